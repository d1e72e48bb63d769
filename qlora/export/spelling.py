"""What transformers 5 writes in new words, in the old ones too: for transformers 4, llama.cpp's converter, vLLM and Ollama.

    {"rope_parameters": {"rope_theta": 1e5, …}, "dtype": "bfloat16"}   ─►   and "rope_theta": 1e5, "torch_dtype": "bfloat16"

transformers 4 passes over words that it does not know and takes its defaults, so a model of another rotary base answers
wrongly there, and nobody is told. Knows the JSON files of a model's folder; must not know weights.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from qlora.files.durable import write_json
from qlora.model.checkpoint import read_json
from qlora.model.config import values_of
from qlora.model.tokenizer import TEMPLATE

TOKENIZER = "tokenizer_config.json"
OWN = {"gpt_neox": {"rope_theta": "rotary_emb_base", "partial_rotary_factor": "rotary_pct"}}
FULL, SLIDING = "full_attention", "sliding_attention"  # Gemma 3 has a rotary table for each


def both_spellings(config: Mapping[str, Any], architecture: str | None = None) -> dict[str, Any]:
    """config.json with the words of transformers 4 beside those of 5; ``architecture`` where it names no class.

    The words of 4 are left out where the installed transformers would then read something else, or cannot be asked: a type
    with its own code.
    """
    named = dict(config)
    if architecture and not named.get("architectures"):
        named["architectures"] = [architecture]
    both = _old_words(named)
    read = values_of(both)
    return both if read is not None and read == values_of(named) else named


def _old_words(config: Mapping[str, Any]) -> dict[str, Any]:
    values = {key: _old_words(value) if key == "text_config" and value else value for key, value in config.items()}
    if "dtype" in values:
        values.setdefault("torch_dtype", values["dtype"])
    rope = values.get("rope_parameters")
    full = rope.get(FULL, rope) if isinstance(rope, Mapping) else None
    if not isinstance(rope, Mapping) or not isinstance(full, Mapping) or "rope_theta" not in full:
        return values
    own = OWN.get(str(values.get("model_type")), {})
    for key in ("rope_theta", "partial_rotary_factor"):
        if key in full:
            values.setdefault(own.get(key, key), full[key])
    if isinstance(rope.get(SLIDING), Mapping) and "rope_theta" in rope[SLIDING]:
        values.setdefault("rope_local_base_freq", rope[SLIDING]["rope_theta"])
    scaling = {key: value for key, value in full.items() if key not in ("rope_theta", "partial_rotary_factor")}
    if scaling.get("rope_type") == "longrope":  # Phi-3 takes these three fields and no other
        if "original_max_position_embeddings" in scaling:
            values.setdefault("original_max_position_embeddings", scaling["original_max_position_embeddings"])
        scaling = {"type": "longrope", **{key: scaling[key] for key in ("short_factor", "long_factor")}}
    if scaling.get("rope_type", "") != "default":
        values.setdefault("rope_scaling", scaling)
    return values


def older_tokenizer(folder: Path) -> None:
    """Have transformers 4 load the tokenizer in ``folder``, and find its chat template where it and Ollama look."""
    if not (folder / TOKENIZER).is_file():
        return
    values = read_json(folder, TOKENIZER, "a tokenizer's configuration")
    before = dict(values)
    if values.get("tokenizer_class") == "TokenizersBackend":
        values["tokenizer_class"] = "PreTrainedTokenizerFast"
    if not isinstance(values.get("chat_template"), list) and (folder / TEMPLATE).is_file():
        values["chat_template"] = (folder / TEMPLATE).read_text(encoding="utf-8")
    if values != before:
        write_json(folder / TOKENIZER, values)
