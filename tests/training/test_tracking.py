"""Trackers get the numbers of metrics.jsonl, and none of them can stop a run."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from qlora.errors import RecipeError
from qlora.recipe import Recipe
from qlora.training import tracking as module
from qlora.training.log import MetricsLog
from qlora.training.tracking import require_trackers, tracking

LINES: list[dict[str, Any]] = [
    {"step": 0, "held_out_loss": 3.0, "held_out_perplexity": 20.0},
    {"step": 1, "loss": 2.5, "note": "what happened", "skipped": True},
]
NUMBERS = [(0, {"held_out/loss": 3.0, "held_out/perplexity": 20.0}), (1, {"train/loss": 2.5})]


class Tracker:
    """What accelerate's trackers look like, failing where it is told to."""

    def __init__(self, fails_at: str = "") -> None:
        self.fails_at, self.did, self.lines = fails_at, list[str](), list[tuple[int, Mapping[str, Any]]]()

    def _do(self, what: str) -> None:
        self.did.append(what)
        if what == self.fails_at:
            raise ConnectionError(f"no way to {what}")

    def start(self) -> None:
        self._do("start")

    def store_init_configuration(self, values: dict[str, Any]) -> None:
        assert "method.r" in values
        assert all(isinstance(value, bool | int | float | str) for value in values.values())
        self._do("store")

    def log(self, values: Mapping[str, Any], step: int) -> None:
        self._do("log")
        self.lines.append((step, values))

    def finish(self) -> None:
        self._do("finish")


def recipe_with(*names: str) -> Recipe:
    return Recipe.from_dict({"data": {"train": "my.jsonl"}, "tracking": list(names)})


def told(folder: Path, recipe: Recipe, done: int = 0) -> list[str]:
    """Write the lines as a run does; what was said of it."""
    folder.mkdir(exist_ok=True)
    (folder / "environment.json").write_text("{}")
    said: list[str] = []
    log = MetricsLog(folder / "metrics.jsonl")
    with tracking(recipe, folder, done, said.append) as log.also:
        for line in LINES:
            log.write(line)
    assert len((folder / "metrics.jsonl").read_text().splitlines()) == len(LINES)
    return said


@pytest.mark.parametrize("fails_at", ["", "start", "store", "log", "finish"])
def test_a_tracker_gets_the_numbers_and_its_failure_is_said_once(
    fails_at: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = {"mlflow": Tracker(fails_at), "trackio": Tracker()}
    monkeypatch.setattr(module, "_tracker", lambda name, *_: made[name])
    said = told(tmp_path / "run", recipe_with("mlflow", "trackio"))
    assert made["trackio"].lines == NUMBERS  # beside one that failed too
    assert made["trackio"].did == ["start", "store", "log", "log", "finish"]
    assert made["mlflow"].lines == ([] if fails_at in ("start", "store", "log") else NUMBERS)
    assert len(said) == bool(fails_at)
    assert all(f"mlflow failed (no way to {fails_at}" in one or "mlflow failed (ConnectionError" in one for one in said)


def test_a_resumed_run_does_not_tell_its_recipe_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tracker = Tracker()
    monkeypatch.setattr(module, "_tracker", lambda *_: tracker)
    assert not told(tmp_path / "run", recipe_with("wandb"), done=1)
    assert "store" not in tracker.did


def test_a_library_that_is_not_there_is_one_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(
        RecipeError, match="tracking names wandb, not installed here; install it \\(pip install wandb\\)"
    ):
        require_trackers(["wandb"])
    require_trackers([])
    with pytest.raises(RecipeError, match=r"'tracking\.0' is 'comet'"):
        recipe_with("comet")


def test_tensorboard_reads_them(tmp_path: Path) -> None:
    events = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    assert not told(tmp_path / "run", recipe_with("tensorboard"))
    found = events.EventAccumulator(str(tmp_path / "run/tensorboard")).Reload()
    assert [(one.step, one.value) for one in found.Scalars("train/loss")] == [(1, 2.5)]
    assert [(one.step, one.value) for one in found.Scalars("held_out/loss")] == [(0, 3.0)]


def test_wandb_takes_them_offline(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    assert not told(tmp_path / "run", recipe_with("wandb"))
    assert list((tmp_path / "run/wandb").glob("offline-run-*/*.wandb"))
