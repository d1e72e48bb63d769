"""NaN and infinity, put into rows, weights and gradients: nothing moves, and the step, its rows and the module are named."""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path
from typing import Any

import numpy
import pytest
import torch
from safetensors.torch import load_file, save_file

from qlora.data.batches import step_rows
from qlora.data.packing import Row
from qlora.errors import NonFiniteError
from qlora.methods.base import AdaptedModel
from qlora.model.nf4 import dense_weight
from qlora.recipe import TrainingSection
from qlora.training import checkpoint
from qlora.training.log import Step
from qlora.training.loop import Trainer
from qlora.training.optim import optimizer_tensors
from tests.tiny import adapter_bytes, random_rows, tiny_checkpoint, tiny_model

BAD = 95  # a token that no row holds but the one it is put into
ROWS = [
    Row(
        numpy.where(row.ids == BAD, 5, row.ids),
        numpy.where(row.labels == BAD, 5, row.labels),
        row.positions,
        row.examples,
    )
    for row in random_rows(30, seed=1)[:14]
]  # by 4: steps of 4, 4, 4 and 2 rows an epoch
WAYS = {
    "layer-major": {},
    "micro-batch-major": {"accumulation": "micro_batch_major"},
    "resident": {"gradient_checkpointing": False},
}


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_checkpoint(tmp_path_factory.mktemp("base"))


def trainer_on(base: Path, rows: list[Row] = ROWS, folder: Path | None = None, **values: Any) -> Trainer:
    model = tiny_model(base, dropout=0.1, target_modules=("q_proj", "o_proj", "down_proj"))
    training = {"batch_size": 4, "micro_batch_size": 2, "steps": 8, "learning_rate": 1e-2, **values}
    return Trainer(model, rows, TrainingSection(**training), folder)


def with_bad_row(step: int) -> tuple[list[Row], int]:
    """Rows of which one, in step ``step`` from 0, holds the bad token; and its place."""
    place = step_rows(len(ROWS), 4, step, 0)[1]
    ids = ROWS[place].ids.copy()
    ids[1] = BAD
    return [Row(ids, r.labels, r.positions, r.examples) if at == place else r for at, r in enumerate(ROWS)], place


def spoil_embedding(model: AdaptedModel, value: float = math.nan) -> None:
    model.model.get_input_embeddings().weight.data[BAD] = value


def module_at(model: AdaptedModel, path: str) -> Any:
    """The outermost module that is called ``path`` without the boundary's part of its name."""
    return next(module for name, module in model.model.named_modules() if name.replace(".layer.", ".") == path)


def state_of(trainer: Trainer) -> tuple[Any, ...]:
    moments = optimizer_tensors(trainer.state.optimizer, trainer.state.parameters)
    return adapter_bytes(trainer.model), {name: value.numpy().tobytes() for name, value in moments.items()}


def refusal(trainer: Trainer) -> str:
    """The sentence that the next step is refused with, after which nothing has moved."""
    before, step = state_of(trainer), trainer.step_number
    with pytest.raises(NonFiniteError) as caught:
        next(trainer)
    assert state_of(trainer) == before
    assert trainer.step_number == step
    assert all(p.grad is None for p in trainer.state.parameters.values())
    assert not trainer.model.model.training
    return str(caught.value)


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.sampled
def test_a_bad_row_is_named_and_the_module_that_met_it_first(base: Path, way: str, value: float) -> None:
    rows, place = with_bad_row(step=1)
    trainer = trainer_on(base, rows, **WAYS[way])
    next(trainer)
    spoil_embedding(trainer.model, value)
    words = refusal(trainer)
    assert words.startswith("Step 2 gave loss nan")
    assert f"on rows {place};" in words
    assert "the first bad value is the output of model.embed_tokens, whose weight is not finite" in words
    assert (
        "No step was taken; lower training.learning_rate, look at those rows, or set training.not_finite=skip" in words
    )


@pytest.mark.parametrize("way", WAYS)
def test_a_frozen_weight_is_named(base: Path, way: str) -> None:
    trainer = trainer_on(base, **WAYS[way])
    next(trainer)
    linear = module_at(trainer.model, "model.layers.1.mlp.up_proj")
    linear.offset.fill_(math.inf)  # of the scales
    linear.kept = None
    assert not dense_weight(linear, torch.float32).isfinite().all()
    words = refusal(trainer)
    assert "the first bad value is the output of model.layers.1.mlp.up_proj, whose weight is not finite" in words
    assert f"on rows {', '.join(map(str, step_rows(len(ROWS), 4, 1, 0)))};" in words


def test_a_trained_weight_is_named(base: Path) -> None:
    trainer = trainer_on(base)
    next(trainer)
    name = "model.layers.0.self_attn.q_proj.lora_B"
    trainer.state.parameters[name].data[0, 0] = math.nan
    assert (
        "the first bad value is the output of model.layers.0.self_attn.q_proj, whose weight is not finite"
        in refusal(trainer)
    )


@pytest.mark.parametrize("way", WAYS)
def test_a_gradient_that_turns_bad_inside_is_named(base: Path, way: str) -> None:
    """The loss is finite; what comes back out of layer 1's MLP is not."""
    trainer = trainer_on(base, **WAYS[way])
    next(trainer)
    down = module_at(trainer.model, "model.layers.1.mlp.down_proj")
    down.register_forward_hook(lambda module, inputs, output: _Explodes.apply(output))
    words = refusal(trainer)
    assert "and gradient norm" in words
    assert "the first bad value is the gradient of the input of model.layers.1.mlp.down_proj" in words
    assert "the first gradients that are not finite: " in words


class _Explodes(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, values: torch.Tensor) -> torch.Tensor:
        return values.clone()

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> torch.Tensor:  # type: ignore[override]
        return gradient * math.inf


def test_looking_for_it_leaves_no_hook(base: Path) -> None:
    rows, _ = with_bad_row(step=1)
    trainer = trainer_on(base, rows)
    next(trainer)
    weight = trainer.model.model.get_input_embeddings().weight
    kept = weight.data[BAD].clone()
    spoil_embedding(trainer.model)
    refusal(trainer)
    assert not any(module._forward_hooks for module in trainer.model.model.modules())
    weight.data[BAD] = kept
    straight = trainer_on(base, rows)
    expected = [next(straight).loss for _ in range(3)]
    assert [next(trainer).loss, next(trainer).loss] == expected[1:]
    assert adapter_bytes(trainer.model) == adapter_bytes(straight.model)


# --- skip ------------------------------------------------------------------------------------------------------------


def test_a_skipped_step_moves_nothing_and_the_run_goes_on(base: Path, tmp_path: Path) -> None:
    rows, place = with_bad_row(step=1)
    trainer = trainer_on(base, rows, tmp_path, not_finite="skip", steps=3)
    next(trainer)
    spoil_embedding(trainer.model)
    before = state_of(trainer)
    step = next(trainer)
    assert state_of(trainer) == before
    assert (step.number, step.skipped, trainer.step_number, trainer.state.skipped) == (2, True, 2, 1)
    assert math.isnan(step.loss)
    assert math.isnan(step.grad_norm)
    assert f"on rows {place};" in step.note
    assert "No step was taken; it is skipped (1 of at most 10)." in step.note
    line = json.loads(json.dumps(step.metrics(), allow_nan=False))  # JSON knows no NaN
    assert line["skipped"] is True
    assert not line.keys() & {"loss", "grad_norm"}
    assert "skipped: Step 2 gave" in str(step)
    after: Step = next(trainer)
    assert not after.skipped
    assert "skipped" not in after.metrics()
    assert state_of(trainer) != before
    assert list(trainer) == []


def test_the_limit_holds_also_across_a_resume_and_what_was_done_is_saved(base: Path, tmp_path: Path) -> None:
    def spoiled() -> Trainer:
        trainer = trainer_on(base, folder=tmp_path, not_finite="skip", skip_limit=3)
        module_at(trainer.model, "model.layers.1.mlp.up_proj").bias = torch.full((1,), math.nan)  # every step meets it
        return trainer

    trainer = spoiled()
    assert [next(trainer).skipped for _ in range(2)] == [True, True]
    trainer.save()
    again = spoiled()
    assert again.load_newest() == []
    assert (again.state.skipped, again.step_number) == (2, 2)
    assert next(again).skipped
    words = refusal(again)
    assert "training.skip_limit=3 steps were skipped before; look at those rows" in words
    assert f"The state after step 3 is in '{tmp_path / 'checkpoints' / '000003'}'" in words


def test_a_run_that_stops_saves_first(base: Path, tmp_path: Path) -> None:
    rows, _ = with_bad_row(step=2)
    trainer = trainer_on(base, rows, tmp_path)
    next(trainer), next(trainer)
    spoil_embedding(trainer.model)
    assert "The state after step 2 is in" in refusal(trainer)
    assert checkpoint.newest(tmp_path / "checkpoints") == (tmp_path / "checkpoints" / "000002", [])


def test_an_adapter_that_is_not_finite_is_not_saved(base: Path, tmp_path: Path) -> None:
    """It could not be read again, and it would push out the checkpoints that can."""
    trainer = trainer_on(base, folder=tmp_path, keep_checkpoints=1)
    next(trainer)
    place = trainer.save()
    next(trainer)
    trainer.state.parameters["model.layers.0.self_attn.q_proj.lora_B"].data[0, 0] = math.nan
    words = refusal(trainer)
    assert "The state after" not in words
    with pytest.raises(NonFiniteError, match=r"q_proj\.lora_B hold.* not saved; the newest checkpoint is whole"):
        trainer.save()
    assert checkpoint.newest(place.parent) == (place, [])
    trainer.load(place)
    assert next(trainer).number == 2


@pytest.mark.parametrize(
    ("tensor", "words"),
    [
        (
            "model.layers.1.mlp.down_proj.weight",
            "the output of model.layers.1.mlp.down_proj, whose weight is not finite",
        ),
        ("model.norm.weight", "the output of model.norm, whose weight is not finite"),
        ("lm_head.weight", "the output of lm_head, whose weight is not finite"),
    ],
)
def test_a_checkpoint_that_holds_nan_is_told_before_the_first_step(
    base: Path, tmp_path: Path, tensor: str, words: str
) -> None:
    folder = tmp_path / "base"
    shutil.copytree(base, folder)
    (path,) = folder.glob("*.safetensors")
    tensors = load_file(path)
    tensors[tensor].view(-1)[3] = math.nan
    save_file(tensors, path, metadata={"format": "pt"})
    with pytest.raises(
        NonFiniteError, match=f"before any step: the first bad value is {words}. Fetch the checkpoint again"
    ):
        trainer_on(folder)
