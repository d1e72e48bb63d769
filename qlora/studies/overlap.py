"""Whether the cells of a study changed the weights in the same directions: how much of one's leading subspace lies in another's.

    cells/NAME/directions.safetensors ─► φ(8, 8) of every matrix ─► its mean over them, for each pair of settings

Hu et al. 2021 (arXiv 2106.09685), section 7.2 and equation 4. Knows the files that cells leave; must not know a model.
"""

from __future__ import annotations

import itertools
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from safetensors.torch import load_file, save_file
from torch import Tensor

from qlora.evaluation.change import directions_of, overlaps
from qlora.files.durable import file_written_aside
from qlora.methods.base import AdaptedModel
from qlora.studies.results import Compared

DIRECTIONS, MOST = "directions.safetensors", 8


class Overlap(NamedTuple):
    """Of two settings: the mean of φ over the matrices that both changed, and what random subspaces would have."""

    one: str
    other: str
    value: float
    chance: float


def keep_directions(model: AdaptedModel, place: Path) -> None:
    """Write the leading directions [at most 8, columns] of every matrix's change into the run folder ``place``."""
    with file_written_aside(place / DIRECTIONS) as aside:
        save_file({path: one.half().contiguous() for path, one in directions_of(model, MOST).items()}, aside)


def overlaps_of(folder: Path, found: Sequence[Compared]) -> list[Overlap]:
    """For each pair of settings at their best rate whose run folders still hold their directions."""
    places = {one.setting: folder / "cells" / one.best.cell / DIRECTIONS for one in found}
    kept = {setting: load_file(place) for setting, place in places.items() if place.is_file()}
    return [
        _overlap(*pair) for pair in itertools.combinations(kept.items(), 2) if pair[0][1].keys() & pair[1][1].keys()
    ]


def _overlap(one: tuple[str, dict[str, Tensor]], other: tuple[str, dict[str, Tensor]]) -> Overlap:
    shared = overlaps(one[1], other[1])
    chances = [max(of.shape) / one[1][path].shape[1] for path, of in shared.items()]
    return Overlap(
        one[0], other[0], statistics.fmean(of[-1, -1].item() for of in shared.values()), statistics.fmean(chances)
    )
