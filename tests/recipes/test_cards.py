"""recipes/cards is what ``qlora init`` and the plan make of the families for the cards, and each fits its card."""

from __future__ import annotations

import re
from itertools import cycle, product
from pathlib import Path

import pytest

from benchmarks.cards import CARDS, FAMILIES, FOLDER, text
from qlora.errors import DoesNotFitError
from qlora.machine.cards import card, parse_memory
from qlora.machine.disk import bytes_text
from qlora.recipe import Recipe

FILES = sorted(FOLDER.glob("*.yaml"))


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)
def test_it_says_that_it_fits(file: Path) -> None:
    family, _, size = file.stem.rpartition("-")
    said, recipe = file.read_text(encoding="utf-8"), Recipe.from_yaml(file)
    assert recipe.model.name == FAMILIES[family][0]
    assert f"python -m benchmarks.cards --models {family} --cards {size}\n" in said
    known, host_memory, needs = CARDS[size]
    takes, has, beside = re.search(
        rf"# Needs {re.escape(needs)}: (.+?) of its (.+?) and (.+?) of host memory, as", said
    ).groups()  # type: ignore[union-attr]
    assert has == bytes_text(card(known).memory)
    assert parse_memory(takes) < parse_memory(has)
    assert parse_memory(beside) < parse_memory(host_memory)


def test_every_family_has_one_for_every_card_that_holds_it() -> None:
    assert {file.stem.rpartition("-")[0] for file in FILES} == FAMILIES.keys()
    assert {file.stem.rpartition("-")[2] for file in FILES} == CARDS.keys()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("family", "size"), [*zip(FAMILIES, cycle(CARDS), strict=False), *product(["llama-3.1-8b"], CARDS)]
)
def test_it_is_what_is_made(family: str, size: str) -> None:
    """Each family once, and one of them for every card; ``python -m benchmarks.cards --check`` does it for all."""
    file = FOLDER / f"{family}-{size}.yaml"
    if file.exists():
        assert text(family, size) == file.read_text(encoding="utf-8")
    else:
        with pytest.raises(DoesNotFitError):
            text(family, size)
