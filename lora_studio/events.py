"""What training says while it runs: eight frozen events, one JSON line each, both ways.

Training yields them, the worker appends them to `events.jsonl`, everything else reads them. Not-a-number
has no JSON form, so such a value is written as null and its name is listed under "nan".
"""

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import MISSING, asdict, dataclass, field, fields
from typing import Any


@dataclass(frozen=True, kw_only=True)
class Started:
    """An attempt knows what it will do: sizes are exact. `step` is the one it goes on behind, 0 for a fresh run.

    Whoever draws a curve forgets what earlier attempts said of later steps than this one.
    """

    steps: int
    trainable: int
    total: int
    device: str
    precision: str
    train_rows: int
    heldout_rows: int
    step: int = 0


@dataclass(frozen=True, kw_only=True)
class Probed:
    """One forward and backward on the heaviest batch, measured before training; it replaces the estimate."""

    tokens: int  # of that batch
    seconds_step: float
    seconds: float  # forecast for all steps, by tokens
    memory_bytes: int  # peak: of the process on a CPU, of the tensors on CUDA
    accumulate: int  # parts that a step is split into from here on
    batch_fits: int | None  # examples in a pass that fit the memory; None where all do
    step: int = 0


@dataclass(frozen=True, kw_only=True)
class Metric:
    """Figures of one optimizer step; step 0 is the base model before any update.

    Keys in use: train_loss, learning_rate, grad_norm, tokens (so far), tokens_per_s, seconds_left, memory_bytes; at
    evaluations heldout_loss, accuracy, and general_loss, the loss on a fixed text that has nothing to do with the rows.
    """

    step: int
    values: Mapping[str, float]


@dataclass(frozen=True, kw_only=True)
class Sample:
    """One fixed prompt answered greedily at this step."""

    step: int
    index: int
    prompt: str
    text: str
    target: str


@dataclass(frozen=True, kw_only=True)
class Saved:
    """The adapter of this step is on disk and is the best by held-out loss so far."""

    step: int
    heldout_loss: float | None


@dataclass(frozen=True, kw_only=True)
class Warned:
    """Something the user should know; training goes on. change: settings of TrainConfig that would cure it."""

    step: int
    code: str
    message: str
    hint: str = ""
    change: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class Learned:
    """What the adapter that is kept has learnt: the verdict of learned.judge and all that it rests on.

    step: the adapter's. losses: by part (train, heldout, general) the base model's and the adapted one's. metric: a
    learned.Score or None. rows: learned.Row each, first the ones that it trained on.
    """

    step: int
    verdict: str  # learnt, memorised, no change, broken or untested
    sentence: str
    advice: str
    losses: Mapping[str, Sequence[float | None]]
    metric: Mapping[str, Any] | None
    rows: Sequence[Mapping[str, Any]]


@dataclass(frozen=True, kw_only=True)
class Ended:
    """The last event of an attempt. status: done, stopped, paused or failed."""

    step: int
    run: str
    status: str
    error: Mapping[str, Any] | None = None
    values: Mapping[str, float] = field(default_factory=dict)


Event = Started | Probed | Metric | Sample | Saved | Warned | Learned | Ended
EVENTS: dict[str, type] = {
    kind.__name__: kind for kind in (Started, Probed, Metric, Sample, Saved, Warned, Learned, Ended)
}
SAID = {  # what the record of each must have, so that no reader has to ask
    name: {one.name for one in fields(kind) if one.default is MISSING and one.default_factory is MISSING}
    | {"step", "time", "attempt"}
    for name, kind in EVENTS.items()
}


def to_line(event: Event, *, time: float, attempt: int) -> str:
    """One JSON object without a newline; `time` in seconds since the epoch."""
    record: dict[str, Any] = {"type": type(event).__name__, **asdict(event), "time": time, "attempt": attempt}
    values = record.get("values")
    if values:
        bad = sorted(name for name, value in values.items() if not math.isfinite(value))
        if bad:
            record["values"] = {name: None if name in bad else value for name, value in values.items()}
            record["nan"] = bad
    return json.dumps(record, ensure_ascii=False, allow_nan=False)


def from_line(line: str | bytes) -> dict[str, Any] | None:
    """The record of one line, or None when the line is torn or is not an event."""
    try:
        record = json.loads(line)
    except ValueError:
        return None
    return record if _is_event(record) else None


def from_lines(data: bytes) -> list[dict[str, Any]]:
    """The records of many lines, without those that are torn or no events."""
    lines = data.splitlines()
    try:
        records = json.loads(b"[%s]" % b",".join(lines))  # at once, in half the time
    except ValueError:
        records = []
    if len(records) != len(lines):  # some line is no JSON, or is more than one
        return [record for record in map(from_line, lines) if record]
    return [record for record in records if _is_event(record)]


def _is_event(record: Any) -> bool:  # in few calls: a long curve has a hundred thousand of them
    kind = record.get("type") if type(record) is dict else None
    needed = SAID.get(kind) if type(kind) is str else None
    if needed is None or not record.keys() >= needed:
        return False
    return (
        type(record["step"]) is type(record["attempt"]) is type(record.get("steps", 0)) is int
        and type(record.get("values", {})) is dict
    )
