"""Where the images of layers wait while they are not on the device: host memory, or a file.

Knows bytes, memory and files; must not know what an image holds.
"""

from __future__ import annotations

import itertools
import os
import tempfile
import threading
import weakref
import zlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import IO, Protocol

import torch
from torch import Tensor

from qlora.errors import DoesNotFitError, ModelError, QloraError, disk_is_full
from qlora.machine.device import host_bytes, shared_bytes
from qlora.machine.processes import here

PIECE = 64 * 1024**2  # bytes read at once
CHECKED = 4 * 1024**2  # bytes that a checksum reads at once


class Home(Protocol):
    """Where the images of layers wait."""

    def read(self, layer: int, memory: Tensor, start: int = 0) -> None:
        """Copy the layer's bytes from ``start`` on into ``memory``, uint8 on any device, as many as it holds."""

    def write(self, layer: int, start: int, values: Tensor) -> None:
        """Replace the layer's bytes from ``start`` on by those of ``values``, uint8 on any device."""

    def close(self) -> None:
        """Give back what it holds; nothing is read any more."""


class HostHome:
    """Images in host memory, pinned where ``device`` is a GPU."""

    def __init__(self, sizes: dict[int, int], device: torch.device) -> None:
        self.images = {layer: host_bytes(size, device) for layer, size in sizes.items()}

    def read(self, layer: int, memory: Tensor, start: int = 0) -> None:
        image = self.images[layer]
        memory.copy_(image[start : start + len(memory)], non_blocking=True)

    def write(self, layer: int, start: int, values: Tensor) -> None:
        self.images[layer][start : start + len(values)].copy_(values)

    def close(self) -> None:
        self.images.clear()


class SharedHostHome(HostHome):
    """Images in host memory that the processes of a machine share, pinned where ``device`` is a GPU.

    Each of them writes all of it, and one's bytes are kept, until all have called ``share``. What is written afterwards (PiSSA,
    LoftQ) is the writer's own.
    """

    def __init__(self, sizes: dict[int, int], device: torch.device) -> None:
        self.device, self.shared, self.own = device, False, set[int]()
        whole = shared_bytes(sum(sizes.values()), device)
        self.images = dict(zip(sizes, whole.split(list(sizes.values())), strict=True))

    def write(self, layer: int, start: int, values: Tensor) -> None:
        if self.shared and layer not in self.own:
            own = host_bytes(len(self.images[layer]), self.device)
            self.images[layer] = own.copy_(self.images[layer])
            self.own.add(layer)
        if self.shared or here().local_rank == 0:
            self.images[layer][start : start + len(values)].copy_(values)

    def share(self) -> None:
        """From here on every process reads what is whole."""
        here().barrier()
        self.shared = True


class FileHome:
    """Images in a file, one behind the other: the file cache of ``cache.py``, which other runs may read too.

    What ``write`` changes after the cache was made (PiSSA, LoftQ) lies in a file of this process without a name. The files
    are closed with this object.
    """

    def __init__(self, path: Path, sizes: Sequence[int], device: torch.device, new: bool = False) -> None:
        self.path, self.sizes, self.device, self.new = path, sizes, device, new
        self.starts = [0, *itertools.accumulate(sizes)]
        """Where each layer's image begins in the file, and where the last one ends."""
        self.file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL if new else os.O_RDONLY, 0o644)
        self._closing = weakref.finalize(self, os.close, self.file)
        self._own: IO[bytes] | None = None
        self._changed: set[int] = set()
        """Layers whose bytes are those of this process's own file, at the same place as in the cache."""
        self._staging: list[tuple[Tensor, torch.cuda.Event]] = []
        self._turn = threading.Lock()  # a single linear may be fetched while the next layer is on its way
        if new:
            try:
                if hasattr(os, "posix_fallocate"):  # a full disk is found out now
                    os.posix_fallocate(self.file, 0, self.starts[-1])
                else:
                    os.truncate(self.file, self.starts[-1])
            except OSError:
                self.close()
                raise

    def read(self, layer: int, memory: Tensor, start: int = 0) -> None:
        """Copy the layer's bytes from ``start`` on into ``memory``. Raises ModelError when the file cannot be read."""
        if memory.is_cpu:
            self._read(layer, memory, start)
            return
        with self._turn:  # disk → locked host memory → GPU: two of these, so that the disk does not wait for the copy
            if len(self._staging) < 2:
                staging = host_bytes(max(self.sizes), self.device)
            else:
                staging, copied = self._staging.pop(0)
                copied.synchronize()
            part = staging[: len(memory)]
            self._read(layer, part, start)
            memory.copy_(part, non_blocking=True)
            self._staging.append((staging, torch.cuda.current_stream(self.device).record_event()))

    def _read(self, layer: int, memory: Tensor, start: int) -> None:
        file = self._own.fileno() if self._own is not None and layer in self._changed else self.file
        into, offset, done = memory.numpy().data, self.starts[layer] + start, 0
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
        """Replace bytes of a layer: in the cache while it is made, else in this process's own file."""
        try:
            file = self.file if self.new else self._file_of_ours(layer)
            _write(file, values.cpu().numpy().data, self.starts[layer] + start)
        except OSError as error:
            raise unwritable(self.path.parent.parent, error) from error

    def _file_of_ours(self, layer: int) -> int:
        """This process's own file, with the layer in it: as long as the cache, with holes where layers are unchanged."""
        if self._own is None:
            self._own = tempfile.TemporaryFile(dir=self.path.parent.parent)  # noqa: SIM115 (as long as this object)
            weakref.finalize(self, self._own.close)
        if layer not in self._changed:
            for at, part in self._parts(layer, PIECE):
                _write(self._own.fileno(), part.numpy().data, at)
            self._changed.add(layer)
        return self._own.fileno()

    def _parts(self, layer: int, size: int) -> Iterator[tuple[int, Tensor]]:
        """(place in the file, bytes) of the layer's image, at most ``size`` at a time, in memory that is used again."""
        whole = self.sizes[layer]
        memory = torch.empty(min(size, whole), dtype=torch.uint8)
        for start in range(0, whole, size):
            part = memory[: min(size, whole - start)]
            self._read(layer, part, start)
            yield self.starts[layer] + start, part

    def checksum(self, layer: int) -> int:
        """CRC-32 of the layer's image as it lies on the disk."""
        value = 0
        for _, part in self._parts(layer, CHECKED):
            value = zlib.crc32(part.numpy().data, value)
        return value

    def close(self) -> None:
        """Close the files, if they are not closed yet."""
        self._closing()
        if self._own is not None:
            self._own.close()


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
