"""Numbers for people, and the few figures that sum a run up.

Knows units, rounding and a run's records; must not know HTML. Every text is plain: ``4.88 M``, ``6 min 12 s``,
``−50.3 %``. A missing number is an em dash, never a zero.
"""

from __future__ import annotations

import math
from statistics import median
from typing import NamedTuple

from qlora.machine import disk
from qlora.reporting.records import HeldOut, Records, number, section, whole

MISSING = "—"


class Figures(NamedTuple):
    """The head of the page. ``None`` where the run folder does not tell (yet)."""

    before: HeldOut | None
    after: HeldOut | None  # the final evaluation, or the latest one of a run that has not ended
    finished: bool
    steps_done: int
    steps_planned: int | None
    trainable: int | None
    parameters: int | None
    tokens: int | None  # that went through the model in training, without padding
    target_tokens: int | None
    seconds: float | None  # in optimizer steps, without loading and evaluation
    peak_memory: float | None  # bytes
    tokens_per_second: float | None  # the median over the steps
    matrix_share: float | None  # of the device's matrix rate, as it was measured before the run


def summarise(records: Records) -> Figures:
    """Records → the headline figures."""
    done = records.steps[-1].number if records.steps else 0
    planned = whole(records.plan, "steps")
    evaluated = number(section(records.evaluation, "held_out", "after"), "loss") is not None
    speeds = column(records, "tokens_per_second")
    tokens, targets = column(records, "tokens"), column(records, "target_tokens")
    seconds = column(records, "seconds")
    speed = median(speeds) if speeds else None
    arithmetic = section(records.plan, "arithmetic")
    flops, rate = number(arithmetic, "flops_per_token"), number(arithmetic, "matrix_flops_per_second")
    return Figures(
        before=next((point for point in records.held_out if point.step == 0), None),
        after=next((point for point in reversed(records.held_out) if point.step > 0), None),
        finished=evaluated or (planned is not None and done >= planned),
        steps_done=done,
        steps_planned=planned,
        trainable=whole(section(records.plan, "method"), "trainable_parameters"),
        parameters=whole(section(records.plan, "model"), "parameters"),
        tokens=round(math.fsum(tokens)) if tokens else None,
        target_tokens=round(math.fsum(targets)) if targets else None,
        seconds=math.fsum(seconds) if seconds else None,
        peak_memory=max(column(records, "peak_memory_bytes"), default=None),
        tokens_per_second=speed,
        matrix_share=speed * flops / rate if speed and flops and rate else None,
    )


def column(records: Records, key: str) -> list[float]:
    """What the steps say under ``key``, those left out that say nothing."""
    return [value for step in records.steps if (value := number(step.values, key)) is not None]


def change_text(before: float, after: float) -> str:
    """The relative change: 2.0 → 1.0 is ``−50.0 %``; without a base to compare with, an em dash."""
    if before == 0 or not math.isfinite(before) or not math.isfinite(after):
        return MISSING
    change = 100 * (after - before) / abs(before)
    return f"{'−' if change < 0 else '+'}{abs(change):.1f} %"


def shares_text(before: HeldOut | None, after: HeldOut | None, name: str) -> str:
    """A share of pairs before and after, ``50 % → 81 %``, as far as it is known."""
    found = [getattr(point, name) for point in (before, after) if point is not None]
    return " → ".join(MISSING if share is None else f"{100 * share:.0f} %" for share in found)


def count_text(count: float | None) -> str:
    """A count in short: 950 → ``950``, 48_213 → ``48.2 k``, 4_884_480 → ``4.88 M``, 7.24e9 → ``7.24 B``."""
    if count is None:
        return MISSING
    for least, unit, letter in ((1e12, 1e12, "T"), (1e9, 1e9, "B"), (1e6, 1e6, "M"), (1e4, 1e3, "k")):
        if abs(count) >= least:
            return f"{significant(count / unit, 3)} {letter}"
    return exact_text(count)


def exact_text(count: float | None) -> str:
    """A count in full, in groups of three: 4884480 → ``4 884 480`` (narrow spaces)."""
    return MISSING if count is None else f"{count:,.0f}".replace(",", "\u202f")


def significant(value: float | None, digits: int = 4) -> str:
    """``digits`` significant digits, trailing zeros kept: 1.5 → ``1.500``; plain notation wherever that stays short."""
    if value is None:
        return MISSING
    if not math.isfinite(value):
        return "∞" if value > 0 else "−∞"
    if value == 0:
        return "0"
    mantissa, _, power = f"{value:.{digits - 1}e}".partition("e")
    exponent = int(power)
    if not -4 <= exponent <= 6:
        return f"{mantissa}e{exponent}".replace("-", "−")
    return f"{value:.{max(0, digits - 1 - exponent)}f}".replace("-", "−")


def duration_text(seconds: float | None) -> str:
    """``4.3 s``, ``6 min 12 s``; a dash where nobody knows."""
    return MISSING if seconds is None else disk.duration_text(seconds)
