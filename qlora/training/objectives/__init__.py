"""Objectives: what a step minimises. Each turns rows into a summed loss and says what that sum is divided by.

    rows ─► loss (summed over what counts)     rows of the whole step ─► denominator

The step divides once, by the whole step's denominator, so that micro-batches of any size give the same gradient.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from torch import Tensor

from qlora.data import Row
from qlora.training.objectives.tokens import Tokens

__all__ = ["Objective", "Tokens"]


class Objective(Protocol):
    """What the step asks of an objective."""

    def denominator(self, rows: Sequence[Row]) -> int:
        """What the summed loss of these rows is divided by."""
        ...

    def loss(self, rows: Sequence[Row], chunk: int) -> Tensor:
        """The summed loss of rows that enter the model together, a scalar; ``chunk`` positions have logits at a time."""
        ...
