"""The exception tree: each error's exit status, and what else it is."""

from __future__ import annotations

import signal

import pytest

from qlora import errors
from qlora.errors import DiffersError, DoesNotFitError, InputError, NonFiniteError, QloraError, Stopped, listed, nearest


def test_exit_status_of_every_error() -> None:
    kinds = [kind for kind in vars(errors).values() if isinstance(kind, type) and issubclass(kind, QloraError)]
    assert len(kinds) == 13
    for kind in kinds:
        assert kind.__name__ in (errors.__doc__ or ""), "the tree at the top of the file lacks it"
        if issubclass(kind, InputError):
            assert kind.exit_status == 2
    assert QloraError.exit_status == 1
    assert DoesNotFitError.exit_status == 3
    assert DiffersError.exit_status == 4
    assert [Stopped("", number).exit_status for number in (signal.SIGINT, signal.SIGTERM)] == [130, 143]


@pytest.mark.parametrize(
    ("kind", "standard"), [(InputError, ValueError), (DoesNotFitError, MemoryError), (NonFiniteError, ArithmeticError)]
)
def test_errors_are_also_the_standard_ones(kind: type[QloraError], standard: type[Exception]) -> None:
    assert issubclass(kind, standard)


def test_nearest_and_listed() -> None:
    assert nearest("alhpa", ["r", "alpha"]) == " Did you mean 'alpha'?"
    assert nearest("zzz", ["r", "alpha"]) == ""
    assert listed("abcde") == "a, b, c, d, e"
    assert listed("abcdefg") == "a, b, c, d, e and 2 more"
    assert listed([]) == ""
