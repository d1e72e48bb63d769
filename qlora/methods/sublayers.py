"""Where attention and the MLP stand inside a model's layers, by the names that the families give them.

    layer in ─┬─ norm ─ attention ─ + ─┬─ norm ─ MLP ─ + ─ layer out
              └────────────────────────┴───────────────┘

A sublayer's output is what is added to the residual stream. Mostly a module of its own gives it. In BERT the module also
adds and normalises, so its last linear is meant; OPT has the MLP's two linears in the layer itself; in Bloom and MPT a
sublayer is handed the residual and adds it, so again its last linear is meant.

Knows module names; must not know what is planted there.
"""

from __future__ import annotations

import inspect
from typing import Any

from torch import nn

from qlora.errors import MethodError, listed
from qlora.methods.planted import Planted
from qlora.model.nf4 import features, is_linear

# The first path that a layer has is taken, so the more particular ones stand first.
ATTENTION = ("attention.output.dense", "self_attn", "self_attention", "attn", "attention")
MLP = ("output.dense", "mlp", "feed_forward", "ffn", "fc2")
WHOLE_MLP = ("mlp", "feed_forward", "ffn")
LAST = ("dense", "dense_4h_to_h", "down_proj")  # of Bloom's and MPT's sublayers
PARTS = {"attention": ATTENTION, "MLP": MLP, "whole MLP": WHOLE_MLP}


def find_layers(model: nn.Module) -> dict[str, nn.Module]:
    """The layers of ``model`` by module path: the members of every list of modules with attention and an MLP.

    Raises MethodError, naming the lists that there are, when none has these.
    """
    lists = [(path, module) for path, module in model.named_modules() if isinstance(module, nn.ModuleList)]
    found = {
        f"{path}.{number}" if path else str(number): layer
        for path, layers in lists
        if any(_first(layer, ATTENTION) and _first(layer, MLP) for layer in layers)
        for number, layer in enumerate(layers)
    }
    if not found:
        there = [f"{path} ({', '.join(_children(layers[0]))})" for path, layers in lists if len(layers)]
        raise MethodError(
            f"{type(model).__name__} has no list of layers with attention ({', '.join(ATTENTION)}) and an MLP "
            f"({', '.join(MLP)}); its lists are {listed(there, 4) if there else 'none'}. Take method.name=lora, "
            "which needs linears only."
        )
    return found


def sublayer(layers: dict[str, nn.Module], path: str, part: str) -> str:
    """The module path of ``part``, one of ``PARTS``, in the layer at ``path`` of ``find_layers``.

    Raises MethodError, naming what the layer has, when it has no such part or one of another width.
    """
    layer = layers[path]
    name = _first(layer, PARTS[part])
    if name is not None and part != "whole MLP" and "residual" in _arguments(at(layer, name)):
        last = _first(at(layer, name), LAST)
        name = None if last is None else f"{name}.{last}"
    d = width(layer)
    module = None if name is None else at(layer, name)
    if module is None or (is_linear(module) and features(module)[0] != d):
        raise MethodError(
            f"'{path}', a {type(stood(layer)).__name__}, has no {part} under the names {', '.join(PARTS[part])} that "
            f"gives {d} numbers a token; it has {', '.join(_children(layer))}. Take another method.form, or method.name=lora."
        )
    return f"{path}.{name}"


def width(layer: nn.Module) -> int:
    """The hidden states' width d: the inputs of the first linear of a layer, which is attention's."""
    first = next(module for module in layer.modules() if is_linear(module))
    return features(first)[1]


def at(module: nn.Module, path: str) -> Any:
    """The module at ``path`` inside ``module``, or None; what is planted on the way stands for what stood there."""
    found: Any = stood(module)
    for name in path.split("."):
        found = getattr(found, name, None)
        if not isinstance(found, nn.Module):
            return None
        found = stood(found)
    return found


def stood(module: nn.Module) -> nn.Module:
    """What stood here before any method planted anything."""
    while isinstance(module, Planted):
        module = module.base
    return module


def _first(module: nn.Module, paths: tuple[str, ...]) -> str | None:
    return next((path for path in paths if at(module, path) is not None), None)


def _children(module: nn.Module) -> list[str]:
    return [name for name, _ in stood(module).named_children()]


def _arguments(module: nn.Module) -> set[str]:
    return set(inspect.signature(module.forward).parameters)
