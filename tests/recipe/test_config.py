"""The recipe: every field documented once, nothing unknown accepted, every mistake named with its place."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pydantic
import pytest

from qlora.errors import RecipeError
from qlora.recipe import LoRA, Recipe, Section, TaskSection, choices, parts_of, reference
from qlora.recipe import methods as method_sections
from qlora.recipe import objectives as objective_sections
from qlora.recipe.reading import ELSEWHERE

MINIMAL: dict[str, Any] = {"data": {"train": "a.jsonl"}}


def sections() -> dict[str, type[Section]]:
    """Each section of a recipe by its heading in the reference; a method's has the method's name in it."""
    kinds = [field.annotation for field in Recipe.model_fields.values()]
    unions = {"method": method_sections, "objective": objective_sections}
    named = [
        (union, kind)
        for union, module in unions.items()
        for kind in vars(module).values()
        if isinstance(kind, type) and "name" in fields_of(kind)
    ]
    return {
        **{name: kind for name, kind in zip(Recipe.model_fields, kinds, strict=True) if fields_of(kind)},
        **{f"{union}: {kind.model_fields['name'].default}": kind for union, kind in named},
        "evaluation.tasks": TaskSection,
    }


def fields_of(kind: Any) -> dict[str, Any]:
    return kind.model_fields if isinstance(kind, type) and issubclass(kind, Section) else {}


def test_every_field_is_documented_and_in_the_reference() -> None:
    tables = {part.split("`")[0]: part for part in reference().split("## `")[1:]}
    assert tables.keys() == sections().keys() | {"(top level)"}
    assert len(tables) == 6 + 13 + 5 + 1 + 1
    for heading, section in {**sections(), "(top level)": Recipe}.items():
        for name, field in section.model_fields.items():
            if section is not Recipe or name not in ("method", "objective", *sections()):
                assert field.description, f"{heading} {name} has no text under it"
                assert f"\n| `{field.alias or name}` | " in tables[heading], f"{heading} {name} is not in the reference"


def test_reference_gives_defaults_as_yaml_has_them() -> None:
    rows = {line.split("`")[1]: line for line in reference().splitlines() if line.startswith("| `")}
    assert rows["dropout"].startswith("| `dropout` | `0.0` |")
    assert rows["epochs"].startswith("| `epochs` | `1` |")
    assert rows["save_every"].startswith("| `save_every` | `100` |")
    assert rows["double_quant"].startswith("| `double_quant` | `true` |")
    assert rows["steps"].startswith("| `steps` | `null` |")
    assert rows["betas"].startswith("| `betas` | `[0.9, 0.999]` |")
    assert "| `train` | required |" in rows["train"]
    assert "`nf4`, `fp4`, `int8`, `none`" in rows["quantization"]


def test_docs_are_generated() -> None:
    written = (Path(__file__).parents[2] / "docs/recipe.md").read_text(encoding="utf-8")
    assert written == reference(), "regenerate docs/recipe.md: qlora recipe"


def test_all_mistakes_at_once_with_their_lines(tmp_path: Path) -> None:
    path = tmp_path / "bad.yaml"
    path.write_text("modle: {name: x}\nmethod:\n  r: 0\n  alhpa: 3\ntraining:\n  shedule: linear\n", encoding="utf-8")
    with pytest.raises(RecipeError) as caught:
        Recipe.from_yaml(path)
    head, *mistakes = str(caught.value).splitlines()
    assert head == f"5 mistakes in {path}:"
    together = "\n".join(mistakes)
    for expected in (
        "'modle' (line 1) is not a known key. Did you mean 'model'?",
        "'method.r' (line 3) is 0; expected",
        "'method.alhpa' (line 4) is not a known key. Did you mean 'alpha'?",
        "'training.shedule' (line 6) is not a known key. Did you mean 'schedule'?",
        "'data' is missing",
    ):
        assert expected in together


def test_key_with_nothing_near_lists_what_there_is() -> None:
    with pytest.raises(RecipeError, match="The keys there are name, threads"):
        Recipe.from_dict({**MINIMAL, "device": {"zzz": 1}})


def test_overrides_are_yaml_and_come_last(tmp_path: Path) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text("data:\ntraining: {epochs: 3, learning_rate: 2e-4}\n", encoding="utf-8")
    recipe = Recipe.from_yaml(
        path,
        "data.train=[a.jsonl, b.jsonl]",
        "training.epochs=5",
        "method.target_modules=[q_proj]",
        "model.revision=null",
    )
    assert recipe.data.train == ("a.jsonl", "b.jsonl")
    assert recipe.training.epochs == 5
    assert recipe.training.learning_rate == 2e-4  # YAML 1.1 reads 2e-4 as text
    assert recipe.method.target_modules == ("q_proj",)
    assert recipe.folder == "runs/mine"
    with pytest.raises(RecipeError, match=r"'training.epochs' .an override. is 'x'"):
        Recipe.from_yaml(path, "data.train=a", "training.epochs=x")


def test_overrides_leave_the_values_given_alone() -> None:
    values = {"data": {"train": "a"}, "training": {"epochs": 1}}
    assert Recipe.from_dict(values, "training.epochs=4", "device.threads=2").training.epochs == 4
    assert values == {"data": {"train": "a"}, "training": {"epochs": 1}}
    both = [{"name": "bottleneck", "form": "pfeiffer"}] * 2
    method = Recipe.from_dict({**MINIMAL, "method": both}, "method.1.form=lin").method
    assert [part.form for part in parts_of(method)] == ["pfeiffer", "lin"]  # the override of one is none of the other


def test_an_override_takes_the_place_of_what_says_the_same_in_another_way(tmp_path: Path) -> None:
    """A run's recipe.yaml names steps and epochs; of what was held out by a file a share is asked for, and the other way round."""
    path = tmp_path / "mine.yaml"
    path.write_text("data: {train: a.jsonl, held_out: b.jsonl}\ntraining: {epochs: 1, steps: 30}\n", encoding="utf-8")
    longer = Recipe.from_yaml(path, "training.epochs=3").training
    assert (longer.epochs, longer.steps) == (3, None)
    assert Recipe.from_yaml(path, "training.steps=7").training.steps == 7
    shared = Recipe.from_yaml(path, "data.held_out_fraction=0.1")
    assert (shared.data.held_out, shared.data.held_out_fraction) == (None, 0.1)
    assert Recipe.from_yaml(path, "data.held_out_fraction=0.1", "data.held_out=c.jsonl").data.held_out == "c.jsonl"


def test_overrides_with_dashes_are_the_same(tmp_path: Path) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text("data: {train: a.jsonl}\n", encoding="utf-8")
    assert Recipe.from_yaml(path, "--training.epochs=3") == Recipe.from_yaml(path, "training.epochs=3")
    assert Recipe.from_dict(MINIMAL, "--overwrite=true").overwrite


def test_repr_says_what_is_wanted_in_two_lines() -> None:
    methods = [{"name": "lora", "r": 8, "target_modules": ["q_proj"]}, {"name": "modules", "modules": ["lm_head"]}]
    recipe = Recipe.from_dict({**MINIMAL, "method": methods}, "training.steps=10", "data.held_out_fraction=0.02")
    assert (
        repr(recipe)
        == str(recipe)
        == (
            "Recipe(smollm2-135m-instruct in nf4, lora r=8 target_modules=('q_proj',) + modules modules=('lm_head',),\n"
            "       a.jsonl (2.00% held out), 10 steps of 16 rows a step, folder None)"
        )
    )
    assert "lora r=16,\n       a.jsonl (nothing held out), 1 epoch" in repr(Recipe.from_dict(MINIMAL))


def test_recipe_is_frozen() -> None:
    recipe = Recipe.from_dict(MINIMAL)
    with pytest.raises(pydantic.ValidationError):
        recipe.folder = "elsewhere"  # type: ignore[misc]
    with pytest.raises(pydantic.ValidationError):
        recipe.training.epochs = 2  # type: ignore[misc]
    with pytest.raises(pydantic.ValidationError):
        LoRA(alhpa=3)  # type: ignore[call-arg]


def test_yaml_of_a_recipe_reads_back_as_the_same(tmp_path: Path) -> None:
    recipe = Recipe.from_dict(MINIMAL, "data.columns={prompt: frage}", "training.betas=[0.8, 0.95]", "folder=runs/ü")
    path = tmp_path / "recipe.yaml"
    path.write_text(recipe.to_yaml(), encoding="utf-8")
    assert Recipe.from_yaml(path) == recipe


def test_true_is_no_number() -> None:
    with pytest.raises(RecipeError, match=r"'training.epochs' .an override. is true; expected whole number"):
        Recipe.from_dict(MINIMAL, "training.epochs=true")
    assert Recipe.from_dict(MINIMAL, "model.double_quant=false").model.double_quant is False


@pytest.mark.parametrize(
    ("values", "overrides", "recompute", "accumulation"),
    [
        ({}, [], "auto", "auto"),
        ({"gradient_checkpointing": True}, [], "all", "auto"),
        ({"gradient_checkpointing": False, "accumulation": "layer_major"}, [], "none", "micro_batch_major"),
        ({"recompute": 3}, ["training.gradient_checkpointing=false"], "none", "micro_batch_major"),
        ({"gradient_checkpointing": False}, ["training.recompute=7"], 7, "auto"),
        ({"recompute": 3}, ["training.recompute=all"], "all", "auto"),
    ],
)
def test_checkpointing_is_read_by_its_former_name(
    values: dict[str, Any], overrides: list[str], recompute: object, accumulation: str
) -> None:
    """An override speaks for both names, whatever the file calls it."""
    found = Recipe.from_dict({"data": {"train": "x"}, "training": values}, *overrides).training
    assert (found.recompute, found.accumulation) == (recompute, accumulation)


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"gradient_checkpointing": True, "recompute": 3}, "has both recompute and gradient_checkpointing"),
        ({"gradient_checkpointing": 1}, "has gradient_checkpointing: 1; expected true or false, or better recompute"),
        ({"recompute": True}, "recompute.* is true"),
        ({"recompute": -1}, "recompute"),
    ],
)
def test_what_recompute_cannot_be_is_said(values: dict[str, Any], words: str) -> None:
    with pytest.raises(RecipeError, match=words):
        Recipe.from_dict({"data": {"train": "x"}, "training": values})


def test_keys_by_the_names_that_others_give_them() -> None:
    """``training.lr`` is answered with 'learning_rate'. Each name stands for one key, which there is, and is no key itself."""
    keys = choices()
    assert ELSEWHERE.keys() <= keys.keys()
    names = [name for several in ELSEWHERE.values() for name in several.split()]
    assert len(set(names)) == len(names)
    for key, several in ELSEWHERE.items():
        section, _, name = key.rpartition(".")
        for other in several.split():
            with pytest.raises(RecipeError, match=f"Did you mean '({key}|{name})'"):
                Recipe.from_dict({**MINIMAL, "folder": "x"}, f"{section}.{other}=1".lstrip("."))
