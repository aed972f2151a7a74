"""Data in, a plotly Figure out: pure functions that know no model, no file and no page.

The rows are those of the reports' `as_json`. Backgrounds are transparent and colours are of middle lightness or
safe for colour-blind eyes (Okabe and Ito's, viridis), so that a figure can be read on light and on dark; a page may
set the font colour of its own. Names come from people and from model files, and plotly reads tags in text: they are
escaped and shortened here.
"""

import html
import math
from collections.abc import Mapping, Sequence
from typing import Any

import plotly.graph_objects as go
from plotly.subplots import make_subplots

INK, GRID = "#6b7280", "rgba(128, 128, 128, .25)"
STRONG, FAINT = "#6366f1", "rgba(99, 102, 241, .4)"  # what matters and the rest
MARK = "#d55e00"
SERIES = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#56b4e9", "#e69f00", "#8c8c8c")
SYMBOLS = ("circle", "square", "diamond", "cross", "triangle-up", "x", "star")
COLORBAR = {"thickness": 12, "outlinewidth": 0, "x": 1.01, "xpad": 4}
TIMES = [digit * 10.0**power for power in range(-4, 6) for digit in (1, 2, 5)]  # ticks of a logarithmic axis
LEARNT = ("answer", "document")  # parts of a row that are trained on
MOST_BARS = 20  # labels with a bar of their own
OUTSIDE = "outside"  # where a matrix stands that belongs to no block, such as the embedding


def relative_change(modules: Sequence[Mapping[str, Any]]) -> go.Figure:
    """Heat map of ‖ΔW‖ / ‖W‖ in percent: one column per role, one row per layer, the first layer on top."""
    roles = list(dict.fromkeys(module["role"] for module in modules))
    layers = sorted({_layer(module) for module in modules}, key=lambda layer: (layer != OUTSIDE, len(layer), layer))
    cells = {(_layer(module), module["role"]): module for module in modules}
    rows = [[cells.get((layer, role)) for role in roles] for layer in layers]
    figure = go.Figure(
        go.Heatmap(
            x=[text(role, 28) for role in roles],
            y=layers,
            z=[[cell and 100 * cell["relative_norm"] for cell in row] for row in rows],
            text=[[_told(cell) for cell in row] for row in rows],
            hovertemplate="%{text}<extra></extra>",
            hoverongaps=False,
            colorscale="Viridis",
            colorbar={**COLORBAR, "title": {"text": "‖ΔW‖/‖W‖", "side": "top"}, "ticksuffix": " %"},
            xgap=1,
            ygap=1,
        )
    )
    figure.update_yaxes(type="category", autorange="reversed", title_text="layer", showgrid=False)
    figure.update_xaxes(type="category", title_text="matrix", showgrid=False)
    return _dressed(figure, height=170 + max(16 * len(layers), 90))


def singular_values(module: Mapping[str, Any]) -> go.Figure:
    """Bars of one matrix's singular values: strong ones hold 99 % of ‖ΔW‖², a line marks the effective rank."""
    values = module["singular_values"]
    figure = go.Figure(
        go.Bar(
            x=list(range(1, len(values) + 1)),
            y=list(values),
            marker_color=[STRONG if place < module["rank99"] else FAINT for place in range(len(values))],
            hovertemplate="direction %{x}: %{y:.4g}<extra></extra>",
        )
    )
    figure.add_vline(
        x=module["effective_rank"] + 0.5,  # k equal bars end at k + 0.5
        line={"color": MARK, "width": 2, "dash": "dash"},
        annotation={"text": f"effective rank {module['effective_rank']:.1f}", "font": {"color": MARK}, "yshift": 4},
    )
    figure.update_xaxes(title_text="direction, strongest first", dtick=max(1, len(values) // 8), showgrid=False)
    figure.update_yaxes(title_text="singular value of ΔW", rangemode="tozero")
    return _dressed(figure, height=280)


def similarity(
    phi: Sequence[Sequence[float]], baseline: Sequence[Sequence[float]], names: tuple[str, str]
) -> go.Figure:
    """Two heat maps on one scale: φ(i, j) of two adapters, and what random directions would give.

    The scale starts at 0 and ends at the next quarter above the largest value of both; 1 is the most there is.
    """
    figure = make_subplots(1, 2, shared_yaxes=True, horizontal_spacing=0.06, subplot_titles=["φ(i, j)", "random"])
    for column, grid in enumerate((phi, baseline), start=1):
        across, down = list(range(1, len(grid[0]) + 1)), list(range(1, len(grid) + 1))
        hover = "i = %{y}, j = %{x}: %{z:.2f}<extra></extra>"
        figure.add_trace(go.Heatmap(x=across, y=down, z=grid, coloraxis="coloraxis", hovertemplate=hover), 1, column)
    ticks = {"showgrid": False, "tickformat": "d", "nticks": 6}
    figure.update_xaxes(title_text=f"j, {text(names[1], 14)}", **ticks)
    figure.update_yaxes(**ticks)
    figure.update_yaxes(title_text=f"i, {text(names[0], 24)}", col=1)
    most = math.ceil(4 * max(value for grid in (phi, baseline) for row in grid for value in row) - 1e-3) / 4
    figure.update_layout(coloraxis={"colorscale": "Viridis", "cmin": 0, "cmax": most, "colorbar": COLORBAR})
    return _dressed(figure, height=340, top=30)


def rank_curve(curve: Mapping[str, Any]) -> go.Figure:
    """Held-out loss against the rank that is kept; a ring marks the smallest rank that is good enough.

    curve: inside.RankCurve.as_json. The ranks stand at equal distances, since they mostly double.
    """
    points = curve["points"]
    names, losses = [str(point["rank"]) for point in points], [point["loss"] for point in points]
    figure = go.Figure(
        go.Scatter(
            x=names,
            y=losses,
            mode="lines+markers",
            line={"color": STRONG, "width": 2},
            marker={"size": 7},
            hovertemplate="rank %{x}: loss %{y:.4g}<extra></extra>",
        )
    )
    if points and points[-1]["rank"] == curve["rank"]:
        figure.add_hline(y=losses[-1], line={"color": INK, "width": 1, "dash": "dot"})
    for point in points:
        if point["rank"] == curve["smallest"]:
            ring = {"size": 16, "color": "rgba(0, 0, 0, 0)", "line": {"color": MARK, "width": 2.5}}
            at = {"x": [str(point["rank"])], "y": [point["loss"]]}
            figure.add_trace(go.Scatter(**at, mode="markers", marker=ring, hoverinfo="skip"))
    figure.update_xaxes(type="category", title_text="rank kept", categoryorder="array", categoryarray=names)
    figure.update_yaxes(title_text="held-out loss, nats/token")
    return _dressed(figure, height=300)


def strength_curve(curve: Mapping[str, Any]) -> go.Figure:
    """Held-out loss against strength; a ring marks the lowest, a dotted line the adapter as trained.

    curve: strength.StrengthCurve.as_json.
    """
    points = curve["points"]
    figure = go.Figure(
        go.Scatter(
            x=[point["strength"] for point in points],
            y=[point["loss"] for point in points],
            mode="lines+markers",
            line={"color": STRONG, "width": 2},
            marker={"size": 7},
            hovertemplate="strength %{x}: loss %{y:.4g}<extra></extra>",
        )
    )
    figure.add_vline(
        x=1,
        line={"color": INK, "width": 1, "dash": "dot"},
        annotation={"text": "as trained", "font": {"color": INK}, "yshift": 4},
    )
    for point in points:
        if point["strength"] == curve["best"]:
            ring = {"size": 16, "color": "rgba(0, 0, 0, 0)", "line": {"color": MARK, "width": 2.5}}
            at = {"x": [point["strength"]], "y": [point["loss"]]}
            figure.add_trace(go.Scatter(**at, mode="markers", marker=ring, hoverinfo="skip"))
    figure.update_xaxes(title_text="strength", range=[-0.08, 2.08], dtick=0.5, showgrid=False)
    figure.update_yaxes(title_text="held-out loss, nats/token")
    return _dressed(figure, height=300)


def amplification(rows: Sequence[Mapping[str, Any]]) -> go.Figure:
    """‖ΔW‖ / ‖Uᵀ W V‖ by layer, a line per role; on a logarithmic axis, 1 is as strong as the weight itself."""
    figure = go.Figure()
    roles = list(dict.fromkeys(row["role"] for row in rows))
    for place, role in enumerate(roles):
        own = [row for row in rows if row["role"] == role]
        colour = SERIES[place % len(SERIES)]
        figure.add_trace(
            go.Scatter(
                x=[_layer(row) for row in own],
                y=[row["factor"] or None for row in own],
                name=text(role, 28),
                mode="lines+markers",
                line={"color": colour, "width": 1.5},
                marker={"symbol": SYMBOLS[place % len(SYMBOLS)], "size": 7},
                hovertemplate="layer %{x}: %{y:.3g}×<extra>%{fullData.name}</extra>",
            )
        )
    layers = sorted({_layer(row) for row in rows}, key=lambda layer: (layer != OUTSIDE, len(layer), layer))
    figure.update_xaxes(type="category", title_text="layer", categoryorder="array", categoryarray=layers, nticks=16)
    ticks = {"tickvals": TIMES, "ticktext": [f"{value:g}" for value in TIMES]}  # plotly's own say 5 for 50
    figure.update_yaxes(type="log", title_text="amplification, times", **ticks)
    figure.update_layout(legend={"orientation": "h", "x": 0, "y": 1.02, "yanchor": "bottom"}, showlegend=True)
    return _dressed(figure, height=320, top=40)


def study(told: Mapping[str, Any]) -> go.Figure:
    """Held-out loss against trainable parameters: a line per choice of matrices, a point per rank.

    told: study.Table.as_json. Points above one another cost the same; a ring marks the recommended cell.
    """
    figure = go.Figure()
    for place, row in enumerate(told["rows"]):
        cells = [cell for cell in row["cells"] if cell and cell["loss"] is not None]
        colour, ringed = SERIES[place % len(SERIES)], [cell["run"] == told["recommended"] for cell in cells]
        figure.add_trace(
            go.Scatter(
                x=[cell["parameters"] for cell in cells],
                y=[cell["loss"] for cell in cells],
                customdata=[cell["rank"] for cell in cells],
                text=[f"{'    ' if ring else ''}r{cell['rank']}" for cell, ring in zip(cells, ringed, strict=True)],
                textposition=["middle right" if ring else "top center" for ring in ringed],
                name=text(row["name"], 28),
                mode="lines+markers+text",
                cliponaxis=False,
                line={"color": colour, "width": 1.5},
                marker={"symbol": SYMBOLS[place % len(SYMBOLS)], "size": 8},
                hovertemplate="rank %{customdata}, %{x:,} parameters: %{y:.4g}<extra>%{fullData.name}</extra>",
            )
        )
        for cell in cells:
            if cell["run"] == told["recommended"]:
                ring = {"size": 18, "color": "rgba(0, 0, 0, 0)", "line": {"color": MARK, "width": 2.5}}
                at = {"x": [cell["parameters"]], "y": [cell["loss"]]}
                figure.add_trace(
                    go.Scatter(**at, mode="markers", marker=ring, hoverinfo="skip", showlegend=False, cliponaxis=False)
                )
    figure.update_xaxes(type="log", title_text="trainable parameters", tickformat="~s", dtick="D2")
    figure.update_yaxes(title_text="held-out loss, nats")
    figure.update_layout(legend={"orientation": "h", "x": 0, "y": 1.02, "yanchor": "bottom"}, showlegend=True)
    return _dressed(figure, height=320, top=40)


def token_lengths(told: Mapping[str, Mapping[str, Any]]) -> go.Figure:
    """Bars of how many rows have how many tokens, a panel per part of a row.

    told: data.health.Health.as_json["histograms"]; the last bar of a panel has everything longer too.
    """
    figure = make_subplots(len(told), 1, vertical_spacing=0.36)
    for place, (name, one) in enumerate(told.items(), start=1):
        width, counts = one["width"], one["counts"]
        starts = [width * bar for bar in range(len(counts))]
        ends = [f"{start + width - 1:,}" for start in starts[:-1]] + [f"{one['longest']:,}"]
        figure.add_trace(
            go.Bar(
                x=[start + width / 2 for start in starts],
                y=list(counts),
                width=0.9 * width,
                marker_color=STRONG if name in LEARNT else INK,
                customdata=[f"{start:,} to {end}" for start, end in zip(starts, ends, strict=True)],
                hovertemplate="%{customdata} tokens: %{y:,} rows<extra></extra>",
            ),
            place,
            1,
        )
        figure.update_xaxes(title_text=f"tokens of the {name}", row=place)
    figure.update_yaxes(title_text="rows", rangemode="tozero", nticks=4)
    figure.update_xaxes(showgrid=False, rangemode="tozero", tickformat=",d", nticks=8)
    return _dressed(figure, height=56 + 124 * len(told))


def label_counts(labels: Sequence[tuple[str, int]]) -> go.Figure:
    """Bars of how many rows have each label, the most frequent on top; what is beyond MOST_BARS is one bar."""
    bars = [(text(label, 24), rows) for label, rows in labels[:MOST_BARS]]
    if rest := labels[MOST_BARS:]:
        bars.append((f"{len(rest):,} more", sum(rows for _, rows in rest)))
    places = list(range(len(bars)))
    figure = go.Figure(
        go.Bar(
            x=[rows for _, rows in bars],
            y=places,
            orientation="h",
            text=[f"{rows:,}" for _, rows in bars],
            textposition="outside",
            cliponaxis=False,
            marker_color=[STRONG] * len(bars[:MOST_BARS]) + [INK] * bool(rest),
            customdata=[label for label, _ in bars],
            hovertemplate="%{customdata}: %{x:,} rows<extra></extra>",
        )
    )
    names = [label for label, _ in bars]
    figure.update_yaxes(title_text="label", autorange="reversed", tickvals=places, ticktext=names, showgrid=False)
    figure.update_xaxes(title_text="rows", rangemode="tozero", nticks=5)
    return _dressed(figure, height=70 + 22 * len(bars))


def shade(row: int, column: int, columns: int) -> str:
    """The colour of a cell's line: a hue per choice of matrices, lighter for lower ranks."""
    hue = SERIES[row % len(SERIES)]
    light = 0.45 * (1 - column / max(1, columns - 1)) if columns > 1 else 0.0
    parts = [int(hue[at : at + 2], 16) for at in (1, 3, 5)]
    return "#" + "".join(f"{round(part + (225 - part) * light):02x}" for part in parts)


def text(name: str, limit: int = 40) -> str:
    """A name inside a figure: one line of at most `limit` signs, and no tag in it is read as one."""
    line = " ".join(name.split())
    return html.escape(line if len(line) <= limit else f"{line[: limit - 1]}…", quote=False)


def percent(share: float) -> str:
    """0.0123 as 1.2 %, 12.34 as 1,234 %."""
    value = 100 * share
    return f"{value:,.0f} %" if abs(value) >= 100 else f"{value:.2g} %"


def _dressed(figure: go.Figure, *, height: int, top: int = 12) -> go.Figure:
    """The looks that all figures share."""
    figure.update_layout(
        template="none",
        height=height,
        margin={"l": 48, "r": 10, "t": top, "b": 44},
        paper_bgcolor="rgba(0, 0, 0, 0)",
        plot_bgcolor="rgba(0, 0, 0, 0)",
        font={"color": INK, "size": 12},
        showlegend=bool(figure.layout["showlegend"]),
    )
    figure.update_xaxes(automargin=True, gridcolor=GRID, zeroline=False, title_standoff=8)
    figure.update_yaxes(automargin=True, gridcolor=GRID, zeroline=False, title_standoff=8)
    return figure


def _layer(row: Mapping[str, Any]) -> str:
    return OUTSIDE if row["layer"] is None else str(row["layer"])


def _told(cell: Mapping[str, Any] | None) -> str:
    if cell is None:
        return ""
    lines = [
        f"{text(cell['name'], 60)} ({text(cell['role'], 28)})",
        f"changed by {percent(cell['relative_norm'])}",
        f"effective rank {cell['effective_rank']:.1f} of {len(cell['singular_values'])}",
    ]
    return "<br>".join(lines)
