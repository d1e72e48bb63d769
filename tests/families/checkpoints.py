"""A tiny random checkpoint of any model type that the installed transformers knows, made from its configuration's defaults.

    types()                          every causal language model and every model of images and text, by model_type
    tiny_config("qwen3_moe")         the defaults of its class, every size made small
    save_family(folder, "qwen3_moe") a checkpoint with a tokenizer, its norms not ones, and the class that made it

Knows transformers' configurations and how their sizes are called; must not know what qlora does with a family.
"""

from __future__ import annotations

import inspect
import re
import string
from pathlib import Path
from typing import Any

import torch
import transformers
from tokenizers import Tokenizer
from tokenizers.models import BPE
from torch import nn
from transformers import PretrainedConfig, PreTrainedTokenizerFast
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES,
)

from qlora.model.anatomy import BY_PLACE

VOCABULARY = 128
LETTERS = string.ascii_letters + string.digits
SPECIAL = 100
"""Tokens from here on are a configuration's own tokens, of images and the like, and stand in no text."""
LAYERS, HYBRID_LAYERS = 2, 4
LAYER_COUNTS = (
    "num_hidden_layers", "n_layer", "num_layers", "n_layers", "encoder_layers", "decoder_layers", "depth", "layers",
    "num_decoder_layers", "num_encoder_layers", "conf_num_hidden_layers", "num_blocks", "max_window_layers",
)  # fmt: skip
SIZES: dict[str, int] = {
    name: size
    for names, size in {
        "vocab_size decoder_vocab_size vocab_size_per_layer_input additional_vocab_size "
        "codebook_size num_embeddings audio_vocab_size mel_vocab_size ngram_vocab_size_base "
        "encoder_hash_byte_group_vocab pronunciation_vocab_size shape_vocab_size": VOCABULARY,
        "hidden_size d_model n_embd embed_dim dim_model_base emb_dim embedding_dim hidden_size_global projector_hidden_size "
        "projection_dim out_hidden_size text_hidden_size encoder_hidden_size word_embed_proj_dim input_size lru_width "
        "moe_intermediate_size moe_hidden_size expert_ffn_hidden_size decoder_hidden_size embedding_size "
        "input_embedding_size output_embedding_size backbone_hidden_size image_text_hidden_size router_hidden_size "
        "projection_hidden_size attention_hidden_size adapter_in_dim adapter_out_dim adapter_input_size vision_hidden_size "
        "moe_latent_size output_dim patch_embed_hidden_size ple_embed_dim": 64,
        "intermediate_size encoder_ffn_dim decoder_ffn_dim ffn_dim n_inner ffn_hidden_size d_ff dff dim_ff d_inner mlp_dim "
        "shared_expert_intermediate_size shared_intermediate_size intermediate_size_mlp dense_intermediate_size "
        "feed_forward_size moe_shared_expert_intermediate_size shared_experts_intermediate_size share_expert_dim "
        "alignment_intermediate_size projection_intermediate_size merged_hidden_size mamba_d_ssm": 128,
        "unpadded_vocab_size": VOCABULARY - 8,
        "max_position_embeddings n_positions max_seq_len n_ctx model_max_length max_target_positions "
        "original_max_position_embeddings context_length": 256,
        "num_attention_heads n_head num_heads encoder_attention_heads decoder_attention_heads n_heads attention_heads "
        "linear_num_value_heads num_encoder_attention_heads num_decoder_attention_heads index_n_heads "
        "swa_num_attention_heads num_experts num_local_experts n_routed_experts moe_num_experts linear_num_heads "
        "num_sliding_attention_heads zero_expert_num resampler_n_heads": 4,
        "num_key_value_heads num_experts_per_tok num_experts_per_token n_shared_experts moe_topk moe_k swa_num_key_value_heads num_query_groups num_kv_heads "
        "linear_num_key_heads n_groups": 2,
        "first_k_dense_replace num_dense_layers n_group topk_group num_expert_group mamba_n_groups mamba_ngroups num_group": 1,
        "mamba_n_heads mamba_num_heads n_mamba_heads": 8,
        "head_dim d_kv d_head kv_channels v_head_dim qk_nope_head_dim qk_rope_head_dim index_head_dim swa_head_dim "
        "linear_key_head_dim linear_value_head_dim attention_head_dim global_head_dim mamba_d_head mamba_head_dim "
        "mamba_d_state mamba_headdim state_size ssm_state_size dim_head linear_head_dim chunk_size mamba_chunk_size rotary_dim "
        "hidden_size_per_layer_input laurel_rank sliding_window_size attention_chunk_size query_pre_attn_scalar "
        "latent_query_num num_query_tokens resampler_head_dim resampler_n_latents attention_head_size o_lora_rank "
        "index_block_size": 16,
        "kv_lora_rank q_lora_rank qk_head_dim sliding_window local_attention adapter_rank attention_window_size": 32,
    }.items()
    for name in names.split()
}
"""A size, by every name that configurations have for it. A default that is smaller stays."""

NOT_GIVEN = ("model_type", "transformers_version", "architectures", "dtype", "torch_dtype")
ROPE = {"rope_parameters": {"mrope_section": [2, 3, 3]}}
ALTERNATING = ["sliding_attention", "full_attention"] * 2
INDEXER = {
    "indexer_n_heads": 4, "indexer_kv_heads": 1, "indexer_head_dim": 16, "indexer_budget": 16, "indexer_compress_ratio": 4,
    "ple_embed_dim": None,
}  # fmt: skip
COMPASS = {"rope_parameters": {"full_attention": {"rope_type": "default", "rope_theta": 1e4}, "rope_type": ...}}
MOE_GROUPS = {"num_experts_per_tok": 2, "n_routed_experts": 4, "n_group": 1, "topk_group": 1}
DECODER = {"is_decoder": True}  # halves of encoder-decoders and encoders, made as decoders
MAMBA = {"mamba_n_heads": 8, "mamba_d_head": 16}
MAMBA_1 = {"time_step_rank": 4, "state_size": 8}
INKLING = {"n_routed_experts": 16, "n_shared_experts": 1, "rel_extent": 64}
"""What is never packed is a smaller part of real ones, too."""
EXCEPTIONS: dict[str, dict[str, Any]] = {
    **dict.fromkeys(
        (
            "bert",
            "bert-generation",
            "big_bird",
            "camembert",
            "data2vec-text",
            "electra",
            "ernie",
            "megatron-bert",
            "rembert",
            "roberta",
            "roberta-prelayernorm",
            "roc_bert",
            "roformer",
            "xlm-roberta",
            "xlm-roberta-xl",
        ),
        DECODER,
    ),
    "bailing_hybrid": {"layer_group_size": 2, "num_local_experts": 4, "num_experts_per_tok": 2},
    "bamba": {**MAMBA, "attn_layer_indices": [1]},
    "chameleon": {
        "vocabulary_map": {"<image>": 100},
        "intermediate_size": 4096,
        "vq_config": {"base_channels": 32, "channel_multiplier": [1, 1], "num_res_blocks": 1, "latent_channels": 32},
    },
    "cohere_compass": {"text_config": COMPASS},
    "cohere_compass_text": COMPASS,
    "dbrx": {"attn_config": {"rope_theta": 1e4, "kv_n_heads": 2}},
    "deepseek_v4": {"hc_mult": 2, "n_routed_experts": 8},
    "deepseek_ocr2": {"text_config": {"mlp_layer_types": ["dense", "sparse"]}},
    "dots1": {"n_routed_experts": 4},
    "emu3": {"vocabulary_map": {"<image>": 100, "<|extra_200|>": 101}},
    "ernie4_5_vl_moe": {"text_config": {"rope_parameters": {"mrope_section": [3, 3, 2]}}},
    "falcon_h1": MAMBA,
    "falcon_mamba": MAMBA_1,
    "gemma3n_text": {
        "layer_types": ALTERNATING,
        "num_kv_shared_layers": 2,
        "activation_sparsity_pattern": [0.95, 0.0, 0.0, 0.0],
    },
    "gemma4_assistant": {"first": {"text_config": {"hidden_size_per_layer_input": 0, "vocab_size_per_layer_input": 0}}},
    "glm5_next": {"text_config": {"hc_mult": 2}},
    "glm46v": {"text_config": ROPE},
    "glm4v": {"text_config": ROPE},
    "glm4v_moe": {"text_config": {"rope_parameters": {"mrope_section": [1, 1, 2]}}},
    "glm_ocr": {"text_config": ROPE},
    "glmga": {"text_config": ROPE},
    "granite4_vision": {"deepstack_layer_map": [[0, 0]], "downsample_rate": "1/2"},
    "granitemoehybrid": {**MAMBA, "layer_types": ["linear_attention", "full_attention"], "num_local_experts": 4},
    "hrm_text": {"num_layers_per_stack": 2},
    "hunyuan_v1_moe": {"num_experts": 4, "moe_topk": 2},
    "hunyuan_vl": {"text_config": ROPE},
    "inkling_mm_model": {"text_config": INKLING},
    "inkling_text": INKLING,
    "jamba": {
        "attn_layer_period": 2,
        "attn_layer_offset": 1,
        "expert_layer_period": 2,
        "expert_layer_offset": 1,
        "mamba_dt_rank": 4,
    },
    "kimi_linear": {"num_experts": 4},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"] * 2, "num_hidden_layers": 4},
    "mamba": MAMBA_1,
    "mamba2": {"num_heads": 8, "n_groups": 1},
    "mistral4": {"head_dim": 32, "rope_parameters": {"partial_rotary_factor": 0.5}},
    "molmo2": {"adapter_config": {"vision_feature_layer": [1, 0]}},
    "paddleocr_vl": {"text_config": ROPE},
    "phi4_multimodal": {
        "intermediate_size": 4096,
        "audio_config": {"nemo_conv_channels": 64, "ext_pw_out_channel": 64, "depthwise_separable_out_channel": 64},
    },
    "qwen2_5_omni_thinker": {"text_config": ROPE},
    "qwen2_5_vl": {"text_config": ROPE},
    "qwen2_vl": {"text_config": ROPE},
    "qwen4_exp": {"text_config": INDEXER},
    "qwen4_exp_text": INDEXER,
    "recurrent_gemma": {"num_hidden_layers": 3},
    "reformer": {"is_decoder": True, "axial_pos_embds": False},
    "step3p7": {"text_config": {"sliding_window": 32}},
    "xlstm": {"qk_dim_factor": 1.0},
    "xmod": {"default_language": "en_XX", "is_decoder": True},
    "zamba": {
        "mamba_dt_rank": 4,
        "mamba_d_state": 4,
        "n_mamba_heads": 2,
        "attention_hidden_size": 128,
        "attention_head_dim": 32,
        "num_hidden_layers": 4,
        "layers_block_type": ["linear_attention", "hybrid"] * 2,
    },
    "zamba2": {
        "attention_hidden_size": 128,
        "hybrid_layer_ids": [1, 3],
        "num_hidden_layers": 4,
        "n_mamba_heads": 8,
        "layers_block_type": ["linear_attention", "hybrid"] * 2,
    },
    "zaya": {"router_hidden_size": 16},
}
"""By type, what its configuration needs beside, or instead."""


def types() -> dict[str, str]:
    """Every model type that is trained on text: its class, by ``model_type``; where there are two, the one with images."""
    known = {**MODEL_FOR_CAUSAL_LM_MAPPING_NAMES, **MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES}
    return {kind: name if isinstance(name, str) else name[0] for kind, name in sorted(known.items())}


def origin(kind: str) -> dict[str, Any]:
    """The year in the head of the files of ``kind``, which is that of what it was made from where that is all they name, and whether
    it is a decoder alone: no half of an encoder-decoder, and no encoder that is told to be a decoder."""
    cls = CONFIG_MAPPING[kind]
    files = Path(inspect.getfile(cls)).parent.glob("*.py")
    heads = [path.read_text(encoding="utf-8")[:1500] for path in files if path.stem.startswith(("modeling", "config"))]
    years = [int(year) for head in heads for year in re.findall(r"(?i)copyright \D{0,12}(\d{4})", head)]
    half = cls.is_encoder_decoder or EXCEPTIONS.get(kind, {}).get("is_decoder") or kind in BY_PLACE
    return {"year": max(years, default=None), "decoder": not half}


def tiny_config(kind: str) -> PretrainedConfig:
    """The configuration of ``kind`` with every size made small."""
    cls = CONFIG_MAPPING[kind]
    exceptions = EXCEPTIONS.get(kind, {})
    values = cls(**exceptions.get("first", {})).to_dict()
    return cls(**_merged(_shrunk(values), {key: value for key, value in exceptions.items() if key != "first"}))


def _merged(values: dict[str, Any], others: dict[str, Any]) -> dict[str, Any]:
    values = dict(values)
    for key, value in others.items():
        values[key] = _merged(values.get(key) or {}, value) if isinstance(value, dict) else value
    return {key: value for key, value in values.items() if value is not ...}


def _shrunk(values: dict[str, Any], special: list[int] | None = None) -> dict[str, Any]:
    """A configuration's values as the arguments of its class, made small, in it and in those that are inside."""
    special = special or [SPECIAL]
    counts = [value for key, value in values.items() if key in LAYER_COUNTS and isinstance(value, int)]
    depth = values.get("num_hidden_layers") or max(counts, default=0)
    kept = _kept_layers(values, depth)
    made: dict[str, Any] = {}
    for key, value in values.items():
        key = str(key)
        if key in NOT_GIVEN:
            continue
        if key == "per_layer_config" and isinstance(value, dict):
            made[key] = {kept.index(int(layer)): _shrunk(one) for layer, one in value.items() if int(layer) in kept}
        elif isinstance(value, dict):
            made[key] = _shrunk(value, special) | ({"model_type": value["model_type"]} if "model_type" in value else {})
        elif isinstance(value, bool):
            made[key] = value
        elif key in ("head_dim", "num_key_value_heads", "num_experts_per_tok", "n_shared_experts") and value is None:
            made[key] = SIZES[key]
        elif key in LAYER_COUNTS and isinstance(value, int):
            made[key] = min(value, len(kept) or LAYERS)
        elif isinstance(value, list | tuple) and len(value) == depth > len(kept):
            made[key] = [value[layer] for layer in kept]
        elif key == "mrope_section":
            made[key] = [2, 3, 3]
        elif isinstance(value, int) and key.endswith(("_token_id", "_token_index", "_start_id", "_end_id")):
            if value >= VOCABULARY or value < 0:
                value = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}.get(key, special[0])
                special[0] += value == special[0]
            made[key] = value
        elif key == "num_key_value_heads" and isinstance(value, int) and values.get("kv_lora_rank"):
            made[key] = SIZES["num_attention_heads"]  # their keys are as many as their queries
        elif isinstance(value, int) and key in SIZES:
            made[key] = min(value, SIZES[key])
        else:
            made[key] = value
    return made


def _kept_layers(values: dict[str, Any], depth: int) -> list[int]:
    """Which of ``depth`` layers are left: the first, and the first of each other kind."""
    lists = [value for value in values.values() if isinstance(value, list) and len(value) == depth > 0]
    kinds = [str(layer) for layer in zip(*lists, strict=True)] or [""] * depth
    kept = {kinds.index(kind) for kind in kinds}
    if len(kept) > HYBRID_LAYERS:  # of lists with a number for each layer
        kept = set(range(HYBRID_LAYERS))
    count = LAYERS if len(kept) == 1 else HYBRID_LAYERS
    more = [layer for layer in range(depth) if layer not in kept]
    return sorted([*kept, *more[: max(0, count - len(kept))]])


def model_class(kind: str) -> Any:
    return getattr(transformers, types()[kind])


def tiny_family(kind: str) -> nn.Module:
    """A random model of ``kind`` in fp32, its norms and biases not ones and zeros, its logits far from uniform."""
    config = tiny_config(kind)
    for inner in [config, *(value for value in vars(config).values() if isinstance(value, PretrainedConfig))]:
        for name in ("initializer_range", "init_std", "initializer_factor"):
            if isinstance(getattr(inner, name, None), float):
                setattr(inner, name, 0.1)
    torch.manual_seed(0)
    model: nn.Module = model_class(kind)(config).eval()
    for values in model.parameters():
        if values.dim() == 1 and values.is_floating_point():
            with torch.no_grad():
                values.add_(torch.randn(values.shape) * 0.1)
    return model


def save_family(folder: Path, kind: str) -> Path:
    """Write a checkpoint of ``kind`` with a tokenizer of letters."""
    model: Any = tiny_family(kind)
    model.save_pretrained(folder)
    names = [*("<pad>", "<s>", "</s>"), *LETTERS, "▁", "Ġ"]
    names += [f"<{number}>" for number in range(len(names), VOCABULARY)]
    # letter by letter, which every family's own tokenizer class leaves as it is
    core = Tokenizer(BPE({name: number for number, name in enumerate(names)}, []))
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=core, pad_token="<pad>", bos_token="<s>", eos_token="</s>")
    tokenizer.save_pretrained(folder)
    return folder


@torch.no_grad()
def takes_text(kind: str, folder: Path) -> None:
    """Raise unless transformers itself answers on text alone with this checkpoint."""
    model = model_class(kind).from_pretrained(folder, dtype=torch.float32)
    ids = torch.arange(3, 19)[None]
    logits = model.eval()(input_ids=ids, use_cache=False).logits
    if logits.shape[:2] != ids.shape:
        raise ValueError(
            f"it answers {list(logits.shape)} to {list(ids.shape)} tokens: it does not go from text to text"
        )
    if not logits.isfinite().all():
        raise ValueError("its logits are not finite")
