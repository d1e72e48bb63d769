"""The laws of a training step that every method keeps: the way to its gradients, a cache, and packing change nothing."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from qlora.data.packing import Row
from qlora.methods.base import AdaptedModel
from tests.methods.test_laws import CASES, ROWS, adapted, spoken
from tests.methods.test_prompt import assert_answers_need_no_cache, assert_packed_is_alone, gradients_of
from tests.rounding import GRADIENT, rounding
from tests.tiny import difference, tiny_checkpoint

DROPS = [name for name, case in CASES.items() if getattr(case.section, "dropout", 0)]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_checkpoint(tmp_path_factory.mktemp("base"))


@pytest.fixture(scope="module", params=CASES)
def model(request: pytest.FixtureRequest, checkpoint: Path) -> AdaptedModel:
    """Each case once, with values in its adapter and without dropout."""
    made = adapted(checkpoint, CASES[request.param], stirred=True)
    for module in made.model.modules():
        if isinstance(vars(module).get("dropout"), float):
            module.dropout = 0.0  # type: ignore[assignment]
    return made


def in_turn(model: AdaptedModel, rows: list[Row], size: int) -> dict[str, torch.Tensor]:
    """The sum of the gradients of micro-batches of ``size`` rows, one after the other behind the boundary."""
    parts = [gradients_of(model, rows[start : start + size], size) for start in range(0, len(rows), size)]
    return {name: torch.stack([part[name] for part in parts]).sum(0) for name in parts[0]}


def assert_same(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor], tolerance: float) -> None:
    assert found.keys() == expected.keys()
    worst = max(expected, key=lambda name: difference(found[name], expected[name]))
    assert difference(found[worst], expected[worst]) <= tolerance, worst


@pytest.mark.sampled
def test_gradients_are_the_same_by_every_way(model: AdaptedModel) -> None:
    """Resident, recomputed, and layer by layer with whole, even and uneven micro-batches."""
    rows = spoken(model, ROWS[:4])
    resident = gradients_of(model, rows)
    assert all(grad.any() for grad in resident.values())
    assert_same(gradients_of(model, rows, 4), resident, rounding(GRADIENT))
    for size in (1, 3):
        assert_same(in_turn(model, rows, size), resident, rounding(GRADIENT))
        assert_same(gradients_of(model, rows, size), resident, rounding(GRADIENT))


@pytest.mark.sampled
def test_answers_need_no_cache(model: AdaptedModel) -> None:
    assert_answers_need_no_cache(model, 6)


@pytest.mark.sampled
def test_packed_is_alone(model: AdaptedModel) -> None:
    assert_packed_is_alone(model)


@pytest.mark.parametrize("name", DROPS)
def test_dropout_is_drawn_again_in_the_recompute(checkpoint: Path, name: str) -> None:
    model = adapted(checkpoint, CASES[name], stirred=True)
    found = []
    for seed, at_once in ((5, None), (5, 4), (6, None)):
        torch.manual_seed(seed)
        found.append(gradients_of(model, ROWS[:4], at_once))
    assert_same(found[1], found[0], rounding(GRADIENT))
    with pytest.raises(AssertionError):
        assert_same(found[2], found[0], 1e-2)
