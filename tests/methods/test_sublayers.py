"""Where the families keep attention and the MLP, and what is said of models that have neither."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import transformers
from torch import nn

from qlora import recipe as config
from qlora.errors import MethodError
from qlora.methods.base import apply_method
from qlora.methods.planted import Planted, unplanted
from qlora.methods.sublayers import find_layers, width
from qlora.model.anatomy import at
from qlora.model.base import Base
from tests.methods.adapters_oracle import make
from tests.methods.test_bottleneck import FORMS, META, section, small_model
from tests.tiny import difference, stir


def planted_at(name: str, form: str) -> set[str]:
    with META:
        model = small_model(name)
    base = Base(model, None, Path(), name, None, "none", False, META, torch.float32)
    return set(apply_method(base, section(form)).planted)


@pytest.mark.parametrize(
    ("name", "layer", "attention", "mlp", "whole"),
    [
        ("gpt2", "transformer.h.1", "attn", "mlp", "mlp"),
        ("falcon", "transformer.h.1", "self_attention", "mlp", "mlp"),
        ("gptj", "transformer.h.1", "attn", "mlp", "mlp"),
        ("gpt_neox", "gpt_neox.layers.1", "attention", "mlp", "mlp"),
        ("bloom", "transformer.h.1", "self_attention.dense", "mlp.dense_4h_to_h", "mlp"),
        ("mpt", "transformer.blocks.1", "attn", "ffn.down_proj", "ffn"),
        ("opt", "model.decoder.layers.1", "self_attn", "fc2", None),
        ("phi", "model.layers.1", "self_attn", "mlp", "mlp"),
        ("mixtral", "model.layers.1", "self_attn", "mlp", "mlp"),
    ],
)
def test_places_in_every_family(name: str, layer: str, attention: str, mlp: str, whole: str | None) -> None:
    def both(*ends: str) -> set[str]:
        first = layer.replace("1", "0")
        return {f"{path}.{end}" if end else path for path in (first, layer) for end in ends}

    assert planted_at(name, "houlsby") == both(attention, mlp)
    assert planted_at(name, "pfeiffer") == both("")
    assert planted_at(name, "lin") == both("")
    if whole is None:
        with pytest.raises(MethodError, match=r"layers\.0', a OPTDecoderLayer, has no whole MLP .* fc1, fc2"):
            planted_at(name, "parallel")
    else:
        assert planted_at(name, "parallel") == both(whole)


def test_encoders_and_vision_models() -> None:
    bert = transformers.BertForSequenceClassification(
        transformers.BertConfig(
            hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4, vocab_size=40
        )
    )
    vit = transformers.ViTForImageClassification(
        transformers.ViTConfig(
            hidden_size=32,
            intermediate_size=48,
            num_hidden_layers=2,
            num_attention_heads=4,
            image_size=16,
            patch_size=8,
        )
    )
    layers = [f"bert.encoder.layer.{number}" for number in (0, 1)]
    ends = ("attention.output.dense", "output.dense")
    assert set(apply_method(bert, section("houlsby")).planted) == {f"{at}.{end}" for at in layers for end in ends}
    pixels = torch.linspace(-1, 1, 2 * 3 * 16 * 16).reshape(2, 3, 16, 16)
    vit.eval()
    before = vit(pixels).logits
    for form in FORMS:
        model = apply_method(vit, section(form))
        assert torch.equal(vit(pixels).logits, before)
        stir(model)
        vit(pixels).logits.square().sum().backward()
        assert difference(vit(pixels).logits, before) > 1e-3
        assert all(values.grad.any() for values in model.trainable_parameters().values())
        model.remove()
        assert torch.equal(vit(pixels).logits, before)


def test_models_without_such_layers_are_refused_and_left_alone() -> None:
    t5 = transformers.T5ForConditionalGeneration(
        transformers.T5Config(d_model=32, d_kv=8, d_ff=48, num_layers=1, num_heads=4, vocab_size=40)
    )
    with pytest.raises(
        MethodError, match=r"T5ForConditionalGeneration has no list of layers.*encoder\.block \(layer\)"
    ):
        apply_method(t5, section("houlsby"))
    with pytest.raises(MethodError, match=r"Sequential has no list of layers.*its lists are none"):
        apply_method(nn.Sequential(nn.Linear(4, 4)), section("houlsby"))
    albert = transformers.AlbertModel(
        transformers.AlbertConfig(
            hidden_size=32,
            intermediate_size=48,
            num_hidden_layers=2,
            num_attention_heads=4,
            embedding_size=8,
            vocab_size=40,
        )
    )  # its "ffn" is the MLP's first linear alone, and its "attention" adds the residual itself
    with pytest.raises(MethodError, match=r"has no MLP .* that gives 32 numbers a token; it has .*ffn_output"):
        apply_method(albert, section("houlsby"))
    bert = make.build("bert")
    with pytest.raises(MethodError, match=r"a BertLayer, has no whole MLP .*intermediate, output.*Take another method"):
        apply_method(bert, section("parallel"))
    # torch's own encoder layer has a fast path that never calls its linears
    encoder = nn.TransformerEncoder(nn.TransformerEncoderLayer(32, 4, 48, batch_first=True), 1)
    with pytest.raises(MethodError, match=r"its lists are layers \(self_attn, linear1"):
        apply_method(encoder, section("houlsby"))
    for model in (t5, albert, bert, encoder):
        assert not any(isinstance(module, Planted) for module in model.modules())


def test_what_is_planted_stands_for_what_stood_there() -> None:
    model = small_model("gpt2")
    attention = model.transformer.h[1].attn
    apply_method(model, config.Combined(parts=(config.LoRA(r=2), section("houlsby"), section("lin"))))
    assert isinstance(model.transformer.h[1], Planted)
    assert unplanted(model.transformer.h[1].attn) is attention
    assert at(model, "transformer.h.1.attn") is attention
    assert at(model, "transformer.h.1.attention") is None
    layers = find_layers(model)
    assert list(layers) == ["transformer.h.0", "transformer.h.1"]
    assert [width(layer) for layer in layers.values()] == [32, 32]
