"""Each form is detected and named; a record that does not fit is refused by its place."""

from __future__ import annotations

from typing import Any

import pytest

from qlora.data.formats import Parsed, detect_form, parse
from qlora.data.sources import Record
from qlora.errors import DataError

HI, YO = {"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Yo"}
MESSAGES = {"messages": [HI, YO]}
SHAREGPT = {"conversations": [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Yo"}]}
ALPACA = {"instruction": "Hi", "input": "", "output": "Yo"}
PAIR = {"prompt": "Hi", "completion": "Yo"}
FORMS = {"messages": MESSAGES, "sharegpt": SHAREGPT, "alpaca": ALPACA, "prompt_completion": PAIR}


def parsed(*rows: dict[str, Any], form: str = "auto", columns: dict[str, str] | None = None) -> Parsed:
    return parse([Record(row, "a.jsonl", "line", n) for n, row in enumerate(rows, 1)], form, columns)


@pytest.mark.parametrize("form", FORMS)
def test_every_chat_form_gives_the_same_conversation(form: str) -> None:
    assert detect_form(FORMS[form]) == form
    result = parsed({**FORMS[form], "category": 3})
    assert result.form == form
    assert result.conversations[0].messages == (HI, YO)


def test_alpaca_and_sharegpt_take_their_optional_fields() -> None:
    (one,) = parsed({**ALPACA, "input": "there", "system": "Be kind"}).conversations
    assert [m["content"] for m in one.messages] == ["Be kind", "Hi\n\nthere", "Yo"]
    (one,) = parsed({**ALPACA, "input": None}).conversations
    assert one.messages == (HI, YO)
    (one,) = parsed({**SHAREGPT, "system": "Be kind", "tools": '[{"name": "f"}]'}).conversations
    assert one.messages[0] == {"role": "system", "content": "Be kind"}
    assert one.tools == ({"name": "f"},)
    (one,) = parsed({"messages": [{"role": "user", "content": [{"type": "text", "text": "Hi"}]}, YO]}).conversations
    assert one.messages == (HI, YO)


def test_columns_rename_fields() -> None:
    row = {"question": "Hi", "answer": "Yo", "prompt": "not this"}
    result = parsed(row, columns={"prompt": "question", "completion": "answer"})
    assert result.form == "prompt_completion"
    assert result.conversations[0].messages == (HI, YO)
    swapped = parsed({"prompt": "Yo", "completion": "Hi"}, columns={"prompt": "completion", "completion": "prompt"})
    assert swapped.conversations[0].messages == (HI, YO)
    with pytest.raises(DataError, match=r"maps 'promt', which is no form's field. Did you mean 'prompt'\?"):
        parsed(row, columns={"promt": "question"})
    with pytest.raises(DataError, match=r"Line 1 .* no field 'qestion'.* Did you mean 'question'\?"):
        parsed(row, columns={"prompt": "qestion"})
    with pytest.raises(DataError, match="no field 'contxt'"):
        parsed(ALPACA, columns={"input": "contxt"})


def test_unanswered_turns_are_left_off_and_kept_for_the_count() -> None:
    result = parsed({"messages": [HI, YO, HI]}, {"messages": [HI]}, MESSAGES)
    assert [one.messages for one in result.conversations] == [(HI, YO), (HI, YO)]
    assert result.conversations[0].unanswered == ("Hi",)
    assert [one.unanswered for one in result.skipped] == [("Hi",)]
    assert len(result) == 3


@pytest.mark.parametrize(
    ("rows", "sentence"),
    [
        (
            [{"question": "a", "answer": "b"}],
            r"Line 1 of 'a.jsonl' has the fields question, answer, which are no known form",
        ),
        ([MESSAGES, ALPACA], r"Line 2 of 'a.jsonl' has the form alpaca, but line 1 of 'a.jsonl' was read as messages"),
        ([MESSAGES, {"messages": "Hi"}], r"Line 2 .* has text in 'messages'; expected a list"),
        ([PAIR, {"prompt": "Hi"}], "Line 2 .* lacks completion of the form prompt_completion; its fields are prompt"),
        ([{"text": "a"}, {"text": " "}], "Line 2 .* has an empty 'text'"),
        ([{"text": 3}], r"has a number \(3\) in 'text'; expected text"),
        ([{"messages": []}], "has no turns"),
        ([{"messages": [YO]}], "begins with the assistant; expected a user's turn first"),
        ([{"messages": [{"role": "system", "content": "S"}, YO]}], "begins with the assistant"),
        ([{"messages": [HI, {"role": "assistant", "content": " "}]}], r"has an empty turn \(turn 2, assistant\)"),
        ([{"messages": [{"role": "user", "content": None}, YO]}], r"has an empty turn \(turn 1, user\)"),
        ([{**ALPACA, "output": ""}], r"has an empty turn \(turn 2, assistant\)"),
        ([{"messages": [{"role": "usr", "content": "Hi"}]}], r"unknown role 'usr' in turn 1; did you mean 'user'\?"),
        ([{"messages": [HI, {"role": "assistant", "content": 3}]}], r"a number \(3\) as the content of turn 2"),
        ([{"messages": [HI, "Yo"]}], r"a turn without role and content \(turn 2: Yo\)"),
        ([{**SHAREGPT, "tools": "{broken"}], "'tools' field that is not JSON"),
        ([{**PAIR, "completion": None}], "has null in 'completion'; expected text"),
        ([MESSAGES, {"messages": [YO]}, {"messages": []}], r"Line 2 .* begins .* 1 more record has a mistake"),
    ],
)
def test_a_wrong_record_is_refused_by_its_place(rows: list[dict[str, Any]], sentence: str) -> None:
    with pytest.raises(DataError, match=sentence):
        parsed(*rows)


def test_a_form_that_is_asked_for_is_required() -> None:
    with pytest.raises(DataError, match=r"Line 1 .* has the form alpaca, but .*read as text"):
        parsed(ALPACA, form="text")
    assert parsed({**ALPACA, "text": "T"}, form="text").texts == ["T"]
