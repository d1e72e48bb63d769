"""Exports say it in the words of transformers 4 too, and transformers 5 reads them as before."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from transformers import AutoModelForCausalLM, AutoTokenizer

from qlora.export.spelling import both_spellings, older_tokenizer
from qlora.model.tokenizer import TEMPLATE
from tests.tiny import word_tokenizer

SIZES: dict[str, Any] = {
    "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": 64, "pad_token_id": 0,
}  # fmt: skip
DEFAULT = {"rope_theta": 5e4, "rope_type": "default"}
LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 64}  # fmt: skip
LONG = {"rope_type": "longrope", "short_factor": [1.0] * 8, "long_factor": [2.0] * 8}
CASES = [
    ("Llama", DEFAULT, {"rope_theta": 5e4}),
    ("Llama", {"rope_theta": 5e5, **LLAMA3}, {"rope_theta": 5e5, "rope_scaling": LLAMA3}),
    ("Glm4", {**DEFAULT, "partial_rotary_factor": 0.5}, {"rope_theta": 5e4, "partial_rotary_factor": 0.5}),
    ("GPTNeoX", {**DEFAULT, "partial_rotary_factor": 0.5}, {"rotary_emb_base": 5e4, "rotary_pct": 0.5}),
    (
        "Gemma3Text",
        {"full_attention": {"rope_theta": 1e6, "rope_type": "linear", "factor": 8.0}, "sliding_attention": DEFAULT},
        {"rope_theta": 1e6, "rope_local_base_freq": 5e4, "rope_scaling": {"rope_type": "linear", "factor": 8.0}},
    ),
    (
        "Phi3",
        {"rope_theta": 1e4, **LONG},
        {"rope_scaling": {"type": "longrope", "short_factor": [1.0] * 8, "long_factor": [2.0] * 8}},
    ),
]


@pytest.mark.parametrize(("kind", "rope", "old"), CASES, ids=lambda value: value if isinstance(value, str) else "")
def test_old_words_stand_beside_the_new_ones(kind: str, rope: Any, old: dict[str, Any], tmp_path: Path) -> None:
    config = getattr(transformers, f"{kind}Config")(**SIZES, rope_parameters=rope)
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config)
    model.save_pretrained(tmp_path)
    saved = json.loads((tmp_path / "config.json").read_text(encoding="utf-8"))
    both = both_spellings(saved)
    assert {key: both[key] for key in old} == old
    assert both["torch_dtype"] == both["dtype"] == "float32"
    assert saved.items() <= both.items()
    (tmp_path / "config.json").write_text(json.dumps(both), encoding="utf-8")
    ids = torch.arange(40)[None]
    again = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert torch.equal(again.eval()(ids).logits, model.eval()(ids).logits)


def test_what_would_be_read_otherwise_is_left_alone() -> None:
    """A rope that transformers 5 would take from the old words and not from the new ones."""
    values = {"model_type": "llama", "rope_theta": 1.0, "rope_parameters": dict(DEFAULT), "dtype": "bfloat16"}
    assert both_spellings(values)["rope_theta"] == 1.0
    strange = {"model_type": "of our own", "rope_parameters": dict(DEFAULT)}  # which nobody here can read
    assert both_spellings(strange, "OursForCausalLM") == {**strange, "architectures": ["OursForCausalLM"]}


@pytest.mark.parametrize("kind", ["Mamba2", "Bamba", "FalconH1", "GraniteMoeHybrid", "NemotronH"])
def test_what_json_has_no_word_for_is_read_as_from_a_file(kind: str, tmp_path: Path) -> None:
    getattr(transformers, f"{kind}Config")(dtype="bfloat16").save_pretrained(tmp_path)
    saved = json.loads((tmp_path / "config.json").read_text(encoding="utf-8"))
    assert "__float__" in json.dumps(saved)
    assert both_spellings(saved)["torch_dtype"] == "bfloat16"


def test_the_class_is_named_where_the_base_names_none() -> None:
    assert both_spellings({"model_type": "llama"}, "LlamaForCausalLM")["architectures"] == ["LlamaForCausalLM"]
    assert both_spellings({"model_type": "llama", "architectures": ["A"]}, "B")["architectures"] == ["A"]


def test_a_tokenizer_of_transformers_5_loads_in_4(tmp_path: Path) -> None:
    tokenizer = word_tokenizer(bos_token="<s>")
    tokenizer.save_pretrained(tmp_path)
    path = tmp_path / "tokenizer_config.json"
    values = json.loads(path.read_text(encoding="utf-8")) | {"tokenizer_class": "TokenizersBackend"}
    path.write_text(json.dumps(values), encoding="utf-8")
    (tmp_path / TEMPLATE).write_text("{{ messages }}", encoding="utf-8")
    older_tokenizer(tmp_path)
    found = json.loads(path.read_text(encoding="utf-8"))
    assert found == values | {"tokenizer_class": "PreTrainedTokenizerFast", "chat_template": "{{ messages }}"}
    assert AutoTokenizer.from_pretrained(tmp_path)("w3 w9")["input_ids"] == tokenizer("w3 w9")["input_ids"]
