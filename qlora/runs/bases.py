"""A base kept in memory from one run to the next, where the next wants the same.

    run ─► model without its adapter ─► kept ─► the next run's base, if checkpoint, arrangement and device are alike

Knows what makes two bases alike; must not know how either is trained.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar, cast

import torch

from qlora.machine.device import release_memory, resolve_compute_dtype
from qlora.machine.processes import here
from qlora.methods.base import AdaptedModel, apply_method
from qlora.model.base import Base
from qlora.model.checkpoint import Checkpoint
from qlora.model.skeleton import skeleton_base
from qlora.recipe import Recipe, parts_of
from qlora.residence.layers import unwrap_layers
from qlora.residence.load import load_base
from qlora.training.shares import elsewhere

Measured = TypeVar("Measured")
OTHER_BESIDE = ("pissa", "loftq")
"""Ways to begin that leave another base beside the adapter: the remainder, quantised."""
CHANGES_ITS_BASE = {"full", "new_tokens"}
"""Methods behind which the base is another one: other weights, or rows that stay in embedding and head."""


class Bases:
    """Where runs that follow each other in one process get their base from. A new one keeps nothing until it is given."""

    def __init__(self) -> None:
        self._kept: tuple[tuple[object, ...], Base] | None = None
        self._ends: tuple[int, ...] = ()
        self._taken: tuple[object, ...] = ()
        self._known: dict[tuple[object, ...], object] = {}

    def take(self, recipe: Recipe, checkpoint: Checkpoint, device: torch.device, quiet: bool) -> Base:
        """The base of a recipe: the one that is kept if that is the same, or loaded now. It is the caller's until it is given back."""
        kept, self._kept = self._kept, None
        if kept is not None and kept[0] == _key(recipe, checkpoint, device):
            base = kept[1]
        else:
            if kept is not None:
                del kept
                release_memory(device)  # before there are two
            memory, others = recipe.memory, set[str]()
            if memory.spread and recipe.trains_every_weight:  # what trains is spread by the trainer
                if here().size > 1:
                    dtype = resolve_compute_dtype(device, recipe.model.compute_dtype)
                    empty = skeleton_base(recipe.model, torch.device("meta"), dtype)
                    others = elsewhere(apply_method(empty, recipe.method), memory, here())
                memory = memory.model_copy(update={"layers": "resident"})
            base = load_base(recipe.model, device, not quiet, memory, checkpoint, others)
        beside = [part for part in parts_of(recipe.method) if getattr(part, "init", None) in OTHER_BESIDE]
        self._taken = (*_key(recipe, checkpoint, device), repr(beside))
        self._ends = base.end_tokens  # to which a run adds those of its chat template
        return base

    def once(self, what: tuple[object, ...], measure: Callable[[], Measured]) -> Measured:
        """What ``measure`` finds of the base alone: what another run with that base has found, or now. ``what`` says what decides it."""
        key = (*self._taken, *what)
        if key not in self._known:
            self._known[key] = measure()
        return cast(Measured, self._known[key])

    def give_back(self, recipe: Recipe, model: AdaptedModel) -> None:
        """Take the adapter out of a run's model, which came from here, and keep its base for the next one."""
        if changes_its_base(recipe):
            return
        unwrap_layers(model.model)
        model.remove()
        model.base.end_tokens = self._ends
        model.base.model.eval()
        self.keep(recipe, model.base)

    def keep(self, recipe: Recipe, base: Base) -> None:
        """Keep a base that came from here, and carries no adapter, for the next run."""
        if base.checkpoint is not None:
            self._kept = (_key(recipe, base.checkpoint, base.device), base)


def changes_its_base(recipe: Recipe) -> bool:
    """Whether behind the recipe's method the base is another one."""
    return any(part.name in CHANGES_ITS_BASE for part in parts_of(recipe.method))


def _key(recipe: Recipe, checkpoint: Checkpoint, device: torch.device) -> tuple[object, ...]:
    return checkpoint.fingerprint, recipe.model, recipe.memory, str(device)
