"""Axes: round ticks that enclose the data."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from qlora.reporting.axes import fit_axis


def test_ticks_are_round_and_labels_alike() -> None:
    axis = fit_axis([1.13, 3.05], 100, 0)
    assert axis.values == pytest.approx((1.0, 1.5, 2.0, 2.5, 3.0, 3.5))
    assert axis.ticks == [(100, "1.0"), (80, "1.5"), (60, "2.0"), (40, "2.5"), (20, "3.0"), (0, "3.5")]


def test_from_zero() -> None:
    assert fit_axis([890, 910], 0, 100, from_zero=True).values[0] == 0
    assert fit_axis([890, 910], 0, 100).values[0] > 800


def test_steps_are_whole_and_reach_to_the_ends_of_the_data() -> None:
    axis = fit_axis([1.0, 120.0], 0, 100, count=7, whole=True)
    assert axis.values == (20, 40, 60, 80, 100, 120)
    assert (axis.place(1), axis.place(120)) == (0, 100)
    assert fit_axis([0.0, 3.0], 0, 100, count=10, whole=True).values == (0, 1, 2, 3)


def test_large_and_small_values_share_an_exponent() -> None:
    axis = fit_axis([0, 5e-4], 0, 100)
    assert axis.exponent == -4
    assert axis.power == "×10⁻⁴"
    assert [label for _, label in axis.ticks][:3] == ["0", "1", "2"]
    large = fit_axis([12_000, 41_000], 0, 100, from_zero=True)
    assert (large.power, large.ticks[1][1]) == ("", "10\u202f000")


@given(st.lists(st.floats(-1e9, 1e9), min_size=1, max_size=20), st.booleans(), st.booleans())
def test_all_values_are_on_the_axis(values: list[float], from_zero: bool, whole: bool) -> None:
    axis = fit_axis(values, 0, 100, from_zero=from_zero, whole=whole)
    assert axis.low < axis.high
    slack = (axis.high - axis.low) * 1e-6
    assert all(axis.low - slack <= value <= axis.high + slack for value in values)
    assert 1 <= len(axis.ticks) <= 12
    assert len({label for _, label in axis.ticks}) == len(axis.ticks)
