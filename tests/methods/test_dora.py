"""The laws of DoRA: PEFT's forward and gradients on copied weights, with dropout too, and what is kept for backward."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from qlora import recipe as config
from qlora.errors import MethodError
from qlora.methods.base import apply_method
from qlora.methods.dora import DoraLinear
from qlora.methods.files import save_adapter, save_portable
from qlora.methods.loading import load_adapter
from qlora.methods.lora import LoraLinear
from qlora.model.nf4 import Linear4bit, Linear8bit, dense_weight
from tests.methods.against_peft import BATCH, assert_as_peft, gradients_of, merge_in_place, plain_model, with_our_values
from tests.rounding import LAYER, rounding
from tests.tiny import FAMILIES, difference, logits_of, stir, tiny_base, tiny_checkpoint

SECTION = config.DoRA(r=4, alpha=8)
CPU = torch.device("cpu")


def peft_config(section: Any, **values: Any) -> peft.LoraConfig:
    targets = section.target_modules
    return peft.LoraConfig(
        r=section.r,
        lora_alpha=section.alpha,
        use_dora=True,
        use_rslora=section.rslora,
        rank_pattern=section.rank_pattern,
        target_modules=targets if targets == "all-linear" else list(targets),
        **values,
    )


def stir_all(ours: Any) -> None:
    """Adapters that do something; magnitudes a tenth or so beside their norms."""
    magnitudes = {n: v.detach().clone() for n, v in ours.trainable_parameters().items() if n.endswith("vector")}
    stir(ours)
    for name, values in ours.trainable_parameters().items():
        if name in magnitudes:
            values.data = magnitudes[name] * (1 + values.data)


@pytest.mark.parametrize("quantization", ["nf4", "none"])
@pytest.mark.parametrize("family", FAMILIES)
def test_logits_and_gradients_are_those_of_peft(tmp_path: Path, family: str, quantization: str) -> None:
    folder = tiny_checkpoint(tmp_path, family)
    section = SECTION.model_copy(update={"rslora": True, "rank_pattern": {"v_proj": 7}})
    ours = apply_method(tiny_base(folder, quantization), section)
    stir_all(ours)
    theirs = with_our_values(plain_model(folder, quantization), peft_config(section, task_type="CAUSAL_LM"), ours)
    with ours.disabled():
        assert difference(logits_of(ours.model), logits_of(theirs)) > 1e-2
    print(f"{family} {quantization}: {assert_as_peft(ours, theirs, **BATCH)}")


@pytest.mark.parametrize("quantization", ["nf4", "none"])
def test_magnitudes_begin_as_in_peft_and_change_nothing(tmp_path: Path, quantization: str) -> None:
    folder = tiny_checkpoint(tmp_path, "qwen2")
    base = tiny_base(folder, quantization)
    before = logits_of(base.model)
    ours = apply_method(base, SECTION)
    assert torch.equal(logits_of(ours.model), before)
    theirs = peft.get_peft_model(plain_model(folder, quantization), peft_config(SECTION))
    state = peft.get_peft_model_state_dict(theirs)
    keys = [key for key in ours.adapter_state() if key.endswith(".lora_magnitude_vector")]
    assert len(keys) == len(ours.planted)
    assert max(difference(ours.adapter_state()[key], state[key]) for key in keys) < rounding(LAYER)


def alone(base: nn.Module, dropout: float, dtype: torch.dtype = torch.float64) -> DoraLinear:
    generator = torch.Generator().manual_seed(2)
    outputs, inputs = (base.nf, base.nx) if isinstance(base, Conv1D) else (base.out_features, base.in_features)
    lora_A = torch.randn(3, inputs, generator=generator).to(dtype)
    lora_B = torch.randn(outputs, 3, generator=generator).to(dtype)
    layer = DoraLinear(base, lora_A, lora_B, 2.0, dropout)
    layer.lora_magnitude_vector.data.uniform_(0.5, 2.0, generator=generator)
    return layer


KINDS = {
    "bias": lambda: nn.Linear(5, 4),
    "plain": lambda: nn.Linear(5, 4, bias=False),
    "Conv1D": lambda: Conv1D(4, 5),
    "square Conv1D": lambda: Conv1D(5, 5),
}


class GivenDropout(nn.Module):
    """Drops what a mask says."""

    def __init__(self, kept: torch.Tensor, stretch: float) -> None:
        super().__init__()
        self.kept, self.stretch = kept, stretch

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x * self.kept.view(x.shape) * self.stretch


@pytest.mark.parametrize("dropout", [0.0, 0.4])
@pytest.mark.parametrize("kind", KINDS)
def test_a_layer_is_pefts_with_dropout_too(kind: str, dropout: float) -> None:
    torch.manual_seed(0)
    base = nn.Sequential(KINDS[kind]().requires_grad_(False))
    nn.init.normal_(base[0].weight)
    layer = alone(base[0], dropout, torch.float32)
    lora = peft.LoraConfig(
        r=3, lora_alpha=6, use_dora=True, target_modules=["0"], lora_dropout=dropout,
        fan_in_fan_out=isinstance(base[0], Conv1D),
    )  # fmt: skip
    theirs = peft.get_peft_model(copy.deepcopy(base), lora).train()
    state = {f"base_model.model.0.{name}.weight": values.detach() for name, values in layer.own_parameters().items()}
    state["base_model.model.0.lora_magnitude_vector"] = state.pop("base_model.model.0.lora_magnitude_vector.weight")
    assert not peft.set_peft_model_state_dict(theirs, state).unexpected_keys
    x = torch.randn(2, 3, 5)
    torch.manual_seed(3)
    kept = torch.native_dropout(x.view(-1, 5), dropout, True)[1]
    assert bool(kept.all()) is (dropout == 0)
    if dropout:
        theirs.base_model.model[0].lora_dropout["default"] = GivenDropout(kept, 1 / (1 - dropout))
    ours_x, theirs_x = x.clone().requires_grad_(True), x.clone().requires_grad_(True)
    torch.manual_seed(3)
    found, expected = layer(ours_x), theirs(theirs_x)
    assert difference(found, expected) < rounding(LAYER)
    (found**2).sum().backward()
    (expected**2).sum().backward()
    gradients = gradients_of(theirs)
    worst = max(difference(values.grad, gradients[f"0.{name}"]) for name, values in layer.own_parameters().items())
    worst = max(worst, difference(ours_x.grad, theirs_x.grad))
    print(f"{kind}, dropout {dropout}: outputs {difference(found, expected):.1e}, gradients {worst:.1e}")
    assert worst < rounding(LAYER)


@pytest.mark.parametrize("dropout", [0.0, 0.4])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.sampled
def test_gradients_are_derivatives_with_the_norm_held(kind: str, dropout: float) -> None:
    layer = alone(KINDS[kind]().double().requires_grad_(False), dropout)
    layer.lora_magnitude_vector.data = layer.lora_magnitude_vector.data.double()
    x = torch.randn(2, 3, 5, dtype=torch.float64, requires_grad=True)
    norm = layer.norm(dense_weight(layer.base, torch.float64))
    layer.norm = lambda weight: norm  # type: ignore[method-assign]  # section 4.3: a constant

    def forward(x: torch.Tensor, lora_A: torch.Tensor, lora_B: torch.Tensor, m: torch.Tensor) -> torch.Tensor:
        torch.manual_seed(3)
        values = {"lora_A": lora_A, "lora_B": lora_B, "lora_magnitude_vector": m}
        return torch.func.functional_call(layer, values, (x,))

    inputs = (x, layer.lora_A, layer.lora_B, layer.lora_magnitude_vector)
    assert torch.autograd.gradcheck(forward, inputs)


def test_the_norm_is_that_of_the_sum() -> None:
    layer = alone(nn.Linear(50, 40).double(), 0.0)
    whole = layer.base.weight + 2.0 * layer.lora_B @ layer.lora_A
    norm = layer.norm(layer.base.weight)
    assert difference(norm, whole.norm(dim=1)) < 1e-12
    low = layer.norm(layer.base.weight.bfloat16())
    assert low.dtype == torch.float32
    assert difference(low, whole.norm(dim=1)) < 1e-2


def test_a_row_of_zeros_stays_finite() -> None:
    linear = nn.Linear(5, 4)
    linear.weight.data[1] = 0
    model = apply_method(nn.Sequential(linear, nn.Linear(4, 2)), config.DoRA(r=2, target_modules=("0",)))
    x = torch.randn(3, 5)
    model.model(x).sum().backward()
    assert torch.equal(model.planted["0"](x), nn.functional.linear(x, linear.weight, linear.bias))
    assert all(torch.isfinite(values.grad).all() for values in model.trainable_parameters().values())
    merged: Any = model.planted["0"]
    assert torch.isfinite(merged.merged("weight", linear.weight.detach().clone())).all()


@pytest.mark.parametrize("kind", KINDS)
def test_merged_is_the_layer(kind: str) -> None:
    torch.manual_seed(0)
    plain = nn.Sequential(KINDS[kind]())
    nn.init.normal_(plain[0].weight)
    ours = apply_method(plain, config.DoRA(r=2, alpha=4, target_modules=("0",)))
    stir_all(ours)
    x = torch.randn(3, 5)
    expected = ours.model(x)
    assert difference(merge_in_place(ours)(x), expected) < rounding(LAYER)


@pytest.mark.parametrize("dropout", [0.0, 0.5])
def test_no_weight_is_kept_for_backward(dropout: float) -> None:
    linear = Linear4bit.empty(64, 128, bias=False, quant_type="nf4", double_quant=True, compute_dtype=torch.float32)
    linear.place(torch.randn(128, 64), CPU)
    layer = alone(linear, dropout, torch.float32)
    kept: list[torch.Size] = []
    with torch.autograd.graph.saved_tensors_hooks(
        lambda values: kept.append(values.shape) or values, lambda values: values
    ):
        y = layer(torch.randn(10, 64, requires_grad=True))
    # x, A, B, m, x Aᵀ, W'x, m / ‖W'‖ and ‖W'‖, with dropout what was kept of x; never [128, 64]
    expected = [(10, 64), (3, 64), (128, 3), (128,), (10, 3), (10, 128), (128,), (128,)]
    assert sorted(kept) == sorted(expected + ([(10, 64)] if dropout else []))
    assert linear.kept is None
    packed = linear.weight
    first = torch.autograd.grad(y.sum(), layer.lora_A, retain_graph=True)[0]
    linear.weight = torch.zeros_like(packed)
    assert torch.equal(torch.autograd.grad(y.sum(), layer.lora_A)[0], first)  # which needs no W


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("kind", [LoraLinear, DoraLinear])
def test_an_8bit_linear_is_its_dequantised_one(kind: type[LoraLinear], bias: bool) -> None:
    torch.manual_seed(0)
    packed = Linear8bit.empty(64, 48, bias=bias, compute_dtype=torch.float32)
    packed.place(torch.randn(48, 64), CPU)
    dense = nn.Linear(64, 48, bias=bias).requires_grad_(False)
    dense.weight.copy_(dense_weight(packed, torch.float32))
    if bias:
        packed.bias = dense.bias
    x = torch.randn(7, 64)
    found = []
    for base in (packed, dense):
        layer = kind(base, torch.randn(3, 64, generator=torch.Generator().manual_seed(1)), torch.ones(48, 3), 2.0, 0.0)
        inputs = x.clone().requires_grad_(True)
        y = layer(inputs)
        y.square().sum().backward()
        found.append([y, inputs.grad, *(values.grad for values in layer.own_parameters().values())])
    assert len(found[0]) == (5 if kind is DoraLinear else 4)
    for ours, expected in zip(*found, strict=True):
        assert difference(ours, expected) < rounding(LAYER)


def test_the_magnitude_stays_fp32_beside_bf16_adapters() -> None:
    linear = nn.Sequential(nn.Linear(64, 32), nn.Linear(32, 2)).bfloat16()
    x = torch.randn(8, 64, dtype=torch.bfloat16)
    before = linear(x)
    model = apply_method(linear, config.DoRA(r=4, target_modules=("0",), adapter_dtype="bf16"))
    layer: Any = model.planted["0"]
    assert (layer.lora_A.dtype, layer.lora_magnitude_vector.dtype) == (torch.bfloat16, torch.float32)
    assert torch.equal(model.model(x), before)
    model.model(x).sum().backward()
    assert layer.lora_magnitude_vector.grad.dtype == torch.float32
    assert layer.lora_B.grad.dtype == torch.bfloat16


def test_peft_and_we_read_each_other(tmp_path: Path) -> None:
    folder = tiny_checkpoint(tmp_path / "base")
    ours = apply_method(tiny_base(folder, "none"), SECTION)
    stir_all(ours)
    save_adapter(ours, tmp_path / "ours")
    values = json.loads((tmp_path / "ours" / "adapter_config.json").read_text())
    assert (values["peft_type"], values["use_dora"]) == ("LORA", True)
    theirs = peft.PeftModel.from_pretrained(plain_model(folder), tmp_path / "ours").eval()
    assert peft.get_peft_model_state_dict(theirs).keys() == ours.adapter_state().keys()
    expected = logits_of(ours.model)
    assert difference(logits_of(theirs), expected) < rounding()
    theirs.save_pretrained(tmp_path / "theirs")
    for way in ("ours", "theirs"):
        back = load_adapter(tiny_base(folder, "none"), tmp_path / way)
        assert back.section == SECTION.model_copy(update={"target_modules": back.section.target_modules})
        assert torch.equal(logits_of(back.model), expected)
    with pytest.raises(MethodError, match="is dora, this model has lora"):
        load_adapter(apply_method(tiny_base(folder), config.LoRA(r=4, alpha=8)), tmp_path / "ours")


def test_it_is_not_portable_and_only_on_linears(tmp_path: Path) -> None:
    ours = apply_method(tiny_base(tiny_checkpoint(tmp_path / "base")), SECTION)
    assert "export it merged" in (save_portable(ours, tmp_path / "adapter") or "")
    assert load_adapter(tiny_base(tmp_path / "base"), tmp_path / "adapter").section.name == "dora"
    with pytest.raises(
        MethodError,
        match=r"'embed_tokens', but 'model.embed_tokens' \(Embedding\) is no linear; the method modules trains it whole",
    ):
        apply_method(tiny_base(tmp_path / "base"), config.DoRA(target_modules=("embed_tokens",)))


@pytest.mark.parametrize("init", ["pissa", "loftq"])
def test_magnitudes_follow_what_a_and_b_begin_as(tmp_path: Path, init: str) -> None:
    folder = tiny_checkpoint(tmp_path)
    section = config.DoRA(r=4, alpha=4, init=init, target_modules=("q_proj", "up_proj"))
    lora = config.LoRA(r=4, alpha=4, init=init, target_modules=("q_proj", "up_proj"))
    expected = logits_of(apply_method(tiny_base(folder), lora).model)
    ours = apply_method(tiny_base(folder), section)
    assert difference(logits_of(ours.model), expected) < rounding()
