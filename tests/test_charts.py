"""Charts are functions of plain rows: what they plot, that every figure can be drawn anywhere, and escaping."""

import json
from collections.abc import Callable
from typing import Any

import plotly.graph_objects as go
import pytest

from lora_studio import charts

EVIL = "<img src=x onerror=alert(1)><a href='javascript:alert(1)'>\n& co"


def module(layer: int | None = 0, role: str = "attn.q", relative: float = 0.02, **own: Any) -> dict[str, Any]:
    values = {"delta_norm": 3.0, "effective_rank": 1.8, "rank99": 2, "singular_values": [2.0, 1.0, 0.1]}
    place = {"name": f"model.layers.{layer}.{role}", "role": role, "layer": layer}
    return {**place, "relative_norm": relative, **values, **own}


def row(layer: int | None = 0, role: str = "attn.q", factor: float | None = 8.0) -> dict[str, Any]:
    norms = {"weight_norm": 60.0, "delta_norm": 3.0, "along_delta": 0.3, "along_weight": 20.0, "along_random": 0.1}
    return {"name": f"layers.{layer}.{role}", "role": role, "layer": layer, "rank": 4, **norms, "factor": factor}


CURVE = {
    "rank": 4,
    "smallest": 2,
    "points": [{"rank": rank, "loss": loss, "parameters": 10 * rank} for rank, loss in [(0, 5.0), (2, 1.01), (4, 1.0)]],
}
GRID = [[0.5, 0.25], [0.25, 0.4], [0.2, 0.3]]
LENGTHS = {name: {"width": 20, "counts": [1, 0, 2], "longest": 99} for name in ("prompt", "answer")}
FIGURES: dict[str, Callable[[str], go.Figure]] = {
    "relative change": lambda name: charts.relative_change([module(role=name, name=name), module(None, role="embed")]),
    "singular values": lambda name: charts.singular_values(module(name=name)),
    "similarity": lambda name: charts.similarity(GRID, GRID, (name, name)),
    "rank curve": lambda name: charts.rank_curve(CURVE),
    "amplification": lambda name: charts.amplification([row(role=name), row(1)]),
    "token lengths": lambda name: charts.token_lengths(LENGTHS),
    "labels": lambda name: charts.label_counts([(name, 3), ("b", 1)]),
}


@pytest.mark.parametrize("name", FIGURES)
def test_a_figure_is_plain_json_on_a_transparent_ground_with_titled_axes(name: str) -> None:
    figure = FIGURES[name]("attn.q")
    drawn = json.loads(figure.to_json())
    layout = drawn["layout"]
    assert layout["paper_bgcolor"] == layout["plot_bgcolor"] == "rgba(0, 0, 0, 0)" and "width" not in layout
    axes = [axis for key, axis in layout.items() if key in ("xaxis", "yaxis", "xaxis2")]
    assert len(axes) >= 2 and all(axis["title"]["text"] for axis in axes)
    assert "bdata" not in figure.to_json()  # lists, which every plotly.js reads


@pytest.mark.parametrize("name", FIGURES)
def test_no_name_is_read_as_a_tag(name: str) -> None:
    drawn = FIGURES[name](EVIL).to_json()
    assert "<img" not in drawn and "<a " not in drawn and "\\u003cimg" not in drawn


def test_a_name_is_one_short_line() -> None:
    assert charts.text("a\n b") == "a b" and charts.text("x" * 50, 10) == "x" * 9 + "…"
    assert charts.text("<b>&") == "&lt;b&gt;&amp;" and charts.text("it's") == "it's"


@pytest.mark.parametrize(("share", "said"), [(0.0123, "1.2 %"), (0.5, "50 %"), (12.34, "1,234 %"), (0.0, "0 %")])
def test_shares_are_said_in_percent(share: float, said: str) -> None:
    assert charts.percent(share) == said


def test_the_heat_map_puts_layers_in_order_and_leaves_gaps() -> None:
    modules = [module(layer, role, relative=0.01 * layer) for layer in (10, 9, 2) for role in ("attn.q", "attn.v")]
    heat = charts.relative_change([*modules[:-1], module(None, "embed", 0.5)]).data[0]
    assert list(heat.x) == ["attn.q", "attn.v", "embed"] and list(heat.y) == ["outside", "2", "9", "10"]
    assert [list(line) for line in heat.z] == [
        [None, None, 50.0],
        [2.0, None, None],  # the last one of the list was left out
        [9.0, 9.0, None],
        [10.0, 10.0, None],
    ]


def test_the_bars_that_hold_99_percent_are_strong_and_the_line_is_at_the_effective_rank() -> None:
    figure = charts.singular_values(module())
    assert list(figure.data[0].y) == [2.0, 1.0, 0.1]
    assert list(figure.data[0].marker.color) == [charts.STRONG, charts.STRONG, charts.FAINT]
    assert figure.layout.shapes[0].x0 == 2.3 and "1.8" in figure.layout.annotations[0].text


def test_similarity_shows_the_baseline_on_the_same_scale() -> None:
    figure = charts.similarity(GRID, [[0.1, 0.2], [0.2, 0.2], [0.3, 0.3]], ("one", "two"))
    measured, random = figure.data
    assert [list(line) for line in measured.z] == GRID and random.z[2][1] == 0.3
    assert measured.coloraxis == random.coloraxis == "coloraxis"
    assert (figure.layout.coloraxis.cmin, figure.layout.coloraxis.cmax) == (0, 0.5)
    assert charts.similarity([[1.0002]], GRID[:1], ("a", "b")).layout.coloraxis.cmax == 1  # rounding is no quarter
    assert list(measured.x) == [1, 2] and list(measured.y) == [1, 2, 3]  # i down, j across, counted from 1


def test_the_curve_rings_the_smallest_rank_and_draws_the_whole_as_a_line() -> None:
    figure = charts.rank_curve(CURVE)
    line, ring = figure.data
    assert list(line.x) == ["0", "2", "4"] and list(line.y) == [5.0, 1.01, 1.0]
    assert (list(ring.x), list(ring.y)) == (["2"], [1.01]) and figure.layout.shapes[0].y0 == 1.0
    growing = charts.rank_curve({**CURVE, "smallest": None, "points": CURVE["points"][:2]})
    assert len(growing.data) == 1 and not growing.layout.shapes  # the whole adapter is not measured yet
    assert charts.rank_curve({**CURVE, "smallest": None, "points": []}).data[0].y == ()


def test_amplification_has_a_line_per_role_and_a_gap_where_it_has_no_bound() -> None:
    figure = charts.amplification([row(0), row(0, "attn.v", 2.0), row(1, factor=None), row(1, "attn.v", 3.0)])
    q, v = figure.data
    assert (q.name, list(q.x), list(q.y)) == ("attn.q", ["0", "1"], [8.0, None])
    assert list(v.y) == [2.0, 3.0] and figure.layout.yaxis.type == "log"
    assert q.line.color != v.line.color and q.marker.symbol != v.marker.symbol  # told apart without colour


def test_every_bar_of_lengths_says_from_where_to_where_and_the_last_has_the_rest() -> None:
    prompts, answers = charts.token_lengths(LENGTHS).data
    assert list(prompts.x) == [10, 30, 50] and list(prompts.y) == [1, 0, 2]
    assert list(prompts.customdata) == ["0 to 19", "20 to 39", "40 to 99"]
    assert prompts.marker.color != answers.marker.color == charts.STRONG


def test_labels_beyond_the_last_bar_are_one_bar_and_no_row_is_lost() -> None:
    labels = [(f"{'x' * 30} {number}", 100 - number) for number in range(charts.MOST_BARS + 7)]
    (bars,) = charts.label_counts(labels).data
    assert sum(bars.x) == sum(rows for _, rows in labels) and len(bars.x) == charts.MOST_BARS + 1
    assert list(bars.y) == list(range(len(bars.x)))  # names that are cut alike stay apart
    assert bars.customdata[-1] == "7 more"
    assert len(charts.label_counts(labels[:3]).data[0].x) == 3
