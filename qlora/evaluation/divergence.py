"""How far one model's next tokens are from another's, at the target tokens of held-out text.

Knows hidden states, heads and labels; must not know which models they are of.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from qlora.model.loss import IGNORE_INDEX, Head

CHUNK = 256  # positions whose logits exist at the same time


@dataclass
class Divergence:
    """Sums over target tokens; the means are properties. ``differences``: of each row, its mean loss less the reference's."""

    tokens: int = 0
    summed_loss: float = 0.0
    summed_divergence: float = 0.0
    same: int = 0
    differences: list[float] = field(default_factory=list)

    @property
    def loss(self) -> float:
        """Nats a token."""
        return self.summed_loss / self.tokens

    @property
    def divergence(self) -> float:
        """Kullback-Leibler divergence from the reference, in nats a token."""
        return self.summed_divergence / self.tokens

    @property
    def same_choice(self) -> float:
        """The share of target tokens at which both think the same token likeliest."""
        return self.same / self.tokens

    @property
    def difference(self) -> tuple[float, float]:
        """(the mean over rows of how much more loss than the reference's, its standard error), paired row by row."""
        return mean_with_error(self.differences)

    @torch.no_grad()
    def add(
        self, hidden_TD: Tensor, reference_TD: Tensor, labels_T: Tensor, head: Head, reference: Head | None = None
    ) -> None:
        """Take in one row's hidden states of both models, position t to predict ``labels_T[t + 1]``; ``reference``: the other
        model's head, where it is another one."""
        wanted = labels_T[1:] != IGNORE_INDEX
        ours_ND, theirs_ND, labels_N = hidden_TD[:-1][wanted], reference_TD[:-1][wanted], labels_T[1:][wanted].long()
        if not len(labels_N):
            return
        difference = 0.0
        for start in range(0, len(labels_N), CHUNK):
            part = slice(start, start + CHUNK)
            ours = head.logits(ours_ND[part]).log_softmax(-1)
            theirs = (reference or head).logits(theirs_ND[part]).log_softmax(-1)
            index = labels_N[part, None]
            loss, before = -ours.gather(1, index).sum().item(), -theirs.gather(1, index).sum().item()
            self.summed_loss += loss
            difference += loss - before
            self.summed_divergence += (theirs.exp() * (theirs - ours)).sum().item()
            self.same += int((ours.argmax(-1) == theirs.argmax(-1)).sum())
        self.tokens += len(labels_N)
        self.differences.append(difference / len(labels_N))


def mean_with_error(values: Sequence[float]) -> tuple[float, float]:
    """(the mean, its standard error)."""
    found = torch.tensor(values, dtype=torch.float64)
    return found.mean().item(), found.std().item() / math.sqrt(len(found)) if len(found) > 1 else math.inf
