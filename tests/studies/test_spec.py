"""A study's file: its cells, and one sentence for each mistake."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

from qlora.errors import RecipeError
from qlora.studies.spec import StudySection, held_equal, settings_of

RECIPE: dict[str, Any] = {"data": {"train": "some.jsonl", "held_out": "other.jsonl"}, "training": {"steps": 8}}


def written(folder: Path, *overrides: str, **values: Any) -> StudySection:
    path = folder / "compare.yaml"
    path.write_text(yaml.safe_dump({"recipe": RECIPE, **values}, sort_keys=False), encoding="utf-8")
    return StudySection.from_yaml(path, *overrides)


def test_arms_times_grid_make_settings_and_rates_times_seeds_their_cells(tmp_path: Path) -> None:
    found = written(
        tmp_path,
        arms={"lora": {"method.alpha": 8}, "dora": {"method": {"name": "dora"}}},
        grid={"method.r": [2, 4]},
        rates=[1e-3, 1e-2],
        seeds=[0, 1],
    )
    settings = settings_of(found)
    assert [one.name for one in settings] == ["lora · r 2", "lora · r 4", "dora · r 2", "dora · r 4"]
    cells = [cell for one in settings for cell in one.cells.values()]
    assert len({cell.name for cell in cells}) == len(cells) == 16
    last = cells[-1].recipe
    assert (last.method.name, last.method.r, last.training.learning_rate, last.training.seed) == ("dora", 4, 1e-2, 1)
    equal, differ = held_equal(settings)
    assert equal["training.steps"] == 8
    assert {"method.r", "training.learning_rate", "training.seed", "method.name"} <= set(differ)


def test_what_changes_together_is_one_field_and_an_arm_may_have_its_own_rates(tmp_path: Path) -> None:
    pairs = [{"method.r": r, "method.alpha": r} for r in (2, 4)]
    settings = settings_of(
        written(tmp_path, arms={"published": {"rates": [1e-4]}, "tuned": {}}, grid={"rank": pairs}, rates=[1e-3, 1e-2])
    )
    assert [one.name for one in settings] == [
        f"{arm} · r {r} · alpha {r}" for arm in ("published", "tuned") for r in (2, 4)
    ]
    assert [one.rates for one in settings] == [(1e-4,), (1e-4,), (1e-3, 1e-2), (1e-3, 1e-2)]
    assert {(cell.recipe.method.r, cell.recipe.method.alpha) for one in settings for cell in one.cells.values()} == {
        (2, 2.0),
        (4, 4.0),
    }


def test_a_cell_has_the_same_folder_wherever_the_data_are(tmp_path: Path) -> None:
    here, there = (settings_of(written(tmp_path, f"data_root={root}"))[0] for root in ("/data", "/elsewhere"))
    (one,), (other,) = here.cells.values(), there.cells.values()
    assert one.name == other.name
    recipe = one.in_folder(tmp_path, "/data")
    assert (recipe.data.train, recipe.data.held_out) == ("/data/some.jsonl", "/data/other.jsonl")
    assert recipe.folder == str(tmp_path / "cells" / one.name)


def test_a_size_takes_the_place_of_values_and_overrides_that_of_a_size(tmp_path: Path) -> None:
    sizes = {"gpu": {"recipe.model.name": "large", "seeds": [0, 1, 2], "recipe.training.steps": 500}}
    found = written(tmp_path, "size=gpu", "recipe.training.steps=9", sizes=sizes)
    (setting,) = settings_of(found)
    recipe = setting.cells[2, 2e-4].recipe
    assert (recipe.model.name, recipe.training.steps) == ("large", 9)


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ({"grid": {"training.lr": [1e-3]}}, r"'training\.lr' is not a known key"),
        ({"grid": {"method.r": []}}, r"'grid' .*has no value for method\.r; expected a list"),
        ({"grid": {"training.learning_rate": [1e-3]}}, r"in the grid; expected its values as 'rates: \[…\]'"),
        ({"grid": {"folder": ["a"]}}, r"leave it out: the study gives every cell a folder"),
        ({"arms": {"a": {"method.r": 8}, "b": {"method.r": 8}}}, r"'b' and 'a' are the same recipe"),
        ({"arms": {"a": {"method.rank": 8}}}, r"arm 'a' of the study's recipe: 'method\.rank' is not a known key"),
        ({"rates": [0.0]}, r"'rates.*' .*is 0\.0; expected .*greater than 0"),
        ({"size": "gpu"}, r"size is 'gpu'; expected one of"),
        ({"arm": {}}, r"'arm' .*is not a known key\. Did you mean 'arms'"),
        ({"recipe": {"data": {"train": "x.jsonl"}}, "rates": [1e-3, 1e-2]}, r"several rates and holds nothing out"),
        ({"recipe": "missing.yaml"}, r"There is no recipe at 'missing\.yaml'"),
    ],
    ids=lambda value: "" if isinstance(value, str) else "-".join(value),
)
def test_a_mistake_is_one_sentence(tmp_path: Path, values: dict[str, Any], said: str) -> None:
    with pytest.raises(RecipeError, match=said):
        settings_of(written(tmp_path, **values))


def test_a_name_that_stands_twice_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "twice.yaml"
    path.write_text("recipe: r.yaml\narms:\n  a: {method.r: 2}\n  a: {method.r: 4}\n", encoding="utf-8")
    with pytest.raises(RecipeError, match="stands twice"):
        StudySection.from_yaml(path)


@pytest.mark.parametrize(
    "path", sorted((Path(__file__).parents[2] / "recipes" / "studies").glob("*.yaml")), ids=lambda path: path.stem
)
def test_every_study_that_is_shipped_makes_cells_in_each_of_its_sizes(path: Path) -> None:
    sizes = StudySection.from_yaml(path).sizes
    for size in [(), *((f"size={name}",) for name in sizes)]:
        found = StudySection.from_yaml(path, *size, "data_root=/data")
        settings = settings_of(found)
        assert len(settings) >= 5
        for setting in settings:
            for cell in setting.cells.values():
                recipe = cell.in_folder(Path("studies"), found.data_root)
                assert str(recipe.data.train).startswith("/data/")
                assert all(str(task.data).startswith("/data/") for task in recipe.evaluation.tasks)
