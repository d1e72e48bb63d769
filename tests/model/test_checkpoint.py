"""Finding a checkpoint and reading it one tensor at a time; everything that is wrong with one is said in a sentence."""

from __future__ import annotations

import errno
import gc
import importlib
import importlib.util
import json
import shutil
import types
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from huggingface_hub.hf_api import BlobLfsInfo, RepoSibling
from huggingface_hub.utils import filter_repo_objects
from safetensors.torch import save_file
from torch import Tensor

from qlora.errors import DoesNotFitError, ModelError
from qlora.model.checkpoint import INDEX, Checkpoint, commit_of, open_checkpoint
from qlora.model.hub import HUB_FILES, find_model
from qlora.model.tokenizer import FILES
from qlora.recipe import DEFAULT_MODEL

http = importlib.import_module("httpx2" if importlib.util.find_spec("httpx2") else "httpx")
"""The hub's HTTP client: huggingface_hub 2 has the first, 1 the second."""

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


def every_tensor(checkpoint: Checkpoint) -> dict[str, Tensor]:
    return {name: checkpoint.read(name) for name in checkpoint.entries}


@pytest.mark.parametrize("kind", ["folder", "sharded"])
def test_every_tensor_is_read_as_it_was_written(kind: str, request: pytest.FixtureRequest) -> None:
    checkpoint = open_checkpoint(request.getfixturevalue(kind))
    read = every_tensor(checkpoint)
    assert read.keys() == TENSORS.keys()
    for name, tensor in TENSORS.items():
        assert read[name].dtype == tensor.dtype
        assert torch.equal(read[name], tensor), name
        entry = checkpoint.entries[name]
        assert (entry.dtype, entry.shape, entry.bytes) == (tensor.dtype, tuple(tensor.shape), tensor.nbytes)
        assert entry.file in checkpoint.shards
    assert len(checkpoint.shards) == (1 if kind == "folder" else 2)


def test_no_tensor_is_kept(folder: Path) -> None:
    checkpoint = open_checkpoint(folder)
    for name in checkpoint.entries:
        earlier = weakref.ref(checkpoint.read(name))
        gc.collect()
        assert earlier() is None


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
        (_header({"a": F32 | {"dtype": "F4"}}), "dtype 'F4'"),
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
        ({"weight_map": {"a": "../elsewhere.safetensors"}}, "outside of its folder: '../elsewhere"),
        ({"weight_map": {"a": "/etc/passwd"}}, "outside of its folder: '/etc/passwd'"),
        ({"weight_map": {"a": ".."}}, "no safetensors"),
        ({"weight_map": {"a": "model-3.safetensors"}}, "lacks 'model-3.safetensors'"),
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
        every_tensor(checkpoint)


def test_missing_folder(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="does not exist"):
        open_checkpoint(tmp_path / "nowhere")


def test_find_local_folder_and_default(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert find_model(str(folder)) == folder
    monkeypatch.setenv("QLORA_CACHE", str(folder))
    with pytest.raises(ModelError, match=r"run 'python -m qlora\.quickstart' once"):
        find_model(DEFAULT_MODEL)
    made = folder / "models" / DEFAULT_MODEL
    made.mkdir(parents=True)
    assert find_model(DEFAULT_MODEL) == made


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


COMMIT = "0123456789abcdef" * 2 + "01234567"
# What a repository may hold, and what a run takes of it: always, with the weights, and with leave to run code.
ALWAYS = [
    "config.json", "generation_config.json", INDEX, "tokenizer.json", "tokenizer_config.json", "tokenizer.model",
    "spiece.model", "tekken.json", "vocab.json", "vocab.txt", "merges.txt", "own.tiktoken", "chat_template.jinja",
    "additional_chat_templates/tool_use.jinja",
]  # fmt: skip
WEIGHTS = ["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"]
CODE = ["modeling_own.py"]
NEVER = [
    "consolidated.safetensors", "consolidated-00001-of-00002.safetensors", "vision/model.safetensors",
    "checkpoint-100/model-00001-of-00002.safetensors", "pytorch_model.bin", "original/consolidated.00.pth",
    "model-q4.gguf", "README.md", "training_args.bin",
]  # fmt: skip


class Hub:
    """Stands in for the hub's client: hands out a folder or an error, lists a repository, and counts."""

    def __init__(self, folder: Path) -> None:
        self.answer: Path | Exception = folder
        self.listed: Any = ConnectionError("no network in tests")
        self.downloads: list[dict[str, Any]] = []
        self.lists: list[dict[str, Any]] = []

    def snapshot_download(self, name: str, **options: Any) -> str:
        self.downloads.append({"name": name, **options})
        if isinstance(self.answer, Exception):
            raise self.answer
        return str(self.answer)

    def model_info(self, name: str, **options: Any) -> Any:
        self.lists.append({"name": name, **options})
        if isinstance(self.listed, Exception):
            raise self.listed
        return self.listed


@pytest.fixture
def hub(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Hub:
    stand_in = Hub(folder)
    monkeypatch.setattr("huggingface_hub.snapshot_download", stand_in.snapshot_download)
    monkeypatch.setattr("huggingface_hub.model_info", stand_in.model_info)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(folder / "hub"))
    return stand_in


@pytest.mark.parametrize("weights", [True, False])
@pytest.mark.parametrize("code", [True, False])
def test_hub_id_takes_what_a_run_reads(hub: Hub, folder: Path, weights: bool, code: bool) -> None:
    assert find_model("org/name", "v1", weights=weights, trust_remote_code=code) == folder
    (asked,) = hub.downloads
    assert (asked.pop("name"), asked.pop("revision")) == ("org/name", "v1")
    taken = set(filter_repo_objects([*ALWAYS, *WEIGHTS, *CODE, *NEVER], **asked))
    assert taken == {*ALWAYS, *(WEIGHTS if weights else []), *(CODE if code else [])}


def test_no_code_is_taken_unless_asked_for(hub: Hub) -> None:
    find_model("org/name")
    assert not any(pattern.endswith(".py") for pattern in hub.downloads[0]["allow_patterns"])


@pytest.mark.parametrize("pattern", FILES)
def test_every_kind_of_tokenizer_is_downloaded(pattern: str) -> None:
    assert list(filter_repo_objects([pattern.replace("*", "own")], allow_patterns=HUB_FILES))


@pytest.mark.parametrize(
    ("error", "sentence"),
    [
        ("RepositoryNotFoundError", "neither a local folder nor a public repository"),
        ("GatedRepoError", "terms"),
        ("RevisionNotFoundError", "no such revision"),
        ("LocalEntryNotFoundError", "cannot be reached"),
        ("IncompleteSnapshotError", "not wholly in the local cache"),
        ("OfflineModeIsEnabled", "cannot be reached"),
        ("HfHubHTTPError", "could not be downloaded: HfHubHTTPError; try again"),
    ],
)
def test_hub_failures_are_sentences(error: str, sentence: str, hub: Hub) -> None:
    import huggingface_hub.errors

    kind = getattr(huggingface_hub.errors, error)
    hub.answer = kind.__new__(kind)
    with pytest.raises(ModelError, match=f"'org/name' at revision 'v9'.*{sentence}"):
        find_model("org/name", "v9")


@pytest.mark.parametrize(
    ("error", "reason"),
    [
        (http.RemoteProtocolError("peer closed connection.\nFor more, see …"), "peer closed connection;"),
        (http.ReadTimeout("The read operation timed out"), "The read operation timed out;"),
        (http.ReadError(""), "ReadError;"),
        (RuntimeError("Data processing error: CAS service error"), "Data processing error: CAS service error;"),
        (OSError(errno.EACCES, "Permission denied"), r"\[Errno 13\] Permission denied;"),
    ],
    ids=lambda item: type(item).__name__,
)
def test_download_that_breaks_off_is_a_sentence(error: Exception, reason: str, hub: Hub) -> None:
    """Most exceptions of the hub's HTTP client are no OSError."""
    hub.answer = error
    with pytest.raises(ModelError, match=f"^The model 'org/name' could not be downloaded: {reason} try again"):
        find_model("org/name")


@pytest.mark.parametrize(
    "error",
    [
        *(OSError(number, "full") for number in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)),
        RuntimeError("I/O error: No space left on device (os error 28)"),
    ],
    ids=str,
)
def test_full_disk_is_no_mistake_of_the_recipe(error: Exception, hub: Hub) -> None:
    hub.answer = error
    with pytest.raises(type(error)) as caught:
        find_model("org/name")
    assert caught.value is error


@pytest.fixture
def repository(hub: Hub) -> int:
    """A repository with two files of weights, one of them in the cache already; what is left to download, in bytes."""
    kept = Path(hub.answer if isinstance(hub.answer, Path) else "") / "hub" / "models--org--name"
    files = [
        *(RepoSibling(name, 10, name) for name in ALWAYS),
        *(RepoSibling(name, 5000, "pointer", BlobLfsInfo(5000, f"sha-{name}", 100)) for name in WEIGHTS),
        *(RepoSibling(name, 10**9, name) for name in NEVER),
    ]
    (kept / "blobs").mkdir(parents=True)
    (kept / "blobs" / f"sha-{WEIGHTS[0]}").touch()  # of an earlier commit
    (kept / "snapshots" / COMMIT).mkdir(parents=True)
    (kept / "snapshots" / COMMIT / "config.json").touch()  # where there are no symbolic links
    hub.listed = types.SimpleNamespace(sha=COMMIT, siblings=files)
    return 5000 + 10 * (len(ALWAYS) - 1)


@pytest.mark.parametrize("short", [1, 0], ids=["short-of-a-byte", "enough"])
def test_room_is_asked_for_before_a_download(
    hub: Hub, repository: int, short: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda place: types.SimpleNamespace(free=repository - short))
    if short:
        with pytest.raises(DoesNotFitError, match=r"The model 'org/name' needs 5\.0 KiB under '.*hub'"):
            find_model("org/name", "v1")
    else:
        find_model("org/name", "v1")
    assert len(hub.downloads) == 1 - short
    assert hub.lists == [{"name": "org/name", "revision": "v1", "files_metadata": True, "timeout": 10}]


def test_room_is_not_asked_for_without_weights_or_sizes(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda place: types.SimpleNamespace(free=0))
    find_model("org/name", weights=False)
    assert hub.lists == []
    find_model("org/name")  # the list raises: the hub is not reached
    hub.listed = types.SimpleNamespace(sha=None, siblings=None)
    find_model("org/name")
    assert len(hub.downloads) == 3


def _other_config(folder: Path) -> None:
    (folder / "config.json").write_text('{"model_type": "llama" }')


def _other_vocabulary(folder: Path) -> None:
    (folder / "tokenizer.json").write_text("{}")


def _cast(folder: Path) -> None:
    save_file(TENSORS | {"a.weight": TENSORS["a.weight"].double()}, folder / "model.safetensors", {"format": "pt"})


def _reshape(folder: Path) -> None:
    tensors = TENSORS | {"a.weight": TENSORS["a.weight"].T.contiguous()}  # the size of the file stays
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})


def _rename(folder: Path) -> None:
    (folder / "model.safetensors").rename(folder / "weights.safetensors")


def _other_numbers(folder: Path) -> None:
    save_file(TENSORS | {"a.weight": TENSORS["a.weight"] + 1}, folder / "model.safetensors", {"format": "pt"})


def _other_files(folder: Path) -> None:
    (folder / "README.md").write_text("news")
    save_file({"x": torch.zeros(1)}, folder / "adapter_model.safetensors")


@pytest.mark.parametrize(
    ("act", "noticed"),
    [
        (_other_config, True),
        (_other_vocabulary, True),
        (_cast, True),
        (_reshape, True),
        (_append, True),
        (_rename, True),
        (_other_numbers, True),
        (_other_files, False),
    ],
)
def test_fingerprint_notices_what_it_says(folder: Path, act: Callable[[Path], None], noticed: bool) -> None:
    before = Checkpoint(folder, "").fingerprint
    assert (len(before), Checkpoint(folder, "").fingerprint) == (64, before)
    act(folder)
    assert (Checkpoint(folder, "").fingerprint != before) == noticed


def test_fingerprint_does_not_know_where_the_folder_is(sharded: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    copy = shutil.copytree(sharded, tmp_path_factory.mktemp("copy") / "model")
    assert Checkpoint(copy, "").fingerprint == Checkpoint(sharded, "").fingerprint
    last = sorted(copy.glob("*.safetensors"))[-1]
    save_file({name: tensor for name, tensor in TENSORS.items() if name > "b.weight"}, last, {"format": "pt"})
    assert Checkpoint(copy, "").fingerprint != Checkpoint(sharded, "").fingerprint


@pytest.mark.parametrize(("damage", "sentence"), [(_no_config, "has no config"), (_no_weights, "has no weights")])
def test_fingerprint_of_no_checkpoint(folder: Path, damage: Callable[[Path], None], sentence: str) -> None:
    damage(folder)
    with pytest.raises(ModelError, match=sentence):
        Checkpoint(folder, "").fingerprint  # noqa: B018


def test_commit_of_a_snapshot(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    snapshot = tmp_path / "models--org--name" / "snapshots" / COMMIT
    snapshot.mkdir(parents=True)
    (tmp_path / "link").symlink_to(snapshot)
    assert commit_of(snapshot) == commit_of(tmp_path / "link") == COMMIT
    monkeypatch.chdir(snapshot)
    assert commit_of(Path()) == COMMIT
    assert commit_of(snapshot.with_name("main")) is None
    assert commit_of(snapshot.with_name(f"{COMMIT}0")) is None
    assert commit_of(tmp_path / COMMIT) is None
