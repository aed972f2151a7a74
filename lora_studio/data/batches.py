"""Examples -> token ids with a mark on every supervised token, cut to what fits, and what their lengths look like.

How a tokenizer reads a conversation is in data.words. For a classifier there is no template: the text alone is read,
the answer is a label. This file does not know where rows come from or how a model is trained.
"""

import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from lora_studio.core.lean import Tokens
from lora_studio.data.formats import Example
from lora_studio.data.words import Reading, read_rows, read_texts
from lora_studio.errors import StudioError, quote


@dataclass(frozen=True)
class Encoded:
    """One example as the model sees it; `cut` tokens at its end did not fit."""

    tokens: Tokens
    cut: int
    quoted: int = 0  # control tokens of the model in somebody's words, read as plain letters


@dataclass(frozen=True)
class Piece:
    """A run of rendered text for the preview; kind: context, trained or cut."""

    text: str
    kind: str


@dataclass(frozen=True, kw_only=True)
class Lengths:
    """Token statistics of a dataset under one tokenizer and length limit; lengths are before cutting."""

    median: int
    p95: int
    max: int
    cut: int  # examples that lose tokens
    unsupervised: int  # examples left without a supervised token
    total: int  # tokens kept, of all examples
    supervised: int
    histogram: tuple[int, ...]  # 20 equal bins from 0 to `max`
    quoted: int = 0  # examples with control tokens of the model in their words


def encode(tokenizer: Any, example: Example, max_length: int) -> Encoded:
    """Token ids and supervision marks, cut on the right at `max_length` tokens."""
    return encode_all(tokenizer, [example], max_length)[0]


def encode_all(tokenizer: Any, examples: Sequence[Example], max_length: int) -> list[Encoded]:
    """As `encode`, for many rows at once, which costs less where the tokenizer is guarded."""
    return [_cut(reading, max_length) for reading in read_rows(tokenizer, examples)]


def encode_label(tokenizer: Any, example: Example, labels: Sequence[str], max_length: int) -> Encoded:
    """The last message before the answer as an encoder reads it, and which of `labels` the answer is.

    Cut inside at `max_length` tokens: the special tokens that close a text stay. Raises E_LABELS.
    """
    return encode_labels(tokenizer, [example], labels, max_length)[0]


def encode_labels(tokenizer: Any, examples: Sequence[Example], labels: Sequence[str], max_length: int) -> list[Encoded]:
    """As `encode_label`, for many rows at once."""
    places = {label: number for number, label in enumerate(labels)}
    for example in examples:
        if example.target.strip() not in places:
            label, known = quote(example.target.strip(), 40), quote(", ".join(labels), 100)
            message = f"Row {example.row:,} has the label {label}; known are {known}."
            raise StudioError("E_LABELS", message, "Correct the row.")
    texts = [example.prompt[-1].content if example.prompt else "" for example in examples]
    encoded = []
    for example, (ids, around, quoted) in zip(examples, read_texts(tokenizer, texts), strict=True):
        cut = max(0, len(ids) - max_length)
        if cut:
            closing = next((number for number, mark in enumerate(reversed(around)) if not mark), 0)
            ids = ids[: max_length - closing] + ids[len(ids) - closing :]
        ids = ids or [tokenizer.eos_token_id or 0]  # a model must read something
        tokens = Tokens(tuple(ids), (False,) * len(ids), places[example.target.strip()])
        encoded.append(Encoded(tokens, cut, quoted))
    return encoded


def preview(tokenizer: Any, example: Example, max_length: int) -> list[Piece]:
    """The rendered text token by token: context, trained, or cut off."""
    reading = read_rows(tokenizer, [example], texts=True)[0]
    kinds = ["trained" if mark else "context" for mark in reading.supervised]
    kinds[max_length:] = ["cut"] * len(kinds[max_length:])
    return [Piece(text, kind) for text, kind in zip(reading.texts, kinds, strict=True)]


def lengths(encoded: Sequence[Encoded]) -> Lengths:
    """Statistics over all examples; raises E_NO_TARGET when nothing is left to learn from."""
    full = sorted(len(one.tokens.ids) + one.cut for one in encoded)
    supervised = [one.tokens.count for one in encoded]
    if not any(supervised):
        raise StudioError(
            "E_NO_TARGET",
            f"None of the {len(encoded)} examples has a token to learn from.",
            "Raise the length limit, or check which column holds the answer.",
        )
    bins = [0] * 20
    for length in full:
        bins[min(19, 20 * length // (full[-1] + 1))] += 1
    return Lengths(
        median=int(statistics.median(full)),
        p95=full[min(len(full) - 1, int(0.95 * len(full)))],
        max=full[-1],
        cut=sum(one.cut > 0 for one in encoded),
        unsupervised=sum(count == 0 for count in supervised),
        total=sum(len(one.tokens.ids) for one in encoded),
        supervised=sum(supervised),
        histogram=tuple(bins),
        quoted=sum(one.quoted > 0 for one in encoded),
    )


def _cut(reading: Reading, most: int) -> Encoded:
    tokens = Tokens(reading.ids[:most], reading.supervised[:most])
    return Encoded(tokens, max(0, len(reading.ids) - most), reading.quoted)
