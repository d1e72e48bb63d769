"""What stands in place of one of the base's modules: that module, frozen, with trainable parameters beside it.

    model.layers.0.self_attn.q_proj        becomes        Planted(base=q_proj, its own parameters)

Knows no formula; every method's planted modules answer to this.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from torch import Tensor, nn

from qlora.errors import MethodError


class Planted(nn.Module):
    """A module planted by a method. ``base`` is what stood there; while ``enabled`` is off it answers alone."""

    def __init__(self, base: nn.Module) -> None:
        super().__init__()
        self.base = base
        self.enabled = True

    def __getattr__(self, name: str) -> Any:
        # a model may ask its own modules for things such as their width
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(super().__getattr__("base"), name)

    def own_parameters(self) -> dict[str, nn.Parameter]:
        """What trains here, by attribute: everything outside ``base`` that wants a gradient."""
        return {
            name: values
            for name, values in self.named_parameters()
            if values.requires_grad and not name.startswith("base.")
        }

    def before_quantising(self, weight: Tensor) -> Tensor:
        """What the frozen weight was made from, given the checkpoint's own ``weight`` [out, in]; mostly the same.

        PiSSA and LoftQ take a part of the weight away before it is quantised.
        """
        return weight

    def original(self, weight: Tensor) -> Tensor:
        """What ``merged`` is added to where the checkpoint's own ``weight`` is to carry the adapter; mostly the same."""
        return weight

    def at_first(self, weight: Tensor) -> Tensor:
        """What the dense ``weight`` [out, in] of ``base`` stood for at step 0; mostly itself. May be in place."""
        return weight

    def low_rank(self) -> tuple[Tensor, Tensor] | None:
        """fp32 (A [k, in], B [out, k]) where all that was learned is B A on top of ``at_first``; None elsewhere."""
        return None

    def merged(self, name: str, values: Tensor) -> Tensor:
        """``values``, the fp32 tensor ``name`` of ``base`` (as ``weight``), with what was learned added; may be in place.

        Raises MethodError where the mathematics has no such thing.
        """
        raise MethodError(f"{type(self).__name__} cannot be merged into '{name}'.")


def unplanted(module: nn.Module) -> nn.Module:
    """What stood here before any method planted anything, or the module itself."""
    while isinstance(module, Planted):
        module = module.base
    return module


def modules_unplanted(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """``model.named_modules()``, with their paths, without the bases inside what was planted."""
    return ((path, module) for path, module in model.named_modules() if not path.endswith(".base"))
