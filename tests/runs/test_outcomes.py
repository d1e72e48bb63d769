"""A bad outcome looks bad: in what is printed, in evaluation.json, and in what to do next."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import yaml

from qlora.cli import _summary, main
from qlora.evaluation.score import HeldOut
from qlora.runs.session import Run
from tests.tiny import tiny_values

GREEN, RED, YELLOW = "\x1b[32m", "\x1b[1;31m", "\x1b[33m"


def measured(*losses: float) -> HeldOut:
    mean = math.fsum(losses) / len(losses)
    return HeldOut(mean, 0.0, len(losses), tuple((loss, 1) for loss in losses))


@pytest.mark.parametrize(
    ("after", "colour", "outcome", "then"),
    [
        (measured(0.5, 0.6), GREEN, "better", "chat runs/demo"),
        (measured(5.2, 5.3), RED, "worse", "folder=runs/demo-again training.learning_rate=0.002"),
        (measured(0.0, 2.1), YELLOW, "no clear change", "chat runs/demo"),
        (measured(math.inf, 1.0), RED, "diverged", "training.learning_rate=0.002"),
        (None, YELLOW, "not known", "chat runs/demo"),
    ],
)
def test_the_summary_is_green_only_where_training_helped(
    after: HeldOut | None,
    colour: str,
    outcome: str,
    then: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("TERM", "xterm")
    folder = Path("runs/demo")
    folder.mkdir(parents=True)
    (folder / "recipe.yaml").write_text("data: {train: my.jsonl}\ntraining: {learning_rate: 0.02}\n")
    _summary(Run(folder, 10, 100, measured(1.0, 1.0) if after else None, after))
    said = capsys.readouterr().out
    assert [one for one in (GREEN, RED, YELLOW) if one in said] == [colour]
    assert f"Verdict                {outcome}: " in said
    assert then in said


@pytest.mark.slow
def test_a_rate_that_is_far_too_high_is_said_while_it_trains_and_in_the_end(
    tiny_model: Path, chat_data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    values = tiny_values(tiny_model, chat_data, tmp_path / "good")
    values["method"] = {"name": "full"}
    values["model"]["quantization"] = "none"
    values["training"] = {"steps": 60, "batch_size": 5, "learning_rate": 0.01}
    path = tmp_path / "tiny.yaml"
    path.write_text(yaml.safe_dump(values))
    assert main(["train", str(path)]) == 0  # random weights cannot get worse: these can
    assert main(["export", str(tmp_path / "good"), "merged"]) == 0
    assert "That is good: up to 0.02 nats is rounding." in capsys.readouterr().out
    values = tiny_values(tmp_path / "good/merged", chat_data, tmp_path / "bad")
    values["training"] |= {"steps": 20, "learning_rate": 1}
    path.write_text(yaml.safe_dump(values))
    assert main(["train", str(path)]) == 0
    captured = capsys.readouterr()
    assert "The loss diverges: for 5 steps" in captured.err
    assert "Verdict                worse: " in captured.out
    assert "training.learning_rate=0.1" in captured.out
