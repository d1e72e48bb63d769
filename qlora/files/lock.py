"""The lock of a run folder: one process at a time trains in it.

    with run_lock(folder): …        runs/demo/.lock, held by the system for this process

The system frees it when the process ends, however it ends, so that nothing is left to clear after a kill. Knows files;
must not know what a run is.
"""

from __future__ import annotations

import errno
import json
import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from filelock import FileLock, Timeout

from qlora.errors import RunError, disk_is_full
from qlora.files.strangers import Fault, read_object

LOCK = ".lock"


@contextmanager
def run_lock(folder: Path) -> Iterator[None]:
    """Inside, no other process trains in ``folder``, which must exist. Raises RunError when one does already.

    The file tells who holds the lock, as far as the system lets others read it; it stays behind, empty. Raises RunError
    too where the folder cannot be written to.
    """
    lock = FileLock(folder / LOCK)
    try:
        lock.acquire(timeout=0)
    except OSError as error:
        if isinstance(error, Timeout):
            raise RunError(_taken(folder)) from None
        if disk_is_full(error):
            raise
        if error.errno in (errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOSYS):
            raise RunError(
                f"The file system of '{folder}' has no locks ({error}); choose a folder on another disk (folder=…)."
            ) from None
        raise RunError(
            f"The run folder '{folder}' cannot be written ({error}); make it writable, or choose another (folder=runs/…)."
        ) from None
    try:
        with suppress(PermissionError):  # Windows locks the bytes themselves
            (folder / LOCK).write_text(
                json.dumps({"process": os.getpid(), "host": socket.gethostname()}), encoding="utf-8"
            )
        yield
    finally:
        with suppress(OSError):  # somebody deleted the folder
            os.truncate(folder / LOCK, 0)
        lock.release()


def _taken(folder: Path) -> str:
    try:
        values = read_object(folder / LOCK) or {}
    except Fault:  # the other one is about to write it, or the system keeps it from us
        values = {}
    who = f" ({values['process']} on {values.get('host')})" if "process" in values else ""
    return (
        f"Another process{who} is training in '{folder}'; wait until it ends, stop it, or choose another folder "
        "(folder=runs/…)."
    )
