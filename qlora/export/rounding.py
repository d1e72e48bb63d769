"""NF4 codes chosen for what a matrix is multiplied with: the error of each column is taken up by those that follow.

    plain   each weight to the nearest code: what was learned is smaller than a step, so the old codes come back, and it is lost
    here    min over codes of  ‖W x − Ŵ x̂‖²,  x the inputs in the trained model and x̂ those in the model made so far

GPTQ (Frantar et al. 2022, arXiv:2210.17323) with scales fixed before, the columns with the largest inputs first, and W
moved beforehand to where it answers x̂ as it answered x (Li et al. 2025, GPTAQ, arXiv:2504.02692). A block's scale is the
least-squares one, found by turns with its codes. The result is in bitsandbytes' own packing. Knows matrices; must not know models.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from bitsandbytes.functional import QuantState, dequantize_blockwise, get_4bit_type, quantize_blockwise
from torch import Tensor

from qlora.model.nf4 import BLOCK, NESTED_BLOCK

DAMPING = 0.01  # of the mean square of the inputs, added to each: GPTQ's own
COLUMNS = 128  # whose errors reach the columns behind them together
SHRUNK = (1.0, 0.95, 0.9, 0.85, 0.8)  # of a block's largest weight, where its scale is looked for first


@dataclass
class Inputs:
    """What is kept of a linear's inputs: Σ x̂ x̂ᵀ and Σ (x − x̂) x̂ᵀ, both [in, in] in fp32."""

    squares: Tensor
    moved: Tensor

    @classmethod
    def none_yet(cls, features: int, device: torch.device) -> Inputs:
        """Before the first input."""
        return cls(torch.zeros(features, features, device=device), torch.zeros(features, features, device=device))

    def add(self, made: Tensor, trained: Tensor) -> None:
        """Take in x̂ and x, both [n, in]."""
        made, trained = made.float(), trained.float()
        self.squares.addmm_(made.t(), made)
        self.moved.addmm_((trained - made).t(), made)


def rounded(weight: Tensor, inputs: Inputs, double_quant: bool, dtype: torch.dtype) -> tuple[Tensor, QuantState]:
    """bitsandbytes' packed NF4 codes [⌈out·in/2⌉, 1] of ``weight`` [out, in], and their state for ``dtype``."""
    device, (rows, columns) = weight.device, weight.shape
    code = get_4bit_type("nf4", device=device)
    squares = inputs.squares.clone()
    diagonal = squares.diagonal()
    diagonal += max(DAMPING * float(diagonal.mean()), torch.finfo(torch.float32).tiny)
    factor = torch.linalg.cholesky(squares)
    weight = weight.float()
    weight = weight + torch.cholesky_solve((weight @ inputs.moved).t(), factor).t()
    state = _scales(weight, diagonal, code, double_quant, dtype)
    scales = _unnested(state).repeat_interleave(BLOCK)[: rows * columns].view(rows, columns)
    order = diagonal.argsort(descending=True)
    squares = squares[order][:, order]
    # row j of U: how column j's error is answered by those behind it, once all before are fixed
    inverse = torch.cholesky_inverse(torch.linalg.cholesky(squares))
    codes = _fed_back(weight[:, order], scales[:, order], torch.linalg.cholesky(inverse, upper=True), code)
    codes = codes[:, order.argsort()].reshape(-1)
    if len(codes) % 2:
        codes = torch.cat([codes, codes.new_full((1,), int(code.abs().argmin()))])
    return (codes[::2] << 4 | codes[1::2])[:, None].contiguous(), state


def _fed_back(weight: Tensor, scales: Tensor, upper: Tensor, code: Tensor) -> Tensor:
    """The codes, uint8 [out, in], of columns taken one after the other; ``weight`` is used up."""
    codes = torch.empty_like(weight, dtype=torch.uint8)
    for start in range(0, weight.shape[1], COLUMNS):
        part = slice(start, min(start + COLUMNS, weight.shape[1]))
        errors, inside = torch.empty_like(weight[:, part]), upper[part, part]
        values = weight[:, part]
        for column in range(values.shape[1]):
            wanted, scale = values[:, column], scales[:, start + column]
            found = _nearest(wanted, scale, code)
            codes[:, start + column] = found
            error = (wanted - code[found.long()] * scale) / inside[column, column]
            values[:, column:] -= torch.outer(error, inside[column, column:])
            errors[:, column] = error
        weight[:, part.stop :] -= errors @ upper[part, part.stop :]
    return codes


def _nearest(values: Tensor, scale: Tensor, code: Tensor) -> Tensor:
    """The number of the code nearest to each of ``values`` in steps of ``scale``, uint8; that of zero in a block of zeros."""
    steps = torch.where(scale > 0, values / scale, 0.0)
    return torch.bucketize(steps, (code[1:] + code[:-1]) / 2).to(torch.uint8)


def _scales(weight: Tensor, weights: Tensor, code: Tensor, double_quant: bool, dtype: torch.dtype) -> QuantState:
    """A scale for each block of 64, the one that leaves the least error, its columns weighed by their inputs' squares [in]."""
    count = weight.numel()
    blocks = -(-count // BLOCK)
    padded = torch.nn.functional.pad(weight.reshape(-1), (0, blocks * BLOCK - count)).view(blocks, BLOCK)
    weighed = torch.nn.functional.pad(weights.expand_as(weight).reshape(-1), (0, blocks * BLOCK - count)).view_as(
        padded
    )
    largest = padded.abs().amax(1, keepdim=True)
    best, least = largest, torch.full_like(largest, torch.inf)
    for share in SHRUNK:
        scale = largest * share
        for _ in range(3):
            steps = code[_nearest(padded, scale, code).long()]
            error = (weighed * (padded - steps * scale).square()).sum(1, keepdim=True)
            best, least = torch.where(error < least, scale, best), torch.minimum(error, least)
            square = (weighed * steps.square()).sum(1, keepdim=True)
            scale = torch.where(square > 0, (weighed * padded * steps).sum(1, keepdim=True) / square, scale)
    absmax, offset, nested = best[:, 0], None, None
    if double_quant:
        offset = absmax.mean()
        absmax, nested = quantize_blockwise(absmax - offset, blocksize=NESTED_BLOCK)
    return QuantState(absmax, weight.shape, code, BLOCK, "nf4", dtype, offset, nested)


def _unnested(state: QuantState) -> Tensor:
    """A scale for each block, in fp32, as bitsandbytes reads it."""
    if not state.nested:
        return state.absmax
    return dequantize_blockwise(state.absmax, state.state2) + state.offset
