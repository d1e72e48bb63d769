"""Classification: which label is likeliest behind the prompt.

    accuracy    the share of items whose likeliest label is the right one
    precision   of what was given a label, the share that has it      recall   of what has a label, the share that was given it
    f1          2 · precision · recall / (precision + recall)

The last three are about the label ``positive``, or without one their means over all labels (macro). Where nothing is in the
denominator the value is 0.

Knows a record's fields and counts; must not know how likelihoods are computed.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from qlora.evaluation.tasks.choice import likeliest
from qlora.evaluation.tasks.result import Json
from qlora.evaluation.tasks.task import Asked, Form, Kind, Unusable, filled, judged, text_in


def _ask(fields: Mapping[str, Any], form: Form) -> Asked:
    labels = form.labels or {}
    if len(labels) < 2 or not all(label.strip() for label in labels.values()):
        raise Unusable("cannot be asked: the task's labels are fewer than two, or one is empty")
    value = text_in(fields, form.answer, "the label").strip()
    if value not in labels:
        raise Unusable(f"has {value!r} in '{form.answer}', which is none of the task's labels: {', '.join(labels)}")
    if form.positive is not None and form.positive not in labels:
        raise Unusable(f"cannot be asked: positive is {form.positive!r}, which is none of {', '.join(labels)}")
    prompt = filled(form.prompt or "", fields, "the prompt")
    names = list(labels)
    positive = None if form.positive is None else names.index(form.positive)
    gold = {"right": names.index(value), "positive": positive}
    return Asked(tuple((prompt, form.delimiter + label) for label in labels.values()), gold=gold)


def _scores(answer: Json) -> dict[str, float]:
    return {"accuracy": float(likeliest(answer["log_likelihoods"]) == answer["right"])}


def _together(answers: Sequence[Json]) -> dict[str, float]:
    pairs = [(likeliest(answer["log_likelihoods"]), answer["right"]) for answer in answers]
    positive, count = answers[0]["positive"], len(answers[0]["log_likelihoods"])
    each = [of_label(pairs, label) for label in ([positive] if positive is not None else range(count))]
    means = (sum(values) / len(each) for values in zip(*each, strict=True))
    return dict(zip(("precision", "recall", "f1"), means, strict=True))


def _chance(answers: Sequence[Json], vocabulary: int) -> dict[str, float]:
    """Labels drawn evenly: precision is then a label's share, recall and accuracy one of so many."""
    positive, count = answers[0]["positive"], len(answers[0]["log_likelihoods"])
    right = [answer["right"] for answer in answers]
    shares = [right.count(label) / len(right) for label in ([positive] if positive is not None else range(count))]
    f1 = [2 * share / count / (share + 1 / count) for share in shares]
    precision = sum(shares) / len(shares)
    return {"accuracy": 1 / count, "precision": precision, "recall": 1 / count, "f1": sum(f1) / len(f1)}


def of_label(pairs: Sequence[tuple[int, int]], label: int) -> tuple[float, float, float]:
    """(precision, recall, F1) of one label, from (given, right)."""
    hits = sum(given == right == label for given, right in pairs)
    given, there = (sum(pair[side] == label for pair in pairs) for side in (0, 1))
    return (
        hits / given if given else 0.0,
        hits / there if there else 0.0,
        2 * hits / (given + there) if given + there else 0.0,
    )


CLASSIFICATION = Kind(
    {"accuracy": "higher", "precision": "higher", "recall": "higher", "f1": "higher"},
    _ask,
    judged,
    _scores,
    _together,
    _chance,
)
