"""The law of experts: packed one by one, they answer and pass gradients on as the dense matrices that they stand for."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

from qlora.export import merge
from qlora.methods import AdaptedModel, apply_method, save_adapter
from qlora.model.experts import PackedExperts
from qlora.model.nf4 import FrozenLinear, Linear4bit
from qlora.recipe import LoRA, MemorySection, ModelSection
from qlora.residence.load import load_base
from tests.rounding import GRADIENT, difference, rounding
from tests.steps import close
from tests.tiny import CPU, TOKENS, any_checkpoint, gradients, logits_of, stir, tiny_base

FEW = {"num_experts_per_tok": 2, "initializer_range": 0.2}
NARROW = {"moe_intermediate_size": 64}
FAMILIES: dict[str, dict[str, Any]] = {
    "Qwen3Moe": {"num_experts": 8, **NARROW},
    "Qwen3_5MoeText": {
        "num_experts": 8, "shared_expert_intermediate_size": 64, "layer_types": ["linear_attention", "full_attention"], **NARROW,
    },
    "GptOss": {"num_local_experts": 4, "layer_types": ["sliding_attention", "full_attention"]},
    "Mixtral": {"num_local_experts": 4},
    "Olmoe": {"num_experts": 8},
    "Glm4Moe": {"n_routed_experts": 8, "first_k_dense_replace": 1, "n_group": 1, "topk_group": 1, **NARROW},
    "Gemma4Text": {
        "enable_moe_block": True, "vocab_size_per_layer_input": 96, "hidden_size_per_layer_input": 16, "num_experts": 8, "top_k_experts": 2, "layer_types": ["sliding_attention", "full_attention"],
        **NARROW,
    },
    "GraniteMoe": {"num_local_experts": 4},
    "DeepseekV3": {
        "n_routed_experts": 8, "first_k_dense_replace": 1, "n_group": 2, "topk_group": 1, "q_lora_rank": 32, "kv_lora_rank": 32,
        "qk_rope_head_dim": 16, "qk_nope_head_dim": 16, "v_head_dim": 16, "num_key_value_heads": 4, **NARROW,
    },
    "Lfm2Moe": {"num_experts": 8, "num_dense_layers": 1, "layer_types": ["conv", "full_attention"], **NARROW},
}  # fmt: skip
EVERY = pytest.mark.parametrize("family", [*FAMILIES])
TWO = pytest.mark.parametrize(
    "family", ["Qwen3Moe", "GptOss"]
)  # a tensor for each expert; one for all, transposed, with biases


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Any:
    made: dict[str, Path] = {}

    def of(family: str) -> Path:
        if family not in made:
            made[family] = any_checkpoint(tmp_path_factory.mktemp(family), family, **FEW | FAMILIES[family])
        return made[family]

    return of


def experts_of(model: nn.Module) -> dict[str, PackedExperts]:
    return {path: module for path, module in model.named_modules() if isinstance(module, PackedExperts)}


def dense_of(folder: Path, packed: nn.Module) -> nn.Module:
    """transformers' own model in fp32 with what the packed weights stand for in the place of the checkpoint's."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    return filled(model, packed)


@torch.no_grad()
def filled(model: nn.Module, packed: nn.Module) -> nn.Module:
    for planted, module in packed.named_modules():
        path = planted.removesuffix(".base")
        owner, _, name = path.rpartition(".")
        if isinstance(module, PackedExperts):
            for expert in range(module.count):
                getattr(model.get_submodule(owner), name)[expert] = module.dequantise(expert, torch.float32)
        elif isinstance(module, FrozenLinear):
            model.get_submodule(path).weight.copy_(module.dequantise(torch.float32))  # type: ignore[operator, union-attr]
    return model


@EVERY
def test_logits_are_those_of_the_dense_experts(family: str, checkpoint: Any) -> None:
    model = tiny_base(checkpoint(family)).model
    assert experts_of(model)
    dense = dense_of(checkpoint(family), model)
    assert difference(logits_of(model), logits_of(dense)) <= rounding()


@TWO
def test_each_expert_has_the_bytes_of_a_linear(family: str, checkpoint: Any) -> None:
    folder = checkpoint(family)
    experts = experts_of(tiny_base(folder).model)
    dense = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    for path, packed in experts.items():
        for expert, matrix in enumerate(getattr(dense.get_submodule(path.rpartition(".")[0]), path.rpartition(".")[2])):
            linear = Linear4bit.empty(
                packed.columns,
                packed.rows,
                bias=False,
                quant_type="nf4",
                double_quant=True,
                compute_dtype=torch.float32,
            )
            linear.place(matrix.detach(), CPU)
            assert torch.equal(packed.weight[expert], linear.weight.view(-1))
            assert torch.equal(packed.dequantise(expert, torch.float32), linear.dequantise(torch.float32))


def adapted(
    folder: Path, like: AdaptedModel | None = None, memory: MemorySection | None = None, **method: Any
) -> AdaptedModel:
    """An adapted base in NF4; or a dense one with the weights that ``like`` stands for, adapted in the same places."""
    section = ModelSection(name=str(folder), quantization="nf4" if like is None else "none", compute_dtype="fp32")
    base = load_base(section, CPU, memory=memory)
    if like is not None:
        filled(base.model, like.model)
        method |= {"target_modules": list(like.planted)}
    model = apply_method(base, LoRA(r=4, **method))
    stir(model, 0.05)
    return model


def backward(model: AdaptedModel) -> dict[str, Tensor]:
    model.model(input_ids=TOKENS, labels=TOKENS, use_cache=False).loss.backward()
    return gradients(model)


@EVERY
def test_gradients_are_those_of_the_dense_experts(family: str, checkpoint: Any) -> None:
    model = adapted(checkpoint(family))
    assert not any("experts." in path for path in model.planted if "shared" not in path)
    close(backward(model), backward(adapted(checkpoint(family), like=model)), rounding(GRADIENT))


@TWO
@pytest.mark.parametrize("tier", ["host", "disk"])
def test_streamed_layers_bring_their_experts(family: str, tier: str, checkpoint: Any, tmp_path: Path) -> None:
    memory = MemorySection(layers="streamed", tier=tier, cache=str(tmp_path))
    resident = adapted(checkpoint(family))
    for _ in range(2):  # the second time from the file that the first made
        streamed = adapted(checkpoint(family), memory=memory)
        assert all(packed.weight.is_meta for packed in experts_of(streamed.model).values())
        assert torch.equal(logits_of(streamed.model), logits_of(resident.model))


@EVERY
@pytest.mark.parametrize("base", ["dequantized", "original"])
def test_the_merged_model_is_the_trained_one_in_the_layout_of_its_checkpoint(
    family: str, base: Any, checkpoint: Any, tmp_path: Path
) -> None:
    folder = checkpoint(family)
    model = adapted(folder)
    save_adapter(model, tmp_path / "adapter")
    merge(folder, tmp_path / "adapter", tmp_path / "merged", compute_dtype="fp32", dtype="fp32", base=base)
    found, source = (load_file(place / "model.safetensors") for place in (tmp_path / "merged", folder))
    assert {name: values.shape for name, values in found.items()} == {
        name: values.shape for name, values in source.items()
    }
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged", dtype=torch.float32)
    if base == "dequantized":
        assert difference(logits_of(merged), logits_of(model.model)) <= rounding()
    else:
        for name, values in source.items():
            assert "experts" not in name or "shared" in name or torch.equal(found[name], values.float()), name
