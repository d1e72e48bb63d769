"""Rows: several examples side by side in one sequence, each with its own positions.

    examples of 5, 3 and 2 tokens, max_length 8
    ids        a a a a a b b b | c c
    positions  0 1 2 3 4 0 1 2 | 0 1        attention never crosses a position that restarts at 0
    labels     . a a a a . b b | . c        an example's first token is nobody's target

A method may put P virtual tokens before every example (prompt tuning). Rows are packed with room for them, but hold the
real tokens alone; they come in with ``behind_virtual_tokens``, when a batch is made:

    ids        v v a a a a a v v b b b      positions 0 1 2 3 4 5 6 0 1 2 3 4

Two answers that are compared, a pair, stay in one row, the chosen one first: whatever enters the model with one of them has
the other. Where examples may not see that they share a row, such a row enters as one row for each (``apart``).

Knows lengths and arrays. Must not know text, templates or batches.
"""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Sequence
from dataclasses import dataclass

import numpy
from numpy.typing import NDArray

from qlora.data.examples import Example
from qlora.model.loss import IGNORE_INDEX


@dataclass(frozen=True)
class Row:
    """One sequence for the model: ``ids``, ``labels`` and ``positions``, all int32 ``[n]``."""

    ids: NDArray[numpy.int32]
    labels: NDArray[numpy.int32]
    positions: NDArray[numpy.int32]
    """Count from 0 and restart at 0 where the next example begins."""
    examples: tuple[int, ...]
    """The indices of the examples in this row, in order."""
    apart: bool = False
    """Whether each of its examples enters the model as a row of its own."""

    @property
    def packed(self) -> bool:
        """Whether examples are side by side in the model."""
        return len(self.examples) > 1 and not self.apart

    def sequences(self) -> list[Row]:
        """What enters the model: this row, or one for each of its examples."""
        if not self.apart:
            return [self]
        return [
            Row(self.ids[begin:end], self.labels[begin:end], self.positions[begin:end], (index,))
            for index, (begin, end) in zip(self.examples, self.spans(), strict=True)
        ]

    @property
    def target_tokens(self) -> int:
        """How many tokens carry loss."""
        return int(numpy.count_nonzero(self.labels != IGNORE_INDEX))

    def spans(self) -> list[tuple[int, int]]:
        """Where each example of ``examples`` begins and ends in this row."""
        starts = numpy.flatnonzero(self.positions == 0).tolist()
        return list(zip(starts, [*starts[1:], len(self.ids)], strict=True))

    def behind_virtual_tokens(self, count: int) -> Row:
        """This row with ids −count … −1 before each of its examples: no targets, and positions that count from the first.

        Negative ids, because those of the vocabulary are taken and its size is none of the data's business.
        """
        if not count:
            return self
        virtual = numpy.arange(-count, 0, dtype=numpy.int32)
        silent = numpy.full(count, IGNORE_INDEX, dtype=numpy.int32)
        spans = self.spans()
        return Row(
            ids=numpy.concatenate([part for begin, end in spans for part in (virtual, self.ids[begin:end])]),
            labels=numpy.concatenate([part for begin, end in spans for part in (silent, self.labels[begin:end])]),
            positions=numpy.concatenate([numpy.arange(count + end - begin, dtype=numpy.int32) for begin, end in spans]),
            examples=self.examples,
        )


def make_rows(
    examples: Sequence[Example], max_length: int, packing: bool, virtual_tokens: int = 0, together: int = 1
) -> list[Row]:
    """The rows of these examples, packed, or one a row. ``together``: so many that follow each other are in one row in any case.

    Each has at most ``max_length`` tokens, times ``together``, once every example has its ``virtual_tokens`` before it.
    """
    units = [range(start, start + together) for start in range(0, len(examples), together)]
    if packing:
        lengths = [sum(virtual_tokens + len(examples[index].ids) for index in unit) for unit in units]
        groups = best_fit(lengths, max_length * together)
    else:
        groups = [[unit] for unit in range(len(units))]
    apart = together > 1 and not packing
    return [_row(examples, [index for unit in group for index in units[unit]], apart) for group in groups]


def best_fit(lengths: Sequence[int], capacity: int) -> list[list[int]]:
    """Group indices so that each group's lengths sum to at most ``capacity``, in few groups: best-fit decreasing.

    Longest first, each goes where the least room is left over. Deterministic; groups and their members come back in
    the order of the input. Every length must be at most ``capacity``.
    """
    groups: list[list[int]] = []
    rooms: list[int] = []  # the distinct amounts of room left, sorted; at most `capacity` of them
    by_room: dict[int, list[int]] = {}  # room left → the groups that have it
    for index in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        length = lengths[index]
        if length > capacity:
            raise ValueError(f"example {index} has {length} tokens, more than a row's {capacity}")
        place = bisect_left(rooms, length)
        if place < len(rooms):
            room = rooms[place]
            group = by_room[room].pop()
            if not by_room[room]:
                del by_room[room], rooms[place]
            groups[group].append(index)
        else:
            room, group = capacity, len(groups)
            groups.append([index])
        if left := room - length:
            if left not in by_room:
                by_room[left] = []
                insort(rooms, left)
            by_room[left].append(group)
    return sorted(sorted(group) for group in groups)


def _row(examples: Sequence[Example], group: list[int], apart: bool) -> Row:
    parts = [examples[index] for index in group]
    return Row(
        ids=numpy.concatenate([part.ids for part in parts]),
        labels=numpy.concatenate([part.labels for part in parts]),
        positions=numpy.concatenate([numpy.arange(len(part.ids), dtype=numpy.int32) for part in parts]),
        examples=tuple(group),
        apart=apart,
    )
