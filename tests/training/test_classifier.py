"""The laws of a classifier: transformers' own logits, the loss of a plain implementation by any way, PEFT's files."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy
import peft
import pytest
import torch
import torch.nn.functional as F
from transformers import AutoModelForSequenceClassification

from qlora.data.examples import Example
from qlora.data.load import load_data
from qlora.data.packing import Row, make_rows
from qlora.errors import DataError, MethodError
from qlora.evaluation.classes import classes_of
from qlora.evaluation.score import score
from qlora.evaluation.tasks.classification import CLASSIFICATION
from qlora.methods.base import AdaptedModel, apply_method
from qlora.methods.files import save_adapter
from qlora.methods.loading import load_adapter
from qlora.model.loss import batch_loss, head_of, hidden_states
from qlora.recipe import Combined, DataSection, LoRA, MemorySection, ModelSection, Modules, Recipe, TrainingSection
from qlora.residence.layers import unwrap_layers
from qlora.residence.load import load_base
from qlora.training.loop import Trainer
from qlora.training.objectives import make_objective
from tests.data.test_labelled import RECORDS
from tests.rounding import MODEL, rounding
from tests.steps import close, step_of
from tests.tiny import CPU, VOCABULARY, any_checkpoint, stir, tiny_base, tiny_checkpoint, word_tokenizer, write_lines

LAYERS, LABELS = 2, ("bad", "good", "so")
ALLOWED = rounding(sums=2 * MODEL * LAYERS)
FAMILIES = ("Llama", "Qwen2", "Gemma2", "Qwen3Moe", "Phi3", "Mistral")
WAYS: dict[str, dict[str, Any]] = {
    "one micro-batch": {"micro_batch_size": 8, "accumulation": "micro_batch_major", "recompute": "none"},
    "two": {"micro_batch_size": 4, "accumulation": "micro_batch_major"},
    "row by row": {"micro_batch_size": 1, "accumulation": "micro_batch_major", "loss_chunk": 1},
    "layer-major": {"micro_batch_size": 3},
    "streamed, ends on the host": {"micro_batch_size": 3},
}
MEMORY = {"layers": 1, "tier": "disk", "embedding": "host", "head": "host", "layer_inputs": "host"}


def examples(count: int = 20, seed: int = 0) -> list[Example]:
    """Texts of 1 to 9 tokens, none of them padding, and behind each a padding that has its class."""
    random, made = numpy.random.default_rng(seed), []
    for _ in range(count):
        ids = numpy.r_[random.integers(3, VOCABULARY, int(random.integers(1, 10))), 0].astype(numpy.int32)
        labels = numpy.full(len(ids), -100, dtype=numpy.int32)
        labels[-1] = random.integers(0, len(LABELS))
        made.append(Example(ids, labels))
    return made


def rows_of(packing: bool) -> list[Row]:
    return make_rows(examples(), 30, packing)


def classifier(base: Any, method: Any = None) -> AdaptedModel:
    parts = (method or LoRA(r=4, alpha=8), Modules(modules=("score",), labels=LABELS))
    return apply_method(base, Combined(parts=parts))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_checkpoint(tmp_path_factory.mktemp("base"), num_hidden_layers=LAYERS)


def model_of(folder: Path, quantization: str = "nf4", **memory: Any) -> AdaptedModel:
    section = ModelSection(name=str(folder), quantization=quantization, compute_dtype="fp32")  # type: ignore[arg-type]
    model = classifier(load_base(section, CPU, memory=MemorySection(**memory, cache=str(folder / "cache"))))
    stir(model, 0.05)
    return model


def padded(side: str) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
    """The texts of ``examples`` in one batch, and their classes."""
    texts = [torch.tensor(one.ids[:-1].astype("int64")) for one in examples()]
    longest = max(map(len, texts))
    fill = [(0, longest - len(text)) if side == "right" else (longest - len(text), 0) for text in texts]
    ids = torch.stack([F.pad(text, each, value=0) for text, each in zip(texts, fill, strict=True)])
    return {"input_ids": ids, "attention_mask": (ids != 0).long()}, torch.tensor(
        [int(one.labels[-1]) for one in examples()]
    )


def class_logits(model: AdaptedModel) -> torch.Tensor:
    """Of each text alone, at its last token [texts, classes]."""
    found = []
    for one in examples():
        ids = torch.tensor(one.ids[None, :-1].astype("int64"))
        given = {"input_ids": ids, "position_ids": torch.arange(ids.shape[1])[None]}
        with torch.no_grad():
            found.append(head_of(model.model).logits(hidden_states(model.model, given)[0, -1:]))
    return torch.cat(found)


def recipe_of(**training: Any) -> Recipe:
    values = {"batch_size": 8, "micro_batch_size": 4, "steps": 4, "learning_rate": 1e-2, "max_grad_norm": None}
    return Recipe.from_dict({"data": {"train": "x"}, "objective": "classification", "training": {**values, **training}})


@pytest.mark.sampled
@pytest.mark.parametrize("family", FAMILIES)
def test_logits_are_those_of_transformers_own_classifier(family: str, tmp_path: Path) -> None:
    """On copied weights, alone and in padded batches; the loss of packed rows is the mean of its own."""
    folder = any_checkpoint(tmp_path / "base", family, torch.float32, pad_token_id=0)
    theirs = AutoModelForSequenceClassification.from_pretrained(folder, num_labels=3, dtype=torch.float32).eval()
    theirs.config.pad_token_id = 0
    model = classifier(tiny_base(folder, "none"))
    with torch.no_grad():
        theirs.score.weight.normal_(0, 0.5)
        model.trainable_parameters()["score.weight"].copy_(theirs.score.weight)
    ours = class_logits(model)
    for side in ("right", "left"):
        batch, right = padded(side)
        with torch.no_grad():
            found = theirs(**batch, labels=right)
        torch.testing.assert_close(ours, found.logits, rtol=1e-4, atol=1e-4)
    measured = score(model, rows_of(packing=True))
    assert measured.target_tokens == 20
    assert measured.loss == pytest.approx(found.loss.item(), abs=1e-4)
    assert measured.classes is not None
    assert measured.classes.accuracy == (found.logits.argmax(-1) == right).double().mean().item()


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.sampled
def test_loss_and_gradients_are_a_plain_implementations_by_any_way(way: str, folder: Path) -> None:
    """Each text alone and its whole logits against packed rows, however they are cut into micro-batches."""
    model, rows = model_of(folder), rows_of(packing=True)[:8]
    parameters = model.trainable_parameters()
    texts = [examples()[index] for row in rows for index in row.examples]
    losses = []
    for one in texts:
        ids = torch.tensor(one.ids[None, :-1].astype("int64"))
        hidden = model.model.model(input_ids=ids, use_cache=False).last_hidden_state[0, -1].double()
        logits = hidden @ parameters["score.weight"].double().T
        losses.append(F.cross_entropy(logits[None], torch.tensor([int(one.labels[-1])])))
    loss = torch.stack(losses).mean()
    grads = dict(zip(parameters, torch.autograd.grad(loss, list(parameters.values())), strict=True))
    if way.startswith("streamed"):
        model = model_of(folder, **MEMORY)
    step, found = step_of(Trainer(model, rows, recipe=recipe_of(**WAYS[way])))
    unwrap_layers(model.model)
    assert step.loss == pytest.approx(loss.item(), rel=1e-5)
    close(found, grads, ALLOWED)


def test_packed_is_alone(folder: Path) -> None:
    model = model_of(folder)
    apart = score(model, rows_of(packing=False))
    packed = score(model, rows_of(packing=True), rows_at_once=2)
    assert packed.loss == pytest.approx(apart.loss, abs=1e-5)
    assert packed.classes == apart.classes


def test_peft_reads_the_adapter_with_our_logits_and_we_read_it_too(folder: Path, tmp_path: Path) -> None:
    model = model_of(folder, "none")
    save_adapter(model, tmp_path)
    base = AutoModelForSequenceClassification.from_pretrained(folder, num_labels=3, dtype=torch.float32)
    theirs = peft.PeftModel.from_pretrained(base, tmp_path).eval()
    assert type(theirs) is peft.PeftModelForSequenceClassification
    theirs.config.pad_token_id = 0
    batch, _ = padded("right")
    with torch.no_grad():
        torch.testing.assert_close(theirs(**batch).logits, class_logits(model), rtol=1e-4, atol=1e-4)
    again = load_adapter(tiny_base(folder, "none"), tmp_path)
    assert again.section.parts[-1].labels == LABELS or again.section.parts[0].labels == LABELS
    assert torch.equal(class_logits(again), class_logits(model))


def test_the_head_comes_and_goes_and_the_language_models_is_left_alone(folder: Path) -> None:
    base = tiny_base(folder)
    batch = {
        "input_ids": torch.arange(3, 9)[None],
        "position_ids": torch.arange(6)[None],
        "labels": torch.arange(3, 9)[None],
    }
    before = batch_loss(base.model, batch)[0]
    model = classifier(base)
    assert [name for name in model.trainable_parameters() if "lora" not in name] == ["score.weight"]
    head, other = model.trainable_parameters()["score.weight"].clone(), classifier(tiny_base(folder))
    assert torch.equal(head, other.trainable_parameters()["score.weight"])
    stir(model)
    with model.disabled():
        assert score(model, rows_of(packing=False)).loss == score(other, rows_of(packing=False)).loss
    model.remove()
    assert not hasattr(base.model, "score")
    assert torch.equal(batch_loss(base.model, batch)[0], before)


def test_shares_are_those_of_the_task_of_the_same_name() -> None:
    """Macro, and of each class; where nothing was given a class, its precision is 0."""
    chosen = [0, 0, 1, 1, 0, 1, 0, 0]
    right = [0, 0, 0, 1, 1, 1, 2, 2]
    found = classes_of(list(zip(chosen, right, strict=True)), LABELS)
    answers = [
        {"log_likelihoods": [float(n == one) for n in range(3)], "right": label, "positive": None}
        for one, label in zip(chosen, right, strict=True)
    ]
    assert CLASSIFICATION.together(answers) == {"precision": found.precision, "recall": found.recall, "f1": found.f1}
    assert found.accuracy == 4 / 8
    assert [(one.label, one.examples, one.precision, one.recall) for one in found.each] == [
        ("bad", 3, 2 / 5, 2 / 3), ("good", 3, 2 / 3, 2 / 3), ("so", 2, 0.0, 0.0),
    ]  # fmt: skip
    assert "  so  " in found.table()
    assert (
        classes_of([(0, 0)], [f"class {number}" for number in range(25)])
        .table()
        .endswith("and 5 more, in evaluation.json")
    )


def test_parts_put_together_in_python_train_if_they_belong_together(folder: Path, tmp_path: Path) -> None:

    section = DataSection(train=str(write_lines(tmp_path / "train.jsonl", RECORDS)), max_length=32)
    data = load_data(section, word_tokenizer(pad_token="<pad>", eos_token="</s>"), classifies=True)
    with pytest.raises(DataError, match="head has the labels bad, good, so, and the data the classes 0, 1;"):
        Trainer(model_of(folder), data, recipe=recipe_of())
    with pytest.raises(MethodError, match="transformers has no classifier with a head 'score' for this cohere model"):
        classifier(tiny_base(any_checkpoint(tmp_path / "cohere", "Cohere", torch.float32), "none"))
    ours = load_data(
        section, word_tokenizer(pad_token="<pad>", eos_token="</s>"), classifies=True, classes=(*LABELS[:1], "0", "1")
    )
    model = apply_method(
        tiny_base(folder), Combined(parts=(LoRA(r=4), Modules(modules=("score",), labels=ours.classes)))
    )
    trainer = Trainer(model, ours, TrainingSection(steps=2, batch_size=2), tmp_path / "run")
    assert [next(trainer).target_tokens, next(trainer).target_tokens] == [6, 6]
    assert Recipe.from_yaml(tmp_path / "run" / "recipe.yaml").objective.name == "classification"
    assert make_objective(recipe_of().objective, model_of(folder)).denominator(rows_of(packing=True)) == 20
