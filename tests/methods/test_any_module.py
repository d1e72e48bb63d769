"""Modules of any shape: a diffusion UNet, torch's own encoder, a plain stack. What is found, changed and left alone."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import UNet2DConditionModel
from torch import Tensor, nn
from transformers import BertConfig, BertModel

from qlora import recipe as config
from qlora.errors import MethodError, ModelError
from qlora.methods.base import AdaptedModel, apply_method
from qlora.methods.files import save_adapter
from qlora.methods.loading import load_adapter
from qlora.methods.targets import find_linears
from qlora.model.in_memory import as_base, quantise
from qlora.model.nf4 import FrozenLinear
from tests.rounding import difference, rounding
from tests.tiny import stir

ATTENTION = ("to_q", "to_k", "to_v", "to_out.0")


def stack_of() -> nn.Sequential:
    return nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 4))


def unet() -> Any:
    """diffusers' own, with two attention levels that see a text of width 64."""
    torch.manual_seed(0)
    return UNet2DConditionModel(
        sample_size=8, in_channels=4, out_channels=4, layers_per_block=1, block_out_channels=(64, 64),
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"), up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        cross_attention_dim=64, attention_head_dim=4, norm_num_groups=8,
    ).eval()  # fmt: skip


def noise_of(model: Any) -> Tensor:
    """The noise [2, 4, 8, 8] that the UNet sees in a picture, at time 7, told a text of 5 tokens."""
    generator = torch.Generator().manual_seed(1)
    picture, text = (torch.randn(*shape, generator=generator) for shape in ((2, 4, 8, 8), (2, 5, 64)))
    noise: Tensor = model(picture, torch.tensor([7, 7]), encoder_hidden_states=text).sample
    return noise


@pytest.mark.parametrize("quantization", ["none", "nf4"])
def test_attention_of_a_unet(quantization: str, tmp_path: Path) -> None:
    base = unet() if quantization == "none" else quantise(unet())
    expected = noise_of(base).detach()
    model = apply_method(base, config.LoRA(r=4, target_modules=ATTENTION))
    # five transformer blocks, each with self-attention and attention to the text
    blocks = [path for path, _ in base.named_modules() if path.endswith("attn2")]
    assert len(model.planted) == len(blocks) * 2 * 4
    assert all(isinstance(layer.base, FrozenLinear) == (quantization == "nf4") for layer in model.planted.values())
    assert torch.equal(noise_of(model.model), expected)

    noise_of(model.model).square().mean().backward()
    trained = model.trainable_parameters()
    with_gradient = {id(values) for values in model.model.parameters() if values.grad is not None}
    assert with_gradient == {id(values) for values in trained.values()}
    assert all(bool(values.grad.any()) == name.endswith("lora_B") for name, values in trained.items())  # type: ignore[union-attr]

    stir(model)
    adapted = noise_of(model.model).detach()
    assert not torch.allclose(adapted, expected, atol=1e-3)
    save_adapter(model, tmp_path)
    fresh = unet() if quantization == "none" else quantise(unet())
    assert torch.equal(noise_of(load_adapter(as_base(fresh), tmp_path).model), adapted)
    assert torch.equal(noise_of(model.remove().model), expected)


def test_all_linears_of_a_unet_are_those_of_its_blocks() -> None:
    found = find_linears(unet())
    assert {path.split(".")[0] for path in found} == {"down_blocks", "mid_block", "up_blocks"}
    assert {path.rpartition(".")[2] for path in found} >= {"to_q", "to_k", "to_v", "0", "time_emb_proj"}


class Encoder(nn.Module):
    """torch's own encoder layers, which read past their modules where nobody is watching, and a head."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        layer = nn.TransformerEncoderLayer(64, 4, 128, dropout=0.0, batch_first=True)
        self.encoder = nn.TransformerEncoder(layer, 2)
        self.head = nn.Linear(64, 3)

    def forward(self, x: Tensor) -> Tensor:
        """[N, T, 64] → [N, 3]"""
        return self.head(self.encoder(x).mean(1))


@pytest.mark.parametrize("quantization", ["none", "nf4"])
def test_torchs_encoder_layers_see_the_adapter_without_gradients_too(quantization: str) -> None:
    base = Encoder().eval() if quantization == "none" else quantise(Encoder().eval())
    x = torch.randn(2, 5, 64, generator=torch.Generator().manual_seed(0))
    model = apply_method(base, config.LoRA(r=4))
    assert sorted({path.rpartition(".")[2] for path in model.planted}) == ["linear1", "linear2"]
    with torch.no_grad():
        before = model.model(x)
        stir(model, 0.3)
        alone = model.model(x)
    watched = model.model(x).detach()
    assert difference(alone, watched) < rounding()
    assert not torch.allclose(alone, before, atol=1e-2)


def test_the_output_projection_of_torchs_attention_is_refused() -> None:
    """Its module is never called, so an adapter on it would be neither seen nor trained."""
    with pytest.raises(MethodError, match="names there are head, linear1, linear2"):
        apply_method(Encoder(), config.LoRA(r=4, target_modules=("out_proj",)))


def test_a_plain_stack_is_adapted_but_for_its_last_linear() -> None:
    stack = stack_of()
    x = torch.randn(3, 64)
    expected = stack(x).detach()
    model = apply_method(stack, config.LoRA(r=4))
    assert list(model.planted) == ["0", "2"]
    assert torch.equal(model.model(x), expected)
    model.model(x).sum().backward()
    assert {name for name, values in stack.named_parameters() if values.grad is not None} == set(
        model.trainable_parameters()
    )
    assert (model.tokenizer, model.base.name, model.device) == (None, "Sequential", torch.device("cpu"))


class Attention(nn.Module):
    """diffusers' attention alone: its output projection stands in a list of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.to_q = nn.Linear(8, 8)
        self.to_out = nn.ModuleList([nn.Linear(8, 8), nn.Dropout(0.0)])
        self.head = nn.Linear(8, 2)


@pytest.mark.parametrize(
    ("model", "expected"),
    [
        (nn.Sequential(nn.Linear(8, 8), nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 2))), ["0", "1.0"]),
        (nn.ModuleList([nn.Sequential(nn.Linear(8, 8)), nn.Sequential(nn.Linear(8, 8))]), ["0.0", "1.0"]),
        (Attention(), ["to_q", "to_out.0"]),
        (
            BertModel(BertConfig(hidden_size=8, num_hidden_layers=1, num_attention_heads=2, intermediate_size=8)),
            [f"encoder.layer.0.{part}" for part in (
                "attention.self.query", "attention.self.key", "attention.self.value", "attention.output.dense",
                "intermediate.dense", "output.dense",
            )],
        ),
    ],
    ids=["nested stack", "list", "attention", "bert"],
)  # fmt: skip
def test_what_all_linear_means(model: nn.Module, expected: list[str]) -> None:
    """Attention and MLP below the layers, without BERT's pooler; all but the last where there are no layers."""
    assert list(find_linears(model)) == expected


def test_the_mode_and_the_dtype_are_the_modules_own() -> None:
    model = apply_method(stack_of().to(torch.bfloat16).eval(), config.LoRA(r=2))
    assert model.base.compute_dtype == torch.bfloat16
    assert not any(layer.training for layer in model.layers())
    assert model.model(torch.zeros(1, 64, dtype=torch.bfloat16)).dtype == torch.bfloat16


def test_a_module_on_several_devices_is_refused() -> None:
    spread = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4, device="meta"))
    with pytest.raises(ModelError, match="lies on several devices"):
        apply_method(spread, config.LoRA(r=2))


def test_methods_that_need_a_language_model_say_so() -> None:
    for section in (config.PromptTuning(tokens=2), config.PrefixTuning(tokens=2), config.Bottleneck(size=2)):
        stack = stack_of()
        with pytest.raises((MethodError, ModelError), match=r"Sequential|layers|language"):
            apply_method(stack, section)
        assert isinstance(apply_method(stack, config.LoRA(r=2)), AdaptedModel)  # nothing was left behind
