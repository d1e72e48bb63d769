"""The model card says what the run's files say, in YAML that hubs read and Markdown that nothing breaks out of."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import yaml

from qlora.reporting.card import licence_of, write_card

RECIPE = "model: {name: org/base-1b}\ndata: {train: a.jsonl}\nmethod: {name: lora, r: 8}\n"


def run(folder: Path, recipe: str = RECIPE, name: str = "org/base-1b") -> Path:
    folder.mkdir()
    (folder / "recipe.yaml").write_text(recipe)
    plan = {
        "steps": 2, "model": {"name": name, "parameters": 10**9}, "method": {"trainable_parameters": 5_000_000},
        "data": {"train": {"examples": 1200, "target_tokens": 34_000}, "held_out": {"examples": 60, "target_tokens": 1_700}},
    }  # fmt: skip
    (folder / "plan.json").write_text(json.dumps(plan))
    lines = [{"step": n, "loss": 2.0, "tokens": 10, "seconds": 60.0, "peak_memory_bytes": 3 * 1024**3} for n in (1, 2)]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    before, after = ({"loss": loss, "perplexity": 8.0, "target_tokens": 1_700} for loss in (2.5, 2.0))
    (folder / "evaluation.json").write_text(json.dumps({"held_out": {"before": before, "after": after}}))
    return folder


@pytest.mark.parametrize(
    ("form", "relation", "library", "loads"),
    [
        ("merged", "finetune", "transformers", "vllm serve PATH"),
        ("nf4", "quantized", "transformers", "bitsandbytes"),
        ("adapter", "adapter", "peft", 'PeftModel.from_pretrained(base, "PATH")'),
        ("gguf", "quantized", "gguf", "llama-cli -m model-q8_0.gguf"),
        ("gguf-adapter", "adapter", "gguf", "--lora model-q8_0.gguf"),
    ],
)
def test_card(tmp_path: Path, form: str, relation: str, library: str, loads: str) -> None:
    out = tmp_path / "out"
    out.mkdir()
    (out / "model-q8_0.gguf").write_bytes(b"GGUF")
    (tmp_path / "base").mkdir()
    (tmp_path / "base/README.md").write_text("---\nlicense: apache-2.0\n---\n# Base\n")
    text = write_card(run(tmp_path / "mine"), out, form, base_folder=tmp_path / "base", told=["It loads."]).read_text()
    front = yaml.safe_load(text.split("---\n")[1])
    assert front == {
        "base_model": "org/base-1b", "base_model_relation": relation, "library_name": library, "license": "apache-2.0",
        "tags": ["qlora", "lora"],
    }  # fmt: skip
    for part in (
        "# mine\n", "5.00 M of 1.00 B parameters", "| 2.500 | 2.000 | −20.0 % |", "It loads.\n", loads, RECIPE.splitlines()[0],
        "1\u202f200 training examples, 34\u202f000 tokens with loss", "of training on its device", "3.00 GiB",
    ):  # fmt: skip
        assert part in text, part


def test_nothing_breaks_out(tmp_path: Path) -> None:
    name = 'a"`b\n---\nlicense: mit'
    folder = run(tmp_path / "mine", RECIPE + "# ```\n# hf_abcdefghijklmnopqrstuvwxyz0123456789\n", name)
    (folder / "evaluation.json").unlink()
    text = write_card(folder, tmp_path, "adapter", shell=["serve BASE --lora PATH"]).read_text()
    assert """\nserve 'a'"'"''"'"'b --- license: mit' --lora PATH\n""" in text
    front = yaml.safe_load(text.split("\n---\n")[0].removeprefix("---\n"))
    assert "base_model" not in front
    assert "license" not in front
    assert "# mine\n" in text
    assert "````yaml" in text
    assert "hf_abcdef" not in text
    assert "No held-out data" in text
    assert "names no licence" in text


def test_no_path_of_this_machine_leaves_it(tmp_path: Path) -> None:
    recipe = f"model: {{name: {tmp_path}/models/mine}}\ndata: {{train: [{tmp_path}/a b.jsonl, '~/my/data.jsonl']}}\nfolder: runs/mine\n"
    text = write_card(run(tmp_path / "mine", recipe, f"{tmp_path}/models/mine"), tmp_path, "merged").read_text()
    assert str(tmp_path) not in text
    assert "made of `mine`" in text
    assert "data.jsonl" in text
    assert "~/" not in text
    assert "folder: runs/mine" in text


@pytest.mark.parametrize(
    "card", [None, "", "# no YAML\n", "---\n: [\n---\n", "---\n- list\n---\n", "---\nlicense: [a]\n---\n"]
)
def test_no_licence(tmp_path: Path, card: str | None) -> None:
    if card is not None:
        (tmp_path / "README.md").write_text(card)
    assert licence_of(tmp_path) is None
