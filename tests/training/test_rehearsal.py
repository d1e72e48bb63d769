"""The law of the rehearsal: it takes the most expensive step that the data can give, and leaves no trace of it."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy
import pytest
import torch

from qlora import recipe as config
from qlora.data.batches import collate, step_rows
from qlora.data.packing import Row
from qlora.errors import DoesNotFitError
from qlora.machine import device
from qlora.methods.base import AdaptedModel, apply_method
from qlora.model.anatomy import layers as decoder_layers
from qlora.recipe import TrainingSection
from qlora.residence.layers import unwrap_layers
from qlora.training import rehearsal
from qlora.training.loop import Trainer
from qlora.training.objectives import tokens
from qlora.training.optim import optimizer_tensors, steps_taken_back
from qlora.training.rehearsal import worst_rows
from qlora.training.way import Way
from tests.steps import take
from tests.tiny import adapter_bytes, random_rows, stir, tiny_base, tiny_checkpoint, tiny_model
from tests.training.test_smaller import losses_in_chunks_of, no_collection, short_of_memory

ROWS = random_rows(60, seed=1)[:14]
CPU = torch.device("cpu")


def section(**values: Any) -> TrainingSection:
    how = {"batch_size": 4, "micro_batch_size": 2, "learning_rate": 1e-2, "weight_decay": 0.1, "steps": 4}
    return TrainingSection(**{**how, **values})


__all__ = ["no_collection"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_checkpoint(tmp_path_factory.mktemp("base"))


@pytest.fixture(scope="module")
def one_model(folder: Path) -> AdaptedModel:
    return tiny_model(folder, r=64, dropout=0.1, target_modules=("q_proj", "down_proj"))


@pytest.fixture
def model(one_model: AdaptedModel) -> Iterator[AdaptedModel]:
    stir(one_model, 0.05)
    yield one_model
    unwrap_layers(one_model.model)


def state_of(trainer: Trainer) -> tuple[Any, ...]:
    """Everything that a step may change, as bytes."""
    moments = optimizer_tensors(trainer.state.optimizer, trainer.state.parameters)
    return (
        adapter_bytes(trainer.model),
        {name: values.numpy().tobytes() for name, values in moments.items()},
        {name: values.grad for name, values in trainer.state.parameters.items()},
        {name: values._version for name, values in trainer.state.parameters.items()},
        {name: values.numpy().tobytes() for name, values in trainer.model.model.named_buffers()},
        [(module.training, vars(module).get("max_seq_len_cached")) for module in trainer.model.model.modules()],
        torch.get_rng_state().numpy().tobytes(),
        (trainer.step_number, trainer.state.loss_scale, trainer.state.torn, trainer.state.way),
    )


@pytest.mark.parametrize("optimizer", ["adamw", "adamw_8bit", "paged_adamw", "paged_adamw_8bit"])
@pytest.mark.sampled
def test_a_run_is_the_same_with_and_without_it(model: AdaptedModel, tmp_path: Path, optimizer: Any) -> None:
    """Before the first step, between two, and before a checkpoint is loaded."""
    plain = Trainer(model, ROWS, section(optimizer=optimizer), tmp_path)
    expected = take(plain, 2)
    place = plain.save()
    expected += take(plain, 2)
    wanted = adapter_bytes(model)

    stir(model, 0.05)
    trainer = Trainer(model, ROWS, section(optimizer=optimizer))
    model.model.train()
    before = state_of(trainer)
    trainer.rehearse()
    assert state_of(trainer) == before
    assert not trainer.state.optimizer.state
    model.model.eval()
    found = take(trainer, 2)
    before = state_of(trainer)
    assert len(before[1])
    trainer.rehearse()
    assert state_of(trainer) == before
    assert found + take(trainer, 2) == expected
    assert adapter_bytes(model) == wanted

    again = Trainer(model, ROWS, section(optimizer=optimizer))
    again.rehearse()
    again.load(place)
    assert take(again, 2) == expected[2:]
    assert adapter_bytes(model) == wanted


@pytest.mark.parametrize("name", ["adalora", "full", "prompt_tuning", "fp16"])
@pytest.mark.sampled
def test_whatever_the_method_and_the_way(folder: Path, name: str) -> None:
    methods: dict[str, Any] = {
        "adalora": config.AdaLoRA(r=2, initial_r=4, alpha=8, warmup=0.0, final=0.2, interval=1),
        "full": config.Full(),
        "prompt_tuning": config.PromptTuning(tokens=3),
    }
    curves = []
    for rehearsed in (False, True):
        base = tiny_base(folder, "none" if name == "full" else "nf4")
        model = apply_method(base, methods.get(name, config.LoRA(r=4, dropout=0.1)))
        trainer = Trainer(model, ROWS, section())
        if name == "fp16":
            trainer.state.loss_scale = 2.0**12
        before = state_of(trainer)
        if rehearsed:
            trainer.rehearse()
            assert state_of(trainer) == before
            assert all(method.why_not_disabled() is None for method in model.methods)  # full: not moved
        curves.append((take(trainer, 3), adapter_bytes(model), model.report(), trainer.state.loss_scale))
    assert curves[0] == curves[1]


def test_a_rotary_table_does_not_remember_it(tmp_path: Path) -> None:
    """Dynamic NTK stretches its table for the longest text so far, and keeps it for shorter ones. Up to 16 tokens, the longest of
    the check before a run, it does not: beyond them a row is turned otherwise beside a longer one, and that would be refused."""
    scaling = {"rope_type": "dynamic", "factor": 4.0, "rope_theta": 1e4}
    tiny_checkpoint(tmp_path, max_position_embeddings=16, rope_parameters=scaling)
    rows = sorted(random_rows(30, packing=False, seed=2, longest=24), key=lambda row: len(row.ids))
    model = tiny_model(tmp_path)
    trainer = Trainer(model, rows, section())
    next(trainer)
    before = state_of(trainer)
    trainer.rehearse()
    assert state_of(trainer) == before


def row_of(*lengths: int, targets: int = 1) -> Row:
    ids = numpy.arange(sum(lengths), dtype=numpy.int32) % 90 + 3
    positions = numpy.concatenate([numpy.arange(length, dtype=numpy.int32) for length in lengths])
    labels = numpy.full(len(ids), -100, dtype=numpy.int32)
    labels[len(ids) - targets :] = ids[len(ids) - targets :]
    return Row(ids, labels, positions, tuple(range(len(lengths))))


def shape_of(rows: list[Row]) -> list[tuple[int, int, int]]:
    return [(len(row.ids), len(row.examples), row.target_tokens) for row in rows]


def test_the_worst_rows() -> None:
    """(tokens, examples, targets) of each row."""
    plain = [row_of(n, targets=n // 4) for n in (12, 4, 20, 8, 16)]
    assert shape_of(worst_rows(plain, 3, Way(2, True, 1), 0)) == [(20, 1, 5), (16, 1, 4), (12, 1, 3)]
    # one after the other: the worst two come when there are gradients already
    found = worst_rows(plain, 4, Way(2, False, 1), 0)
    assert shape_of(found) == [(12, 1, 3), (8, 1, 2), (20, 1, 5), (16, 1, 4)]
    assert shape_of(worst_rows(plain, 3, Way(2, False, 1), 0)) == [(20, 1, 5), (16, 1, 4), (12, 1, 3)]
    assert len(worst_rows(plain, 9, Way(2, True, 1), 0)) == 5
    # a packed row brings a mask; it is to be beside the longest one
    packed = [*plain, row_of(5, 4), row_of(3, 3)]
    assert shape_of(worst_rows(packed, 3, Way(2, True, 1), 0)) == [(20, 1, 5), (16, 1, 4), (9, 2, 1)]
    assert shape_of(worst_rows(packed, 4, Way(2, False, 1), 0)[2:]) == [(20, 1, 5), (9, 2, 1)]
    assert shape_of(worst_rows(packed, 1, Way(2, False, 1), 0)) == [(20, 1, 5)]
    # virtual tokens stand before each example: 9 + 2 · 6 is more than 20 + … of one
    assert shape_of(worst_rows(packed, 1, Way(1, True, 1), 12))[0] == (9, 2, 1)
    # a chunk of the loss is full wherever some rows can fill it
    many = [row_of(20), row_of(20), row_of(10, targets=9)]
    assert shape_of(worst_rows(many, 2, Way(1, False, 256), 0))[1] == (20, 1, 9)
    assert shape_of(worst_rows(many, 2, Way(1, False, 4), 0))[1] == (20, 1, 4)
    assert sum(row.target_tokens for row in worst_rows(many, 2, Way(1, True, 256), 0)) == 10
    assert many[0].target_tokens == 1


@pytest.mark.parametrize("way", [Way(2, True, 256), Way(2, False, 256)])
def test_no_step_is_wider_than_the_rehearsed_one(way: Way) -> None:
    rows = random_rows(60, seed=5)

    def widths(chosen: list[Row]) -> list[int]:
        at_once = len(chosen) if way.layer_major else way.micro_batch_size
        parts = [chosen[start : start + at_once] for start in range(0, len(chosen), at_once)]
        return [collate(part, 0, 3)["input_ids"].numel() for part in parts]

    worst = widths(worst_rows(rows, 8, way, 3))
    for step in range(40):
        steps = widths([rows[place] for place in step_rows(len(rows), 8, step, 0)])
        assert max(steps) <= max(worst)
        assert sum(steps) <= sum(worst) or not way.layer_major  # one after the other, the largest alone counts


def test_what_it_tells(model: AdaptedModel) -> None:
    found = Trainer(model, ROWS, section()).rehearse()
    longest = max(len(row.ids) for row in ROWS)
    assert (found.rows, found.length, found.tokens, found.micro_batch_size) == (4, longest, 4 * longest, 2)
    assert found.seconds > 0
    assert found.notes == ()
    assert str(found).startswith(
        f"Rehearsed the most expensive step: 4 rows of up to {longest} tokens ({4 * longest} with"
    )
    by_turns = Trainer(model, ROWS, section(accumulation="micro_batch_major")).rehearse()
    assert 2 * longest < by_turns.tokens <= found.tokens


def test_its_peak_is_its_own(model: AdaptedModel, monkeypatch: pytest.MonkeyPatch) -> None:
    """Not what was held before it, and what a step holds on top. Whoever asks for the run's peak hears of both."""
    large = torch.ones(160 * 2**20 // 4)
    del large
    trainer = Trainer(model, ROWS, section())
    plain = trainer.rehearse().peak_memory_bytes

    def hold(module: torch.nn.Module, args: Any) -> None:
        if torch.is_grad_enabled():
            torch.ones(80 * 2**20 // 4)

    handle = decoder_layers(model.model)[0].register_forward_pre_hook(hold)
    more = trainer.rehearse()
    handle.remove()
    assert abs(more.peak_memory_bytes - plain - 80 * 2**20) < 8 * 2**20
    assert device.peak_memory_bytes(CPU) - plain > 140 * 2**20
    assert "since it began" not in str(more)
    large = torch.nn.Parameter(torch.ones(64 * 2**20 // 4))
    trainer.state.parameters["large"] = large
    copied = trainer.rehearse().peak_memory_bytes  # its copy is the rehearsal's own, and no step's
    assert abs(copied - plain - 64 * 2**20) < 8 * 2**20
    monkeypatch.setattr(rehearsal, "reset_peak_memory", lambda device: False)
    assert "resident in this process since it began, which the system cannot tell apart" in str(trainer.rehearse())


def test_the_moments_are_there_from_the_beginning(model: AdaptedModel) -> None:
    """As in every step but the first; else their memory would be missing where the peak is, in backward."""
    trainer = Trainer(model, ROWS, section())
    seen: list[int] = []
    norm: Any = model.model.get_submodule("model.norm")
    handle = norm.register_forward_hook(lambda *_: seen.append(len(trainer.state.optimizer.state)))
    trainer.rehearse()
    handle.remove()
    assert seen == [len(trainer.state.parameters)]


def test_a_smaller_way_is_found_and_kept(model: AdaptedModel) -> None:
    trainer = Trainer(model, ROWS, section(micro_batch_size=4))
    with short_of_memory(model, 1, "backward", layer=0) as refused:
        found = trainer.rehearse()
        assert refused == [4, 2]
        assert (found.micro_batch_size, trainer.micro_batch_size) == (1, 1)
        assert [note.split(" did not fit into memory")[0] for note in found.notes] == [
            f"The most expensive step of this data, 4 rows of up to {found.length} tokens,"
        ] * 2
        assert next(trainer).note == ""
    assert refused == [4, 2]


def test_what_does_not_fit_is_refused_before_anything_is_written(
    model: AdaptedModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trainer = Trainer(model, ROWS, section(), tmp_path / "run")
    before = state_of(trainer)
    monkeypatch.setattr(tokens, "batch_loss", losses_in_chunks_of(0))
    with pytest.raises(DoesNotFitError, match=r"most expensive step .* no smaller way is left"):
        trainer.rehearse()
    assert state_of(trainer)[:-1] == before[:-1]
    assert not (tmp_path / "run").exists()


def test_memory_for_the_moments_counts(model: AdaptedModel, monkeypatch: pytest.MonkeyPatch) -> None:
    trainer = Trainer(model, ROWS, section(micro_batch_size=1, loss_chunk=16, accumulation="micro_batch_major"))

    def refuse() -> None:
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(trainer.state.optimizer, "step", refuse)
    with pytest.raises(DoesNotFitError, match="CUDA out of memory"):
        trainer.rehearse()
    assert not trainer.state.torn


def test_paged_states_are_emptied_in_place() -> None:
    """bitsandbytes never frees managed memory, so a new paged state stays, as if no step had been taken."""
    values = torch.nn.Parameter(torch.ones(3, 4))
    optimizer: Any = torch.optim.AdamW([values])
    with steps_taken_back(optimizer, [values]) as kept:
        assert kept == 48
        moment = torch.ones(3, 4)
        moment.is_paged = True  # type: ignore[attr-defined]
        optimizer.state[values] = {"step": 1, "state1": moment, "qmap1": torch.ones(2)}
        values.data.zero_()
    assert optimizer.state[values]["step"] == 0
    assert optimizer.state[values]["state1"] is moment
    assert not moment.any()
    assert optimizer.state[values]["qmap1"].all()
    assert values.detach().all()
