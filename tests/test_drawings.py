"""Drawings that stand still: laws of their arithmetic, and that names in them are text."""

import re
from html.parser import HTMLParser

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lora_studio.drawings import Line, bars, curve, figure, heat, smooth, spread, thin, ticks

NUMBERS = st.floats(-1e6, 1e6, allow_nan=False)


@given(NUMBERS, st.floats(1e-6, 1e6), st.booleans())
def test_ticks_are_round_lie_between_and_are_few(low: float, width: float, whole: bool) -> None:
    high = low + width
    if not high > low:
        return
    found = ticks(low, high, whole=whole)
    slack = 1e-6 * max(1.0, abs(low), width)
    assert len(found) <= 6 and all(low - slack <= value <= high + slack for value in found)
    if not whole:
        assert len(found) >= 2
    assert not whole or all(abs(value - round(value)) < 1e-6 for value in found)


@given(st.lists(NUMBERS, min_size=1, max_size=300), st.integers(1, 40))
def test_thinning_keeps_every_extreme_and_the_order(values: list[float], columns: int) -> None:
    points = [(float(step), value) for step, value in enumerate(values)]
    kept = thin(points, columns)
    assert len(kept) <= max(2 * columns, 0) and kept == sorted(kept) and {*kept} <= {*points}
    assert {min(values), max(values)} <= {value for _, value in kept}


@given(st.lists(st.floats(0, 10), min_size=1, max_size=60), st.integers(1, 500))
def test_smoothing_is_an_unbiased_mean(values: list[float], steps: int) -> None:
    mean = smooth(values, steps)
    assert mean[0] == pytest.approx(values[0])
    assert all(min(values) - 1e-9 <= value <= max(values) + 1e-9 for value in mean)
    assert smooth([3.0] * len(values), steps) == pytest.approx([3.0] * len(values))


@given(st.lists(st.integers(), max_size=80), st.integers(2, 20))
def test_what_is_picked_has_both_ends(items: list[int], most: int) -> None:
    picked = spread(items, most)
    assert len(picked) == min(len(items), most)
    assert not items or (picked[0], picked[-1]) == (items[0], items[-1])


@pytest.mark.parametrize(
    ("value", "words"), [(0, "0"), (0.01234, "0.0123"), (1.5, "1.5"), (12345, "12,300"), (-2000, "-2,000")]
)
def test_three_digits_count(value: float, words: str) -> None:
    assert figure(value) == words


def test_a_curve_lies_within_its_frame_and_tells_its_figures() -> None:
    train = Line(name="train", points=[(step, 1 / (1 + step)) for step in range(1001)], look="faint")
    held = Line(name="held out", points=[(0, 2.0), (500, 1.0), (1000, 0.5)], look="held", dots=True)
    drawn = curve([train, held], across="step", up="loss", label="Loss")
    places = [float(one) for one in re.findall(r"[ML ]([\d.-]+) ([\d.-]+)", drawn) for one in one]
    assert places and all(0 <= place <= 100 for place in places)
    assert "<title>step 500, train 0.002, held out 1</title>" in drawn and len(drawn) < 40_000
    assert curve([Line(name="x", points=[], look="held")], across="step", up="loss", label="") == ""


def test_one_point_and_one_level_can_be_drawn() -> None:
    for points in ([(0, 1.0)], [(0, 0.0), (1, 0.0)], [(0, -3.0), (7, -3.0)]):
        assert "<svg" in curve([Line(name="x", points=points, look="held")], across="step", up="loss", label="x")
    assert "height:0.0%" in bars([0.0, 0.0], ["a", "b"], label="nothing") and bars([], [], label="none")


def test_names_are_text() -> None:
    evil = "<img src=x onerror=hit(0)>'\""

    found: list[str] = []

    class Tags(HTMLParser):
        def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
            found.extend([tag, *(name for name, _ in attrs)])

    seen = Tags()
    seen.feed(curve([Line(name=evil, points=[(0, 1.0)], look="held")], across=evil, up=evil, label=evil))
    seen.feed(bars([1.0], [evil], label=evil) + heat({(evil, evil): (1.0, evil)}, corner=evil))
    assert "svg" in found and not {"img", "onerror"} & {*found}
