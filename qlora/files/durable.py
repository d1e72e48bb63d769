"""Files that are whole or absent, whatever happens to the process that writes them.

    written aside ► flushed to the disk ► renamed      a file, a folder, an object as JSON
    renamed ► deleted                                  a folder
    sealed: checksums.json beside a folder's files     truncated files and flipped bits are noticed when they are read

A rename is the only thing that a file system does at once. Knows files; must not know what is in them.
"""

from __future__ import annotations

import glob
import hashlib
import json
import math
import os
import re
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from qlora.errors import RunError, disk_is_full
from qlora.files.strangers import Fault, JsonObject, read_object

SEAL = "checksums.json"
MADE_OF = ".made-of"  # in a folder that is written aside
_LEFT = re.compile(r"\.(.*)\.(writing|old|gone)-(\d+)", re.DOTALL)
"""What ``_beside`` calls a file or a folder: its name, what it is for, and the process that writes it."""
_ASIDE: set[Path] = set()
"""What this process writes aside now. A number alone does not tell: in a container the next process may have the same."""


@contextmanager
def folder_written_aside(folder: str | Path, overwrite: bool = False, made_of: str | None = None) -> Iterator[Path]:
    """Yield an empty folder beside ``folder`` to write into; when the block ends well it is flushed and takes its place.

    When the block fails, what was written is deleted and ``folder`` is as it was. ``made_of`` names all that decides what is
    written: then it is not empty where a process that was killed wrote the same, but has its files that were ``file_written_aside``
    there. Where ``folder`` is a link, that is what it points to. Raises RunError when it holds something already and ``overwrite`` is off.
    """
    folder = _followed(Path(folder))
    require_new(folder, overwrite)
    aside, old = _beside(folder, "writing"), _beside(folder, "old")
    _ASIDE.update((aside, old))
    try:
        shutil.rmtree(aside, ignore_errors=True)
        _take_over(aside, folder.absolute().name, made_of)
        clear_leftovers(aside.parent, folder.absolute().name)
        aside.mkdir(parents=True, exist_ok=True)
        if made_of is not None:
            (aside / MADE_OF).write_text(made_of, encoding="utf-8")
        yield aside
        (aside / MADE_OF).unlink(missing_ok=True)
        for path in sorted(aside.rglob("*")):
            follow_umask(path)
            sync(path)
        sync(aside)
        if folder.exists():
            folder.rename(old)
        aside.rename(folder)
    except BaseException:
        shutil.rmtree(aside, ignore_errors=True)
        if old.exists() and not folder.exists():
            old.rename(folder)
        raise
    finally:
        _ASIDE.difference_update((aside, old))
    sync(folder.absolute().parent)
    shutil.rmtree(old, ignore_errors=True)


def _take_over(aside: Path, name: str, made_of: str | None) -> None:
    """Give ``aside`` what a process that is gone wrote aside for ``name``, if it was the same."""
    for left in aside.parent.glob(f".{glob.escape(name)}.writing-*"):
        parts = _LEFT.fullmatch(left.name)
        try:
            same = (left / MADE_OF).read_text(encoding="utf-8") == made_of
        except (OSError, ValueError):
            continue
        if same and parts and not _lives(left, int(parts[3])):
            left.rename(aside)
            clear_leftovers(aside)
            return


def require_new(folder: Path, overwrite: bool = False) -> None:
    """Raise RunError when ``folder`` is a file, or holds something already and ``overwrite`` is off."""
    if folder.is_file():
        raise RunError(f"'{folder}' is a file; expected the name of a new folder.")
    if folder.is_dir() and any(folder.iterdir()) and not overwrite:
        raise RunError(
            f"'{folder}' is there already and not empty; choose another folder, delete it, or overwrite it (overwrite=true)."
        )


def keep_apart(out: Path, *sources: Path, replaces: str | None = None) -> None:
    """Raise RunError when ``out`` is, or holds, a folder that is being read: overwriting must never delete that.

    ``replaces``: the file without which what is at ``out`` is no such thing as is going to take its place.
    """
    for source in sources:
        if source.resolve() == out.resolve() or out.resolve() in source.resolve().parents:
            raise RunError(f"'{out}' holds '{source}', which is being read; choose another folder for the result.")
    if replaces and out.is_dir() and any(out.iterdir()) and not any(out.glob(replaces)):
        raise RunError(f"'{out}' holds no {replaces}, so it is not overwritten; choose another folder.")


def require_writable(folder: Path, advice: str) -> None:
    """Raise RunError, with ``advice``, when nothing can be written into ``folder``, or it cannot be made. Leaves nothing behind."""
    place = folder.absolute()
    while not place.exists() and place != place.parent:
        place = place.parent
    try:
        with tempfile.TemporaryDirectory(
            prefix=".qlora-", dir=place
        ):  # rights do not tell: read-only mounts, quotas, root
            pass
    except OSError as error:
        if disk_is_full(error):
            raise
        raise RunError(f"Nothing can be written in '{folder}' ({error.strerror}: '{place}'); {advice}.") from None


def expanded(name: str | Path) -> Path:
    """A path as people write it: ``~`` is the home, where there is one. Unlike pathlib's own this never raises."""
    return Path(os.path.expanduser(name))


def from_here(name: str | Path) -> str:
    """What there is to say of a path that leads nowhere: a sentence for a relative one, nothing for another."""
    return "" if expanded(name).is_absolute() else f" Relative paths start at the working directory, '{Path.cwd()}'."


def delete_folder(folder: Path) -> None:
    """Delete a folder under another name: a kill leaves none that looks whole and is not. Raises OSError."""
    gone = _beside(folder, "gone")
    shutil.rmtree(gone, ignore_errors=True)
    folder.rename(gone)
    shutil.rmtree(gone)


def _followed(path: Path) -> Path:
    """What a link points to, which may be on another disk and may not be there yet; any other path as it is."""
    return path.resolve() if path.is_symlink() else path


def _beside(path: Path, kind: str) -> Path:
    """``runs/demo/adapter`` → ``/…/runs/demo/.adapter.writing-4711``."""
    return path.absolute().with_name(f".{path.absolute().name}.{kind}-{os.getpid()}")


def clear_leftovers(parent: str | Path, name: str = "*") -> None:
    """Delete what a process that was killed left in ``parent`` of the file or folder ``name``, or of any.

    An old folder that was moved out of the way, and has no successor, is put back. Living writers are left alone.
    """
    for path in Path(parent).glob(f".{name if name == '*' else glob.escape(name)}.*-*"):
        parts = _LEFT.fullmatch(path.name)
        if parts is None or _lives(path, int(parts[3])):
            continue
        if parts[2] == "old" and not path.with_name(parts[1]).exists():
            path.rename(path.with_name(parts[1]))
        elif path.is_dir():
            shutil.rmtree(path, ignore_errors=True)
        else:
            with suppress(OSError):
                path.unlink()


def is_leftover(name: str) -> bool:
    """Whether a file or folder of this name is written, or was written until its process was killed."""
    return _LEFT.fullmatch(name) is not None


def _lives(path: Path, process: int) -> bool:
    """Whether the process by that number, which writes ``path`` aside, is there."""
    if process == os.getpid():
        return path.absolute() in _ASIDE
    if os.name == "nt":  # signal 0 is Ctrl-C there
        return True
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except (OverflowError, PermissionError):
        pass
    return True


@contextmanager
def file_written_aside(path: Path) -> Iterator[Path]:
    """Yield the name of a file beside ``path``, or beside what it links to, to write; when the block ends well it is flushed and takes
    its place."""
    path = _followed(path)
    aside = _beside(path, "writing")
    _ASIDE.add(aside)
    try:
        yield aside
        follow_umask(aside)
        sync(aside)
        aside.replace(path)
    finally:
        aside.unlink(missing_ok=True)
        _ASIDE.discard(aside)


def follow_umask(path: Path) -> None:
    """Give a file the mode of any new one: 0644 with umask 022. (safetensors writes through a private one of mode 0600.)"""
    if path.is_file():
        mask = os.umask(0o077)  # there is no other way to ask; what another thread makes meanwhile is private
        os.umask(mask)
        path.chmod(0o666 & ~mask)


def write_text(path: Path, text: str) -> None:
    """Write a text in UTF-8, whole or not at all. Raises OSError."""
    with file_written_aside(path) as aside:
        aside.write_text(text, encoding="utf-8")


def write_json(path: Path, values: JsonObject) -> None:
    """Write an object as JSON, whole or not at all. Raises OSError."""
    write_text(path, json.dumps(_finite(values), indent=2, ensure_ascii=False) + "\n")


def _finite(value: object) -> object:
    """JSON knows no infinity: a perplexity too large for a float becomes null."""
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    return [_finite(item) for item in value] if isinstance(value, list | tuple) else value


def seal(folder: Path) -> None:
    """Write ``checksums.json`` into a folder, of its files. Raises OSError."""
    (folder / SEAL).write_text(json.dumps(checksums(folder), indent=2) + "\n", encoding="utf-8")


def damage(folder: Path) -> str | None:
    """What tells a folder from the one that was sealed, in a few words, or None."""
    try:
        return difference(folder, read_object(folder / SEAL), SEAL)
    except Fault:
        return f"{SEAL} is missing or unreadable"


def checksums(folder: Path) -> dict[str, dict[str, int | str]]:
    """Of every file in ``folder`` its size in bytes and SHA-256, but for the seal's own. Raises OSError."""
    return {
        path.name: {"bytes": path.stat().st_size, "sha256": sha256_of(path)}
        for path in sorted(folder.iterdir())
        if path.is_file() and path.name != SEAL
    }


def difference(folder: Path, files: object, record: str) -> str | None:
    """What tells a folder's files from ``files``, their checksums as they were read from ``record``, in a few words, or None.

    Sizes first: they cost nothing. A file that was added is no difference; what is read of a folder is in its record.
    """
    try:
        expected = {str(name): (int(one["bytes"]), str(one["sha256"])) for name, one in files.items()}  # type: ignore[attr-defined]
    except (ValueError, LookupError, TypeError, AttributeError, OverflowError):
        return f"{record} is missing or unreadable"
    if not expected or any(Path(name).name != name or len(name) > 255 for name in expected):
        return f"{record} names no files of this folder"
    if not all(0 <= size < 2**63 for size, _ in expected.values()):
        return f"{record} gives sizes that no file has"
    try:
        for name, (size, _) in expected.items():
            if not (folder / name).is_file():
                return f"{name} is missing"
            if (found := (folder / name).stat().st_size) != size:
                return f"{name} has {found:,} bytes instead of {size:,}"
        for name, (_, digest) in expected.items():
            if sha256_of(folder / name) != digest:
                return f"{name} has another checksum than when it was written"
    except OSError as error:
        return f"it cannot be read: {error}"
    return None


def sha256_of(path: Path) -> str:
    """The SHA-256 of a file's bytes, in hexadecimal. Raises OSError."""
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def sync(path: Path) -> None:
    """Wait until a file or a folder's entries are on the disk."""
    if os.name == "nt":  # Windows opens no folders
        return
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
