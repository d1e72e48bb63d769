"""Line charts as inline SVG: axes with units, a raw and a smoothed line, measured points, and a read-out under the pointer.

No script: every step owns an invisible column, and CSS shows that column's read-out while the pointer is over it.
Knows curves; must not know a run folder or the page around it.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy

from qlora.reporting.axes import Axis, fit_axis
from qlora.reporting.figures import exact_text, significant
from qlora.reporting.markup import Markup, join, tag

Point = tuple[float, float]  # (step, value)

WIDE, SMALL = (1000, 340), (490, 220)
MOST_POINTS = 1_000  # a line has no more corners than that: more than a screen can show
MOST_COLUMNS = 200  # read-outs under the pointer, each some 300 bytes


@dataclass(frozen=True)
class Curve:
    """One line. ``kind`` is its CSS class: ``raw`` (faint), ``main`` (bold), ``held-out`` (a line with marked points)."""

    name: str
    points: Sequence[Point]
    kind: str = "main"


@dataclass(frozen=True)
class Chart:
    """What a figure shows. Values are in ``unit``; the x axis counts optimizer steps."""

    title: str
    unit: str
    curves: Sequence[Curve]
    note: str = ""
    from_zero: bool = False
    reference: tuple[str, float] | None = None
    """A dashed line across, with its label; drawn only where the curves come near it."""
    boundaries: Sequence[float] = field(default_factory=tuple)
    """Steps after which a new epoch begins."""
    text: Callable[[float], str] = significant
    """A value in the read-out."""


def smooth(points: Sequence[Point], weights: Sequence[float]) -> tuple[list[Point], int]:
    """A Gaussian-weighted mean around each point, and its reach (two standard deviations) in steps.

    Centred, so that the line does not lag behind the curve as a running average does. ``weights`` are target tokens: a
    step's loss is a mean over them, so a short step counts less. Fewer than eight points are not smoothed: ([], 0).
    """
    if len(points) < 8:
        return [], 0
    spacing = (points[-1][0] - points[0][0]) / (len(points) - 1)
    group = -(-len(points) // MOST_POINTS)
    starts = numpy.arange(0, len(points), group)
    weight = numpy.asarray(weights, dtype=float)
    weight_sum = numpy.add.reduceat(weight, starts)
    steps = numpy.asarray([step for step, _ in points])
    middle = numpy.add.reduceat(steps, starts) / numpy.diff([*starts, len(points)])
    values_sum = numpy.add.reduceat(weight * numpy.asarray([value for _, value in points]), starts)
    sigma = max(1.0, len(starts) / 40)
    offsets = numpy.arange(-int(3 * sigma), int(3 * sigma) + 1)
    kernel = numpy.exp(-0.5 * (offsets / sigma) ** 2)
    # "full" and cut, because "same" returns the kernel's length where the kernel is the longer one
    cut = slice(len(kernel) // 2, len(kernel) // 2 + len(starts))
    mean = numpy.convolve(values_sum, kernel)[cut] / numpy.convolve(weight_sum, kernel)[cut]
    return list(zip(middle.tolist(), mean.tolist(), strict=True)), round(2 * sigma * group * spacing)


def thinned(points: Sequence[Point]) -> list[Point]:
    """At most ``MOST_POINTS`` points; every stretch keeps its lowest and its highest, so no spike is lost."""
    if len(points) <= MOST_POINTS:
        return list(points)
    size = -(-2 * len(points) // MOST_POINTS)
    kept: list[Point] = []
    for start in range(0, len(points), size):
        stretch = points[start : start + size]
        ends = {min(stretch, key=lambda point: point[1]), max(stretch, key=lambda point: point[1])}
        kept += sorted(ends)
    return kept


def draw(chart: Chart, size: tuple[int, int] = SMALL) -> Markup:
    """The chart as a ``<figure>``; a sentence in place of the drawing when there is nothing to draw."""
    caption = tag(
        "figcaption",
        tag("span", tag("b", chart.title), tag("span", chart.unit, class_="unit"), class_="what"),
        tag("span", (_swatch(curve) for curve in chart.curves), class_="legend") if len(chart.curves) > 1 else None,
        tag("span", chart.note, class_="note") if chart.note else None,
    )
    everything = [point for curve in chart.curves for point in curve.points]
    if not everything:
        return tag("figure", caption, tag("p", "Nothing has been recorded yet.", class_="empty"), class_="chart")
    width, height = size
    left, right, top, bottom = 58, width - 14, 26, height - 44
    wide = width > 600
    values = [value for _, value in everything]
    y = fit_axis(values, bottom, top, count=5 if wide else 4, from_zero=chart.from_zero)
    if chart.reference and not y.low <= chart.reference[1] <= y.high and chart.reference[1] <= 1.5 * max(values):
        y = fit_axis([*values, chart.reference[1]], bottom, top, count=4, from_zero=chart.from_zero)
    x = fit_axis([step for step, _ in everything], left, right, count=12 if wide else 7, whole=True)
    picture = tag(
        "svg",
        _grid(x, y, chart),
        _reference(chart, x, y),
        (_line(curve, x, y) for curve in chart.curves),
        _read_outs(chart, x, y),
        viewBox=f"0 0 {width} {height}",
        role="img",
        aria_label=_description(chart),
        class_="wide" if wide else None,
    )
    return tag("figure", caption, tag("div", picture, class_="drawing"), class_="chart")


def _grid(x: Axis, y: Axis, chart: Chart) -> Markup:
    parts: list[Markup] = []
    for value, label in zip(y.ticks, y.labels(), strict=True):
        at = y.place(value)
        parts.append(tag("line", x1=x.start, x2=x.end, y1=at, y2=at, class_="rule"))
        parts.append(tag("text", label, x=x.start - 9, y=at + 4, text_anchor="end"))
    if y.exponent:
        parts.append(tag("text", _power(y.exponent), x=x.start - 9, y=y.end - 12, text_anchor="end", class_="title"))
    for value, label in zip(x.ticks, x.labels(), strict=True):
        at = x.place(value)
        parts.append(tag("line", x1=at, x2=at, y1=y.start, y2=y.start + 5, class_="axis"))
        parts.append(tag("text", label, x=at, y=y.start + 19, text_anchor="middle"))
    for step in chart.boundaries:
        if x.low < step < x.high:
            at = x.place(step)
            parts.append(tag("line", x1=at, x2=at, y1=y.end, y2=y.start, class_="epoch"))
    parts.append(tag("line", x1=x.start, x2=x.end, y1=y.start, y2=y.start, class_="axis"))
    parts.append(tag("text", "step", x=(x.start + x.end) / 2, y=y.start + 37, text_anchor="middle", class_="title"))
    return tag("g", parts, class_="grid", aria_hidden="true")


def _reference(chart: Chart, x: Axis, y: Axis) -> Markup | None:
    if chart.reference is None or not y.low <= chart.reference[1] <= y.high:
        return None
    label, value = chart.reference
    at = y.place(value)
    below = at - y.end < 16  # no room above the line
    return tag(
        "g",
        tag("line", x1=x.start, x2=x.end, y1=at, y2=at),
        tag("text", label, x=x.end, y=at + 14 if below else at - 6, text_anchor="end"),
        class_="reference",
    )


def _line(curve: Curve, x: Axis, y: Axis) -> Markup | None:
    if not curve.points:
        return None
    places = [(x.place(step), y.place(value)) for step, value in thinned(curve.points)]
    path = tag("polyline", points=" ".join(f"{px:.1f},{py:.1f}" for px, py in places), class_="line")
    marked = curve.kind == "held-out" or len(places) == 1
    dots = [tag("circle", cx=px, cy=py, r=3.5 if len(places) < 60 else 2, class_="dot") for px, py in places]
    return tag("g", path, dots if marked else None, _end_labels(curve, places), class_=f"curve {curve.kind}")


def _end_labels(curve: Curve, places: list[Point]) -> list[Markup]:
    """The values of the first and the last measured point, written beside them."""
    if curve.kind != "held-out":
        return []
    labels = [("start", 9.0, places[0], curve.points[0][1])]
    if len(places) > 1:
        labels.append(("end", 0.0, places[-1], curve.points[-1][1]))
    return [
        tag("text", significant(value), x=px + shift, y=max(py - 9, 20.0), text_anchor=anchor, class_="value")
        for anchor, shift, (px, py), value in labels
    ]


def _read_outs(chart: Chart, x: Axis, y: Axis) -> Markup:
    """A column for every step (for every n-th of a long run) that shows all curves' values there.

    The smoothed line of a long run has fewer points than the raw one, so a curve is read at its nearest earlier point.
    """
    steps = sorted({step for curve in chart.curves for step, _ in curve.points})
    measured = {step for curve in chart.curves if curve.kind == "held-out" for step, _ in curve.points}
    every = -(-len(steps) // MOST_COLUMNS)
    steps = [step for index, step in enumerate(steps) if index % every == 0 or step in measured]
    places = [x.place(step) for step in steps]
    edges = [x.start, *((a + b) / 2 for a, b in itertools.pairwise(places)), x.end]
    columns: list[Markup] = []
    cursor = [0] * len(chart.curves)
    for index, step in enumerate(steps):
        dots: list[Markup] = []
        said = [f"step {exact_text(step)}"]
        for number, curve in enumerate(chart.curves):
            points = curve.points
            while cursor[number] + 1 < len(points) and points[cursor[number] + 1][0] <= step:
                cursor[number] += 1
            if not points or points[cursor[number]][0] > step:
                continue
            at, value = points[cursor[number]]
            if at != step and curve.kind in ("raw", "held-out"):
                continue  # a measurement is only read where it was made
            said.append(f"{curve.name} {chart.text(value)}" if len(chart.curves) > 1 else chart.text(value))
            dots.append(tag("circle", cx=places[index], cy=y.place(value), r=3, class_=f"dot {curve.kind}"))
        columns.append(
            tag(
                "g",
                tag("rect", x=edges[index], y=0, width=edges[index + 1] - edges[index], height=y.start),
                tag(
                    "g",
                    tag("line", x1=places[index], x2=places[index], y1=y.end, y2=y.start),
                    dots,
                    tag("text", "  ·  ".join(said), x=x.end, y=y.end - 12, text_anchor="end"),
                ),
                class_="at",
            )
        )
    return tag("g", columns, class_="read-outs", aria_hidden="true")


def _description(chart: Chart) -> str:
    """What a screen reader says: each curve's first and last value."""
    parts = [
        f"{curve.name}: {chart.text(curve.points[0][1])} at step {exact_text(curve.points[0][0])}, "
        f"{chart.text(curve.points[-1][1])} at step {exact_text(curve.points[-1][0])}"
        for curve in chart.curves
        if curve.points
    ]
    return f"{chart.title} ({chart.unit}). " + "; ".join(parts)


def _swatch(curve: Curve) -> Markup:
    sample = tag(
        "svg",
        tag("line", x1=1, x2=19, y1=5, y2=5, class_="line"),
        tag("circle", cx=10, cy=5, r=3, class_="dot") if curve.kind == "held-out" else None,
        viewBox="0 0 20 10",
        class_=f"swatch curve {curve.kind}",
        aria_hidden="true",
    )
    return tag("span", sample, curve.name)


def _power(exponent: int) -> str:
    """−4 → ``×10⁻⁴``."""
    return "×10" + str(exponent).translate(str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹"))


def bars(rows: Sequence[tuple[str, float, str]], total: float) -> Markup:
    """Labelled horizontal bars: (label, amount, text) each, the full width being ``total``."""
    cells = [
        tag(
            "div",
            tag("span", label, class_="label"),
            tag(
                "svg",
                tag("rect", x=0, y=0, width=100, height=10, class_="track"),
                tag("rect", x=0, y=0, width=max(0.4, 100 * amount / total), height=10, class_="bar"),
                viewBox="0 0 100 10",
                preserveAspectRatio="none",
                aria_hidden="true",
            ),
            tag("span", text, class_="amount"),
            class_="bar-row",
        )
        for label, amount, text in rows
    ]
    return join(tag("div", cells, class_="bars"))
