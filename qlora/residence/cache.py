"""The NF4 file cache: the frozen linears of every layer, quantised once from a checkpoint, on disk.

    <folder>/<key>/layers.bin     the images of all layers, one behind the other (placement.py)
                   index.json     where each begins, its checksum, and how each linear is packed; and its own checksum

The key covers the base's fingerprint, how it is quantised, in which dtype and on what kind of device, so two runs of one
model share a cache and another model, or a changed one, never meets it. It is written aside under a lock, flushed, and
renamed: a folder that has its name is whole, and what a killed run left is removed by the next. Every image is read and
compared with its checksum whenever a cache is opened; one that is damaged is made again.

Knows files and images; must not know a checkpoint's names, devices' streams or what is trained.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import os
import shutil
import tempfile
import threading
import weakref
import zlib
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from filelock import FileLock, Timeout
from torch import Tensor

from qlora.errors import DoesNotFitError, ModelError, QloraError, disk_is_full, first_line
from qlora.files.durable import expanded, sync
from qlora.machine.device import bytes_text, cache_folder, host_bytes, require_disk
from qlora.model.nf4 import Linear4bit
from qlora.recipe import MemorySection
from qlora.residence.placement import Image

FILE, INDEX = "layers.bin", "index.json"
VERSION = 1  # of this format
PIECE = 64 * 1024**2  # bytes read at once
CHECKED, CHECKERS = 4 * 1024**2, 4  # bytes that one checker holds, and how many check at once
PACKING = ("quant_type", "double_quant", "block")
"""What a 4-bit linear knows of its packing beside its tensors."""


@dataclass(frozen=True)
class Extent:
    """Where a layer's image lies in the file."""

    start: int
    bytes: int


def cache_key(**facts: Any) -> str:
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
    place, extents = folder / key, _extents(images)
    total = extents[-1].start + extents[-1].bytes
    try:
        if place.is_dir() and not os.access(folder, os.W_OK):  # others keep it for us: there is nothing to lock
            home, why = _opened(place, extents, images, device)
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
                home, why = _opened(place, extents, images, device)
                if home is not None:
                    return home
                say(f"The file cache '{place}' is damaged ({why}); making it again.")
                shutil.rmtree(place)
            require_disk(folder, total, "The file cache of the quantised layers")
            say(f"Writing the file cache of the quantised layers once: {bytes_text(total)} in '{place}' …")
            _make(place, extents, images, device, make)
            return FileHome(place / FILE, extents, device)
    except QloraError:
        raise
    except OSError as error:
        raise unwritable(folder, error) from error


def _opened(
    place: Path, extents: Sequence[Extent], images: Sequence[Image], device: torch.device
) -> tuple[FileHome | None, str | None]:
    """(the cache in ``place``, None), or (None, what is wrong with it, in a few words). Raises OSError."""
    if not (place / FILE).is_file():
        return None, "it lacks a file"
    home = FileHome(place / FILE, extents, device)
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
    extents: Sequence[Extent],
    images: Sequence[Image],
    device: torch.device,
    make: Callable[[FileHome], None],
) -> None:
    """Write a cache aside and rename it. Runs under the lock."""
    aside = place.with_name(f".{place.name}.writing")
    aside.mkdir()
    try:
        home = FileHome(aside / FILE, extents, device, new=True)
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
        index = json.loads((place / INDEX).read_text(encoding="utf-8"))
        if index.pop("own_crc32") != _own_checksum(index):
            return f"the checksum of {INDEX} is wrong"
        layout, packing, checksums = index["layout"], index["packing"], index["crc32"]
        if layout != [_layout(image) for image in images]:
            return "it is of other shapes"
        if os.fstat(home.file).st_size != home.extents[-1].start + home.extents[-1].bytes:
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


def _own_checksum(index: dict[str, Any]) -> int:
    return zlib.crc32(json.dumps(index, sort_keys=True).encode())


def _extents(images: Sequence[Image]) -> list[Extent]:
    starts = [0, *itertools.accumulate(image.bytes for image in images)]
    return [Extent(start, image.bytes) for start, image in zip(starts, images, strict=False)]


def _layout(image: Image) -> list[list[Any]]:
    """The shapes of an image as plain values."""
    return [[p.name, str(p.dtype).removeprefix("torch."), list(p.shape), p.start] for p in image.pieces]


def _packing(linear: Any) -> dict[str, Any]:
    return {name: getattr(linear, name) for name in PACKING} if isinstance(linear, Linear4bit) else {}


def _write(file: int, data: memoryview, offset: int) -> None:
    done = 0
    while done < len(data):
        done += os.pwrite(file, data[done : done + PIECE], offset + done)


def unwritable(folder: Path, error: OSError) -> QloraError:
    """What to raise where the cache's folder refuses."""
    full = disk_is_full(error)
    advice = "make room on its disk" if full else "make it writable"
    kind = DoesNotFitError if full else ModelError
    return kind(
        f"The file cache cannot be kept in '{folder}' ({error}); {advice}, or name another folder by memory.cache."
    )


class FileHome:
    """The images of layers in a file.

    What ``write`` changes after the cache was made (PiSSA, LoftQ) lies in a file without a name beside it, which is gone
    with this process: the cache is shared. The files are closed with this object.
    """

    def __init__(self, path: Path, extents: Sequence[Extent], device: torch.device, new: bool = False) -> None:
        self.path, self.extents, self.device, self.new = path, extents, device, new
        self.file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL if new else os.O_RDONLY, 0o644)
        self.closing: list[Any] = [weakref.finalize(self, os.close, self.file)]
        self.changed: dict[int, int] = {}
        """Where in the private file the layers lie that were changed."""
        self.private: Any = None
        self.staging: list[tuple[Tensor, Any]] = []
        self.turn = threading.Lock()  # a single linear may be fetched while the next layer is on its way
        if new:
            try:
                total = extents[-1].start + extents[-1].bytes
                if hasattr(os, "posix_fallocate"):  # a full disk is found out now
                    os.posix_fallocate(self.file, 0, total)
                else:
                    os.truncate(self.file, total)
            except OSError:
                self.close()
                raise

    def read(self, layer: int, memory: Tensor, start: int = 0) -> None:
        """Copy the layer's bytes from ``start`` on into ``memory``. Raises ModelError when the file cannot be read."""
        if memory.is_cpu:
            self._read(layer, memory, start)
            return
        with self.turn:  # disk → locked host memory → GPU: two of these, so that the disk does not wait for the copy
            if len(self.staging) < 2:
                staging = host_bytes(max(extent.bytes for extent in self.extents), self.device)
            else:
                staging, copied = self.staging.pop(0)
                copied.synchronize()
            part = staging[: len(memory)]
            self._read(layer, part, start)
            memory.copy_(part, non_blocking=True)
            self.staging.append((staging, torch.cuda.current_stream(self.device).record_event()))

    def _read(self, layer: int, memory: Tensor, start: int) -> None:
        file, offset = self.file, self.extents[layer].start + start
        if layer in self.changed:
            file, offset = self.private.fileno(), self.changed[layer] + start
        into = memory.numpy().data
        done = 0
        try:
            while done < len(into):
                count = os.preadv(file, [into[done : done + PIECE]], offset + done)
                if not count:
                    raise ModelError(
                        f"The file cache '{self.path}' became shorter while it was read; delete '{self.path.parent}'."
                    )
                done += count
        except OSError as error:
            raise ModelError(
                f"The file cache '{self.path}' cannot be read ({error}); delete '{self.path.parent}', and it is made again."
            ) from None

    def write(self, layer: int, start: int, values: Tensor) -> None:
        """Replace bytes of a layer: in the cache while it is made, else in this process's own copy of the layer."""
        data = values.cpu().numpy().data
        file, offset = self.file, self.extents[layer].start
        if not self.new:
            self._own(layer)
            file, offset = self.private.fileno(), self.changed[layer]
        try:
            _write(file, data, offset + start)
        except OSError as error:
            raise unwritable(self.path.parent.parent, error) from error

    def _own(self, layer: int) -> None:
        """Give the layer a place in the private file."""
        if layer in self.changed:
            return
        extent = self.extents[layer]
        place = sum(self.extents[other].bytes for other in self.changed)
        memory = torch.empty(min(PIECE, extent.bytes), dtype=torch.uint8)
        try:
            if self.private is None:
                self.private = tempfile.TemporaryFile(dir=self.path.parent.parent)  # noqa: SIM115 (as long as this object)
                self.closing.append(weakref.finalize(self, self.private.close))
            for start in range(0, extent.bytes, PIECE):
                part = memory[: min(PIECE, extent.bytes - start)]
                self._read(layer, part, start)
                _write(self.private.fileno(), part.numpy().data, place + start)
        except OSError as error:
            raise unwritable(self.path.parent.parent, error) from error
        self.changed[layer] = place

    def checksum(self, layer: int) -> int:
        """CRC-32 of the layer's image as it lies on the disk."""
        value, extent = 0, self.extents[layer]
        memory = torch.empty(min(CHECKED, extent.bytes), dtype=torch.uint8)
        for start in range(0, extent.bytes, CHECKED):
            part = memory[: min(CHECKED, extent.bytes - start)]
            self._read(layer, part, start)
            value = zlib.crc32(part.numpy().data, value)
        return value

    def close(self) -> None:
        """Close the files, if they are not closed yet."""
        for close in self.closing:
            close()
