"""A frozen weight is changed and put back bit for bit, wherever it came from."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

from qlora.methods.originals import copy_to_keep, knows_what_was_quantised, own_weight, put, put_back
from qlora.model.base import Base
from qlora.model.in_memory import as_base
from qlora.model.nf4 import dense_weight
from tests.tiny import tiny_base, tiny_checkpoint

PATH = "model.layers.0.mlp.up_proj"


def tensors_of(linear: nn.Module) -> dict[str, Tensor]:
    return {name: values.clone() for name, values in [*linear.named_parameters(), *linear.named_buffers()]}


def base_of(folder: Path, source: str) -> Base:
    checkpoint = tiny_checkpoint(folder / "plain", num_hidden_layers=1)
    if source == "memory":
        return as_base(AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.float32))
    if not source.startswith("packed"):
        return tiny_base(checkpoint, source)
    eight = source.endswith("int8")
    quantised = (
        BitsAndBytesConfig(load_in_8bit=True)
        if eight
        else BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4")
    )
    packed = AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.float32, quantization_config=quantised)
    packed.train().save_pretrained(folder / "packed")
    for file in checkpoint.glob("tokenizer*"):
        (folder / "packed" / file.name).write_bytes(file.read_bytes())
    return tiny_base(folder / "packed", "int8" if eight else "nf4")


@pytest.mark.parametrize("source", ["nf4", "fp4", "int8", "none", "memory", "packed-nf4", "packed-int8"])
def test_what_was_put_goes_and_the_original_comes_back(tmp_path: Path, source: str) -> None:
    base = base_of(tmp_path, source)
    linear = base.model.get_submodule(PATH)
    before, dense = tensors_of(linear), dense_weight(linear, torch.float32).clone()
    kept = copy_to_keep(base, PATH, linear)
    assert (kept is not None) is (source == "memory")
    assert knows_what_was_quantised(base, PATH) is (source in ("nf4", "fp4", "int8", "none"))

    own = own_weight(base, PATH, linear, kept)
    if source in ("nf4", "fp4", "int8"):
        assert not torch.equal(own, dense)  # what was quantised, and not what came of it
        put(linear, own)
        assert all(torch.equal(values, before[name]) for name, values in tensors_of(linear).items())
    else:
        assert torch.equal(own, dense)
    put(linear, own * -2)
    changed = dense_weight(linear, torch.float32)
    assert (changed + 2 * own).abs().max() < 0.3 * own.abs().max()
    assert not torch.equal(changed, dense)
    assert torch.equal(own_weight(base, PATH, linear, kept), own)  # whatever stands there now

    put(linear, own * -2)
    put_back(base, PATH, linear, kept)
    after = tensors_of(linear)
    assert after.keys() == before.keys()
    assert all(torch.equal(values, before[name]) for name, values in after.items())
