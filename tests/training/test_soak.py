"""A run leaves nothing behind: what it holds open, and how many threads it has, stay as they are. (Memory: ``make survive``.)"""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from qlora.recipe import Recipe
from qlora.runs.train import train
from qlora.training.log import MetricsLog
from tests.tiny import tiny_values


@pytest.mark.skipif(not Path("/proc/self/task").is_dir(), reason="reads /proc")
@pytest.mark.slow
def test_files_and_threads_do_not_pile_up(
    tiny_model: Path, chat_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """AdaLoRA streamed from the disk, with a checkpoint every 5 steps and an evaluation every 10."""
    values = tiny_values(tiny_model, chat_data, tmp_path / "run")
    values["method"] = {"name": "adalora", "r": 2, "initial_r": 4}
    values["memory"] = {"layers": "streamed", "tier": "disk", "cache": str(tmp_path / "cache"), "rehearse": False}
    values["training"] |= {"steps": 30, "save_every": 5, "batch_size": 2, "micro_batch_size": 1}
    values["evaluation"] |= {"every": 10, "prompts": 1}
    samples: dict[int, tuple[int, int]] = {}
    write = MetricsLog.write

    def look(self: MetricsLog, line: Mapping[str, Any]) -> None:
        write(self, line)
        if "loss" in line:
            samples[line["step"]] = len(os.listdir("/proc/self/fd")), len(os.listdir("/proc/self/task"))

    monkeypatch.setattr(MetricsLog, "write", look)
    train(Recipe.from_dict(values), quiet=True)
    assert samples[30] == samples[15]
    assert (tmp_path / "run" / "checkpoints" / "000030").is_dir()
