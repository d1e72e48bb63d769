"""The quickstart's steps beside programs that keep cores busy: tokens/s with one thread and with one for each core.

    python benchmarks/beside_others.py [--shares 0 0.3 0.5 1] [--spin]

A share is the part of its time for which each busy program computes. ``--spin`` measures an idle machine with threads that wait
actively too. Every measurement is a process of its own. Needs the quickstart's model and data (``python -m qlora.quickstart``).
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

BUSY = """
import sys, time
share = float(sys.argv[1])
while True:
    began = time.time()
    while time.time() < began + 0.05 * share:
        pass
    time.sleep(0.05 * (1 - share))
"""
PLAIN = (
    "training.steps=8", "evaluation={}", "data.held_out=null", "memory.rehearse=false", "training.recompute=none",
    "training.accumulation=micro_batch_major",
)  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=str(__doc__).split("\n\n")[0])
    parser.add_argument("--shares", type=float, nargs="+", default=[0, 0.3, 0.5, 1])
    parser.add_argument("--programs", type=int, default=1, help="busy programs at once")
    parser.add_argument("--spin", action="store_true")
    options = parser.parse_args()
    cores = len(os.sched_getaffinity(0))
    print(f"| busy programs | 1 thread | {cores} threads |\n|---|--:|--:|")
    for share in options.shares:
        busy = [
            subprocess.Popen([sys.executable, "-c", BUSY, str(share)]) for _ in range(options.programs if share else 0)
        ]
        try:
            speeds = [tokens_per_second(threads, {}) for threads in (1, cores)]
        finally:
            for program in busy:
                program.kill()
        print(f"| {len(busy)} at {share:.0%} | {speeds[0]:.0f} | {speeds[1]:.0f} |", flush=True)
    for again in range(3 if options.spin else 0):
        passive, active = (tokens_per_second(cores, wait) for wait in ({}, {"OMP_WAIT_POLICY": "active"}))
        print(
            f"idle, {again + 1}: {passive:.0f} tokens/s with threads that wait as ours do, {active:.0f} actively",
            flush=True,
        )


def tokens_per_second(threads: int, environment: dict[str, str]) -> float:
    """Of seven steps, after one that warms up."""
    with tempfile.TemporaryDirectory() as place:
        words = [sys.executable, "-m", "qlora", "train", "quickstart.yaml", f"folder={place}/run", *PLAIN]
        done = subprocess.run(
            [*words, f"device.threads={threads}"], env={**os.environ, **environment}, capture_output=True, text=True
        )
        if done.returncode:
            raise SystemExit(done.stderr)
        lines = [json.loads(line) for line in (Path(place) / "run" / "metrics.jsonl").read_text().splitlines()]
    steps = [line for line in lines if "loss" in line][1:]
    return sum(line["tokens"] for line in steps) / sum(line["seconds"] for line in steps)


if __name__ == "__main__":
    main()
