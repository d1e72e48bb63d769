"""One training step, taken through the trainer as a user would: its loss and gradients, and how two of them are compared.

Knows the trainer's public side; must not know how it goes about a step.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

from qlora.training.log import Step
from qlora.training.loop import Trainer
from qlora.training.way import Way
from tests.rounding import FLOOR, MODEL, difference, rounding

LOSS = rounding()
"""How far two orders of sums may take the loss of a tiny model of two layers, relative."""
GRADIENT = rounding(2 * MODEL)
"""… and a gradient, relative to the largest of its tensor."""
LATER = 1e-3
"""A loss after some steps of Adam, which divides a gradient by its own size: what is rounding in a gradient near zero is all of
its step."""
EPS = torch.finfo(torch.float32).eps


def take(trainer: Trainer, count: int) -> list[tuple[float, float]]:
    """(loss, norm of the gradients) of the next steps."""
    return [(step.loss, step.grad_norm) for step in (next(trainer) for _ in range(count))]


def go(trainer: Trainer, way: Way) -> Trainer:
    """Have rows go this way from now on."""
    trainer.state.way = way
    trainer.passage.take(way)
    return trainer


def step_of(trainer: Trainer) -> tuple[Step, dict[str, Tensor]]:
    """Take a step whose optimizer stands still: what the step tells, and the gradients that would have moved it."""
    found: dict[str, Tensor] = {}
    optimizer: Any = trainer.state.optimizer
    move = optimizer.step

    def look(*_: Any, **__: Any) -> None:
        parameters = trainer.model.trainable_parameters().items()
        found.update({name: values.grad.clone() for name, values in parameters if values.grad is not None})

    optimizer.step = look
    try:
        return next(trainer), found
    finally:
        optimizer.step = move


def same_bits(found: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> None:
    assert found.keys() == expected.keys()
    for name, values in expected.items():
        assert torch.equal(found[name], values), name


def close(found: Mapping[str, Tensor], expected: Mapping[str, Tensor], allowed: float = GRADIENT) -> None:
    """Each within ``allowed`` of its largest value; and where terms cancel, within the rounding of what cancelled.

    Example: queries of a text of two tokens get gradients that are sums of large terms to almost nothing.
    """
    assert found.keys() == expected.keys()
    largest = max(float(values.abs().max()) for values in expected.values())
    assert largest > 0
    for name, values in expected.items():
        worst = float((found[name].double() - values.double()).abs().max())
        bound = allowed * float(values.abs().max()) + FLOOR * EPS * largest
        assert worst <= bound, (
            f"{name}: {difference(found[name], values):.1e} of its largest value, {allowed:.1e} allowed"
        )


def peak_of(work: Callable[[], object]) -> int:
    """The most bytes that torch's allocator held at one time during ``work``, beyond what it held before."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        work()
    events = [event for event in profiler.profiler.kineto_results.events() if event.name() == "[memory]"]  # type: ignore[union-attr]
    live = peak = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        live += event.nbytes()
        peak = max(peak, live)
    assert peak > 0
    return peak
