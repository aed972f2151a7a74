"""Answers, token by token, or the probabilities of labels and of a wanted answer: one model, one batch, a gate per row.

`stream` is the decoding loop; `compare` runs one prompt through the base model and any number of adapters in
one batch. Rows are drawn with the same random number at each step, so with equal models sampled texts are
equal too, and a difference between two panes is never luck.
"""

import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from transformers import DynamicCache

from lora_studio.core.layout import heads
from lora_studio.core.lean import Tokens, class_logits, few_at_once, stepwise_attention
from lora_studio.core.lora import LoRA, Row
from lora_studio.models import context
from lora_studio.settings import Sampling


@dataclass(frozen=True)
class Answer:
    """One row's text so far."""

    text: str = ""
    tokens: int = 0
    done: bool = False


@torch.inference_mode()
def stream(
    model: Any, prompts: Sequence[Sequence[int]], sampling: Sampling, stop: frozenset[int], pad: int = 0
) -> Iterator[list[int | None]]:
    """One new token per row and step, None for rows that have ended; prompts are padded on the left.

    The token that ends a row is not yielded. Call inside `lora.use(...)`, which decides what each row runs.
    A prompt that leaves no room in the model's context loses its beginning.
    """
    room = context(model) or sys.maxsize
    prompts = [prompt[-(room - 1) :] for prompt in prompts]
    device = next(model.parameters()).device
    width = max(len(prompt) for prompt in prompts)
    ids = torch.tensor([[pad] * (width - len(prompt)) + list(prompt) for prompt in prompts], device=device)
    mask = torch.tensor([[0] * (width - len(prompt)) + [1] * len(prompt) for prompt in prompts], device=device)
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    cache = DynamicCache(config=model.config)
    draws = torch.Generator().manual_seed(sampling.seed)
    running = [True] * len(prompts)
    padded = bool((mask == 0).any())
    last = torch.tensor([-1], device=device)  # as an index: of a slice, a CPU's head would be copied for every row
    for _ in range(min(sampling.max_new_tokens, room - width)):
        with stepwise_attention(model), few_at_once(model):
            output = model(
                input_ids=ids,
                attention_mask=mask if padded else None,
                position_ids=positions,
                past_key_values=cache,
                use_cache=True,
                logits_to_keep=last,
            )
        chosen = _pick(output.logits[:, -1].float(), sampling, draws)
        tokens = chosen.tolist()
        running = [alive and token not in stop for alive, token in zip(running, tokens, strict=True)]
        if not any(running):
            return
        yield [token if alive else None for alive, token in zip(running, tokens, strict=True)]
        ids, positions = chosen[:, None], positions[:, -1:] + 1
        mask = torch.cat([mask, mask.new_ones(len(mask), 1)], dim=1)


def _pick(logits: torch.Tensor, sampling: Sampling, draws: torch.Generator) -> torch.Tensor:
    """Next token of each row (rows,), from logits (rows, vocabulary)."""
    if sampling.temperature == 0:
        return logits.argmax(-1)
    ranked, order = (logits / sampling.temperature).softmax(-1).sort(descending=True)
    mass = ranked.cumsum(-1)
    allowed = (mass - ranked < sampling.top_p) * ranked  # the likeliest token is always allowed
    mass = allowed.cumsum(-1)
    draw = torch.rand(1, generator=draws).to(mass)  # one number for all rows
    place = torch.searchsorted(mass, draw * mass[:, -1:]).clamp(max=mass.shape[1] - 1)
    return order.gather(1, place)[:, 0]


def stop_tokens(model: Any, tokenizer: Any) -> frozenset[int]:
    """Tokens that end an answer, from the model's generation settings and the tokenizer."""
    ends = model.generation_config.eos_token_id if model.generation_config else None
    listed = ends if isinstance(ends, list) else [ends]
    return frozenset(token for token in (*listed, tokenizer.eos_token_id) if token is not None)


def answer(model: Any, tokenizer: Any, prompts: Sequence[Sequence[int]], sampling: Sampling) -> Iterator[list[Answer]]:
    """All rows' texts as they grow; the last list is the final one."""
    ids: list[list[int]] = [[] for _ in prompts]
    rows = [Answer() for _ in prompts]
    for tokens in stream(model, prompts, sampling, stop_tokens(model, tokenizer), tokenizer.pad_token_id or 0):
        for number, token in enumerate(tokens):
            if token is None:
                rows[number] = replace(rows[number], done=True)
                continue
            ids[number].append(token)
            text = tokenizer.decode(ids[number], skip_special_tokens=True).lstrip()
            # a character that is still missing bytes decodes to U+FFFD; it is shown with the next token
            rows[number] = Answer(text.rstrip("�") if text.endswith("�") else text, len(ids[number]))
        yield list(rows)
    yield [replace(row, done=True) for row in rows]


def answers(
    model: Any, tokenizer: Any, prompts: Sequence[Sequence[int]], sampling: Sampling, batch: int = 64
) -> list[str]:
    """The final texts, in the order of the prompts; similar lengths share a batch."""
    order = sorted(range(len(prompts)), key=lambda number: len(prompts[number]))
    texts = [""] * len(prompts)
    for start in range(0, len(order), batch):
        numbers = order[start : start + batch]
        final: list[Answer] = []
        for final in answer(model, tokenizer, [prompts[number] for number in numbers], sampling):  # noqa: B007
            pass
        for number, row in zip(numbers, final, strict=True):
            texts[number] = row.text
    return texts


def answer_all(
    lora: LoRA,
    tokenizer: Any,
    prompts: Sequence[Sequence[int]],
    rows: Sequence[Row],
    sampling: Sampling,
    batch: int = 32,
) -> Iterator[dict[int, list[str]]]:
    """Every prompt by every row, as for `compare`: the texts of the prompts that have just become final.

    Prompts of similar lengths share a batch of about `batch` rows. By number of the prompt; empty at most steps, so
    that whoever asks may stop at any of them.
    """
    order = sorted(range(len(prompts)), key=lambda number: len(prompts[number]))
    size = max(1, batch // len(rows))
    for start in range(0, len(order), size):
        waiting = order[start : start + size]
        places = {number: place * len(rows) for place, number in enumerate(waiting)}
        asked = [prompts[number] for number in waiting for _ in rows]
        with lora.use(*(row for _ in waiting for row in rows)):
            for texts in answer(lora.model, tokenizer, asked, sampling):
                found = {number: texts[place : place + len(rows)] for number, place in places.items()}
                fresh = {number: found[number] for number in places if all(one.done for one in found[number])}
                places = {number: place for number, place in places.items() if number not in fresh}
                yield {number: [one.text for one in ones] for number, ones in fresh.items()}


def compare(
    lora: LoRA, tokenizer: Any, prompt: Sequence[int], rows: Sequence[Row], sampling: Sampling
) -> Iterator[list[Answer]]:
    """One prompt, one batch, one row per entry: None is the base model, a mapping is a blend or a strength."""
    with lora.use(*rows):
        yield from answer(lora.model, tokenizer, [prompt] * len(rows), sampling)


@torch.inference_mode()
def classify(lora: LoRA, rows: Sequence[Row], ids: Sequence[int], classes: Sequence[str]) -> list[list[float]]:
    """The probability of each class for one text, one list per row; rows as for `compare`.

    Row by row, because some encoders compute a part of their attention once for the whole batch.
    """
    found = []
    for row in rows:
        with lora.use(row):
            logits = class_logits(lora.model, [Tokens(ids, ())])  # (1, classes)
        assert logits.shape[1] == len(classes), f"the model chooses among {logits.shape[1]}, not {len(classes)}"
        found += logits.float().softmax(-1).tolist()
    return found


@torch.inference_mode()
def chances(lora: LoRA, rows: Sequence[Row], tokens: Tokens) -> list[list[float]]:
    """The probability of each supervised token that has one before it, given all before: a list per row, one forward.

    rows as for `compare`.
    """
    places = [place for place, wanted in enumerate(tokens.supervised) if wanted and place]
    ids = torch.tensor([list(tokens.ids)] * len(rows), device=next(lora.model.parameters()).device)
    before = torch.tensor(places, device=ids.device) - 1
    with lora.use(*rows):
        logits = lora.model(input_ids=ids, use_cache=False, logits_to_keep=before).logits  # (rows, places, vocabulary)
    wanted = ids[0, places, None]
    return [row.float().log_softmax(-1).gather(-1, wanted)[:, 0].exp().tolist() for row in logits]  # a row's copy each


@torch.inference_mode()
def base_difference(lora: LoRA, prompt: Sequence[int], rows: Sequence[Row]) -> float:
    """Largest difference between the base rows' logits in this mixed batch and those of the untouched model.

    A row with strength 0 is a base row too. The reference is the same batch with every adapter's hook taken out of
    the model, so that the shapes, and with them the rounding, are the same: the difference must be exactly 0.
    Classifiers answer row by row.
    """
    if heads(lora.model):
        rows = [None]
    ids = torch.tensor([list(prompt)] * len(rows), device=next(lora.model.parameters()).device)
    with lora.use(*rows):
        mixed = lora.model(input_ids=ids, use_cache=False, logits_to_keep=1).logits
    with lora.unhooked():
        untouched = lora.model(input_ids=ids, use_cache=False, logits_to_keep=1).logits
    base = [number for number, row in enumerate(rows) if not isinstance(row, str) and not any((row or {}).values())]
    return float((mixed[base] - untouched[base]).abs().max())
