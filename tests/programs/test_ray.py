"""A study on a local Ray cluster: a worker is killed, Ray begins its cell again, and the study is the one that ``local`` gives."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml

from qlora.studies.run import study
from tests.tiny import tiny_values

FOLDER = os.environ.get("QLORA_RAY", "/nonexistent")
sys.path.append(FOLDER)  # at the end: of what both have, it is ours that counts
pytest.importorskip("ray", reason="QLORA_RAY names no folder of 'pip install --target' with Ray")
pytestmark = pytest.mark.slow
LONG = ("recipe.training.steps=60", "recipe.training.save_every=1")


def test_a_cell_whose_worker_is_killed_goes_on(tiny_model: Path, chat_data: Path, tmp_path: Path) -> None:
    recipe = {key: value for key, value in tiny_values(tiny_model, chat_data, tmp_path).items() if key != "folder"}
    recipe["evaluation"] = {"prompts": 0}
    path = tmp_path / "compare.yaml"
    path.write_text(yaml.safe_dump({"recipe": recipe, "rates": [1e-3, 1e-2, 3e-2], "folder": str(tmp_path / "ray")}))
    command = [sys.executable, "-m", "qlora", "study", str(path), *LONG, "engine=ray"]
    path_there = os.pathsep.join([*filter(None, [os.environ.get("PYTHONPATH")]), FOLDER])  # for Ray's workers too
    environment = os.environ | {"PYTHONPATH": path_there}
    process = subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    deadline = time.monotonic() + 300
    while not any('"step": 3' in (begun := file).read_text() for file in tmp_path.glob("ray/cells/*/metrics.jsonl")):
        assert process.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.02)
    killed = json.loads((begun.parent / ".lock").read_text())["process"]
    os.kill(killed, signal.SIGKILL)
    _, said = process.communicate(timeout=500)
    assert process.returncode == 0, said
    assert "failed" not in said
    on_ray = study(path, *LONG, quiet=True)  # everything has ended: this only reads
    local = study(path, *LONG, f"folder={tmp_path / 'local'}", quiet=True)
    assert [(row.rate, row.loss, row.error) for row in on_ray.rows] == [
        (row.rate, row.loss, row.error) for row in local.rows
    ]
    assert len(on_ray.rows) == 3
