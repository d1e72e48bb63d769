"""The disk: what is free on it and where downloads are kept; bytes and seconds as text.

Knows the operating system; must not know torch, which takes seconds to import: see ``runs/first.py``.
"""

from __future__ import annotations

import os
import shutil
from pathlib import Path

from qlora.errors import DoesNotFitError
from qlora.files.durable import expanded

GIB = 1024**3


def bytes_text(count: float) -> str:
    """Bytes for people, in binary units: ``1.25 GiB``, ``12.0 MiB``, ``512 B``."""
    if count >= GIB:
        return f"{count / GIB:.2f} GiB"
    if count >= 1024**2:
        return f"{count / 1024**2:.1f} MiB"
    return f"{count / 1024:.1f} KiB" if count >= 1024 else f"{int(count)} B"


def duration_text(seconds: float) -> str:
    """``7 ms``, ``4.3 s``, ``42 s``, ``6 min 12 s``, ``3 h 05 min``."""
    if 0 < seconds < 0.095:
        return f"{max(1, round(1000 * seconds))} ms"
    if seconds < 10:
        return f"{seconds:.1f} s"
    if round(seconds) < 60:
        return f"{round(seconds)} s"
    if round(seconds) < 3600:
        return f"{round(seconds) // 60} min {round(seconds) % 60:02d} s"
    minutes = round(seconds / 60)
    return f"{minutes // 60} h {minutes % 60:02d} min"


def require_disk(folder: Path, needed: int, what: str) -> None:
    """Raise DoesNotFitError when the disk under ``folder`` has less than ``needed`` bytes free for ``what``."""
    free = free_disk(folder)
    if free < needed:
        raise DoesNotFitError(
            f"{what} needs {bytes_text(needed)} under '{folder}', but {bytes_text(free)} are free; free some or choose another folder."
        )


def free_disk(folder: Path) -> int:
    """Bytes free on the disk that ``folder`` is on, or will be once it is made."""
    place = folder.absolute()
    while not place.exists():
        place = place.parent
    return shutil.disk_usage(place).free


def cache_folder() -> Path:
    """Where downloads are kept: ``$QLORA_CACHE``, else ``qlora`` in the user's cache folder."""
    if place := os.environ.get("QLORA_CACHE"):
        return expanded(place)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache").expanduser() / "qlora"
