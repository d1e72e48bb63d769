"""Rows that go through a decoder a layer at a time come to what the whole model makes of them."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn

from qlora.data.batches import collate
from qlora.model.attention import keep_apart
from qlora.model.walk import Walk, standing
from tests.tiny import CPU, random_model, random_rows, tiny_model


@pytest.mark.parametrize(
    ("family", "sizes"), [("Llama", {}), ("Gemma2", {}), ("Qwen3", {}), ("GPTJ", {"rotary_dim": 4})]
)  # whose layers answer with a tuple
@pytest.mark.parametrize("apart", [True, False])
def test_layer_by_layer_is_the_whole(family: str, sizes: dict[str, int], apart: bool) -> None:
    model = random_model(family, **sizes)
    if apart:
        keep_apart(model, torch.float32, None)
    batches = [collate([row], 0) for row in random_rows(6)]
    walk = Walk(model, batches)
    for batch, hidden in enumerate(walk.first):
        for number in range(len(walk.layers)):
            hidden = walk.visit(number, batch, hidden)
        assert torch.equal(walk.behind(batch, hidden), walk.last[batch])


def test_what_stands_instead_is_used_and_gone_again(tmp_path: Path) -> None:
    model = tiny_model(tmp_path / "model")
    walk = Walk(model.model, [collate(random_rows(1), 0)])
    layer, path = walk.layers[0], "self_attn.q_proj"
    before, zero = layer.get_submodule(path), nn.Linear(64, 64, bias=False, device=CPU)
    nn.init.zeros_(zero.weight)
    plain = walk.visit(0, 0, walk.first[0])
    with standing(layer, {path: zero}):
        assert not torch.equal(walk.visit(0, 0, walk.first[0]), plain)
    assert layer.get_submodule(path) is before
    assert torch.equal(walk.visit(0, 0, walk.first[0]), plain)
