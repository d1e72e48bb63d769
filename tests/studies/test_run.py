"""A study that runs: one base for its cells, failures kept, stopped and gone on with, all of it told."""

from __future__ import annotations

import csv
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from qlora import load_base, load_run
from qlora.data.packing import Row
from qlora.errors import InputError, RunError
from qlora.evaluation.forgetting import text_rows
from qlora.evaluation.tasks.opening import open_task
from qlora.recipe import Recipe, TaskSection
from qlora.studies.run import plan_study, study
from qlora.studies.spec import StudySection
from tests.tiny import WORDS, tiny_values, write_lines

pytestmark = pytest.mark.slow  # a cell takes seconds


def written(folder: Path, model: Path, data: Path, **values: Any) -> Path:
    recipe = {key: value for key, value in tiny_values(model, data, folder).items() if key not in ("folder", "device")}
    recipe["training"] = {**recipe["training"], "steps": 2}
    recipe["evaluation"] = {"prompts": 0}
    path = folder / "compare.yaml"
    path.write_text(yaml.safe_dump({"recipe": recipe, "folder": str(folder / "study"), **values}, sort_keys=False))
    return path


@pytest.fixture(scope="module")
def done(tiny_model: Path, chat_data: Path, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Two arms at two rates and two seeds; a third arm fails."""
    folder = tmp_path_factory.mktemp("done")
    arms = {
        "lora": {"method.r": 2},
        "wrong": {"method.target_modules": ["nothing"]},
        "dora": {"method": {"name": "dora", "r": 2}},
    }
    path = written(folder, tiny_model, chat_data, arms=arms, rates=[1e-3, 3e-2], seeds=[0, 1], about="<b>Which</b>?")
    return path, study(path, quiet=True)


def test_failures_stop_nothing_and_the_best_rate_is_repeated(done: Any) -> None:
    _, found = done
    assert [(one.setting, len(one.rows)) for one in found.compared] == [("lora", 2), ("dora", 2)]
    failed = [row for row in found.rows if row.error]
    assert [row.setting for row in failed] == ["wrong", "wrong"]
    assert all("nothing" in row.error for row in failed)
    for one in found.compared:
        tried = {row.rate: row.loss for row in one.tried}
        assert tried[one.best.rate] == min(tried.values())
    first, second = found.compared
    assert first.against is None
    expected = second.best.loss - first.best.loss
    assert second.against is not None
    assert second.against[0] == pytest.approx(expected, abs=1e-6)
    assert 0 < second.against[1] < 1


def test_its_files_say_what_it_returns_and_no_path_of_this_machine(done: Any) -> None:
    path, found = done
    model = yaml.safe_load(path.read_text())["recipe"]["model"]["name"]
    assert not [
        file for file in (found.folder / "results").glob("*.json") if str(Path(model).parent) in file.read_text()
    ]
    lines = list(csv.DictReader((found.folder / "study.csv").open()))
    assert [line["cell"] for line in lines] == [row.cell for row in found.rows]
    assert [float(line["held_out_after"]) for line in lines if not line["error"]] == [
        row.loss for row in found.rows if not row.error
    ]
    results = [json.loads(path.read_text()) for path in sorted((found.folder / "results").glob("*.json"))]
    good = [one for one in results if one["train_info"]["status"] == "success"]
    assert (len(results), len(good)) == (8, 6)
    for one in good:  # what PEFT's processing.py reads
        assert one["run_info"]["peft_config"]["peft_type"] == "LORA"
        assert one["run_info"]["peft_config"]["base_model_name_or_path"] == Path(model).name
        assert {"test accuracy", "train loss", "train samples", "train total tokens"} <= one["train_info"]["metrics"][
            -1
        ].keys()
        assert one["train_info"]["accelerator_memory_max"] > one["train_info"]["file_size"] > 0
        assert {"peft-version", "torch-version", "bitsandbytes-version"} <= one["meta_info"]["package_info"].keys()
    page = found.page.read_text()
    assert "&lt;b&gt;Which&lt;/b&gt;?" in page
    assert "<b>Which" not in page
    assert [word in page for word in ("Loss by learning rate", "nothing", "<script")] == [True, True, False]


def test_a_cell_is_an_ordinary_run(done: Any) -> None:
    from qlora.runs.evaluate import evaluate

    _, found = done
    row = found.compared[0].best
    again = evaluate(found.folder / "cells" / row.cell, quiet=True)
    assert again.after is not None
    assert again.after.loss == row.loss


def test_what_ended_is_not_run_again_and_a_new_arm_joins_it(done: Any, tmp_path: Path) -> None:
    path, found = done
    before = {
        one: one.stat().st_mtime_ns for one in (found.folder / "results").glob("*.json") if "wrong" not in one.name
    }
    values = yaml.safe_load(path.read_text())
    del values["arms"]["wrong"]
    values["arms"]["lora of 4"] = {"method.r": 4}
    wider = StudySection.model_validate({**values, "rates": values["rates"][1:], "seeds": [0]})
    again = study(wider, quiet=True)
    assert [one.setting for one in again.compared] == ["lora", "dora", "lora of 4"]
    assert {one: one.stat().st_mtime_ns for one in before} == before


def test_the_folder_of_another_study_is_left_alone(
    done: Any, tiny_model: Path, chat_data: Path, tmp_path: Path
) -> None:
    _, found = done
    path = written(tmp_path, tiny_model, chat_data, arms={"other": {"method.r": 3}})
    with pytest.raises(RunError, match=r"holds another study, of lora, .* not one cell of this one; choose another"):
        study(path, f"folder={found.folder}", quiet=True)


def test_a_plan_says_what_it_takes_and_a_budget_below_one_cell_is_refused(
    tiny_model: Path, chat_data: Path, tmp_path: Path
) -> None:
    path = written(tmp_path, tiny_model, chat_data, rates=[1e-3, 1e-2], seeds=[0, 1])
    said = plan_study(path)
    assert "| the recipe | 2 | 2 | 2 |" in said
    assert "3 cells in " in said
    assert not (tmp_path / "study").exists()
    with pytest.raises(RunError, match=r"hours is 1e-05; give it more"):
        study(path, "hours=1e-5", quiet=True)


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        (["recipe.data.train=missing.jsonl"], r"the recipe: .*missing\.jsonl"),
        (
            ["recipe.evaluation.tasks=[{name: sst2, data: missing.jsonl}]"],
            r"the recipe: The task 'sst2' cannot be read",
        ),
    ],
)
def test_what_no_cell_could_read_is_said_before_the_first(
    overrides: list[str], said: str, tiny_model: Path, chat_data: Path, tmp_path: Path
) -> None:
    with pytest.raises(InputError, match=said):
        study(written(tmp_path, tiny_model, chat_data), *overrides, quiet=True)
    assert not (tmp_path / "study" / "results").exists()


def _begun(path: Path, *overrides: str) -> subprocess.Popen[str]:
    """A study in a process of its own, whose first cell has taken steps, and has more to take."""
    command = [sys.executable, "-m", "qlora", "study", str(path), *overrides]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    deadline = time.monotonic() + 120
    while not any('"step": 3' in file.read_text() for file in path.parent.glob("study/cells/*/metrics.jsonl")):
        assert process.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.02)
    return process


LONG = ("recipe.training.steps=25", "recipe.training.save_every=1")


@pytest.mark.parametrize("kind", [signal.SIGTERM, signal.SIGKILL])
def test_a_study_that_was_stopped_gives_what_one_in_one_go_gives(
    kind: signal.Signals, tiny_model: Path, chat_data: Path, tmp_path: Path
) -> None:
    paths = []
    for name in ("whole", "stopped"):
        (tmp_path / name).mkdir()
        paths.append(written(tmp_path / name, tiny_model, chat_data, rates=[1e-3, 1e-2]))
    process = _begun(paths[1], *LONG)
    process.send_signal(kind)
    _, said = process.communicate(timeout=120)
    assert process.returncode == (143 if kind == signal.SIGTERM else -9), said
    assert not list((tmp_path / "stopped" / "study" / "results").iterdir())
    time.sleep(3 if kind == signal.SIGKILL else 0)  # what ran saves its state once it sees that it is alone
    again, whole = study(paths[1], *LONG, quiet=True), study(paths[0], *LONG, quiet=True)
    assert [(row.rate, row.loss, row.error) for row in again.rows] == [(row.rate, row.loss, "") for row in whole.rows]


def test_a_cell_whose_process_is_killed_fails_alone(tiny_model: Path, chat_data: Path, tmp_path: Path) -> None:
    path = written(tmp_path, tiny_model, chat_data, arms={"one": {"method.r": 2}, "two": {"method.r": 3}})
    process = _begun(path, *LONG)
    (lock,) = tmp_path.glob("study/cells/one-*/.lock")
    os.kill(json.loads(lock.read_text())["process"], signal.SIGKILL)
    _, said = process.communicate(timeout=120)
    assert process.returncode == 2, said
    results = [
        json.loads(file.read_text())["run_info"]["error_msg"] for file in sorted(tmp_path.glob("study/results/*"))
    ]
    assert [bool(error) for error in results] == [True, False]
    assert "killed" in results[0]
    again = study(path, *LONG, quiet=True)
    assert [row.error for row in again.rows] == ["", ""]


def test_divergence_is_from_the_base_also_where_it_was_trained_whole(
    tiny_model: Path, chat_data: Path, tmp_path: Path
) -> None:
    text = write_lines(tmp_path / "text.jsonl", [{"text": " ".join(WORDS[n : n + 20])} for n in range(3)])
    path = written(
        tmp_path,
        tiny_model,
        chat_data,
        arms={"lora": {"method.r": 2}, "full": {"method": {"name": "full"}, "model.quantization": "none"}},
        rates=[3e-2],
        measure=["divergence"],
    )
    task = json.dumps([{"name": "text", "kind": "text", "data": str(text)}])
    found = study(path, f"recipe.evaluation.tasks={task}", quiet=True)
    for row in found.rows:
        folder = found.folder / "cells" / row.cell
        base = load_base(Recipe.from_yaml(folder / "recipe.yaml").model)
        rows = text_rows(open_task(TaskSection(name="text", kind="text", data=str(text)), base.tokenizer))
        before = [log_probabilities(base.model, one) for one in rows]
        after = [log_probabilities(load_run(folder, quiet=True).model, one) for one in rows]
        apart = [(old.exp() * (old - new)).sum(-1) for old, new in zip(before, after, strict=True)]
        expected = torch.cat(apart).mean().item()
        assert expected > 1e-3
        assert row.more["divergence"]["text"]["divergence"] == pytest.approx(expected, rel=1e-3)
    assert "KL, nats a token" in found.page.read_text()


@torch.no_grad()
def log_probabilities(model: torch.nn.Module, row: Row) -> torch.Tensor:
    return model.eval()(input_ids=torch.from_numpy(row.ids)[None].long()).logits[0, :-1].double().log_softmax(-1)


def test_divergence_needs_a_text(tiny_model: Path, chat_data: Path, tmp_path: Path) -> None:
    path = written(tmp_path, tiny_model, chat_data, measure=["divergence"])
    with pytest.raises(InputError, match="kind text"):
        study(path, quiet=True)
