"""Curves: smoothing, thinning, and where things end up on the drawing."""

from __future__ import annotations

import re

import pytest

from qlora.reporting.charts import MOST_POINTS, Chart, Curve, bars, draw, smooth, thinned


def numbers(pattern: str, text: str) -> list[float]:
    return [float(value) for value in re.findall(pattern, text)]


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


def test_few_points_are_not_smoothed_and_many_are_grouped() -> None:
    assert smooth([(1.0, 1.0)] * 7, [1.0] * 7) == ([], 0)
    many, reach = smooth([(float(step), 1.0) for step in range(10_000)], [1.0] * 10_000)
    assert len(many) == MOST_POINTS
    assert reach == 500


def test_thinning_keeps_spikes() -> None:
    points = [(float(step), 100.0 if step == 7_777 else 1.0) for step in range(20_000)]
    kept = thinned(points)
    assert len(kept) <= MOST_POINTS
    assert (7_777.0, 100.0) in kept
    assert kept == sorted(kept)


def test_every_value_is_inside_the_frame() -> None:
    curve = Curve("loss", [(float(step), 3.0 - step / 50) for step in range(1, 101)])
    svg = draw(Chart("Loss", "nats", [curve, Curve("held out", [(0.0, 3.4), (100.0, 0.9)], "held-out")]))
    places = re.findall(r"([-\d.]+),([-\d.]+)", re.search(r'points="([^"]*)"', svg)[1])  # type: ignore[index]
    assert all(58 <= float(x) <= 476 and 26 <= float(y) <= 176 for x, y in places)
    ys = [float(y) for _, y in places]
    assert ys == sorted(ys)  # a falling curve goes down the page
    assert ">3.400<" in svg
    assert ">0.9000<" in svg


def test_read_outs_cover_the_width_once() -> None:
    curve = Curve("loss", [(float(step), 1.0 * step) for step in range(1, 11)])
    svg = draw(Chart("Loss", "nats", [curve]))
    widths = numbers(r'<rect x="[\d.]+" y="0" width="([\d.]+)"', svg)
    assert len(widths) == 10
    assert sum(widths) == pytest.approx(476 - 58, abs=1)
    assert "step 7  ·  7.000" in svg


def test_a_reference_is_drawn_only_near_the_curve() -> None:
    curve = Curve("norm", [(1.0, 0.8), (2.0, 0.7)])
    assert "clipped" in draw(Chart("Norm", "", [curve], from_zero=True, reference=("clipped", 1.0)))
    assert "clipped" not in draw(Chart("Norm", "", [curve], from_zero=True, reference=("clipped", 50.0)))


def test_small_values_get_a_power_of_ten() -> None:
    svg = draw(Chart("Rate", "", [Curve("rate", [(1.0, 0.0), (2.0, 5e-4)])], from_zero=True))
    assert "×10⁻⁴" in svg
    assert ">5</text>" in svg or ">6</text>" in svg


@pytest.mark.parametrize("points", [[(5.0, 1.0)], [(1.0, 0.0), (2.0, 0.0)], [(1.0, -3.0), (2.0, 1e9)]])
def test_degenerate_curves(points: list[tuple[float, float]]) -> None:
    assert "polyline" in draw(Chart("x", "", [Curve("x", points)]))


def test_bars_are_in_proportion() -> None:
    assert numbers(r'width="([\d.]+)" height="10" class="bar"', bars([("a", 50, ""), ("b", 200, "")], 200)) == [25, 100]
