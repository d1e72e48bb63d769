"""The laws of parameters that compute in bf16: every step counts, every micro-batch counts, and a checkpoint keeps both."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from qlora import recipe
from qlora.errors import RunError
from qlora.methods.base import AdaptedModel, apply_method
from qlora.methods.files import WEIGHTS
from qlora.methods.lora import LoraLinear
from qlora.recipe import ModelSection, TrainingSection
from qlora.residence.load import load_base
from qlora.training.checkpoint import OPTIMIZER
from qlora.training.loop import Trainer
from qlora.training.masters import KEY, Masters, master_bytes, wide_gradients
from qlora.training.optim import make_optimizer
from tests.steps import close, same_bits, step_of
from tests.tiny import CPU, random_rows, stir, tiny_checkpoint, tiny_model

RATE = 2e-5
ROWS = random_rows(80, seed=1)[:8]
EPS = torch.finfo(torch.bfloat16).eps
WAYS = [(size, way) for size in (1, 2, 4, 8) for way in ("layer_major", "micro_batch_major")]


def first_values() -> Tensor:
    """What A begins as beside 4,096 inputs: even between -1/64 and 1/64."""
    return torch.linspace(-1 / 64, 1 / 64, 4096)


def section(**values: Any) -> TrainingSection:
    defaults = {
        "batch_size": 8,
        "learning_rate": RATE,
        "schedule": "constant",
        "warmup_fraction": 0,
        "max_grad_norm": None,
    }
    return TrainingSection(**{**defaults, **values})


def stepped(dtype: torch.dtype, count: int, **values: Any) -> tuple[nn.Parameter, Tensor]:
    """(a parameter of ``first_values``, its master) after ``count`` steps with one and the same gradient."""
    parameters = {"p": nn.Parameter(first_values().to(dtype))}
    masters = Masters(parameters)
    optimizer = make_optimizer(masters.values, section(**values))
    for _ in range(count):
        parameters["p"].grad = torch.ones(4096)
        masters.follow()
        masters.take_gradients()
        optimizer.step()
        masters.hand_over()
        masters.drop_gradients()
    return parameters["p"], masters.values["p"].detach()


def test_without_masters_half_of_the_numbers_would_stand_still() -> None:
    """A step of Adam is the rate. In bf16 numbers from 1/128 to 1/64 are 6.1e-5 apart, and half of them are in there."""
    before = first_values().bfloat16()
    after = (before.float() - RATE).bfloat16()  # the best that an optimizer of bf16 parameters alone can do
    moved = (before.float() - after.float()) / RATE
    assert float((moved == 0).float().mean()) == pytest.approx(0.5, abs=0.01)
    assert float(moved.mean()) == pytest.approx(0.61, abs=0.01)
    again = (after.float() - RATE).bfloat16()
    assert torch.equal(again[moved == 0], before[moved == 0])  # and so in every step


@pytest.mark.parametrize("optimizer", ["adamw", "paged_adamw", "adamw_8bit", "paged_adamw_8bit"])
def test_with_masters_every_number_moves_by_the_rate(optimizer: str) -> None:
    count = 8
    found, master = stepped(torch.bfloat16, count, optimizer=optimizer)
    plain, _ = stepped(torch.float32, count, optimizer=optimizer)
    begun = first_values().bfloat16()
    moved = (begun.double() - master.double()) / (count * RATE)
    eight_bit = 2 / 256 if "8bit" in optimizer else 0  # of both moments, one number in 256
    assert float((moved - 1).abs().max()) <= eight_bit + 1e-3  # fp32's rounding, count times, of numbers of 1/64
    assert plain.dtype == master.dtype == torch.float32
    assert found.dtype == torch.bfloat16
    assert torch.equal(found, master.bfloat16())  # computed with: what the master rounds to
    assert bool((found != begun).all())


def test_a_parameter_in_fp32_is_its_own_master() -> None:
    parameters = {"wide": nn.Parameter(torch.ones(3)), "narrow": nn.Parameter(torch.ones(3).bfloat16())}
    masters = Masters(parameters)
    assert masters.values["wide"] is parameters["wide"]
    assert list(masters.state()) == [f"narrow{KEY}"]
    assert master_bytes(parameters.values()) == sum(m.numel() * 4 for m in masters.state().values()) == 12


def test_what_is_written_into_a_parameter_counts() -> None:
    """An adapter that is loaded after the trainer was made, values that EVA takes from data, triplets that are pruned."""
    values = nn.Parameter(torch.full((4,), 0.3).bfloat16())
    masters = Masters({"p": values})
    master = masters.values["p"].data
    master.add_(torch.tensor([1e-5, 1e-5, -1e-5, 0]))  # steps too small to show in bf16
    masters.hand_over()
    kept = master.clone()
    masters.follow()
    assert torch.equal(master, kept)
    with torch.no_grad():
        values[1] = 0
        values[3] = 7
    masters.follow()
    assert torch.equal(master, torch.tensor([float(kept[0]), 0, float(kept[2]), 7]))


# --- micro-batches -----------------------------------------------------------------------------------------------------


def test_the_gradient_of_micro_batches_in_bf16_is_that_of_all_rows() -> None:
    """To the last bit: of small whole numbers the sums are exact in fp32, and far from it in bf16's eight bits."""
    generator = torch.Generator().manual_seed(0)

    def whole(*shape: int, most: int = 3) -> Tensor:
        return torch.randint(-most, most + 1, shape, generator=generator).float()

    base = nn.Linear(16, 8, bias=False).requires_grad_(False)
    layer = LoraLinear(base, whole(2, 16, most=1), whole(8, 2, most=1), 2.0, 0.0).bfloat16()
    wide_gradients(layer.parameters())
    x, grad = whole(8, 999, 16), whole(8, 999, 8)
    low = x.double() @ layer.lora_A.double().t()
    exact = {
        "lora_A": 2 * torch.einsum("btr,bti->ri", grad.double() @ layer.lora_B.double(), x.double()),
        "lora_B": 2 * torch.einsum("bto,btr->or", grad.double(), low),
    }
    for size in (1, 2, 4, 8):
        for part in range(0, 8, size):
            rows = slice(part, part + size)
            layer(x[rows].bfloat16()).backward(grad[rows].bfloat16())
        for name, expected in exact.items():
            values = layer.get_parameter(name)
            assert values.grad is not None
            assert values.grad.dtype == torch.float32
            assert torch.equal(values.grad.double(), expected), (size, name)
            assert not torch.equal(expected.bfloat16().double(), expected)
            values.grad = None


NARROW: dict[str, Any] = {
    "lora": recipe.LoRA(r=4, adapter_dtype="bf16"),
    "dora": recipe.DoRA(r=4, adapter_dtype="bf16"),
    "adalora": recipe.AdaLoRA(r=2, initial_r=4, adapter_dtype="bf16"),
}


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_checkpoint(tmp_path_factory.mktemp("base") / "model")


def adapted(checkpoint: Path, method: Any, **values: Any) -> AdaptedModel:
    values = {"compute_dtype": "fp32", **values}
    model = apply_method(load_base(ModelSection(name=str(checkpoint), **values), CPU), method)
    stir(model, 0.05)
    return model


@pytest.mark.parametrize("method", NARROW)
def test_bf16_adapters_get_the_same_gradient_in_every_split(checkpoint: Path, method: str) -> None:
    """1 × 8 = 2 × 4 = 8 × 1 to fp32's rounding. Products are in fp32 here, so that every row's states are the same on any
    processor; of those in bf16 the test above tells."""
    model = adapted(checkpoint, NARROW[method])
    _, expected = step_of(Trainer(model, ROWS, section(steps=99, micro_batch_size=8, gradient_checkpointing=False)))
    assert {values.dtype for values in expected.values()} == {torch.float32}
    assert {values.dtype for values in model.trainable_parameters().values()} >= {torch.bfloat16}
    for size, way in WAYS:
        _, found = step_of(Trainer(model, ROWS, section(steps=99, micro_batch_size=size, accumulation=way)))
        close(found, expected)


# --- checkpoints -------------------------------------------------------------------------------------------------------


def test_a_checkpoint_holds_masters_and_its_adapter_what_was_computed_with(checkpoint: Path, tmp_path: Path) -> None:
    model = adapted(checkpoint, NARROW["lora"])
    trainer = Trainer(model, ROWS, section(steps=3), tmp_path)
    list(trainer)
    place = trainer.save()
    masters = trainer.state.masters.values
    moments = load_file(place / OPTIMIZER)
    same_bits({name: moments[f"{name}{KEY}"] for name in masters}, masters)
    written = load_file(place / WEIGHTS)
    assert {values.dtype for values in written.values()} == {torch.bfloat16}
    same_bits(written, model.adapter_state())
    same_bits(model.trainable_parameters(), {name: master.bfloat16() for name, master in masters.items()})
    assert any(not torch.equal(master, master.bfloat16().float()) for master in masters.values())


def test_a_rehearsal_leaves_masters_as_they_were(checkpoint: Path) -> None:
    """Though the first step after it writes them anew from an adapter that was loaded in between."""
    trainer = Trainer(adapted(checkpoint, NARROW["lora"]), ROWS, section(weight_decay=0.1, learning_rate=1e-2))
    next(trainer)
    before = {name: master.detach().clone() for name, master in trainer.state.masters.values.items()}
    trainer.rehearse()
    same_bits(trainer.state.masters.values, before)
    with torch.no_grad():
        for values in trainer.state.parameters.values():
            values.fill_(0.5)
    trainer.state.masters.follow()
    assert all(bool((master == 0.5).all()) for master in trainer.state.masters.values.values())


def test_a_checkpoint_without_masters_is_refused_in_a_sentence(checkpoint: Path, tmp_path: Path) -> None:
    trainer = Trainer(adapted(checkpoint, NARROW["lora"]), ROWS, section(steps=3), tmp_path)
    next(trainer)
    state = trainer.state.masters.state()
    with pytest.raises(RunError, match=r"does not hold the fp32 masters .*lora_A.*method\.from"):
        trainer.state.masters.load({key: values for key, values in state.items() if "layers.1" not in key})
    wide = Trainer(tiny_model(tmp_path / "wide"), ROWS, section(steps=3))
    with pytest.raises(RunError, match="another adapter_dtype"):
        wide.state.masters.load(state)
