"""A study's drawings: what a setting's loss does by its rate, learning against forgetting, a score by a field of the grid.

    rows ─► series of points in the data's units ─► places in pixels, with axes ─► study.html.jinja draws them as SVG

Knows rows and axes; must not know HTML.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

from qlora.reporting.axes import Axis, fit_axis
from qlora.reporting.figures import significant

SIZE = (490, 300)  # pixels
WIDE = 10  # times the least of what is drawn: from there on y goes by its logarithm, or the least lie on one line
COLOURS = 8  # that the sheet has; the ninth series begins again with another mark


class Point(NamedTuple):
    """Where a point is, in pixels; what is said while the pointer is on it; how wide its error reaches up and down."""

    x: float
    y: float
    about: str
    error: float = 0.0
    size: float = 4.0


class Series(NamedTuple):
    """One line, or one cloud of points."""

    name: str
    points: list[Point]
    line: bool = True


class Plot(NamedTuple):
    """What a figure shows. Ticks are (pixels, label)."""

    title: str
    x_title: str
    y_title: str
    series: list[Series]
    x_ticks: list[tuple[float, str]]
    y_ticks: list[tuple[float, str]]
    frame: tuple[float, float, float, float]
    """left, right, top and bottom of where points may be, in pixels."""
    reference: tuple[float, str] | None = None
    """A line across: (pixels, what it is)."""
    path: list[Point] = []  # noqa: RUF012 (never changed)
    """A dashed line through the best points, as the Pareto front."""
    note: str = ""


Given = dict[str, list[tuple[float, float, str, float, float]]]
"""Series by name: of each point x, y, what is said of it, its error and its size from 0 to 1."""


def plot(
    title: str,
    x_title: str,
    y_title: str,
    given: Given,
    *,
    log: bool = False,
    line: bool = True,
    reference: tuple[float, str] | None = None,
    front: bool = False,
    x_text: Callable[[float], str] = "{:g}".format,
    note: str = "",
) -> Plot | None:
    """The drawing of some series; None where there is no point. ``log``: x goes by its logarithm, with a tick at each value.

    ``front``: a line through the points that no other one beats both to the left and below.
    """
    width, height = SIZE
    left, right, top, bottom = 62.0, width - 16.0, 18.0, height - 46.0
    points = [point for series in given.values() for point in series if math.isfinite(point[1])]
    if not points:
        return None
    scale: Callable[[float], float] = math.log10 if log else float
    x = fit_axis([scale(point[0]) for point in points], left + 10, right - 10, count=6, whole=False)
    values = [end for point in points for end in (point[1] - point[3], point[1] + point[3])]
    values += [reference[0]] if reference else []
    rise: Callable[[float], float] = math.log10 if 0 < WIDE * min(values) < max(values) else float
    y = fit_axis([*map(rise, values)], bottom, top, count=5)
    y_ticks = y.ticks if rise is float else [(y.place(rise(value)), f"{value:g}") for value in _round(y)]
    if log:
        x = Axis(min(scale(p[0]) for p in points), max(scale(p[0]) for p in points), left + 10, right - 10, (), 0)
        if x.low == x.high:
            x = x._replace(low=x.low - 1, high=x.high + 1)
        at = dict.fromkeys(sorted(point[0] for point in points))
        x_ticks = _apart([(x.place(scale(value)), x_text(value)) for value in at])
    else:
        x_ticks = x.ticks
    series = [
        Series(
            name,
            [
                Point(
                    x.place(scale(a)),
                    y.place(rise(b)),
                    about,
                    abs(y.place(rise(b + error)) - y.place(rise(b))),
                    4 + 9 * size,
                )
                for a, b, about, error, size in some
                if math.isfinite(b)
            ],
            line,
        )
        for name, some in given.items()
    ]
    best = _front([point for one in series for point in one.points]) if front else []
    across = None if reference is None else (y.place(rise(reference[0])), reference[1])
    return Plot(title, x_title, y_title, series, x_ticks, y_ticks, (left, right, top, bottom), across, best, note)


def _round(axis: Axis) -> list[float]:
    """1, 2 and 5 times the powers of ten whose logarithms are on ``axis``."""
    powers = range(math.floor(axis.low), math.ceil(axis.high) + 1)
    return [
        value
        for power in powers
        for value in (10.0**power, 2 * 10.0**power, 5 * 10.0**power)
        if axis.low <= math.log10(value) <= axis.high
    ]


def _apart(ticks: list[tuple[float, str]]) -> list[tuple[float, str]]:
    """The ticks without those whose labels would run into the one before."""
    kept: list[tuple[float, str]] = []
    for at, label in ticks:
        if not kept or at - kept[-1][0] >= 4 * (len(label) + len(kept[-1][1])):
            kept.append((at, label))
    return kept


def _front(points: Sequence[Point]) -> list[Point]:
    """Those that no other beats: further left (less forgotten) or lower (more learned), from left to right."""
    kept: list[Point] = []
    for point in sorted(points, key=lambda one: (one.x, -one.y)):
        if not kept or point.y > kept[-1].y:  # pixels grow downwards: lower is less loss
            kept.append(point)
    return kept


def of_loss(value: float) -> str:
    """A loss in words."""
    return f"{significant(value)} nats"


class Square(NamedTuple):
    """One matrix of a heat map: its column and row, how strong its colour is from 0 to 1, and what is said of it."""

    column: int
    row: int
    strength: float
    about: str


class HeatMap(NamedTuple):
    """One figure of every matrix of a setting, by layer (to the right) and module (down)."""

    title: str
    note: str
    columns: int
    rows: list[str]
    squares: list[Square]


def heat_map(title: str, figure: str, matrices: Sequence[Mapping[str, Any]], most: float, text: str) -> HeatMap | None:
    """The figure of that name of ``matrices`` as ``cell.py`` writes them, in colours up to ``most``; None where there is none."""
    known = [one for one in matrices if one["layer"] is not None and one.get(figure) is not None]
    if not known or most <= 0:
        return None
    modules = list(dict.fromkeys(str(one["module"]) for one in known))
    squares = [
        Square(
            int(one["layer"]),
            modules.index(str(one["module"])),
            min(1.0, float(one[figure]) / most),
            f"layer {one['layer']}, {one['module']}: {significant(float(one[figure]), 3)}",
        )
        for one in known
    ]
    return HeatMap(
        title,
        f"{text}, full colour is {significant(most, 3)}",
        1 + max(one.column for one in squares),
        modules,
        squares,
    )
