"""Layers that train, spread over the processes of a run: each weight is whole in one of them, its owner, and visits the others.

                 waits        a layer's visit            backward of the layer has ended            the step's end
    owner        W            W ──────► all              gradients of all, added up                 its master moves W
    others       nothing      W, as long as it lasts     ──────► the owner, nothing stays           nothing

What FSDP does by parts of each parameter (ZeRO stage 3, Rajbhandari et al. 2020, arXiv:1910.02054, section 5.3) is done by whole
parameters: so each moves exactly as in one process, with one optimizer state of one shape, and a checkpoint is that of one
process. Beside what a process owns there is the layer at work and the next one, on its way meanwhile. What no layer has alone
(embedding, head, last norm) stays everywhere.

In the place of a weight that is away stands NaN, so that whoever reads it all the same is found out. All processes have to
visit the same layers in the same order, as for a frozen base that is spread (``spread.py``).

Knows parameters, layers and processes; must not know masters, an optimizer or files.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from qlora.model import anatomy
from qlora.model.base import StreamedLayers
from qlora.model.load import absent
from qlora.recipe import MemorySection
from qlora.residence.placement import NONE, next_layers, resident_layers
from qlora.residence.spread import Led


@dataclass
class Coming:
    """A layer on its way."""

    number: int = NONE
    memory: dict[str, Tensor] = field(default_factory=dict)
    """What it will have that this process lacks."""
    copies: list[Callable[[], None]] = field(default_factory=list)

    def arrive(self) -> None:
        """Wait for all of it."""
        for one in self.copies:
            one()


class OwnedLayers(Led):
    """The layers ``order`` of ``layers``, whose ``weights`` by number are each one process's. Every call of such a layer brings in
    what it lacks, and lets go of the layer before it."""

    tier = "processes"

    def __init__(
        self, layers: nn.ModuleList, weights: Mapping[int, Mapping[str, nn.Parameter]], owner: Mapping[str, int]
    ):
        super().__init__()
        self.weights, self.owner, self.order = weights, owner, sorted(weights)
        self.device = next(v.device for inside in weights.values() for v in inside.values())
        self.names = {name for inside in weights.values() for name in inside}
        """Of the parameters that are apart."""
        self.current, self.graded = NONE, False
        """The layer that is whole now, and whether its gradients are to be added up."""
        self.coming, self.direction = Coming(), 1
        self.hooks = [
            layers[number].register_forward_pre_hook(self._bringing(number, layers[number])) for number in weights
        ]
        for number in self.order:
            self._drop(number)

    def _bringing(self, number: int, own: nn.Module) -> Callable[[nn.Module, tuple[object, ...]], None]:
        def bring(module: nn.Module, args: tuple[object, ...]) -> None:
            if module is own:
                self.visit(number)

        return bring

    def is_here(self, name: str) -> bool:
        """Whether this process has the parameter between visits."""
        return name not in self.names or self.owner[name] == self.processes.rank

    def visit(self, number: int) -> None:
        """Have the layer whole, and the next one on its way. With gradients on, what its backward leaves is added up when the next
        one is visited."""
        if number != self.current:
            before = self.current
            self._leave()
            if self.leads:
                self._order(number)
            self._bring(number)
            self.current = number
            self._fetch_ahead(before)
        self.graded |= torch.is_grad_enabled() and not self.leads

    def _bring(self, number: int) -> None:
        """Have what this process lacks of the layer, in memory of its own."""
        if self.coming.number != number:
            self._discard()
            self._fetch(number)
        self.coming.arrive()
        for name, memory in self.coming.memory.items():
            self.weights[number][name].data = memory
        self.coming = Coming()

    def _fetch_ahead(self, before: int) -> None:
        """Begin to bring in the layer that comes next, unless this one is where backward ends."""
        backwards = before > self.current
        self.direction, wanted = next_layers(self.order, self.current, before, self.direction, 2)
        if not (self.leads or len(wanted) < 2 or (backwards and self.current == self.order[0])):
            self._fetch(wanted[1])

    @torch.no_grad()
    def _fetch(self, number: int) -> None:
        """Begin to bring in the layer."""
        self.coming = Coming(number)
        for name, values in self.weights[number].items():
            memory = values.detach()
            if not self.is_here(name):
                memory = torch.empty(values.shape, dtype=values.dtype, device=self.device)
                self.coming.memory[name] = memory
            self.coming.copies.append(self.processes.begin_copy(memory, self.owner[name]))

    def _discard(self) -> None:
        self.coming.arrive()
        self.coming = Coming()

    def forget(self) -> None:
        """Have every weight be with its owner alone; gradients go there."""
        self._leave()
        self._discard()

    def _leave(self) -> None:
        """Let go of the layer that is whole; its gradients go to their owners."""
        if self.current == NONE:
            return
        if self.graded:
            self._add_up(self.weights[self.current])
        self._drop(self.current)
        self.current, self.graded = NONE, False

    def _add_up(self, inside: Mapping[str, nn.Parameter]) -> None:
        """Gradients that are there in any process, to the owner, added to what it has of earlier visits."""
        anywhere = zip(*self.processes.gather(*(values.grad is not None for values in inside.values())), strict=True)
        for (name, values), flags in zip(inside.items(), anywhere, strict=True):
            if any(flags):
                if values.grad is None:
                    values.grad = torch.zeros_like(values, dtype=values.grad_dtype)  # type: ignore[attr-defined]
                self.processes.add_to(values.grad, self.owner[name])

    def _drop(self, number: int) -> None:
        for name, values in self.weights[number].items():
            if not self.is_here(name):
                values.grad = None
                values.data = absent(values, self.device)

    def _follow(self, layer: int) -> None:
        self._bring(layer)
        self._drop(layer)

    @contextmanager
    def all_here(self, read: bool) -> Iterator[None]:
        """Inside, every weight has memory of its own: in host memory, where another process owns it. ``read``: with its values, by
        the process that is ``alone``; else to be written over."""
        held: dict[str, Tensor] = {}
        for number, inside in self.weights.items():
            if read:
                self.visit(number)
            for name, values in inside.items():
                if not self.is_here(name):
                    place = torch.empty(values.shape, dtype=values.dtype)
                    held[name] = place.copy_(values.detach()) if read else place
        self.forget()
        for inside in self.weights.values():
            for name in inside.keys() & held.keys():
                inside[name].data = held[name]
        try:
            yield
        finally:
            for number in self.order:
                self._drop(number)

    def bytes_on_device(self) -> int:
        """What the others own of the largest layer, for the one at work and the one on its way."""
        return 2 * max(
            sum(values.numel() * values.element_size() for name, values in inside.items() if not self.is_here(name))
            for inside in self.weights.values()
        )

    def close(self) -> None:
        """Forget the hooks. Weights of others stay away for good."""
        for hook in self.hooks:
            hook.remove()


def apart(
    model: nn.Module, parameters: Mapping[str, nn.Parameter], memory: MemorySection
) -> dict[int, dict[str, nn.Parameter]]:
    """Of each layer that does not stay (``memory.layers``), those of ``parameters`` that nothing else in ``model`` has; single numbers
    stay everywhere, since by its strides nobody could tell whether one is here."""
    layers = anatomy.layers(model)
    uses = Counter(id(values) for module in model.modules() for values in module.parameters(recurse=False))
    names = {id(values): name for name, values in parameters.items() if uses[id(values)] == 1 and values.numel() > 1}
    away = sorted(set(range(len(layers))) - resident_layers(memory.layers, len(layers)))
    found = {number: {names[id(v)]: v for v in layers[number].parameters() if id(v) in names} for number in away}
    return {number: inside for number, inside in found.items() if inside}


def is_elsewhere(values: Tensor) -> bool:
    """Whether a parameter is another process's, and no memory here holds its numbers."""
    return values.numel() > 1 and not any(values.stride())


def all_here(placement: StreamedLayers | None, read: bool = True) -> AbstractContextManager[None]:
    """Inside, every weight that trains has memory of its own, as ``OwnedLayers.all_here``; elsewhere they have it anyway."""
    return placement.all_here(read) if isinstance(placement, OwnedLayers) else nullcontext()
