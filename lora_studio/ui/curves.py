"""Curves of runs for the scripts that draw several at once: the points that a page has not seen yet."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

from lora_studio.runs.config import Run
from lora_studio.studio import Studio
from lora_studio.ui import live

POINTS = 6_000  # of all curves together in one answer


def news(studio: Studio, runs: Sequence[Run], seen: Any) -> list[dict[str, Any]]:
    """What is new of each run; seen: records that the caller has, by run."""
    known = seen if isinstance(seen, Mapping) else {}
    limit = max(200, POINTS // max(1, len(runs)))
    return [_news(studio, run, known.get(run.id), limit) for run in runs]


def curve(records: Sequence[Mapping[str, Any]], name: str) -> tuple[list[int], list[float | None]]:
    """Steps and values of one figure; a later attempt's Started forgets what was said of later steps."""
    points: dict[int, float | None] = {}
    for record in records:
        if record["type"] == "Started":
            points = {step: value for step, value in points.items() if step <= record["step"]}
        elif record["type"] == "Metric" and name in record["values"]:
            points[record["step"]] = short(record["values"][name])
    return list(points), list(points.values())


def _news(studio: Studio, run: Run, seen: Any, limit: int) -> dict[str, Any]:
    """All points of a run once it went on behind an earlier step; tokens: trained so far, at each of train's steps."""
    start = seen if type(seen) is int and seen >= 0 else 0
    records = studio.runs.events(run.id, start)
    following = start + len(records)
    if start and any(record["type"] == "Started" for record in records):
        start, records = 0, studio.runs.events(run.id)[:following]
    train = live.thin(*curve(records, "train_loss"), limit)
    trained = [one for one in records if one["type"] == "Metric" and "tokens" in one["values"]]
    tokens = {one["step"]: one["values"]["tokens"] for one in trained}
    return {
        "run": run.id,
        "start": start,
        "next": following,
        "state": run.status,
        "step": run.step,
        "steps": run.steps,
        "train": (*train, [tokens.get(step) for step in train[0]]),
        "heldout": live.thin(*curve(records, "heldout_loss"), limit),
    }


def short(value: float | None) -> float | None:
    """Five digits of a figure; None where there is none."""
    return None if value is None or not math.isfinite(value) else float(f"{value:.5g}")
