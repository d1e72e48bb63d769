"""Triton where it is installed, and which tensors its kernels take; everything else goes the plain way.

``TRITON_INTERPRET=1``, set before Triton is imported, has its interpreter run the kernels on a CPU: slow, and so for tests.

Knows Triton and devices; must not know an operator.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

try:
    import triton
    import triton.language as tl
except ImportError:  # not on CPUs' torch, macOS or Windows
    triton = tl = None

HERE = triton is not None
INTERPRETED = HERE and os.environ.get("TRITON_INTERPRET") == "1"
PIECE = 2**17
"""Numbers that a CPU computes with at once, where it computes the plain way: in fp32 several such stay in a core's cache."""
OPERATORS = torch.library.Library("qlora", "FRAGMENT")
"""A plan on fake tensors sees one operator, and what it gives, in the place of what is inside."""


def jit(function: Callable[..., Any]) -> Any:
    """``triton.jit``; the function itself where there is none, and nobody calls it."""
    return function if triton is None else triton.jit(function)


def taken(*tensors: Tensor) -> bool:
    """Whether the kernels take these: in 16 or 32 bits, on a GPU or interpreted."""
    known = (torch.float16, torch.bfloat16, torch.float32)
    return HERE and all((one.is_cuda or INTERPRETED) and one.dtype in known for one in tensors)


def pieces(*tensors: Tensor) -> Iterator[tuple[Tensor, ...]]:
    """Of tensors [N, …], as views, the rows that are computed with at once: all of them, but on a CPU."""
    rows = max(1, PIECE // tensors[0][0].numel()) if tensors[0].is_cpu and len(tensors[0]) else max(1, len(tensors[0]))
    return zip(*(one.split(rows) for one in tensors), strict=True)


def up_to_power(count: int) -> int:
    """The next power of two, which is what a block's sizes have to be. Example: 80 → 128"""
    return 1 << (count - 1).bit_length()


def wide(dtype: torch.dtype) -> torch.dtype:
    """What the plain way computes in: fp32 at least."""
    return torch.promote_types(dtype, torch.float32)
