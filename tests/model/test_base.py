"""A checkpoint is opened once, a base says what it is, and a family's parts are found."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from qlora.export.merged import merge
from qlora.machine.disk import bytes_text
from qlora.methods.base import apply_method
from qlora.methods.files import save_adapter
from qlora.methods.planted import Planted
from qlora.model import anatomy
from qlora.model import checkpoint as checkpoints
from qlora.model.checkpoint import open_checkpoint
from qlora.model.in_memory import as_base
from qlora.recipe import LoRA, MemorySection, ModelSection
from qlora.residence.load import load_base
from tests.tiny import tiny_checkpoint

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_checkpoint(tmp_path_factory.mktemp("model"), shard="150KB")


def test_what_is_opened_is_read_once(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A load, one into layers that wait on disk, another from that file, and a merge."""
    read: Counter[str] = Counter()
    for name in ("find_model", "read_header", "read_model_config", "_shards", "_fingerprint"):
        made = getattr(checkpoints, name)
        counted = lambda *args, name=name, made=made: (read.update([name]), made(*args))[1]  # noqa: E731
        monkeypatch.setattr(checkpoints, name, counted)
    section = ModelSection(name=str(folder))
    checkpoint = open_checkpoint(section)
    disk = MemorySection(layers="streamed", tier="disk", cache=str(tmp_path / "cache"))
    for memory in (disk, disk, None):
        base = load_base(section, CPU, memory=memory, checkpoint=checkpoint)
        assert base.checkpoint is checkpoint
        assert base.tokenizer is checkpoint.tokenizer
    once = Counter(["find_model", "read_model_config", "_shards", "_fingerprint", *["read_header"] * 3])
    assert read == once
    save_adapter(apply_method(base, LoRA(r=2)), tmp_path / "adapter")
    merge(folder, tmp_path / "adapter", tmp_path / "merged", compute_dtype="fp32", checkpoint=checkpoint)
    assert (read["find_model"], read["read_header"]) == (1, 3)


def test_a_configuration_is_each_models_own(folder: Path) -> None:
    checkpoint = open_checkpoint(folder)
    first, second = checkpoint.model_config(), checkpoint.model_config()
    first.vocab_size += 1
    assert second.vocab_size == checkpoint.model_config().vocab_size == first.vocab_size - 1


def test_a_base_says_what_it_is(folder: Path) -> None:
    base = load_base(ModelSection(name=str(folder)), CPU, memory=MemorySection(layers=1, slots=2))
    assert base.placement is not None
    assert repr(base).splitlines() == [
        f"Base '{folder}': LlamaForCausalLM",
        "  86,336 parameters in nf4 (scales quantised too), 75.4 KiB",
        "  on cpu, computing in fp32",
        f"  1 layer kept in host memory, {bytes_text(base.placement.bytes_on_device())} on the device for them",
    ]
    plain = as_base(torch.nn.Sequential(torch.nn.Linear(4, 8)), "mine")
    assert repr(plain).splitlines()[:2] == ["Base 'mine': Sequential", "  40 parameters unquantised, 160 B"]


@pytest.mark.parametrize(
    ("family", "attention", "mlp", "output"),
    [
        ("Llama", "self_attn", "mlp", "mlp"),
        ("GPT2", "attn", "mlp", "mlp"),
        ("OPT", "self_attn", None, "fc2"),
        ("Bloom", "self_attention", "mlp", "mlp"),
        ("Mpt", "attn", "ffn", "ffn"),
        ("Gemma2", "self_attn", "mlp", "mlp"),
    ],
)
def test_where_a_family_keeps_its_parts(family: str, attention: str, mlp: str | None, output: str) -> None:
    """Also under what is planted there, and behind what is wrapped around its layers."""
    config: Any = getattr(transformers, f"{family}Config")()
    with torch.device("meta"):
        model = transformers.AutoModelForCausalLM.from_config(config)
    sizes, layers = anatomy.sizes(model), anatomy.layers(model)
    assert sizes == anatomy.sizes(config)
    assert sizes.layers == len(layers) == len(anatomy.layer_kinds(model))
    layer = layers[0]
    for _ in range(2):
        names = (anatomy.ATTENTION, anatomy.MLP, anatomy.MLP_OUTPUT)
        assert [anatomy.first(layer, paths) for paths in names] == [attention, mlp, output]
        if mlp is not None:
            assert anatomy.at(layer, mlp) is layers[0].get_submodule(mlp)
        layer = Planted(layer)
    assert anatomy.embedding_rows(model) == sizes.vocabulary
    assert anatomy.path_of(model, anatomy.head(model)) == "lm_head"
    assert anatomy.is_tied(model) == bool(anatomy.tied_names(model))
    assert any(anatomy.gives_positions(path, module) for path, module in model.named_modules()) == (
        family not in ("Bloom", "Mpt")
    )
