"""Checkpoints: what a run needs to continue, written aside and renamed, the newest few kept.

    checkpoints/000200/
        adapter_config.json, adapter_model.safetensors    a PEFT adapter, usable as it is
        method.safetensors                                what else the method needs; most need nothing
        optimizer.safetensors                             the moments, by parameter
        state.json                                        step, loss scale, steps skipped, the smaller way of going through
                                                          a step that memory made necessary, what is checked on resume
        checksums.json                                    of each of these files, so that damage is noticed

A damaged checkpoint is passed over for the newest one that is whole. The order of the data and the random draws follow from the seed and the step, so neither is stored. Plain data and
safetensors only; nothing is pickled. Knows a trainer's parts; must not know a recipe or a report.
"""

from __future__ import annotations

import json
import math
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors.torch import save_file

from qlora.errors import MethodError, NonFiniteError, RunError, listed
from qlora.files.durable import clear_leftovers, damage, delete_folder, folder_written_aside, seal
from qlora.methods.files import (
    read_adapter_tensors,
    read_method_state,
    save_adapter,
)
from qlora.model.tensor_file import read_tensors
from qlora.training.optim import load_optimizer_tensors, optimizer_tensors
from qlora.training.smaller import Way

if TYPE_CHECKING:
    from qlora.training.loop import Trainer

STATE = "state.json"
OPTIMIZER = "optimizer.safetensors"


class DamagedError(RunError):
    """A checkpoint that is not what was written."""


def save(trainer: Trainer, folder: Path, keep: int) -> Path:
    """Write ``folder/<step>`` and delete all but the ``keep`` newest. What this trainer wrote or read is not written again.

    Checkpoints of later steps go too: they are of another course, and ``find`` would take one of them for the newest.
    """
    place = folder / f"{trainer.step_number:06d}"
    if place != trainer.saved:
        if broken := not_finite(trainer):
            raise NonFiniteError(
                f"{listed(broken, 3)} hold values that are not finite after step {trainer.step_number}, so this state is not "
                "saved; the newest checkpoint is whole."
            )
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
            if trainer.skipped:
                state["skipped"] = trainer.skipped
            if trainer.way != Way.of(trainer.training):
                state["smaller"] = trainer.way.values()
            (aside / STATE).write_text(json.dumps(state, indent=2) + "\n", encoding="utf-8")
            seal(aside)
        trainer.saved = place
    found = find(folder)
    ours = [other for other in found if int(other.name) <= trainer.step_number]
    for old in {*found} - {*ours[-keep:]}:
        with suppress(OSError):  # one too many does no harm
            delete_folder(old)
    return place


def not_finite(trainer: Trainer) -> list[str]:
    """The trained parameters that hold NaN or infinity. A checkpoint with one could not be read again."""
    # the norm is NaN or infinite where a value is, and takes no memory, as isfinite() does
    largest = {
        name: torch.linalg.vector_norm(values.detach(), math.inf)
        for name, values in trainer.parameters.items()
        if values.numel()
    }
    return [name for name, value in largest.items() if not math.isfinite(float(value))]


def find(folder: Path) -> list[Path]:
    """The checkpoints in ``folder``, oldest first. One that was interrupted has another name, and is not among them."""
    if not folder.is_dir():
        return []
    found = [place for place in folder.iterdir() if place.name.isdecimal() and place.is_dir()]
    return sorted(found, key=lambda place: int(place.name))


def newest(folder: Path) -> tuple[Path | None, list[str]]:
    """(the newest checkpoint whose files are what was written, a sentence for each newer one that is damaged).

    None where there is no checkpoint at all. Raises DamagedError when every one is damaged.
    """
    found, lost = find(folder), list[str]()
    for place in reversed(found):
        if (why := damage(place)) is None:
            return place, lost
        if not place.is_dir():  # a run that goes on has newer ones and deleted it
            return newest(folder)
        lost.append(_loss(place, why))
    _require_one(folder, found, lost)
    return None, []


def load_newest(trainer: Trainer, folder: Path) -> list[str]:
    """``load`` the newest checkpoint that is whole; return a sentence for each newer one, whose steps are taken again.

    Raises RunError when there is none, or when it does not belong to this run.
    """
    found, lost = find(folder), list[str]()
    for place in reversed(found):
        try:
            load(trainer, place)
            return lost
        except DamagedError as error:
            lost.append(str(error))
    _require_one(folder, found, lost)
    raise RunError(f"There is no checkpoint in '{folder}'.")


def _loss(place: Path, why: str) -> str:
    return f"The checkpoint '{place}' is damaged ({why}); the newest one before it is used."


def _require_one(folder: Path, found: list[Path], lost: list[str]) -> None:
    if found:
        raise DamagedError(
            f"No checkpoint in '{folder}' is whole. {' '.join(lost)} Put one back from a copy, or delete that folder to "
            "begin again at the first step."
        )


def load(trainer: Trainer, place: Path) -> None:
    """Put a trainer into the state that ``save`` wrote.

    Raises DamagedError, with nothing changed, when the files are not what was written; RunError when they do not belong
    to this run.
    """
    if (why := damage(place)) is not None:
        raise DamagedError(_loss(place, why))
    try:
        state = json.loads((place / STATE).read_text(encoding="utf-8"))
        total, kind = state["total_steps"], state["optimizer"]
        step, scale = int(state["step"]), float(state["loss_scale"])
        skipped = int(state.get("skipped", 0))
        smaller = Way.from_values(state["smaller"]) if "smaller" in state else trainer.way
        tensors = read_tensors(place / OPTIMIZER)
        adapter, method = read_adapter_tensors(place), read_method_state(place)
    except (
        OSError, ValueError, LookupError, TypeError, AttributeError, OverflowError, RecursionError, MethodError
    ) as error:  # fmt: skip
        raise DamagedError(_loss(place, str(error))) from None
    if (total, kind) != (trainer.total_steps, trainer.training.optimizer):
        raise RunError(
            f"The checkpoint '{place}' is of a run of {total} steps with {kind}, not of {trainer.total_steps} steps with "
            f"{trainer.training.optimizer}; resume with the run's own recipe."
        )
    trainer.torn = True  # until everything is in its place
    try:
        trainer.model.load_state(adapter, method)
    except MethodError as error:
        raise RunError(f"The checkpoint '{place}' does not belong to this run. {error}") from None
    load_optimizer_tensors(trainer.optimizer, trainer.parameters, tensors)
    trainer.optimizer.zero_grad(set_to_none=True)  # of a step that was broken off
    trainer._arrange(min(smaller, trainer.way))  # this trainer may know already that less fits
    trainer.step_number = step
    trainer.skipped = skipped
    trainer.torn = False
    trainer.loss_scale = scale
    trainer.saved = place
