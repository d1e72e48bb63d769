"""MXFP4, in which gpt-oss keeps its experts: 32 numbers of 4 bits share a power of two (OCP Microscaling Formats, 1.0).

    blocks uint8 [E, out, in / 32, 16]  ┐
                                        ├─►  [E, in, out], as transformers computes with it
    scales uint8 [E, out, in / 32]      ┘

Exact in bf16: a number has two significant bits. Knows the format alone.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

VALUES = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0, -0.0, -0.5, -1.0, -1.5, -2.0, -3.0, -4.0, -6.0)
BIAS = 127
"""Of the scales' exponents."""
BLOCKS, SCALES = "_blocks", "_scales"
"""What a checkpoint appends to a parameter's name."""


def dense(blocks: Tensor, scales: Tensor) -> Tensor:
    """[…, out, in / 32, 16] bytes, the lower half of each first, and their scales → [..., in, out] in bf16."""
    values = torch.tensor(VALUES, dtype=torch.bfloat16, device=blocks.device)
    pairs = torch.stack([values[(blocks & 15).int()], values[(blocks >> 4).int()]], -1).flatten(-2)
    whole = torch.ldexp(pairs, (scales.int() - BIAS).unsqueeze(-1)).to(torch.bfloat16)
    return whole.flatten(-2).transpose(-1, -2).contiguous()


class FromMxfp4:
    """``dense`` in the form of transformers' conversions; there is no way back, so a merged model has 16 bits."""

    def convert(self, tensors: dict[str, Any], target_patterns: list[str], **_: Any) -> dict[str, Any]:
        """{…_blocks: [tensor], …_scales: [tensor]} → {target: dense}"""
        (blocks,), (scales,) = (next(v for k, v in tensors.items() if k.endswith(end)) for end in (BLOCKS, SCALES))
        return {target_patterns[0]: dense(blocks, scales)}
