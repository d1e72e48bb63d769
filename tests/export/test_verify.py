"""What lies there is held against the merge made anew, tensor by tensor, and of a mixture expert by expert."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file
from torch import Tensor

from qlora.errors import DiffersError, MethodError
from qlora.export.adapter import export_adapter
from qlora.export.gguf import export_gguf
from qlora.export.merged import merge
from qlora.export.source import Source
from qlora.export.verify import GgufFile, verify, verify_adapter, verify_gguf
from qlora.methods.files import WEIGHTS
from qlora.model.checkpoint import Checkpoint
from qlora.recipe import LoRA, ModelSection
from tests.export import gguf_models
from tests.export.test_merge import trained
from tests.tiny import MIXTURES, tiny_checkpoint

EXPERTS = ("mlp.experts.gate_up_proj", "mlp.experts.down_proj")


@pytest.mark.parametrize("family", MIXTURES)
def test_experts(tmp_path: Path, family: str) -> None:
    base = tiny_checkpoint(tmp_path / "base", family)
    trained(base, tmp_path / "adapter", "nf4", LoRA(r=4, target_parameters=EXPERTS))
    merge(base, tmp_path / "adapter", tmp_path / "merged", compute_dtype="fp32")
    section = ModelSection(name=str(base), compute_dtype="fp32")
    source = Source(Checkpoint(base, "base"), section, tmp_path / "adapter")
    file = tmp_path / "merged" / "model.safetensors"
    tensors = load_file(file)
    assert verify(source, tmp_path / "merged") == len(tensors)
    name = next(name for name in tensors if "experts" in name and "down_proj" in name)
    save_file({**tensors, name: tensors[name] * 1.05}, file, metadata={"format": "pt"})
    with pytest.raises(DiffersError, match=rf"{name} differ"):
        verify(source, tmp_path / "merged")


def one_number(values: Tensor, change: str) -> Tensor:
    """A copy with a single number that is off: not finite, or far from what it was."""
    wrong = values.clone()
    wrong.view(-1)[wrong.numel() // 2] = float("nan") if change == "nan" else 100.0
    return wrong


@pytest.mark.parametrize("change", ["nan", "far"])
def test_one_number_that_was_not_rounded_to_codes_is_found(tmp_path: Path, change: str) -> None:
    """Only where 4-bit codes are chosen anew may another machine choose a few others; NaN is never right."""
    base = tiny_checkpoint(tmp_path / "base", "llama")
    trained(base, tmp_path / "adapter", "nf4", LoRA(r=4))
    merge(base, tmp_path / "adapter", tmp_path / "merged", compute_dtype="fp32")
    source = Source(Checkpoint(base, "base"), ModelSection(name=str(base), compute_dtype="fp32"), tmp_path / "adapter")
    file = tmp_path / "merged" / "model.safetensors"
    tensors = load_file(file)
    assert verify(source, tmp_path / "merged") == len(tensors)
    linear = "model.layers.0.mlp.up_proj.weight"
    for name in ("model.embed_tokens.weight", "model.norm.weight", linear):
        if name == linear and change == "far":
            continue  # one in thousands, which may be a tie
        save_file({**tensors, name: one_number(tensors[name], change)}, file, metadata={"format": "pt"})
        with pytest.raises(DiffersError, match=rf"{name} differ \(1 of {len(tensors)} tensors\)"):
            verify(source, tmp_path / "merged")


@pytest.mark.parametrize("change", ["nan", "far"])
@pytest.mark.parametrize("type", ["f16", "q8_0"])
def test_one_number_of_a_gguf_file_is_found(tmp_path: Path, type: str, change: str) -> None:
    base = gguf_models.checkpoint(tmp_path / "base", "llama")
    trained(base, tmp_path / "adapter", "nf4", LoRA(r=4))
    section = ModelSection(name=str(base), compute_dtype="fp32")
    written = export_gguf(base, tmp_path / "adapter", tmp_path / "gguf", section=section, type=type)
    source = Source(Checkpoint(base, "base"), section, tmp_path / "adapter")
    found = GgufFile(written.file)
    assert verify_gguf(source, found, None, ()) == written.tensors
    whole = found.tensor

    def damaged(name: str) -> Tensor:
        return one_number(whole(name), change) if name == "token_embd.weight" else whole(name)

    found.tensor = damaged  # type: ignore[method-assign]
    with pytest.raises(DiffersError, match=r"token_embd\.weight differ \(1 of"):
        verify_gguf(source, found, None, ())


@pytest.mark.parametrize("form", ["portable", "its own"])
def test_one_number_of_an_adapter_is_found(tmp_path: Path, form: str) -> None:
    base = tiny_checkpoint(tmp_path / "base", "llama")
    trained(base, tmp_path / "adapter", "nf4", LoRA(r=4))
    section, checkpoint, place = ModelSection(name=str(base)), Checkpoint(base, "base"), tmp_path / "adapter"
    if form == "portable":
        export_adapter(section, checkpoint, place, tmp_path / "portable")
    copy = Path(shutil.copytree(tmp_path / "portable" if form == "portable" else place, tmp_path / "copy"))
    tensors = load_file(copy / WEIGHTS)
    assert verify_adapter(section, checkpoint, place, copy) == len(tensors)
    name = next(iter(tensors))
    save_file({**tensors, name: one_number(tensors[name], "nan")}, copy / WEIGHTS, metadata={"format": "pt"})
    with pytest.raises(DiffersError, match=rf"{name} differ \(1 of {len(tensors)} tensors\)"):
        verify_adapter(section, checkpoint, place, copy)


@pytest.mark.parametrize(
    ("renamed", "said"),
    [
        (lambda name: name.replace(".lora_A.", ".lora_A.default."), r"as PEFT calls it in memory; in files it has no '\.default'"),
        (lambda name: name.removeprefix("base_model.model."), r"expected PEFT's names, which begin with 'base_model\.model\.'"),
    ],
    ids=["in memory", "bare"],
)  # fmt: skip
def test_renamed_keys_are_named_as_what_they_are(tmp_path: Path, renamed: Callable[[str], str], said: str) -> None:
    """Not as those of another base (issue 15)."""
    base = tiny_checkpoint(tmp_path / "base", "llama")
    trained(base, tmp_path / "adapter", "nf4", LoRA(r=4))
    file = tmp_path / "adapter" / WEIGHTS
    tensors = {renamed(name): values for name, values in load_file(file).items()}
    save_file(tensors, file, metadata={"format": "pt"})
    with pytest.raises(MethodError, match=said):
        Source(Checkpoint(base, "base"), ModelSection(name=str(base)), tmp_path / "adapter")


@pytest.mark.parametrize("there", [True, False])
def test_a_link_is_followed(tmp_path: Path, there: bool) -> None:
    """Whoever links an export to a larger disk means that disk."""
    base = tiny_checkpoint(tmp_path / "base", "llama")
    trained(base, tmp_path / "adapter", "nf4", LoRA(r=4))
    (tmp_path / "disk").mkdir()
    (tmp_path / "disk" / "merged").mkdir() if there else None
    (tmp_path / "out").symlink_to(tmp_path / "disk" / "merged")
    merge(base, tmp_path / "adapter", tmp_path / "out", compute_dtype="fp32")
    assert (tmp_path / "out").is_symlink()
    assert (tmp_path / "disk" / "merged" / "model.safetensors").is_file()
    assert [path.name for path in (tmp_path / "disk").iterdir()] == ["merged"]
