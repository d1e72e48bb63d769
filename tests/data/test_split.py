"""What is held out: whole records where that can be, else pieces of text; always by seed, and never what is trained on."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qlora.data.examples import Example, make_example
from qlora.data.load import Data, load_data
from qlora.data.packing import Row
from qlora.data.parsing import Parsed
from qlora.data.split import needs_pieces, split_pieces
from qlora.errors import DataError
from qlora.recipe import DataSection, Recipe
from tests.data.conftest import LINES

RECIPE = Path(__file__).parents[2] / "recipes" / "pretrain-text.yaml"


def document(name: str, lines: int) -> str:
    """Text in which no two stretches are alike."""
    return "".join(f"{name}{number}: {LINES[number % 3]}\n" for number in range(lines))


def pieces(rows: list[Row]) -> list[tuple[int, ...]]:
    return [tuple(row.ids[begin:end].tolist()) for row in rows for begin, end in row.spans()]


def load(texts: Any, tokenizer: Any, seed: int = 0, **fields: Any) -> Data:
    return load_data(DataSection(train=texts, **{"max_length": 32, **fields}), tokenizer, seed)


def test_the_recipe_for_raw_text_takes_one_text_file(write: Any, tokenizer: Any) -> None:
    path = write("my-text.txt", document("a", 5000))
    recipe = Recipe.from_yaml(RECIPE, f"data.train={path}")
    data = load_data(recipe.data, tokenizer, recipe.training.seed)
    whole = load_data(recipe.data.model_copy(update={"held_out_fraction": 0.0}), tokenizer)
    train, held = pieces(data.train), pieces(data.held_out)
    assert sorted(train + held) == sorted(pieces(whole.train))  # no token in both, none lost
    assert not set(train) & set(held)
    counts, held_counts = data.report.train, data.report.held_out
    assert counts.tokens + held_counts.tokens == whole.report.train.tokens
    assert (counts.records, held_counts.records) == (1, 1)
    assert held_counts.examples == round(0.02 * whole.report.train.examples) > 1
    assert counts.losses() == held_counts.losses() == []
    assert "held out, not whole documents: one document is too few for held_out_fraction=0.02" in str(data.report)
    assert data.report.as_dict()["notes"] == list(data.report.notes)
    # the questions come from what is held out
    prompts = data.held_out_prompts(recipe.evaluation.prompts)
    assert len({tuple(prompt.ids) for prompt in prompts}) == 3
    assert all(any(tuple(prompt.ids) == piece[: len(prompt.ids)] for piece in held) for prompt in prompts)
    assert all(prompt.text and prompt.answer for prompt in prompts)


def test_a_few_documents_are_held_out_in_pieces(write: Any, tokenizer: Any) -> None:
    paths = [write(f"{name}.txt", document(name, 60)) for name in "abc"]
    one, same, other = (load(paths, tokenizer, seed, held_out_fraction=0.1) for seed in (0, 0, 1))
    whole = load(paths, tokenizer)
    assert one.fingerprint == same.fingerprint != other.fingerprint
    assert sorted(pieces(one.train) + pieces(one.held_out)) == sorted(pieces(whole.train))
    assert one.report.held_out.examples == round(0.1 * whole.report.train.examples)
    assert "3 documents are too few for held_out_fraction=0.1" in str(one.report)


def test_enough_documents_are_held_out_whole(write: Any, tokenizer: Any) -> None:
    texts = [document(f"d{number}-", 8) for number in range(20)]
    data = load(write("a.jsonl", [{"text": text} for text in texts]), tokenizer, held_out_fraction=0.1, packing=False)
    assert (data.report.train.records, data.report.held_out.records) == (18, 2)
    ids = [token for piece in pieces(data.held_out) for token in piece]
    held = tokenizer.decode(ids).split("</s>")[:-1]
    assert len(held) == 2
    assert set(held) < set(texts)
    assert data.report.notes == ()


def test_a_text_of_one_piece_cannot_be_split(write: Any, tokenizer: Any) -> None:
    with pytest.raises(DataError, match=r"held_out_fraction=0.5 of 1 piece leaves none to train on; give a data"):
        load(write("a.txt", "Hello there"), tokenizer, held_out_fraction=0.5)


@pytest.mark.parametrize(
    ("documents", "fraction", "expected"),
    [
        (1, 0.02, True),
        (1, 0.9, True),
        (9, 0.1, True),
        (10, 0.1, False),
        (50, 0.02, False),
        (2, 0.9, True),
        (1, 0.0, False),
    ],
)
def test_whole_documents_are_no_more_than_was_asked_for(documents: int, fraction: float, expected: bool) -> None:
    assert needs_pieces(Parsed("text", ["a"] * documents), fraction) is expected
    assert not needs_pieces(Parsed("messages", ["a"] * documents), fraction)


@settings(max_examples=60, deadline=None)
@given(st.lists(st.integers(0, 5), min_size=1, max_size=12), st.floats(0.01, 0.99), st.integers(0, 99))
def test_every_piece_is_in_one_part_of_its_document(lengths: list[int], fraction: float, seed: int) -> None:
    documents: list[list[Example]] = [
        [make_example([number, at], [True] * 2) for at in range(length)] for number, length in enumerate(lengths)
    ]
    if max(1, round(sum(lengths) * fraction)) >= sum(lengths):
        with pytest.raises(DataError, match="leaves none to train on"):
            split_pieces(documents, fraction, seed)
        return
    train, held = split_pieces(documents, fraction, seed)
    for number, (left, right, every) in enumerate(zip(train, held, documents, strict=True)):
        assert sorted([*left, *right], key=lambda piece: piece.ids[1]) == every
        assert [piece.ids[1] for piece in left] == sorted(piece.ids[1] for piece in left)
        assert all(piece.ids[0] == number for piece in (*left, *right))
    assert sum(map(len, held)) == max(1, round(sum(lengths) * fraction))
