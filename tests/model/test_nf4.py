"""Quantised linears hold bitsandbytes' bytes, multiply by the weight that those mean, and differentiate through it."""

from __future__ import annotations

import gc
import weakref
from typing import Any

import bitsandbytes
import pytest
import torch
import torch.nn.functional as F
from bitsandbytes.functional import QuantState, dequantize_4bit, int8_vectorwise_quant, quantize_4bit
from torch import Tensor, nn

from qlora.errors import ModelError
from qlora.model.nf4 import (
    FrozenLinear,
    Linear4bit,
    Linear8bit,
    dense_cached,
    dense_weight,
    is_linear,
)
from tests.rounding import rounding

CPU = torch.device("cpu")
# bitsandbytes 0.50.2 on a CPU with AVX-512 dequantises the first twelve with scales of other blocks; the rest rightly, but
# that it transposes a weight of one byte
WIDTHS = [16, 32, 48, 80, 96, 112, 144, 160, 176, 208, 240, 592, 1, 2, 8, 17, 33, 60, 64, 65, 100, 101, 128, 192, 576]
SHAPES = [(64, 64), (128, 320), (33, 17), (7, 10), (65, 130), (3, 5), (1, 1)]  # [out, in]: even, odd, not blocks of 64


def make(weight: Tensor, quant_type: str = "nf4", double_quant: bool = True, **options: Any) -> Linear4bit:
    options = {"bias": False, "compute_dtype": weight.dtype} | options
    linear = Linear4bit.empty(
        weight.shape[1], weight.shape[0], quant_type=quant_type, double_quant=double_quant, **options
    )
    linear.place(weight, CPU)
    return linear


def by_hand(linear: Linear4bit) -> Tensor:
    """The weight from the packed bytes by the paper's definition, without bitsandbytes."""
    count = linear.in_features * linear.out_features
    pairs = linear.weight.view(-1).int()
    numbers = torch.stack([pairs >> 4, pairs & 15], 1).view(-1)[:count]
    scales = linear.absmax
    if linear.double_quant:
        assert linear.nested_absmax is not None
        assert linear.nested_code is not None
        assert linear.offset is not None
        nested = linear.nested_absmax.repeat_interleave(256)[: scales.numel()]
        scales = linear.nested_code[scales.long()] * nested + linear.offset
    values = linear.code[numbers] * scales.repeat_interleave(linear.block)[:count]
    return values.view(linear.out_features, linear.in_features)


def assert_rounded(found: Tensor, expected: Tensor) -> None:
    """Three products and a sum in fp32 (codes, scales, their scales and offset), then rounded once to the dtype of ``found``."""
    few = 8 * torch.finfo(torch.float32).eps
    once = torch.finfo(found.dtype).eps / 2 if found.dtype != torch.float32 else 0.0
    torch.testing.assert_close(found.float(), expected, rtol=few + once, atol=few * float(expected.abs().max()))


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("double_quant", [True, False])
@pytest.mark.parametrize("quant_type", ["nf4", "fp4"])
def test_layout_is_that_of_bitsandbytes_and_means_what_the_paper_says(
    shape: tuple[int, int], double_quant: bool, quant_type: str
) -> None:
    weight = torch.randn(shape, generator=torch.Generator().manual_seed(1))
    linear = Linear4bit.empty(
        shape[1], shape[0], bias=False, quant_type=quant_type, double_quant=double_quant, compute_dtype=torch.float32
    )
    promised = {name: (buffer.shape, buffer.dtype) for name, buffer in linear.named_buffers()}
    assert all(buffer.is_meta for buffer in linear.buffers())
    linear.place(weight, CPU)
    assert {name: (buffer.shape, buffer.dtype) for name, buffer in linear.named_buffers()} == promised

    packed, state = quantize_4bit(weight, blocksize=64, compress_statistics=double_quant, quant_type=quant_type)
    assert torch.equal(linear.weight, packed)
    assert torch.equal(linear.absmax, state.absmax)
    assert torch.equal(linear.code, state.code)
    if double_quant:
        assert linear.nested_absmax is not None
        assert linear.offset is not None
        assert torch.equal(linear.nested_absmax, state.state2.absmax)
        assert torch.equal(linear.offset, state.offset)
    assert_rounded(dense_weight(linear, torch.float32), by_hand(linear))


def uneven(outputs: int, inputs: int) -> Tensor:
    """A weight whose neighbouring blocks have very different scales, so that a wrong one shows."""
    generator = torch.Generator().manual_seed(outputs * inputs)
    blocks = torch.arange(outputs * inputs).view(outputs, inputs) // 64
    return torch.randn(outputs, inputs, generator=generator) * torch.tensor([1.0, 7.0, 0.2])[blocks % 3]


@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("double_quant", [True, False])
@pytest.mark.parametrize("quant_type", ["nf4", "fp4"])
def test_blocks_over_the_ends_of_rows_have_their_own_scales(width: int, double_quant: bool, quant_type: str) -> None:
    for rows in (1, 2, 3, 5, 64):
        linear = make(uneven(rows, width), quant_type, double_quant)
        expected = by_hand(linear)
        for dtype in (torch.float32, torch.bfloat16, torch.float16):
            found = linear.dequantise(dtype)
            assert found.dtype == dtype
            assert found.is_contiguous()
            assert_rounded(found, expected)


@pytest.mark.parametrize("block", [32, 128, 256, pytest.param(2048, marks=pytest.mark.slow)])
def test_blocks_of_other_sizes_over_the_ends_of_rows(block: int) -> None:
    for rows, width in ((6, 48), (33, 64), (40, 208), (7, 17), (3, 2048)):
        linear = Linear4bit.empty(
            width, rows, bias=False, quant_type="nf4", double_quant=True, compute_dtype=torch.float32
        )
        linear.place_quantised(prequantised(uneven(rows, width), "nf4", True, block), CPU)
        assert linear.block == block
        assert_rounded(linear.dequantise(torch.float32), by_hand(linear))


@pytest.mark.parametrize(("shape", "copied"), [((5, 128), False), ((4, 96), False), ((3, 48), True), ((3, 5), True)])
def test_the_packed_weight_is_copied_only_to_fill_up_its_last_block(
    shape: tuple[int, int], copied: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    read: list[int] = []

    def watched(packed: Tensor, state: QuantState) -> Tensor:
        read.append(packed.data_ptr())
        return dequantize_4bit(packed, state)

    linear = make(uneven(*shape))
    monkeypatch.setattr("qlora.model.nf4.dequantize_4bit", watched)
    assert linear.dequantise(torch.float32).shape == shape
    assert [place != linear.weight.data_ptr() for place in read] == [copied]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("bias", [True, False])
def test_forward_is_that_of_bitsandbytes_linear(dtype: torch.dtype, bias: bool) -> None:
    torch.manual_seed(2)
    plain = nn.Linear(128, 80, bias=bias, dtype=dtype)  # with rows of 96, say, theirs is wrong (WIDTHS)
    linear = make(plain.weight.detach(), bias=bias, compute_dtype=dtype)
    if linear.bias is not None:
        linear.bias = nn.Parameter(plain.bias.detach().clone(), requires_grad=False)
    theirs = bitsandbytes.nn.Linear4bit(128, 80, bias=bias, compute_dtype=dtype, quant_type="nf4")
    theirs.load_state_dict(plain.state_dict())
    # in eval mode on a CPU with AVX512-BF16 theirs would repack the weight and compute in bf16
    theirs = theirs.to("cpu").train()
    x = torch.randn(2, 5, 128, dtype=dtype, requires_grad=True)
    ours, expected = linear(x), theirs(x)
    assert torch.equal(ours, expected)
    gradient = torch.randn_like(ours)
    (mine,) = torch.autograd.grad(ours, x, gradient)
    (other,) = torch.autograd.grad(expected, x, gradient)
    assert torch.equal(mine, other)


def test_input_in_another_dtype_is_computed_in_the_compute_dtype() -> None:
    linear = make(torch.randn(64, 64), compute_dtype=torch.bfloat16)
    x = torch.randn(3, 64)
    expected = F.linear(x.bfloat16(), dense_weight(linear, torch.bfloat16)).float()
    assert torch.equal(linear(x), expected)
    assert not torch.equal(linear(x), F.linear(x, dense_weight(linear, torch.float32)))


def test_gradient_is_that_of_finite_differences() -> None:
    linear = make(torch.randn(6, 10), bias=True)
    linear.bias = nn.Parameter(torch.randn(6), requires_grad=False)
    x = torch.randn(4, 10, requires_grad=True)
    y = linear(x)
    (gradient,) = torch.autograd.grad(y.sum(), x)
    step = torch.zeros(4, 10)
    step[1, 3] = 0.5  # the product is linear in x, so a large step is exact and rounds little
    difference = (linear(x + step) - linear(x - step)).sum()
    # each of the 12 sums of 10 terms is about as large as its output
    assert abs(gradient[1, 3] - difference.detach()) <= rounding(terms=10, sums=12) * float(y.abs().max())


@pytest.mark.parametrize("kind", ["4bit", "8bit"])
def test_backward_reads_the_module_again_and_saves_nothing(kind: str) -> None:
    first, second = torch.randn(64, 64), torch.randn(64, 64)
    if kind == "4bit":
        linear: FrozenLinear = make(first)
    else:
        linear = Linear8bit.empty(64, 64, bias=False, compute_dtype=torch.float32)
        assert isinstance(linear, Linear8bit)
        linear.place(first, CPU)
    saved: list[Tensor] = []
    x = torch.randn(2, 64, requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):  # type: ignore[func-returns-value]
        y = linear(x)
    assert saved == []
    assert isinstance(linear, Linear4bit | Linear8bit)
    linear.place(second, CPU)  # as a streamed layer whose buffers were fetched again
    y.backward(torch.ones_like(y))
    assert x.grad is not None
    assert torch.equal(x.grad, torch.ones(2, 64) @ dense_weight(linear, torch.float32))


def test_dense_cached_keeps_one_copy_and_drops_it() -> None:
    layer = nn.Sequential(make(torch.randn(64, 64)), nn.ReLU(), make(torch.randn(64, 64)))
    x = torch.randn(2, 64)
    outside = layer(x)
    assert dense_weight(layer[0], torch.float32) is not dense_weight(layer[0], torch.float32)
    with dense_cached(layer):
        kept = dense_weight(layer[0], torch.float32)
        assert dense_weight(layer[0], torch.float32) is kept
        assert dense_weight(layer[0], torch.bfloat16).dtype == torch.bfloat16
        with dense_cached(layer[0]):
            pass
        assert dense_weight(layer[0], torch.float32) is kept  # an inner scope does not end the outer one
        assert torch.equal(layer(x), outside)
        alive = weakref.ref(kept)
    del kept
    gc.collect()
    assert alive() is None


def test_dense_cached_is_dropped_after_an_error() -> None:
    layer = make(torch.randn(64, 64))

    def fail() -> None:
        with dense_cached(layer):
            dense_weight(layer, torch.float32)
            raise ArithmeticError

    with pytest.raises(ArithmeticError):
        fail()
    assert layer.kept is None


def test_casting_a_model_leaves_the_packed_weight_as_it_is() -> None:
    linear = make(torch.randn(64, 64), bias=True)
    linear.bias = nn.Parameter(torch.randn(64), requires_grad=False)
    before = dense_weight(linear, torch.float32)
    linear.to(torch.bfloat16)
    assert linear.code.dtype == torch.float32
    assert torch.equal(dense_weight(linear, torch.float32), before)
    assert all(buffer.is_meta for buffer in linear.to("meta").buffers())


def prequantised(weight: Tensor, quant_type: str, double_quant: bool, block: int = 64) -> dict[str, Tensor]:
    packed, state = quantize_4bit(weight, blocksize=block, compress_statistics=double_quant, quant_type=quant_type)
    return {"weight": packed} | {f"weight.{key}": value for key, value in state.as_dict(packed=True).items()}


@pytest.mark.parametrize("double_quant", [True, False])
@pytest.mark.parametrize("quant_type", ["nf4", "fp4"])
@pytest.mark.parametrize("storage", [torch.uint8, torch.bfloat16])
def test_prequantised_weight_is_taken_over(double_quant: bool, quant_type: str, storage: torch.dtype) -> None:
    weight = torch.randn(48, 64)
    tensors = prequantised(weight, quant_type, double_quant)
    tensors["weight"] = tensors["weight"].view(-1).view(storage).view(-1, 1)
    linear = Linear4bit.empty(64, 48, bias=False, quant_type="nf4", double_quant=True, compute_dtype=torch.float32)
    linear.place_quantised(tensors, CPU)
    expected = dense_weight(make(weight, quant_type, double_quant), torch.float32)
    assert torch.equal(dense_weight(linear, torch.float32), expected)
    assert (linear.quant_type, linear.double_quant) == (quant_type, double_quant)


def test_prequantised_weight_that_does_not_fit_is_refused() -> None:
    linear = Linear4bit.empty(64, 48, bias=False, quant_type="nf4", double_quant=True, compute_dtype=torch.float32)
    good = prequantised(torch.randn(48, 64), "nf4", True)
    with pytest.raises(ModelError, match=r"\[64, 48\].*expects \[48, 64\]"):
        linear.place_quantised(prequantised(torch.randn(64, 48), "nf4", True), CPU)
    with pytest.raises(ModelError, match="quant_map"):
        linear.place_quantised({key: value for key, value in good.items() if key != "weight.quant_map"}, CPU)
    with pytest.raises(ModelError, match="bytes"):
        linear.place_quantised(good | {"weight": good["weight"][:-1]}, CPU)
    with pytest.raises(ModelError, match="damaged"):
        linear.place_quantised(good | {"weight.quant_state.bitsandbytes__nf4": torch.zeros(9, dtype=torch.uint8)}, CPU)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_int8_weight_and_product_are_those_of_bitsandbytes(dtype: torch.dtype) -> None:
    torch.manual_seed(3)
    weight = torch.randn(48, 64, dtype=dtype)
    linear = Linear8bit.empty(64, 48, bias=False, compute_dtype=dtype)
    linear.place(weight, CPU)
    codes, scales, _ = int8_vectorwise_quant(weight.half())
    assert torch.equal(linear.weight, codes)
    assert_rounded(dense_weight(linear, torch.float32), codes.float() * scales[:, None] / 127)
    theirs = bitsandbytes.nn.Linear8bitLt(64, 48, bias=False, has_fp16_weights=False, threshold=6.0)
    theirs.load_state_dict({"weight": weight})
    theirs = theirs.to("cpu").train()  # in training a CPU multiplies densely, as ours always does there
    x = torch.randn(2, 3, 64, dtype=dtype)
    assert torch.equal(linear(x), theirs(x))


def packed_by_bitsandbytes(weight: Tensor) -> dict[str, Tensor]:
    """What bitsandbytes' own 8-bit linear saves."""
    theirs = bitsandbytes.nn.Linear8bitLt(weight.shape[1], weight.shape[0], bias=False, has_fp16_weights=False)
    theirs.load_state_dict({"weight": weight})
    return dict(theirs.to("cpu").state_dict())


@pytest.mark.parametrize("scales", [torch.float32, torch.float16])
@pytest.mark.parametrize("named", [True, False], ids=["with-format", "without"])
def test_prequantised_int8_weight_is_taken_over(named: bool, scales: torch.dtype) -> None:
    weight = torch.randn(48, 64)
    tensors = packed_by_bitsandbytes(weight)
    assert tensors.keys() == {"weight", "SCB", "weight_format"}
    tensors["SCB"] = tensors["SCB"].to(scales)
    if not named:
        del tensors["weight_format"]  # from before bitsandbytes wrote it
    ours, expected = (Linear8bit.empty(64, 48, bias=False, compute_dtype=torch.float32) for _ in range(2))
    ours.place_quantised(tensors, CPU)
    expected.place(weight, CPU)
    assert torch.equal(ours.weight, expected.weight)
    assert ours.scales.dtype == torch.float32
    torch.testing.assert_close(
        ours.scales, expected.scales, rtol=0 if scales == torch.float32 else torch.finfo(torch.float16).eps, atol=0
    )


def test_prequantised_int8_weight_that_does_not_fit_is_refused() -> None:
    linear = Linear8bit.empty(64, 48, bias=False, compute_dtype=torch.float32)
    good = packed_by_bitsandbytes(torch.randn(48, 64))
    with pytest.raises(ModelError, match=r"int8 \[64, 48\].*expects int8 \[48, 64\]"):
        linear.place_quantised(packed_by_bitsandbytes(torch.randn(64, 48)), CPU)
    with pytest.raises(ModelError, match="47 scales"):
        linear.place_quantised(good | {"SCB": good["SCB"][:-1]}, CPU)
    with pytest.raises(ModelError, match=r"float32 \[48, 64\]"):
        linear.place_quantised(good | {"weight": torch.randn(48, 64)}, CPU)
    with pytest.raises(ModelError, match=r"\['weight', 'weight_format'\]; expected weight, SCB"):
        linear.place_quantised({key: value for key, value in good.items() if key != "SCB"}, CPU)
    with pytest.raises(ModelError, match=r"weight_format \[1\]"):
        linear.place_quantised(good | {"weight_format": torch.tensor(1, dtype=torch.uint8)}, CPU)
    assert linear.weight.is_meta


def test_which_modules_are_linears_and_what_they_take() -> None:
    plain = nn.Linear(64, 64)
    assert is_linear(plain)
    assert is_linear(make(torch.randn(64, 64)))
    assert not is_linear(nn.Embedding(4, 4))
    assert dense_weight(plain, torch.bfloat16).dtype == torch.bfloat16
    assert not dense_weight(plain, torch.float32).requires_grad
