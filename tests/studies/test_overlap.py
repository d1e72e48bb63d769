"""Directions of two cells: their overlap is that of full SVDs, 1 with themselves."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch

from qlora.methods.lora import LoraLinear
from qlora.studies.overlap import MOST, keep_directions, overlaps_of
from tests import tiny


def kept(model_folder: Path, place: Path, rank: int) -> dict[str, torch.Tensor]:
    """A model's directions on disk, and ΔW by path."""
    model = tiny.tiny_model(model_folder, quantization="none", r=rank)
    tiny.stir(model, 0.3)
    place.mkdir(parents=True)
    keep_directions(model, place)
    return {
        path: (module.lora_B @ module.lora_A).detach().double()
        for path, module in model.model.named_modules()
        if isinstance(module, LoraLinear)
    }


def test_overlap_is_that_of_full_svds(tiny_model: Path, tmp_path: Path) -> None:
    ranks = {"a": 2, "b": 12, "c": 2}
    deltas = {name: kept(tiny_model, tmp_path / "cells" / name, rank) for name, rank in ranks.items()}
    found = [SimpleNamespace(setting=name, best=SimpleNamespace(cell=name)) for name in [*ranks, "gone"]]
    told = overlaps_of(tmp_path, cast(Any, found))
    assert [(one.one, one.other) for one in told] == [("a", "b"), ("a", "c"), ("b", "c")]
    for one in told:
        expected = []
        for path, delta in deltas[one.one].items():
            first, second = (
                torch.linalg.svd(deltas[name][path] if name != one.one else delta).Vh[: min(ranks[name], MOST)]
                for name in (one.one, one.other)
            )
            least = min(len(first), len(second))
            expected.append(torch.linalg.matrix_norm(first @ second.t()).square().item() / least)
        assert one.value == pytest.approx(sum(expected) / len(expected), abs=1e-3)  # directions are kept in 16 bits
        assert 0 < one.chance < 1
    same = [SimpleNamespace(setting=name, best=SimpleNamespace(cell="a")) for name in ("x", "y")]
    assert overlaps_of(tmp_path, cast(Any, same))[0].value == pytest.approx(1, abs=1e-3)
