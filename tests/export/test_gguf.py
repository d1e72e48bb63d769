"""A GGUF file holds the merged model: read back with the gguf library, its tensors and keys are the merge's and the config's."""

from __future__ import annotations

import json
import os
import shutil
import signal
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from qlora import recipe as config
from qlora.errors import DoesNotFitError, MethodError, ModelError, RunError
from qlora.export import gguf as export
from qlora.export import gguf_tokenizer
from qlora.export.gguf import export_gguf, export_gguf_adapter, stands_for
from qlora.export.gguf_models import Converted
from qlora.export.merged import merge
from qlora.export.modelfile import go_template, write_modelfile
from qlora.export.rounding import dithered
from qlora.export.source import Source
from qlora.model.checkpoint import Checkpoint
from qlora.recipe import ModelSection
from tests.export.gguf_models import FAMILIES, checkpoint, sentencepiece_like, trained
from tests.tiny import chat_checkpoint, tiny_checkpoint

# the largest error of a block, as a share of its largest value: half a step of 127, and of 8
STEP = {"q8_0": 0.5 / 127, "q4_0": 1 / 8}

DIFFERENT = ("llama 3.1, tied", "gemma3", "qwen3.5", "phi3, long")  # what orders, names and keys the others have too


def section(base: Path) -> ModelSection:
    return ModelSection(name=str(base), quantization="none", compute_dtype="fp32")


def field(reader: Any, key: str) -> Any:
    return reader.fields[key].contents()


@pytest.fixture
def any_rules(monkeypatch: pytest.MonkeyPatch) -> None:
    """transformers makes byte-level tokenizers of some families' files, whose rules for text llama.cpp has not."""
    monkeypatch.setattr(gguf_tokenizer, "_kind", lambda tokenizer, described: None)


@pytest.mark.usefixtures("any_rules")
@pytest.mark.parametrize(
    "family", [name if name in DIFFERENT else pytest.param(name, marks=pytest.mark.slow) for name in FAMILIES]
)
@pytest.mark.sampled
def test_tensors_are_the_merged_models(tmp_path: Path, family: str) -> None:
    base = checkpoint(tmp_path / "base", family)
    trained(base, tmp_path / "adapter")
    merge(base, tmp_path / "adapter", tmp_path / "merged", quantization="none", compute_dtype="fp32", dtype="fp32")
    merged = load_file(tmp_path / "merged" / "model.safetensors")
    read = Checkpoint(base, "base")
    converted = Converted(config_of(base))
    files = {}
    for kind in ("f32", "f16", "bf16", "q8_0", "q4_0"):
        written = export_gguf(
            base, tmp_path / "adapter", tmp_path / kind, section=section(base), type=kind, checkpoint=read
        )
        files[kind] = gguf.GGUFReader(written.file)
        assert written.bytes == written.file.stat().st_size
        assert (tmp_path / kind / "Modelfile").read_text().startswith(f"FROM ./model-{kind}.gguf\n")
    expected = {
        converted.name(name): converted.values(name, values) for name, values in merged.items()
    } | converted.factors()
    for kind, reader in files.items():
        assert {tensor.name for tensor in reader.tensors} == set(expected)
        for tensor in reader.tensors:
            found = gguf.quants.dequantize(tensor.data, tensor.tensor_type).reshape(tensor.shape[::-1])
            wanted = expected[tensor.name].numpy()
            stored = tensor.tensor_type.name.lower()
            if wanted.ndim == 2 and tensor.name.startswith("blk") and "conv1d" not in tensor.name:
                assert np.array_equal(found, stands_for(expected[tensor.name], kind).numpy()), tensor.name
            assert stored == ("f32" if wanted.ndim == 1 or "norm" in tensor.name or "conv1d" in tensor.name else stored)
            if stored in STEP:
                blocks = np.abs(wanted.reshape(-1, 32)).max(1)
                # the step itself is rounded to fp16
                bound = blocks * STEP[stored] * (1 + 2**-9) + np.finfo(np.float32).tiny
                assert (np.abs(found - wanted).reshape(-1, 32).max(1) <= bound + blocks * 2**-10).all(), tensor.name
            else:
                dtype = {"f32": torch.float32, "f16": torch.float16, "bf16": torch.bfloat16}[stored]
                assert np.array_equal(found, dithered(expected[tensor.name], dtype).float().numpy()), tensor.name
                assert (np.abs(found - wanted) <= np.abs(wanted) * torch.finfo(dtype).eps + 2**-24).all(), tensor.name
        assert {tensor.tensor_type.name.lower() for tensor in reader.tensors} >= {kind}
    reader, text = files["f32"], config_of(base)
    arch = field(reader, "general.architecture")
    for key, value in {
        "context_length": min(text.max_position_embeddings, 32) if family == "mistral" else text.max_position_embeddings,
        "embedding_length": text.hidden_size, "block_count": text.num_hidden_layers, "feed_forward_length": text.intermediate_size,
        "attention.head_count": text.num_attention_heads, "attention.head_count_kv": text.num_key_value_heads,
        "attention.layer_norm_rms_epsilon": np.float32(text.rms_norm_eps), "vocab_size": text.vocab_size,
    }.items():  # fmt: skip
        assert field(reader, f"{arch}.{key}") == value, key
    assert (
        len(field(reader, "tokenizer.ggml.tokens"))
        == len(field(reader, "tokenizer.ggml.token_type"))
        == text.vocab_size
    )
    assert field(reader, "tokenizer.chat_template") == read.tokenizer.chat_template
    assert field(reader, "tokenizer.ggml.eos_token_id") == read.tokenizer.eos_token_id


def config_of(base: Path) -> Any:
    from transformers import AutoConfig

    return AutoConfig.from_pretrained(base).get_text_config()


def test_an_adapter_is_the_portable_one(tmp_path: Path) -> None:
    base = checkpoint(tmp_path / "base", "llama")
    model = trained(base, tmp_path / "adapter", config.LoRA(r=4, alpha=12))
    written = export_gguf_adapter(section(base), Checkpoint(base, "base"), tmp_path / "adapter", tmp_path / "out")
    reader = gguf.GGUFReader(written.file)
    assert (field(reader, "general.type"), field(reader, "adapter.type")) == ("adapter", "lora")
    parts = {tensor.name: torch.from_numpy(tensor.data.copy()) for tensor in reader.tensors}
    converted, scale = Converted(config_of(base)), field(reader, "adapter.lora.alpha") / 4
    for path, layer in model.planted.items():
        name = converted.name(f"{path}.weight")
        expected = converted.values(f"{path}.weight", layer.scaling * (layer.lora_B @ layer.lora_A).detach())
        torch.testing.assert_close(scale * (parts[f"{name}.lora_b"] @ parts[f"{name}.lora_a"]), expected)
    assert len(parts) == 2 * len(model.planted)


def test_ends_and_template_of_the_run(tmp_path: Path) -> None:
    base = checkpoint(tmp_path / "base", "llama")
    trained(base, tmp_path / "adapter")
    written = export_gguf(
        base,
        tmp_path / "adapter",
        tmp_path / "out",
        section=section(base),
        chat_template="mine",
        ends=(2, 263),
        type="f16",
    )
    reader = gguf.GGUFReader(written.file)
    assert (field(reader, "tokenizer.ggml.eos_token_id"), field(reader, "tokenizer.ggml.eot_token_id")) == (2, 263)
    assert field(reader, "tokenizer.chat_template") == "mine"
    assert field(reader, "tokenizer.ggml.add_bos_token") is True
    lines = (tmp_path / "out" / "Modelfile").read_text().splitlines()
    stops = [json.loads(line.split(" ", 2)[2]) for line in lines if line.startswith("PARAMETER stop ")]
    assert stops == ["</s>", Checkpoint(base, "base").tokenizer.convert_ids_to_tokens(263)]


CHATML = (
    "{% for m in messages %}{% if loop.first and m.role != 'system' %}<|im_start|>system\nBe kind<|im_end|>\n{% endif %}"
    "<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


@pytest.mark.parametrize(
    ("template", "expected"),
    [
        (
            "{{ bos_token }}{% for m in messages %}[{{ m.role }}] {{ m.content }}\n{% endfor %}{% if add_generation_prompt %}[assistant]{% endif %}",
            '{{ range .Messages }}{{ if eq .Role "system" }}[system] {{ .Content }}\n{{ else if eq .Role "user" }}[user] {{ .Content }}\n'
            '{{ else if eq .Role "assistant" }}[assistant] {{ .Content }}\n{{ end }}{{ end }}[assistant]',
        ),
        (
            CHATML,
            '{{ if ne (index .Messages 0).Role "system" }}<|im_start|>system\nBe kind<|im_end|>\n{{ end }}{{ range .Messages }}'
            + "{{ else ".join(f'if eq .Role "{role}" }}}}<|im_start|>{role}\n{{{{ .Content }}}}<|im_end|>\n' for role in ("system", "user", "assistant")).replace("if eq", "{{ if eq", 1)
            + "{{ end }}{{ end }}<|im_start|>assistant\n",
        ),
        (CHATML.replace("{% if loop", "{% if not loop.last and m.role == 'assistant' %}(old){% endif %}{% if loop"), "(old)<|im_start|>assistant"),
        (CHATML + "{{ strftime_now('%d') }}", None),  # of the day it was exported
        (CHATML + "{% if messages | length > 4 %}long{% endif %}", None),  # not turn by turn
        (CHATML.replace("m.content", "m.content | upper"), None),
        (CHATML.replace("Be kind", "{{ '{{' }}"), None),  # Go would read it
        ("{{ raise_exception('no') }}", None),
    ],
)  # fmt: skip
def test_a_chat_template_in_go(template: str, expected: str | None) -> None:
    found = go_template(sentencepiece_like(), template)
    assert found == expected if expected is None or expected.startswith("{{") else expected in str(found)


def test_ollama_is_told_how_to_sample(tmp_path: Path) -> None:
    kept = {"temperature": 0.6, "top_k": 20, "repetition_penalty": 1.1, "eos_token_id": 2}
    write_modelfile(tmp_path, "m.gguf", ["<end>"], sentencepiece_like(), CHATML, kept)
    text = (tmp_path / "Modelfile").read_text()
    assert text.startswith('FROM ./m.gguf\nTEMPLATE """{{ if ne (index')
    assert text.endswith(
        'PARAMETER stop "<end>"\nPARAMETER temperature 0.6\nPARAMETER top_k 20\nPARAMETER repeat_penalty 1.1\n'
    )
    write_modelfile(tmp_path, "m.gguf", [], sentencepiece_like(), None, {**kept, "do_sample": False})
    assert (tmp_path / "Modelfile").read_text() == "FROM ./m.gguf\n"


def test_k_types_are_the_quantisers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    base = checkpoint(tmp_path / "base", "llama")
    trained(base, tmp_path / "adapter")
    monkeypatch.setenv("PATH", str(tmp_path / "bin"))
    written = export_gguf(base, tmp_path / "adapter", tmp_path / "out", section=section(base), type="q4_k_m")
    assert written.type == "bf16"
    assert written.command == f"llama-quantize {written.file} {written.file.with_name('model-q4_k_m.gguf')} Q4_K_M"
    (tmp_path / "bin").mkdir()
    program = tmp_path / "bin" / "llama-quantize"
    program.write_text('#!/bin/sh\n[ "$3" = Q4_K_M ] || { echo "type?" >&2; exit 3; }\necho "made of $1" > "$2"\n')
    program.chmod(0o755)
    written = export_gguf(
        base, tmp_path / "adapter", tmp_path / "out", section=section(base), type="q4_k_m", overwrite=True
    )
    assert (written.type, written.command) == ("q4_k_m", None)
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["Modelfile", "model-q4_k_m.gguf"]
    with pytest.raises(RunError, match=r"status 3: type\?"):
        export_gguf(base, tmp_path / "adapter", tmp_path / "other", section=section(base), type="q6_k")
    assert not (tmp_path / "other").exists()


def test_what_llama_cpp_does_not_have_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refused(base: Path, error: type[Exception], match: str, type: str = "q8_0") -> None:
        if not (base / "adapter").exists():
            trained(base, base / "adapter")
        with pytest.raises(error, match=match):
            export_gguf(base, base / "adapter", tmp_path / "out", section=section(base), type=type)
        assert not (tmp_path / "out").exists()

    refused(tiny_checkpoint(tmp_path / "words"), ModelError, "is a WordLevel of tokenizers")
    plain = chat_checkpoint(tmp_path / "plain")
    trained(plain, plain / "adapter")
    written = export_gguf(plain, plain / "adapter", tmp_path / "known", section=section(plain))
    assert field(gguf.GGUFReader(written.file), "tokenizer.ggml.pre") == "gpt-2"
    unknown = chat_checkpoint(tmp_path / "unknown")
    described = json.loads((unknown / "tokenizer.json").read_text())
    digits = {"type": "Digits", "individual_digits": True}
    described["pre_tokenizer"] = {"type": "Sequence", "pretokenizers": [digits, described["pre_tokenizer"]]}
    (unknown / "tokenizer.json").write_text(json.dumps(described))
    refused(unknown, ModelError, r"rules for this tokenizer are not known .* hash [0-9a-f]{12}")
    base = checkpoint(tmp_path / "base", "llama")
    FAMILIES_TOO = {"falcon": "not for 'falcon'"}
    for kind, match in FAMILIES_TOO.items():
        with pytest.raises(ModelError, match=match):
            Converted(type("Config", (), {"model_type": kind}))
    windows = checkpoint(tmp_path / "windows", "gemma2")
    values = json.loads((windows / "config.json").read_text())
    (windows / "config.json").write_text(json.dumps({**values, "layer_types": ["full_attention"] * 2}))
    refused(windows, ModelError, "window in each layer but every 2th")
    trained(base, base / "adapter", config.LoRA(r=4, target_modules=("embed_tokens",)))
    with pytest.raises(MethodError, match=r"no LoRA on|plain LoRA alone"):
        export_gguf_adapter(section(base), Checkpoint(base, "base"), base / "adapter", tmp_path / "out")
    monkeypatch.setattr("qlora.machine.disk.free_disk", lambda folder: 1000)
    refused(base, DoesNotFitError, "The GGUF file needs")


def test_a_killed_export_goes_on_behind_the_tensors_that_it_had_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    base, adapter, out = checkpoint(tmp_path / "base", "llama 3.1, tied"), tmp_path / "adapter", tmp_path / "gguf"
    trained(base, adapter)
    whole = export_gguf(base, adapter, tmp_path / "whole", section=section(base))
    expected = whole.file.read_bytes()
    plain, asked = Source.tensor, list[str]()
    monkeypatch.setattr(export, "TOLD_EVERY", 1)

    def counted(self: Source, name: str, *given: Any, **named: Any) -> torch.Tensor:
        asked.append(name)
        return plain(self, name, *given, **named)

    monkeypatch.setattr(Source, "tensor", counted)

    def killed(**settings: Any) -> None:
        if child := os.fork():
            assert os.waitpid(child, 0)[1] == signal.SIGKILL
            return

        def deadly(self: Source, *given: Any, **named: Any) -> torch.Tensor:
            if len(asked) == 5:
                (waiting,) = tmp_path.glob(".gguf.writing-*/*.gguf")
                with waiting.open("ab") as file:  # half of the next tensor
                    file.write(b"\xff" * 100)
                os.kill(os.getpid(), signal.SIGKILL)
            return counted(self, *given, **named)

        monkeypatch.setattr(Source, "tensor", deadly)
        export_gguf(base, adapter, out, section=section(base), **settings)
        os._exit(0)

    killed()
    assert not out.exists()
    found = export_gguf(base, adapter, out, section=section(base))
    assert len(asked) == whole.tensors - 5 - len(Converted(config_of(base)).factors())
    assert found.file.read_bytes() == expected
    assert {path.name for path in out.iterdir()} == {path.name for path in (tmp_path / "whole").iterdir()}
    assert {path.name for path in tmp_path.iterdir()} == {"base", "adapter", "whole", "gguf"}
    shutil.rmtree(out)  # what was made otherwise is begun anew
    asked.clear()
    killed(chat_template="{{ messages }}")
    assert export_gguf(base, adapter, out, section=section(base)).file.read_bytes() == expected
    assert len(asked) == whole.tensors - len(Converted(config_of(base)).factors())
