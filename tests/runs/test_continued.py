"""A new run that goes on from an adapter: of a run, of a folder, of PEFT; on new data, by a new optimizer."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from qlora.errors import MethodError, QloraError, RecipeError, RunError
from qlora.files.durable import sha256_of
from qlora.planning.continued import continued
from qlora.planning.plan import survey
from qlora.recipe import Recipe
from qlora.runs.evaluate import load_run
from qlora.runs.train import resume, train
from tests.marks import slow
from tests.tiny import conversations, logits_of, tiny_values, write_lines

WEIGHTS = "adapter_model.safetensors"
METHODS: dict[str, Any] = {
    "lora": {"r": 4, "alpha": 8, "dropout": 0.1},
    "pissa": {"r": 4, "init": "pissa"},
    "adalora": {"name": "adalora", "r": 2, "initial_r": 3},
    "p_tuning": {"name": "p_tuning", "tokens": 3},
    "two": [{"name": "lora", "r": 2}, {"name": "modules", "modules": ["lm_head"]}],
}


@pytest.fixture(scope="module")
def new_data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_lines(tmp_path_factory.mktemp("new") / "new.jsonl", conversations()[::-1][:30])


@pytest.fixture(scope="module")
def first(tiny_model: Path, chat_data: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A short run of each method, once somebody asks for it. Copy it before changing it."""
    place = tmp_path_factory.mktemp("first")

    class Runs(dict[str, Path]):
        def __missing__(self, name: str) -> Path:
            values = {**tiny_values(tiny_model, chat_data, place / name), "method": METHODS[name]}
            values["training"] |= {"steps": 2}
            train(Recipe.from_dict(values), quiet=True)
            return self.setdefault(name, place / name)

    return Runs()


def recipe_from(model: Path, data: Path, folder: Path, method: Any, **training: Any) -> Recipe:
    values = {**tiny_values(model, data, folder), "method": method}
    values["training"] |= {"steps": 2, "learning_rate": 1e-3, **training}
    return Recipe.from_dict(values)


def newest(run: Path) -> Path:
    return checkpoints_of(run)[-1]


def checkpoints_of(run: Path) -> list[Path]:
    return sorted((run / "checkpoints").iterdir(), key=lambda place: int(place.name))


@pytest.mark.parametrize("name", ["lora", *(slow(name) for name in ("adalora", "pissa", "p_tuning", "two"))])
def test_a_run_goes_on_from_anothers(
    first: dict[str, Path], name: str, tiny_model: Path, new_data: Path, tmp_path: Path
) -> None:
    shutil.copytree(first[name], tmp_path / "first")
    recipe = recipe_from(
        tiny_model, new_data, tmp_path / "run", {"from": str(tmp_path / "first")}, keep_checkpoints=9, save_every=1
    )
    if name == "lora":
        assert f"Goes on from the adapter in '{newest(tmp_path / 'first')}'" in str(survey(recipe, table=False))
    run = train(recipe, quiet=True)
    old, begun = (load_file(place / WEIGHTS) for place in (newest(tmp_path / "first"), checkpoints_of(run.folder)[0]))
    assert old.keys() == begun.keys()
    assert all(torch.equal(values, begun[key]) for key, values in old.items())
    after = load_file(newest(run.folder) / WEIGHTS)
    assert any(not torch.equal(values, begun[key]) for key, values in after.items())
    environment = json.loads((run.folder / "environment.json").read_text())
    place = newest(tmp_path / "first")
    assert environment["continued_from"] == {"folder": str(place), "sha256": sha256_of(place / WEIGHTS)}
    # resumed from its beginning, without the old adapter, it is the same run to the last bit
    shutil.rmtree(tmp_path / "first")
    for place in checkpoints_of(run.folder)[1:]:
        shutil.rmtree(place)
    resume(run.folder, quiet=True)
    again = load_file(newest(run.folder) / WEIGHTS)
    assert all(torch.equal(values, again[key]) for key, values in after.items())


def test_more_of_a_run_is_its_own_recipe_in_a_folder_of_its_own(first: dict[str, Path], tmp_path: Path) -> None:
    origin = tmp_path / "run"
    shutil.copytree(first["lora"], origin)
    more = (f"folder={origin}", f"method.from={origin}", "training.steps=1", "evaluation.prompts=0")
    run = train(Recipe.from_yaml(origin / "recipe.yaml", *more), quiet=True)
    assert run.folder == tmp_path / "run-2"
    environment = json.loads((run.folder / "environment.json").read_text())
    assert environment["continued_from"]["folder"] == str(newest(origin))
    with pytest.raises(
        MethodError, match="r=3 instead of 4"
    ):  # what it does not ask for itself is another adapter still
        train(Recipe.from_yaml(origin / "recipe.yaml", *more, "method.r=3"), quiet=True)
    with pytest.raises(RecipeError, match=r"follows a linear schedule.* method\.from="):
        resume(origin, "training.steps=9", quiet=True)


@pytest.mark.slow
def test_what_is_measured_before_is_the_old_adapter(
    first: dict[str, Path], tiny_model: Path, chat_data: Path, tmp_path: Path
) -> None:
    old = json.loads((first["lora"] / "evaluation.json").read_text())["held_out"]["after"]["loss"]
    run = train(recipe_from(tiny_model, chat_data, tmp_path / "run", {"from": str(first["lora"])}), quiet=True)
    assert run.before is not None
    assert run.before.loss == pytest.approx(old, rel=1e-6)


def test_a_run_goes_on_from_pefts_adapter(tiny_model: Path, new_data: Path, tmp_path: Path) -> None:
    settings = peft.LoraConfig(
        r=3, lora_alpha=5, target_modules=r".*\.[qv]_proj", task_type="CAUSAL_LM", init_lora_weights=False
    )
    theirs = peft.get_peft_model(AutoModelForCausalLM.from_pretrained(tiny_model, dtype=torch.float32), settings)
    theirs.save_pretrained(tmp_path / "peft")
    method = {"from": str(tmp_path / "peft"), "adapter_dtype": "fp32", "dropout": 0.2}
    recipe = recipe_from(tiny_model, new_data, tmp_path / "run", method, learning_rate=1e-12)
    run = train(recipe, quiet=True)
    trained = Recipe.from_yaml(run.folder / "recipe.yaml").method
    assert (trained.name, trained.r, trained.alpha, trained.dropout) == ("lora", 3, 5, 0.2)
    assert trained.from_ == str(tmp_path / "peft")
    old, new = load_file(tmp_path / "peft" / WEIGHTS), load_file(newest(run.folder) / WEIGHTS)
    assert all(torch.allclose(values, new[key], atol=1e-9) for key, values in old.items())
    assert logits_of(load_run(run.folder).model).isfinite().all()
    # its own recipe says the same again
    again = Recipe.from_yaml(run.folder / "recipe.yaml", f"folder={tmp_path / 'again'}")
    assert train(again, quiet=True).steps == run.steps


@pytest.mark.parametrize("how", ["changed", "resized"])
def test_an_adapter_with_embeddings_of_its_own_is_refused_in_a_true_sentence(
    how: str, tiny_model: Path, new_data: Path, tmp_path: Path
) -> None:
    base = AutoModelForCausalLM.from_pretrained(tiny_model, dtype=torch.float32)
    if how == "resized":
        base.resize_token_embeddings(base.config.vocab_size + 2)
    else:
        base.get_input_embeddings().weight.data += 0.01
    theirs = peft.get_peft_model(base, peft.LoraConfig(r=3, target_modules=["q_proj"], task_type="CAUSAL_LM"))
    theirs.save_pretrained(tmp_path / "peft", save_embedding_layers=True)
    if how == "resized":
        tokenizer = AutoTokenizer.from_pretrained(tiny_model)
        tokenizer.add_tokens(["<one>", "<two>"])
        tokenizer.save_pretrained(tmp_path / "peft")
    recipe = recipe_from(
        tiny_model, new_data, tmp_path / "run", {"from": str(tmp_path / "peft"), "adapter_dtype": "fp32"}
    )
    with pytest.raises(
        MethodError, match=r"brings along a changed embedding or head, or new rows of one.*Merge it into"
    ):
        train(recipe, quiet=True)


@pytest.mark.parametrize(
    ("of", "method", "said"),
    [
        ("lora", {"r": 8}, r"has r=8 instead of 4 of the adapter"),
        ("lora", {"name": "dora", "r": 4}, r"method is dora, and the adapter in .* is lora"),
        ("two", {"r": 2, "name": "lora"}, r"method is lora, and the adapter in .* is lora and modules"),
        ("lora", {"target_modules": ["q_proj"]}, r"has target_modules=.*q_proj"),
    ],
)
def test_a_contradiction_is_refused_in_a_sentence(
    first: dict[str, Path], of: str, method: dict[str, Any], said: str, tiny_model: Path, new_data: Path, tmp_path: Path
) -> None:
    recipe = recipe_from(tiny_model, new_data, tmp_path / "run", {**method, "from": str(first[of])})
    for verb in (survey, train):
        with pytest.raises(MethodError, match=said):
            verb(recipe)
    assert not (tmp_path / "run").exists()


def test_keys_that_say_the_same_may_stay(
    first: dict[str, Path], tiny_model: Path, new_data: Path, tmp_path: Path
) -> None:
    method = {"name": "lora", "r": 4, "alpha": 8, "learning_rate_ratio": 16, "from": str(first["lora"] / "adapter")}
    with pytest.raises(MethodError, match="alpha=8"):  # the form for others has alpha = r
        survey(recipe_from(tiny_model, new_data, tmp_path / "run", method), table=False)
    method["from"] = str(first["lora"])
    run = train(recipe_from(tiny_model, new_data, tmp_path / "run", method), quiet=True)
    assert Recipe.from_yaml(run.folder / "recipe.yaml").method.learning_rate_ratio == 16


def test_what_is_no_adapter_is_said_before_anything_is_loaded(
    first: dict[str, Path], tiny_model: Path, new_data: Path, tmp_path: Path
) -> None:
    for method, said in (
        ({"from": str(tmp_path)}, "neither an adapter"),
        ([{"name": "lora", "from": "x"}], "inside a list"),
    ):
        with pytest.raises(QloraError, match=said):
            survey(recipe_from(tiny_model, new_data, tmp_path / "run", method), table=False)
    shutil.copytree(first["lora"] / "adapter", tmp_path / "wider")
    path = tmp_path / "wider" / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "r": 5, "lora_alpha": 5}))
    with pytest.raises(MethodError, match="wrong shape"):
        survey(recipe_from(tiny_model, new_data, tmp_path / "run", {"from": str(tmp_path / "wider")}), table=False)


@pytest.mark.slow
def test_the_run_that_it_goes_on_from_is_not_overwritten(
    first: dict[str, Path], tiny_model: Path, new_data: Path, tmp_path: Path
) -> None:
    shutil.copytree(first["lora"], tmp_path / "run")
    recipe = recipe_from(tiny_model, new_data, tmp_path / "run", {"from": str(tmp_path / "run")})
    before = sorted(os.listdir(tmp_path / "run" / "checkpoints"))
    assert train(recipe.model_copy(update={"overwrite": True}), quiet=True).folder == tmp_path / "run-2"
    assert sorted(os.listdir(tmp_path / "run" / "checkpoints")) == before


def test_stopped_before_its_beginning_was_saved_it_says_so(
    first: dict[str, Path], tiny_model: Path, new_data: Path, tmp_path: Path
) -> None:
    run = train(recipe_from(tiny_model, new_data, tmp_path / "run", {"from": str(first["lora"])}), quiet=True)
    shutil.rmtree(run.folder / "checkpoints")
    with pytest.raises(RunError, match="goes on from another adapter and has no checkpoint that holds it"):
        resume(run.folder, quiet=True)


def test_a_damaged_checkpoint_is_passed_over_aloud(
    first: dict[str, Path], tiny_model: Path, new_data: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """As for every verb on a run: its older checkpoint, and where none is whole the finished adapter."""
    shutil.copytree(first["lora"], tmp_path / "first")
    recipe = recipe_from(tiny_model, new_data, tmp_path / "second", {"from": str(tmp_path / "first")})
    (newest(tmp_path / "first") / WEIGHTS).write_bytes(b"damaged")
    continued(recipe)
    assert "damaged" in capfd.readouterr().err
