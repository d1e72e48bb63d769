"""qlora: fine-tune a large language model on the card you have.

    import qlora
    run = qlora.train(qlora.Recipe.from_yaml("recipes/quickstart.yaml"))

``__init__.pyi`` lists the public names. Each is imported when it is first used, so that ``import qlora`` is quick and
``qlora doctor`` runs without torch.
"""

from __future__ import annotations

import ast
import logging
from importlib import import_module
from pathlib import Path

# While it is imported, bitsandbytes advises a package of faster CPU inference kernels, which training does not use.
logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)

_HOMES = {
    alias.name: line.module
    for line in ast.parse(Path(__file__).with_suffix(".pyi").read_text(encoding="utf-8")).body
    if isinstance(line, ast.ImportFrom) and line.module
    for alias in line.names
}

__all__ = sorted(_HOMES)


def __getattr__(name: str) -> object:
    if name not in _HOMES:
        raise AttributeError(f"module 'qlora' has no attribute '{name}'")
    return getattr(import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return __all__
