"""Finding a checkpoint and reading it one tensor at a time; everything that is wrong with one is said in a sentence."""

from __future__ import annotations

import gc
import json
import sys
import types
import weakref
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from qlora.config import DEFAULT_MODEL
from qlora.errors import ModelError
from qlora.model.shards import HUB_FILES, INDEX, find_model, open_checkpoint

TENSORS = {
    "a.weight": torch.randn(3, 5),
    "b.weight": torch.randn(4, 7).bfloat16(),
    "c": torch.arange(6),
    "d": torch.tensor(2.5),
    "e": torch.empty(0, 4),
    "f": torch.randint(0, 255, (9, 1), dtype=torch.uint8),
}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """One file, all dtypes."""
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    save_file(TENSORS, tmp_path / "model.safetensors", {"format": "pt"})
    return tmp_path


@pytest.fixture
def sharded(tmp_path: Path) -> Path:
    """Two files and an index."""
    (tmp_path / "config.json").write_text("{}")
    names = sorted(TENSORS)
    where = {name: f"model-0000{1 + (name > 'b.weight')}-of-00002.safetensors" for name in names}
    for file in set(where.values()):
        save_file({name: TENSORS[name] for name in names if where[name] == file}, tmp_path / file)
    (tmp_path / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": where}))
    return tmp_path


@pytest.mark.parametrize("kind", ["folder", "sharded"])
def test_every_tensor_is_read_as_it_was_written(kind: str, request: pytest.FixtureRequest) -> None:
    checkpoint = open_checkpoint(request.getfixturevalue(kind))
    read = dict(checkpoint)
    assert read.keys() == TENSORS.keys()
    for name, tensor in TENSORS.items():
        assert read[name].dtype == tensor.dtype
        assert torch.equal(read[name], tensor), name
        entry = checkpoint.names()[name]
        assert (entry.dtype, entry.shape, entry.bytes) == (tensor.dtype, tuple(tensor.shape), tensor.nbytes)
        assert entry.file in checkpoint.shards
    assert len(checkpoint.shards) == (1 if kind == "folder" else 2)


def test_one_tensor_at_a_time(folder: Path) -> None:
    earlier: weakref.ref[Tensor] | None = None
    for _, tensor in open_checkpoint(folder):
        gc.collect()
        assert earlier is None or earlier() is None
        earlier = weakref.ref(tensor)
        del tensor


def test_a_tensor_has_memory_of_its_own(folder: Path) -> None:
    """A mapped file would change the tensor, or kill the process, when it is overwritten or cut off."""
    tensor = open_checkpoint(folder).read("a.weight")
    (folder / "model.safetensors").write_bytes(b"")
    assert torch.equal(tensor, TENSORS["a.weight"])


def _truncate(folder: Path) -> None:
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-1])


def _cut_header(folder: Path) -> None:
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:40])


def _empty(folder: Path) -> None:
    (folder / "model.safetensors").write_bytes(b"")


def _noise(folder: Path) -> None:
    (folder / "model.safetensors").write_bytes(b"\xff" * 400)


def _append(folder: Path) -> None:
    with (folder / "model.safetensors").open("ab") as file:
        file.write(b"x")


def _header(fields: object) -> Callable[[Path], None]:
    def write(folder: Path) -> None:
        text = json.dumps(fields).encode()
        (folder / "model.safetensors").write_bytes(len(text).to_bytes(8, "little") + text + bytes(32))

    return write


def _pickles(folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    (folder / "pytorch_model.bin").write_bytes(b"never opened")


def _no_weights(folder: Path) -> None:
    (folder / "model.safetensors").unlink()


def _adapter(folder: Path) -> None:
    (folder / "model.safetensors").rename(folder / "adapter_model.safetensors")


def _no_config(folder: Path) -> None:
    (folder / "config.json").unlink()


def _broken_config(folder: Path) -> None:
    (folder / "config.json").write_text('{"model_type": ')


def _several(folder: Path) -> None:
    for name in "ab":
        save_file(TENSORS, folder / f"{name}.safetensors")
    (folder / "model.safetensors").unlink()


F32 = {"dtype": "F32", "shape": [4], "data_offsets": [0, 16]}


@pytest.mark.parametrize(
    ("damage", "sentence"),
    [
        (_truncate, "truncated"),
        (_cut_header, "ends inside its header"),
        (_empty, "does not begin with a safetensors header"),
        (_noise, "does not begin with a safetensors header"),
        (_append, "too long"),
        (_header({"a": F32 | {"data_offsets": [0, 12]}}), "takes 12 bytes where its shape needs 16"),
        (_header({"a": F32, "b": F32}), "gap or overlap"),
        (_header({"a": F32 | {"dtype": "F4"}}), "dtype F4"),
        (_header({"a": {"dtype": "F32"}}), "damaged"),
        (_header(["a"]), "damaged"),
        (_pickles, r"pickled weights only \(pytorch_model.bin\).*save_pretrained"),
        (_no_weights, "has no weights"),
        (_adapter, "is an adapter"),
        (_no_config, "has no config.json"),
        (_broken_config, "not readable JSON"),
        (_several, "no model.safetensors.index.json"),
    ],
)
def test_damage_is_a_sentence(folder: Path, damage: Callable[[Path], None], sentence: str) -> None:
    damage(folder)
    with pytest.raises(ModelError, match=sentence):
        open_checkpoint(folder)


@pytest.mark.parametrize(
    ("index", "sentence"),
    [
        ({"weight_map": {"a": "../elsewhere.safetensors"}}, "outside of its folder: ../elsewhere"),
        ({"weight_map": {"a": "/etc/passwd"}}, "outside of its folder: /etc/passwd"),
        ({"weight_map": {"a": ".."}}, "outside|lacks"),
        ({"weight_map": {"a": "model-3.safetensors"}}, "lacks model-3.safetensors"),
        ({"weight_map": {"a": 3}}, "no 'weight_map'"),
        ({}, "no 'weight_map'"),
    ],
)
def test_index_is_not_trusted(sharded: Path, index: dict[str, object], sentence: str) -> None:
    (sharded / INDEX).write_text(json.dumps(index))
    with pytest.raises(ModelError, match=sentence):
        open_checkpoint(sharded)


def test_file_that_shrinks_while_it_is_read(folder: Path) -> None:
    checkpoint = open_checkpoint(folder)
    _truncate(folder)
    with pytest.raises(ModelError, match=r"became shorter"):
        dict(checkpoint)


def test_missing_folder(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="does not exist"):
        open_checkpoint(tmp_path / "nowhere")


def test_find_local_folder_and_default(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert find_model(str(folder)) == folder
    default = types.ModuleType("qlora.model.default")
    default.default_model_folder = lambda progress=False: folder / "default"  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "qlora.model.default", default)
    assert find_model(DEFAULT_MODEL) == folder / "default"


@pytest.mark.parametrize("name", ["/nowhere/at/all", "./nowhere", "~/nowhere-at-all", "models/a/b", "nowhere"])
def test_path_that_does_not_exist(name: str) -> None:
    with pytest.raises(ModelError, match=f"There is no model folder '{name}'"):
        find_model(name)


def test_name_close_to_the_default() -> None:
    with pytest.raises(ModelError, match=f"Did you mean '{DEFAULT_MODEL}'"):
        find_model("smollm2-135m-instuct")


def test_file_instead_of_folder(folder: Path) -> None:
    with pytest.raises(ModelError, match="is a file"):
        find_model(str(folder / "config.json"))


def test_hub_id_takes_safe_files_only(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: dict[str, object] = {}

    def snapshot_download(name: str, **options: object) -> str:
        asked.update(options, name=name)
        return str(folder)

    monkeypatch.setattr("huggingface_hub.snapshot_download", snapshot_download)
    assert find_model("org/name", "v1") == folder
    assert asked == {"name": "org/name", "revision": "v1", "allow_patterns": HUB_FILES}
    assert not any(pattern.endswith((".bin", ".pt", ".py")) for pattern in HUB_FILES)


@pytest.mark.parametrize(
    ("error", "sentence"),
    [
        ("RepositoryNotFoundError", "neither a local folder nor a public repository"),
        ("GatedRepoError", "terms"),
        ("RevisionNotFoundError", "no such revision"),
        ("LocalEntryNotFoundError", "cannot be reached"),
        ("OfflineModeIsEnabled", "cannot be reached"),
        ("HfHubHTTPError", "could not be downloaded"),
    ],
)
def test_hub_failures_are_sentences(error: str, sentence: str, monkeypatch: pytest.MonkeyPatch) -> None:
    import huggingface_hub.errors

    kind = getattr(huggingface_hub.errors, error)

    def snapshot_download(name: str, **options: object) -> str:
        raise kind.__new__(kind)

    monkeypatch.setattr("huggingface_hub.snapshot_download", snapshot_download)
    with pytest.raises(ModelError, match=f"'org/name' at revision 'v9'.*{sentence}"):
        find_model("org/name", "v9")
