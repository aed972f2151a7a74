"""Health of a dataset: what repeats, what is empty, what the two sides of the split share, what a length limit costs.

From examples and their token counts, each looked at once. Rows are compared as they are, and once more without
capitals and with single spaces ("near"); nothing is changed or left out here.
This module does not know where rows come from, what a tokenizer is, or how a page looks.
"""

import math
from bisect import bisect_left
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from lora_studio.data.batches import Lengths, Measured
from lora_studio.data.formats import MOST_LABELS, Example

LIMITS = (256, 512, 1024)  # that are always told
BARS = 30  # of a histogram, at most
FEW_ROWS, FEW_OF_A_LABEL = 20, 5
MUCH_CUT = MUCH_EMPTY = 0.01  # shares from which a finding comes before everything else
MUCH_REPEATED = 0.05
ONE_LABEL = 0.9
ROUND = 64  # tokens that an advised limit is a multiple of
NAMES = {"answers": "answer", "labels": "text", "documents": "document"}  # what of a row a limit cuts


class Verdict(NamedTuple):
    """One sentence: whether to train on it, and what to look at first. grade: fit, look or unfit."""

    grade: str
    sentence: str


class Histogram(NamedTuple):
    """How many rows have 0 to width - 1 tokens, and so on; the last bar has everything longer."""

    width: int
    counts: tuple[int, ...]
    longest: int


@dataclass(frozen=True, kw_only=True)
class Health:
    """What there is to know of rows before they are trained on, for every length limit."""

    kind: str  # what is learnt: "answers", "labels" or whole "documents"
    rows: int
    train: int
    heldout: int
    empty: int  # rows of the file with nothing to learn in them, which are left out and not among `rows`
    duplicates: int  # rows equal to an earlier one in prompt and answer
    near_duplicates: int  # rows that equal one but for capitals and spaces
    shared_prompts: int  # held-out rows whose prompt is trained on as well: 0, by the split
    near_prompts: int  # and those whose prompt is but for capitals and spaces
    shared_answers: int | None  # held-out rows whose answer is trained on as well; None where it tells nothing
    labels: tuple[tuple[str, int], ...]  # each label and its rows, the most frequent first
    measured: Measured

    def at(self, limit: int) -> Lengths:
        """What a length limit keeps and loses."""
        return self.measured.at(limit)

    def cut(self, lengths: Lengths) -> int:
        """Rows that lose what they are there for: their answer, text that a label goes by, or their end."""
        return lengths.cut_answers if self.kind == "answers" else lengths.cut

    def enough(self, share: float = 1.0) -> int:
        """The least round limit that leaves this share of the rows whole."""
        place = min(self.rows, math.ceil(share * self.rows)) - 1
        return ROUND * math.ceil(self.measured.tokens[place] / ROUND)

    def verdict(self, limit: int) -> Verdict:
        """Whether to train on it with this limit. What weighs most is said first, and nothing else."""
        lengths = self.at(limit)
        if not lengths.supervised:
            said = f"no {NAMES[self.kind]} has a token left to learn at {limit:,} tokens"
            return Verdict("unfit", f"Not fit to train on: {said}. A limit of {self.enough():,} cuts nothing.")
        for found in (self._too_long(lengths, limit), self._empty(), self._repeats(), self._labels(), self._few()):
            if found:
                return Verdict("look", found)
        cut = self.cut(lengths)
        repeated = _count(self.duplicates, "duplicate") if self.duplicates else "no duplicates"
        shortened = f"{_count(cut, NAMES[self.kind])} cut" if cut else "nothing is cut"
        said = f"{_count(self.rows, 'row')}, {repeated}, {shortened} at {limit:,} tokens"
        return Verdict("fit", f"Fit to train on: {said}.")

    def learnt(self, limit: int) -> str:
        """What will be trained, in words."""
        lengths = self.at(limit)
        if self.kind == "labels":
            return f"Learnt is the label of each text; its {lengths.total:,} tokens are only read."
        if self.kind == "documents":
            said = f"All tokens of each document are learnt, {lengths.supervised:,} in all; each is one row."
            if not lengths.cut:
                return f"{said} None is longer than {limit:,} tokens."
            longer = f"{_count(lengths.cut, 'document')} {_are(lengths.cut)} longer than {limit:,} tokens and cut there"
            return f"{said} {longer}: {lengths.lost:,} tokens are left out, not continued in another row."
        read = lengths.total - lengths.supervised
        return f"Learnt are the answers, {lengths.supervised:,} tokens; the prompts, {read:,} tokens, are only read."

    def histograms(self) -> dict[str, Histogram]:
        """Tokens of the prompts and of the answers, or of the texts."""
        known = self.measured
        counts = {
            "answers": {"prompt": known.read, "answer": known.learnt},
            "labels": {"text": known.tokens},
            "documents": {"document": known.tokens},
        }[self.kind]
        return {name: _histogram(one) for name, one in counts.items()}

    def as_json(self, limit: int) -> dict[str, Any]:
        """Everything as plain JSON, at the limits that are always told and at this one."""
        counted = {name: value for name, value in vars(self).items() if name != "measured"}
        return {
            **self.verdict(limit)._asdict(),
            "learnt": self.learnt(limit),
            **counted,
            "different_labels": len(self.labels),
            "labels": [{"label": label, "rows": rows} for label, rows in self.labels[:MOST_LABELS]],
            "limits": [self._limit_as_json(one) for one in sorted({*LIMITS, limit})],
            "histograms": {name: one._asdict() for name, one in self.histograms().items()},
        }

    def _limit_as_json(self, limit: int) -> dict[str, int]:
        lengths = self.at(limit)
        return {
            "limit": limit,
            "cut": lengths.cut,
            "cut_answers": lengths.cut_answers,
            "nothing_left": lengths.unsupervised,
            "tokens_lost": lengths.lost,
            "supervised_tokens_lost": lengths.lost_supervised,
        }

    def _too_long(self, lengths: Lengths, limit: int) -> str:
        cut = self.cut(lengths)
        if cut < MUCH_CUT * self.rows:
            return ""
        name = NAMES[self.kind]
        wholly = f", {lengths.unsupervised:,} of them wholly" if lengths.unsupervised else ""
        most, all_whole = self.enough(0.99), self.enough()
        cure = f"{all_whole:,} would cut none" if most == all_whole else f"{most:,} would leave 99 % whole"
        of = f"{cut:,} of {_count(self.rows, name)} {_are(cut)} cut at {limit:,} tokens{wholly}"
        return f"Look at the length limit first: {of}. {cure}."

    def _empty(self) -> str:
        file = self.rows + self.empty
        if self.empty < MUCH_EMPTY * file or not self.empty:
            return ""
        what = "text" if self.kind == "documents" else "answer"
        return (
            f"Look at the empty rows first: no {what} in {self.empty:,} of {file:,}, which {_are(self.empty)} left out."
        )

    def _repeats(self) -> str:
        repeated = self.duplicates + self.near_duplicates
        if repeated >= MUCH_REPEATED * self.rows:
            said = f"{repeated:,} of {_count(self.rows, 'row')} {_are(repeated)} like an earlier one"
            return f"Look at the duplicates first: {said}, and what they say is learnt more often."
        leaked = self.shared_prompts + self.near_prompts
        if leaked and leaked >= MUCH_REPEATED * self.heldout:
            said = f"{leaked:,} of {_count(self.heldout, 'held-out prompt')} {_are(leaked)} trained on too"
            return f"Look at the shared prompts first: {said}, so that the held-out loss will flatter."
        return ""

    def _labels(self) -> str:
        if not self.labels:
            return ""
        (most, rows), (least, few) = self.labels[0], self.labels[-1]
        if rows > ONE_LABEL * self.rows:
            said = f"{rows:,} of {_count(self.rows, 'row')} have “{_short(most)}”, so that it is nearly always right"
            return f"Look at the labels first: {said}."
        if few < FEW_OF_A_LABEL:
            rare = sum(count < FEW_OF_A_LABEL for _, count in self.labels)
            which = f"“{_short(least)}” has" if rare == 1 else f"{rare:,} of them have"
            return f"Look at the labels first: {which} fewer than {FEW_OF_A_LABEL} rows, too few to be learnt."
        return ""

    def _few(self) -> str:
        return f"Look at the number of rows first: {self.rows:,} are few to learn from." if self.rows < FEW_ROWS else ""


def examine(
    train: Sequence[Example], heldout: Sequence[Example], measured: Measured, *, kind: str, labels: bool, empty: int = 0
) -> Health:
    """The health of rows that are split and measured. labels: whether the answers are labels."""
    trained, held = [_Row.of(one) for one in train], [_Row.of(one) for one in heldout]
    rows, answers = [*trained, *held], {row.answer for row in trained}
    prompts, near_prompts = {row.prompt for row in trained}, {row.near_prompt for row in trained}
    exact = {(row.prompt, row.answer) for row in rows}
    near = {(row.near_prompt, row.near_answer) for row in rows}
    shared = sum(row.prompt in prompts for row in held)
    return Health(
        kind=kind,
        rows=len(rows),
        train=len(train),
        heldout=len(heldout),
        empty=empty,
        duplicates=len(rows) - len(exact),
        near_duplicates=len(exact) - len(near),
        shared_prompts=shared,
        near_prompts=sum(row.near_prompt in near_prompts for row in held) - shared,
        shared_answers=sum(row.answer in answers for row in held) if kind == "answers" and not labels else None,
        labels=_by_frequency([row.answer.strip() for row in rows]) if labels else (),
        measured=measured,
    )


class _Row(NamedTuple):
    """What is compared of a row. The near ones are 64 bits, since the words themselves would be held twice."""

    prompt: tuple[str, ...]  # role and words of each message before the answer, or the document
    answer: str
    near_prompt: int
    near_answer: int

    @classmethod
    def of(cls, example: Example) -> "_Row":
        said = tuple(part for message in example.prompt for part in (message.role, message.content))
        prompt = said or (example.text,)
        return cls(prompt, example.target, hash(tuple(map(_plainly, prompt))), hash(_plainly(example.target)))


def _plainly(words: str) -> str:
    """Without capitals and with single spaces."""
    return " ".join(words.casefold().split())


def _by_frequency(labels: Sequence[str]) -> tuple[tuple[str, int], ...]:
    return tuple(sorted(Counter(labels).items(), key=lambda one: (-one[1], one[0])))


def _histogram(counts: Sequence[int]) -> Histogram:
    """Of sorted counts: bars of 1, 2 or 5 times a power of ten that reach as far as 99 of 100 do."""
    least = math.ceil((counts[int(0.99 * (len(counts) - 1))] + 1) / BARS)
    power = 10 ** (len(str(least)) - 1)
    width = next(digit * power for digit in (1, 2, 5, 10) if digit * power >= least)
    bars = min(BARS, counts[-1] // width + 1)
    edges = [bisect_left(counts, width * bar) for bar in range(bars)] + [len(counts)]
    return Histogram(width, tuple(edges[bar + 1] - edges[bar] for bar in range(bars)), counts[-1])


def _count(number: int, what: str) -> str:
    return f"{number:,} {what}{'' if number == 1 else 's'}"


def _are(number: int) -> str:
    return "is" if number == 1 else "are"


def _short(label: str, most: int = 40) -> str:
    line = " ".join(label.split())
    return line if len(line) <= most else f"{line[: most - 1]}…"
