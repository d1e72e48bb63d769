"""Axes: round ticks, their labels, and the way from a value to a place on the page.

Pure arithmetic; knows neither a run nor SVG.
"""

from __future__ import annotations

import itertools
import math
from typing import NamedTuple


class Axis(NamedTuple):
    """A linear scale: ``low`` to ``high`` in the data's unit fall on ``start`` to ``end`` in pixels."""

    low: float
    high: float
    start: float
    end: float
    values: tuple[float, ...]
    exponent: int  # labels are divided by ten to this power, which the axis title has to say

    def place(self, value: float) -> float:
        """A value → pixels, to a tenth; one beyond the axis is at its end."""
        inside = min(max(value, self.low), self.high)
        return round(self.start + (inside - self.low) / (self.high - self.low) * (self.end - self.start), 1)

    @property
    def ticks(self) -> list[tuple[float, str]]:
        """The place of every tick and its label, all with the same number of decimals: 0, 0.5, 1 → ``0.0 0.5 1.0``."""
        scaled = [value / 10**self.exponent for value in self.values]
        step = min((b - a for a, b in itertools.pairwise(scaled)), default=1.0)
        decimals = next((d for d in range(7) if abs(step - round(step, d)) < step * 1e-6), 6)
        labels = [f"{value:,.{decimals}f}".replace(",", "\u202f").replace("-", "−") for value in scaled]
        return list(zip(map(self.place, self.values), labels, strict=True))

    @property
    def power(self) -> str:
        """The exponent as a title: −4 → ``×10⁻⁴``; empty for 0."""
        return (
            "×10" + str(self.exponent).translate(str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹")) if self.exponent else ""
        )


def fit_axis(
    values: list[float], start: float, end: float, *, count: int = 5, from_zero: bool = False, whole: bool = False
) -> Axis:
    """An axis around ``values`` that begins and ends on a round tick.

    ``from_zero`` puts the lower end at 0, for quantities whose *ratio* is read off (speed, memory); ``whole`` keeps the
    ticks on whole numbers and the ends on the data, as steps need it.
    """
    low, high = min(values), max(values)
    if from_zero:
        low, high = min(low, 0.0), max(high, 0.0)
    if high - low <= 1e-9 * max(abs(low), abs(high)):  # one value, or all alike: room on both sides, but none below 0
        room = abs(high) * 0.1 or 1.0
        low, high = (low - room if low else low), high + room
    if whole:
        low, high = math.floor(low), math.ceil(high)
    step = _round_step((high - low) / count, whole)
    if whole:
        first, last = math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9)
    else:
        first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
        low, high = first * step, last * step
    ticks = tuple(float(index * step) for index in range(first, last + 1))
    power = math.floor(math.log10(max(abs(low), abs(high))))
    return Axis(float(low), float(high), start, end, ticks, power if power <= -3 or power >= 6 else 0)


def _round_step(rough: float, whole: bool) -> float:
    """The next of 1, 2, 2.5, 5 times a power of ten: 0.037 → 0.05. Whole numbers leave 2.5 out."""
    power = 10.0 ** math.floor(math.log10(rough))
    choices = [1.0, 2.0, 5.0, 10.0] if whole else [1.0, 2.0, 2.5, 5.0, 10.0]
    step = next(choice for choice in choices if choice * power >= rough * (1 - 1e-9)) * power
    return max(1.0, step) if whole else step
