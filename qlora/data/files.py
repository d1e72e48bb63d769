"""The files that data was read from: have they changed since?

Knows their bytes; must not know what is in them.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from qlora.errors import DataError
from qlora.files.durable import expanded, sha256_of


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


def _stamp(path: Path) -> tuple[int, int]:
    found = path.stat()
    return found.st_size, found.st_mtime_ns
