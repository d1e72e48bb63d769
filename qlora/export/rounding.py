"""Rounding a merge to 16 bits so that a small change stays in it.

The weights under an adapter lie on the grid of 16 bits already: in the checkpoint, or as the run dequantised them. What an adapter
adds is often less than half of the way to the next number there, and rounding to the nearest one takes it back: of a short fine-tune
at 2e-4 seven weights in ten came out as they had gone in. So a weight is rounded up as often as it lies near the number above
(stochastic rounding, Gupta et al. 2015, arXiv:1502.02551), and sums over many weights keep what each of them cannot. Numbers of
the grid itself stay as they are.

"As often" is decided by the weight's place, by multiples of the golden ratio, which cover an interval evenly and are the same everywhere.
"""

from __future__ import annotations

import torch
from torch import Tensor

DROPPED = {torch.bfloat16: 16, torch.float16: 13}
"""Of an fp32 number's bits, how many the dtype does not have."""
GOLDEN = 0x9E3779B9  # 2³² divided by the golden ratio
PIECE = 2**20


def dithered(values: Tensor, dtype: torch.dtype) -> Tensor:
    """fp32 ``values`` in ``dtype``, on average what they are; any other values, or dtype, by the nearest number."""
    if values.dtype != torch.float32 or dtype not in DROPPED:
        return values.to(dtype)
    drop, flat = DROPPED[dtype], values.contiguous().view(-1)
    rounded = torch.empty(flat.shape, dtype=dtype, device=flat.device)
    places = torch.arange(min(PIECE, len(flat)), device=flat.device) * GOLDEN
    for begin in range(0, len(flat), PIECE):
        bits = flat[begin : begin + PIECE].view(torch.int32)
        part = (places[: len(bits)] + begin * GOLDEN & 0xFFFFFFFF) >> (32 - drop)  # of the way that was dropped
        rounded[begin : begin + PIECE] = (bits + part.to(torch.int32) & -(1 << drop)).view(torch.float32).to(dtype)
    return rounded.view(values.shape)
