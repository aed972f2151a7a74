"""Data in, HTML that draws it out: curves, bars and a heat map without a script, for a page that must open anywhere.

Pure functions that know no run and no file. A drawing is as wide as its place: lines are stretched, the words beside
them are not. What a mark stands for is its title, shown where the pointer rests. Colours are the page's variables.
"""

import html
import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TypeVar

COLUMNS = 240  # of a curve: more points than these are drawn as the lowest and the highest of each column
HOVERS = 100  # places of a curve that have a title; as many again where there are dots

Point = tuple[float, float]
T = TypeVar("T")


@dataclass(frozen=True, kw_only=True)
class Line:
    """One series. look: faint, strong, held or general, as the page's style sheet has them."""

    name: str
    points: Sequence[Point]  # by step, without gaps
    look: str
    dots: bool = False


def curve(lines: Sequence[Line], *, across: str, up: str, label: str) -> str:
    """Lines over steps with their legend; empty where there is no point. `label` is what is read out for it."""
    lines = [line for line in lines if line.points]
    if not lines:
        return ""
    every = [point for line in lines for point in line.points]
    last, low, high = max(x for x, _ in every) or 1, min(y for _, y in every), max(y for _, y in every)
    room = (high - low) * 0.06 or abs(high) * 0.1 or 1.0
    low, high = low - room, high + room

    def at(point: Point) -> tuple[float, float]:
        return 100 * point[0] / last, 100 * (high - point[1]) / (high - low)

    marks = [(value, 100 * (high - value) / (high - low)) for value in ticks(low, high)]
    grid = "".join(f"<path class='grid' d='M0 {y:.2f}H100'/>" for _, y in marks)
    drawn = "".join(_drawn(line, [at(point) for point in thin(line.points)]) for line in lines)
    beside = "".join(f"<span style='top:{y:.2f}%'>{figure(value)}</span>" for value, y in marks)
    below = "".join(f"<span style='left:{100 * x / last:.2f}%'>{x:,.0f}</span>" for x in ticks(0, last, whole=True))
    legend = "".join(f"<span class='{line.look}'>{html.escape(line.name)}</span>" for line in lines)
    return (
        f"<figure class='curve'><figcaption>{legend}</figcaption><div class='plot'><div class='up'>{beside}</div>"
        f"<svg viewBox='0 0 100 100' preserveAspectRatio='none' role='img' aria-label='{html.escape(label)}'>"
        f"{grid}{drawn}{_hovers(lines, across, last)}</svg><div class='across'>{below}</div></div>"
        f"<p class='axes'>{html.escape(up)} by {html.escape(across)}</p></figure>"
    )


def bars(values: Sequence[float], titles: Sequence[str], *, strong: int | None = None, label: str) -> str:
    """Bars from zero; the first `strong` of them stand out, all where it is None."""
    top = max(values, default=0) or 1
    drawn = "".join(
        f"<i class='{'strong' if strong is None or place < strong else 'faint'}'"
        f" style='height:{max(100 * value / top, 1.5 if value else 0):.1f}%' title='{html.escape(title)}'></i>"
        for place, (value, title) in enumerate(zip(values, titles, strict=True))
    )
    return f"<div class='bars' role='img' aria-label='{html.escape(label)}'>{drawn}</div>"


def heat(cells: Mapping[tuple[str, str], tuple[float, str]], *, corner: str) -> str:
    """A table of shades by (row, column), each with its figure and what it tells; the largest is darkest."""
    top = max((value for value, _ in cells.values()), default=0) or 1
    rows, columns = (list(dict.fromkeys(key[side] for key in cells)) for side in (0, 1))
    head = "".join(f"<th scope='col'>{html.escape(column)}</th>" for column in columns)
    body = ""
    for row in rows:
        body += f"<tr><th scope='row'>{html.escape(row)}</th>"
        for column in columns:
            value, told = cells.get((row, column), (0.0, ""))
            shade = f"<i style='opacity:{value / top:.3f}'></i><span>{figure(value)}</span>" if told else ""
            body += f"<td title='{html.escape(told)}'>{shade}</td>"
        body += "</tr>"
    return f"<table class='heat'><thead><tr><th scope='col'>{html.escape(corner)}</th>{head}</tr></thead>{body}</table>"


# ---- arithmetic --------------------------------------------------------------------------------------------------


def smooth(values: Sequence[float], steps: int) -> list[float]:
    """A running mean that starts unbiased; a short run is remembered for less long. As the live chart has it."""
    memory = min(0.9, max(0.5, 1 - 10 / max(steps, 1)))
    mean = weight = 0.0
    smoothed = []
    for value in values:
        mean, weight = memory * mean + (1 - memory) * value, memory * weight + 1 - memory
        smoothed.append(mean / weight)
    return smoothed


def thin(points: Sequence[Point], columns: int = COLUMNS) -> list[Point]:
    """At most two points for each of so many columns of equal width, the lowest and the highest, in their order."""
    if len(points) <= 2 * columns:
        return list(points)
    first, last = points[0][0], points[-1][0]
    buckets: dict[int, list[int]] = {}
    for place, (x, _) in enumerate(points):
        buckets.setdefault(min(columns - 1, int(columns * (x - first) / (last - first))), []).append(place)
    ends = [(min(own, key=lambda p: points[p][1]), max(own, key=lambda p: points[p][1])) for own in buckets.values()]
    return [points[place] for place in sorted({place for pair in ends for place in pair})]


def spread(items: Sequence[T], most: int) -> list[T]:
    """At most so many of them, evenly picked, the first and the last among them."""
    if len(items) <= most:
        return list(items)
    return [items[round(place * (len(items) - 1) / (most - 1))] for place in range(most)]


def ticks(low: float, high: float, count: int = 5, *, whole: bool = False) -> list[float]:
    """Round numbers between the two, about so many: multiples of 1, 2 or 5 times a power of ten."""
    rough = (high - low) / count
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(power * factor for factor in (1, 2, 5, 10) if power * factor >= rough * (1 - 1e-9))
    step = max(step, 1.0) if whole else step
    return [number * step for number in range(math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9) + 1)]


def figure(value: float) -> str:
    """Three digits that count: 1.23, 0.0123, 12,300."""
    return f"{float(f'{value:.3g}'):,.0f}" if abs(value) >= 1000 else f"{value:.3g}"


def _drawn(line: Line, points: Sequence[Point]) -> str:
    path = "M" + "L".join(f"{x:.2f} {y:.2f}" for x, y in points)
    dots = "".join(f"M{x:.2f} {y:.2f}h0" for x, y in points) if line.dots or len(points) == 1 else ""
    return f"<path class='{line.look}' d='{path}'/>" + (f"<path class='{line.look} dots' d='{dots}'/>" if dots else "")


def _hovers(lines: Sequence[Line], across: str, last: float) -> str:
    """A column for each place that tells the figures that are known there."""
    every = sorted({x for line in lines for x, _ in line.points})
    dotted = sorted({x for line in lines if line.dots for x, _ in line.points})
    steps = sorted({*spread(every, HOVERS), *spread(dotted, HOVERS)})
    borders = [0.0, *((a + b) / 2 for a, b in itertools.pairwise(steps)), last]
    known = [dict(line.points) for line in lines]
    drawn = ""
    for place, step in enumerate(steps):
        told = [f"{line.name} {figure(own[step])}" for line, own in zip(lines, known, strict=True) if step in own]
        left, right = 100 * borders[place] / last, 100 * borders[place + 1] / last
        title = html.escape(", ".join([f"{across} {step:,.0f}", *told]))
        drawn += f"<rect x='{left:.2f}' width='{right - left:.2f}' height='100'><title>{title}</title></rect>"
    return drawn
