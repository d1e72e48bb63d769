"""Every recipe in recipes/methods trains: a few steps on a tiny model, from the recipe file to a chat with the result."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import qlora
from qlora.chat import Conversation
from qlora.cli import main
from qlora.errors import MethodError
from qlora.methods.base import METHODS
from qlora.methods.files import WEIGHTS
from qlora.recipe import Recipe, parts_of
from qlora.runs.export import in_transformers
from tests.rounding import rounding

FOLDER = Path(__file__).parents[2] / "recipes" / "methods"
RECIPES = sorted(FOLDER.glob("*.yaml"))
# what a model of two layers with other words has in the place of the recipe's own
TINY = {
    "last-layers": ["method.modules=[layers.1, model.norm]"],
    "rslora": ["method.r=16"],
    "new-tokens": ['method.1.tokens=[" folder", " whole"]'],
}
UNMERGED = {
    "houlsby", "lin", "pfeiffer", "parallel", "prompt-tuning", "p-tuning", "prefix-tuning", "lora-and-bottleneck",
    "lora-and-prompt",
}  # fmt: skip


def test_every_method_has_a_recipe() -> None:
    shown = {part.name for path in RECIPES for part in parts_of(Recipe.from_yaml(path).method)}
    assert shown == set(METHODS)


# one that merges, one that cannot, one of several methods with a tokenizer of its own; the others in make test-all
QUICK = ("lora", "prompt-tuning", "new-tokens")
EVERY = [pytest.param(path, marks=[] if path.stem in QUICK else pytest.mark.slow, id=path.stem) for path in RECIPES]


@pytest.mark.parametrize("path", EVERY)
def test_recipe_trains(path: Path, tiny_model: Path, chat_data: Path, tmp_path: Path) -> None:
    overrides = [
        f"model.name={tiny_model}", f"data.train={chat_data}", "data.held_out=null", "data.held_out_fraction=0.2",
        "data.max_length=128", "training.steps=3", "training.save_every=2", "evaluation.prompts=1",
        "evaluation.max_new_tokens=4", f"folder={tmp_path / 'run'}", "device.name=cpu", "device.threads=1",
    ]  # fmt: skip
    assert main(["train", str(path), *overrides, *TINY.get(path.stem, [])]) == 0
    run = tmp_path / "run"
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    assert [line["step"] for line in lines if "loss" in line] == [1, 2, 3]
    assert (run / "report.html").is_file()
    evaluation = json.loads((run / "evaluation.json").read_text(encoding="utf-8"))
    after = evaluation["held_out"]["after"]["loss"]
    assert after != evaluation["held_out"]["before"]["loss"]
    if path.stem == "new-tokens":  # the words of the data, whose rows began alike
        saved = load_file(run / "adapter" / WEIGHTS)
        deltas = [values for key, values in saved.items() if key.endswith("tokens_delta")]
        assert [len(rows) for rows in deltas] == [2, 2]  # of the embedding and of the head
        assert not any(torch.equal(*rows) for rows in deltas)
    # the run as it was trained, read back from its folder
    assert qlora.evaluate(run, quiet=True).after.loss == pytest.approx(after, rel=rounding())  # type: ignore[union-attr]
    assert isinstance(Conversation(run).say("hello there", max_new_tokens=2), str)
    if path.stem in UNMERGED:
        with pytest.raises(MethodError, match="cannot be merged"):
            qlora.merge(run)
    else:
        found = in_transformers(run, qlora.merge(run, dtype="fp32").folder, 3)
        assert found is not None
        assert found.largest < 1e-3
