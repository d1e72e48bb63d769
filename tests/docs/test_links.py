"""Every link, anchor and file that a page names is there, and the first page stays a first page."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

from tests.docs.pages import PAGES, ROOT, anchors, blocks, links, name, spans

RESULTS = sorted((ROOT / "benchmarks/results").glob("*.md"))
FILE = re.compile(r"(?:qlora|tests|benchmarks|recipes|docs|notebooks|\.ci)/[\w./*-]+")


@pytest.mark.parametrize("page", [*PAGES, *RESULTS], ids=name)
def test_links_lead_somewhere(page: Path) -> None:
    broken = []
    for target, line in links(page):
        path, _, anchor = target.partition("#")
        place = (page.parent / path).resolve() if path else page
        if not place.exists():
            broken.append(f"line {line}: {target} is not there")
        elif anchor and anchor not in anchors(place):
            broken.append(f"line {line}: {target}; the headings there are {', '.join(sorted(anchors(place)))}")
    assert not broken, f"{name(page)}: " + "; ".join(broken)


@pytest.mark.parametrize("page", [page for page in PAGES if page.name != "CHANGELOG.md"], ids=name)
def test_files_that_are_named_exist(page: Path) -> None:
    named = {span.partition(":")[0].rstrip("/") for span in spans(page) if FILE.fullmatch(span.partition(":")[0])}
    missing = sorted(path for path in named if not list(ROOT.glob(path)))
    assert not missing, f"{name(page)} names {missing}"


def test_the_first_page_stays_short() -> None:
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    assert len(text.splitlines()) <= 200
    assert len(re.findall(r"not measured on a GPU", text, re.IGNORECASE)) == 1
    assert "docs/report.png" in text


def test_every_page_is_reached_from_the_first() -> None:
    reached = {(ROOT / target.partition("#")[0]).resolve() for target, _ in links(ROOT / "README.md")}
    assert [name(page) for page in PAGES if page not in reached and page.name != "README.md"] == []


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_nothing_is_installed_from_an_index_under_our_name(page: Path) -> None:
    """Nothing is published: our own package is installed from a clone or from a wheel file."""
    text = "\n".join([*spans(page), *(block.text for block in blocks(page))])
    for words in re.findall(r"pip3? install ([^\n#&]+)", text):
        bare = [word for word in words.split() if re.match(r"['\"]?qlora", word)]
        assert not bare, f"{name(page)}: pip install {words.strip()}"


def test_troubleshooting_quotes_what_is_said() -> None:
    """What stands in the first column of its table is a part of a message of the package."""
    said = [
        node.value
        for path in (ROOT / "qlora").rglob("*.py")
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.Constant) and isinstance(node.value, str)
    ]
    quoted = re.findall(r"(?m)^\| `([^`]+)` \|", (ROOT / "docs/troubleshooting.md").read_text(encoding="utf-8"))
    assert len(quoted) > 5
    assert [words for words in quoted if not any(words in text for text in said)] == []
