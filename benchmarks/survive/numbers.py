"""NaN and infinity, put into rows, weights and gradients at random: does anything move, and is the place named?

Every trial trains a tiny model to a random step, injects one value, and takes the next step under ``stop`` or ``skip``. It
survives when adapter and optimizer are what they were, bit for bit, and the sentence names step, rows and module.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy
import torch

from benchmarks.survive.matrix import OPTIMIZERS, PLACEMENTS, Cell, trainer_for, write_base
from benchmarks.survive.size import Size
from qlora.data import Row, step_rows
from qlora.errors import NonFiniteError
from qlora.training import Trainer
from qlora.training.optim import optimizer_tensors

BAD = 7
"""A token that no row holds but the one it is put into."""
FAULTS = {
    "NaN or infinity met through a row of the data": "row",
    "NaN or infinity in a frozen weight": "frozen",
    "NaN or infinity in a gradient": "gradient",
}
METHOD_NAMES = ("lora", "dora", "adalora", "bottleneck, houlsby", "lora + bottleneck")


def run(place: Path, size: Size, say: Callable[[str], None]) -> list[dict[str, Any]]:
    """Rows of the table: fault, trials, survived, lost."""
    chance, rows, base = random.Random(3), list[dict[str, Any]](), write_base(place / "base")
    for fault, kind in FAULTS.items():
        lost = []
        trials = size.of(3, 40)
        for _ in range(trials):
            cell = Cell(
                chance.choice(METHOD_NAMES),
                chance.choice(OPTIMIZERS),
                chance.choice([name for name in PLACEMENTS if name != "optimizer in backward"]),
                chance.random() < 0.5,
                "",
            )
            value, step, policy = (
                chance.choice((math.nan, math.inf)),
                chance.randrange(4),
                chance.choice(("stop", "skip")),
            )
            if (why := trial(base, place, cell, kind, value, step, policy)) is not None:
                lost.append(f"{cell}, {value} at step {step + 1}, {policy}: {why}")
                say(f"{fault}: {lost[-1]}")
        rows.append({"fault": fault, "trials": trials, "survived": trials - len(lost), "lost": "; ".join(lost)})
    return rows


def trial(base: Path, place: Path, cell: Cell, kind: str, value: float, step: int, policy: str) -> str | None:
    """What went wrong, or None."""
    trainer = trainer_for(base, place / "run", cell, not_finite=policy)
    places = step_rows(len(trainer.rows), 2, step, trainer.training.seed)
    trainer.rows = [_without(row) for row in trainer.rows]
    if kind == "row":
        trainer.rows = [_with(row) if at == places[0] else row for at, row in enumerate(trainer.rows)]
    for _ in range(step):
        next(trainer)
    expected = inject(trainer, kind, value)
    before = state_of(trainer)
    try:
        words = next(trainer).note
        stopped = False
    except NonFiniteError as error:
        words, stopped = str(error), True
    if state_of(trainer) != before:
        return "something moved"
    if stopped != (policy == "stop"):
        return f"it {'stopped' if stopped else 'went on'}"
    named = [f"Step {step + 1} gave", "on rows", "No step was taken", *expected]
    named += [f"on rows {places[0]};"] if kind == "row" else []
    return next((f"the sentence lacks '{part}': {words}" for part in named if part not in words), None)


def inject(trainer: Trainer, kind: str, value: float) -> list[str]:
    """Put ``value`` where ``kind`` says; return what the sentence must then name."""
    network = trainer.model.model
    if kind == "row":
        embedding = network.get_input_embeddings()
        with torch.no_grad():
            embedding.weight[BAD] = value
        return ["model.embed_tokens"]
    if kind == "gradient":
        name, parameter = list(trainer.state.parameters.items())[len(trainer.state.parameters) // 2]
        parameter.register_hook(lambda gradient: gradient * value)
        return [name]
    norm = network.get_submodule("model.norm")
    with torch.no_grad():
        norm.weight[0] = value
    return ["the output of model.norm, whose weight is not finite"]


def state_of(trainer: Trainer) -> tuple[dict[str, bytes], dict[str, bytes]]:
    """Every byte that a step may move."""
    moments = optimizer_tensors(trainer.state.optimizer, trainer.state.parameters)
    values = {
        name: p.detach().cpu().contiguous().view(torch.uint8).numpy().tobytes()
        for name, p in trainer.state.parameters.items()
    }
    return values, {name: m.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes() for name, m in moments.items()}


def _without(row: Row) -> Row:
    ids, labels = (numpy.where(values == BAD, BAD + 1, values) for values in (row.ids, row.labels))
    return Row(ids, labels, row.positions, row.examples)


def _with(row: Row) -> Row:
    ids = row.ids.copy()
    ids[1] = BAD
    return Row(ids, row.labels, row.positions, row.examples)
