"""The product that a recompute leaves out: only where nothing reads it, and without a change in any gradient."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from transformers import Gemma2Config, Gemma2ForCausalLM, LlamaConfig, LlamaForCausalLM

from qlora.model.anatomy import layers as decoder_layers
from qlora.model.nf4 import Linear4bit
from qlora.residence.boundary import unread_linears
from qlora.residence.layers import wrap_layers
from tests.steps import close

SIZES = {
    "vocab_size": 32,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "head_dim": 32,
}


def model_of(family: str) -> nn.Module:
    """A random model whose down projections are 4-bit and whose other weights train."""
    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(**SIZES)) if family == "llama" else Gemma2ForCausalLM(Gemma2Config(**SIZES))
    for layer in decoder_layers(model):
        layer.mlp.down_proj = quantised(layer.mlp.down_proj.weight)
    return model.train()


def quantised(weight: Tensor) -> Linear4bit:
    linear = Linear4bit.empty(
        weight.shape[1], weight.shape[0], bias=False, quant_type="nf4", double_quant=True, compute_dtype=torch.float32
    )
    linear.place(weight.detach(), torch.device("cpu"))
    return linear


def gradients(model: nn.Module) -> dict[str, Tensor]:
    model.zero_grad()
    ids = torch.arange(24).reshape(4, 6)
    model(input_ids=ids, use_cache=False).logits.square().sum().backward()
    return {name.replace(".layer.", "."): p.grad for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize(("family", "left_out"), [("llama", 1), ("gemma2", 0)])
def test_gradients_are_the_same_without_the_product(family: str, left_out: int) -> None:
    model = model_of(family)
    expected = gradients(model)
    wrap_layers(model, 2)
    for _ in range(2):  # the first pass finds the linear in its first micro-batch, the second leaves it out throughout
        found = gradients(model)
        close(found, expected)
    for layer in decoder_layers(model):
        assert len(layer.unread) == left_out
        assert not layer.layer.mlp.down_proj.unread


def test_a_product_that_something_else_reads_is_kept() -> None:
    linear = quantised(torch.randn(64, 64))
    x = torch.randn(2, 64, requires_grad=True)
    product = linear(x)
    assert unread_linears(x + product) == [linear]
    assert unread_linears(x.exp() * product.sum() + product) == []  # read by the multiplication too
    assert unread_linears(linear(x.exp() + linear(x)) + x) == []  # used twice: its other answer is read
    assert unread_linears((x + product).tanh()) == []
    assert unread_linears(x * product) == []  # a factor is read, a term is not
