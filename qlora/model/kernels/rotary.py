"""Rotary positions of queries and keys in one kernel; backward is the same with the turn the other way.

    [a, b | rest] → [a · cos₁ − b · sin₁, b · cos₂ + a · sin₂ | rest]      Su et al. 2021, arXiv:2104.09864

a and b are the two halves of the numbers that turn, and cos and sin have two halves too; what is beyond them (partial
rotary) passes. Nothing is kept but cos and sin, which all layers share. All is computed in fp32 and rounded once.

Knows one operator; must not know models.

Shape suffixes: R rows, T tokens, H heads, E size of a head.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from qlora.model.kernels.language import OPERATORS, jit, taken, tl, up_to_power


@jit
def _turn(  # type: ignore[no-untyped-def]
    x_ptr, y_ptr, cos_1, sin_1, cos_2, sin_2, heads, x_head, y_head, half, size,
    HEADS: tl.constexpr, HALF: tl.constexpr, REST: tl.constexpr, BACK: tl.constexpr,
):  # fmt: skip
    # all heads of one token
    head = tl.arange(0, HEADS)[:, None]
    column = tl.arange(0, HALF)[None, :]
    inside = (head < heads) & (column < half)
    a = tl.load(x_ptr + head * x_head + column, mask=inside, other=0.0).to(tl.float32)
    b = tl.load(x_ptr + head * x_head + half + column, mask=inside, other=0.0).to(tl.float32)
    if BACK:
        turned_a, turned_b = a * cos_1 + b * sin_2, b * cos_2 - a * sin_1
    else:
        turned_a, turned_b = a * cos_1 - b * sin_1, b * cos_2 + a * sin_2
    tl.store(y_ptr + head * y_head + column, turned_a.to(y_ptr.dtype.element_ty), mask=inside)
    tl.store(y_ptr + head * y_head + half + column, turned_b.to(y_ptr.dtype.element_ty), mask=inside)
    if REST:
        column = 2 * half + tl.arange(0, REST)[None, :]
        inside = (head < heads) & (column < size)
        rest = tl.load(x_ptr + head * x_head + column, mask=inside, other=0.0)
        tl.store(y_ptr + head * y_head + column, rest, mask=inside)


@jit
def _rotate(  # type: ignore[no-untyped-def]
    q_ptr, k_ptr, q_out_ptr, k_out_ptr, cos_ptr, sin_ptr, tokens, q_heads, k_heads, half, size,
    q_row, q_token, q_head, k_row, k_token, k_head, cos_row, cos_token, sin_row, sin_token,
    Q_HEADS: tl.constexpr, K_HEADS: tl.constexpr, HALF: tl.constexpr, REST: tl.constexpr, BACK: tl.constexpr,
):  # fmt: skip
    place = tl.program_id(0).to(tl.int64)
    row, token = place // tokens, place % tokens
    column = tl.arange(0, HALF)[None, :]
    cos_ptr += row * cos_row + token * cos_token
    sin_ptr += row * sin_row + token * sin_token
    cos_1 = tl.load(cos_ptr + column, mask=column < half, other=0.0).to(tl.float32)
    sin_1 = tl.load(sin_ptr + column, mask=column < half, other=0.0).to(tl.float32)
    cos_2 = tl.load(cos_ptr + half + column, mask=column < half, other=0.0).to(tl.float32)
    sin_2 = tl.load(sin_ptr + half + column, mask=column < half, other=0.0).to(tl.float32)
    _turn(
        q_ptr + row * q_row + token * q_token, q_out_ptr + place * q_heads * size,
        cos_1, sin_1, cos_2, sin_2, q_heads, q_head, size, half, size, Q_HEADS, HALF, REST, BACK,
    )  # fmt: skip
    _turn(
        k_ptr + row * k_row + token * k_token, k_out_ptr + place * k_heads * size,
        cos_1, sin_1, cos_2, sin_2, k_heads, k_head, size, half, size, K_HEADS, HALF, REST, BACK,
    )  # fmt: skip


OPERATORS.define("rotary(Tensor q, Tensor k, Tensor cos, Tensor sin, bool back) -> (Tensor, Tensor)")


@torch.library.impl(OPERATORS, "rotary", "CompositeExplicitAutograd")
def _rotary(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, back: bool) -> tuple[Tensor, Tensor]:
    outputs = _shapes(q, k, cos, sin, back)
    if not taken(q, k, cos, sin):
        for x, y in zip((q, k), outputs, strict=True):
            _plain(x, cos, sin, back, y)
        return outputs
    rows, q_heads, tokens, size = q.shape
    half = cos.shape[-1] // 2
    q, k, cos, sin = (one if one.stride(-1) == 1 else one.contiguous() for one in (q, k, cos, sin))
    shared = 0 if len(cos) == 1 else 1  # one table for all rows
    heads_at_once, half_at_once = up_to_power(q_heads), up_to_power(half)
    with torch.cuda.device_of(q):
        _rotate[(rows * tokens,)](
            q, k, *outputs, cos, sin, tokens, q_heads, k.shape[1], half, size,
            q.stride(0), q.stride(2), q.stride(1), k.stride(0), k.stride(2), k.stride(1),
            shared * cos.stride(0), cos.stride(1), shared * sin.stride(0), sin.stride(1),
            Q_HEADS=heads_at_once, K_HEADS=up_to_power(k.shape[1]), HALF=half_at_once,
            REST=up_to_power(size - 2 * half) if size > 2 * half else 0, BACK=back,
            num_warps=min(16, max(1, heads_at_once * half_at_once // 512)),  # 16 numbers a thread
        )  # fmt: skip
    return outputs


@torch.library.register_fake("qlora::rotary", lib=OPERATORS)
def _shapes(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, back: bool) -> tuple[Tensor, Tensor]:
    dtype = torch.promote_types(q.dtype, cos.dtype)
    made = [x.new_empty(len(x), x.shape[2], x.shape[1], x.shape[3], dtype=dtype).transpose(1, 2) for x in (q, k)]
    return made[0], made[1]


def _plain(x: Tensor, cos: Tensor, sin: Tensor, back: bool, y: Tensor) -> None:
    """The same in torch, into ``y``, of whose dtype the first product is."""
    half = cos.shape[-1] // 2
    # [R, T, H, E], as they lie in memory
    x, y, cos, sin = x.transpose(1, 2), y.transpose(1, 2), cos.unsqueeze(2), sin.unsqueeze(2)
    (cos_1, cos_2), (sin_1, sin_2) = cos.split(half, -1), sin.split(half, -1)
    a, b, rest = x.split([half, half, x.shape[-1] - 2 * half], -1)
    y_a, y_b, y_rest = y.split([half, half, rest.shape[-1]], -1)
    torch.mul(a, cos_1, out=y_a).addcmul_(b, sin_2 if back else sin_1, value=1 if back else -1)
    torch.mul(b, cos_2, out=y_b).addcmul_(a, sin_1 if back else sin_2, value=-1 if back else 1)
    y_rest.copy_(rest)


class _Rotary(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
        ctx.save_for_backward(cos, sin)
        ctx.dtypes = q.dtype, k.dtype
        return torch.ops.qlora.rotary(q, k, cos, sin, False)

    @staticmethod
    def backward(ctx: Any, grad_q: Tensor, grad_k: Tensor) -> tuple[Tensor | None, ...]:
        back = torch.ops.qlora.rotary(grad_q, grad_k, *ctx.saved_tensors, True)
        for_q, for_k = (grad.to(dtype) for grad, dtype in zip(back, ctx.dtypes, strict=True))
        return for_q if ctx.needs_input_grad[0] else None, for_k if ctx.needs_input_grad[1] else None, None, None


def rotary(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    """Queries [R, H, T, E] and keys [R, K, T, E], turned by tables [R or 1, T, up to E]."""
    return _Rotary.apply(q, k, cos, sin)
