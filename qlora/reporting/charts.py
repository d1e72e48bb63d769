"""Line charts: their curves, their axes, and what is said under the pointer; ``report.html.jinja`` draws them as SVG.

No script: every step owns an invisible column, and CSS shows that column's read-out while the pointer is over it.
Knows curves; must not know a run folder, or HTML.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy

from qlora.reporting.axes import Axis, fit_axis
from qlora.reporting.figures import exact_text, significant

Point = tuple[float, float]  # (step, value)

WIDE, SMALL = (1000, 340), (490, 220)  # pixels
MOST_POINTS = 1_000  # a line has no more corners than that: more than a screen can show
MOST_COLUMNS = 200  # read-outs under the pointer, each some 300 bytes
LONG, SPIKES = 50, 1  # points of a curve from which so many per cent at either end may be spikes
WIDEST = 250  # steps of a standard deviation, which bounds the time that smoothing takes


class Curve(NamedTuple):
    """One line. ``kind`` is its CSS class: ``raw`` (faint), ``main`` (bold), ``held-out`` (a line with marked points)."""

    name: str
    points: Sequence[Point]
    kind: str = "main"


class Chart(NamedTuple):
    """What a figure shows. Values are in ``unit``; the x axis counts optimizer steps."""

    title: str
    unit: str
    curves: Sequence[Curve]  # none of them empty
    note: str = ""
    from_zero: bool = False
    reference: tuple[str, float] | None = None  # a dashed line across, drawn only where the curves come near it
    boundaries: Sequence[float] = ()  # steps after which a new epoch begins
    saved: Sequence[float] = ()  # steps that have a checkpoint
    resumed: Sequence[float] = ()  # steps before which a stopped run was gone on with
    text: Callable[[float], str] = significant  # a value in words


class Column(NamedTuple):
    """What is shown while the pointer is between ``left`` and ``left + width`` pixels: the values at ``step``."""

    left: float
    width: float
    step: float
    values: list[tuple[Curve, float]]


def smooth(points: Sequence[Point], weights: Sequence[float]) -> tuple[list[Point], int]:
    """A Gaussian-weighted mean around each point, and its reach (two standard deviations) in steps.

    Centred, so that the line does not lag behind the curve as a running average does. ``weights`` are target tokens: a
    step's loss is a mean over them, so a short step counts less. Fewer than eight points are not smoothed: ([], 0).
    """
    if len(points) < 8:
        return [], 0
    steps, values = numpy.array(points).T
    weight = numpy.array(weights)
    sigma = min(max(1.0, len(points) / 40), WIDEST)
    offsets = numpy.arange(-int(3 * sigma), int(3 * sigma) + 1)
    kernel = numpy.exp(-0.5 * (offsets / sigma) ** 2)
    # "full" and cut, because "same" returns the kernel's length where the kernel is the longer one
    cut = slice(len(kernel) // 2, len(kernel) // 2 + len(points))
    mean = numpy.convolve(weight * values, kernel)[cut] / numpy.convolve(weight, kernel)[cut]
    if not numpy.isfinite(mean).all():  # weights or values that no run has
        return [], 0
    spacing = (steps[-1] - steps[0]) / (len(points) - 1)
    return list(zip(steps.tolist(), mean.tolist(), strict=True)), round(2 * sigma * spacing)


def thinned(points: Sequence[Point]) -> list[Point]:
    """At most ``MOST_POINTS`` points; every stretch keeps its lowest and its highest, so no spike is lost."""
    if len(points) <= MOST_POINTS:
        return list(points)
    size = -(-2 * len(points) // MOST_POINTS)
    stretches = [points[start : start + size] for start in range(0, len(points), size)]
    by_value = [sorted(stretch, key=lambda point: point[1]) for stretch in stretches]
    return [point for stretch in by_value for point in sorted({stretch[0], stretch[-1]})]


def axes(chart: Chart, size: tuple[int, int]) -> tuple[Axis, Axis]:
    """The axis of the steps and the axis of the values, with room around them for their labels."""
    (width, height), wide = size, size == WIDE
    points = [point for curve in chart.curves for point in curve.points]
    values = [value for curve in chart.curves for value in shown(curve)]
    x = fit_axis([step for step, _ in points], 58, width - 14, count=12 if wide else 7, whole=True)
    y = fit_axis(values, height - 44, 26, count=5 if wide else 4, from_zero=chart.from_zero)
    if chart.reference and y.high < chart.reference[1] <= 1.5 * max(values):
        y = fit_axis([*values, chart.reference[1]], height - 44, 26, count=4, from_zero=chart.from_zero)
    return x, y


def shown(curve: Curve) -> list[float]:
    """The values that an axis has to have: of a long faint or single curve not its rare spikes, which would press all else flat."""
    values = [value for _, value in curve.points]
    if curve.kind == "held-out" or len(values) < LONG:
        return values
    low, high = numpy.percentile(values, [SPIKES, 100 - SPIKES])
    spread = max(values) - min(values)
    return [min(max(value, low), high) for value in values] if high - low < spread / 2 else values


def columns(chart: Chart, x: Axis) -> list[Column]:
    """A column for every step (for every n-th of a long run, and for what was measured) with all curves' values there."""
    known = [(curve, dict(curve.points)) for curve in chart.curves]
    measured = {step for curve, values in known if curve.kind == "held-out" for step in values}
    steps = sorted({step for _, values in known for step in values})
    every = -(-len(steps) // MOST_COLUMNS)
    steps = [step for index, step in enumerate(steps) if index % every == 0 or step in measured]
    middles = [(x.place(a) + x.place(b)) / 2 for a, b in itertools.pairwise(steps)]
    return [
        Column(round(left, 1), round(right - left, 1), step, [(curve, of[step]) for curve, of in known if step in of])
        for step, (left, right) in zip(steps, itertools.pairwise([x.start, *middles, x.end]), strict=True)
    ]


def read_out(chart: Chart, column: Column) -> str:
    """``step 7  ·  training 2.000  ·  smoothed 1.900``; a single curve needs no name."""
    named = len(chart.curves) > 1
    said = [f"{curve.name} {chart.text(value)}" if named else chart.text(value) for curve, value in column.values]
    return "  ·  ".join([f"step {exact_text(column.step)}", *said])
