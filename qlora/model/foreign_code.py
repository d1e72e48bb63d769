"""Foreign code: the Python files that come with a checkpoint. They run only where the recipe says so, and then it is said.

Knows where a checkpoint names such files (``auto_map``); must not know what is in them.
"""

from __future__ import annotations

import json
import sys
from functools import cache
from pathlib import Path

from qlora.errors import ModelError, listed, redacted, visible

_NAMING = ("config.json", "tokenizer_config.json")


def foreign_code(folder: Path, files: tuple[str, ...] = _NAMING) -> list[str]:
    """The Python files that loading from ``folder`` would run, where one of ``files`` names any in ``auto_map``.

    All that lie in the folder, as each may import the others, and those of other repositories as ``org/name: file.py``.
    """
    named = sorted({name for file in files for name in _named(_values(folder / file).get("auto_map"))})
    if not named:
        return []
    here = {path.name for path in folder.glob("*.py")}
    for name in named:  # "modeling.Model", or "org/name--modeling.Model" for a file of another repository
        repository, _, place = name.rpartition("--")
        file = f"{place.partition('.')[0]}.py"
        here.add(f"{repository}: {file}" if repository else file)
    return sorted(here)


@cache
def say_foreign_code(folder: Path) -> None:
    """Tell on standard error, once for a folder, which Python files will run, as model.trust_remote_code=true allows."""
    if files := foreign_code(folder):
        print(
            visible(
                redacted(
                    f"model.trust_remote_code=true: Python code of '{folder}' runs with your rights: {listed(files, 20)}."
                )
            ),
            file=sys.stderr,
            flush=True,
        )


def refuse_foreign_tokenizer(folder: Path) -> None:
    """Raise ModelError where the tokenizer in ``folder`` needs code of its own."""
    if files := foreign_code(folder, ("tokenizer_config.json",)):
        raise ModelError(
            f"The tokenizer in '{folder}' comes with its own Python code ({listed(files)}), which is not run by default. Read that "
            "code, and if you trust it set model.trust_remote_code=true."
        )


def _values(path: Path) -> dict[str, object]:
    """What a file holds, or nothing: whoever loads it says what is wrong with it."""
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return {}
    return values if isinstance(values, dict) else {}


def _named(value: object) -> list[str]:
    """The classes in an ``auto_map``: one by its kind, of a tokenizer the slow and the fast one in a list."""
    kinds = value.values() if isinstance(value, dict) else [value]
    several = [kind if isinstance(kind, list) else [kind] for kind in kinds]
    return [name for names in several for name in names if isinstance(name, str)]
