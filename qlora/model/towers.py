"""The language model inside a wrapper: what of a multimodal model text never passes is taken out before anything is read.

    model ─┬─ vision tower, audio tower, projectors ── taken out: not read, not quantised, not adapted, not counted
           ├─ language model ─┬─ embedding
           │                  └─ layers
           └─ head

The class stays the checkpoint's own, so paths, and with them the keys of adapters, are those of whoever loads it whole. Its
own forward works without towers, as long as it is given text alone. Knows module trees; must not know files or weights.
"""

from __future__ import annotations

import inspect
from collections.abc import Collection

import torch
from torch import nn
from transformers import PreTrainedModel

from qlora.errors import ModelError, listed
from qlora.model import anatomy


def find_towers(model: PreTrainedModel) -> list[str]:
    """The paths of the outermost modules of ``model`` that neither hold its decoder, head and embedding nor are inside these.

    A container's own parameters stay, as the row that LLaVA-NeXT puts at a line's end, and so does what has none. Raises ModelError where the language
    model cannot be told from the rest.
    """
    needed = [
        name
        for name, value in list(inspect.signature(type(model).forward).parameters.items())[1:]
        if value.default is value.empty and value.kind is value.POSITIONAL_OR_KEYWORD and name != "input_ids"
    ]
    if needed:
        raise ModelError(
            f"A {type(model).__name__} cannot read text alone: it asks for {listed(needed)}. Name a checkpoint of its language "
            "model alone."
        )
    parts = [anatomy.decoder(model), anatomy.head(model), anatomy.embedding(model)]
    kept = [path for path in (anatomy.path_of(model, part) for part in parts if part is not None) if path]
    if len(kept) < len(parts) or parts[0] is model:
        raise ModelError(
            f"A {type(model).__name__} does not say which of its modules are its language model and its output head; name "
            "a checkpoint of its language model alone."
        )
    found: list[str] = []
    for path, module in model.named_modules():
        inside = within(path, kept) or within(path, found) or any(within(part, [path]) for part in kept)
        if path and not inside and next(module.parameters(), None) is not None:
            found.append(path)
    return found


def take_out(model: PreTrainedModel, towers: Collection[str]) -> None:
    """Put nothing that has weights in the place of ``towers``, and forget the weights that are tied to theirs."""
    for path in towers:
        parent, _, name = path.rpartition(".")
        holder = model.get_submodule(parent)
        read = inspect.unwrap(type(holder).forward).__code__.co_names
        # Qwen2-Audio asks its tower where it is, whatever it is given
        holder.register_module(name, _Gone(model) if {name, "device"} <= {*read} else None)
    tied = anatomy.tied_names(model)
    for target in [name for name, origin in tied.items() if within(name, towers) or within(origin, towers)]:
        del tied[target]


class _Gone(nn.Module):
    """In the place of a tower: it is where its model is."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.__dict__["model"] = model

    @property
    def device(self) -> torch.device:
        return next(self.__dict__["model"].parameters()).device  # type: ignore[no-any-return]


def within(path: str, places: Collection[str]) -> bool:
    """Whether ``path`` is one of ``places`` or lies inside of one."""
    return any(path == place or path.startswith(f"{place}.") for place in places)
