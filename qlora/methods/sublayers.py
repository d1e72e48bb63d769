"""Where attention and the MLP stand inside a model's layers, and what is said where a model has none.

    layer in ─┬─ norm ─ attention ─ + ─┬─ norm ─ MLP ─ + ─ layer out
              └────────────────────────┴───────────────┘

A sublayer's output is what is added to the residual stream. Mostly a module of its own gives it. In BERT the module also
adds and normalises, so its last linear is meant; OPT has the MLP's two linears in the layer itself; in Bloom and MPT a
sublayer is handed the residual and adds it, so again its last linear is meant.

Knows what a method needs of a layer; must not know what families call its parts (``model/anatomy.py``).
"""

from __future__ import annotations

import inspect

from torch import nn

from qlora.errors import MethodError, listed
from qlora.methods.planted import unplanted
from qlora.model import anatomy
from qlora.model.nf4 import features, is_linear

PARTS = {"attention": anatomy.ATTENTION, "MLP": anatomy.MLP_OUTPUT, "whole MLP": anatomy.MLP}


def find_layers(model: nn.Module) -> dict[str, nn.Module]:
    """The layers of ``model`` by module path: the members of every list of modules with attention and an MLP.

    Raises MethodError, naming the lists that there are, when none has these.
    """
    lists = [(path, module) for path, module in model.named_modules() if isinstance(module, nn.ModuleList)]
    found = {
        f"{path}.{number}" if path else str(number): layer
        for path, members in lists
        if any(all(anatomy.first(layer, PARTS[part]) for part in ("attention", "MLP")) for layer in members)
        for number, layer in enumerate(members)
    }
    if not found:
        there = [f"{path} ({', '.join(_children(members[0]))})" for path, members in lists if len(members)]
        raise MethodError(
            f"{type(model).__name__} has no list of layers with attention ({', '.join(anatomy.ATTENTION)}) and an MLP "
            f"({', '.join(anatomy.MLP_OUTPUT)}); its lists are {listed(there, 4) if there else 'none'}. Take method.name=lora, "
            "which needs linears only."
        )
    return found


def sublayer(layers: dict[str, nn.Module], path: str, part: str) -> str:
    """The module path of ``part``, one of ``PARTS``, in the layer at ``path`` of ``find_layers``.

    Raises MethodError, naming what the layer has, when it has no such part or one of another width.
    """
    layer = layers[path]
    name, d = anatomy.first(layer, PARTS[part]), width(layer)
    module = None if name is None else anatomy.at(layer, name)
    if module is not None and part != "whole MLP" and "residual" in arguments(module):
        last = anatomy.first(module, anatomy.LAST_LINEAR)
        name = None if last is None else f"{name}.{last}"
        module = None if last is None else anatomy.at(module, last)
    if module is None or (is_linear(module) and features(module)[0] != d):
        raise MethodError(
            f"'{path}', a {type(unplanted(layer)).__name__}, has no {part} under the names {', '.join(PARTS[part])} that "
            f"gives {d} numbers a token; it has {', '.join(_children(layer))}. Take another method.form, or method.name=lora."
        )
    return f"{path}.{name}"


def width(layer: nn.Module) -> int:
    """The hidden states' width d: the inputs of the first linear of a layer, which is attention's."""
    first = next(module for module in layer.modules() if is_linear(module))
    return features(first)[1]


def arguments(module: nn.Module) -> list[str]:
    """What a module's ``forward`` takes, by name and in order."""
    return list(inspect.signature(unplanted(module).forward).parameters)


def _children(module: nn.Module) -> list[str]:
    return [name for name, _ in unplanted(module).named_children()]
