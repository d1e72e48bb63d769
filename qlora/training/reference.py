"""The reference: how likely each answer was before training, measured once and kept in the run folder.

    adapter off (or, of a run that goes on from an adapter, the model as it begins) ─► one pass over all pairs ─► reference/

A resumed run reads it: bits stay those of the first call, and what full fine-tuning has changed could not be asked any more.
Knows pairs and a folder; must not know a loss.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

from qlora.data.packing import Row
from qlora.errors import RunError
from qlora.files.durable import damage, folder_written_aside, seal
from qlora.files.strangers import Fault
from qlora.model.tensor_file import read_tensors
from qlora.training.objectives.pairs import Pairs, answers, pair_numbers
from qlora.training.state import TrainState

FOLDER, FILE = "reference", "logps.safetensors"


def prepare_reference(
    objective: Pairs,
    state: TrainState,
    parts: dict[str, Sequence[Row]],
    folder: Path | None,
    say: Callable[[str], None],
) -> dict[str, Tensor]:
    """The log-probabilities of the answers in each of ``parts``, [pairs, 2] in float64: read from the run ``folder``, or measured and
    written there, which ``say`` is told.

    Raises RunError where they are not there and the model that gave them is gone.
    """
    place = None if folder is None else folder / FOLDER
    found = {} if place is None else _read(place)
    if any(name not in found or found[name].shape != (_pairs(rows), 2) for name, rows in parts.items()):
        found = _measured(objective, state, parts, place, say)
    return found


def unknown(parts: dict[str, Sequence[Row]]) -> dict[str, Tensor]:
    """Room for the same, of zeros."""
    return {name: torch.zeros(_pairs(rows), 2, dtype=torch.float64) for name, rows in parts.items()}


def rows_at_once(state: TrainState) -> int:
    """Rows that enter the model together to be measured: a step's where the layers cut them."""
    return state.training.batch_size if state.way.layer_major else state.way.micro_batch_size


def read_reference(folder: Path) -> dict[str, Tensor]:
    """What ``prepare_reference`` wrote into the run ``folder``. Raises RunError where it is damaged or not there."""
    found = _read(folder / FOLDER)
    if not found:
        raise RunError(
            f"'{folder / FOLDER}', how likely the answers were before training, is damaged or not there; put it back from a copy, or "
            f"go on with the run, which measures it again where it can."
        )
    return found


def _read(place: Path) -> dict[str, Tensor]:
    """Nothing where what is there is not what was written."""
    if damage(place) is not None:
        return {}
    try:
        return read_tensors(place / FILE)
    except (Fault, OSError):
        return {}


def _measured(
    objective: Pairs,
    state: TrainState,
    parts: dict[str, Sequence[Row]],
    place: Path | None,
    say: Callable[[str], None],
) -> dict[str, Tensor]:
    model = state.model
    alone = model.section.from_ is None and all(method.why_not_disabled() is None for method in model.methods)
    if state.step and not alone:
        raise RunError(
            f"How likely the answers were before training is not known: '{place}' is damaged or not there, and the model that "
            "gave it has been trained since. Put it back from a copy, or train the run anew."
        )
    say(f"Measuring how likely the answers of {sum(map(_pairs, parts.values())):,} pairs are before training …")
    found = unknown(parts)
    with model.disabled() if alone else nullcontext():
        for name, rows in parts.items():
            if rows:
                sums, _ = objective.measure(rows, rows_at_once(state), state.way.loss_chunk)
                found[name][pair_numbers(rows)] = answers(sums)
    if place is not None:
        with folder_written_aside(place, overwrite=True) as aside:
            save_file(found, aside / FILE)
            seal(aside)
    return found


def _pairs(rows: Sequence[Row]) -> int:
    return 1 + max(pair_numbers(rows), default=-1)
