"""Targets: which frozen linears a method adapts, and the names that tell PEFT the same.

Knows module paths and PEFT's matching rule; must not know what is planted there.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Literal, cast

from torch import nn

from qlora.errors import MethodError, listed, nearest
from qlora.model.nf4 import FrozenLinear, is_linear

Linear = FrozenLinear | nn.Linear


def find_linears(model: nn.Module) -> dict[str, Linear]:
    """Every frozen linear below the decoder layers, by module path: attention and MLP, not the head or the embeddings.

    Example: ``{"model.layers.0.self_attn.q_proj": Linear4bit(…), …}``
    """
    # Layers are the numbered members of a ModuleList; the output head and the embeddings stand outside of them.
    return {
        path: cast(Linear, module)
        for path, module in model.named_modules()
        if is_linear(module) and any(part.isdigit() for part in path.split("."))
    }


def choose_targets(model: nn.Module, wanted: Literal["all-linear"] | tuple[str, ...]) -> dict[str, Linear]:
    """The linears that ``wanted`` names, in the model's order.

    Raises MethodError when a name matches nothing, listing the names that exist.
    """
    linears = find_linears(model)
    if not linears:
        raise MethodError(
            f"{type(model).__name__} has no linear below its layers to adapt; expected a decoder of attention and MLP linears."
        )
    if wanted == "all-linear":
        return linears
    for name in wanted:
        if not any(matches(name, path) for path in linears):
            existing = sorted({leaf(path) for path in linears})
            raise MethodError(
                f"method.target_modules names '{name}', which no linear below the layers of {type(model).__name__} is called."
                f"{nearest(name, existing)} The names there are {listed(existing, 12)}."
            )
    return {path: linear for path, linear in linears.items() if any(matches(name, path) for name in wanted)}


def target_names(planted: Iterable[str], every_path: Iterable[str]) -> list[str]:
    """The shortest names that make PEFT adapt ``planted`` and nothing else: the leaf names, or else the full paths.

    ``every_path`` are all module paths of the model before anything was planted: PEFT matches names against all of them.
    """
    chosen = set(planted)
    leaves = sorted({leaf(path) for path in chosen})
    matched = {path for path in every_path if any(matches(name, path) for name in leaves)}
    return leaves if matched == chosen else sorted(chosen)


def matches(name: str, path: str) -> bool:
    """PEFT's rule: ``q_proj`` and ``self_attn.q_proj`` match ``model.layers.0.self_attn.q_proj``; ``proj`` does not."""
    return path == name or path.endswith(f".{name}")


def leaf(path: str) -> str:
    """The last component of a module path."""
    return path.rpartition(".")[2]
