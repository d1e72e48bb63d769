"""The table of cards in docs/memory.md is that of the code."""

from __future__ import annotations

from qlora.machine.cards import CARDS
from tests.docs.pages import ROOT

GIB = 1024**3


def table() -> str:
    rows = ["| card | sold with | of it for training | computes in | TFLOP/s |", "|---|--:|--:|---|--:|"]
    for card in sorted({one.name: one for one in CARDS.values()}.values(), key=lambda one: (one.memory, one.name)):
        rows.append(
            f"| {card.name} | {card.gigabytes} GB | {card.memory / GIB:.1f} GiB | {card.dtype} | {card.flops / 1e12:.0f} |"
        )
    return "\n".join(rows)


def test_the_cards_are_those_that_a_plan_knows() -> None:
    text = (ROOT / "docs/memory.md").read_text(encoding="utf-8")
    assert f"\n{table()}\n" in text, f"docs/memory.md should have:\n{table()}"
