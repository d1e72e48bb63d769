"""LoRA on embeddings and convolutions, tied ones too, and the experts that it refuses: PEFT's numbers, merging, the disk."""

from __future__ import annotations

import copy
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from safetensors import safe_open
from torch import nn
from transformers import MixtralConfig, MixtralForCausalLM, Qwen3MoeConfig, Qwen3MoeForCausalLM

from qlora import recipe as config
from qlora.errors import MethodError
from qlora.export.merged import merge
from qlora.methods.base import AdaptedModel, apply_method
from qlora.methods.files import save_adapter, save_portable
from qlora.methods.loading import load_adapter
from qlora.methods.lora_layers import LoraConv2d, LoraEmbedding, sides
from qlora.methods.targets import left_out
from qlora.model.in_memory import as_base
from qlora.model.loss import batch_loss
from tests.methods.against_peft import BATCH, assert_as_peft, gradients_of, merge_in_place, plain_model, with_our_values
from tests.rounding import GRADIENT, LAYER, rounding
from tests.tiny import SIZES, TOKENS, difference, logits_of, stir, tiny_base, tiny_checkpoint

EMBEDDING = config.LoRA(r=4, alpha=6, dropout=0.3, target_modules=("embed_tokens", "q_proj"))
BOTH = config.LoRA(r=4, alpha=8, target_modules=("embed_tokens", "lm_head", "down_proj"))


def peft_config(section: Any, **values: Any) -> peft.LoraConfig:
    return peft.LoraConfig(r=section.r, lora_alpha=section.alpha, target_modules=list(section.target_modules), **values)


# Embeddings


@pytest.mark.parametrize("quantization", ["nf4", "none"])
@pytest.mark.parametrize("family", ["llama", "gemma2"])  # gemma2's embedding is its head too, and is scaled
def test_an_embedding_is_adapted_as_in_peft(tmp_path: Path, family: str, quantization: str) -> None:
    folder = tiny_checkpoint(tmp_path, family)
    section = EMBEDDING.model_copy(update={"dropout": 0.0})
    ours = apply_method(tiny_base(folder, quantization), section)
    stir(ours)
    theirs = with_our_values(plain_model(folder, quantization), peft_config(section, task_type="CAUSAL_LM"), ours)
    with ours.disabled():
        assert difference(logits_of(ours.model), logits_of(theirs)) > 1e-2
    print(f"embedding, {family} {quantization}: {assert_as_peft(ours, theirs, **BATCH)}")


class ScaledEmbedding(nn.Embedding):
    """Gemma 3's: it multiplies inside."""

    def __init__(self, count: int, width: int, padding: int) -> None:
        super().__init__(count, width, padding)
        self.register_buffer("embed_scale", torch.tensor(3.0), persistent=False)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        return super().forward(ids) * self.embed_scale


def test_a_scaled_embedding_with_padding_is_as_in_peft_and_merges() -> None:
    torch.manual_seed(0)
    plain = nn.Sequential(ScaledEmbedding(11, 6, 2), nn.Linear(6, 4))
    section = config.LoRA(r=3, alpha=4, dropout=0.5, target_modules=("0", "1"))
    ours = apply_method(copy.deepcopy(plain), section)
    stir(ours)
    theirs = with_our_values(copy.deepcopy(plain), peft_config(section, lora_dropout=0.5), ours).eval()
    ids = torch.tensor([[2, 3, 3, 10], [0, 2, 7, 1]])
    found, expected = ours.model.eval()(ids), theirs(ids)
    assert difference(found, expected) < rounding(LAYER)
    (found**2).sum().backward()
    (expected**2).sum().backward()
    gradients = gradients_of(theirs)
    for name, values in ours.trainable_parameters().items():
        assert difference(values.grad, gradients[name]) < rounding(LAYER)
    assert not ours.trainable_parameters()["0.lora_embedding_A"].grad[:, 2].any()
    assert difference(merge_in_place(ours)(ids), found) < rounding(LAYER)


def test_an_embedding_drops_nothing_out_and_begins_as_the_base(tmp_path: Path) -> None:
    base = tiny_base(tiny_checkpoint(tmp_path))
    before = logits_of(base.model)
    ours = apply_method(base, EMBEDDING.model_copy(update={"target_modules": ("embed_tokens",)}))
    assert torch.equal(logits_of(ours.model.train()), before)
    layer: Any = ours.planted["model.embed_tokens"]
    assert not layer.lora_embedding_A.any()
    assert abs(layer.lora_embedding_B.std() - 1) < 0.1
    stir(ours)
    assert torch.equal(logits_of(ours.model), logits_of(ours.model))
    assert not torch.equal(logits_of(ours.model), before)
    assert torch.equal(logits_of(ours.remove().model), before)


@pytest.mark.parametrize("family", ["llama", "gemma2"])
def test_peft_and_we_read_each_others_embeddings(tmp_path: Path, family: str) -> None:
    folder = tiny_checkpoint(tmp_path / "base", family)
    ours = apply_method(tiny_base(folder, "none"), BOTH)
    stir(ours)
    save_adapter(ours, tmp_path / "ours")
    with safe_open(tmp_path / "ours" / "adapter_model.safetensors", "pt") as file:
        assert "base_model.model.model.embed_tokens.lora_embedding_A" in set(file.keys())
        assert "base_model.model.lm_head.lora_A.weight" in set(file.keys())
    theirs = peft.PeftModel.from_pretrained(plain_model(folder), tmp_path / "ours").eval()
    state = peft.get_peft_model_state_dict(theirs, save_embedding_layers=False)
    assert state.keys() == ours.adapter_state().keys()
    expected = logits_of(ours.model)
    assert difference(logits_of(theirs), expected) < rounding()

    theirs.save_pretrained(tmp_path / "theirs")  # with the frozen weights of both beside the adapter
    with safe_open(tmp_path / "theirs" / "adapter_model.safetensors", "pt") as file:
        assert "base_model.model.model.embed_tokens.base_layer.weight" in set(file.keys())
    back = load_adapter(tiny_base(folder, "none"), tmp_path / "theirs")
    assert torch.equal(logits_of(back.model), expected)
    again = load_adapter(tiny_base(folder, "none"), tmp_path / "ours")
    assert torch.equal(logits_of(again.model), expected)


def test_a_frozen_weight_beside_the_adapter_must_be_the_bases(tmp_path: Path) -> None:
    ours = apply_method(tiny_base(tiny_checkpoint(tmp_path)), EMBEDDING)
    key = "base_model.model.model.embed_tokens.base_layer.weight"
    weight = ours.model.get_input_embeddings().base.weight
    state = {name: values.clone() for name, values in ours.adapter_state().items()}
    ours.load_adapter_state({**state, key: weight.bfloat16()})  # rounded, but the same
    for other in (weight + 0.1, torch.cat([weight, weight])):
        with pytest.raises(MethodError, match=r"a weight of model.embed_tokens that is not this base's; load the base"):
            ours.load_adapter_state({**state, key: other})


@pytest.mark.parametrize("targets", [("embed_tokens",), ("lm_head",), ("embed_tokens", "lm_head")])
@pytest.mark.parametrize("family", ["llama", "gemma2"])
def test_merging_unties_what_the_adapter_made_different(tmp_path: Path, family: str, targets: tuple[str, ...]) -> None:
    folder = tiny_checkpoint(tmp_path / "base", family)
    ours = apply_method(tiny_base(folder), config.LoRA(r=4, alpha=8, target_modules=(*targets, "up_proj")))
    stir(ours)
    save_adapter(ours, tmp_path / "adapter")
    merge(folder, tmp_path / "adapter", tmp_path / "merged", compute_dtype="fp32", dtype="fp32")
    merged = plain_model(tmp_path / "merged").eval()
    assert not merged.config.tie_word_embeddings
    worst = difference(logits_of(merged), logits_of(ours.model))
    print(f"merged {family} {targets}: {worst:.1e}")
    assert worst < rounding()


def test_merging_leaves_tied_what_no_adapter_touched(tmp_path: Path) -> None:
    folder = tiny_checkpoint(tmp_path / "base", "gemma2")
    ours = apply_method(tiny_base(folder), config.LoRA(r=4))
    save_adapter(ours, tmp_path / "adapter")
    done = merge(folder, tmp_path / "adapter", tmp_path / "merged", compute_dtype="fp32", dtype="fp32")
    assert json.loads((tmp_path / "merged" / "config.json").read_text())["tie_word_embeddings"]
    with safe_open(done.folder / "model.safetensors", "pt") as file:
        assert "lm_head.weight" not in set(file.keys())


def test_an_embeddings_gradient_goes_through_the_chunked_loss(tmp_path: Path) -> None:
    ours = apply_method(tiny_base(tiny_checkpoint(tmp_path, "gemma2"), "none"), BOTH)
    stir(ours)
    ours.model(**BATCH).loss.backward()
    count = TOKENS.numel() - len(TOKENS)
    expected = {name: values.grad * count for name, values in ours.trainable_parameters().items()}
    for values in ours.trainable_parameters().values():
        values.grad = None
    positions = torch.arange(TOKENS.shape[1]).expand_as(TOKENS)
    batch_loss(ours.model, {"input_ids": TOKENS, "position_ids": positions, "labels": TOKENS}, 7)[0].backward()
    worst = max(difference(values.grad, expected[name]) for name, values in ours.trainable_parameters().items())
    assert worst < rounding(GRADIENT)


# Convolutions


def vision(**convolution: Any) -> nn.Sequential:
    torch.manual_seed(0)
    values = {"stride": 2, "padding": 1, **convolution}
    return nn.Sequential(
        nn.Conv2d(4, 6, (3, 2), **values), nn.ReLU(), nn.Conv2d(6, 8, 1, bias=False), nn.Flatten(), nn.LazyLinear(3)
    )


CONVOLUTIONS = config.LoRA(r=2, alpha=6, target_modules=("0", "2"))
IMAGE = torch.randn(2, 4, 9, 8, generator=torch.Generator().manual_seed(3))


def adapted_vision(**convolution: Any) -> tuple[nn.Sequential, AdaptedModel]:
    plain = vision(**convolution)
    plain(IMAGE)
    ours = apply_method(copy.deepcopy(plain), CONVOLUTIONS)
    assert torch.equal(ours.model(IMAGE), plain(IMAGE))
    stir(ours)
    return plain, ours


@pytest.mark.parametrize("convolution", [{}, {"stride": 1, "padding": "same"}, {"padding": (2, 0), "bias": False}])
def test_a_convolution_is_adapted_as_in_peft_and_merges(convolution: Any) -> None:
    plain, ours = adapted_vision(**convolution)
    assert isinstance(ours.planted["0"], LoraConv2d)
    theirs = with_our_values(copy.deepcopy(plain), peft_config(CONVOLUTIONS), ours)
    found, expected = ours.model(IMAGE), theirs(IMAGE)
    assert difference(found, plain(IMAGE)) > 1e-2
    (found**2).sum().backward()
    (expected**2).sum().backward()
    gradients = gradients_of(theirs)
    assert gradients.keys() == ours.trainable_parameters().keys()
    worst = max(difference(values.grad, gradients[name]) for name, values in ours.trainable_parameters().items())
    print(f"convolution {convolution}: outputs {difference(found, expected):.1e}, gradients {worst:.1e}")
    assert difference(found, expected) < rounding(LAYER)
    assert worst < rounding(GRADIENT)
    with ours.disabled():
        assert torch.equal(ours.model(IMAGE), plain(IMAGE))
    merged = merge_in_place(ours)(IMAGE)
    theirs = theirs.merge_and_unload()
    print(f"merged: {difference(merged, found):.1e}")
    assert difference(merged, found) < rounding(LAYER)
    assert difference(theirs(IMAGE), merged) < rounding(LAYER)


def test_a_dilated_convolution_merges_too() -> None:
    """PEFT's A has no dilation, so its two sums do not even have the same size."""
    _, ours = adapted_vision(dilation=2)
    found = ours.model(IMAGE)
    assert difference(merge_in_place(ours)(IMAGE), found) < rounding(LAYER)


def test_a_convolution_drops_out_in_training_only(tmp_path: Path) -> None:
    plain = vision()
    plain(IMAGE)
    ours = apply_method(plain, CONVOLUTIONS.model_copy(update={"dropout": 0.5}))
    stir(ours)
    assert torch.equal(ours.model.eval()(IMAGE), ours.model(IMAGE))
    assert not torch.equal(ours.model.train()(IMAGE), ours.model(IMAGE))


def test_first_values_of_a_convolution_have_pefts_distribution() -> None:
    model = apply_method(nn.Sequential(nn.Conv2d(64, 64, 3)), config.LoRA(r=16, target_modules=("0",)))
    layer: Any = model.planted["0"]
    assert layer.lora_A.shape == (16, 64, 3, 3)
    assert layer.lora_B.shape == (64, 16, 1, 1)
    assert not layer.lora_B.any()
    bound = sides(layer.base)[1] ** -0.5
    assert layer.lora_A.abs().max() <= bound
    assert abs(layer.lora_A.std() * 3**0.5 / bound - 1) < 0.05


@pytest.mark.parametrize(
    ("module", "why"),
    [
        (nn.Conv2d(4, 4, 3, groups=2), "groups=2"),
        (nn.Conv2d(4, 4, 3, padding=1, padding_mode="reflect"), "padding_mode=reflect"),
        (nn.Embedding(4, 4, max_norm=1.0), "max_norm=1"),
    ],
)
def test_what_could_not_be_merged_is_refused(module: nn.Module, why: str) -> None:
    model = nn.Sequential(module, nn.Linear(4, 4))
    with pytest.raises(MethodError, match=f"target 0 has {why}; leave it out of method.target_modules"):
        apply_method(model, config.LoRA(r=2, target_modules=("0", "1")))
    assert model[0] is module


def test_beginnings_from_a_weight_are_for_linears(tmp_path: Path) -> None:
    base = tiny_base(tiny_checkpoint(tmp_path))
    for init in ("pissa", "loftq", "eva"):
        with pytest.raises(MethodError, match=rf"method.init is {init}, .* targets model.embed_tokens are none; use"):
            apply_method(base, EMBEDDING.model_copy(update={"init": init}))


# All kinds


def test_other_layers_are_not_portable(tmp_path: Path) -> None:
    ours = apply_method(tiny_base(tiny_checkpoint(tmp_path / "base")), BOTH)
    stir(ours)
    why = save_portable(ours, tmp_path / "adapter")
    assert why == ("LoRA on model.embed_tokens is on no linear, which not every program loads")
    assert load_adapter(tiny_base(tmp_path / "base"), tmp_path / "adapter").section.target_modules == (
        "down_proj", "embed_tokens", "lm_head",
    )  # fmt: skip


@pytest.mark.parametrize("section", [BOTH, CONVOLUTIONS, config.DoRA(r=4, alpha=8, target_modules=("4", "lm_head"))])
@pytest.mark.parametrize("device", ["meta", "cpu"])
def test_shapes_alone_are_enough_to_plan_and_to_merge(section: Any, device: str) -> None:
    """The planner has everything on meta; a merge has the model there and the adapter's values in memory."""
    real = nn.Sequential(*vision()[:4], nn.Linear(160, 30))
    real.lm_head, real.embed_tokens, real.down_proj = nn.Linear(8, 9), nn.Embedding(9, 8), nn.Linear(8, 8)
    expected = {n: v.shape for n, v in apply_method(copy.deepcopy(real), section).trainable_parameters().items()}
    base = as_base(real.to("meta"))
    planned = apply_method(replace(base, device=torch.device(device), compute_dtype=torch.float32), section)
    found = planned.trainable_parameters()
    assert {name: values.shape for name, values in found.items()} == expected
    assert {values.device.type for values in found.values()} == {device}


def test_all_linear_leaves_other_layers_alone(tmp_path: Path) -> None:
    ours = apply_method(tiny_base(tiny_checkpoint(tmp_path)), config.LoRA(r=4))
    assert not any(isinstance(layer, LoraEmbedding) for layer in ours.planted.values())
    assert not {"lm_head", "model.embed_tokens"} & set(ours.planted)


def mixture(kind: str) -> nn.Module:
    torch.manual_seed(0)
    sizes = {**SIZES, "hidden_size": 32, "intermediate_size": 48, "head_dim": 8}
    if kind == "mixtral":
        return MixtralForCausalLM(MixtralConfig(**sizes, num_local_experts=4))
    return Qwen3MoeForCausalLM(
        Qwen3MoeConfig(
            **sizes,
            num_experts=4,
            num_experts_per_tok=2,
            moe_intermediate_size=24,
            mlp_only_layers=[1],
        )
    )


@pytest.mark.parametrize("kind", ["mixtral", "qwen3_moe"])  # of qwen3_moe's two layers one has a plain MLP
@pytest.mark.parametrize("name", ["experts", "gate_up_proj", "down_proj", "mlp.experts.down_proj"])
def test_fused_experts_are_refused_in_a_sentence(kind: str, name: str) -> None:
    model = mixture(kind)
    with pytest.raises(
        MethodError, match=r"experts of \w+ForCausalLM .* fused .*of three dimensions \(model.layers.0.mlp"
    ):
        apply_method(model, config.LoRA(r=2, target_modules=(name, "q_proj")))
    assert not any("experts" in path for path in apply_method(mixture(kind), config.LoRA(r=2)).planted)
    (said,) = left_out(model, "all-linear")
    assert "of several experts (model.layers.0.mlp.experts.gate_up_proj" in said
    if kind == "qwen3_moe":
        plain = apply_method(model, config.LoRA(r=2, target_modules=("layers.1.mlp.down_proj",)))
        assert list(plain.planted) == ["model.layers.1.mlp.down_proj"]


def test_a_router_is_no_target_and_attention_learns_beside_the_experts() -> None:
    model = mixture("mixtral")
    with pytest.raises(
        MethodError, match=r"names 'gate', but .*gate' \(MixtralTopKRouter\) is no linear, .* modules: \[gate\]"
    ):
        apply_method(model, config.LoRA(r=2, target_modules=("gate",)))
    model.config._experts_implementation = "eager"  # the grouped product knows no float64
    plain = copy.deepcopy(model)
    section = config.LoRA(r=4, alpha=8, target_modules=("q_proj", "v_proj"))
    ours = apply_method(model, section)
    assert len(ours.planted) == 4
    stir(ours)
    theirs = with_our_values(plain, peft_config(section, task_type="CAUSAL_LM"), ours)
    print(f"attention of a mixture: {assert_as_peft(ours, theirs, **BATCH)}")
