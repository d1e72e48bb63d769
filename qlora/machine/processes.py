"""Several processes that train one model: which of them this is, and what they tell each other. One alone tells itself.

    torchrun --nproc-per-node 2 -m qlora train recipe.yaml      one process a device, started and ended by torchrun
    accelerate launch --num-processes 2 -m qlora train …        the same

A launcher says who is who in the environment (RANK, WORLD_SIZE, LOCAL_RANK, MASTER_ADDR, MASTER_PORT), and torch.distributed does
the rest. Decisions travel through gloo, on CPUs: it notices at once when a process that it waits for has ended. Gradients
on GPUs travel through NCCL, which does not, so before each of its sums all have said through gloo that they are there.

Knows torch.distributed and numbers; must not know what they stand for.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from functools import lru_cache
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from qlora.errors import ProcessLostError, RecipeError, first_line

Some = TypeVar("Some")
BUCKET = 256 * 1024**2  # bytes that travel together; beside them, a sum takes as much memory again
PATIENCE = timedelta(days=2)  # for one that evaluates while the others wait; of one that ended, gloo knows at once
SUM_PATIENCE = timedelta(minutes=5)  # until all have come, and for NCCL, whose sums all begin together


@dataclass(frozen=True)
class Processes:
    """This process among those that train together."""

    rank: int = 0
    """Its number."""
    size: int = 1
    """How many there are."""
    local_rank: int = 0
    """Its number among those on this machine, and so of its GPU."""
    local_size: int = 1
    """How many there are on this machine."""
    cpus: Any = None
    """The group through which CPUs send."""
    gpus: Any = None
    """The group through which GPUs send; None without GPUs."""

    @property
    def main(self) -> bool:
        """Whether this is the one that writes, measures and speaks."""
        return self.rank == 0

    def share(self, count: int) -> slice:
        """Which of ``count`` things are this process's, as even as can be, in order. Example: 5 among 2 → 0:2 and 2:5."""
        return slice(self.rank * count // self.size, (self.rank + 1) * count // self.size)

    def most(self, count: int) -> int:
        """The largest share of ``count`` things."""
        return -(-count // self.size)

    def gather(self, *numbers: float) -> list[list[float]]:
        """Every process's ``numbers``, as many from each, by rank."""
        if self.size == 1:
            return [list(numbers)]
        mine = torch.tensor(numbers, dtype=torch.float64)
        found = [torch.empty_like(mine) for _ in range(self.size)]
        with together():
            dist.all_gather(found, mine, group=self.cpus)
        return [one.tolist() for one in found]

    def any(self, flag: bool) -> bool:
        """Whether it is so in one of them."""
        return any(value for (value,) in self.gather(float(flag)))

    def barrier(self) -> None:
        """Return once all are here."""
        self.gather(self.rank)  # nothing at all would not be waited for

    def sum(self, tensors: Sequence[Tensor]) -> None:
        """Replace each by its sum over all processes, whose tensors have the same shapes; those of one dtype travel together."""
        if self.size > 1:
            for bucket in buckets(tensors):
                flat = torch.cat([one.reshape(-1) for one in bucket])
                with together():
                    dist.all_reduce(flat, group=self.gpus if flat.is_cuda else self.cpus)
                parts = flat.split([one.numel() for one in bucket])
                torch._foreach_copy_(bucket, [part.view(one.shape) for one, part in zip(bucket, parts, strict=True)])

    def add_to(self, tensor: Tensor, target: int) -> None:
        """In the process ``target`` replace it by its sum over all, whose tensors have the same shape; in others it is of no use then."""
        flat = tensor.view(-1)
        with together():
            dist.reduce(flat, target, group=self.gpus if flat.is_cuda else self.cpus)

    def begin_copy(self, tensor: Tensor, source: int) -> Callable[[], None]:
        """Begin to replace it, on any device and without gaps, by that of the process ``source``; what is given back waits for it."""
        with together():
            under_way = dist.broadcast(
                tensor.detach().view(-1).view(torch.uint8),
                source,
                group=self.gpus if tensor.is_cuda else self.cpus,
                async_op=True,
            )

        def arrive() -> None:
            with together():
                under_way.wait()

        return arrive

    def copy(self, tensors: Iterable[Tensor], source: int = 0) -> None:
        """Replace each by that of the process ``source``, byte for byte; the main one's unless said."""
        if self.size > 1:
            for one in tensors:
                sent = one.detach().reshape(-1).contiguous().view(torch.uint8)
                with together():
                    dist.broadcast(sent, source, group=self.gpus if sent.is_cuda else self.cpus)
                if self.rank != source and sent.data_ptr() != one.data_ptr():
                    one.detach().copy_(sent.view(one.dtype).view(one.shape))

    def once(self, make: Callable[[], str], source: int = 0) -> str:
        """What ``make`` gives in the process ``source``, which alone calls it; the main one unless said."""
        if self.size == 1:
            return make()
        text = torch.tensor(list(make().encode()) if self.rank == source else [], dtype=torch.uint8)
        length = int(self.gather(len(text))[source][0])
        text = text if self.rank == source else torch.empty(length, dtype=torch.uint8)
        self.copy([text], source)
        return bytes(text.tolist()).decode()

    def collect(self, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        """In the main process the ``tensors`` of all, which are on CPUs and have names of their own; in another its own."""
        found = dict(tensors)
        for source in range(1, self.size):
            listed = [[name, str(one.dtype).removeprefix("torch."), list(one.shape)] for name, one in tensors.items()]
            for name, dtype, shape in json.loads(self.once(lambda listed=listed: json.dumps(listed), source)):  # type: ignore[misc]
                with together():
                    if self.rank == source:
                        dist.send(tensors[name].reshape(-1).contiguous().view(torch.uint8), 0, group=self.cpus)
                    elif self.main:
                        found[name] = torch.empty(shape, dtype=getattr(torch, dtype))
                        dist.recv(found[name].reshape(-1).view(torch.uint8), source, group=self.cpus)
        return found


ALONE = Processes()


def buckets(tensors: Iterable[Tensor]) -> Iterator[list[Tensor]]:
    """``tensors`` by dtype and device, in their order, so many together that none of several is above ``BUCKET`` bytes."""
    kinds: dict[tuple[torch.dtype, torch.device], list[Tensor]] = {}
    for one in tensors:
        kinds.setdefault((one.dtype, one.device), []).append(one)
    for same in kinds.values():
        bucket, size = list[Tensor](), 0
        for one in same:
            if bucket and size + one.nbytes > BUCKET:
                yield bucket
                bucket, size = [], 0
            bucket.append(one)
            size += one.nbytes
        yield bucket


def count() -> int:
    """How many processes a launcher started; 1 without one. Raises RecipeError where the environment has no number."""
    given = os.environ.get("WORLD_SIZE") or "1"
    if not given.isdecimal() or not int(given):
        raise RecipeError(
            f"WORLD_SIZE is '{given}' in the environment; expected the number of processes, as torchrun sets it."
        )
    return int(given)


def here() -> Processes:
    """This process among those that the launcher started; the first call waits for the others. Raises RecipeError."""
    return ALONE if count() == 1 else _joined()


@lru_cache(maxsize=1)
def _joined() -> Processes:
    missing = [name for name in ("RANK", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT") if not os.environ.get(name)]
    if missing:
        raise RecipeError(
            f"WORLD_SIZE={count()} says that this is one of several processes, but {', '.join(missing)} are not set; start them "
            "by torchrun or accelerate launch, or unset WORLD_SIZE."
        )
    local = int(os.environ["LOCAL_RANK"])
    try:
        if not dist.is_initialized():
            dist.init_process_group("gloo", timeout=SUM_PATIENCE)
        cpus = dist.new_group(backend="gloo", timeout=PATIENCE)
        gpus = dist.new_group(backend="nccl", timeout=SUM_PATIENCE) if torch.cuda.is_available() else None
    except (RuntimeError, ValueError) as error:
        place = f"{os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']}"
        raise ProcessLostError(
            f"The {count()} processes did not find each other at {place} ({first_line(error)}); is that address reached from every "
            "machine, and were all started?"
        ) from None
    beside = int(os.environ.get("LOCAL_WORLD_SIZE") or 1)
    return Processes(dist.get_rank(), dist.get_world_size(), local, beside, cpus, gpus)


def tells() -> bool:
    """Whether this process is the first of all to say why the run ends, so that the others need not say it again."""
    if not dist.is_initialized():
        return count() == 1 or os.environ.get("RANK", "0") == "0"
    try:
        return bool(dist.distributed_c10d._get_default_store().add("told", 1) == 1)
    except RuntimeError:  # the process that kept it has ended
        return True


def leave() -> None:
    """Say goodbye, once there is nothing more to do together."""
    if dist.is_initialized():
        dist.destroy_process_group()
        _joined.cache_clear()


@contextmanager
def together() -> Iterator[None]:
    """Around what all do. Raises ProcessLostError where another one is not there any more."""
    try:
        yield
    except RuntimeError as error:
        why = "" if "by peer" in str(error) else f" ({first_line(error)})"
        raise ProcessLostError(
            f"Another of the {dist.get_world_size()} processes ended, and none trains without it{why}. What was saved is whole; go on "
            "with qlora resume RUN, with any number of processes."
        ) from None
