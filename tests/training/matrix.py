"""Is a resumed run the same run? Methods × optimizers × placements, bit for bit.

    straight    step 1 … step 5                                                       ► checkpoint, losses
    broken      step 1 … step k, saved ┊ base, adapter, trainer anew, loaded, … 5     ► checkpoint, losses     equal?

Dropout is on, a held-out loss is measured in between, and in half of the cells rows are packed, and adapters in bf16. With 5 rows by 2 an epoch has
three steps, the last one short. A run is broken in the middle of an epoch, at its last step, or twice.
"""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any

import torch

from qlora import recipe
from qlora.errors import InputError
from qlora.evaluation.score import score
from qlora.methods.base import apply_method
from qlora.recipe import MemorySection, ModelSection, TrainingSection
from qlora.residence.load import load_base
from qlora.training.loop import Trainer
from tests.methods.test_laws import spoken
from tests.tiny import CPU, random_rows

STEPS = 5
# 32 × 128 = 64 × 64 = 4,096 values and more have 8-bit state
TARGETS = ("q_proj", "v_proj", "down_proj")
HALF: dict[str, Any] = {"r": 32, "alpha": 32, "dropout": 0.1, "target_modules": TARGETS}
FEW: dict[str, Any] = {"r": 4, "target_modules": TARGETS}
ADAPTER: dict[str, Any] = {"size": 64, "dropout": 0.1}

METHODS: dict[str, Any] = {
    "lora": recipe.LoRA(**HALF),
    "lora, rslora, two learning rates": recipe.LoRA(**HALF, rslora=True, learning_rate_ratio=4.0),
    "lora, pissa": recipe.LoRA(**HALF, init="pissa"),
    "lora, loftq": recipe.LoRA(**HALF, init="loftq"),
    "lora, eva": recipe.LoRA(**FEW, dropout=0.1, init="eva"),
    "dora": recipe.DoRA(**HALF),
    "adalora": recipe.AdaLoRA(r=16, initial_r=32, alpha=32, dropout=0.1, target_modules=TARGETS),
    "bottleneck, houlsby": recipe.Bottleneck(form="houlsby", **ADAPTER),
    "bottleneck, lin": recipe.Bottleneck(form="lin", **ADAPTER),
    "bottleneck, pfeiffer": recipe.Bottleneck(form="pfeiffer", **ADAPTER),
    "bottleneck, parallel": recipe.Bottleneck(form="parallel", scale=4.0, **ADAPTER),
    "prompt_tuning": recipe.PromptTuning(tokens=4),
    "p_tuning": recipe.PTuning(tokens=4, hidden_size=64),
    "prefix_tuning": recipe.PrefixTuning(tokens=4),
    "prefix_tuning, projected": recipe.PrefixTuning(tokens=4, projection_size=64),
    "ia3": recipe.IA3(),
    "bitfit": recipe.BitFit(new_biases=True),
    "full": recipe.Full(),
    "modules": recipe.Modules(modules=("layers.1.mlp", "norm")),
    "modules, head": recipe.Modules(modules=("lm_head",)),
    "new_tokens": recipe.NewTokens(tokens=("<tool>", "</tool>")),
    "lora + bottleneck": recipe.Combined(parts=(recipe.LoRA(**HALF), recipe.Bottleneck(**ADAPTER))),
    "lora + prompt_tuning": recipe.Combined(parts=(recipe.LoRA(**FEW), recipe.PromptTuning(tokens=3))),
    "lora + modules + new_tokens": recipe.Combined(
        parts=(recipe.LoRA(**FEW), recipe.Modules(modules=("norm",)), recipe.NewTokens(tokens=("<tool>",)))
    ),
}
OPTIMIZERS = ("adamw", "adamw_8bit", "paged_adamw", "paged_adamw_8bit")
# where things are: (memory, training)
PLACEMENTS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "resident": ({}, {}),
    "streamed from disk": ({"layers": "streamed", "tier": "disk"}, {}),
    "half streamed": ({"layers": 1, "tier": "disk"}, {}),
    "tiled, layer inputs on the host": ({"layer_inputs": "host", "mlp_tile": 7}, {}),
    "embedding and head on the host": ({"embedding": "host", "head": "host"}, {}),
    "micro-batch by micro-batch": ({}, {"accumulation": "micro_batch_major"}),
}
SPREAD: dict[str, Any] = {"layers": "streamed", "tier": "processes"}
"""For several processes alone."""
BROKEN: dict[str, tuple[int, ...]] = {"mid-epoch": (4,), "end of an epoch": (3,), "twice": (1, 3)}


@dataclass(frozen=True)
class Cell:
    """One run of the matrix, by the names above."""

    method: str
    optimizer: str
    placement: str
    packing: bool
    broken_at: str
    narrow: bool = False
    """Whether adapters are in bf16, beside products in fp32 that are quick on any processor; full fine-tuning's too."""


def every_pair() -> list[Cell]:
    """Every pair of method, optimizer, placement, packing and where the run is broken: each method in each placement, the rest
    in turns."""
    ways, optimizers = list(product((True, False), BROKEN)), len(OPTIMIZERS)
    return [
        Cell(
            method,
            OPTIMIZERS[(m + p) % optimizers],
            placement,
            *ways[(m // optimizers + m + 2 * p) % len(ways)],
            narrow=bool((m + p) % 2),
        )
        for (m, method), (p, placement) in product(enumerate(METHODS), enumerate(PLACEMENTS))
    ]


def few() -> list[Cell]:
    """Every method once, and every pair of optimizer, placement, packing and where the run is broken."""
    ways = list(product((True, False), BROKEN))
    placed = list(product(enumerate(OPTIMIZERS), enumerate(PLACEMENTS)))
    cells = []
    for number, method in enumerate(METHODS):
        (o, optimizer), (p, placement) = placed[number % len(placed)]
        cells.append(Cell(method, optimizer, placement, *ways[(2 * o + p) % len(ways)], narrow=bool(number % 2)))
    return cells


@dataclass
class Found:
    """What a cell gave."""

    refused: str = ""
    differs: tuple[str, ...] = ()
    eight_bit: int = 0
    """Tensors of the optimizer's state that have 8 bits."""


def try_cell(base: Path, place: Path, cell: Cell) -> Found:
    """Train a cell straight and broken, in ``place``, which is emptied first."""
    shutil.rmtree(place, ignore_errors=True)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        try:
            straight = trainer_for(base, place / "straight", cell)
        except InputError as error:
            return Found(refused=str(error))
        expected = take(straight, STEPS)
        wanted = files_of(straight.save())

        trainer, found = trainer_for(base, place / "broken", cell), []
        for number, at in enumerate(BROKEN[cell.broken_at]):
            found += take(trainer, at)
            score(trainer.model, trainer.rows[:2])
            trainer.save()
            del trainer  # and with it base, adapter and optimizer
            torch.manual_seed(90 + number)
            trainer = trainer_for(base, place / "broken", cell, again=True)
        found += take(trainer, STEPS)
        files = files_of(trainer.save())
    differs = [name for name in sorted({*wanted, *files}) if wanted.get(name) != files.get(name)]
    differs += [f"step {step[0]}" for step, other in zip(expected, found, strict=True) if step != other]
    states = straight.state.optimizer.state.values()
    eight_bit = sum(v.dtype == torch.uint8 for state in states for v in state.values() if torch.is_tensor(v))
    return Found(differs=tuple(differs), eight_bit=eight_bit)


def trainer_for(base: Path, place: Path, cell: Cell, again: bool = False, rows: int = 5, **training: Any) -> Trainer:
    """A cell's trainer as a process would make it, with everything from the disk; ``again``: to go on where it was saved."""
    memory, way = (SPREAD, {}) if cell.placement == "spread" else PLACEMENTS[cell.placement]
    where = MemorySection(**memory, cache=str(base.with_name("cache")))
    quantization: Any = "none" if cell.method == "full" else "nf4"
    dtype: Any = "bf16" if cell.narrow and cell.method == "full" else "fp32"
    loaded = (
        MemorySection() if (cell.method, cell.placement) == ("full", "spread") else where
    )  # the trainer spreads what trains
    frozen = load_base(ModelSection(name=str(base), quantization=quantization, compute_dtype=dtype), CPU, memory=loaded)
    section = narrowed(METHODS[cell.method]) if cell.narrow else METHODS[cell.method]
    model = apply_method(frozen, section, values_follow=again)
    settings: dict[str, Any] = {
        "batch_size": 2, "micro_batch_size": 1, "steps": STEPS, "learning_rate": 1e-2, "optimizer": cell.optimizer,
        "schedule": "cosine", "warmup_fraction": 0.2, "weight_decay": 0.1, "keep_checkpoints": 1, **way, **training,
    }  # fmt: skip
    given = spoken(model, random_rows(4 * rows, cell.packing, seed=4)[:rows])
    trainer = Trainer(model, given, TrainingSection(**settings), place, where)
    if again:
        assert trainer.load_newest() == []
    else:
        model.prepare(trainer.batches())
    return trainer


def narrowed(section: Any) -> Any:
    """A method's section with its adapter in bf16."""
    if isinstance(section, recipe.Combined):
        return section.model_copy(update={"parts": tuple(map(narrowed, section.parts))})
    return section.model_copy(update={"adapter_dtype": "bf16"})


def take(trainer: Trainer, last: int) -> list[tuple[Any, ...]]:
    """Steps up to number ``last``: what two runs of the same steps must share to the last bit."""
    steps = []
    while trainer.step_number < last:
        step = next(trainer)
        steps.append((step.number, step.loss, step.grad_norm, step.learning_rate, step.epoch, step.target_tokens))
    return steps


def files_of(folder: Path) -> dict[str, bytes]:
    """Every file of a checkpoint: adapter, method state, optimizer state, step, checksums."""
    return {path.name: path.read_bytes() for path in folder.iterdir()}
