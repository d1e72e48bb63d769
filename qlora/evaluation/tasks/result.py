"""Results: what a model scored on a task, item by item and in all, and how two of them differ.

    a metric of items       the mean over items of what each scores (accuracy)          standard error: s / √n
    a metric of all items   computed from their answers together (F1, BLEU)             standard error: by jackknife
    a difference            the same, of the items that both have, item by item

Knows numbers; must not know a model or a kind of task beyond its name.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import partial
from typing import Any, Literal

import numpy

from qlora.errors import InputError

Json = dict[str, Any]
Together = Callable[[Sequence[Json]], dict[str, float]]
GROUPS = 20  # that a jackknife leaves out in turn


@dataclass(frozen=True)
class Metric:
    """A score: its value, its standard error (None where one item gives none), what guessing at random scores (None where that
    means nothing), and whether more is ``higher`` or ``lower`` of what is wanted."""

    value: float
    error: float | None
    chance: float | None
    better: Literal["higher", "lower"]


@dataclass(frozen=True)
class Paired:
    """By how much one result is above another on ``items`` that both have, and the standard error of that."""

    value: float
    error: float | None
    items: int


@dataclass(frozen=True)
class Result:
    """What a model scored on a task."""

    task: str
    kind: str
    """The task's kind: ``choice``, ``text``, …"""
    settings: str
    """What the task asks, by a hash: results of other prompts cannot be compared item by item."""
    metrics: dict[str, Metric]
    """By name; the first is the one that stands for the task."""
    scores: dict[str, dict[str, float]]
    """By item id, what the item scores in each metric of items: ``{"3f5c…": {"accuracy": 1.0}}``. The id is made from the
    item's content, so that it is the same in every result and every subset."""
    answers: dict[str, Json] = field(default_factory=dict)
    """By item id, what the model answered: log-likelihoods, the choice picked, a text. Metrics of all items follow from it."""

    def as_dict(self) -> Json:
        """Plain JSON."""
        return asdict(self)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Result:
        """What ``as_dict`` gave. Raises InputError for anything else."""
        try:
            metrics = {name: Metric(**metric) for name, metric in values["metrics"].items()}
            return cls(**{**values, "metrics": metrics})
        except (AttributeError, KeyError, TypeError) as error:
            raise InputError(f"This is no result of a task ({error}); expected what Result.as_dict gave.") from None


def mean_and_error(values: Sequence[float]) -> tuple[float, float | None]:
    """(the mean, its standard error: s / √n with n − 1 degrees of freedom)."""
    array = numpy.asarray(values, dtype=numpy.float64)
    return float(array.mean()), float(array.std(ddof=1) / math.sqrt(len(array))) if len(array) > 1 else None


def jackknifed(ids: Sequence[str], of: Callable[[list[str]], float]) -> tuple[float, float | None]:
    """(``of`` all ``ids``, its standard error by leaving out one of ``GROUPS`` groups at a time).

    Efron 1982: √((g − 1) / g · Σ (θ₍ⱼ₎ − θ̄)²). The groups follow from the ids alone, so a second call gives the same.
    """
    ordered, count = sorted(ids), min(GROUPS, len(ids))
    whole = of(ordered)
    if count < 2:
        return whole, None
    left = [of([one for place, one in enumerate(ordered) if place % count != group]) for group in range(count)]
    spread = numpy.asarray(left, dtype=numpy.float64)
    return whole, math.sqrt((count - 1) / count * float(((spread - spread.mean()) ** 2).sum()))


def _apart(together: Together, one: Result, other: Result, name: str, ids: Sequence[str]) -> float:
    """The difference in a metric of all items, where these are ``ids``."""
    ours, theirs = (together([result.answers[key] for key in ids])[name] for result in (one, other))
    return ours - theirs


def difference(one: Result, other: Result) -> dict[str, Paired]:
    """How much ``one`` scores above ``other``, by metric, on the items that both have.

    Raises InputError when they are of other tasks, or have no item in common.
    """
    from qlora.evaluation.tasks.kinds import KINDS

    if (one.kind, one.settings) != (other.kind, other.settings):
        raise InputError(
            f"The results of '{one.task}' and '{other.task}' cannot be compared: they were asked in another way; score both "
            "with one section."
        )
    ids = [key for key in one.scores if key in other.scores]
    if not ids:
        raise InputError(f"The two results of '{one.task}' have no item in common, so that nothing can be compared.")
    found = {}
    for name in one.metrics:
        if name in one.scores[ids[0]]:
            value, error = mean_and_error([one.scores[key][name] - other.scores[key][name] for key in ids])
        else:
            value, error = jackknifed(ids, partial(_apart, KINDS[one.kind].together, one, other, name))
        found[name] = Paired(value, error, len(ids))
    return found
