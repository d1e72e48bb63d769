"""The state of a training: everything that changes from step to step, and so what a checkpoint holds.

The loop changes it, a checkpoint writes and reads it, the rehearsal takes its changes back. Knows parameters and an
optimizer; must not know rows, files or what happens in a step.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor, nn

from qlora.errors import RunError
from qlora.machine.device import TrimmedHeap
from qlora.machine.processes import Processes, here
from qlora.methods.base import AdaptedModel
from qlora.recipe import TrainingSection
from qlora.residence.owned import is_elsewhere
from qlora.training.masters import Masters
from qlora.training.optim import make_optimizer, optimizer_tensors, quiet_paging
from qlora.training.passage import count_layers
from qlora.training.shares import Shares
from qlora.training.way import Way

LARGEST_SCALE = 2.0**14  # what the loss is multiplied with under fp16, at first


@dataclass
class TrainState:
    """Where a training is."""

    model: AdaptedModel
    training: TrainingSection
    total_steps: int
    parameters: dict[str, nn.Parameter]
    """What is trained, by name."""
    masters: Masters
    """What the optimizer changes in their place: in fp32, where they compute in 16 bits."""
    optimizer: torch.optim.Optimizer
    asked: Way
    """How the recipe has steps go through the model."""
    way: Way
    """How steps go through the model now; smaller than the recipe's after memory ran out."""
    step: int = 0
    """Steps done."""
    loss_scale: float = 1.0
    """What the loss is multiplied with under fp16, so that small gradients do not vanish; 1 otherwise."""
    skipped: int = 0
    """Steps that changed nothing because a number was not finite."""
    processes: Processes = field(default_factory=here, repr=False)
    """This process among those that train together."""
    shares: Shares | None = field(default=None, repr=False)
    """Where they share out the masters and moments."""
    torn: bool = field(default=False, repr=False)
    """Whether a step was broken off while the optimizer changed the parameters; only loading a checkpoint mends that."""
    saved: Path | None = None
    """The checkpoint that holds this state."""
    heap: TrimmedHeap = field(init=False, repr=False)

    def __post_init__(self) -> None:
        self.heap = TrimmedHeap(self.model.device)

    @classmethod
    def new(cls, model: AdaptedModel, training: TrainingSection, total_steps: int) -> TrainState:
        """The state before the first step."""
        quiet_paging()
        parameters = model.trainable_parameters()
        shares = Shares.of(model, here())
        masters = Masters(parameters, shares.is_mine) if shares else Masters(parameters)
        optimizer = make_optimizer(masters.values, training, model.learning_rate_ratios())
        scale = LARGEST_SCALE if model.base.compute_dtype == torch.float16 else 1.0
        way = Way.of(training, count_layers(model, training))
        return cls(
            model, training, total_steps, parameters, masters, optimizer, way, way, loss_scale=scale, shares=shares
        )

    def is_apart(self, name: str) -> bool:
        """Whether one process alone has this parameter and its gradient."""
        return self.shares is not None and self.shares.is_apart(name)

    def settle(self) -> None:
        """Have weights and gradients that are spread be with their owners alone, after a visit."""
        if self.shares is not None and self.shares.layers is not None:
            self.shares.layers.forget()

    @property
    def lockstep(self) -> bool:
        """Whether processes have to go through the model together, since each has a part of its layers."""
        return self.model.base.placement is not None and self.model.base.placement.tier == "processes"

    def kept(self) -> dict[str, Tensor]:
        """The masters, and the optimizer's moments, on the CPU: all of them in the main process, whoever keeps them."""
        mine = self.masters.state() | optimizer_tensors(self.optimizer, self.masters.values)
        return mine if self.shares is None else self.shares.collected(mine)

    def require_whole(self) -> None:
        """Raise RunError after a step that was broken off halfway."""
        if self.torn:
            raise RunError(
                f"Step {self.step + 1} was broken off while it changed the parameters; load the newest checkpoint, which "
                "is whole."
            )

    def not_finite(self) -> list[str]:
        """The trained parameters that hold NaN or infinity. A checkpoint with one could not be read again. Of those that are spread,
        this process's own, unless all are here."""
        # the norm is NaN or infinite where a value is, and takes no memory, as isfinite() does
        largest = {
            name: torch.linalg.vector_norm(values.detach(), math.inf)
            for name, values in self.parameters.items()
            if values.numel() and not is_elsewhere(values)
        }
        return [name for name, value in largest.items() if not math.isfinite(float(value))]
