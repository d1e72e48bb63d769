"""Labelled texts: one target an example behind the text's last token, and a sentence for every record or set that is none."""

from __future__ import annotations

from typing import Any

import numpy
import pytest

from qlora.data.load import Data, load_data
from qlora.errors import DataError
from qlora.model.loss import IGNORE_INDEX
from qlora.recipe import DataSection
from tests.data.conftest import make_tokenizer

TEXTS = ["a good film", "a bad film", "fine", "dull", "warm and wise", "cold"]
RECORDS = [{"text": text, "label": number % 2} for number, text in enumerate(TEXTS)]
ONE = {"text": "fine", "label": 1}


def loaded(write: Any, tokenizer: Any, records: Any = RECORDS, name: str = "train.jsonl", **section: Any) -> Data:
    values = {"max_length": 64, **section}
    return load_data(DataSection(train=write(name, records), **values), tokenizer, classifies=True)


def test_an_example_is_the_texts_tokens_and_one_more_which_is_the_class(write: Any, tokenizer: Any) -> None:
    data = loaded(write, tokenizer, packing=False)
    assert data.classes == ("0", "1")
    assert data.template is None
    assert len(data.train) == 6
    for row, record in zip(data.train, RECORDS, strict=True):
        assert row.ids[:-1].tolist() == tokenizer(record["text"])["input_ids"]
        assert row.labels[-1] == record["label"]
        assert (row.labels[:-1] == IGNORE_INDEX).all()
    assert "note: 2 classes: 0 3, 1 3" in str(data.report)
    assert data.report.train.target_tokens == 6
    assert data.held_out_prompts(3) == []
    assert "of the class '1'" in str(data.preview(1))


def test_the_tokenizers_own_special_tokens_are_there_and_padding_at_the_end_is_not(write: Any) -> None:
    tokenizer = make_tokenizer(adds_bos=True)
    records = [
        {"text": "a good film<pad><pad>", "label": "a"},
        *({"text": text, "label": "b"} for text in TEXTS),
        ONE | {"label": "a"},
    ]
    data = loaded(write, tokenizer, records, packing=False)
    assert data.train[0].ids[0] == tokenizer.bos_token_id
    assert data.train[0].ids[:-1].tolist() == tokenizer("a good film")["input_ids"]


@pytest.mark.parametrize(
    ("first", "section"),
    [
        ({"sentence": "s", "label": "x"}, {}),
        ({"review": "s", "sentiment": "x"}, {}),
        ({"one": "s", "two": "x"}, {"columns": {"prompt": "one", "completion": "two"}}),
        ({"one": "s", "two": "x", "text": "t"}, {"columns": {"text": "one", "label": "two"}}),
        ({"one": "a", "and": "b", "label": "x"}, {"columns": {"text": "{one} / {and}"}}),
    ],
)  # fmt: skip
def test_texts_and_labels_are_found_by_their_usual_names_or_by_columns(
    write: Any, tokenizer: Any, first: dict[str, str], section: Any
) -> None:
    *_, name = (name for name in first if name not in ("text",))
    records = [first, first, first | {name: "y"}, first | {name: "y"}]
    data = loaded(write, tokenizer, records, packing=False, **section)
    assert data.classes == ("x", "y")
    assert [int(row.labels[-1]) for row in data.train] == [0, 0, 1, 1]
    text = {"one": "a / b" if "and" in first else "s"}.get("one")
    assert data.train[0].ids[:-1].tolist() == tokenizer(text)["input_ids"]


@pytest.mark.parametrize(
    ("labels", "classes"),
    [([10, 9, 2], ("2", "9", "10")), (["b", "a", "C"], ("C", "a", "b")), ([True, False], ("false", "true"))],
)
def test_classes_are_in_the_order_of_numbers_or_of_the_alphabet(
    write: Any, tokenizer: Any, labels: list[Any], classes: tuple[str, ...]
) -> None:
    records = [{"text": text, "label": label} for label in labels for text in TEXTS[:2]]
    assert loaded(write, tokenizer, records).classes == classes


def test_numbers_have_the_names_that_the_recipe_gives_them_in_csv_too(write: Any, tokenizer: Any) -> None:
    names = {"label": {"0": "negative", "1": "positive"}}
    assert loaded(write, tokenizer, labels=names).classes == ("negative", "positive")
    table = "text,label\n" + "".join(f"{record['text']},{record['label']}\n" for record in RECORDS)
    for some in (table, table.replace(",0", ",0.0"), table.replace(",1", ",1.0")):  # as pandas writes them beside a gap
        assert loaded(write, tokenizer, some, "train.csv", labels=names).classes == ("negative", "positive")
    floats = [record | {"label": float(record["label"])} for record in RECORDS]
    assert loaded(write, tokenizer, floats).classes == ("0", "1")
    assert loaded(write, tokenizer, floats, labels={"label": {"0.0": "no", "1": "yes"}}).classes == ("no", "yes")


@pytest.mark.parametrize("adds_end", [False, True])
def test_a_text_that_is_too_long_is_cut_and_keeps_its_class(write: Any, adds_end: bool) -> None:
    from tokenizers import processors

    tokenizer = make_tokenizer()
    if adds_end:
        tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
            single="$A </s>", special_tokens=[("</s>", tokenizer.eos_token_id)]
        )
    records = [{"text": "word " * 40, "label": label} for label in (0, 0, 1, 1)]
    data = loaded(write, tokenizer, records, max_length=12, packing=False)
    for row, record in zip(data.train, records, strict=True):
        assert row.ids[:-1].tolist() == tokenizer(record["text"], truncation=True, max_length=11)["input_ids"]
        assert row.labels[-1] == record["label"]
    assert "4 examples truncated" in str(data.report)
    assert "inside an answer" not in str(data.report)
    with pytest.raises(DataError, match="All 4 examples are too long"):
        loaded(write, tokenizer, records, max_length=12, too_long="drop")


def test_what_is_held_out_is_drawn_and_has_the_classes_of_training(write: Any, tokenizer: Any) -> None:
    data = loaded(write, tokenizer, RECORDS * 4, held_out_fraction=0.25)
    assert data.report.train.records == 18
    assert data.report.held_out.records == 6
    assert "; held out: 0 " in str(data.report)
    other = write("held.jsonl", [ONE, ONE | {"label": 2}, ONE | {"label": 2}])
    with pytest.raises(DataError) as error:
        loaded(write, tokenizer, held_out=other)
    assert str(error.value) == (
        f"Line 2 of '{other}' has the label '2', which no training record has; expected one of 0, 1. In all 2 records have such "
        "labels. Leave it out, or hold out other records."
    )


def test_given_classes_are_kept_and_another_label_is_refused(write: Any, tokenizer: Any) -> None:
    section = DataSection(train=write("train.jsonl", RECORDS))
    data = load_data(section, tokenizer, classifies=True, classes=("1", "0", "2"))
    assert data.classes == ("1", "0", "2")
    assert sorted(numpy.concatenate([row.labels for row in data.train]).tolist())[-1] == 1
    with pytest.raises(DataError, match="has the label '0', which"):
        load_data(section, tokenizer, classifies=True, classes=("1", "2"))


@pytest.mark.parametrize(
    ("bad", "said"),
    [
        ({"label": 1}, "has nothing in 'text'; expected a text"),
        ({"text": " ", "label": 1}, "has nothing in 'text'; expected a text"),
        ({"text": ["a"], "label": 1}, "has a list in 'text'; expected text"),
        ({"text": "a"}, "has nothing in 'label'; expected the label of its class"),
        ({"text": "a", "label": ""}, "has nothing in 'label'; expected the label of its class"),
        ({"text": "a", "label": 0.5}, "has a number (0.5) in 'label'; expected one class, as text or a whole number: a head that"),
        ({"text": "a", "label": ["x"]}, "has a list in 'label'; expected one class"),
    ],
)  # fmt: skip
def test_a_record_without_a_text_or_a_class_is_named(write: Any, tokenizer: Any, bad: Any, said: str) -> None:
    with pytest.raises(DataError) as error:
        loaded(write, tokenizer, [*RECORDS, bad])
    assert str(error.value).startswith("Line 7 of ")
    assert said in str(error.value)
    data = loaded(write, tokenizer, [*RECORDS * 2, bad], on_bad_record="skip")
    assert data.report.train.records == 12
    assert "on_bad_record=skip left out 1 of 13 records" in str(data.report)


@pytest.mark.parametrize(
    ("records", "said"),
    [
        ([ONE] * 4, "All 4 training records have the label '1'; expected two classes at least."),
        ([ONE | {"label": number} for number in range(5)], "The 5 training records have 5 different labels, as 0, 1, 2 and 2 more;"),
        ([ONE | {"label": label} for label in ("0.5", "1.5", "2") * 3], "The labels are numbers such as 0.5; expected names"),
        ([{"text": "a", "review": "b", "label": 1}] * 4, "several that may be its text (text, review)"),
        ([{"title": "a", "label": 1}] * 4, "none that is known as its text"),
        ([{"text": "a", "points": 1}] * 4, "none that is known as its label"),
    ],
)  # fmt: skip
def test_data_that_are_no_classes_are_refused_in_a_sentence(
    write: Any, tokenizer: Any, records: Any, said: str
) -> None:
    with pytest.raises(DataError) as error:
        loaded(write, tokenizer, records)
    assert said in str(error.value)
