"""Every recipe in the repository validates and says how to run it; the quickstart's data is the same every time."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from qlora.recipe import Recipe

ROOT = Path(__file__).parents[2]
FOLDER = ROOT / "recipes"
# rglob, not glob: a check that does not look into sub-folders says nothing of the recipes there.
RECIPES = sorted([*FOLDER.rglob("*.yaml"), *FOLDER.rglob("*.yml")])
SCRIPT = FOLDER / "quickstart_data.py"


def names(path: Path) -> str:
    return str(path.relative_to(FOLDER))


def test_there_are_recipes() -> None:
    expected = {"quickstart.yaml", "qlora-7b-24gb.yaml", "qlora-7b-colab-t4.yaml", "pretrain-text.yaml"}
    assert {names(path) for path in RECIPES} >= expected


@pytest.mark.parametrize("path", RECIPES, ids=names)
def test_recipe_validates_and_comes_back_the_same(path: Path) -> None:
    recipe = Recipe.from_yaml(path)
    assert recipe.folder == f"runs/{path.stem}"
    assert Recipe.from_dict(recipe.model_dump(mode="json")) == recipe


@pytest.mark.parametrize("path", RECIPES, ids=names)
def test_recipe_opens_with_the_command_that_runs_it(path: Path) -> None:
    lines = path.read_text(encoding="utf-8").splitlines()
    comment = lines[: next(i for i, line in enumerate(lines) if not line.startswith("#"))]
    place = path.relative_to(ROOT).as_posix()
    assert re.match(rf"# (make \w+|qlora train {re.escape(place)})( |$)", comment[0])
    assert f"qlora train {place}" in "\n".join(comment)
    assert any("Needs" in line or "needs" in line for line in comment)


def make(folder: Path, hash_seed: str) -> tuple[Path, Path]:
    train, held_out = folder / "a" / "train.jsonl", folder / "b" / "held_out.jsonl"
    subprocess.run(
        [sys.executable, str(SCRIPT), str(train), str(held_out)],
        check=True,
        cwd=folder,
        capture_output=True,
        env={**os.environ, "PYTHONHASHSEED": hash_seed},
    )
    return train, held_out


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    return make(tmp_path_factory.mktemp("once"), "1")


def conversations(path: Path) -> list[tuple[str, str]]:
    """(question, answer) of each line; fails on any other form."""
    found = []
    for line in path.read_text(encoding="utf-8").splitlines():
        (user, assistant) = json.loads(line)["messages"]
        assert (user["role"], assistant["role"]) == ("user", "assistant")
        found.append((user["content"], assistant["content"]))
    return found


def test_quickstart_data_has_the_same_bytes_twice(made: tuple[Path, Path], tmp_path: Path) -> None:
    again = make(tmp_path, "2")
    assert [path.read_bytes() for path in made] == [path.read_bytes() for path in again]
    assert sorted(path.name for path in tmp_path.rglob("*.*")) == ["held_out.jsonl", "train.jsonl"]


def test_quickstart_data_is_about_3500_pairs_with_a_twentieth_held_out(made: tuple[Path, Path]) -> None:
    train, held_out = map(conversations, made)
    assert 3300 <= len(train) + len(held_out) <= 3900
    assert abs(len(held_out) / (len(train) + len(held_out)) - 0.05) < 0.001
    questions = dict(train + held_out)
    assert questions["What does `shutil.copytree` do in Python?"] == (
        "Recursively copy a directory tree and return the destination directory."
    )
    assert questions["What does `len` do in Python?"] == "Return the number of items in a container."
    assert questions["What is `fractions.Fraction` in Python?"].startswith("This class implements rational numbers.")


def test_quickstart_data_shares_nothing_between_its_files(made: tuple[Path, Path]) -> None:
    (train_questions, train_answers), (questions, answers) = (zip(*conversations(path), strict=True) for path in made)
    assert not set(train_questions) & set(questions)

    def words(texts: tuple[str, ...]) -> set[str]:
        return {" ".join(re.findall(r"\w+", text.casefold())) for text in texts}

    assert not words(train_answers) & words(answers)
    assert len(words(train_answers)) == len(train_answers)


def test_quickstart_answers_are_single_sentences_of_a_fit_length(made: tuple[Path, Path]) -> None:
    for path in made:
        for question, answer in conversations(path):
            assert re.fullmatch(r"What (does `[\w.]+` do|is `[\w.]+`) in Python\?", question)
            assert 20 <= len(answer) <= 301
            assert answer == " ".join(answer.split())
            assert answer[0].isupper()
            assert answer[-1] in ".!?"
            assert not re.search(r"at 0x[0-9a-f]{8,}", answer), "an address differs from process to process"


@pytest.mark.parametrize(
    ("docstring", "expected"),
    [
        ("f(x) -> int\n\nReturn the number\nof things.\n\nMore.", "Return the number of things."),
        ("f(x)\nf(x, y)\n\n    Return the number of things", "Return the number of things."),
        ("Do what is asked\n    of this function.\n    ", "Do what is asked of this function."),
        ("Return one of the following:\n\n- a\n- b", None),
        ("Too short.", None),
        ("Long. " * 60, None),
        ("f(x) is a sentence that\nis cut off by its first line.", None),
        ("Alias for field number 0", None),
        ("", None),
        (None, None),
    ],
)
def test_first_paragraph(docstring: str | None, expected: str | None) -> None:
    import runpy

    assert runpy.run_path(str(SCRIPT))["first_paragraph"](docstring) == expected


def test_quickstart_data_refuses_stripped_docstrings(tmp_path: Path) -> None:
    result = subprocess.run([sys.executable, "-OO", str(SCRIPT)], cwd=tmp_path, capture_output=True, text=True)
    assert result.returncode == 1
    assert "-OO" in result.stderr
    assert list(tmp_path.iterdir()) == []


def test_constraints_cover_what_the_project_asks_for() -> None:
    import tomllib

    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    wanted = [*project["dependencies"], *project["optional-dependencies"]["test"]]
    pinned = re.findall(r"(?m)^([\w.-]+)==[\w.]+$", (ROOT / "constraints.txt").read_text(encoding="utf-8"))

    def plain(name: str) -> str:
        return re.sub(r"[-_.]+", "-", name).lower()

    names_wanted = {plain(match[0]) for text in wanted if (match := re.match(r"[\w.-]+", text))}
    assert names_wanted <= set(map(plain, pinned))
