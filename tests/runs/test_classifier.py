"""A classifier, from a recipe to a folder that transformers opens: measured by class, gone on with, merged."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from qlora.chat import Conversation
from qlora.cli import main
from qlora.errors import RunError, Stopped
from qlora.model.checkpoint import open_checkpoint
from qlora.model.loss import head_of, hidden_states
from qlora.planning.plan import plan
from qlora.planning.rows import with_known_head
from qlora.recipe import Recipe
from qlora.runs.evaluate import evaluate, load_run
from qlora.runs.session import read_evaluation
from qlora.runs.train import resume, train
from qlora.training.log import MetricsLog
from tests.tiny import WORDS, tiny_values, write_lines

CLOSE = {"rtol": 1e-4, "atol": 1e-4}
TEXTS = [f"{WORDS[number * 7 % 20]} {number} {('good', 'bad', 'so')[number % 3]}" for number in range(60)]


@pytest.fixture(scope="module")
def values(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Texts of three kinds, by a word in them."""
    place = tmp_path_factory.mktemp("classes")
    records = [{"sentence": text, "label": number % 3} for number, text in enumerate(TEXTS)]
    found = tiny_values(tiny_model, write_lines(place / "texts.jsonl", records), place / "run")
    found["objective"] = "classification"
    found["data"] |= {"packing": True, "labels": {"label": {"0": "good", "1": "bad", "2": "so"}}}
    return found


@pytest.fixture(scope="module")
def finished(values: dict[str, Any]) -> Path:
    patched = pytest.MonkeyPatch()
    patched.setattr("qlora.runs.train.matrix_rate", lambda device, dtype: 1e11)
    patched.setattr("qlora.planning.plan.faster_in_bf16", lambda: False)
    try:
        train(Recipe.from_dict(values), quiet=True)
    finally:
        patched.undo()
    return Path(values["folder"])


@pytest.fixture(scope="module")
def merged(finished: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("merged") / "model"
    assert main(["export", str(finished), "merged", f"out={place}", "dtype=fp32", "for=serving"]) == 0
    return place


def lines(folder: Path, key: str) -> list[dict[str, Any]]:
    found = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [line for line in found if key in line]


def trained_logits(finished: Path) -> torch.Tensor:
    """Of ``TEXTS``, each alone, by the trained model [texts, classes]."""
    model = load_run(finished, quiet=True)
    found = []
    for text in TEXTS:
        ids = torch.tensor([model.tokenizer(text)["input_ids"]])
        given = {"input_ids": ids, "position_ids": torch.arange(ids.shape[1])[None]}
        with torch.no_grad():
            found.append(head_of(model.model).logits(hidden_states(model.model, given)[0, -1:]))
    return torch.cat(found)


def batch_of(tokenizer: Any, side: str) -> Any:
    tokenizer.padding_side = side
    return tokenizer(TEXTS, padding=True, return_tensors="pt")


def test_classes_are_measured_before_and_after_and_by_step(finished: Path, capsys: Any) -> None:
    held_out = json.loads((finished / "evaluation.json").read_text())["held_out"]
    before, after = held_out["before"], held_out["after"]
    assert after["loss"] < 0.7 * before["loss"]
    assert after["target_tokens"] == after["classes"]["examples"] == 12
    assert after["classes"]["accuracy"] > before["classes"]["accuracy"]
    assert {one["label"] for one in after["classes"]["each"]} == {"good", "bad", "so"}
    told = lines(finished, "held_out_loss")
    assert [line["step"] for line in told] == [0, 4, 8, 10]
    assert told[-1]["held_out_f1"] == after["classes"]["f1"]
    known = read_evaluation(finished)
    assert known is not None
    assert known[0] is not None
    assert known[0].classes is not None
    assert known[0].classes.each[1].label == "good"
    page = (finished / "report.html").read_text()
    assert "<h2>Classes</h2>" in page
    assert "3 classes: bad 1" in page
    assert "nats per example" in page
    assert "over 12 examples" in page
    assert f"→ {100 * after['classes']['accuracy']:.0f} %" in page
    again = evaluate(finished, quiet=True)
    assert again.after is not None
    assert again.after.classes is not None
    assert again.after.classes.accuracy == after["classes"]["accuracy"]
    assert main(["evaluate", str(finished)]) == 0
    said = capsys.readouterr().out
    assert f"accuracy {after['classes']['accuracy']:.1%} over 12 examples" in said
    assert "  good " in said
    assert "export" in said.splitlines()[-1]


@pytest.mark.slow
def test_a_classifiers_run_goes_on_bit_for_bit(
    values: dict[str, Any], finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write, folder = MetricsLog.write, tmp_path / "run"

    def stopping(self: MetricsLog, line: dict[str, Any]) -> None:
        write(self, line)
        if line["step"] == 5 and "loss" in line:
            raise KeyboardInterrupt

    monkeypatch.setattr(MetricsLog, "write", stopping)
    with pytest.raises((KeyboardInterrupt, Stopped)):
        train(Recipe.from_dict({**values, "folder": str(folder)}), quiet=True)
    monkeypatch.setattr(MetricsLog, "write", write)
    assert resume(folder, quiet=True).steps == 10
    names = ["step", "loss", "grad_norm"]
    assert [[line[n] for n in names] for line in lines(folder, "loss")] == [[line[n] for n in names] for line in lines(finished, "loss")]  # fmt: skip
    found, expected = (load_file(place / "adapter" / "adapter_model.safetensors") for place in (folder, finished))
    assert {name: tensor.numpy().tobytes() for name, tensor in found.items()} == {
        name: tensor.numpy().tobytes() for name, tensor in expected.items()
    }


def test_transformers_opens_what_is_merged_with_the_trained_logits(finished: Path, merged: Path) -> None:
    model = AutoModelForSequenceClassification.from_pretrained(merged).eval()
    config = json.loads((merged / "config.json").read_text())
    assert config["architectures"] == ["LlamaForSequenceClassification"]
    assert model.config.id2label == {0: "bad", 1: "good", 2: "so"}
    assert model.config.label2id == {"bad": 0, "good": 1, "so": 2}
    assert "lm_head.weight" not in load_file(merged / "model.safetensors")
    expected = trained_logits(finished)
    for side in ("right", "left"):
        batch = batch_of(AutoTokenizer.from_pretrained(merged), side)
        assert not batch["attention_mask"].all()
        with torch.no_grad():
            torch.testing.assert_close(model(**batch).logits, expected, **CLOSE)


def test_the_merge_says_how_far_it_is_and_is_checked_again(finished: Path, tmp_path: Path, capsys: Any) -> None:
    place = tmp_path / "merged"
    assert main(["export", str(finished), "merged", f"out={place}"]) == 0
    said = capsys.readouterr().out
    assert "the same class at 100.0% of the examples" in said
    card = (place / "README.md").read_text()
    assert "AutoModelForSequenceClassification.from_pretrained" in card
    assert "| accuracy | " in card
    assert "vllm" not in card
    assert main(["export", str(finished), "check", f"from={place}"]) == 0
    tensors = load_file(place / "model.safetensors")
    save_file(tensors | {"score.weight": -tensors["score.weight"]}, place / "model.safetensors", {"format": "pt"})
    assert main(["export", str(finished), "check", f"from={place}"]) != 0
    assert "score.weight" in capsys.readouterr().err


@pytest.mark.slow
def test_another_run_goes_on_from_it(values: dict[str, Any], finished: Path, tmp_path: Path) -> None:
    more = {**values, "folder": str(tmp_path / "more"), "method": {"from": str(finished)}}
    run = train(Recipe.from_dict(more, "training.steps=2"), quiet=True)
    assert run.before is not None
    assert run.before.loss == pytest.approx(
        json.loads((finished / "evaluation.json").read_text())["held_out"]["after"]["loss"], rel=1e-5
    )


def test_the_plan_has_the_head_also_without_data(values: dict[str, Any], finished: Path) -> None:
    recipe = Recipe.from_dict(values)
    planned = plan(recipe)
    assert planned.recipe.classes == ("bad", "good", "so")
    held = load_file(finished / "adapter" / "adapter_model.safetensors")
    assert planned.trainable_parameters == sum(values.numel() for values in held.values())
    elsewhere = Recipe.from_dict(values, "data.train=someone/else")
    found, said = with_known_head(elsewhere, open_checkpoint(elsewhere.model, weights=False))
    assert found.classes == ("0", "1")
    assert said is not None
    assert "a head of two classes is planned" in said


@pytest.mark.parametrize("words", [["nf4"], ["gguf"], ["gguf-adapter"]])
def test_what_makes_no_sense_of_a_classifier_is_refused_in_a_sentence(
    finished: Path, words: list[str], capsys: Any
) -> None:
    assert main(["export", str(finished), *words]) != 0
    assert "trained a classifier, and" in capsys.readouterr().err
    with pytest.raises(RunError, match="trained a classifier, and chat is for models that answer in text"):
        Conversation(finished)
