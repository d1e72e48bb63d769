"""How long a token takes: which model is measured as unmerged and as merged, and that it is left as it was."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from qlora import recipe as config
from qlora.evaluation import latency as measured
from qlora.evaluation.latency import latency_of
from qlora.methods.base import apply_method
from qlora.methods.planted import Planted
from qlora.model.nf4 import FrozenLinear
from qlora.residence.load import load_base
from tests.tiny import CPU, logits_of, stir, tiny_base, tiny_checkpoint

LORA = config.LoRA(r=4)
PISSA = config.LoRA(r=4, alpha=4, init="pissa")
MODULES = config.Combined(parts=(LORA, config.Modules(modules=("norm",))))


@pytest.fixture(autouse=True)
def few(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(measured, "TOKENS", 3)
    monkeypatch.setattr(measured, "ANSWERS", 1)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_checkpoint(tmp_path_factory.mktemp("base"))


@pytest.mark.parametrize(
    ("section", "quantization", "merges"),
    [
        (LORA, "nf4", True),
        (LORA, "none", True),
        (PISSA, "int8", True),
        (MODULES, "nf4", True),
        (config.Full(), "none", False),  # it is merged as it stands
        (config.PromptTuning(tokens=3), "nf4", False),
    ],
)
def test_merged_is_dense_and_nothing_is_planted(
    checkpoint: Path, monkeypatch: pytest.MonkeyPatch, section: Any, quantization: str, merges: bool
) -> None:
    model = apply_method(tiny_base(checkpoint, quantization), section)
    stir(model)
    model.after_step(1, 2)
    expected, generate, seen = logits_of(model.model), measured.generated, []

    def watched(one: Any, prompts: Any, count: int, **options: Any) -> Any:
        parts = list(one.model.modules())
        packed = sum(isinstance(part, FrozenLinear) for part in parts)
        seen.append((packed, sum(isinstance(part, Planted) and part.enabled for part in parts)))
        found = generate(one, prompts, count, **options)
        assert found.sequences.shape[1] == one.virtual_tokens + len(prompts[0]) + measured.TOKENS  # no end came early
        return found

    monkeypatch.setattr(measured, "generated", watched)
    model.base.end_tokens = tuple(range(96))
    found = latency_of(model)
    assert found.unmerged > 0
    as_it_stands = sum(isinstance(part, FrozenLinear) for part in model.model.modules()), len(model.layers())
    assert seen == [as_it_stands] * 2 + [(0, 0)] * (2 if merges else 0)
    assert (found.merged is None) == (section.name == "prompt_tuning")
    assert merges or found.merged in (None, found.unmerged)
    assert torch.equal(logits_of(model.model), expected)


def test_what_does_not_fit_is_not_merged(checkpoint: Path, tmp_path: Path) -> None:
    section = config.ModelSection(name=str(checkpoint), compute_dtype="fp32")
    streamed = load_base(section, CPU, memory=config.MemorySection(layers="streamed"))
    mixture = tiny_base(tiny_checkpoint(tmp_path, "qwen3_moe"))
    for base in (streamed, mixture):
        assert latency_of(apply_method(base, LORA)).merged is None
