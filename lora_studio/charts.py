"""Data -> plotly figures, as pure functions: what a report or a notebook shows of a run without the page.

The live chart of the page is drawn by ui/live.js with the same colours; this module knows no run and no page.
"""

from collections.abc import Sequence
from typing import Any

import plotly.graph_objects as go

TRAIN, HELDOUT = "#4f46e5", "#c2570c"
GRID = "rgba(100, 116, 139, .22)"

Curve = tuple[Sequence[int], Sequence[float | None]]  # steps, values


def loss_curves(train: Curve, heldout: Curve = ((), ()), kept: int | None = None) -> go.Figure:
    """Train loss faint and smoothed, held-out loss as markers, a ring around the step that was kept."""
    steps, losses = train
    at, measured = heldout
    figure = go.Figure(layout=_layout("step", "loss"))
    faint = {"line": {"width": 1, "color": TRAIN}, "opacity": 0.38, "hoverinfo": "skip"}
    figure.add_scatter(x=list(steps), y=list(losses), name="train", mode="lines", **faint)
    line, even = {"width": 2.2, "color": TRAIN}, smooth(losses, max(steps, default=1))
    figure.add_scatter(x=list(steps), y=even, name="train, smoothed", mode="lines", line=line)
    line = {"width": 1.5, "color": HELDOUT}
    figure.add_scatter(x=list(at), y=list(measured), name="held out", mode="lines+markers", line=line)
    if kept is not None and kept in at:
        ring = {"size": 13, "color": "rgba(0, 0, 0, 0)", "line": {"width": 2, "color": HELDOUT}}
        figure.add_scatter(x=[kept], y=[measured[list(at).index(kept)]], name="kept", mode="markers", marker=ring)
    return figure


def token_histogram(bins: Sequence[int], longest: int, limit: int | None = None) -> go.Figure:
    """How many examples have how many tokens, over equal bins from 0 to `longest`; `limit` marks the cut."""
    width = (longest + 1) / max(1, len(bins))
    figure = go.Figure(layout=_layout("tokens per example", "examples"))
    centres = [width * (place + 0.5) for place in range(len(bins))]
    figure.add_bar(x=centres, y=list(bins), width=width, marker={"color": TRAIN}, name="examples")
    if limit is not None and limit <= longest:
        figure.add_vline(x=limit, line={"color": HELDOUT, "dash": "dash"}, annotation_text="cut")
    return figure


def smooth(values: Sequence[float | None], steps: int) -> list[float | None]:
    """Running mean that starts unbiased; gaps stay gaps, and a run of few `steps` is remembered for less long."""
    mean, weight = 0.0, 0.0
    memory = min(0.9, max(0.5, 1 - 10 / steps))
    smoothed: list[float | None] = []
    for value in values:
        if value is None:
            smoothed.append(None)
            continue
        mean, weight = memory * mean + (1 - memory) * value, memory * weight + 1 - memory
        smoothed.append(mean / weight)
    return smoothed


def _layout(across: str, up: str) -> dict[str, Any]:
    axis = {"gridcolor": GRID, "zeroline": False, "automargin": True}
    return {
        "template": "none",
        "height": 320,
        "margin": {"l": 50, "r": 10, "t": 10, "b": 44},
        "paper_bgcolor": "rgba(0, 0, 0, 0)",
        "plot_bgcolor": "rgba(0, 0, 0, 0)",
        "hovermode": "x unified",
        "legend": {"orientation": "h", "x": 1, "xanchor": "right", "y": 1.01, "yanchor": "bottom"},
        "xaxis": {**axis, "title": {"text": across}, "rangemode": "tozero"},
        "yaxis": {**axis, "title": {"text": up}},
    }
