"""A figure held against what was asked of it, in one sentence: met or not met, with the spread of the repetitions.

The three programs training, generation and study end alike: their ratios and figures, in one line of JSON.
"""

import argparse
import json
import statistics
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True, kw_only=True)
class Goal:
    """`values`: one figure per repetition; their median is held against the bound."""

    text: str
    values: Sequence[float]
    least: float | None = None
    most: float | None = None
    unit: str = "times"

    @property
    def value(self) -> float:
        return statistics.median(self.values)

    @property
    def met(self) -> bool:
        return self.value >= self.least if self.least is not None else self.value <= (self.most or 0.0)

    @property
    def sentence(self) -> str:
        bound = f"at least {self.least:g}" if self.least is not None else f"at most {self.most:g}"
        spread = f" ({min(self.values):.3g} to {max(self.values):.3g})" if len(self.values) > 1 else ""
        return f"{'Met' if self.met else 'NOT MET'}: {self.text}: {self.value:.3g}{spread} {self.unit}, {bound} asked."


def paired(ours: Sequence[float], theirs: Sequence[float]) -> list[float]:
    """ours / theirs, repetition by repetition: both of a pair ran close together on a machine that drifts."""
    return [one / other for one, other in zip(ours, theirs, strict=True)]


def middle(values: Sequence[float], digits: int = 2) -> str:
    """The median, with the smallest and largest value behind it when there are several."""
    shown = f"{statistics.median(values):.{digits}f}"
    return f"{shown} ({min(values):.{digits}f}–{max(values):.{digits}f})" if len(values) > 1 else shown


def say(goals: Sequence[Goal]) -> None:
    """Each goal on a line of its own."""
    print("\n".join(f"- {goal.sentence}" for goal in goals), flush=True)


def finish(options: argparse.Namespace, goals: Sequence[Goal], figures: Mapping[str, Any]) -> None:
    """The last line, where JSON was asked for."""
    if options.json:
        from benchmarks.paper import machine

        ratios = {goal.text: goal.value for goal in goals}
        missed = [goal.text for goal in goals if not goal.met]
        document = {"ratios": ratios, "not_met": missed, "figures": figures, "machine": machine()}
        print(json.dumps(document | {"date": time.strftime("%F")}))
