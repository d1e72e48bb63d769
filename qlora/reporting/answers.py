"""Answers for people: what training changed, word by word, and which parts are code.

Knows texts; must not know runs or HTML.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from difflib import SequenceMatcher
from itertools import groupby
from typing import NamedTuple

MOST_WORDS = 400  # compared: the time grows with their square
ALIKE = 0.2  # of the words: with less in common, marks would be everywhere
CUT = "[…]"
_CODE = re.compile(r"\s*([\[{]|<tool_call>|<function)")


class Piece(NamedTuple):
    """A part of an answer. Together they are the answer, letter by letter."""

    text: str
    changed: bool
    code: bool


def compared(before: str | None, after: str | None) -> tuple[list[Piece] | None, list[Piece] | None]:
    """Both answers in pieces, with what only one of them has marked as changed; None for one that is not there yet."""
    first, second = _words(before or ""), _words(after or "")
    kept: tuple[set[int], set[int]] = (set(range(len(first))), set(range(len(second))))
    if before and after and max(len(first), len(second)) <= MOST_WORDS:
        found = SequenceMatcher(a=first, b=second, autojunk=False)
        blocks = found.get_matching_blocks()
        alike = _counted([word for b in blocks for word in first[b.a : b.a + b.size]])
        if alike and alike >= ALIKE * max(_counted(first), _counted(second)):
            kept = ({b.a + n for b in blocks for n in range(b.size)}, {b.b + n for b in blocks for n in range(b.size)})
    return (
        None if before is None else list(_pieces(first, kept[0])),
        None if after is None else list(_pieces(second, kept[1])),
    )


def _counted(words: list[str]) -> int:
    """How many of them say something."""
    return sum(not word.isspace() and word != CUT for word in words)


def _words(text: str) -> list[str]:
    """``a fox`` → ``["a", " ", "fox"]``; fences of code stand alone."""
    return re.findall(r"```|\s+|(?:(?!```)\S)+", text)


def _pieces(words: list[str], kept: set[int]) -> Iterator[Piece]:
    """Neighbours that are alike in one piece: code is what stands between fences, or all of a text that begins as JSON or a call."""
    inside = always = bool(_CODE.match("".join(words)))
    kinds = []
    for place, word in enumerate(words):
        opens = word == "```" and not inside
        kinds.append((place not in kept and not word.isspace(), inside or opens))
        inside = always or (inside != (word == "```"))
    for (changed, code), group in groupby(zip(kinds, words, strict=True), key=lambda pair: pair[0]):
        yield Piece("".join(word for _, word in group), changed, code)
