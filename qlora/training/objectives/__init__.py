"""Objectives: what a step minimises. Each turns rows into a summed loss and says what that sum is divided by.

    rows ─► loss (summed over what counts)     rows of the whole step ─► denominator

The step divides once, by the whole step's denominator, so that micro-batches of any size give the same gradient.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Protocol

from torch import Tensor

from qlora.data import Row
from qlora.methods import AdaptedModel
from qlora.recipe import AnyObjective
from qlora.training.objectives.tokens import Tokens

__all__ = ["OBJECTIVES", "Objective", "Tokens", "make_objective"]


OBJECTIVES: dict[str, Callable[[AnyObjective, AdaptedModel], Objective]] = {"tokens": lambda _, model: Tokens(model)}
"""By the section's name, what makes it."""


def make_objective(section: AnyObjective, model: AdaptedModel) -> Objective:
    """The objective of a recipe's section, for ``model``."""
    return OBJECTIVES[section.name](section, model)


class Objective(Protocol):
    """What the step asks of an objective."""

    def denominator(self, rows: Sequence[Row]) -> int:
        """What the summed loss of these rows is divided by."""
        ...

    def batch(self, rows: Sequence[Row]) -> dict[str, Tensor]:
        """Rows as the tensors that enter the model together."""
        ...

    def loss(self, rows: Sequence[Row], chunk: int) -> Tensor:
        """The summed loss of rows that enter the model together, a scalar; ``chunk`` positions have logits at a time."""
        ...
