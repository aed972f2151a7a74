"""Examples -> token ids with a mark on every supervised token, cut to what fits, and how long they are.

Lengths are counted once for every limit: a token at position p is lost where the limit is p or less, so what a limit
keeps follows from sorted counts. How a tokenizer reads a conversation is in data.words. For a classifier there is no
template: the text alone is read, the answer is a label. This file does not know where rows come from or how a model
is trained.
"""

import statistics
from array import array
from bisect import bisect_left, bisect_right
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import accumulate, pairwise
from typing import Any

from lora_studio.core.lean import Tokens, common_prefix
from lora_studio.data.formats import Example
from lora_studio.data.words import Reading, read_rows, read_texts
from lora_studio.errors import StudioError, quote

AT_ONCE = 1000  # rows whose tokens are held while they are counted


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
    cut_answers: int = 0  # examples that lose supervised tokens
    unsupervised: int  # examples left without a supervised token
    total: int  # tokens kept, of all examples
    lost: int = 0  # tokens cut off
    supervised: int
    lost_supervised: int = 0
    shared_prefix: int = 0  # tokens that all examples begin with, as core.lean.shared_prefix counts them
    histogram: tuple[int, ...]  # 20 equal bins from 0 to `max`
    quoted: int = 0  # examples with control tokens of the model in their words


@dataclass(frozen=True, kw_only=True)
class Measured:
    """Token counts of all examples under one tokenizer, uncut: of each kind one number an example, sorted."""

    tokens: array
    read: array  # tokens that are only read
    learnt: array  # supervised tokens; 1 for a label
    first: array  # position of the first supervised token, of examples that have one
    end: array  # position behind the last supervised token, of the same
    at_position: array  # not by example: how many have a supervised token at position 0, 1, 2, ...
    quoted: int
    alike: int = 0  # tokens that all of them begin with

    def at(self, limit: int) -> Lengths:
        """What a length limit keeps and loses; no row is read for it."""
        rows, cut = len(self.tokens), _above(self.tokens, limit)
        lost = sum(self.tokens[rows - cut :]) - cut * limit
        supervised, longest = sum(self.at_position[:limit]), self.tokens[-1]
        edges = [bisect_left(self.tokens, -(-number * (longest + 1) // 20)) for number in range(21)]
        return Lengths(
            median=int(statistics.median(self.tokens)),
            p95=self.tokens[min(rows - 1, int(0.95 * rows))],
            max=longest,
            cut=cut,
            cut_answers=_above(self.end, limit),
            unsupervised=rows - bisect_left(self.first, limit),
            total=sum(self.tokens) - lost,
            lost=lost,
            supervised=supervised,
            lost_supervised=sum(self.learnt) - supervised,
            shared_prefix=self._shared_prefix(limit),
            histogram=tuple(after - before for before, after in pairwise(edges)),
            quoted=self.quoted,
        )

    def _shared_prefix(self, limit: int) -> int:
        if len(self.tokens) == 1:
            return 0
        before = min((*self.first[:1], self.tokens[0], limit)) - 1  # what follows may predict a supervised token
        return max(0, min(self.alike, before))


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
    encoded = []
    for example, text in zip(examples, read_texts(tokenizer, _texts(examples)), strict=True):
        gone = _cut_inside(text.around, max_length)
        ids = text.ids[: gone.start] + text.ids[gone.stop :]
        ids = ids or [tokenizer.eos_token_id or 0]  # a model must read something
        tokens = Tokens(tuple(ids), (False,) * len(ids), places[example.target.strip()])
        encoded.append(Encoded(tokens, len(gone), text.quoted))
    return encoded


def preview(tokenizer: Any, example: Example, max_length: int) -> list[Piece]:
    """The rendered text token by token: context, trained, or cut off."""
    reading = read_rows(tokenizer, [example], texts=True)[0]
    kinds = ["trained" if mark else "context" for mark in reading.supervised]
    kinds[:1] = ["context"] * len(kinds[:1])  # nothing stands before the first token to tell it from
    kinds[max_length:] = ["cut"] * len(kinds[max_length:])
    return [Piece(text, kind) for text, kind in zip(reading.texts, kinds, strict=True)]


def preview_label(tokenizer: Any, example: Example, max_length: int) -> list[Piece]:
    """A classifier's text token by token: context or cut out; what is learnt is the label behind it."""
    text = read_texts(tokenizer, _texts([example]), texts=True)[0]
    kinds = ["context"] * len(text.ids)
    gone = _cut_inside(text.around, max_length)
    kinds[gone.start : gone.stop] = ["cut"] * len(gone)
    pieces = [Piece(*one) for one in zip(text.texts, kinds, strict=True)] or [Piece("", "context")]
    pieces[-1] = replace(pieces[-1], text=f"{pieces[-1].text} → ")
    return [*pieces, Piece(example.target, "trained")]


def measure(tokenizer: Any, examples: Sequence[Example]) -> Measured:
    """The lengths of all rows as `encode` reads them."""
    alike: tuple[int, ...] | None = None

    def counted() -> Iterator[tuple[int, list[tuple[int, int]], int]]:
        nonlocal alike
        for one in (one for some in _groups(examples) for one in read_rows(tokenizer, some)):
            alike = one.ids if alike is None else common_prefix((alike, one.ids))
            yield len(one.ids), list(_spans(one.supervised)), one.quoted

    return replace(_measured(counted()), alike=len(alike or ()))


def measure_labels(tokenizer: Any, examples: Sequence[Example]) -> Measured:
    """The lengths of all texts as `encode_label` reads them; the one thing learnt of each is never cut."""
    readings = (one for some in _groups(examples) for one in read_texts(tokenizer, _texts(some)))
    measured = _measured((max(1, len(one.ids)), [(0, 1)], one.quoted) for one in readings)
    return replace(measured, read=measured.tokens)


def _measured(rows: Iterable[tuple[int, list[tuple[int, int]], int]]) -> Measured:
    """From the length of each row, where its supervised tokens begin and end, and its quoted control tokens."""
    tokens, read, learnt, first, end = ([] for _ in range(5))
    steps: Counter[int] = Counter()
    quoted = 0
    for length, spans, control in rows:
        supervised = sum(stop - start for start, stop in spans)
        tokens.append(length)
        read.append(length - supervised)
        learnt.append(supervised)
        if spans:
            first.append(spans[0][0])
            end.append(spans[-1][1])
        for start, stop in spans:
            steps[start] += 1
            steps[stop] -= 1
        quoted += control > 0
    tokens, read, learnt, first, end = (array("q", sorted(one)) for one in (tokens, read, learnt, first, end))
    at_position = array("q", accumulate(steps[position] for position in range(max(steps, default=0))))
    return Measured(
        tokens=tokens, read=read, learnt=learnt, first=first, end=end, at_position=at_position, quoted=quoted
    )


def _spans(marks: Sequence[bool]) -> Iterator[tuple[int, int]]:
    """Where supervised tokens begin and end; the first of a row has nothing before it to be learnt from."""
    flags, stop = bytes(marks), 1
    while (start := flags.find(1, stop)) >= 0:
        stop = flags.find(0, start)
        stop = len(flags) if stop < 0 else stop
        yield start, stop


def _above(counts: array, limit: int) -> int:
    return len(counts) - bisect_right(counts, limit)


def _groups(examples: Sequence[Example]) -> Iterator[Sequence[Example]]:
    return (examples[start : start + AT_ONCE] for start in range(0, len(examples), AT_ONCE))


def _texts(examples: Sequence[Example]) -> list[str]:
    """What a classifier reads of each: the last message before the answer."""
    return [example.prompt[-1].content if example.prompt else "" for example in examples]


def _cut_inside(around: Sequence[bool], most: int) -> range:
    """Places of the tokens of a text that do not fit: the last ones before the special tokens that close it."""
    if len(around) <= most:
        return range(0)
    closing = next((number for number, mark in enumerate(reversed(around)) if not mark), 0)
    return range(most - closing, len(around) - closing)


def _cut(reading: Reading, most: int) -> Encoded:
    tokens = Tokens(reading.ids[:most], reading.supervised[:most])
    return Encoded(tokens, max(0, len(reading.ids) - most), reading.quoted)
