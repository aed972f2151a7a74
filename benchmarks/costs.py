"""Tables g and h: milliseconds and bytes, on the starter model."""

import statistics
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any

import torch

from benchmarks import published
from benchmarks.quality import TEXT
from benchmarks.report import Report, Scale
from benchmarks.trials import NAME, Bench, Trial, label
from benchmarks.verdict import Claim, judge, measured, median_noise
from lora_studio import adapters
from lora_studio.core import baselines
from lora_studio.core.lora import LoRA
from lora_studio.core.merge import merged
from lora_studio.train import train

LEVEL = 0.02  # merged LoRA within 2 % of the base model counts as no added latency
TASKS = 100  # of the paper's example of one base and many adapters


# ---- table g -----------------------------------------------------------------------------------------------------


def latency(bench: Bench, scale: Scale) -> Report:
    """Table 1 of the paper."""
    report = Report(letter="g", title="Latency of one forward pass, starter model (the paper's Table 1, GPT-2 medium)")
    lora = bench.lora("e2e", "float32")
    names = ("lora", "adapter_h", "adapter_l")
    for name in names:
        baselines.add(lora, name, TEXT[name])
        with torch.no_grad():
            for tensor in lora.parameters(name):
                tensor.normal_(0, 0.02)  # a trained adapter has no zeros
    ways: dict[str, Callable[[], AbstractContextManager]] = {
        "base model": lora.unhooked,
        "LoRA merged": lambda: _merged(lora),
        "LoRA unmerged": lambda: lora.use("lora"),
        "adapter H": lambda: lora.use("adapter_h"),
        "adapter L": lambda: lora.use("adapter_l"),
    }
    try:
        for batch, tokens in scale.shapes:
            times = interleaved(lora, ways, batch, tokens, scale.rounds)
            report.figures[f"{batch}x{tokens}"] = {way: statistics.median(values) for way, values in times.items()}
            _latency_table(report, (batch, tokens), times)
    finally:
        for name in names:
            lora.remove(name)
    budgets = ", ".join(f"{label(TEXT[name])}" for name in names)
    report.settings += [
        f"{budgets}: about 0.46 million parameters each. Medians of {scale.rounds} rounds; a round measures every way",
        "once, in turn and in one process, so that the machine's drift hits all alike; ratios are medians of the",
        f"rounds' own ratios to merged. float32, in which the app answers on a CPU, {torch.get_num_threads()} threads;",
        "logits of the last token only. All three adapters stay hooked while a way of use is timed, so an unmerged",
        "way also pays the idle hooks of the others; base and merged are timed without hooks.",
    ]
    return report


def interleaved(
    lora: LoRA, ways: Mapping[str, Callable[[], AbstractContextManager]], batch: int, tokens: int, rounds: int
) -> dict[str, list[float]]:
    """Milliseconds of a forward pass in every way, round by round; each round begins with another way."""
    generator = torch.Generator().manual_seed(0)
    vocabulary = lora.model.get_input_embeddings().num_embeddings
    ids = torch.randint(vocabulary, (batch, tokens), generator=generator)
    times: dict[str, list[float]] = {way: [] for way in ways}
    order = list(ways)
    for number in range(rounds + 1):  # the first is warm-up
        for way in order[number % len(order) :] + order[: number % len(order)]:
            with ways[way](), torch.inference_mode():
                start = time.perf_counter()
                lora.model(input_ids=ids, use_cache=False, logits_to_keep=1)
                spent = time.perf_counter() - start
            if number:
                times[way].append(1000 * spent)
    return times


@contextmanager
def _merged(lora: LoRA) -> Iterator[None]:
    """LoRA folded into the weights and no hook left."""
    with merged(lora, "lora"), lora.unhooked():
        yield


def _latency_table(report: Report, shape: tuple[int, int], times: dict[str, list[float]]) -> None:
    ratios = {
        way: [one / other for one, other in zip(values, times["LoRA merged"], strict=True)]
        for way, values in times.items()
    }
    middle = {way: statistics.median(values) for way, values in ratios.items()}
    paper = published.LATENCY.get(shape, {})
    names = {"adapter H": "adapter_h", "adapter L": "adapter_l"}
    lines = [
        [
            way,
            f"{statistics.median(values):.1f}",
            f"{middle[way]:.3f} ± {median_noise(ratios[way]) or 0:.3f}",
            f"{paper[names[way]]:.3f}" if way in names and paper else "1" if way == "LoRA merged" else "–",
        ]
        for way, values in times.items()
    ]
    report.add_table([f"batch {shape[0]}, {shape[1]} tokens", "ms", "against merged", "paper"], lines)
    report.ratios |= {
        f"g {way} / merged, {shape[0]}x{shape[1]}": value for way, value in middle.items() if way != "LoRA merged"
    }
    if paper:
        report.claims += [_no_latency(middle["base model"], median_noise(ratios["base model"]))]
        report.claims += [
            measured(
                f"{way} adds latency at batch {shape[0]} and {shape[1]} tokens.",
                middle[way],
                median_noise(ratios[way]),
                floor=1.0,
                unit="times merged LoRA",
                paper=f"{paper[name]:.3f} times, on a GPU",
            )
            for way, name in names.items()
        ]


def _no_latency(ratio: float, noise: float | None) -> Claim:
    distance = abs(ratio - 1)
    return Claim(
        text=f"Merged LoRA adds no latency: the base model takes the same time within {LEVEL:.0%}.",
        judgement=judge(LEVEL - distance, noise),
        ours=f"the base model takes {ratio:.3f} ± {noise or 0:.3f} times as long",
        paper="none by construction",
    )


# ---- table h -----------------------------------------------------------------------------------------------------


def sizes(bench: Bench, scale: Scale) -> Report:
    """Section 4.2 of the paper."""
    report = Report(
        letter="h", title="Bytes of the checkpoint and of training, starter model (the paper's section 4.2)"
    )
    lora = bench.lora("e2e", "float32")
    weights = sum(tensor.numel() * tensor.element_size() for tensor in lora.model.parameters())
    found = {
        name: measure(bench, lora, name, scale.text_batch)
        for name in ("full", *(one for one in scale.text if one != "full"))
    }
    lines = []
    for name, one in found.items():
        # Elsewhere full fine-tuning trains the weights in place; the app's copies beside the base are not counted.
        frozen = 0 if name == "full" else weights
        one["training"] = frozen + one["masters"] + one["gradients"] + one["optimizer"] + one["activations"]
        full = found["full"]
        lines.append(
            [
                label(TEXT[name]),
                f"{one['trainable']:,}",
                _mb(one["checkpoint"]),
                f"{full['checkpoint'] / one['checkpoint']:,.0f}",
                _mb(one["masters"] + one["gradients"] + one["optimizer"]),
                _mb(one["activations"]),
                _mb(one["training"]),
                f"{full['training'] / one['training']:.2f}",
            ]
        )
    head = ["MB", "trained", "checkpoint", "times smaller", "masters, gradients, Adam", "saved activations"]
    report.add_table([*head, "training, base included", "times smaller"], lines)
    report.figures |= found
    full, ours = found["full"], found["lora"]
    many = TASKS * full["checkpoint"] / (weights + TASKS * ours["checkpoint"])
    report.ratios |= {
        "h checkpoint full / lora": full["checkpoint"] / ours["checkpoint"],
        "h training full / lora": full["training"] / ours["training"],
        "h activations full / lora": full["activations"] / ours["activations"],
        f"h {TASKS} tasks full / lora": many,
    }
    report.figures |= {"base_bytes": weights, f"{TASKS}_tasks_times_smaller": many}
    _size_claims(report)
    report.settings += [
        f"Everything in float32: the files that the app writes, and one step of {scale.text_batch} rows of E2E:",
        "the optimizer's own tensors, and every tensor that autograd saves, once per storage, without",
        f"parameters. {TASKS} tasks are one base ({_mb(weights)} MB) and {TASKS} adapters:",
        f"{_mb(weights + TASKS * ours['checkpoint'])} MB against {_mb(TASKS * full['checkpoint'])} MB.",
    ]
    return report


def _size_claims(report: Report) -> None:
    claims = (
        (
            "The checkpoint is at least 100 times smaller.",
            "h checkpoint full / lora",
            100,
            published.CHECKPOINT_TIMES_SMALLER,
        ),
        ("Training takes a third of the memory.", "h training full / lora", 3, published.TRAINING_MEMORY_TIMES_SMALLER),
        (
            f"{TASKS} tasks take at least 50 times less room.",
            f"h {TASKS} tasks full / lora",
            50,
            published.HUNDRED_TASKS_TIMES_SMALLER,
        ),
    )
    for text, name, floor, paper in claims:
        times = f"{paper:,.1f} times, GPT-3 with rank 4" if paper < 1000 else f"{paper:,} times, GPT-3 with rank 4"
        report.claims.append(measured(text, report.ratios[name], 0.0, floor=floor, unit="times", paper=times))


def measure(bench: Bench, lora: LoRA, name: str, batch: int) -> dict[str, Any]:
    """Bytes of one method: its files, what one step holds beside the base, and what autograd saves for the backward."""
    method = TEXT[name]
    baselines.add(lora, NAME, method)
    try:
        job = bench.job(Trial(task="e2e", method=method, rate=1e-6, steps=1, batch=batch), lora)
        known = {tensor.untyped_storage().data_ptr() for tensor in (*lora.model.parameters(), *lora.parameters(NAME))}
        saved: dict[int, int] = {}
        with torch.autograd.graph.saved_tensors_hooks(_counter(saved, known), lambda tensor: tensor):
            for _ in train(job):
                pass
        trained = lora.parameters(NAME)
        with tempfile.TemporaryDirectory() as folder:
            adapters.save(lora, NAME, Path(folder) / NAME, bench.models["e2e"])
            checkpoint = sum(file.stat().st_size for file in Path(folder).rglob("*") if file.is_file())
    finally:
        lora.remove(NAME)
    held = sum(tensor.numel() * tensor.element_size() for tensor in trained)
    states = [one for state in job.optimizer.state.values() for one in state.values() if torch.is_tensor(one)]
    return {
        "trainable": sum(tensor.numel() for tensor in trained),
        "checkpoint": checkpoint,
        "masters": held,
        "gradients": held,  # one of its size for each, in its dtype
        "optimizer": sum(tensor.numel() * tensor.element_size() for tensor in states),
        "activations": sum(saved.values()),
    }


def _counter(saved: dict[int, int], known: set[int]) -> Callable[[torch.Tensor], torch.Tensor]:
    """A pack hook that notes each storage once; it is kept alive until the backward, so that no address comes twice."""

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in known:
            saved[storage.data_ptr()] = storage.nbytes()
        return tensor

    return pack


def _mb(bytes_: float) -> str:
    return f"{bytes_ / 1e6:,.1f}"
