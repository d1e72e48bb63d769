"""How long examples are, what is lost of those that are too long, and what would keep them."""

from __future__ import annotations

from typing import Any

import pytest

from qlora.data.examples import fit, make_example
from qlora.data.lengths import LONGEST_ROW, bins_of, histogram, too_long_note
from qlora.data.load import Data, load_data
from qlora.errors import DataError
from qlora.recipe import DataSection


def load(path: str, tokenizer: Any, positions: int | None = None, **fields: Any) -> Data:
    return load_data(DataSection(train=path, **{"max_length": 64, **fields}), tokenizer, positions=positions)


def pairs(*words: int) -> list[dict[str, str]]:
    """Questions of few words and answers of so many."""
    return [{"prompt": f"Hi {number}", "completion": " ".join(["so"] * count)} for number, count in enumerate(words)]


def test_bins_are_powers_of_two_without_gaps() -> None:
    assert bins_of([]) == ()
    assert bins_of([1, 8, 9, 16, 17, 100]) == ((8, 2), (16, 2), (32, 1), (64, 0), (128, 1))
    assert histogram(bins_of([8] * 64 + [16, 100])).splitlines() == [
        "  up to   8 tokens  64 " + "█" * 32,
        "  up to  16 tokens   1 █",
        "  up to  32 tokens   0",
        "  up to  64 tokens   0",
        "  up to 128 tokens   1 █",
    ]


@pytest.mark.parametrize(
    ("lengths", "max_length", "taken", "positions", "said"),
    [
        ([10, 64], 64, 0, None, None),
        ([10, 65], 64, 0, None, "1 of 2 examples are longer than data.max_length=64: 128 would keep them all whole"),
        ([10, 65], 65, 1, None, "1 of 2 examples are longer than data.max_length=65: 128 would keep them all whole"),
        (
            [10] * 283 + [400] * 15 + [3000, 2000],
            256,
            0,
            None,
            "17 of 300 examples are longer than data.max_length=256: 512 would keep all but 2 of them whole, 4,096 would keep "
            "them all whole",
        ),
        ([5000], 1000, 0, 2048, "1 of 1 examples are longer than data.max_length=1,000: the model has 2,048 positions"),
        ([5000] + [1500] * 200, 1000, 0, 2048, "201 of 201 examples are longer than data.max_length=1,000: 2,048 would keep all but "
         "1 of them whole, the model has 2,048 positions"),
        ([LONGEST_ROW + 1], LONGEST_ROW, 0, None, "1 of 1 examples are longer than data.max_length=1,048,576"),
    ],
)  # fmt: skip
def test_what_would_keep_them_is_said(
    lengths: list[int], max_length: int, taken: int, positions: int | None, said: str | None
) -> None:
    assert too_long_note(lengths, max_length, taken, positions) == ([said] if said else [])


def test_an_answer_that_lost_its_end_is_told_from_one_that_was_left_out() -> None:
    """Of eight tokens: an answer from 5 on is cut inside by 6 and left out by 5; one before 4 is whole."""

    def example(*trained: int) -> Any:
        return make_example(range(8), [place in trained for place in range(8)])

    late, early = example(5, 6, 7), example(2, 3)
    for limit, cut in ((6, 1), (5, 0), (7, 1)):
        assert fit([late], limit, "truncate").cut_answers == cut
        assert fit([early], limit, "truncate").cut_answers == 0
    assert fit([late, early], 6, "drop").cut_answers == 0
    assert fit([example(2, 3, 6, 7)], 4, "truncate").cut_answers == 0  # between two answers


def test_losses_are_said_with_what_would_change_them(write: Any, tokenizer: Any) -> None:
    path = write("a.jsonl", pairs(1, 2, 3, 300))
    report = load(path, tokenizer).report
    length = len(load(path, tokenizer, max_length=4096, packing=False).train[3].ids)
    assert length > 64
    assert report.train.losses() == [
        f"1 example truncated ({length - 64:,} tokens), 1 of them inside an answer, whose end is not learnt"
    ]
    fits = next(2**power for power in range(20) if 2**power >= length)
    note = f"1 of 4 examples are longer than data.max_length=64: {fits:,} would keep them all whole"
    assert report.notes == (note,)
    assert load(path, tokenizer, too_long="drop").report.notes == (note,)
    assert load(path, tokenizer, max_length=fits).report.notes == ()
    counted = report.as_dict()["train"]["lengths"]
    assert sum(count for _, count in counted) == 4
    assert counted[-1] == (fits, 1)
    assert report.histogram().splitlines()[-1].split()[:4] == ["up", "to", f"{fits:,}", "tokens"]


def test_more_than_the_model_has_positions_is_said_before_anything_is_packed(write: Any, tokenizer: Any) -> None:
    short, long = write("a.jsonl", pairs(1, 2, 3)), write("b.jsonl", pairs(1, 2, 300))
    note = "data.max_length=4,096 is above the 128 positions of the model: a row may be as long as that, a single example may not"
    assert load(short, tokenizer, 128, max_length=4096).report.notes == (note,)
    assert load(short, tokenizer, 128, max_length=128).report.notes == ()
    length = len(load(long, tokenizer, max_length=4096, packing=False).train[2].ids)
    said = f"1 of 3 examples are longer than the 128 positions that the model has, the longest {length} tokens; set data.max_length=128"
    for fields, path in (({}, long), ({"held_out": long}, short), ({"too_long": "drop"}, long)):
        with pytest.raises(DataError, match=said):
            load(path, tokenizer, 128, **{"max_length": 4096, **fields})
    assert load(long, tokenizer, 128, max_length=128).report.train.truncated == 1
    assert load(long, tokenizer, 128, max_length=length - 1, too_long="drop").report.train.dropped == 1


def test_documents_are_measured_whole(write: Any, tokenizer: Any) -> None:
    path = write("a.jsonl", [{"text": "so " * 200}, {"text": "so"}])
    data = load(path, tokenizer)
    assert sum(count for _, count in data.report.train.lengths) == 2
    assert data.report.train.lengths[-1][0] > 64
    assert data.report.notes == ()  # nothing is cut off
    assert "lengths of the training documents" in data.report.histogram()


def test_held_out_examples_that_were_trained_on_are_counted(write: Any, tokenizer: Any) -> None:
    rows = pairs(*range(1, 11))
    other = {"prompt": rows[3]["prompt"], "completion": "Something else."}
    fresh = {"prompt": "New?", "completion": "New."}
    told = [
        ([rows[0], rows[1], other, fresh], "of 4 held-out examples 2 are in the training data too, word for word and 1 have a "),
        ([rows[0], fresh], "of 2 held-out examples 1 are in the training data too, word for word; "),
        ([other, fresh], "of 2 held-out examples 1 have a question of the training data, with another answer; "),
    ]  # fmt: skip
    path = write("a.jsonl", rows)
    for held_out, said in told:
        (note,) = load(path, tokenizer, held_out=write("h.jsonl", held_out)).report.notes
        assert note.startswith(said)
    assert load(path, tokenizer, held_out=write("h.jsonl", [fresh])).report.notes == ()
    assert load(write("b.jsonl", rows * 2), tokenizer, held_out_fraction=0.5).report.notes
    texts = [{"text": "One and the same."}, {"text": "Another one."}]
    data = load(write("t.jsonl", texts), tokenizer, held_out=write("u.jsonl", texts[:1]))
    assert data.report.notes[0].startswith("of 1 held-out examples 1 are in the training data too, word for word;")
