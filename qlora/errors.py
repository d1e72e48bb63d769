"""Every exception that qlora raises on purpose, and the exit status that each one gives the command line.

    QloraError                  1   a defect of ours, said in a sentence all the same
    ├── InputError              2   something the user gave us is wrong; also a ValueError
    │   ├── RecipeError             the recipe: unknown keys, wrong types, out of range
    │   ├── ModelError              the checkpoint: missing, truncated, pickled, of an unknown shape
    │   ├── DataError               the data: missing, broken, empty, nothing to train on
    │   ├── MethodError             the method: targets that match nothing, an adapter of another base
    │   ├── RunError                the run folder: not one, already there, changed under us
    │   └── NonFiniteError          the numbers: a loss or gradient that is not finite; also an ArithmeticError
    ├── DoesNotFitError         3   memory or disk is too small for what was asked; also a MemoryError
    └── Stopped           130, 143  a signal arrived; the state was saved first

A message is one or two sentences: what was found, what was expected, what to do next. This file knows no other module.
"""

from __future__ import annotations

import difflib
import errno
from collections.abc import Iterable


class QloraError(Exception):
    """Root of the tree. ``exit_status`` is what the command line exits with."""

    exit_status = 1


class InputError(QloraError, ValueError):
    """The user's input is wrong."""

    exit_status = 2


class RecipeError(InputError):
    """A recipe that cannot be read or does not validate."""


class ModelError(InputError):
    """A checkpoint that cannot be loaded."""


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
    """The first line of another library's complaint without its full stop, or the exception's name where it has none."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0].rstrip(".")


def nearest(name: str, known: Iterable[str]) -> str:
    """`` Did you mean 'x'?`` for the known name closest to ``name``, or an empty string when none is close.

    Example: ``nearest("alhpa", ["r", "alpha"])`` → ``" Did you mean 'alpha'?"``
    """
    close = difflib.get_close_matches(name, list(known), n=1, cutoff=0.6)
    return f" Did you mean '{close[0]}'?" if close else ""


def listed(names: Iterable[object], limit: int = 5) -> str:
    """The first ``limit`` names, comma-separated, with how many were left out: ``a, b, c and 4 more``."""
    every = [str(name) for name in names]
    shown = ", ".join(every[:limit])
    return shown if len(every) <= limit else f"{shown} and {len(every) - limit} more"
