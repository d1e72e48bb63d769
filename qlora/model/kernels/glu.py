"""A gated activation, act(gate) · up, in one kernel there and one back; for backward gate and up alone are kept.

    SwiGLU   silu(gate) · up             GeGLU   gelu(gate) · up             Shazeer 2020, arXiv:2002.05202

Backward computes the activation again and writes both gradients over gate and up. Autograd is told, so that another
reader of theirs would fail and not read gradients. All is computed in fp32 and rounded once.

Knows one operator; must not know models.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from qlora.model.kernels.language import OPERATORS, jit, taken, tl

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "silu": F.silu,
    "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),
    "gelu": F.gelu,
}
BACKWARD: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "silu": torch.ops.aten.silu_backward,
    "gelu_tanh": lambda grad, x: torch.ops.aten.gelu_backward(grad, x, approximate="tanh"),
    "gelu": torch.ops.aten.gelu_backward,
}
BLOCK = 1024


@jit
def _activation(x, NAME: tl.constexpr):  # type: ignore[no-untyped-def]
    # (the activation, its slope)
    if NAME == "silu":
        s = tl.sigmoid(x)
        value, slope = x * s, s * (1.0 + x * (1.0 - s))
    elif NAME == "gelu_tanh":
        s = tl.sigmoid(1.5957691216057308 * (x + 0.044715 * x * x * x))  # (1 + tanh z) / 2 = sigmoid(2 z)
        inner = 1.5957691216057308 * (1.0 + 0.134145 * x * x)
        value, slope = x * s, s + x * s * (1.0 - s) * inner
    else:
        s = 0.5 * (1.0 + tl.erf(x * 0.7071067811865476))
        value, slope = x * s, s + x * tl.exp(-0.5 * x * x) * 0.3989422804014327
    return value, slope


@jit
def _forward(gate_ptr, up_ptr, y_ptr, width, gate_row, up_row, NAME: tl.constexpr, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = column < width
    gate = tl.load(gate_ptr + row * gate_row + column, mask=inside, other=0.0).to(tl.float32)
    up = tl.load(up_ptr + row * up_row + column, mask=inside, other=0.0).to(tl.float32)
    value, _ = _activation(gate, NAME)
    tl.store(y_ptr + row * width + column, (value * up).to(y_ptr.dtype.element_ty), mask=inside)


@jit
def _backward(grad_ptr, gate_ptr, up_ptr, width, gate_row, up_row, NAME: tl.constexpr, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = column < width
    grad = tl.load(grad_ptr + row * width + column, mask=inside, other=0.0).to(tl.float32)
    gate_ptr += row * gate_row
    up_ptr += row * up_row
    gate = tl.load(gate_ptr + column, mask=inside, other=0.0).to(tl.float32)
    up = tl.load(up_ptr + column, mask=inside, other=0.0).to(tl.float32)
    value, slope = _activation(gate, NAME)
    tl.store(gate_ptr + column, (grad * up * slope).to(gate_ptr.dtype.element_ty), mask=inside)
    tl.store(up_ptr + column, (grad * value).to(up_ptr.dtype.element_ty), mask=inside)


OPERATORS.define("glu(Tensor gate, Tensor up, str act) -> Tensor")
OPERATORS.define("glu_backward_(Tensor(a!) gate, Tensor(b!) up, Tensor grad, str act) -> ()")


@torch.library.impl(OPERATORS, "glu", "CompositeExplicitAutograd")
def _glu(gate: Tensor, up: Tensor, act: str) -> Tensor:
    if not taken(gate, up):
        return ACTIVATIONS[act](gate).mul_(up)
    y = _shape(gate, up, act)
    gate_NI, up_NI = gate.flatten(0, -2), up.flatten(0, -2)
    rows, width = gate_NI.shape
    with torch.cuda.device_of(gate):
        _forward[rows, -(-width // BLOCK)](
            gate_NI, up_NI, y, width, gate_NI.stride(0), up_NI.stride(0), NAME=act, BLOCK=BLOCK
        )
    return y


@torch.library.register_fake("qlora::glu", lib=OPERATORS)
def _shape(gate: Tensor, up: Tensor, act: str) -> Tensor:
    return gate.new_empty(gate.shape)


@torch.library.impl(OPERATORS, "glu_backward_", "CompositeExplicitAutograd")
def _glu_backward(gate: Tensor, up: Tensor, grad: Tensor, act: str) -> None:
    if not taken(gate, up, grad):
        for_gate = BACKWARD[act](grad * up, gate)
        torch.mul(grad, ACTIVATIONS[act](gate), out=up)
        gate.copy_(for_gate)
        return
    gate_NI, up_NI = gate.flatten(0, -2), up.flatten(0, -2)
    rows, width = gate_NI.shape
    with torch.cuda.device_of(gate):
        _backward[rows, -(-width // BLOCK)](
            grad.contiguous(), gate_NI, up_NI, width, gate_NI.stride(0), up_NI.stride(0), NAME=act, BLOCK=BLOCK
        )


@torch.library.register_fake("qlora::glu_backward_", lib=OPERATORS)
def _nothing(gate: Tensor, up: Tensor, grad: Tensor, act: str) -> None:
    return None


class _GLU(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, gate: Tensor, up: Tensor | None, act: str) -> Tensor:
        ctx.act, ctx.joined = act, up is None
        held = [one.contiguous() for one in (gate, up) if one is not None]
        ctx.save_for_backward(*held)
        return torch.ops.qlora.glu(*_two(held), act)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        held = [one.detach() for one in ctx.saved_tensors]
        torch.ops.qlora.glu_backward_(*_two(held), grad, ctx.act)
        for one in held:
            torch.autograd.graph.increment_version(one)
        wanted = [one if needed else None for one, needed in zip(held, ctx.needs_input_grad, strict=False)]
        return (*wanted, None, None) if ctx.joined else (*wanted, None)


def _two(held: list[Tensor]) -> tuple[Tensor, Tensor]:
    """Gate and up, as views where they are one tensor."""
    gate, up = held if len(held) == 2 else held[0].chunk(2, -1)
    return gate, up


def glu(gate: Tensor, up: Tensor | None, act: str) -> Tensor:
    """[…, I] twice → […, I]; where ``up`` is None, ``gate`` is [gate | up], […, 2 I]. ``act``: a name of ``ACTIVATIONS``.

    Backward writes over both, which nobody else may read then.
    """
    if up is not None and (up.dtype != gate.dtype or up.shape != gate.shape):
        return ACTIVATIONS[act](gate) * up
    return _GLU.apply(gate, up, act)
