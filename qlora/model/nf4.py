"""Frozen quantised linears: how a weight matrix becomes 4-bit NF4 or FP4, or 8-bit, and how it is multiplied with.

Knows bitsandbytes, which does the arithmetic, and is the only file that may ask whether a linear is quantised. Must not
know checkpoints, transformers or adapters. The packed bytes are bitsandbytes' own, bit for bit.

Why not ``bitsandbytes.nn.Linear4bit``: on CPUs with AVX512-BF16 it packs its weight anew, in place, and then computes in
bf16 whatever dtype was asked for (in eval mode, without a gradient); and its ``MatMul4Bit`` keeps the packed weight in
an attribute of the graph, so that with streamed weights its backward reads whatever lies in that memory by then. Here
all state is plain buffers, and the backward asks the module again.
"""

from __future__ import annotations

import qlora.model.late_compile  # noqa: F401  before bitsandbytes

# isort: split
import json
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, Protocol, Self

import bitsandbytes
import torch
import torch.nn.functional as F
from bitsandbytes.functional import (
    QuantState,
    dequantize_4bit,
    int8_vectorwise_quant,
    quantize_4bit,
    quantize_blockwise,
)
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from transformers.pytorch_utils import Conv1D

from qlora.errors import ModelError

BLOCK = 64  # weights that share one scale (QLoRA paper, section 3)
PIECE = 16384 * BLOCK  # weights that a CPU quantises at once
NESTED_BLOCK = 256  # scales that share one scale of their own under double quantisation
FUSED_ROWS = 16  # up to so many rows, as in generation, CUDA's fused kernel beats dequantising; no loss is taken there
INT8_THRESHOLD = 6.0  # activations above it are multiplied in 16 bits (LLM.int8(), arXiv:2208.07339)


class Away(Protocol):
    """Where the weights of a linear wait while its layer is not on the device (``residence/placement.py``)."""

    @property
    def device(self) -> torch.device:
        """Where the weights are computed with."""

    @property
    def names(self) -> Collection[str]:
        """The linear's tensors that wait."""

    def bring(self) -> None:
        """Give the linear its weights, in memory of their own, until ``keep`` or ``drop``."""

    def keep(self) -> None:
        """Send the weights that the linear has now to where they wait."""

    def drop(self) -> None:
        """Leave the linear without weights again."""


class Packed(nn.Module):
    """What holds a frozen weight in few bits, in buffers that may wait elsewhere: a linear, or the experts of a mixture.

    It stands for ``out_features`` · ``in_features`` numbers, and computes in ``compute_dtype``.
    """

    def __init__(self, in_features: int, out_features: int, *, compute_dtype: torch.dtype) -> None:
        super().__init__()
        self.in_features = in_features
        self.out_features = out_features
        self.compute_dtype = compute_dtype
        self.away: Away | None = None

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        # model.to(torch.bfloat16) is for dense weights; rounding the scales would change what the packed bits mean
        def keep_dtype(tensor: Tensor) -> Tensor:
            moved = fn(tensor)
            return moved if moved.dtype == tensor.dtype else tensor.to(moved.device)

        return super()._apply(keep_dtype, recurse)


class FourBit(Packed):
    """What holds matrices of n weights in NF4 or FP4, in blocks of 64. Buffers, with a dimension ahead of them where it is several:

    ``weight`` uint8 [⌈n/2⌉], two weights a byte · ``absmax`` the scales, fp32 [⌈n/64⌉], or uint8 under double quantisation ·
    ``code`` fp32 [16], what each 4-bit number means; and under double quantisation ``nested_absmax`` fp32 [⌈scales/256⌉] ·
    ``nested_code`` fp32 [256] · ``offset`` fp32 [], the mean scale. The codes are those of all matrices.
    """

    weight: Tensor
    absmax: Tensor
    code: Tensor
    nested_absmax: Tensor | None
    nested_code: Tensor | None
    offset: Tensor | None

    quant_type: str
    double_quant: bool

    def hold(self, numbers: int, quant_type: str, double_quant: bool, *several: int) -> None:
        """Declare the buffers on the meta device, in their final shapes."""
        self.quant_type, self.double_quant = quant_type, double_quant
        scales = -(-numbers // BLOCK)
        buffers = {
            "weight": torch.empty(*several, (numbers + 1) // 2, dtype=torch.uint8, device="meta"),
            "absmax": torch.empty(
                *several, scales, dtype=torch.uint8 if double_quant else torch.float32, device="meta"
            ),
            "code": torch.empty(16, device="meta"),
            "nested_absmax": torch.empty(*several, -(-scales // NESTED_BLOCK), device="meta") if double_quant else None,
            "nested_code": torch.empty(256, device="meta") if double_quant else None,
            "offset": torch.empty(several, device="meta") if double_quant else None,
        }
        for name, buffer in buffers.items():
            self.register_buffer(name, buffer)

    def state(self, rows: int, columns: int, block: int, dtype: torch.dtype, which: Any = ...) -> QuantState:
        """bitsandbytes' view of the buffers of one matrix, of several that ``which`` is; ``dtype`` is what it dequantises to."""
        nested = offset = None
        if self.nested_absmax is not None and self.offset is not None:
            offset = self.offset[which]
            nested = QuantState(
                absmax=self.nested_absmax[which], code=self.nested_code, blocksize=NESTED_BLOCK, dtype=torch.float32
            )
        return QuantState(
            absmax=self.absmax[which],
            shape=torch.Size((rows, columns)),
            code=self.code,
            blocksize=block,
            quant_type=self.quant_type,
            dtype=dtype,
            offset=offset,
            state2=nested,
        )


class FrozenLinear(Packed):
    """What the quantised linears share: y = x Wᵀ + b with a W that never trains and is never kept dense.

    ``forward`` takes [..., in_features] to [..., out_features], computes in ``compute_dtype`` and answers in x's dtype.
    """

    def __init__(self, in_features: int, out_features: int, *, bias: bool, compute_dtype: torch.dtype) -> None:
        super().__init__(in_features, out_features, compute_dtype=compute_dtype)
        values = torch.empty(out_features, dtype=compute_dtype, device="meta")
        self.bias = nn.Parameter(values, requires_grad=False) if bias else None
        self.kept: dict[torch.dtype, Tensor] | None = None  # filled inside dense_cached, None outside
        self.unread = False  # on while nobody reads the product but its gradient is wanted (layers.py)
        self.transposed = False
        """Whether a checkpoint has the weight as [in, out], as GPT-2's does; here it is [out, in] all the same."""

    def place(self, weight: Tensor, device: torch.device) -> None:
        """Quantise a dense [out, in] tensor (fp32, fp16 or bf16) on ``device`` and keep the result there."""
        raise NotImplementedError

    def place_quantised(self, tensors: Mapping[str, Tensor], device: torch.device) -> None:
        """Take over a weight that bitsandbytes quantised before: what its checkpoint has for it, by the last part of its name."""
        raise NotImplementedError

    def dequantise(self, dtype: torch.dtype) -> Tensor:
        """The weight, [out, in], made anew."""
        raise NotImplementedError

    def product(self, x: Tensor) -> Tensor:
        """x Wᵀ + b for x [..., in] in ``compute_dtype``, outside any graph."""
        bias = None if self.bias is None else self.bias.to(x.dtype)
        return F.linear(x, dense_weight(self, x.dtype), bias)

    def add_product(self, x: Tensor, onto: Tensor) -> None:
        """Add ``product`` of x [..., in] to ``onto`` [..., out] in place; see the function of that name."""
        if self.fused(x):
            onto.add_(self.product(x))
        else:
            _add_dense(x, dense_weight(self, x.dtype), self.bias, onto)

    def fused(self, x: Tensor) -> bool:
        """Whether bitsandbytes multiplies x with the packed weight."""
        return False

    def forward(self, x: Tensor) -> Tensor:
        product: Tensor = _Product.apply(x.to(self.compute_dtype), self)
        return product.to(x.dtype)

    def extra_repr(self) -> str:
        return f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}"


class _Product(torch.autograd.Function):
    """y = x Wᵀ + b. Saves neither x (W is frozen, so no gradient needs it) nor W (backward reads the module again)."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, linear: FrozenLinear) -> Tensor:
        ctx.linear = linear
        return x.new_zeros(*x.shape[:-1], linear.out_features) if linear.unread else linear.product(x)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return grad @ dense_weight(ctx.linear, grad.dtype), None


class Linear4bit(FourBit, FrozenLinear):
    """A frozen linear in NF4 or FP4, of n = out·in weights. Its ``weight`` is [⌈n/2⌉, 1], as bitsandbytes has it."""

    @classmethod
    def empty(
        cls,
        in_features: int,
        out_features: int,
        *,
        bias: bool,
        quant_type: str,
        double_quant: bool,
        compute_dtype: torch.dtype,
    ) -> Self:
        """A linear on the meta device, its buffers in their final shapes. ``place`` fills it."""
        linear = cls(in_features, out_features, bias=bias, compute_dtype=compute_dtype)
        linear.hold(in_features * out_features, quant_type, double_quant)
        linear.weight = linear.weight.unsqueeze(1)
        linear.block = BLOCK
        return linear

    block: int

    def place(self, weight: Tensor, device: torch.device) -> None:
        self._keep(*quantised(weight.to(device).contiguous(), self.quant_type, self.double_quant))

    def place_quantised(self, tensors: Mapping[str, Tensor], device: torch.device) -> None:
        """Take over a weight that bitsandbytes quantised before.

        ``tensors`` holds what its checkpoint has for this weight, by the keys ``weight``, ``weight.absmax``,
        ``weight.quant_map``, ``weight.quant_state.bitsandbytes__nf4`` (or ``fp4``) and, under double quantisation,
        ``weight.nested_absmax`` and ``weight.nested_quant_map``. Raises ModelError where these do not fit together.
        """
        parts = {key.removeprefix("weight."): value for key, value in tensors.items() if key != "weight"}
        blobs = [key for key in parts if key.startswith("quant_state.bitsandbytes__")]
        if "weight" not in tensors or len(blobs) != 1 or not {"absmax", "quant_map"} <= parts.keys():
            raise ModelError(
                f"A 4-bit weight of this checkpoint comes with {sorted(tensors)}; expected weight, weight.absmax, "
                "weight.quant_map and one weight.quant_state.bitsandbytes__nf4 or __fp4, as bitsandbytes writes them."
            )
        try:
            state = QuantState.from_dict(parts, torch.device(device))
        except (ValueError, KeyError, AttributeError, AssertionError, json.JSONDecodeError) as error:
            raise ModelError(
                f"The quantisation state of a 4-bit weight is damaged ({error!r}); fetch the checkpoint again."
            ) from None
        # quant_storage may be another dtype than uint8 (FSDP shards bf16 only); the bytes are the same
        packed = tensors["weight"].to(device).contiguous().view(torch.uint8).reshape(-1, 1)
        shape, expected = tuple(state.shape or ()), (self.out_features, self.in_features)
        scales = -(-self.out_features * self.in_features // state.blocksize)
        if shape != expected or packed.numel() != self.weight.numel() or state.absmax.numel() != scales:
            raise ModelError(
                f"A 4-bit weight of this checkpoint has the shape {list(shape)} in {packed.numel()} bytes with "
                f"{state.absmax.numel()} scales; the model's configuration expects {list(expected)}."
            )
        if state.nested and state.state2.blocksize != NESTED_BLOCK:
            raise ModelError(
                f"A 4-bit weight of this checkpoint has doubly quantised scales in blocks of {state.state2.blocksize}; "
                f"only {NESTED_BLOCK}, bitsandbytes' own, is supported."
            )
        self._keep(packed, state)

    def _keep(self, packed: Tensor, state: QuantState) -> None:
        self.quant_type = state.quant_type
        self.double_quant = state.nested
        self.block = state.blocksize
        self.weight = packed
        self.absmax = state.absmax
        self.code = state.code
        self.nested_absmax = state.state2.absmax if state.nested else None
        self.nested_code = state.state2.code if state.nested else None
        self.offset = state.offset if state.nested else None
        if self.away is not None:
            self.away.keep()

    def quant_state(self, dtype: torch.dtype) -> QuantState:
        """bitsandbytes' view of the buffers; ``dtype`` is what it dequantises to."""
        return self.state(self.out_features, self.in_features, self.block, dtype)

    def dequantise(self, dtype: torch.dtype) -> Tensor:
        return dequantised(self.weight, self.quant_state(dtype))

    def product(self, x: Tensor) -> Tensor:
        if self.fused(x):
            bias = None if self.bias is None else self.bias.to(x.dtype)
            return bitsandbytes.matmul_4bit(x, self.weight, quant_state=self.quant_state(x.dtype), bias=bias)
        return super().product(x)

    def fused(self, x: Tensor) -> bool:
        few = x.is_cuda and self.kept is None and x.numel() <= FUSED_ROWS * self.in_features
        return few and self.in_features % self.block == 0

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, {self.quant_type}{', double_quant' if self.double_quant else ''}"


def quantised(weight: Tensor, quant_type: str, double_quant: bool) -> tuple[Tensor, QuantState]:
    """bitsandbytes' packed bytes of a dense ``weight`` and their state.

    Its CPU code works with some ten tensors of the weight's size at once: 2 GB for one of a 7B model's. So on a CPU it gets
    a piece at a time, and the scales are then quantised together, as it does it. The bytes are the same.
    """
    if not weight.is_cpu:
        return quantize_4bit(weight, blocksize=BLOCK, compress_statistics=double_quant, quant_type=quant_type)
    pieces = [
        quantize_4bit(piece, blocksize=BLOCK, compress_statistics=False, quant_type=quant_type)
        for piece in weight.reshape(-1).split(PIECE)
    ]
    state = pieces[0][1]
    state.shape = weight.shape
    state.absmax = torch.cat([piece.absmax for _, piece in pieces])
    if double_quant:
        state.offset = state.absmax.mean()
        state.absmax, state.state2 = quantize_blockwise(state.absmax - state.offset, blocksize=NESTED_BLOCK)
        state.nested = True
    return torch.cat([packed for packed, _ in pieces]), state


def dequantised(packed: Tensor, state: QuantState) -> Tensor:
    """The dense matrix that bitsandbytes' ``packed`` bytes stand for, in the shape and dtype of ``state``, made anew."""
    rows, columns = state.shape
    if not packed.is_cpu or columns % state.blocksize == 0:
        return dequantize_4bit(packed.view(-1, 1), state)
    # bitsandbytes 0.50.2 on a CPU with AVX-512 takes the wrong scale, and says nothing, where a block reaches over the
    # end of a row whose length is a multiple of 16 (96, say, in blocks of 64). So here a row is a block, and the last
    # one is filled up. CUDA's kernel does not look at rows; no such fault of it is known.
    state.shape = torch.Size((state.absmax.numel(), state.blocksize))
    packed = packed.view(-1)
    missing = state.shape.numel() // 2 - packed.numel()
    if missing:  # F.pad copies even where there is nothing to add
        packed = F.pad(packed, (0, missing))
    return dequantize_4bit(packed.view(-1, 1), state).view(-1)[: rows * columns].view(rows, columns)


class Linear8bit(FrozenLinear):
    """A frozen linear in LLM.int8(): ``weight`` int8 [out, in] and ``scales`` fp32 [out], W = weight · scales / 127.

    On CUDA the activations are quantised too, but for outlier columns. A CPU has no kernel for that (bitsandbytes falls
    back to a slower one in fp32), so there the product is the dense one, which bitsandbytes takes when training.
    """

    weight: Tensor
    scales: Tensor

    @classmethod
    def empty(cls, in_features: int, out_features: int, *, bias: bool, compute_dtype: torch.dtype) -> Self:
        """A linear on the meta device, its buffers in their final shapes. ``place`` fills it."""
        linear = cls(in_features, out_features, bias=bias, compute_dtype=compute_dtype)
        linear.register_buffer("weight", torch.empty(out_features, in_features, dtype=torch.int8, device="meta"))
        linear.register_buffer("scales", torch.empty(out_features, device="meta"))
        return linear

    def place(self, weight: Tensor, device: torch.device) -> None:
        """Quantise a dense [out, in] tensor on ``device``, through fp16 as bitsandbytes does, and keep the result."""
        self.weight, self.scales, _ = int8_vectorwise_quant(weight.to(device, torch.float16).contiguous())
        if self.away is not None:
            self.away.keep()

    def place_quantised(self, tensors: Mapping[str, Tensor], device: torch.device) -> None:
        """Take over a weight that bitsandbytes quantised before.

        ``tensors`` holds what its checkpoint has for this weight: ``weight`` int8 [out, in], ``SCB`` [out], the largest
        number of each row, and mostly ``weight_format``, 0 for the only arrangement that is still written. Raises
        ModelError where these do not fit together.
        """
        if not {"weight", "SCB"} <= tensors.keys():
            raise ModelError(
                f"An 8-bit weight of this checkpoint comes with {sorted(tensors)}; expected weight, SCB and perhaps "
                "weight_format, as bitsandbytes writes them."
            )
        layout = tensors["weight_format"].flatten().tolist() if "weight_format" in tensors else [0]
        if layout != [0]:
            raise ModelError(
                f"An 8-bit weight of this checkpoint is arranged for one kind of GPU (weight_format {layout}); only plain "
                "rows (0) are supported, so take the 16-bit checkpoint that it was made from."
            )
        weight, scales = tensors["weight"], tensors["SCB"]
        expected = (self.out_features, self.in_features)
        if weight.dtype != torch.int8 or tuple(weight.shape) != expected or scales.numel() != self.out_features:
            raise ModelError(
                f"An 8-bit weight of this checkpoint is {str(weight.dtype).removeprefix('torch.')} "
                f"{list(weight.shape)} with {scales.numel()} scales; the model's configuration expects int8 {list(expected)}."
            )
        self.weight = weight.to(device).contiguous()
        self.scales = scales.to(device, torch.float32).reshape(-1).contiguous()
        if self.away is not None:
            self.away.keep()

    def dequantise(self, dtype: torch.dtype) -> Tensor:
        return self.weight.to(dtype).mul_(self.scales.unsqueeze(1).mul(1.0 / 127.0))

    def product(self, x: Tensor) -> Tensor:
        if not self.fused(x):
            return super().product(x)
        state = bitsandbytes.MatmulLtState()
        state.CB, state.SCB = self.weight, self.scales
        state.has_fp16_weights, state.is_training, state.threshold = False, False, INT8_THRESHOLD
        bias = None if self.bias is None else self.bias.to(x.dtype)
        rows = bitsandbytes.matmul(x.reshape(-1, self.in_features), self.weight, bias=bias, state=state)
        return rows.view(*x.shape[:-1], self.out_features)

    def fused(self, x: Tensor) -> bool:
        return x.is_cuda


def dense_weight(linear: nn.Module, dtype: torch.dtype) -> Tensor:
    """The weight of a frozen linear as a dense [out, in] tensor. Do not write into it: it may be the one that is kept.

    Where the linear's layer is not on the device, its weight alone is fetched.
    """
    if is_away(linear):
        with at_hand(linear):
            return dense_weight(linear, dtype)
    if not isinstance(linear, FrozenLinear):
        weight: Any = linear.weight
        device = getattr(linear, "compute_device", weight.device)  # a head may lie in host memory (residence/ends.py)
        return (weight.t() if isinstance(linear, Conv1D) else weight).detach().to(device, dtype)
    if linear.kept is None:
        return linear.dequantise(dtype)
    if dtype not in linear.kept:
        linear.kept[dtype] = linear.dequantise(dtype)
    return linear.kept[dtype]


def add_product(linear: nn.Module, x: Tensor, onto: Tensor) -> None:
    """Add x Wᵀ + b of a frozen linear to ``onto`` [..., out] in place, for x [..., in] of its dtype; outside any graph.

    In 16 bits the order decides what is learnt. x Wᵀ, once rounded, lies on a grid whose steps are wider than what a young
    adapter adds; whatever is less than half a step would be lost for every token alike. Here the sum is rounded, not its
    first part, so a small ``onto`` counts in the mean as it should. The bias comes first, as in torch's own linear: while
    ``onto`` is zero this is the base bit for bit, and only a bias larger than the product has a grid as wide as that.
    It cannot be had of a product that is only known rounded, as LLM.int8()'s is, and bitsandbytes' own for a few rows.
    """
    weight = linear.weight
    if isinstance(linear, FrozenLinear) and x.dtype == linear.compute_dtype:
        linear.add_product(x, onto)
    elif type(linear) in (nn.Linear, Conv1D) and isinstance(weight, Tensor) and weight.dtype == x.dtype:
        _add_dense(x, dense_weight(linear, x.dtype), linear.bias, onto)
    else:  # it computes in another dtype than it answers in, or in a way of its own
        onto.add_(linear(x))


def _add_dense(x: Tensor, weight: Tensor, bias: Any, onto: Tensor) -> None:
    if bias is not None:
        onto.add_(bias)
    onto.view(-1, onto.shape[-1]).addmm_(x.reshape(-1, x.shape[-1]), weight.t())


@contextmanager
def dense_cached(layer: nn.Module) -> Iterator[None]:
    """Inside, every quantised linear below ``layer`` is dequantised at most once a dtype; on exit the copies are dropped.

    For sending several micro-batches through one layer. The weights must not move or change inside.
    """
    linears = [module for module in layer.modules() if isinstance(module, FrozenLinear) and module.kept is None]
    for linear in linears:
        linear.kept = {}
    try:
        yield
    finally:
        for linear in linears:
            linear.kept = None


def away_of(module: nn.Module) -> Away | None:
    """Where a linear's weights wait, plain or quantised; None for what stays."""
    return getattr(module, "away", None)


def is_away(linear: nn.Module) -> bool:
    """Whether the linear has weights, but they wait elsewhere at the moment."""
    return away_of(linear) is not None and bool(linear.weight.is_meta)  # type: ignore[union-attr]


def is_empty(linear: nn.Module) -> bool:
    """Whether the linear has a shape and no weights anywhere, as in a skeleton."""
    return bool(linear.weight.is_meta) and away_of(linear) is None  # type: ignore[union-attr]


@contextmanager
def at_hand(linear: nn.Module, changed: bool = False) -> Iterator[None]:
    """Inside, the linear has its weights even while its layer waits elsewhere. ``changed``: they go back there afterwards."""
    away = away_of(linear)
    if away is None or not is_away(linear):
        yield
        if changed and away is not None:
            away.keep()
        return
    away.bring()
    try:
        yield
    except BaseException:
        away.drop()
        raise
    if changed:
        away.keep()
    else:
        away.drop()


def packed_numbers(model: nn.Module) -> int:
    """The numbers that the packed weights in ``model`` stand for, in all."""
    return sum(part.in_features * part.out_features for part in model.modules() if isinstance(part, Packed))


def is_linear(module: nn.Module) -> bool:
    """Whether ``module`` is a linear map with one weight: quantised, plain, or GPT-2's Conv1D, which is one in spite of its name."""
    # torch's MultiheadAttention reads the weight of its out_proj and never calls it, so nothing can be planted there
    return isinstance(module, FrozenLinear | nn.Linear | Conv1D) and not isinstance(
        module, nn.modules.linear.NonDynamicallyQuantizableLinear
    )


def is_plain_linear(module: nn.Module) -> bool:
    """Whether ``module`` computes x Wᵀ + b and nothing else, so that a quantised linear may take its place.

    A class of its own may do more, as a router does; Falcon's adds its bias after the product, which is all.
    """
    return type(module) in (nn.Linear, Conv1D) or type(module).__name__ == "FalconLinear"


def is_transposed(linear: nn.Module) -> bool:
    """Whether checkpoints store the weight as [in, out], as GPT-2's Conv1D has it; every other linear's is [out, in]."""
    return isinstance(linear, Conv1D) or getattr(linear, "transposed", False)


def features(linear: nn.Module) -> tuple[int, int]:
    """(outputs, inputs) of a linear."""
    if isinstance(linear, Conv1D):
        return int(linear.weight.shape[1]), int(linear.weight.shape[0])
    return int(linear.out_features), int(linear.in_features)  # type: ignore[arg-type]
