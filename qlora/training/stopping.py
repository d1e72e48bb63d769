"""Stopping: a signal lets the step in progress end and its state be saved; a second one, or one between steps, ends at once.

    with stoppable("qlora resume runs/demo") as signals:
        signals.wait = True            # from here on somebody looks at signals.arrived after each step

Several processes let one another know of it after each step. Knows the operating system's signals; must not know trainers or
run folders.
"""

from __future__ import annotations

import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from types import FrameType
from typing import Any

from qlora.errors import Stopped
from qlora.machine.processes import count


@dataclass
class Signals:
    """What arrived, and whether the first signal waits to be looked at."""

    arrived: int = 0
    """The signal's number, 0 when there was none."""
    wait: bool = False

    def note(self, number: int, frame: FrameType | None) -> None:
        """The handler. Raises KeyboardInterrupt unless this is the first signal and it may wait."""
        first, self.arrived = not self.arrived, number
        if not (first and self.wait):
            raise KeyboardInterrupt
        if count() > 1:  # each of them gets it, and a launcher that ends them sends it too
            return
        with suppress(RuntimeError, OSError, ValueError):  # it may have arrived in the middle of another print
            print("Stopping after this step; once more to stop at once.", file=sys.stderr, flush=True)


@contextmanager
def stoppable(command: str) -> Iterator[Signals]:
    """Inside, SIGINT and SIGTERM are handled as above; ``command`` is what goes on with the work.

    Raises Stopped in place of KeyboardInterrupt. Outside of the main thread signals are left alone.
    """
    signals = Signals()
    before: dict[signal.Signals, Any] = {}
    try:
        for kind in (signal.SIGINT, signal.SIGTERM):
            before[kind] = signal.signal(kind, signals.note)
    except ValueError:  # not the main thread
        before.clear()
    try:
        yield signals
    except KeyboardInterrupt:
        number = signals.arrived or signal.SIGINT
        name = signal.Signals(number).name
        raise Stopped(f"{name} stopped the run; what was saved is whole. Go on with: {command}", number) from None
    finally:
        for kind, handler in before.items():
            signal.signal(kind, handler)
