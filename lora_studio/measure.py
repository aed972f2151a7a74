"""What rows cost under the adapter in use: loss, accuracy, sample answers, and the memory it all took.

It knows models and rows, and nothing of steps: training, evaluating and looking inside all measure here.
"""

import resource
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import torch

from lora_studio.core import lean
from lora_studio.core.lora import LoRA
from lora_studio.data.batches import encode_all, encode_labels
from lora_studio.data.formats import Example
from lora_studio.data.words import prompt_ids
from lora_studio.errors import StudioError
from lora_studio.generate import answer
from lora_studio.models import memory
from lora_studio.settings import Sampling

HELDOUT_TOKENS = 2_048  # of held-out text measured at each evaluation
SAMPLE_TOKENS, SAMPLE_SPARE = 96, 8  # longest answer in the sample timeline, and room behind the longest wanted one


@torch.no_grad()
def figures(lora: LoRA, rows: Sequence[lean.Tokens], budget: int = 4096) -> dict[str, float]:
    """Of rows under the adapter in use: "loss", the mean cross-entropy per supervised token or per label, and for
    labels "accuracy", the share of rows whose likeliest label is theirs.

    budget: tokens in a pass; it is halved where the memory does not take them.
    """
    while True:
        try:
            return _figures(lora, rows, budget)
        except (RuntimeError, MemoryError) as error:
            if not is_shortage(error) or budget < max(len(tokens.ids) for tokens in rows):
                raise
        budget //= 2


def _figures(lora: LoRA, rows: Sequence[lean.Tokens], budget: int) -> dict[str, float]:
    total, right = 0.0, 0
    for batch in passes(sorted(rows, key=lambda tokens: len(tokens.ids)), budget):  # alike lengths pad little
        if batch[0].label is None:
            total += float(losses(lora, batch).sum())
            continue
        logits = lean.class_logits(lora.model, batch)
        total += float(lean.label_losses(logits, batch).sum())
        right += sum(best == tokens.label for best, tokens in zip(logits.argmax(-1).tolist(), batch, strict=True))
    loss = total / sum(tokens.count for tokens in rows)
    return {"loss": loss} if rows[0].label is None else {"loss": loss, "accuracy": right / len(rows)}


def mean_loss(lora: LoRA, rows: Sequence[lean.Tokens], budget: int = 4096) -> float:
    """The loss of `figures`."""
    return figures(lora, rows, budget)["loss"]


def losses(lora: LoRA, batch: Sequence[lean.Tokens]) -> torch.Tensor:
    """(supervised tokens or rows,): the cross-entropy of each, in the batch's order, under the adapters in use.

    By labels, else packed where model and adapters allow it, else padded.
    """
    model = lora.model
    with leanly(lora, batch):
        if batch[0].label is not None:
            return lean.label_losses(lean.class_logits(model, batch), batch)
        if not packs(lora, lora.in_use):
            return lean.padded_losses(model, lean.pack(batch, _device(lora)))
        return lean.packed_losses(model, _laid(lora, lora.in_use, [batch]))


def losses_together(lora: LoRA, work: Mapping[str, Sequence[lean.Tokens]]) -> tuple[torch.Tensor, ...]:
    """The same for adapters that train in one pass, each with its own rows; all must be such that `lora.shares`."""
    packed = _laid(lora, tuple(work), list(work.values()))
    counts = [sum(tokens.count for tokens in batch) for batch in work.values()]
    with lora.use_spans(dict(zip(work, packed.spans, strict=True))), leanly(lora, next(iter(work.values()))):
        return lean.packed_losses(lora.model, packed).split(counts)


def _laid(lora: LoRA, names: Sequence[str], groups: Sequence[Sequence[lean.Tokens]]) -> lean.Packed:
    return lean.pack_groups(groups, _device(lora), share=shares_prefix(lora, names))


def shares_prefix(lora: LoRA, names: Sequence[str]) -> bool:
    """Whether the prefix that the rows of a pass share is computed once, under these adapters.

    It has to be the same for each row, so nothing may be drawn at random.
    """
    return lean.can_share(lora.model, _device(lora).type) and packs(lora, names) and not any(map(lora.draws, names))


def _device(lora: LoRA) -> torch.device:
    return next(lora.model.parameters()).device


@contextmanager
def leanly(lora: LoRA, batch: Sequence[lean.Tokens]) -> Iterator[None]:
    """Inside, the model runs as `losses` runs it; a backward that computes activations again belongs in it too."""
    packed = batch[0].label is None and packs(lora, lora.in_use)
    with lean.frugal(lora.model), lean.packed_attention(lora.model) if packed else nullcontext():
        yield


def packs(lora: LoRA, names: Sequence[str]) -> bool:
    """Whether sequences may be laid end to end under these adapters."""
    return lean.packable(lora.model) and all(map(lora.packs, names))


def sampled(lora: LoRA, tokenizer: Any, samples: Sequence[Example], classes: Sequence[str], most: int) -> list[str]:
    """What the adapters in use write to each sample, a row each, or the label they find likeliest: "positive (0.93)".

    `most`: tokens of a row.
    """
    if not classes:
        prompts = [prompt_ids(tokenizer, example.prompt) for example in samples]
        room = sample_tokens(tokenizer, samples, most)
        *_, final = answer(lora.model, tokenizer, prompts, Sampling(max_new_tokens=room))
        return [row.text for row in final]
    rows = [one.tokens for one in encode_labels(tokenizer, samples, classes, most)]
    with torch.no_grad():
        likeliest = lean.class_logits(lora.model, rows).float().softmax(-1).max(-1)
    pairs = zip(likeliest.indices.tolist(), likeliest.values.tolist(), strict=True)
    return [f"{classes[index]} ({probability:.2f})" for index, probability in pairs]


def sample_tokens(tokenizer: Any, samples: Sequence[Example], most: int) -> int:
    """Tokens that an answer to a sample may have: a little more than the longest that is wanted."""
    return min(SAMPLE_TOKENS, SAMPLE_SPARE + max(one.tokens.count for one in encode_all(tokenizer, samples, most)))


def within(rows: Sequence[lean.Tokens], budget: int) -> list[lean.Tokens]:
    """The first rows that fit into `budget` tokens, at least one."""
    kept, used = [], 0
    for tokens in rows:
        used += len(tokens.ids)
        if kept and used > budget:
            break
        kept.append(tokens)
    return kept


def is_shortage(error: BaseException) -> bool:
    """Whether an error says that memory ran out: on the GPU, or where the system refuses it to torch or Python."""
    words = str(error)
    shortage = "out of memory" in words or "can't allocate memory" in words or "not enough memory" in words
    return isinstance(error, MemoryError | torch.OutOfMemoryError) or shortage


def shortage(device: torch.device, tokens: int) -> StudioError:
    """E_MEMORY, with figures: a pass of so many tokens did not fit."""
    used, free = memory_in_use(device), free_memory(device)
    message = f"A pass of {tokens} tokens needs more than the {free / 1e9:.1f} GB that are free"
    hint = "Shorten the length limit, adapt fewer layers, or choose a smaller model."
    return StudioError("E_MEMORY", f"{message}; {used / 1e9:.1f} GB are used.", hint)


def free_memory(device: torch.device) -> int:
    """Bytes that tensors may still take; what torch holds of the GPU without using it counts too."""
    kept = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device) if device.type == "cuda" else 0
    return memory()[0] + kept


def memory_in_use(device: torch.device) -> int:
    """Bytes held now: on CUDA by tensors, else by the whole process; 0 where the system does not say."""
    return torch.cuda.memory_allocated(device) if device.type == "cuda" else _proc("VmRSS")


def peak_memory(device: torch.device) -> int:
    """Most bytes held since `forget_peak`, or at all."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return _proc("VmHWM") or resource.getrusage(resource.RUSAGE_SELF).ru_maxrss  # bytes on macOS


def forget_peak(device: torch.device) -> bool:
    """Begin to look for the peak anew; False where the system does not let us."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        return True
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        return False
    return True


def _proc(name: str) -> int:
    """Bytes that Linux counts under this name; 0 elsewhere. getrusage would count what the parent held at the fork."""
    status = Path("/proc/self/status")
    lines = status.read_text().splitlines() if status.exists() else ()
    return next((1024 * int(line.split()[1]) for line in lines if line.startswith(name)), 0)


def passes(rows: Sequence[lean.Tokens], budget: int) -> Iterator[list[lean.Tokens]]:
    batch: list[lean.Tokens] = []
    for tokens in rows:
        if batch and sum(len(one.ids) for one in batch) + len(tokens.ids) > budget:
            yield batch
            batch = []
        batch.append(tokens)
    if batch:
        yield batch
