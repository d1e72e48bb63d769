"""The NF4 file cache: the frozen linears of every layer, quantised once from a checkpoint, on disk.

    <folder>/<key>/layers.bin     the images of all layers, one behind the other (image.py)
                   index.json     where each begins, its checksum, and how each linear is packed; and its own checksum

The key covers the base's fingerprint, how it is quantised, in which dtype and on what kind of device, so two runs of one
model share a cache and another model, or a changed one, never meets it. It is written aside under a lock, flushed, and
renamed: a folder that has its name is whole, and what a killed run left is removed by the next. Every image is read and
compared with its checksum whenever a cache is opened; one that is damaged is made again.

Knows files and images; must not know a checkpoint's names, devices' streams or what is trained.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import zlib
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import torch
from filelock import FileLock, Timeout
from torch import nn

from qlora.errors import ModelError, QloraError, first_line
from qlora.files.durable import expanded, sync
from qlora.files.strangers import json_values
from qlora.machine.disk import bytes_text, cache_folder, require_disk
from qlora.model.nf4 import Linear4bit
from qlora.recipe import MemorySection
from qlora.residence.homes import FileHome, unwritable
from qlora.residence.image import Image

FILE, INDEX = "layers.bin", "index.json"
VERSION = 1  # of this format
CHECKERS = 4  # how many layers are checked at once
PACKING = ("quant_type", "double_quant", "block")
"""What a 4-bit linear knows of its packing beside its tensors."""


def cache_key(**facts: object) -> str:
    """A name for a cache of these ``facts``, plain values that decide its bytes."""
    text = json.dumps({"version": VERSION, **facts}, sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:32]


def cache_folder_of(memory: MemorySection) -> Path:
    """Where file caches are kept, and what else waits on the disk: the recipe's folder, or ``nf4`` in qlora's own."""
    return expanded(memory.cache) if memory.cache else cache_folder() / "nf4"


def open_cache(
    folder: Path,
    key: str,
    images: Sequence[Image],
    device: torch.device,
    make: Callable[[FileHome], None],
    say: Callable[[str], None],
) -> FileHome:
    """The cache ``key`` in ``folder``; where there is no whole one, ``make`` writes every image into a new one first.

    Two processes wait for each other. Raises ModelError for a folder that cannot be written or read, DoesNotFitError for
    a full disk; what is half-written never has a name that is used.
    """
    place = folder / key
    total = sum(image.bytes for image in images)
    try:
        if place.is_dir() and not os.access(folder, os.W_OK):  # others keep it for us: there is nothing to lock
            home, why = _opened(place, images, device)
            if home is not None:
                return home
            raise ModelError(
                f"The file cache '{place}' is damaged ({why}) and cannot be made again, because '{folder}' cannot be "
                "written; make it writable, or name another folder by memory.cache."
            )
        folder.mkdir(parents=True, exist_ok=True)
        with _locked(folder / f"{key}.lock", say):
            for stale in folder.glob(f".{key}.*"):  # what a killed run left
                shutil.rmtree(stale, ignore_errors=True)
            if place.is_dir():
                home, why = _opened(place, images, device)
                if home is not None:
                    return home
                say(f"The file cache '{place}' is damaged ({why}); making it again.")
                shutil.rmtree(place)
            require_disk(folder, total, "The file cache of the quantised layers")
            say(f"Writing the file cache of the quantised layers once: {bytes_text(total)} in '{place}' …")
            _make(place, images, device, make)
            return FileHome(place / FILE, [image.bytes for image in images], device)
    except QloraError:
        raise
    except OSError as error:
        raise unwritable(folder, error) from error


def _opened(place: Path, images: Sequence[Image], device: torch.device) -> tuple[FileHome | None, str | None]:
    """(the cache in ``place``, None), or (None, what is wrong with it, in a few words). Raises OSError."""
    if not (place / FILE).is_file():
        return None, "it lacks a file"
    home = FileHome(place / FILE, [image.bytes for image in images], device)
    if (why := _damage(place, home, images)) is None:
        return home, None
    home.close()
    return None, why


@contextmanager
def _locked(path: Path, say: Callable[[str], None]) -> Iterator[None]:
    """Inside, no other process makes or checks this cache. The system frees the lock of one that dies."""
    lock = FileLock(path)
    try:
        lock.acquire(timeout=0)
    except Timeout:
        say(f"Another run makes or checks this file cache; waiting for it ('{path}') …")
        lock.acquire()
    try:
        yield
    finally:
        lock.release()


def _make(
    place: Path,
    images: Sequence[Image],
    device: torch.device,
    make: Callable[[FileHome], None],
) -> None:
    """Write a cache aside and rename it. Runs under the lock."""
    aside = place.with_name(f".{place.name}.writing")
    aside.mkdir()
    try:
        home = FileHome(aside / FILE, [image.bytes for image in images], device, new=True)
        try:
            make(home)
            os.fsync(home.file)
            checksums = [home.checksum(layer) for layer in range(len(images))]
        finally:
            home.close()
        index = {
            "version": VERSION,
            "layout": [_layout(image) for image in images],
            "packing": [[_packing(linear) for linear in image.linears] for image in images],
            "crc32": checksums,
        }
        with (aside / INDEX).open("w", encoding="utf-8") as file:
            json.dump({**index, "own_crc32": _own_checksum(index)}, file)
            file.flush()
            os.fsync(file.fileno())
        aside.rename(place)
        sync(place.parent)
    except BaseException:
        shutil.rmtree(aside, ignore_errors=True)
        raise


def _damage(place: Path, home: FileHome, images: Sequence[Image]) -> str | None:
    """What is wrong with a cache, in a few words, or None; where nothing is, the linears know how they are packed."""
    try:
        index = json_values((place / INDEX).read_text(encoding="utf-8"))
        if index.pop("own_crc32") != _own_checksum(index):
            return f"the checksum of {INDEX} is wrong"
        layout, packing, checksums = index["layout"], index["packing"], index["crc32"]
        if layout != [_layout(image) for image in images]:
            return "it is of other shapes"
        if os.fstat(home.file).st_size != home.starts[-1]:
            return f"{FILE} has another size"
        with ThreadPoolExecutor(CHECKERS) as pool:  # zlib and the disk leave the interpreter free
            found = list(pool.map(home.checksum, range(len(images))))
        if wrong := [layer for layer, value in enumerate(found) if value != checksums[layer]]:
            return f"the checksum of layer {wrong[0]} is wrong"
        for image, layer in zip(images, packing, strict=True):
            for linear, values in zip(image.linears, layer, strict=True):
                vars(linear).update({name: values[name] for name in PACKING if name in values})
    except (OSError, ValueError, KeyError, IndexError, TypeError, AttributeError, RecursionError, ModelError) as error:
        return f"{type(error).__name__}: {first_line(error)}"
    return None


def _own_checksum(index: dict[str, object]) -> int:
    return zlib.crc32(json.dumps(index, sort_keys=True).encode())


def _layout(image: Image) -> list[list[object]]:
    """The shapes of an image as plain values."""
    return [[p.name, str(p.dtype).removeprefix("torch."), list(p.shape), p.start] for p in image.pieces]


def _packing(linear: nn.Module) -> dict[str, object]:
    return {name: getattr(linear, name) for name in PACKING} if isinstance(linear, Linear4bit) else {}
