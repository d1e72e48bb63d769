"""The laws of (IA)³: PEFT's forward and gradients, its files both ways, merging, and which linears families call what."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    BitsAndBytesConfig,
    GPT2Config,
    GPT2LMHeadModel,
    OPTConfig,
    OPTForCausalLM,
)

from qlora import recipe as config
from qlora.errors import MethodError
from qlora.export.merged import merge
from qlora.methods.base import AdaptedModel, apply_method
from qlora.methods.files import save_adapter
from qlora.methods.ia3 import Ia3Linear, Ia3Method
from qlora.methods.loading import load_adapter
from tests import tiny
from tests.methods.against_peft import assert_answers_as
from tests.rounding import GRADIENT, rounding
from tests.tiny import TOKENS, difference, logits_of, tiny_base, tiny_checkpoint

TARGETS = {
    "llama": (["k_proj", "v_proj", "down_proj"], ["down_proj"]),
    "qwen2": (["k_proj", "v_proj", "down_proj"], ["down_proj"]),
    "opt": (["k_proj", "v_proj", "fc2"], ["fc2"]),
    "gpt2": (["c_attn", "mlp.c_proj"], ["mlp.c_proj"]),
}
QUIET = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0, "dropout": 0.0}  # of GPT-2 and OPT


@pytest.fixture(autouse=True)
def families(monkeypatch: pytest.MonkeyPatch) -> None:
    """With biases everywhere: Conv1D, and plain linears."""
    monkeypatch.setitem(tiny.FAMILIES, "gpt2", (GPT2Config, GPT2LMHeadModel))
    monkeypatch.setitem(tiny.FAMILIES, "opt", (OPTConfig, OPTForCausalLM))


def stir(model: AdaptedModel) -> None:
    """Move every vector away from one; some numbers change their sign."""
    generator = torch.Generator().manual_seed(7)
    for values in model.trainable_parameters().values():
        values.data += torch.randn(values.shape, generator=generator) * 0.5


def peft_model(folder: Path, family: str, quantization: str) -> Any:
    quantised = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.float32,
    )
    model = AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, quantization_config=quantised if quantization == "nf4" else None
    )
    targets, ends = TARGETS[family]
    ia3 = peft.IA3Config(target_modules=targets, feedforward_modules=ends, task_type="CAUSAL_LM")
    return peft.get_peft_model(model, ia3).train()


@pytest.mark.parametrize(
    ("family", "quantization"),
    [("llama", "nf4"), ("qwen2", "nf4"), ("qwen2", "none"), ("opt", "none"), ("gpt2", "none")],
)
@pytest.mark.sampled
def test_logits_and_gradients_are_those_of_peft(tmp_path: Path, family: str, quantization: str) -> None:
    folder = tiny_checkpoint(tmp_path, family, **QUIET)
    ours = apply_method(tiny_base(folder, quantization), config.IA3())
    stir(ours)
    theirs = peft_model(folder, family, quantization)
    missing = peft.set_peft_model_state_dict(theirs, ours.adapter_state())
    assert not missing.unexpected_keys
    assert peft.get_peft_model_state_dict(theirs).keys() == ours.adapter_state().keys()
    found = ours.model(input_ids=TOKENS, labels=TOKENS, use_cache=False)
    expected = theirs(input_ids=TOKENS, labels=TOKENS, use_cache=False)
    found.loss.backward()
    expected.loss.backward()
    with ours.disabled():
        assert difference(logits_of(ours.model), expected.logits) > 1e-2  # the adapter matters
    assert difference(found.logits, expected.logits) < rounding()
    gradients = {
        name.removeprefix("base_model.model.").replace(".default", ""): values.grad.flatten()
        for name, values in theirs.named_parameters()
        if "ia3_l" in name
    }
    assert gradients.keys() == ours.trainable_parameters().keys()
    worst = max(difference(values.grad, gradients[name]) for name, values in ours.trainable_parameters().items())
    print(f"{family} {quantization}: logits {difference(found.logits, expected.logits):.1e}, gradients {worst:.1e}")
    assert worst < rounding(GRADIENT)


@pytest.mark.parametrize("family", TARGETS)
def test_peft_loads_ours_whole(tmp_path: Path, family: str) -> None:
    folder = tiny_checkpoint(tmp_path / "base", family)
    ours = apply_method(tiny_base(folder, "none"), config.IA3())
    stir(ours)
    save_adapter(ours, tmp_path / "adapter")
    plain = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    theirs = peft.PeftModel.from_pretrained(plain, tmp_path / "adapter").eval()
    state = peft.get_peft_model_state_dict(theirs)
    assert state.keys() == ours.adapter_state().keys()
    assert all(torch.equal(values, ours.adapter_state()[key]) for key, values in state.items())
    assert_answers_as(theirs, ours)


@pytest.mark.parametrize("family", TARGETS)
@pytest.mark.sampled
def test_we_load_what_peft_saves(tmp_path: Path, family: str) -> None:
    folder = tiny_checkpoint(tmp_path / "base", family)
    theirs = peft_model(folder, family, "none").eval()
    torch.manual_seed(3)
    for name, values in theirs.named_parameters():
        if "ia3_l" in name:
            values.data += torch.randn_like(values) * 0.5
    theirs.save_pretrained(tmp_path / "adapter")
    ours = load_adapter(tiny_base(folder, "none"), tmp_path / "adapter")
    assert_answers_as(theirs, ours)
    save_adapter(ours, tmp_path / "again")
    before, after = (load_file(tmp_path / way / "adapter_model.safetensors") for way in ("adapter", "again"))
    assert before.keys() == after.keys()
    assert all(torch.equal(values, after[key]) for key, values in before.items())
    with torch.no_grad():
        merged = theirs.merge_and_unload()
    merge(folder, tmp_path / "again", tmp_path / "out", quantization="none", compute_dtype="fp32", dtype="fp32")
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32)
    for name, values in plain.state_dict().items():
        assert difference(values, merged.state_dict()[name]) < rounding(), name


@pytest.mark.parametrize(("family", "quantization"), [("qwen2", "nf4"), ("opt", "int8"), ("gpt2", "none")])
def test_merged_is_the_adapter_model(tmp_path: Path, family: str, quantization: Any) -> None:
    """Biases of keys and values are rescaled with their rows; the MLP's last bias is left alone."""
    folder = tiny_checkpoint(tmp_path / "base", family)
    ours = apply_method(tiny_base(folder, quantization), config.IA3())
    stir(ours)
    save_adapter(ours, tmp_path / "adapter")
    merge(folder, tmp_path / "adapter", tmp_path / "out", quantization=quantization, compute_dtype="fp32", dtype="fp32")
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32).eval()
    worst = difference(logits_of(plain), logits_of(ours.model))
    print(f"{family} {quantization}: merged {worst:.1e}")
    assert worst < rounding()
    with ours.disabled():
        assert difference(logits_of(plain), logits_of(ours.model)) > 1e-2


@pytest.mark.parametrize("family", TARGETS)
def test_the_adapter_starts_as_the_base_in_fp32_vectors(tmp_path: Path, family: str) -> None:
    base = tiny_base(tiny_checkpoint(tmp_path, family), "none" if family == "gpt2" else "nf4")
    before = logits_of(base.model)
    model = apply_method(base, config.IA3())
    assert torch.equal(logits_of(model.model), before)
    # vectors, so that weight decay, which is for matrices, leaves them alone
    assert all(values.dim() == 1 and (values == 1).all() for values in model.trainable_parameters().values())


def test_vectors_stay_fp32_unless_bf16_is_asked_for() -> None:
    cuda = torch.device("cuda")
    assert Ia3Method.trained_dtype("auto", cuda, torch.bfloat16) == torch.float32
    assert Ia3Method.trained_dtype("bf16", cuda, torch.bfloat16) == torch.bfloat16


@pytest.mark.parametrize("feedforward", [False, True])
def test_small_steps_count_beside_bf16_activations(feedforward: bool) -> None:
    linear = nn.Linear(8, 8, bias=False).bfloat16().requires_grad_(False)
    nn.init.eye_(linear.weight)
    layer = Ia3Linear(linear, torch.full((8,), 1.003), feedforward)  # one, if it were rounded to bf16
    y = layer(torch.full((4, 8), 255.0, dtype=torch.bfloat16))
    assert (y == 256).all()
    y.sum().backward()
    assert y.dtype == torch.bfloat16
    assert layer.ia3_l.grad is not None
    assert layer.ia3_l.grad.dtype == torch.float32


@pytest.mark.parametrize("feedforward", [False, True])
def test_gradients_are_derivatives(feedforward: bool) -> None:
    linear = nn.Linear(5, 4).double().requires_grad_(False)
    layer = Ia3Linear(linear, torch.randn(5 if feedforward else 4, dtype=torch.float64), feedforward)
    x = torch.randn(2, 3, 5, dtype=torch.float64, requires_grad=True)

    def forward(x: Tensor, ia3_l: Tensor) -> Tensor:
        answer: Tensor = torch.func.functional_call(layer, {"ia3_l": ia3_l}, (x,))
        return answer

    assert torch.autograd.gradcheck(forward, (x, layer.ia3_l))
    expected = linear(x * layer.ia3_l) if feedforward else linear(x) * layer.ia3_l
    torch.testing.assert_close(layer(x), expected)


KNOWN = {
    "llama": "k_proj v_proj down_proj*",
    "mistral": "k_proj v_proj down_proj*",
    "qwen2": "k_proj v_proj down_proj*",
    "gemma": "k_proj v_proj down_proj*",
    "phi3": "qkv_proj down_proj*",
    "gpt2": "attn.c_attn mlp.c_proj*",
    "gpt_bigcode": "attn.c_attn mlp.c_proj*",
    "gptj": "k_proj v_proj fc_out*",
    "gpt_neox": "query_key_value dense_4h_to_h*",
    "bloom": "query_key_value dense_4h_to_h*",
    "falcon": "query_key_value dense_4h_to_h*",
    "mpt": "Wqkv ffn.down_proj*",
    "opt": "k_proj v_proj fc2*",
    "bert": "self.key self.value layer.*.output.dense*",
    "distilbert": "k_lin v_lin ffn.lin2*",
    "albert": "key value ffn_output*",
    "deberta-v2": "key_proj value_proj output.dense*",
    "vit": "k_proj v_proj fc2*",
    "t5": "SelfAttention.k SelfAttention.v EncDecAttention.k EncDecAttention.v DenseReluDense.wo*",
    "deepseek_v3": "kv_b_proj down_proj*",
}


@pytest.mark.parametrize("kind", KNOWN)
def test_auto_finds_the_linears_of_a_family(kind: str) -> None:
    values = AutoConfig.for_model(kind)
    for depth in ("num_hidden_layers", "num_layers", "n_layer", "first_k_dense_replace"):
        if hasattr(values, depth):
            setattr(values, depth, 2)
    with torch.device("meta"):
        network = AutoModel.from_config(values)
    model = apply_method(network, config.IA3())
    expected = KNOWN[kind].split()
    for path, layer in model.planted.items():
        names = [name for name in expected if name.endswith("*") is layer.feedforward]
        ends = [name.removesuffix("*").rpartition("*.")[2] for name in names]
        assert any(path.endswith(f".{end}") for end in ends), path
        assert "attention.output" not in path
    reached = {
        end for end in expected for path in model.planted if path.endswith(end.removesuffix("*").rpartition("*.")[2])
    }
    assert reached == set(expected)
    assert all(values.is_meta for values in model.trainable_parameters().values())


@pytest.mark.parametrize(
    ("kind", "words"),
    [
        ("mixtral", r"experts of MixtralModel are fused.*feedforward_modules=\[\]"),
        ("mamba", r"end of an MLP.*feedforward_modules.*in_proj"),
    ],
)
def test_what_auto_does_not_know_is_said(kind: str, words: str) -> None:
    with torch.device("meta"):
        network = AutoModel.from_config(AutoConfig.for_model(kind, num_hidden_layers=1))
    with pytest.raises(MethodError, match=words):
        apply_method(network, config.IA3())
    with pytest.raises(MethodError, match="both empty"):
        apply_method(network, config.IA3(target_modules=(), feedforward_modules=()))


def test_fused_experts_are_left_out_when_asked(tmp_path: Path) -> None:
    with torch.device("meta"):
        network = AutoModel.from_config(AutoConfig.for_model("mixtral", num_hidden_layers=1))
    model = apply_method(network, config.IA3(feedforward_modules=()))
    assert sorted(model.planted) == ["layers.0.self_attn.k_proj", "layers.0.self_attn.v_proj"]


def test_names_of_ones_own(tmp_path: Path) -> None:
    """As PEFT's users write them: a linear that is named twice is the MLP's."""
    folder = tiny_checkpoint(tmp_path / "base")
    section = config.IA3(
        target_modules=("layers.1.mlp.down_proj", "q_proj"), feedforward_modules=("layers.1.mlp.down_proj",)
    )
    model = apply_method(tiny_base(folder), section)
    assert [path for path, layer in model.planted.items() if layer.feedforward] == ["model.layers.1.mlp.down_proj"]
    assert len(model.planted) == 3
    stir(model)
    save_adapter(model, tmp_path / "adapter")
    values = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    assert values["feedforward_modules"] == ["model.layers.1.mlp.down_proj"]
    assert set(values["feedforward_modules"]) < set(values["target_modules"])
    again = load_adapter(tiny_base(folder), tmp_path / "adapter")
    assert torch.equal(logits_of(again.model), logits_of(model.model))


def test_a_name_that_ends_another_is_written_out(tmp_path: Path) -> None:
    """PEFT takes ``kv_fc`` for feedforward when ``fc`` is."""
    network = nn.ModuleDict({"kv_fc": nn.Linear(4, 4), "fc": nn.Linear(4, 4)})
    block = nn.ModuleDict({"layers": nn.ModuleList([network])})
    model = apply_method(block, config.IA3(target_modules=("kv_fc",), feedforward_modules=("fc",)))
    values = model.methods[0].layout.peft_config(model.paths)
    ends = tuple(values["feedforward_modules"])
    assert [path for path in model.planted if path.endswith(ends)] == ["layers.0.fc"]
    assert set(ends) <= set(values["target_modules"])


def test_what_is_not_supported_is_refused_by_name(tmp_path: Path) -> None:
    folder = tiny_checkpoint(tmp_path / "base")
    save_adapter(apply_method(tiny_base(folder), config.IA3()), tmp_path / "adapter")
    file = tmp_path / "adapter" / "adapter_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "modules_to_save": ["lm_head"]}))
    with pytest.raises(MethodError, match="modules_to_save"):
        load_adapter(tiny_base(folder), tmp_path / "adapter")
