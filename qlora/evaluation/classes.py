"""Classes: how well a classifier's choices agree with the labels.

    accuracy    the share of examples whose class was chosen
    precision, recall, F1       of each class, and their means over all classes (macro), as tasks/classification.py has them

Knows numbers alone.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from qlora.evaluation.tasks.classification import of_label

MOST_SHOWN = 20  # classes in a terminal


@dataclass(frozen=True)
class OfClass:
    """One class: how many examples have its label, and its three shares."""

    label: str
    examples: int
    precision: float
    recall: float
    f1: float


@dataclass(frozen=True)
class Classes:
    """What is measured of a classifier's choices beside their loss."""

    examples: int
    accuracy: float
    precision: float
    """The mean over all classes, as the next two."""
    recall: float
    f1: float
    each: tuple[OfClass, ...]

    def __str__(self) -> str:
        means = f"precision {self.precision:.3f}, recall {self.recall:.3f}, F1 {self.f1:.3f} (means over classes)"
        return f"accuracy {self.accuracy:.1%} over {self.examples:,} examples, {means}"

    def table(self) -> str:
        """A line a class, of many the first."""
        shown = self.each[:MOST_SHOWN]
        wide = max(len(one.label) for one in shown)
        lines = [
            f"  {one.label:<{wide}}  {one.examples:>6,} examples  precision {one.precision:.3f}  recall {one.recall:.3f}  F1 {one.f1:.3f}"
            for one in shown
        ]
        more = len(self.each) - len(shown)
        return "\n".join([*lines, *([f"  and {more:,} more, in evaluation.json"] if more else [])])


def classes_of(pairs: Sequence[tuple[int, int]], labels: Sequence[str]) -> Classes:
    """The measurement of examples by the (chosen, right) class of each, numbers in ``labels``. Where nothing is in a denominator the
    value is 0."""
    each = [
        OfClass(label, sum(right == number for _, right in pairs), *of_label(pairs, number))
        for number, label in enumerate(labels)
    ]
    precision, recall, f1 = (
        sum(getattr(one, name) for one in each) / len(each) for name in ("precision", "recall", "f1")
    )
    accuracy = sum(chosen == right for chosen, right in pairs) / len(pairs)
    return Classes(len(pairs), accuracy, precision, recall, f1, tuple(each))
