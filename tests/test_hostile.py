"""Files from strangers: whatever they hold, the answer is one sentence, soon, and nothing is run, written or unpickled."""

from __future__ import annotations

import ast
import json
import pickle
import struct
import sys
import time
import tracemalloc
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from benchmarks.survive.changes import changed
from benchmarks.survive.fuzz import LONGEST
from benchmarks.survive.parsers import LLAMA, LORA, PARSERS, Parser, tensor, tensors_bytes
from qlora.cli import main
from qlora.errors import DoesNotFitError, MethodError, ModelError, QloraError, RecipeError
from qlora.files.strangers import MAX_JSON, MAX_LEVELS, MAX_RECIPE, MAX_VALUES, Fault, json_object, shown, yaml_values
from qlora.machine.cards import parse_memory
from qlora.methods import files
from qlora.methods.files import read_adapter_config, read_adapter_tensors, read_method_state, recorded_base
from qlora.model import tensor_file, tokenizer
from qlora.model.checkpoint import (
    INDEX,
    MAX_SHARDS,
    find_model,
    fingerprint,
    open_checkpoint,
    read_model_config,
)
from qlora.model.tensor_file import MAX_HEADER
from qlora.recipe.config import MOST_MISTAKES, Recipe

ROOT = Path(__file__).parents[1]
SOON = 10.0  # seconds of a core, on a slow one


@pytest.fixture(autouse=True)
def in_time() -> Iterator[None]:
    """No hostile file takes long."""
    began = time.process_time()
    yield
    assert time.process_time() - began < 60


# --- safetensors -----------------------------------------------------------------------------------------------------

F32 = {"dtype": "F32", "shape": [4], "data_offsets": [0, 16]}


def twice(*fields: object) -> bytes:
    """A header whose key stands twice, as no dictionary can say it."""
    return ("{" + ", ".join(f'"a": {json.dumps(value)}' for value in fields) + "}").encode()


HEADERS: dict[str, tuple[object, str]] = {
    "negative sizes whose product is right": ({"a": F32 | {"shape": [-2, -2]}}, "has the shape"),
    "a negative size": ({"a": F32 | {"shape": [-4]}}, "has the shape"),
    "a true size": ({"a": F32 | {"shape": [True, 4]}}, "has the shape"),
    "a size with a point": ({"a": F32 | {"shape": [4.0]}}, "has the shape"),
    "a size in text": ({"a": F32 | {"shape": ["4"]}}, "has the shape"),
    "no list of sizes": ({"a": F32 | {"shape": 4}}, "has the shape"),
    "a shape of text": ({"a": F32 | {"shape": "4"}}, "has the shape"),
    "a huge size": ({"a": F32 | {"shape": [2**63]}}, "has the shape"),
    "sizes that overflow": ({"a": F32 | {"shape": [2**40, 2**40]}}, "at most 2⁶⁰ elements"),
    "nothing, of enormous shape": ({"a": F32 | {"shape": [0, 2**62, 2**62], "data_offsets": [0, 0]}}, "at most 2⁶⁰"),
    "very many dimensions": ({"a": F32 | {"shape": [9_999_999_999] * 200_000}}, "at most 2⁶⁰ elements"),
    "offsets with a point": ({"a": F32 | {"data_offsets": [0.0, 16.0]}}, "has the data_offsets"),
    "negative offsets": ({"a": F32 | {"data_offsets": [-16, 0]}}, "has the data_offsets"),
    "offsets backwards": ({"a": F32 | {"data_offsets": [16, 0]}}, "has the data_offsets"),
    "three offsets": ({"a": F32 | {"data_offsets": [0, 8, 16]}}, "has the data_offsets"),
    "huge offsets": ({"a": F32 | {"data_offsets": [2**63 - 16, 2**63]}}, "has the data_offsets"),
    "offsets after the end": ({"a": F32 | {"data_offsets": [2**50, 2**50 + 16]}}, "gap or overlap"),
    "an overlap": ({"a": F32, "b": F32 | {"data_offsets": [8, 24]}}, "gap or overlap at byte 8"),
    "an alias of the same bytes": ({"a": F32, "b": F32}, "gap or overlap at byte 0"),
    "a gap": ({"a": F32, "b": F32 | {"data_offsets": [20, 36]}}, "gap or overlap at byte 20"),
    "too few bytes": ({"a": F32 | {"data_offsets": [0, 15]}}, "takes 15 bytes where its shape needs 16"),
    "a dtype that is a list": ({"a": F32 | {"dtype": ["F32"]}}, "has the dtype"),
    "a dtype of next year": ({"a": F32 | {"dtype": "F4"}}, "dtype 'F4', which is not supported"),
    "an unknown field": ({"a": F32 | {"loader": "x"}}, "expected dtype, shape and data_offsets"),
    "no field": ({"a": {}}, "expected dtype, shape and data_offsets"),
    "no object": ({"a": None}, "expected dtype, shape and data_offsets"),
    "metadata of objects": ({"__metadata__": {"a": {}}, "b": F32}, "metadata is not text by text"),
    "metadata that is a tensor": ({"__metadata__": F32}, "metadata is not text by text"),
    "a name with half a character": (b'{"\\ud800": ' + json.dumps(F32).encode() + b"}", "which is no text"),
    "a name of a megabyte": ({"a" * 10**6: F32 | {"dtype": "?"}}, "has the dtype"),
    "the same name twice": (twice(F32, F32), "has the key 'a' twice"),
    "a name twice, with other bytes": (twice(F32, F32 | {"shape": [2, 2]}), "has the key 'a' twice"),
    "NaN": (b'{"a": NaN}', "NaN"),
    "infinity": (b'{"a": -Infinity}', "Infinity"),
    "a number of 5,000 digits": (b'{"a": ' + b"9" * 5000 + b"}", "digits"),
    "nested": (b'{"a":' * 100_000, "nested"),
    "nested a little": (b'{"a":' * 80 + b"1" + b"}" * 80, "nested|expected dtype"),
    "UTF-16": ('{"a": 1}'.encode("utf-16"), "no JSON"),
    "a byte order mark": (b"\xef\xbb\xbf{}", "no JSON"),
    "a list": ([], "holds list"),
}  # fmt: skip


@pytest.mark.parametrize("name", HEADERS)
def test_header_is_refused(name: str, tmp_path: Path) -> None:
    header, said = HEADERS[name]
    (tmp_path / "config.json").write_text("{}")
    content = tensors_bytes(header, size=36)
    for file, read, kind in (
        ("model.safetensors", open_checkpoint, ModelError),
        (files.WEIGHTS, read_adapter_tensors, MethodError),
        (files.WEIGHTS, recorded_base, MethodError),
        (files.METHOD_STATE, read_method_state, MethodError),
    ):
        (tmp_path / file).write_bytes(content)
        began = time.process_time()
        with pytest.raises(kind, match=said) as caught:
            read(tmp_path)
        assert time.process_time() - began < SOON
        assert "damaged" in str(caught.value)
        assert len(str(caught.value)) < 1000
        assert "\n" not in str(caught.value)


def test_what_is_odd_and_sound_is_read(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"time_step_limit": [0.0, Infinity]}')  # as Mamba's has it
    header = {"__metadata__": {"a": "b"}, "z": tensor(0), "a": tensor(4, 0, 7), "ü\n": tensor(4, 1, 1, 1, 1, 1, 1)}
    (tmp_path / "model.safetensors").write_bytes(tensors_bytes(header))
    checkpoint = open_checkpoint(tmp_path)
    assert {name: tuple(checkpoint.read(name).shape) for name in checkpoint.entries} == {
        "z": (), "a": (0, 7), "ü\n": (1, 1, 1, 1, 1, 1)
    }  # fmt: skip


@pytest.mark.parametrize("length", [0, 1, MAX_HEADER + 1, 100 * 10**6, 2**63, 2**64 - 1])
def test_length_of_a_header_takes_no_memory(length: int, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    path = tmp_path / "model.safetensors"
    with path.open("wb") as file:
        file.write(struct.pack("<Q", length) + b"{}")
        file.truncate(8 + min(length, 10**12))  # a file with holes
    tracemalloc.start()
    try:
        with pytest.raises(ModelError, match="does not begin with a safetensors header"):
            open_checkpoint(tmp_path)
        assert tracemalloc.get_traced_memory()[1] < 10**6
    finally:
        tracemalloc.stop()


def test_header_as_large_as_it_may_be(tmp_path: Path) -> None:
    """The worst in memory: as many small objects as fit. Thirty times the header's size is what the constant promises."""
    path = tmp_path / "a.safetensors"
    header = b'{"a":[' + b"{}," * 100_000 + b"{}]}"
    path.write_bytes(tensors_bytes(header))
    tracemalloc.start()
    try:
        with pytest.raises(Fault, match="expected dtype"):
            tensor_file.read_header(path)
        assert tracemalloc.get_traced_memory()[1] < 30 * len(header)
    finally:
        tracemalloc.stop()


def test_file_with_holes_takes_no_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    size = 2**40
    header = {"a": {"dtype": "U8", "shape": [size], "data_offsets": [0, size]}}
    with (tmp_path / files.WEIGHTS).open("wb") as file:
        content = tensors_bytes(header, size=0)
        file.write(content)
        file.truncate(len(content) + size)
    monkeypatch.setattr(tensor_file, "total_memory_bytes", lambda device: (2**39, 2**40))
    with pytest.raises(DoesNotFitError, match=r"holds 1,024\.0 GiB of tensors|holds .*TiB|holds 1024"):
        read_adapter_tensors(tmp_path)


def test_pipe_is_not_waited_for(tmp_path: Path) -> None:
    import os

    (tmp_path / "config.json").write_text("{}")
    for name in ("model.safetensors", files.WEIGHTS, files.CONFIG):
        os.mkfifo(tmp_path / name)
    with pytest.raises(ModelError, match="has no weights"):
        open_checkpoint(tmp_path)
    with pytest.raises(MethodError, match=f"no {files.WEIGHTS}"):
        read_adapter_tensors(tmp_path)
    with pytest.raises(MethodError, match="no ordinary file"):
        read_adapter_config(tmp_path)
    (tmp_path / "config.json").unlink()
    (tmp_path / "config.json").symlink_to("/dev/zero")
    with pytest.raises(ModelError, match="no ordinary file"):
        open_checkpoint(tmp_path)


# --- the index -------------------------------------------------------------------------------------------------------

INDEXES: dict[str, tuple[object, str]] = {
    "upwards": ({"a": "../secret.safetensors"}, "outside of its folder"),
    "absolute": ({"a": "/etc/passwd"}, "outside of its folder"),
    "below": ({"a": "sub/x.safetensors"}, "outside of its folder"),
    "upwards on Windows": ({"a": "..\\secret.safetensors"}, "outside of its folder"),
    "a drive": ({"a": "C:secret.safetensors"}, "outside of its folder"),
    "the folder itself": ({"a": "."}, "outside of its folder"),
    "the folder above": ({"a": ".."}, "no safetensors"),
    "no name": ({"a": ""}, "no safetensors"),
    "a pickle": ({"a": "pytorch_model.bin"}, "no safetensors: 'pytorch_model.bin'"),
    "a name with NUL": ({"a": "\0.safetensors"}, "lacks"),
    "a name with half a character": ({"a": "\ud800.safetensors"}, "lacks"),
    "a name longer than names": ({"a": "x" * 5000 + ".safetensors"}, "lacks"),
    "orders to a terminal": ({"a": "\x1b[2J.safetensors"}, r"lacks '\\x1b\[2J"),
    "no text": ({"a": 3}, "no 'weight_map'"),
    "a list": (["a.safetensors"], "no 'weight_map'"),
    "nothing": ({}, "names 0 files"),
    "very many files": ({str(number): f"{number}.safetensors" for number in range(MAX_SHARDS + 1)}, "names 10,001 files"),
    "very many tensors": ({f"model.layers.{number}.weight": "a.safetensors" for number in range(10**5)}, "lacks 'a.safetensors'"),
}  # fmt: skip


@pytest.mark.parametrize("name", INDEXES)
def test_index_leads_nowhere_else(name: str, tmp_path: Path) -> None:
    weight_map, said = INDEXES[name]
    folder = tmp_path / "model"
    folder.mkdir()
    (tmp_path / "secret.safetensors").write_bytes(tensors_bytes({"a": tensor(0)}))
    (folder / "pytorch_model.bin").write_bytes(b"\x80")
    (folder / "config.json").write_text("{}")
    (folder / INDEX).write_text(json.dumps({"weight_map": weight_map}))
    for read in (open_checkpoint, fingerprint):
        with pytest.raises(ModelError, match=said) as caught:
            read(folder)
        assert len(str(caught.value)) < 2000


def test_index_that_is_too_large_is_not_read(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    with (tmp_path / INDEX).open("wb") as file:
        file.truncate(10**12)  # a file with holes
    with pytest.raises(ModelError, match="has 1,000,000,000,000 bytes; expected at most"):
        open_checkpoint(tmp_path)


def test_index_with_a_key_twice(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / INDEX).write_text('{"weight_map": {"a": "a.safetensors"}, "weight_map": {"a": "../a.safetensors"}}')
    with pytest.raises(ModelError, match="has the key 'weight_map' twice"):
        open_checkpoint(tmp_path)


def test_links_of_the_hubs_cache_are_followed(tmp_path: Path) -> None:
    blobs, snapshot = tmp_path / "blobs", tmp_path / "snapshots" / ("a" * 40)
    blobs.mkdir()
    snapshot.mkdir(parents=True)
    for name, content in (
        ("config.json", b"{}"),
        ("a.safetensors", tensors_bytes({"a": tensor(0, 2)})),
        (INDEX, b'{"weight_map": {"a": "a.safetensors"}}'),
    ):
        (blobs / name).write_bytes(content)
        (snapshot / name).symlink_to(Path("../../blobs") / name)
    assert open_checkpoint(snapshot).read("a").tolist() == [0.0, 0.0]
    assert len(fingerprint(snapshot)) == 64


# --- configurations of models, tokenizers and adapters ---------------------------------------------------------------

CONFIGS: dict[str, tuple[object, str]] = {
    "labels without end": ({**LLAMA, "num_labels": 10**9}, "'num_labels': 1000000000; expected at most"),
    "layers without end": ({**LLAMA, "num_hidden_layers": 10**9}, "expected at most"),
    "layers inside": ({**LLAMA, "text_config": {"n_layer": 10**12}}, "expected at most"),
    "infinitely many": (b'{"model_type": "llama", "num_hidden_layers": Infinity}', "expected at most"),
    "a type that is a list": ({**LLAMA, "model_type": ["llama"]}, "has the model_type"),
    "classes that are a number": ({**LLAMA, "architectures": 5}, "has the architectures"),
    "classes of classes": ({**LLAMA, "architectures": [["x"]]}, "has the architectures"),
    "nested": (b'{"a":' * 500 + b"1" + b"}" * 500, "nested more than"),
    "nested deeply": (b'{"a":' * 100_000, "nested more than"),
    "a key twice": (b'{"vocab_size": 1, "vocab_size": 2}', "has the key 'vocab_size' twice"),
    "large": (b'{"a": "' + b"x" * MAX_JSON + b'"}', f"at most {MAX_JSON:,}"),
    "long digits": (b'{"a": ' + b"9" * 10_000 + b"}", "digits"),
    "a list": ([], "holds list"),
    "no text": (b"\xff\xfe", "no JSON"),
}  # fmt: skip


@pytest.mark.parametrize("name", CONFIGS)
def test_model_configuration_is_refused(name: str, tmp_path: Path) -> None:
    values, said = CONFIGS[name]
    (tmp_path / "config.json").write_bytes(values if isinstance(values, bytes) else json.dumps(values).encode())
    for read in (read_model_config, open_checkpoint, fingerprint):
        with pytest.raises(ModelError, match=said) as caught:
            read(tmp_path)
        assert len(str(caught.value)) < 1000


def test_configuration_with_the_same_twice_is_read(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"use_cache": true, "use_cache": true}')
    assert read_model_config(tmp_path) == {"use_cache": True}
    (tmp_path / "config.json").write_text(json.dumps({"num_hidden_layers": 1_000}))
    assert read_model_config(tmp_path)


@pytest.mark.parametrize(
    "fields",
    [
        {"num_attention_heads": 0},
        {"hidden_size": -1},
        {"hidden_size": "wide"},
        {"vocab_size": 2**62},
        {"rope_scaling": {"rope_type": "x", "factor": -1}},
        {"hidden_act": "__import__"},
        {"head_dim": 0},
        {"torch_dtype": "os.system"},
        {"text_config": 5},
        {"quantization_config": "x"},
        {"quantization_config": {"quant_method": []}},
        {"intermediate_size": 10**30},
        {"layer_types": 3},
        {"is_encoder_decoder": "x"},
    ],
    ids=str,
)
def test_model_of_hostile_sizes_is_built_or_refused(fields: dict[str, Any], tmp_path: Path) -> None:
    reader = next(parser for parser in PARSERS if parser.name == "config.json")
    with suppress(QloraError):
        reader.read(tmp_path, json.dumps({**LLAMA, **fields}).encode())


def test_tokenizer_that_panics_is_a_sentence(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class PanicException(BaseException):
        """What the Rust libraries raise: no Exception."""

    def panic(*_: Any, **__: Any) -> None:
        raise PanicException("index out of bounds")

    (tmp_path / "tokenizer.json").write_text("{}")
    monkeypatch.setattr(tokenizer.AutoTokenizer, "from_pretrained", panic)
    with pytest.raises(ModelError, match="cannot be loaded: index out of bounds"):
        tokenizer.load_tokenizer(tmp_path)
    monkeypatch.setattr(tokenizer, "MAX_TOKENIZER", 1)
    with pytest.raises(ModelError, match="no file of at most 1 bytes"):
        tokenizer.load_tokenizer(tmp_path)


ADAPTER_CONFIGS: dict[str, tuple[object, str]] = {
    "a kind without end": ({**LORA, "peft_type": "x" * 10**6}, "peft_type='xxx"),
    "a kind that is a list": ({**LORA, "peft_type": [[["x"]]]}, "peft_type="),
    "a rank for a fool": ({**LORA, "r": 10**4000}, "r is a number of 13,288 bits"),
    "a rank that is NaN": (b'{"peft_type": "LORA", "r": NaN, "lora_alpha": 8, "target_modules": ["a"]}', "r is nan"),
    "targets of a megabyte": ({**LORA, "target_modules": "x" * 10**6}, "a pattern"),
    "targets that are numbers": ({**LORA, "target_modules": list(range(10_000))}, "; and 9,99. more"),
    "very many values": ({**LORA, "target_modules": [0] * 300_000}, "more than 200,000 values"),
    "a key of a megabyte": ({**LORA, "x" * 10**6: 1}, "not supported"),
    "a key with orders to a terminal": ({**LORA, "\x1b[2J": 1}, r"sets \\x1b\[2J=1"),
    "nested": (b'{"peft_type":' + b"[" * 900 + b"]" * 900 + b"}", "nested"),
    "a key twice": (b'{"peft_type": "LORA", "peft_type": "IA3"}', "has the key 'peft_type' twice"),
    "rows below zero": ({"peft_type": "TRAINABLE_TOKENS", "token_indices": [-1, 2]}, "trains the token rows"),
    "ours, with a lie": ({"peft_type": "QLORA", "qlora_method": "lora"}, "cannot be used|no method"),
    "ours, with nothing": ({"peft_type": "QLORA"}, "cannot be used|no method"),
}  # fmt: skip


@pytest.mark.parametrize("name", ADAPTER_CONFIGS)
def test_adapter_config_is_refused(name: str, tmp_path: Path) -> None:
    values, said = ADAPTER_CONFIGS[name]
    (tmp_path / files.CONFIG).write_bytes(values if isinstance(values, bytes) else json.dumps(values).encode())
    began = time.process_time()
    with pytest.raises(MethodError, match=said) as caught:
        read_adapter_config(tmp_path)
    assert time.process_time() - began < SOON
    assert len(str(caught.value)) < 3000
    assert str(caught.value).isprintable()


# --- recipes ---------------------------------------------------------------------------------------------------------

DATA = "data: {train: x}\n"
LAUGHS = "a: &a [x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"{y}: &{y} [{', '.join([f'*{x}'] * 9)}]\n" for x, y in zip("abcdefgh", "bcdefghi", strict=True)
)
MERGED_LAUGHS = "a: &a {x: 1}\n" + "".join(
    f"{y}: &{y} {{<<: [{', '.join([f'*{x}'] * 9)}]}}\n" for x, y in zip("abcdefgh", "bcdefghi", strict=True)
)
RECIPES: dict[str, tuple[str | bytes, str]] = {
    "a billion laughs": (LAUGHS, "more than 20,000 values"),
    "a billion laughs by merging": (MERGED_LAUGHS, "more than 20,000 values"),
    "a list in itself": ("data: &a [*a]", "an anchor that holds itself at line 1, column 11"),
    "a mapping in itself": ("&a\ndata: *a", "an anchor that holds itself"),
    "a merge of itself": ("data: &a {<<: *a}", "an anchor that holds itself"),
    "a chain of aliases": ("a0: &a0 [x]\n" + "".join(f"a{n}: &a{n} [*a{n - 1}]\n" for n in range(1, 99)), f"more than {MAX_LEVELS} levels"),
    "an alias of nothing": ("data: *x", "undefined alias"),
    "Python": ("data: !!python/object/apply:os.system ['touch made']", "'!!python/object/apply:os.system'"),
    "Python's names": ("data: !!python/name:os.system", "'!!python/name:os.system'"),
    "a tag of one's own": ("data: !x {train: y}", "stands for no plain value"),
    "a set": (DATA + "method: {target_modules: !!set {a, b}}", "'!!set'"),
    "bytes": (DATA + "folder: !!binary aGk=", "'!!binary'"),
    "an ordered map": (DATA + "method: !!omap [a: 1]", "'!!omap'"),
    "an empty number": (DATA + "training: {epochs: !!int ''}", "not valid YAML"),
    "a truth that is none": (DATA + "overwrite: !!bool x", "not valid YAML"),
    "a date that is none": (DATA + "folder: !!timestamp x", "not valid YAML"),
    "an impossible date": (DATA + "folder: 2024-13-45", "not valid YAML"),
    "a number to the base of sixty": (DATA + f"training: {{epochs: {'1:' * 400}1.5}}", "a number of more than 64 characters"),
    "many digits": (DATA + f"training: {{epochs: {'9' * 100_000}}}", "a number of more than 64 characters"),
    "many hexadecimal digits": (DATA + f"training: {{epochs: 0x{'f' * 100_000}}}", "a number of more than 64 characters"),
    "a number too large to count": (DATA + "training: {epochs: 999999999999999999999}", "expected a number below 2⁵³"),
    "a float too large": (DATA + "training: {learning_rate: 1.0e+999}", "finite number|less than or equal"),
    "a NUL": (b"folder: \x00", "not valid YAML"),
    "an escaped NUL": (DATA + r'folder: "a\0b"', "no text may hold"),
    "half a character": (DATA + r'folder: "\ud800"', "no text may hold"),
    "no character": (DATA + r'folder: "\U7fffffff"', "not valid YAML"),
    "not UTF-8": (b"folder: \xe9", "UTF-8"),
    "UTF-16": ("folder: a".encode("utf-16"), "UTF-8"),
    "a list as a key": ("? [a]\n: b", "a key that is no plain text"),
    "a mapping as a key": ("{{a: b}: c}", "a key that is no plain text"),
    "an anchor as a key": ("x: &x [1]\n*x : y", "a key that is no plain text"),
    "a key twice in a list": (DATA + "method:\n- {r: 4,\n   r: 8}", "'method.0.r' stands twice, at lines 3 and 4"),
    "two documents": ("data: x\n---\ndata: y", "not valid YAML"),
    "a large file": ("#" * (MAX_RECIPE + 1), f"at most {MAX_RECIPE:,}"),
    "many values": (DATA + f"x: [{'1,' * 100_000}]", f"more than {MAX_VALUES:,} values"),
    "nested": ("[" * 200_000, f"nested more than {MAX_LEVELS} levels"),
    "nested in blocks": ("- " * 100_000, f"nested more than {MAX_LEVELS} levels"),
    "many mistakes": (DATA + "".join(f"k{number}: 1\n" for number in range(3000)), f"and {3000 - MOST_MISTAKES:,} more"),
    "many wrong files": (f"data: {{train: [{'1,' * 9000}]}}", "more"),
    "many methods": (DATA + f"method: [{'{},' * 9000}]", "more than once"),
    "many tokens": (DATA + f"method: {{name: new_tokens, tokens: [{'a,' * 9000}]}}", "more than once"),
    "rows that are negative": (DATA + "method: {name: new_tokens, tokens: [a], ids: [-1]}", "method.ids"),
    "a long value": (DATA + f"training: {{epochs: {'x' * 100_000}}}", "'training.epochs' .line 2. is 'xxx"),
    "a long key": (DATA + f"? {'x' * 100_000}\n: 1", "is not a known key"),
    "orders to a terminal": (DATA + '"\\e[2J": 1', r"'\\x1b\[2J' .line 2. is not a known key"),
    "a revision that is a path": (DATA + "model: {revision: ../../../etc/passwd}", "expected a branch, tag or commit"),
    "a revision that is absolute": (DATA + "model: {revision: /etc/passwd}", "expected a branch, tag or commit"),
}  # fmt: skip


@pytest.mark.parametrize("name", RECIPES)
def test_recipe_is_refused(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    text, said = RECIPES[name]
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "recipe.yaml"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    began = time.process_time()
    with pytest.raises(RecipeError, match=said) as caught:
        Recipe.from_yaml(path)
    assert time.process_time() - began < SOON
    assert len(str(caught.value)) < 3000
    assert [item.name for item in tmp_path.iterdir()] == ["recipe.yaml"]


def test_laughs_take_no_memory() -> None:
    for text in (LAUGHS, MERGED_LAUGHS):
        tracemalloc.start()
        try:
            with pytest.raises(Fault, match="values"):
                yaml_values(text)
            assert tracemalloc.get_traced_memory()[1] < 2 * 10**6
        finally:
            tracemalloc.stop()


def test_anchors_and_merges_of_a_recipe_are_read() -> None:
    text = "x: &x {train: a.jsonl, limit: 5}\ndata: {<<: *x, limit: 6}\ny: [*x, *x]\n"
    values, lines = yaml_values("\ufeff" + text)
    assert values == yaml.safe_load(text)
    assert lines["data", "limit"] == 2
    parts = yaml_values("data: {train: a}\nmethod: [&b {name: bottleneck, form: pfeiffer}, *b]")[0]
    forms = [part.form for part in Recipe.from_dict(parts, "method.1.form=lin").method.parts]
    assert forms == ["pfeiffer", "lin"]  # the override of one is none of the other


OVERRIDES = {
    "no value": ("training.epochs", "expected section.key=value"),
    "no key": ("=1", "expected section.key=value"),
    "very deep": (".".join("a" * 5000) + "=1", "expected section.key=value"),
    "very long": ("a" * 10**6, "expected section.key=value"),
    "a number of a list with 5,000 digits": (f"method.{'9' * 5000}.r=1", "in a list of 1"),
    "a superscript": ("method.².r=1", "in a list of 1"),
    "a negative number": ("method.-1.r=1", "in a list of 1"),
    "an anchor in itself": ("data.train=&a [*a]", "an anchor that holds itself"),
    "Python": ("data.train=!!python/object/apply:os.system ['true']", "stands for no plain value"),
    "nested": ("data.train=" + "[" * 10_000, "nested more than"),
    "a long value": ("training.epochs=" + "x" * 10**5, "is 'xxx"),
    "not YAML": ("data.train=[", "not valid YAML"),
    "half a character": ("folder=\ud800", "not valid YAML|no text may hold"),
}


@pytest.mark.parametrize("name", OVERRIDES)
def test_override_is_refused(name: str) -> None:
    override, said = OVERRIDES[name]
    with pytest.raises(RecipeError, match=said) as caught:
        Recipe.from_dict({"data": {"train": "x"}, "method": [{"name": "lora"}]}, override)
    assert len(str(caught.value)) < 1000


@pytest.mark.parametrize(
    "text", ["9" * 400 + "GiB", "9" * 10**6 + "GiB", "1e999GiB", "infGiB", "٣GiB", "-1GiB", "0GiB", "\0"]
)
def test_amount_of_memory_that_is_none(text: str) -> None:
    with pytest.raises(RecipeError, match="memory") as caught:
        parse_memory(text)
    assert len(str(caught.value)) < 300


@pytest.mark.parametrize("name", ["~nobody-is-called-so/x", "x" * 5000, "org/na\0me", "org/../../x", "..", "a/.."])
def test_name_of_a_model_that_is_none(name: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    if name == "..":
        assert find_model(name) == Path("..")  # a folder is what its name says
        return
    with pytest.raises(ModelError) as caught:
        find_model(name, weights=False)
    assert len(str(caught.value)) < 1000


@pytest.mark.parametrize(
    "name", ["a billion laughs", "Python", "a list in itself", "an escaped NUL", "not UTF-8", "nested", "a long value"]
)
def test_command_line_says_one_line(
    name: str, tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    text, _ = RECIPES[name]
    path = tmp_path / "recipe.yaml"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    assert main(["train", str(path)]) == 2
    errors = capfd.readouterr().err
    assert errors.startswith("qlora: ")
    assert errors.count("\n") == 1
    assert "Traceback" not in errors
    assert [item.name for item in tmp_path.iterdir()] == ["recipe.yaml"]


# --- pickles -----------------------------------------------------------------------------------------------------------


class Bomb:
    """Whoever unpickles it makes a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Callable[..., object], tuple[object, ...]]:
        return open, (str(self.path), "w")


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.pt", "weights.pth", "last.ckpt"])
def test_pickled_model_is_refused_with_the_way_to_convert_it(name: str, tmp_path: Path) -> None:
    made = tmp_path / "made"
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(LLAMA))
    (folder / name).write_bytes(pickle.dumps(Bomb(made)))
    for read in (open_checkpoint, fingerprint):
        with pytest.raises(ModelError, match=rf"pickled weights only \({name}\).*from_pretrained.*save_pretrained"):
            read(folder)
    (folder / "adapter_model.bin").write_bytes(pickle.dumps(Bomb(made)))
    with pytest.raises(MethodError, match="is a pickle, which is never read"):
        read_adapter_tensors(folder)
    for name in ("model.safetensors", files.WEIGHTS, files.METHOD_STATE):  # a pickle by another name
        (folder / name).write_bytes(pickle.dumps(Bomb(made)))
    for reader in (open_checkpoint, read_adapter_tensors, read_method_state, recorded_base):
        with pytest.raises(QloraError, match="damaged"):
            reader(folder)
    assert not made.exists()
    pickle.loads(pickle.dumps(Bomb(made))).close()
    assert made.exists()  # the bomb works


# --- laws of the source ----------------------------------------------------------------------------------------------

SOURCES = sorted(path for room in ("qlora", "recipes", "benchmarks") for path in (ROOT / room).rglob("*.py"))
PICKLING = {"pickle", "cPickle", "_pickle", "dill", "cloudpickle", "shelve", "marshal", "joblib"}
FORBIDDEN = {
    "torch.load", "torch.save", "torch.hub", "torch.jit.load", "yaml.load", "yaml.load_all",
    "yaml.unsafe_load", "yaml.full_load", "yaml.Loader", "yaml.UnsafeLoader", "yaml.FullLoader", "pandas.read_pickle",
    "os.system", "os.popen", "os.execv", "os.execvp", "os.spawnl", "subprocess.getoutput", "subprocess.getstatusoutput",
    "asyncio.create_subprocess_shell", "eval", "exec", "compile", "input", "breakpoint",
}  # fmt: skip


FORMAT = "format of a text that is not written here"


def dotted(node: ast.AST) -> str:
    """``a.b.c`` of a name or an attribute of one; empty for anything else."""
    if isinstance(node, ast.Name):
        return node.id
    inside = dotted(node.value) if isinstance(node, ast.Attribute) else ""
    return f"{inside}.{node.attr}" if inside and isinstance(node, ast.Attribute) else ""


def breaches(source: str) -> list[str]:
    """What in a Python text unpickles, evaluates, goes through a shell, or formats by a text that is not its own."""
    found = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import | ast.ImportFrom):
            module = getattr(node, "module", None) or ""
            names = [f"{module}.{alias.name}".strip(".") for alias in node.names]
            found += [name for name in names if name.split(".")[0] in PICKLING or name in FORBIDDEN]
        elif dotted(node).startswith("yaml.") and dotted(node).endswith("Loader") and dotted(node) != "yaml.SafeLoader":
            found.append(dotted(node))
        elif isinstance(node, ast.Attribute | ast.Name) and dotted(node) in FORBIDDEN:
            if isinstance(node, ast.Attribute) or dotted(node) not in ("compile", "input"):
                found.append(dotted(node))
        elif isinstance(node, ast.Call):
            keywords = {word.arg: word.value for word in node.keywords}
            found += [f"{name}=" for name in ("allow_pickle", "weights_only", "trust_repo") if name in keywords]
            called = dotted(node.func)
            if called in ("compile", "input"):
                found.append(called)
            as_text = "shell" in keywords or (node.args and isinstance(node.args[0], ast.JoinedStr | ast.Constant))
            if called.startswith("subprocess.") and as_text:
                found.append(f"{called} of a text")
            formats = isinstance(node.func, ast.Attribute) and node.func.attr == "format"
            if formats and not isinstance(
                node.func.value, ast.Constant
            ):  # a stranger's text could ask for any attribute
                found.append(FORMAT)
            if isinstance(node.func, ast.Attribute) and node.func.attr in ("read_pickle", "to_pickle"):
                found.append(node.func.attr)
    return found


@pytest.mark.parametrize(
    "source",
    [
        "import pickle",
        "from pickle import loads",
        "import dill as d",
        "torch.load(p)",
        "torch.load(p, weights_only=True)",
        "np.load(p, allow_pickle=True)",
        "yaml.load(t, Loader=yaml.SafeLoader)",
        "from yaml import unsafe_load",
        "class L(yaml.CLoader): pass",
        "eval(x)",
        "f = exec",
        "os.system(c)",
        "subprocess.run(c, shell=True)",
        "subprocess.run(f'rm {x}')",
        "template.format(x)",
    ],
)
def test_law_finds_breaches(source: str) -> None:
    assert breaches(source)


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(ROOT)))
def test_nothing_is_unpickled_evaluated_or_put_into_a_shell(path: Path) -> None:
    ours = FORMAT if "benchmarks" in path.parts else ""  # a benchmark has no text but its own
    assert [breach for breach in breaches(path.read_text(encoding="utf-8")) if breach != ours] == []


# --- arbitrary changes -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "reader", [p for p in PARSERS if p.share == 1 or p.name == "recipe"], ids=lambda reader: reader.name
)
def test_any_change_is_read_or_refused_in_a_sentence(reader: Parser, tmp_path: Path) -> None:
    reader.prepare(tmp_path)

    @settings(max_examples=20, deadline=None, database=None, derandomize=True, suppress_health_check=list(HealthCheck))
    @given(changed(reader.seeds))
    def each(content: bytes) -> None:
        said = ""
        try:
            reader.read(tmp_path, content)
        except QloraError as error:
            said = str(error)
        assert len(said) <= LONGEST

    each()


@settings(max_examples=40, deadline=None, database=None, derandomize=True)
@given(st.recursive(st.none() | st.booleans() | st.integers() | st.floats() | st.text() | st.binary(), st.lists))
def test_what_is_shown_of_a_value_is_short_and_printable(value: object) -> None:
    assert len(shown(value)) < 800
    assert shown(value).isprintable()


@settings(max_examples=100, deadline=None, database=None, derandomize=True)
@given(st.binary(max_size=60) | st.text(alphabet='{}[]":,0123456789eE+-.aNI\\ud', max_size=60).map(str.encode))
def test_json_is_what_the_json_module_reads_or_a_fault(content: bytes) -> None:
    try:
        values = json_object(content)
    except Fault:
        return
    assert str(values) == str(json.loads(content))


@settings(max_examples=150, deadline=None, database=None, derandomize=True)
@given(st.text(alphabet="{}[]\"',:?-&*!|>#\n ab01<=.~%", max_size=40))
def test_yaml_is_what_pyyaml_reads_or_a_fault(text: str) -> None:
    try:
        values, _ = yaml_values(text)
    except Fault:
        return
    assert str(values) == str(yaml.safe_load(text))


def test_both_engines_find_nothing(tmp_path: Path) -> None:
    pytest.importorskip("atheris", reason="pip install -e '.[fuzz]' brings the fuzzer that is guided by coverage")
    if sys.platform == "win32":
        pytest.skip("needs fork")
    from benchmarks.survive import fuzz
    from benchmarks.survive.size import Size

    said: list[str] = []
    rows = fuzz.run(tmp_path, Size(small=True), said.append, only="adapter")  # of all: make survive
    assert len(rows) == len(said) == 4
    assert [row for row in rows if row["failures"]] == []
    assert all(row["inputs"] >= 10 for row in rows)
