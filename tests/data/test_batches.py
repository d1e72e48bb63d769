"""Every row once an epoch, in an order that depends on seed and epoch alone; padding that nothing can see."""

from __future__ import annotations

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from qlora.data.batches import collate, step_rows, steps_per_epoch
from qlora.data.examples import make_example
from qlora.data.packing import make_rows


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 40), st.integers(1, 12), st.integers(0, 2**32 - 1), st.integers(0, 3))
def test_the_steps_of_an_epoch_hold_each_row_exactly_once(count: int, batch: int, seed: int, epoch: int) -> None:
    steps = steps_per_epoch(count, batch)
    taken = [step_rows(count, batch, epoch * steps + step, seed) for step in range(steps)]
    assert sorted(row for rows in taken for row in rows) == list(range(count))
    assert all(len(rows) == batch for rows in taken[:-1])
    assert 1 <= len(taken[-1]) <= batch


@settings(max_examples=60, deadline=None)
@given(st.lists(st.integers(1, 9), min_size=1, max_size=300).map(tuple), st.integers(1, 3), st.integers(0, 3))
def test_steps_by_length_hold_each_row_exactly_once(lengths: tuple[int, ...], batch: int, epoch: int) -> None:
    steps = steps_per_epoch(len(lengths), batch)
    taken = [step_rows(len(lengths), batch, epoch * steps + step, 0, lengths) for step in range(steps)]
    assert sorted(row for rows in taken for row in rows) == list(range(len(lengths)))
    assert all(len(rows) == batch for rows in taken[:-1])


def test_steps_by_length_are_nearly_without_padding_and_spread() -> None:
    """Chats: lengths from 16 to 1,024, most of them short."""
    drawn = torch.rand(4096, generator=torch.Generator().manual_seed(0))
    lengths = tuple((16 * 64**drawn).int().tolist())
    shares, longest = [], []
    for by in (None, lengths):
        steps = [[lengths[row] for row in step_rows(4096, 16, step, 0, by)] for step in range(256)]
        shares.append(sum(map(sum, steps)) / sum(16 * max(step) for step in steps))
        longest = [max(step) for step in steps]
    assert shares[0] < 0.4
    assert shares[1] > 0.95
    assert len({step_rows(4096, 16, 0, seed, lengths)[0] for seed in range(8)}) > 1
    quarters = [sum(longest[at : at + 64]) for at in range(0, 256, 64)]
    assert max(quarters) < 1.5 * min(quarters)


def test_the_order_depends_on_seed_and_epoch_alone() -> None:
    order = [step_rows(50, 50, epoch, seed) for seed in (0, 1) for epoch in (0, 1)]
    assert len({tuple(one) for one in order}) == 4
    assert step_rows(50, 50, 1, 0) == order[1]
    # the batch size cuts the same order elsewhere
    assert [row for step in range(10, 20) for row in step_rows(50, 5, step, 0)] == order[1]


def test_the_order_is_the_same_in_every_process() -> None:
    assert step_rows(8, 8, 0, 0) == [2, 4, 3, 6, 5, 0, 1, 7]


def test_padding_carries_no_loss_and_its_positions_count_on() -> None:
    trained = [True] * 3
    rows = make_rows([make_example([5, 0, 7], trained), make_example([8, 9], [True] * 2)], 8, packing=False)
    batch = collate(rows, pad_id=0)
    assert batch["input_ids"].tolist() == [[5, 0, 7], [8, 9, 0]]
    assert batch["labels"].tolist() == [[-100, 0, 7], [-100, 9, -100]]  # the real 0 keeps its label, the pad has none
    assert batch["position_ids"].tolist() == [[0, 1, 2], [0, 1, 2]]
    assert not batch.pop("mask").packed
    assert all(tensor.dtype == torch.int64 for tensor in batch.values())
    wide = collate(make_rows([make_example([1, 2], [1, 1]), make_example([3, 4, 5], [1, 1, 1])], 8, True), 0)
    assert wide["position_ids"].tolist() == [[0, 1, 0, 1, 2]]
    assert wide["mask"].starts == [[0, 2]]


def test_virtual_tokens_come_in_when_a_batch_is_made() -> None:
    rows = make_rows([make_example([5, 6, 7], [1, 1, 1]), make_example([8, 9], [1, 1])], 8, packing=False)
    batch = collate(rows, 0, virtual_tokens=2)
    assert batch["input_ids"].tolist() == [[-2, -1, 5, 6, 7], [-2, -1, 8, 9, 0]]
    assert batch["labels"].tolist() == [[-100, -100, -100, 6, 7], [-100, -100, -100, 9, -100]]
    assert batch["position_ids"].tolist() == [[0, 1, 2, 3, 4], [0, 1, 2, 3, 4]]
    assert [row.ids.tolist() for row in rows] == [[5, 6, 7], [8, 9]]


def test_padding_stays_within_the_positions_that_real_tokens_have() -> None:
    """Beside a packed row there is more padding than an example is long: a learned table may end where the examples do."""
    short = [make_example([5] * length, [True] * length) for length in (4, 3, 4, 2)]
    rows = [*make_rows(short[:3], 11, packing=True), *make_rows(short[3:], 11, packing=True)]
    batch = collate(rows, 0)
    assert batch["position_ids"].tolist() == [[0, 1, 2, 3, 0, 1, 2, 0, 1, 2, 3], [0, 1, 2, 3, 0, 1, 2, 3, 0, 1, 2]]
    behind = collate(rows, 0, virtual_tokens=1)["position_ids"]
    assert behind.max() == 4
    assert behind[1].tolist() == [*range(5), *range(5), *range(4)]
