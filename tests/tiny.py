"""The tiny models that tests run on, each made here: random checkpoints on disk, models in memory, adapters, rows and recipes.

    tiny_checkpoint(folder, "qwen2")     a checkpoint with a tokenizer of 96 words           → tiny_base, tiny_model
    any_checkpoint(folder, "Phi3")       of any family, stored in bf16, its norms not ones
    chat_checkpoint(folder)              with a tokenizer of bytes and a chat template       → tiny_values, a recipe for it
    random_model("Gemma2")               in memory, frozen, logits far from uniform
    small_model("falcon", folder)        in memory and adapted, layers that answer with a tuple

Knows models, methods and rows; must not know a trainer or what a test is about.
"""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path
from typing import Any

import numpy
import torch
import transformers
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from torch import Tensor, nn
from transformers import (
    AutoModelForCausalLM,
    Gemma2Config,
    Gemma2ForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
)

from qlora.data.examples import make_example
from qlora.data.packing import Row, make_rows
from qlora.methods.base import AdaptedModel, apply_method
from qlora.model.base import Base
from qlora.recipe import LoRA, ModelSection
from qlora.residence.load import load_base
from tests.data.conftest import make_tokenizer
from tests.rounding import difference

__all__ = [
    "CPU", "FAMILIES", "HYBRIDS", "SIZES", "SMALL", "TOKENS", "VOCABULARY", "WORDS", "WRAPPERS", "adapter_bytes", "any_checkpoint",
    "chat_checkpoint", "conversations", "difference", "gradients", "logits_of", "random_model", "random_rows", "random_wrapper", "small_model",
    "stir", "tiny_base", "tiny_checkpoint", "tiny_model", "tiny_values", "word_tokenizer", "wrapper_checkpoint", "write_lines",
]  # fmt: skip

CPU = torch.device("cpu")
VOCABULARY = 96
SIZES: dict[str, Any] = {
    "vocab_size": VOCABULARY, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 16, "max_position_embeddings": 64, "bos_token_id": 1, "eos_token_id": 2,
    "pad_token_id": 0,
}  # fmt: skip
FAMILIES: dict[str, tuple[Any, Any]] = {
    "llama": (LlamaConfig, LlamaForCausalLM),
    "qwen2": (Qwen2Config, Qwen2ForCausalLM),  # biases on q, k and v
    "gemma2": (Gemma2Config, Gemma2ForCausalLM),  # tied head, soft-capped logits
}
MIXTURES: dict[str, tuple[Any, Any]] = {
    "qwen3_moe": (
        partial(Qwen3MoeConfig, num_experts=8, num_experts_per_tok=2, moe_intermediate_size=64),
        Qwen3MoeForCausalLM,
    ),
}
# families whose layers answer with a tuple, and sizes by their own names
SMALL: dict[str, tuple[str, dict[str, Any]]] = {
    "falcon": ("Falcon", {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}),
    "falcon, alibi": ("Falcon", {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "alibi": True}),
    "gptj": ("GPTJ", {"n_embd": 32, "n_layer": 2, "n_head": 4, "rotary_dim": 4, "n_positions": 64}),
    "codegen": ("CodeGen", {"n_embd": 32, "n_layer": 2, "n_head": 4, "rotary_dim": 4, "n_positions": 64}),
    "bloom": ("Bloom", {"hidden_size": 32, "n_layer": 2, "n_head": 4}),
    "mpt": ("Mpt", {"d_model": 32, "n_layers": 2, "n_heads": 4, "max_seq_len": 64}),
}
_TEXT = {**SIZES, "initializer_range": 0.2}
_EYES = {
    "hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 4, "image_size": 28,
    "patch_size": 14, "initializer_range": 0.2,
}  # fmt: skip
_QWEN = {
    "depth": 1, "embed_dim": 64, "hidden_size": 64, "out_hidden_size": 64, "intermediate_size": 64, "num_heads": 4,
    "patch_size": 14,
}  # fmt: skip
_AXES = {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 3, 3]}}
_WINDOW = {"layer_types": ["sliding_attention", "full_attention"], "sliding_window": 8}
_DELTA = {f"linear_{name}": size for name, size in {
    "num_key_heads": 2, "num_value_heads": 4, "key_head_dim": 8, "value_head_dim": 8,
}.items()}  # fmt: skip
# language models inside of multimodal ones: what is added to the text's sizes, and the tower's own
WRAPPERS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "Gemma3": (_WINDOW, _EYES),
    "Gemma4": (
        {
            **_WINDOW,
            "global_head_dim": 16,
            "hidden_size_per_layer_input": 8,
            "vocab_size_per_layer_input": VOCABULARY,
            "num_kv_shared_layers": 0,
        },
        {**_EYES, "head_dim": 16, "num_key_value_heads": 4},
    ),
    "Llava": ({"model_type": "llama"}, {"model_type": "clip_vision_model", **_EYES}),
    "Mistral3": ({"model_type": "mistral"}, {"model_type": "pixtral", **_EYES, "head_dim": 16}),
    "Qwen2_5_VL": (_AXES, _QWEN),
    "Qwen3VL": (_AXES, {**_QWEN, "deepstack_visual_indexes": [0]}),
    "Qwen3_5": ({"layer_types": ["linear_attention", "full_attention"], **_DELTA}, _QWEN),
    "AyaVision": ({"model_type": "cohere2", "logit_scale": 0.25}, {"model_type": "siglip_vision_model", **_EYES}),
    "PaliGemma": ({"model_type": "gemma"}, {"model_type": "siglip_vision_model", **_EYES}),
    "Idefics3": ({"model_type": "llama"}, _EYES),
}
_GATED: dict[str, Any] = {
    "linear_num_value_heads": 4, "linear_num_key_heads": 2, "linear_key_head_dim": 8, "linear_value_head_dim": 8,
    "layer_types": ["linear_attention", "full_attention", "linear_attention"],
}  # fmt: skip
_MAMBA: dict[str, Any] = {
    "mamba_n_heads": 8, "mamba_d_head": 8, "mamba_d_state": 8, "mamba_n_groups": 1, "mamba_expand": 2, "mamba_chunk_size": 8,
}  # fmt: skip
# families whose layers pass on a state, three layers each: (transformers' name, sizes, model_type)
HYBRIDS: dict[str, tuple[str, dict[str, Any], str]] = {
    "qwen3.5": ("Qwen3_5Text", _GATED, "qwen3_5_text"),
    "qwen3-next": ("Qwen3Next", {**_GATED, "num_experts": 0, "mlp_only_layers": [0, 1, 2]}, "qwen3_next"),
    "olmo-hybrid": ("OlmoHybrid", {**_GATED, "linear_num_key_heads": 4, "num_key_value_heads": 4}, "olmo_hybrid"),
    "granite-4": (
        "GraniteMoeHybrid",
        {**_MAMBA, "layer_types": ["mamba", "attention", "mamba"], "num_local_experts": 0, "shared_intermediate_size": 48},
        "granitemoehybrid",
    ),
    "bamba": ("Bamba", {**_MAMBA, "attn_layer_indices": [1]}, "bamba"),
    "falcon-h1": ("FalconH1", {**_MAMBA, "mamba_d_ssm": 64}, "falcon_h1"),
    "lfm2": ("Lfm2", {"layer_types": ["conv", "full_attention", "conv"], "block_auto_adjust_ff_dim": False}, "lfm2"),
    "nemotron-h": (
        "NemotronH",
        {
            "layers_block_type": ["mamba", "attention", "mlp"], "mamba_num_heads": 8, "mamba_head_dim": 8, "n_groups": 1,
            "ssm_state_size": 8, "chunk_size": 8,
        },
        "nemotron_h",
    ),
    "zamba-2": (
        "Zamba2",
        {
            "layers_block_type": ["mamba", "hybrid", "mamba"], "mamba_ngroups": 1, "n_mamba_heads": 8, "mamba_d_state": 8,
            "mamba_headdim": 8, "chunk_size": 8, "num_mem_blocks": 1, "adapter_rank": 4, "num_key_value_heads": 4,
            "attention_head_dim": 16, "attention_hidden_size": 64,
        },
        "zamba2",
    ),
    "jamba": (
        "Jamba",
        {
            "num_experts": 1, "num_experts_per_tok": 1, "attn_layer_period": 3, "attn_layer_offset": 1,
            "use_mamba_kernels": False, "mamba_d_state": 8, "mamba_dt_rank": 4,
        },
        "jamba",
    ),
    "mamba-2": ("Mamba2", {"num_heads": 8, "head_dim": 8, "state_size": 8, "n_groups": 1, "chunk_size": 8}, "mamba2"),
    "falcon-mamba": ("FalconMamba", {"state_size": 8}, "falcon_mamba"),
    "recurrent-gemma": (
        "RecurrentGemma", {"block_types": ["recurrent", "attention"], "lru_width": 32, "attention_window_size": 64},
        "recurrent_gemma",
    ),
    "minimax": (
        "MiniMax",
        {"layer_types": ["linear_attention", "full_attention", "linear_attention"], "block_size": 8, "num_local_experts": 2},
        "minimax",
    ),
    "rwkv": ("Rwkv", {"attention_hidden_size": 32, "context_length": 64}, "rwkv"),
    "xlstm": ("xLSTM", {"num_heads": 4, "qk_dim_factor": 1.0}, "xlstm"),
}  # fmt: skip
TOKENS = torch.arange(24).reshape(2, 12) * 7 % VOCABULARY
WORDS = [
    "what", "does", "copytree", "do", "it", "copies", "a", "whole", "folder", "hello", "there", "how", "are", "you",
    "today", "fine", "thank", "said", "the", "fox",
]  # fmt: skip


# --- models ------------------------------------------------------------------------------------------------------------


def _random(family: str, **sizes: Any) -> Any:
    """A random model of a family by transformers' name, always the same one for the same sizes."""
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(getattr(transformers, f"{family}Config")(**sizes))


def word_tokenizer(
    size: int = VOCABULARY, first: tuple[str, ...] = ("<pad>", "<s>", "</s>"), **special: str
) -> PreTrainedTokenizerFast:
    """A tokenizer of ``first``, w3, w4, … ``special`` gives words their meaning, as in ``eos_token="</s>"``."""
    names = [*first, *(f"w{number}" for number in range(len(first), size))]
    words = Tokenizer(WordLevel({name: number for number, name in enumerate(names)}, unk_token="w3"))
    words.pre_tokenizer = Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=words, **special)


def tiny_checkpoint(
    folder: Path, family: str = "llama", shard: str = "5GB", dtype: torch.dtype = torch.float32, **sizes: Any
) -> Path:
    """Write a checkpoint of one of ``FAMILIES`` or ``MIXTURES`` with weights large enough that quantisation and adapters show."""
    config_class, model_class = (FAMILIES | MIXTURES)[family]
    torch.manual_seed(0)
    model = model_class(config_class(**{**SIZES, **sizes}, initializer_range=0.08))
    for name, values in model.named_parameters():
        if name.endswith("bias"):  # transformers starts them at zero, which would hide one that is lost
            nn.init.normal_(values, std=0.1)
    model.to(dtype).save_pretrained(folder, max_shard_size=shard)
    tokenizer = word_tokenizer(first=(), pad_token="w0", bos_token="w1", eos_token="w2")
    tokenizer.chat_template = "{% for message in messages %}{{ message.content }}{% endfor %}"
    tokenizer.save_pretrained(folder)
    return folder


def any_checkpoint(
    folder: Path, family: str = "Llama", dtype: torch.dtype = torch.bfloat16, shards: str = "5GB", **options: Any
) -> Path:
    """A checkpoint of any family, saved as anyone would save it.

    Its rows are whole blocks of 64: of others, bitsandbytes on a CPU dequantises some wrongly (test_nf4.py).
    """
    sizes = {**SIZES, "intermediate_size": 192, "max_position_embeddings": 128}
    model = _random(family, **sizes | options).to(dtype)
    for name, parameter in model.named_parameters():
        if "norm" in name or "bias" in name:  # ones and zeros would hide a norm or bias that was not loaded
            nn.init.normal_(parameter, 0.5, 0.2)
    model.save_pretrained(folder, max_shard_size=shards)
    word_tokenizer(pad_token="<pad>", bos_token="<s>", eos_token="</s>").save_pretrained(folder)
    return folder


def random_wrapper(family: str, **sizes: Any) -> Any:
    """A random multimodal model of ``WRAPPERS``, always the same one, its norms and biases not ones and zeros."""
    text, eyes = WRAPPERS[family]
    config = getattr(transformers, f"{family}Config")(
        text_config={**_TEXT, **text, **sizes}, vision_config=eyes, image_token_id=90, mm_tokens_per_image=4
    )
    torch.manual_seed(0)
    model = getattr(transformers, f"{family}ForConditionalGeneration")(config)
    for name, values in model.named_parameters():
        if "norm" in name or "bias" in name or not values.any():
            nn.init.normal_(values, 0.5, 0.2)
    return model.eval()


def wrapper_checkpoint(folder: Path, family: str, **sizes: Any) -> Path:
    """A checkpoint of ``random_wrapper``, with the files of a tokenizer and of what reads images."""
    random_wrapper(family, **sizes).save_pretrained(folder)
    word_tokenizer(pad_token="<pad>", bos_token="<s>", eos_token="</s>").save_pretrained(folder)
    for name in ("preprocessor_config.json", "processor_config.json", "video_preprocessor_config.json"):
        (folder / name).write_text('{"image_size":  28}')
    return folder


def chat_checkpoint(folder: Path, family: str = "Llama", **sizes: Any) -> Path:
    """A model with a byte-level tokenizer and a chat template, for runs by recipe."""
    tokenizer = make_tokenizer()
    values: dict[str, Any] = {
        "vocab_size": len(tokenizer), "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2,
        "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 256,
        "initializer_range": 0.2,  # the usual 0.02 leaves a model this small with nothing to say
        "bos_token_id": tokenizer.bos_token_id, "eos_token_id": tokenizer.eos_token_id, "pad_token_id": tokenizer.pad_token_id,
    }  # fmt: skip
    _random(family, **{**values, **sizes}).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def random_model(family: str, **options: Any) -> Any:
    """A frozen model in memory, its weights large enough that logits are far from uniform."""
    sizes = {**SIZES, "hidden_size": 32, "intermediate_size": 48, "head_dim": 8, "initializer_range": 0.3}
    kept = {name: size for name, size in (sizes | options).items() if size is not ...}  # Falcon takes no head_dim
    return _random(family, **kept).eval().requires_grad_(False)


def small_model(name: str, folder: Path) -> AdaptedModel:
    """One of ``SMALL``, unquantised, with adapters that do something."""
    family, sizes = SMALL[name]
    bare = _random(family, vocab_size=VOCABULARY, bos_token_id=1, eos_token_id=2, initializer_range=0.2, **sizes)
    base = Base(bare.eval(), None, folder, "small", None, "none", False, CPU, torch.float32)
    model = apply_method(base, LoRA(r=4))
    stir(model, 0.05)
    return model


def tiny_base(folder: Path, quantization: str = "nf4", **section: Any) -> Base:
    model = ModelSection(name=str(folder), quantization=quantization, compute_dtype="fp32", **section)  # type: ignore[arg-type]
    return load_base(model, CPU)


def tiny_model(folder: Path, family: str = "llama", stirred: bool = True, **method: Any) -> AdaptedModel:
    """An adapted NF4 model; ``stirred`` gives the adapter values, so that both halves get a gradient from the start."""
    if not (folder / "config.json").is_file():
        tiny_checkpoint(folder, family)
    quantization = method.pop("quantization", "nf4")
    model = apply_method(tiny_base(folder, quantization), LoRA(**{"r": 4, "alpha": 8, **method}))
    if stirred:
        stir(model, 0.05)
    return model


def stir(model: AdaptedModel, size: float = 0.1) -> None:
    """Give both halves of every adapter values, so that it changes the logits and both get a gradient."""
    generator = torch.Generator().manual_seed(7)
    for values in model.trainable_parameters().values():
        values.data.copy_(torch.empty(values.shape).normal_(std=size, generator=generator))  # the same on any device


# --- what comes out of them --------------------------------------------------------------------------------------------


def logits_of(model: Any) -> Tensor:
    """Of ``TOKENS``, in fp32; in float64 where the model computes so."""
    with torch.no_grad():
        logits: Tensor = model(input_ids=TOKENS, use_cache=False).logits
    return logits if logits.dtype == torch.float64 else logits.float()


def adapter_bytes(model: AdaptedModel) -> dict[str, bytes]:
    return {name: values.detach().numpy().tobytes() for name, values in model.trainable_parameters().items()}


def gradients(model: AdaptedModel) -> dict[str, Tensor]:
    """Copies of the gradients, by parameter; they are cleared."""
    found = {}
    for name, values in model.trainable_parameters().items():
        assert values.grad is not None, name
        found[name] = values.grad.clone()
        values.grad = None
    return found


# --- data and recipes --------------------------------------------------------------------------------------------------


def random_rows(examples: int, packing: bool = True, seed: int = 0, longest: int = 11) -> list[Row]:
    """Rows of examples of 2 to ``longest`` tokens, a random part of them targets, two or more to a packed row."""
    random = numpy.random.default_rng(seed)
    made = []
    for _ in range(examples):
        length = int(random.integers(2, longest + 1))
        trained = random.random(length) < 0.6
        trained[1] = True  # a row without a target would be left out by the data room
        made.append(make_example(random.integers(3, VOCABULARY, length), trained))
    return make_rows(made, 2 * longest + 1, packing)


def conversations(count: int = 40) -> list[dict[str, Any]]:
    """Short questions and answers of some twenty tokens, no two alike."""
    return [
        {
            "messages": [
                {"role": "user", "content": f"{WORDS[number % 20]} {number}?"},
                {"role": "assistant", "content": " ".join(WORDS[(number * 3 + n) % 20] for n in range(4))},
            ]
        }
        for number in range(count)
    ]


def write_lines(path: Path, records: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")
    return path


def tiny_values(model: Path, data: Path, folder: Path) -> dict[str, Any]:
    """A recipe of ten steps for ``chat_checkpoint``: two epochs, evaluations at 4 and 8, checkpoints at 3, 6, 9 and 10."""
    return {
        "model": {"name": str(model), "compute_dtype": "fp32"},  # on any processor
        "method": {"r": 4, "alpha": 8, "dropout": 0.1},
        "data": {"train": str(data), "held_out_fraction": 0.2, "max_length": 64, "packing": False},
        "training": {
            "steps": 10, "batch_size": 5, "micro_batch_size": 2, "learning_rate": 0.02, "save_every": 3,
            "keep_checkpoints": 2,
        },
        "evaluation": {"every": 4, "prompts": 2, "max_new_tokens": 6},
        "device": {"name": "cpu", "threads": 1},
        "folder": str(folder),
    }  # fmt: skip
