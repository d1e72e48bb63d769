"""Processes that are hit by a fault: at a time, or at an event.

    nurseries(2)             imports everything once, then forks a process for each command, hits it, and says how it ended

An event is the n-th time that the process is about to open a file for writing, rename, delete, flush or write one. Times find
what nobody thought of, events what is over in a microsecond. Knows the command line; must not know what a trainer does.
"""

from __future__ import annotations

import ctypes
import fcntl
import functools
import gc
import json
import os
import resource
import select
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from queue import SimpleQueue
from typing import Any, TypeVar

from benchmarks.survive.scene import row

LONGEST = 100.0  # seconds that a tiny run may take before it counts as hanging
Some = TypeVar("Some")
Task = TypeVar("Task")


@dataclass(frozen=True)
class Ended:
    """How a process ended: its status (negative: the signal that ended it), and what it wrote."""

    status: int
    output: str
    errors: str
    seconds: float
    process: int
    stopped: bool = False
    """Whether it only stands still and waits for ``Nursery.go_on``."""


class Nursery:
    """A process that has imported everything and forks a child a command. It ends with this one.

    Where the system allows it, its mounts are its own (``mounts``).
    """

    def __init__(self) -> None:
        prefix = next((words for words in (["unshare", "-m"], ["unshare", "-rm"]) if _works(*words, "true")), [])
        self.mounts = bool(prefix) and _works(*prefix, "mount", "-t", "tmpfs", "tmpfs", "/mnt")
        self.log = tempfile.NamedTemporaryFile("w+", prefix="nursery-")  # noqa: SIM115 (as long as the process)
        self.process = subprocess.Popen(
            [*(prefix if self.mounts else []), sys.executable, "-m", "benchmarks.survive.nursery"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self.log,
            text=True,
            cwd=Path(__file__).parents[2],
            env={**os.environ, "OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"},
        )

    def ask(self, **order: Any) -> Any:
        """Send an order to the process and return its answer."""
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self.process.stdin.write(json.dumps(order) + "\n")
        self.process.stdin.flush()
        answer = self.process.stdout.readline()
        if not answer:
            raise RuntimeError(f"the nursery died: {Path(self.log.name).read_text()[-2000:]}")
        return json.loads(answer)

    def warm(self, recipe: Path) -> None:
        """Plan a recipe inside: its children know then what one step of it takes, and need no dry run of their own."""
        self.ask(warm=str(recipe))

    def run(self, *words: object, **faults: Any) -> Ended:
        """``qlora WORDS`` in a process of its own, with ``faults`` (the keywords of ``_suffer`` and ``hits``).

        ``hits``: [(seconds after the verb began, number of a signal), …].
        """
        return self.together([words], **faults)[0]

    def together(self, commands: Sequence[Sequence[object]], **faults: Any) -> list[Ended]:
        """Several commands at the same moment, each in a process of its own."""
        words = [[str(word) for word in command] for command in commands]
        return [Ended(**values) for values in self.ask(commands=words, **faults)]

    def go_on(self, process: int) -> Ended:
        """Let a process that stands still go on, and wait until it ends."""
        return Ended(**self.ask(go_on=process))

    def shell(self, command: str) -> None:
        """Run a command where the children run. Raises RuntimeError when it fails."""
        if why := self.ask(shell=command):
            raise RuntimeError(why)

    def seen(self, path: Path) -> Path:
        """How this process sees a path of the children, whose mounts may be others."""
        return Path(f"/proc/{self.process.pid}/root") / path.absolute().relative_to("/")


_ALIVE: list[Nursery] = []


def nurseries(count: int) -> list[Nursery]:
    """So many nurseries; all that this process ever needed are kept, because to import everything takes its time."""
    while len(_ALIVE) < count:
        _ALIVE.append(Nursery())
    return _ALIVE[:count]


def _works(*words: str) -> bool:
    try:
        return subprocess.run(words, capture_output=True, check=False).returncode == 0
    except OSError:
        return False


def in_turns(nurseries: Sequence[Nursery], tasks: Sequence[Task], work: Callable[[Nursery, Task], Some]) -> list[Some]:
    """``work`` on every task, as many at once as there are nurseries; results in the order of the tasks."""
    free: SimpleQueue[Nursery] = SimpleQueue()
    for nursery in nurseries:
        free.put(nursery)

    def one(task: Task) -> Some:
        nursery = free.get()
        try:
            return work(nursery, task)
        finally:
            free.put(nursery)

    with ThreadPoolExecutor(len(nurseries)) as pool:
        return list(pool.map(one, tasks))


def row_of(
    fault: str,
    nurseries: Sequence[Nursery],
    trials: Sequence[Task],
    work: Callable[[Nursery, Task], str | None],
    say: Callable[[str], None],
) -> dict[str, Any]:
    """A line of the table: ``work`` on every trial, what each lost said at once."""

    def one(nursery: Nursery, trial: Task) -> str | None:
        if (lost := work(nursery, trial)) is not None:
            say(f"{fault}: {trial}: {lost}")
        return lost

    found = row(fault, in_turns(nurseries, trials, one))
    say(f"{fault}: {found['survived']} of {found['trials']} survived")
    return found


# --- inside the nursery ----------------------------------------------------------------------------------------------


def _serve() -> None:
    """Read orders from standard input and answer each on standard output."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # nothing else may write among the answers
    sys.path.insert(0, os.getcwd())
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    assert torch.get_num_threads() == 1  # threads do not live through a fork
    LlamaForCausalLM(
        LlamaConfig(hidden_size=8, intermediate_size=8, num_hidden_layers=1, vocab_size=8, num_attention_heads=1)
    )
    for line in sys.stdin:
        order = json.loads(line)
        if "shell" in order:
            done = subprocess.run(["sh", "-c", order["shell"]], capture_output=True, text=True, check=False)
            answer: Any = done.stderr or str(done.returncode) if done.returncode else ""
        elif "warm" in order:
            answer = _plan_once(order["warm"])
        elif "go_on" in order:
            os.kill(order["go_on"], signal.SIGCONT)
            answer = _watch([order["go_on"]], [], time.monotonic())[0]
        else:
            answer = _bear(**order)
        answers.write(json.dumps(answer) + "\n")
        answers.flush()


def _plan_once(recipe: str) -> None:
    """Keep what a dry run finds for every model and shape; the seconds that it takes are no part of a run's risks."""
    from qlora.planning import memory
    from qlora.planning.plan import plan
    from qlora.recipe import Recipe

    if memory.dry_run.__name__ == "remembered":
        return
    dry_run, known = memory.dry_run, dict[Any, Any]()

    def remembered(adapted: Any, shape: Any, device: str) -> Any:
        key = str((shape, device, adapted.section))  # all models here are the same
        if key not in known:
            known[key] = dry_run(adapted, shape, device)
        return known[key]

    memory.dry_run = remembered
    plan(Recipe.from_yaml(recipe))
    gc.collect()
    gc.freeze()  # the children need not look through all that was imported


_OUTPUTS: dict[int, list[int]] = {}
"""Of each child the ends of its standard output's and standard error's pipes."""


def _bear(commands: list[list[str]], hits: Sequence[tuple[float, int]] = (), **faults: Any) -> list[dict[str, Any]]:
    """Fork a child a command, hit them all, and wait for them."""
    ready, begun = os.pipe()
    barrier, gate = os.pipe()
    children = []
    for words in commands:
        pipes = [_wide_pipe(), _wide_pipe()]
        child = os.fork()
        if not child:
            os.close(gate)
            for (_, end), number in zip(pipes, (1, 2), strict=True):
                os.dup2(end, number)
            status = 70
            try:
                status = _suffer(words, begun, barrier, **faults)
            except BaseException:
                import traceback

                traceback.print_exc()
            finally:
                for stream in (sys.stdout, sys.stderr):
                    try:
                        stream.flush()
                    except (OSError, ValueError):
                        continue
                os._exit(status)
        children.append(child)
        _OUTPUTS[child] = [read for read, _ in pipes]
        for _, end in pipes:
            os.close(end)
    os.close(begun)
    os.close(barrier)
    os.close(gate)  # the gate opens
    select.select([ready], [], [], LONGEST)  # a byte: a verb began; end of file: all ended before one did
    begin = time.monotonic()
    ended = _watch(children, list(hits), begin)
    os.close(ready)
    return ended


def _wide_pipe() -> tuple[int, int]:
    """A pipe that holds all that a tiny run says. (A file would be hit by the limits on files.)"""
    read, write = os.pipe()
    fcntl.fcntl(read, fcntl.F_SETPIPE_SZ, 2**20)
    os.set_blocking(read, False)
    return read, write


def _said(child: int) -> tuple[str, str]:
    """What a child has written to standard output and standard error, which are closed."""
    found = []
    for read in _OUTPUTS.pop(child):
        try:
            found.append(os.read(read, 2**20).decode(errors="replace"))
        except BlockingIOError:  # nothing, and a grandchild holds the other end
            found.append("")
        os.close(read)
    return found[0], found[1]


def _watch(children: list[int], hits: list[tuple[float, int]], begin: float) -> list[dict[str, Any]]:
    """Wait until the children end or stand still, and send the signals whose time has come."""
    ended: dict[int, dict[str, Any]] = {}
    while len(ended) < len(children):
        now = time.monotonic() - begin
        for child in children:
            found, status = os.waitpid(child, os.WNOHANG | os.WUNTRACED) if child not in ended else (0, 0)
            if found:
                stands = os.WIFSTOPPED(status)
                code = 0 if stands else os.waitstatus_to_exitcode(status)
                output, errors = ("", "") if stands else _said(child)
                ended[child] = {"status": code, "seconds": now, "process": child, "stopped": stands}
                ended[child] |= {"output": output, "errors": errors}
        while hits and now >= hits[0][0]:
            _, number = hits.pop(0)
            for child in children:
                if child not in ended:
                    os.kill(child, number)
        if now > LONGEST:
            for child in children:
                if child not in ended:
                    os.kill(child, signal.SIGKILL)
                    os.waitpid(child, 0)
                    output, errors = _said(child)
                    ended[child] = {"status": 99, "seconds": now, "process": child, "output": output}
                    ended[child]["errors"] = f"it hangs: {errors[-500:]}"
        time.sleep(0.0005)
    return [ended[child] for child in children]


def _suffer(
    words: list[str],
    begun: int,
    barrier: int,
    *,
    at: dict[str, int] | None = None,
    torn: bool = False,
    watch: str = "",
    record: str = "",
    limit: int | None = None,
    fill: tuple[str, int, int] | None = None,
    user: int | None = None,
    environment: dict[str, str | None] | None = None,
    clock: bool = False,
    offline: bool = False,
    asked: str = "",
    deaf: bool = False,
    beside: str = "",
) -> int:
    """In the child: prepare the faults, run the command, return its exit status.

    ``at``: {number of an event: signal}; ``torn``: what was about to be written then is written by half. ``watch``: the
    folder whose events count; ``record``: a file that lists them. ``limit``: bytes that a file may have. ``fill``: (folder,
    bytes that its disk has left, from which event on). ``user``: whose rights it has. ``environment``: variables, None
    for one that is unset. ``clock``: the time of day jumps about. ``offline``: no connection can be made, and a try is
    printed. ``asked``: its standard input. ``deaf``: nobody reads its standard error any more. ``beside``:
    the current folder.
    """
    from qlora import cli

    if deaf:
        read, write = os.pipe()
        os.dup2(write, 2)
        os.close(read)
        os.close(write)
    sys.stdin = open(os.devnull)  # noqa: SIM115
    if asked:
        read, write = os.pipe()
        os.write(write, asked.encode())
        os.close(write)
        sys.stdin = os.fdopen(read)
    sys.stdout, sys.stderr = (os.fdopen(number, "w", buffering=1, errors="backslashreplace") for number in (1, 2))
    for name, value in (environment or {}).items():
        os.environ.pop(name, None) if value is None else os.environ.update({name: value})
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background job ignores it
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    if beside:
        os.chdir(beside)
    if clock:
        _jump()
    if offline:
        _cut_off()
    if limit is not None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, resource.RLIM_INFINITY))
    if user is not None:
        os.setgroups([])
        os.setgid(user)
        os.setuid(user)
    if watch:
        _Events({int(key): number for key, number in (at or {}).items()}, torn, watch, record, fill)
    verb = cli.VERBS.get(words[0])
    if verb is not None:

        @functools.wraps(verb)
        def begins(arguments: list[str]) -> int | None:
            os.write(begun, b".")
            return verb(arguments)

        cli.VERBS[words[0]] = begins
    os.read(barrier, 1)  # until the gate opens
    status = cli.main(words)
    for number in (signal.SIGINT, signal.SIGTERM):  # it is over; the interpreter's own end is not what is tried
        signal.signal(number, signal.SIG_IGN)
    return status


class _Events:
    """Counts what the process is about to do to files under a folder, and sends it a signal at the events that are due."""

    def __init__(
        self, at: dict[int, int], torn: bool, folder: str, record: str, fill: tuple[str, int, int] | None
    ) -> None:
        import safetensors.torch

        from qlora.runs import session, train
        from qlora.training.log import MetricsLog

        self.at, self.torn, self.folder, self.count, self.fill, self.busy = at, torn, folder, 0, fill, False
        self.record = open(record, "w", buffering=1) if record else None  # noqa: SIM115
        sys.addaudithook(self.hear)
        fsync, pwrite, fallocate = os.fsync, os.pwrite, os.posix_fallocate
        serialize, write_line = safetensors.torch.serialize_file, MetricsLog.write

        def flushed(handle: int) -> None:
            self.due("flush")
            fsync(handle)

        def written(handle: int, data: Any, offset: int) -> int:
            self.due("pwrite", lambda: pwrite(handle, data[: len(data) // 2], offset))
            return pwrite(handle, data, offset)

        def reserved(handle: int, offset: int, length: int) -> None:
            self.due("reserve")
            fallocate(handle, offset, length)

        def serialized(tensors: Any, path: Any, metadata: Any = None) -> None:
            def half() -> None:
                serialize(tensors, path, metadata)
                os.truncate(path, os.stat(path).st_size // 2)

            self.due(f"tensors {Path(path).name}", half)
            serialize(tensors, path, metadata)

        def line(log: Any, values: Any) -> None:
            def half() -> None:
                with log.path.open("a", encoding="utf-8") as file:
                    file.write(json.dumps(dict(values))[:20])

            self.due("line", half)
            write_line(log, values)

        measure, answers = train.score, session.answers

        def measured(model: Any, rows: Any, *others: Any) -> Any:
            self.due("measure", lambda: measure(model, rows[: len(rows) // 2], *others))
            return measure(model, rows, *others)

        def answered(model: Any, prompts: Any, length: int) -> Any:
            self.due("answer", lambda: answers(model, prompts, length // 2))
            return answers(model, prompts, length)

        train.score, session.answers = measured, answered
        os.fsync, os.pwrite, os.posix_fallocate = flushed, written, reserved  # type: ignore[assignment]
        safetensors.torch.serialize_file = serialized
        MetricsLog.write = line  # type: ignore[method-assign]

    def hear(self, event: str, arguments: tuple[Any, ...]) -> None:
        if event == "open":
            path, _, flags = arguments
            if isinstance(flags, int) and flags & (os.O_WRONLY | os.O_RDWR) and self.ours(path):
                self.due(f"open {Path(os.fsdecode(path)).name}")
        elif event in ("os.rename", "os.remove", "os.rmdir", "os.mkdir", "os.truncate"):
            path, inside = arguments[0], arguments[-1]
            if (
                event in ("os.remove", "os.rmdir") and inside >= 0
            ):  # shutil.rmtree gives an open folder and a name in it
                path = os.path.join(os.readlink(f"/proc/self/fd/{inside}"), path)
            if self.ours(path):
                self.due(f"{event.removeprefix('os.')} {Path(os.fsdecode(path)).name}")

    def ours(self, path: Any) -> bool:
        return isinstance(path, str | os.PathLike | bytes) and os.fsdecode(path).startswith(self.folder)

    def due(self, what: str, half: Callable[[], object] | None = None) -> None:
        if self.busy:
            return
        self.busy = True
        self.count += 1
        if self.fill is not None and self.count == self.fill[2]:
            _fill(*self.fill[:2])
        if self.record is not None:
            self.record.write(f"{self.count} {what}\n")
        number = self.at.pop(self.count, 0)
        if number:
            if self.torn and half is not None:
                half()
            os.kill(os.getpid(), number)
        self.busy = False


def _fill(folder: str, left: int) -> None:
    """Take what is free on the disk of ``folder`` but for ``left`` bytes."""
    free = shutil.disk_usage(folder).free
    handle = os.open(Path(folder) / "ballast", os.O_CREAT | os.O_WRONLY)
    if free > left:
        os.posix_fallocate(handle, 0, free - left)
    os.close(handle)


def _jump() -> None:
    """The time of day goes back and forth by hours; the monotonic clock, as on every system, does not."""
    true, calls = time.time, iter(range(10**9))
    time.time = lambda: true() + 3600.0 * (-5, 7, 0, -90000, 40000)[next(calls) % 5]


def _cut_off() -> None:
    """No network: a namespace without one where the system allows it, and every try to connect is printed and fails."""
    import socket

    clone_new_net = 0x40000000
    ctypes.CDLL(None).unshare(clone_new_net)

    def refused(*arguments: Any, **_: Any) -> None:
        print(f"CONNECTS {arguments[1:]}", file=sys.stderr, flush=True)
        raise OSError(101, "Network is unreachable")

    socket.socket.connect = refused  # type: ignore[assignment,method-assign]
    socket.getaddrinfo = refused  # type: ignore[assignment]


if __name__ == "__main__":
    _serve()
