"""One JSON line each way."""

import json
import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lora_studio.events import (
    EVENTS,
    SAID,
    Ended,
    Event,
    Learned,
    Metric,
    Probed,
    Sample,
    Saved,
    Started,
    Warned,
    from_line,
    from_lines,
    to_line,
)

ALL = [
    Started(steps=3, trainable=1, total=2, device="cpu", precision="float32", train_rows=9, heldout_rows=1),
    Probed(tokens=9, seconds_step=0.5, seconds=3.0, memory_bytes=9, accumulate=1, batch_fits=None),
    Metric(step=1, values={"train_loss": 0.5}),
    Sample(step=0, index=0, prompt="p\n", text="tö", target="x"),
    Saved(step=1, heldout_loss=None),
    Warned(step=0, code="W", message="m"),
    Learned(
        step=3,
        verdict="learnt",
        sentence="It learnt.",
        advice="Go on.",
        losses={"heldout": [2.0, None]},
        metric=None,
        rows=[{"part": "train", "base": "ö\n"}],
    ),
    Ended(step=3, run="r", status="done"),
]


def test_every_event_is_one_line_and_comes_back() -> None:
    assert {type(event).__name__ for event in ALL} == set(EVENTS)
    for event in ALL:
        line = to_line(event, time=1.0, attempt=1)
        record = from_line(line)
        assert "\n" not in line and record and record.pop("time") == 1.0 and record.pop("attempt") == 1
        assert EVENTS[record.pop("type")](**record) == event


def test_not_a_number_is_null_and_named() -> None:
    record = json.loads(to_line(Metric(step=1, values={"a": math.nan, "b": 1.0}), time=0.0, attempt=1))
    assert record["values"] == {"a": None, "b": 1.0} and record["nan"] == ["a"]


@pytest.mark.parametrize("event", ALL)
def test_a_record_that_misses_what_every_reader_counts_on_is_no_event(event: Event) -> None:
    whole = json.loads(to_line(event, time=1.0, attempt=1))
    for name in SAID[whole["type"]] | {"type"}:
        assert from_line(json.dumps({key: value for key, value in whole.items() if key != name})) is None, name
    for name in ("step", "attempt"):
        assert from_line(json.dumps(whole | {name: "1"})) is None


def test_what_is_no_event_is_none() -> None:
    assert [from_line(line) for line in (b"", b'{"type": "Metr', b"[]", b'{"type": "Else"}', b"\x00\x00")] == [None] * 5


LINES = [to_line(event, time=1.0, attempt=1).encode() for event in ALL]
ELSE = [b"", b"[]", b"{}", b'{"type": "Metr', LINES[0] + b"," + LINES[1], b"],[", b"1", b'"\xff"', b"\x00"]


@given(st.lists(st.sampled_from([*LINES, *ELSE]), max_size=8))
def test_many_lines_are_read_as_each_alone(lines: list[bytes]) -> None:
    alone = [record for record in map(from_line, lines) if record]
    assert from_lines(b"".join(line + b"\n" for line in lines)) == alone
