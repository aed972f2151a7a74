"""Training as a generator of events: train(job) yields, the caller decides what happens to each event.

There are no callbacks and there is no file code here. To stop, stop pulling; between two events the weights
are consistent, so that is when a caller saves. Same job, same seed: same events.
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
from lora_studio.data.batches import Encoded, prompt_ids
from lora_studio.data.formats import Example
from lora_studio.errors import StudioError
from lora_studio.events import Event, Metric, Sample, Started, Warned
from lora_studio.generate import Sampling, answers
from lora_studio.settings import TrainConfig

HELDOUT_TOKENS = 2_048  # of held-out text measured at each evaluation
SAMPLE_TOKENS = 48  # longest answer in the sample timeline


@dataclass(kw_only=True)
class Job:
    """Everything that one training needs, loaded: the adapter is attached and fresh."""

    lora: LoRA
    adapter: str
    tokenizer: Any
    train: Sequence[Encoded]
    heldout: Sequence[Encoded]
    samples: Sequence[Example] = ()
    config: TrainConfig
    optimizer: torch.optim.Optimizer = field(init=False)

    def __post_init__(self) -> None:
        parameters = self.lora.parameters(self.adapter)
        fused = parameters[0].device.type in ("cuda", "cpu")
        self.optimizer = torch.optim.AdamW(
            parameters, lr=self.config.learning_rate, weight_decay=self.config.weight_decay, fused=fused
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
    total = sum(tensor.numel() for tensor in lora.model.parameters())
    usual = config.usual_rate(total)
    yield Started(
        steps=steps,
        trainable=sum(tensor.numel() for tensor in parameters),
        total=total,
        device=str(first.device),
        precision=str(first.dtype).removeprefix("torch."),
        train_rows=len(rows),
        heldout_rows=len(_measured(job)),
    )
    if config.learning_rate > 2 * usual:
        message = f"A learning rate of {config.learning_rate:g} is high for a model of this size; {usual:.1g} is usual."
        yield Warned(step=0, code="W_RATE", message=message)
    torch.manual_seed(config.seed)  # dropout's
    measure_at = measured_steps(config, steps)
    yield from _measure(job, step=0)
    clock, seen = time.monotonic(), 0
    for step, batch in enumerate(_batches(rows, config, steps), start=1):
        rate = config.learning_rate * schedule(config, step, steps)
        for group in job.optimizer.param_groups:
            group["lr"] = rate
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
    rows = _measured(job)
    if not rows:
        return None
    with job.lora.use(job.adapter):
        return mean_loss(job.lora, rows)


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
def mean_loss(lora: LoRA, rows: Sequence[lean.Tokens], budget: int = 4096) -> float:
    """Mean cross-entropy per supervised token under the adapter in use; `budget` tokens a pass."""
    model, total, count = lora.model, 0.0, sum(tokens.count for tokens in rows)
    device = next(model.parameters()).device
    for batch in _passes(rows, budget):
        total += float(_summed_loss(model, lean.pack(batch, device)))
    return total / count


def peak_memory(device: torch.device) -> int:
    """Most bytes held so far: on CUDA by tensors, else by the whole process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    status = Path("/proc/self/status")  # getrusage would count what the parent held before the exec
    if status.exists():
        return next(1024 * int(line.split()[1]) for line in status.read_text().splitlines() if line.startswith("VmHWM"))
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss  # bytes on macOS


def _step(job: Job, parameters: Sequence[torch.nn.Parameter], batch: Sequence[lean.Tokens]) -> tuple[float, float]:
    """One optimizer step; the loss averages over all supervised tokens of the step, however it is split."""
    model = job.lora.model.train()
    count = sum(tokens.count for tokens in batch)
    size = math.ceil(len(batch) / job.config.accumulate)
    total = 0.0
    with job.lora.use(job.adapter):
        for start in range(0, len(batch), size):
            packed = lean.pack(batch[start : start + size], parameters[0].device)
            loss = _summed_loss(model, packed) / count
            loss.backward()
            total += loss.item()
    norm = torch.nn.utils.clip_grad_norm_(parameters, job.config.clip_norm or math.inf)
    job.optimizer.step()
    job.optimizer.zero_grad(set_to_none=True)
    model.eval()
    return total, float(norm)


def _summed_loss(model: Any, packed: lean.Packed) -> torch.Tensor:
    if not lean.packable(model):
        return lean.padded_loss(model, packed)
    with lean.packed_attention(model):
        return lean.packed_loss(model, packed)


def _measure(job: Job, step: int) -> Iterator[Event]:
    """Held-out loss and the fixed sample prompts; at step 0 the fresh adapter is still the base model."""
    loss = heldout_loss(job)
    if loss is not None:
        yield Metric(step=step, values={"heldout_loss": loss})
    elif step == 0:
        message = "No rows are held out, so learning cannot be told from memorising."
        yield Warned(step=0, code="W_NO_HELDOUT", message=message)
    if not job.samples:
        return
    prompts = [prompt_ids(job.tokenizer, example.prompt) for example in job.samples]
    with job.lora.use(job.adapter):
        texts = answers(job.lora.model, job.tokenizer, prompts, Sampling(max_new_tokens=SAMPLE_TOKENS))
    for index, (example, text) in enumerate(zip(job.samples, texts, strict=True)):
        yield Sample(step=step, index=index, prompt=example.prompt[-1].content, text=text, target=example.target)


def _measured(job: Job) -> list[lean.Tokens]:
    """The held-out rows that are measured: the same first ones each time, within the budget."""
    return _within([one.tokens for one in job.heldout if one.tokens.count], HELDOUT_TOKENS)


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


def _within(rows: Sequence[lean.Tokens], budget: int) -> list[lean.Tokens]:
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
