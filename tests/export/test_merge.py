"""The law of merging: the merged checkpoint in plain transformers gives the adapter model's logits."""

from __future__ import annotations

import json
import math
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig

from qlora import recipe as config
from qlora.errors import DoesNotFitError, MethodError, ModelError, RunError
from qlora.export.merged import merge
from qlora.methods.base import AdaptedModel, apply_method
from qlora.methods.files import save_adapter
from qlora.model.checkpoint import MERGE, Checkpoint, open_checkpoint
from qlora.model.config import quantised_again
from qlora.recipe import ModelSection
from tests.rounding import difference, rounding
from tests.tiny import FAMILIES, logits_of, stir, tiny_base, tiny_checkpoint

SECTION = config.LoRA(r=4, alpha=8)

FOUR_BIT = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True)
EIGHT_BIT = BitsAndBytesConfig(load_in_8bit=True)


def trained(
    folder: Path, adapter: Path, quantization: str = "nf4", section: config.LoRA = SECTION, **model: Any
) -> AdaptedModel:
    adapted = apply_method(tiny_base(folder, quantization, **model), section)
    stir(adapted)
    save_adapter(adapted, adapter)
    return adapted


def plain_logits(folder: Path) -> torch.Tensor:
    model, report = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, output_loading_info=True)
    assert not any(report.values()), report
    return logits_of(model.eval())


@pytest.mark.parametrize("quantization", ["nf4", "fp4", "int8", "none"])
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.sampled
def test_merged_is_the_adapter_model(tmp_path: Path, family: str, quantization: Any) -> None:
    base = tiny_checkpoint(tmp_path / "base", family)
    model = trained(base, tmp_path / "adapter", quantization)
    expected = logits_of(model.model)
    # the weights themselves are rounded, each by half an eps at most
    for dtype, tolerance in (("fp32", rounding()), ("bf16", 5 * 2**-8), ("fp16", 6 * 2**-11)):
        out = tmp_path / dtype
        merged = merge(base, tmp_path / "adapter", out, quantization=quantization, compute_dtype="fp32", dtype=dtype)
        worst = difference(plain_logits(out), expected)
        print(f"{family} {quantization} {dtype}: {worst:.1e}")
        assert worst < tolerance
        assert (merged.adapted, merged.dequantised) == (14, 0)
        stored = {values.dtype for values in load_file(out / "model.safetensors").values()}
        assert stored == {{"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}[dtype]}
    with model.disabled():
        assert difference(logits_of(model.model), expected) > 5e-2  # the adapter matters, more than any tolerance above


def test_linears_without_adapter_went_through_quantisation_too(tmp_path: Path) -> None:
    base = tiny_checkpoint(tmp_path / "base")
    section = config.LoRA(r=4, target_modules=("layers.1.self_attn.q_proj",))
    model = trained(base, tmp_path / "adapter", section=section)
    merged = merge(base, tmp_path / "adapter", tmp_path / "out", compute_dtype="fp32", dtype="fp32")
    assert (merged.adapted, merged.dequantised) == (1, 13)
    assert difference(plain_logits(tmp_path / "out"), logits_of(model.model)) <= rounding()


def test_original_adds_to_the_weights_before_quantisation(tmp_path: Path) -> None:
    base = tiny_checkpoint(tmp_path / "base")
    model = trained(base, tmp_path / "adapter")
    merge(base, tmp_path / "adapter", tmp_path / "out", base="original", dtype="fp32", compute_dtype="fp32")
    before, after = load_file(base / "model.safetensors"), load_file(tmp_path / "out" / "model.safetensors")
    name = "model.layers.0.mlp.up_proj"
    layer = model.planted[name]
    expected = before[f"{name}.weight"] + layer.scaling * (layer.lora_B @ layer.lora_A).detach()
    torch.testing.assert_close(after[f"{name}.weight"], expected)
    assert torch.equal(after["lm_head.weight"], before["lm_head.weight"])


@pytest.mark.parametrize("weights", ["dequantized", "original"])
def test_a_base_in_fp8_is_merged_into_plain_weights(tmp_path: Path, weights: Any) -> None:
    base = tiny_checkpoint(tmp_path / "base")
    tensors, exact = load_file(base / "model.safetensors"), {}
    for name in [name for name in tensors if "proj" in name]:
        rows, columns = tensors[name].shape
        scales = torch.rand(-(-rows // 32), -(-columns // 32)) + 0.5
        spread = scales.repeat_interleave(32, 0)[:rows].repeat_interleave(32, 1)[:, :columns]
        tensors[name] = (tensors[name].float() / spread).to(torch.float8_e4m3fn)
        tensors[f"{name}_scale_inv"] = scales
        exact[name] = tensors[name].float() * spread
    save_file(tensors, base / "model.safetensors", metadata={"format": "pt"})
    values = json.loads((base / "config.json").read_text())
    values["quantization_config"] = {"quant_method": "fp8", "weight_block_size": [32, 32]}
    (base / "config.json").write_text(json.dumps(values))
    model = trained(base, tmp_path / "adapter", "nf4" if weights == "dequantized" else "none")
    merged = merge(base, tmp_path / "adapter", tmp_path / "out", compute_dtype="fp32", dtype="fp32", base=weights)
    assert difference(plain_logits(tmp_path / "out"), logits_of(model.model)) <= rounding()
    assert merged.tensors == len(load_file(tmp_path / "out" / "model.safetensors")) == len(tensors) - len(exact)


def test_a_killed_merge_goes_on_with_the_files_that_it_finished(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from qlora.export.source import Source

    base, adapter, out = tiny_checkpoint(tmp_path / "base", shard="100KB"), tmp_path / "adapter", tmp_path / "merged"
    trained(base, adapter)
    expected = merge(base, adapter, tmp_path / "whole", compute_dtype="fp32")
    files = {path.name: path.read_bytes() for path in (tmp_path / "whole").iterdir()}
    first = min(name for name in files if name.startswith("model-"))
    plain, asked = Source.tensor, list[str]()
    names = {
        name for name, file in json.loads(files["model.safetensors.index.json"])["weight_map"].items() if file == first
    }

    def counted(self: Source, name: str, *given: Any, **named: Any) -> torch.Tensor:
        asked.append(name)
        return plain(self, name, *given, **named)

    monkeypatch.setattr(Source, "tensor", counted)

    def killed(settings: dict[str, Any]) -> None:
        if child := os.fork():
            assert os.waitpid(child, 0)[1] == signal.SIGKILL
            return

        def deadly(self: Source, *given: Any, **named: Any) -> torch.Tensor:
            if len(asked) > len(names):
                os.kill(os.getpid(), signal.SIGKILL)
            return counted(self, *given, **named)

        monkeypatch.setattr(Source, "tensor", deadly)
        merge(base, adapter, out, compute_dtype="fp32", **settings)
        os._exit(0)

    killed({})
    assert not out.exists()
    found = merge(base, adapter, out, compute_dtype="fp32")
    assert not names & set(asked)
    assert {path.name: path.read_bytes() for path in out.iterdir()} == files
    assert (found.adapted, found.dequantised) == (expected.adapted, expected.dequantised)
    assert {path.name for path in tmp_path.iterdir()} == {"base", "adapter", "whole", "merged"}
    # what was made of other weights, or otherwise, is begun anew
    shutil.rmtree(out)
    asked.clear()
    killed({"base": "original"})
    merge(base, adapter, out, compute_dtype="fp32")
    assert names <= set(asked)
    assert {path.name: path.read_bytes() for path in out.iterdir()} == files


def test_shards_keep_their_boundaries(tmp_path: Path) -> None:
    base = tiny_checkpoint(tmp_path / "base", shard="100KB")
    model = trained(base, tmp_path / "adapter")
    merged = merge(base, tmp_path / "adapter", tmp_path / "out", compute_dtype="fp32")
    before = json.loads((base / "model.safetensors.index.json").read_text())
    after = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())
    assert len(set(after["weight_map"].values())) > 2
    assert after["weight_map"] == before["weight_map"]
    assert after["metadata"]["total_size"] == merged.bytes
    assert difference(plain_logits(tmp_path / "out"), logits_of(model.model)) < 2e-2


@pytest.mark.parametrize(("family", "tied"), [("llama", True), ("llama", False), ("gemma2", True)])
def test_ties_are_told_as_the_files_have_them(tmp_path: Path, family: str, tied: bool) -> None:
    base = tiny_checkpoint(tmp_path / "base", family, tie_word_embeddings=tied)
    model = trained(base, tmp_path / "adapter")
    merge(base, tmp_path / "adapter", tmp_path / "out", compute_dtype="fp32", dtype="fp32")
    assert json.loads((tmp_path / "out" / "config.json").read_text())["tie_word_embeddings"] is tied
    assert ("lm_head.weight" in load_file(tmp_path / "out" / "model.safetensors")) is not tied
    assert difference(plain_logits(tmp_path / "out"), logits_of(model.model)) <= rounding()


def test_a_tied_config_with_both_tensors_in_the_file(tmp_path: Path) -> None:
    base = tiny_checkpoint(tmp_path / "base", tie_word_embeddings=True)
    tensors = load_file(base / "model.safetensors")
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()
    save_file(tensors, base / "model.safetensors", metadata={"format": "pt"})
    model = trained(base, tmp_path / "adapter")
    merge(base, tmp_path / "adapter", tmp_path / "out", compute_dtype="fp32", dtype="fp32")
    assert json.loads((tmp_path / "out" / "config.json").read_text())["tie_word_embeddings"] is False
    assert difference(plain_logits(tmp_path / "out"), logits_of(model.model)) <= rounding()


def test_what_lies_beside_the_weights_comes_along(tmp_path: Path) -> None:
    base = tiny_checkpoint(tmp_path / "base")
    (base / "tokenizer.model").write_bytes(b"sentencepiece")
    (base / "pytorch_model.bin").write_bytes(b"pickle")
    trained(base, tmp_path / "adapter")
    merge(base, tmp_path / "adapter", tmp_path / "out", compute_dtype="fp32")
    names = {path.name for path in (tmp_path / "out").iterdir()}
    assert names >= {"generation_config.json", "tokenizer.json", "tokenizer_config.json", "tokenizer.model"}
    assert "pytorch_model.bin" not in names
    values = json.loads((tmp_path / "out" / "config.json").read_text())
    assert values["dtype"] == "bfloat16"
    assert "quantization_config" not in values
    talk = [{"role": "user", "content": "w5 w6"}]
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "out")
    assert tokenizer.apply_chat_template(talk, tokenize=False) == "w5 w6"


@pytest.mark.parametrize("inside", [True, False], ids=["in tokenizer_config.json", "as files"])
def test_of_several_chat_templates_all_come_along(tmp_path: Path, inside: bool) -> None:
    """The run's own is one of them; alone it would have calls prompted otherwise than they were trained."""
    base, several = tiny_checkpoint(tmp_path / "base"), {"default": "{{ bos_token }}", "tool_use": "{{ eos_token }}"}
    tokenizer = AutoTokenizer.from_pretrained(base)
    tokenizer.chat_template = several
    (base / "chat_template.jinja").unlink()
    tokenizer.save_pretrained(base, save_jinja_files=not inside)
    trained(base, tmp_path / "adapter")
    for run, expected in (("{{ bos_token }}", several), ("mine", "mine")):
        out = tmp_path / f"out{len(run)}"
        merge(base, tmp_path / "adapter", out, compute_dtype="fp32", chat_template=run)
        found = AutoTokenizer.from_pretrained(out).chat_template
        assert found == expected or found["default"] == expected


@pytest.mark.parametrize("quantised", [FOUR_BIT, EIGHT_BIT], ids=["nf4", "int8"])
def test_a_prequantised_base_becomes_plain(tmp_path: Path, quantised: BitsAndBytesConfig) -> None:
    source = tiny_checkpoint(tmp_path / "source")
    packed = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32, quantization_config=quantised).train()
    packed.save_pretrained(tmp_path / "base")
    AutoTokenizer.from_pretrained(source).save_pretrained(tmp_path / "base")
    options: dict[str, Any] = {"compute_dtype": "fp32", "quantization": "int8" if quantised.load_in_8bit else "nf4"}
    model = trained(tmp_path / "base", tmp_path / "adapter", options["quantization"])
    merge(tmp_path / "base", tmp_path / "adapter", tmp_path / "out", dtype="fp32", **options)
    assert "quantization_config" not in json.loads((tmp_path / "out" / "config.json").read_text())
    assert difference(plain_logits(tmp_path / "out"), logits_of(model.model)) <= rounding()
    with pytest.raises(ModelError, match="itself quantised"):
        merge(tmp_path / "base", tmp_path / "adapter", tmp_path / "no", base="original", **options)


@pytest.mark.parametrize("problem", ["missing", "unknown", "shape", "nan"])
def test_an_adapter_that_does_not_fit_is_refused_and_nothing_written(tmp_path: Path, problem: str) -> None:
    base = tiny_checkpoint(tmp_path / "base")
    trained(base, tmp_path / "adapter")
    file = tmp_path / "adapter" / "adapter_model.safetensors"
    tensors = load_file(file)
    name = "base_model.model.model.layers.1.mlp.up_proj.lora_B.weight"
    if problem == "missing":
        del tensors[name]
    elif problem == "unknown":
        name = "base_model.model.model.layers.9.mlp.up_proj.lora_B.weight"
        tensors[name] = torch.zeros(128, 4)
    elif problem == "shape":
        tensors[name] = torch.zeros(64, 4)
    else:
        tensors[name][0] = math.nan
    save_file(tensors, file)
    with pytest.raises(MethodError, match=name):
        merge(base, tmp_path / "adapter", tmp_path / "out", compute_dtype="fp32")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["adapter", "base"]


def test_fp16_overflow_is_refused_and_nothing_written(tmp_path: Path) -> None:
    base = tiny_checkpoint(tmp_path / "base")
    model = trained(base, tmp_path / "adapter", "none")
    model.trainable_parameters()["model.layers.1.mlp.up_proj.lora_B"].data.fill_(1e6)
    save_adapter(model, tmp_path / "adapter")
    with pytest.raises(MethodError, match=r"model\.layers\.1\.mlp\.up_proj\.weight.*65504"):
        merge(base, tmp_path / "adapter", tmp_path / "out", dtype="fp16", compute_dtype="fp32")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["adapter", "base"]


def test_a_taken_folder_and_a_full_disk_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    base = tiny_checkpoint(tmp_path / "base")
    trained(base, tmp_path / "adapter")
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine").write_text("kept")
    with pytest.raises(RunError, match="not empty"):
        merge(base, tmp_path / "adapter", tmp_path / "out", compute_dtype="fp32")
    assert (tmp_path / "out" / "mine").read_text() == "kept"
    with pytest.raises(RunError, match=r"holds no config\.json"):
        merge(base, tmp_path / "adapter", tmp_path / "out", overwrite=True, compute_dtype="fp32")
    assert (tmp_path / "out" / "mine").read_text() == "kept"
    (tmp_path / "out" / "config.json").write_text("{}")
    for place in (base, tmp_path):
        with pytest.raises(RunError, match="being read"):
            merge(base, tmp_path / "adapter", place, overwrite=True, compute_dtype="fp32")
    merge(base, tmp_path / "adapter", tmp_path / "out", overwrite=True, compute_dtype="fp32")
    assert not (tmp_path / "out" / "mine").exists()
    monkeypatch.setattr(shutil, "disk_usage", lambda place: shutil._ntuple_diskusage(100, 99, 1))
    with pytest.raises(DoesNotFitError, match="merged model"):
        merge(base, tmp_path / "adapter", tmp_path / "other", compute_dtype="fp32")


PEAK = """
import resource, sys
from qlora.export.merged import merge
small, large, adapter_small, adapter_large, out = sys.argv[1:]
def peak():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
merge(small, adapter_small, out + "-small", compute_dtype="fp32")
before = peak()
merge(large, adapter_large, out + "-large", compute_dtype="fp32")
print(peak() - before)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="other systems return memory when they like")
@pytest.mark.slow
def test_memory_is_one_tensor_whatever_the_model(tmp_path: Path) -> None:
    section = config.LoRA(r=4, target_modules=("up_proj",))
    for name, layers in (("small", 1), ("large", 12)):
        sizes = {"hidden_size": 512, "intermediate_size": 4096, "head_dim": 128, "num_hidden_layers": layers}
        trained(tiny_checkpoint(tmp_path / name, **sizes), tmp_path / f"adapter-{name}", "none", section)
    paths = [str(tmp_path / name) for name in ("small", "large", "adapter-small", "adapter-large", "out")]
    grown = int(subprocess.run([sys.executable, "-c", PEAK, *paths], check=True, capture_output=True, text=True).stdout)
    whole = (tmp_path / "large" / "model.safetensors").stat().st_size
    print(f"{grown / 2**20:.1f} MiB more for a file of {whole / 2**20:.1f} MiB")
    assert grown < 2 * 512 * 4096 * 4  # two dense matrices of a model that has thirty-six


@pytest.mark.parametrize(
    ("base", "quantization", "warned"),
    [
        ("dequantized", "nf4", True), ("dequantized", "none", False), ("dequantized", "int8", False),
        ("original", "nf4", False),
    ],
)  # fmt: skip
def test_a_merge_on_the_grid_warns_whoever_quantises_it_again(
    tmp_path: Path, base: Any, quantization: Any, warned: bool
) -> None:
    """And rightly so: the packed bytes come back as they were, and a small adapter is gone."""
    source = tiny_checkpoint(tmp_path / "base")
    adapted = apply_method(tiny_base(source), SECTION)
    stir(adapted, 0.01)
    save_adapter(adapted, tmp_path / "adapter")
    merged = merge(source, tmp_path / "adapter", tmp_path / "out", compute_dtype="fp32", base=base)
    assert merged.for_serving == (base == "dequantized")
    section = ModelSection(name=str(tmp_path / "out"), quantization=quantization)
    said = quantised_again(open_checkpoint(section), section)
    assert (said is not None) == warned
    if quantization != "nf4":
        return
    path = "model.layers.0.self_attn.q_proj"
    before, after = (tiny_base(folder).model.get_submodule(path).weight for folder in (source, tmp_path / "out"))
    assert torch.equal(before, after) == warned


def test_a_damaged_note_of_a_merge_is_said(tmp_path: Path) -> None:
    (tmp_path / MERGE).write_text("[]", encoding="utf-8")
    with pytest.raises(ModelError, match=r"qlora_merge.json' is not readable JSON .*; export the merged model again"):
        _ = Checkpoint(tmp_path, "merged").merge
