"""The kernels' first use on a device: there and back on a few rows, beside the plain way in float64.

Knows the operators; must not know models.
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from qlora.errors import first_line
from qlora.model.kernels.glu import ACTIVATIONS, glu
from qlora.model.kernels.rms_norm import rms_norm
from qlora.model.kernels.rotary import rotary

WITHIN = 16  # in eps of the dtype, of the largest number: each result is rounded once or twice


@functools.cache
def prove(operators: frozenset[str], device: torch.device, dtype: torch.dtype) -> bool:
    """Whether these compile on ``device`` and give there what the plain way gives; else a sentence on standard error."""
    for name, compute, inputs in _cases():
        if name not in operators:
            continue
        try:
            off = _apart(compute, inputs, device, dtype)
        except Exception as error:  # whatever a compiler or a driver may raise
            reason = f"does not run ({type(error).__name__}: {first_line(error)})"
        else:
            if off <= WITHIN * torch.finfo(dtype).eps:
                continue
            reason = f"is off by {off:.1e} of the largest number"
        print(
            f"The fused {name} kernel {reason} on {device} in {str(dtype).removeprefix('torch.')}: norms, rotary positions "
            "and gated activations are computed by transformers' own code, which is slower and gives the same.",
            file=sys.stderr,
        )
        return False
    return True


def _cases() -> Iterator[tuple[str, Callable[..., Any], list[Tensor]]]:
    generator = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator)

    for offset in (0.0, 1.0):
        norm = functools.partial(rms_norm, eps=1e-6, offset=offset)
        yield "rms_norm", norm, [normal(5, 80), normal(80)]
        yield "rms_norm", norm, [normal(3, 5000), normal(5000)]
    yield "rotary", rotary, [normal(2, 3, 4, 20), normal(2, 1, 4, 20), normal(2, 4, 16), normal(2, 4, 16)]
    for act in ACTIVATIONS:
        yield f"glu_{act}", functools.partial(_glu, act=act), [2 * normal(3, 1030), normal(3, 1030)]
        yield f"glu_{act}", functools.partial(_glu, up=None, act=act), [2 * normal(3, 2060)]


def _glu(gate: Tensor, up: Tensor | None, act: str) -> Tensor:
    # copies: backward writes over what it is given
    return glu(gate * 1, None if up is None else up * 1, act)


def _apart(compute: Callable[..., Any], inputs: list[Tensor], device: torch.device, dtype: torch.dtype) -> float:
    """How far the kernel in ``dtype`` and the plain way in float64, from the same numbers, are apart in the worst result."""
    rounded = [one.to(dtype) for one in inputs]
    ours = _results(compute, [one.to(device) for one in rounded])
    plain = _results(compute, [one.double() for one in rounded])
    worst = 0.0
    for mine, exact in zip(ours, plain, strict=True):
        off = float((mine.cpu().double() - exact).abs().max() / exact.abs().max())
        worst = max(worst, off if off == off else float("inf"))
    return worst


def _results(compute: Callable[..., Any], inputs: list[Tensor]) -> list[Tensor]:
    """Values and gradients."""
    asked = [one.requires_grad_() for one in inputs]
    with torch.enable_grad():
        values = compute(*asked)
    values = values if isinstance(values, tuple) else (values,)
    weights = [torch.linspace(-1, 1, one.numel(), dtype=torch.float64).view(one.shape).to(one) for one in values]
    gradients = torch.autograd.grad(values, asked, weights, allow_unused=True)
    return [*(one.detach() for one in values), *(one for one in gradients if one is not None)]
