"""The laws of autocast: a loop in fp32 with bf16 products trains, near the fp32 gradients; without it nothing changes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from qlora import recipe as config
from qlora.methods.base import AdaptedModel, apply_method
from qlora.methods.lora import as_autocast, without_autocast
from tests.tiny import TOKENS, difference, stir, tiny_base, tiny_checkpoint

SECTIONS: dict[str, Any] = {
    "lora": config.LoRA(r=4),
    "lora_dropout": config.LoRA(r=4, dropout=0.2),
    "lora_others": config.LoRA(r=4, target_modules=("q_proj", "embed_tokens", "lm_head")),
    "pissa": config.LoRA(r=4, init="pissa"),
    "dora": config.DoRA(r=4),
    "dora_dropout": config.DoRA(r=4, dropout=0.2),
    "adalora": config.AdaLoRA(r=2, initial_r=4),
    "ia3": config.IA3(),
}


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_checkpoint(tmp_path_factory.mktemp("base"), "qwen2")


def step(model: AdaptedModel, autocast: bool, inside: bool = False) -> tuple[Tensor, dict[str, Tensor]]:
    """(logits, gradients) of one step; ``inside``: the backward too runs under autocast."""
    torch.manual_seed(1)
    model.model.train()
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        output = model.model(input_ids=TOKENS, labels=TOKENS, use_cache=False)
        if inside:
            output.loss.backward()
    if not inside:
        output.loss.backward()
    gradients = {}
    for name, values in model.trainable_parameters().items():
        assert values.grad is not None, name
        gradients[name], values.grad = values.grad.clone(), None
    return output.logits.detach().float(), gradients


@pytest.mark.parametrize("quantization", ["none", "nf4"])
@pytest.mark.parametrize("section", SECTIONS.values(), ids=SECTIONS)
@pytest.mark.sampled
def test_a_step_under_autocast_is_near_the_one_in_fp32(checkpoint: Path, section: Any, quantization: str) -> None:
    model = apply_method(tiny_base(checkpoint, quantization), section)
    generator = torch.Generator().manual_seed(7)
    for values in model.trainable_parameters().values():
        values.data += 0.05 * torch.randn(values.shape, generator=generator)
    expected, gradients = step(model, autocast=False)
    for inside in (False, True):
        found, others = step(model, autocast=True, inside=inside)
        worst = max(float((others[name] - values).norm() / values.norm()) for name, values in gradients.items())
        print(f"{section.name}, {quantization}: logits {difference(found, expected):.1e}, gradients {worst:.1e}")
        assert 1e-5 < difference(found, expected) < 0.05  # it was bf16, and no worse than that
        assert worst < 0.1
        assert all(others[name].dtype == values.dtype for name, values in gradients.items())
    alone = logits_of_base(model, autocast=False)
    assert difference(logits_of_base(model, autocast=True), alone) < 0.05


@torch.no_grad()
def logits_of_base(model: AdaptedModel, autocast: bool) -> Tensor:
    with model.disabled(), torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        logits: Tensor = model.model(input_ids=TOKENS, use_cache=False).logits.float()
    return logits


def test_a_layer_answers_in_the_dtype_of_autocast(checkpoint: Path) -> None:
    model = apply_method(tiny_base(checkpoint), SECTIONS["dora"])
    stir(model)
    layer = model.planted["model.layers.0.self_attn.q_proj"]
    x = torch.randn(3, 64)
    assert layer(x).dtype == torch.float32
    with torch.autocast("cpu", torch.bfloat16):
        assert layer(x).dtype == torch.bfloat16


def test_what_is_cast_and_what_is_left() -> None:
    x = torch.randn(2)
    assert as_autocast(x) is x
    assert as_autocast(x.to("meta")).is_meta
    with torch.autocast("cpu", torch.bfloat16):
        assert as_autocast(x).dtype == torch.bfloat16
        assert as_autocast(x.double()).dtype == torch.float64
        assert as_autocast(x.to("meta")).dtype == torch.float32
        with without_autocast(x.device):
            assert as_autocast(x) is x
