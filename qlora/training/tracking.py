"""Where else the lines of ``metrics.jsonl`` go: TensorBoard, Weights & Biases, trackio or MLflow, by accelerate's trackers.

    a line ─► its numbers, as train/loss or held_out/loss, at its step ─► each tracker

A tracker that fails is said once and left alone from then on: no run stops for it. Knows lines and a run folder; must not know
what made them. No text of the data goes to a tracker: numbers alone, and the recipe.
"""

from __future__ import annotations

import hashlib
import importlib.util
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from qlora.errors import RecipeError, first_line, listed, redacted
from qlora.recipe import Recipe

PROJECT = "qlora"
Tell = Callable[[Mapping[str, Any]], None]


def require_trackers(names: Sequence[str]) -> None:
    """Raise RecipeError where a tracker's library is not installed: now, not after the model was loaded."""
    if missing := [name for name in names if importlib.util.find_spec(name) is None]:
        raise RecipeError(
            f"tracking names {listed(missing)}, not installed here; install it (pip install {' '.join(missing)}), or leave it out."
        )


@contextmanager
def tracking(recipe: Recipe, folder: Path, done: int, say: Callable[[str], None]) -> Iterator[Tell]:
    """Inside, what takes the lines of a run in ``folder``, of which ``done`` steps are taken. Fails in no way."""
    trackers: dict[str, Any] = {}

    def safely(name: str, action: Callable[[], None]) -> None:
        try:
            action()
        except Exception as error:
            trackers.pop(name, None)
            say(
                f"Warning: {name} failed ({first_line(error)}); the run goes on without it, and metrics.jsonl holds all."
            )

    def begin(name: str) -> None:
        trackers[name] = _tracker(name, folder, done)
        trackers[name].start()
        if not done:  # a resumed run is the same one
            trackers[name].store_init_configuration(_settings(recipe))

    def tell(line: Mapping[str, Any]) -> None:
        for name, tracker in list(trackers.items()):
            safely(name, lambda: tracker.log(_numbers(line), step=int(line["step"])))  # noqa: B023 (called here and now)

    for wanted in recipe.tracking:
        safely(wanted, lambda: begin(wanted))  # noqa: B023
    try:
        yield tell
    finally:
        for name, tracker in list(trackers.items()):
            safely(name, tracker.finish)


def _tracker(name: str, folder: Path, done: int) -> Any:
    """accelerate's tracker. A resumed run goes on in the same TensorBoard folder and wandb run; in MLflow it is a new one."""
    from accelerate import PartialState, tracking

    PartialState(cpu=True)  # its loggers ask for it
    known = hashlib.sha256((folder / "environment.json").read_bytes()).hexdigest()[:16]
    title = folder.absolute().name
    if name == "tensorboard":
        return tracking.TensorBoardTracker(name, folder, purge_step=done + 1)
    if name == "wandb":
        return tracking.WandBTracker(PROJECT, name=title, dir=str(folder), id=known, resume="allow")
    if name == "trackio":
        return tracking.TrackioTracker(PROJECT, name=f"{title}-{known}", resume="allow")
    return tracking.MLflowTracker(PROJECT, run_name=title)


def _settings(recipe: Recipe) -> dict[str, Any]:
    """The recipe's values by ``section.key``, as texts and numbers; without passwords."""
    found: dict[str, Any] = {}
    for section, values in redacted(recipe.model_dump(mode="json")).items():
        each = values.items() if isinstance(values, dict) else [("", values)]
        found |= {f"{section}.{key}".rstrip("."): value for key, value in each}
    return {key: value if isinstance(value, bool | int | float | str) else str(value) for key, value in found.items()}


def _numbers(line: Mapping[str, Any]) -> dict[str, float]:
    """``{"step": 3, "loss": 2.5}`` → ``{"train/loss": 2.5}``; of a held-out evaluation ``held_out/loss``."""
    numbers = {key: value for key, value in line.items() if key != "step" and type(value) in (int, float)}
    return {
        f"held_out/{key.removeprefix('held_out_')}" if key.startswith("held_out_") else f"train/{key}": value
        for key, value in numbers.items()
    }
