"""Does a long run grow? Memory, open files and threads of one process over 2,000 steps.

    qlora.train in a process of its own     a checkpoint every 50 steps, a held-out loss every 100
      └─ looked at every 100 steps, after a collection: resident memory, /proc/self/fd, /proc/self/task

What a run needs is there after a warm-up; from then on nothing may pile up. Memory is judged by its slope: a line through the
second half of the samples, by least squares. Linux only, since it reads /proc.
"""

from __future__ import annotations

import ctypes
import gc
import json
import os
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy

from benchmarks.survive.scene import Scene
from benchmarks.survive.size import Size

LIMIT = 32.0
"""KiB by which memory may grow in a hundred steps: less than any tensor a step, more than the allocator's noise."""
ONE_THREAD = {"OMP_NUM_THREADS": "1"}
# what is soaked: (memory, method, training)
VARIANTS: dict[str, tuple[dict[str, Any], dict[str, Any], dict[str, Any]]] = {
    "lora, resident": ({}, {"name": "lora", "r": 8, "dropout": 0.1}, {}),
    "adalora, streamed from disk": (
        {"layers": "streamed", "tier": "disk"},
        {"name": "adalora", "r": 4, "initial_r": 8},
        {"optimizer": "adamw_8bit"},
    ),
}


def run(place: Path, size: Size, say: Callable[[str], None]) -> list[dict[str, Any]]:
    """Three rows a variant: what it did at the start (after the warm-up), at the end, and at most; and whether it ``grows``.

    ``growth`` and ``limit`` are in KiB per 100 steps, and are None for what is counted.
    """
    scene, rows = Scene(place / "scene"), []
    for name in size.of(list(VARIANTS)[-1:], list(VARIANTS)):
        steps, every = size.of(60, 2000), size.of(4, 100)
        path = place / f"{list(VARIANTS).index(name)}.yaml"
        memory, method, training = VARIANTS[name]
        often = {"steps": steps, "batch_size": 2, "micro_batch_size": 1, "save_every": size.of(5, 50), **training}
        scene.recipe(
            path,
            path.with_suffix(""),
            place / "cache" if memory else None,
            method=method,
            training=often,
            evaluation={"every": size.of(10, 100), "prompts": 0},
        )
        samples = look_at(path, every)
        # 60 steps are few for a slope: there one late allocation counts as much as sixty would
        found = judge(samples, warm=steps // 4, limit=size.of(64 * LIMIT, LIMIT))
        rows += [{"variant": name, "steps": steps, **row} for row in found]
        say(
            f"soak: {name}, {steps} steps: " + "; ".join(f"{r['what']} {r['at_start']} to {r['at_end']}" for r in found)
        )
    return rows


def judge(samples: Sequence[Mapping[str, float]], warm: int, limit: float) -> list[dict[str, Any]]:
    """The rows of one run's ``samples``: step, memory in KiB, files and threads. ``warm``: the last step of the warm-up.

    Files and threads grow when there are more at the end than at the start; memory when the slope of the second half is
    above ``limit``, in KiB per 100 steps.
    """
    after = [sample for sample in samples if sample["step"] > warm]
    late = after[len(after) // 2 :]
    slope = 100 * float(numpy.polyfit([s["step"] for s in late], [s["memory"] for s in late], 1)[0])
    rows = []
    for key, what, unit in (
        ("memory", "resident memory, MiB", 1024),
        ("files", "open files", 1),
        ("threads", "threads", 1),
    ):
        values = [round(sample[key] / unit, 1) if unit > 1 else int(sample[key]) for sample in after]
        row: dict[str, Any] = {"what": what, "at_start": values[0], "at_end": values[-1], "largest": max(values)}
        if key == "memory":
            rows.append({**row, "growth": round(slope, 1), "limit": limit, "grows": slope > limit})
        else:
            rows.append({**row, "growth": None, "limit": None, "grows": values[-1] > values[0]})
    return rows


def look_at(recipe: Path, every: int) -> list[dict[str, float]]:
    """Train ``recipe`` in a process of its own; a sample each ``every`` steps."""
    call = [sys.executable, "-m", "benchmarks.survive.soak", str(recipe), str(every)]
    done = subprocess.run(
        call,
        capture_output=True,
        text=True,
        check=False,
        cwd=Path(__file__).parents[2],
        env={**os.environ, **ONE_THREAD},
    )
    if done.returncode:
        raise RuntimeError(f"The soaked run ended with {done.returncode}: {done.stderr[-2000:]}")
    samples: list[dict[str, float]] = json.loads(done.stdout.splitlines()[-1])
    return samples


def sample() -> dict[str, float]:
    """This process now: resident memory in KiB, open files, threads. What is free inside the allocator is given back first."""
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    lines = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
    status = dict(line.split(":", 1) for line in lines if ":" in line)
    return {
        "memory": float(status["VmRSS"].split()[0]),
        "files": len(os.listdir("/proc/self/fd")),
        "threads": int(status["Threads"]),
    }


def main(recipe: str, every: int) -> None:
    """In a process of its own: train, and print the samples as one line of JSON."""
    from qlora.recipe import Recipe
    from qlora.runs.train import train
    from qlora.training.log import MetricsLog

    write, samples = MetricsLog.write, list[dict[str, float]]()

    def look(self: MetricsLog, line: Mapping[str, Any]) -> None:
        write(self, line)
        if "loss" in line and line["step"] % every == 0:
            samples.append({"step": line["step"], **sample()})

    MetricsLog.write = look  # type: ignore[method-assign, assignment]
    train(Recipe.from_yaml(recipe), quiet=True)
    print(json.dumps(samples))


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]))
