"""Marks that parameters of tests share."""

from __future__ import annotations

from typing import Any

import pytest


def slow(*values: Any) -> Any:
    """A parameter set whose test runs with ``make test-all`` alone: one of its kind is among the plain tests."""
    return pytest.param(*values, marks=pytest.mark.slow)
