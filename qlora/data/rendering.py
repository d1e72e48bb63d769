"""Rendering: a stranger's chat template runs in a process of its own, and is cut off when it loops or explodes.

    this process  ── jobs: messages, tools, cuts ──►  child (sandbox.py): transformers' sandbox, no files
                  ◄── one text for each cut ────────  10 s and 1 GiB at most, and 16 Mi characters

A template is a program that comes with a model. The sandbox keeps it from Python; nothing in it keeps ``{% for %}`` in
``{% for %}`` from going on for ever, or ``'a' * 10 ** 10`` from taking the memory. The child is a fresh interpreter on every
system and speaks JSON, a line each way: nothing is unpickled. One child serves all templates; it takes half a second to start,
60 MB, and ends with the outermost ``with one_child()``, so that none is left while a model trains.

Knows processes, pipes and limits; must not know what a text means.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, NamedTuple

from qlora.errors import DataError

SECONDS = 10.0
"""What a rendering may compute, in seconds of its own: a busy or suspended machine cuts nothing off."""
MEMORY = 2**30
"""Bytes that the child may take beyond what it begins with. Windows and macOS do not bound it."""
CHARACTERS = 2**24
"""The longest text, beyond the length of what it is made from."""


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

    messages: Sequence[Mapping[str, object]]
    tools: Sequence[Mapping[str, object]] | None
    cuts: Sequence[tuple[int, bool]]


class Rendered(NamedTuple):
    """A text, and the (begin, end) characters of its ``{% generation %}`` blocks where they were asked for."""

    text: str
    answers: list[tuple[int, int]]


class Renderer(NamedTuple):
    """Renders one template; ``variables`` are the special tokens by name, and what else the template may read."""

    template: str
    variables: Mapping[str, object]

    def render(self, jobs: Sequence[Job], mark_answers: bool = False) -> list[list[Rendered]]:
        """The texts of each job, one for each of its cuts.

        Raises Refused for what the template raises, and CutOff when it is stopped, each at the first such job.
        """
        request = {**self._asdict(), "mark_answers": mark_answers, "jobs": jobs}
        with one_child():
            return _CHILD.ask(json.dumps(request).encode() + b"\n", [len(job.cuts) for job in jobs])

    def text(
        self,
        messages: Sequence[Mapping[str, object]],
        tools: Sequence[Mapping[str, object]] | None = None,
        add_generation_prompt: bool = False,
    ) -> str:
        """The text of all messages. Raises as ``render``."""
        return self.render([Job(messages, tools, [(len(messages), add_generation_prompt)])])[0][0].text


@contextmanager
def one_child() -> Iterator[None]:
    """Inside, all renderings share one child; it ends behind the outermost block. After a cut-off the next one begins another."""
    with _CHILD.lock:
        _CHILD.users += 1
    try:
        yield
    finally:
        with _CHILD.lock:
            _CHILD.users -= 1
            if not _CHILD.users:
                _CHILD.end()


class _Child:
    """The process that renders, begun when it is first asked."""

    def __init__(self) -> None:
        self.process: subprocess.Popen[bytes] | None = None
        self.owner = self.users = 0
        self.lock = threading.RLock()

    def ask(self, request: bytes, counts: Sequence[int]) -> list[list[Rendered]]:
        """Send a request and receive the texts of its jobs, ``counts`` of each."""
        done: list[list[Rendered]] = []
        with self.lock:
            requests, replies = self._pipes()
            try:
                requests.write(request)
                requests.flush()
                longest = 12 * (CHARACTERS + len(request)) + 2**20  # twelve bytes for a fox: \ud83e\udd8a
                for count in counts:
                    reply = json.loads(replies.readline(longest))
                    if isinstance(reply, dict):
                        raise _failure(reply, len(done))
                    texts = [Rendered(text, [(begin, end) for begin, end in answers]) for text, answers in reply]
                    if len(texts) != count:
                        raise ValueError(count)
                    done.append(texts)
            except Refused:
                raise  # the child has left this request and waits for the next
            except (BrokenPipeError, ValueError, LookupError, TypeError, RecursionError):  # it ended, or makes no sense
                raise CutOff(_why(self.end()), len(done)) from None
            except BaseException:  # Ctrl-C: what the child still says belongs to this request
                self.end()
                raise
        return done

    def _pipes(self) -> tuple[IO[bytes], IO[bytes]]:
        if self.owner != os.getpid():  # a process that was forked off shares its parent's pipes, and must not
            self.process, self.owner = None, os.getpid()
        if self.process is None:
            program = [sys.executable, "-P", str(Path(__file__).with_name("sandbox.py"))]
            try:
                self.process = subprocess.Popen(
                    [*program, str(SECONDS), str(MEMORY), str(CHARACTERS)],
                    stdin=subprocess.PIPE,
                    stdout=subprocess.PIPE,
                    stderr=subprocess.DEVNULL,
                    start_new_session=True,  # Ctrl-C reaches the terminal's whole group; the parent ends the child itself
                )
            except OSError as error:
                raise DataError(
                    f"No process can be started to render the chat template in ({error}); try again."
                ) from None
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        return self.process.stdin, self.process.stdout

    def end(self) -> int:
        """End the child at once, there is nothing in it to lose; the status that it ended with."""
        process, self.process = self.process, None
        if process is None or self.owner != os.getpid():
            return 0
        process.kill()  # one that has ended already keeps the status that it ended with
        for pipe in (process.stdin, process.stdout):
            with suppress(OSError):  # what was not flushed has nobody to read it
                if pipe is not None:
                    pipe.close()
        return process.wait()


_CHILD = _Child()


def _failure(reply: Mapping[str, object], job: int) -> Refused | CutOff:
    """What a child says in place of texts, as an exception."""
    if "cut" in reply:
        return CutOff(str(reply["cut"]), job)
    line = reply.get("line")
    return Refused(str(reply["refused"]), job, line if isinstance(line, int) else None)


def _why(status: int) -> str:
    """How a child ended that did not say so itself. ``status``: as subprocess has it, signals below zero."""
    if status == -getattr(signal, "SIGPROF", 0) or (status == 1 and not hasattr(signal, "setitimer")):
        return f"it computed for more than {SECONDS:g} s"
    return f"its process ended ({f'signal {-status}' if status < 0 else f'exit status {status}'})"
