"""The laws of BitFit: the biases' own gradients, step 0 = the base, merged into plain models that have a place for them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import (
    AutoModelForCausalLM,
    BertConfig,
    BertForSequenceClassification,
    GPT2Config,
    GPT2LMHeadModel,
    GPTNeoXConfig,
    GPTNeoXForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from qlora import recipe as config
from qlora.errors import MethodError
from qlora.export.merged import merge
from qlora.methods.base import AdaptedModel, apply_method
from qlora.methods.bitfit import BiasLayer, BitFitMethod
from qlora.methods.files import save_adapter
from qlora.methods.loading import load_adapter
from qlora.model.loss import batch_loss
from qlora.residence.layers import wrap_layers
from tests import tiny
from tests.rounding import GRADIENT, rounding
from tests.tiny import TOKENS, difference, logits_of, tiny_base, tiny_checkpoint

SECTION = config.BitFit()
NEW = config.BitFit(new_biases=True)
QUIET = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}  # GPT-2's dropout
BATCH = {"input_ids": TOKENS, "labels": TOKENS, "position_ids": torch.arange(12).expand(2, 12)}
FAMILIES = {
    "gpt2": (GPT2Config, GPT2LMHeadModel),  # biases on all linears (Conv1D) and LayerNorms
    "gpt_neox": (GPTNeoXConfig, GPTNeoXForCausalLM),  # the same on plain linears, so that it has a 4-bit form
    "qwen3": (Qwen3Config, Qwen3ForCausalLM),  # no biases; its configuration has a place for them in attention alone
}


@pytest.fixture(autouse=True)
def families(monkeypatch: pytest.MonkeyPatch) -> None:
    for family, classes in FAMILIES.items():
        monkeypatch.setitem(tiny.FAMILIES, family, classes)


def stir(model: AdaptedModel, size: float = 0.3) -> None:
    generator = torch.Generator().manual_seed(7)
    for values in model.trainable_parameters().values():
        values.data += torch.randn(values.shape, generator=generator) * size


def merged_logits(base: Path, adapter: Path, out: Path, quantization: Any) -> Tensor:
    merge(base, adapter, out, quantization=quantization, compute_dtype="fp32", dtype="fp32")
    plain, report = AutoModelForCausalLM.from_pretrained(out, dtype=torch.float32, output_loading_info=True)
    assert not any(report.values()), report
    return logits_of(plain.eval())


@pytest.mark.parametrize("family", ["gpt2", "gpt_neox", "qwen2"])
def test_gradients_are_those_of_the_models_own_biases(tmp_path: Path, family: str) -> None:
    """Of every bias in the model, the LayerNorms' too: that is what the paper trains."""
    folder = tiny_checkpoint(tmp_path, family, **QUIET)
    plain = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    ours = apply_method(tiny_base(folder, "none"), SECTION)
    found = ours.model(input_ids=TOKENS, labels=TOKENS, use_cache=False)
    expected = plain(input_ids=TOKENS, labels=TOKENS, use_cache=False)
    assert torch.equal(found.logits, expected.logits)
    found.loss.backward()
    expected.loss.backward()
    biases = {name: values for name, values in plain.named_parameters() if name.endswith(".bias")}
    trained = {name.replace("trained_bias", "bias"): v for name, v in ours.trainable_parameters().items()}
    assert trained.keys() == biases.keys()
    assert all(torch.equal(trained[name], values) for name, values in biases.items())
    worst = max(difference(trained[name].grad, values.grad) for name, values in biases.items())
    print(f"{family}: gradients {worst:.1e}")
    assert worst < rounding(GRADIENT)


@pytest.mark.parametrize(("family", "quantization"), [("qwen2", "nf4"), ("gpt_neox", "nf4"), ("gpt_neox", "int8")])
def test_quantised_linears_train_their_biases(tmp_path: Path, family: str, quantization: str) -> None:
    """Against the derivative by differences: a quantised linear's own bias gets no gradient."""
    base = tiny_base(tiny_checkpoint(tmp_path, family), quantization)
    before = logits_of(base.model)
    model = apply_method(base, SECTION)
    assert torch.equal(logits_of(model.model), before)
    parameters = model.trainable_parameters()

    def loss() -> Tensor:
        return batch_loss(model.model, BATCH, 64)[0]

    loss().backward()
    for name in list(parameters)[:: len(parameters) // 4]:
        values = parameters[name]
        assert values.grad is not None
        direction = values.grad / values.grad.norm()
        with torch.no_grad():
            values += 1e-2 * direction
            up = loss()
            values -= 2e-2 * direction
            down = loss()
            values += 1e-2 * direction
        torch.testing.assert_close((up - down) / 2e-2, values.grad.norm(), rtol=2e-2, atol=0)


def test_all_linear_means_the_norms_too_and_names_mean_themselves(tmp_path: Path) -> None:
    folder = tiny_checkpoint(tmp_path, "gpt2")
    every = apply_method(tiny_base(folder, "none"), SECTION)
    assert {"transformer.ln_f", "transformer.h.1.ln_2", "transformer.h.0.attn.c_proj"} <= every.planted.keys()
    assert len(every.planted) == 2 * 6 + 1
    assert every.count_trainable() == 2 * (64 + 192 + 64 + 64 + 256 + 64) + 64
    some = apply_method(tiny_base(folder, "none"), config.BitFit(target_modules=("ln_1", "c_attn")))
    assert sorted(some.planted) == [
        f"transformer.h.{layer}.{name}" for layer in (0, 1) for name in ("attn.c_attn", "ln_1")
    ]


def test_without_biases_it_says_what_to_set(tmp_path: Path) -> None:
    base = tiny_base(tiny_checkpoint(tmp_path / "llama"))
    before = list(base.model.state_dict())
    with pytest.raises(MethodError, match=r"no target in LlamaForCausalLM has one .*q_proj.*new_biases=true"):
        apply_method(base, SECTION)
    assert list(base.model.state_dict()) == before
    qwen = tiny_base(tiny_checkpoint(tmp_path / "qwen2", "qwen2"))
    with pytest.raises(MethodError, match=r"names o_proj, which has no bias in Qwen2ForCausalLM.*new_biases=true"):
        apply_method(qwen, config.BitFit(target_modules=("o_proj", "q_proj")))


@pytest.mark.parametrize(
    ("family", "quantization"), [("gpt2", "none"), ("gpt_neox", "nf4"), ("qwen2", "nf4"), ("qwen2", "int8")]
)
def test_learned_biases_merge(tmp_path: Path, family: str, quantization: str) -> None:
    folder = tiny_checkpoint(tmp_path / "base", family)
    ours = apply_method(tiny_base(folder, quantization), SECTION)
    stir(ours)
    save_adapter(ours, tmp_path / "adapter")
    found = merged_logits(folder, tmp_path / "adapter", tmp_path / "out", quantization)
    worst = difference(found, logits_of(ours.model))
    print(f"{family} {quantization}: merged {worst:.1e}")
    assert worst < rounding()
    with ours.disabled():
        assert difference(found, logits_of(ours.model)) > 1e-2
    assert load_file(folder / "model.safetensors").keys() == load_file(tmp_path / "out" / "model.safetensors").keys()


@pytest.mark.parametrize("targets", ["all-linear", ("q_proj", "layers.1.mlp.up_proj"), ("down_proj",)])
def test_new_biases_merge_into_llama(tmp_path: Path, targets: Any) -> None:
    """A Llama has biases on all linears of its attention, or of its MLP, or on none: the others are zeros."""
    folder = tiny_checkpoint(tmp_path / "base", shard="100KB")
    base = tiny_base(folder)
    before = logits_of(base.model)
    ours = apply_method(base, NEW.model_copy(update={"target_modules": targets}))
    assert torch.equal(logits_of(ours.model), before)
    stir(ours)
    save_adapter(ours, tmp_path / "adapter")
    found = merged_logits(folder, tmp_path / "adapter", tmp_path / "out", "nf4")
    assert difference(found, logits_of(ours.model)) < rounding()
    assert difference(found, before) > 1e-2
    values = json.loads((tmp_path / "out" / "config.json").read_text())
    assert values["attention_bias"] is (targets != ("down_proj",))
    assert values["mlp_bias"] is True


def test_new_biases_merge_where_the_architecture_has_a_place(tmp_path: Path) -> None:
    folder = tiny_checkpoint(tmp_path / "base", "qwen3")
    ours = apply_method(tiny_base(folder), NEW.model_copy(update={"target_modules": ("q_proj", "o_proj")}))
    stir(ours)
    save_adapter(ours, tmp_path / "adapter")
    found = merged_logits(folder, tmp_path / "adapter", tmp_path / "out", "nf4")
    assert difference(found, logits_of(ours.model)) < rounding()
    assert json.loads((tmp_path / "out" / "config.json").read_text())["attention_bias"] is True


@pytest.mark.parametrize(
    ("family", "lacking"), [("qwen3", "down_proj, gate_proj, up_proj"), ("qwen2", "o_proj, up_proj")]
)
def test_where_there_is_no_place_a_sentence_says_so(tmp_path: Path, family: str, lacking: str) -> None:
    folder = tiny_checkpoint(tmp_path / "base", family)
    ours = apply_method(tiny_base(folder), NEW)
    save_adapter(ours, tmp_path / "adapter")
    with pytest.raises(
        MethodError, match=f"cannot be merged: a {family} model has no place for biases in .*{lacking};"
    ):
        merge(folder, tmp_path / "adapter", tmp_path / "out", compute_dtype="fp32")
    assert not (tmp_path / "out").exists()
    assert "new" not in (ours.methods[0].layout.why_not_portable() or "new")


def test_saved_under_the_names_of_a_plain_model(tmp_path: Path) -> None:
    folder = tiny_checkpoint(tmp_path / "base", "qwen2")
    ours = apply_method(tiny_base(folder), SECTION)
    stir(ours)
    save_adapter(ours, tmp_path / "adapter")
    stored = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    key = "base_model.model.model.layers.0.self_attn.q_proj.bias"
    assert len(stored) == 6
    assert torch.equal(stored[key], ours.planted["model.layers.0.self_attn.q_proj"].trained_bias)
    assert json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())["peft_type"] == "QLORA"
    again = load_adapter(tiny_base(folder), tmp_path / "adapter")
    assert torch.equal(logits_of(again.model), logits_of(ours.model))


def test_biases_stay_fp32_unless_bf16_is_asked_for() -> None:
    cuda = torch.device("cuda")
    assert BitFitMethod.trained_dtype("auto", cuda, torch.bfloat16) == torch.float32
    assert BitFitMethod.trained_dtype("bf16", cuda, torch.bfloat16) == torch.bfloat16


def test_small_steps_count_beside_large_bf16_biases() -> None:
    linear = nn.Linear(4, 4).bfloat16().requires_grad_(False)
    nn.init.constant_(linear.bias, 100.0)
    nn.init.zeros_(linear.weight)
    model = apply_method(nn.ModuleDict({"a": linear, "head": nn.Linear(4, 4)}), config.BitFit(target_modules=("a",)))
    (bias,) = model.trainable_parameters().values()
    assert bias.dtype == torch.float32
    for _ in range(100):  # bf16 has 100 and 100.5, and nothing in between
        bias.data += 0.01
    y = linear_of(model)(torch.zeros(2, 4, dtype=torch.bfloat16))
    assert y.dtype == torch.bfloat16
    assert (y == 101).all()


def linear_of(model: AdaptedModel) -> BiasLayer:
    layer = model.planted["a"]
    assert isinstance(layer, BiasLayer)
    return layer


def test_behind_the_recompute_boundary(tmp_path: Path) -> None:
    """The final norm is outside of the layers, the others inside; all get their gradients."""
    folder = tiny_checkpoint(tmp_path, "gpt_neox", hidden_dropout=0.0, attention_dropout=0.0)
    grads = []
    for wrapped in (False, True):
        model = apply_method(tiny_base(folder), SECTION)
        stir(model)
        model.model.train()
        if wrapped:
            wrap_layers(model.model, 1)
        batch_loss(model.model, BATCH, 64)[0].backward()
        grads.append({name: values.grad for name, values in model.trainable_parameters().items()})
    assert max(difference(grads[1][name], grad) for name, grad in grads[0].items()) < rounding(GRADIENT)
    assert all(grad.any() for name, grad in grads[1].items())


def test_an_encoder_with_a_classifier() -> None:
    """A module that came from no folder; its head keeps its bias as it is."""
    values = BertConfig(hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=64, vocab_size=96)
    network = BertForSequenceClassification(values).eval()
    with torch.no_grad():
        before = network(TOKENS).logits
    model = apply_method(network, SECTION)
    with torch.no_grad():
        assert torch.equal(model.model(TOKENS).logits, before)
    assert "bert.embeddings.LayerNorm" in model.planted
    assert "bert.encoder.layer.1.attention.output.LayerNorm" in model.planted
    assert "classifier" not in model.planted
    assert model.methods[0].merge.why_not() is None


def test_a_channels_first_norm_is_left_alone() -> None:
    class ChannelsFirst(nn.LayerNorm):
        data_format = "channels_first"

    with pytest.raises(MethodError, match=r"names 'norm', but .* \(\w+\) is no linear or LayerNorm"):
        apply_method(
            nn.ModuleDict({"norm": ChannelsFirst(4), "a": nn.Linear(4, 4)}), config.BitFit(target_modules=("norm",))
        )


def test_two_methods_on_one_module_are_refused(tmp_path: Path) -> None:
    parts = (config.LoRA(r=2, target_modules=("c_attn",)), config.BitFit(target_modules=("ln_1", "c_attn")))
    with pytest.raises(MethodError, match="Two methods want to change"):
        apply_method(tiny_base(tiny_checkpoint(tmp_path, "gpt2"), "none"), config.Combined(parts=parts))


def test_beside_lora_on_other_modules(tmp_path: Path) -> None:
    parts = (config.LoRA(r=2, target_modules=("c_attn",)), config.BitFit(target_modules=("ln_1", "ln_2", "ln_f")))
    folder = tiny_checkpoint(tmp_path / "base", "gpt2")
    ours = apply_method(tiny_base(folder, "none"), config.Combined(parts=parts))
    stir(ours, 0.1)
    save_adapter(ours, tmp_path / "adapter")
    found = merged_logits(folder, tmp_path / "adapter", tmp_path / "out", "none")
    assert difference(found, logits_of(ours.model)) < rounding()
