"""The leading singular directions: exact for small matrices, close to the best for large ones, signs fixed."""

from __future__ import annotations

import pytest
import torch

from qlora.methods import decomposition
from qlora.methods.decomposition import leading
from tests.rounding import rounding


def generator() -> torch.Generator:
    return torch.Generator().manual_seed(3)


def trained(rows: int, columns: int) -> torch.Tensor:
    """A random matrix with the singular values of a trained weight: they fall as a power of their number."""
    left = torch.linalg.qr(torch.randn(rows, rows, generator=generator())).Q
    right = torch.linalg.qr(torch.randn(columns, rows, generator=generator())).Q
    return (left * torch.arange(1, rows + 1).float() ** -0.4) @ right.t()


@pytest.mark.parametrize("shape", [(64, 32), (32, 64)])
def test_small_matrices_are_decomposed_whole(shape: tuple[int, int]) -> None:
    matrix = torch.randn(shape, generator=generator())
    left, values, right = leading(matrix, 5, generator())
    expected = torch.linalg.svd(matrix, full_matrices=False)
    best = (expected.U[:, :5] * expected.S[:5]) @ expected.Vh[:5]
    assert torch.equal(values, expected.S[:5])
    torch.testing.assert_close((left * values) @ right, best, rtol=rounding(), atol=rounding())
    assert (right.gather(1, right.abs().argmax(1, keepdim=True)) > 0).all()


@pytest.mark.parametrize(("matrix", "most"), [(trained(600, 800), 1e-4), (torch.randn(600, 800), 5e-3)])
def test_large_matrices_are_nearly_as_well_approximated(matrix: torch.Tensor, most: float) -> None:
    assert min(matrix.shape) > decomposition.EXACT
    left, values, right = leading(matrix, 16, generator())
    best = torch.linalg.svdvals(matrix)[:16].square().sum()
    lost = 1 - float(((left.t() @ matrix) @ right.t()).diagonal().square().sum() / best)
    print(f"lost {lost:.1e} of the energy of 16 directions")
    assert lost < most
    torch.testing.assert_close(right @ right.t(), torch.eye(16), rtol=0, atol=rounding())
    torch.testing.assert_close(left.t() @ left, torch.eye(16), rtol=0, atol=rounding())
    again = leading(matrix, 16, generator())
    assert all(torch.equal(a, b) for a, b in zip((left, values, right), again, strict=True))


def test_nothing_has_directions_of_no_size() -> None:
    left, values, right = leading(torch.zeros(8, 6), 2, generator())
    assert not values.any()
    assert torch.isfinite(left).all()
    assert torch.isfinite(right).all()
