"""vLLM serves the exported adapters with our log-probabilities. Skipped where there is no vLLM (``make test-programs``)."""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from qlora import recipe as config
from qlora.export.merged import merge
from qlora.export.programs import programs
from qlora.methods.base import apply_method
from qlora.methods.files import save_adapter, save_portable
from tests.programs import read_vllm
from tests.rounding import MODEL, rounding
from tests.tiny import SIZES, random_model, stir, tiny_base, tiny_checkpoint, word_tokenizer

PYTHON = Path(os.environ.get("QLORA_VLLM_PYTHON", "/nonexistent"))
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not PYTHON.is_file(), reason="QLORA_VLLM_PYTHON names no Python with vLLM"),
]
IDS = [1, *(n * 7 % 90 + 3 for n in range(40))]
LINEARS = ("q_proj", "down_proj")
LOADED = {
    "plain": (config.LoRA(r=8), save_portable),
    "rslora": (config.LoRA(r=8, rslora=True), save_portable),
    "several ranks": (config.LoRA(r=4, rank_pattern={"q_proj": 8}), save_portable),
    "tied head": (config.LoRA(r=4, target_modules=(*LINEARS, "lm_head")), save_portable),
    "embedding": (config.LoRA(r=4, target_modules=(*LINEARS, "embed_tokens")), save_portable),
    "rank 20": (config.LoRA(r=20), save_portable),
    "several ranks and scales": (
        config.LoRA(r=4, rank_pattern={"k_proj": 8}, alpha_pattern={"q_proj": 32}),
        save_adapter,
    ),
}
REFUSED = {
    "dora": (config.DoRA(r=4), save_portable),
    "whole module": (config.Combined(parts=(config.LoRA(r=4), config.Modules(modules=("norm",)))), save_adapter),
}
HIGHEST = 32
HEADS = {
    "hidden_size": 128,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 64,
}  # that vLLM has on a CPU
EXPERTS = ("mlp.experts.gate_up_proj", "mlp.experts.down_proj")


def likelihood(logits: Tensor) -> np.ndarray:
    """log-probabilities [T − 1] of the ids, each after those before it."""
    return logits.log_softmax(-1)[:-1].gather(1, torch.tensor(IDS[1:])[:, None])[:, 0].numpy()


def read(work: Path, adapters: list[Path | None], max_rank: int = HIGHEST) -> list[np.ndarray]:
    """What vLLM says of the base with each of ``adapters``."""
    job = {
        "base": str(work / "base"), "adapters": [adapter and str(adapter) for adapter in adapters], "max_rank": max_rank,
        "ids": IDS, "out": str(work / "found.npz"),
    }  # fmt: skip
    (work / "job.json").write_text(json.dumps(job))
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    quiet = {"VLLM_LOGGING_LEVEL": "ERROR", "VLLM_CPU_KVCACHE_SPACE": "1"}
    subprocess.run([str(PYTHON), read_vllm.__file__, str(work / "job.json")], env={**environment, **quiet}, check=True)
    found = np.load(job["out"])
    return [found[f"{number}"] for number in range(len(adapters))]


def test_adapters(tmp_path: Path) -> None:
    """What the rules say that vLLM loads gives our likelihoods; what they say that it does not, it refuses."""
    random_model("Llama", **{**SIZES, **HEADS, "tie_word_embeddings": True}).save_pretrained(tmp_path / "base")
    word_tokenizer().save_pretrained(tmp_path / "base")
    ids, expected, verdicts, folders = torch.tensor([IDS]), {}, {}, {}
    for name, (section, save) in {**LOADED, **REFUSED}.items():
        model = apply_method(tiny_base(tmp_path / "base", "none"), section)
        stir(model, 0.05)
        folders[name] = tmp_path / name.replace(" ", "-")
        save(model, folders[name])
        verdicts[name] = programs(folders[name], tied=True)[0]
        with torch.no_grad():
            expected[name] = likelihood(model.model(input_ids=ids, use_cache=False).logits[0])
            with model.disabled():
                bare = likelihood(model.model(input_ids=ids, use_cache=False).logits[0])
    alone, *found = read(tmp_path, [None, *(folders[name] for name in LOADED)])
    close = rounding(MODEL, terms=128) * float(np.abs(bare).max())
    assert np.abs(alone - bare).max() < close
    for name, theirs in zip(LOADED, found, strict=True):
        apart, moved = np.abs(theirs - expected[name]).max(), np.abs(bare - expected[name]).max()
        print(f"{name}: within {apart:.1e}, the base alone {moved:.1e}; {verdicts[name]}")
        assert moved > 100 * close
        assert apart < close
        assert verdicts[name].why_not is None
    assert verdicts["rank 20"].how.endswith(f" {HIGHEST}")
    for name in REFUSED:  # it does not outlive a refusal
        (theirs,) = read(tmp_path, [folders[name]])
        assert theirs.dtype.kind == "U"
        assert verdicts[name].why_not


def test_a_mixture_of_experts(tmp_path: Path) -> None:
    """Merged, with experts that were trained, it gives our likelihoods; the adapter beside its base does not load."""
    base = tiny_checkpoint(tmp_path / "trained on", "qwen3_moe", **HEADS)
    model = apply_method(tiny_base(base), config.LoRA(r=4, target_parameters=EXPERTS))
    stir(model, 0.05)
    ids = torch.tensor([IDS])
    with torch.no_grad():
        expected = likelihood(model.model(input_ids=ids, use_cache=False).logits[0])
        with model.disabled():
            bare = likelihood(model.model(input_ids=ids, use_cache=False).logits[0])
    save_adapter(model, tmp_path / "adapter")
    merge(base, tmp_path / "adapter", tmp_path / "base", compute_dtype="fp32", dtype="fp32")
    (found,) = read(tmp_path, [None], max_rank=0)
    apart, moved = np.abs(found - expected).max(), np.abs(bare - expected).max()
    print(f"experts, merged: within {apart:.1e}, the base alone {moved:.1e}")
    close = rounding(MODEL, terms=128) * float(np.abs(expected).max())
    assert moved > 100 * close
    assert apart < close
    assert programs(tmp_path / "adapter", tied=False)[0].why_not == "it adapts experts"
