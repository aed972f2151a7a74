"""Ours against PEFT + Trainer, TRL's SFTTrainer and full fine-tuning: speed per processor second and peak memory.

    python -m benchmarks.training --data pairs.jsonl                  about half an hour on two cores alone
    python -m benchmarks.training --data pairs.jsonl --quick          one repetition of one timed step
    python -m benchmarks.training --data pairs.jsonl --forecast       memory forecast against measured peaks
    python -m benchmarks.training --data pairs.jsonl --parity         bf16 against fp32; ours against a plain loop
    python -m benchmarks.training --data pairs.jsonl --device cuda    random weights of 1.5 B and 8 B parameters

Every training runs in a process of its own, on the same batches in the same order, from the same adapter; the ways take
turns, so that the machine's drift hits all alike. Ours has the allocator settings of the app's worker, as a run of the
app does, with --alike every way has them. Steps alone are timed, behind one that warms up. Tables are Markdown on
stdout, progress goes to stderr. benchmarks/requirements.txt names what the others need.
"""

import argparse
import logging
import math
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks import goals, pairs, work
from benchmarks.fresh import measure
from benchmarks.goals import Goal, middle, paired
from benchmarks.paper import machine
from benchmarks.verdict import markdown
from lora_studio.errors import StudioError

log = logging.getLogger("benchmarks")


@dataclass(frozen=True)
class Way:
    """One line of the table: what `contenders.trained` is asked to do."""

    label: str
    way: str
    precision: str
    packed: bool = False
    defaults: bool = False


WAYS = {
    "ours32": Way("ours, fp32", "ours", "float32"),
    "ours16": Way("ours, bf16", "ours", "bfloat16"),
    "peft32": Way("PEFT + Trainer, fp32", "peft", "float32"),
    "peft16": Way("PEFT + Trainer, bf16 autocast", "peft", "bfloat16"),
    "sft": Way("TRL SFTTrainer, fp32", "sft", "float32"),
    "sft-packed": Way("TRL SFTTrainer packed, fp32", "sft", "float32", packed=True),
    "sft-defaults": Way("TRL SFTTrainer, its bf16 and checkpointing", "sft", "bfloat16", defaults=True),
    "full": Way("full fine-tuning, Trainer, fp32", "full", "float32"),
}
SIZES = ("1.5 B", "8 B")  # of the random models of `cuda`
USUAL = tuple(name for name in WAYS if name != "sft-defaults")
# Goals on two CPU cores: ours, theirs, supervised tokens per CPU second at least so many times theirs.
SPEED = [
    ("ours32", "peft32", 1.7),
    ("ours16", "peft32", 2.75),
    ("ours16", "peft16", 1.8),
    ("ours16", "sft-packed", 3.3),
    ("ours16", "full", 4.3),
]
MEMORY = [("ours16", "peft32", 0.28), ("ours16", "full", 0.19)]  # peak at most this share of theirs
OF_PEAK = {"ours32": 0.70, "ours16": 0.60}  # least fraction of the measured matrix rate


def main(arguments: Sequence[str] | None = None) -> int:
    """0 when all that was asked came out, whether goals are met or not; 1 with a reason on stderr otherwise."""
    options = _options(arguments)
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s", datefmt="%T", stream=sys.stderr)
    logging.getLogger("httpx").setLevel(logging.WARNING)
    try:
        if options.forecast:
            from benchmarks import forecast

            return forecast.run(options)
        if options.parity:
            from benchmarks import parity

            return parity.run(options)
        if options.device == "cuda":
            from benchmarks import cuda

            return cuda.run(options)
        return on_cpu(options)
    except StudioError as error:
        print(f"{error.code}: {error}", file=sys.stderr)
        return 1


# ---- on a CPU --------------------------------------------------------------------------------------------------------


def on_cpu(options: argparse.Namespace) -> int:
    """The table of the starter model on real text."""
    print(f"# Training\n\n{time.strftime('%F')}, {machine()}.\n", flush=True)
    with tempfile.TemporaryDirectory(prefix="lora-studio-bench-") as folder:
        spec, sizes = prepared(options, Path(folder))
        print(f"{in_words(spec, options)}\n", flush=True)
        runs = {name: list[dict[str, Any]]() for name in options.only}
        peaks: dict[str, list[float]] = {"float32": [], "bfloat16": []}
        for name, answer in turns(spec, options):
            if name in peaks:
                peaks[name].append(answer["rate"])
            else:
                runs[name].append(answer)
    found = {name: summary(spec, sizes, answers, WAYS[name], peaks) for name, answers in runs.items()}
    print(table(found))
    print(f"\n{losses(found)}\n")
    print(rates(peaks))
    reached = on_two_cores(found)
    goals.say(reached)
    goals.finish(options, reached, {"ways": found, "matrix_rate": peaks})
    return 0


def prepared(options: argparse.Namespace, folder: Path) -> tuple[dict[str, Any], dict[str, int]]:
    """What every process is told (model, rows, batches), and the sizes of the model. Writes the first adapter."""
    from lora_studio.models import ModelLibrary
    from lora_studio.studio import default_root

    library = ModelLibrary(default_root())
    library.fetch(options.model)
    spec = told(options, options.batch, folder)
    begun = measure("benchmarks.contenders:start", spec)
    return spec, work.sizes_of(library.skeleton(options.model), begun["trainable"])


def told(options: argparse.Namespace, batch: int, folder: Path) -> dict[str, Any]:
    """What every process is told: the rows in batches of `batch`, by the model's tokenizer."""
    from lora_studio.models import ModelLibrary
    from lora_studio.studio import default_root

    steps = options.warmup + options.steps
    every = pairs.rows(
        ModelLibrary(default_root()).tokenizer(options.model),
        pairs.examples(options.data, options.prompt, options.answer),
        options.shortest,
        options.longest,
        steps * batch,
    )
    return {
        "model": options.model,
        "tokenizer": options.model,
        "rows": every,
        "batches": pairs.batches(every, batch, steps, options.seed),
        "warmup": options.warmup,
        "device": options.device,
        "seed": options.seed,
        "adapter": str(folder / "adapter"),
        "folder": str(folder / "trainer"),
    }


def turns(spec: Mapping[str, Any], options: argparse.Namespace) -> Iterator[tuple[str, dict[str, Any]]]:
    """Every way once a round, each round beginning with another; the matrix rates are measured in between."""
    from lora_studio.models import ModelLibrary
    from lora_studio.studio import default_root

    skeleton = ModelLibrary(default_root()).skeleton(options.model)
    timed = spec["batches"][spec["warmup"] :]
    tokens = round(statistics.fmean(sum(len(ids) for ids, _ in batch) for batch in timed))
    supervised = round(statistics.fmean(sum(sum(marks[1:]) for _, marks in batch) for batch in timed))
    shapes = [(*shape, count) for shape, count in work.shapes_of(skeleton, tokens, supervised).items()]
    names = list(options.only)
    for number in range(options.repeats):
        for precision in ("float32", "bfloat16"):
            asked = {"shapes": shapes, "precision": precision, "device": "cpu"}
            yield precision, measure("benchmarks.work:matrix_rate", asked)
        first = number * len(names) // options.repeats
        for name in names[first:] + names[:first]:
            way = WAYS[name]
            asked = {**spec, "way": way.way, "precision": way.precision}
            asked |= {"packed": way.packed, "defaults": way.defaults}
            worker = options.alike or way.way == "ours"  # a run of the app is one
            answer = measure("benchmarks.contenders:trained", asked, as_worker=worker)
            spent = sum(step["cpu_s"] for step in answer["steps"])
            log.info("%d %s: %.1f CPU-s, %.0f MB", number + 1, name, spent, answer["peak_bytes"] / 1e6)
            yield name, answer


def summary(
    spec: Mapping[str, Any],
    sizes: Mapping[str, int],
    answers: Sequence[Mapping[str, Any]],
    way: Way,
    peaks: Mapping[str, Sequence[float]],
    seconds: str = "cpu_s",
) -> dict[str, Any]:
    """The figures of one way, a value per repetition: speed, peak, losses, and the fraction of the matrix rate."""
    total = [sum(step[seconds] for step in answer["steps"]) for answer in answers]
    counted = {name: sum(step[name] for step in answers[0]["steps"]) for name in ("supervised", "real", "processed")}
    timed = spec["batches"][spec["warmup"] :]
    share = counted["supervised"] / sum(sum(marks[1:]) for batch in timed for _, marks in batch)  # packing differs
    operations = share * sum(work.useful(sizes, batch) for batch in timed)
    rate = peaks[way.precision] if way.way != "full" else [math.inf] * len(total)  # it does more than is counted
    return {
        "label": way.label,
        "seconds": total,
        "speed": [counted["supervised"] / one for one in total],
        "real_speed": [counted["real"] / one for one in total],
        "peak_bytes": [answer["peak_bytes"] for answer in answers],
        "losses": [step["loss"] for step in answers[0]["steps"]],
        "of_peak": [operations / one / most for one, most in zip(total, rate, strict=True)],
        **counted,
    }


def table(found: Mapping[str, Mapping[str, Any]]) -> str:
    """A line per way; medians over the repetitions, with the smallest and largest."""
    head = ["way", "s", "supervised tokens / s", "real tokens / s", "processed / real", "peak MB", "of matrix rate"]
    lines = [
        [
            one["label"],
            middle(one["seconds"], 1),
            middle(one["speed"], 1),
            middle(one["real_speed"], 1),
            f"{one['processed'] / one['real']:.2f}",
            middle([peak / 1e6 for peak in one["peak_bytes"]], 0),
            middle(one["of_peak"]) if any(one["of_peak"]) else "–",
        ]
        for one in found.values()
    ]
    return markdown(head, lines)


def losses(found: Mapping[str, Mapping[str, Any]]) -> str:
    """The loss of every timed step, so that it is seen that all do the same work."""
    most = max(len(one["losses"]) for one in found.values())
    lines = [
        [one["label"], *(f"{loss:.5f}" for loss in one["losses"]), *[""] * (most - len(one["losses"]))]
        for one in found.values()
    ]
    return markdown(["loss of timed step", *(str(number + 1) for number in range(most))], lines)


def rates(peaks: Mapping[str, Sequence[float]]) -> str:
    """The matrix rates in words."""
    said = [f"{name} {middle([one / 1e9 for one in values], 0)}" for name, values in peaks.items() if values]
    return f"Matrix products of the model's own shapes, GFLOP per CPU-second: {', '.join(said)}.\n"


def on_two_cores(found: Mapping[str, Mapping[str, Any]]) -> list[Goal]:
    """What was asked of the starter model on two CPU cores, as far as both sides were measured."""
    asked = []
    for ours, theirs, least in SPEED:
        if ours in found and theirs in found:
            text = f"supervised tokens per CPU second, {found[ours]['label']} / {found[theirs]['label']}"
            asked.append(Goal(text=text, values=paired(found[ours]["speed"], found[theirs]["speed"]), least=least))
    for ours, theirs, most in MEMORY:
        if ours in found and theirs in found:
            text = f"peak memory, {found[ours]['label']} / {found[theirs]['label']}"
            shares = paired(found[ours]["peak_bytes"], found[theirs]["peak_bytes"])
            asked.append(Goal(text=text, values=shares, most=most))
    for ours, least in OF_PEAK.items():
        if ours in found:
            text = f"fraction of the measured matrix rate, {found[ours]['label']}"
            asked.append(Goal(text=text, values=found[ours]["of_peak"], least=least, unit="of it"))
    return asked


def in_words(spec: Mapping[str, Any], options: argparse.Namespace) -> str:
    """What was trained on what, for the reader of the table."""
    timed = spec["batches"][spec["warmup"] :]
    real = [sum(len(ids) for ids, _ in batch) for batch in timed]
    padded = [len(batch) * max(len(ids) for ids, _ in batch) for batch in timed]
    supervised = [sum(sum(marks[1:]) for _, marks in batch) for batch in timed]
    from importlib.metadata import distributions

    installed = {one.name: one.version for one in distributions()}
    versions = ", ".join(f"{name} {installed.get(name, 'not installed')}" for name in ("peft", "trl", "accelerate"))
    return (
        f"Model {options.model}, LoRA r=8 alpha=16 on q and v, AdamW at a constant 2e-4 (full fine-tuning 2e-5), "
        f"batches of {options.batch} rows of {options.shortest} to {options.longest} tokens from {options.data.name}: "
        f"{statistics.fmean(real):.0f} real, {statistics.fmean(padded):.0f} padded, {statistics.fmean(supervised):.0f} "
        f"supervised tokens a step. {len(timed)} timed steps behind {spec['warmup']} that warm up, {options.repeats} "
        "repetitions in turn; s are CPU seconds of 2 threads; median (least–most). SFTTrainer: "
        "gradient_checkpointing=False and bf16=False as for Trainer (its defaults are True), packing up to 1024 "
        "tokens, two packed rows a step, all else its defaults. "
        f"{'All run' if options.alike else 'Ours runs'} with the allocator settings of the app's worker. {versions}."
    )


# ---- options ---------------------------------------------------------------------------------------------------------


def _options(arguments: Sequence[str] | None) -> argparse.Namespace:
    summary, _, usage = (__doc__ or "").partition("\n\n")
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.training",
        description=summary,
        epilog=usage,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--data", type=Path, required=True, help="a file of prompt and answer pairs")
    parser.add_argument("--prompt", default="", help="column of the prompts; else as the app guesses")
    parser.add_argument("--answer", default="", help="column of the answers")
    parser.add_argument("--model", default="starter", help="a name or a folder")
    parser.add_argument("--only", type=_names, default=USUAL, help=f"ways to compare, of {', '.join(WAYS)}")
    parser.add_argument("--sizes", type=_sizes, default=SIZES, help=f"models on CUDA, of {', '.join(SIZES)}")
    parser.add_argument("--batch", type=int, help="rows a step; 8, on CUDA 16")
    parser.add_argument("--steps", type=int, help="timed steps; 2, on CUDA 10")
    parser.add_argument("--warmup", type=int, help="steps before them; 1, on CUDA 12, in which passes are recorded")
    parser.add_argument("--repeats", type=int, default=3, help="fresh processes of each way")
    parser.add_argument("--shortest", type=int, default=60, help="tokens of the shortest row")
    parser.add_argument("--longest", type=int, default=330, help="tokens of the longest row")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument(
        "--forecast",
        nargs="?",
        const="lora",
        choices=("lora", "methods"),
        help="memory forecast against measured peaks, of LoRA or of its variants and other methods",
    )
    parser.add_argument("--parity", action="store_true", help="losses of bf16 against fp32, and against a plain loop")
    parser.add_argument("--alike", action="store_true", help="the allocator settings of the app's worker for every way")
    parser.add_argument("--quick", action="store_true", help="one repetition and few steps")
    parser.add_argument("--json", action="store_true", help="end with one line of JSON")
    options = parser.parse_args(arguments)
    usual = (None, 10, 12) if options.device == "cuda" and not options.parity else (8, 2, 1)
    options.batch, options.steps, options.warmup = (
        given or one for given, one in zip((options.batch, options.steps, options.warmup), usual, strict=True)
    )
    if options.quick:
        options.repeats, options.steps = 1, 1
    return options


def _sizes(text: str) -> tuple[str, ...]:
    sizes = tuple(one.strip() for one in text.split(","))
    if set(sizes) - set(SIZES):
        raise argparse.ArgumentTypeError(f"sizes are {', '.join(SIZES)}, got {text!r}")
    return sizes


def _names(text: str) -> tuple[str, ...]:
    names = tuple(text.replace(" ", "").split(","))
    if set(names) - set(WAYS):
        raise argparse.ArgumentTypeError(f"ways are {', '.join(WAYS)}, got {text!r}")
    return names


if __name__ == "__main__":
    sys.exit(main())
