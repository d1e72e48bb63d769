"""The laws of LoRA: PEFT's forward and gradients on copied weights, gradients that are derivatives, step 0 = the base."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

from qlora import config
from qlora.errors import MethodError
from qlora.methods import LoraLinear, apply_method
from qlora.methods.lora import adapter_dtype
from qlora.model.nf4 import Linear4bit, dense_cached
from tests.methods.tiny import FAMILIES, TOKENS, difference, logits_of, stir, tiny_base, tiny_checkpoint

SECTION = config.LoRA(r=4, alpha=8)
CPU = torch.device("cpu")


def planted(base: nn.Module, dropout: float = 0.0, dtype: torch.dtype = torch.float64) -> LoraLinear:
    layer = LoraLinear.from_base(
        base, config.LoRA(r=3, alpha=6, dropout=dropout), torch.Generator().manual_seed(1), CPU, dtype
    )
    layer.lora_B.data.normal_(generator=torch.Generator().manual_seed(2))
    return layer


def peft_model(folder: Path, quantization: str) -> Any:
    """PEFT's LoRA on from_pretrained, in train mode: in eval bitsandbytes packs the weights anew on some CPUs."""
    quantised = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.float32,
    )
    model = AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, quantization_config=quantised if quantization == "nf4" else None
    )
    lora = peft.LoraConfig(r=4, lora_alpha=8, target_modules="all-linear", task_type="CAUSAL_LM")
    return peft.get_peft_model(model, lora).train()


@pytest.mark.parametrize("quantization", ["nf4", "none"])
@pytest.mark.parametrize("family", FAMILIES)
def test_logits_and_gradients_are_those_of_peft(tmp_path: Path, family: str, quantization: str) -> None:
    folder = tiny_checkpoint(tmp_path, family)
    ours = apply_method(tiny_base(folder, quantization), SECTION)
    stir(ours)
    theirs = peft_model(folder, quantization)
    missing = peft.set_peft_model_state_dict(theirs, ours.adapter_state())
    assert not missing.unexpected_keys
    found = ours.model(input_ids=TOKENS, labels=TOKENS, use_cache=False)
    expected = theirs(input_ids=TOKENS, labels=TOKENS, use_cache=False)
    found.loss.backward()
    expected.loss.backward()
    with ours.disabled():
        assert difference(logits_of(ours.model), expected.logits) > 1e-2  # the adapter matters
    assert difference(found.logits, expected.logits) < 1e-6
    gradients = {
        name.removeprefix("base_model.model.").replace(".default.weight", ""): values.grad
        for name, values in theirs.named_parameters()
        if "lora_" in name
    }
    assert gradients.keys() == ours.trainable_parameters().keys()
    worst = max(difference(values.grad, gradients[name]) for name, values in ours.trainable_parameters().items())
    print(f"{family} {quantization}: logits {difference(found.logits, expected.logits):.1e}, gradients {worst:.1e}")
    assert worst < 3e-6


@pytest.mark.parametrize("dropout", [0.0, 0.4])
@pytest.mark.parametrize("bias", [True, False])
def test_gradients_are_derivatives(dropout: float, bias: bool) -> None:
    layer = planted(nn.Linear(5, 4, bias=bias).double().requires_grad_(False), dropout)
    x = torch.randn(2, 3, 5, dtype=torch.float64, requires_grad=True)

    def forward(x: torch.Tensor, lora_A: torch.Tensor, lora_B: torch.Tensor) -> torch.Tensor:
        torch.manual_seed(3)  # the same elements dropped at every evaluation
        return torch.func.functional_call(layer, {"lora_A": lora_A, "lora_B": lora_B}, (x,))

    assert torch.autograd.gradcheck(forward, (x, layer.lora_A, layer.lora_B))


def test_forward_is_the_formula() -> None:
    linear = nn.Linear(5, 4).double().requires_grad_(False)
    layer = planted(linear)
    x = torch.randn(2, 3, 5, dtype=torch.float64)
    expected = x @ linear.weight.t() + linear.bias + 2.0 * (x @ layer.lora_A.t() @ layer.lora_B.t())
    torch.testing.assert_close(layer(x), expected)
    torch.testing.assert_close(layer.delta().double(), 2.0 * layer.lora_B @ layer.lora_A, rtol=1e-6, atol=1e-6)
    merged = x @ layer.merged_weight(torch.float64).t() + linear.bias
    torch.testing.assert_close(merged, expected, rtol=1e-5, atol=1e-5)


def test_merging_leaves_the_base_alone() -> None:
    linear = nn.Linear(5, 4).requires_grad_(False)
    before = linear.weight.clone()
    planted(linear, dtype=torch.float32).merged_weight(torch.float32)
    assert torch.equal(linear.weight, before)


def test_dropout_happens_in_training_only_and_keeps_the_mean() -> None:
    layer = planted(nn.Linear(64, 32).double().requires_grad_(False), dropout=0.5)
    x = torch.ones(4000, 64, dtype=torch.float64)
    calm = layer.eval()(x)
    assert torch.equal(calm[0], calm[1])
    restless = layer.train()(x)
    assert not torch.equal(restless[0], restless[1])
    assert difference(restless.mean(0), calm.mean(0)) < 0.05


def test_a_4bit_weight_is_not_kept_for_backward() -> None:
    linear = Linear4bit.empty(64, 128, bias=False, quant_type="nf4", double_quant=True, compute_dtype=torch.float32)
    linear.place(torch.randn(128, 64), CPU)
    layer = planted(linear, dtype=torch.float32)
    kept: list[torch.Size] = []
    with torch.autograd.graph.saved_tensors_hooks(
        lambda values: kept.append(values.shape) or values, lambda values: values
    ):
        layer(torch.randn(10, 64, requires_grad=True))
    assert sorted(kept) == sorted([(10, 64), (3, 64), (128, 3), (10, 3)])  # x, A, B, x Aᵀ; never [128, 64]


def test_backward_reads_the_weight_again() -> None:
    linear = Linear4bit.empty(64, 128, bias=False, quant_type="nf4", double_quant=True, compute_dtype=torch.float32)
    linear.place(torch.randn(128, 64), CPU)
    layer = planted(linear, dtype=torch.float32)
    x = torch.randn(10, 64, requires_grad=True)
    packed, y = linear.weight, layer(x)
    expected = torch.autograd.grad(y.sum(), x, retain_graph=True)[0]
    linear.weight = torch.zeros_like(packed)  # what a streamed layer's slot may hold in between
    assert not torch.equal(torch.autograd.grad(y.sum(), x, retain_graph=True)[0], expected)
    linear.weight = packed
    with dense_cached(layer):
        assert torch.equal(torch.autograd.grad(y.sum(), x)[0], expected)


def test_fp32_adapters_train_beside_bf16_activations() -> None:
    layer = planted(nn.Linear(64, 32).bfloat16().requires_grad_(False), dtype=torch.float32)
    y = layer(torch.randn(3, 64, dtype=torch.bfloat16))
    y.sum().backward()
    assert y.dtype == torch.bfloat16
    assert layer.lora_A.grad is not None
    assert layer.lora_A.grad.dtype == torch.float32
    assert layer.lora_A.grad.abs().max() > 0


def test_the_adapter_starts_as_the_base_and_with_pefts_distribution(tmp_path: Path) -> None:
    base = tiny_base(tiny_checkpoint(tmp_path))
    before = logits_of(base.model)
    model = apply_method(base, SECTION)
    assert torch.equal(logits_of(model.model), before)
    for layer in model.planted.values():
        bound = layer.in_features**-0.5
        assert layer.lora_A.abs().max() <= bound
        assert abs(layer.lora_A.std() * 3**0.5 / bound - 1) < 0.15  # uniform: std = bound / √3
        assert not layer.lora_B.any()


def test_first_values_depend_on_seed_and_name_alone(tmp_path: Path) -> None:
    folder = tiny_checkpoint(tmp_path)
    everything = apply_method(tiny_base(folder), SECTION, seed=1).trainable_parameters()
    some = apply_method(tiny_base(folder), config.LoRA(r=4, target_modules=("v_proj",)), seed=1).trainable_parameters()
    other = apply_method(tiny_base(folder), SECTION, seed=2).trainable_parameters()
    for name, values in some.items():
        assert torch.equal(values, everything[name])
        assert name.endswith("lora_B") or not torch.equal(values, other[name])
    firsts = [values for name, values in some.items() if name.endswith("lora_A")]
    assert not torch.equal(firsts[0], firsts[1])


def test_a_rank_above_a_side_is_refused_before_anything_is_planted(tmp_path: Path) -> None:
    base = tiny_base(tiny_checkpoint(tmp_path))
    with pytest.raises(MethodError, match=r"method\.r is 33.*k_proj \[32, 64\]"):
        apply_method(base, config.LoRA(r=33))
    assert not any(isinstance(module, LoraLinear) for module in base.model.modules())


def test_adapter_dtype_policy() -> None:
    cuda = torch.device("cuda")
    assert adapter_dtype("auto", cuda, torch.bfloat16) == torch.bfloat16
    assert adapter_dtype("auto", cuda, torch.float16) == torch.float32
    assert adapter_dtype("auto", CPU, torch.bfloat16) == torch.float32
    assert adapter_dtype("fp32", cuda, torch.bfloat16) == torch.float32
    assert adapter_dtype("bf16", CPU, torch.float32) == torch.bfloat16
