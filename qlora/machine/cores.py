"""How many CPU threads are good: as many as there are cores that nobody else keeps busy.

Knows Linux's files; elsewhere nothing is known. Must not know a recipe.
"""

from __future__ import annotations

import math
import os
import time
from pathlib import Path

WATCHED = 0.5  # seconds; Linux counts in hundredths
NEARLY_FREE = 0.3  # a core that is so little used by others may have a thread


def allowed_cores(root: Path = Path("/sys/fs/cgroup")) -> int | None:
    """So many cores a container may keep busy, version 2 or 1, a part of one counting as one; None without a limit.

    torch begins a thread for each core that it sees. With 64 of them on the time of four, each waits most of a tenth of a
    second for the others' next share.
    """
    for folder, files in ((root, ["cpu.max"]), (root / "cpu", ["cpu.cfs_quota_us", "cpu.cfs_period_us"])):
        try:
            time, period = " ".join((folder / name).read_text() for name in files).split()
            if time.isdecimal():  # "max" or -1 is no limit
                return max(1, math.ceil(int(time) / int(period)))
        except (OSError, ValueError, ZeroDivisionError):
            continue
    return None


def threads_for(threads: int) -> int:
    """How many of ``threads``, which this process would begin, find a core for themselves now; at least one.

    The threads of a product wait for the last of them: beside one busy program on two cores, two threads made 63 tokens/s where one
    made 219; beside one that is busy for a third of the time, 272 and 205 (benchmarks/beside_others.py).
    """
    if threads > 1 and (busy := used_by_others()) is not None:
        threads = max(1, min(threads, math.floor(len(_cores()) - busy + NEARLY_FREE)))
    return threads


def used_by_others() -> float | None:
    """How many of this process's cores other programs keep busy, seen for half a second; None where the system does not say."""
    try:
        before, ours, began = _busy_seconds(), time.process_time(), time.perf_counter()
        time.sleep(WATCHED)
        busy, ours, seconds = _busy_seconds() - before, time.process_time() - ours, time.perf_counter() - began
    except (OSError, ValueError, IndexError, AttributeError):
        return None
    return max(0.0, (busy - ours) / seconds)


def _busy_seconds(file: Path = Path("/proc/stat")) -> float:
    """How long this process's cores were not idle, in seconds, summed since the machine began."""
    ours, ticks = {f"cpu{core}" for core in _cores()}, 0
    for name, *times in (line.split() for line in file.read_text().splitlines()):
        if name in ours:
            user, nice, system, _idle, _wait, interrupts, soft, stolen = map(
                int, times[:8]
            )  # guests are counted in the first two
            ticks += user + nice + system + interrupts + soft + stolen
    return ticks / os.sysconf("SC_CLK_TCK")


def _cores() -> set[int]:
    """The cores that this process may run on. Raises AttributeError where the system does not say."""
    return os.sched_getaffinity(0)
