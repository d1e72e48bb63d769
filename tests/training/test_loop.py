"""The laws of the loop: the loss by its definition; nothing in between changes a run; nothing broken is stepped on."""

from __future__ import annotations

import math
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis.strategies import booleans, integers, sampled_from
from transformers import BartConfig, BartForCausalLM

from qlora.data.batches import step_rows
from qlora.data.load import Data
from qlora.data.packing import Row
from qlora.errors import DataError, ModelError, NonFiniteError
from qlora.evaluation.generate import answers
from qlora.evaluation.score import score
from qlora.methods.base import AdaptedModel, apply_method
from qlora.model.anatomy import layers as decoder_layers
from qlora.model.attention import keep_apart
from qlora.model.base import Base
from qlora.model.loss import IGNORE_INDEX
from qlora.model.skeleton import skeleton_base
from qlora.recipe import LoRA, ModelSection, TrainingSection
from qlora.residence import layers
from qlora.residence.layers import RecomputedLayer, unwrap_layers, wrap_layers
from qlora.training import recover
from qlora.training.loop import Trainer
from qlora.training.objectives.tokens import Tokens
from qlora.training.optim import learning_rate
from qlora.training.state import LARGEST_SCALE
from qlora.training.step import total_norm
from tests.rounding import rounding
from tests.steps import LATER, LOSS, close, step_of
from tests.tiny import VOCABULARY, adapter_bytes, any_checkpoint, gradients, random_rows, small_model, stir, tiny_model

ROWS = random_rows(80, seed=1)[:19]
NORM = rounding(terms=4096, sums=2)  # a sum of that many squares at most, and one over the parameters
WAYS = [(size, way) for size in (1, 2, 4, 8) for way in ("layer_major", "micro_batch_major", "resident")]


def test_what_no_gradient_reaches_is_named_once(tmp_path: Path) -> None:
    bare = BartForCausalLM(
        BartConfig(
            vocab_size=VOCABULARY,
            d_model=32,
            encoder_layers=1,
            decoder_layers=1,
            decoder_attention_heads=2,
            decoder_ffn_dim=64,
        )
    )
    base = Base(bare.eval(), None, tmp_path, "bart", None, "none", False, torch.device("cpu"), torch.float32)
    model = apply_method(base, LoRA(r=2, target_modules=("q_proj", "fc1")))  # of attention to an encoder too
    notes = [step.note for step in Trainer(model, random_rows(8, packing=False), section(steps=2))]
    assert notes[0].startswith("No gradient reached 2 of 6 trainable parameters, ")
    assert "encoder_attn.q_proj.lora_A" in notes[0]
    assert not notes[1]


def section(**values: Any) -> TrainingSection:
    return TrainingSection(**{"batch_size": 8, "micro_batch_size": 2, "learning_rate": 1e-2, **values})


@pytest.fixture(scope="module")
def one_model(tmp_path_factory: pytest.TempPathFactory) -> AdaptedModel:
    return tiny_model(tmp_path_factory.mktemp("model"), "qwen2")


@pytest.fixture
def model(one_model: AdaptedModel) -> Iterator[AdaptedModel]:
    stir(one_model, 0.05)
    for layer in one_model.planted.values():
        layer.dropout = 0.0
    yield one_model
    unwrap_layers(one_model.model)
    for values in one_model.trainable_parameters().values():
        values.grad = None


@pytest.fixture
def dropping(model: AdaptedModel) -> AdaptedModel:
    for layer in model.planted.values():
        layer.dropout = 0.2
    return model


def gradients_of(model: AdaptedModel, rows: list[Row], size: int, way: str) -> tuple[float, dict[str, torch.Tensor]]:
    how: dict[str, Any] = {"gradient_checkpointing": way != "resident"}
    if way != "resident":
        how["accumulation"] = way
    trainer = Trainer(model, rows, section(batch_size=len(rows), micro_batch_size=size, max_grad_norm=None, **how))
    step, found = step_of(trainer)
    assert step.target_tokens == sum(row.target_tokens for row in rows)
    return step.loss, found


def test_the_rows_are_awkward() -> None:
    assert len(ROWS) == 19
    assert len({row.target_tokens for row in ROWS}) > 5
    assert len({len(row.ids) for row in ROWS}) > 2
    assert any(len(row.examples) > 1 for row in ROWS)


def test_a_step_tells_what_it_did(model: AdaptedModel) -> None:
    training = section(schedule="cosine", warmup_fraction=0.4, epochs=2)
    trainer = Trainer(model, ROWS, training)
    assert (trainer.total_steps, trainer.steps_per_epoch) == (6, 3)
    steps = list(trainer)
    assert [step.number for step in steps] == [1, 2, 3, 4, 5, 6]
    assert [step.epoch for step in steps] == pytest.approx([1 / 3, 2 / 3, 1, 4 / 3, 5 / 3, 2])
    assert [step.learning_rate for step in steps] == [learning_rate(training, number, 6) for number in range(6)]
    for number, step in enumerate(steps):
        rows = [ROWS[place] for place in step_rows(19, 8, number, 0)]
        assert step.tokens == sum(len(row.ids) for row in rows)
        assert step.target_tokens == sum(row.target_tokens for row in rows)
        assert step.tokens_per_second == pytest.approx(step.tokens / step.seconds)
        assert step.peak_memory_bytes > 0
        assert step.metrics()["step"] == step.number
        assert f"step {step.number} " in str(step)
    assert list(steps[0].metrics()) == [
        "step", "epoch", "loss", "learning_rate", "grad_norm", "target_tokens", "tokens", "tokens_per_second",
        "peak_memory_bytes", "seconds", "micro_batch_size",
    ]  # fmt: skip
    assert next(trainer, None) is None
    assert not model.model.training


def test_it_learns(model: AdaptedModel) -> None:
    """Each row again and again: the loss must fall far below that of a guess."""
    losses = [step.loss for step in Trainer(model, ROWS[:4], section(batch_size=4, steps=30, learning_rate=2e-2))]
    assert losses[-1] < 0.5 * losses[0]


@pytest.mark.parametrize("limit", [0.05, 1e9, None])
def test_clipping_is_torchs(model: AdaptedModel, limit: float | None) -> None:
    step, found = step_of(Trainer(model, ROWS, section(max_grad_norm=limit)))
    _, before = step_of(Trainer(model, ROWS, section(max_grad_norm=None)))
    parameters = model.trainable_parameters()
    for name, value in parameters.items():
        value.grad = before[name].clone()
    expected = float(torch.nn.utils.clip_grad_norm_(parameters.values(), math.inf if limit is None else limit))
    assert step.grad_norm == pytest.approx(expected, rel=NORM)
    close(found, gradients(model), NORM)
    assert (limit == 0.05) == any(not torch.equal(found[name], before[name]) for name in before)


def test_the_norm_of_bf16_gradients_is_in_fp32() -> None:
    """A sum in bf16 is rounded to three digits, and so would be every gradient that is scaled by it."""
    generator = torch.Generator().manual_seed(0)
    whole = [torch.randn(40, 30, generator=generator).to(dtype) for dtype in (torch.bfloat16, torch.bfloat16)]
    exact = math.sqrt(sum(float(values.double().square().sum()) for values in whole))
    assert abs(float(torch.nn.utils.get_total_norm(whole)) / exact - 1) > 1e-5  # torch's own
    for parts in (whole, [whole[0], whole[1].float()]):
        assert total_norm(parts) == pytest.approx(exact, rel=NORM)
    assert total_norm([torch.full((9,), 6e4, dtype=torch.float16)]) == pytest.approx(1.8e5, rel=1e-3)
    assert total_norm([]) == 0


@pytest.mark.parametrize("optimizer", ["adamw", "adamw_8bit"])
def test_what_happens_between_steps_changes_nothing(dropping: AdaptedModel, optimizer: Any, tmp_path: Path) -> None:
    """Scoring, answering, saving, drawing random numbers, and a different state of torch's own generator."""
    training = section(optimizer=optimizer, epochs=2)
    torch.manual_seed(1)
    plain = [(step.loss, step.grad_norm) for step in Trainer(dropping, ROWS, training)]
    expected = adapter_bytes(dropping)
    stir(dropping, 0.05)
    torch.manual_seed(2)
    trainer = Trainer(dropping, ROWS, training, tmp_path)
    busy = []
    for step in trainer:
        busy.append((step.loss, step.grad_norm))
        score(dropping, ROWS[:3])
        answers(dropping, [[5, 6, 7]], 3)
        trainer.save()
        torch.rand(3)
        dropping.model.train(bool(step.number % 2))
    assert busy == plain
    assert adapter_bytes(dropping) == expected
    dropping.model.eval()


def test_steps_leave_torchs_random_state_alone_and_seeds_matter(dropping: AdaptedModel) -> None:
    torch.manual_seed(3)
    state = torch.get_rng_state()
    first = next(Trainer(dropping, ROWS[:8], section()))
    assert torch.equal(torch.get_rng_state(), state)
    stir(dropping, 0.05)
    again = next(Trainer(dropping, ROWS[:8], section()))
    stir(dropping, 0.05)
    other = next(Trainer(dropping, ROWS[:8], section(seed=1)))
    assert first.loss == again.loss
    assert abs(first.loss - other.loss) > 1e-4


def test_dropout_draws_anew_each_step(dropping: AdaptedModel) -> None:
    trainer = Trainer(dropping, ROWS[:8], section(learning_rate=1e-12, steps=3))
    losses = [step.loss for step in trainer]
    assert len(set(losses)) == 3


def state_of(trainer: Trainer) -> tuple[Any, ...]:
    from qlora.training.optim import optimizer_tensors

    moments = {
        name: value.numpy().tobytes()
        for name, value in optimizer_tensors(trainer.state.optimizer, trainer.state.parameters).items()
    }
    return adapter_bytes(trainer.model), moments, trainer.step_number


@pytest.mark.parametrize("way", ["layer_major", "micro_batch_major", "resident"])
def test_a_row_that_gives_nan_is_refused_by_name(model: AdaptedModel, way: str) -> None:
    how: dict[str, Any] = {"gradient_checkpointing": way != "resident"}
    if way != "resident":
        how["accumulation"] = way
    bad = 95
    rows = [row if bad not in row.ids else Row(numpy.where(row.ids == bad, 5, row.ids), row.labels, row.positions, row.examples) for row in ROWS]  # fmt: skip
    place = step_rows(len(rows), 8, 1, 0)[3]
    ids = rows[place].ids.copy()
    ids[1] = bad
    rows[place] = Row(ids, rows[place].labels, rows[place].positions, rows[place].examples)
    trainer = Trainer(model, rows, section(**how))
    next(trainer)
    embedding = model.model.get_input_embeddings().weight
    kept = embedding[bad].clone()
    embedding.data[bad] = torch.nan
    try:
        before = state_of(trainer)
        for _ in range(2):  # and again, should someone go on
            with pytest.raises(
                NonFiniteError, match=rf"Step 2 gave loss nan .* on rows .*\b{place}\b.*No step was taken"
            ):
                next(trainer)
            assert state_of(trainer) == before
            assert all(value.grad is None for value in trainer.state.parameters.values())
            assert not model.model.training
    finally:
        embedding.data[bad] = kept
    assert next(trainer).number == 2


def test_a_gradient_that_is_not_finite_is_refused_by_name(model: AdaptedModel) -> None:
    trainer = Trainer(model, ROWS, section())
    name = "model.layers.1.mlp.down_proj.lora_B"
    handle = trainer.state.parameters[name].register_hook(lambda grad: grad * math.inf)
    before = state_of(trainer)
    with pytest.raises(NonFiniteError, match=f"gradient norm (inf|nan) .*{name}"):
        next(trainer)
    handle.remove()
    assert state_of(trainer) == before


def test_an_interrupted_step_leaves_no_gradients(model: AdaptedModel) -> None:
    trainer = Trainer(model, ROWS, section(accumulation="micro_batch_major"))
    calls = []

    def interrupt(*_: Any) -> None:
        calls.append(1)
        if len(calls) == 3:
            raise KeyboardInterrupt

    handle = decoder_layers(model.model)[1].register_forward_hook(interrupt)
    before = state_of(trainer)
    with pytest.raises(KeyboardInterrupt):
        next(trainer)
    handle.remove()
    assert state_of(trainer) == before
    assert all(value.grad is None for value in trainer.state.parameters.values())
    assert not model.model.training


def test_an_fp16_overflow_halves_the_scale_and_runs_the_same_rows_again(dropping: AdaptedModel) -> None:
    """The scale itself is a power of two: with or without it, and with overflows in between, the step is the same."""
    plain = next(Trainer(dropping, ROWS, section()))
    expected = adapter_bytes(dropping)
    stir(dropping, 0.05)
    trainer = Trainer(dropping, ROWS, section())
    trainer.state.loss_scale = 2.0**14
    overflows = iter([True, True])
    parameter = trainer.state.parameters["model.layers.0.self_attn.q_proj.lora_A"]

    def overflow(value: torch.Tensor) -> None:
        assert value.grad is not None
        if next(overflows, False):
            value.grad.fill_(math.inf)

    handle = parameter.register_post_accumulate_grad_hook(overflow)
    step = next(trainer)
    handle.remove()
    # layer-major with micro-batches of 2: both overflows fall into the first try
    assert trainer.state.loss_scale == 2.0**13
    assert (step.loss, step.grad_norm) == (plain.loss, plain.grad_norm)
    assert adapter_bytes(dropping) == expected


def test_an_overflow_that_no_scale_cures_is_refused(model: AdaptedModel) -> None:
    trainer = Trainer(model, ROWS[:2], section(batch_size=2))
    trainer.state.loss_scale = 8.0
    handle = trainer.state.parameters["model.layers.0.self_attn.q_proj.lora_A"].register_hook(
        lambda grad: grad * math.nan
    )
    before = state_of(trainer)
    with pytest.raises(NonFiniteError, match="Step 1"):
        next(trainer)
    handle.remove()
    assert trainer.state.loss_scale == 1.0
    assert state_of(trainer) == before


def test_a_skipped_step_leaves_the_scale_as_it_was(model: AdaptedModel) -> None:
    """One bad row must not leave the next five hundred steps without a scale."""
    trainer = Trainer(model, ROWS[:2], section(batch_size=2, steps=2, not_finite="skip"))
    trainer.state.loss_scale = 8.0
    handle = trainer.state.parameters["model.layers.0.self_attn.q_proj.lora_A"].register_hook(
        lambda grad: grad * math.nan
    )
    assert next(trainer).skipped
    handle.remove()
    assert trainer.state.loss_scale == 8.0
    assert not next(trainer).skipped


def test_fp16_bases_start_with_a_loss_scale(model: AdaptedModel, monkeypatch: pytest.MonkeyPatch) -> None:
    assert Trainer(model, ROWS, section()).state.loss_scale == 1.0
    monkeypatch.setattr(model.base, "compute_dtype", torch.float16)
    assert Trainer(model, ROWS, section()).state.loss_scale == 2.0**14


def test_a_scale_that_fell_rises_again(model: AdaptedModel, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(recover, "SCALE_GROWTH", 3)
    plain = Trainer(model, ROWS, section(steps=9))
    assert [next(plain).number and plain.state.loss_scale for _ in range(4)] == [1.0] * 4
    trainer = Trainer(model, ROWS, section(steps=9))
    trainer.state.loss_scale = LARGEST_SCALE / 2
    scales = [next(trainer).number and trainer.state.loss_scale for _ in range(6)]
    assert [scale / LARGEST_SCALE for scale in scales] == [0.5, 0.5, 1, 1, 1, 1]


def test_methods_get_their_penalty_and_their_turn(model: AdaptedModel) -> None:
    name = "model.layers.0.self_attn.q_proj.lora_A"
    weight = model.trainable_parameters()[name]
    plain_loss, plain = gradients_of(model, ROWS[:8], 2, "layer_major")
    turns: list[tuple[int, int]] = []
    model.penalty, model.after_step = lambda: weight.square().sum(), lambda *numbers: turns.append(numbers)
    try:
        loss, found = gradients_of(model, ROWS[:8], 2, "layer_major")
        assert loss == plain_loss  # methods are compared by their cross-entropy alone
        close(found, {**plain, name: plain[name] + 2 * weight.detach()}, NORM)
        turns.clear()
        list(Trainer(model, ROWS, section(steps=2)))
    finally:
        model.penalty, model.after_step = lambda: None, lambda step, total: None
    assert turns == [(1, 2), (2, 2)]


@pytest.mark.parametrize("quantization", ["nf4", "int8", "none"])
@pytest.mark.parametrize("recompute", ["none", "all"])
@pytest.mark.sampled
def test_gradients_are_had_without_a_look_at_the_device(tmp_path: Path, quantization: str, recompute: str) -> None:
    """A GPU would have to be waited for. Tensors on meta have no values to look at: whoever asks for some raises."""
    section = ModelSection(name=str(any_checkpoint(tmp_path, "Llama")), quantization=quantization)
    base = skeleton_base(section, torch.device("meta"), torch.bfloat16)
    adapted = apply_method(base, LoRA(r=4))
    keep_apart(base.model, torch.bfloat16, 0)
    wrap_layers(base.model, 2, keep=range(2) if recompute == "none" else ())
    rows = random_rows(6)[:2]
    assert any(len(row.examples) > 1 for row in rows)
    base.model.train()
    loss = Tokens(adapted).loss(rows, 5)
    loss.backward()  # type: ignore[no-untyped-call]
    assert all(values.grad is not None for values in adapted.trainable_parameters().values())
    with pytest.raises((RuntimeError, NotImplementedError)):
        loss.item()


def test_nothing_to_train_on_is_refused(model: AdaptedModel) -> None:
    with pytest.raises(DataError, match="no rows"):
        Trainer(model, [])
    silent = [Row(row.ids, numpy.full_like(row.labels, IGNORE_INDEX), row.positions, row.examples) for row in ROWS[:2]]
    trainer = Trainer(model, silent, section())
    with pytest.raises(DataError, match=r"Step 1 .* rows [01], [01] hold no target token"):
        next(trainer)
    with pytest.raises(DataError, match="folder"):
        trainer.save()


def test_a_model_that_leaks_is_refused_before_anything_is_spent(
    model: AdaptedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    for layer in decoder_layers(model.model):
        attention: Any = layer.self_attn
        blind = partial(lambda forward, attention_mask=None, **given: forward(attention_mask=None, **given), attention.forward)  # fmt: skip
        monkeypatch.setattr(attention, "forward", blind)
    with pytest.raises(ModelError, match="see each other"):
        Trainer(model, ROWS, section())
    with pytest.raises(ModelError, match="see each other"):
        Trainer(model, [first_tokens(ROWS[0], 3), *ROWS], section())  # too short to be told apart in
    Trainer(model, random_rows(8, packing=False), section())


def first_tokens(row: Row, count: int) -> Row:
    return Row(row.ids[:count], row.labels[:count], row.positions[:count], (0,))


def test_the_checks_do_not_mind_dropout_or_training_mode(dropping: AdaptedModel) -> None:
    stir(dropping, 0.3)
    dropping.model.train()
    state = torch.get_rng_state()
    Trainer(dropping, ROWS, section())
    assert torch.equal(torch.get_rng_state(), state)
    assert dropping.model.training
    dropping.model.eval()


def test_the_boundary_follows_the_recipe(model: AdaptedModel) -> None:
    Trainer(model, ROWS, section(micro_batch_size=4))
    assert [layer.rows for layer in decoder_layers(model.model)] == [4, 4]
    Trainer(model, ROWS, section(gradient_checkpointing=False))
    assert not any(isinstance(module, RecomputedLayer) for module in model.model.modules())


def short_rows(count: int) -> list[Row]:
    return random_rows(count, packing=False, seed=4)


@pytest.mark.parametrize("name", ["falcon", "gptj"])
def test_families_with_tuples_train(tmp_path: Path, name: str) -> None:
    model = small_model(name, tmp_path)
    rows = ROWS if name == "gptj" else short_rows(19)  # Falcon does not look for positions that restart
    losses = []
    for how in ({}, {"accumulation": "micro_batch_major"}, {"gradient_checkpointing": False}):
        stir(model, 0.05)
        losses.append([step.loss for step in Trainer(model, rows, section(steps=3, **how))])
    for found in losses[:2]:
        assert found[0] == pytest.approx(losses[2][0], rel=LOSS)
        assert found == pytest.approx(losses[2], rel=LATER)


def test_what_cannot_be_cut_is_refused_before_anything_is_spent(tmp_path: Path) -> None:
    """Bloom gives its layers a bias for each row and head, in one dimension."""
    model = small_model("bloom", tmp_path)
    rows = short_rows(8)
    with pytest.raises(
        ModelError, match=r"bloom .*8 rows, 2 at once.*accumulation=micro_batch_major, or .*recompute=none"
    ):
        Trainer(model, rows, section())
    assert not model.model.training
    plain = next(Trainer(model, rows, section(gradient_checkpointing=False))).loss
    for how in ({"accumulation": "micro_batch_major"}, {"micro_batch_size": 8}):
        stir(model, 0.05)
        assert next(Trainer(model, rows, section(**how))).loss == pytest.approx(plain, rel=LOSS)


@pytest.mark.parametrize(("count", "size"), [(4, 1), (12, 1), (20, 2)])
def test_a_wrong_cut_is_refused_in_whole_and_in_short_steps(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, count: int, size: int
) -> None:
    """MPT's bias has 4 heads: steps of 4 rows are where it may be taken for rows, without an error for 1 row at once."""
    model = small_model("mpt", tmp_path)
    rows = short_rows(count)
    Trainer(model, rows, section(micro_batch_size=size))
    monkeypatch.setattr(layers, "_has_rows", lambda value, count, tokens: value.dim() > 1 and len(value) == count)
    with pytest.raises(ModelError, match=f"4 rows, {size} at once: .*recompute=none"):
        Trainer(model, rows, section(micro_batch_size=size))
    Trainer(model, rows, section(micro_batch_size=size, gradient_checkpointing=False))
    Trainer(model, rows, section(micro_batch_size=size, accumulation="micro_batch_major"))
    if count > 8:
        Trainer(model, rows, section(micro_batch_size=size, steps=1))  # never gets to the short step


@pytest.mark.parametrize(("count", "last"), [(16, []), (19, [(1, 8), (4, 8), (3, 8)])])
def test_the_checks_are_quick(model: AdaptedModel, count: int, last: list[tuple[int, int]]) -> None:
    """A step of 8 rows in micro-batches of 2, and the 3 that end an epoch: each twice plain, once through the boundary."""
    shapes: list[tuple[int, ...]] = []
    embedding = model.model.get_input_embeddings()
    handle = embedding.register_forward_hook(lambda _, args, __: shapes.append(tuple(args[0].shape)))
    Trainer(model, ROWS[:count], section())
    handle.remove()
    loss_path, causal, packing, boundary = shapes[:2], shapes[2:7], shapes[7:12], shapes[12:]
    assert loss_path == [(1, 8), (1, 8)]
    assert packing == [(1, 8), *[(2, 16)] * 4]
    assert causal == [(1, 8), (3, 8), *[(2, 16)] * 3]
    assert boundary == [(2, 9), (8, 9), (8, 9), *last]


def changed(row: Row, **arrays: Any) -> Row:
    return Row(**{"ids": row.ids, "labels": row.labels, "positions": row.positions, "examples": row.examples, **arrays})


def test_a_token_without_an_embedding_is_refused(model: AdaptedModel) -> None:
    """A tokenizer with tokens added to it, and a model that was never resized for them."""
    rows = list(ROWS)
    for token in (VOCABULARY - 1, VOCABULARY):
        ids = rows[7].ids.copy()
        ids[-1] = token
        rows[7] = changed(rows[7], ids=ids)
        if token < VOCABULARY:
            Trainer(model, rows, section())
    with pytest.raises(
        DataError, match=r"Row 7 holds token 96, but this qwen2 model has embeddings for tokens 0 to 95"
    ):
        Trainer(model, rows, section())


def test_a_text_beyond_the_models_positions_is_refused(model: AdaptedModel) -> None:
    """64 positions: for one example, not for a packed row."""

    def row(*lengths: int) -> Row:
        ids = numpy.arange(sum(lengths), dtype=numpy.int32) % 90 + 3
        positions = numpy.concatenate([numpy.arange(length, dtype=numpy.int32) for length in lengths])
        return Row(ids, ids.copy(), positions, tuple(range(len(lengths))))

    Trainer(model, [row(64, 30), row(10, 64)], section())
    with pytest.raises(
        DataError, match=r"Row 1 holds an example of 65 tokens, .* has 64 positions; set data.max_length=64"
    ):
        Trainer(model, [row(64), row(65, 5)], section())


def test_held_out_rows_are_looked_at_before_training(model: AdaptedModel) -> None:
    ids = numpy.full(65, 5, dtype=numpy.int32)
    long = Row(ids, ids, numpy.arange(65, dtype=numpy.int32), (0,))
    counts: Any = None
    data = Data(ROWS, [*ROWS[:2], long], counts, "", model.tokenizer, None, 64, [])
    with pytest.raises(DataError, match=r"Held-out row 2 holds an example of 65 tokens, .*; set data.max_length=64"):
        Trainer(model, data, section())


def test_rows_need_not_be_a_list(model: AdaptedModel) -> None:
    class Lazy:
        def __len__(self) -> int:
            return 5

        def __getitem__(self, place: int) -> Row:
            if place >= 5:
                raise IndexError(place)
            return ROWS[place]

    expected = next(Trainer(model, ROWS[:5], section())).loss
    stir(model, 0.05)
    assert next(Trainer(model, Lazy(), section())).loss == expected  # type: ignore[arg-type]


# --- accumulation ----------------------------------------------------------------------------------------------------


def alone(model: AdaptedModel, rows: list[Row]) -> tuple[float, dict[str, torch.Tensor]]:
    """The definition, by torch alone: every example by itself, unpacked and unpadded; its targets' negative logarithms
    summed in float64, and divided once by how many targets there are."""
    total, targets = torch.zeros((), dtype=torch.float64), 0
    for row in rows:
        for begin, end in row.spans():
            ids, labels = (torch.tensor(values[begin:end])[None].long() for values in (row.ids, row.labels))
            logits = model.model(input_ids=ids, use_cache=False).logits[0, :-1].double()
            wanted = labels[0, 1:]
            places = (wanted != IGNORE_INDEX).nonzero().squeeze(1)
            total = total - logits.log_softmax(-1)[places, wanted[places]].sum()
            targets += len(places)
    loss = total / targets
    loss.backward()
    return loss.item(), gradients(model)


@given(seed=integers(0, 2**20), count=integers(1, 9), packing=booleans(), size=sampled_from((1, 2, 4, 8)))
@settings(max_examples=8, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_any_rows_in_any_split_give_the_loss_by_definition(
    model: AdaptedModel, seed: int, count: int, packing: bool, size: int
) -> None:
    """Up to 9 rows, targets spread unevenly over them; with windows that are short and micro-batches that are."""
    rows = random_rows(4 * count, packing, seed)[:count]
    unwrap_layers(model.model)
    expected, wanted = alone(model, rows)
    for way in ("layer_major", "micro_batch_major"):
        loss, found = gradients_of(model, rows, size, way)
        assert loss == pytest.approx(expected, rel=LOSS)
        close(found, wanted)


def test_a_row_without_targets_counts_for_nothing(model: AdaptedModel) -> None:
    silent = changed(ROWS[0], labels=numpy.full_like(ROWS[0].labels, IGNORE_INDEX))
    expected, wanted = alone(model, ROWS[1:4])
    for size, way in WAYS:
        loss, found = gradients_of(model, [silent, *ROWS[1:4]], size, way)
        assert loss == pytest.approx(expected, rel=LOSS)
        close(found, wanted)
