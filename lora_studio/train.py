"""Training as a generator of events: train(job) yields, the caller decides what happens to each event.

There are no callbacks and there is no file code here. To stop, stop pulling; between two events the weights
are consistent, so that is when a caller saves. Same job, same seed: same events. Any method trains in the same
way, LoRA or one of the paper's others, and so does a classifier: its rows carry a label instead of an answer.
"""

import math
import random
import resource
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from lora_studio.core import lean
from lora_studio.core.lora import LoRA
from lora_studio.data.batches import Encoded, encode_label, prompt_ids
from lora_studio.data.formats import Example
from lora_studio.errors import StudioError
from lora_studio.events import Event, Metric, Sample, Started, Warned
from lora_studio.generate import Sampling, answers
from lora_studio.models import parameter_count
from lora_studio.settings import QUANTISED, TrainConfig

HELDOUT_TOKENS = 2_048  # of held-out text measured at each evaluation
SAMPLE_TOKENS = 48  # longest answer in the sample timeline


@dataclass(kw_only=True)
class Job:
    """Everything that one training needs, loaded: the adapter is attached and fresh.

    classes: the names of the labels, where the rows carry labels.
    """

    lora: LoRA
    adapter: str
    tokenizer: Any
    train: Sequence[Encoded]
    heldout: Sequence[Encoded]
    samples: Sequence[Example] = ()
    classes: Sequence[str] = ()
    config: TrainConfig
    optimizer: torch.optim.Optimizer = field(init=False)

    def __post_init__(self) -> None:
        config = self.config
        groups = self.lora.groups(self.adapter, config.lr_ratio_b)
        fused = groups[0]["params"][0].device.type in ("cuda", "cpu")
        self.optimizer = torch.optim.AdamW(
            groups, lr=config.learning_rate, weight_decay=config.weight_decay, fused=fused
        )


def train(job: Job) -> Iterator[Event]:
    """Train one adapter; the first event is Started, step 0 measures the base model.

    Raises E_NO_TARGET when no training row has a token to learn from and E_NOT_FINITE when the loss or the
    gradient stops being a number.
    """
    config, lora = job.config, job.lora
    rows = [one.tokens for one in job.train if one.tokens.count]
    if not rows:
        raise StudioError("E_NO_TARGET", "No training row has a token to learn from.", "Raise the length limit.")
    steps = config.total_steps(len(rows))
    parameters = lora.parameters(job.adapter)
    first = next(lora.model.parameters())
    total = parameter_count(lora.model)
    usual = config.usual_rate(total, getattr(lora.specs[job.adapter], "kind", "lora"))
    yield Started(
        steps=steps,
        trainable=sum(tensor.numel() for tensor in parameters),
        total=total,
        device=str(first.device),
        precision=config.precision if config.precision in QUANTISED else str(first.dtype).removeprefix("torch."),
        train_rows=len(rows),
        heldout_rows=len(_measured(job)),
    )
    if config.learning_rate > 2 * usual:
        message = (
            f"A learning rate of {config.learning_rate:g} is high for this model and method; {usual:.1g} is usual."
        )
        yield Warned(step=0, code="W_RATE", message=message)
    torch.manual_seed(config.seed)  # dropout's
    measure_at = measured_steps(config, steps)
    yield from _measure(job, step=0)
    clock, seen = time.monotonic(), 0
    for step, batch in enumerate(_batches(rows, config, steps), start=1):
        rate = config.learning_rate * schedule(config, step, steps)
        for group in job.optimizer.param_groups:
            group["lr"] = rate * group["ratio"]
        loss, norm = _step(job, parameters, batch)
        seen += sum(len(tokens.ids) for tokens in batch)
        elapsed = time.monotonic() - clock
        yield Metric(
            step=step,
            values={
                "train_loss": loss,
                "learning_rate": rate,
                "grad_norm": norm,
                "tokens_per_s": seen / elapsed,
                "seconds_left": elapsed / step * (steps - step),
                "memory_bytes": peak_memory(first.device),
            },
        )
        if not (math.isfinite(loss) and math.isfinite(norm)):
            raise StudioError(
                "E_NOT_FINITE",
                f"The loss stopped being a number at step {step}.",
                f"Lower the learning rate, for instance to {config.learning_rate / 10:g}.",
            )
        if step in measure_at:
            paused = time.monotonic()
            yield from _measure(job, step)
            clock += time.monotonic() - paused  # measuring is not training


def heldout_loss(job: Job) -> float | None:
    """Mean loss of the held-out rows under the job's adapter; None when nothing is held out."""
    return heldout_figures(job).get("heldout_loss")


def heldout_figures(job: Job, *, base: bool = False) -> dict[str, float]:
    """heldout_loss, and the accuracy where rows carry labels, under the job's adapter or of the base model.

    {} when nothing is held out.
    """
    rows = _measured(job)
    if not rows:
        return {}
    with job.lora.use(None if base else job.adapter):
        found = figures(job.lora, rows)
    return {"heldout_loss" if name == "loss" else name: value for name, value in found.items()}


def measured_steps(config: TrainConfig, steps: int) -> frozenset[int]:
    """The steps after which the held-out loss is measured and samples are answered; the last is among them."""
    return frozenset(math.ceil(steps * part / config.evaluations) for part in range(1, config.evaluations + 1))


def schedule(config: TrainConfig, step: int, steps: int) -> float:
    """Share of the peak learning rate at `step` of 1..steps; rises over the warm-up, then falls towards 0."""
    warmup = min(steps - 1, round(config.warmup * steps))
    if step <= warmup:
        return step / (warmup + 1)
    left = 1 - (step - 1 - warmup) / (steps - warmup)  # 1 at the first step after the warm-up, above 0 at the last
    if config.schedule == "constant":
        return 1.0
    return left if config.schedule == "linear" else 0.5 * (1 + math.cos(math.pi * (1 - left)))


@torch.no_grad()
def figures(lora: LoRA, rows: Sequence[lean.Tokens], budget: int = 4096) -> dict[str, float]:
    """Of rows under the adapter in use: "loss", the mean cross-entropy per supervised token or per label, and for
    labels "accuracy", the share of rows whose likeliest label is theirs. `budget`: tokens in a pass.
    """
    total, right = 0.0, 0
    for batch in _passes(sorted(rows, key=lambda tokens: len(tokens.ids)), budget):  # alike lengths pad little
        if batch[0].label is None:
            total += float(_summed_loss(lora, batch))
            continue
        logits = lean.class_logits(lora.model, batch)
        total += float(lean.label_loss(logits, batch))
        right += sum(best == tokens.label for best, tokens in zip(logits.argmax(-1).tolist(), batch, strict=True))
    loss = total / sum(tokens.count for tokens in rows)
    return {"loss": loss} if rows[0].label is None else {"loss": loss, "accuracy": right / len(rows)}


def mean_loss(lora: LoRA, rows: Sequence[lean.Tokens], budget: int = 4096) -> float:
    """The loss of `figures`."""
    return figures(lora, rows, budget)["loss"]


def peak_memory(device: torch.device) -> int:
    """Most bytes held so far: on CUDA by tensors, else by the whole process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    status = Path("/proc/self/status")  # getrusage would count what the parent held before the exec
    if status.exists():
        return next(1024 * int(line.split()[1]) for line in status.read_text().splitlines() if line.startswith("VmHWM"))
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss  # bytes on macOS


def _step(job: Job, parameters: Sequence[torch.nn.Parameter], batch: Sequence[lean.Tokens]) -> tuple[float, float]:
    """One optimizer step; the loss averages over all supervised tokens or labels of the step, however it is split."""
    model = job.lora.model.train()  # before `use`, which goes by it
    count = sum(tokens.count for tokens in batch)
    size = math.ceil(len(batch) / job.config.accumulate)
    total = 0.0
    try:
        with job.lora.use(job.adapter):
            for start in range(0, len(batch), size):
                loss = _summed_loss(job.lora, batch[start : start + size]) / count
                loss.backward()
                total += loss.item()
    finally:
        model.eval()
    unreached = job.lora.unreached(job.adapter)
    if unreached:
        message = f"The model does not pass through {unreached[0]}, so it cannot be adapted."
        raise StudioError("E_UNREACHED", message, "Leave this matrix out.")
    norm = torch.nn.utils.clip_grad_norm_(parameters, job.config.clip_norm or math.inf)
    job.optimizer.step()
    job.optimizer.zero_grad(set_to_none=True)
    return total, float(norm)


def _summed_loss(lora: LoRA, batch: Sequence[lean.Tokens]) -> torch.Tensor:
    """By labels, else packed where model and adapters allow it, else padded."""
    model = lora.model
    if batch[0].label is not None:
        return lean.label_loss(lean.class_logits(model, batch), batch)
    packed = lean.pack(batch, next(model.parameters()).device)
    if not (lean.packable(model) and all(map(lora.packs, lora.in_use))):
        return lean.padded_loss(model, packed)
    with lean.packed_attention(model):
        return lean.packed_loss(model, packed)


def _measure(job: Job, step: int) -> Iterator[Event]:
    """Held-out loss and the fixed sample prompts, at step 0 of the base model; prefixes change it from the start."""
    found = heldout_figures(job, base=step == 0)
    if found:
        yield Metric(step=step, values=found)
    elif step == 0:
        message = "No rows are held out, so learning cannot be told from memorising."
        yield Warned(step=0, code="W_NO_HELDOUT", message=message)
    if job.samples:
        with job.lora.use(job.adapter if step else None):
            texts = _answers(job)
        for index, (example, text) in enumerate(zip(job.samples, texts, strict=True)):
            yield Sample(step=step, index=index, prompt=example.prompt[-1].content, text=text, target=example.target)


def _answers(job: Job) -> list[str]:
    """What the adapter in use writes to each sample, or the label it finds likeliest: "positive (0.93)"."""
    model, words = job.lora.model, job.tokenizer
    if not job.classes:
        prompts = [prompt_ids(words, example.prompt) for example in job.samples]
        return answers(model, words, prompts, Sampling(max_new_tokens=SAMPLE_TOKENS))
    rows = [encode_label(words, example, job.classes, job.config.max_length).tokens for example in job.samples]
    with torch.no_grad():
        likeliest = lean.class_logits(model, rows).float().softmax(-1).max(-1)
    pairs = zip(likeliest.indices.tolist(), likeliest.values.tolist(), strict=True)
    return [f"{job.classes[index]} ({probability:.2f})" for index, probability in pairs]


def _measured(job: Job) -> list[lean.Tokens]:
    """The held-out rows that are measured: the same first ones each time, within the budget."""
    return within([one.tokens for one in job.heldout if one.tokens.count], HELDOUT_TOKENS)


def _batches(rows: Sequence[lean.Tokens], config: TrainConfig, steps: int) -> Iterator[list[lean.Tokens]]:
    """`steps` batches over ever new shuffles of the rows; a batch may reach from one pass into the next."""
    shuffle = random.Random(config.seed)
    order: list[int] = []
    for _ in range(steps):
        batch = []
        while len(batch) < min(config.batch_size, len(rows)):
            if not order:
                order = list(range(len(rows)))
                shuffle.shuffle(order)
            batch.append(rows[order.pop()])
        yield batch


def within(rows: Sequence[lean.Tokens], budget: int) -> list[lean.Tokens]:
    """The first rows that fit into `budget` tokens, at least one."""
    kept, used = [], 0
    for tokens in rows:
        used += len(tokens.ids)
        if kept and used > budget:
            break
        kept.append(tokens)
    return kept


def _passes(rows: Sequence[lean.Tokens], budget: int) -> Iterator[list[lean.Tokens]]:
    batch: list[lean.Tokens] = []
    for tokens in rows:
        if batch and sum(len(one.ids) for one in batch) + len(tokens.ids) > budget:
            yield batch
            batch = []
        batch.append(tokens)
    if batch:
        yield batch
