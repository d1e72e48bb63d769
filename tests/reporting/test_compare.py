"""Several runs on one page: what they share is said once, what differs stands side by side."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from qlora.cli import main
from tests.reporting.conftest import RunFolder
from tests.reporting.test_write_report import KNOWN, read


@pytest.fixture
def other(finished: RunFolder) -> RunFolder:
    """The same run with another rank and another answer."""
    place = finished.path.parent / "<i>other"
    shutil.copytree(finished.path, place)
    run = RunFolder.__new__(RunFolder)
    run.path = place
    run.recipe(method={"r": 2}, training={"learning_rate": 0.005})
    answer = {"prompt": "What is up?", "expected": "The sky.", "before": "No.", "after": "The <b>clouds</b>."}
    run.json("evaluation.json", {"generations": [answer], "verdict": {"outcome": "worse", "said": "by much"}})
    return run


def test_two_runs(finished: RunFolder, other: RunFolder, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "both.html"
    assert main(["report", str(finished.path), str(other.path), f"out={out}"]) == 0
    assert capsys.readouterr().out.strip() == str(out)
    page = read(out)
    source = out.read_text(encoding="utf-8")
    for text in ("A demo", "B <i>other", "What is up?", "The sky is.", "The <b>clouds</b>.", "worse", "3.200", "1.600"):
        assert text in page.text, text
    assert source.count("What is up?") == 1
    recipes = source[source.index("<h2>Recipes") : source.index("<h2>Answers")]
    assert "method.r" in recipes
    assert "training.learning_rate" in recipes
    assert "warmup_fraction" not in recipes  # they agree on it
    assert {"run0", "run1"} <= set(source.replace('"', " ").split())
    assert "not to be compared" not in page.text
    assert page.tags <= set(KNOWN.split())
    assert "<script" not in source
    assert "https:" not in source


def test_runs_on_other_data_are_not_compared_in_loss(finished: RunFolder, other: RunFolder, tmp_path: Path) -> None:
    other.json("environment.json", {"data_files": {"data.jsonl": "of other bytes"}})
    out = tmp_path / "both.html"
    assert main(["report", str(finished.path), str(other.path), f"out={out}"]) == 0
    assert "losses are not to be compared" in read(out).text


def test_what_cannot_be_compared_is_a_sentence(
    finished: RunFolder, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = str(finished.path)
    for words, said in (
        ([run, str(tmp_path / "none")], "There is no run folder"),
        ([run] * 7, "at most 6"),
        ([run, run, "out=/proc/no/such/folder.html"], "give another place with out=FILE"),
        ([run, "out=x.html"], "out is for the page of several runs"),
    ):
        assert main(["report", *words]) == 2
        assert said in capsys.readouterr().err
    assert main(["report", run, run, f"out={tmp_path / 'a/new/folder.html'}"]) == 0
    assert (tmp_path / "a/new/folder.html").is_file()
