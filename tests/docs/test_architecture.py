"""The map of the code is true: every file is on it, every station of its two walks is there, and each walk is short."""

from __future__ import annotations

import ast
import re
from pathlib import Path

from tests.docs.pages import ROOT, blocks

PAGE = ROOT / "docs/architecture.md"
STATION = re.compile(r"(?m)^\d+\. `(?P<file>[\w/]+\.py):(?P<name>[\w.]+)`")


def defined(path: Path) -> set[str]:
    """Functions, classes and methods of a file, as ``merge`` and ``Merge.merged``."""
    found = set()
    for node in ast.parse(path.read_text(encoding="utf-8")).body:
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            found.add(node.name)
        if isinstance(node, ast.ClassDef):
            found |= {f"{node.name}.{inner.name}" for inner in node.body if isinstance(inner, ast.FunctionDef)}
    return found


def test_every_station_is_there() -> None:
    stations = [(match["file"], match["name"]) for match in STATION.finditer(PAGE.read_text(encoding="utf-8"))]
    assert len(stations) > 20
    wrong = [
        f"{file}:{name}" for file, name in stations if not (ROOT / file).is_file() or name not in defined(ROOT / file)
    ]
    assert not wrong, f"docs/architecture.md names what is not there: {', '.join(wrong)}"


def test_each_walk_has_at_most_15_stations() -> None:
    for section in PAGE.read_text(encoding="utf-8").split("\n## ")[1:]:
        assert len(STATION.findall(section)) <= 15, section.splitlines()[0]


def test_every_file_is_on_the_map_and_nothing_else() -> None:
    (tree,) = (block.text for block in blocks(PAGE) if block.kind == "text")
    drawn, path = set(), []
    for line in tree[: tree.index("\nrecipes/")].splitlines()[1:]:
        depth, name = re.match(r"((?:│   |    )*)[├└]── (\S+)", line).groups()  # type: ignore[union-attr]
        path[len(depth) // 4 :] = [name]
        if name.endswith(".py"):
            drawn.add("".join(path))
    there = {path.relative_to(ROOT / "qlora").as_posix() for path in (ROOT / "qlora").rglob("*.py")}
    there = {name for name in there if not name.endswith("__init__.py")}
    assert there - drawn == set(), "not drawn in docs/architecture.md"
    assert drawn - there == set(), "drawn in docs/architecture.md, and not there"
