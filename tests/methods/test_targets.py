"""Which linears a name reaches, and the names that tell PEFT the same."""

from __future__ import annotations

from pathlib import Path

import pytest

from qlora import recipe as config
from qlora.errors import MethodError
from qlora.methods import apply_method
from qlora.methods.targets import choose_targets, matches, target_names
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
    ("name", "hint"), [("q_porj", "Did you mean 'q_proj'"), ("input_layernorm", "down_proj, .*gate_proj")]
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
