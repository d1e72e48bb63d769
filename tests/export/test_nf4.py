"""A merged model in 4 bits opens as bitsandbytes' own, in transformers and here."""

from __future__ import annotations

import json
import os
import signal
from pathlib import Path
from typing import Any

import bitsandbytes
import pytest
import torch
from bitsandbytes.functional import dequantize_4bit
from transformers import AutoModelForCausalLM

from qlora.errors import ModelError
from qlora.export.merged import merge
from qlora.export.nf4 import export_nf4
from qlora.export.source import Source
from qlora.model.checkpoint import Checkpoint
from qlora.recipe import LoRA, ModelSection
from tests.export.test_merge import trained
from tests.rounding import difference, rounding
from tests.tiny import MIXTURES, logits_of, tiny_base, tiny_checkpoint


@pytest.mark.parametrize("quantization", ["nf4", "none"])
def test_it_opens_and_keeps_what_was_learned(tmp_path: Path, quantization: str) -> None:
    base = tiny_checkpoint(tmp_path / "base", "qwen2")
    trained(base, tmp_path / "adapter", quantization, LoRA(r=4, alpha=0.4))
    section = ModelSection(name=str(base), quantization=quantization, compute_dtype="fp32")  # type: ignore[arg-type]
    export_nf4(Checkpoint(base, "base"), tmp_path / "adapter", tmp_path / "nf4", section=section)
    opened = AutoModelForCausalLM.from_pretrained(tmp_path / "nf4", dtype=torch.float32).eval()
    assert sum(isinstance(module, bitsandbytes.nn.Linear4bit) for module in opened.modules()) == 14
    ours = tiny_base(tmp_path / "nf4").model
    for path, linear in opened.named_modules():
        if isinstance(linear, bitsandbytes.nn.Linear4bit):
            found = dequantize_4bit(linear.weight.data, linear.weight.quant_state)
            assert torch.equal(found, ours.get_submodule(path).dequantise(torch.bfloat16))
    assert difference(logits_of(opened), logits_of(ours)) < 5 * 2**-8  # bitsandbytes computes in bf16
    merge(
        base,
        tmp_path / "adapter",
        tmp_path / "merged",
        compute_dtype="fp32",
        quantization=section.quantization,
        base="original",
    )
    again = tiny_base(tmp_path / "merged").model  # rounded to bf16 before, as here
    assert difference(logits_of(ours), logits_of(again)) <= rounding()
    before = tiny_base(base).model
    path = "model.layers.0.self_attn.q_proj"
    assert not torch.equal(ours.get_submodule(path).weight, before.get_submodule(path).weight)
    said = json.loads((tmp_path / "nf4" / "config.json").read_text())["quantization_config"]
    assert (said["quant_method"], said["llm_int8_skip_modules"]) == ("bitsandbytes", ["lm_head"])


def test_a_killed_export_goes_on_with_the_files_that_it_finished(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    base, adapter, out = tiny_checkpoint(tmp_path / "base", "qwen2"), tmp_path / "adapter", tmp_path / "nf4"
    trained(base, adapter, "nf4", LoRA(r=4, alpha=4))
    section = ModelSection(name=str(base), compute_dtype="fp32")
    monkeypatch.setattr("qlora.export.nf4.SHARD", 20_000)
    expected = export_nf4(Checkpoint(base, "base"), adapter, tmp_path / "whole", section=section)
    files = {path.name: path.read_bytes() for path in (tmp_path / "whole").iterdir()}
    assert len([name for name in files if name.endswith(".safetensors")]) > 3
    plain, asked, finished = Source.tensor, list[str](), len(files)

    def deadly(self: Source, name: str, *given: Any, **named: Any) -> torch.Tensor:
        asked.append(name)
        if len(list(tmp_path.glob(".nf4.writing-*/model-*"))) == finished:
            os.kill(os.getpid(), signal.SIGKILL)
        return plain(self, name, *given, **named)

    monkeypatch.setattr(Source, "tensor", deadly)
    if not (child := os.fork()):
        finished = 2
        export_nf4(Checkpoint(base, "base"), adapter, out, section=section)
        os._exit(0)
    assert os.waitpid(child, 0)[1] == signal.SIGKILL
    assert not out.exists()
    found = export_nf4(Checkpoint(base, "base"), adapter, out, section=section)
    places = json.loads(files["model.safetensors.index.json"])["weight_map"]
    assert asked
    assert {places[name] for name in asked}.isdisjoint({min(places.values())})
    assert {path.name: path.read_bytes() for path in out.iterdir()} == files
    assert (found.tensors, found.adapted, found.bytes) == (expected.tensors, expected.adapted, expected.bytes)
    assert {path.name for path in tmp_path.iterdir()} == {"base", "adapter", "whole", "nf4"}


def test_experts_are_refused(tmp_path: Path) -> None:
    base = tiny_checkpoint(tmp_path / "base", next(iter(MIXTURES)))
    trained(base, tmp_path / "adapter")
    section = ModelSection(name=str(base), compute_dtype="fp32")
    with pytest.raises(ModelError, match="has experts"):
        export_nf4(Checkpoint(base, "base"), tmp_path / "adapter", tmp_path / "nf4", section=section)
    assert not (tmp_path / "nf4").exists()
