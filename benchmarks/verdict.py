"""From figures to a sentence: confirmed, not confirmed, or within noise.

Every claim is brought to the form "this difference is at least so much". Noise is two standard errors of the
difference. Where a table has several methods with a few seeds each, the standard deviation is pooled over them,
because three values alone tell little about their spread.
"""

import math
import statistics
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

CONFIRMED, NOT_CONFIRMED, WITHIN_NOISE = "confirmed", "not confirmed", "within noise"


def judge(difference: float, noise: float | None, floor: float = 0.0) -> str:
    """The verdict on "difference >= floor"; noise None means that the spread is unknown."""
    if noise is None or not math.isfinite(difference):
        return WITHIN_NOISE if noise is None else NOT_CONFIRMED
    if difference - noise > floor:
        return CONFIRMED
    return NOT_CONFIRMED if difference + noise < floor else WITHIN_NOISE


def pooled_noise(samples: Iterable[Sequence[float]]) -> float | None:
    """Two standard errors of the difference of two means, from the spread within all samples of a table.

    None when no sample has two values.
    """
    groups = [sample for sample in samples if len(sample) > 1]
    if not groups:
        return None
    squares = sum((len(group) - 1) * statistics.variance(group) for group in groups)
    variance = squares / sum(len(group) - 1 for group in groups)
    return 2 * math.sqrt(2 * variance / min(map(len, groups)))


def paired_noise(ours: Sequence[float], theirs: Sequence[float]) -> float | None:
    """Two standard errors of the mean difference of two methods on the same items."""
    differences = [one - other for one, other in zip(ours, theirs, strict=True)]
    return 2 * statistics.stdev(differences) / math.sqrt(len(differences)) if len(differences) > 1 else None


def median_noise(values: Sequence[float]) -> float | None:
    """Two standard errors of a median, from the median absolute deviation: timings have outliers."""
    if len(values) < 2:
        return None
    middle = statistics.median(values)
    spread = 1.4826 * statistics.median(abs(value - middle) for value in values)
    return 2 * 1.2533 * spread / math.sqrt(len(values))


@dataclass(frozen=True, kw_only=True)
class Claim:
    """One sentence of the paper, held against our figures."""

    text: str
    judgement: str
    ours: str
    paper: str

    @property
    def sentence(self) -> str:
        return f"{self.judgement.capitalize()}: {self.text} Here {self.ours}; the paper: {self.paper}."


def at_least(
    text: str,
    ours: float,
    theirs: float,
    noise: float | None,
    *,
    paper: str,
    unit: str,
    floor: float = 0.0,
    chance: float = -math.inf,
) -> Claim:
    """A claim about a difference; the sentence says both figures, the difference and its noise.

    chance: what is had without learning. Where neither figure is clearly above it there is nothing to compare.
    """
    known = f"± {noise:.2f}" if noise is not None else "of unknown noise (one run each)"
    learnt = max(ours, theirs) > chance + (noise or 0.0)
    nothing = "" if learnt else f", and neither is clearly above the {chance:.2f} of no learning"
    return Claim(
        text=text,
        judgement=judge(ours - theirs, noise, floor) if learnt else WITHIN_NOISE,
        ours=f"{ours:.2f} against {theirs:.2f} {unit}, difference {ours - theirs:+.2f} {known}{nothing}",
        paper=paper,
    )


def measured(text: str, value: float, noise: float | None, *, paper: str, floor: float, unit: str) -> Claim:
    """A claim that one figure is at least `floor`; the sentence says the figure and its noise."""
    known = f" ± {noise:.2f}" if noise else ""
    return Claim(text=text, judgement=judge(value, noise, floor), ours=f"it is {value:,.2f}{known} {unit}", paper=paper)


def mean_sd(values: Sequence[float], digits: int = 1) -> str:
    """89.1 ± 0.4, or the value alone when there is one."""
    mean = f"{statistics.fmean(values):.{digits}f}"
    return f"{mean} ± {statistics.stdev(values):.{digits}f}" if len(values) > 1 else mean


def markdown(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table in Markdown, padded so that it reads as plain text too."""
    widths = [max(len(line[column]) for line in (head, *rows)) for column in range(len(head))]
    lines = [head, ["-" * width for width in widths], *rows]
    return "\n".join(
        f"| {' | '.join(cell.ljust(width) for cell, width in zip(line, widths, strict=True))} |" for line in lines
    )
