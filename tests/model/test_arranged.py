"""Weights that transformers fuses or splits on load are made, and a merge splits them into what they were made from."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers.core_model_loading import Chunk, Concatenate, WeightConverter

from qlora.errors import ModelError
from qlora.model.arranged import Arranged, arranged
from qlora.model.checkpoint import Checkpoint

CONVOLUTION = WeightConverter(
    ["q_conv1d.weight", "k_conv1d.weight", "v_conv1d.weight"], ["conv1d.weight"], [Concatenate(dim=0)]
)
HALVES = WeightConverter(["fused.weight"], ["up.weight", "gate.weight"], [Chunk(dim=0)])


class Model(nn.Module):
    config = SimpleNamespace(model_type="made_up")

    def __init__(self) -> None:
        super().__init__()
        self.mixer = nn.ModuleDict({"conv1d": nn.Conv1d(10, 10, 4, groups=10, bias=False)})
        self.mlp = nn.ModuleDict({"up": nn.Linear(4, 3, bias=False), "gate": nn.Linear(4, 5, bias=False)})


def stored(folder: Path) -> tuple[Checkpoint, dict[str, Tensor]]:
    shapes = {
        "mixer.q_conv1d": (2, 1, 4),
        "mixer.k_conv1d": (3, 1, 4),
        "mixer.v_conv1d": (5, 1, 4),
        "mlp.fused": (8, 4),
    }
    tensors = {f"{name}.weight": torch.randn(shape) for name, shape in shapes.items()}
    save_file({**tensors, "norm.weight": torch.ones(4)}, folder / "model.safetensors")
    return Checkpoint(folder, "made up"), tensors


FOUND = {
    **{("mixer.conv1d.weight", f"{one}_conv1d.weight"): [f"mixer.{one}_conv1d.weight"] for one in "qkv"},
    ("mlp.up.weight", "fused.weight"): ["mlp.fused.weight"],
}


def test_weights_are_made_and_split_again(tmp_path: Path) -> None:
    checkpoint, tensors = stored(tmp_path)
    model: Any = Model()
    made = arranged(checkpoint, model, FOUND, [CONVOLUTION, HALVES])
    assert isinstance(made, Arranged)
    assert {name: entry.shape for name, entry in made.entries.items()} == {
        **{name: tuple(values.shape) for name, values in model.state_dict().items()},
        "norm.weight": (4,),
    }
    weights = {name: made.read(name) for name in made.group_of}
    q, k, v, fused = tensors.values()
    assert torch.equal(weights["mixer.conv1d.weight"], torch.cat([q, k, v]))
    assert torch.equal(weights["mlp.up.weight"], fused[:3])
    assert torch.equal(weights["mlp.gate.weight"], fused[3:])
    assert torch.equal(made.read("mlp.gate.weight", 4), fused[7])
    again = {name: values for group in made.groups for name, values in group.split(weights).items()}
    assert again.keys() == tensors.keys()
    assert all(torch.equal(again[name], tensors[name]) for name in tensors)


def test_a_missing_part_is_named(tmp_path: Path) -> None:
    checkpoint, _ = stored(tmp_path)
    model: Any = Model()
    found = {key: names for key, names in FOUND.items() if key[1] != "k_conv1d.weight"}
    with pytest.raises(ModelError, match=r"other tensors for 'mixer.conv1d.weight' than transformers makes it from"):
        arranged(checkpoint, model, found, [CONVOLUTION, HALVES])
