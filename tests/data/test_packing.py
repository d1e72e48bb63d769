"""Packing loses nothing, lets nothing leak, and gives the loss of unpacked rows."""

from __future__ import annotations

import time
from typing import Any

import numpy
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from qlora.data.batches import collate
from qlora.data.examples import Example, fit, make_example, text_examples
from qlora.data.packing import best_fit, make_rows
from qlora.model.loss import IGNORE_INDEX
from tests.data.conftest import make_tokenizer


def example(length: int, first: int = 10, trained_from: int = 0) -> Example:
    return make_example(numpy.arange(length) + first, numpy.arange(length) >= trained_from)


@settings(max_examples=60, deadline=None)
@given(st.lists(st.integers(1, 16), max_size=40), st.integers(16, 24))
def test_best_fit_places_every_example_once_and_never_overfills(lengths: list[int], capacity: int) -> None:
    groups = best_fit(lengths, capacity)
    assert sorted(index for group in groups for index in group) == list(range(len(lengths)))
    assert all(sum(lengths[index] for index in group) <= capacity for group in groups)
    # no two groups could have been one: best fit opens a group only when nothing else fits
    loads = sorted(sum(lengths[index] for index in group) for group in groups)
    assert len(loads) < 2 or loads[0] + loads[1] > capacity


def test_best_fit_takes_the_tightest_room() -> None:
    assert best_fit([6, 5, 4, 3, 2], 10) == [[0, 2], [1, 3, 4]]
    assert best_fit([7, 6, 3, 4], 10) == [[0, 2], [1, 3]]


def test_best_fit_is_fast_for_many() -> None:
    lengths = numpy.random.default_rng(0).integers(20, 900, 100_000).tolist()
    began = time.process_time()
    groups = best_fit(lengths, 2048)
    assert time.process_time() - began < 5
    assert sum(lengths) / (len(groups) * 2048) > 0.99


def test_a_packed_row_is_its_examples_side_by_side() -> None:
    examples = [example(5, 10), example(6, 20), example(3, 30, trained_from=1)]
    rows = make_rows(examples, 8, packing=True)
    assert [row.examples for row in rows] == [(0, 2), (1,)]
    row = rows[0]
    assert row.ids.tolist() == [10, 11, 12, 13, 14, 30, 31, 32]
    assert row.positions.tolist() == [0, 1, 2, 3, 4, 0, 1, 2]
    assert row.labels.tolist() == [-100, 11, 12, 13, 14, -100, 31, 32]  # 30 follows 14, which must not predict it
    assert row.spans() == [(0, 5), (5, 8)]
    alone = make_rows(examples, 8, packing=False)
    assert [one.examples for one in alone] == [(0,), (1,), (2,)]
    assert [one.labels.tolist() for one in alone] == [one.labels.tolist() for one in examples]


def test_virtual_tokens_stand_before_every_example_of_a_row() -> None:
    rows = make_rows([example(3, 10), example(5, 20), example(2, 30)], 9, packing=True, virtual_tokens=2)
    assert [row.examples for row in rows] == [(0, 2), (1,)]  # 5 + 4 fit; 10 alone would have fitted 7 + 5 real tokens
    row = rows[0]
    assert row.ids.tolist() == [10, 11, 12, 30, 31]  # the row itself holds real tokens alone
    with_them = row.behind_virtual_tokens(2)
    assert with_them.ids.tolist() == [-2, -1, 10, 11, 12, -2, -1, 30, 31]
    assert with_them.labels.tolist() == [-100, -100, -100, 11, 12, -100, -100, -100, 31]
    assert with_them.positions.tolist() == [0, 1, 2, 3, 4, 0, 1, 2, 3]
    assert with_them.spans() == [(0, 5), (5, 9)]
    assert (with_them.examples, with_them.target_tokens) == (row.examples, row.target_tokens)
    assert {part.dtype for part in (with_them.ids, with_them.labels, with_them.positions)} == {numpy.dtype("int32")}
    assert row.behind_virtual_tokens(0) is row
    with pytest.raises(ValueError, match="example 1 has 7 tokens, more than a row's 6"):
        make_rows([example(3), example(5)], 6, packing=True, virtual_tokens=2)


@settings(max_examples=60, deadline=None)
@given(st.lists(st.integers(1, 16), min_size=1, max_size=20), st.integers(0, 6), st.booleans())
def test_rows_with_virtual_tokens_keep_to_the_limit(lengths: list[int], count: int, packing: bool) -> None:
    rows = make_rows([example(length) for length in lengths], 16 + count, packing, count)
    for row in rows:
        whole = row.behind_virtual_tokens(count)
        assert len(whole.ids) == len(row.ids) + count * len(row.examples) <= 16 + count
        assert whole.ids[whole.ids >= 0].tolist() == row.ids.tolist()
    assert sum(len(row.ids) for row in rows) == sum(lengths)


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.tuples(st.integers(1, 30), st.integers(0, 30)), max_size=20),
    st.integers(8, 20),
    st.sampled_from(["truncate", "drop"]),
    st.booleans(),
)
def test_no_token_is_lost_unreported(shapes: list[tuple[int, int]], limit: int, too_long: str, packing: bool) -> None:
    examples = [example(length, trained_from=start) for length, start in shapes]
    fitted = fit(examples, limit, too_long)
    rows = make_rows(fitted.examples, limit, packing)
    into = sum(len(one.ids) for one in examples)
    assert into == sum(len(row.ids) for row in rows) + fitted.truncated_tokens + fitted.dropped_tokens
    assert len(examples) == len(fitted.examples) + fitted.dropped
    assert all(row.target_tokens and len(row.ids) <= limit for row in rows)


def test_truncation_to_no_target_is_a_drop() -> None:
    fitted = fit([example(12, trained_from=9), example(12, trained_from=4)], 8, "truncate")
    assert (fitted.dropped, fitted.dropped_tokens, fitted.truncated, fitted.truncated_tokens) == (1, 12, 1, 4)
    assert [one.labels.tolist() for one in fitted.examples] == [[-100] * 4 + [14, 15, 16, 17]]


@pytest.mark.parametrize("length", range(1, 40))
def test_a_text_is_cut_into_pieces_without_loss(tokenizer: Any, length: int) -> None:
    ids = list(range(20, 20 + length))
    text = tokenizer.decode(ids)
    whole = [*tokenizer(text)["input_ids"], tokenizer.eos_token_id]
    (pieces,) = text_examples([text], tokenizer, 8)
    assert [token for piece in pieces for token in piece.ids.tolist()] == whole
    assert all(2 <= len(piece.ids) <= 8 for piece in pieces)
    assert all((piece.labels[1:] == piece.ids[1:]).all() for piece in pieces)


def test_texts_are_not_joined_and_begin_with_bos_where_the_tokenizer_says_so() -> None:
    tokenizer = make_tokenizer(None, adds_bos=True)
    (one,), (two,) = text_examples(["Hello there", "Fine"], tokenizer, 64)
    assert tokenizer.decode(one.ids) == "<s>Hello there</s>"
    assert tokenizer.decode(two.ids) == "<s>Fine</s>"
    assert one.labels[-1] == tokenizer.eos_token_id


def test_packed_examples_have_the_logits_and_the_loss_that_they_have_alone() -> None:
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=64,
            hidden_size=16,
            intermediate_size=32,
            num_hidden_layers=2,
            num_attention_heads=2,
            num_key_value_heads=1,
            attn_implementation="sdpa",
        )
    ).eval()
    examples = [example(n, first) for n, first in [(7, 3), (5, 20), (4, 30), (6, 40), (3, 50)]]

    def losses(packing: bool) -> tuple[torch.Tensor, dict[int, torch.Tensor]]:
        rows = make_rows(examples, 12, packing)
        batch = collate(rows, pad_id=0)
        labels, _ = batch.pop("labels"), batch.pop("mask")
        with torch.no_grad():
            logits = model(**batch, use_cache=False).logits
        flat = torch.nn.functional.cross_entropy(
            logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten(), ignore_index=IGNORE_INDEX, reduction="sum"
        )
        each = {
            index: logits[n, begin:end]
            for n, row in enumerate(rows)
            for index, (begin, end) in zip(row.examples, row.spans(), strict=True)
        }
        return flat, each

    packed, packed_logits = losses(True)
    alone, alone_logits = losses(False)
    assert len(make_rows(examples, 12, True)) == 3  # so that something was packed
    torch.testing.assert_close(packed, alone, rtol=1e-5, atol=1e-5)
    for index in range(len(examples)):
        torch.testing.assert_close(packed_logits[index], alone_logits[index], rtol=1e-5, atol=1e-5)
