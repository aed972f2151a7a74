"""Several ranks trained in one pass against one training each: losses, memory, and how much faster.

    python -m benchmarks.study --data pairs.jsonl            about 20 minutes on two cores alone
    python -m benchmarks.study --data pairs.jsonl --quick    one repetition, few steps
    python -m benchmarks.study --data pairs.jsonl --prompt summary --answer topic    columns by name

Three things are measured, in processor seconds: steps on small models of random weights, from few tokens per adapter
and pass to many, and whether both ways make the same operations of torch there, as where the adapters take turns; whole
processes on the starter model with short rows, start-up included, one for all ranks against one
for each, both with a worker's settings of the allocator; and in these whether losses and memory are what they should
be. Rows are real text from a file given by path;
for the small models they are random tokens.
"""

import argparse
import logging
import sys
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks import goals, pairs
from benchmarks.fresh import measure
from benchmarks.goals import Goal, middle, paired
from benchmarks.paper import machine
from benchmarks.verdict import markdown
from lora_studio.errors import StudioError

log = logging.getLogger("benchmarks")

RANKS = (1, 2, 4, 8)
EQUAL = 1e-4  # between the losses of a step, fp32
MEMORY = 1.5  # peak of all ranks against the largest single one
FASTER = 2.0  # a step at NEAR tokens per adapter on the small model
WHOLE = 1.5  # start-up included
SLOWEST = 1.0  # at any point: training in one pass is never slower
NEAR = 64  # tokens per adapter and pass
TOKENS = (16, 32, NEAR, 128, 256, 512, 1024, 2048)
ENOUGH, FEWEST = 4096, 6  # tokens, and steps, that are timed for a point of the curve
ROW = 64  # tokens of a random row, at most
RATE = 1e-3
SMALL = {  # 0.3 and 6 million parameters
    "4 layers of 64": {"hidden_size": 64, "intermediate_size": 176, "num_hidden_layers": 4, "num_attention_heads": 4},
    "6 layers of 256": {"hidden_size": 256, "intermediate_size": 688, "num_hidden_layers": 6, "num_attention_heads": 4},
}
VOCABULARY = 1024


def main(arguments: Sequence[str] | None = None) -> int:
    """0 when everything was measured, whether goals are met or not; 1 with a reason on stderr otherwise."""
    options = _options(arguments)
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s", datefmt="%T", stream=sys.stderr)
    logging.getLogger("httpx").setLevel(logging.WARNING)
    print(f"# Study in one pass\n\n{time.strftime('%F')}, {machine()}.\n", flush=True)
    try:
        asked, figures = curves(options)
        more, processes = whole(options)
    except StudioError as error:
        print(f"{error.code}: {error}", file=sys.stderr)
        return 1
    goals.say([*asked, *more])
    goals.finish(options, [*asked, *more], {"curves": figures, "processes": processes})
    return 0


# ---- steps of a small model ------------------------------------------------------------------------------------------


def curves(options: argparse.Namespace) -> tuple[list[Goal], dict[str, Any]]:
    """Speed-up of a step against tokens per adapter and pass, a line for each small model."""
    tokens = (TOKENS[0], NEAR, 512) if options.quick else TOKENS
    found: dict[str, Any] = {}
    for name, shape in SMALL.items():
        spec = {"shape": {**shape, "vocab_size": VOCABULARY}, "tokens": tokens, "steps": options.steps}
        told = {**spec, "repeats": options.repeats, "seed": options.seed}
        found[name] = measure("benchmarks.study:stepped", told, threads=1, as_worker=True)["curve"]
        log.info("%s: done", name)
    lines = [
        [f"{name}: {what}", *(cell(one) for one in curve)]
        for name, curve in found.items()
        for what, cell in {
            "one by one, CPU-ms": lambda one: middle([1000 * spent for spent in one["alone"]], 1),
            "in one pass, CPU-ms": lambda one: middle([1000 * spent for spent in one["together"]], 1),
            "times faster": lambda one: middle(paired(one["alone"], one["together"])),
            "operations that only one pass makes": lambda one: str(one["besides"]),
        }.items()
    ]
    head = [f"step of {len(RANKS)} ranks; tokens per adapter and pass", *map(str, tokens)]
    print(f"{markdown(head, lines)}\n", flush=True)
    asked = []
    for number, (name, curve) in enumerate(found.items()):
        faster = {one["tokens"]: paired(one["alone"], one["together"]) for one in curve}
        if not number:
            text = f"{name}: a step in one pass, {NEAR} tokens per adapter, against one by one"
            asked.append(Goal(text=text, values=faster[NEAR], least=FASTER))
        differ = [faster[one["tokens"]] for one in curve if one["besides"]]
        slowest = min(differ, key=lambda values: Goal(text="", values=values, least=0.0).value)
        text = f"{name}: the slowest point of the curve at which one pass is not the same operations as one by one"
        asked.append(Goal(text=text, values=slowest, least=SLOWEST))
    return asked, found


def stepped(spec: Mapping[str, Any]) -> dict[str, Any]:
    """In a process of its own: {"curve": [{"tokens", "alone", "together"}]}, CPU seconds a step of all ranks."""
    from benchmarks.contenders import base
    from lora_studio.core.lora import LoRA

    lora = LoRA(base({**spec, "model": ""}, "float32", "cpu"))
    curve = []
    for tokens in spec["tokens"]:
        one: dict[str, Any] = {"tokens": tokens, "alone": [], "together": []}
        told = {**spec, "steps": min(spec["steps"], max(FEWEST, ENOUGH // tokens))}
        for number in range(spec["repeats"]):
            for way in ("alone", "together")[:: 1 if number % 2 else -1]:  # no side is always the later
                one[way].append(_race(lora, _random_rows(tokens, spec), way == "together", told)["step_s"])
        rows = _random_rows(tokens, spec)
        together, alone = (_operations(lora, rows, way, {**told, "steps": 2}) for way in (True, False))
        one["besides"] = (together - alone).total()  # none: their times differ by noise alone
        curve.append(one)
    return {"curve": curve}


def _operations(lora: Any, work: Mapping[str, Any], together: bool, spec: Mapping[str, Any]) -> Counter[tuple]:
    """torch's operations in the training of all ranks, with the sizes of the tensors that they take."""
    import torch
    from torch.utils._python_dispatch import TorchDispatchMode
    from torch.utils._pytree import tree_leaves

    made: Counter[tuple] = Counter()

    class Noted(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            made[str(func), *(one.shape for one in tree_leaves(args) if isinstance(one, torch.Tensor))] += 1
            return func(*args, **(kwargs or {}))

    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # a pass beside another would be out of sight
    try:
        with Noted():
            _race(lora, work, together, spec)
    finally:
        torch.set_num_threads(threads)
    return made


def _random_rows(tokens: int, spec: Mapping[str, Any]) -> dict[str, Any]:
    """Rows for each rank: a step takes `tokens` of them, half supervised."""
    import random

    length = min(ROW, tokens)
    draw = random.Random(spec["seed"])
    marks = [False] * (length // 2) + [True] * (length - length // 2)
    rows = [([draw.randrange(VOCABULARY) for _ in range(length)], marks) for _ in range(2 * tokens // length)]
    return {"rows": rows, "batch": tokens // length}


# ---- whole processes -------------------------------------------------------------------------------------------------


def whole(options: argparse.Namespace) -> tuple[list[Goal], dict[str, Any]]:
    """One process for all ranks against one for each, on the real model, start-up included."""
    from lora_studio.models import ModelLibrary
    from lora_studio.studio import default_root

    tokenizer = ModelLibrary(default_root()).tokenizer(options.model)
    conversations = pairs.examples(options.data, options.prompt, options.answer)
    rows = pairs.rows(tokenizer, conversations, options.shortest, options.longest, options.rows)
    tokens = options.batch * sum(len(ids) for ids, _ in rows) / len(rows)
    spec = {"model": options.model, "rows": rows, "batch": options.batch, "steps": options.steps, "seed": options.seed}
    asked, figures, lines = [], {}, []
    for precision in ("float32", "bfloat16"):
        together, alone = [], []
        for _ in range(options.repeats):
            told = {**spec, "precision": precision}
            together.append(measure("benchmarks.study:raced", {**told, "ranks": RANKS}, as_worker=True))
            ones = [{**told, "ranks": [rank]} for rank in RANKS]
            alone.append([measure("benchmarks.study:raced", one, as_worker=True) for one in ones])
            log.info("%s: %.0f CPU-s in one", precision, together[-1]["process_cpu_s"])
        one = _processes(together, alone)
        figures[precision] = one
        lines.append(
            [
                precision,
                middle(one["alone_cpu_s"], 1),
                middle(one["together_cpu_s"], 1),
                middle(paired(one["alone_cpu_s"], one["together_cpu_s"])),
                middle(paired(one["alone_wall_s"], one["together_wall_s"])),
                middle(one["memory"]),
                f"{one['apart']:.1e}",
            ]
        )
        if precision == "float32":
            text = f"largest difference of a step's loss, fp32, {options.steps} steps, {len(RANKS)} ranks"
            asked.append(Goal(text=text, values=[one["apart"]], most=EQUAL, unit="nats"))
        text = f"{precision}: peak memory of {len(RANKS)} ranks in one pass / of the largest alone"
        asked.append(Goal(text=text, values=one["memory"], most=MEMORY))
        faster = paired(one["alone_cpu_s"], one["together_cpu_s"])
        text = f"{precision}: processor time of {len(RANKS)} processes / of one for all ranks, start-up included"
        asked.append(Goal(text=text, values=faster, least=WHOLE))
    head = ["processes", "4, CPU-s", "1, CPU-s", "times less", "wall, times less", "memory", "losses apart"]
    print(f"{markdown(head, lines)}\n", flush=True)
    print(
        f"Model {options.model}, ranks {', '.join(map(str, RANKS))} on q and v, {options.steps} steps of "
        f"{options.batch} rows of {options.shortest} to {options.longest} tokens: {tokens:.0f} tokens per adapter and "
        f"pass; {options.repeats} repetitions, 2 threads, median (least–most). Losses apart: the largest difference of "
        "any step.\n"
    )
    return asked, figures


def _processes(together: Sequence[Mapping[str, Any]], alone: Sequence[Sequence[Mapping[str, Any]]]) -> dict[str, Any]:
    """The figures of one precision, a value per repetition."""
    apart = max(
        abs(one - other)
        for answer, ones in zip(together, alone, strict=True)
        for ours, theirs in zip(answer["losses"], ones, strict=True)
        for one, other in zip(ours, theirs["losses"][0], strict=True)
    )
    return {
        "together_cpu_s": [answer["process_cpu_s"] for answer in together],
        "alone_cpu_s": [sum(one["process_cpu_s"] for one in ones) for ones in alone],
        "together_wall_s": [answer["process_wall_s"] for answer in together],
        "alone_wall_s": [sum(one["process_wall_s"] for one in ones) for ones in alone],
        "memory": [
            answer["peak_bytes"] / max(one["peak_bytes"] for one in ones)
            for answer, ones in zip(together, alone, strict=True)
        ],
        "apart": apart,
    }


def raced(spec: Mapping[str, Any]) -> dict[str, Any]:
    """In a process of its own: load the model and train spec["ranks"], together where they are several."""
    from benchmarks.fresh import peak_bytes
    from lora_studio.core.lora import LoRA
    from lora_studio.models import ModelLibrary
    from lora_studio.studio import default_root

    lora = LoRA(ModelLibrary(default_root()).load(spec["model"], precision=spec["precision"], on="cpu"))
    before = peak_bytes()  # training may reset the system's own note of it
    found = _race(lora, spec, True, spec, spec["ranks"])
    return {"losses": found["losses"], "peak_bytes": max(before, peak_bytes())}


def _race(
    lora: Any, work: Mapping[str, Any], together: bool, spec: Mapping[str, Any], ranks: Sequence[int] = RANKS
) -> dict[str, Any]:
    """Train fresh adapters of these ranks: {"losses": a list per rank, "step_s": CPU seconds a step of all of them}."""
    from lora_studio.core.lean import Tokens
    from lora_studio.core.spec import LoraSpec
    from lora_studio.data.batches import Encoded
    from lora_studio.events import Metric
    from lora_studio.settings import TrainConfig
    from lora_studio.train import Job, train_together

    rows = [Encoded(Tokens(ids, marks), 0) for ids, marks in work["rows"]]
    jobs = []
    for rank in ranks:
        lora.add(f"r{rank}", LoraSpec(rank=rank, alpha=2.0 * rank), seed=spec["seed"])
        config = TrainConfig(
            steps=spec["steps"],
            batch_size=work["batch"],
            learning_rate=RATE,
            evaluations=1,
            samples=0,
            seed=spec["seed"] + rank,  # each its own order of the rows
        )
        jobs.append(Job(lora=lora, adapter=f"r{rank}", tokenizer=None, train=rows, heldout=(), config=config))
    losses: list[list[float]] = [[] for _ in ranks]
    spent = 0.0
    for first, group in enumerate([jobs] if together else [[job] for job in jobs]):
        start = stop = 0.0
        for index, event in train_together(group):
            if isinstance(event, Metric) and "train_loss" in event.values:
                losses[first + index].append(event.values["train_loss"])
                stop = time.process_time()
                start = stop if event.step == 1 else start  # the first step warms up
        spent += (stop - start) / (spec["steps"] - 1)
    for rank in ranks:
        lora.remove(f"r{rank}")
    return {"losses": losses, "step_s": spent}


# ---- options ---------------------------------------------------------------------------------------------------------


def _options(arguments: Sequence[str] | None) -> argparse.Namespace:
    summary, _, usage = (__doc__ or "").partition("\n\n")
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.study",
        description=summary,
        epilog=usage,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--data", type=Path, required=True, help="a file of prompt and answer pairs")
    parser.add_argument("--prompt", default="", help="column of the prompts; else as the app guesses")
    parser.add_argument("--answer", default="", help="column of the answers")
    parser.add_argument("--model", default="starter", help="a name or a folder")
    parser.add_argument("--shortest", type=int, default=16, help="tokens of the shortest row")
    parser.add_argument("--longest", type=int, default=80, help="tokens of the longest row")
    parser.add_argument("--rows", type=int, default=40, help="rows of the real model's trainings")
    parser.add_argument("--batch", type=int, default=1, help="rows of a step of the real model's trainings")
    parser.add_argument("--steps", type=int, default=30, help="of every training")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--quick", action="store_true", help="one repetition, few steps")
    parser.add_argument("--json", action="store_true", help="end with one line of JSON")
    options = parser.parse_args(arguments)
    if options.quick:
        options.repeats, options.steps = 1, 5
    return options


if __name__ == "__main__":
    sys.exit(main())
