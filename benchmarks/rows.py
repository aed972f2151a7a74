"""The real data, read from files that are given by path, and split so that nothing reported was trained or tuned on.

train    what is learnt from
tuning   taken from the training rows; learning rates are chosen on it
heldout  what is reported: the file's own dev set (SST-2), else rows held out by a fixed seed, whole groups at a
         time: equal sentences (CoLA), equal meaning representations (E2E)
"""

import csv
import hashlib
import random
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from lora_studio.data.formats import Example, Message
from lora_studio.data.readers import read_path
from lora_studio.errors import StudioError

SEED = 2021  # of every split; never of a training
SYSTEM = "Describe the place."  # short, because every token of every row is paid for

One = TypeVar("One")


@dataclass(frozen=True, kw_only=True)
class Rows:
    """One task's rows. references[i] are all right answers to heldout[i] (E2E only)."""

    train: tuple[Example, ...]
    tuning: tuple[Example, ...]
    heldout: tuple[Example, ...]
    labels: tuple[str, ...] = ()
    references: tuple[tuple[str, ...], ...] = ()

    @property
    def fingerprint(self) -> str:
        """A short hash of every row in its place: results of other rows are other results."""
        return hashlib.sha256(repr(self).encode()).hexdigest()[:12]


def apart(
    rows: Iterable[One], key: Callable[[One], str], sizes: Sequence[int], seed: int = SEED
) -> tuple[list[One], ...]:
    """Parts of `sizes` groups each, then the rest; rows with an equal key are never in two parts."""
    groups: dict[str, list[One]] = {}
    for row in rows:
        groups.setdefault(key(row), []).append(row)
    order = sorted(groups)
    random.Random(seed).shuffle(order)
    assert sum(sizes) < len(order), f"{len(order)} groups do not give parts of {sizes} and a rest"
    parts, start = [], 0
    for size in (*sizes, len(order)):
        parts.append([row for name in order[start : start + size] for row in groups[name]])
        start += size
    return tuple(parts)


def sst2(folder: Path, *, tuning: int, heldout: int) -> Rows:
    """SST-2: the first `heldout` of the shuffled dev file; `tuning` sentences of the training file."""
    chosen, train = apart(_labelled(folder / "sst2_train.tsv", text=0, label=1), _text, [tuning])
    dev = _labelled(folder / "sst2_dev.tsv", text=0, label=1)
    random.Random(SEED).shuffle(dev)
    return Rows(train=tuple(train), tuning=tuple(chosen), heldout=tuple(dev[:heldout]), labels=("0", "1"))


def cola(folder: Path, *, tuning: int, heldout: int) -> Rows:
    """CoLA, which has no dev file here: `heldout` sentences of the training file are held out.

    Seven in ten of its sentences are acceptable, and a short training would learn just that; so it learns from
    as many of the one kind as of the other. The rows that are measured keep their proportion.
    """
    rows = _labelled(folder / "cola_train.tsv", text=3, label=1)
    kept, chosen, train = apart(rows, _text, [heldout, tuning])
    return Rows(train=tuple(balanced(train)), tuning=tuple(chosen), heldout=tuple(kept), labels=("0", "1"))


def e2e(folder: Path, *, tuning: int, heldout: int) -> Rows:
    """E2E: `heldout` meaning representations with all their references, one row of `tuning` others, the rest."""
    table = read_path(_there(folder / "e2e_dev.csv"))
    rows = [_described(row["mr"], row["ref"], number) for number, row in enumerate(table.rows, 1)]
    kept, chosen, train = apart(rows, meaning, [heldout, tuning])
    asked: dict[str, list[Example]] = {}
    for row in kept:
        asked.setdefault(meaning(row), []).append(row)
    return Rows(
        train=tuple(train),
        tuning=tuple({meaning(row): row for row in chosen}.values()),
        heldout=tuple(group[0] for group in asked.values()),
        references=tuple(tuple(row.target for row in group) for group in asked.values()),
    )


def balanced(rows: Sequence[Example], seed: int = SEED) -> list[Example]:
    """As many rows of every label as the rarest has, drawn by the seed."""
    kinds = {label: [row for row in rows if row.target == label] for label in sorted({row.target for row in rows})}
    least = min(map(len, kinds.values()))
    return [row for kind in kinds.values() for row in random.Random(seed).sample(kind, least)]


def meaning(row: Example) -> str:
    """The meaning representation that an E2E row puts into words."""
    return row.prompt[-1].content


def _text(row: Example) -> str:
    return row.prompt[-1].content


def _described(mr: str, reference: str, number: int) -> Example:
    turns = (Message("system", SYSTEM), Message("user", mr), Message("assistant", reference))
    return Example(turns, row=number)


def _labelled(path: Path, *, text: int, label: int) -> list[Example]:
    """Rows of a tab-separated file without a header line, which the app's own readers would take for one."""
    with _there(path).open(encoding="utf-8", newline="") as file:
        cells = [row for row in csv.reader(file, delimiter="\t", quoting=csv.QUOTE_NONE) if row]
    return [
        Example((Message("user", row[text]), Message("assistant", row[label])), row=number)
        for number, row in enumerate(cells, 1)
    ]


def _there(path: Path) -> Path:
    if not path.is_file():
        raise StudioError("E_DATA", f"There is no file {path}.", "Give the folder with --data-dir.")
    return path
