"""Curves: smoothing, thinning, and where things end up on the drawing."""

from __future__ import annotations

import re
from collections.abc import Callable

import pytest

from qlora.reporting import page, read_records
from qlora.reporting.charts import MOST_POINTS, SMALL, Chart, Curve, axes, columns, read_out, smooth, thinned
from tests.reporting.conftest import RunFolder


@pytest.fixture
def drawn(begun: RunFolder, monkeypatch: pytest.MonkeyPatch) -> Callable[[Chart], str]:
    """Draws a chart as the first small one of a page."""

    def draw(chart: Chart) -> str:
        monkeypatch.setattr(page, "small_charts", lambda records: [chart])
        source = page.render(read_records(begun.path))
        return source[source.index('<div class="charts">') : source.index("</section>")]

    return draw


def test_smoothing_keeps_a_constant_and_does_not_lag() -> None:
    flat, reach = smooth([(float(step), 2.0) for step in range(1, 101)], [1.0] * 100)
    assert [value for _, value in flat] == pytest.approx([2.0] * 100)
    assert reach == 5
    line, _ = smooth([(float(step), float(step)) for step in range(1, 101)], [1.0] * 100)
    assert line[50][1] == pytest.approx(line[50][0])


def test_smoothing_weighs_by_target_tokens() -> None:
    points = [(float(step), 10.0 if step == 50 else 1.0) for step in range(100)]
    light, _ = smooth(points, [0.01 if step == 50 else 1.0 for step in range(100)])
    even, _ = smooth(points, [1.0] * 100)
    assert light[50][1] < 1.1 < even[50][1]


def test_few_points_are_not_smoothed_and_many_over_a_bounded_reach() -> None:
    assert smooth([(1.0, 1.0)] * 7, [1.0] * 7) == ([], 0)
    many, reach = smooth([(float(step), 1.0) for step in range(100_000)], [1.0] * 100_000)
    assert len(many) == 100_000
    assert reach == 500


@pytest.mark.filterwarnings("ignore::RuntimeWarning")
def test_what_cannot_be_smoothed_is_not() -> None:
    points = [(float(step), 1e308) for step in range(10)]
    assert smooth(points, [1e308] * 10) == ([], 0)
    assert smooth(points, [0.0] * 10) == ([], 0)


def test_thinning_keeps_spikes() -> None:
    points = [(float(step), 100.0 if step == 7_777 else 1.0) for step in range(20_000)]
    kept = thinned(points)
    assert len(kept) <= MOST_POINTS
    assert (7_777.0, 100.0) in kept
    assert kept == sorted(kept)


def test_every_value_is_inside_the_frame(drawn: Callable[[Chart], str]) -> None:
    curve = Curve("loss", [(float(step), 3.0 - step / 50) for step in range(1, 101)])
    svg = drawn(Chart("Loss", "nats", [curve, Curve("held out", [(0.0, 3.4), (100.0, 0.9)], "held-out")]))
    places = re.findall(r"([-\d.]+),([-\d.]+)", re.search(r'points="([^"]*)"', svg)[1])  # type: ignore[index]
    assert len(places) == 100
    assert all(58 <= float(x) <= 476 and 26 <= float(y) <= 176 for x, y in places)
    ys = [float(y) for _, y in places]
    assert ys == sorted(ys)  # a falling curve goes down the page
    assert ">3.400<" in svg
    assert ">0.9000<" in svg
    assert 'aria-label="Loss (nats). loss: 2.980 at step 1, 1.000 at step 100; held out: 3.400 at step 0,' in svg


def test_read_outs_cover_the_width_once(drawn: Callable[[Chart], str]) -> None:
    chart = Chart("Loss", "nats", [Curve("loss", [(float(step), 1.0 * step) for step in range(1, 11)])])
    found = columns(chart, axes(chart, SMALL)[0])
    assert len(found) == 10
    assert found[0].left == 58
    assert sum(column.width for column in found) == pytest.approx(476 - 58, abs=1)
    assert drawn(chart).count('<rect x="') == 10
    assert ">step 7  ·  7.000<" in drawn(chart)


def test_a_read_out_says_what_was_measured_at_its_step() -> None:
    """Every 10th of 2,000 steps has a column, and those with an evaluation too."""
    raw = Curve("training", [(float(step), 2.0) for step in range(2_000)], "raw")
    chart = Chart("Loss", "nats", [raw, Curve("held out", [(0.0, 3.0), (1_005.0, 1.5)], "held-out")])
    said = [read_out(chart, column) for column in columns(chart, axes(chart, SMALL)[0])]
    assert len(said) == 201
    assert said[:2] == ["step 0  ·  training 2.000  ·  held out 3.000", "step 10  ·  training 2.000"]
    assert "step 1\u202f005  ·  training 2.000  ·  held out 1.500" in said


def test_a_reference_is_drawn_only_near_the_curve(drawn: Callable[[Chart], str]) -> None:
    curve = Curve("norm", [(1.0, 0.8), (2.0, 0.7)])
    assert "clipped" in drawn(Chart("Norm", "", [curve], from_zero=True, reference=("clipped", 1.0)))
    assert "clipped" not in drawn(Chart("Norm", "", [curve], from_zero=True, reference=("clipped", 50.0)))


def test_small_values_get_a_power_of_ten(drawn: Callable[[Chart], str]) -> None:
    svg = drawn(Chart("Rate", "", [Curve("rate", [(1.0, 0.0), (2.0, 5e-4)])], from_zero=True))
    assert "×10⁻⁴" in svg
    assert ">5</text>" in svg or ">6</text>" in svg


@pytest.mark.parametrize("points", [[(5.0, 1.0)], [(1.0, 0.0), (2.0, 0.0)], [(1.0, -3.0), (2.0, 1e9)]])
def test_degenerate_curves(points: list[tuple[float, float]], drawn: Callable[[Chart], str]) -> None:
    svg = drawn(Chart("x", "", [Curve("x", points)]))
    assert "polyline" in svg
    assert "nan" not in svg


def test_a_rare_spike_does_not_press_the_curve_flat(drawn: Callable[[Chart], str]) -> None:
    points = [(float(step), 1e4 if step == 50 else 2.0 + step / 100) for step in range(1, 201)]
    axis = axes(Chart("Loss", "nats", [Curve("training", points, "raw")]), SMALL)[1]
    assert axis.high < 5
    assert axis.place(1e4) == axis.end  # drawn at the top
    few = Chart("Loss", "nats", [Curve("training", points[:49])])
    assert axes(few, SMALL)[1].high < 5
    assert axes(Chart("Loss", "nats", [Curve("held out", points, "held-out")]), SMALL)[1].high >= 1e4


def test_few_points_are_dots(drawn: Callable[[Chart], str]) -> None:
    for count, dots in ((1, 1), (2, 2), (7, 7), (8, 0)):
        svg = drawn(Chart("Speed", "tokens", [Curve("speed", [(float(step), 1.0 + step) for step in range(count)])]))
        assert len(re.findall(r'<circle [^>]*r="3.5"', svg)) == dots
