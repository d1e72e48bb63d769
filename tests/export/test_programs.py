"""The rules for programs that load adapters; tests/programs holds them against the programs themselves."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from qlora import recipe as config
from qlora.export.programs import commands, programs, told
from qlora.methods.base import apply_method
from qlora.methods.files import save_adapter, save_portable
from tests.tiny import tiny_base, tiny_checkpoint

VLLM, LLAMA = (
    "vLLM (--enable-lora --max-lora-rank {0}), SGLang (--max-lora-rank {1})",
    "llama.cpp (as gguf-adapter), Ollama (as gguf-adapter)",
)


@pytest.mark.parametrize(
    ("section", "save", "tied", "said"),
    [
        (config.LoRA(r=4), save_portable, True, f"Loads in {VLLM.format(8, 4)}, {LLAMA}."),
        (config.LoRA(r=4, rank_pattern={"q_proj": 33}), save_portable, False, f"Loads in {VLLM.format(64, 33)}, {LLAMA}."),
        (config.LoRA(r=4, rank_pattern={"q_proj": 9}), save_adapter, False, f"Loads in {VLLM.format(16, 9)}, {LLAMA}."),
        (config.LoRA(r=2, target_modules=("lm_head",)), save_portable, True, f"Loads in {VLLM.format(8, 2)}; not in llama.cpp or Ollama, since it adapts a head that is tied to the embedding."),
        (config.LoRA(r=2, target_modules=("embed_tokens",)), save_portable, False, f"Loads in {VLLM.format(8, 2)}; not in llama.cpp or Ollama, since it adapts the embedding."),
        (config.DoRA(r=2), save_portable, False, "Not in vLLM or SGLang or llama.cpp or Ollama, since it is no plain LoRA."),
        (config.Combined(parts=(config.LoRA(r=2), config.Modules(modules=("norm",)))), save_adapter, False, "Not in vLLM or SGLang or llama.cpp or Ollama, since it is no plain LoRA."),
        (config.IA3(), save_portable, False, "Not in vLLM or SGLang or llama.cpp or Ollama, since it is no plain LoRA."),
    ],
)  # fmt: skip
def test_said(tmp_path: Path, section: Any, save: Any, tied: bool, said: str) -> None:
    save(apply_method(tiny_base(tiny_checkpoint(tmp_path / "base")), section), tmp_path / "adapter")
    assert told(programs(tmp_path / "adapter", tied)) == said


def test_a_rank_beyond_vllms(tmp_path: Path) -> None:
    save_portable(apply_method(tiny_base(tiny_checkpoint(tmp_path / "base")), config.LoRA(r=4)), tmp_path / "adapter")
    values = tmp_path / "adapter/adapter_config.json"
    values.write_text(values.read_text().replace('"r": 4', '"r": 513'))
    said = told(programs(tmp_path / "adapter", tied=False))
    assert said == (
        f"Loads in SGLang (--max-lora-rank 513), {LLAMA}; not in vLLM, since its rank is 513, where 512 is the most."
    )


def test_a_line_of_a_shell_for_each(tmp_path: Path) -> None:
    model = apply_method(tiny_base(tiny_checkpoint(tmp_path / "base")), config.LoRA(r=4, target_modules=("lm_head",)))
    save_portable(model, tmp_path / "adapter")
    loads = programs(tmp_path / "adapter", tied=False)
    assert commands(loads) == [
        "vllm serve BASE --enable-lora --max-lora-rank 8 --lora-modules tuned=PATH",
        "python -m sglang.launch_server --model-path BASE --max-lora-rank 4 --lora-paths tuned=PATH",
        "qlora export RUN gguf-adapter  # for the lines below, in the folder that it writes",
        "llama-cli -m BASE.gguf --lora ADAPTER.gguf",
        "ollama create tuned -f Modelfile",
    ]
    assert commands(programs(tmp_path / "adapter", tied=True)) == commands(loads)[:2]
