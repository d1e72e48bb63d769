"""Cheap mistakes are said before torch is imported, in a sentence that says what to do."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks.mistakes import MISTAKES, Mistake

HERE = [one for one in MISTAKES if "silent" not in one.words]  # which waits for a hub
ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def told() -> dict[str, tuple[int, str, str, bool]]:
    """By mistake: status, standard output and error, and whether torch was imported; all made in one process."""
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.mistakes", "--together"],
        capture_output=True,
        text=True,
        check=False,
        cwd=ROOT,
    )
    assert done.returncode == 0, done.stderr
    return dict(zip([one.name for one in HERE], json.loads(done.stdout), strict=True))


@pytest.mark.parametrize("mistake", HERE, ids=lambda one: one.name)
def test_it_is_said_without_torch(mistake: Mistake, told: dict[str, tuple[int, str, str, bool]]) -> None:
    status, out, errors, torch = told[mistake.name]
    assert mistake.says in out + errors
    assert status == mistake.status, errors
    assert not torch
    assert "Traceback" not in errors
    assert errors.count("qlora: ") == (1 if status else 0)
