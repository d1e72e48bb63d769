"""A run's tasks: base and adapter scored around training, resumed where they stopped, told on the terminal, the page and in JSON."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml

from qlora.cli import main
from qlora.errors import DataError, RunError, Stopped
from qlora.recipe import Recipe
from qlora.reporting import write_report
from qlora.runs import tasks as module
from qlora.runs.evaluate import evaluate, load_run
from qlora.runs.train import resume, train
from tests.evaluation.tasks.test_choice import records
from tests.tiny import tiny_values, write_lines


@pytest.fixture(scope="module")
def values(tiny_model: Path, chat_data: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    place = tmp_path_factory.mktemp("tasks")
    data = str(write_lines(place / "choice.jsonl", records()))
    section = {"data": data, "kind": "choice", "prompt": "{query}", "choices": "choices", "answer": "gold"}
    made = tiny_values(tiny_model, chat_data, place / "run")
    made["training"]["steps"], made["memory"] = 3, {"rehearse": False}
    made["evaluation"] = {
        "prompts": 0,
        "tasks": [{"name": "own", **section}, {"name": "chat", "chat": True, **section}],
    }
    return made


@pytest.fixture(scope="module")
def folder(values: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> Path:
    recipe = tmp_path_factory.mktemp("recipe") / "tasks.yaml"
    recipe.write_text(yaml.safe_dump(values), encoding="utf-8")
    assert main(["train", str(recipe)]) == 0
    return Path(values["folder"])


def test_base_and_adapter_are_in_the_table(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = json.loads((folder / "tasks.json").read_text())["tasks"]
    assert [(row["task"], row["metric"]) for row in rows] == [
        (task, metric) for task in ("own", "chat") for metric in ("accuracy", "accuracy_norm")
    ]
    for row in rows:
        assert row["difference"]["value"] == pytest.approx(row["trained"]["value"] - row["base"]["value"])
        assert row["chance"] == pytest.approx((1 / 2 + 1 / 3 + 1 / 4) / 3)
    base, trained = (json.loads((folder / "tasks" / name / "own.json").read_text()) for name in ("base", "000003"))
    assert base["scores"].keys() == trained["scores"].keys()
    assert base["answers"] != trained["answers"]  # the adapter was on
    page = write_report(folder).read_text()
    assert "<h2>Tasks</h2>" in page
    assert f"<td>{rows[0]['base']['value']:.3f} ± {rows[0]['base']['error']:.3f}</td>" in page
    assert main(["evaluate", str(folder)]) == 0
    said = capsys.readouterr().out
    assert "task  items  metric         chance" in said
    assert f"own      12  accuracy        0.361  {rows[0]['base']['value']:.3f} ± " in said


def test_the_results_are_those_of_the_model(folder: Path) -> None:
    from qlora.evaluation.tasks.opening import open_task
    from qlora.evaluation.tasks.scoring import score

    model = load_run(folder, quiet=True)
    section = Recipe.from_yaml(folder / "recipe.yaml").evaluation.tasks[0]
    task = open_task(section, model.tokenizer)
    for name in ("base", "000003"):
        known = module.read_result(folder / "tasks" / name / "own.json", task)
        if name == "base":
            with model.disabled():
                assert score(model, task) == known
        else:
            assert score(model, task) == known


def test_a_stopped_run_goes_on_in_the_middle_of_a_task(
    values: dict[str, Any], folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = Recipe.from_dict({**values, "folder": str(tmp_path / "run")})
    asked, real = list[int](), module.score

    def stopped(model: Any, task: Any, kept: Path, whose: str, show: Any) -> Any:
        def watched(done: int, of: int) -> None:
            asked.append(done)
            show(done, of)
            if len(asked) == 29:  # 12 and 12 of the base, 5 of the adapter
                raise KeyboardInterrupt

        return real(model, task, kept, whose, watched)

    monkeypatch.setattr(module, "score", stopped)
    with pytest.raises(Stopped):
        train(recipe, quiet=True)
    run = resume(tmp_path / "run", quiet=True)
    assert len(asked) == 12 + 12 + 12 + 12  # nothing twice
    assert run.tasks == json.loads((folder / "tasks.json").read_text())["tasks"]
    assert not list((tmp_path / "run" / "tasks").rglob("*.jsonl"))
    (tmp_path / "run" / "tasks" / "base" / "own.json").write_text('{"task": 1}')
    with pytest.raises(RunError, match="is damaged; delete it, and the task is scored again"):
        evaluate(tmp_path / "run", quiet=True)


def test_a_task_that_cannot_be_asked_stops_the_run_before_it_begins(values: dict[str, Any], tmp_path: Path) -> None:
    lost = {"name": "lost", "data": str(tmp_path / "none.jsonl"), "kind": "text"}
    recipe = Recipe.from_dict({**values, "folder": str(tmp_path / "run"), "evaluation": {"tasks": [lost]}})
    with pytest.raises(DataError, match=r"The task 'lost' cannot be read\. There is no data file"):
        train(recipe, quiet=True)
    assert not (tmp_path / "run").exists()
