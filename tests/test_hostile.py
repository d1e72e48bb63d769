"""Files from strangers: whatever they hold, the answer is one sentence, soon, and nothing is run, written or unpickled."""

from __future__ import annotations

import ast
import json
import pickle
import struct
import time
import tracemalloc
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings

from qlora.errors import DoesNotFitError, MethodError, ModelError, QloraError, RecipeError
from qlora.files.strangers import MAX_JSON, Fault
from qlora.machine.cards import parse_memory
from qlora.methods import files
from qlora.methods.files import read_adapter_tensors, read_method_state, recorded_base
from qlora.methods.peft_config import read_adapter_config
from qlora.model import tensor_file, tokenizer
from qlora.model.checkpoint import (
    INDEX,
    MAX_INDEX,
    MAX_SHARDS,
    Checkpoint,
    open_checkpoint,
    read_model_config,
)
from qlora.model.hub import find_model
from qlora.model.tensor_file import MAX_HEADER
from tests.hostile.changes import changed
from tests.hostile.parsers import LLAMA, LONGEST, LORA, PARSERS, Parser, tensor, tensors_bytes

ROOT = Path(__file__).parents[1]
SOON = 10.0  # seconds of a core, on a slow one


def fingerprint(folder: Path) -> str:
    return Checkpoint(folder, "").fingerprint


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
    "very many files": (
        {str(number): f"{number}.safetensors" for number in range(MAX_SHARDS + 1)},
        "names 10,001 files",
    ),
    "very many tensors": (
        {f"model.layers.{number}.weight": "a.safetensors" for number in range(10**5)},
        "lacks 'a.safetensors'",
    ),
}
INDEX_FILES: dict[str, tuple[object, str]] = {
    **{name: ({"weight_map": weight_map}, said) for name, (weight_map, said) in INDEXES.items()},
    "a key twice": (b'{"weight_map": {"a": "a.safetensors"}, "weight_map": {"a": "../a.safetensors"}}', "has the key 'weight_map' twice"),
    "too large": (b" " * (MAX_INDEX + 1), "bytes; expected at most"),
}  # fmt: skip


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
    "targets of a megabyte": ({**LORA, "target_modules": "x" * 10**6}, "whose names would say what that is"),
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


FILES: dict[str, tuple[dict[str, tuple[object, str]], type[QloraError], tuple[Callable[[Path], object], ...]]] = {
    "model.safetensors": (HEADERS, ModelError, (open_checkpoint,)),
    files.WEIGHTS: (HEADERS, MethodError, (read_adapter_tensors, recorded_base)),
    files.METHOD_STATE: (HEADERS, MethodError, (read_method_state,)),
    INDEX: (INDEX_FILES, ModelError, (open_checkpoint, fingerprint)),
    "config.json": (CONFIGS, ModelError, (read_model_config, open_checkpoint, fingerprint)),
    files.CONFIG: (ADAPTER_CONFIGS, MethodError, (read_adapter_config,)),
}


@pytest.mark.parametrize(("file", "name"), [(file, name) for file in FILES for name in FILES[file][0]])
def test_file_is_refused(file: str, name: str, tmp_path: Path) -> None:
    table, kind, readers = FILES[file]
    content, said = table[name]
    folder = tmp_path / "model"
    folder.mkdir()
    (tmp_path / "secret.safetensors").write_bytes(tensors_bytes({"a": tensor(0)}))
    (folder / "pytorch_model.bin").write_bytes(b"\x80")
    (folder / "config.json").write_text("{}")
    if table is HEADERS:
        content = tensors_bytes(content, size=36)
    (folder / file).write_bytes(content if isinstance(content, bytes) else json.dumps(content).encode())
    for read in readers:
        began = time.process_time()
        with pytest.raises(kind, match=said) as caught:
            read(folder)
        assert time.process_time() - began < SOON
        assert len(str(caught.value)) < 3000
        assert str(caught.value).isprintable()
        assert table is not HEADERS or "damaged" in str(caught.value)


# --- words of the command line ----------------------------------------------------------------------------------------


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


# --- pickles -------------------------------------------------------------------------------------------------------


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
