"""Real processes: ``qlora …`` as a user runs it, hit by a fault, and how it ended.

    run("train", recipe, at=("line", 7, SIGKILL))     killed right before the seventh line of metrics.jsonl
    start(…).wait()                                   the same, with something in between

Python's own fork server imports everything once; each process then costs what it does. Knows the command line and where it
writes files; must not know what a trainer does.
"""

from __future__ import annotations

import ctypes
import json
import multiprocessing
import os
import resource
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import safetensors.torch
import torch

from qlora import cli
from qlora.training.log import MetricsLog

NO_MOUNTS = 77
"""The status of a process that could not make a folder read-only."""
LONGEST = 300.0  # seconds that a tiny run may take before it counts as hanging, on a busy machine too
_SERVER = multiprocessing.get_context("forkserver")
_SERVER.set_forkserver_preload(["tests.processes"])


@dataclass(frozen=True)
class Ended:
    """How a process ended: its status (negative: the signal that ended it), and what it wrote."""

    status: int
    output: str
    errors: str
    seconds: float


class Started:
    """A process that runs."""

    def __init__(self, words: tuple[object, ...], faults: dict[str, Any]) -> None:
        self.place = Path(tempfile.mkdtemp(prefix="process-"))
        self.begin = time.monotonic()
        arguments = ([str(word) for word in words], str(self.place), faults)
        self.process = _SERVER.Process(target=_suffer, args=arguments)
        self.process.start()
        assert self.process.pid is not None
        self.pid: int = self.process.pid

    def wait_until_it_stands(self) -> None:
        """Until a SIGSTOP of its own has stopped it."""
        while time.monotonic() - self.begin < LONGEST:
            state = Path(f"/proc/{self.pid}/stat").read_text().rpartition(")")[2].split()[0]
            if state in "TZX":
                return
            time.sleep(0.01)
        raise AssertionError(f"it hangs: {self._said('err')[-500:]}")

    def wait(self) -> Ended:
        self.process.join(LONGEST)
        if self.process.exitcode is None:
            os.kill(self.pid, signal.SIGKILL)
            self.process.join()
            raise AssertionError(f"it hangs: {self._said('err')[-500:]}")
        return Ended(self.process.exitcode, self._said("out"), self._said("err"), time.monotonic() - self.begin)

    def _said(self, name: str) -> str:
        path = self.place / name
        return path.read_text(encoding="utf-8", errors="replace") if path.exists() else ""


def start(*words: object, **faults: Any) -> Started:
    """``qlora WORDS`` in a process of its own, with the faults of ``_suffer``."""
    return Started(words, faults)


def run(*words: object, **faults: Any) -> Ended:
    return start(*words, **faults).wait()


# --- inside the process ------------------------------------------------------------------------------------------------


def _suffer(words: list[str], place: str, faults: dict[str, Any]) -> None:
    for name, number in (("out", 1), ("err", 2)):
        os.dup2(os.open(f"{place}/{name}", os.O_WRONLY | os.O_CREAT), number)
    sys.stdout, sys.stderr = (os.fdopen(number, "w", buffering=1, errors="backslashreplace") for number in (1, 2))
    sys.stdin = open(os.devnull)  # noqa: SIM115
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a background job ignores it
    torch.set_num_threads(1)
    status = _with_faults(words, place, **faults)
    for stream in (sys.stdout, sys.stderr):
        try:
            stream.flush()
        except OSError:
            continue
    os._exit(status)


def _with_faults(
    words: list[str],
    place: str,
    *,
    at: tuple[str, int, int] | None = None,
    torn: bool = False,
    record: str = "",
    limit: int | None = None,
    environment: dict[str, str | None] | None = None,
    read_only: tuple[str, ...] = (),
    clock: bool = False,
    offline: bool = False,
    asked: str = "",
    deaf: bool = False,
    beside: str = "",
) -> int:
    """Prepare the faults, run the command, return its exit status.

    ``at``: (how an event's name begins, the how many-th of them, signal); ``torn``: what was about to be written then is
    written by half. ``record``: a file that gets the events. ``limit``: bytes that a file may have. ``environment``: variables,
    None for one that is unset. ``read_only``: folders that nobody can write into. ``clock``: the time of day jumps about.
    ``offline``: every try to connect is printed and fails. ``asked``: its standard input. ``deaf``: nobody reads its standard
    error any more. ``beside``: the current folder.
    """
    if read_only and not _made_read_only(read_only):
        return NO_MOUNTS
    if asked:
        (Path(place) / "in").write_text(asked)
        sys.stdin = (Path(place) / "in").open()
    for name, value in (environment or {}).items():
        os.environ.pop(name, None) if value is None else os.environ.update({name: value})
    if beside:
        os.chdir(beside)
    if clock:
        true, calls = time.time, iter(range(10**9))
        time.time = lambda: true() + 3600.0 * (-5, 7, 0, -90000, 40000)[next(calls) % 5]
    if offline:
        _cut_off()
    if limit is not None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, resource.RLIM_INFINITY))
    if at or record:
        _watch_files(at, torn, record)
    if deaf:
        read, write = os.pipe()
        os.dup2(write, 2)
        os.close(read)
        os.close(write)
    return cli.main(words)


def _watch_files(at: tuple[str, int, int] | None, torn: bool, record: str) -> None:
    """Send this process a signal at the event that is due: a file is about to be opened for writing, renamed, flushed, …"""
    seen = 0
    log = open(record, "w", buffering=1) if record else None  # noqa: SIM115
    serialize, write_line, fsync = safetensors.torch.serialize_file, MetricsLog.write, os.fsync

    def due(what: str, half: Callable[[], object] | None = None) -> None:
        nonlocal seen
        if log is not None:
            log.write(what + "\n")
        if at is None or not what.startswith(at[0]):
            return
        seen += 1
        if seen == at[1]:
            if torn and half is not None:
                half()
            os.kill(os.getpid(), at[2])

    def hear(event: str, arguments: tuple[Any, ...]) -> None:
        if event == "open" and isinstance(arguments[2], int) and arguments[2] & (os.O_WRONLY | os.O_RDWR):
            due(f"open {Path(os.fsdecode(arguments[0])).name}" if not isinstance(arguments[0], int) else "open")
        elif event in ("os.rename", "os.remove", "os.rmdir", "os.mkdir"):
            due(f"{event.removeprefix('os.')} {Path(os.fsdecode(arguments[0])).name}")

    def serialized(tensors: Any, path: Any, metadata: Any = None) -> None:
        def half() -> None:
            serialize(tensors, path, metadata)
            os.truncate(path, os.stat(path).st_size // 2)

        due(f"tensors {Path(path).name}", half)
        serialize(tensors, path, metadata)

    def line(log: Any, values: Any) -> None:
        def half() -> None:
            with log.path.open("a", encoding="utf-8") as file:
                file.write(json.dumps(dict(values))[:20])

        due("line", half)
        write_line(log, values)

    def flushed(handle: int) -> None:
        due("flush")
        fsync(handle)

    sys.addaudithook(hear)
    safetensors.torch.serialize_file = serialized
    MetricsLog.write, os.fsync = line, flushed  # type: ignore[method-assign, assignment]


def _made_read_only(folders: tuple[str, ...]) -> bool:
    """In this process alone: mounts of its own where the system allows them, else by rights, which root has anyway."""
    new_mounts = 0x20000
    if ctypes.CDLL(None).unshare(new_mounts) == 0:
        script = (
            'mount --make-rprivate /; for f in "$@"; do mount --bind "$f" "$f" && mount -o remount,bind,ro "$f"; done'
        )
        return subprocess.run(["sh", "-ec", script, "sh", *folders], capture_output=True, check=False).returncode == 0
    if not os.geteuid():
        return False
    for folder in folders:
        Path(folder).chmod(0o555)
    return True


def _cut_off() -> None:
    import socket

    def refused(*arguments: Any, **_: Any) -> None:
        print(f"CONNECTS {arguments[1:]}", file=sys.stderr, flush=True)
        raise OSError(101, "Network is unreachable")

    socket.socket.connect = refused  # type: ignore[assignment, method-assign]
    socket.getaddrinfo = refused  # type: ignore[assignment]
