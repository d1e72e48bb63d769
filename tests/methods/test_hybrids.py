"""Hybrids under a method: what a mixer reads without calling it is left alone, and PEFT loads what is saved."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM

from qlora.methods.base import apply_method
from qlora.methods.files import save_portable
from qlora.methods.targets import leaf, left_out
from qlora.model.nf4 import FrozenLinear
from qlora.recipe import LoRA
from tests.rounding import MODEL, rounding
from tests.tiny import HYBRIDS, any_checkpoint, difference, logits_of, stir, tiny_base


@pytest.mark.parametrize("name", ["falcon-h1", "jamba", "nemotron-h", "qwen3.5"])
def test_peft_loads_what_all_linear_saves(name: str, tmp_path: Path) -> None:
    family, sizes, kind = HYBRIDS[name]
    any_checkpoint(tmp_path / "base", family, num_hidden_layers=3, **sizes)
    model = apply_method(tiny_base(tmp_path / "base", "none"), LoRA(r=4))
    stir(model, 0.05)
    (tmp_path / "adapter").mkdir()
    assert save_portable(model, tmp_path / "adapter") is None
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "base", dtype=torch.float32)
    theirs = PeftModel.from_pretrained(plain, tmp_path / "adapter").eval()
    assert difference(logits_of(model.model), logits_of(theirs)) < rounding(3 * MODEL)
    said = left_out(model.model, "all-linear")
    without = {"falcon_h1": ["out_proj"], "nemotron_h": ["out_proj"], "jamba": ["dt_proj"]}.get(kind, [])
    assert len(said) == len(without)
    assert all(f"without {name}" in sentence for name, sentence in zip(without, said, strict=True))
    assert not left_out(model.model, ("out_proj",))


def test_a_weight_that_is_read_and_not_called_stays_dense_and_has_no_adapter(tmp_path: Path) -> None:
    family, sizes, _ = HYBRIDS["jamba"]
    model = apply_method(tiny_base(any_checkpoint(tmp_path / "base", family, num_hidden_layers=3, **sizes)), LoRA(r=4))
    inside = {path: module for path, module in model.model.named_modules() if leaf(path) == "dt_proj"}
    assert len(inside) == 2
    assert all(type(module) is torch.nn.Linear for module in inside.values())
    assert any(isinstance(module, FrozenLinear) for module in model.model.modules())
    logits_of(model.model)
    assert any(
        "without dt_proj, whose weights jamba reads" in sentence for sentence in left_out(model.model, "all-linear")
    )


def test_a_mixer_is_never_in_training_itself(tmp_path: Path) -> None:
    """Else a fused kernel would read the packed weight of its ``out_proj``."""
    family, sizes, _ = HYBRIDS["falcon-h1"]
    network = tiny_base(any_checkpoint(tmp_path / "base", family, num_hidden_layers=3, **sizes)).model.train()
    mixers = [module for path, module in network.named_modules() if leaf(path) == "mamba"]
    assert len(mixers) == 3
    assert not any(mixer.training for mixer in mixers)
    assert all(mixer.in_proj.training for mixer in mixers)
