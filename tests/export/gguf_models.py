"""A small random model of every family that GGUF is written for, with a tokenizer as SentencePiece's are."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import transformers
from tokenizers import Tokenizer, decoders, models, normalizers, processors
from torch import nn
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

from qlora import recipe as config
from qlora.methods.base import AdaptedModel, apply_method
from qlora.methods.files import save_adapter
from tests.tiny import SIZES, stir, tiny_base

WINDOWS = ["sliding_attention", "full_attention"]
LLAMA3 = {
    "rope_type": "llama3", "rope_theta": 10000.0, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}  # fmt: skip
SHORT, LONG = [1.0 + n / 8 for n in range(8)], [2.0 + n / 4 for n in range(8)]
FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("Llama", {}),
    "llama 3.1, tied": ("Llama", {"rope_parameters": LLAMA3, "tie_word_embeddings": True}),
    "llama, biases": ("Llama", {"attention_bias": True, "rope_parameters": {"rope_type": "linear", "rope_theta": 1e4, "factor": 2.0}}),
    "mistral": ("Mistral", {"sliding_window": 32}),
    "smollm3": ("SmolLM3", {"num_hidden_layers": 4}),
    "qwen2": ("Qwen2", {"rope_parameters": {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0, "original_max_position_embeddings": 16}}),
    "qwen3": ("Qwen3", {}),
    "qwen3.5": ("Qwen3_5Text", {
        "num_hidden_layers": 4, "linear_num_key_heads": 2, "linear_num_value_heads": 4, "linear_key_head_dim": 16,
        "linear_value_head_dim": 16, "head_dim": 32, "rope_parameters": {
            "rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.5, "mrope_section": [4, 2, 2], "mrope_interleaved": True,
        },
    }),
    "gemma": ("Gemma", {}),
    "gemma2": ("Gemma2", {"query_pre_attn_scalar": 16, "layer_types": WINDOWS, "sliding_window": 8}),
    "gemma3": ("Gemma3Text", {"query_pre_attn_scalar": 16, "num_hidden_layers": 6, "sliding_window": 8}),
    "phi3": ("Phi3", {}),
    "phi3, long": ("Phi3", {
        "max_position_embeddings": 2048, "original_max_position_embeddings": 512,  # llama.cpp's shortest context is 256
        "rope_parameters": {"rope_type": "longrope", "rope_theta": 1e4, "short_factor": SHORT, "long_factor": LONG},
    }),
}  # fmt: skip


def sentencepiece_like() -> PreTrainedTokenizerFast:
    """BPE with byte fallback, as Llama 2's: unknown, begin, end, 256 bytes, letters and some merges."""
    words = ["<unk>", "<s>", "</s>", *(f"<0x{n:02X}>" for n in range(256)), "▁", *"abcdehilnorstw"]
    merges = [
        ("▁", "t"),
        ("h", "e"),
        ("▁t", "he"),
        ("a", "n"),
        ("i", "n"),
        ("o", "r"),
        ("▁", "w"),
        ("l", "l"),
        ("an", "d"),
    ]
    words += ["".join(pair) for pair in merges]
    core = Tokenizer(
        models.BPE(
            {word: n for n, word in enumerate(words)}, merges, unk_token="<unk>", byte_fallback=True, fuse_unk=True
        )
    )
    core.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    core.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    core.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return PreTrainedTokenizerFast(tokenizer_object=core, bos_token="<s>", eos_token="</s>", unk_token="<unk>")


def checkpoint(folder: Path, family: str) -> Path:
    name, options = FAMILIES[family]
    tokenizer = sentencepiece_like()
    torch.manual_seed(0)
    values = {**SIZES, "vocab_size": 288, "pad_token_id": 0, "initializer_range": 0.08, **options}
    model = AutoModelForCausalLM.from_config(getattr(transformers, f"{name}Config")(**values))
    for key, parameter in model.named_parameters():
        if "norm" in key or "bias" in key or parameter.dim() == 1:  # ones and zeros would hide one that is lost
            nn.init.normal_(parameter, 0.3, 0.1)
    model.save_pretrained(folder)
    tokenizer.chat_template = "{% for message in messages %}{{ message.content }}</s>{% endfor %}"
    tokenizer.save_pretrained(folder)
    return folder


def trained(folder: Path, adapter: Path, section: config.LoRA | None = None) -> AdaptedModel:
    """An unquantised base with an adapter that does something, saved."""
    adapted = apply_method(tiny_base(folder, "none"), section or config.LoRA(r=4, alpha=8))
    stir(adapted, 0.05)
    save_adapter(adapted, adapter)
    return adapted
