"""Which curves a run has: its records as charts.

Knows the fields of metrics.jsonl and what is worth comparing them with; must not know how a chart is drawn.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator

from qlora.machine.device import GIB
from qlora.reporting.charts import Chart, Curve, Point, smooth
from qlora.reporting.figures import exact_text, significant
from qlora.reporting.records import Records, number

MOST_BOUNDARIES = 24  # more epochs than that would be a grey veil


def loss_chart(records: Records) -> Chart:
    """Training loss, smoothed training loss and held-out loss, by step."""
    points = _points(records, "loss")
    weights = {step["step"]: number(step, "target_tokens") or 0.0 for step in records.steps}
    known = [weights[int(step)] for step, _ in points]
    smoothed, reach = smooth(points, known if all(known) else [1.0] * len(points))
    curves = [
        Curve("training" if smoothed else "training loss", points, "raw" if smoothed else "main"),
        Curve("smoothed", smoothed),
        Curve("held out", [(float(point.step), point.loss) for point in records.held_out], "held-out"),
    ]
    return Chart(
        "Loss",
        "nats a target token",
        [curve for curve in curves if curve.points],
        note=f"smoothed over ± {reach} steps" if smoothed else "",
        boundaries=_epochs(records),
    )


def small_charts(records: Records) -> Iterator[Chart]:
    """Learning rate, gradient norm, speed and memory, by step."""
    boundaries = _epochs(records)
    yield Chart(
        "Learning rate",
        "of a step",
        [Curve("learning rate", _points(records, "learning_rate"))],
        from_zero=True,
        boundaries=boundaries,
        text=lambda value: significant(value, 3),
    )
    clip = records.recipe.training.max_grad_norm if records.recipe else None
    yield Chart(
        "Gradient norm",
        "before clipping",
        [Curve("gradient norm", _points(records, "grad_norm"))],
        from_zero=True,
        reference=(f"clipped at {significant(clip, 2)}", clip) if clip else None,
        boundaries=boundaries,
        text=lambda value: significant(value, 3),
    )
    yield Chart(
        "Speed",
        "tokens a second",
        [Curve("speed", _points(records, "tokens_per_second"))],
        from_zero=True,
        boundaries=boundaries,
        text=exact_text,
    )
    yield Chart(
        "Peak memory",
        "GiB so far",
        [Curve("peak memory", [(step, value / GIB) for step, value in _points(records, "peak_memory_bytes")])],
        from_zero=True,
        boundaries=boundaries,
        text=lambda value: f"{value:.2f} GiB",
    )


def _points(records: Records, key: str) -> list[Point]:
    return [(float(step["step"]), value) for step in records.steps if (value := number(step, key)) is not None]


def _epochs(records: Records) -> tuple[float, ...]:
    """Where an epoch ends, between two steps: ``epoch`` 0.9, 1.0, 1.1 or 0, 0, 1 at steps 9, 10, 11 → after 10."""
    steps = [(step["step"], epoch) for step in records.steps if (epoch := number(step, "epoch")) is not None]
    fractional = any(epoch != int(epoch) for _, epoch in steps)
    ends: list[float] = []
    for (step, epoch), (following, next_epoch) in itertools.pairwise(steps):
        # A fraction counts what is done (1.0 is the last step of the first epoch), a whole number is the epoch's own.
        done, next_done = (math.ceil(epoch), math.ceil(next_epoch)) if fractional else (int(epoch), int(next_epoch))
        if next_done > done:
            ends.append((step + following) / 2)
    return tuple(ends) if len(ends) <= MOST_BOUNDARIES else ()
