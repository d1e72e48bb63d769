"""Several processes at once, started as a launcher starts them: one environment each, gloo between them.

    together(3, work, folder)            work(folder) in three processes, each with its rank in the environment
    environments(2)                      for processes that are started one by one

Knows the environment that torchrun makes; must not know what the processes do.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist

from qlora.machine.processes import leave
from tests import processes

_STORES: list[dist.TCPStore] = []


def environments(size: int) -> list[dict[str, str | None]]:
    """What torchrun sets, for each of ``size`` processes of this machine."""
    # torchrun keeps it, and outlives them
    store = dist.TCPStore("localhost", 0, is_master=True, wait_for_workers=False)
    _STORES.append(store)
    shared = {"WORLD_SIZE": str(size), "LOCAL_WORLD_SIZE": str(size)}
    shared |= {"MASTER_ADDR": "localhost", "MASTER_PORT": str(store.port)}
    shared |= {"TORCHELASTIC_USE_AGENT_STORE": "True", "TORCHELASTIC_RESTART_COUNT": "0"}
    return [{**shared, "RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in range(size)]


def together(size: int, work: Callable[..., None], *given: Any) -> None:
    """Call ``work(*given)`` in ``size`` processes; what one of them raises is printed there, and fails here."""
    started = [processes._SERVER.Process(target=_inside, args=(one, work, given)) for one in environments(size)]
    for process in started:
        process.start()
    for process in started:
        process.join(processes.LONGEST)
    assert [process.exitcode for process in started] == [0] * size


def _inside(environment: dict[str, str], work: Callable[..., None], given: tuple[Any, ...]) -> None:
    os.environ.update(environment)
    torch.set_num_threads(1)
    work(*given)
    leave()
