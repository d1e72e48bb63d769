"""Checkpoints: what a run needs to continue, written aside and renamed, the newest few kept.

    checkpoints/000200/
        adapter_config.json, adapter_model.safetensors    a PEFT adapter, usable as it is
        method.safetensors                                what else the method needs; most need nothing
        optimizer.safetensors                             the moments, by parameter
        state.json                                        step, loss scale, the smaller way of going through a step that
                                                          memory made necessary, what is checked on resume

The order of the data and the random draws follow from the seed and the step, so neither is stored. Plain data and
safetensors only; nothing is pickled. Knows a trainer's parts; must not know a recipe or a report.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from qlora.errors import MethodError, RunError
from qlora.methods.files import (
    clear_leftovers,
    folder_written_aside,
    read_adapter_tensors,
    read_method_state,
    save_adapter,
)
from qlora.training.optim import load_optimizer_tensors, optimizer_tensors
from qlora.training.smaller import Way

if TYPE_CHECKING:
    from qlora.training.loop import Trainer

STATE = "state.json"
OPTIMIZER = "optimizer.safetensors"


def save(trainer: Trainer, folder: Path, keep: int) -> Path:
    """Write ``folder/<step>`` and delete all but the ``keep`` newest. What this trainer wrote or read is not written again.

    Checkpoints of later steps go too: they are of another course, and ``find`` would take one of them for the newest.
    """
    place = folder / f"{trainer.step_number:06d}"
    if place != trainer.saved:
        clear_leftovers(folder)
        with folder_written_aside(place, overwrite=True) as aside:
            save_adapter(trainer.model, aside)
            save_file(optimizer_tensors(trainer.optimizer, trainer.parameters), aside / OPTIMIZER)
            state: dict[str, Any] = {
                "step": trainer.step_number,
                "total_steps": trainer.total_steps,
                "loss_scale": trainer.loss_scale,
                "optimizer": trainer.training.optimizer,
            }
            if trainer.way != Way.of(trainer.training):
                state["smaller"] = trainer.way.values()
            (aside / STATE).write_text(json.dumps(state, indent=2) + "\n", encoding="utf-8")
        trainer.saved = place
    found = find(folder)
    ours = [other for other in found if int(other.name) <= trainer.step_number]
    for old in {*found} - {*ours[-keep:]}:
        shutil.rmtree(old, ignore_errors=True)
    return place


def find(folder: Path) -> list[Path]:
    """The whole checkpoints in ``folder``, oldest first. One that was interrupted has another name, and is not among them."""
    if not folder.is_dir():
        return []
    whole = [place for place in folder.iterdir() if place.name.isdecimal() and (place / STATE).is_file()]
    return sorted(whole, key=lambda place: int(place.name))


def load(trainer: Trainer, place: Path) -> None:
    """Put a trainer into the state that ``save`` wrote. Raises RunError when the files are damaged or do not belong to it."""
    try:
        state = json.loads((place / STATE).read_text(encoding="utf-8"))
        total, kind = state["total_steps"], state["optimizer"]
        step, scale = int(state["step"]), float(state["loss_scale"])
        smaller = Way.from_values(state["smaller"]) if "smaller" in state else trainer.way
        tensors = load_file(place / OPTIMIZER)
        adapter, method = read_adapter_tensors(place), read_method_state(place)
    except (OSError, ValueError, KeyError, TypeError, SafetensorError, MethodError) as error:
        raise RunError(
            f"The checkpoint '{place}' is damaged or incomplete ({error}); delete it, and the one before it is used."
        ) from None
    if (total, kind) != (trainer.total_steps, trainer.training.optimizer):
        raise RunError(
            f"The checkpoint '{place}' is of a run of {total} steps with {kind}, not of {trainer.total_steps} steps with "
            f"{trainer.training.optimizer}; resume with the run's own recipe."
        )
    try:
        trainer.model.load_state(adapter, method)
    except MethodError as error:
        raise RunError(f"The checkpoint '{place}' does not belong to this run. {error}") from None
    load_optimizer_tensors(trainer.optimizer, trainer.parameters, tensors)
    trainer.optimizer.zero_grad(set_to_none=True)  # of a step that was broken off
    trainer._arrange(min(smaller, trainer.way))  # this trainer may know already that less fits
    trainer.step_number = step
    trainer.torn = False
    trainer.loss_scale = scale
    trainer.saved = place
