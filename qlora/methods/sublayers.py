"""Where attention and the MLP stand inside a model's layers, and what is said where a model has none.

    layer in ─┬─ norm ─ attention ─ + ─┬─ norm ─ MLP ─ + ─ layer out
              └────────────────────────┴───────────────┘

A sublayer's output is what is added to the residual stream. Mostly a module of its own gives it. In BERT the module also
adds and normalises, so its last linear is meant; OPT has the MLP's two linears in the layer itself; in Bloom and MPT a
sublayer is handed the residual and adds it, so again its last linear is meant.

Everything that this room asks about families goes through here. Must not know what is planted there.
"""

from __future__ import annotations

import inspect
from typing import Any

from torch import nn

from qlora.errors import MethodError, listed
from qlora.methods.planted import unplanted
from qlora.model.nf4 import features, is_linear
from qlora.residence.layers import decoder_layers as layers

__all__ = ["at", "decoder", "embedding", "find_layers", "fused_experts", "gives_positions", "head", "layers", "path_of"]
__all__ += ["sublayer", "text_config", "width"]

# The first path that a layer has is taken, so the more particular ones stand first.
ATTENTION = ("attention.output.dense", "self_attn", "self_attention", "attn", "attention")
MLP = ("mlp", "feed_forward", "ffn")
MLP_OUTPUT = ("output.dense", *MLP, "fc2")
LAST_LINEAR = ("dense", "dense_4h_to_h", "down_proj")  # of Bloom's and MPT's sublayers
POSITION_TABLES = ("wpe", "embed_positions")  # learned positions
PARTS = {"attention": ATTENTION, "MLP": MLP_OUTPUT, "whole MLP": MLP}


def find_layers(model: nn.Module) -> dict[str, nn.Module]:
    """The layers of ``model`` by module path: the members of every list of modules with attention and an MLP.

    Raises MethodError, naming the lists that there are, when none has these.
    """
    lists = [(path, module) for path, module in model.named_modules() if isinstance(module, nn.ModuleList)]
    found = {
        f"{path}.{number}" if path else str(number): layer
        for path, members in lists
        if any(_first(layer, ATTENTION) and _first(layer, MLP_OUTPUT) for layer in members)
        for number, layer in enumerate(members)
    }
    if not found:
        there = [f"{path} ({', '.join(_children(members[0]))})" for path, members in lists if len(members)]
        raise MethodError(
            f"{type(model).__name__} has no list of layers with attention ({', '.join(ATTENTION)}) and an MLP "
            f"({', '.join(MLP_OUTPUT)}); its lists are {listed(there, 4) if there else 'none'}. Take method.name=lora, "
            "which needs linears only."
        )
    return found


def sublayer(layers: dict[str, nn.Module], path: str, part: str) -> str:
    """The module path of ``part``, one of ``PARTS``, in the layer at ``path`` of ``find_layers``.

    Raises MethodError, naming what the layer has, when it has no such part or one of another width.
    """
    layer = layers[path]
    name, d = _first(layer, PARTS[part]), width(layer)
    module = None if name is None else at(layer, name)
    if module is not None and part != "whole MLP" and "residual" in arguments(module):
        last = _first(module, LAST_LINEAR)
        name = None if last is None else f"{name}.{last}"
        module = None if last is None else at(module, last)
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


def _first(module: nn.Module, paths: tuple[str, ...]) -> str | None:
    return next((path for path in paths if at(module, path) is not None), None)


def _children(module: nn.Module) -> list[str]:
    return [name for name, _ in unplanted(module).named_children()]


# ── what any model is asked ───────────────────────────────────────────────────────────────────────────────────────────


def at(module: nn.Module, path: str) -> nn.Module | None:
    """The module at ``path`` inside ``module``, or None; where something is planted on the way, what stood there."""
    found = unplanted(module)
    for name in path.split("."):
        inside = getattr(found, name, None)
        if not isinstance(inside, nn.Module):
            return None
        found = unplanted(inside)
    return found


def decoder(model: nn.Module) -> nn.Module:
    """The module that turns token ids into hidden states; the model itself where it names none."""
    return _asked(model, "get_decoder") or model


def embedding(model: nn.Module) -> nn.Module | None:
    """The input embedding; None where the model has none."""
    return _asked(model, "get_input_embeddings")


def head(model: nn.Module) -> nn.Module | None:
    """The module that turns hidden states into logits; None where the model has none."""
    return _asked(model, "get_output_embeddings")


def _asked(model: Any, name: str) -> nn.Module | None:
    ask = getattr(model, name, None)
    try:
        return None if ask is None else ask()
    except NotImplementedError:  # a model of images, asked for the embedding of its tokens
        return None


def text_config(model: Any) -> Any:
    """The configuration of a model's text decoder: the nested one where there are several."""
    config: Any = getattr(model, "config", None)
    return config.get_text_config(decoder=True) if hasattr(config, "get_text_config") else config


def path_of(model: nn.Module, module: nn.Module | None) -> str | None:
    """The path at which ``module`` stands in ``model``; None where it does not."""
    return next((path for path, part in model.named_modules() if part is module), None)


def gives_positions(path: str, module: nn.Module) -> bool:
    """Whether the module at ``path`` turns positions into rotations or embeddings."""
    return "RotaryEmbedding" in type(unplanted(module)).__name__ or path.rpartition(".")[2] in POSITION_TABLES


def fused_experts(model: nn.Module) -> list[str]:
    """The parameters that hold the matrices of several experts in one tensor [experts, …, …], as transformers 5 has them."""
    return [
        f"{path}.{name}"
        for path, module in model.named_modules()
        if not isinstance(module, nn.Conv1d)
        for name, values in module.named_parameters(recurse=False)
        if values.dim() == 3 and min(values.shape) > 1
    ]
