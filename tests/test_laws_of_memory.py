"""The law of memory: where weights and layer inputs are kept, and how a step is cut, change memory and speed alone.

Losses and gradients of every arrangement are held against those of the resident model, for the most part to the last bit
and with dropout on. Where the order of a sum is another one, float noise is allowed: tiles of an MLP and slices of a head
give matrix products of other shapes, which a CPU's kernels add up in another order; so do micro-batches of other sizes.
Dropout draws in the order of the computation, so it is compared between arrangements that cut a step in the same way.
"""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from qlora import recipe as config
from qlora.errors import MethodError
from qlora.evaluation import answers, score
from qlora.export import merge
from qlora.methods import Adapters, apply_method, load_adapter, save_adapter
from qlora.model import load_base
from qlora.model.load import Base
from qlora.recipe import LoRA, MemorySection, ModelSection, TrainingSection
from qlora.residence.layers import unwrap_layers
from qlora.residence.placement import Placement
from qlora.training import Trainer
from tests.methods.test_laws import CASES, TARGETS, Case, spoken
from tests.tiny import FAMILIES, adapter_bytes, difference, gradients, logits_of, random_rows, stir, tiny_checkpoint

CPU = torch.device("cpu")
LAYERS = 4
ROWS = random_rows(20, seed=3)[:5]  # of odd lengths; in micro-batches of 2 the last one is short
STEP = {"batch_size": 5, "micro_batch_size": 2, "steps": 10, "learning_rate": 1e-2}

STREAMED = {"layers": "streamed"}
FILE = {"layers": "streamed", "tier": "disk"}
NOISE = 5e-6
"""Relative to the largest gradient of a tensor, where the order of a sum is another one."""

PLAIN = {"gradient_checkpointing": False}
MICRO = {"accumulation": "micro_batch_major"}
HOST = {"embedding": "host", "head": "host"}
EVERYTHING = {**FILE, **HOST, "layers": 1, "slots": 3, "mlp_tile": 7, "layer_inputs": "disk"}
# what is arranged otherwise: (memory, training, the difference allowed)
ARRANGEMENTS: dict[str, tuple[dict[str, Any], dict[str, Any], float]] = {
    "from the file": (FILE, {}, 0),
    "half resident": ({"layers": 2}, {}, 0),
    "streamed micro-batch by micro-batch": ({**FILE, "slots": 3}, MICRO, 0),
    "tiled": ({"mlp_tile": 5}, {}, NOISE),
    "everything": (EVERYTHING, {}, NOISE),
    "everything, micro-batch by micro-batch": ({**EVERYTHING, "slots": 2, "layer_inputs": "host"}, MICRO, NOISE),
}
MORE: dict[str, tuple[dict[str, Any], dict[str, Any], float]] = {
    "streamed": (STREAMED, {}, 0),
    "one streamed, from the file": ({"layers": LAYERS - 1, "tier": "disk"}, {}, 0),
    "more slots than layers": ({**STREAMED, "slots": 9}, {}, 0),
    "recomputed micro-batch by micro-batch": ({}, MICRO, 0),
    "inputs on disk": ({"layer_inputs": "disk"}, {}, 0),
    "embedding and head on the host": (HOST, {}, NOISE),
}
FAMILY_ARRANGEMENTS = {"llama": ARRANGEMENTS | MORE, "qwen2": ARRANGEMENTS, "gemma2": ARRANGEMENTS}


@pytest.fixture(autouse=True)
def _poison(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Whoever reads a slot after its layer left gets NaN."""
    monkeypatch.setattr(Placement, "poison", True)
    yield
    gc.collect()


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """The folder of a family's checkpoint; one of its file caches is ``cache`` in it."""
    found: dict[str, Path] = {}

    def folder(family: str) -> Path:
        if family not in found:
            found[family] = tiny_checkpoint(tmp_path_factory.mktemp(family), family, num_hidden_layers=LAYERS)
        return found[family]

    return folder


def base_of(folder: Path, memory: dict[str, Any], quantization: str = "nf4", **section: Any) -> Base:
    model = ModelSection(name=str(folder), quantization=quantization, compute_dtype="fp32", **section)  # type: ignore[arg-type]
    return load_base(model, CPU, memory=MemorySection(**memory, cache=str(folder / "cache")))


def measured(
    base: Base, memory: dict[str, Any], training: dict[str, Any], section: Any = None
) -> tuple[float, dict[str, torch.Tensor]]:
    """The loss of one step and the gradients of its adapter; with dropout on."""
    model = apply_method(base, section or LoRA(r=4, alpha=8, dropout=0.1))
    stir(model, 0.05)
    trainer = Trainer(model, ROWS, TrainingSection(**{**STEP, **training}), memory=MemorySection(**memory))
    loss, _ = trainer._gradients(ROWS)
    found = gradients(model)
    unwrap_layers(base.model)
    model.remove()
    return loss, found


def compare(found: tuple[float, dict[str, torch.Tensor]], expected: tuple[float, Any], allowed: float) -> None:
    assert found[0] == pytest.approx(expected[0], rel=max(allowed, 1e-7))
    assert found[1].keys() == expected[1].keys()
    for name, values in expected[1].items():
        if allowed:
            assert difference(found[1][name], values) <= allowed, name
        else:
            assert torch.equal(found[1][name], values), name


@pytest.mark.parametrize("family", FAMILIES)
def test_every_arrangement_gives_the_resident_gradients(folders: Callable[[str], Path], family: str) -> None:
    folder, still = folders(family), LoRA(r=4, alpha=8)
    resident = base_of(folder, {})
    references = {None: measured(resident, {}, {}), "micro_batch_major": measured(resident, {}, PLAIN)}
    assert all(values.isfinite().all() and values.any() for values in references[None][1].values())
    whole = measured(resident, {}, {**PLAIN, "micro_batch_size": 5}, still)
    for training in ({}, MICRO):
        compare(measured(resident, {}, training, still), whole, NOISE)
    for name, (memory, training, allowed) in FAMILY_ARRANGEMENTS[family].items():
        base = base_of(folder, memory)
        assert (base.placement is not None) == ("layers" in memory)
        tiled = "mlp_tile" in memory  # a tile draws its dropout before the next one
        expected = whole if tiled else references[training.get("accumulation")]
        found = measured(base, memory, training, still if tiled else None)
        print(f"{family}, {name}: {max(difference(found[1][key], expected[1][key]) for key in expected[1]):.1e}")
        compare(found, expected, allowed)
        if base.placement is not None:
            assert base.placement.fetched >= len(base.placement.order)


# --- methods -----------------------------------------------------------------------------------------------------------

PARTLY = {**FILE, "layers": 1}
FEW = ROWS[:3]


def trainer_of(
    folder: Path, case: Case, memory: dict[str, Any], runs: Path | None = None, fresh: bool = True
) -> Trainer:
    base = base_of(folder, memory, case.quantization)
    model = apply_method(base, case.section)
    training = TrainingSection(batch_size=3, micro_batch_size=2, steps=10, learning_rate=1e-2, weight_decay=0.1)
    trainer = Trainer(model, spoken(model, FEW), training, runs)
    if case.reads_data and fresh:
        model.prepare(trainer.batches())
    return trainer


@pytest.mark.parametrize("name", CASES)
def test_every_method_trains_streamed_as_resident_whatever_is_asked_in_between(
    folders: Callable[[str], Path], name: str
) -> None:
    case, folder = CASES[name], folders("llama")
    if name == "full":
        with pytest.raises(MethodError, match=r"streamed .*; set memory\.layers=resident, or method\.name=lora"):
            trainer_of(folder, case, PARTLY)
        return
    resident, streamed = trainer_of(folder, case, {}), trainer_of(folder, case, PARTLY)
    expected = [next(resident).loss for _ in range(2)]
    found = [next(streamed).loss]
    between = score(streamed.model, FEW[:1])
    answers(streamed.model, [[5, 6, 7], [8, 9]], 2)
    found.append(next(streamed).loss)
    assert found == expected
    assert adapter_bytes(streamed.model) == adapter_bytes(resident.model)
    assert between != score(streamed.model, FEW[:1])
    with streamed.model.disabled(), resident.model.disabled():
        assert torch.equal(logits_of(streamed.model.model), logits_of(resident.model.model))


@pytest.mark.parametrize(
    ("name", "quantization", "memory"),
    [
        ("pissa", "int8", PARTLY),
        ("pissa", "none", {"layers": 1}),
        ("dora", "none", PARTLY),
        ("whole layers", "int8", {"layers": 1}),
        ("whole layers", "none", PARTLY),
    ],
)
def test_other_quantisations_stream_too(
    folders: Callable[[str], Path], name: str, quantization: str, memory: dict[str, Any]
) -> None:
    """Whole layers as well: their copies train and stay, the layers themselves are streamed for whoever asks the base."""
    section = CASES[name].section if name in CASES else config.Modules(modules=("layers.1", "layers.2.mlp.up_proj"))
    case = Case(section, quantization=quantization)
    resident, streamed = (trainer_of(folders("qwen2"), case, where) for where in ({}, memory))
    assert next(streamed).loss == next(resident).loss
    assert adapter_bytes(streamed.model) == adapter_bytes(resident.model)
    with streamed.model.disabled(), resident.model.disabled():
        assert torch.equal(logits_of(streamed.model.model), logits_of(resident.model.model))


def test_a_streamed_run_goes_on_and_is_merged_as_a_resident_one(folders: Callable[[str], Path], tmp_path: Path) -> None:
    """With PiSSA, which changes the frozen weights: a process has its own copy of what it changed of a shared cache."""
    folder, case = folders("llama"), CASES["pissa"]
    whole = trainer_of(folder, case, {}, tmp_path / "whole")
    losses = [next(whole).loss for _ in range(10)]
    first = trainer_of(folder, case, PARTLY, tmp_path / "cut")
    assert [next(first).loss for _ in range(6)] == losses[:6]
    second = trainer_of(folder, case, {**STREAMED, "slots": 3}, tmp_path / "cut", fresh=False)
    second.load(first.save())
    assert [next(second).loss for _ in range(4)] == losses[6:]
    assert adapter_bytes(second.model) == adapter_bytes(whole.model)
    files = []
    for run in (whole, second):
        place = tmp_path / f"adapter-{len(files)}"
        save_adapter(run.model, place)
        merge(folder, place, place / "merged", quantization="nf4", compute_dtype="fp32", dtype="fp32")
        files.append((place / "merged/model.safetensors").read_bytes())
    assert files[0] == files[1]


def test_adapters_come_and_go_on_a_streamed_base(folders: Callable[[str], Path], tmp_path: Path) -> None:
    folder = folders("qwen2")
    sections = {"a": LoRA(r=4, target_modules=TARGETS), "b": LoRA(r=2, init="pissa"), "c": config.DoRA(r=2)}
    found = {}
    for memory in ({}, PARTLY):
        base, logits = base_of(folder, memory), []
        alone = logits_of(base.model)
        for name, section in sections.items():
            model = apply_method(base, section)
            stir(model, 0.05)
            logits.append(logits_of(model.model))
            place = tmp_path / f"{name}-{len(memory)}"
            save_adapter(model, place)
            model.remove()
            assert torch.equal(logits_of(base.model), alone)
            model.attach()
            assert torch.equal(logits_of(base.model), logits[-1])
            model.remove()
            again = load_adapter(base, place)
            assert torch.equal(logits_of(again.model), logits[-1])
            again.remove()
        found[len(memory)] = [alone, *logits]
        assert all(not torch.equal(alone, values) for values in logits)
    for resident, streamed in zip(found[0], found[len(PARTLY)], strict=True):
        assert torch.equal(resident, streamed)


def test_adapters_are_switched_and_mixed_on_a_streamed_base(folders: Callable[[str], Path]) -> None:
    found: list[list[torch.Tensor]] = []
    for memory in ({}, PARTLY):
        base = base_of(folders("gemma2"), memory)
        adapters = Adapters(base)
        seen = []
        for name, section in (("a", LoRA(r=4, target_modules=TARGETS)), ("b", LoRA(r=2))):
            stir(adapters.add(name, section), 0.05)
            with adapters.using(name):
                seen.append(logits_of(base.model))
        with adapters.mixed(["b", None]):
            seen.append(logits_of(base.model))
        found.append(seen)
    for resident, streamed in zip(*found, strict=True):
        assert torch.equal(resident, streamed)
