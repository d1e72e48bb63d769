"""Names of a package that are imported when they are first used, so that importing it waits for nothing heavy.

    __getattr__, __all__ = late_names(__file__)      what there is, and where it is from: __init__.pyi beside that file

Knows how Python looks a name up in a package; must not know which packages there are.
"""

from __future__ import annotations

import ast
from collections.abc import Callable
from importlib import import_module
from pathlib import Path


def late_names(file: str) -> tuple[Callable[[str], object], list[str]]:
    """A package's ``__getattr__`` and ``__all__``, by the lines ``from qlora.room.home import Name as Name`` of its stub."""
    stub = Path(file).with_suffix(".pyi")
    homes = {
        alias.name: line.module
        for line in ast.parse(stub.read_text(encoding="utf-8")).body
        if isinstance(line, ast.ImportFrom) and line.module
        for alias in line.names
    }

    def find(name: str) -> object:
        if name not in homes:
            raise AttributeError(f"module '{stub.parent.name}' has no attribute '{name}'")
        return getattr(import_module(homes[name]), name)

    return find, sorted(homes)
