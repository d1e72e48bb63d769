"""The adapted model: what trains, what is frozen, switching off, taking out, and loading values strictly."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from qlora import recipe as config
from qlora.errors import MethodError
from qlora.methods.base import AdaptedModel, apply_method
from qlora.methods.lora import LoraLinear
from tests.tiny import logits_of, stir, tiny_base, tiny_checkpoint

SECTION = config.LoRA(r=4, target_modules=("q_proj", "down_proj"))
KEY = "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight"


@pytest.fixture
def model(tmp_path: Path) -> AdaptedModel:
    model = apply_method(tiny_base(tiny_checkpoint(tmp_path, "qwen2")), SECTION)
    stir(model)
    return model


def test_exactly_the_adapter_trains(model: AdaptedModel) -> None:
    training = {id(values) for values in model.model.parameters() if values.requires_grad}
    assert training == {id(values) for values in model.trainable_parameters().values()}
    assert model.count_trainable() == 2 * 4 * ((64 + 64) + (64 + 128))
    assert "model.layers.1.mlp.down_proj.lora_B" in model.trainable_parameters()


def test_disabled_is_the_base_and_enabled_again_after(model: AdaptedModel) -> None:
    adapted = logits_of(model.model)
    with model.disabled():
        alone = logits_of(model.model)
    assert not torch.equal(alone, adapted)
    assert torch.equal(logits_of(model.model), adapted)
    base = model.remove()
    assert torch.equal(logits_of(base.model), alone)
    assert not any(isinstance(module, LoraLinear) for module in base.model.modules())


def test_enabled_again_after_an_error(model: AdaptedModel) -> None:
    def fail_while_disabled() -> None:
        with model.disabled():
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fail_while_disabled()
    assert all(layer.enabled for layer in model.planted.values())


def test_a_second_adapter_is_refused(model: AdaptedModel) -> None:
    with pytest.raises(MethodError, match="carries an adapter already"):
        apply_method(model.base, SECTION)


def test_names_survive_a_wrapped_layer(model: AdaptedModel) -> None:
    before = list(model.adapter_state())
    layers = model.model.get_submodule("model.layers")
    layers[0] = torch.nn.Sequential(layers[0])
    assert list(model.adapter_state()) == before


def test_state_goes_round(model: AdaptedModel, tmp_path: Path) -> None:
    state = {key: values.clone() for key, values in model.adapter_state().items()}
    expected = logits_of(model.model)
    stir(model, 1.0)
    assert not torch.equal(logits_of(model.model), expected)
    model.load_adapter_state({key: values.double() for key, values in state.items()})
    assert torch.equal(logits_of(model.model), expected)
    assert all(values.dtype == torch.float32 for values in model.trainable_parameters().values())


@pytest.mark.parametrize("problem", ["missing", "unexpected", "shape", "nan"])
def test_a_state_that_does_not_fit_changes_nothing(model: AdaptedModel, problem: str) -> None:
    state = {key: torch.zeros_like(values) for key, values in model.adapter_state().items()}
    before = {key: values.clone() for key, values in model.adapter_state().items()}
    name = KEY
    if problem == "missing":
        del state[KEY]
    elif problem == "unexpected":
        name = KEY.replace("q_proj", "v_proj")
        state[name] = torch.zeros(4, 64)
    elif problem == "shape":
        state[KEY] = torch.zeros(8, 64)
    else:
        state[KEY][0, 0] = torch.nan
    with pytest.raises(MethodError, match=name):
        model.load_adapter_state(state)
    assert all(torch.equal(values, before[key]) for key, values in model.adapter_state().items())


def test_what_wanted_gradients_before_wants_them_again_after() -> None:
    network = torch.nn.Sequential(torch.nn.Linear(6, 8), torch.nn.LayerNorm(8), torch.nn.Linear(8, 3))
    network[1].requires_grad_(False)
    before = {name: values.requires_grad for name, values in network.named_parameters()}
    assert set(before.values()) == {True, False}

    def now() -> dict[str, bool]:
        return {name: values.requires_grad for name, values in network.named_parameters()}

    section = config.LoRA(r=2, target_modules=("0",))
    adapted = apply_method(network, section)
    assert {name for name, wanted in now().items() if wanted} == {"0.lora_A", "0.lora_B"}
    adapted.remove()
    assert now() == before
    adapted.attach()
    assert {name for name, wanted in now().items() if wanted} == {"0.lora_A", "0.lora_B"}
    adapted.remove()
    assert now() == before
    with pytest.raises(MethodError, match="smaller side"):
        apply_method(network, config.LoRA(r=5, target_modules=("0", "2")))
    assert now() == before


def test_a_state_of_which_half_does_not_fit_changes_nothing(tmp_path: Path) -> None:
    section = config.AdaLoRA(r=2, initial_r=4, target_modules=("q_proj",))
    model: AdaptedModel = apply_method(tiny_base(tiny_checkpoint(tmp_path)), section)
    adapter = {key: torch.ones_like(values) for key, values in model.adapter_state().items()}
    state = dict(model.method_state())
    before = {key: values.clone() for key, values in model.adapter_state().items()}
    for broken in ({}, {**state, "adalora/strange": torch.zeros(1)}):
        with pytest.raises(MethodError, match="adalora/"):
            model.load_state(adapter, broken)
        assert all(torch.equal(values, before[key]) for key, values in model.adapter_state().items())
    model.load_state(adapter, state)
    assert all(torch.equal(values, adapter[key]) for key, values in model.adapter_state().items())


def test_its_repr_says_what_people_ask(tmp_path: Path) -> None:
    """Shares are of the numbers that packed weights stand for, and a tied head counts once."""
    base = tiny_base(tiny_checkpoint(tmp_path, "gemma2"))
    whole = tiny_base(tmp_path, "none").model
    total = sum(values.numel() for values in whole.parameters())
    parts = (config.LoRA(r=4, target_modules=("q_proj", "down_proj")), config.BitFit(new_biases=True))
    model = apply_method(base, parts[0])
    count = model.count_trainable()
    assert repr(model).splitlines() == [
        f"AdaptedModel: lora (target_modules=('q_proj', 'down_proj'), r=4) on {tmp_path} (nf4, cpu)",
        f"  trains {count:,} numbers, {100 * count / (total + count):.3g} % of all, in fp32 ({4 * count / 1024:.1f} KiB)",
        "  planted at 4 modules: down_proj, q_proj",
    ]
    model.remove()
    both = apply_method(base, config.Combined(parts=(config.Bottleneck(size=8), parts[1])))
    assert " and bitfit (new_biases=True) on " in repr(both)
    assert len(repr(both).splitlines()) == 3
    full = apply_method(tiny_base(tmp_path, "none"), config.Full())
    assert f"trains {total:,} numbers, 100 % of all" in repr(full)
    assert repr(full).endswith("nothing is planted")
