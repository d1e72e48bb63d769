"""Numbers for people, and the few figures that sum a run up.

Knows units, rounding and a run's records; must not know HTML. Every text is plain: ``4.88 M``, ``6 min 12 s``,
``−50.3 %``. Missing numbers are an em dash, never a zero.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from qlora.reporting.records import HeldOut, Records, number, section, whole

MISSING = "—"


@dataclass(frozen=True)
class Figures:
    """What stands at the head of the page. ``None`` where the run folder does not tell (yet)."""

    before: HeldOut | None
    after: HeldOut | None
    """The final evaluation, or the latest one of a run that has not ended."""
    finished: bool
    steps_done: int
    steps_planned: int | None
    trainable: int | None
    parameters: int | None
    tokens: int | None
    """Tokens that went through the model in training, padding left out as the log counts them."""
    target_tokens: int | None
    seconds: float | None
    """Time spent in optimizer steps; loading and evaluation are not in it."""
    peak_memory: float | None
    """Bytes."""
    tokens_per_second: float | None
    """The median over the steps."""


def summarise(records: Records) -> Figures:
    """Records → the headline figures."""
    done = records.steps[-1]["step"] if records.steps else 0
    planned = whole(records.plan, "steps")
    after_exists = number(section(records.evaluation, "held_out", "after"), "loss") is not None
    before_exists = bool(records.held_out) and records.held_out[0].step == 0
    later = [point for point in records.held_out if point.step > 0]
    method, model = section(records.plan, "method"), section(records.plan, "model")
    return Figures(
        before=records.held_out[0] if before_exists else None,
        after=later[-1] if later else None,
        finished=after_exists or (planned is not None and done >= planned),
        steps_done=done,
        steps_planned=planned,
        trainable=whole(method, "trainable_parameters"),
        parameters=whole(model, "parameters"),
        tokens=_total(records, "tokens"),
        target_tokens=_total(records, "target_tokens"),
        seconds=_sum(records, "seconds"),
        peak_memory=max(_column(records, "peak_memory_bytes"), default=None),
        tokens_per_second=_median(_column(records, "tokens_per_second")),
    )


def change_text(before: float, after: float) -> str:
    """The relative change: 2.0 → 1.0 is ``−50.0 %``; without a base to compare with, an em dash."""
    if before == 0 or not math.isfinite(before) or not math.isfinite(after):
        return MISSING
    change = 100 * (after - before) / abs(before)
    return f"{'−' if change < 0 else '+'}{abs(change):.1f} %"


def count_text(count: float | None) -> str:
    """A count in short: 950 → ``950``, 48_213 → ``48.2 k``, 4_884_480 → ``4.88 M``, 7.24e9 → ``7.24 B``."""
    if count is None:
        return MISSING
    for size, letter in ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e4, "k")):
        if abs(count) >= size:
            return f"{significant(count / (1e3 if letter == 'k' else size), 3)} {letter}"
    return f"{count:,.0f}".replace(",", "\u202f")


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
    exponent = math.floor(math.log10(abs(float(f"{value:.{digits - 1}e}"))))
    if not -4 <= exponent <= 6:
        mantissa, _, power = f"{value:.{digits - 1}e}".partition("e")
        return f"{mantissa}e{int(power)}".replace("-", "−")
    return f"{value:.{max(0, digits - 1 - exponent)}f}".replace("-", "−")


def duration_text(seconds: float | None) -> str:
    """``42 s``, ``6 min 12 s``, ``3 h 05 min``."""
    if seconds is None:
        return MISSING
    if seconds < 10:
        return f"{seconds:.1f} s"
    whole_seconds = round(seconds)
    if whole_seconds < 60:
        return f"{whole_seconds} s"
    if whole_seconds < 3600:
        return f"{whole_seconds // 60} min {whole_seconds % 60:02d} s"
    minutes = round(seconds / 60)
    return f"{minutes // 60} h {minutes % 60:02d} min"


def share_text(part: float | None, of: float | None) -> str:
    """``3.50 %``; an em dash where either is missing."""
    if part is None or not of:
        return MISSING
    return f"{significant(100 * part / of, 3)} %"


def _column(records: Records, key: str) -> list[float]:
    return [value for step in records.steps if (value := number(step, key)) is not None]


def _sum(records: Records, key: str) -> float | None:
    column = _column(records, key)
    return math.fsum(column) if column else None


def _total(records: Records, key: str) -> int | None:
    total = _sum(records, key)
    return None if total is None else round(total)


def _median(values: list[float]) -> float | None:
    return sorted(values)[len(values) // 2] if values else None
