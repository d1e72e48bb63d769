"""The file cache: what is in it, when it is made again, and what every fault of a disk gives: a sentence, and no rubbish."""

from __future__ import annotations

import errno
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from qlora.errors import DoesNotFitError, ModelError, QloraError
from qlora.model.base import Base
from qlora.model.checkpoint import Checkpoint
from qlora.recipe import MemorySection, ModelSection
from qlora.residence import cache
from qlora.residence.cache import FILE, INDEX, cache_folder_of, cache_key
from qlora.residence.load import load_base
from qlora.residence.placement import Placement
from tests.tiny import logits_of, tiny_checkpoint

CPU = torch.device("cpu")
LAYERS = 3


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_checkpoint(tmp_path_factory.mktemp("base"), num_hidden_layers=LAYERS)


@pytest.fixture(scope="module")
def expected(folder: Path) -> torch.Tensor:
    return logits_of(load_base(ModelSection(name=str(folder)), CPU).model)


def streamed(folder: Path, place: Path, progress: bool = True, **section: Any) -> Base:
    memory = MemorySection(layers="streamed", tier="disk", cache=str(place))
    return load_base(ModelSection(name=str(folder), **section), CPU, progress, memory)


def caches(place: Path) -> list[Path]:
    return sorted(path for path in place.iterdir() if path.is_dir())


def rest(place: Path) -> list[str]:
    """What lies there beside caches and their locks."""
    return [path.name for path in place.iterdir() if path.name.startswith(".") or path.suffix not in ("", ".lock")]


class Says:
    """What was said on standard error since the last look."""

    def __init__(self, capsys: pytest.CaptureFixture[str]) -> None:
        self.capsys = capsys

    def written(self) -> bool:
        return "Writing the file cache" in self.look()

    def look(self) -> str:
        return self.capsys.readouterr().err


@pytest.fixture
def says(capsys: pytest.CaptureFixture[str]) -> Says:
    return Says(capsys)


# --- when it is used ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["plain", "with spaces and Ümläute 模型", "a/b/c", "link"])
def test_it_is_written_once_and_then_only_read(
    folder: Path, tmp_path: Path, expected: torch.Tensor, says: Says, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    place = tmp_path / name
    if name == "link":
        (tmp_path / "elsewhere").mkdir()
        place.symlink_to(tmp_path / "elsewhere")
    assert torch.equal(logits_of(streamed(folder, place).model), expected)
    assert says.written()
    (made,) = caches(place)
    assert {path.name for path in made.iterdir()} == {FILE, INDEX}
    read: list[str] = []
    original = Checkpoint.read
    monkeypatch.setattr(Checkpoint, "read", lambda self, key: (read.append(key), original(self, key))[1])
    assert torch.equal(logits_of(streamed(folder, place).model), expected)
    assert not says.written()
    assert read
    assert not any("_proj" in key for key in read)
    assert not rest(place)


def test_left_out_it_lies_in_the_cache_folder(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("QLORA_CACHE", str(tmp_path / "cache"))
    assert cache_folder_of(MemorySection()) == tmp_path / "cache/nf4"
    load_base(ModelSection(name=str(folder)), CPU, memory=MemorySection(layers=1, tier="disk"))
    assert len(caches(tmp_path / "cache/nf4")) == 1
    monkeypatch.setenv("HOME", str(tmp_path))
    load_base(ModelSection(name=str(folder)), CPU, memory=MemorySection(layers=1, tier="disk", cache="~/mine"))
    assert len(caches(tmp_path / "mine")) == 1


def test_one_serves_every_arrangement_and_no_other_model_or_setting(
    folder: Path, tmp_path: Path, expected: torch.Tensor, says: Says
) -> None:
    place = tmp_path / "cache"
    for layers in ("streamed", 1, 2):
        memory = MemorySection(layers=layers, tier="disk", slots=3, cache=str(place))  # type: ignore[arg-type]
        base = load_base(ModelSection(name=str(folder)), CPU, memory=memory)
        assert torch.equal(logits_of(base.model), expected)
        assert len(caches(place)) == 1
    for count, section in enumerate(
        [{"double_quant": False}, {"quantization": "int8"}, {"quantization": "fp4"}, {"compute_dtype": "bf16"}], start=2
    ):
        found = logits_of(streamed(folder, place, **section).model)
        assert torch.equal(found, logits_of(load_base(ModelSection(name=str(folder), **section), CPU).model))  # type: ignore[arg-type]
        assert len(caches(place)) == count


def test_weights_that_changed_a_little_make_another_one(folder: Path, tmp_path: Path, says: Says) -> None:
    """Also between the samples that a fingerprint reads."""
    model, place = Path(shutil.copytree(folder, tmp_path / "model")), tmp_path / "cache"
    before = logits_of(streamed(model, place).model)
    weights = model / "model.safetensors"
    (key,) = (path.name for path in caches(place))
    content, mark = bytearray(weights.read_bytes()), Checkpoint(model, "").fingerprint
    header = int.from_bytes(content[:8], "little")
    entry = json.loads(content[8 : 8 + header])["model.layers.1.mlp.up_proj.weight"]["data_offsets"][0]
    for offset in range(8 + header + entry, len(content), 4):
        changed = content.copy()
        changed[offset : offset + 4] = b"\x00\x00\x80\x40"  # 4.0
        weights.write_bytes(changed)
        if Checkpoint(model, "").fingerprint == mark:
            break
    os.utime(weights, ns=(10**18, 10**18))
    after = logits_of(streamed(model, place).model)
    assert not torch.equal(before, after)
    assert torch.equal(after, logits_of(load_base(ModelSection(name=str(model)), CPU).model))
    assert key in {path.name for path in caches(place)}
    assert len(caches(place)) == 2


def test_files_of_the_hub_are_known_by_their_hash(folder: Path, tmp_path: Path, says: Says) -> None:
    """Fetched again they have another time, and the same cache."""
    model, place = Path(shutil.copytree(folder, tmp_path / "model")), tmp_path / "cache"
    blob = tmp_path / ("ab" * 32)
    (model / "model.safetensors").rename(blob)
    (model / "model.safetensors").symlink_to(blob)
    streamed(model, place)
    os.utime(blob, ns=(10**18, 10**18))
    streamed(model, place)
    assert len(caches(place)) == 1


def test_the_key_covers_every_fact() -> None:
    facts = {"base": "x", "dtype": "fp32"}
    keys = {cache_key(**facts), cache_key(**{**facts, "base": "y"}), cache_key(**facts, device="cuda")}
    assert len(keys) == 3
    assert cache_key(**facts) == cache_key(**dict(reversed(facts.items())))


# --- damage ------------------------------------------------------------------------------------------------------------


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) * 3 // 4] ^= 1
    path.write_bytes(content)


def edit(path: Path, change: Any) -> None:
    index = json.loads(path.read_text())
    change(index)
    path.write_text(json.dumps(index))


def other_shapes(index: dict[str, Any]) -> None:
    index["layout"][0][0][2] = [1, 1]
    del index["own_crc32"]
    index["own_crc32"] = cache._own_checksum(index)


DAMAGES: dict[str, tuple[Any, str]] = {
    "a flipped bit": (lambda made: flip(made / FILE), "the checksum of layer 2 is wrong"),
    "truncated": (lambda made: os.truncate(made / FILE, 1000), f"{FILE} has another size"),
    "empty": (lambda made: (made / FILE).write_bytes(b""), f"{FILE} has another size"),
    "longer": (lambda made: os.truncate(made / FILE, 10**6), f"{FILE} has another size"),
    "no weights": (lambda made: (made / FILE).unlink(), "it lacks a file"),
    "no index": (lambda made: (made / INDEX).unlink(), "FileNotFoundError"),
    "index of garbage": (lambda made: (made / INDEX).write_bytes(b"\x80{{{"), "UnicodeDecodeError"),
    "index cut": (lambda made: os.truncate(made / INDEX, 100), "JSONDecodeError"),
    "index of something else": (lambda made: (made / INDEX).write_text("[1, 2]"), "TypeError"),
    "index nested without end": (lambda made: (made / INDEX).write_text("[" * 100_000), "RecursionError"),
    "index with another packing": (
        lambda made: edit(made / INDEX, lambda index: index["packing"][0][0].update(quant_type="fp4")),
        f"the checksum of {INDEX} is wrong",
    ),
    "other shapes": (lambda made: edit(made / INDEX, other_shapes), "it is of other shapes"),
}


@pytest.mark.parametrize("kind", DAMAGES)
@pytest.mark.sampled
def test_damage_is_noticed_said_and_mended(
    folder: Path, tmp_path: Path, expected: torch.Tensor, says: Says, kind: str
) -> None:
    place = tmp_path / "cache"
    streamed(folder, place)
    (made,) = caches(place)
    whole = (made / FILE).read_bytes()
    act, why = DAMAGES[kind]
    act(made)
    says.look()
    base = streamed(folder, place)
    said = says.look()
    assert f"The file cache '{made}' is damaged ({why}" in said
    assert "Writing the file cache" in said
    assert torch.equal(logits_of(base.model), expected)
    assert (made / FILE).read_bytes() == whole
    streamed(folder, place)
    assert not says.written()
    assert not rest(place)


def test_deleted_while_in_use_it_works_on(folder: Path, tmp_path: Path, expected: torch.Tensor) -> None:
    base = streamed(folder, tmp_path / "cache")
    shutil.rmtree(tmp_path / "cache")
    assert torch.equal(logits_of(base.model), expected)


def test_shortened_while_in_use_it_is_a_sentence(folder: Path, tmp_path: Path) -> None:
    base = streamed(folder, tmp_path / "cache")
    (made,) = caches(tmp_path / "cache")
    os.truncate(made / FILE, 10)
    with pytest.raises(ModelError, match=rf"'{made / FILE}' became shorter while it was read; delete '{made}'"):
        logits_of(base.model)


def test_a_disk_that_fails_while_in_use_is_a_sentence(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    base = streamed(folder, tmp_path / "cache")

    def fail(*_: Any) -> int:
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(cache.os, "preadv", fail)
    with pytest.raises(ModelError, match=r"cannot be read \(\[Errno 5\] Input/output error\); delete '"):
        logits_of(base.model)


# --- a folder that refuses ---------------------------------------------------------------------------------------------


def test_a_cache_that_names_a_file_is_refused(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("mine")
    for place in (tmp_path / "file", tmp_path / "file/below"):
        with pytest.raises(ModelError, match=rf"cannot be kept in '{place}' .*name another folder by memory\.cache"):
            streamed(folder, place)
    assert (tmp_path / "file").read_text() == "mine"


FAULTS = ["posix_fallocate", "pwrite", "fsync", "pwrite without a word"]


@pytest.mark.parametrize("call", FAULTS)
def test_a_full_disk_is_a_sentence_and_leaves_nothing(
    folder: Path, tmp_path: Path, expected: torch.Tensor, monkeypatch: pytest.MonkeyPatch, call: str
) -> None:
    place = tmp_path / "cache"
    streamed(folder, place, double_quant=False)
    (older,) = caches(place)
    calls, files = 0, len(os.listdir("/proc/self/fd")) if Path("/proc/self/fd").is_dir() else 0
    original = getattr(os, call.split()[0])

    def full(*arguments: Any) -> Any:
        nonlocal calls
        calls += 1
        if call == "pwrite" and calls < 20:
            return original(*arguments)
        raise OSError(errno.EIO if call.endswith("word") else errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch:
        patch.setattr(cache.os, call.split()[0], full)
        kind: type[QloraError] = ModelError if call.endswith("word") else DoesNotFitError
        with pytest.raises(kind, match=rf"cannot be kept in '{place}' .*memory\.cache"):
            streamed(folder, place)
    assert caches(place) == [older]
    assert not rest(place)
    if files:
        assert len(os.listdir("/proc/self/fd")) <= files + 1
    assert torch.equal(logits_of(streamed(folder, place).model), expected)


def test_too_little_room_is_known_before_anything_is_written(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("shutil.disk_usage", lambda _: SimpleNamespace(free=1000))
    with pytest.raises(DoesNotFitError, match=r"file cache of the quantised layers needs .* but 1000 B are free"):
        streamed(folder, tmp_path / "cache")
    assert not caches(tmp_path / "cache")


def test_no_room_for_what_one_process_changed(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    base = streamed(folder, tmp_path / "cache")
    before = (caches(tmp_path / "cache")[0] / FILE).read_bytes()

    def full(*_: Any) -> int:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    linear: Any = base.model.get_submodule("model.layers.0.mlp.up_proj")
    with monkeypatch.context() as patch:
        patch.setattr(cache.os, "pwrite", full)
        with pytest.raises(DoesNotFitError, match=r"cannot be kept in .*make room on its disk"):
            linear.place(torch.randn(linear.out_features, linear.in_features), CPU)
    assert (caches(tmp_path / "cache")[0] / FILE).read_bytes() == before
    assert not rest(tmp_path / "cache")


# --- real processes ----------------------------------------------------------------------------------------------------

# Imports once, then forks the processes of each order, all at the same time; prints a line for each: how it ended.
DRIVER = """
import json, os, resource, signal, sys, time
import torch
torch.set_num_threads(1)
from qlora.recipe import MemorySection, ModelSection
from qlora.errors import QloraError
from qlora.residence import cache, load
from qlora.residence.load import load_base

def kill(after):
    write, calls = os.pwrite, 0
    def pwrite(*arguments):
        nonlocal calls
        calls += 1
        if calls == after:
            os.kill(os.getpid(), signal.SIGKILL)
        return write(*arguments)
    os.pwrite = pwrite

def small(bytes):
    resource.setrlimit(resource.RLIMIT_FSIZE, (bytes, resource.RLIM_INFINITY))

def stranger(_):
    before = load.open_cache
    def open_cache(folder, *arguments):
        if os.geteuid() == 0:
            os.seteuid(65534)
        return before(folder, *arguments)
    load.open_cache = open_cache

def slow(seconds):
    make = cache._make
    def slowly(*arguments):
        time.sleep(seconds)
        make(*arguments)
    cache._make = slowly

def together(moment):
    time.sleep(max(0, moment - time.time()))
    slow(0.5)

for order in json.loads(sys.argv[1]):
    children = []
    for number, (model, place, act, value) in enumerate(order):
        child = os.fork()
        if not child:
            out = os.open(place + "." + str(number) + ".err", os.O_WRONLY | os.O_CREAT)
            os.dup2(out, 2)
            try:
                globals()[act](time.time() + 0.3 if act == "together" else value)
                memory = MemorySection(layers="streamed", tier="disk", cache=place)
                base = load_base(ModelSection(name=model), torch.device("cpu"), True, memory)
                with torch.no_grad():
                    print("logits", base.model(torch.arange(3, 13)[None]).logits.sum().item().hex(), file=sys.stderr)
                status = 0
            except QloraError as error:
                print(type(error).__name__, error, file=sys.stderr)
                status = error.exit_status
            sys.stderr.flush()
            os._exit(status)
        children.append(child)
    print(*(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children), flush=True)
"""


@pytest.fixture(scope="module")
def processes(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[Path, list[int], list[str]]]:
    """By what happened: the cache's folder, how the processes ended, what each said."""
    orders: dict[str, list[tuple[str, Any]]] = {
        "killed": [("kill", 40)],
        "small files only": [("small", 20_000)],
        "not writable": [("stranger", None)],
        "two at once": [("together", None), ("together", None)],
    }
    places = {name: tmp_path_factory.mktemp("cache") / "nf4" for name in orders}
    places["not writable"].mkdir()
    places["not writable"].chmod(0o555)
    streamed(folder, places["small files only"], double_quant=False)
    values = [[(str(folder), str(places[name]), *act) for act in acts] for name, acts in orders.items()]
    done = subprocess.run(
        [sys.executable, "-c", DRIVER, json.dumps(values)],
        capture_output=True,
        text=True,
        check=True,
        timeout=200,
        cwd=Path(__file__).parents[2],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    found = {}
    for (name, acts), line in zip(orders.items(), done.stdout.splitlines(), strict=True):
        texts = [Path(f"{places[name]}.{number}.err").read_text() for number in range(len(acts))]
        found[name] = (places[name], [int(status) for status in line.split()], texts)
    return found


@pytest.mark.slow
def test_killed_while_it_was_written_it_is_made_by_the_next(
    processes: dict[str, Any], folder: Path, expected: torch.Tensor, says: Says
) -> None:
    place, statuses, _ = processes["killed"]
    assert statuses == [-9]
    assert not [path for path in caches(place) if not path.name.startswith(".")]
    (left,) = (path for path in caches(place) if path.name.startswith("."))
    assert (left / FILE).stat().st_size > 10_000
    assert torch.equal(logits_of(streamed(folder, place).model), expected)
    assert says.written()
    assert not rest(place)


@pytest.mark.slow
def test_a_system_that_limits_files(processes: dict[str, Any]) -> None:
    place, statuses, (text,) = processes["small files only"]
    assert statuses == [3]
    assert "DoesNotFitError The file cache cannot be kept in" in text
    assert "make room on its disk" in text
    assert len(caches(place)) == 1  # the one that was there
    assert not rest(place)


@pytest.mark.slow
def test_a_folder_of_someone_else(processes: dict[str, Any]) -> None:
    place, statuses, (text,) = processes["not writable"]
    assert statuses == [2]
    assert f"ModelError The file cache cannot be kept in '{place}' ([Errno 13] Permission denied" in text
    assert "make it writable, or name another folder by memory.cache." in text


@pytest.mark.slow
def test_two_processes_at_once_write_it_once(processes: dict[str, Any]) -> None:
    place, statuses, texts = processes["two at once"]
    assert statuses == [0, 0]
    assert sum("Writing the file cache" in text for text in texts) == 1
    assert sum("Another run makes or checks this file cache" in text for text in texts) == 1
    (values,) = {text.split("logits ")[1] for text in texts}
    assert values
    assert len(caches(place)) == 1


def test_the_images_in_the_file_are_those_in_host_memory(folder: Path, tmp_path: Path) -> None:
    file = streamed(folder, tmp_path / "cache").placement
    host = load_base(ModelSection(name=str(folder)), CPU, memory=MemorySection(layers="streamed")).placement
    assert isinstance(file, Placement)
    assert isinstance(host, Placement)
    for layer, image in file.images.items():
        sizes = [piece.bytes for piece in image.pieces]
        found, expected = (torch.zeros(image.bytes, dtype=torch.uint8) for _ in range(2))
        file.home.read(layer, found)
        host.home.read(layer, expected)
        for piece in image.pieces:
            part = slice(piece.start, piece.start + piece.bytes)
            assert torch.equal(found[part], expected[part])
        assert sum(sizes) > 0
