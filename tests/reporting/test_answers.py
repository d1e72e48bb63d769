"""What training changed in an answer: marked word by word, and nothing of it lost."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from qlora.reporting.answers import MOST_WORDS, Piece, compared


def changed(before: str, after: str) -> tuple[list[str], list[str]]:
    """The words that are marked in each."""
    first, second = compared(before, after)
    assert first is not None
    assert second is not None
    marked = [[piece.text for piece in one if piece.changed] for one in (first, second)]
    return marked[0], marked[1]


def test_words_that_only_one_has_are_marked() -> None:
    assert changed("The sky is grey today.", "The sky is blue today.") == (["grey"], ["blue"])
    assert changed("It copies.", "It copies. A folder.") == ([], ["A", "folder."])
    assert changed("the same", "the same") == ([], [])


def test_answers_with_little_in_common_are_not_marked_all_over() -> None:
    assert changed("one two three four five six", "seven eight nine ten a one") == ([], [])
    assert changed("one two […]", "three […]") == ([], [])
    long = "word " * MOST_WORDS
    assert changed(long, long + "more") == ([], [])


def test_an_answer_that_is_not_there_yet() -> None:
    assert compared("before", None) == ([Piece("before", False, False)], None)
    assert compared(None, "") == (None, [])


@pytest.mark.parametrize(
    ("text", "code"),
    [
        ("Try:\n```python\nx = 1\n```\nand run it.", "```python\nx = 1\n```"),
        ('{"name": "weather"}', '{"name": "weather"}'),
        ("<tool_call>\n{}", "<tool_call>\n{}"),
        ("No code, not even a ` or two.", ""),
        ("It ends inside ```x = 1", "```x = 1"),
    ],
)
def test_code_is_told_apart(text: str, code: str) -> None:
    pieces, _ = compared(text, None)
    assert pieces is not None
    assert "".join(piece.text for piece in pieces if piece.code) == code


@given(st.text(alphabet="ab `{\n", max_size=40), st.text(alphabet="ab `{\n", max_size=40))
def test_the_pieces_are_the_answer(before: str, after: str) -> None:
    for text, pieces in zip((before, after), compared(before, after), strict=True):
        assert pieces is not None
        assert "".join(piece.text for piece in pieces) == text
