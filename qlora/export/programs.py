"""Which programs load an adapter as its files have it: one rule a program.

    what it holds                        vLLM                SGLang              llama.cpp, Ollama
    LoRA on linears                      to rank 512         yes                 yes, as gguf-adapter
    … on a head tied to the embedding    yes                 yes                 no
    … on an embedding                    yes                 yes                 no
    … on experts                         no                  no                  no
    DoRA, whole modules, anything else   no                  no                  no

vLLM's and llama.cpp's columns are held against the programs (tests/programs); SGLang's and Ollama's follow their
documentation; Ollama takes safetensors too, of Llama, Mistral and Gemma 1 and 2. Experts: vLLM has a way for some on a GPU, which was not tried. Knows an adapter's two files.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from qlora.files.strangers import json_object
from qlora.methods.files import CONFIG, WEIGHTS
from qlora.model.tensor_file import read_header

VLLM_RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)
"""What vLLM 0.32 takes as ``--max-lora-rank``: an adapter needs the next one from its own rank on."""
WHOLE = ("use_dora", "modules_to_save", "trainable_token_indices")


class Verdict(NamedTuple):
    """What a program does with an adapter: why it does not load it, or None, and how to tell it to."""

    program: str
    why_not: str | None
    how: str = ""
    command: str = ""
    """A line for a shell that opens it; BASE and PATH stand for the two folders."""


def programs(folder: str | Path, tied: bool) -> list[Verdict]:
    """Of the adapter in ``folder``, on a base whose head is ``tied`` to its embedding or not. One verdict a program."""
    config = json_object((Path(folder) / CONFIG).read_bytes())
    keys = list(read_header(Path(folder) / WEIGHTS).entries)
    none = None
    if config.get("peft_type") != "LORA" or any(config.get(field) for field in WHOLE):
        none = "it is no plain LoRA"
    elif named := config.get("target_parameters"):
        shared = all(str(name).endswith(".weight") for name in named)
        none = "it adapts shared experts, by their weights (target_parameters)" if shared else "it adapts experts"
    ends = None
    if any(".lora_embedding_" in key for key in keys):
        ends = "it adapts the embedding"
    elif tied and any(".lm_head.lora_" in key for key in keys):
        ends = "it adapts a head that is tied to the embedding"
    r = max(int(config.get("r") or 0), *(config.get("rank_pattern") or {"": 0}).values())
    needed = next((rank for rank in VLLM_RANKS if rank >= r), None)
    high = None if needed else f"its rank is {r}, where {VLLM_RANKS[-1]} is the most"
    vllm, sglang = f"--enable-lora --max-lora-rank {needed}", f"--max-lora-rank {r}"
    return [
        Verdict("vLLM", none or high, vllm, f"vllm serve BASE {vllm} --lora-modules tuned=PATH"),
        Verdict(
            "SGLang", none, sglang, f"python -m sglang.launch_server --model-path BASE {sglang} --lora-paths tuned=PATH"
        ),
        Verdict("llama.cpp", none or ends, "as gguf-adapter", "llama-cli -m BASE.gguf --lora ADAPTER.gguf"),
        Verdict("Ollama", none or ends, "as gguf-adapter", "ollama create tuned -f Modelfile"),
    ]


def commands(verdicts: Sequence[Verdict]) -> list[str]:
    """For a shell, a line a program that loads the adapter; what a program reads as GGUF is exported first."""
    lines = [each.command for each in verdicts if each.why_not is None]
    gguf = next((at for at, line in enumerate(lines) if line.startswith("llama-cli")), len(lines))
    first = ["qlora export RUN gguf-adapter  # for the lines below, in the folder that it writes"]
    return lines[:gguf] + (first + lines[gguf:] if lines[gguf:] else [])


def told(verdicts: list[Verdict]) -> str:
    """``Loads in vLLM (--enable-lora --max-lora-rank 16); not in llama.cpp, since it adapts the embedding.``"""
    takes = [f"{each.program} ({each.how})" for each in verdicts if each.why_not is None]
    whys: dict[str, list[str]] = {}
    for each in verdicts:
        if each.why_not is not None:
            whys.setdefault(each.why_not, []).append(each.program)
    parts = [f"Loads in {', '.join(takes)}"] if takes else []
    parts += [f"{'not' if parts else 'Not'} in {' or '.join(names)}, since {why}" for why, names in whys.items()]
    return "; ".join(parts) + "."
