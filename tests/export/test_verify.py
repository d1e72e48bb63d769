"""What a mixture of experts was merged into is held against the merge made anew, expert by expert."""

from __future__ import annotations

from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file

from qlora.errors import DiffersError
from qlora.export.merged import merge
from qlora.export.source import Source
from qlora.export.verify import verify
from qlora.model.checkpoint import Checkpoint
from qlora.recipe import LoRA, ModelSection
from tests.export.test_merge import trained
from tests.tiny import MIXTURES, tiny_checkpoint

EXPERTS = ("mlp.experts.gate_up_proj", "mlp.experts.down_proj")


@pytest.mark.parametrize("family", MIXTURES)
def test_experts(tmp_path: Path, family: str) -> None:
    base = tiny_checkpoint(tmp_path / "base", family)
    trained(base, tmp_path / "adapter", "nf4", LoRA(r=4, target_parameters=EXPERTS))
    merge(base, tmp_path / "adapter", tmp_path / "merged", compute_dtype="fp32")
    section = ModelSection(name=str(base), compute_dtype="fp32")
    source = Source(Checkpoint(base, "base"), section, tmp_path / "adapter")
    file = tmp_path / "merged" / "model.safetensors"
    tensors = load_file(file)
    assert verify(source, tmp_path / "merged") == len(tensors)
    name = next(name for name in tensors if "experts" in name and "down_proj" in name)
    save_file({**tensors, name: tensors[name] * 1.05}, file, metadata={"format": "pt"})
    with pytest.raises(DiffersError, match=rf"{name} differ"):
        verify(source, tmp_path / "merged")
