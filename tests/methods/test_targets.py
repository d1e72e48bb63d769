"""Which linears a name reaches, and the names that tell PEFT the same."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import (
    BartConfig,
    BartForCausalLM,
    DogeConfig,
    DogeForCausalLM,
    RecurrentGemmaConfig,
    RecurrentGemmaForCausalLM,
)

from qlora import recipe as config
from qlora.errors import MethodError
from qlora.methods.base import apply_method
from qlora.methods.targets import choose_targets, find_linears, matches, target_names
from qlora.model.base import Base
from tests.tiny import tiny_base, tiny_checkpoint


@pytest.mark.parametrize(
    ("name", "path", "expected"),
    [
        ("q_proj", "model.layers.0.self_attn.q_proj", True),
        ("self_attn.q_proj", "model.layers.0.self_attn.q_proj", True),
        ("model.layers.0.self_attn.q_proj", "model.layers.0.self_attn.q_proj", True),
        ("proj", "model.layers.0.self_attn.q_proj", False),
        ("self_attn", "model.layers.0.self_attn.q_proj", False),
    ],
)
def test_names_match_as_in_peft(name: str, path: str, expected: bool) -> None:
    assert matches(name, path) is expected


def test_all_linear_leaves_out_attention_to_an_encoder() -> None:
    """Of a decoder taken alone: text never goes through it, so nothing there could train."""
    model = BartForCausalLM(
        BartConfig(vocab_size=96, d_model=32, decoder_layers=1, decoder_attention_heads=2, decoder_ffn_dim=64)
    )
    assert {path.split(".layers.0.")[1] for path in find_linears(model)} == {
        "fc1", "fc2", *(f"self_attn.{name}_proj" for name in ("q", "k", "v", "out")),
    }  # fmt: skip


def test_all_linear_leaves_out_gates_that_are_narrower_than_the_rank(tmp_path: Path) -> None:
    model = DogeForCausalLM(
        DogeConfig(vocab_size=96, hidden_size=64, intermediate_size=64, num_hidden_layers=1, num_attention_heads=4)
    )
    base = Base(model.eval(), None, tmp_path, "doge", None, "none", False, torch.device("cpu"), torch.float32)
    (method,) = apply_method(base, config.LoRA(r=8)).methods
    assert method.left_out == ["model.layers.0.self_attn.dt_proj"]
    assert method.left_out[0] not in method.planted
    method.base.model = DogeForCausalLM(model.config)
    with pytest.raises(MethodError, match=r"method\.r is 8, more than the smaller side of"):
        apply_method(method.base, config.LoRA(r=8, target_modules=("dt_proj",)))


def test_gates_of_a_matrix_by_head_are_no_experts() -> None:
    """Griffin's are parameters of three dimensions too."""
    config_ = RecurrentGemmaConfig(
        vocab_size=96, hidden_size=32, intermediate_size=64, num_hidden_layers=3, num_attention_heads=2, lru_width=32
    )
    assert "linear_out" in {
        path.rpartition(".")[2] for path in choose_targets(RecurrentGemmaForCausalLM(config_), "all-linear")
    }


def test_all_linear_is_attention_and_mlp_without_the_head(tmp_path: Path) -> None:
    model = tiny_base(tiny_checkpoint(tmp_path)).model
    chosen = choose_targets(model, "all-linear")
    assert len(chosen) == 2 * 7
    assert "lm_head" not in chosen
    assert list(choose_targets(model, ("v_proj", "layers.1.mlp.up_proj"))) == [
        "model.layers.0.self_attn.v_proj",
        "model.layers.1.self_attn.v_proj",
        "model.layers.1.mlp.up_proj",
    ]


@pytest.mark.parametrize(
    ("name", "hint"),
    [
        ("q_porj", "Did you mean 'q_proj'"),
        ("kv", "down_proj, .*gate_proj"),
        ("input_layernorm", "the method modules trains it whole"),
    ],
)
def test_a_name_that_matches_nothing_lists_those_that_exist(tmp_path: Path, name: str, hint: str) -> None:
    base = tiny_base(tiny_checkpoint(tmp_path))
    with pytest.raises(MethodError, match=f"'{name}'.*{hint}"):
        apply_method(base, config.LoRA(r=4, target_modules=("v_proj", name)))


def test_the_head_is_adapted_where_it_is_named(tmp_path: Path) -> None:
    model = apply_method(tiny_base(tiny_checkpoint(tmp_path)), config.LoRA(r=4, target_modules=("lm_head",)))
    assert list(model.planted) == ["lm_head"]


def test_leaf_names_suffice_or_full_paths_are_told() -> None:
    every = ["layers.0.q_proj", "layers.1.q_proj", "layers.0.up", "head.up"]
    assert target_names(["layers.0.q_proj", "layers.1.q_proj"], every) == ["q_proj"]
    assert target_names(["layers.1.q_proj"], every) == ["layers.1.q_proj"]
    assert target_names(["layers.0.up"], every) == ["layers.0.up"]  # 'up' would reach the head's too
