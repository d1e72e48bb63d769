"""Blocks that several layers share (Zamba): packed and kept once, and not adapted. That the model is transformers' own is the families' test."""

from __future__ import annotations

from pathlib import Path

import pytest

import qlora
from qlora.errors import MethodError, ModelError
from qlora.methods.targets import left_out
from qlora.model.anatomy import repeated
from qlora.model.nf4 import Linear4bit
from qlora.planning.plan import plan
from qlora.recipe import LoRA, MemorySection, Recipe
from qlora.residence.load import load_base
from tests.families.checkpoints import save_family
from tests.families.judge import section_of

KINDS = ("zamba", "zamba2")


@pytest.fixture(scope="module", params=KINDS)
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_family(tmp_path_factory.mktemp("shared") / "model", request.param)


def test_a_shared_block_is_packed_once(folder: Path) -> None:
    """The fourth layer has the second one's block, each with its own linear and mixer, and by its weights alone they are one too."""
    layers = load_base(section_of(folder)).model.model.layers
    second, fourth = ({path: m for path, m in layers[i].named_modules() if isinstance(m, Linear4bit)} for i in (1, 3))
    shared = {path for path in second if path.startswith("shared_transf")}
    assert len(shared) >= 6
    assert all(second[path] is fourth[path] for path in shared)
    assert all(second[path] is not fourth[path] for path in second.keys() - shared)


def test_layers_that_share_a_block_are_not_streamed(folder: Path) -> None:
    with pytest.raises(
        ModelError,
        match=r"share model.layers.1.shared_transf.* so they cannot be streamed one by one; set memory.layers=resident",
    ):
        load_base(section_of(folder), memory=MemorySection(layers="streamed"))


def test_what_is_shared_is_not_adapted_and_said(folder: Path) -> None:
    model = load_base(section_of(folder)).model
    (said,) = [sentence for sentence in left_out(model, "all-linear") if "share" in sentence]
    assert "linears of blocks that several layers of zamba" in said
    planted = qlora.apply_method(load_base(section_of(folder)), LoRA(r=4, alpha=8)).planted
    assert planted
    assert not repeated(model) & planted.keys()
    with pytest.raises(MethodError, match=r"names 'q_proj', but zamba2? has .* in several layers at once"):
        qlora.apply_method(load_base(section_of(folder)), LoRA(r=4, alpha=8, target_modules=["q_proj", "in_proj"]))


def test_and_a_plan_says_so_before_anything_is_read(folder: Path) -> None:
    recipe = {"model": {"name": str(folder)}, "data": {"train": "none.jsonl"}, "memory": {"layers": "streamed"}}
    with pytest.raises(ModelError, match="so they cannot be streamed one by one"):
        plan(Recipe.from_dict(recipe))


def test_as_many_layers_as_there_are_stay_and_are_planned(tmp_path: Path) -> None:
    recipe = {
        "model": {"name": str(save_family(tmp_path, "zamba2"))},
        "data": {"train": "none.jsonl", "max_length": 32},
    }
    plan(Recipe.from_dict(recipe | {"memory": {"layers": 99}, "training": {"batch_size": 1}}))
