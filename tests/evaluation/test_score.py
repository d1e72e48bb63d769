"""The law of scoring: packed = unpacked = any batch size, and the model is left as it was."""

from __future__ import annotations

import math
import sys
from pathlib import Path

import numpy
import pytest
import torch

from qlora.data.batches import collate
from qlora.data.examples import Example, make_example
from qlora.data.packing import Row, make_rows
from qlora.errors import DataError
from qlora.evaluation.score import HeldOut, difference, score, verdict
from qlora.methods.base import AdaptedModel, apply_method
from qlora.model.anatomy import layers as decoder_layers
from qlora.model.base import Base
from qlora.model.loss import IGNORE_INDEX
from qlora.recipe import PrefixTuning
from qlora.residence.layers import wrap_layers
from tests.model.test_loss import LargestLogits
from tests.rounding import rounding
from tests.tiny import VOCABULARY, random_model, random_rows, stir

MODULE = sys.modules["qlora.evaluation.score"]  # by attribute that name is the function
UNPACKED = random_rows(23, packing=False, seed=8)
PACKED = make_rows([Example(row.ids, row.labels) for row in UNPACKED], 40, True)


@torch.no_grad()
def truth(model: AdaptedModel) -> tuple[float, int]:
    """One example at a time, torch's own cross-entropy on the model's own logits."""
    total, count = 0.0, 0
    for row in UNPACKED:
        batch = collate([row], 0)
        logits = model.model(input_ids=batch["input_ids"], use_cache=False).logits.double()
        total += torch.nn.functional.cross_entropy(logits[0, :-1], batch["labels"][0, 1:], reduction="sum").item()
        count += row.target_tokens
    return total / count, count


@pytest.mark.parametrize("rows_at_once", [1, 4, 50])
@pytest.mark.parametrize("rows", [UNPACKED, PACKED, PACKED[::-1]], ids=["unpacked", "packed", "reversed"])
@pytest.mark.sampled
def test_neither_packing_nor_batches_nor_order_matter(model: AdaptedModel, rows: list[Row], rows_at_once: int) -> None:
    assert len(PACKED) < len(UNPACKED) / 2
    loss, count = truth(model)
    found = score(model, rows, rows_at_once, chunk=7)
    assert found.loss == pytest.approx(loss, rel=rounding())
    assert found.perplexity == pytest.approx(math.exp(loss), rel=loss * rounding())  # d exp(x) = exp(x) dx
    assert found.target_tokens == count


def test_the_adapter_counts(model: AdaptedModel) -> None:
    with model.disabled():
        base = score(model, PACKED)
    assert abs(score(model, PACKED).loss - base.loss) > 1e-3


@pytest.mark.parametrize("training", [True, False])
def test_the_model_is_left_as_it_was(model: AdaptedModel, training: bool) -> None:
    """Dropout is off while it measures, whatever the mode; nothing is drawn, no gradient is made."""
    wrap_layers(model.model, 1)
    expected = score(model, PACKED)
    model.model.train(training)
    state = torch.get_rng_state()
    assert score(model, PACKED) == expected
    assert all(module.training == training for module in model.model.modules())
    assert torch.equal(torch.get_rng_state(), state)
    assert all(values.grad is None for values in model.trainable_parameters().values())


def test_without_targets_there_is_nothing_to_measure(model: AdaptedModel) -> None:
    silent = [Row(row.ids, numpy.full_like(row.labels, IGNORE_INDEX), row.positions, row.examples) for row in PACKED]
    model.model.train()
    for rows in (silent, []):
        with pytest.raises(DataError, match="no target token"):
            score(model, rows)
    assert model.model.training
    half = [*silent, *PACKED]
    assert score(model, half).loss == pytest.approx(score(model, PACKED).loss, rel=rounding())


def test_full_logits_never_exist(model: AdaptedModel) -> None:
    with LargestLogits(VOCABULARY) as watched:
        found = score(model, PACKED, 50, chunk=8)
    allowed = 64 * VOCABULARY  # a chunk of 8, or the head itself, transposed
    assert 8 * VOCABULARY <= watched.largest <= allowed < found.target_tokens * VOCABULARY


def test_an_endless_perplexity_is_infinite(one_model: AdaptedModel, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(MODULE, "token_loss", lambda *_: (torch.tensor(8000.0), 10))
    assert score(one_model, PACKED[:1]).perplexity == math.inf


def test_flash_attention_gets_packed_rows_one_by_one(model: AdaptedModel, monkeypatch: pytest.MonkeyPatch) -> None:
    """transformers looks for packed examples in FlashAttention batches of one row only; more would see each other."""
    sizes: list[int] = []
    handle = decoder_layers(model.model)[0].register_forward_hook(lambda _, args, __: sizes.append(len(args[0])))
    score(model, PACKED, 4)
    assert max(sizes) == 4
    monkeypatch.setattr(MODULE, "packs_one_row", lambda _: True)
    sizes.clear()
    score(model, PACKED, 4)
    assert set(sizes) == {1}
    sizes.clear()
    score(model, UNPACKED, 4)
    handle.remove()
    assert max(sizes) == 4


@pytest.mark.parametrize("problem", ["token", "position"])
def test_rows_that_the_model_cannot_read_are_refused(model: AdaptedModel, problem: str) -> None:
    ids = numpy.full(65, 5, dtype=numpy.int32)
    positions = numpy.arange(65, dtype=numpy.int32) % (30 if problem == "token" else 65)
    if problem == "token":
        ids[-1] = VOCABULARY
    row = Row(ids, ids.copy(), positions, (0,))
    text = "holds token 96" if problem == "token" else "an example of 65 tokens, .* has 64 positions"
    with pytest.raises(DataError, match=f"Held-out row 1 holds .*|{text}") as caught:
        score(model, [PACKED[0], row])
    caught.match(text)


def test_padding_beside_a_packed_row_has_a_place_in_a_learned_table() -> None:
    """10 positions, 3 of them a prefix's: the short row is padded by more than the 7 that are left."""
    bare = random_model("GPT2", max_position_embeddings=10, num_key_value_heads=4)
    base = Base(bare, None, Path(), "small", None, "none", False, torch.device("cpu"), torch.float32)
    model = apply_method(base, PrefixTuning(tokens=3))
    stir(model, 0.5)
    examples = [make_example(range(3, 3 + length), [True] * length) for length in (7, 6, 7, 4)]
    rows = [*make_rows(examples[:3], 20, True), *make_rows(examples[3:], 20, True)]
    together, alone = score(model, rows, 2), score(model, rows, 1)
    assert together.loss == pytest.approx(alone.loss, rel=rounding())


def test_two_measurements_are_compared_row_by_row(model: AdaptedModel) -> None:
    base = score(model, PACKED)
    assert sum(count for _, count in base.rows) == base.target_tokens
    alone = [score(model, [row]) for row in PACKED]
    for (loss, count), one in zip(base.rows, alone, strict=True):
        assert (loss / count, count) == (pytest.approx(one.loss, rel=rounding()), one.target_tokens)
    worse = HeldOut(0.0, 1.0, base.target_tokens, tuple((loss + 0.5 * count, count) for loss, count in base.rows))
    assert difference(worse, base) == (pytest.approx(0.5), pytest.approx(0.0, abs=1e-6))
    # by hand: rows of 1, 1 and 2 tokens, 1, 2 and 0 more nats; the mean is 0.75, and 0.25² + 1.25² + 1.5² over 16, times 3 / 2
    one, other = (
        HeldOut(0.0, 1.0, 4, rows) for rows in (((1.0, 1), (2.0, 1), (0.0, 2)), ((0.0, 1), (0.0, 1), (0.0, 2)))
    )
    assert difference(one, other) == (0.75, pytest.approx(math.sqrt((0.0625 + 1.5625 + 2.25) * 1.5) / 4))
    with pytest.raises(ValueError, match="the same held-out rows"):
        difference(one, base)


@pytest.mark.parametrize(
    ("losses", "said"),
    [
        ((0.5, 0.6, 0.55), "better: 0.4500 ± 0.0289 nats a token less, over 3 held-out tokens"),
        (
            (1.5, 1.6, 1.55),
            "worse: 0.5500 ± 0.0289 nats a token more, over 3 held-out tokens; lower training.learning_rate",
        ),
        ((1.5, 0.5, 1.05), "no clear change: 0.0167 ± 0.2892 nats a token more"),
        ((math.inf, 1.0, 1.0), "diverged: the loss is not finite any more"),
    ],
)
def test_the_verdict_is_one_of_four(losses: tuple[float, ...], said: str) -> None:
    before = HeldOut(1.0, math.e, 3, ((1.0, 1), (1.0, 1), (1.0, 1)))
    after = HeldOut(sum(losses) / 3, 0.0, 3, tuple((loss, 1) for loss in losses))
    assert str(verdict(before, after)).startswith(said)


def test_one_row_has_no_standard_error_and_is_judged_by_its_sign() -> None:
    before, after = (HeldOut(loss, 1.0, 9, ((9 * loss, 9),)) for loss in (1.0, 5.0))
    assert str(verdict(before, after)).startswith(
        "worse: 4.0000 nats a token more, over 9 held-out tokens in one row, which"
    )
    assert verdict(after, before).outcome == "better"
    assert verdict(before, before).outcome == "no clear change"
