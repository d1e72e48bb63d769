"""``python -m qlora.quickstart`` puts three things in place, says what to do next, and keeps what was changed."""

from __future__ import annotations

from pathlib import Path

import pytest

from qlora.quickstart import __main__ as quickstart
from qlora.quickstart import model
from qlora.recipe import Recipe


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty folder to run in, and a model that is made already."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(model, "make_model", lambda: Path("cache/model"))
    return tmp_path


def test_it_writes_what_the_recipe_reads_and_says_what_is_next(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert quickstart.main([]) == 0
    recipe = Recipe.from_yaml("quickstart.yaml")
    assert Path(recipe.data.train).is_file()
    assert Path(str(recipe.data.held_out)).is_file()
    said = capsys.readouterr().out
    assert "cache/model" in said
    assert said.endswith(f"  qlora train quickstart.yaml\n  qlora export {recipe.folder} merged\n")


def test_a_recipe_that_was_changed_is_kept(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (here / "quickstart.yaml").write_text("model: {name: mine}\n")
    assert quickstart.main([]) == 0
    assert (here / "quickstart.yaml").read_text() == "model: {name: mine}\n"
    assert "kept as you changed it" in capsys.readouterr().out


def test_words_are_refused(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert quickstart.main(["run"]) == 2
    assert "takes none" in capsys.readouterr().err
    assert list(here.iterdir()) == []
