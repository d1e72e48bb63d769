"""Hostile files: every reader of strangers' bytes, fuzzed by hypothesis and by atheris, which is guided by coverage.

    one process imports everything, qlora (and PyYAML) instrumented ► forks one child for each parser and engine
    child: bytes ► read ► nothing, or a QloraError of bounded length; else a failure, kept in found.jsonl

A failure is any other exception, an input that takes more than 2 s, memory beyond the parser's bound, a file written outside
of the input's own folder, a process started, a socket connected, anything unpickled: Python's audit events tell of each.
Knows engines and counts; must not know what a parser reads.

    python -m benchmarks.survive.fuzz PLACE [--small] [--only PARSER]
"""

from __future__ import annotations

import argparse
import contextlib
import json
import mmap
import os
import resource
import shutil
import signal
import struct
import subprocess
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from random import Random
from typing import Any

from benchmarks.survive.size import Size

SLOW = 2.0  # seconds of a core that one input may take
HANGS = 60  # seconds on the clock, which other processes share, after which one input counts as hanging
KINDS = ("hypothesis", "atheris")
INPUTS = {"hypothesis": (25, 400), "atheris": (100, 16_000)}  # of each parser, times its share: (small, full)
LIMIT = 1200  # seconds of one child, after which it counts as hanging
COUNTERS = struct.Struct("<qqd")  # inputs, failures, when the present input began (0 between inputs)


def run(place: Path, size: Size, say: Callable[[str], None], only: str = "") -> list[dict[str, Any]]:
    """Fuzz every parser, or those with ``only`` in their names, with both engines below ``place``.

    A row for each: parser, engine, inputs, seconds, failures, peak_memory_mib (by which the process grew).

    Raises ModuleNotFoundError where an engine is not installed: half of the inputs would be missing without a word.
    """
    import atheris  # noqa: F401
    import hypothesis  # noqa: F401

    place.mkdir(parents=True, exist_ok=True)
    command = [
        sys.executable,
        "-m",
        "benchmarks.survive.fuzz",
        str(place.resolve()),
        f"--only={only}",
        *(["--small"] if size.small else []),
    ]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "HF_HUB_OFFLINE": "1"}
    rows = []
    with subprocess.Popen(
        command, cwd=Path(__file__).parents[2], env=environment, stdout=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout is not None
        for line in process.stdout:
            if line.startswith('{"parser"'):
                rows.append(json.loads(line))
                say("{parser}, {engine}: {inputs:,} inputs, {failures} failures, {seconds:.0f} s".format(**rows[-1]))
    if process.returncode != 0:
        raise RuntimeError(f"the fuzzing process ended with {process.returncode} after {len(rows)} rows")
    return rows


def main(words: list[str] | None = None) -> None:
    """Import everything once, instrumented, then fork a child for each parser and engine, and print a row for each."""
    parser = argparse.ArgumentParser()
    parser.add_argument("place", type=Path)
    parser.add_argument("--small", action="store_true")
    parser.add_argument("--only", default="")
    chosen = parser.parse_args(words)
    import atheris
    import hypothesis  # noqa: F401  (here, so that it is not imported once more in each child)

    with atheris.instrument_imports(include=["qlora", "yaml"], enable_loader_override=False):
        import yaml  # noqa: F401

        from tests.hostile import changes  # noqa: F401
        from tests.hostile.parsers import PARSERS
    sys.addaudithook(_watch)
    for target in PARSERS:
        for engine in KINDS:
            if chosen.only in target.name:
                few, many = INPUTS[engine]
                count = Size(chosen.small).of(few, max(100, round(many * target.share)))
                print(json.dumps(_row(target, engine, count, chosen.place)), flush=True)


def _row(target: Any, engine: str, count: int, place: Path) -> dict[str, Any]:
    """Fuzz in a child, and count what it did, however it ended."""
    folder = place / f"{target.name} {engine}".replace(" ", "_").replace(".", "")
    shutil.rmtree(folder, ignore_errors=True)
    (folder / "input").mkdir(parents=True)
    target.prepare(folder / "input")
    for content in target.seeds:  # here, so that what is imported late is imported once
        with contextlib.suppress(Exception):
            target.read(folder / "input", content)
    shared = mmap.mmap(-1, COUNTERS.size)
    began = time.monotonic()
    child = os.fork()
    if child == 0:
        try:
            resource.setrlimit(resource.RLIMIT_AS, (_memory("VmSize") * 1024 + target.memory_mib * 1024**2,) * 2)
            resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
            _Trial(target, folder, shared).fuzz(engine, count)
            os._exit(0)
        except BaseException:
            traceback.print_exc()
            os._exit(99)
    status, stuck = _wait(child, shared, LIMIT)
    inputs, failures, _ = COUNTERS.unpack(shared[:])
    peak = _peak_of(folder)
    if status != 0:  # it died: a crash in native code, no end, or too much memory
        failures += 1
        print(f"{target.name}, {engine}: {'hung' if stuck else 'ended'} ({status})", file=sys.stderr)
    return {
        "parser": target.name,
        "engine": engine,
        "inputs": inputs,
        "seconds": round(time.monotonic() - began, 1),
        "failures": failures,
        "peak_memory_mib": peak,
    }


def _wait(child: int, shared: mmap.mmap, limit: float) -> tuple[int, bool]:
    """The exit status of a child, which is killed when one input does not end, or all take too long."""
    end = time.monotonic() + limit
    while True:
        done, status = os.waitpid(child, os.WNOHANG)
        if done:
            return status, False
        since = COUNTERS.unpack(shared[:])[2]
        if time.monotonic() > end or (since and time.monotonic() - since > HANGS):
            os.kill(child, signal.SIGKILL)
            return os.waitpid(child, 0)[1], True
        time.sleep(0.05)


class _Trial:
    """One parser in one process."""

    def __init__(self, target: Any, folder: Path, shared: mmap.mmap) -> None:
        self.target, self.folder, self.shared, self.before = target, folder, shared, _memory("VmRSS")
        self.inputs = self.failures = 0
        self.names = sorted(os.listdir(folder))
        _watched.folder = str((folder / "input").resolve())

    def fuzz(self, engine: str, count: int) -> None:
        """Never returns with atheris: libFuzzer ends the process."""
        (self._hypothesis if engine == "hypothesis" else self._atheris)(count)

    def _hypothesis(self, count: int) -> None:
        from hypothesis import HealthCheck, Phase, given, seed, settings

        from tests.hostile.changes import changed

        @seed(0)
        @settings(
            max_examples=count,
            database=None,
            deadline=None,
            phases=[Phase.generate],
            suppress_health_check=list(HealthCheck),
        )
        @given(changed(self.target.seeds))
        def each(content: bytes) -> None:
            self.one(content)

        each()

    def _atheris(self, count: int) -> None:
        import atheris

        from tests.hostile.changes import TOKENS, change

        def mutate(content: bytes, most: int, seed: int) -> bytes:
            made = change(Random(seed), content) if seed % 2 else atheris.Mutate(content, most)
            return made[:most]

        corpus, found = self.folder / "corpus", self.folder / "found"
        corpus.mkdir()
        found.mkdir()
        self.names = sorted(os.listdir(self.folder))
        for number, content in enumerate(self.target.seeds):
            (corpus / str(number)).write_bytes(content)
        dictionary = self.folder / "input" / ".dictionary"
        quoted = ("".join(f"\\x{byte:02x}" for byte in token) for token in TOKENS if len(token) <= 64)
        dictionary.write_text("".join(f'"{token}"\n' for token in quoted))
        words = [
            "fuzz", f"-runs={count}", "-seed=1", f"-max_len={self.target.longest}", "-len_control=0", f"-dict={dictionary}", "-verbosity=0",
            f"-artifact_prefix={found}/", f"-timeout={HANGS}", "-rss_limit_mb=0", "-print_final_stats=0", str(corpus),
        ]  # fmt: skip
        os.dup2(os.open(os.devnull, os.O_WRONLY), 2)  # libFuzzer's own lines; what failed is in found.jsonl
        atheris.Setup(words, self.one, custom_mutator=mutate)
        atheris.Fuzz()

    def one(self, content: bytes) -> None:
        """Read one input and judge what happened."""
        self.inputs += 1
        self.shared[:] = COUNTERS.pack(self.inputs, self.failures, time.monotonic())
        began = time.process_time()
        _watched.seen.clear()
        _watched.on = True
        wrong = None
        try:
            self.target.read(self.folder / "input", content)
        except Exception as error:
            _watched.on = False
            wrong = _judged(error)
        except BaseException as error:  # a panic of Rust
            _watched.on = False
            wrong = f"{type(error).__name__}: {error}"
        finally:
            _watched.on = False
        seconds = time.process_time() - began
        if seconds > SLOW:
            wrong = f"it took {seconds:.1f} s"
        if _watched.seen:
            wrong = f"it did what a parser must not: {_watched.seen[0]}"
        if self.inputs % 64 == 1:
            if sorted(os.listdir(self.folder)) != self.names:
                wrong = "files were made beside the input's folder"
            (self.folder.parent / f"{self.folder.name}.peak").write_text(str((_memory("VmHWM") - self.before) // 1024))
        if wrong is not None:
            self.failures += 1
            with (self.folder.parent / f"{self.folder.name}.found.jsonl").open("a") as file:
                file.write(json.dumps({"what": wrong, "input": content.decode("latin1")}) + "\n")
        self.shared[:] = COUNTERS.pack(self.inputs, self.failures, 0.0)


def _judged(error: Exception) -> str | None:
    from qlora.errors import QloraError
    from tests.hostile.parsers import LONGEST

    if isinstance(error, QloraError):
        return (
            None if len(str(error)) <= LONGEST else f"a message of {len(str(error)):,} characters: {str(error)[:200]}"
        )
    last = traceback.extract_tb(error.__traceback__)[-1]
    return f"{type(error).__name__}: {str(error)[:300]} ({Path(last.filename).name}:{last.lineno})"


class _Watched:
    """What the present input made Python do."""

    on = False
    folder = ""
    seen: list[str] = []  # noqa: RUF012


_watched = _Watched()
_WRITES = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND
_NEVER = (
    "subprocess.", "os.system", "os.exec", "os.posix_spawn", "os.fork", "socket.connect", "socket.getaddrinfo", "pickle.",
    "os.kill", "ftplib.", "smtplib.", "urllib.", "webbrowser.", "shutil.rmtree",
)  # fmt: skip
_CHANGES = ("os.remove", "os.rename", "os.rmdir", "os.mkdir", "os.symlink", "os.link", "os.truncate", "os.chmod")


def _watch(event: str, arguments: tuple[Any, ...]) -> None:
    """Python's audit hook: called for what could leave the folder of the input."""
    if not _watched.on:
        return
    if event == "open":
        path, _, flags = arguments
        if isinstance(flags, int) and flags & _WRITES and not _inside(path):
            _watched.seen.append(f"opened {path!r:.200} to write")
    elif event in _CHANGES:
        if not _inside(arguments[0]):
            _watched.seen.append(f"{event} {arguments!r:.200}")
    elif event.startswith(_NEVER):
        _watched.seen.append(f"{event} {arguments!r:.200}")


def _inside(path: object) -> bool:
    if isinstance(path, int):  # a file that is open already
        return True
    text = os.path.realpath(os.fsdecode(path))  # type: ignore[arg-type]
    return text.startswith(_watched.folder + os.sep) or text == os.devnull


def _memory(kind: str) -> int:
    """A line of this process's status, in KiB."""
    return next(int(line.split()[1]) for line in Path("/proc/self/status").read_text().splitlines() if kind in line)


def _peak_of(folder: Path) -> int:
    path = folder.parent / f"{folder.name}.peak"
    return int(path.read_text()) if path.is_file() else 0


if __name__ == "__main__":
    main()
