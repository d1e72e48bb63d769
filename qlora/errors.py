"""Every exception that qlora raises on purpose, and the exit status that each one gives the command line.

    QloraError                  1   a defect of ours, said in a sentence all the same
    ├── InputError              2   something the user gave us is wrong; also a ValueError
    │   ├── RecipeError             the recipe: unknown keys, wrong types, out of range
    │   ├── ModelError              the checkpoint: missing, truncated, pickled, of an unknown shape
    │   │   └── PackingError            examples that share a row would see each other
    │   ├── DataError               the data: missing, broken, empty, nothing to train on
    │   ├── MethodError             the method: targets that match nothing, an adapter of another base
    │   ├── RunError                the run folder: not one, already there, changed under us
    │   └── NonFiniteError          the numbers: a loss or gradient that is not finite; also an ArithmeticError
    ├── DoesNotFitError         3   memory or disk is too small for what was asked; also a MemoryError
    ├── DiffersError            4   what was exported is not what was trained
    ├── ProcessLostError        5   another process of this run ended, and it cannot go on without
    └── Stopped           130, 143  a signal arrived; the state was saved first

A message is one or two sentences: what was found, what was expected, what to do next. Below the tree is what every text
goes through before it is shown or written: ``redacted`` takes secrets out, ``visible`` shows control characters as escapes.
Knows no other module.
"""

from __future__ import annotations

import difflib
import errno
import os
import re
from collections.abc import Iterable
from typing import Any


class QloraError(Exception):
    """Root of the tree. ``exit_status`` is what the command line exits with. A message never holds a secret."""

    exit_status = 1

    def __init__(self, *details: object) -> None:
        super().__init__(*(redacted(detail) for detail in details))


class InputError(QloraError, ValueError):
    """The user's input is wrong."""

    exit_status = 2


class RecipeError(InputError):
    """A recipe that cannot be read or does not validate."""


class ModelError(InputError):
    """A checkpoint that cannot be loaded."""


class PackingError(ModelError):
    """A model whose packed examples see each other."""


class DataError(InputError):
    """Data that cannot be read, or holds nothing to train on."""


class MethodError(InputError):
    """A method or an adapter that does not suit its base."""


class RunError(InputError):
    """A run folder that is not one, is taken, or has changed."""


class NonFiniteError(InputError, ArithmeticError):
    """A loss or a gradient that is not finite; no step was taken."""


class DoesNotFitError(QloraError, MemoryError):
    """More memory or disk is needed than there is."""

    exit_status = 3


class DiffersError(QloraError):
    """An export that is not the model that was trained."""

    exit_status = 4


class ProcessLostError(QloraError):
    """Another of the processes that train together ended."""

    exit_status = 5


class Stopped(QloraError):
    """A signal stopped the run after its state was saved. ``exit_status`` is 128 + the signal's number."""

    def __init__(self, message: str, signal_number: int) -> None:
        super().__init__(message)
        self.exit_status = 128 + signal_number


DISK_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


def disk_is_full(error: BaseException | str) -> bool:
    """Whether an exception, or what another process printed of one, comes from a full disk.

    The libraries in Rust have exceptions without a number and put it into the text.
    """
    text = str(error)
    return getattr(error, "errno", None) in DISK_FULL or any(
        mark in text for number in DISK_FULL for mark in (f"[Errno {number}]", f"(os error {number})")
    )


def first_line(error: BaseException) -> str:
    """The first line of another library's complaint without its full stop, or the exception's name where it has none; with the
    second one, where the first announces it."""
    lines = str(error).strip().splitlines() or [type(error).__name__]
    announces = lines[0].rstrip().endswith(":") and len(lines) > 1
    return (f"{lines[0].rstrip()} {lines[1].strip()}" if announces else lines[0]).rstrip(".")


def nearest(name: str, known: Iterable[str]) -> str:
    """`` Did you mean 'x'?`` for the known name closest to ``name``, or an empty string when none is close.

    Example: ``nearest("alhpa", ["r", "alpha"])`` → ``" Did you mean 'alpha'?"``
    """
    close = difflib.get_close_matches(name, list(known), n=1, cutoff=0.6)
    return f" Did you mean '{close[0]}'?" if close else ""


LONGEST_NAME = 200  # characters of one name: a stranger's may fill the screen


def listed(names: Iterable[object], limit: int = 5) -> str:
    """The first ``limit`` names, comma-separated, with how many were left out: ``a, b, c and 4 more``."""
    every = [str(name) for name in names]
    shown = ", ".join(name if len(name) <= LONGEST_NAME else f"{name[:LONGEST_NAME]}…" for name in every[:limit])
    return shown if len(every) <= limit else f"{shown} and {len(every) - limit} more"


def counted(count: int, noun: str) -> str:
    """``1 row``, ``2,000 rows``."""
    return f"{count:,} {noun}{'s' * (count != 1)}"


# --- text that leaves ------------------------------------------------------------------------------------------------

REDACTED = "[redacted]"

_ADDRESS = re.compile(r"(://)(?:[^\s/@:'\"]*:[^\s/@'\"]*|[^\s/@'\"]{16,})@")  # https://user:password@host
_NAMED = re.compile(
    r"(\b(?:bearer|authorization:(?:\s*basic)?)\s+"
    r"|[?&](?:[\w-]*(?:token|secret|signature|credential|password|policy|key)[\w-]*|sig)=)[^\s&'\"<>]{8,}",
    re.IGNORECASE,
)
_KEYS = re.compile(
    r"(?<![A-Za-z0-9])(?:"
    r"(?:hf_|api_org_)[A-Za-z0-9]{16,}"  # the hub's
    r"|sk-(?:[a-z0-9]{1,8}-){0,2}(?=[A-Za-z_]*[0-9])[A-Za-z0-9_]{20,}[A-Za-z0-9_-]*"  # of those who serve models
    r"|gh[opsur]_[A-Za-z0-9]{16,}|github_pat_[A-Za-z0-9_]{16,}|glpat-[A-Za-z0-9_-]{16,}"
    r"|A(?:KIA|SIA)[A-Z0-9]{16}|AIza[A-Za-z0-9_-]{30,}|xox[abprs]-[A-Za-z0-9-]{10,}"
    r")"
)
_SECRET_NAMES = {"TOKEN", "TOKENS", "SECRET", "SECRETS", "PASSWORD", "PASSWD", "PASSPHRASE", "CREDENTIALS", "APIKEY"}
_PLACE_NAMES = {
    *["PATH", "FILE", "DIR", "FOLDER", "HOME", "NAME", "ID", "TYPE", "URL"]
}  # HF_TOKEN_PATH says where the token is
_SHORTEST_SECRET = 8  # characters; TOKEN=true would take every "true" with it


def redacted(value: Any) -> Any:
    """``value`` without secrets, also inside lists and mappings: what looks like a key, passwords in addresses, and the
    values of environment variables that are called TOKEN, SECRET, PASSWORD, API_KEY.

    For what is said and written of a run, not for the data: what people train on is theirs.
    """
    if isinstance(value, dict):
        return {redacted(key): redacted(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(map(redacted, value)) if type(value) in (list, tuple) else value
    if not isinstance(value, str):
        return value
    for secret in _secrets_here():
        value = value.replace(secret, REDACTED)
    value = _ADDRESS.sub(rf"\1{REDACTED}@", value)
    return _KEYS.sub(REDACTED, _NAMED.sub(rf"\1{REDACTED}", value))


def _secrets_here() -> list[str]:
    """The secrets of the environment, the longest first: one may be a part of another."""
    found = set()
    for name, secret in os.environ.items():
        words = name.upper().split("_")
        secret = secret.strip()
        named = _SECRET_NAMES.intersection(words) or (words[-1] == "KEY" and {"API", "ACCESS", "PRIVATE"} & set(words))
        if named and words[-1] not in _PLACE_NAMES and len(secret) >= _SHORTEST_SECRET:
            found.add(secret)
    return sorted(found, key=len, reverse=True)


# Controls but tab and line feed, marks that turn the direction of writing, line separators, halves of surrogate pairs,
# and the invisible letters of "tags".
_UNSEEN = re.compile(
    "[\x00-\x08\x0b-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069\ufeff\ufff9-\ufffb\ud800-\udfff"
    "\U000e0000-\U000e007f]"
)


def visible(value: object) -> str:
    """``value`` as text for a terminal: what would move the cursor, colour or retitle is shown as its escape (``\\x1b``).

    Letters of every script stay, with tabs and line feeds.
    """
    return _UNSEEN.sub(lambda found: found[0].encode("unicode_escape").decode(), str(value))
