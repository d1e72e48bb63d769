"""``torch.autocast``, which a loop of your own may have on, around our autograd functions.

    x in fp32, autocast to bf16  ─► x in bf16 ─► the function, forward and backward, in x's dtype as ever

torch casts what goes into each product, one by one; inside a function that adds in place, fp32 and bf16 would meet. Cast
once before it, everything inside agrees. Knows torch's switch; must not know any formula.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor


def as_autocast(x: Tensor) -> Tensor:
    """``x`` in the dtype that autocast computes products in; as it is where that is off, and in fp64, which torch leaves."""
    kind = x.device.type
    return x.to(torch.get_autocast_dtype(kind)) if _is_on(kind) and x.dtype != torch.float64 else x


def without_autocast(device: torch.device) -> AbstractContextManager[None]:
    """Inside, products are computed in the dtype of what is multiplied."""
    return torch.autocast(device.type, enabled=False) if _is_on(device.type) else nullcontext()


def _is_on(kind: str) -> bool:
    return kind != "meta" and torch.is_autocast_enabled(kind)  # torch knows no autocast on meta, and raises
