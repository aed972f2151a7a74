"""A study: the same training with several ranks and choices of matrices, and the table that reads it.

    grid    one RunConfig per rank, choice of matrices and learning rate; they share config.study and nothing else
    table   those runs as the paper's Table 6 (matrices down, ranks across) with the cells of its Table 5 marked:
            different matrices at about the same number of trainable parameters

The recommended cell has the fewest trainable parameters among those that keep 99 % of the best cell's fall in held-out
loss, counted from the base model's. This module knows neither the queue nor the training: it makes configs and reads
runs.
"""

import math
import re
import uuid
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

from lora_studio.core.spec import PRESETS, LoraSpec
from lora_studio.errors import StudioError, quote
from lora_studio.fields import check
from lora_studio.runs.config import ACTIVE, Run, RunConfig

MOST = 24  # runs of one study
KEPT = 0.99  # of the best cell's fall, by the recommended cell
OVER, FINAL = ("done", "stopped", "failed"), ("done", "stopped")  # what has ended for good, and what of it counts
BROKEN = ("paused", "lost")  # what nobody trains, but what can go on
SAME = 1.25  # the largest ratio of parameters within one budget: less than between two ranks that double
MATRICES: dict[str, tuple[str, ...]] = {"Attention q": ("attn.q",), **PRESETS}  # rows that a form offers
ALONG = (
    "Along a row: more rank on the same matrices. Where the loss stops falling, more rank buys nothing here (the"
    " paper's Table 6)."
)
LETTERS = (
    "Cells with the same letter cost about the same number of parameters: the lowest of them says which matrices to"
    " spend them on (Table 5)."
)
RULE = (
    "Recommended is the cell with the fewest trainable parameters that keeps 99 % of the best cell's fall in held-out"
    " loss. Each cell is one run: a difference as small as that of another seed says nothing."
)


# ---- what is asked ---------------------------------------------------------------------------------------------------


def grid(
    config: RunConfig, ranks: Sequence[int], targets: Sequence[Sequence[str]], rates: Sequence[float] = ()
) -> list[RunConfig]:
    """One config per choice of matrices, rank and rate, in this order, all with one fresh study id.

    alpha keeps its ratio to the rank, so that the scale of the update is the same in every cell. rates: learning
    rates; none takes the config's. Doubles count once. Raises E_STUDY, E_CONFIG.
    """
    method = config.method
    if not isinstance(method, LoraSpec):
        raise StudioError("E_STUDY", f"A study varies LoRA's rank and matrices; the method is {method.kind}.", _LORA)
    if method.rank_pattern or method.alpha_pattern:
        message = "Rank and alpha patterns give some matrices values of their own, which a study could not vary."
        raise StudioError("E_STUDY", message, "Leave the patterns empty.")
    if not config.train.holdout:
        message = "A study compares held-out losses, and no rows are held out."
        raise StudioError("E_STUDY", message, "Hold out a tenth of the rows.")
    ranks, rows = sorted(set(map(_rank, ranks))), list(dict.fromkeys(map(tuple, targets)))
    if not ranks:
        raise StudioError("E_STUDY", "No ranks are given.", "Give some, such as 1, 2, 4, 8.")
    if not rows or not all(rows):
        raise StudioError("E_STUDY", "No matrices are given.", "Choose at least one row of the table.")
    speeds = sorted({*rates}) or [config.train.learning_rate]
    count = len(ranks) * len(rows) * len(speeds)
    if count > MOST:
        message = f"{len(rows)} choices of matrices, {len(ranks)} ranks and {len(speeds)} rates are {count} runs."
        raise StudioError("E_STUDY", message, f"A study has at most {MOST}.")
    study, stem = uuid.uuid4().hex, config.name or config.dataset.name
    cells = []
    for row in rows:
        for rank in ranks:
            spec = replace(method, rank=rank, alpha=method.alpha / method.rank * rank, targets=row)
            for rate in speeds:
                tail = f" at {rate:g}" if len(speeds) > 1 else ""
                train = replace(config.train, learning_rate=rate)
                name = f"{stem} r{rank} {short(row)}{tail}".strip()
                cells.append(replace(config, name=name, method=check(spec), train=check(train), study=study))
    return cells


def parse_ranks(text: str) -> list[int]:
    """Ranks such as 1, 2, 4, 8. Raises E_STUDY."""
    words = _words(text)
    wrong = next((word for word in words if not re.fullmatch(r"\d{1,6}", word)), None)
    if wrong is not None:
        raise StudioError("E_STUDY", f"The rank {quote(wrong)} is not a whole number.", "Write ranks as 1, 2, 4, 8.")
    return [int(word) for word in words]


def parse_rates(text: str) -> list[float]:
    """Learning rates such as 1e-3, 5e-3. Raises E_STUDY."""
    try:
        return [float(word) for word in _words(text)]
    except ValueError:
        message = f"The learning rates {quote(text)} are not all numbers."
        raise StudioError("E_STUDY", message, "Write them as 1e-3, 5e-3.") from None


def parse_targets(text: str) -> list[tuple[str, ...]]:
    """attn.q; attn.q, attn.v; all-linear as three choices of matrices."""
    return [tuple(_words(row)) for row in text.split(";") if row.strip()]


def short(targets: Iterable[str]) -> str:
    """Matrices in a run's name: q+v, or all."""
    names = [role.rsplit(".", 1)[-1] for role in targets]
    return "all" if names == ["all-linear"] else "+".join(names)


def words(targets: Iterable[str]) -> str:
    """Matrices as a row of the table is called: q + v, or all linear."""
    name = short(targets)
    return "all linear" if name == "all" else name.replace("+", " + ")


# ---- what came of it -------------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Cell:
    """One run of a study. loss: its best held-out loss in nats, per token or per label, once it has ended well."""

    run: str
    name: str
    targets: tuple[str, ...]
    rank: int
    rate: float
    parameters: int  # trainable
    status: str
    step: int
    steps: int
    loss: float | None
    accuracy: float | None  # where labels are chosen
    adapter: bool  # whether there is one to compare and export
    resumable: bool  # paused or lost, and able to go on
    error: str

    @property
    def place(self) -> str:
        return f"{words(self.targets)} at rank {self.rank}"


@dataclass(frozen=True, kw_only=True)
class Budget:
    """Cells with different matrices and about the same number of trainable parameters, by number."""

    letter: str
    cells: tuple[Cell, ...]

    @property
    def best(self) -> Cell | None:
        """The lowest loss, once all of those that can still say theirs have said it, and two have."""
        if any(cell.status not in OVER for cell in self.cells):
            return None
        said = [cell for cell in self.cells if cell.loss is not None]
        return min(said, key=_loss) if len(said) > 1 else None

    @property
    def sentence(self) -> str:
        """What the budget says, lowest loss first."""
        sizes = sorted({cell.parameters for cell in self.cells})
        about = f"{sizes[0]:,}" if len(sizes) == 1 else f"{sizes[0]:,} to {sizes[-1]:,}"
        ranked = sorted(self.cells, key=_loss)
        said = ", ".join(f"{cell.place} ({_figure(cell.loss)})" for cell in ranked)
        return f"{self.letter}, {about} parameters: {said}"


@dataclass(frozen=True, kw_only=True)
class Table:
    """A study as it stands: rows are choices of matrices, columns are ranks."""

    study: str
    name: str
    model: str
    created: float  # seconds since the epoch, of the first run
    rows: tuple[tuple[str, ...], ...]
    ranks: tuple[int, ...]
    rates: tuple[float, ...]
    cells: Mapping[tuple[tuple[str, ...], int], tuple[Cell, ...]]  # by row and rank; the best rate first
    base_loss: float | None
    base_accuracy: float | None

    @property
    def every(self) -> list[Cell]:
        """All runs, row by row."""
        return [cell for cells in self.cells.values() for cell in cells]

    @property
    def leads(self) -> list[Cell]:
        """What stands in the table: of each cell the best of its rates."""
        return [cells[0] for cells in self.cells.values()]

    @property
    def active(self) -> bool:
        return any(cell.status in ACTIVE for cell in self.every)

    @property
    def unfinished(self) -> list[Cell]:
        """What has not ended for good: waiting, running, paused or lost."""
        return [cell for cell in self.every if cell.status not in OVER]

    @property
    def best(self) -> Cell | None:
        """The lowest final loss; of equal ones the smallest."""
        said = [cell for cell in self.leads if cell.loss is not None]
        return min(said, key=lambda cell: (_loss(cell), cell.parameters)) if said else None

    @property
    def recommended(self) -> Cell | None:
        """The cell in front, once every run has ended."""
        return None if self.unfinished else self.front

    @property
    def front(self) -> Cell | None:
        """The fewest parameters that keep 99 % of the best cell's fall; None while no cell is below the base."""
        best, base = self.best, self.base_loss
        if best is None or base is None or not _loss(best) < base:
            return None
        enough = base - KEPT * (base - _loss(best))
        keeping = [cell for cell in self.leads if _loss(cell) <= max(enough, _loss(best))]
        return min(keeping, key=lambda cell: (cell.parameters, _loss(cell)))

    @property
    def reading(self) -> list[str]:
        """How to read the table: what is in it."""
        return [ALONG, *[LETTERS] * bool(self.budgets), RULE]

    @property
    def budgets(self) -> list[Budget]:
        """Groups of cells within a quarter of each other's parameters, one per choice of matrices, smallest first."""
        left, found = sorted(self.leads, key=lambda cell: (cell.parameters, cell.rank)), []
        while left:
            first = left[0]
            near = [cell for cell in left if cell.parameters <= SAME * first.parameters]
            own = {cell.targets: cell for cell in reversed(near)}  # of one row the nearest
            group = sorted(own.values(), key=lambda cell: cell.parameters)
            if len(group) > 1:
                found.append(Budget(letter=_letter(len(found)), cells=tuple(group)))
            left = [cell for cell in left if cell not in group]
        return found

    @property
    def verdict(self) -> str:
        """What the table says so far, in one or two sentences; empty until a run has ended."""
        best, chosen, base, left = self.best, self.front, self.base_loss, len(self.unfinished)
        waiting = f"{left} of {len(self.every)} runs {'has' if left == 1 else 'have'} not finished."
        if best is None or base is None:
            if left:
                return "" if self.active else waiting
            return "No run has ended with a held-out loss, so there is nothing to compare."
        if chosen is None:
            far = f"{waiting} So far no" if left else "No"
            return f"{far} cell has a lower held-out loss than the base model ({_figure(base)})."
        rate = f", learning rate {chosen.rate:g}" if len(self.rates) > 1 else ""
        place = f"{chosen.place}{rate}. Held-out loss"
        won = f"{_figure(base)} to {_figure(chosen.loss)} with {chosen.parameters:,} parameters"
        if left:
            return f"{waiting} In front: {place} {won}."
        if chosen == best:
            return f"Recommended: {place} {won}, the lowest of all; no smaller cell keeps 99 % of its fall."
        kept = 100 * (base - _loss(chosen)) / (base - _loss(best))
        return (
            f"Recommended: {place} {won}: {math.floor(10 * kept) / 10:g} % of the fall of the best,"
            f" {best.place} ({_figure(best.loss)}, {best.parameters:,} parameters)."
        )

    def as_json(self) -> dict[str, Any]:
        """Plain values: rows of cells, a null where nothing was run, and what they say."""
        letters = {cell.run: budget.letter for budget in self.budgets for cell in budget.cells}

        def told(cell: Cell) -> dict[str, Any]:
            return {**asdict(cell), "targets": list(cell.targets), "budget": letters.get(cell.run)}

        def lead(row: tuple[str, ...], rank: int) -> dict[str, Any] | None:
            cells = self.cells.get((row, rank))
            return {**told(cells[0]), "others": [told(cell) for cell in cells[1:]]} if cells else None

        return {
            "study": self.study,
            "name": self.name,
            "model": self.model,
            "active": self.active,
            "unfinished": len(self.unfinished),
            "base_loss": self.base_loss,
            "base_accuracy": self.base_accuracy,
            "ranks": list(self.ranks),
            "rates": list(self.rates),
            "rows": [
                {"targets": list(row), "name": words(row), "cells": [lead(row, rank) for rank in self.ranks]}
                for row in self.rows
            ],
            "budgets": [
                {
                    "letter": budget.letter,
                    "runs": [cell.run for cell in budget.cells],
                    "best": budget.best.run if budget.best else None,
                    "sentence": budget.sentence,
                }
                for budget in self.budgets
            ],
            "best": self.best.run if self.best else None,
            "front": self.front.run if self.front else None,
            "recommended": self.recommended.run if self.recommended else None,
            "verdict": self.verdict,
            "reading": self.reading,
        }


def table(runs: Sequence[Run]) -> Table:
    """The table of the runs of one study, in any order."""
    assert runs and len({run.config.study for run in runs}) == 1, "the runs of one study"
    runs = sorted(runs, key=lambda run: (run.created, run.id))
    made = [_cell(run) for run in runs]
    rows, ranks = dict.fromkeys(cell.targets for cell in made), sorted({cell.rank for cell in made})
    cells = {
        (row, rank): tuple(sorted((cell for cell in made if (cell.targets, cell.rank) == (row, rank)), key=_loss))
        for row in rows
        for rank in ranks
    }
    first = runs[0]
    base = [run.summary for run in runs if run.summary.get("base_loss") is not None]
    return Table(
        study=first.config.study,
        name=first.config.dataset.name or first.name,
        model=first.config.model,
        created=first.created,
        rows=tuple(rows),
        ranks=tuple(ranks),
        rates=tuple(sorted({cell.rate for cell in made})),
        cells={place: found for place, found in cells.items() if found},
        base_loss=base[0]["base_loss"] if base else None,
        base_accuracy=base[0].get("base_accuracy") if base else None,
    )


def studies(runs: Iterable[Run]) -> dict[str, list[Run]]:
    """The runs of each study; studies and runs in the order given."""
    found: dict[str, list[Run]] = {}
    for run in runs:
        if run.config.study:
            found.setdefault(run.config.study, []).append(run)
    return found


def in_words(told: Table) -> str:
    """The table as text: one line per choice of matrices, its losses by rank, and what they say."""
    marks = {cell.run: budget.letter for budget in told.budgets for cell in budget.cells}
    width = max(18, *(len(words(row)) for row in told.rows))
    lines = [f"{'held-out loss':{width}}" + "".join(f"{f'rank {rank}':>14}" for rank in told.ranks)]
    for row in told.rows:
        line = f"{words(row):{width}}"
        for rank in told.ranks:
            cells = told.cells.get((row, rank))
            line += f"{_mark(cells[0], told, marks) if cells else '':>14}"
        lines.append(line.rstrip())
    if told.base_loss is not None:
        lines.append(f"{'base model':{width}}{_figure(told.base_loss):>12}")
    said = [told.verdict] if told.verdict else []
    if told.budgets:
        said += ["Cells with one letter have the same budget:", *(one.sentence for one in told.budgets)]
    return "\n".join([*lines, "", *said, *told.reading])


# ---- inside ----------------------------------------------------------------------------------------------------------

_LORA = "Choose the method LoRA."


def _cell(run: Run) -> Cell:
    method, summary = run.config.method, run.summary
    assert isinstance(method, LoraSpec), "grid refuses other methods"
    return Cell(
        run=run.id,
        name=run.name or run.id[:8],
        targets=method.targets,
        rank=method.rank,
        rate=run.config.train.learning_rate,
        parameters=int(run.facts.get("estimate", {}).get("trainable", 0)),
        status=run.status,
        step=run.step,
        steps=run.steps,
        loss=summary.get("best_loss") if run.status in FINAL else None,
        accuracy=summary.get("best_accuracy") if run.status in FINAL else None,
        adapter=run.has_adapter,
        resumable=run.status in BROKEN and run.resumable,
        error=(run.error or {}).get("message", ""),
    )


def _rank(rank: Any) -> int:
    if type(rank) is not int or rank < 1:
        raise StudioError("E_STUDY", f"The rank {quote(rank)} is no whole number of at least 1.", "Give 1, 2, 4, 8.")
    return rank


def _words(text: str) -> list[str]:
    return [word for word in re.split(r"[,\s]+", text) if word]


def _loss(cell: Cell) -> float:
    return math.inf if cell.loss is None else cell.loss


def _mark(cell: Cell, told: Table, letters: Mapping[str, str]) -> str:
    said = _figure(cell.loss) if cell.loss is not None else cell.status
    chosen = "*" if told.recommended == cell else " "
    return f"{said}{chosen}{letters.get(cell.run, ' ')}"


def _figure(value: float | None) -> str:
    return "–" if value is None else f"{value:.3f}" if value >= 0.1 else f"{value:.3g}"


def _letter(place: int) -> str:
    return chr(ord("A") + place)
