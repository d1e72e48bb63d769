"""The law of the optimizer in backward: the steps are those of one call for all parameters, and one layer's gradients live."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from qlora import recipe as config
from qlora.data import collate
from qlora.errors import DoesNotFitError, NonFiniteError, RecipeError, RunError
from qlora.methods import AdaptedModel, apply_method
from qlora.model.loss import batch_loss
from qlora.recipe import TrainingSection
from qlora.residence.layers import RecomputedLayer, decoder_layers
from qlora.training import Trainer
from qlora.training.in_backward import InBackward
from tests.tiny import adapter_bytes, random_rows, stir, tiny_base, tiny_checkpoint, tiny_model
from tests.training.test_smaller import no_collection, short_of_memory

ROWS = random_rows(80, seed=1)[:19]
TARGETS = ("q_proj", "o_proj", "down_proj")


def section(in_backward: bool = True, **values: Any) -> TrainingSection:
    how = {
        "batch_size": 8, "micro_batch_size": 2, "learning_rate": 1e-2, "weight_decay": 0.1, "max_grad_norm": None,
        "steps": 5, "optimizer_in_backward": in_backward,
    }  # fmt: skip
    return TrainingSection(**{**how, **values})


__all__ = ["no_collection"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Tied embeddings."""
    return tiny_checkpoint(tmp_path_factory.mktemp("base"), "gemma2", num_hidden_layers=3)


@pytest.fixture(scope="module")
def one_model(folder: Path) -> AdaptedModel:
    return tiny_model(folder, r=64, dropout=0.1, target_modules=TARGETS)


@pytest.fixture
def model(one_model: AdaptedModel) -> AdaptedModel:
    stir(one_model, 0.05)
    return one_model


def take(trainer: Trainer, count: int) -> list[tuple[float, float, float]]:
    return [(step.loss, step.grad_norm, step.learning_rate) for step in (next(trainer) for _ in range(count))]


@pytest.mark.parametrize("optimizer", ["adamw", "adamw_8bit", "paged_adamw", "paged_adamw_8bit"])
def test_five_steps_are_the_same_bit_for_bit(model: AdaptedModel, tmp_path: Path, optimizer: Any) -> None:
    """With dropout, a short step, and a checkpoint between them that either may go on from."""
    trainer = Trainer(model, ROWS, section(False, optimizer=optimizer), tmp_path)
    expected = take(trainer, 3)
    place = trainer.save()
    expected += take(trainer, 2)
    wanted = adapter_bytes(model)
    stir(model, 0.05)
    assert take(Trainer(model, ROWS, section(optimizer=optimizer)), 5) == expected
    assert adapter_bytes(model) == wanted
    stir(model, 0.3)
    again = Trainer(model, ROWS, section(optimizer=optimizer))
    again.load(place)
    assert take(again, 2) == expected[3:]
    assert adapter_bytes(model) == wanted


@pytest.mark.parametrize(
    "method",
    [
        config.Full(),
        config.Combined(parts=(config.LoRA(r=4, target_modules=TARGETS), config.NewTokens(tokens=("<tool>",)))),
        config.PrefixTuning(tokens=3, projection_size=8),
    ],
    ids=["full", "new_tokens", "prefix"],
)
def test_what_trains_outside_the_layers_moves_at_the_end(folder: Path, method: Any) -> None:
    """A tied embedding has a part of its gradient long before the first layer is left."""
    curves = []
    for in_backward in (False, True):
        model = apply_method(tiny_base(folder, "none" if method.name == "full" else "nf4"), method)
        trainer = Trainer(model, ROWS, section(in_backward, steps=3))
        if trainer.in_backward is not None:
            own = {name for names in trainer.in_backward.own for name in names}
            assert own < set(trainer.parameters)
            assert own == {name for name in trainer.parameters if ".layers." in name and ".shared." not in name}
        curves.append((take(trainer, 3), adapter_bytes(model)))
    assert curves[0] == curves[1]


def test_one_layers_gradients_live_at_a_time(model: AdaptedModel, monkeypatch: pytest.MonkeyPatch) -> None:
    trainer = Trainer(model, ROWS, section())
    alive: list[set[str]] = []
    leave = InBackward._move

    def look(self: InBackward, names: list[str], number: int | None = None) -> None:
        alive.append({name for name, values in trainer.parameters.items() if values.grad is not None})
        leave(self, names, number)

    monkeypatch.setattr(InBackward, "_move", look)
    next(trainer)
    layers = [{name for name in trainer.parameters if f"layers.{number}." in name} for number in range(3)]
    assert alive == [layers[2], layers[1], layers[0], set()]
    assert all(values.grad is None for values in trainer.parameters.values())


def test_a_parameter_of_two_layers_is_whole_at_the_end(model: AdaptedModel) -> None:
    trainer = Trainer(model, ROWS, section())
    name = "model.layers.1.mlp.down_proj.lora_A"
    layers = decoder_layers(model.model)
    other: Any = layers[2]
    other.layer.borrowed = trainer.parameters[name]
    try:
        own = InBackward(model.model, trainer.parameters, trainer.optimizer).own
    finally:
        del other.layer.borrowed
    assert name not in own[1] + own[2]
    assert len(own[1]) == len(own[0]) - 1


def test_a_backward_of_somebody_else_moves_nothing(model: AdaptedModel) -> None:
    trainer = Trainer(model, ROWS, section())
    next(trainer)
    before = adapter_bytes(model)
    model.model.train()
    batch_loss(model.model, collate(ROWS[:4], 0))[0].backward()
    model.model.eval()
    assert adapter_bytes(model) == before
    assert all(values.grad is not None for values in trainer.parameters.values())
    trainer.optimizer.zero_grad()


def test_the_next_trainer_finds_nothing_left_of_it(model: AdaptedModel) -> None:
    Trainer(model, ROWS, section())
    plain = Trainer(model, ROWS, section(False))
    layers = [module for module in model.model.modules() if isinstance(module, RecomputedLayer)]
    assert [layer.after_backward for layer in layers] == [None] * 3
    plain._gradients(ROWS[:8])
    assert all(values.grad is not None for values in plain.parameters.values())
    plain.optimizer.zero_grad()


@pytest.mark.parametrize(("layer", "words"), [(2, "No step was taken"), (1, "Part of the step was taken .*is whole")])
def test_a_gradient_that_is_not_finite_stops_it(model: AdaptedModel, tmp_path: Path, layer: int, words: str) -> None:
    trainer = Trainer(model, ROWS, section(), tmp_path)
    take(trainer, 1)
    place, before = trainer.save(), adapter_bytes(model)
    name = f"model.layers.{layer}.mlp.down_proj.lora_B"
    handle = trainer.parameters[name].register_hook(lambda grad: grad * torch.inf)
    with pytest.raises(NonFiniteError, match=rf"Step 2 gave gradient norm (inf|nan) on rows \d.*{name}. {words}"):
        next(trainer)
    handle.remove()
    assert all(values.grad is None for values in trainer.parameters.values())
    moved = {key for key, values in adapter_bytes(model).items() if values != before[key]}
    assert {key.split(".")[2] for key in moved} == (set() if layer == 2 else {"2"})
    if layer == 1:
        for act in (trainer.save, lambda: next(trainer)):
            with pytest.raises(RunError, match="Step 2 was broken off"):
                act()
        trainer.load(place)
        assert adapter_bytes(model) == before
    assert next(trainer).number == 2


def test_a_loss_that_is_not_finite_is_seen_before_anything_moves(model: AdaptedModel) -> None:
    trainer = Trainer(model, ROWS, section())
    before = adapter_bytes(model)
    norm: Any = model.model.get_submodule("model.norm")
    handle = norm.register_forward_hook(lambda module, args, output: output * torch.nan)
    with pytest.raises(NonFiniteError, match=r"Step 1 gave loss nan on rows .*No step was taken"):
        next(trainer)
    handle.remove()
    assert adapter_bytes(model) == before
    assert next(trainer).number == 1


def test_short_memory_is_cured_as_long_as_nothing_has_moved(model: AdaptedModel, tmp_path: Path) -> None:
    expected = take(Trainer(model, ROWS, section(micro_batch_size=1)), 2)
    stir(model, 0.05)
    trainer = Trainer(model, ROWS, section(), tmp_path)
    with short_of_memory(model, 1, "backward", layer=2):
        found = take(trainer, 2)
    assert found == expected
    assert trainer.micro_batch_size == 1
    stir(model, 0.05)
    trainer = Trainer(model, ROWS, section(), tmp_path)
    with (
        short_of_memory(model, 1, "backward", layer=1),
        pytest.raises(
            DoesNotFitError, match=r"Step 1 did not fit .*some layers had moved already .*micro_batch_size below 2"
        ),
    ):
        next(trainer)
    with pytest.raises(RunError, match="broken off"):
        next(trainer)


def test_a_layer_that_is_visited_twice_is_refused(model: AdaptedModel, monkeypatch: pytest.MonkeyPatch) -> None:
    trainer = Trainer(model, ROWS, section())
    layers = decoder_layers(model.model)
    monkeypatch.setattr(layers[2], "forward", lambda hidden, *args, **kw: RecomputedLayer.forward(layers[2], RecomputedLayer.forward(layers[2], hidden, *args, **kw), *args, **kw))  # type: ignore[arg-type]  # fmt: skip
    with pytest.raises(Exception, match="Layer 2 is visited twice in a step"):
        next(trainer)


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"max_grad_norm": 1.0}, r"max_grad_norm is 1.0, and .*set it to null"),
        ({"accumulation": "micro_batch_major"}, r"accumulation is micro_batch_major, .*set it to layer_major"),
        ({"gradient_checkpointing": False}, r"asks for training.optimizer_in_backward, .*set it to true"),
    ],
)
def test_what_it_needs_is_said_in_a_sentence(model: AdaptedModel, values: dict[str, Any], words: str) -> None:
    with pytest.raises(RecipeError, match=words):
        Trainer(model, ROWS, section(**values))


def test_what_needs_all_gradients_is_refused(
    model: AdaptedModel, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    adalora = apply_method(tiny_base(folder), config.AdaLoRA(r=2, initial_r=4, orthogonality=0))
    with pytest.raises(RecipeError, match=r"adalora needs all gradients after the step; leave"):
        Trainer(adalora, ROWS, section())
    monkeypatch.setattr(model.methods[0], "penalty", lambda: nn.Parameter(torch.ones(())))
    with pytest.raises(RecipeError, match=r"lora needs all gradients"):
        Trainer(model, ROWS, section())
    monkeypatch.undo()
    monkeypatch.setattr(model.base, "compute_dtype", torch.float16)
    with pytest.raises(RecipeError, match=r"computes in fp16"):
        Trainer(model, ROWS, section())
