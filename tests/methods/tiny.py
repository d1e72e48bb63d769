"""Tiny random checkpoints of real architectures, with a tokenizer, and an adapter that does something."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from transformers import (
    Gemma2Config,
    Gemma2ForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen2ForCausalLM,
)

from qlora.methods import AdaptedModel
from qlora.model.base import Base
from qlora.recipe import ModelSection
from qlora.residence.load import load_base
from tests.rounding import difference as difference

VOCABULARY = 96
SIZES = {
    "vocab_size": VOCABULARY,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 64,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
FAMILIES: dict[str, tuple[Any, Any]] = {
    "llama": (LlamaConfig, LlamaForCausalLM),
    "qwen2": (Qwen2Config, Qwen2ForCausalLM),  # biases on q, k and v
    "gemma2": (Gemma2Config, Gemma2ForCausalLM),  # tied head, soft-capped logits
}
TOKENS = torch.arange(24).reshape(2, 12) * 7 % VOCABULARY


def tiny_checkpoint(
    folder: Path, family: str = "llama", shard: str = "5GB", dtype: torch.dtype = torch.float32, **sizes: Any
) -> Path:
    """Write a random checkpoint of ``family`` with weights large enough that quantisation and adapters show."""
    config_class, model_class = FAMILIES[family]
    torch.manual_seed(0)
    model = model_class(config_class(**{**SIZES, **sizes}, initializer_range=0.08))
    for name, values in model.named_parameters():
        if name.endswith("bias"):  # transformers starts them at zero, which would hide one that is lost
            torch.nn.init.normal_(values, std=0.1)
    model.to(dtype).save_pretrained(folder, max_shard_size=shard)
    words = Tokenizer(WordLevel({f"w{number}": number for number in range(VOCABULARY)}, unk_token="w3"))
    words.pre_tokenizer = Whitespace()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, pad_token="w0", bos_token="w1", eos_token="w2")
    tokenizer.chat_template = "{% for message in messages %}{{ message.content }}{% endfor %}"
    tokenizer.save_pretrained(folder)
    return folder


def tiny_base(folder: Path, quantization: str = "nf4", **section: Any) -> Base:
    return load_base(
        ModelSection(name=str(folder), quantization=quantization, compute_dtype="fp32", **section), torch.device("cpu")
    )


def stir(model: AdaptedModel, size: float = 0.1) -> None:
    """Give both halves of every adapter values, so that it changes the logits and both get a gradient."""
    generator = torch.Generator().manual_seed(7)
    for values in model.trainable_parameters().values():
        values.data.normal_(std=size, generator=generator)


def logits_of(model: Any) -> torch.Tensor:
    with torch.no_grad():
        logits: torch.Tensor = model(input_ids=TOKENS, use_cache=False).logits
    return logits if logits.dtype == torch.float64 else logits.float()
