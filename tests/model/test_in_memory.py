"""A module in memory: quantised as a loaded checkpoint is, described as a base, copied without its weights."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from transformers import BertConfig, BertForSequenceClassification, LlamaConfig, LlamaForCausalLM

from qlora.errors import ModelError
from qlora.model.checks import check_packing
from qlora.model.in_memory import as_base, main_dtype, on_meta, quantise
from qlora.model.nf4 import FrozenLinear, Linear4bit, Linear8bit, dense_weight
from qlora.recipe import ModelSection
from qlora.residence.load import load_base
from tests.tiny import HYBRIDS, random_model

SIZES = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4}
CPU = torch.device("cpu")


def llama() -> LlamaForCausalLM:
    torch.manual_seed(0)
    return LlamaForCausalLM(LlamaConfig(vocab_size=96, num_key_value_heads=2, initializer_range=0.2, **SIZES)).eval()


def bert() -> BertForSequenceClassification:
    torch.manual_seed(0)
    return BertForSequenceClassification(BertConfig(vocab_size=96, **SIZES)).eval()


def test_packed_examples_of_a_hybrid_in_memory_do_not_see_each_other() -> None:
    family, sizes, _ = HYBRIDS["mamba-2"]
    model = random_model(family, num_hidden_layers=3, **sizes)
    ids = [5, 17, 31, 42, 8, 66, 90, 23, 4, 77, 12, 58, 39, 6, 81, 20]
    with pytest.raises(ModelError, match="see each other"):
        check_packing(model, ids)
    check_packing(as_base(model).model, ids)


@pytest.mark.parametrize("double_quant", [True, False])
@pytest.mark.parametrize("quantization", ["nf4", "fp4", "int8"])
def test_the_same_bits_as_a_checkpoint_that_is_loaded(
    tmp_path_factory: pytest.TempPathFactory, quantization: str, double_quant: bool
) -> None:
    folder = tmp_path_factory.mktemp("saved")
    llama().save_pretrained(folder)
    (folder / "tokenizer.json").write_text(TOKENIZER, encoding="utf-8")
    (folder / "tokenizer_config.json").write_text(
        '{"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "a"}', encoding="utf-8"
    )
    section = ModelSection(name=str(folder), quantization=quantization, double_quant=double_quant, compute_dtype="fp32")  # type: ignore[arg-type]
    loaded = load_base(section, CPU).model
    ours = quantise(llama(), quantization, double_quant)
    expected, found = loaded.state_dict(), ours.state_dict()
    assert expected.keys() == found.keys()
    assert all(torch.equal(found[name], values) for name, values in expected.items())
    assert [path for path, module in ours.named_modules() if type(module) is nn.Linear] == ["lm_head"]
    base = as_base(ours)
    assert (base.quantization, base.double_quant) == (quantization, double_quant and quantization != "int8")


TOKENIZER = '{"version": "1.0", "added_tokens": [], "model": {"type": "WordLevel", "vocab": {"a": 0, "b": 1}, "unk_token": "a"}}'


def test_skipped_linears_and_the_head_stay_as_they_are() -> None:
    model, plain = bert(), bert()
    assert quantise(model, skip=("pooler", "layer.1.output")) is model
    dense = [path for path, module in model.named_modules() if type(module) is nn.Linear]
    assert dense == [
        "bert.encoder.layer.1.output.dense",
        "bert.pooler.dense",
        "classifier",
    ]
    assert all(torch.equal(model.get_submodule(p).weight, plain.get_submodule(p).weight) for p in dense)
    packed = [module for module in model.modules() if isinstance(module, FrozenLinear)]
    assert len(packed) == 2 * 6 - 1
    assert all(not module.training for module in packed)


@pytest.mark.parametrize("problem", ["skip", "kind", "dtype", "nothing", "devices"])
def test_what_cannot_be_quantised_is_refused_and_left_alone(problem: str) -> None:
    model = nn.Sequential(nn.Conv2d(1, 1, 1), nn.Linear(4, 4)) if problem == "nothing" else bert()
    if problem == "devices":
        model.to_empty(device="meta").classifier.to_empty(device="cpu")
    arguments, text = {
        "skip": ({"skip": ("poller",)}, "'poller', which no linear .* The names there are classifier, dense, key"),
        "kind": ({"quantization": "int4"}, "'int4'; expected one of nf4, fp4, int8"),
        "dtype": ({"compute_dtype": "fp8"}, "'fp8'; expected one of fp32, bf16, fp16"),
        "nothing": ({}, "no plain linear to quantise but its head"),
        "devices": ({}, "several devices"),
    }[problem]
    with pytest.raises(ModelError, match=text):
        quantise(model, **arguments)  # type: ignore[arg-type]
    assert not any(isinstance(module, FrozenLinear) for module in model.modules())


@pytest.mark.parametrize(("wanted", "expected"), [(None, torch.bfloat16), ("fp32", torch.float32)])
def test_compute_dtype(wanted: str | None, expected: torch.dtype) -> None:
    model = quantise(bert().to(torch.bfloat16), compute_dtype=wanted)
    linear = model.get_submodule("bert.encoder.layer.0.attention.self.query")
    assert linear.compute_dtype == expected
    assert linear.bias.dtype == expected  # type: ignore[union-attr]
    assert main_dtype(model) == as_base(model).compute_dtype == expected


@pytest.mark.parametrize("kind", ["nf4", "int8", "none"])
def test_a_copy_on_meta_has_every_shape_and_no_memory(kind: str) -> None:
    model = bert() if kind == "none" else quantise(bert(), kind)
    model.bert.embeddings.word_embeddings.weight = model.classifier.weight  # type: ignore[union-attr]
    copied = on_meta(model)
    assert {name: (v.shape, v.dtype) for name, v in copied.state_dict().items()} == {
        name: (v.shape, v.dtype) for name, v in model.state_dict().items()
    }
    assert all(values.is_meta for values in [*copied.parameters(), *copied.buffers()])
    assert not any(values.is_meta for values in [*model.parameters(), *model.buffers()])
    assert copied.bert.embeddings.word_embeddings.weight is copied.classifier.weight  # type: ignore[union-attr]
    assert [p.requires_grad for p in copied.parameters()] == [p.requires_grad for p in model.parameters()]


def test_a_module_on_meta_gets_the_shapes() -> None:
    whole, empty = quantise(bert()), quantise(on_meta(bert()))
    shapes = {name: values.shape for name, values in whole.state_dict().items()}
    assert {name: values.shape for name, values in empty.state_dict().items()} == shapes
    assert all(values.is_meta for values in empty.state_dict().values())


def test_quantised_products_are_near_the_plain_ones() -> None:
    stack = nn.Sequential(nn.Linear(64, 64), nn.Linear(64, 64), nn.Linear(64, 2))
    weights = [linear.weight.detach().clone() for linear in stack]  # type: ignore[union-attr]
    x = torch.randn(8, 64, generator=torch.Generator().manual_seed(0))
    expected = stack(x).detach()
    for kind, allowed in (("nf4", 0.15), ("int8", 0.02)):
        fresh = nn.Sequential(nn.Linear(64, 64), nn.Linear(64, 64), nn.Linear(64, 2))
        fresh.load_state_dict(stack.state_dict())
        quantise(fresh, kind)
        assert [type(module) for module in fresh] == [{"nf4": Linear4bit, "int8": Linear8bit}[kind]] * 2 + [nn.Linear]
        error = (dense_weight(fresh[0], torch.float32) - weights[0]).abs().max() / weights[0].abs().max()
        assert 0 < error < 0.2
        assert 0 < float((fresh(x).detach() - expected).norm() / expected.norm()) < allowed


class Tied(nn.Module):
    """Plain torch: a head called as the linears of its blocks are, and one weight for head and embedding."""

    def __init__(self, tied: bool, last: bool = True) -> None:
        super().__init__()
        self.embedding = nn.Embedding(32, 64)
        if not last:
            self.fc = nn.Linear(64, 32, bias=False)
        self.blocks = nn.ModuleList(
            nn.ModuleDict({"fc": nn.Linear(64, 64), "out": nn.Linear(64, 64)}) for _ in range(2)
        )
        if last:
            self.fc = nn.Linear(64, 32, bias=False)
        else:
            self.norm = nn.LayerNorm(64)
        if tied:
            self.fc.weight = self.embedding.weight


@pytest.mark.parametrize("last", [True, False])
@pytest.mark.parametrize("place", ["cpu", "meta"])
def test_a_tied_head_stays_tied(place: str, last: bool) -> None:
    module = Tied(True, last)
    model = quantise(on_meta(module) if place == "meta" else module)
    assert model.fc.weight is model.embedding.weight  # type: ignore[union-attr]
    assert sum(isinstance(part, FrozenLinear) for part in model.modules()) == 4


def test_a_heads_name_keeps_nothing_else_dense() -> None:
    model = quantise(Tied(False))
    dense = [path for path, part in model.named_modules() if type(part) is nn.Linear]
    assert dense == ["fc"]
    named = quantise(Tied(False), skip=("blocks.1", "out"))  # as before, a part of a path
    packed = [path for path, part in named.named_modules() if isinstance(part, FrozenLinear)]
    assert packed == ["blocks.0.fc"]


def test_a_linear_that_stands_at_two_places_stays_one() -> None:
    shared = nn.Linear(64, 64)
    model = quantise(nn.Sequential(shared, nn.Linear(64, 64), shared, nn.Linear(64, 2)))
    assert model[0] is model[2] is shared  # type: ignore[index]
    assert isinstance(model[1], FrozenLinear)  # type: ignore[index]
