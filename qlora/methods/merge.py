"""How what a method learned becomes part of the base's weights, tensor by tensor.

By default the planted module that a tensor belongs to is asked, and nothing else of the model changes. Knows names of tensors and
planted modules; must not know checkpoints, or how merged files are written.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import Tensor

from qlora.methods.planted import Planted

if TYPE_CHECKING:
    from qlora.methods.method import Method


class Merge:
    """One method's part of a merged model."""

    def __init__(self, method: Method) -> None:
        self.method = method

    def why_not(self) -> str | None:
        """What speaks against merging the method, or against merging it in this model."""
        return self.method.unmergeable

    def touches(self, name: str) -> bool:
        """Whether ``merged`` may change the tensor ``name``."""
        return self.layer_of(name)[0] is not None

    def merged(self, name: str, values: Tensor) -> Tensor:
        """The model's tensor ``name`` (as ``model.layers.0.mlp.up_proj.weight``), in fp32, with what was learned added."""
        layer, inside = self.layer_of(name)
        return values if layer is None else layer.merged(inside, values)

    def merged_expert(self, name: str, expert: int, values: Tensor) -> Tensor:
        """The same of one expert's matrix in the parameter ``name``, as ``model.layers.0.mlp.experts.down_proj``."""
        return values

    def before_quantising(self, name: str, weight: Tensor) -> Tensor:
        """What the frozen weight ``name`` was quantised from, given the checkpoint's own values."""
        layer, _ = self.layer_of(name)
        return weight if layer is None else layer.before_quantising(weight)

    def original(self, name: str, weight: Tensor) -> Tensor:
        """What ``merged`` is added to where the checkpoint's own weight ``name`` is to carry the adapter."""
        layer, _ = self.layer_of(name)
        return weight if layer is None else layer.original(weight)

    def shape(self, name: str, shape: tuple[int, ...]) -> tuple[int, ...]:
        """The shape of the merged tensor ``name``: another one where tokens were added."""
        return shape

    def unties(self, one: str, other: str) -> bool:
        """Whether what was learned makes different tensors of ``one`` and ``other``, of which the base has one for both."""
        return False

    def config(self, values: dict[str, Any]) -> dict[str, Any]:
        """The merged model's config.json, given the base's."""
        return values

    def drops(self, name: str) -> bool:
        """Whether the base's tensor ``name`` is not in the merged model."""
        return False

    def new_tensors(self) -> dict[str, Tensor]:
        """Tensors that the merged model has and the base has not, by name."""
        return {}

    def finish(self, folder: Path) -> None:
        """Write into the merged model's ``folder`` what else it needs, as a tokenizer with new tokens."""

    def layer_of(self, name: str) -> tuple[Planted | None, str]:
        """(the planted module that the tensor ``name`` belongs to, its name inside that); None where there is none."""
        parts = name.split(".")
        for count in range(len(parts) - 1, 0, -1):
            layer = self.method.planted.get(".".join(parts[:count]))
            if layer is not None:
                return layer, ".".join(parts[count:])
        return None, name
