"""Curves and heatmaps as inline SVG, for a page that needs nothing else. Knows numbers and labels only."""

import html
import math
from collections.abc import Sequence
from dataclasses import dataclass

WIDTH, HEIGHT, LEFT, RIGHT, TOP, BOTTOM = 620, 230, 58, 14, 12, 30
POINTS = 300  # of a curve at most: a bin's mean stands for its steps
CELLS = 60  # columns of a heatmap at most


@dataclass(frozen=True)
class Curve:
    """Points by step; `faint` is drawn thin, behind the others."""

    name: str
    points: Sequence[tuple[float, float]]
    faint: bool = False


def line_chart(title: str, curves: Sequence[Curve], marks: Sequence[tuple[float, str]] = (), logarithmic: bool = False) -> str:
    """A figure of curves over steps with `marks` (step, text) as vertical lines; "" where there is nothing to draw."""
    curves = [Curve(curve.name, _thinned(_drawable(curve.points, logarithmic)), curve.faint) for curve in curves]
    points = [point for curve in curves for point in curve.points]
    if not points:
        return ""
    steps, values = zip(*points, strict=True)
    low, high = _range(values, logarithmic)
    across, up = _scale(min(steps), max(steps), LEFT, WIDTH - RIGHT), _scale(low, high, HEIGHT - BOTTOM, TOP)
    place = (lambda value: up(math.log10(value))) if logarithmic else up
    parts = [f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{html.escape(title)}">']
    for tick in _ticks(low, high):
        label = f"{float(f'{10**tick:.2g}'):g}" if logarithmic else f"{tick:g}"
        parts.append(f'<line class="grid" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{up(tick):.1f}" y2="{up(tick):.1f}"/>'
                     f'<text class="tick" x="{LEFT - 6}" y="{up(tick) + 4:.1f}" text-anchor="end">{label}</text>')
    parts += [f'<text class="tick" x="{across(tick):.1f}" y="{HEIGHT - 10}" text-anchor="middle">{tick:g}</text>'
              for tick in _ticks(min(steps), max(steps)) if tick == int(tick)]
    for step, text in marks:
        if min(steps) <= step <= max(steps):
            parts.append(f'<line class="mark" x1="{across(step):.1f}" x2="{across(step):.1f}" y1="{TOP}" y2="{HEIGHT - BOTTOM}">'
                         f"<title>{html.escape(text)}</title></line>")
    for number, curve in enumerate(curves):
        line = " ".join(f"{across(step):.1f},{place(value):.1f}" for step, value in curve.points)
        parts.append(f'<polyline class="curve c{number % 6}{" faint" if curve.faint else ""}" points="{line}">'
                     f"<title>{html.escape(curve.name)}</title></polyline>")
        if len(curve.points) < 40 and not curve.faint:
            parts += [f'<circle class="dot c{number % 6}" r="2.5" cx="{across(step):.1f}" cy="{place(value):.1f}">'
                      f"<title>step {step:g}: {value:.4g}</title></circle>" for step, value in curve.points]
    legend = " ".join(f'<span class="key c{number % 6}">{html.escape(curve.name)}</span>' for number, curve in enumerate(curves))
    return f'<figure><figcaption>{html.escape(title)} {legend}</figcaption>{"".join(parts)}</svg></figure>'


def heatmap(title: str, steps: Sequence[int], rows: Sequence[Sequence[float]]) -> str:
    """A figure of `rows` [rows][steps] of values around 1: pale at 1, blue below, orange above, full at 0 and at 2 and more."""
    chosen = range(0, len(steps), max(1, -(-len(steps) // CELLS)))
    height = max(4, min(16, 160 // max(len(rows), 1)))
    width = 300 / max(len(chosen), 1)
    cells = [f'<rect x="{column * width:.2f}" y="{row * height}" width="{width + 0.3:.2f}" height="{height}" fill="{_colour(values[at])}">'
             f"<title>step {steps[at]}, expert {row}: {values[at]:.2f}</title></rect>"
             for row, values in enumerate(rows) for column, at in enumerate(chosen)]
    return (f'<figure class="heat"><figcaption>{html.escape(title)}</figcaption><svg viewBox="0 0 300 {height * len(rows)}" role="img" '
            f'aria-label="{html.escape(title)}">{"".join(cells)}</svg></figure>')


def _colour(load: float) -> str:
    far, colour = min(abs(load - 1), 1.0), ((31, 90, 148) if load < 1 else (194, 87, 26))
    return "#" + "".join(f"{round(244 + (part - 244) * far):02x}" for part in colour)


def _drawable(points: Sequence[tuple[float, float]], logarithmic: bool) -> list[tuple[float, float]]:
    return [(step, value) for step, value in points if math.isfinite(value) and (value > 0 or not logarithmic)]


def _thinned(points: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
    """At most POINTS points, each the mean of its neighbours."""
    size = max(1, -(-len(points) // POINTS))
    bins = [points[first:first + size] for first in range(0, len(points), size)]
    return [(part[-1][0], sum(value for _, value in part) / len(part)) for part in bins]


def _range(values: Sequence[float], logarithmic: bool) -> tuple[float, float]:
    low, high = (math.log10(bound) if logarithmic else bound for bound in (min(values), max(values)))
    margin = (high - low) * 0.05 or abs(high) * 0.05 or 1.0
    return low - margin, high + margin


def _scale(low: float, high: float, first: float, last: float):
    return lambda value: first + (value - low) / ((high - low) or 1) * (last - first)


def _ticks(low: float, high: float) -> list[float]:
    """About five round numbers between two bounds."""
    rough = (high - low) / 5 or 1
    size = 10 ** math.floor(math.log10(rough))
    step = next(size * factor for factor in (1, 2, 5, 10) if size * factor >= rough)
    return [round(number * step, 12) for number in range(math.ceil(low / step), math.floor(high / step) + 1)]
