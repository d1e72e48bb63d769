"""The law of experts: packed one by one, they answer and pass gradients on as the dense matrices that they stand for."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from peft import PeftModel
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, BitsAndBytesConfig
from transformers.integrations.mxfp4 import convert_moe_packed_tensors

from qlora.data.batches import collate
from qlora.data.packing import Row
from qlora.errors import MethodError, ModelError
from qlora.export.merged import merge
from qlora.methods.base import AdaptedModel, apply_method
from qlora.methods.files import save_adapter
from qlora.methods.loading import load_adapter
from qlora.methods.targets import left_out
from qlora.model.experts import PackedExperts
from qlora.model.loss import batch_loss
from qlora.model.nf4 import FrozenLinear, Linear4bit
from qlora.model.skeleton import _refuse_mostly_dense
from qlora.recipe import LoRA, MemorySection, ModelSection
from qlora.residence.layers import wrap_layers
from qlora.residence.load import load_base
from tests.rounding import GRADIENT, difference, doubled, no_worse, rounding
from tests.steps import close
from tests.tiny import CPU, TOKENS, any_checkpoint, gradients, logits_of, random_rows, stir, tiny_base

PARAMETERS = ("experts.gate_up_proj", "experts.down_proj")
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
@pytest.mark.sampled
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
    folder: Path,
    like: AdaptedModel | None = None,
    memory: MemorySection | None = None,
    dtype: Any = "fp32",
    **method: Any,
) -> AdaptedModel:
    """An adapted base in NF4; or a dense one with the weights that ``like`` stands for, adapted in the same places."""
    section = ModelSection(name=str(folder), quantization="nf4" if like is None else "none", compute_dtype=dtype)
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


@pytest.mark.parametrize("adapted_too", [(), PARAMETERS], ids=["alone", "with experts"])
def test_experts_that_get_no_adapter_are_named(adapted_too: tuple[str, ...], checkpoint: Any) -> None:
    model = apply_method(tiny_base(checkpoint("Qwen3Moe")), LoRA(r=4, target_parameters=adapted_too)).model
    said = [one for one in left_out(model, "all-linear") if "the experts, which stay as they are" in one]
    assert len(said) == (0 if adapted_too else 1)
    assert all("target_parameters=[mlp.experts.gate_up_proj, mlp.experts.down_proj]" in one for one in said)


@TWO
def test_experts_that_bitsandbytes_left_in_16_bits_are_packed_here(
    family: str, checkpoint: Any, tmp_path: Path
) -> None:
    """Its checkpoints hold linears packed and experts whole: the same model as from the checkpoint that it was made from."""
    four = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.float32,
    )
    folder = checkpoint(family)
    AutoModelForCausalLM.from_pretrained(folder, quantization_config=four, dtype=torch.float32).save_pretrained(
        tmp_path
    )
    for file in folder.glob("tokenizer*"):
        shutil.copy(file, tmp_path)
    packed, ours = (tiny_base(place).model for place in (tmp_path, folder))
    assert experts_of(packed).keys() == experts_of(ours).keys()
    assert packed.state_dict().keys() == ours.state_dict().keys()
    assert difference(logits_of(packed), logits_of(ours)) <= rounding()
    with pytest.raises(ModelError, match=r"in nf4 or fp4, not in int8; name the 16-bit checkpoint"):
        _refuse_mostly_dense(AutoModelForCausalLM.from_pretrained(folder), "int8", prequantised=True)


@EVERY
@pytest.mark.sampled
def test_gradients_are_those_of_the_dense_experts(family: str, checkpoint: Any) -> None:
    model = adapted(checkpoint(family))
    assert not any("experts." in path for path in model.planted if "shared" not in path)
    close(backward(model), backward(adapted(checkpoint(family), like=model)), rounding(GRADIENT))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("family", ["Qwen3Moe", "GptOss", "Mixtral"])
@pytest.mark.sampled
def test_packed_examples_are_what_they_are_alone(family: str, dtype: torch.dtype, checkpoint: Any) -> None:
    """Loss and gradients, as near to those of the dense model in float64 as every example's alone are: which tokens visit an
    expert together is another matter."""
    model = adapted(checkpoint(family), dtype="fp32" if dtype == torch.float32 else "bf16")
    rows = random_rows(2)
    alone = [part for row in rows for part in apart(row)]
    assert len(alone) > len(rows)
    exact = doubled(adapted(checkpoint(family), like=model).model)
    exact.config._experts_implementation = "eager"  # torch's grouped product has no float64
    total = torch.zeros((), dtype=torch.float64)
    for row in alone:
        batch = collate([row], 0)
        logits = exact(input_ids=batch["input_ids"], use_cache=False).logits
        total = total + F.cross_entropy(logits[0, :-1], batch["labels"][0, 1:], reduction="sum")
    total.backward()  # type: ignore[no-untyped-call]
    wanted = {name: values.grad for name, values in exact.named_parameters() if values.grad is not None}
    found = []
    for batches in ([rows], [[row] for row in alone]):
        losses = [batch_loss(model.model, collate(together, 0))[0] for together in batches]
        sum(losses).backward()
        found.append({"loss": sum(losses).detach(), **gradients(model)})
    wanted["loss"] = total.detach()
    assert found[0].keys() == wanted.keys()
    for name, values in found[0].items():
        no_worse(values, found[1][name], wanted[name], dtype)


def apart(row: Row) -> list[Row]:
    """Every example of a row as one of its own."""
    parts = [slice(*span) for span in row.spans()]
    return [Row(row.ids[part], row.labels[part], row.positions[part], (0,)) for part in parts]


@TWO
@pytest.mark.parametrize("tier", ["host", "disk"])
@pytest.mark.sampled
def test_streamed_layers_bring_their_experts(family: str, tier: str, checkpoint: Any, tmp_path: Path) -> None:
    memory = MemorySection(layers="streamed", tier=tier, cache=str(tmp_path))
    resident = adapted(checkpoint(family))
    for _ in range(2):  # the second time from the file that the first made
        streamed = adapted(checkpoint(family), memory=memory)
        assert all(packed.weight.is_meta for packed in experts_of(streamed.model).values())
        assert torch.equal(logits_of(streamed.model), logits_of(resident.model))


@EVERY
@pytest.mark.parametrize("base", ["dequantized", "original"])
@pytest.mark.sampled
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


def test_mxfp4_is_dequantised_and_merged_in_16_bits(checkpoint: Any, tmp_path: Path) -> None:
    """Every byte, and scales of many sizes, as transformers has them; packed anew, and merged as the 16-bit checkpoint is."""
    folder = Path(shutil.copytree(checkpoint("GptOss"), tmp_path / "mxfp4"))
    tensors = load_file(folder / "model.safetensors")
    plain = dict(tensors)
    for name in [name for name in tensors if "experts" in name and not name.endswith("bias")]:
        experts, inputs, outputs = tensors.pop(name).shape
        blocks = torch.randint(0, 256, (experts, outputs, inputs // 32, 16), dtype=torch.uint8)
        scales = torch.randint(120, 124, (experts, outputs, inputs // 32), dtype=torch.uint8)
        tensors |= {f"{name}_blocks": blocks, f"{name}_scales": scales}
        plain[name] = convert_moe_packed_tensors(blocks, scales, dtype=torch.bfloat16)
    save_file(tensors, folder / "model.safetensors")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"quantization_config": {"quant_method": "mxfp4"}}))
    other = Path(shutil.copytree(checkpoint("GptOss"), tmp_path / "plain"))
    save_file({name: values.contiguous() for name, values in plain.items()}, other / "model.safetensors")
    for quantization in ("none", "nf4"):
        assert torch.equal(
            logits_of(tiny_base(folder, quantization).model), logits_of(tiny_base(other, quantization).model)
        )
    model = adapted(folder, target_parameters=("experts.down_proj",))
    save_adapter(model, tmp_path / "adapter")
    merge(folder, tmp_path / "adapter", tmp_path / "merged", compute_dtype="fp32", dtype="fp32")
    assert load_file(tmp_path / "merged" / "model.safetensors").keys() == plain.keys()
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged", dtype=torch.float32)
    assert difference(logits_of(merged), logits_of(model.model)) <= rounding()
    name = next(name for name in tensors if name.endswith("_blocks"))
    save_file(tensors | {name: tensors[name][..., ::2].contiguous()}, folder / "model.safetensors")
    with pytest.raises(ModelError, match=f"'{name}' in .* has the shape"):
        tiny_base(folder)


# --- trained ------------------------------------------------------------------------------------------------------------

SOME = pytest.mark.parametrize(
    ("family", "parameters"), [("Qwen3Moe", PARAMETERS), ("GptOss", PARAMETERS), ("GptOss", PARAMETERS[1:])]
)


def of_peft(folder: Path, adapter: Path, packed: nn.Module) -> PeftModel:
    """Our adapter in PEFT, on transformers' model with what the packed weights stand for."""
    return PeftModel.from_pretrained(dense_of(folder, packed), adapter, is_trainable=True)  # type: ignore[arg-type]


@SOME
def test_peft_reads_adapters_on_experts_and_has_our_logits_and_gradients(
    family: str, parameters: tuple[str, ...], checkpoint: Any, tmp_path: Path
) -> None:
    folder = checkpoint(family)
    model = adapted(folder, target_parameters=parameters)
    save_adapter(model, tmp_path / "adapter")
    peft = of_peft(folder, tmp_path / "adapter", model.model)
    assert difference(logits_of(model.model), logits_of(peft)) <= rounding()
    peft(input_ids=TOKENS, labels=TOKENS, use_cache=False).loss.backward()
    theirs = {
        name.replace(".default", ""): values.grad for name, values in peft.named_parameters() if values.requires_grad
    }
    (layout,) = (method.layout for method in model.methods)
    found = {layout.key(name): grad for name, grad in backward(model).items()}
    assert sum(".experts." in key for key in found) == 4 * len(parameters)
    close(found, theirs, rounding(GRADIENT))  # type: ignore[arg-type]
    again = load_adapter(tiny_base(folder), tmp_path / "adapter")
    assert torch.equal(logits_of(again.model), logits_of(model.model))


def test_an_answer_may_be_normalised_before_it_is_weighed(checkpoint: Any, tmp_path: Path) -> None:
    """Muse Spark's; transformers' own way through dense experts does it for whatever family asks."""

    def normalised(model: nn.Module) -> nn.Module:
        for module in list(model.modules()):
            if hasattr(module, "has_post_expert_norm"):
                module.has_post_expert_norm, module.post_expert_norm = True, nn.RMSNorm(64, eps=1e-6)  # type: ignore[assignment]
                module.post_expert_norm.weight.requires_grad_(False).copy_(torch.linspace(0.5, 1.5, 64))
        return model

    folder = checkpoint("Qwen3Moe")
    model = adapted(folder, target_parameters=PARAMETERS)
    save_adapter(model, tmp_path / "adapter")
    before, peft = logits_of(model.model), of_peft(folder, tmp_path / "adapter", model.model)
    peft.config._experts_implementation = "batched_mm"
    assert difference(logits_of(normalised(model.model)), logits_of(normalised(peft))) <= rounding()
    assert difference(logits_of(model.model), before) > 1e-2
    peft(input_ids=TOKENS, labels=TOKENS, use_cache=False).loss.backward()
    theirs = {name.replace(".default", ""): p.grad for name, p in peft.named_parameters() if p.requires_grad}
    (layout,) = (method.layout for method in model.methods)
    close({layout.key(name): grad for name, grad in backward(model).items()}, theirs, rounding(GRADIENT))  # type: ignore[arg-type]


@SOME
def test_adapters_on_experts_begin_as_nothing_are_merged_and_streamed(
    family: str, parameters: tuple[str, ...], checkpoint: Any, tmp_path: Path
) -> None:
    folder = checkpoint(family)
    base = tiny_base(folder)
    before = logits_of(base.model)
    model = apply_method(base, LoRA(r=4, target_parameters=parameters))
    assert torch.equal(logits_of(model.model), before)
    stir(model, 0.05)
    after = logits_of(model.model)
    assert difference(after, before) > 1e-2
    with model.disabled():
        assert torch.equal(logits_of(model.model), before)
    streamed = adapted(folder, memory=MemorySection(layers="streamed"), target_parameters=parameters)
    assert torch.equal(logits_of(streamed.model), after)
    wrap_layers(streamed.model, rows=1)
    streamed.model.train()
    close(backward(streamed), backward(model), rounding(GRADIENT))
    save_adapter(model, tmp_path / "adapter")
    merge(folder, tmp_path / "adapter", tmp_path / "merged", compute_dtype="fp32", dtype="fp32")
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged", dtype=torch.float32)
    assert difference(logits_of(merged), after) <= rounding()


@pytest.mark.parametrize(
    ("method", "sentence"),
    [
        ({"target_parameters": ("experts.middle",)}, "The names there are .*experts.down_proj"),
        ({"target_parameters": PARAMETERS, "dropout": 0.1}, "method.dropout is 0.1, .*expected 0"),
        ({"target_parameters": PARAMETERS, "init": "pissa"}, "method.init is pissa, .*expected kaiming or gaussian"),
        ({"target_parameters": PARAMETERS, "r": 65, "target_modules": ["q_proj"]}, "more than the smaller side"),
    ],
)
def test_what_cannot_be_on_experts_is_said(method: dict[str, Any], sentence: str, checkpoint: Any) -> None:
    with pytest.raises(MethodError, match=sentence):
        apply_method(tiny_base(checkpoint("Qwen3Moe")), LoRA(**method))
    dense = tiny_base(checkpoint("Qwen3Moe"), "none")
    with pytest.raises(
        MethodError, match=r"'down_proj', which is of experts.*target_parameters=\[mlp.experts.down_proj\]"
    ):
        apply_method(tiny_base(checkpoint("Qwen3Moe")), LoRA(target_modules=("down_proj",)))
    with pytest.raises(MethodError, match="not quantised, and experts are adapted"):
        apply_method(dense, LoRA(r=4, target_modules=("q_proj",), target_parameters=PARAMETERS))
