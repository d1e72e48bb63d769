"""A run that was made in Python, part by part, leaves a folder that the command line takes."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

import qlora
from qlora.cli import main
from qlora.errors import RecipeError, RunError
from qlora.recipe import Recipe
from tests.tiny import tiny_values


def trainer_in(folder: Path, model: Path, data: Path, *overrides: str, seed: int = 0) -> qlora.Trainer:
    recipe = Recipe.from_dict(tiny_values(model, data, folder), *overrides)
    base = qlora.load_base(recipe.model)
    adapted = qlora.apply_method(base, recipe.method, recipe.training.seed)
    rows = qlora.load_data(recipe.data, base.tokenizer, seed)
    return qlora.Trainer(adapted, rows, recipe.training, folder=folder)


def test_the_command_line_goes_on_with_it(tiny_model: Path, chat_data: Path, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    trainer = trainer_in(folder, tiny_model, chat_data)
    losses = [next(trainer).loss for _ in range(6)]
    trainer.save()
    losses += [next(trainer).loss for _ in range(4)]  # a run that was lost after its checkpoint
    assert main(["report", str(folder)]) == 0
    assert (folder / "report.html").is_file()
    assert main(["export", str(folder), "adapter", f"out={tmp_path / 'portable'}"]) == 0
    assert main(["resume", str(folder)]) == 0
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert [line["loss"] for line in lines if "loss" in line] == losses  # bit for bit what Python went on with
    assert main(["export", str(folder), "merged", f"out={tmp_path / 'merged'}"]) == 0


def test_another_recipes_folder_is_refused(tiny_model: Path, chat_data: Path, tmp_path: Path) -> None:
    next(trainer_in(tmp_path, tiny_model, chat_data))
    before = (tmp_path / "recipe.yaml").read_bytes()
    with pytest.raises(RunError, match="a run of another recipe"):
        next(trainer_in(tmp_path, tiny_model, chat_data, "training.learning_rate=0.5"))
    assert (tmp_path / "recipe.yaml").read_bytes() == before
    assert next(trainer_in(tmp_path, tiny_model, chat_data)).number == 1  # the same cell of a notebook, run again
    assert len((tmp_path / "metrics.jsonl").read_text().splitlines()) == 1


def test_data_that_a_resumed_run_would_split_otherwise_is_refused(
    tiny_model: Path, chat_data: Path, tmp_path: Path
) -> None:
    with pytest.raises(RecipeError, match=r"drawn by the seed 3, but training.seed is 0"):
        next(trainer_in(tmp_path / "run", tiny_model, chat_data, seed=3))
    assert not (tmp_path / "run").exists()
