"""Batches: which rows a step takes, and how rows become tensors.

The order of an epoch is a permutation drawn from (seed, epoch) and a step takes a slice of it, so the place in the data
*is* the step number: nothing to save, nothing to restore wrongly. Where examples cannot share rows, steps of rows of like length
are made from that order, so that little of what goes through the model is padding. Knows rows; must not know a model or an optimizer.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import numpy
import torch

from qlora.data.packing import Row
from qlora.model.attention import PackedMask
from qlora.model.loss import IGNORE_INDEX

NEAR = 64  # steps, among whose rows those of like length are put together: long ones stay spread over the epoch


def steps_per_epoch(count: int, batch_size: int) -> int:
    """Steps that ``count`` rows give at ``batch_size`` rows a step; the last one may be short."""
    return -(-count // batch_size)


def step_rows(count: int, batch_size: int, step: int, seed: int, lengths: tuple[int, ...] | None = None) -> list[int]:
    """The rows of a step, counted from 0 over all epochs. Every epoch holds each of ``count`` rows exactly once; with their
    ``lengths``, those of a step are of like length.

    Example: 5 rows by 2 → steps 0, 1, 2 hold 2, 2 and 1 rows; step 3 begins the second epoch in a new order.
    """
    epoch, place = divmod(step, steps_per_epoch(count, batch_size))
    order = _order(count, seed, epoch) if lengths is None else _order_by_length(lengths, batch_size, seed, epoch)
    return list(order[place * batch_size : (place + 1) * batch_size])


@lru_cache(maxsize=2)
def _order(count: int, seed: int, epoch: int) -> tuple[int, ...]:
    return tuple(numpy.random.Generator(numpy.random.PCG64([seed, epoch])).permutation(count).tolist())


@lru_cache(maxsize=2)
def _order_by_length(lengths: tuple[int, ...], batch_size: int, seed: int, epoch: int) -> tuple[int, ...]:
    """The drawn order, sorted within every ``NEAR`` steps, and these steps in an order drawn anew; a short one stays the last."""
    drawn, near = _order(len(lengths), seed, epoch), NEAR * batch_size
    rows = [
        row
        for start in range(0, len(drawn), near)
        for row in sorted(drawn[start : start + near], key=lengths.__getitem__)
    ]
    full = len(rows) // batch_size
    steps = numpy.random.Generator(numpy.random.PCG64([seed, epoch, 1])).permutation(full).tolist()
    return tuple(row for step in (*steps, full) for row in rows[step * batch_size : (step + 1) * batch_size])


def collate(rows: list[Row], pad_id: int, virtual_tokens: int = 0) -> dict[str, Any]:
    """Rows as int64 tensors ``[R, T]``: ``input_ids``, ``labels``, ``position_ids``; T is the longest row's length, and R counts
    the sequences of rows that enter ``apart``. And ``mask``, which says where their examples begin.

    ``virtual_tokens`` of them, ids −P … −1, stand before every example (see ``packing.py``).

    Padding stands on the right: ids ``pad_id``, labels ``IGNORE_INDEX`` by position, whatever id the pad is, and
    positions that count on, since a restart would look like one more packed example, for which masks are built. The
    causal mask already keeps real tokens from seeing what is to their right, so there is no attention mask. No position
    is beyond the largest of the real ones, since a learned table may end there: behind that, padding counts from 0 again.
    Only in a batch with packed rows, which has its masks anyway, is there so much of it.
    """
    rows = [one.behind_virtual_tokens(virtual_tokens) for row in rows for one in row.sequences()]
    width = max(len(row.ids) for row in rows)
    ids = numpy.full((len(rows), width), pad_id, dtype=numpy.int64)
    labels = numpy.full((len(rows), width), IGNORE_INDEX, dtype=numpy.int64)
    positions = numpy.empty((len(rows), width), dtype=numpy.int64)
    beyond = 1 + max(int(row.positions.max()) for row in rows)
    for at, row in enumerate(rows):
        n = len(row.ids)
        ids[at, :n] = row.ids
        labels[at, :n] = row.labels
        positions[at, :n] = row.positions
        positions[at, n:] = (numpy.arange(1, width - n + 1) + row.positions[-1]) % beyond
    return {
        "input_ids": torch.from_numpy(ids),
        "labels": torch.from_numpy(labels),
        "position_ids": torch.from_numpy(positions),
        "mask": PackedMask.of(positions),
    }
