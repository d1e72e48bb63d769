"""Layers spread over processes: the same bytes, and so the same losses, as where every process holds all of them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from qlora.errors import DoesNotFitError, RecipeError
from qlora.evaluation.score import score
from qlora.machine.processes import here
from qlora.residence.homes import SharedHostHome
from qlora.residence.placement import by_main
from qlora.residence.spread import SpreadHome
from tests.tiny import CPU, tiny_base, tiny_checkpoint
from tests.together import together
from tests.training.test_several import WAYS, cell, compare, trainer

NOT_NUMBERS = (0x7FC0, 0x7F81, 0xFFFF, 0xFF80, 0x7F80, 0x0001)
"""bf16 patterns: quiet, signalling and negative NaN, both infinities, and the smallest subnormal."""


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("spread") / "base"
    tiny_checkpoint(folder)
    return folder


def bytes_come_back() -> None:
    """What was written, by each process in full, is read by each, whole or in part: bytes, whatever numbers they would be."""
    patterns = torch.tensor(NOT_NUMBERS, dtype=torch.int32).to(torch.uint16).view(torch.uint8)
    images = {0: patterns.repeat(86)[:1024], 3: torch.arange(256, dtype=torch.uint8).repeat(3)}
    home = SpreadHome({layer: len(image) for layer, image in images.items()}, CPU)
    for layer, image in images.items():
        for start in range(0, len(image), 100):
            home.write(layer, start, image[start : start + 100])
    for layer, image in images.items():
        for start, count in ((0, len(image)), (0, 7), (500, 200), (len(image) - 1, 1)):
            found = torch.zeros(count, dtype=torch.uint8)
            home.read(layer, found, start)
            assert torch.equal(found, image[start : start + count]), (layer, start)
    assert all(len(part) == -(-len(images[layer]) // here().size) for layer, part in home.parts.items())


@pytest.mark.slow
@pytest.mark.parametrize("size", [2, 3])
def test_bytes_come_back(size: int) -> None:
    together(size, bytes_come_back)


def host_memory_is_shared() -> None:
    """One process's bytes are everybody's, once; what is written later is the writer's own."""
    home, main = SharedHostHome({0: 512, 3: 256}, CPU), here().main
    home.write(3, 0, torch.full((256,), 7 if main else 8, dtype=torch.uint8))
    home.share()
    found = torch.zeros(256, dtype=torch.uint8)
    home.read(3, found)
    assert (found == 7).all()
    if main:
        home.images[0].fill_(5)  # behind its back: is it the same memory?
    here().barrier()
    assert (home.images[0] == 5).all()
    here().barrier()
    if main:
        home.write(0, 10, torch.full((2,), 6, dtype=torch.uint8))
    here().barrier()
    assert int((home.images[0] == 6).sum()) == (2 if main else 0)
    assert int((home.images[0] == 5).sum()) == (510 if main else 512)


@pytest.mark.slow
def test_host_memory_is_shared() -> None:
    together(3, host_memory_is_shared)


def weights_are_a_residents(base: Path, quantization: str, tier: str) -> None:
    from qlora.recipe import MemorySection, ModelSection
    from qlora.residence.load import load_base

    section = ModelSection(name=str(base), quantization=quantization, compute_dtype="fp32")  # type: ignore[arg-type]
    resident = tiny_base(base, quantization)
    spread = load_base(section, CPU, memory=MemorySection(layers="streamed", tier=tier))  # type: ignore[arg-type]
    placement: Any = spread.placement
    for layer, image in placement.images.items():
        placement.visit(layer)
        for piece in image.pieces:
            path = next(path for path, module in spread.model.named_modules() if module is piece.linear)
            expected = getattr(resident.model.get_submodule(path), piece.name)
            found = getattr(piece.linear, piece.name)
            assert found.dtype == expected.dtype
            assert torch.equal(found.reshape(-1).view(torch.uint8), expected.reshape(-1).view(torch.uint8)), path


@pytest.mark.slow
@pytest.mark.parametrize(
    ("quantization", "tier"), [("nf4", "processes"), ("int8", "processes"), ("none", "processes"), ("nf4", "host")]
)
def test_weights_are_a_residents_bit_for_bit(quantization: str, tier: str, base: Path) -> None:
    together(3, weights_are_a_residents, base, quantization, tier)


@pytest.mark.slow
@pytest.mark.parametrize("way", ["layer by layer", "micro-batch by micro-batch"])
def test_spread_is_resident(way: str, base: Path, tmp_path: Path) -> None:
    """One process with all layers, and 2 and 3 with a part each; in the last step of an epoch some have no row of their own."""
    methods = ["lora", "lora, pissa", "adalora", "prefix_tuning"] if way == "layer by layer" else ["lora"]
    compare(base, tmp_path, [cell(method) for method in methods], (1,), **WAYS[way])
    compare(base, tmp_path, [cell(method, "spread") for method in methods], (2, 3), one=1, **WAYS[way])


def main_evaluates_alone(base: Path, folder: Path) -> None:
    """While the others serve, in the middle of training; and the steps after it are those of a run without it."""
    plain = trainer(base, folder / "plain", cell("lora", "spread"))
    expected = [next(plain).loss for _ in range(4)]
    training, losses = trainer(base, folder / "run", cell("lora", "spread")), []
    for number in range(4):
        losses.append(next(training).loss)
        found = by_main(training.model.base.placement, lambda: score(training.model, training.rows[:3]).loss)
        assert (found is not None) == here().main
        if number == 2:
            training.save()
    assert losses == expected


@pytest.mark.slow
def test_main_evaluates_alone(base: Path, tmp_path: Path) -> None:
    together(2, main_evaluates_alone, base, tmp_path)


def memory_runs_out(base: Path, folder: Path) -> None:
    training = trainer(base, folder / "run", cell("lora", "spread"))

    def too_large(rows: Any, chunk: int) -> Any:
        raise torch.OutOfMemoryError("not enough")

    training.objective.loss = too_large  # type: ignore[method-assign]
    with pytest.raises(DoesNotFitError, match="no smaller way can be agreed on"):
        next(training)


@pytest.mark.slow
def test_memory_that_runs_out_ends_the_run(base: Path, tmp_path: Path) -> None:
    together(2, memory_runs_out, base, tmp_path)


def test_one_process_has_nobody_to_spread_over() -> None:
    with pytest.raises(RecipeError, match="there is one alone"):
        SpreadHome({0: 256}, CPU)
