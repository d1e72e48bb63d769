"""What every method answers to: the frozen weights that PEFT saves beside an adapter are known, and not another base's."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from safetensors.torch import load_file, save_file

from qlora.errors import MethodError
from qlora.methods.loading import load_adapter
from tests.methods.against_peft import plain_model
from tests.rounding import rounding
from tests.tiny import difference, logits_of, tiny_base, tiny_checkpoint

TARGETS = ["lm_head", "v_proj"]
HEAD = "base_model.model.lm_head.base_layer.weight"
CONFIGS: dict[str, Any] = {
    "lora": peft.LoraConfig(r=2, target_modules=TARGETS, init_lora_weights=False),
    "dora": peft.LoraConfig(r=2, target_modules=TARGETS, init_lora_weights=False, use_dora=True),
    "adalora": peft.AdaLoraConfig(
        init_r=4, target_r=2, target_modules=TARGETS, init_lora_weights=False, total_step=10, tinit=1, tfinal=2
    ),
    "ia3": peft.IA3Config(target_modules=TARGETS, feedforward_modules=[], init_ia3_weights=False),
}


@pytest.mark.parametrize("kind", CONFIGS)
def test_a_head_that_peft_saved_beside_its_adapter_is_the_bases_own_or_refused(tmp_path: Path, kind: str) -> None:
    folder = tiny_checkpoint(tmp_path / "base")
    torch.manual_seed(0)
    theirs = peft.get_peft_model(plain_model(folder), CONFIGS[kind]).eval()
    theirs.save_pretrained(tmp_path / "adapter")
    path = tmp_path / "adapter" / "adapter_model.safetensors"
    tensors = load_file(path)
    assert HEAD in tensors
    loaded = load_adapter(tiny_base(folder, "none"), tmp_path / "adapter")
    assert "lm_head" in loaded.planted
    worst = difference(logits_of(loaded.model), logits_of(theirs))
    print(f"{kind}: {worst:.1e}")
    assert worst < rounding()
    for other in (tensors[HEAD] + 0.1, torch.cat([tensors[HEAD]] * 2)):
        save_file({**tensors, HEAD: other}, path, metadata={"format": "pt"})
        base = tiny_base(folder, "none")
        before = [name for name, _ in base.model.named_modules()]
        with pytest.raises(MethodError, match="brings along a weight of lm_head that is not this base's"):
            load_adapter(base, tmp_path / "adapter")
        assert [name for name, _ in base.model.named_modules()] == before
