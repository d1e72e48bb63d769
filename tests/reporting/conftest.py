"""A made-up run folder: the files that a run writes, with small numbers."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest

from qlora.recipe import Recipe


class RunFolder:
    """Writes and changes a run folder's files."""

    def __init__(self, path: Path) -> None:
        self.path = path
        path.mkdir(parents=True)

    def recipe(self, **sections: Any) -> None:
        values = {"folder": f"runs/{self.path.name}", "data": {"train": "data.jsonl"}, **sections}
        (self.path / "recipe.yaml").write_text(Recipe.from_dict(values).to_yaml(), encoding="utf-8")

    def json(self, name: str, value: Any) -> None:
        (self.path / name).write_text(json.dumps(value), encoding="utf-8")

    def metrics(self, lines: list[Any], torn: str = "") -> None:
        text = "".join((line if isinstance(line, str) else json.dumps(line)) + "\n" for line in lines)
        (self.path / "metrics.jsonl").write_text(text + torn, encoding="utf-8")


def step_line(step: int, /, *, total: int = 40, **values: Any) -> dict[str, Any]:
    """A step's line in metrics.jsonl: loss falls from 3 to 1, 100 tokens of which 60 carry loss, half a second."""
    return {
        "step": step,
        "epoch": 2 * step / total,
        "loss": 3 - 2 * step / total,
        "learning_rate": 2e-4 * (1 - step / total),
        "grad_norm": 0.5,
        "target_tokens": 60,
        "tokens": 100,
        "tokens_per_second": 200.0,
        "peak_memory_bytes": 2**30,
        "seconds": 0.5,
        **values,
    }


@pytest.fixture
def begun(tmp_path: Path) -> RunFolder:
    """A run that has written its recipe and its plan, and nothing more."""
    run = RunFolder(tmp_path / "demo")
    run.recipe(training={"epochs": 2, "learning_rate": 5e-4}, model={"name": "org/model"})
    counts = {"records": 90, "examples": 88, "tokens": 4000, "target_tokens": 2400, "truncated": 3, "dropped": 2}
    run.json(
        "plan.json",
        {
            "model": {"name": "org/model", "parameters": 1_000_000, "quantization": "nf4"},
            "method": {"trainable_parameters": 25_000},
            "data": {
                "form": "messages",
                "train_on": "assistant",
                "train": {**counts, "target_fraction": 0.6, "split_conversations": 0},
                "held_out": {"records": 10, "examples": 10, "tokens": 500, "target_tokens": 300, "truncated": 0},
                "notes": ["A note of the data room."],
            },
            "steps": 40,
            "device": "cpu",
            "arithmetic": {"flops_per_token": 6e8, "matrix_flops_per_second": 2e11},
            "memory": {"base": 3 * 2**20, "optimizer": 2**20, "total": 4 * 2**20},
            "why": ["compute_dtype: fp32, as this is a CPU."],
        },
    )
    run.json("environment.json", {"versions": {"torch": "2.13.0"}, "device": "a CPU", "data_fingerprint": "abc123"})
    return run


@pytest.fixture
def finished(begun: RunFolder) -> RunFolder:
    """A run of 40 steps with an evaluation half way, answers before and after."""
    lines: list[Any] = [step_line(step) for step in range(1, 41)]
    lines.insert(20, {"step": 20, "held_out_loss": 2.2, "held_out_perplexity": 9.03, "held_out_target_tokens": 300})
    begun.metrics(lines)
    scores = {
        when: {"loss": loss, "perplexity": math.exp(loss), "target_tokens": 300}
        for when, loss in (("before", 3.2), ("after", 1.6))
    }
    answer = {"prompt": "What is up?", "expected": "The sky.", "before": "I do not know.", "after": "The sky is."}
    begun.json("evaluation.json", {"held_out": scores, "generations": [answer]})
    return begun
