"""A base that is kept from run to run: the next run is the one that a base loaded anew gives."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from qlora.recipe import Recipe
from qlora.runs import bases as module
from qlora.runs.bases import Bases
from qlora.runs.evaluate import load_run
from qlora.runs.train import train
from tests.tiny import tiny_values

QUICK: list[Any] = [{"name": "lora", "r": 4, "init": "pissa"}]
OTHERS: list[Any] = [
    {"name": "lora", "r": 4},
    {"name": "lora", "r": 4, "init": "loftq"},
    {"name": "dora", "r": 4},
    {"name": "adalora", "r": 2, "initial_r": 4},
    {"name": "ia3"},
    {"name": "bitfit", "new_biases": True},
    {"name": "bottleneck", "size": 4},
    {"name": "prompt_tuning", "tokens": 4},
    {"name": "prefix_tuning", "tokens": 4},
    {"name": "p_tuning", "tokens": 4},
    {"name": "modules", "modules": ["norm"]},
]


AFTER = {"name": "lora", "r": 4}


def _recipe(model: Path, data: Path, folder: Path, section: Any) -> Recipe:
    values = tiny_values(model, data, folder)
    return Recipe.from_dict({**values, "method": section, "training": {**values["training"], "steps": 2}})


def _losses(folder: Path) -> list[str]:
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [f"{key} {line[key]!r}" for line in lines for key in ("loss", "held_out_loss", "grad_norm") if key in line]


@pytest.fixture(scope="module")
def alone(tiny_model: Path, chat_data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run whose base was loaded for it."""
    folder = tmp_path_factory.mktemp("alone") / "run"
    train(_recipe(tiny_model, chat_data, folder, AFTER), quiet=True)
    return folder


@pytest.mark.parametrize(
    "method",
    [*QUICK, *(pytest.param(one, marks=pytest.mark.slow) for one in OTHERS)],
    ids=lambda section: "-".join(map(str, section.values())),
)
@pytest.mark.slow
def test_a_run_behind_another_one_is_the_run_alone(
    method: Any, tiny_model: Path, chat_data: Path, alone: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    loaded: list[str] = []
    load = module.load_base
    monkeypatch.setattr(module, "load_base", lambda *given: loaded.append("") or load(*given))
    bases = Bases()
    train(_recipe(tiny_model, chat_data, tmp_path / "first", method), quiet=True, bases=bases)
    train(_recipe(tiny_model, chat_data, tmp_path / "second", AFTER), quiet=True, bases=bases)
    trained = load_run(tmp_path / "second", quiet=True, bases=bases)
    assert len(loaded) == 1
    assert _losses(tmp_path / "second") == _losses(alone)
    assert trained.base.end_tokens == load_run(alone, quiet=True).base.end_tokens


@pytest.mark.parametrize(
    ("method", "quantization"), [({"name": "full"}, "none"), ({"name": "new_tokens", "tokens": ["<new>"]}, "nf4")]
)
def test_a_base_that_is_another_one_is_not_kept(
    method: Any, quantization: str, tiny_model: Path, chat_data: Path, tmp_path: Path
) -> None:
    recipe = _recipe(tiny_model, chat_data, tmp_path / "run", method)
    recipe = recipe.model_copy(update={"model": recipe.model.model_copy(update={"quantization": quantization})})
    bases = Bases()
    train(recipe, quiet=True, bases=bases)
    assert bases._kept is None
