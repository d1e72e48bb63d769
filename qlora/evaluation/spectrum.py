"""What the singular values and vectors of a weight and of its change say.

    ΔW = B A     QR of B and of Aᵀ, and the SVD of a product as small as the rank
    ΔW dense     the eigenvalues of the smaller of ΔWᵀΔW and ΔWΔWᵀ: all singular values, in float64

Why no randomised SVD: what full fine-tuning changed has no few leading directions. Of a 1,536 × 576 of SmolLM2-135M's a sketch of
288 (``torch.svd_lowrank``) holds 94 % of the energy, so that it knows no effective rank, and takes twice as long as all values
(``benchmarks/change.py``). What is below 1e-8 of the largest is lost where it is squared, which no sum of squares and no entropy
shows. Knows matrices alone.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from qlora.methods.decomposition import leading

TOP = 10  # leading directions of the changed weight that may be intruders (arXiv:2410.21228)
STRANGE = 0.5  # the |cos| with every direction of the old weight below which one is
ROWS = 4096  # of a matrix that are in float64 at the same time
NOTHING = 1e-13  # of ‖A‖ ‖B‖: float64's rounding
LOST = 1e-7  # of the largest singular value: below that a squared matrix has no direction that could be trusted


def factored(lora_A: Tensor, lora_B: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """(U [m, k], S [k], Vᵀ [k, n]) of B A for A [r, n] and B [m, r], k = min(r, m, n), in float64; B A is not formed.

    What is left where B A adds up to nothing, as of a pair that began as more than nothing and was not trained, is 0.
    """
    left, upper = torch.linalg.qr(lora_B.double())
    right, lower = torch.linalg.qr(lora_A.double().t())
    inner_left, values, inner_right = torch.linalg.svd(upper @ lower.t(), full_matrices=False)
    values = values.masked_fill(
        values <= NOTHING * torch.linalg.matrix_norm(upper) * torch.linalg.matrix_norm(lower), 0
    )
    return left @ inner_left, values, inner_right @ right.t()


def singular_values(matrix: Tensor) -> Tensor:
    """All singular values of ``matrix`` [m, n], from the largest, in float64."""
    return torch.linalg.eigvalsh(_squared(matrix)).flip(0).clamp_min_(0).sqrt_()


def effective_rank(values: Sequence[float]) -> float:
    """e to the entropy of σᵢ / Σσ (Roy and Vetterli 2007): k where k values are alike and all others 0; 0 for no change."""
    total = math.fsum(values)
    shares = [value / total for value in values if value > 0] if total else []
    return math.exp(-math.fsum(share * math.log(share) for share in shares)) if shares else 0.0


def rank_of_energy(values: Sequence[float], share: float = 0.9) -> int:
    """The least count of leading values whose squares are ``share`` of the sum of all squares; 0 for no change."""
    total, held = math.fsum(value * value for value in values), 0.0
    for count, value in enumerate(values if total else (), 1):
        held += value * value
        if held >= share * total:
            return count
    return len(values) if total else 0


def overlap(one: Tensor, other: Tensor) -> Tensor:
    """φ(i, j) [k, l] in float64 for i = 1 … k of the directions ``one`` [k, n] and j = 1 … l of ``other`` [l, n], each orthonormal.

    φ(i, j) = ‖Uᵢᵀ Uⱼ‖² / min(i, j), between 0 (orthogonal) and 1 (one lies within the other): Hu et al. 2021, equation 4. Two
    random subspaces have about max(i, j) / n.
    """
    squares = (one.double() @ other.double().t()).square_().cumsum(0).cumsum(1)
    i, j = (torch.arange(1, 1 + count, dtype=torch.float64, device=squares.device) for count in squares.shape)
    return squares / torch.minimum(i[:, None], j[None, :])


@dataclass(frozen=True)
class Intruders:
    """Of the ``TOP`` leading left singular vectors of a changed weight, those that no singular vector of the old one is like."""

    count: int
    energy: float
    """Their share of the squared Frobenius norm of the changed weight."""


class Directions:
    """The left singular vectors of an old weight ``before`` [m, n], against which a changed one's are held."""

    def __init__(self, before: Tensor) -> None:
        self.before = before
        squares, self.vectors = torch.linalg.eigh(_squared(before))
        scale = squares.clamp_min(0).sqrt()
        self.scale = scale.masked_fill_(scale <= LOST * scale[-1], torch.inf)

    def intruders(self, after: Tensor, generator: torch.Generator) -> Intruders:
        """Those of ``after`` [m, n], in fp32."""
        left, values, _ = leading(after.float(), TOP, generator)
        if self.before.shape[0] <= self.before.shape[1]:  # the vectors are the left ones; else the right ones
            cosines = left.double().t() @ self.vectors
        else:
            cosines = (left.t() @ self.before.float()).double() @ self.vectors / self.scale
        strange = cosines.abs().amax(1) < STRANGE
        total = _energy(after)
        energy = float(values.double().square()[strange].sum()) / total if total else 0.0
        return Intruders(int(strange.sum()), energy)


def elsewhere(values: Tensor, rows: int, columns: int, generator: torch.Generator) -> Tensor:
    """A matrix [rows, columns] in fp32 with these singular values [k], and so this norm, in random directions."""
    k = len(values)
    sides = [torch.linalg.qr(torch.randn(side, k, generator=generator).to(values.device)).Q for side in (rows, columns)]
    return (sides[0] * values.float()) @ sides[1].t()


def norm(matrix: Tensor) -> float:
    """The Frobenius norm, summed in float64."""
    return math.sqrt(_energy(matrix))


def _energy(matrix: Tensor) -> float:
    return float(sum(rows.double().square().sum() for rows in matrix.split(ROWS)))


def _squared(matrix: Tensor) -> Tensor:
    """The smaller of Mᵀ M and M Mᵀ in float64, added up over pieces of ``ROWS``."""
    tall = matrix if matrix.shape[0] > matrix.shape[1] else matrix.t()
    side = tall.shape[1]
    total = torch.zeros(side, side, dtype=torch.float64, device=matrix.device)
    for rows in tall.split(ROWS):
        wide = rows.double()
        total.addmm_(wide.t(), wide)
    return total
