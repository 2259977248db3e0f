"""chart(): curves as one inline SVG, without script; a point's numbers show when the pointer rests on it."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from html import escape
from typing import NamedTuple

WIDTH, HEIGHT, LEFT, RIGHT, TOP, BOTTOM = 640, 230, 62, 12, 12, 26  # px of the drawing, and its margins
MOST_POINTS = 600  # of a curve; of more, each stretch keeps its lowest and its highest
DOTS = 80  # up to so many points each has a mark of its own
COLOURS = 8

Point = tuple[float, float]


class Curve(NamedTuple):
    """Points in order of x; y is nan where it was not finite."""

    name: str
    points: Sequence[Point]


def chart(title: str, curves: Sequence[Curve], show: Callable[[float], str]) -> str:
    """The figure, empty text where no curve has a finite point. `show` writes a y value.

    Values that were not finite are crosses at the upper edge.
    """
    finite = [point for curve in curves for point in curve.points if math.isfinite(point[1])]
    if not finite:
        return ""
    frame = _frame(finite)
    used = [(place, curve) for place, curve in enumerate(curves) if curve.points]
    lines = "\n".join(_curve(curve, place, frame, show, names=len(used) > 1) for place, curve in used)
    legend = "".join(f'<span class="c{place % COLOURS}">{escape(curve.name)}</span> ' for place, curve in used) if len(used) > 1 else ""
    caption = escape(title) + (f" <small>{legend}</small>" if legend else "")
    drawing = f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{escape(title)} by step">\n{_axes(frame, show)}\n{lines}\n</svg>'
    return f"<figure>\n<figcaption>{caption}</figcaption>\n{drawing}\n</figure>"


class _Frame(NamedTuple):
    """The ranges of both axes, and the y axis' ticks."""

    low: Point
    high: Point
    ticks: tuple[float, ...]

    def place(self, point: Point) -> Point:
        x = LEFT + (point[0] - self.low[0]) / (self.high[0] - self.low[0]) * (WIDTH - LEFT - RIGHT)
        share = (point[1] - self.low[1]) / (self.high[1] - self.low[1]) if math.isfinite(point[1]) else 1.0
        return x, HEIGHT - BOTTOM - share * (HEIGHT - TOP - BOTTOM)


def _frame(points: Sequence[Point]) -> _Frame:
    x_low, x_high = min(x for x, _ in points), max(x for x, _ in points)
    ticks = steps(min(y for _, y in points), max(y for _, y in points))
    return _Frame((x_low, ticks[0]), (x_high if x_high > x_low else x_low + 1, ticks[-1]), ticks)


def steps(low: float, high: float) -> tuple[float, ...]:
    """Round values, 1, 2 or 5 times a power of ten apart, from at most `low` to at least `high`; four to ten of them."""
    if not high > low:
        low, high = low - (abs(low) or 1) / 10, high + (abs(high) or 1) / 10
    power = 10.0 ** math.floor(math.log10((high - low) / 4))
    step = next(power * factor for factor in (1, 2, 5, 10) if (high - low) / (power * factor) <= 5)
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return tuple(round(number * step, 12) for number in range(first, last + 1))


def _axes(frame: _Frame, show: Callable[[float], str]) -> str:
    parts = []
    for tick in frame.ticks:
        y = frame.place((frame.low[0], tick))[1]
        parts.append(f'<line class="grid" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y:.1f}" y2="{y:.1f}"/>')
        parts.append(f'<text x="{LEFT - 6}" y="{y + 4:.1f}" text-anchor="end">{escape(show(tick))}</text>')
    for step in steps(frame.low[0], frame.high[0]):
        if frame.low[0] <= step <= frame.high[0] and step == int(step):
            x = frame.place((step, frame.low[1]))[0]
            parts.append(f'<text x="{x:.1f}" y="{HEIGHT - 8}" text-anchor="middle">{int(step):,}</text>')
    return "\n".join(parts)


def _curve(curve: Curve, place: int, frame: _Frame, show: Callable[[float], str], *, names: bool) -> str:
    points = thinned([point for point in curve.points if math.isfinite(point[1])])
    colour = f"c{place % COLOURS}"
    placed = [frame.place(point) for point in points]
    parts = [f'<polyline class="{colour}" points="{" ".join(f"{x:.1f},{y:.1f}" for x, y in placed)}"/>']
    dots = points if len(points) <= DOTS else points[:: -(-len(points) // DOTS)]
    for point in dots:
        x, y = frame.place(point)
        told = f"{f'{curve.name}, ' if names else ''}step {point[0]:,.0f}: {show(point[1])}"
        parts.append(f'<circle class="{colour}" cx="{x:.1f}" cy="{y:.1f}" r="2.5"><title>{escape(told)}</title></circle>')
    for point in curve.points:
        if not math.isfinite(point[1]):
            x = frame.place((min(max(point[0], frame.low[0]), frame.high[0]), point[1]))[0]
            told = f"<title>step {point[0]:,.0f}: not finite</title>"
            parts.append(f'<text class="bad" x="{x:.1f}" y="{TOP + 4}" text-anchor="middle">×{told}</text>')
    return "\n".join(parts)


def thinned(points: Sequence[Point]) -> Sequence[Point]:
    """At most MOST_POINTS of the points: of each stretch the lowest and the highest, so that no peak is lost."""
    if len(points) <= MOST_POINTS:
        return points
    size = -(-2 * len(points) // MOST_POINTS)
    kept: list[Point] = []
    for start in range(0, len(points), size):
        stretch = points[start : start + size]
        kept += sorted({min(stretch, key=lambda point: point[1]), max(stretch, key=lambda point: point[1])})
    return kept
