"""Rendering: a stranger's chat template runs in a process of its own, and is cut off when it loops or explodes.

    this process  ── jobs: messages, tools, cuts ──►  child: transformers' sandbox, no files
                  ◄── one text for each cut ────────  10 s and 1 GiB at most, and 16 Mi characters

A template is a program that comes with a model. The sandbox keeps it from Python; nothing in it keeps ``{% for %}`` in
``{% for %}`` from going on for ever, or ``'a' * 10 ** 10`` from taking the memory. The child is forked where that is sound
(Linux without a GPU in use: nothing to load again) and begun anew elsewhere. Both speak JSON: nothing is unpickled. A forked one lives as long as a
``with`` block or a single call, so that no copy of memory stays behind while a model trains; one begun anew takes seconds to
load and lives as long as its renderer.

Knows processes, pipes and limits; must not know what a text means.
"""

from __future__ import annotations

import contextlib
import faulthandler
import gc
import json
import os
import signal
import subprocess
import sys
import threading
import warnings
import weakref
from collections.abc import Mapping, Sequence
from typing import Any, BinaryIO, NamedTuple, Protocol, Self

from qlora.errors import DataError

SECONDS = 10.0
"""What a rendering may compute, in seconds of its own: a busy or suspended machine cuts nothing off."""
MEMORY = 2**30
"""Bytes that the child may take beyond what it begins with. Windows and macOS do not bound it."""
CHARACTERS = 2**24
"""The longest text, beyond the length of what it is made from."""

_BUFFER = 2**18  # bytes; replies leave the child in few pieces
_REASON = 500  # characters of a template's own complaint


class Refused(Exception):
    """The template raised an exception of its own: it does not take the conversation of job number ``job``, from 0.

    ``line``: of a syntax error.
    """

    def __init__(self, reason: str, job: int = 0, line: int | None = None) -> None:
        super().__init__(reason)
        self.job, self.line = job, line


class CutOff(Exception):
    """The template was stopped at job number ``job``. The message says why, as in ``it computed for more than 10 s``."""

    def __init__(self, reason: str, job: int = 0) -> None:
        super().__init__(reason)
        self.job = job


class Job(NamedTuple):
    """A conversation to render: once for each of ``cuts``, its first n messages with or without a generation prompt.

    Messages and tools hold JSON values; there is a message before every cut.
    """

    messages: Sequence[Mapping[str, Any]]
    tools: Sequence[Mapping[str, Any]] | None
    cuts: Sequence[tuple[int, bool]]


class Rendered(NamedTuple):
    """A text, and the (begin, end) characters of its ``{% generation %}`` blocks where they were asked for."""

    text: str
    answers: list[tuple[int, int]]


class Renderer:
    """Renders one template; ``variables`` are the special tokens by name, and what else the template may read.

    Within a ``with`` block all calls share one child; without, each has its own where children are forked. After a cut-off the
    next call begins another.
    """

    def __init__(self, template: str, variables: Mapping[str, Any]) -> None:
        self._setup = {"template": template, "variables": dict(variables)}
        self._child: _Child | None = None
        self._process = 0
        self._users = 0
        self._lock = threading.RLock()

    def __enter__(self) -> Self:
        self._lock.acquire()
        self._users += 1
        return self

    def __exit__(self, *_: object) -> None:
        self._users -= 1
        if not self._users and not isinstance(self._child, _Begun):
            self._end()
        self._lock.release()

    def render(self, jobs: Sequence[Job], mark_answers: bool = False) -> list[list[Rendered]]:
        """The texts of each job, one for each of its cuts.

        Raises Refused for what the template raises, and CutOff when it is stopped, each at the first such job.
        """
        request = _packed({"jobs": jobs, "mark_answers": mark_answers})
        done: list[list[Rendered]] = []
        with self:
            child = self._started()
            try:
                child.requests.write(request)
                child.requests.flush()
                for job in jobs:
                    done.append([self._received(child, len(request), len(done)) for _ in job.cuts])
            except Refused:
                raise  # the child has left this request and waits for the next
            except (
                BrokenPipeError,
                EOFError,
                ValueError,
                LookupError,
                TypeError,
                RecursionError,
            ):  # or it makes no sense
                child.kill()
                why = _why(child.wait())
                self._end()
                raise CutOff(why, len(done)) from None
            except BaseException:  # Ctrl-C: what the child still says belongs to this request
                self._end()
                raise
        return done

    def text(
        self, messages: Sequence[Mapping[str, Any]], tools: Any = None, add_generation_prompt: bool = False
    ) -> str:
        """The text of all messages. Raises as ``render``."""
        return self.render([Job(messages, tools, [(len(messages), add_generation_prompt)])])[0][0].text

    def _started(self) -> _Child:
        if self._process != os.getpid():  # a process that was forked off shares its parent's pipe, and must not
            self._child, self._process = None, os.getpid()
        if self._child is None:
            try:
                self._child = _forked() if sys.platform == "linux" and not _on_gpu() else _begun()
                if isinstance(self._child, _Begun):
                    weakref.finalize(self, _ended, self._child)
                self._child.requests.write(_packed(self._setup))
            except OSError as error:
                self._end()
                raise DataError(
                    f"No process can be started to render the chat template in ({error}); try again."
                ) from None
        return self._child

    def _received(self, child: _Child, asked: int, job: int) -> Rendered:
        reply = _unpacked(child.replies, 4 * (CHARACTERS + asked) + 2**20)  # UTF-8: at most 4 bytes a character
        if reply is None:
            raise EOFError
        if "cut" in reply:
            raise CutOff(str(reply["cut"]), job)
        if "refused" in reply:
            raise Refused(str(reply["refused"]), job, reply.get("line"))
        return Rendered(reply["text"], [(begin, end) for begin, end in reply["answers"]])

    def _end(self) -> None:
        """End the child at once; there is nothing in it to lose."""
        child, self._child = self._child, None
        if child is not None and self._process == os.getpid():
            _ended(child)


def _ended(child: _Child) -> None:
    child.kill()
    child.wait()
    for pipe in (child.requests, child.replies):
        with contextlib.suppress(OSError):  # what was not flushed has nobody to read it
            pipe.close()


# --- frames: eight bytes of length, then JSON ---------------------------------------------------------------------------


_encode, _decode = json.JSONEncoder(ensure_ascii=False).encode, json.JSONDecoder().decode


def _packed(values: Mapping[str, Any]) -> bytes:
    content = _encode(values).encode(errors="surrogatepass")
    return len(content).to_bytes(8, "big") + content


def _unpacked(pipe: BinaryIO, longest: int | None = None) -> dict[str, Any] | None:
    """The next frame; None at the end, and for a frame beyond ``longest`` bytes."""
    head = pipe.read(8)
    size = int.from_bytes(head, "big")
    if len(head) < 8 or (longest is not None and size > longest):
        return None
    content = pipe.read(size)
    return _decode(content.decode(errors="surrogatepass")) if len(content) == size else None


def _why(status: int) -> str:
    """How a child ended that did not say so itself. ``status``: as subprocess has it, signals below zero."""
    if status == -getattr(signal, "SIGPROF", 0) or (status == 1 and not hasattr(signal, "setitimer")):
        return f"it computed for more than {SECONDS:g} s"
    return f"its process ended ({f'signal {-status}' if status < 0 else f'exit status {status}'})"


# --- the child ----------------------------------------------------------------------------------------------------------


class _Child(Protocol):
    """A process at the other end of two pipes."""

    requests: BinaryIO
    replies: BinaryIO

    def kill(self) -> None: ...

    def wait(self) -> int: ...


class _Forked:
    """A forked child, by its number."""

    def __init__(self, number: int, requests: BinaryIO, replies: BinaryIO) -> None:
        self.number, self.requests, self.replies = number, requests, replies
        self.status: int | None = None

    def kill(self) -> None:
        if self.status is None:  # one that has ended already keeps the status that it ended with
            os.kill(self.number, signal.SIGKILL)

    def wait(self) -> int:
        if self.status is None:
            self.status = os.waitstatus_to_exitcode(os.waitpid(self.number, 0)[1])
        return self.status


class _Begun:
    """A child with an interpreter of its own."""

    def __init__(self) -> None:
        code = "from qlora.data.rendering import main; main()"
        process = subprocess.Popen(
            [sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL
        )
        assert process.stdin is not None
        assert process.stdout is not None
        self.process = process
        self.requests: BinaryIO = process.stdin  # type: ignore[assignment]
        self.replies: BinaryIO = process.stdout  # type: ignore[assignment]

    def kill(self) -> None:
        self.process.kill()

    def wait(self) -> int:
        return int(self.process.wait())


def _on_gpu() -> bool:
    """Whether this process has page-locked memory, perhaps: a fork copies such pages at once, and they may be half a model."""
    torch = sys.modules.get("torch")
    return torch is not None and bool(torch.cuda.is_initialized())


def _begun() -> _Child:
    return _Begun()


def _forked() -> _Child:
    from qlora.data.sandbox import prepare

    prepare()
    theirs, ours = os.pipe()
    mine, its = os.pipe()
    # Nothing may reach the child before it has taken its leave of what the parent does at a signal.
    blocked = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT, signal.SIGTERM})
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)  # of threads: the child calls nothing that has any
            try:
                number = os.fork()
            except OSError:
                os.close(ours)
                os.close(mine)
                raise
        if number == 0:
            try:
                _leave_parent(theirs, its)
                _serve(open(theirs, "rb"), open(its, "wb", _BUFFER))  # noqa: SIM115
            except BaseException:
                os._exit(1)
            os._exit(0)
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, blocked)
        os.close(theirs)
        os.close(its)
    return _Forked(number, open(ours, "wb"), open(mine, "rb"))


def _leave_parent(*kept: int) -> None:
    """Let go of what a forked child has of its parent's and must not touch: handlers, garbage, open files, locks on them."""
    for number in (signal.SIGTERM, signal.SIGPROF):
        signal.signal(number, signal.SIG_DFL)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the whole group; the parent ends the child itself
    signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT, signal.SIGTERM, signal.SIGPROF})
    gc.freeze()  # a temporary folder of the parent's that is garbage here is none there
    nothing = os.open(os.devnull, os.O_RDWR)
    for standard in range(3):
        os.dup2(nothing, standard)
    for handle in map(int, os.listdir("/proc/self/fd")):
        if handle > 2 and handle not in kept:
            with contextlib.suppress(OSError):  # the listing's own is closed already
                os.close(handle)


def main() -> None:
    """The child of systems that do not fork, at its standard input and output."""
    from qlora.data.sandbox import prepare

    signal.signal(signal.SIGINT, signal.SIG_IGN)
    prepare()
    _serve(sys.stdin.buffer, sys.stdout.buffer)


def _serve(requests: BinaryIO, replies: BinaryIO) -> None:
    """Answer requests until the parent closes the pipe, or ends."""
    watch = None if hasattr(signal, "setitimer") else open(os.devnull, "w")  # noqa: SIM115
    _limit()
    setup = _unpacked(requests)
    while setup is not None and (request := _unpacked(requests)) is not None:
        for job in request["jobs"]:
            fine = _answer(replies, setup, job, request["mark_answers"], watch)
            replies.flush()  # what is left in here is lost when the next job is cut off, and with it which one it was
            if not fine:
                break


def _answer(replies: BinaryIO, setup: dict[str, Any], job: list[Any], mark_answers: bool, watch: Any) -> bool:
    """Write a reply for every cut of a job, up to the first that has no text: False."""
    messages, tools, cuts = job
    for count, prompt in cuts:
        _start_clock(watch)
        reply = _reply(setup, messages[:count], tools, prompt, mark_answers)
        _stop_clock(watch)
        replies.write(_packed(reply))
        if "text" not in reply:
            return False
    return True


def _reply(setup: dict[str, Any], messages: Any, tools: Any, prompt: bool, mark_answers: bool) -> dict[str, Any]:
    import jinja2

    from qlora.data.sandbox import render

    try:
        text, answers = render(setup["template"], setup["variables"], messages, tools, prompt, mark_answers)
        if len(text) > CHARACTERS and len(text) > CHARACTERS + len(json.dumps([messages, tools])):
            return {"cut": f"it wrote {len(text):,} characters"}
        text.encode()
        return {"text": text, "answers": answers}
    except jinja2.TemplateSyntaxError as error:
        return {"refused": _reason(error), "line": error.lineno}
    except MemoryError:
        return {"cut": f"it needed more than {MEMORY / 2**30:g} GiB of memory"}
    except UnicodeEncodeError:
        return {"refused": "it wrote a lone surrogate, which is no text"}
    except Exception as error:  # a template is a program of its author's: any exception means that it refuses
        return {"refused": _reason(error)}


def _reason(error: Exception) -> str:
    found = str(error).encode(errors="replace").decode().strip().rstrip(".") or type(error).__name__
    return found if len(found) <= _REASON else found[:_REASON] + "…"


def _limit() -> None:
    """Take from this process what rendering does not need: more memory, files, sockets, processes."""
    try:
        import resource
    except ImportError:  # Windows
        return
    with contextlib.suppress(OSError):  # without /proc nobody knows what it has
        with open("/proc/self/statm", encoding="ascii") as file:
            pages = int(file.read().split()[0])
        allowed = pages * resource.getpagesize() + MEMORY
        _, most = resource.getrlimit(resource.RLIMIT_AS)
        if most == resource.RLIM_INFINITY or most > allowed:
            resource.setrlimit(resource.RLIMIT_AS, (allowed, allowed))
    for limit in (resource.RLIMIT_CORE, resource.RLIMIT_FSIZE, resource.RLIMIT_NPROC, resource.RLIMIT_NOFILE):
        resource.setrlimit(limit, (0, 0))


def _start_clock(watch: Any) -> None:
    """From here on the kernel, or a thread that needs no interpreter, ends this process after ``SECONDS``."""
    if watch is None:
        signal.setitimer(signal.ITIMER_PROF, SECONDS)
    else:
        faulthandler.dump_traceback_later(SECONDS, exit=True, file=watch)


def _stop_clock(watch: Any) -> None:
    if watch is None:
        signal.setitimer(signal.ITIMER_PROF, 0)
    else:
        faulthandler.cancel_dump_traceback_later()
