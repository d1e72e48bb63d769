"""Several processes at once, started as a launcher starts them: one environment each, gloo between them.

    together(3, work, folder)            work(folder) in three processes, each with its rank in the environment
    environments(2)                      for processes that are started one by one

Knows the environment that torchrun makes; must not know what the processes do.
"""

from __future__ import annotations

import os
import socket
from collections.abc import Callable
from typing import Any

import torch

from qlora.machine.processes import leave
from tests import processes


def environments(size: int) -> list[dict[str, str | None]]:
    """What torchrun sets, for each of ``size`` processes of this machine."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    shared = {
        "WORLD_SIZE": str(size),
        "LOCAL_WORLD_SIZE": str(size),
        "MASTER_ADDR": "localhost",
        "MASTER_PORT": str(port),
    }
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
