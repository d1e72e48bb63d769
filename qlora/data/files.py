"""The files that data is read from: their bytes, unpacked, and have they changed since?

Knows bytes; must not know what is in them.
"""

from __future__ import annotations

import hashlib
import os
import shlex
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from qlora.errors import DataError
from qlora.files.durable import expanded, sha256_of

_PACKED = {".gz": ("gzip", "gzip"), ".bz2": ("bz2", "bzip2"), ".zst": ("zstd", "zstd")}
"""How a packed file ends: what pyarrow, which comes with `datasets`, calls it, and the program that unpacks it by hand."""
MAX_UNPACKED = 256 * 1024**2  # bytes that any packed file may hold
MAX_RATIO = 100  # and a larger one, for each of its own; JSON lines unpack to 5 to 30 times their size
_CHUNK = 1024**2
_POINTER = b"version https://git-lfs.github.com/spec/"
_MAGIC = {".gz": b"\x1f\x8b", ".bz2": b"BZh", ".zst": b"(\xb5/\xfd", ".parquet": b"PAR1"}
"""The bytes that a file of such a name begins with; a Parquet file ends with them too."""


def unpacker(path: Path) -> str | None:
    """The program that unpacks a file of this name, or None for one that is not packed."""
    found = _PACKED.get(path.suffix.lower())
    return found[1] if found else None


def ending(path: Path) -> str:
    """``.jsonl``, of ``train.jsonl`` and of ``train.jsonl.gz``."""
    return Path(path.stem if unpacker(path) else path.name).suffix.lower()


def content(path: Path, name: str) -> bytes:
    """The file's bytes, unpacked. Raises DataError, also for a packed file that would grow beyond any text."""
    require_whole(path, name)
    try:
        if (program := unpacker(path)) is None:
            return path.read_bytes()
        most = max(MAX_UNPACKED, MAX_RATIO * path.stat().st_size)
    except OSError as error:
        raise DataError(f"'{name}' cannot be read: {error.strerror}.") from None
    import pyarrow as pa

    by_hand = f"{program} -dk {shlex.quote(str(path))}"
    packing = _PACKED[path.suffix.lower()][0]
    if not pa.Codec.is_available(packing):
        raise DataError(f"The installed pyarrow cannot unpack '{name}'; unpack it: {by_hand}")
    chunks, size = [], 0
    try:
        with pa.input_stream(str(path), compression=packing) as stream:
            while chunk := stream.read(_CHUNK):
                chunks.append(chunk)
                size += len(chunk)
                if size > most:  # a megabyte of zeros packs into a few bytes
                    raise DataError(
                        f"'{name}' unpacks to more than {most:,} bytes; expected at most {MAX_RATIO} times its own. If "
                        f"that is right, unpack it: {by_hand}"
                    )
    except OSError as error:
        raise DataError(f"'{name}' cannot be unpacked ({error}); is it whole, and what its name says?") from None
    return b"".join(chunks)


def require_whole(path: Path, name: str) -> None:
    """Raise DataError for what is no ordinary file, cannot be opened, stands in place of a file that git-lfs has not fetched, or
    does not begin (or, as Parquet, end) as its name says; nothing more of it is read."""
    if not path.is_file():  # a pipe would be waited for, a device never ends
        raise DataError(f"'{name}' is no ordinary file; expected a data file.")
    try:
        with path.open("rb") as file:
            begin = file.read(len(_POINTER))
            file.seek(-min(4, path.stat().st_size), os.SEEK_END)
            end = file.read()
    except OSError as error:
        raise DataError(f"'{name}' cannot be read: {error.strerror}.") from None
    if begin == _POINTER:
        folder = shlex.quote(str(path.parent))
        raise DataError(
            f"'{name}' is a Git-LFS pointer, which says where the data is and does not hold it; fetch it: "
            f"git -C {folder} lfs pull --include {shlex.quote('**/' + path.name)}"
        )
    kind = path.suffix.lower()
    magic = _MAGIC.get(kind, b"")
    if not begin.startswith(magic) or (kind == ".parquet" and end != magic):
        where = "begin" if not begin.startswith(magic) else "end"
        raise DataError(f"'{name}' does not {where} as a {kind} file does; is it whole, and what its name says?")


@dataclass(frozen=True)
class DataFile:
    """A data file as it was when it was read. ``name`` is what the recipe calls it."""

    name: str
    path: Path
    sha256: str
    stamp: tuple[int, int]
    """Its size in bytes, and when it was changed, in nanoseconds."""

    @classmethod
    def look(cls, name: str) -> DataFile | None:
        """The file called ``name``, or None where there is none: a hub data set. Raises DataError when it cannot be read."""
        path = expanded(name)
        if not path.is_file():
            return None
        try:
            stamp = _stamp(path)
            return cls(name, path.absolute(), sha256_of(path), stamp)
        except OSError as error:
            raise DataError(f"'{name}' cannot be read: {error.strerror}.") from None

    def change(self) -> str | None:
        """What happened to the file since, in a few words, or None. One that was only written again is unchanged."""
        try:
            if _stamp(self.path) == self.stamp or sha256_of(self.path) == self.sha256:
                return None
        except OSError:
            return "is gone or cannot be read"
        return "has other content"


@dataclass(frozen=True)
class DataFolder:
    """A folder or a pattern, as it was when its files were read: their names. Each of them is a DataFile besides."""

    name: str
    sha256: str
    """Over its files' names."""
    find: Callable[[], Sequence[str]]
    """Looks for its files."""

    @classmethod
    def look(cls, name: str, find: Callable[[], Sequence[str]]) -> DataFolder:
        """The folder or pattern called ``name``, whose files ``find`` finds, also later and from another working directory."""
        return cls(name, _sha256_of_names(find()), find)

    def change(self) -> str | None:
        """What happened to it since, in a few words, or None. What happened to its files is theirs to say."""
        try:
            return None if _sha256_of_names(self.find()) == self.sha256 else "has other files"
        except (DataError, OSError):
            return "has other files"


def _sha256_of_names(files: Sequence[str]) -> str:
    return hashlib.sha256("\n".join(Path(file).name for file in files).encode("utf-8", "surrogateescape")).hexdigest()


def _stamp(path: Path) -> tuple[int, int]:
    found = path.stat()
    return found.st_size, found.st_mtime_ns
