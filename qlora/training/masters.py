"""fp32 masters: what the optimizer changes, where a parameter computes in 16 bits.

    bf16 parameter ─► forward, backward ─► .grad, summed in fp32 ─► optimizer ─► fp32 master ─► rounded: bf16 parameter

A bf16 number has 8 bits. At a learning rate of 2e-5 a step of Adam is less than half of the distance to the next number
for about half of an adapter's numbers: they would never change, however many steps there were. A master takes every step,
and its parameter follows once enough of them came together (Micikevicius et al. 2018, arXiv:1710.03740, section 3.1). A
parameter in fp32 is its own master.

Knows parameters and their gradients; must not know which optimizer there is, or what a step is.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping

import torch
from torch import Tensor, nn

from qlora.errors import RunError, listed
from qlora.residence.owned import is_elsewhere

KEY = "/master"
"""What a master's name in a checkpoint ends with, after its parameter's."""


class Masters:
    """The masters of ``parameters``, by the same names. They begin as what the parameters hold. ``is_mine`` says of which there are
    any, where several processes share them out."""

    def __init__(
        self, parameters: Mapping[str, nn.Parameter], is_mine: Callable[[str], bool] = lambda name: True
    ) -> None:
        self.parameters = parameters
        wide_gradients(parameters.values())
        mine = {name: p for name, p in parameters.items() if is_mine(name)}
        self.values = {name: nn.Parameter(p.detach().float()) if is_narrow(p) else p for name, p in mine.items()}
        """What the optimizer is to change."""
        self._pairs = [(p, self.values[name]) for name, p in mine.items() if is_narrow(p)]
        self.doubt()

    def tensors(self) -> list[Tensor]:
        """Every tensor here that a step changes, the parameters beside their masters."""
        beside = (p for name, p in self.parameters.items() if p is not self.values.get(name) and not is_elsewhere(p))
        return [*self.values.values(), *beside]

    @torch.no_grad()
    def follow(self) -> None:
        """Take over what was written into the parameters since ``hand_over``: an adapter's file, a triplet that was pruned.

        torch counts such writes. A number that is what its master rounds to was not written, and keeps its master.
        """
        for place, (p, master) in enumerate(self._pairs):
            if p._version != self._versions[place]:
                master.copy_(torch.where(master.to(p.dtype) == p, master, p))
                self._versions[place] = p._version

    def doubt(self) -> None:
        """Have ``follow`` look at every parameter, since torch's counts of writes were set back or say too little."""
        self._versions = [-1] * len(self._pairs)

    def take_gradients(self) -> None:
        """Give the masters their parameters' gradients: the same tensors."""
        for p, master in self._pairs:
            master.grad = p.grad

    @torch.no_grad()
    def hand_over(self) -> None:
        """Round the masters into the parameters."""
        if self._pairs:
            torch._foreach_copy_([p for p, _ in self._pairs], [master for _, master in self._pairs])
            self._versions = [p._version for p, _ in self._pairs]

    def drop_gradients(self) -> None:
        """Have neither parameters nor masters hold a gradient."""
        for p in (*self.parameters.values(), *self.values.values()):
            p.grad = None

    def state(self) -> dict[str, Tensor]:
        """What a checkpoint holds of the masters: nothing of those that are their own parameter."""
        self.follow()
        return {
            f"{name}{KEY}": master.detach().cpu()
            for name, master in self.values.items()
            if master is not self.parameters[name]
        }

    @torch.no_grad()
    def load(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Copy in what ``state`` gave, once the parameters hold theirs; return the rest of ``tensors``.

        Raises RunError unless there is one of its shape for each master here, and no other.
        """
        elsewhere = self.parameters.keys() - self.values.keys()  # what other processes keep
        tensors = {key: values for key, values in tensors.items() if key.rpartition("/")[0] not in elsewhere}
        found = {key.removesuffix(KEY): values for key, values in tensors.items() if key.endswith(KEY)}
        narrow = {name: master for name, master in self.values.items() if master is not self.parameters[name]}
        here, there = ({name: values.shape for name, values in held.items()} for held in (narrow, found))
        if wrong := [name for name in {**here, **there} if here.get(name) != there.get(name)]:
            raise RunError(
                f"The checkpoint does not hold the fp32 masters that this run needs, such as those of {listed(wrong, 3)}: it "
                "was written with another adapter_dtype, or before there were any. Begin a new run from its adapter, by "
                "method.from."
            )
        for name, values in found.items():
            narrow[name].copy_(values)
        self.doubt()
        return {key: values for key, values in tensors.items() if not key.endswith(KEY)}


def is_narrow(values: Tensor) -> bool:
    """Whether a parameter computes in fewer bits than its steps need."""
    return values.dtype.itemsize < 4


def wide_gradients(parameters: Iterable[nn.Parameter]) -> None:
    """Have every ``.grad`` be summed in fp32 from now on: 16 bits would lose what each further micro-batch brings."""
    for p in parameters:
        if is_narrow(p):
            p.grad = None
            p.grad_dtype = torch.float32  # type: ignore[attr-defined]


def master_bytes(parameters: Iterable[Tensor]) -> int:
    """What the masters of ``parameters`` hold beside these."""
    return sum(4 * p.numel() for p in parameters if is_narrow(p))
