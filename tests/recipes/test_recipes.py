"""Every recipe in the repository validates and says how to run it."""

from __future__ import annotations

import re
import tomllib
from pathlib import Path

import pytest

from qlora.recipe import Recipe

ROOT = Path(__file__).parents[2]
FOLDER = ROOT / "recipes"
# rglob, not glob: a check that does not look into sub-folders says nothing of the recipes there.
RECIPES = sorted([*FOLDER.rglob("*.yaml"), *FOLDER.rglob("*.yml"), ROOT / "qlora/quickstart/quickstart.yaml"])
RECIPES = [
    path for path in RECIPES if path.parent.name != "studies"
]  # of which tests/studies/test_spec.py says as much


def names(path: Path) -> str:
    """How a user calls it: ``python -m qlora.quickstart`` puts quickstart.yaml into the folder it runs in."""
    return path.name if path.stem == "quickstart" else path.relative_to(ROOT).as_posix()


def test_there_are_recipes() -> None:
    assert {path.name for path in RECIPES} >= {
        "quickstart.yaml",
        "qlora-7b-24gb.yaml",
        "qlora-7b-colab-t4.yaml",
        "pretrain-text.yaml",
    }


@pytest.mark.parametrize("path", RECIPES, ids=names)
def test_recipe_validates_and_comes_back_the_same(path: Path) -> None:
    recipe = Recipe.from_yaml(path)
    assert recipe.folder == f"runs/{path.stem}"
    assert Recipe.from_dict(recipe.model_dump(mode="json")) == recipe


@pytest.mark.parametrize("path", RECIPES, ids=names)
def test_recipe_opens_with_the_command_that_runs_it(path: Path) -> None:
    lines = path.read_text(encoding="utf-8").splitlines()
    comment = lines[: next(i for i, line in enumerate(lines) if not line.startswith("#"))]
    assert re.match(rf"# (make \w+|qlora train {re.escape(names(path))})( |$)", comment[0])
    assert f"qlora train {names(path)}" in "\n".join(comment)
    assert any("Needs" in line or "needs" in line for line in comment)


def test_constraints_cover_what_the_project_asks_for() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    wanted = [*project["dependencies"], *project["optional-dependencies"]["test"]]
    pinned = re.findall(r"(?m)^([\w.-]+)==[\w.]+$", (ROOT / "constraints.txt").read_text(encoding="utf-8"))

    def plain(name: str) -> str:
        return re.sub(r"[-_.]+", "-", name).lower()

    names_wanted = {plain(match[0]) for text in wanted if (match := re.match(r"[\w.-]+", text))}
    names_wanted -= {plain(project["name"])}  # its own extras
    assert names_wanted <= set(map(plain, pinned))


def test_the_oldest_releases_that_are_admitted_are_those_that_are_tried() -> None:
    admitted = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]["dependencies"]
    tried = re.findall(r"(?m)^(\w+)==([\d.]+)\.\*$", (ROOT / ".ci" / "oldest.txt").read_text(encoding="utf-8"))
    assert len(tried) == 4
    assert {f"{name}>={version}" for name, version in tried} <= set(admitted)
