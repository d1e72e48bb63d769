"""The flat script is what it says: short, flat, and it trains, measures, saves and merges."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SCRIPT = ROOT / "recipes" / "flat.py"
RECIPE = ROOT / "qlora" / "quickstart" / "quickstart.yaml"


@pytest.fixture(scope="module")
def done(tmp_path_factory: pytest.TempPathFactory, tiny_model: Path, chat_data: Path) -> tuple[Path, str]:
    """The folder in which the script ran on a tiny model, and what it printed."""
    folder = tmp_path_factory.mktemp("flat")
    (folder / RECIPE.name).write_bytes(RECIPE.read_bytes())  # as python -m qlora.quickstart leaves it
    overrides = (
        f"model.name={tiny_model}", f"data.train={chat_data}", "data.held_out=null", "data.held_out_fraction=0.2",
        "data.max_length=128", "training.steps=4", "training.batch_size=2", "training.learning_rate=3e-2",
        "device.name=cpu",
    )  # fmt: skip
    result = subprocess.run([sys.executable, str(SCRIPT), *overrides], cwd=folder, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    return folder, result.stdout


def test_it_is_under_60_lines_and_flat() -> None:
    text = SCRIPT.read_text(encoding="utf-8")
    assert len(text.splitlines()) < 60
    assert not [node for node in ast.walk(ast.parse(text)) if isinstance(node, ast.FunctionDef | ast.ClassDef)]


@pytest.mark.slow
def test_it_trains_and_says_what_that_brought(done: tuple[Path, str]) -> None:
    _, printed = done
    assert [int(number) for number in re.findall(r"(?m)^step (\d+)  loss ", printed)] == [1, 2, 3, 4]
    measured = re.search(r"held-out loss (\S+) before, (\S+) after, over (\d+) tokens", printed)
    assert measured
    assert float(measured[2]) < float(measured[1])
    assert "<|start|>assistant\n⟦" in printed
    assert re.search(r"(?m)^\? \w+ \d+\?\n  expected: ", printed)


@pytest.mark.slow
def test_it_leaves_an_adapter_and_a_plain_model_with_the_same_logits(done: tuple[Path, str], tiny_model: Path) -> None:
    import torch
    from transformers import AutoModelForCausalLM

    from qlora.methods.loading import load_adapter
    from qlora.recipe import ModelSection
    from qlora.residence.load import load_base

    folder, _ = done
    ids = torch.arange(10, 40)[None]
    base = load_base(ModelSection(name=str(tiny_model)), torch.device("cpu"))
    with torch.no_grad():
        bare = base.model(ids).logits
        expected = load_adapter(base, folder / "runs/flat/adapter").model(ids).logits
        plain = AutoModelForCausalLM.from_pretrained(folder / "runs/flat/merged", dtype=torch.float32)
        found = plain(ids).logits
    size = expected.abs().max()
    assert (expected - bare).abs().max() > 0.05 * size, "the adapter does nothing, so this says nothing"
    assert (found - expected).abs().max() < 0.02 * size  # the merged weights are rounded to bf16
