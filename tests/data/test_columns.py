"""A form's fields put together from a record's, and the texts that stand for values."""

from __future__ import annotations

from typing import Any

import pytest

from qlora.data.formats import Conversation
from qlora.data.parsing import Parsed, parse
from qlora.data.sources import Record
from qlora.errors import DataError

REVIEWS = [{"title": "Fun", "review": "A {good} film", "meta": {"year": 1999}, "label": label} for label in (0, 1)]


def parsed(records: list[dict[str, Any]], **given: Any) -> Parsed:
    return parse([Record(fields, "x.jsonl", "line", number) for number, fields in enumerate(records, 1)], **given)


def test_a_template_and_labels_make_a_pair() -> None:
    found = parsed(
        REVIEWS,
        columns={"prompt": "{title} ({meta.year}): {review}\nSentiment:", "completion": "label"},
        labels={"label": {"0": "negative", "1": "positive"}},
    )
    pairs = [[turn["content"] for turn in one.messages] for one in found.records if isinstance(one, Conversation)]
    assert pairs == [["Fun (1999): A {good} film\nSentiment:", text] for text in ("negative", "positive")]
    assert not [note for note in found.notes if "not read" in note]


def test_what_a_template_leaves_out_is_named() -> None:
    records = [{**fields, "mood": "calm"} for fields in REVIEWS]
    found = parsed(records, columns={"prompt": "{title}:", "completion": "{review} {label}"})
    assert "fields that are not read: 'meta' (2 records), 'mood' (2 records)" in found.notes


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"columns": {"prompt": "{titel}:", "completion": "review"}}, r"Line 1 .* has no field 'titel', which data\.columns names for 'prompt'\. Did you mean 'title'"),
        ({"columns": {"prompt": "title", "completion": "label"}, "labels": {"label": {"0": "no"}}}, r"Line 2 .* has 1 in 'label', for which data\.labels has no text"),
        ({"columns": {"prompt": "title", "completion": "label"}, "labels": {"lable": {"0": "no"}}}, r"has no field 'lable', which data\.labels names\. Did you mean 'label'"),
        ({"columns": {"prompt": "{meta}:", "completion": "review"}}, r"Line 1 .*has the fields title, label, completion, which are no known form"),
    ],
)  # fmt: skip
def test_a_mistake_is_said_with_its_place(given: dict[str, Any], said: str) -> None:
    with pytest.raises(DataError, match=said):
        parsed(REVIEWS, **given)
