"""A model whose examples cannot share a row is trained in steps of rows of like length, and nobody has to ask for it."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import yaml
from safetensors.torch import load_file

import qlora
from qlora.data.batches import collate
from qlora.errors import PackingError
from qlora.recipe import Recipe
from qlora.runs.evaluate import preview
from qlora.runs.train import resume, train
from qlora.training import passage
from tests.tiny import chat_checkpoint, conversations, tiny_values, write_lines

SAID = "data.packing is by_length, since examples cannot share a row in this openai-gpt model"


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("by_length")
    chat_checkpoint(folder / "gpt", "OpenAIGPT")
    chats = conversations(40)
    for number, chat in enumerate(chats):
        chat["messages"][1]["content"] *= 1 + number % 7
    write_lines(folder / "data.jsonl", chats)
    return folder


def recipe(place: Path, run: Path, **data: Any) -> Recipe:
    values = tiny_values(place / "gpt", place / "data.jsonl", run)
    values["data"] |= {"packing": "auto", "max_length": 256, **data}
    values["training"] |= {"steps": 4, "save_every": 2, "keep_checkpoints": 3}
    values["evaluation"] = {"prompts": 0}
    return Recipe.model_validate(values)


@pytest.mark.slow
@pytest.mark.parametrize("accumulation", ["layer_major", "micro_batch_major"])
def test_it_is_chosen_said_and_resumed(place: Path, tmp_path: Path, capfd: Any, accumulation: str) -> None:
    asked = recipe(place, tmp_path / "run")
    asked = asked.model_copy(update={"training": asked.training.model_copy(update={"accumulation": accumulation})})
    preview(asked, 1)
    assert SAID in capfd.readouterr().err
    assert any(SAID in sentence for sentence in qlora.plan(asked).why)
    train(asked)
    assert SAID in capfd.readouterr().err
    kept = yaml.safe_load((tmp_path / "run/recipe.yaml").read_text(encoding="utf-8"))
    assert kept["data"]["packing"] == "by_length"
    shutil.copytree(tmp_path / "run", tmp_path / "again")
    for gone in ("adapter", "checkpoints/000004", "evaluation.json", "report.html"):
        found = tmp_path / "again" / gone
        shutil.rmtree(found) if found.is_dir() else found.unlink(missing_ok=True)
    resume(tmp_path / "again", quiet=True)
    ours, theirs = (load_file(tmp_path / name / "adapter/adapter_model.safetensors") for name in ("run", "again"))
    assert all(values.equal(theirs[name]) for name, values in ours.items())


def test_packing_that_was_asked_for_is_refused(place: Path, tmp_path: Path) -> None:
    with pytest.raises(PackingError, match=r"cannot share a row in this openai-gpt model.*packing=by_length"):
        train(recipe(place, tmp_path / "run", packing=True), quiet=True)


@pytest.mark.slow
def test_what_only_the_loaded_model_shows_is_done_too(
    place: Path, tmp_path: Path, capfd: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    def leaks(*_: Any) -> None:
        raise PackingError("Packed examples see each other. Set data.packing=by_length.")

    monkeypatch.setattr("qlora.planning.rows.why_not_packed", lambda config: None)
    monkeypatch.setattr(passage, "check_packing", leaks)
    train(recipe(place, tmp_path / "run"))
    assert "packing=by_length. data.packing is auto, so that is done now." in capfd.readouterr().err
    assert "packing: by_length" in (tmp_path / "run/recipe.yaml").read_text(encoding="utf-8")


def test_a_step_holds_rows_of_like_length(place: Path, tmp_path: Path) -> None:
    asked = recipe(place, tmp_path / "run")
    model = qlora.apply_method(qlora.load_base(asked.model), asked.method)
    shares = []
    for packing in (False, "by_length"):
        data = qlora.load_data(asked.data.model_copy(update={"packing": packing}), model.tokenizer)
        trainer = qlora.Trainer(model, data, asked.training)
        steps = [[trainer.rows[place] for place in trainer._places(step)] for step in range(trainer.steps_per_epoch)]
        tokens = sum(len(row.ids) for rows in steps for row in rows)
        shares.append(tokens / sum(collate(rows, 0)["input_ids"].numel() for rows in steps))
    assert shares[0] < 0.8 < 0.9 < shares[1]
