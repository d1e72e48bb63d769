"""A multimodal model's run: its text is trained, broken off, resumed and merged, and its towers stay in their files."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from safetensors.torch import load_file

import qlora
from qlora.recipe import Recipe
from qlora.runs.train import resume, train
from tests.tiny import WORDS, tiny_values, wrapper_checkpoint, write_lines


@pytest.mark.slow
def test_it_is_resumed_as_any_other(tmp_path: Path) -> None:
    base = wrapper_checkpoint(tmp_path / "base", "Gemma3")
    texts = [
        {"text": " ".join(WORDS[(line + at * 7) % len(WORDS)] for at in range(5 + line % 9))} for line in range(40)
    ]
    values = tiny_values(base, write_lines(tmp_path / "data.jsonl", texts), tmp_path / "run")
    values["training"] |= {"steps": 4, "save_every": 2, "keep_checkpoints": 3}
    values["evaluation"] = {"prompts": 0}
    asked = Recipe.model_validate(values)
    assert any("are left in their files" in sentence for sentence in qlora.plan(asked).why)
    train(asked, quiet=True)
    shutil.copytree(tmp_path / "run", tmp_path / "again")
    for gone in ("adapter", "checkpoints/000004"):
        shutil.rmtree(tmp_path / "again" / gone)
    resume(tmp_path / "again", quiet=True)
    ours, theirs = (load_file(tmp_path / name / "adapter/adapter_model.safetensors") for name in ("run", "again"))
    assert ours.keys() == theirs.keys()
    assert all(values.equal(theirs[name]) for name, values in ours.items())
    assert any(values.any() for name, values in ours.items() if "lora_B" in name)
