"""Which curves a run has: its records as charts.

Knows the fields of metrics.jsonl and what they are worth comparing with; must not know how a chart is drawn.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator

from qlora.machine.disk import GIB
from qlora.reporting.charts import Chart, Curve, Point, smooth
from qlora.reporting.figures import exact_text, significant
from qlora.reporting.records import Records, number, whole

MOST_BOUNDARIES = 24  # more epochs than that would be a grey veil


def loss_chart(records: Records) -> Chart:
    """Training loss, smoothed training loss and held-out loss, by step."""
    points = _points(records, "loss")
    weights = [
        number(step.values, "target_tokens") for step in records.steps if number(step.values, "loss") is not None
    ]
    smoothed, reach = smooth(points, [weight or 0.0 for weight in weights] if all(weights) else [1.0] * len(points))
    curves = [
        Curve("training" if smoothed else "training loss", points, "raw" if smoothed else "main"),
        Curve("smoothed", smoothed),
        Curve("held out", [(float(point.step), point.loss) for point in records.held_out], "held-out"),
    ]
    objective = records.recipe and records.recipe.objective
    unit = (
        "pair" if objective and objective.pairs else "example" if objective and objective.classifies else "target token"
    )
    return Chart(
        "Loss",
        f"nats per {unit}",
        [curve for curve in curves if curve.points],
        note=f"smoothed over ± {reach} steps" if smoothed else "",
        boundaries=_epochs(records),
        saved=_saved(records),
        resumed=[step.number - 0.5 for step in records.steps if step.values.get("resumed") is True][:MOST_BOUNDARIES],
    )


def _saved(records: Records) -> list[float]:
    """Steps after which a checkpoint was due, as the recipe says; the last one of a finished run too."""
    every, last = (records.recipe.training.save_every if records.recipe else 0), records.steps[-1:]
    steps = [step.number for step in records.steps if every and step.number % every == 0]
    if last and last[0].number == whole(records.plan, "steps"):
        steps = sorted({*steps, last[0].number})
    return [float(step) for step in steps] if len(steps) <= MOST_BOUNDARIES else []


def small_charts(records: Records) -> Iterator[Chart]:
    """Learning rate, gradient norm, speed and memory, by step; all from zero, so that ratios can be read off. And what pairs have
    beside them."""
    memory = [(step, value / GIB) for step, value in _points(records, "peak_memory_bytes")]
    clip = records.recipe.training.max_grad_norm if records.recipe else None
    clipped = (f"clipped at {significant(clip, 2)}", clip) if clip else None
    for title, unit, points, text in (
        ("Learning rate", "of a step", _points(records, "learning_rate"), _three_digits),
        ("Gradient norm", "before clipping", _points(records, "grad_norm"), _three_digits),
        ("Speed", "tokens per second", _points(records, "tokens_per_second"), exact_text),
        ("Peak memory", "GiB so far", memory, "{:.2f} GiB".format),
    ):
        reference = clipped if title == "Gradient norm" else None
        curve = Curve(title.lower(), points)
        yield Chart(title, unit, [curve] if points else [], "", True, reference, _epochs(records), text=text)
    if margins := _points(records, "reward_margin"):
        unit = "chosen less rejected"
        yield Chart("Rewards", unit, [Curve("margin", margins)], "", True, None, _epochs(records), text=_three_digits)


def _three_digits(value: float) -> str:
    return significant(value, 3)


def _points(records: Records, key: str) -> list[Point]:
    return [(float(step.number), value) for step in records.steps if (value := number(step.values, key)) is not None]


def _epochs(records: Records) -> list[float]:
    """Where an epoch ends, between two steps: ``epoch`` 0.9, 1.0, 1.1 at steps 9, 10, 11 → 10.5."""
    pairs = itertools.pairwise(_points(records, "epoch"))
    ends = [(step + after) / 2 for (step, epoch), (after, later) in pairs if math.ceil(later) > math.ceil(epoch)]
    return ends if len(ends) <= MOST_BOUNDARIES else []
