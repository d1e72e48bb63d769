"""The optimizer in backward: a layer's parameters move as soon as its gradients are whole, and these are freed at once.

    backward   layer 31 ─► its gradients ─► moved, freed ─► layer 30 ─► … ─► layer 0      what else trains: at the end

So there are the gradients of one layer at a time (Lv et al. 2023, arXiv:2306.09782), and of what trains outside the layers.
Every layer is visited once a step, with all of its micro-batches (layer-major accumulation), and nothing below it reads its
parameters again: the steps are those that one call for all parameters takes, bit for bit.

The price: once a layer has moved the step cannot be taken back. What would have to be known before, the norm of all
gradients, or whether all are finite, is known only afterwards.

Knows layers, gradients and an optimizer; must not know rows, losses or checkpoints.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping
from functools import partial

import torch
from torch import Tensor, nn

from qlora.errors import ModelError
from qlora.residence.layers import RecomputedLayer
from qlora.training.optim import step_alone


class NotFinite(ArithmeticError):
    """``what`` is not finite; ``names`` are the parameters whose gradients are to blame."""

    def __init__(self, what: str, names: list[str]) -> None:
        super().__init__(what)
        self.what, self.names = what, names


class InBackward:
    """Moves ``parameters`` layer by layer in the backward of ``model``, whose layers are behind the boundary."""

    def __init__(
        self, model: nn.Module, parameters: Mapping[str, nn.Parameter], optimizer: torch.optim.Optimizer
    ) -> None:
        self.parameters = parameters
        self.optimizer = optimizer
        self.active = False
        """Whether a step is under way; a backward of somebody else moves nothing."""
        self.rehearsing = False
        """Whether what is not finite may pass, because everything is taken back."""
        self.moved: set[int] = set()
        """Layers that have moved in this step, by number."""
        self.norms: dict[str, Tensor] = {}
        boundaries = [module for module in model.modules() if isinstance(module, RecomputedLayer)]
        inside = {id(module) for boundary in boundaries for module in boundary.modules()}
        # what two layers share, or a layer and the embedding, is whole only at the end
        users = Counter(id(values) for boundary in boundaries for values in boundary.parameters())
        users.update(
            id(values)
            for module in model.modules()
            if id(module) not in inside
            for values in module.parameters(recurse=False)
        )
        self.own: list[list[str]] = []
        """By layer, the names of the parameters that are whole after its visit."""
        for number, boundary in enumerate(boundaries):
            mine = {id(values) for values in boundary.parameters() if users[id(values)] == 1}
            self.own.append([name for name, values in parameters.items() if id(values) in mine])
            boundary.after_backward = partial(self._leave, number)

    def begin(self) -> None:
        """A new step."""
        self.active, self.moved, self.norms = True, set(), {}

    def end(self) -> None:
        """The step is over, or was broken off."""
        self.active = False

    def look_at(self, loss: Tensor) -> None:
        """Before its backward. Raises NotFinite."""
        value = loss.item()
        if not self.rehearsing and not math.isfinite(value):
            raise NotFinite(f"loss {value:g}", [])

    def finish(self) -> float:
        """Move what trains outside the layers; return the L2 norm of all of the step's gradients together."""
        self.end()
        self._move(list(self.parameters))
        norms = [self.norms[name] for name in self.parameters if name in self.norms]
        return float(torch.linalg.vector_norm(torch.stack(norms))) if norms else 0.0

    def _leave(self, number: int, layer: nn.Module) -> None:
        """``layer``'s backward visit is done."""
        if not self.active:
            return
        if number in self.moved:
            raise ModelError(
                f"Layer {number} is visited twice in a step, so its gradients are not whole when backward leaves it; set "
                "training.optimizer_in_backward=false. Part of this step was taken."
            )
        self._move(self.own[number], number)

    def _move(self, names: list[str], number: int | None = None) -> None:
        """Take the step of those of ``names`` that have a gradient, and free it. Raises NotFinite with none of them moved."""
        found = {name: self.parameters[name] for name in names if self.parameters[name].grad is not None}
        if not found:
            return
        gradients = [values.grad for values in found.values() if values.grad is not None]
        norms = torch._foreach_norm(gradients, 2, torch.float32)
        norm = float(torch.linalg.vector_norm(torch.stack(norms)))
        if not self.rehearsing and not math.isfinite(norm):
            broken = [name for name, grad in zip(found, gradients, strict=True) if not grad.isfinite().all()]
            raise NotFinite(f"gradient norm {norm:g}", broken)
        self.norms.update(zip(found, norms, strict=True))
        self.moved.add(-1 if number is None else number)
        del gradients
        step_alone(self.optimizer, found.values())
        for values in found.values():
            values.grad = None


def stay_out(model: nn.Module) -> None:
    """Take away what an earlier ``InBackward`` left at the layers."""
    for module in model.modules():
        if isinstance(module, RecomputedLayer):
            module.after_backward = None
