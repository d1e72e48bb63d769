"""Random packed rows and adapted tiny models to train on them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy
import torch

from qlora.data import Row
from qlora.data.examples import make_example
from qlora.data.packing import make_rows
from qlora.methods import AdaptedModel, apply_method
from qlora.recipe import LoRA
from qlora.training import Trainer, step
from qlora.training.way import Way
from tests.methods.tiny import VOCABULARY, stir, tiny_base, tiny_checkpoint


def random_rows(examples: int, packing: bool = True, seed: int = 0, longest: int = 11) -> list[Row]:
    """Rows of examples of 2 to ``longest`` tokens, a random part of them targets, two or more to a packed row."""
    random = numpy.random.default_rng(seed)
    made = []
    for _ in range(examples):
        length = int(random.integers(2, longest + 1))
        trained = random.random(length) < 0.6
        trained[1] = True  # a row without a target would be left out by the data room
        made.append(make_example(random.integers(3, VOCABULARY, length), trained))
    return make_rows(made, 2 * longest + 1, packing)


def tiny_model(folder: Path, family: str = "llama", stirred: bool = True, **method: Any) -> AdaptedModel:
    """An adapted NF4 model; ``stirred`` gives the adapter values, so that both halves get a gradient from the start."""
    if not (folder / "config.json").is_file():
        tiny_checkpoint(folder, family)
    quantization = method.pop("quantization", "nf4")
    model = apply_method(tiny_base(folder, quantization), LoRA(**{"r": 4, "alpha": 8, **method}))
    if stirred:
        stir(model, 0.05)
    return model


def mean_gradients(trainer: Trainer, rows: list[Row]) -> tuple[float, int]:
    """Fill ``.grad`` as a step does; (mean loss, target tokens)."""
    return step.gradients(trainer.state, trainer.objective, rows), trainer.objective.denominator(rows)


def go(trainer: Trainer, way: Way) -> Trainer:
    """Have rows go this way from now on."""
    trainer.state.way = way
    trainer.passage.take(way)
    return trainer


def adapter_bytes(model: AdaptedModel) -> dict[str, bytes]:
    return {name: values.detach().numpy().tobytes() for name, values in model.trainable_parameters().items()}


def gradients(model: AdaptedModel) -> dict[str, torch.Tensor]:
    """Copies of the gradients, by parameter; they are cleared."""
    found = {}
    for name, values in model.trainable_parameters().items():
        assert values.grad is not None, name
        found[name] = values.grad.clone()
        values.grad = None
    return found
