"""The laws of LoRA: PEFT's forward and gradients on copied weights, gradients that are derivatives, step 0 = the base."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from torch import nn
from transformers import GPT2Config, GPT2LMHeadModel
from transformers.pytorch_utils import Conv1D

from qlora import recipe as config
from qlora.errors import MethodError
from qlora.methods.base import AdaptedModel, apply_method
from qlora.methods.files import save_adapter, save_portable
from qlora.methods.loading import load_adapter
from qlora.methods.lora import LoraLinear, LoraMethod
from qlora.methods.switching import MixedRows, Rows
from qlora.methods.targets import pattern_value
from qlora.model.loss import batch_loss
from qlora.model.nf4 import Linear4bit, dense_cached, dense_weight
from qlora.recipe import TrainingSection
from qlora.training.optim import make_optimizer
from tests.methods.against_peft import (
    BATCH,
    assert_answers_as,
    assert_as_peft,
    merge_in_place,
    plain_model,
    with_our_values,
)
from tests.rounding import GRADIENT, LAYER, rounding
from tests.tiny import FAMILIES, TOKENS, VOCABULARY, difference, logits_of, stir, tiny_base, tiny_checkpoint

SECTION = config.LoRA(r=4, alpha=8)
PATTERNED = config.LoRA(
    r=4,
    alpha=8,
    rslora=True,
    rank_pattern={"layers.0.mlp.up_proj": 1, "mlp.up_proj": 7, "v_proj": 32},
    alpha_pattern={"down_proj": 3, "model.layers.1.self_attn.q_proj": 5},
)
CPU = torch.device("cpu")


def planted(base: nn.Module, dropout: float = 0.0, dtype: torch.dtype = torch.float64) -> LoraLinear:
    generator = torch.Generator().manual_seed(2)
    outputs, inputs = (base.nf, base.nx) if isinstance(base, Conv1D) else (base.out_features, base.in_features)
    lora_A = torch.randn(3, inputs, generator=generator).to(dtype)
    lora_B = torch.randn(outputs, 3, generator=generator).to(dtype)
    return LoraLinear(base, lora_A, lora_B, 2.0, dropout)


def peft_config(section: Any, **values: Any) -> peft.LoraConfig:
    targets = section.target_modules
    return peft.LoraConfig(
        r=section.r,
        lora_alpha=section.alpha,
        use_rslora=section.rslora,
        rank_pattern=section.rank_pattern,
        alpha_pattern=section.alpha_pattern,
        target_modules=targets if targets == "all-linear" else list(targets),
        task_type="CAUSAL_LM",
        **values,
    )


@pytest.mark.parametrize("quantization", ["nf4", "none"])
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.sampled
def test_logits_and_gradients_are_those_of_peft(tmp_path: Path, family: str, quantization: str) -> None:
    folder = tiny_checkpoint(tmp_path, family)
    ours = apply_method(tiny_base(folder, quantization), SECTION)
    stir(ours)
    theirs = with_our_values(plain_model(folder, quantization), peft_config(SECTION), ours)
    with ours.disabled():
        assert difference(logits_of(ours.model), logits_of(theirs)) > 1e-2  # the adapter matters
    print(f"{family} {quantization}: {assert_as_peft(ours, theirs, **BATCH)}")


@pytest.mark.parametrize("quantization", ["nf4", "none"])
def test_ranks_and_scalings_by_name_are_those_of_peft(tmp_path: Path, quantization: str) -> None:
    folder = tiny_checkpoint(tmp_path)
    ours = apply_method(tiny_base(folder, quantization), PATTERNED)
    stir(ours)
    ranks = {path: len(layer.lora_A) for path, layer in ours.planted.items()}
    assert ranks["model.layers.0.mlp.up_proj"] == 1
    assert ranks["model.layers.1.mlp.up_proj"] == 7
    assert ranks["model.layers.0.self_attn.v_proj"] == 32
    assert ranks["model.layers.0.self_attn.q_proj"] == 4
    theirs = with_our_values(plain_model(folder, quantization), peft_config(PATTERNED), ours)
    for path, layer in ours.planted.items():
        assert theirs.get_submodule(f"base_model.model.{path}").scaling["default"] == layer.scaling
    print(f"patterns, {quantization}: {assert_as_peft(ours, theirs, **BATCH)}")


@pytest.mark.parametrize(
    "name",
    ["q_proj", "self_attn.q_proj", "0.self_attn.q_proj", "model.layers.1.self_attn.q_proj", "attn.q_proj", "proj"],
)
@pytest.mark.parametrize("path", ["model.layers.1.self_attn.q_proj", "model.layers.10.self_attn.q_proj", "q_proj"])
def test_a_plain_name_in_a_pattern_matches_as_in_peft(name: str, path: str) -> None:
    theirs = peft.utils.other.get_pattern_key([name], path) == name
    assert (pattern_value({name: 3}, path, 0) == 3) is theirs or name == path


@pytest.mark.parametrize(
    ("field", "pattern", "sentence"),
    [
        (
            "rank_pattern",
            {"q_porj": 2},
            r"rank_pattern names 'q_porj', which no target is called. Did you mean 'q_proj'",
        ),
        ("alpha_pattern", {"lm_head": 2}, "alpha_pattern names 'lm_head', which no target is called"),
        (
            "rank_pattern",
            {"q_proj": 2, "layers.0.self_attn.q_proj": 3},
            "counts first; put 'layers.0.self_attn.q_proj'",
        ),
        ("rank_pattern", {"k_proj": 33}, r"rank_pattern gives 33, more than the smaller side of .*k_proj \[32, 64\]"),
    ],
)
def test_a_pattern_that_cannot_be_is_refused(tmp_path: Path, field: str, pattern: Any, sentence: str) -> None:
    base = tiny_base(tiny_checkpoint(tmp_path))
    with pytest.raises(MethodError, match=sentence):
        apply_method(base, SECTION.model_copy(update={field: pattern}))
    assert not any(isinstance(module, LoraLinear) for module in base.model.modules())


def test_a_pattern_keeps_its_order_on_disk(tmp_path: Path) -> None:
    """JSON sorts names; 'o_proj' then stands before 'self_attn.o_proj', which counted first."""
    folder = tiny_checkpoint(tmp_path / "base")
    section = config.LoRA(
        r=4,
        rank_pattern={"1.self_attn.o_proj": 2, "0.self_attn.o_proj": 3},
        alpha_pattern={"self_attn.q_proj": 3, "q_proj": 5, "layers.0.mlp.up_proj": 7, "up_proj": 9},
        target_modules=("q_proj", "o_proj", "up_proj"),
    )
    with pytest.raises(MethodError, match=r"'q_proj' after 'self_attn\.q_proj'"):
        apply_method(tiny_base(folder), section)
    pattern = {"layers.1.mlp.up_proj": 9, "mlp.up_proj": 3, "1.self_attn.q_proj": 2, "0.self_attn.q_proj": 4}
    swapped = {"model.layers.1.mlp.up_proj": 9, "mlp.up_proj": 3, "q_proj": 2}
    for alphas in (pattern, swapped):
        ours = apply_method(tiny_base(folder, "none"), section.model_copy(update={"alpha_pattern": alphas}))
        stir(ours)
        save_adapter(ours, tmp_path / "adapter")
        again = load_adapter(tiny_base(folder, "none"), tmp_path / "adapter")
        assert torch.equal(logits_of(again.model), logits_of(ours.model))
        load_adapter(ours, tmp_path / "adapter")  # the same section by other names
        theirs = peft.PeftModel.from_pretrained(plain_model(folder), tmp_path / "adapter").eval()
        assert_answers_as(theirs, ours)
    other = apply_method(tiny_base(folder, "none"), section.model_copy(update={"alpha_pattern": {"q_proj": 2}}))
    with pytest.raises(MethodError, match=r"another alpha_pattern than this model, for .*up_proj"):
        load_adapter(other, tmp_path / "adapter")


@pytest.mark.parametrize("rank", [1, 256])
def test_the_smallest_and_the_largest_rank(rank: int) -> None:
    linear = nn.Sequential(nn.Linear(300, 256), nn.Linear(256, 2))
    model = apply_method(linear, config.LoRA(r=rank, alpha=rank, target_modules=("0",)))
    stir(model)
    layer: Any = model.planted["0"]
    x = torch.randn(5, 300)
    expected = nn.functional.linear(x, layer.base.weight + layer.lora_B @ layer.lora_A, layer.base.bias)
    assert difference(layer(x), expected) < rounding(LAYER)


@pytest.mark.parametrize("dropout", [0.0, 0.4])
@pytest.mark.parametrize("kind", ["bias", "plain", "Conv1D"])
@pytest.mark.sampled
def test_gradients_are_derivatives(dropout: float, kind: str) -> None:
    base = Conv1D(4, 5) if kind == "Conv1D" else nn.Linear(5, 4, bias=kind == "bias")
    layer = planted(base.double().requires_grad_(False), dropout)
    x = torch.randn(2, 3, 5, dtype=torch.float64, requires_grad=True)

    def forward(x: torch.Tensor, lora_A: torch.Tensor, lora_B: torch.Tensor) -> torch.Tensor:
        torch.manual_seed(3)  # the same elements dropped at every evaluation
        return torch.func.functional_call(layer, {"lora_A": lora_A, "lora_B": lora_B}, (x,))

    assert torch.autograd.gradcheck(forward, (x, layer.lora_A, layer.lora_B))


def test_forward_is_the_formula_and_merged_too() -> None:
    linear = nn.Linear(5, 4).double().requires_grad_(False)
    before = linear.weight.clone()
    layer = planted(linear)
    x = torch.randn(2, 3, 5, dtype=torch.float64)
    expected = x @ linear.weight.t() + linear.bias + 2.0 * (x @ layer.lora_A.t() @ layer.lora_B.t())
    torch.testing.assert_close(layer(x), expected)
    merged = layer.merged("weight", linear.weight.clone())
    torch.testing.assert_close(x @ merged.t() + linear.bias, expected)
    assert torch.equal(layer.merged("bias", linear.bias.clone()), linear.bias)
    assert torch.equal(linear.weight, before)


def test_dropout_happens_in_training_only_and_keeps_the_mean() -> None:
    layer = planted(nn.Linear(64, 32).double().requires_grad_(False), dropout=0.5)
    x = torch.ones(4000, 64, dtype=torch.float64)
    calm = layer.eval()(x)
    assert torch.equal(calm[0], calm[1])
    restless = layer.train()(x)
    assert not torch.equal(restless[0], restless[1])
    assert difference(restless.mean(0), calm.mean(0)) < 0.05


def packed_linear() -> Linear4bit:
    linear = Linear4bit.empty(64, 128, bias=False, quant_type="nf4", double_quant=True, compute_dtype=torch.float32)
    linear.place(torch.randn(128, 64), CPU)
    return linear


def test_a_4bit_weight_is_not_kept_for_backward() -> None:
    layer = planted(packed_linear(), dtype=torch.float32)
    kept: list[torch.Size] = []
    with torch.autograd.graph.saved_tensors_hooks(
        lambda values: kept.append(values.shape) or values, lambda values: values
    ):
        layer(torch.randn(10, 64, requires_grad=True))
    assert sorted(kept) == sorted([(10, 64), (3, 64), (128, 3), (10, 3)])  # x, A, B, x Aᵀ; never [128, 64]


def test_backward_reads_the_weight_again() -> None:
    layer = planted(packed_linear(), dtype=torch.float32)
    linear: Any = layer.base
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
    assert LoraMethod.trained_dtype("auto", cuda, torch.bfloat16) == torch.bfloat16
    assert LoraMethod.trained_dtype("auto", cuda, torch.float16) == torch.float32
    assert LoraMethod.trained_dtype("auto", CPU, torch.bfloat16) == torch.float32
    assert LoraMethod.trained_dtype("fp32", cuda, torch.bfloat16) == torch.float32
    assert LoraMethod.trained_dtype("bf16", CPU, torch.float32) == torch.bfloat16


# GPT-2's linears hold their weight the other way round


def tiny_gpt2() -> GPT2LMHeadModel:
    torch.manual_seed(0)
    sizes = {"vocab_size": VOCABULARY, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 32}
    return GPT2LMHeadModel(GPT2Config(**sizes, attn_pdrop=0, embd_pdrop=0, resid_pdrop=0, initializer_range=0.1)).eval()


def test_gpt2_is_as_in_peft_and_on_disk(tmp_path: Path) -> None:
    plain = tiny_gpt2()
    section = config.LoRA(r=4, alpha=8, target_modules=("c_attn", "c_proj", "c_fc"))
    ours = apply_method(copy.deepcopy(plain), section)
    assert ours.planted["transformer.h.0.attn.c_attn"].lora_B.shape == (96, 4)
    stir(ours)
    theirs = with_our_values(copy.deepcopy(plain), peft_config(section, fan_in_fan_out=True), ours)
    print(f"Conv1D: {assert_as_peft(ours, theirs, **BATCH)}")

    for way, save in (("adapter", save_adapter), ("portable", save_portable)):
        save(ours, tmp_path / way)
        assert json.loads((tmp_path / way / "adapter_config.json").read_text())["fan_in_fan_out"] is True
        loaded = peft.PeftModel.from_pretrained(copy.deepcopy(plain), tmp_path / way).eval()
        assert_answers_as(loaded, ours)
    theirs.save_pretrained(tmp_path / "theirs")
    back = load_adapter(apply_method(copy.deepcopy(plain), section).remove(), tmp_path / "theirs")
    assert torch.equal(logits_of(back.model), logits_of(ours.model))

    expected = logits_of(ours.model)
    square: Any = ours.planted["transformer.h.0.attn.c_proj"].base
    assert square.weight.shape == (32, 32)  # whose shape does not tell which way round it lies
    assert difference(logits_of(merge_in_place(ours)), expected) < rounding()


# The head as a target


@pytest.mark.parametrize("family", ["llama", "gemma2"])  # gemma2's head is its embedding, and its logits are capped
def test_a_head_is_adapted_as_in_peft_and_through_the_chunked_loss(tmp_path: Path, family: str) -> None:
    folder = tiny_checkpoint(tmp_path, family)
    section = config.LoRA(r=4, alpha=8, target_modules=("lm_head", "v_proj"))
    ours = apply_method(tiny_base(folder, "none"), section)
    stir(ours)
    theirs = with_our_values(plain_model(folder), peft_config(section), ours)
    print(f"head, {family}: {assert_as_peft(ours, theirs, **BATCH)}")

    parameters = ours.trainable_parameters()
    expected = {name: values.grad.clone() * (TOKENS.numel() - len(TOKENS)) for name, values in parameters.items()}
    for values in parameters.values():
        values.grad = None
    positions = torch.arange(TOKENS.shape[1]).expand_as(TOKENS)
    batch = {"input_ids": TOKENS, "position_ids": positions, "labels": TOKENS}
    loss, count = batch_loss(ours.model, batch, chunk=5)
    loss.backward()
    assert count == TOKENS.numel() - len(TOKENS)
    assert max(difference(values.grad, expected[name]) for name, values in parameters.items()) < rounding(GRADIENT)
    with torch.no_grad():
        assert abs(float(batch_loss(ours.model, batch, chunk=5)[0]) / float(loss) - 1) < rounding()


# What servers load


@pytest.mark.parametrize(
    "section", [PATTERNED, config.LoRA(r=4, alpha=3, rslora=True), config.LoRA(r=3, alpha=5, dropout=0.2)]
)
def test_the_portable_form_computes_the_same_in_peft_and_here(tmp_path: Path, section: Any) -> None:
    folder = tiny_checkpoint(tmp_path / "base")
    ours = apply_method(tiny_base(folder, "none"), section)
    stir(ours)
    assert save_portable(ours, tmp_path / "portable") is None
    values = json.loads((tmp_path / "portable" / "adapter_config.json").read_text())
    assert values["lora_alpha"] == values["r"] == max([section.r, *section.rank_pattern.values()])
    assert not any(values[key] for key in ("rank_pattern", "alpha_pattern", "use_rslora"))
    theirs = peft.PeftModel.from_pretrained(plain_model(folder), tmp_path / "portable").eval()
    here = load_adapter(tiny_base(folder, "none"), tmp_path / "portable")
    expected = logits_of(ours.model.eval())
    worst = difference(logits_of(theirs), expected), difference(logits_of(here.model), expected)
    print(f"portable: in PEFT {worst[0]:.1e}, here {worst[1]:.1e}")
    assert max(worst) < rounding()


# LoRA+


def test_b_learns_faster_by_the_ratio() -> None:
    torch.manual_seed(0)
    steps: dict[float, dict[str, torch.Tensor]] = {}
    for ratio in (1.0, 16.0):
        torch.manual_seed(0)
        section = config.LoRA(r=2, target_modules=("0", "1"), learning_rate_ratio=ratio)
        model: AdaptedModel = apply_method(nn.Sequential(nn.Linear(6, 8), nn.Embedding(5, 6), nn.Linear(8, 3)), section)
        stir(model)
        parameters = model.trainable_parameters()
        training = TrainingSection(learning_rate=1e-3, weight_decay=0)
        optimizer = make_optimizer(parameters, training, model.learning_rate_ratios())
        before = {name: values.detach().clone() for name, values in parameters.items()}
        for values in parameters.values():
            values.grad = torch.ones_like(values)
        optimizer.step()  # Adam's first step is the learning rate itself, whatever the gradient
        steps[ratio] = {name: before[name] - values.detach() for name, values in parameters.items()}
    assert len(steps[1.0]) == 4
    for name, plain in steps[1.0].items():
        expected = 16 if name == "0.lora_B" else 1
        torch.testing.assert_close(steps[16.0][name] / plain, torch.full_like(plain, expected), rtol=1e-3, atol=0)
        assert abs(float(plain.mean()) - 1e-3) < rounding()


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("quantised", [False, True])
@pytest.mark.parametrize("kind", [config.LoRA, config.DoRA, config.AdaLoRA, "mixed rows", "convolution"])
def test_16_bits_do_not_round_a_small_update_away(kind: Any, quantised: bool, bias: bool) -> None:
    """Of an update of an eighth of bf16's step between 1 and 2, the mean over many tokens is all there.

    A token's rounding errs by up to half a step either way, evenly: the mean of n by step / √(12 n), here five times over.
    Added to what was rounded before, nothing of it would be left.
    """
    draw, step = torch.Generator().manual_seed(1), 2.0**-7
    plain = nn.Linear(64, 16, bias=bias)
    with torch.no_grad():
        plain.weight.normal_(0, 0.125, generator=draw)
        if bias:  # what is added to it first is rounded on its own grid: at most by 2⁻⁵ · 2⁻⁸, step / 64
            plain.bias.uniform_(-(2.0**-5), 2.0**-5, generator=draw)
    linear: Any = plain.bfloat16()
    if quantised:
        linear = Linear4bit.empty(64, 16, bias=bias, quant_type="nf4", double_quant=True, compute_dtype=torch.bfloat16)
        linear.place(plain.weight.data, CPU)
        linear.bias = plain.bias
    if kind == "convolution":
        if quantised:
            pytest.skip("only linears are quantised")
        linear = nn.Conv2d(64, 16, 1, bias=bias)
        linear.weight, linear.bias = nn.Parameter(plain.weight.data[:, :, None, None]), plain.bias
    section = config.LoRA if isinstance(kind, str) else kind
    layer: Any = apply_method(nn.Sequential(linear), section(target_modules=("0",), adapter_dtype="bf16")).planted["0"]
    x = torch.randn(20_000, 64, generator=draw).bfloat16()
    x[:, 0] = 1
    frozen = plain.weight.data if kind == "convolution" else dense_weight(linear, torch.bfloat16)
    with torch.no_grad():
        layer.lora_A.zero_()[0, 0] = 1
        layer.lora_B.zero_()[:, 0] = step / 8 / layer.scaling
        if kind is config.AdaLoRA:
            layer.lora_E.fill_(1)
        if kind is config.DoRA:
            layer.lora_magnitude_vector.copy_(layer.norm(frozen))  # so that the direction's update is all there is
    alone = nn.functional.linear(x.double(), frozen.double(), plain.bias.double() if bias else None)
    near = (alone.abs() > 1) & (alone.abs() < 2)
    if kind == "mixed rows":
        rows = Rows(["one"])
        rows.flat = len(x)
        layer = MixedRows(linear, {"one": layer}, rows)
    given = x[:, :, None, None] if kind == "convolution" else x
    found = ((layer(given).view_as(alone).double() - alone) * near).sum(0) / near.sum(0)
    allowed = 5 * step / (12 * near.sum(0)) ** 0.5 + bias * step / 64
    assert (allowed < step / 16).all(), "too few tokens to tell"
    assert ((found - step / 8).abs() < allowed).all(), found / step
