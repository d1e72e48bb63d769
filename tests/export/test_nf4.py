"""The trained model in 4 bits opens as bitsandbytes' own and keeps what was learned, which plain rounding loses."""

from __future__ import annotations

import json
from pathlib import Path

import bitsandbytes
import pytest
import torch
from bitsandbytes.functional import QuantState, dequantize_4bit
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from qlora.data import collate
from qlora.errors import ModelError
from qlora.export import export_nf4, merge
from qlora.export.rounding import Inputs, rounded
from qlora.model.checkpoint import Checkpoint
from qlora.model.loss import hidden_states
from qlora.model.nf4 import dequantised
from qlora.recipe import LoRA, ModelSection
from tests.export.test_merge import trained
from tests.rounding import difference, rounding
from tests.tiny import MIXTURES, logits_of, random_rows, tiny_base, tiny_checkpoint


def inputs_of(x: torch.Tensor, trained: torch.Tensor | None = None) -> Inputs:
    inputs = Inputs.none_yet(x.shape[1], x.device)
    inputs.add(x, x if trained is None else trained)
    return inputs


@pytest.mark.parametrize("double", [True, False])
@pytest.mark.parametrize(
    "shape", [(24, 64), (5, 96), (3, 7)]
)  # blocks that end with the row, go over it, are cut short
def test_unrelated_inputs_leave_the_nearest_code(shape: tuple[int, int], double: bool) -> None:
    torch.manual_seed(0)
    weight = torch.randn(shape)
    weight[0] = 0
    packed, state = rounded(weight, inputs_of(torch.eye(shape[1])), double, torch.float32)
    stored = state.as_dict(packed=True)

    def read(codes: torch.Tensor) -> torch.Tensor:  # as a checkpoint's are
        return dequantised(codes, QuantState.from_dict(dict(stored), torch.device("cpu")))

    found, absmax = read(packed), read(torch.full_like(packed, 0xFF))  # the code of 1
    steps = (weight / absmax).nan_to_num()[..., None] - state.code
    assert difference((found / absmax).nan_to_num(), state.code[steps.abs().argmin(-1)]) <= rounding()
    assert not found[0].any() or double  # doubly quantised, a scale of zero is only nearly one


def test_errors_are_taken_up_where_inputs_are_alike() -> None:
    torch.manual_seed(0)
    x = torch.randn(400, 8) @ torch.randn(8, 128) + 0.1 * torch.randn(400, 128)
    weight = torch.randn(32, 128)
    plain = dequantised(*rounded(weight, inputs_of(torch.eye(128)), True, torch.float32))
    fed = dequantised(*rounded(weight, inputs_of(x), True, torch.float32))
    errors = [((made - weight) @ x.t()).square().mean().item() for made in (plain, fed)]
    print(f"plain {errors[0]:.3g}, fed back {errors[1]:.3g}")
    assert errors[1] < errors[0] / 4
    shifted = 1.1 * x  # what an earlier layer lost is made good: it answers x̂ as W answers x
    better = dequantised(*rounded(weight, inputs_of(x, shifted), True, torch.float32))
    assert (better @ x.t() - weight @ shifted.t()).square().mean() < (
        fed @ x.t() - weight @ shifted.t()
    ).square().mean() / 4


@pytest.mark.parametrize("quantization", ["nf4", "none"])
def test_it_opens_and_keeps_what_was_learned(tmp_path: Path, quantization: str) -> None:
    base = tiny_checkpoint(tmp_path / "base", "qwen2")
    tensors = load_file(base / "model.safetensors")
    tensors["model.embed_tokens.weight"] = tensors["model.embed_tokens.weight"][:, :8].repeat(
        1, 8
    )  # alike, as a real one's are
    save_file(tensors, base / "model.safetensors", metadata={"format": "pt"})
    model = trained(base, tmp_path / "adapter", quantization, LoRA(r=4, alpha=0.4))
    section = ModelSection(name=str(base), quantization=quantization, compute_dtype="fp32")  # type: ignore[arg-type]
    batches = [collate([row], 0) for row in random_rows(200)]
    before = {name: values.clone() for name, values in model.model.state_dict().items()}
    export_nf4(model, Checkpoint(base, "base"), tmp_path / "adapter", tmp_path / "nf4", batches, section=section)
    assert all(torch.equal(values, before[name]) for name, values in model.model.state_dict().items())
    opened = AutoModelForCausalLM.from_pretrained(tmp_path / "nf4", dtype=torch.float32).eval()
    assert sum(isinstance(module, bitsandbytes.nn.Linear4bit) for module in opened.modules()) == 14
    ours = tiny_base(tmp_path / "nf4").model
    for path, linear in opened.named_modules():
        if isinstance(linear, bitsandbytes.nn.Linear4bit):
            found = dequantize_4bit(linear.weight.data, linear.weight.quant_state)
            assert torch.equal(found, ours.get_submodule(path).dequantise(torch.bfloat16))
    assert difference(logits_of(opened), logits_of(ours)) < 5 * 2**-8  # bitsandbytes computes in bf16
    merge(base, tmp_path / "adapter", tmp_path / "merged", compute_dtype="fp32", quantization=section.quantization)
    naive = tiny_base(tmp_path / "merged").model
    unseen = [collate([row], 0) for row in random_rows(20, seed=1)]
    with torch.no_grad():
        errors = [
            sum((hidden_states(made, row) - hidden_states(model.model, row)).square().sum().item() for row in unseen)
            for made in (naive, ours)
        ]
    print(f"NF4 again {errors[0]:.3g}, chosen {errors[1]:.3g}")
    assert errors[1] < 0.8 * errors[0]
    said = json.loads((tmp_path / "nf4" / "config.json").read_text())["quantization_config"]
    assert (said["quant_method"], said["llm_int8_skip_modules"]) == ("bitsandbytes", ["lm_head"])


def test_experts_are_refused(tmp_path: Path) -> None:
    base = tiny_checkpoint(tmp_path / "base", next(iter(MIXTURES)))
    model = trained(base, tmp_path / "adapter")
    section = ModelSection(name=str(base), compute_dtype="fp32")
    with pytest.raises(ModelError, match="has experts"):
        export_nf4(model, Checkpoint(base, "base"), tmp_path / "adapter", tmp_path / "nf4", [], section=section)
    assert not (tmp_path / "nf4").exists()
