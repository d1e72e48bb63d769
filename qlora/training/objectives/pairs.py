"""Pairs: a chosen answer and a rejected one, compared by how likely the model finds them.

    rows ─► one pass ─► cross-entropy of each answer, summed in its group ─► compare ─► loss of each pair, rewards
                        (its gradient is waiting, as if every weight were 1)     └─► weight of each group, by autograd

The gradient of each loss here is that of cross-entropy with a weight for each answer, so the passes through the model are
those of training on the next token, and logits exist for ``chunk`` positions. Both answers of a pair are in one row
(``data/packing.py``), hence in one pass, and one suffices: weights are needed in backward alone (``model/loss.py``).

Knows rows and a model's loss; must not know steps, optimizers or files.

Shape suffixes: P pairs; 3 groups of a pair: the chosen answer, the rejected one, and what else of the chosen text counts.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import NamedTuple

import numpy
import torch
from torch import Tensor

from qlora.data.packing import Row
from qlora.machine.device import in_smaller_parts
from qlora.methods.base import AdaptedModel
from qlora.model.base import evaluating
from qlora.model.loss import IGNORE_INDEX, grouped_loss, head_of, hidden_states
from qlora.residence.layers import recomputing
from qlora.training.objectives.tokens import Tokens


class Compared(NamedTuple):
    """What a comparison gives, in float64."""

    losses: Tensor
    """In nats, of each pair [P]."""
    rewards: Tensor
    """Of the chosen and of the rejected answer [P, 2]."""


Comparison = Callable[[Tensor, Tensor, Tensor], Compared]
"""What tells preference objectives apart: ``sums`` of cross-entropy in nats and ``counts`` of tokens [P, 3], and the answers'
log-probabilities before training [P, 2] → losses and rewards."""


class Pairs(Tokens):
    """A comparison over the pairs of rows. ``prompts``: whether all tokens of the chosen text count, not its answer's alone."""

    def __init__(self, model: AdaptedModel, compare: Comparison, refers: bool, prompts: bool) -> None:
        super().__init__(model)
        self.compare, self.refers, self.prompts = compare, refers, prompts
        self.reference: Tensor | None = None
        """Log-probabilities of the training data's answers before training [pairs, 2]. None until they are measured: a rehearsal
        then takes them to be zero, and a trainer measures them before its first step."""
        self._rewards: dict[int, Tensor] = {}

    @property
    def unmeasured(self) -> bool:
        """Whether the reference is still to be measured."""
        return self.refers and self.reference is None

    def denominator(self, rows: Sequence[Row]) -> int:
        """Pairs."""
        return sum(len(row.examples) for row in rows) // 2

    def loss(self, rows: Sequence[Row], chunk: int) -> Tensor:
        """The loss of rows that enter the model together, summed over their pairs."""
        numbers = pair_numbers(rows)
        sums, counts = self._sums(rows, chunk)
        reference = (
            sums.new_zeros(len(numbers), 2) if self.reference is None else self.reference[numbers].to(sums.device)
        )
        compared = self.compare(sums, counts, reference)
        self._rewards |= zip(numbers, compared.rewards.detach().unbind(), strict=True)
        return compared.losses.sum().float()

    def summed(self, rows: Sequence[Row]) -> list[float]:
        """Of these rows' pairs, as they were when their loss was taken: how many, their rewards, and how many chosen answers have
        more."""
        if not rows:
            return [0.0] * 4
        rewards = torch.stack([self._rewards[number] for number in pair_numbers(rows)]).cpu()
        return [len(rewards), *rewards.sum(0).tolist(), float((rewards[:, 0] > rewards[:, 1]).sum())]

    def told(self, sums: Sequence[float]) -> dict[str, float]:
        """The mean rewards, how much more the chosen answers have, and how often."""
        pairs, chosen, rejected, ahead = sums
        return {
            "reward_chosen": chosen / pairs,
            "reward_rejected": rejected / pairs,
            "reward_margin": (chosen - rejected) / pairs,
            "reward_accuracy": ahead / pairs,
        }

    @torch.no_grad()
    def measure(self, rows: Sequence[Row], at_once: int, chunk: int) -> tuple[Tensor, Tensor]:
        """(sums of cross-entropy, counts of tokens) [P, 3] of the pairs of ``rows``, on the CPU, without dropout or gradients.

        ``at_once`` rows enter the model together; where layers are behind their boundary it cuts them as in training, so that
        a layer that is fetched, or dequantised, is so once for all of them. Raises DoesNotFitError where one row is too much.
        """
        network = self.model.model
        # rows of like length are together, so that little is padded
        places = sorted(range(len(rows)), key=lambda place: -len(rows[place].ids))

        def measured(start: int, stop: int, chunk: int) -> list[tuple[Tensor, Tensor]]:
            together = [rows[place] for place in places[start:stop]]
            pairs = [len(row.examples) // 2 for row in together]
            both = self._sums(together, chunk)
            return list(zip(*(values.cpu().split(pairs) for values in both), strict=True))

        lengths = [len(rows[place].ids) for place in places]
        with evaluating(network), recomputing(network):
            found = in_smaller_parts(lengths, at_once, chunk, measured, self.model.device, "row of pairs")
        in_order = [one for _, one in sorted(zip(places, found, strict=True), key=lambda pair: pair[0])]
        sums, counts = zip(*in_order, strict=True)
        return torch.cat(sums), torch.cat(counts)

    def _sums(self, rows: Sequence[Row], chunk: int) -> tuple[Tensor, Tensor]:
        """(the cross-entropy of each group, how many tokens it has), both float64 [P, 3]."""
        labelled, groups = _grouped(rows, self.prompts)
        batch, count = self.batch(labelled), 3 * self.denominator(rows)
        hidden, head = hidden_states(self.model.model, batch), head_of(self.model.model)
        sums = grouped_loss(hidden, head, batch["labels"], groups, count, chunk)
        counts = torch.bincount(groups, minlength=count).to(sums)
        return sums.view(-1, 3), counts.view(-1, 3)


def pair_numbers(rows: Sequence[Row]) -> list[int]:
    """The number of each pair in these rows: examples 2 and 3 are pair 1."""
    return [index // 2 for row in rows for index in row.examples[::2]]


def answers(sums: Tensor) -> Tensor:
    """The log-probabilities of the answers [P, 2] by the ``sums`` of cross-entropy [P, 3]."""
    return -sums[:, :2]


def _grouped(rows: Sequence[Row], prompts: bool) -> tuple[list[Row], Tensor]:
    """(rows with all labels that count, the group of each of their targets in order)."""
    labelled: list[Row] = []
    groups: list[numpy.ndarray] = []
    pair = 0
    for row in rows:
        labels = row.labels.copy()
        for side, (begin, end) in enumerate(row.spans()):
            labels[begin] = IGNORE_INDEX  # nothing of its own text is before it
            trained = labels[begin:end] != IGNORE_INDEX
            group = numpy.where(trained, 3 * (pair + side // 2) + side % 2, 3 * (pair + side // 2) + 2)
            if prompts and side % 2 == 0:
                labels[begin + 1 : end], trained[1:] = row.ids[begin + 1 : end], True
            groups.append(group[trained])
        labelled.append(replace(row, labels=labels))
        pair += len(row.examples) // 2
    return labelled, torch.from_numpy(numpy.concatenate(groups).astype(numpy.int64))
