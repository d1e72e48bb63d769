"""The rehearsal: before the first step, the most expensive step that the data can give is taken once, and taken back.

    the longest rows ─► forward ─► backward ─► optimizer ─► parameters, moments, gradients, random state as they were
                                                            what is left: the peak of memory, and the time

Otherwise memory runs out where the longest rows happen to stand, hours later. Where it runs out here, the smaller ways are
tried (``way.py``) and the one that fits is kept.

Knows a training's state and its passage; must not know a recipe's files or the plan.
"""

from __future__ import annotations

import heapq
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import numpy
import torch
from torch import Tensor, nn

from qlora.data.packing import Row
from qlora.errors import DoesNotFitError, first_line
from qlora.machine.device import peak_since_reset, ran_out_of_memory, release_memory, reset_peak_memory
from qlora.machine.disk import bytes_text
from qlora.model.loss import IGNORE_INDEX
from qlora.residence.layers import RecomputedLayer
from qlora.training.objectives import Objective
from qlora.training.optim import make_state, steps_taken_back
from qlora.training.passage import Passage, alone_in_memory
from qlora.training.state import TrainState
from qlora.training.step import gradients, move
from qlora.training.way import Way


@dataclass(frozen=True)
class Rehearsal:
    """What the most expensive step took."""

    rows: int
    length: int
    """Of the longest row, in tokens, with those that the method puts before a text."""
    tokens: int
    """That went through the model, padding and virtual tokens among them."""
    seconds: float
    peak_memory_bytes: int
    measured: str
    """What that is the peak of."""
    micro_batch_size: int
    """Rows at once, in the end."""
    notes: tuple[str, ...] = ()
    """Sentences about smaller ways that had to be taken."""

    def __str__(self) -> str:
        rows = "1 row" if self.rows == 1 else f"{self.rows} rows"
        return (
            f"Rehearsed the most expensive step: {rows} of up to {self.length:,} tokens ({self.tokens:,} with padding), "
            f"{self.micro_batch_size} at once, took {self.seconds:.1f} s and at most {bytes_text(self.peak_memory_bytes)} "
            f"({self.measured})."
        )


def rehearse(state: TrainState, objective: Objective, passage: Passage) -> Rehearsal:
    """Take the worst step and take it back. Raises DoesNotFitError when even the smallest way does not fit."""
    model, notes = state.model, list[str]()
    device, virtual = model.device, model.virtual_tokens
    while True:
        reason = ""
        rows = worst_rows(passage.rows, state.processes.most(state.training.batch_size), state.way, virtual)
        lengths = [length_of(row, virtual) for row in rows]
        try:
            with _taken_back(state) as kept:
                make_state(state.optimizer, state.masters.values.values())  # every step but the first begins with it
                release_memory(device)
                alone = reset_peak_memory(device)
                begin = time.perf_counter()
                gradients(state, objective, rows)
                move(state)
                if device.type == "cuda":
                    torch.cuda.synchronize(device)
                seconds = time.perf_counter() - begin
                peak = peak_since_reset(device) - (kept if device.type == "cpu" else 0)
        except Exception as error:
            if not ran_out_of_memory(error):
                raise
            reason = first_line(error)
            if state.lockstep:
                raise DoesNotFitError(alone_in_memory("The most expensive step of this data", reason)) from None
        failed = [bool(one) for (one,) in state.processes.gather(bool(reason))]
        if not any(failed):
            break
        # only here are the tensors of the failed try without a holder
        release_memory(device)
        reason = reason or f"in process {failed.index(True)} of {len(failed)}"
        what = f"The most expensive step of this data, {len(rows)} rows of up to {max(lengths):,} tokens,"
        state.way, note = passage.smaller(state.way, len(rows), what, reason)
        notes.append(note)
    together = state.way.micro_batches(range(len(rows)))
    measured = "allocated on the GPU" if device.type == "cuda" else "resident in this process"
    return Rehearsal(
        rows=len(rows),
        length=max(lengths),
        tokens=sum(len(places) * max(lengths[place] for place in places) for places in together),
        seconds=seconds,
        peak_memory_bytes=peak,
        measured=measured if alone else f"{measured} since it began, which the system cannot tell apart",
        micro_batch_size=state.way.micro_batch_size,
        notes=tuple(notes),
    )


def length_of(row: Row, virtual: int) -> int:
    """The row's tokens with the ``virtual`` ones that stand before each of its examples; padded, where these enter apart."""
    sequences = row.sequences()
    return len(sequences) * max(len(one.ids) + virtual * len(one.examples) for one in sequences)


def worst_rows(rows: Sequence[Row], batch_size: int, way: Way, virtual: int) -> list[Row]:
    """The rows of the most expensive step that some order of ``rows`` can give, in their most expensive order.

    Rows that are together are padded to the longest of them, so the longest come together. Beside that a packed row costs,
    since its batch gets a mask of length², and targets, of which ``loss_chunk`` have logits at once: the longest row of
    those that are together gets as many as any rows together have.
    """
    worst = heapq.nlargest(
        batch_size, rows, key=lambda row: (length_of(row, virtual), len(row.examples), row.target_tokens)
    )
    together = len(worst) if way.layer_major else min(way.micro_batch_size, len(worst))
    place = max(together, min(2, len(worst))) - 1
    if not any(row.packed for row in worst[: place + 1]) and place:
        packed = (row for row in rows if row.packed)
        longest = max(packed, key=lambda row: length_of(row, virtual), default=None)
        worst[place] = longest or worst[place]
    most = sum(heapq.nlargest(together, (row.target_tokens for row in rows)))
    missing = min(way.loss_chunk, most) - sum(row.target_tokens for row in worst[:together])
    if missing > 0:
        worst[0] = _with_targets(worst[0], missing)
    if len(worst) >= 2 * together:  # not first: there are no gradients yet while the first ones go forward
        worst[:together], worst[together : 2 * together] = worst[together : 2 * together], worst[:together]
    return worst


def _with_targets(row: Row, count: int) -> Row:
    """``row`` with ``count`` more targets, as far as it has room."""
    labels = row.labels.copy()
    silent = numpy.flatnonzero(labels == IGNORE_INDEX)[-count:]
    labels[silent] = labels.max()  # one that the head has: a classifier's are no tokens
    return replace(row, labels=labels)


@contextmanager
def _taken_back(state: TrainState) -> Iterator[int]:
    """Inside, a step may be taken; afterwards there is no trace of it. Yields the bytes of the copies in host memory."""
    network, scale = state.model.model, state.loss_scale
    modes = [(module, module.training) for module in network.modules()]
    state.masters.follow()
    state.settle()
    with steps_taken_back(state.optimizer, state.masters.tensors()) as kept, _forgetting(network):
        try:
            yield kept
        finally:
            state.masters.drop_gradients()
            state.masters.doubt()
            state.loss_scale, state.torn = scale, False
            for module, mode in modes:
                module.training = mode


@contextmanager
def _forgetting(network: nn.Module) -> Iterator[None]:
    """Inside, modules around the layers may remember of the batches they see: a rotary table that grew with the longest text
    (dynamic NTK), a batch norm's running means. Layers may be streamed, and their buffers are not to be touched."""
    layers = [module for module in network.modules() if isinstance(module, RecomputedLayer)]
    inside = {id(module) for layer in layers for module in layer.layer.modules()}
    kept: list[tuple[nn.Module, dict[str, Tensor | None], dict[str, Any]]] = []
    values: list[tuple[Tensor, Tensor]] = []
    for module in network.modules():
        if id(module) in inside or not module._buffers:
            continue
        plain = {key: value for key, value in vars(module).items() if isinstance(value, int | float | Tensor)}
        kept.append((module, dict(module._buffers), plain))
        if isinstance(module, nn.modules.batchnorm._NormBase):
            values += [(held, held.clone()) for held in module.buffers(recurse=False)]
    try:
        yield
    finally:
        for module, buffers, plain in kept:
            module._buffers.update(buffers)
            vars(module).update(plain)
        for held, before in values:
            held.copy_(before)
