"""The soak of ``make survive``, short: a run of sixty steps leaves nothing behind, and what would grow is seen."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from benchmarks.survive import soak
from benchmarks.survive.size import Size


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
def test_a_short_run_does_not_grow(tmp_path: Path) -> None:
    """AdaLoRA streamed from the disk, with a checkpoint every 5 steps and an evaluation every 10, in a process of its own."""
    rows = soak.run(tmp_path, Size(small=True), print)
    assert [row["what"] for row in rows] == ["resident memory, MiB", "open files", "threads"]
    assert [row for row in rows if row["grows"]] == []
    assert all(row["at_end"] > 0 and row["steps"] == 60 for row in rows)
    assert (tmp_path / "1" / "checkpoints" / "000060").is_dir()


def made_up(growth: float, files: int = 7) -> list[dict[str, float]]:
    """2,000 steps: a warm-up that takes 90 MiB, then noise of 40 KiB around ``growth`` KiB per 100 steps."""
    return [
        {
            "step": step,
            "memory": 400_000 + 90_000 * (step > 200) + growth * step / 100 + 40 * (-1) ** (step // 100),
            "files": files if step > 1500 else 7,
            "threads": 5,
        }
        for step in range(100, 2001, 100)
    ]


@pytest.mark.parametrize(("growth", "files", "grows"), [
    (0, 7, [False, False, False]), (-900, 7, [False] * 3), (600, 7, [True, False, False]), (0, 8, [False, True, False]),
])  # fmt: skip
def test_growth_is_seen_and_noise_is_not(growth: float, files: int, grows: list[bool]) -> None:
    rows = soak.judge(made_up(growth, files), warm=500, limit=soak.LIMIT)
    assert [row["grows"] for row in rows] == grows
    assert rows[0]["growth"] == pytest.approx(growth, abs=20)
    assert rows[1] == {
        "what": "open files", "at_start": 7, "at_end": files, "largest": files, "growth": None, "limit": None,
        "grows": files > 7,
    }  # fmt: skip
