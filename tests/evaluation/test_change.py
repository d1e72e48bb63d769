"""What fine-tuning did to the weights, against float64 decompositions of what the layers answer before and after."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from qlora import recipe as config
from qlora.evaluation.change import Change, change_of, directions_of
from qlora.methods import AdaptedModel, apply_method
from tests.rounding import difference, rounding
from tests.tiny import adapter_bytes, stir, tiny_base, tiny_checkpoint

TARGETS = ("q_proj", "down_proj", "up_proj")  # square, wide, tall
LORA = config.LoRA(r=4, alpha=8, target_modules=TARGETS)
CASES: dict[str, tuple[Any, str]] = {
    "lora": (LORA, "nf4"),
    "lora, 8 bits": (LORA, "int8"),
    "embedding": (config.LoRA(r=4, alpha=8, target_modules=("embed_tokens",)), "nf4"),
    "pissa": (config.LoRA(r=4, alpha=4, init="pissa", target_modules=TARGETS), "nf4"),
    "loftq": (config.LoRA(r=4, alpha=4, init="loftq", loftq_iterations=2, target_modules=TARGETS), "nf4"),
    "dora": (config.DoRA(r=4, alpha=8, target_modules=TARGETS), "nf4"),
    "dora, pissa": (config.DoRA(r=4, alpha=4, init="pissa", target_modules=TARGETS), "nf4"),
    "adalora": (config.AdaLoRA(r=2, initial_r=4, alpha=8, target_modules=TARGETS), "nf4"),
    "ia3": (config.IA3(), "nf4"),
    "modules": (config.Modules(modules=("layers.1.mlp", "norm")), "nf4"),
    "full": (config.Full(), "none"),
}


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_checkpoint(tmp_path_factory.mktemp("base"))


def stand_in(module: Any) -> Tensor:
    """The matrix that a linear or an embedding multiplies with, in float64, from its answers to unit vectors."""
    with torch.no_grad():
        if isinstance(module, nn.Embedding) or isinstance(getattr(module, "base", None), nn.Embedding):
            return module(torch.arange(96)).double()
        answers = module(torch.cat([torch.eye(module.in_features), torch.zeros(1, module.in_features)]))
        return (answers[:-1] - answers[-1]).t().double()  # without the bias


def stand_ins(model: AdaptedModel, paths: list[str]) -> dict[str, Tensor]:
    return {path: stand_in(model.model.get_submodule(path)) for path in paths}


@pytest.mark.parametrize("name", CASES)
def test_the_change_is_what_the_answers_say(checkpoint: Path, name: str) -> None:
    section, quantization = CASES[name]
    model = apply_method(tiny_base(checkpoint, quantization), section)
    found = change_of(model)
    paths = [one.path.replace(".mlp.", ".mlp.module.") if name == "modules" else one.path for one in found.matrices]
    before = stand_ins(model, paths)
    assert all(one.norm == 0 and one.effective_rank == one.rank_90 == 0 for one in found.matrices) or "dora" in name
    stir(model)
    kept = adapter_bytes(model)
    found, directions, after = change_of(model), directions_of(model), stand_ins(model, paths)
    assert adapter_bytes(model) == kept
    ranks = {"lora": 4, "lora, 8 bits": 4, "embedding": 4, "pissa": 8, "loftq": 8, "adalora": 4}
    for path, one in zip(paths, found.matrices, strict=True):
        delta = after[path] - before[path]
        bound = rounding() * float(after[path].norm() + before[path].norm())
        expected = torch.linalg.svdvals(delta)
        values = torch.tensor(one.values)
        assert (one.rows, one.columns) == tuple(delta.shape)
        assert len(values) == ranks.get(name, min(delta.shape)), one
        assert (expected[: len(values)] - values).abs().max() <= bound
        assert one.norm == pytest.approx(float(delta.norm()), abs=bound)
        assert one.norm_before == pytest.approx(float(before[path].norm()), abs=bound)
        first = torch.linalg.svd(delta).Vh[:2]
        assert difference((directions[one.path][:2].double() @ first.t()).abs(), torch.eye(2)) < 1e-3
    again = Change.from_json(json.loads(json.dumps(found.to_json())))
    assert again == found
