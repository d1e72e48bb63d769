"""Full fine-tuning by several processes: each keeps the fp32 masters and the moments of a share of the parameters, and where the
recipe spreads the layers, the parameters and gradients of that share alone (``residence/owned.py``).

    gradients, summed in all ─► the owner's master and moments move ─► its parameter ─► copied into every process
    checkpoint: the owners' masters and moments ─► the main process, which writes what one process would have written

Of 18 bytes a number in bf16 these are 12, so two processes need 12 and four 9 (ZeRO stage 1, Rajbhandari et al. 2020,
arXiv:1910.02054, section 5.1). A parameter has one owner whole, so each moves exactly as in one process. An adapter's are too small
to be worth the copies. Knows names, sizes and processes; must not know an optimizer.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from qlora.machine.processes import Processes, here
from qlora.methods.base import AdaptedModel
from qlora.model import anatomy
from qlora.recipe import MemorySection
from qlora.residence.owned import OwnedLayers, apart


@dataclass(frozen=True)
class Shares:
    """Which process keeps what of each parameter."""

    processes: Processes
    owner: Mapping[str, int]
    layers: OwnedLayers | None = None
    """Those whose parameters and gradients their owners have alone."""

    @classmethod
    def of(cls, model: AdaptedModel, processes: Processes) -> Shares | None:
        """None where every process keeps everything: alone, or with an adapter."""
        if processes.size == 1 or not shared_out(model):
            return None
        layers = model.base.placement
        owned = layers if isinstance(layers, OwnedLayers) else None
        return cls(processes, owners(model.trainable_parameters(), processes.size), owned)

    def is_mine(self, name: str) -> bool:
        """Whether this process keeps it."""
        return self.owner[name] == self.processes.rank

    def is_apart(self, name: str) -> bool:
        """Whether its owner alone has the parameter, and its gradient."""
        return self.layers is not None and name in self.layers.names

    @torch.no_grad()
    def hand_round(self, parameters: Mapping[str, nn.Parameter]) -> None:
        """Have every process hold each parameter as its owner has it, unless that one alone is to have it."""
        for name, values in parameters.items():
            if self.is_apart(name):
                continue
            self.processes.copy([values], self.owner[name])
            torch.autograd.graph.increment_version(values)  # what is received is written behind torch's back

    def collected(self, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        """In the main process what all of them gave; in another what it gave itself."""
        return self.processes.collect(tensors)


def spread_out(model: AdaptedModel, memory: MemorySection) -> None:
    """Spread the layers of a model that is fine-tuned in full over the processes, where ``memory`` asks for it; once."""
    inside = spread_weights(model, memory)
    if inside and model.base.placement is None:
        owner = owners(model.trainable_parameters(), here().size)
        model.base.placement = OwnedLayers(anatomy.layers(model.model), inside, owner)


def spread_weights(model: AdaptedModel, memory: MemorySection) -> dict[int, dict[str, nn.Parameter]]:
    """By layer, the parameters that one process alone is to have; none where ``memory`` does not ask for it, or the method is another."""
    if not memory.spread or not shared_out(model):
        return {}
    return apart(model.model, model.trainable_parameters(), memory)


def elsewhere(model: AdaptedModel, memory: MemorySection, processes: Processes) -> set[str]:
    """The names of the parameters that only other processes are to have, whose weights may be on meta."""
    owner = owners(model.trainable_parameters(), processes.size)
    spread = {name for inside in spread_weights(model, memory).values() for name in inside}
    return {name for name in spread if owner[name] != processes.rank}


def shared_out(model: AdaptedModel) -> bool:
    """Whether several processes share out what is kept beside the parameters."""
    return any(method.section.name == "full" for method in model.methods)


def owners(parameters: Mapping[str, Tensor], processes: int) -> dict[str, int]:
    """The process that keeps what is beside each of ``parameters``: the largest are given first, each to the one that has least.

    Example: parameters of 5, 3 and 2 numbers among 2 → 0, 1 and 1.
    """
    sizes, given = {name: values.numel() for name, values in parameters.items()}, [0] * processes
    found = {}
    for name in sorted(sizes, key=lambda name: (-sizes[name], name)):
        found[name] = given.index(min(given))
        given[found[name]] += sizes[name]
    return found
