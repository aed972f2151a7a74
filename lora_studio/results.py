"""What a Studio answers with: plain values, each as JSON where the command line prints it."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from lora_studio.core.spec import Method
from lora_studio.data.library import Dataset
from lora_studio.runs.config import Run


@dataclass(frozen=True, kw_only=True)
class Inspection:
    """A dataset as one model will see it."""

    dataset: Dataset
    format: str
    columns: Mapping[str, str]
    limit: int  # tokens of a row
    health: Any  # data.health.Health
    lengths: Any  # data.batches.Lengths, at the limit
    notes: tuple[str, ...]  # what happened to rows on the way

    @property
    def warnings(self) -> tuple[str, ...]:
        """The notes, and what the limit takes away."""
        cut, rows, unsupervised = self.lengths.cut, self.health.rows, self.lengths.unsupervised
        said = (f"{cut:,} of {rows:,} examples are cut at {self.limit} tokens",) * (cut > 0)
        left_out = f"{unsupervised:,} examples keep no token to learn from and are left out"
        return (*self.notes, *said, *(left_out,) * (unsupervised > 0))

    def as_json(self) -> dict[str, Any]:
        tokens = {"median": self.lengths.median, "p95": self.lengths.p95, "max": self.lengths.max}
        return {
            "id": self.dataset.id,
            "name": self.dataset.name,
            "format": self.format,
            "columns": dict(self.columns),
            "rows": self.health.rows,
            "train": self.health.train,
            "heldout": self.health.heldout,
            "tokens": tokens,
            "histogram": list(self.lengths.histogram),
            "cut": self.lengths.cut,
            "supervised_tokens": self.lengths.supervised,
            "warnings": list(self.warnings),
            "health": self.health.as_json(self.limit),
        }


@dataclass(frozen=True, kw_only=True)
class Plan:
    """What a run would train and cost."""

    pieces: Sequence[Any]  # core.baselines.Piece
    method: Method  # as asked, with the heads that a classifier trains along
    labels: tuple[str, ...]  # what a classifier chooses from
    estimate: Any  # estimate.Estimate

    def as_json(self) -> dict[str, Any]:
        targets = [
            {"name": piece.name, "role": piece.role, "shape": list(piece.shape), "parameters": piece.parameters}
            for piece in self.pieces
        ]
        return {"targets": targets, **self.estimate.as_json()}


@dataclass(frozen=True, kw_only=True)
class Exported:
    """The files of an export, whether they do what the run's model does (proof.Proof) and, of a merged model, what
    rounding changed (export.Rounding)."""

    files: list[Path]
    proof: Any = None
    rounding: Any = None


@dataclass(frozen=True, kw_only=True)
class Pushed:
    """What was uploaded, where it is, and its proof."""

    address: str
    files: list[str]
    proof: Any


@dataclass(frozen=True)
class Comparison:
    """One moment of a side-by-side: answers in the order of the panes, the base model first."""

    names: tuple[str, ...]  # "base", then run ids; a blend's are joined by " + "
    answers: Sequence[Any]  # generate.Answer
    base_difference: float  # largest |logit| difference of the base row to the untouched model; 0 is right if exact
    seconds: float
    exact: bool = True  # False with virtual tokens, which the base row only does not look at, so that sums round
    chances: Sequence[Mapping[str, float]] = ()  # of each label, per answer; empty where text is written


@dataclass(frozen=True)
class Written:
    """The answers of a prompt set that are finished since the last time, and how the base row was checked."""

    texts: Mapping[int, Sequence[str]]  # by number of the prompt, a text per side
    base_difference: float | None  # as Comparison's, on the first prompt; None where the base is not asked
    exact: bool = True


@dataclass(frozen=True)
class Wanted:
    """How likely the wanted answer of one row is: each of its tokens as text, and its probability in each pane."""

    names: tuple[str, ...]  # "base", then run ids
    texts: tuple[str, ...]
    chances: Sequence[Sequence[float]]  # per pane, one per token
    left: int = 0  # tokens of the answer behind these


def run_as_json(run: Run) -> dict[str, Any]:
    """One entry of `runs --json`."""
    return {
        "id": run.id,
        "name": run.name,
        "status": run.status,
        "step": run.step,
        "steps": run.steps,
        "verdict": run.verdict,
        "model": run.config.model,
        "error": dict(run.error) if run.error else None,
        "created": run.created,
        "brought": run.brought,
        "summary": dict(run.summary),
        "config": asdict(run.config),
    }
