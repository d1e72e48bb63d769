"""Singular values, ranks, overlaps and intruders of plain matrices, against whole decompositions in float64."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from qlora.evaluation import spectrum
from qlora.evaluation.spectrum import (
    Directions,
    effective_rank,
    elsewhere,
    factored,
    norm,
    overlap,
    rank_of_energy,
    singular_values,
)
from tests.rounding import difference, rounding

SHAPES = [(40, 40), (24, 60), (60, 24)]


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize(("rows", "columns"), SHAPES)
@pytest.mark.parametrize("r", [1, 8, 30])  # 30 is more than the smaller side of some
def test_a_pair_is_decomposed_as_its_product(rows: int, columns: int, r: int) -> None:
    lora_A, lora_B = random(r, columns), random(rows, r, seed=1)
    left, values, right = factored(lora_A, lora_B)
    product = lora_B.double() @ lora_A.double()
    assert len(values) == min(r, rows, columns)
    exact = rounding(dtype=torch.float64)
    assert difference(values, torch.linalg.svdvals(product)[: len(values)]) <= exact
    assert difference((left * values) @ right, product) <= exact


@pytest.mark.parametrize(("rows", "columns"), SHAPES)
def test_all_singular_values_of_a_dense_matrix(monkeypatch: pytest.MonkeyPatch, rows: int, columns: int) -> None:
    monkeypatch.setattr(spectrum, "ROWS", 7)  # added up over pieces
    matrix = random(rows, columns) * torch.logspace(0, -6, columns)
    expected = torch.linalg.svdvals(matrix.double())
    # squared, so values below 1e-8 of the largest are lost
    assert difference(singular_values(matrix).square(), expected.square()) <= rounding(dtype=torch.float64)
    assert norm(matrix) == pytest.approx(float(matrix.double().norm()), rel=1e-12)


def test_ranks_count_values() -> None:
    assert effective_rank([2.0] * 5) == pytest.approx(5)
    assert effective_rank([3.0, 0.0, 0.0]) == 1
    assert effective_rank([3.0, 1.0]) == pytest.approx(math.exp(-(0.75 * math.log(0.75) + 0.25 * math.log(0.25))))
    assert [rank_of_energy([3.0, 1.0, 0.0], share) for share in (0.89, 0.9, 0.91, 1.0)] == [1, 1, 2, 2]
    for none in ([], [0.0, 0.0]):
        assert effective_rank(none) == rank_of_energy(none) == 0


def test_overlap_is_the_papers_formula() -> None:
    one, other = (torch.linalg.qr(random(20, count, seed=count)).Q.t().double() for count in (3, 5))
    found = overlap(one, other)
    for i in range(1, 4):
        for j in range(1, 6):
            expected = float((one[:i] @ other[:j].t()).norm() ** 2) / min(i, j)
            assert float(found[i - 1, j - 1]) == pytest.approx(expected, rel=1e-12)
    itself = overlap(other, other)
    assert difference(itself, torch.ones(5, 5)) <= rounding()


@pytest.mark.parametrize(("rows", "columns"), SHAPES)
@pytest.mark.parametrize("size", [0.0, 0.5, 3.0])
def test_intruders_are_those_of_whole_decompositions(rows: int, columns: int, size: float) -> None:
    scale = torch.logspace(0, -1, columns)
    before = random(rows, columns, seed=2) * scale
    change = size * random(rows, 1, seed=3) @ random(1, columns, seed=4) * scale
    old = torch.linalg.svd(before.double(), full_matrices=False).U
    new, values, _ = torch.linalg.svd((before + change).double(), full_matrices=False)
    strange = (new[:, :10].t() @ old).abs().amax(1) < 0.5
    found = Directions(before).intruders(before + change, torch.Generator())
    assert found.count == int(strange.sum())
    energy = float(values[:10][strange].square().sum() / values.square().sum())
    assert found.energy == pytest.approx(energy, abs=rounding())
    assert found.count >= {0.0: 0, 0.5: 0, 3.0: 1}[size]
    assert size or not found.count


def test_a_weight_of_few_directions_has_no_others() -> None:
    before = random(60, 3) @ random(3, 24, seed=1)  # singular values of 0, whose squares are rounding
    assert Directions(before).intruders(before, torch.Generator()).energy < 1e-10
    after = before + 10 * random(60, 1, seed=5) @ random(1, 24, seed=6)
    assert Directions(before).intruders(after, torch.Generator()).energy > 0.5
    assert Directions(torch.zeros(8, 8)).intruders(torch.zeros(8, 8), torch.Generator()).energy == 0


def test_the_control_differs_in_direction_alone() -> None:
    values = torch.tensor([3.0, 2.0, 0.5], dtype=torch.float64)
    one, other = (elsewhere(values, 20, 30, torch.Generator().manual_seed(seed)) for seed in (0, 1))
    for matrix in (one, other):
        assert difference(torch.linalg.svdvals(matrix.double())[:3], values) <= rounding()
        assert norm(matrix) == pytest.approx(float(values.norm()), rel=rounding())
    assert float((one - other).norm()) > 1
