"""How far two floating point results may be apart: by what their own rounding explains, on any processor.

Bits are equal only where the same kernels run on the same numbers. Everywhere else the kernels of one processor add up in
another order than those of the next, so a bound must come from the computation itself, not from what one machine gave:

    no_worse(ours, plain, exact)     ours may err as the plain fp32 result does, against the same in float64
    rounding(sums, terms)            two fp32 results without such a reference: how far another order can take them

Knows tensors and models; must not know what a test is about.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

import bitsandbytes as bnb
import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

MODEL = 18  # sums one after the other in a tiny model of two layers: 8 a layer, the embedding's norm and the head
GRADIENT = 2 * MODEL  # there and back
LAYER = 8  # one adapted linear or convolution: the product, the adapter's two, a norm, and there and back
WIDTH = 128  # the terms of the longest sum in a tiny model
FACTOR = 4.0  # ours may add up in a less lucky order than the plain result: the largest of many errors varies by this
CRUDE = 1000.0  # in eps: what errs more was not computed in that dtype
FLOOR = 16.0  # in eps: a plain result may be exact by luck, where ours still has to round


def difference(found: Tensor, expected: Tensor) -> float:
    """The largest difference, relative to the largest expected value; NaN, which no bound holds, where there is one."""
    found, expected = found.detach().double(), expected.detach().double()
    assert found.shape == expected.shape, (found.shape, expected.shape)
    largest = float(expected.abs().max())
    worst = float((found - expected).abs().max())
    return worst / largest if largest else worst


def rounding(sums: int = MODEL, terms: int = WIDTH, dtype: torch.dtype = torch.float32) -> float:
    """What ``difference`` may be between two orders of computing the same: ``sums`` sums of ``terms`` numbers each.

    A sum of n numbers errs by about √n · eps/2 of their size (Higham 2002, section 2.8), two of them are √n · eps apart,
    and what one got wrong the next takes in. As it stands: the logits of a tiny model, 2.4e-5 in fp32. A mistake in a
    formula shows from 1e-3 on. Gradients go through all sums twice: ``rounding(GRADIENT)``.
    """
    return float(torch.finfo(dtype).eps * sums * terms**0.5)


def no_worse(ours: Tensor, plain: Tensor, exact: Tensor, dtype: torch.dtype = torch.float32) -> None:
    """Assert that ``ours`` is as near to ``exact``, in float64, as the ``plain`` result in ``dtype`` is.

    Example: ours errs by 9e-7 and PEFT by 3e-7 of the largest logit → fine; ours errs by 4e-6 → not.
    """
    assert exact.dtype == torch.float64
    eps, theirs = torch.finfo(dtype).eps, difference(plain, exact)
    # in eval mode bitsandbytes multiplies in bf16 on some CPUs, for example, which would allow everything
    assert theirs < CRUDE * eps, f"the plain result itself errs by {theirs:.1e}: it is no {dtype} result of the same"
    allowed = FACTOR * theirs + FLOOR * eps
    found = difference(ours, exact)
    assert found <= allowed, f"ours errs by {found:.1e} of the largest value, where rounding explains {allowed:.1e}"


def none_worse(ours: Mapping[str, Tensor], plain: Mapping[str, Tensor], exact: Mapping[str, Tensor]) -> None:
    """``no_worse`` for tensors by name, all of which must be there."""
    assert ours.keys() == plain.keys() == exact.keys()
    for name, values in ours.items():
        try:
            no_worse(values, plain[name], exact[name])
        except AssertionError as error:
            raise AssertionError(f"{name}: {error}") from None


def doubled(model: nn.Module) -> nn.Module:
    """A copy of ``model`` that computes in float64, bitsandbytes' 4-bit linears as the dense ones that they stand for."""
    dense: dict[int, Any] = {}
    for module in model.modules():
        if isinstance(module, bnb.nn.Linear4bit):
            weight = bnb.functional.dequantize_4bit(module.weight.data, module.weight.quant_state)
            made = nn.Linear(module.in_features, module.out_features, module.bias is not None, device="meta")
            made.weight = nn.Parameter(weight.double(), requires_grad=False)
            if module.bias is not None:
                made.bias = nn.Parameter(module.bias.detach().double(), requires_grad=False)
            dense[id(module)] = made
    # deepcopy takes what its memo holds in an original's place
    copied: nn.Module = copy.deepcopy(model, dense).double()
    forward = copied.forward

    def in_double(*args: Any, **kwargs: Any) -> Any:
        with _InDouble():
            return forward(*args, **kwargs)

    copied.forward = in_double  # type: ignore[method-assign]
    return copied


class _InDouble(TorchFunctionMode):
    """Inside, what a model computes in fp32 for its precision's sake (norms, softmax) is computed in float64."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        func = torch.Tensor.double if func is torch.Tensor.float else func
        return func(*map(_wide, args), **{key: _wide(value) for key, value in (kwargs or {}).items()})


def _wide(value: Any) -> Any:
    return torch.float64 if value is torch.float32 else value
