"""The laws of modules trained whole: PEFT's modules_to_save, a dense copy that begins as the base, ties that are undone."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from safetensors.torch import load_file
from torch import nn
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForSequenceClassification

from qlora import recipe as config
from qlora.errors import MethodError
from qlora.export.merged import merge
from qlora.methods.base import AdaptedModel, apply_method
from qlora.methods.files import save_adapter
from qlora.methods.loading import load_adapter
from qlora.methods.method import Method
from qlora.methods.modules import ModulesMethod, TrainedModule, dense_copy
from qlora.methods.peft_config import read_adapter_config
from qlora.methods.planted import Planted
from qlora.model.in_memory import as_base
from qlora.model.loss import batch_loss
from qlora.model.nf4 import FrozenLinear
from qlora.recipe import ModelSection
from qlora.residence.layers import wrap_layers
from qlora.residence.load import load_base
from tests.methods.against_peft import BATCH, assert_answers_as, plain_model
from tests.rounding import GRADIENT, rounding
from tests.tiny import FAMILIES, SIZES, TOKENS, difference, logits_of, stir, tiny_base, tiny_checkpoint

LORA = config.LoRA(r=4, alpha=8, target_modules=("layers.0.self_attn.q_proj", "layers.0.mlp.down_proj"))


def with_lora(*modules: str) -> config.Combined:
    return config.Combined(parts=(LORA, config.Modules(modules=modules)))


def their_gradients(theirs: nn.Module) -> dict[str, torch.Tensor]:
    """PEFT's by our names."""
    found = {}
    for name, values in theirs.named_parameters():
        if values.requires_grad and values.grad is not None:
            ours = name.removeprefix("base_model.model.").replace(".modules_to_save.default", "")
            found[ours.replace(".default.weight", "") if "lora_" in ours else ours] = values.grad
    return found


CASES = [
    ("llama", "none", ("lm_head",)),
    ("llama", "nf4", ("lm_head", "model.norm")),
    ("llama", "none", ("layers.1",)),
    ("llama", "none", ("embed_tokens", "layers.1.mlp", "post_attention_layernorm")),
    ("qwen2", "nf4", ("norm", "embed_tokens")),
    ("gemma2", "none", ("lm_head",)),  # tied before
    ("gemma2", "nf4", ("embed_tokens",)),
]


@pytest.mark.parametrize(("family", "quantization", "modules"), CASES)
def test_files_logits_and_gradients_are_pefts(
    tmp_path: Path, family: str, quantization: str, modules: tuple[str, ...]
) -> None:
    folder = tiny_checkpoint(tmp_path / "base", family)
    ours = apply_method(tiny_base(folder, quantization), with_lora(*modules))
    stir(ours)
    save_adapter(ours, tmp_path / "adapter")
    theirs = peft.PeftModel.from_pretrained(
        plain_model(folder, quantization), tmp_path / "adapter", is_trainable=True
    ).train()
    state = peft.get_peft_model_state_dict(theirs, save_embedding_layers=False)
    assert state.keys() == ours.adapter_state().keys()
    found = ours.model(**BATCH)
    expected = theirs(**BATCH)
    found.loss.backward()
    expected.loss.backward()
    assert difference(found.logits, expected.logits) < rounding()
    gradients = their_gradients(theirs)
    assert gradients.keys() == ours.trainable_parameters().keys()
    worst = max(difference(values.grad, gradients[name]) for name, values in ours.trainable_parameters().items())
    print(f"{family} {quantization} {modules}: gradients differ by {worst:.1e}")
    assert worst < rounding(GRADIENT)
    theirs.save_pretrained(tmp_path / "theirs", save_embedding_layers=False)
    again = load_adapter(tiny_base(folder, quantization), tmp_path / "theirs")
    assert torch.equal(logits_of(again.model), logits_of(ours.model))


def test_the_config_names_what_peft_would_find(tmp_path: Path) -> None:
    """PEFT's ``norm`` would be ``input_layernorm`` too."""
    ours = apply_method(tiny_base(tiny_checkpoint(tmp_path / "base")), with_lora("norm", "lm_head"))
    save_adapter(ours, tmp_path / "adapter")
    values = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    assert (values["peft_type"], values["modules_to_save"]) == ("LORA", ["lm_head", "model.norm"])
    keys = [key for key in ours.adapter_state() if "lora_" not in key]
    assert sorted(keys) == ["base_model.model.lm_head.weight", "base_model.model.model.norm.weight"]
    parts = {part.name: part for part in read_adapter_config(tmp_path / "adapter").parts}
    assert parts["modules"].modules == ("lm_head", "model.norm")


@pytest.mark.parametrize("adapter", [config.DoRA(r=2), config.AdaLoRA(r=2, initial_r=3)])
def test_other_low_rank_adapters_take_modules_along(tmp_path: Path, adapter: Any) -> None:
    folder = tiny_checkpoint(tmp_path / "base")
    section = config.Combined(parts=(adapter, config.Modules(modules=("lm_head",))))
    ours = apply_method(tiny_base(folder, "none"), section)
    stir(ours)
    save_adapter(ours, tmp_path / "adapter")
    theirs = peft.PeftModel.from_pretrained(plain_model(folder), tmp_path / "adapter").eval()
    state = peft.get_peft_model_state_dict(theirs, save_embedding_layers=False)
    assert "base_model.model.lm_head.weight" in state
    assert state.keys() == ours.adapter_state().keys()
    assert_answers_as(theirs, ours)


@pytest.mark.parametrize("quantization", ["nf4", "fp4", "int8"])
def test_a_packed_module_becomes_a_dense_one_that_answers_the_same(tmp_path: Path, quantization: str) -> None:
    base = tiny_base(tiny_checkpoint(tmp_path, "qwen2"), quantization)
    layer: Any = base.model.get_submodule("model.layers.1")
    made = dense_copy(layer)
    assert not any(isinstance(module, FrozenLinear) for module in made.modules())
    assert sum(type(module) is nn.Linear for module in made.modules()) == 7
    assert any(isinstance(module, FrozenLinear) for module in layer.modules())
    theirs = {values.data_ptr() for values in (*layer.parameters(), *layer.buffers())}
    assert not theirs & {values.data_ptr() for values in (*made.parameters(), *made.buffers())}
    untouched = logits_of(base.model)
    model = apply_method(base, config.Modules(modules=("layers.1",)))
    assert torch.equal(logits_of(model.model), untouched)
    assert len(model.trainable_parameters()) == 7 + 3 + 2  # weights, biases of q, k and v, norms


def test_names_that_cannot_be_meant_are_refused_in_a_sentence(tmp_path: Path) -> None:
    folder = tiny_checkpoint(tmp_path)
    cases: list[tuple[Any, str]] = [
        (config.Modules(modules=("lm_heads",)), "names 'lm_heads', which no module .* Did you mean 'lm_head'?"),
        (config.Modules(modules=("layers.7",)), "names 'layers.7', which no module"),
        (config.Modules(modules=("layers.1", "layers.1.mlp")), r"'model\.layers\.1' and, inside it, model\.layers\.1\.mlp"),
        (config.Modules(modules=("layers",)), r"'model\.layers', which is a list .* 'model\.layers\.0'"),
        (config.Modules(modules=("model",)), "the whole model but its head; .* method.name=full"),
        (
            config.Combined(parts=(config.LoRA(r=2), config.Modules(modules=("layers.1",)))),
            r"names 'model\.layers\.1', but another method changes model\.layers\.1\.self_attn\.q_proj",
        ),
        (
            config.Combined(parts=(config.LoRA(r=2), config.Modules(modules=("q_proj",)))),
            r"names 'model\.layers\.0\.self_attn\.q_proj', but another method changes model\.layers\.0\.self_attn\.q_proj;",
        ),
        (
            config.Combined(parts=(config.NewTokens(tokens=("<a>",)), config.Modules(modules=("embed_tokens",)))),
            r"names 'model\.embed_tokens', but another method changes model\.embed_tokens;",
        ),
    ]  # fmt: skip
    base = tiny_base(folder)
    untouched = logits_of(base.model)
    tokenizer = base.tokenizer
    for section, message in cases:
        with pytest.raises(MethodError, match=message):
            apply_method(base, section)
        assert not any(isinstance(module, Planted) for module in base.model.modules())
        assert base.tokenizer is tokenizer
        assert torch.equal(logits_of(base.model), untouched)


def test_modules_inside_what_another_method_planted_are_found(tmp_path: Path) -> None:
    """A bottleneck around a layer hides the layer's own path; names, files and the way back are the untouched model's."""
    folder = tiny_checkpoint(tmp_path / "base")
    section = config.Combined(
        parts=(config.Modules(modules=("input_layernorm",)), config.Bottleneck(form="pfeiffer", size=8))
    )
    model = apply_method(tiny_base(folder), section)
    stir(model)
    assert "model.layers.1.input_layernorm.weight" in model.trainable_parameters()
    expected = logits_of(model.model)
    save_adapter(model, tmp_path / "adapter")
    again = load_adapter(tiny_base(folder), tmp_path / "adapter")
    assert torch.equal(logits_of(again.model), expected)
    base = again.remove()
    assert torch.equal(logits_of(base.model), logits_of(tiny_base(folder).model))
    again.attach()
    assert torch.equal(logits_of(again.model), expected)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize(
    "modules", [("lm_head",), ("embed_tokens",), ("embed_tokens", "lm_head"), ("layers.0", "norm")], ids=str
)
@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.sampled
def test_merged_is_the_model_and_a_trained_tie_is_undone(
    tmp_path: Path, family: str, modules: tuple[str, ...], tied: bool
) -> None:
    folder = tiny_checkpoint(tmp_path / "base", family, tie_word_embeddings=tied)
    model = apply_method(tiny_base(folder), config.Modules(modules=modules))
    stir(model)
    save_adapter(model, tmp_path / "adapter")
    merge(folder, tmp_path / "adapter", tmp_path / "out", compute_dtype="fp32", dtype="fp32")
    plain, report = AutoModelForCausalLM.from_pretrained(
        tmp_path / "out", dtype=torch.float32, output_loading_info=True
    )
    assert not any(report.values()), report
    assert difference(logits_of(plain.eval()), logits_of(model.model)) < rounding()
    values = json.loads((tmp_path / "out" / "config.json").read_text())
    still = tied and modules == ("layers.0", "norm")
    assert values["tie_word_embeddings"] is still
    written = load_file(tmp_path / "out" / "model.safetensors")
    assert ("lm_head.weight" in written) is not still
    if tied and modules == ("embed_tokens",):
        assert torch.equal(
            written["lm_head.weight"], load_file(folder / "model.safetensors")["model.embed_tokens.weight"]
        )


def test_parameters_are_trained_in_fp32_and_computed_with_in_the_bases_dtype(tmp_path: Path) -> None:
    section = ModelSection(name=str(tiny_checkpoint(tmp_path)), compute_dtype="bf16")
    base = load_base(section, torch.device("cpu"))
    untouched = logits_of(base.model)
    model = apply_method(base, config.Modules(modules=("lm_head", "layers.1", "embed_tokens"), adapter_dtype="fp32"))
    assert {values.dtype for values in model.trainable_parameters().values()} == {torch.float32}
    assert torch.equal(logits_of(model.model), untouched)
    output = model.model(input_ids=TOKENS, labels=TOKENS, use_cache=False)
    assert output.logits.dtype == torch.bfloat16
    output.loss.backward()
    for values in model.trainable_parameters().values():
        assert values.grad.dtype == torch.float32
        assert values.grad.any()
    planted: Any = model.planted["lm_head"]
    assert (
        planted.weight.dtype == torch.bfloat16
    )  # a parent that reads the weight gets the copy's, in the dtype it expects
    with torch.no_grad():
        model.trainable_parameters()["lm_head.weight"].fill_(3.0)
    assert (planted.weight == 3).all()
    with model.disabled():
        assert not (planted.weight == 3).all()


def test_a_whole_layer_trains_behind_the_recompute_boundary(tmp_path: Path) -> None:
    folder = tiny_checkpoint(tmp_path, "gemma2")
    batch = {
        "input_ids": TOKENS.repeat(2, 1),
        "position_ids": torch.arange(12).expand(4, 12),
        "labels": TOKENS.repeat(2, 1),
    }

    def gradients(rows: int | None) -> dict[str, torch.Tensor]:
        model = apply_method(tiny_base(folder), with_lora("layers.1", "lm_head"))
        stir(model)
        if rows is not None:
            wrap_layers(model.model, rows)
        batch_loss(model.model.train(), batch, 7)[0].backward()
        return {name: values.grad for name, values in model.trainable_parameters().items()}

    expected = gradients(None)
    for rows in (1, 3, 4):
        for name, values in gradients(rows).items():
            assert difference(values, expected[name]) < rounding(GRADIENT), name


def classifier() -> Any:
    torch.manual_seed(0)
    return LlamaForSequenceClassification(LlamaConfig(**SIZES, initializer_range=0.08, num_labels=3)).eval()


def scores(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return model(input_ids=TOKENS, attention_mask=torch.ones_like(TOKENS)).logits


def test_a_classifiers_head_trains_and_peft_knows_it(tmp_path: Path) -> None:
    model: AdaptedModel = apply_method(classifier(), config.Combined(parts=(LORA, config.Modules(modules=("score",)))))
    before = scores(model.model)
    optimizer = torch.optim.AdamW(model.trainable_parameters().values(), lr=1e-2)
    for _ in range(8):
        loss = model.model(input_ids=TOKENS, attention_mask=torch.ones_like(TOKENS), labels=torch.tensor([0, 2])).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    assert loss < 0.2
    with model.disabled():
        assert torch.equal(scores(model.model), before)
    save_adapter(model, tmp_path / "ours")
    theirs = peft.PeftModel.from_pretrained(classifier(), tmp_path / "ours").eval()
    assert set(peft.get_peft_model_state_dict(theirs, save_embedding_layers=False)) == set(model.adapter_state())
    assert difference(scores(theirs), scores(model.model)) < rounding()


def test_a_classifier_of_pefts_loads(tmp_path: Path) -> None:
    """PEFT writes the names of both heads that a classifier may have."""
    lora = peft.LoraConfig(r=2, target_modules=["q_proj"], task_type="SEQ_CLS", init_lora_weights=False)
    theirs = peft.get_peft_model(classifier(), lora).eval()
    nn.init.normal_(theirs.base_model.model.score.modules_to_save["default"].weight)
    theirs.save_pretrained(tmp_path, save_embedding_layers=False)
    values = json.loads((tmp_path / "adapter_config.json").read_text())
    assert sorted(values["modules_to_save"]) == ["classifier", "score"]
    ours = load_adapter(as_base(classifier()), tmp_path)
    assert list(ours.planted)[-1] == "score"
    assert difference(scores(ours.model), scores(theirs)) < rounding()


def test_a_copys_buffers_are_saved(tmp_path: Path) -> None:
    def network() -> nn.Module:
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6), nn.Linear(6, 2))

    model = apply_method(network(), config.Modules(modules=("1",)))
    model.model.train()(torch.randn(8, 4))
    save_adapter(model, tmp_path)
    assert "base_model.model.1.running_mean" in load_file(tmp_path / "adapter_model.safetensors")
    again = load_adapter(apply_method(network(), config.Modules(modules=("1",))), tmp_path)
    x = torch.randn(5, 4)
    assert torch.equal(again.model.eval()(x), model.model.eval()(x))
    planted = again.planted["1"]
    assert isinstance(planted, TrainedModule)
    assert planted.module.running_mean.any()
    assert list(again.trainable_parameters()) == ["1.weight", "1.bias"]


def test_a_norm_moves_under_auto_on_cuda(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Beside a bf16 base on CUDA adapters are kept in bf16, in which a weight of 1 cannot take a step of 1e-4."""
    decided: Any = vars(Method)["trained_dtype"].__func__
    on_cuda = classmethod(lambda cls, asked, _, dtype: decided(cls, asked, torch.device("cuda"), dtype))
    monkeypatch.setattr(Method, "trained_dtype", on_cuda)
    base = load_base(ModelSection(name=str(tiny_checkpoint(tmp_path)), compute_dtype="bf16"), torch.device("cpu"))
    model = apply_method(base, config.Modules(modules=("norm",)))
    (norm,) = model.trainable_parameters().values()
    assert norm.dtype == torch.float32
    before = norm.detach().clone()
    optimizer = torch.optim.AdamW([norm], lr=1e-4, weight_decay=0.0)
    model.model(input_ids=TOKENS, labels=TOKENS, use_cache=False).loss.backward()
    optimizer.step()
    assert (norm != before).float().mean() > 0.9
    asked = ModulesMethod.trained_dtype("bf16", torch.device("cuda"), torch.bfloat16)
    assert asked == torch.bfloat16
