"""A module in memory as a base: a classifier, a vision model, anything that was not loaded by ``load_base``.

    your nn.Module ─► quantise (its linears, in place) ─► as_base ─► Base, with no tokenizer and no folder
                 └──► on_meta: the same shapes without memory

Knows modules alone; must not know checkpoints, methods or what a module is for.
"""

from __future__ import annotations

import copy
from collections import Counter
from pathlib import Path

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from qlora.errors import ModelError, listed, nearest
from qlora.machine.device import DTYPES
from qlora.model import anatomy
from qlora.model.base import Base
from qlora.model.config import FOUR_BIT, Scheme
from qlora.model.load import turned
from qlora.model.mixers import begin_anew
from qlora.model.nf4 import Linear4bit, Packed, is_plain_linear
from qlora.model.skeleton import empty_linear, matches, read_otherwise

QUANTISED = (*FOUR_BIT, "int8")


def quantise(
    module: nn.Module,
    quantization: str = "nf4",
    double_quant: bool = True,
    compute_dtype: str | torch.dtype | None = None,
    skip: tuple[str, ...] = (),
) -> nn.Module:
    """Quantise the plain linears of ``module``, in place, one after the other, and give it back.

    As ``load_base`` does it: the output head stays dense, and so does what shares its weight with another module. In a
    module that names no head it is the one with the last parameter. ``skip`` names more, as ``("pooler",)``, each a part of a module
    path. ``compute_dtype`` is what the products are computed in; left out, the dtype of the module's own weights.
    ``quantization``: nf4, fp4 or int8. A module on the meta device gets the shapes alone.

    Raises ModelError, before anything is changed, for a name in ``skip`` that no linear has, and where nothing is left.
    """
    if quantization not in QUANTISED:
        raise ModelError(f"quantization is '{quantization}'; expected one of {', '.join(QUANTISED)}.")
    device, dtype = _device(module), DTYPES.get(str(compute_dtype), compute_dtype) or main_dtype(module)
    if not isinstance(dtype, torch.dtype):
        raise ModelError(f"compute_dtype is '{compute_dtype}'; expected one of {', '.join(DTYPES)}.")
    linears = {path: linear for path, linear in module.named_modules() if is_plain_linear(linear) and path}
    for name in skip:
        if not any(matches(path, [name]) for path in linears):
            leaves = sorted({path.rpartition(".")[2] for path in linears})
            raise ModelError(
                f"skip names '{name}', which no linear of {type(module).__name__} is called.{nearest(name, leaves)} "
                f"The names there are {listed(leaves, 12)}."
            )
    heads, places = _heads(module), module.named_modules(remove_duplicate=False)
    # by a parameter's id, at how many places it stands: two where a head is tied to its embedding
    owners = Counter(id(values) for _, part in places for values in part._parameters.values())
    named = [*skip, *read_otherwise(module)]
    chosen = {
        path: linear
        for path, linear in linears.items()
        if path not in heads and owners[id(linear.weight)] == 1 and not matches(path, named)
    }
    if not chosen:
        raise ModelError(
            f"{type(module).__name__} has no plain linear to quantise but its head; adapt it as it is, unquantised."
        )
    scheme = Scheme(quantization, double_quant, prequantised=False)
    for path, linear in chosen.items():
        empty = empty_linear(linear, scheme, dtype)
        if device.type != "meta":
            empty.place(turned(linear, linear.weight.detach()), device)
            if linear.bias is not None:
                empty.bias = nn.Parameter(linear.bias.detach().to(dtype), requires_grad=False)
        module.set_submodule(path, empty.train(linear.training))
    _call_every_linear(module)
    return module


def as_base(model: nn.Module, name: str | None = None) -> Base:
    """Any module of yours as a base, on the device and in the dtype that it has; it stays what it is, but that mixers of tokens
    in a language model are told where packed examples begin.

    What ``quantise`` did to it is seen. Its mode is yours to choose: under ``train()`` a batch norm goes on averaging, frozen
    or not. Raises ModelError for a module that is on several devices.
    """
    device, dtype = _device(model), main_dtype(model)
    packed = next((module for module in model.modules() if isinstance(module, Packed)), None)
    kind = "none" if packed is None else str(getattr(packed, "quant_type", "int8"))
    double = isinstance(packed, Linear4bit) and packed.double_quant
    _call_every_linear(model)
    if isinstance(model, PreTrainedModel) and anatomy.head(model) is not None:
        begin_anew(model)
    return Base(model, None, Path(), name or type(model).__name__, None, kind, double, device, dtype)


def on_meta(module: nn.Module) -> nn.Module:
    """A copy of ``module`` on the meta device: every shape, no weight and no memory for one."""
    memo: dict[int, object] = {}
    for values in [*module.parameters(), *module.buffers()]:
        empty = torch.empty_like(values, device="meta")
        memo[id(values)] = nn.Parameter(empty, values.requires_grad) if isinstance(values, nn.Parameter) else empty
    return copy.deepcopy(module, memo)


def main_dtype(module: nn.Module) -> torch.dtype:
    """What ``module`` computes in: what its quantised linears say, or the floating dtype that most of its numbers have."""
    counts: Counter[torch.dtype] = Counter()
    for part in module.modules():
        if isinstance(part, Packed):
            counts[part.compute_dtype] += part.in_features * part.out_features
    for values in module.parameters():
        if values.is_floating_point():
            counts[values.dtype] += values.numel()
    return counts.most_common(1)[0][0] if counts else torch.float32


def _device(module: nn.Module) -> torch.device:
    tensors: list[Tensor] = [*module.parameters(), *module.buffers()]
    devices = list(dict.fromkeys(values.device for values in tensors))
    if len(devices) > 1:
        raise ModelError(
            f"{type(module).__name__} lies on several devices ({listed([str(device) for device in devices])}); expected "
            "one, so move it there with to()."
        )
    return devices[0] if devices else torch.device("cpu")


def _heads(module: nn.Module) -> set[str]:
    """The whole paths of output heads: transformers' own answer, and the module that holds the last parameter."""
    head = anatomy.head(module)
    last = next(reversed([name for name, _ in module.named_parameters(remove_duplicate=False)]), "").rpartition(".")[0]
    return {path for path, part in module.named_modules() if part is head or path == last}


def _call_every_linear(model: nn.Module) -> None:
    """Keep torch's own encoder layers from reading the weights of their linears past the modules that stand there.

    In eval mode without gradients ``nn.TransformerEncoderLayer`` hands ``linear1.weight`` to one fused kernel, which knows
    nothing of an adapter and cannot read a packed weight. It never does so where a hook hangs.
    """
    for layer in model.modules():
        if isinstance(layer, nn.TransformerEncoderLayer) and not layer._forward_pre_hooks:
            layer.register_forward_pre_hook(_unfused)


def _unfused(module: nn.Module, inputs: tuple[object, ...]) -> None:
    """Changes nothing; that it hangs there is enough."""
