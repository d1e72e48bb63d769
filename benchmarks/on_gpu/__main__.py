"""Everything that a short visit to a card can tell, in order of value, in at most 8.5 minutes; ``make gpu-check``.

    python -m benchmarks.on_gpu [--out runs/on-gpu] [--stage versions laws …] [--tiny]

Needs no network and no installed package of this project: it runs from a checkout. Each stage has its own limit, and none
stops the rest. Results are a few small files in ``--out``. ``--tiny`` rehearses every stage on any machine with tiny models.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).parents[2]


class Stage(NamedTuple):
    """A command, the seconds that it may take, and the file that its output goes to."""

    seconds: int
    file: str
    command: list[str]
    beside: str | None = None
    """The stage that runs at the same time; its numbers are no timings."""
    timed: bool = False


def stages(out: Path, work: Path, tiny: bool) -> dict[str, Stage]:
    """By name, in order."""
    python, small = sys.executable, ["--tiny"] if tiny else []
    qlora = [python, "-c", "from qlora.cli import entry; entry()"]
    speed = [python, "-m", "benchmarks.on_gpu.speed", *small]
    # the laws by their file: the rest of tests/ needs packages that are only for development
    laws = [python, "-m", "pytest", "tests/test_cuda.py", "-m", "gpu", "-n", "1" if tiny else "6", "-q", "-rsfEP",
            "--tb=short", "--durations=12", "-p", "no:cacheprovider"]  # fmt: skip
    every = {
        "versions": Stage(75, "check.log", ["bash", "-c", 'nvidia-smi; nproc; free -g; ulimit -l; "$@"', "-", *qlora, "doctor"]),
        "laws": Stage(170, "laws.log", laws),
        "end-to-end": Stage(170, "end-to-end.log",
                            [python, "-m", "benchmarks.on_gpu.end_to_end", str(work), str(out), *small], "laws"),
        "speed": Stage(150, "speed.md", [*speed, "--side", "qlora", "--profile", str(out / "profile.txt")], timed=True),
        "peft": Stage(90, "speed.md", [*speed, "--side", "peft"], timed=True),
        "streamed": Stage(110, "streamed.md", [python, "-m", "benchmarks.on_gpu.streamed", *small], timed=True),
    }  # fmt: skip
    # a rehearsal tells what falls over, not how long it takes, also where others share the cores
    return {name: stage._replace(seconds=stage.seconds * (4 if tiny else 1)) for name, stage in every.items()}


def run(name: str, stage: Stage, out: Path, begin: float) -> None:
    """One stage; whatever becomes of it, a line about it."""
    environment = {
        **os.environ, "PYTHONUNBUFFERED": "1", "PYTHONDONTWRITEBYTECODE": "1", "TOKENIZERS_PARALLELISM": "false",
        "HF_HUB_OFFLINE": "1", "TRANSFORMERS_VERBOSITY": "error",
        # one thread a core for a stage that is timed; those that share the machine would stand in each other's way
        **({} if stage.timed else {"OMP_NUM_THREADS": "2"}),
        "PYTHONPATH": os.pathsep.join(filter(None, [os.environ.get("PYTHONPATH"), str(ROOT)])),
    }  # fmt: skip
    at = time.monotonic()
    with (out / stage.file).open("ab") as file:
        process = subprocess.Popen(
            stage.command, cwd=ROOT, env=environment, stdout=file, stderr=file, start_new_session=True
        )
        try:
            ended = f"exit {process.wait(stage.seconds)}"
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, 9)
            process.wait()
            ended = f"stopped after its {stage.seconds} s"
    now = time.monotonic()
    line = f"[{now - begin:.0f} s] {name}: {ended}, {now - at:.0f} s"
    print(line, flush=True)
    with (out / "check.log").open("a", encoding="utf-8") as file:
        file.write(f"{line}\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("runs/on-gpu"))
    parser.add_argument("--stage", nargs="*")
    parser.add_argument("--tiny", action="store_true")
    options = parser.parse_args()
    out = options.out.absolute()
    out.mkdir(parents=True, exist_ok=True)
    begin = time.monotonic()
    with tempfile.TemporaryDirectory() as scratch:
        os.environ["QLORA_CACHE"] = str(Path(scratch) / "cache")
        every = stages(out, Path(scratch), options.tiny)
        wanted = {name: stage for name, stage in every.items() if name in (options.stage or every)}
        beside: list[threading.Thread] = []
        for name, stage in wanted.items():
            if beside and stage.beside is None:
                beside.pop().join()
            later = any(other.beside == name for other in wanted.values())
            if later:
                beside.append(threading.Thread(target=run, args=(name, stage, out, begin)))
                beside[0].start()
            else:
                run(name, stage, out, begin)
        for thread in beside:
            thread.join()
    print(f"[{time.monotonic() - begin:.0f} s] results in {out}")


if __name__ == "__main__":
    main()
