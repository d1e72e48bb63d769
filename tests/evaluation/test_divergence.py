"""Loss, divergence and choices at target tokens, against sums over whole logits in float64."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from qlora.evaluation.divergence import Divergence
from qlora.model.loss import IGNORE_INDEX, Head
from tests.rounding import rounding


def test_sums_are_those_of_whole_logits() -> None:
    torch.manual_seed(0)
    head = Head(nn.Linear(8, 50, bias=False).requires_grad_(False), softcap=4.0)
    found, losses, divergences, same, differences = Divergence(), [], [], [], []
    for length in (5, 300, 2):  # one longer than a chunk
        ours, theirs = torch.randn(length, 8), torch.randn(length, 8)
        labels = torch.randint(0, 50, (length,), dtype=torch.int32)
        labels[torch.rand(length) < 0.3] = IGNORE_INDEX
        labels[-1] = 7
        found.add(ours, theirs, labels, head)
        places = [t for t in range(1, length) if labels[t] != IGNORE_INDEX]
        weight = head.module.weight.double()
        ours_log, theirs_log = (
            (4 * torch.tanh((hidden.double() @ weight.t()) / 4)).log_softmax(-1) for hidden in (ours, theirs)
        )
        before = len(losses)
        for t in places:
            p, q = theirs_log[t - 1], ours_log[t - 1]
            losses.append(-q[labels[t]].item())
            differences.append((p - q)[labels[t]].item())
            divergences.append((p.exp() * (p - q)).sum().item())
            same.append(bool(p.argmax() == q.argmax()))
        differences[before:] = [math.fsum(differences[before:]) / len(places)] * len(places)
    rows = list(dict.fromkeys(differences))
    assert found.tokens == len(losses)
    for value, every in ((found.loss, losses), (found.divergence, divergences), (found.difference[0], rows)):
        assert value == pytest.approx(math.fsum(every) / len(every), abs=4 * rounding())
    assert found.same_choice == sum(same) / len(same)
    assert found.difference[1] == pytest.approx(torch.tensor(rows).double().std().item() / 3**0.5, rel=1e-4)


def test_a_row_without_targets_counts_for_nothing() -> None:
    found, hidden = Divergence(), torch.randn(3, 8)
    found.add(hidden, hidden, torch.full((3,), IGNORE_INDEX), Head(nn.Linear(8, 5)))
    assert (found.tokens, found.differences) == (0, [])
