"""Checkpoints: what a run needs to continue, written aside and renamed, the newest few kept.

    checkpoints/000200/
        adapter_config.json, adapter_model.safetensors    a PEFT adapter, usable as it is
        method.safetensors                                what else the method needs; most need nothing
        optimizer.safetensors                             the moments, by parameter, and the fp32 masters of 16-bit ones
        state.json                                        step, loss scale, steps skipped, the smaller way of going through
                                                          a step that memory made necessary, what is checked on resume
        checksums.json                                    of each of these files, so that damage is noticed

A damaged checkpoint is passed over for the newest one that is whole. The order of the data and the random draws follow
from the seed and the step, so neither is stored. Plain data and safetensors only; nothing is pickled. Knows a training's
state; must not know a recipe's file, rows or a report.
"""

from __future__ import annotations

import json
import shlex
import sys
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path

from safetensors.torch import save_file
from torch import Tensor

from qlora.errors import MethodError, NonFiniteError, RunError, listed
from qlora.files.durable import SEAL, clear_leftovers, damage, delete_folder, folder_written_aside, seal
from qlora.methods.files import CONFIG, read_adapter_tensors, read_method_state, save_adapter
from qlora.methods.loading import at_home
from qlora.model.tensor_file import read_tensors
from qlora.residence.owned import all_here
from qlora.training.optim import load_optimizer_tensors
from qlora.training.state import TrainState
from qlora.training.way import Way

STATE = "state.json"
OPTIMIZER = "optimizer.safetensors"


class DamagedError(RunError):
    """A checkpoint that is not what was written."""


def save(state: TrainState, folder: Path, keep: int, kept: Mapping[str, Tensor] | None = None) -> Path:
    """Write ``folder/<step>`` with what ``state.kept`` gave where several processes have it, and delete all but the ``keep`` newest. What was written or read already is not written again.

    Checkpoints of later steps go too: they are of another course, and ``find`` would take one of them for the newest.
    """
    place = place_of(state, folder)
    if place != state.saved:
        clear_leftovers(folder)
        with all_here(state.model.base.placement):
            _write(state, place, state.kept() if kept is None else kept)
        state.saved = place
    found = find(folder)
    ours = [other for other in found if int(other.name) <= state.step]
    for old in {*found} - {*ours[-keep:]}:
        with suppress(OSError):  # one too many does no harm
            delete_folder(old)
    return place


def _write(state: TrainState, place: Path, kept: Mapping[str, Tensor]) -> None:
    if broken := state.not_finite():
        raise NonFiniteError(
            f"{listed(broken, 3)} hold values that are not finite after step {state.step}, so this state is not "
            "saved; the newest checkpoint is whole."
        )
    with folder_written_aside(place, overwrite=True) as aside:
        save_adapter(state.model, aside)
        save_file(dict(kept), aside / OPTIMIZER)
        (aside / STATE).write_text(json.dumps(_values(state), indent=2) + "\n", encoding="utf-8")
        seal(aside)


def place_of(state: TrainState, folder: Path) -> Path:
    """Where a checkpoint of this moment lies in ``folder``."""
    return folder / f"{state.step:06d}"


def _values(state: TrainState) -> dict[str, object]:
    """What ``state.json`` holds."""
    values: dict[str, object] = {
        "step": state.step,
        "total_steps": state.total_steps,
        "loss_scale": state.loss_scale,
        "optimizer": state.training.optimizer,
    }
    if state.skipped:
        values["skipped"] = state.skipped
    if state.way != state.asked:
        values["smaller"] = state.way.values()
    return values


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
            return place, _passed_over(lost)
        if not place.is_dir():  # a run that goes on has newer ones and deleted it
            return newest(folder)
        lost.append(_loss(place, why))
    _require_one(folder, found, lost)
    return None, []


def adapter_folder(folder: Path) -> Path:
    """Where a run's adapter lies as it was trained: its newest checkpoint, else ``adapter/``, the form for others."""
    adapter = folder / "adapter"
    try:
        found, lost = newest(folder / "checkpoints")
    except DamagedError as error:
        if damage(adapter) is not None:
            raise
        found, lost = None, [f"{error} The finished adapter is whole and is used."]
    for sentence in lost:
        print(sentence, file=sys.stderr, flush=True)
    if found is not None:
        if (adapter / SEAL).is_file() and (why := damage(adapter)):
            told = f"'{adapter}' is not what was written ({why}); the newest checkpoint is used."
            print(told, file=sys.stderr, flush=True)
        return found
    if (adapter / CONFIG).is_file():
        if (adapter / SEAL).is_file() and (why := damage(adapter)):
            raise RunError(
                f"'{adapter}' is not what was written ({why}), and there is no checkpoint to write it again from; put it "
                f"back from a copy, or delete {SEAL} there if you changed it yourself."
            )
        return adapter
    raise RunError(
        f"'{folder}' has neither an adapter nor a checkpoint yet; train it first: qlora resume {shlex.quote(str(folder))}"
    )


def load_newest(state: TrainState, folder: Path) -> list[str]:
    """``load`` the newest checkpoint that is whole; return a sentence for each newer one, whose steps are taken again.

    Raises RunError when there is none, or when it does not belong to this run.
    """
    found, lost = find(folder), list[str]()
    for place in reversed(found):
        try:
            load(state, place)
            return _passed_over(lost)
        except DamagedError as error:
            lost.append(str(error))
    _require_one(folder, found, lost)
    raise RunError(f"There is no checkpoint in '{folder}'.")


def _loss(place: Path, why: str) -> str:
    return f"The checkpoint '{place}' is damaged ({why})"


def _passed_over(lost: list[str]) -> list[str]:
    return [f"{one}; the newest one before it is used." for one in lost]


def _require_one(folder: Path, found: list[Path], lost: list[str]) -> None:
    if found:
        raise DamagedError(
            f"No checkpoint in '{folder}' is whole. {' '.join(f'{one}.' for one in lost)} Put one back from a copy, or train anew into "
            "another folder."
        )


def load(state: TrainState, place: Path) -> None:
    """Put back what ``save`` wrote. The caller then has rows go ``state.way``.

    Raises DamagedError, with nothing changed, when the files are not what was written; RunError when they do not belong
    to this run.
    """
    if (why := damage(place)) is not None:
        raise DamagedError(_loss(place, why))
    try:
        values = json.loads((place / STATE).read_text(encoding="utf-8"))
        total, kind = values["total_steps"], values["optimizer"]
        step, scale, skipped = int(values["step"]), float(values["loss_scale"]), int(values.get("skipped", 0))
        way = Way.from_values(values["smaller"]) if "smaller" in values else state.way
        tensors = read_tensors(place / OPTIMIZER)
        adapter = at_home(read_adapter_tensors(place), state.model.base.model, state.model.paths)
        method = read_method_state(place)
    except (
        OSError, ValueError, LookupError, TypeError, AttributeError, OverflowError, RecursionError, MethodError
    ) as error:  # fmt: skip
        raise DamagedError(_loss(place, str(error))) from None
    # at a constant rate a run may have been made longer since
    longer = state.training.schedule == "constant" and isinstance(total, int) and total < state.total_steps
    if not (total == state.total_steps or longer) or kind != state.training.optimizer:
        raise RunError(
            f"The checkpoint '{place}' is of a run of {total} steps with {kind}, not of {state.total_steps} steps with "
            f"{state.training.optimizer}; resume with the run's own recipe."
        )
    state.torn = True  # until everything is in its place
    try:
        with all_here(state.model.base.placement, read=False):
            state.model.load_state(adapter, method)
    except MethodError as error:
        raise RunError(f"The checkpoint '{place}' does not belong to this run. {error}") from None
    load_optimizer_tensors(state.optimizer, state.masters.values, state.masters.load(tensors))
    state.masters.drop_gradients()  # of a step that was broken off
    state.way = min(way, state.way)  # this process may know already that less fits
    state.step, state.skipped, state.loss_scale = step, skipped, scale
    state.torn, state.saved = False, place
