"""The pages that people read, taken apart: fenced blocks, code within sentences, links, headings.

    page ─► blocks [(kind, text, line)]    a fence without a known kind is kept, so that a test can refuse it
         ─► spans  [`qlora train mine.yaml`, …]
         ─► links  [(target, line)]  and  anchors {…}, as GitHub makes them from headings

Knows Markdown; must not know what a block means.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).parents[2]
PAGES = sorted([ROOT / "README.md", ROOT / "CONTRIBUTING.md", ROOT / "CHANGELOG.md", *(ROOT / "docs").glob("*.md")])
FENCE = re.compile(r"^(?P<indent> *)(?P<fence>```+|~~~+) *(?P<kind>[^`]*)$")


class Block(NamedTuple):
    kind: str  # what stands behind the opening fence: sh, python, yaml, …
    text: str
    line: int  # of its first line, counted from 1


def name(page: Path) -> str:
    return page.relative_to(ROOT).as_posix()


def _parts(page: Path) -> tuple[list[Block], str]:
    """The fenced blocks, and the page without them, its lines where they were."""
    found: list[Block] = []
    others: list[str] = []
    inside: list[str] | None = None
    fence, kind, indent, start = "", "", 0, 0
    for number, line in enumerate(page.read_text(encoding="utf-8").splitlines(), 1):
        opening = FENCE.match(line)
        if inside is None and opening:
            fence, kind, inside = opening["fence"], opening["kind"].strip(), []
            indent, start = len(opening["indent"]), number + 1
        elif inside is not None and line.strip() == fence:
            found.append(Block(kind, "".join(f"{one[indent:]}\n" for one in inside), start))
            inside = None
        elif inside is not None:
            inside.append(line)
        others.append("" if inside is not None or opening else line)
    assert inside is None, f"{name(page)}: the block that begins at line {start} is never closed"
    return found, "\n".join(others)


def blocks(page: Path) -> list[Block]:
    return _parts(page)[0]


def prose(page: Path) -> str:
    """The page without its fenced blocks, its lines where they were."""
    return _parts(page)[1]


def spans(page: Path) -> list[str]:
    """Code within sentences and tables, line breaks in it made spaces."""
    return [" ".join(span.split()) for span in re.findall(r"(?<!`)`([^`]+)`(?!`)", prose(page))]


def links(page: Path) -> list[tuple[str, int]]:
    """Targets of links and pictures that stay in the repository, with their lines."""
    text = re.sub(r"`[^`]*`", lambda code: re.sub(r"[^\n]", " ", code[0]), prose(page))
    found = [(match[1], text.count("\n", 0, match.start()) + 1) for match in re.finditer(r"\]\(([^)\s]+)\)", text)]
    return [(target, line) for target, line in found if not re.match(r"[a-z]+:", target)]


def anchors(page: Path) -> set[str]:
    """The anchors that GitHub gives the headings of a page."""
    found: set[str] = set()
    for line in prose(page).splitlines():
        if heading := re.match(r"#{1,6} +(.+)", line):
            text = re.sub(r"\[([^]]*)\]\([^)]*\)", r"\1", heading[1]).strip().lower()
            anchor = re.sub(r"[^\w\- ]", "", text).replace(" ", "-")
            again = sum(one == anchor or re.fullmatch(rf"{re.escape(anchor)}-\d+", one) is not None for one in found)
            found.add(f"{anchor}-{again}" if again else anchor)
    return found
