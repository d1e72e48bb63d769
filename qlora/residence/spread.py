"""Layers spread over the processes of a run: each keeps a part of every image on its device, and all put one together for a visit.

    process 0   ▓░░  ▓░░  ▓░░ …        visit of layer 1                slot of every process
    process 1   ░▓░  ░▓░  ░▓░ …   ── all parts, to all, ──►            ▓▓▓
    process 2   ░░▓  ░░▓  ░░▓ …      the next one meanwhile

What FSDP does with parameters (ZeRO-3, Rajbhandari et al. 2020, arXiv:1910.02054) is done here with an image's bytes, by the same
collective. Bytes have no dtype that a mixed-precision policy could cast, and no NaN that arithmetic could touch; slots, fetching
ahead and the recompute boundary are ``placement.py``'s, as for every other home.

All processes have to visit the same layers in the same order. While the main one evaluates alone, the others ``serve``.

Knows bytes and processes; must not know what an image holds.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
import torch.distributed as dist
from torch import Tensor

from qlora.errors import RecipeError
from qlora.machine.processes import PATIENCE, SUM_PATIENCE, here, together

DONE = -1  # instead of a layer's number


def require_several() -> None:
    """Raise RecipeError where there is one process."""
    if here().size == 1:
        raise RecipeError(
            "memory.tier is processes, which spreads layers over the processes of a run, but there is one alone; start "
            "several by torchrun, or set memory.tier=host or disk. For full fine-tuning, set memory.layers=resident."
        )


class Led:
    """Something that all processes reach into together, layer by layer, unless one is ``alone`` while the others ``serve``.
    Raises RecipeError where there is one process."""

    def __init__(self) -> None:
        self.processes = here()
        require_several()
        self.orders = dist.new_group(backend="gloo", timeout=PATIENCE)
        self.leads = False
        """Whether the others follow what this process asks for."""

    @contextmanager
    def alone(self) -> Iterator[None]:
        """Inside, this process reads what it likes, while the others ``serve``."""
        self.leads = True
        yield
        self.leads = False
        self._order(DONE)  # not after an error: then this process ends, and the others hear of it

    def serve(self) -> None:
        """Give the process that is ``alone`` what it reads, until it is done."""
        while (layer := self._order(DONE)) != DONE:
            self._follow(layer)

    def _follow(self, layer: int) -> None:
        """Take part where the process that is ``alone`` reads ``layer``."""
        raise NotImplementedError

    def _order(self, layer: int) -> int:
        """Tell the others which layer is wanted; or hear it, where this process is not the main one."""
        wanted = torch.tensor([layer])
        with together():
            dist.broadcast(wanted, 0, group=self.orders)
        return int(wanted)


class SpreadHome(Led):
    """Images of which this process holds a part each, on ``device``."""

    def __init__(self, sizes: dict[int, int], device: torch.device) -> None:
        super().__init__()
        self.parts = {
            layer: torch.zeros(self.processes.most(size), dtype=torch.uint8, device=device)
            for layer, size in sizes.items()
        }
        gpu = device.type == "cuda"
        # groups of their own: what a thread fetches ahead must not come between the sums of gradients
        self.group = dist.new_group(backend="nccl" if gpu else "gloo", timeout=SUM_PATIENCE if gpu else PATIENCE)

    def read(self, layer: int, memory: Tensor, start: int = 0) -> None:
        """Copy the layer's bytes from ``start`` on into ``memory``, as all processes do at once."""
        if self.leads:
            self._order(layer)
        part = self.parts[layer]
        whole = memory
        if start or len(memory) != len(part) * self.processes.size:
            whole = torch.empty(len(part) * self.processes.size, dtype=torch.uint8, device=part.device)
        self._gather(whole, part)
        if whole is not memory:
            memory.copy_(whole[start : start + len(memory)])

    def write(self, layer: int, start: int, values: Tensor) -> None:
        """Replace the layer's bytes from ``start`` on by those of ``values``: those in this process's part."""
        part = self.parts[layer]
        first = self.processes.rank * len(part)
        begin, end = max(start, first), min(start + len(values), first + len(part))
        if begin < end:
            part[begin - first : end - first].copy_(values[begin - start : end - start])

    def _follow(self, layer: int) -> None:
        part = self.parts[layer]
        self._gather(torch.empty(len(part) * self.processes.size, dtype=torch.uint8, device=part.device), part)

    def _gather(self, whole: Tensor, part: Tensor) -> None:
        """``whole`` from every process's ``part``."""
        gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor  # its name until torch 2.12
        with together():
            gather(whole, part, group=self.group)

    def close(self) -> None:
        """Give the parts back."""
        self.parts.clear()
