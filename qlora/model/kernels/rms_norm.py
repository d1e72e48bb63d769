"""RMSNorm in one kernel there and one back; for backward its input and a number a row are kept.

    y = (offset + weight) · x / √(mean x² + eps)        Zhang & Sennrich 2019, arXiv:1910.07467

``offset`` is 1 in Gemma and 0 in most others. All is computed in fp32 and rounded once. The weight's gradient is summed in
two stages, over a fixed number of parts and then over these, so that it is the same in each run.

Knows one operator; must not know models.

Shape suffixes: N rows, D their width, P parts.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from qlora.model.kernels.language import OPERATORS, jit, pieces, taken, tl, up_to_power, wide

WIDEST = 32768  # a row is one block
BLOCK = 4096  # numbers that a program has at once, where a row has fewer
PARTS = 256  # of the weight's gradient


@jit
def _forward(  # type: ignore[no-untyped-def]
    x_ptr, weight_ptr, y_ptr, rstd_ptr, rows, width, eps, offset, ROWS: tl.constexpr, COLUMNS: tl.constexpr
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    column = tl.arange(0, COLUMNS)
    inside = (row < rows)[:, None] & (column < width)[None, :]
    at = row[:, None] * width + column[None, :]
    x = tl.load(x_ptr + at, mask=inside, other=0.0).to(tl.float32)
    weight = tl.load(weight_ptr + column, mask=column < width, other=0.0).to(tl.float32) + offset
    rstd = 1.0 / tl.sqrt(tl.sum(x * x, axis=1) / width + eps)
    y = x * rstd[:, None] * weight[None, :]
    tl.store(y_ptr + at, y.to(y_ptr.dtype.element_ty), mask=inside)
    tl.store(rstd_ptr + row, rstd, mask=row < rows)


@jit
def _backward(  # type: ignore[no-untyped-def]
    grad_ptr, x_ptr, weight_ptr, rstd_ptr, to_x_ptr, to_weight_ptr, rows, width, offset,
    STEPS: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, TO_X: tl.constexpr, TO_WEIGHT: tl.constexpr,
):  # fmt: skip
    # a program has ROWS rows at a time, STEPS times
    column = tl.arange(0, COLUMNS)
    weight = tl.load(weight_ptr + column, mask=column < width, other=0.0).to(tl.float32) + offset
    to_weight = tl.zeros([COLUMNS], dtype=tl.float32)
    first = tl.program_id(0).to(tl.int64) * STEPS * ROWS
    for step in range(STEPS):
        row = first + step * ROWS + tl.arange(0, ROWS)
        inside = (row < rows)[:, None] & (column < width)[None, :]
        at = row[:, None] * width + column[None, :]
        grad = tl.load(grad_ptr + at, mask=inside, other=0.0).to(tl.float32)
        rstd = tl.load(rstd_ptr + row, mask=row < rows, other=0.0)
        normal = tl.load(x_ptr + at, mask=inside, other=0.0).to(tl.float32) * rstd[:, None]
        if TO_X:
            scaled = grad * weight[None, :]
            mean = tl.sum(scaled * normal, axis=1) / width
            to_x = (scaled - normal * mean[:, None]) * rstd[:, None]
            tl.store(to_x_ptr + at, to_x.to(to_x_ptr.dtype.element_ty), mask=inside)
        if TO_WEIGHT:
            to_weight += tl.sum(grad * normal, axis=0)
    if TO_WEIGHT:
        tl.store(to_weight_ptr + tl.program_id(0).to(tl.int64) * width + column, to_weight, mask=column < width)


def _blocks(width: int) -> dict[str, int]:
    columns = up_to_power(width)
    return {
        "ROWS": max(1, BLOCK // columns),
        "COLUMNS": columns,
        "num_warps": min(32, max(8, columns // 512)),  # 16 numbers a thread
    }


OPERATORS.define("rms_norm(Tensor x, Tensor weight, float eps, float offset, bool narrow) -> (Tensor, Tensor)")
OPERATORS.define(
    "rms_norm_backward(Tensor grad, Tensor x, Tensor weight, Tensor rstd, float offset, bool to_x, bool to_weight)"
    " -> (Tensor, Tensor)"
)


@torch.library.impl(OPERATORS, "rms_norm", "CompositeExplicitAutograd")
def _rms_norm(x: Tensor, weight: Tensor, eps: float, offset: float, narrow: bool) -> tuple[Tensor, Tensor]:
    y, rstd_N = _shapes(x, weight, eps, offset, narrow)
    x_ND, y_ND, width = rows_of(x), rows_of(y), x.shape[-1]
    if taken(x, weight) and width <= WIDEST:
        blocks = _blocks(width)
        programs = (-(-len(x_ND) // blocks["ROWS"]),)
        with torch.cuda.device_of(x):
            _forward[programs](x_ND, weight, y_ND, rstd_N, len(x_ND), width, eps, offset, **blocks)
    else:
        scale = weight.to(rstd_N.dtype) + offset
        for x_PD, y_PD, rstd_P in pieces(x_ND, y_ND, rstd_N):
            wide_PD = x_PD.to(rstd_N.dtype, copy=True)
            torch.linalg.vector_norm(wide_PD, dim=-1, out=rstd_P).square_().div_(width).add_(eps).rsqrt_()
            y_PD.copy_(wide_PD.mul_(rstd_P[:, None]).mul_(scale))
    return y, rstd_N


@torch.library.register_fake("qlora::rms_norm", lib=OPERATORS)
def _shapes(x: Tensor, weight: Tensor, eps: float, offset: float, narrow: bool) -> tuple[Tensor, Tensor]:
    dtype = x.dtype if narrow else torch.promote_types(x.dtype, weight.dtype)
    return torch.empty_like(x, dtype=dtype), x.new_empty(x.shape[:-1].numel(), dtype=wide(x.dtype))


@torch.library.impl(OPERATORS, "rms_norm_backward", "CompositeExplicitAutograd")
def _rms_norm_backward(
    grad: Tensor, x: Tensor, weight: Tensor, rstd_N: Tensor, offset: float, to_x: bool, to_weight: bool
) -> tuple[Tensor, Tensor]:
    for_x, for_weight = _gradient_shapes(grad, x, weight, rstd_N, offset, to_x, to_weight)
    grad_ND, x_ND, width = rows_of(grad), rows_of(x), x.shape[-1]
    if not (taken(grad, x, weight) and width <= WIDEST):
        scale, total_D = weight.to(rstd_N.dtype) + offset, torch.zeros(width, dtype=rstd_N.dtype, device=x.device)
        for x_PD, grad_PD, rstd_P, to_x_PD in pieces(x_ND, grad_ND, rstd_N, rows_of(for_x) if to_x else x_ND):
            rstd_P1 = rstd_P[:, None]
            normal_PD = x_PD.to(rstd_N.dtype, copy=True).mul_(rstd_P1)
            wide_PD = grad_PD.to(rstd_N.dtype, copy=True)
            if to_weight:
                total_D += (wide_PD * normal_PD).sum(0)
            if to_x:
                mean_P1 = (wide_PD.mul_(scale) * normal_PD).mean(-1, keepdim=True)
                to_x_PD.copy_(wide_PD.addcmul_(normal_PD, mean_P1, value=-1).mul_(rstd_P1))
        if to_weight:
            for_weight.copy_(total_D)
        return for_x, for_weight
    blocks = _blocks(width)
    count = -(-len(x_ND) // blocks["ROWS"])
    # a power of two, as each other number is compiled anew
    steps = up_to_power(-(-count // PARTS)) if to_weight else 1
    programs = -(-count // steps)
    parts_PD = x.new_empty(programs if to_weight else 0, width, dtype=torch.float32)
    with torch.cuda.device_of(x):
        _backward[(programs,)](
            grad_ND, x_ND, weight, rstd_N, for_x, parts_PD, len(x_ND), width, offset,
            STEPS=steps, TO_X=to_x, TO_WEIGHT=to_weight, **blocks,
        )  # fmt: skip
    if to_weight:
        for_weight.copy_(parts_PD.sum(0))
    return for_x, for_weight


@torch.library.register_fake("qlora::rms_norm_backward", lib=OPERATORS)
def _gradient_shapes(
    grad: Tensor, x: Tensor, weight: Tensor, rstd_N: Tensor, offset: float, to_x: bool, to_weight: bool
) -> tuple[Tensor, Tensor]:
    return torch.empty_like(x) if to_x else x.new_empty(0), weight.new_empty(len(weight) if to_weight else 0)


class _RMSNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float, offset: float, narrow: bool) -> Tensor:
        if not rows_of(x).is_contiguous():  # a slice of something
            x = x.contiguous()
        y, rstd_N = torch.ops.qlora.rms_norm(x, weight, eps, offset, narrow)
        ctx.save_for_backward(x, weight, rstd_N)
        ctx.offset = offset
        return y

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, rstd_N = ctx.saved_tensors
        to_x, to_weight = ctx.needs_input_grad[:2]
        if grad.stride() != x.stride():
            grad = torch.empty_like(x, dtype=grad.dtype).copy_(grad)
        for_x, for_weight = torch.ops.qlora.rms_norm_backward(grad, x, weight, rstd_N, ctx.offset, to_x, to_weight)
        return for_x if to_x else None, for_weight if to_weight else None, None, None, None


def rows_of(x: Tensor) -> Tensor:
    """[…, D] → [N, D] in the order in which they lie in memory, as a view; a copy where they do not lie close together.

    Example: heads [R, H, T, E] that are a view of [R, T, H, E] → [R · T · H, E]
    """
    order = sorted(range(x.dim() - 1), key=x.stride, reverse=True)
    return x.permute(*order, x.dim() - 1).reshape(-1, x.shape[-1])


def rms_norm(x: Tensor, weight: Tensor, eps: float, offset: float = 0.0, narrow: bool = False) -> Tensor:
    """[…, D] → […, D] by ``weight`` [D]. The result has the dtype of ``x`` if ``narrow``, else what both are promoted to."""
    return _RMSNorm.apply(x, weight, eps, offset, narrow)
