"""Objectives: what a step minimises. Each turns rows into a summed loss and says what that sum is divided by.

    rows ─► loss (summed over what counts)     rows of the whole step ─► denominator

The step divides once, by the whole step's denominator, so that micro-batches of any size give the same gradient.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Protocol

from torch import Tensor

from qlora.data.packing import Row
from qlora.methods.base import AdaptedModel
from qlora.recipe import AnyObjective
from qlora.training.objectives.dpo import dpo_loss, ipo_loss
from qlora.training.objectives.orpo import orpo_loss
from qlora.training.objectives.pairs import Compared, Pairs
from qlora.training.objectives.tokens import Tokens

__all__ = ["COMPARISONS", "Objective", "Pairs", "Tokens", "make_objective"]


COMPARISONS: dict[str, Callable[..., Compared]] = {"dpo": dpo_loss, "ipo": ipo_loss, "orpo": orpo_loss}
"""By the section's name, the comparison of an objective of pairs."""


def make_objective(section: AnyObjective, model: AdaptedModel) -> Objective:
    """The objective of a recipe's section, for ``model``."""
    if not section.pairs:
        return Tokens(model)
    compare = partial(COMPARISONS[section.name], section)
    return Pairs(model, compare, section.refers, prompts=section.name == "orpo")


class Objective(Protocol):
    """What the step asks of an objective."""

    model: AdaptedModel

    def denominator(self, rows: Sequence[Row]) -> int:
        """What the summed loss of these rows is divided by."""
        ...

    def batch(self, rows: Sequence[Row]) -> dict[str, Tensor]:
        """Rows as the tensors that enter the model together."""
        ...

    def loss(self, rows: Sequence[Row], chunk: int) -> Tensor:
        """The summed loss of rows that enter the model together, a scalar; ``chunk`` positions have logits at a time."""
        ...

    def summed(self, rows: Sequence[Row]) -> list[float]:
        """What there is to say of these rows beside their loss, in sums, which those of a step's other rows may be added to."""
        ...

    def told(self, sums: Sequence[float]) -> dict[str, float]:
        """The same for ``metrics.jsonl``, from the sums of a whole step."""
        ...
