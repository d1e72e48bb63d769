"""A run on pairs, from a recipe to a merged model: what is measured, kept, gone on with and told."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file

from qlora.cli import main
from qlora.errors import Stopped
from qlora.model.loss import IGNORE_INDEX
from qlora.planning.plan import plan
from qlora.planning.rows import load_recipe_data
from qlora.recipe import Recipe
from qlora.runs.evaluate import evaluate
from qlora.runs.folder import open_run
from qlora.runs.measured import best_base, subject
from qlora.runs.session import read_evaluation
from qlora.runs.train import resume, train
from qlora.training.log import MetricsLog
from tests.tiny import WORDS, tiny_values, write_lines

NAMES = ("reward_chosen", "reward_rejected", "reward_margin", "reward_accuracy")


@pytest.fixture(scope="module")
def values(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Pairs whose chosen answer ends in the question's own word."""
    records = [
        {
            "prompt": f"{WORDS[number % 20]} {number}?",
            "chosen": f"{WORDS[number * 3 % 20]} {WORDS[number % 20]}",
            "rejected": f"{WORDS[number * 3 % 20]} no",
        }
        for number in range(40)
    ]
    place = tmp_path_factory.mktemp("pairs")
    found = tiny_values(tiny_model, write_lines(place / "pairs.jsonl", records), place / "run")
    found["objective"] = {"name": "dpo", "beta": 0.5}
    found["data"] |= {"packing": True}
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


def lines(folder: Path, key: str) -> list[dict[str, Any]]:
    found = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [line for line in found if key in line]


def test_preferences_are_measured_before_and_after_and_by_step(finished: Path, capsys: Any) -> None:
    evaluation = json.loads((finished / "evaluation.json").read_text())["held_out"]
    before, after = evaluation["before"], evaluation["after"]
    assert before["loss"] == pytest.approx(0.6931, abs=1e-4)
    assert before["preferences"] | {"likelier": 0} == {"pairs": 8, "accuracy": 0.5, "margin": 0.0, "likelier": 0}
    assert after["preferences"]["accuracy"] > 0.9
    assert after["preferences"]["margin"] > 0.5
    assert after["loss"] < 0.5 * before["loss"]
    assert sum(pairs for _, pairs in after["rows"]) == 8
    steps = lines(finished, "loss")
    assert len(steps) == 10
    assert all(name in line for line in steps for name in NAMES)
    assert steps[-1]["reward_margin"] == pytest.approx(steps[-1]["reward_chosen"] - steps[-1]["reward_rejected"])
    told = lines(finished, "held_out_loss")
    assert [line["step"] for line in told] == [0, 4, 8, 10]
    assert told[-1]["held_out_accuracy"] == after["preferences"]["accuracy"]
    known = read_evaluation(finished)
    assert known is not None
    assert known[0] is not None
    assert known[0].preferences is not None
    page = (finished / "report.html").read_text()
    assert "Rewards" in page
    assert "chosen answer ahead in 50 % → 100 % of 8 pairs" in page
    again = evaluate(finished, quiet=True)
    assert again.after is not None
    assert again.after.preferences is not None
    assert again.after.preferences.margin == pytest.approx(after["preferences"]["margin"], rel=1e-5)
    assert main(["evaluate", str(finished)]) == 0
    assert "chosen answer ahead in 100.0% of 8 pairs" in capsys.readouterr().out


def test_a_run_on_pairs_goes_on_bit_for_bit(
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
    run = resume(folder, quiet=True)
    assert run.steps == 10
    names = ["step", "loss", "grad_norm", *NAMES]
    assert [[line[n] for n in names] for line in lines(folder, "loss")] == [[line[n] for n in names] for line in lines(finished, "loss")]  # fmt: skip
    found, expected = (load_file(place / "adapter" / "adapter_model.safetensors") for place in (folder, finished))
    assert {name: tensor.numpy().tobytes() for name, tensor in found.items()} == {
        name: tensor.numpy().tobytes() for name, tensor in expected.items()
    }


def test_what_was_trained_is_merged(finished: Path, tmp_path: Path) -> None:
    assert main(["export", str(finished), "merged", f"out={tmp_path / 'merged'}"]) == 0
    assert (tmp_path / "merged" / "config.json").is_file()


@pytest.mark.slow
def test_orpo_needs_no_reference_and_a_model_that_cannot_pack_learns_too(
    values: dict[str, Any], tmp_path: Path
) -> None:
    recipe = Recipe.from_dict(
        {**values, "folder": str(tmp_path / "run")}, "objective={name: orpo}", "data.packing=false"
    )
    run = train(recipe, quiet=True)
    assert not (tmp_path / "run" / "reference").exists()
    assert run.before
    assert run.before.preferences
    assert run.after
    assert run.after.preferences
    assert run.before.preferences.accuracy == run.before.preferences.likelier
    assert run.after.loss < run.before.loss
    assert run.after.preferences.margin > run.before.preferences.margin


def test_the_plan_counts_rows_of_pairs(values: dict[str, Any]) -> None:
    pairs = plan(Recipe.from_dict(values))
    longer = plan(Recipe.from_dict(values, "objective={name: tokens}", "data.max_length=128"))
    assert pairs.chosen.tokens == longer.chosen.tokens == 5 * 128
    assert pairs.memory.total == longer.memory.total


def test_an_export_is_measured_on_chosen_answers_and_merges_into_what_was_trained(
    finished: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Rejected answers are less likely than before: of a base that undoes it their loss is less."""
    run = subject(finished)
    whole = load_recipe_data(open_run(finished)[0], run.source.checkpoint).held_out
    assert sum(row.target_tokens for row in run.held_out) < sum(row.target_tokens for row in whole)
    for row in run.held_out:
        chosen, rejected = (
            [bool((row.labels[begin:end] != IGNORE_INDEX).any()) for begin, end in row.spans()[side::2]]
            for side in (0, 1)
        )
        assert all(chosen)
        assert not any(rejected)
    monkeypatch.setattr("qlora.runs.measured.mean_with_error", lambda differences: (-1.0, 0.0))
    assert best_base(finished)[0] == "dequantized"
