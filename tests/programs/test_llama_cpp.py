"""llama.cpp opens what is exported and computes what was trained. Skipped where its library is not (``make test-programs``)."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from qlora.export import gguf_tokenizer
from qlora.export.gguf import export_gguf, export_gguf_adapter
from qlora.methods import save_adapter
from qlora.model.checkpoint import Checkpoint
from qlora.recipe import ModelSection
from tests.export.gguf_models import FAMILIES, checkpoint, sentencepiece_like, trained
from tests.programs import llama_cpp
from tests.rounding import difference

pytestmark = pytest.mark.skipif(bool(llama_cpp.MISSING), reason=llama_cpp.MISSING)

# llama.cpp keeps windows, rotary angles and normalisations in fp32 as we do, but sums in its own order and takes exp and
# gelu from tables of 16 bits where it has them: a wrong permutation or a lost factor is off by 0.1 and more
CLOSE = 5e-3


@pytest.mark.parametrize("family", FAMILIES)
def test_logits_are_the_adapter_models(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, family: str) -> None:
    # transformers makes byte-level tokenizers of some families' files; ids are given here, so any rules for text will do
    monkeypatch.setattr(gguf_tokenizer, "_kind", lambda tokenizer, described: None)
    base = checkpoint(tmp_path / "base", family)
    model = trained(base, tmp_path / "adapter")
    section = ModelSection(name=str(base), quantization="none", compute_dtype="fp32")
    written = export_gguf(base, tmp_path / "adapter", tmp_path / "gguf", section=section, type="f32")
    ids = [1, *(n * 7 % 250 + 3 for n in range(23))]
    with torch.no_grad():
        expected = model.model(input_ids=torch.tensor([ids]), use_cache=False).logits[0].float()
        with model.disabled():
            bare = model.model(input_ids=torch.tensor([ids]), use_cache=False).logits[0].float()
    opened = llama_cpp.LlamaCpp(written.file, context=64)
    worst = difference(torch.from_numpy(opened.logits(ids)), expected)
    opened.close()
    print(f"{family}: {worst:.1e}, without its adapter {difference(bare, expected):.1e}")
    assert worst < CLOSE
    assert difference(bare, expected) > 10 * CLOSE
    if family in ("llama", "qwen2", "qwen3.5", "mistral"):
        lora = export_gguf_adapter(section, Checkpoint(base, "base"), tmp_path / "adapter", tmp_path / "lora")
        plain = trained(base, tmp_path / "zero")
        for name, values in plain.trainable_parameters().items():
            if "lora_B" in name:
                values.data.zero_()
        save_adapter(plain, tmp_path / "zero")
        bare_file = export_gguf(base, tmp_path / "zero", tmp_path / "bare", section=section, type="f32").file
        opened = llama_cpp.LlamaCpp(bare_file, lora=lora.file, context=64)
        assert difference(torch.from_numpy(opened.logits(ids)), expected) < CLOSE
        opened.close()


TEXTS = ["the and in or", "hello  world", " the", "tthe", "日本語 🚀", "a\n\tb", "", "the</s>and"]


def test_sentencepiece_tokens(tmp_path: Path) -> None:
    base = checkpoint(tmp_path / "base", "llama")
    trained(base, tmp_path / "adapter")
    section = ModelSection(name=str(base), quantization="none", compute_dtype="fp32")
    opened = llama_cpp.LlamaCpp(
        export_gguf(base, tmp_path / "adapter", tmp_path / "gguf", section=section, type="f16").file
    )
    tokenizer = sentencepiece_like()
    for text in TEXTS:
        assert opened.tokens(text) == tokenizer(text)["input_ids"], text
    assert opened.ends(2)
    assert not opened.ends(1)
    assert np.isfinite(opened.logits([1, 2])).all()
    opened.close()
