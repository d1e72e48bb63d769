"""Hybrids: packed examples are what they are alone, forward and backward, with recurrences that know no positions."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers.models.auto.configuration_auto import CONFIG_MAPPING_NAMES

from qlora.errors import ModelError
from qlora.model import anatomy
from qlora.model.attention import PackedMask, keep_apart, packed_rows
from qlora.model.checks import check_packing
from qlora.model.loss import hidden_states
from qlora.model.mixers import begin_anew
from qlora.residence.checks import check_boundary
from qlora.residence.layers import recomputing, wrap_layers
from tests.rounding import GRADIENT, MODEL, rounding
from tests.tiny import HYBRIDS, difference, random_model

IDS = [5, 17, 31, 42, 8, 66, 90, 23, 4, 77, 12, 58, 39, 6, 81, 20]
DEPTH = 3  # a mixer sums in its convolution, its state and the products in and out, where attention has two
LENGTHS = [[3, 1, 9, 2, 7], [12, 10], [22]]


def hybrid(name: str) -> Any:
    family, sizes, _ = HYBRIDS[name]
    return random_model(family, num_hidden_layers=3, **sizes)


def ready(name: str) -> Any:
    model = hybrid(name)
    begin_anew(model)
    keep_apart(model, torch.float32, 0)
    return model


def packed() -> tuple[Tensor, Tensor]:
    """(ids, positions) of three rows that are cut in other places."""
    generator = torch.Generator().manual_seed(0)
    positions = torch.stack([torch.cat([torch.arange(length) for length in lengths]) for lengths in LENGTHS])
    return torch.randint(3, 96, positions.shape, generator=generator), positions


def test_groups_hold_every_token_once() -> None:
    mask = PackedMask.of(packed()[1])
    device = torch.device("cpu")
    groups = mask.groups(device)
    assert [size for _, _, size in groups] == [(2, 22), (3, 10), (2, 3), (1, 1)]
    tokens = torch.cat([tokens for tokens, _, _ in groups])
    assert torch.equal(tokens[mask.back(device)], torch.arange(66))
    for tokens, places, (count, longest) in groups:
        assert len(tokens) == len(places) > count * longest / 2
    assert mask.groups(device) is groups


@pytest.mark.parametrize("name", HYBRIDS)
@pytest.mark.sampled
def test_packed_examples_are_what_they_are_alone(name: str) -> None:
    model, plain = ready(name), hybrid(name)
    ids, positions = packed()
    leaves = []
    for one in (model, plain):
        anatomy.embedding(one).weight.requires_grad_(True)  # type: ignore[union-attr]
        leaves.append(anatomy.embedding(one).weight)  # type: ignore[union-attr]
    found = hidden_states(model, {"input_ids": ids, "position_ids": positions})
    alone = []
    for row, lengths in enumerate(LENGTHS):
        for part, places in zip(ids[row].split(lengths), positions[row].split(lengths), strict=True):
            alone.append(hidden_states(plain, {"input_ids": part[None], "position_ids": places[None]})[0])
    wanted = torch.cat(alone).view_as(found)
    slope = torch.randn(found.shape, generator=torch.Generator().manual_seed(1))
    (grad,), (grad_alone,) = (
        torch.autograd.grad((states * slope).sum(), leaf) for states, leaf in zip((found, wanted), leaves, strict=True)
    )
    assert difference(found, wanted) < rounding(DEPTH * MODEL)
    assert difference(grad, grad_alone) < rounding(DEPTH * GRADIENT)


def test_whatever_a_mixer_answers_comes_back_in_its_rows() -> None:
    """Zaya's gives queries, keys and values, each with a number of heads of its own, and beside them what has no tokens."""

    class Three(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv1d(4, 4, 3)

        def forward(self, hidden: Tensor) -> tuple[Tensor, Tensor, Tensor]:
            summed = hidden.cumsum(1)
            return summed, summed.view(*hidden.shape[:2], 2, 2), hidden.sum()

    model, (ids, positions) = nn.Sequential(Three()), packed()
    plain, hidden = Three(), torch.nn.functional.one_hot(ids % 4, 4).double()
    begin_anew(model)
    with packed_rows(PackedMask.of(positions)):
        states, heads, rest = model(hidden)
    alone = [
        torch.cat([plain(part[None])[0][0] for part in row.split(lengths)])
        for row, lengths in zip(hidden, LENGTHS, strict=True)
    ]
    assert torch.equal(states, torch.stack(alone))
    assert torch.equal(heads.flatten(2), states)
    assert rest is None


@pytest.mark.parametrize("name", HYBRIDS)
@pytest.mark.sampled
def test_what_was_refused_is_right(name: str) -> None:
    with pytest.raises(ModelError, match="see each other"):
        check_packing(hybrid(name), IDS)
    for rows in (1, 3):
        check_packing(ready(name), IDS, rows)


@pytest.mark.parametrize("name", HYBRIDS)
@pytest.mark.sampled
def test_the_recompute_boundary_knows_where_examples_begin(name: str) -> None:
    """Also in backward, long after the forward that was told: by gradients, with two of three rows at once."""
    ids, positions = packed()
    batch = {"input_ids": ids, "position_ids": positions}
    slope, found = torch.randn(3, 22, 32, generator=torch.Generator().manual_seed(1)), []
    for behind in (False, True):
        model = ready(name)
        if behind:
            wrap_layers(model, 2)
            check_boundary(model, IDS, 3, 2, True)
        norms = [
            values
            for module in model.modules()
            if isinstance(module, nn.ModuleList)
            for path, values in module.named_parameters()
            if path.endswith("norm.weight") or ".ln" in path
        ]
        for values in norms:
            values.requires_grad_(True)
        with recomputing(model):
            (hidden_states(model, batch) * slope).sum().backward()
        found.append(torch.cat([values.grad.flatten() for values in norms if values.grad is not None]))
    assert difference(found[1], found[0]) < rounding(DEPTH * GRADIENT)


def test_every_hybrid_is_a_type_of_this_transformers() -> None:
    assert {kind for _, _, kind in HYBRIDS.values()} <= set(CONFIG_MAPPING_NAMES)
