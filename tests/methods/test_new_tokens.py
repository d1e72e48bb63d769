"""The laws of new tokens: PEFT's trainable tokens on a resized base, an export that is a resized model, one id a token."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy
import peft
import pytest
import torch
from safetensors.torch import load_file
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AutoModelForCausalLM, AutoTokenizer, Gemma3ForCausalLM, Gemma3TextConfig

from qlora import recipe as config
from qlora.data.packing import Row
from qlora.errors import MethodError
from qlora.evaluation.generate import answers
from qlora.evaluation.score import score
from qlora.export.merged import merge
from qlora.methods.base import AdaptedModel, apply_method
from qlora.methods.files import save_adapter
from qlora.methods.loading import load_adapter
from qlora.methods.new_tokens import NewTokenEmbedding, NewTokenHead
from qlora.methods.peft_config import read_adapter_config
from qlora.model.base import Base
from qlora.model.loss import batch_loss
from qlora.model.skeleton import skeleton_base
from qlora.model.tokenizer import load_tokenizer, with_new_tokens
from qlora.training.loop import Trainer
from tests.methods.against_peft import plain_model
from tests.rounding import GRADIENT, rounding
from tests.tiny import SIZES, TOKENS, VOCABULARY, difference, stir, tiny_base, tiny_checkpoint

NEW = config.NewTokens(tokens=("<tool>", "</tool>"))
WITH_LORA = config.Combined(parts=(config.LoRA(r=4, alpha=8), NEW))
# family, tied, rows of the model; Qwen2's tokenizer has one token more than the tiny model has rows
BASES = [
    ("llama", False, 96),
    ("llama", True, 96),
    ("llama", False, 128),
    ("llama", True, 97),
    ("gemma2", True, 96),
    ("qwen2", False, 96),
]
each_base = pytest.mark.parametrize(("family", "tied", "vocabulary"), BASES)


def ids_of(model: AdaptedModel) -> list[int]:
    vocabulary = model.tokenizer.get_vocab()
    return [vocabulary[token] for token in NEW.tokens]


def spoken(model: AdaptedModel) -> torch.Tensor:
    """Token ids [2, 12] with new tokens among them."""
    ids = TOKENS.clone()
    ids[:, ::3], ids[0, 1::5] = ids_of(model)[0], ids_of(model)[1]
    return ids


def logits(model: Any, ids: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        return model(input_ids=ids, use_cache=False).logits.float()


def resized(folder: Path, size: int, quantization: str = "none") -> Any:
    plain = plain_model(folder, quantization)
    if size > plain.config.vocab_size:
        plain.resize_token_embeddings(size)
    return plain


def their_gradients(theirs: nn.Module) -> dict[str, torch.Tensor]:
    """PEFT's by our names."""
    found = {}
    for name, values in theirs.named_parameters():
        if values.requires_grad and values.grad is not None:
            ours = name.removeprefix("base_model.model.").replace("token_adapter.", "")
            found[ours.replace(".trainable_tokens_delta.default", ".values").replace(".default.weight", "")] = (
                values.grad
            )
    return found


@each_base
@pytest.mark.parametrize("section", [NEW, WITH_LORA], ids=["alone", "with LoRA"])
@pytest.mark.sampled
def test_files_logits_and_gradients_are_pefts_on_a_resized_base(
    tmp_path: Path, family: str, tied: bool, vocabulary: int, section: Any
) -> None:
    folder = tiny_checkpoint(tmp_path / "base", family, tie_word_embeddings=tied, vocab_size=vocabulary)
    # PEFT's list for a tied head beside LoRA, its tuner alone: both on a packed base once
    quantization = "nf4" if section is WITH_LORA and vocabulary == 96 else "none"
    ours = apply_method(tiny_base(folder, quantization), section)
    stir(ours)
    save_adapter(ours, tmp_path / "adapter")
    size = ours.model.config.vocab_size
    assert size == max(vocabulary, ids_of(ours)[1] + 1)
    theirs = peft.PeftModel.from_pretrained(
        resized(folder, size, quantization), tmp_path / "adapter", is_trainable=True
    ).train()
    assert peft.get_peft_model_state_dict(theirs, save_embedding_layers=False).keys() == ours.adapter_state().keys()
    batch = {"input_ids": spoken(ours), "labels": spoken(ours), "use_cache": False}
    found, expected = ours.model(**batch), theirs(**batch)
    found.loss.backward()
    expected.loss.backward()
    assert found.logits.shape == expected.logits.shape
    assert difference(found.logits, expected.logits) < rounding()
    gradients = their_gradients(theirs)
    assert gradients.keys() == ours.trainable_parameters().keys()
    worst = max(difference(values.grad, gradients[name]) for name, values in ours.trainable_parameters().items())
    print(f"{family} {quantization}: gradients differ by {worst:.1e}")
    assert worst < rounding(GRADIENT)
    for whole in (True, False):  # PEFT saves the resized matrices too unless it is told not to
        theirs.save_pretrained(tmp_path / f"theirs-{whole}", save_embedding_layers=whole)
        ours.tokenizer.save_pretrained(tmp_path / f"theirs-{whole}")
        again = load_adapter(tiny_base(folder, quantization), tmp_path / f"theirs-{whole}")
        assert torch.equal(logits(again.model, spoken(ours)), logits(ours.model, spoken(ours)))
        assert again.methods[-1].ids == ours.methods[-1].ids


@each_base
def test_merged_is_a_resized_model_with_its_tokenizer(tmp_path: Path, family: str, tied: bool, vocabulary: int) -> None:
    folder = tiny_checkpoint(tmp_path / "base", family, tie_word_embeddings=tied, vocab_size=vocabulary)
    ours = apply_method(tiny_base(folder), WITH_LORA)
    stir(ours)
    save_adapter(ours, tmp_path / "adapter")
    merge(folder, tmp_path / "adapter", tmp_path / "out", compute_dtype="fp32", dtype="fp32")
    plain, report = AutoModelForCausalLM.from_pretrained(
        tmp_path / "out", dtype=torch.float32, output_loading_info=True
    )
    assert not any(report.values()), report
    found = logits(plain.eval(), spoken(ours))
    assert difference(found, logits(ours.model, spoken(ours))) < rounding()
    assert plain.config.tie_word_embeddings is tied
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "out")
    text = "w5 <tool>w6</tool>"
    found_ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    assert found_ids == ours.tokenizer(text, add_special_tokens=False)["input_ids"]
    if family != "qwen2":  # whose own class does not read the tiny words
        assert found_ids == [5, ids_of(ours)[0], 6, ids_of(ours)[1]]
    assert [tokenizer.convert_tokens_to_ids(token) for token in NEW.tokens] == ids_of(ours)
    assert tokenizer.apply_chat_template([{"role": "user", "content": "w5"}], tokenize=False) == "w5"


@each_base
def test_the_old_tokens_are_the_bases_and_the_new_begin_as_the_mean(
    tmp_path: Path, family: str, tied: bool, vocabulary: int
) -> None:
    base = tiny_base(tiny_checkpoint(tmp_path, family, tie_word_embeddings=tied, vocab_size=vocabulary))
    before, tokenizer, old = logits(base.model, TOKENS), base.tokenizer, base.model.config.vocab_size
    model = apply_method(base, NEW)
    assert list(model.trainable_parameters()) == ["model.embed_tokens.values", "lm_head.values"][: 1 if tied else 2]
    new = list(model.methods[0].ids)
    kept = [number for number in range(old) if number not in new]
    assert torch.equal(logits(model.model, TOKENS)[..., kept], before[..., kept])
    embedding: Any = model.model.get_input_embeddings()
    assert embedding.num_embeddings == model.model.get_output_embeddings().out_features == max(old, new[-1] + 1)
    mean = embedding.base.weight.mean(0)
    torch.testing.assert_close(embedding.values, mean.expand(len(new), -1))
    assert model.tokenizer is not tokenizer
    assert not {"<tool>", "</tool>"} & tokenizer.get_vocab().keys()
    stir(model)
    with model.disabled():  # as it was before the first step, for new tokens too
        assert torch.equal(logits(model.model, TOKENS)[..., :old], before)
        beyond = [number for number in new if number >= old]
        if beyond:
            expected = mean * getattr(embedding, "embed_scale", 1.0)
            torch.testing.assert_close(embedding(torch.tensor(beyond)), expected.expand(len(beyond), -1))
            assert logits(model.model, TOKENS).shape[-1] == new[-1] + 1
    assert model.remove() is base
    assert base.tokenizer is tokenizer
    assert base.model.config.vocab_size == old
    assert torch.equal(logits(base.model, TOKENS), before)
    model.attach()
    assert (base.model.config.vocab_size, base.tokenizer.get_vocab()["<tool>"]) == (
        max(old, new[-1] + 1),
        ids_of(model)[0],
    )


def test_an_embedding_that_scales_is_scaled_for_new_tokens_too(tmp_path: Path) -> None:
    """Gemma 3 multiplies inside its embedding. Held against transformers' own resized model."""
    tiny_checkpoint(tmp_path / "tokenizer")
    torch.manual_seed(0)
    plain = Gemma3ForCausalLM(Gemma3TextConfig(**{**SIZES, "initializer_range": 0.3})).eval()
    plain.save_pretrained(tmp_path / "base")
    load_tokenizer(tmp_path / "tokenizer").save_pretrained(tmp_path / "base")
    ours = apply_method(tiny_base(tmp_path / "base", "none"), NEW)
    stir(ours, 0.3)
    plain.resize_token_embeddings(VOCABULARY + 2)
    with torch.no_grad():
        plain.get_input_embeddings().weight[VOCABULARY:] = ours.trainable_parameters()["model.embed_tokens.values"]
    assert float(plain.get_input_embeddings().embed_scale) > 1
    assert difference(logits(ours.model, spoken(ours)), logits(plain, spoken(ours))) < rounding()


def test_tokens_keep_their_order_and_their_kind(tmp_path: Path) -> None:
    folder = tiny_checkpoint(tmp_path / "base")
    section = config.NewTokens(tokens=("<z>", "<a>"), special=False)
    alone = apply_method(tiny_base(folder), section)
    together = apply_method(tiny_base(folder), config.Combined(parts=(section, config.BitFit(new_biases=True))))
    beside = apply_method(tiny_base(folder), config.Combined(parts=(section, config.LoRA(r=2))))
    for name, model in (("peft", alone), ("own", together), ("lora", beside)):
        stir(model)
        save_adapter(model, tmp_path / name)
        again = load_adapter(tiny_base(folder), tmp_path / name)
        parts = config.parts_of(read_adapter_config(tmp_path / name))
        (read,) = [part for part in parts if part.name == "new_tokens"]
        assert (read.tokens, read.special) == (("<z>", "<a>"), False)
        assert (again.tokenizer.get_vocab()["<z>"], again.tokenizer.get_vocab()["<a>"]) == (96, 97)
        assert again.tokenizer.decode([96, 5, 97], skip_special_tokens=True).split() == ["<z>", "w5", "<a>"]
        assert AutoTokenizer.from_pretrained(tmp_path / name).get_vocab()["<a>"] == 97
        ids = torch.tensor([[96, 5, 97, 7]])
        assert torch.equal(logits(again.model, ids), logits(model.model, ids))
        load_adapter(model, tmp_path / name)
        wrong = apply_method(tiny_base(folder), swapped(model.section))
        with pytest.raises(MethodError, match="has the new tokens <z>, <a>, this model <a>, <z>"):
            load_adapter(wrong, tmp_path / name)
    special = apply_method(tiny_base(folder), NEW)
    assert special.tokenizer.decode([96, 5, 97], skip_special_tokens=True).split() == ["w5"]


def swapped(section: Any) -> Any:
    parts = tuple(
        part.model_copy(update={"tokens": part.tokens[::-1]}) if part.name == "new_tokens" else part
        for part in config.parts_of(section)
    )
    return config.Combined(parts=parts) if len(parts) > 1 else parts[0]


def test_what_cannot_be_added_is_refused_in_a_sentence(tmp_path: Path) -> None:
    folder = tiny_checkpoint(tmp_path / "base")
    base = tiny_base(folder)
    tokenizer, before = base.tokenizer, logits(base.model, TOKENS)
    for section, message in (
        (config.NewTokens(tokens=("<new>", "w7")), r"has 'w7' already, .* leave them out of method\.tokens"),
        (config.NewTokens(tokens=("<new>",), ids=(99,)), "ids 99 in this adapter, but 96 with the tokenizer"),
    ):
        with pytest.raises(MethodError, match=message):
            apply_method(base, section)
        assert base.tokenizer is tokenizer
        assert torch.equal(logits(base.model, TOKENS), before)
    with pytest.raises(MethodError, match="has none; load it with one"):
        apply_method(base.model, NEW)
    base.tokenizer = None
    with pytest.raises(MethodError, match="has none; load it with one"):
        apply_method(base, NEW)
    with pytest.raises(
        MethodError, match="needs a model with an ordinary embedding of tokens, and 'Sequential' has none"
    ):
        apply_method(nn.Sequential(nn.Linear(3, 3)), NEW)
    with pytest.raises(ValueError, match="'<a>' more than once"):
        config.NewTokens(tokens=("<a>", "<b>", "<a>"))


def test_an_adapter_of_rows_without_a_tokenizer_or_of_strange_rows_is_refused(tmp_path: Path) -> None:
    folder = tiny_checkpoint(tmp_path / "base")
    model = apply_method(tiny_base(folder), WITH_LORA)
    save_adapter(model, tmp_path / "adapter")
    path = tmp_path / "adapter" / "adapter_config.json"
    values = json.loads(path.read_text())
    for rows in ([97, 96], {"embed_tokens": [96], "lm_head": [97]}, ["96"]):
        path.write_text(json.dumps(values | {"trainable_token_indices": rows}))
        with pytest.raises(MethodError, match="expected the same rising ids"):
            read_adapter_config(tmp_path / "adapter")
    path.write_text(json.dumps(values | {"trainable_token_indices": [97]}))  # another row than the token would get here
    with pytest.raises(MethodError, match="ids 97 in this adapter, but 96 with the tokenizer"):
        load_adapter(tiny_base(folder), tmp_path / "adapter")
    path.write_text(json.dumps(values))
    (tmp_path / "adapter" / "tokenizer.json").unlink()
    with pytest.raises(MethodError, match="rows of the tokens 96, 97, and no tokenizer beside it"):
        load_adapter(tiny_base(folder), tmp_path / "adapter")


def test_a_new_token_is_generated_and_read_again(tmp_path: Path) -> None:
    model = apply_method(
        tiny_base(tiny_checkpoint(tmp_path)), config.NewTokens(tokens=("<tool>", "</tool>"), special=False)
    )
    head: Any = model.planted["lm_head"]
    hidden = {}
    handle = head.register_forward_pre_hook(lambda module, inputs: hidden.update(at=inputs[0][0, -1]))
    logits(model.model, torch.tensor([[5, 6]]))
    with torch.no_grad():
        head.values[1] = 50 * hidden["at"]  # what comes after these two words
    handle.remove()
    (text,) = answers(model, [[5, 6]], 3)
    assert text.split()[0] == "</tool>"
    followed = model.model.generate(torch.tensor([[5, 6]]), max_new_tokens=3, do_sample=False)
    assert followed[0, 2] == 97
    assert followed.shape[1] > 3  # the new token went through the embedding too


def test_data_can_be_read_before_the_model_is_loaded(tmp_path: Path) -> None:
    folder = tiny_checkpoint(tmp_path)
    alone = load_tokenizer(folder)
    early = with_new_tokens(alone, WITH_LORA)
    assert with_new_tokens(alone, config.LoRA()) is alone
    model = apply_method(tiny_base(folder), WITH_LORA)
    text = "w5 <tool>w6 w7</tool> w8"
    assert early(text)["input_ids"] == model.tokenizer(text)["input_ids"] == [5, 96, 6, 7, 97, 8]
    assert early.pad_token == alone.pad_token
    assert len(alone) == VOCABULARY


def test_new_tokens_are_learned_and_can_be_scored_before(tmp_path: Path) -> None:
    model = apply_method(tiny_base(tiny_checkpoint(tmp_path, "gemma2")), NEW)
    rows = []
    for number in range(4):
        ids = numpy.array([5, 96, 6 + number, 97] * 3, dtype=numpy.int32)
        rows.append(Row(ids, ids.copy(), numpy.arange(12, dtype=numpy.int32), (number,)))
    with model.disabled():
        before = score(model, rows).loss
    assert before == pytest.approx(score(model, rows).loss, rel=rounding())  # nothing was learned yet
    training = config.TrainingSection(batch_size=4, steps=20, learning_rate=3e-2, warmup_fraction=0.0)
    for _ in Trainer(model, rows, training):
        pass
    assert score(model, rows).loss < before - 0.5
    with model.disabled():
        assert score(model, rows).loss == pytest.approx(before, rel=rounding())


@pytest.mark.parametrize("tied", [True, False])
def test_the_head_may_carry_an_adapter_of_its_own(tmp_path: Path, tied: bool) -> None:
    folder = tiny_checkpoint(tmp_path / "base", tie_word_embeddings=tied)
    section = config.Combined(parts=(config.LoRA(r=2, target_modules=("lm_head", "q_proj")), NEW))
    model = apply_method(tiny_base(folder), section)
    before = logits(model.model, spoken(model))
    stir(model)
    expected = logits(model.model, spoken(model))
    save_adapter(model, tmp_path / "adapter")
    again = load_adapter(tiny_base(folder), tmp_path / "adapter")
    assert torch.equal(logits(again.model, spoken(model)), expected)
    with model.disabled():
        torch.testing.assert_close(logits(model.model, spoken(model)), before, rtol=rounding(), atol=rounding())
    ids = spoken(model)
    batch_loss(model.model, {"input_ids": ids, "position_ids": torch.arange(12).expand(2, 12), "labels": ids}, 5)[
        0
    ].backward()
    assert all(values.grad is not None and values.grad.any() for values in model.trainable_parameters().values())
    base = model.remove()
    assert torch.equal(logits(base.model, TOKENS), logits(tiny_base(folder).model, TOKENS))


class Shapes(TorchDispatchMode):
    """The shapes of what every operation makes."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: set[tuple[int, ...]] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        output = func(*args, **(kwargs or {}))
        for tensor in torch.utils._pytree.tree_leaves(output):
            if isinstance(tensor, torch.Tensor) and "view" not in str(func) and not str(func).startswith("aten.t."):
                self.seen.add(tuple(tensor.shape))
        return output


@pytest.mark.parametrize("tied", [True, False])
def test_nothing_of_the_vocabularys_size_is_copied(tmp_path: Path, tied: bool) -> None:
    model = apply_method(tiny_base(tiny_checkpoint(tmp_path, tie_word_embeddings=tied, intermediate_size=80)), NEW)
    ids = spoken(model)
    batch = {"input_ids": ids, "position_ids": torch.arange(12).expand(2, 12), "labels": ids}
    with Shapes() as shapes:
        batch_loss(model.model, batch, 5)[0].backward()
    assert (5, VOCABULARY + 2) in shapes.seen
    assert not {shape for shape in shapes.seen if len(shape) == 2 and shape[0] >= VOCABULARY and shape[1] == 64}
    assert sum(values.numel() for values in model.trainable_parameters().values()) == 2 * 64 * (1 if tied else 2)


@pytest.mark.parametrize("family", ["llama", "gemma2"])
def test_shapes_are_known_without_weights(tmp_path: Path, family: str) -> None:
    folder = tiny_checkpoint(tmp_path, family)
    section = config.ModelSection(name=str(folder))
    base = Base(
        skeleton_base(section, torch.device("meta"), torch.float32).model, None, folder, "m", None, "nf4", True, torch.device("meta"), torch.float32
    )  # fmt: skip
    planned = apply_method(base, WITH_LORA)
    real = apply_method(tiny_base(folder), WITH_LORA)
    assert {name: values.shape for name, values in planned.trainable_parameters().items()} == {
        name: values.shape for name, values in real.trainable_parameters().items()
    }
    assert all(values.is_meta for values in planned.trainable_parameters().values())
    assert isinstance(planned.planted["model.embed_tokens"], NewTokenEmbedding)
    assert isinstance(planned.planted["lm_head"], NewTokenHead)


def test_stored_beside_the_adapter_lies_the_tokenizer(tmp_path: Path) -> None:
    folder = tiny_checkpoint(tmp_path / "base")
    model = apply_method(tiny_base(folder), NEW)
    save_adapter(model, tmp_path / "adapter")
    assert AutoTokenizer.from_pretrained(tmp_path / "adapter")("<tool>")["input_ids"] == [96]
    assert load_file(tmp_path / "adapter" / "adapter_model.safetensors").keys() == {
        "base_model.model.model.embed_tokens.trainable_tokens_delta",
        "base_model.model.lm_head.trainable_tokens_delta",
    }
