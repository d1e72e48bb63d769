"""Each form is detected and named; a record that does not fit is refused by its place."""

from __future__ import annotations

import datetime
import json
import re
from typing import Any

import pytest

from qlora.data.detection import detect_form
from qlora.data.parsing import Parsed, parse
from qlora.data.sources import Record
from qlora.errors import DataError

HI, YO = {"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Yo"}
MESSAGES = {"messages": [HI, YO]}
SHAREGPT = {"conversations": [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Yo"}]}
ALPACA = {"instruction": "Hi", "input": "", "output": "Yo"}
PAIR = {"prompt": "Hi", "completion": "Yo"}
CUT = "Hi \ud83d"
NESTED: dict[str, Any] = {"name": "f"}
for _ in range(100):
    NESTED = {"name": "f", "inner": NESTED}
FORMS = {"messages": MESSAGES, "sharegpt": SHAREGPT, "alpaca": ALPACA, "prompt_completion": PAIR}


def parsed(
    *rows: dict[str, Any],
    form: str = "auto",
    columns: dict[str, str] | None = None,
    on_bad_record: str = "stop",
    pairs: bool = False,
) -> Parsed:
    records = [Record(row, "a.jsonl", "line", n) for n, row in enumerate(rows, 1)]
    return parse(records, form, columns, on_bad_record, pairs=pairs)


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


MISTAKES = [
    ([{"question": "a", "answer": "b"}], r"Line 1 of 'a.jsonl' has the fields question, answer, which are no known form"),
    ([{"a": 1, "b": 2}], r"fields a, b, which are no known form. Name their fields .* The forms are messages \(messages\)"),
    ([{"messages": [HI, {**YO, "weight": 0.5}]}], "has 0.5 as 'weight' of turn 2; a turn is trained or is not"),
    ([{"messages": [HI, {**YO, "weight": 1, "masked": True}]}], "has weight, masked in turn 2, which contradict"),
    ([{"messages": [HI, {**YO, "train_detail": [{"begin_offset": 0, "end_offset": 1, "train": False}]}]}],
     "has 'train_detail' in turn 2, which trains a part of it"),
    ([{**MESSAGES, "weight": 0}], "has the weight 0 for all of it"),
    ([{**MESSAGES, "weight": "0"}], "has the weight 0 for all of it"),
    ([{"text": "Hi", "weight": 0}], "has the weight 0 for all of it"),
    ([{**MESSAGES, "train": False}], "has the train False for all of it"),
    ([{**MESSAGES, "loss": 0}], "has the loss 0 for all of it"),
    ([{**MESSAGES, "masked": True}], "has the masked True for all of it"),
    ([{**MESSAGES, "ignore_loss": True}], "has 'ignore_loss', which may say whether a record .* data.form=messages to train"),
    ([{**PAIR, "sample_weight": 0.5}, PAIR], "has 'sample_weight', which may say .* data.form=prompt_completion to train"),
    ([{"messages": [HI, {**YO, "skip": True}]}], "has 'skip' in turn 2, which may say whether the turn is trained"),
    ([{"messages": [HI, {**YO, "rating": "bad"}]}], "has rating bad in turn 2, .*; set 'train' to false in that turn"),
    ([{"messages": [HI, {**YO, "channel": "analysis"}, YO]}], "has thoughts as turn 2, in the channel analysis"),
    ([{**MESSAGES, "rejected_response": "No"}], "has the form preference, messages with 'rejected_response'. .* data.form=messages"),
    ([{"messages": [HI], "response": "Yo"}], r"turns that end with a question, and beside them response. Set data.columns='\{prompt: messages, completion: response\}'"),
    ([{**ALPACA, "query": "Who?"}], r"has the form alpaca, and beside it query. Set data.columns='\{input: query\}'"),
    ([{**MESSAGES, "available_tools": [{"name": "f"}]}], r"beside it available_tools. Set data.columns='\{tools: available_tools\}'"),
    ([{**MESSAGES, "image_path": "a.png"}], "has 'image_path', which a text model can't see"),
    ([{"prompt": {"role": "prompter", "text": "Hi", "replies": []}}], "one turn of a conversation in its field prompt; .* a tree of answers"),
    ([{"messages": [HI], "reasoning": "Hm"}], "has 'reasoning' beside turns that do not end with its answer"),
    ([{"messages": [HI, {**YO, "ignore": True}]}], "has 'ignore' in turn 2, which may say whether the turn is trained"),
    ([{"messages": [HI, {**YO, "loss_factor": 0.5}]}], "has 'loss_factor' in turn 2, which may say whether"),
    ([{"messages": [HI, {"role": "assistant", "content": [{"type": "text", "text": "Yo", "train": False}]}]}],
     "has 'train' in a part of turn 2's content; here a turn is trained whole"),
    ([{"messages": [{**HI, "images": ["b64"]}, YO]}], "has 'images' in turn 1, which a text model can't see"),
    ([{"messages": [{"role": "user", "content": "<image>\nWhat?"}, YO]}], "has <image> in a question, which a text model"),
    ([{"messages": [{"role": "user", "content": "Picture 1: <img>a.jpg</img> What?"}, YO]}], "has <img>a.jpg</img> in a"),
    ([{**MESSAGES, "system_prompt": "Be kind"}],
     r"has the form messages, and beside it system_prompt. Set data.columns='\{system: system_prompt\}' to read that"),
    ([ALPACA, {**ALPACA, "context": "C"}], r"Line 2 .* beside it context. Set data.columns='\{input: context\}'"),
    ([{**PAIR, "context": "C"}], r"Set data.columns='\{instruction: prompt, output: completion, input: context\}'"),
    ([HI, YO], "Line 1 of 'a.jsonl' is one turn of a conversation .* data.form=text data.columns='{text: content}'"),
    ([{"text": "Hi", "role": "prompter"}], "is one turn of a conversation .* set data.form=text."),
    ([{"data": MESSAGES}], r"has the form messages inside its field data; set data.columns='\{messages: data.messages\}'"),
    ([{**MESSAGES, "kto_tag": False}], r"has the form kto, .* Set data.form=kto data.columns='\{label: kto_tag\}'"),
    ([{**MESSAGES, "label": -1}, {**MESSAGES, "label": 1}], "has the form kto, messages with 'label'"),
    ([{**MESSAGES, "label": "good"}, {**MESSAGES, "label": "bad"}], "has the form kto, messages with 'label'"),
    ([{**MESSAGES, "history": "Hi"}], "has broken JSON in 'history'"),
    ([{**ALPACA, "history": [["q"]]}], r"has a list in the list of 'history'; expected \[question, answer\]"),
    ([{"messages": [{"role": "system", "content": "S"}, HI, YO], "system": "T"}], "has a 'system' text and another one"),
    ([{"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}, YO]}],
     "has a part of type 'image_url' in the content of turn 1, which is no text"),
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
    ([{**ALPACA, "output": ""}], "has an empty 'output'"),
    ([{"messages": [{"role": "usr", "content": "Hi"}]}], r"unknown role 'usr' in turn 1; did you mean 'user'\?"),
    ([{"messages": [HI, {"role": "assistant", "content": 3}]}], r"a number \(3\) in the content of turn 2; expected text"),
    ([{"messages": ["Hi", "Yo"]}], r"has turns that are plain text \(turn 1: Hi\), and nothing that says who speaks"),
    ([{"messages": [HI, 3]}], r"a turn without role and content \(turn 2: 3\)"),
    ([{"messages": [{"role": ["user"], "content": "Hi"}]}], "has a list as the role of turn 1; expected system, user"),
    ([{"messages": [{"role": None, "content": "Hi"}]}], "has null as the role of turn 1"),
    ([{"messages": [{"role": "user", "content": {"text": "Hi"}}]}], "has an object in the content of turn 1"),
    ([{"messages": [{"role": "user", "content": [{"type": "image"}]}]}], "has a part of type 'image' in the content of turn 1"),
    ([{"messages": [{**HI, "name": 3}, YO]}], r"has a number \(3\) in 'name' of turn 1; expected text"),
    ([{"messages": "Hi"}], "has text in 'messages'; expected a list of turns"),
    ([{"messages": None}], "has null in 'messages'; expected a list"),
    ([{"conversations": [*SHAREGPT["conversations"], {"value": "Hi"}]}], r"without role and content \(turn 3: {'value'"),
    ([{"conversations": [{"from": "human"}]}], r"has an empty turn \(turn 1, user\)"),
    ([{"conversations": [{"from": {}, "value": "Hi"}]}], "has an object as the role of turn 1; expected system, user"),
    ([{**SHAREGPT, "system": ["Be kind"]}], "has a list in 'system'; expected text"),
    ([{**SHAREGPT, "tools": "{broken"}], r"has broken JSON in 'tools' \(Expecting"),
    ([{**SHAREGPT, "tools": "[" * 100_000}], r"has broken JSON in 'tools' \(it is nested too deeply\)"),
    ([{**SHAREGPT, "tools": "9" * 5000}], r"has broken JSON in 'tools' \(it has an integer of more than 4,300 digits"),
    ([{**SHAREGPT, "tools": {"name": "f"}}], "has an object in 'tools'; expected a list of objects"),
    ([{**SHAREGPT, "tools": ["f"]}], "has a list with text in 'tools'; expected a list of objects"),
    ([{**SHAREGPT, "tools": [{"function": None}]}], "has a tool with null as its 'function'; expected an object"),
    ([{**SHAREGPT, "tools": [{"name": datetime.date(2024, 7, 26)}]}], "has a date in 'tools'; expected JSON values"),
    ([{**SHAREGPT, "tools": [NESTED]}], "is nested more than 64 levels deep in 'tools'"),
    ([{**PAIR, "completion": None}], "has null in 'completion'; expected text"),
    ([MESSAGES, {"messages": [YO]}, {"messages": []}], r"Line 2 .* begins .* Line 3 .* has no turns. In all, 2 of 3 records have mistakes"),
]  # fmt: skip


@pytest.mark.parametrize(("rows", "sentence"), MISTAKES)
def test_a_wrong_record_is_refused_by_its_place(rows: list[dict[str, Any]], sentence: str) -> None:
    with pytest.raises(DataError, match=sentence):
        parsed(*rows)


LONE = r"has a lone surrogate \(U\+D83D, half of an emoji cut in two, at character 4\) in "


HALVES = [
    ({"text": CUT}, "'text'"),
    ({**PAIR, "prompt": CUT}, "'prompt'"),
    ({**ALPACA, "input": CUT}, "'input'"),
    ({**SHAREGPT, "system": CUT}, "'system'"),
    ({"conversations": [{"from": "human", "value": CUT}]}, "the content of turn 1"),
    ({"messages": [HI, {**YO, "content": CUT}]}, "the content of turn 2"),
    ({"messages": [HI, YO, {**HI, "content": CUT}]}, "the content of turn 3"),  # left off, but counted in tokens
    ({"messages": [{"role": "user", "content": [{"type": "text", "text": CUT}]}]}, "the content of turn 1"),
    ({"messages": [HI, {**YO, "reasoning_content": CUT}]}, "'reasoning_content' of turn 2"),
    ({"messages": [HI, YO], "tools": [{"name": CUT}]}, "'tools'"),
    ({"messages": [HI, YO], "tools": [{"name": "f", "x": [{CUT: 1}]}]}, "'tools'"),
    ({"messages": [HI, YO], "tools": json.dumps([{"name": CUT}])}, "'tools'"),
]  # fmt: skip


@pytest.mark.parametrize(("row", "where"), HALVES)
def test_half_an_emoji_is_refused_wherever_it_becomes_text(row: dict[str, Any], where: str) -> None:
    with pytest.raises(DataError, match=f"^Line 1 of 'a.jsonl' {LONE}{where}; expected text that UTF-8 can hold"):
        parsed(row)
    renamed = {f"my_{name}": value for name, value in row.items()}
    with pytest.raises(DataError, match=LONE):
        parsed(renamed, columns={name: f"my_{name}" for name in row})
    assert parsed({"text": "a whole \U0001f98a", "unread": CUT}).texts == ["a whole \U0001f98a"]


def calling(tool_calls: Any, role: str = "assistant") -> dict[str, Any]:
    return {"messages": [HI, {"role": role, "content": None, "tool_calls": tool_calls}]}


WRONG_CALLS = [
    ({"name": "f", "arguments": {}}, "has an object in 'tool_calls' of turn 2; expected a list of objects"),
    ([None], "has a list with null in 'tool_calls' of turn 2; expected a list of objects"),
    ("f(1)", r"has broken JSON in 'tool_calls' of turn 2 \(Expecting"),
    ("3", r"has a number \(3\) in 'tool_calls' of turn 2"),
    (True, "has true or false in 'tool_calls' of turn 2"),
    ([{"function": None}], "has a call without its function's name in 'tool_calls' of turn 2; expected name and arg"),
    ([{"function": {"name": 3}}], "has a call without its function's name in 'tool_calls' of turn 2"),
    ([{"name": "", "arguments": {}}], "has a call without its function's name"),
    ([{"name": "f", "arguments": [1]}], "has a list as the arguments of 'tool_calls' of turn 2; expected an object"),
    ([{"name": "f", "arguments": "1"}], r"has a number \(1\) as the arguments of 'tool_calls' of turn 2"),
    ([{"name": "f", "arguments": "x=1"}], r"has broken JSON in the arguments of 'tool_calls' of turn 2 \(Exp"),
    ([{"name": "f", "arguments": "[" * 100_000}], r"the arguments of 'tool_calls' of turn 2 \(it is nested too"),
    ([{"name": "f", "arguments": '{"a": %s}' % ("9" * 5000)}], r"\(it has an integer of more than 4,300 digits"),
    ([{"name": "f", "arguments": {"a": CUT}}], f"{LONE}'tool_calls' of turn 2"),
    ([{"name": "f", "arguments": json.dumps({"a": CUT})}], f"{LONE}the arguments of 'tool_calls' of turn 2"),
    ([{"name": "f", "arguments": NESTED}], "is nested more than 64 levels deep in 'tool_calls' of turn 2"),
    ([], r"has an empty turn \(turn 2, assistant\)"),
]  # fmt: skip


@pytest.mark.parametrize(("tool_calls", "sentence"), WRONG_CALLS)
def test_a_malformed_call_is_refused_by_its_place(tool_calls: Any, sentence: str) -> None:
    with pytest.raises(DataError, match=f"^Line 1 of 'a.jsonl' .*{sentence}"):
        parsed(calling(tool_calls))


def test_calls_of_every_well_defined_shape_are_taken_as_one() -> None:
    function = {"name": "f", "arguments": {"a": 1}}
    framed = [{"type": "function", "function": function}]
    text_arguments = {**function, "arguments": json.dumps(function["arguments"])}
    for tool_calls in (
        framed,
        [function],
        [text_arguments],
        json.dumps(framed),
        [{**framed[0], "function": text_arguments}],
    ):
        (one,) = parsed(calling(tool_calls)).conversations
        assert one.messages[1] == {"role": "assistant", "content": "", "tool_calls": framed}
    for name in ("parameters", "args", "input"):  # Llama 3, LangChain, Anthropic
        (one,) = parsed(calling([{"id": "c1", "type": "tool_call", "name": "f", name: {"a": 1}}])).conversations
        assert one.messages[1]["tool_calls"] == [{"id": "c1", **framed[0]}]
    for nothing in ({}, {"arguments": None}, {"arguments": " "}):
        (one,) = parsed(calling([{"name": "f", **nothing}])).conversations
        assert one.messages[1]["tool_calls"][0]["function"] == {"name": "f", "arguments": {}}
    (one,) = parsed(calling([{"id": "call1", "function": {"strict": True, **function}}])).conversations
    assert one.messages[1]["tool_calls"] == [{"id": "call1", "function": {"strict": True, **function}}]
    with pytest.raises(DataError, match="has 'tool_calls' in turn 2, the user's; expected them in the assistant's"):
        parsed(calling(framed, role="user"))
    (one,) = parsed({"messages": [{**HI, "tool_calls": None}, {**YO, "tool_calls": []}]}).conversations
    assert one.messages == (HI, YO)


def test_a_form_that_is_asked_for_is_required() -> None:
    with pytest.raises(DataError, match=r"Line 1 .* has the form alpaca, but data.form is text"):
        parsed(ALPACA, form="text")
    assert parsed({**ALPACA, "text": "T"}, form="text").texts == ["T"]


def talk(one: Any) -> list[tuple[str, str]]:
    return [(message["role"], message["content"]) for message in one.messages]


QA = [("user", "Hi"), ("assistant", "Yo")]


def test_marked_answers_are_kept_and_not_trained_and_what_follows_the_last_trained_one_is_left_off() -> None:
    for no, yes in ((0, 1), ("0", "1"), (0.0, 1.0), ("false", "true")):  # as JSON, CSV and a table with gaps have them
        (one,) = parsed({"messages": [HI, {**YO, "weight": no}, HI, {**YO, "weight": yes}]}).conversations
        assert one.untrained == {0}
    (one,) = parsed({"messages": [HI, {**YO, "weight": 0}, HI, {**YO, "weight": 1}]}).conversations
    assert (talk(one), one.untrained) == ([*QA, *QA], {0})
    (one,) = parsed({"conversations": [*SHAREGPT["conversations"], HI, {**YO, "train": False}]}).conversations
    assert (talk(one), one.untrained, one.unanswered) == (QA, frozenset(), ("Hi", "Yo"))
    assert len(parsed({"messages": [HI, {**YO, "loss": False}]}, MESSAGES).skipped) == 1
    result = parsed({"messages": [{**HI, "weight": 1}, {**YO, "weight": None}]})
    assert talk(result.conversations[0]) == QA
    assert "turns of others are marked as trained in 1 record" in result.notes[0]


PAIR_OF_ANSWERS = {"prompt": "Hi", "chosen": "Yo", "rejected": "No"}
HUMAN = "\n\nHuman: Hi\n\nAssistant:"
NO = {"role": "assistant", "content": "No"}
PREFERENCES = [
    PAIR_OF_ANSWERS,
    {"instruction": "Hi", "chosen": "Yo", "rejected": "No"},
    {"prompt": [HI], "chosen": [YO], "rejected": [NO]},
    {"prompt": "Hi", "chosen": [HI, YO], "rejected": [HI, NO]},
    {"chosen": [HI, YO], "rejected": [HI, NO]},
    {"chosen": f"{HUMAN} Yo", "rejected": f"{HUMAN} No"},
    {"prompt": HUMAN, "chosen": " Yo", "rejected": " No"},
    {"conversations": [{"from": "human", "value": "Hi"}], "chosen": {"from": "gpt", "value": "Yo"}, "rejected": NO},
    {"prompt": {"messages": [HI]}, "chosen": [YO], "rejected": [NO]},
]  # fmt: skip


@pytest.mark.parametrize("row", PREFERENCES)
def test_a_preference_pair_is_refused_by_name_and_trains_its_chosen_side_when_asked(row: dict[str, Any]) -> None:
    with pytest.raises(
        DataError, match=r"Line 1 .* Set objective.name=dpo to learn from both, or data.form=preference to train the ch"
    ):
        parsed(row)
    result = parsed(row, form="preference")
    assert talk(result.conversations[0]) == QA
    assert result.notes == ("data.form=preference trains the chosen answers alone; the rejected ones are not used",)


@pytest.mark.parametrize("form", ["auto", "preference"])
@pytest.mark.parametrize("row", PREFERENCES)
def test_where_answers_are_compared_both_sides_of_every_layout_are_read(row: dict[str, Any], form: str) -> None:
    result = parsed(row, form=form, pairs=True)
    (one,) = result.conversations
    assert one.rejected is not None
    assert talk(one) == QA
    assert talk(one.rejected) == [("user", "Hi"), ("assistant", "No")]
    assert (result.form, result.notes) == ("preference", ())


TURNS = [HI, YO, HI]
NO_PAIRS = [
    (ALPACA, {}, "compares answers, and expected 'chosen' and 'rejected' among them. Give records with a 'chosen'"),
    ({"input": "Hi", "win": "Yo", "lose": "No"}, {}, "Set data.columns='{prompt: input, chosen: win, rejected: lose}' to read it so"),
    ({"prompt": "Hi", "response_0": "Yo", "response_1": "No"}, {}, "Write the better one of response_0, response_1 as 'chosen'"),
    (MESSAGES, {"form": "messages"}, "data.form is messages, and the objective compares a chosen answer with a rejected one"),
    ({"prompt": "Hi", "chosen": "Yo", "rejected": None}, {}, "'rejected'"),
    ({"prompt": "Hi", "chosen": "Yo", "rejected": " "}, {}, "has an empty 'rejected'"),
    ({"chosen": [*TURNS, YO], "rejected": [HI, NO, HI, NO]}, {}, "has other turns before the chosen answer than before the rejected"),
    ({"chosen": [HI, YO], "rejected": TURNS}, {}, "has turns behind the last answer of 'rejected'"),
    ({"chosen": [HI, YO], "rejected": [HI]}, {}, "has no answer at the end of 'rejected'"),
    ({"prompt": "Ho", "chosen": [HI, YO], "rejected": [HI, NO]}, {}, "has a 'prompt' and another question in 'chosen'"),
    ({"question": "Hi", "chosen": "Yo", "rejected": "No"}, {}, "no 'prompt' before the chosen answer"),
]  # fmt: skip


@pytest.mark.parametrize(("row", "asked", "sentence"), NO_PAIRS)
def test_what_is_no_pair_is_refused_in_a_sentence(row: dict[str, Any], asked: dict[str, Any], sentence: str) -> None:
    with pytest.raises(DataError, match=re.escape(sentence)):
        parsed(row, pairs=True, **asked)


def test_a_pair_of_equal_answers_teaches_nothing_and_is_left_out() -> None:
    result = parsed(PAIR_OF_ANSWERS, {**PAIR_OF_ANSWERS, "rejected": "Yo"}, pairs=True)
    assert len(result.conversations) == 1
    assert result.notes == ("left out, as the chosen answer is the rejected one too: 1 record",)


RIVALS = [
    ({"prompt": "Hi", "response_0": "Yo", "response_1": "No", "better_response_id": 0}, "response_0, response_1), of which better_response_id"),
    ({"question": {"full_text": "Hi"}, "answer_0": "Yo", "answer_1": "No", "score_0": 0.1}, "answer_0, answer_1), of which score_0 may"),
    ({"instruction": "Hi", "input": "", "output_1": "Yo", "output_2": "No", "preference": 1}, "output_1, output_2), of which preference may"),
    ({"history": "Hi", "human_ref_A": "Yo", "human_ref_B": "No", "labels": 1}, "human_ref_A, human_ref_B), of which labels may"),
    ({"prompt": "Hi", "responseA": "Yo", "responseB": "No", "vote": "a"}, "responseA, responseB), of which vote may"),
    ({"model_a_response": [HI, YO], "model_b_response": [HI, NO]}, "model_a_response, model_b_response). Write the better"),
    ({"messages": [HI], "response1": "Yo", "response2": "No"}, "response1, response2). Write the better"),
    ({"text": "Hi", "summary_a": "Yo", "summary_b": "No", "choice": 1}, "summary_a, summary_b), of which choice may"),
    ({"prompt": "Hi", "replies": ["Yo", "No"], "ranks": [1, 2]}, "(replies), of which ranks may"),
    ({"instruction": "Hi", "completions": [{"response": "Yo", "score": 3}, {}]}, "(completions), of which score may"),
]  # fmt: skip


@pytest.mark.parametrize(("row", "sentence"), RIVALS)
def test_several_answers_to_one_question_are_named_as_preferences(row: dict[str, Any], sentence: str) -> None:
    said = "Line 1 .* has the form preference, several answers to one question .*" + re.escape(sentence)
    with pytest.raises(DataError, match=said):
        parsed(row)


@pytest.mark.parametrize(
    ("row", "columns"),
    [
        ({"question": "Hi", "option_a": "Yo", "option_b": "No", "answer": "Yo"}, {"prompt": "question", "completion": "answer"}),
        ({"question": "Hi", "answer": "Yo", "answer_1": "No", "answer_2": "Ne"}, {"prompt": "question", "completion": "answer"}),
        ({"prompt": "Hi", "completion": "Yo", "response_1": "No", "response_2": "Ne"}, {}),
        ({"messages": [HI, YO], "response_1": "No", "response_2": "Ne"}, {}),
    ],
)  # fmt: skip
def test_an_answer_beside_numbered_others_is_the_one(row: dict[str, Any], columns: dict[str, str]) -> None:
    if columns:
        with pytest.raises(DataError, match=r"As prompt_completion they are read with data\.columns"):
            parsed(row)
    (one,) = parsed(row, columns=columns).conversations
    assert talk(one) == QA


def test_a_preference_pair_with_another_answer_may_be_read_for_that() -> None:
    row = {**ALPACA, "chosen": "Yes", "rejected": "No"}
    with pytest.raises(DataError, match=r"or data.form=alpaca to read the records as alpaca"):
        parsed(row)
    result = parsed(row, form="alpaca")
    assert talk(result.conversations[0]) == QA
    assert result.notes == ("fields that are not read: 'chosen' (1 record), 'rejected' (1 record)",)
    asked = {"question": "Hi", "chosen": "Yo", "rejected": "No"}
    with pytest.raises(DataError, match=r"data.form=preference and data.columns='\{prompt: question\}'"):
        parsed(asked)
    assert talk(parsed(asked, form="preference", columns={"prompt": "question"}).conversations[0]) == QA
    with pytest.raises(DataError, match="no 'prompt' before the chosen answer"):
        parsed(asked, form="preference")


@pytest.mark.parametrize(("bad", "good"), [(False, True), (0, 1), ("False", "True")])
@pytest.mark.parametrize("form", FORMS)
def test_labelled_answers_are_refused_by_name_and_the_desirable_ones_train_when_asked(
    form: str, bad: Any, good: Any
) -> None:
    rows = [{**FORMS[form], "label": good}, {**FORMS[form], "label": bad}, {**FORMS[form], "label": good}]
    with pytest.raises(
        DataError, match=f"Line 1 .* form kto, {form} with 'label', .* Set data.form=kto .* data.form={form}"
    ):
        parsed(*rows)
    result = parsed(*rows, form="kto")
    assert [one.place for one in result.conversations] == ["line 1 of 'a.jsonl'", "line 3 of 'a.jsonl'"]
    assert result.notes[0].endswith("left out as undesirable: 1 record")
    assert len(parsed(*rows, form=form)) == 3
    assert parsed({**PAIR, "label": 0}, {**PAIR, "label": 3}).form == "prompt_completion"  # classes, no judgement
    assert parsed({"text": "T", "label": 0}).texts == ["T"]


@pytest.mark.parametrize("form", FORMS)
def test_what_stands_beside_the_turns_is_used(form: str) -> None:
    row = {
        **FORMS[form],
        "system": "S",
        "history": [["q", "a"]],
        "functions": [{"name": "f"}],
        "images": [],
        "id": None,
    }
    result = parsed(row)
    assert talk(result.conversations[0]) == [("system", "S"), ("user", "q"), ("assistant", "a"), *QA]
    assert result.conversations[0].tools == ({"name": "f"},)
    assert result.notes == ()
    for name in ("image", "images", "videos", "audio"):
        with pytest.raises(DataError, match=f"Line 1 .* has '{name}', which a text model can't see"):
            parsed({**FORMS[form], name: ["a.png"]})


def test_every_field_that_is_not_read_is_named_once_with_its_records() -> None:
    rows = [{"messages": [HI, {**YO, "time": 3}], "id": n, "topic": "", "\ud83d": 1} for n in range(1, 4)]
    assert parsed(*rows, MESSAGES).notes == (
        "fields that are not read: 'id' (3 records), '?' (3 records), 'time' of turns (3 records)",
    )
    result = parsed(
        {"question": "Hi", "answer": "Yo", "prompt": "x"}, columns={"prompt": "question", "completion": "answer"}
    )
    assert result.notes == ("fields that are not read: 'prompt' (1 record)",)


@pytest.mark.parametrize(
    ("name", "no", "yes"),
    [
        ("is_correct", False, True),
        ("correct", "false", "true"),
        ("rating", "thumbs_down", "thumbs_up"),
        ("reward", -1.0, 1.0),
        ("tests_passed", False, True),
        ("vote", -1, 1),
    ],
)
def test_a_verdict_by_another_name_is_asked_about_where_one_is_bad(name: str, no: object, yes: object) -> None:
    with pytest.raises(
        DataError, match=rf"with '{name}', which says .* data.form=kto data.columns='\{{label: {name}\}}'"
    ):
        parsed({**PAIR, name: yes}, {**PAIR, name: no})
    assert len(parsed({**PAIR, name: yes}, {**PAIR, name: no}, form="kto", columns={"label": name})) == 1
    assert parsed({**PAIR, name: yes}).notes == (f"fields that are not read: '{name}' (1 record)",)


@pytest.mark.parametrize("flags", [{"loss_mask": [0, 1]}, {"train_on_turns": [False]}, {"weights": [0.0, 1.0]}])
def test_flags_of_turns_that_stand_beside_them_are_refused(flags: dict[str, Any]) -> None:
    with pytest.raises(
        DataError, match=rf"Line 1 of 'a.jsonl' has a list '{next(iter(flags))}', which may say of each turn"
    ):
        parsed({**MESSAGES, **flags})


def test_pictures_and_documents_that_an_answer_may_be_about_are_told() -> None:
    said = ["![x](x.png) What?", "data:image/png;base64,iVB", "Is <image> a tag?", "Hi! [x](y)", "data: image"]
    rows = [{"prompt": one, "completion": "Yo"} for one in said]
    assert parsed(*rows).notes == ("pictures are named in 3 records, and read as text: a text model can't see them",)
    row = {**MESSAGES, "documents": [{"text": "A fox."}]}
    with pytest.raises(
        DataError, match=r"beside it documents, which its answer may be about.* data.form=messages to leave"
    ):
        parsed(row)
    assert parsed(row, form="messages").notes == ("fields that are not read: 'documents' (1 record)",)


ACCEPTED = [
    {"conversations": [HI, YO]},
    {"messages": SHAREGPT["conversations"]},
    {"messages": [{"speaker": "Human", "text": "Hi"}, {"speaker": "AI", "text": "Yo"}]},
    {"messages": json.dumps([HI, YO])},
    {"messages": [{"question": "Hi", "answer": "Yo"}]},
    {"messages": [{"input": "Hi", "output": "Yo", "output_with_loss": True}]},
    {"messages": [{"role": "system", "content": " "}, HI, YO]},
    {"messages": [HI, YO], "system": ""},
    {"messages": [{"role": "Prompter", "content": "Hi"}, {"role": " Assistant", "content": "Yo"}], "loss": True, "score": 3},
    {"messages": [{"role": "user", "content": [{"type": "text", "text": "H"}, {"type": "text", "text": "i"}]}, YO]},
    {"prompt": [HI], "completion": [YO]},
]  # fmt: skip


@pytest.mark.parametrize("row", ACCEPTED)
def test_turns_are_read_as_people_have_them(row: dict[str, Any]) -> None:
    assert talk(parsed(row).conversations[0]) == QA


def test_calls_as_openai_had_them_and_an_empty_result() -> None:
    call = {"role": "assistant", "content": None, "function_call": {"name": "f", "arguments": '{"a": 1}'}}
    (one,) = parsed({"messages": [HI, call, {"role": "function", "name": "f", "content": ""}, YO]}).conversations
    twice = [{"name": "f", "arguments": json.dumps(json.dumps({"a": 1}))}]
    assert one.messages[1]["tool_calls"] == parsed(calling(twice)).conversations[0].messages[1]["tool_calls"]
    assert one.messages[1]["tool_calls"][0]["function"] == {"name": "f", "arguments": {"a": 1}}
    assert one.messages[2] == {"role": "tool", "name": "f", "content": ""}
    (one,) = parsed({"messages": [HI, {**YO, "reasoning": "because"}]}).conversations
    assert one.messages[1]["reasoning_content"] == "because"
    (one,) = parsed({**MESSAGES, "system": {"parts": [{"text": "S"}]}}).conversations
    assert talk(one) == [("system", "S"), *QA]
    with pytest.raises(DataError, match="has a turn without role and content"):  # which of them asks?
        parsed({"messages": [{"instruction": "Do", "input": "Hi", "output": "Yo"}]})


HINTS = [
    ("question context answer", "alpaca", "{instruction: question, input: context, output: answer}"),
    ("instruction context response", "alpaca", "{input: context, output: response}"),
    ("system_prompt question response", "prompt_completion", "{system: system_prompt, prompt: question, completion: response}"),
    ("Question Answer", "prompt_completion", "{prompt: Question, completion: Answer}"),
    ("input output", "prompt_completion", "{prompt: input, completion: output}"),
    ("input preferred_output non_preferred_output", "preference", "{prompt: input, chosen: preferred_output, rejected: non_p"),
    ("document", "text", "{text: document}"),
]  # fmt: skip


@pytest.mark.parametrize(("names", "form", "columns"), HINTS)
def test_unknown_columns_are_answered_with_all_that_the_best_form_takes(names: str, form: str, columns: str) -> None:
    with pytest.raises(DataError) as caught:
        parsed(dict.fromkeys(names.split(), "x"))
    assert f"which are no known form. As {form} they are read with data.columns='{columns}" in str(caught.value)


EMPTY = {"messages": [HI, {**YO, "content": ""}]}


def test_bad_records_stop_or_are_skipped_and_counted() -> None:
    rows = [*[MESSAGES] * 90, *[EMPTY] * 7, {"messages": []}]
    with pytest.raises(DataError) as caught:
        parsed(*rows)
    told = str(caught.value)
    assert told.startswith(
        "Line 91 of 'a.jsonl' (and line 92, line 93, line 94, line 95) has an empty turn (turn 2, assistant). "
    )
    assert "In all, 8 of 98 records have mistakes: has an empty turn (7), has no turns (1)." in told
    assert told.endswith("set data.on_bad_record=skip.")
    result = parsed(*rows, on_bad_record="skip")
    assert len(result.conversations) == 90
    assert result.bad.notes == [
        "data.on_bad_record=skip left out 8 of 98 records: has an empty turn (7), has no turns (1)"
    ]
    with pytest.raises(DataError, match=r"In all, 8 of 78 records .* leaves out at most 10% of the records"):
        parsed(*rows[20:], on_bad_record="skip")


@pytest.mark.parametrize(
    ("fields", "sentence"),
    [
        ({"mr": "name[Loch Fyne]", "ref": "There is Loch Fyne."}, r"If 'ref' answers 'mr', set data.columns='{prompt: mr, completion: ref}'"),
        ({"Fecha": "2020-01-02", "Pregunta": "¿Qué?", "Respuesta": "Nada de eso."},
         "If 'Respuesta' answers 'Pregunta', set data.columns='{prompt: Pregunta, completion: Respuesta}'; if others do"),
        ({"translation": {"en": "Hello", "ro": "Salut"}}, "set data.columns='{prompt: translation.en, completion: translation.ro}'"),
        ({"toy": "A text.", "n": "3"}, "If 'toy' is the text to learn, set data.columns='{text: toy}'"),
        ({"my text": "A text."}, "set data.columns='{text: \"my text\"}'"),
        ({"chosen_messages": MESSAGES["messages"], "rejected_messages": MESSAGES["messages"]},
         "As preference they are read with data.columns='{chosen: chosen_messages, rejected: rejected_messages}'"),
        ({"text": "Add two numbers.", "code": "a + b", "id": 3},
         "has a text, and beside it code. Set data.form=text to learn the text alone, or data.columns='{prompt: text, completion: code}'"),
        ({"text": "Everything", "instruction": "Do", "response": "Done", "flags": "B"},
         "has a text, and beside it instruction, response. Set data.form=text .*, or data.columns="),
        ({"n": 1, "m": None}, "Name their fields with data.columns, as in {prompt: question, completion: answer}"),
        # lists of texts are no turns: what cannot be read is not suggested
        ({"input": ["Hi", "Who?"], "output": ["Yo", "Me."]}, "are no known form. Lists stand in input, output: of turns, each"),
        ({"context": "Bob it was.", "question": "Who?", "answers": {"text": ["Bob"], "answer_start": [0]}}, "Lists stand in answers.text"),
        ({"messages": [HI, YO], "systemInstruction": {"parts": [{"text": "S"}]}}, r"data.columns='\{system: systemInstruction\}'"),
        ({"document": "A long text.", "summary": "A text."}, "{prompt: document, completion: summary}"),
        ({"prompt": "Hi", " completion": "Yo"}, "data.columns='{completion: \" completion\"}'"),
        ({"items": [HI, YO]}, "If the turns of a conversation stand in 'items', set data.columns='{messages: items}'"),
        ({"dialogue": ["Hi", "Yo"]}, "Lists stand in dialogue: of turns, each has to say who speaks"),
        # what only names or numbers a record is no text to learn
        ({"uuid": "a-very-long-name-of-a-record", "file_path": "an/other/long/name", "toy": "A text."}, "If 'toy' is the text to learn"),
    ],
)  # fmt: skip
def test_other_names_are_answered_with_the_line_to_write(fields: dict[str, Any], sentence: str) -> None:
    with pytest.raises(DataError, match=sentence):
        parsed(fields)


def test_what_was_suggested_works() -> None:
    """Also of fields inside another, whose name counts as read."""
    rows = [{"translation": {"en": f"Hello {n}", "ro": f"Salut {n}"}, "id": n} for n in range(20)]
    columns = {"prompt": "translation.en", "completion": "translation.ro"}
    result = parsed(*rows, columns=columns)
    assert [message["content"] for message in result.conversations[3].messages] == ["Hello 3", "Salut 3"]
    assert result.notes == ("fields that are not read: 'id' (20 records)",)
    lacking = [*rows, {"translation": {"en": "Hello"}}]
    with pytest.raises(DataError, match=r"Line 21 of .* lacks completion of the form prompt_completion"):
        parsed(*lacking, columns=columns)
    assert len(parsed(*lacking, columns=columns, on_bad_record="skip")) == 20
    with pytest.raises(DataError, match=r"has no field 'translation.de', which data.columns names for 'prompt'"):
        parsed(*rows, columns={"prompt": "translation.de", "completion": "id"})


def test_a_question_and_its_answer_in_one_turn() -> None:
    """As Firefly and ms-swift write them."""
    pairs = [{"human": "Hi", "assistant": "Yo"}, {"human": "Who?", "assistant": "Me.", "weight": 0}]
    fields = {"conversation": [*pairs, {"human": "Sure?", "assistant": "Yes."}], "system": "Be brief."}
    with pytest.raises(DataError, match=r"As messages they are read with data.columns='{messages: conversation}'"):
        parsed(fields)
    (one,) = parsed(fields, columns={"messages": "conversation"}).conversations
    said = [(message["role"], message["content"]) for message in one.messages]
    assert said == [
        ("system", "Be brief."),
        *[
            ("user", "Hi"),
            ("assistant", "Yo"),
            ("user", "Who?"),
            ("assistant", "Me."),
            ("user", "Sure?"),
            ("assistant", "Yes."),
        ],
    ]
    assert one.untrained == {1}
    with pytest.raises(DataError, match="has a turn without role and content"):
        parsed({"messages": [{"human": "Hi"}]})


def test_parts_of_a_content_by_their_types() -> None:
    """Reasoning and calls inside the content, as LLaMA-Factory and Anthropic write them; what a model cannot see is refused."""
    answer = [
        {"type": "reasoning", "value": "It is cold. "},
        {"type": "thinking", "thinking": "So I look."},
        {"type": "text", "value": "Let me see."},
        {"type": "tool_call", "value": '{"name": "weather", "arguments": {"city": "Oslo"}}'},
        {"type": "tool_use", "id": "call_1", "name": "clock", "input": {"zone": "CET"}},
    ]
    turns = [
        {"role": "user", "content": [{"type": "text", "value": "Cold?"}]},
        {"role": "assistant", "content": answer},
    ]
    (one,) = parsed({"messages": turns}).conversations
    assert one.messages[0]["content"] == "Cold?"
    said = one.messages[1]
    assert (said["content"], said["reasoning_content"]) == ("Let me see.", "It is cold. So I look.")
    assert [(call["function"]["name"], call["function"]["arguments"]) for call in said["tool_calls"]] == [
        ("weather", {"city": "Oslo"}),
        ("clock", {"zone": "CET"}),
    ]
    for part in ({"type": "image", "text": "a.png"}, {"type": "tool_call", "value": "f(1)"}, {"type": "text"}):
        with pytest.raises(DataError, match=r"part of type '(image|text)'|broken JSON in a call of turn 2"):
            parsed({"messages": [turns[0], {"role": "assistant", "content": [part]}]})


def test_reasoning_beside_the_turns_or_twice_is_read_once() -> None:
    thought = {**YO, "reasoning_content": "Hm"}
    twice = {**YO, "content": "<think>\nHm\n</think>\n\nYo"}
    for row in (
        {**MESSAGES, "reasoning": "Hm"},
        {"messages": [HI, {**YO, "cot": "Hm"}]},
        {"messages": [HI, {**twice, "reasoning": "Hm"}]},
        {"prompt": "Hi", "completion": twice["content"], "reasoning": "Hm"},
    ):
        assert parsed(row).conversations[0].messages == (HI, thought)
    result = parsed({**PAIR, "reasoning": "on"})
    assert result.conversations[0].messages == (HI, YO)
    assert result.notes == ("fields that are not read: 'reasoning' (1 record)",)


def test_calls_that_a_pair_has_as_its_answer() -> None:
    """As xLAM has them; an answer of JSON is text where no function may be called."""
    calls = [{"name": "f", "arguments": {"a": 1}}, {"name": "g", "arguments": {}}]
    for answer in (json.dumps(calls), calls):
        (one,) = parsed({"prompt": "Hi", "completion": answer, "tools": '[{"name": "f"}]'}).conversations
        assert [call["function"] for call in one.messages[1]["tool_calls"]] == calls
    for row in ({"completion": json.dumps(calls)}, {"completion": "[1]", "tools": [{"name": "f"}]}):
        (one,) = parsed({"prompt": "Hi", **row}).conversations
        assert one.messages[1] == {"role": "assistant", "content": row["completion"]}


def test_null_arguments_are_told() -> None:
    (note,) = parsed(calling([{"name": "f", "arguments": {"a": None}}])).notes
    assert note == "arguments of calls are null in 1 record, and learnt so"


def test_thoughts_and_refusals_of_other_providers() -> None:
    gemini = {"role": "model", "parts": [{"text": "Hm.", "thought": True}, {"text": "Yo"}]}
    (one,) = parsed({"messages": [HI, gemini]}).conversations
    assert one.messages[1] == {**YO, "reasoning_content": "Hm."}
    for refused in ({"content": None, "refusal": "No."}, {"content": [{"type": "refusal", "refusal": "No."}]}):
        (one,) = parsed({"messages": [HI, {"role": "assistant", **refused}]}).conversations
        assert one.messages[1] == {"role": "assistant", "content": "No."}


def test_nothing_that_a_record_says_is_lost_on_its_way() -> None:
    tool = {"name": "f", "parameters": {}}
    (one,) = parsed({"messages": [{**HI, "tools": [tool]}, YO]}).conversations
    assert one.tools == (tool,)
    openai = {"input": {"messages": [HI], "tools": [tool]}, "preferred_output": [YO], "non_preferred_output": [HI]}
    columns = {"prompt": "input", "chosen": "preferred_output", "rejected": "non_preferred_output"}
    (one,) = parsed(openai, form="preference", columns=columns).conversations
    assert (one.messages, one.tools) == ((HI, YO), (tool,))
    with pytest.raises(DataError, match="As preference they are read"):
        parsed(openai)
    (one,) = parsed({**PAIR, "reasoning": "Hm"}).conversations
    assert one.messages == (HI, {**YO, "reasoning_content": "Hm"})
    (one,) = parsed({**MESSAGES, "system": [{"text": "Be kind"}]}).conversations
    assert one.messages[0] == {"role": "system", "content": "Be kind"}
    result = parsed({"messages": [{**HI, "thinking": "Hm"}, {**YO, "reasoning": "Well", "thinking": "Other"}]})
    assert result.conversations[0].messages == (HI, {**YO, "reasoning_content": "Well"})
    assert result.notes == ("fields that are not read: 'thinking' of turns (1 record)",)
    with pytest.raises(DataError, match="has a 'prompt' and another question in 'chosen'"):
        parsed({"prompt": "Bye", "chosen": [HI, YO], "rejected": [HI, YO]}, form="preference")
    parsed({**MESSAGES, "system_prompt": "Hi"})  # said in the turns already


@pytest.mark.parametrize(
    ("text", "kind"),
    [
        ("Q: What?\nA: That.", "questions with their answers"),
        ("### Human: Hi### Assistant: Yo", "questions with their answers"),
        ("<|im_start|>user\nHi<|im_end|>", "questions with their answers"),
        ("a\tb\nc\td\ne\tf\n", "a table"),
        ("a | b||x\nc||y\nd | e | f||z\n", "pairs with || between them"),
        ("Hi\nYo\n\nBye\nSee you\n\nHow?\nSo", "pairs of lines"),
        ("One line.\n\nA second\nof two.\n\nA third.\n\nThe end.", None),
        ('{"messages": [{"role": "user", "content": "Hi"}]}', "records (as .json"),
        ('data = [\n  {\n    "question": "What?",\n    "sql": "SELECT"\n  }\n]', "records (as .json"),
        ("import os\n\n\ndef f(x):\n    return x\n", "code"),
        ("He said: hello.\nThen she left;\nand it rained, as usual.\nNobody came.", None),
    ],
)
def test_a_text_that_looks_like_something_else_is_told(text: str, kind: str | None) -> None:
    (note,) = parsed({"text": text}).notes or ("",)
    assert (f"of the one text, 1 looks like {kind}" in note) if kind else not note


@pytest.mark.parametrize(
    ("pairs", "said"),
    [
        ([("Who? ->", " Me.\n"), ("Why? -> ", " So.\n")], "nearly all questions with '->' end"),
        ([("Who?\n\n###\n\n", " Me END"), ("Why?\n\n###\n\n", " So END")], "nearly all questions with '###' and answers with ' END' end"),
        ([("Who?", "In THE END"), ("Why?", "So")], None),
        ([("a -> b ->", "c"), ("Who?", "Me")], None),
        ([("Who?", "Me."), ("Why?", "So.")], None),
    ],
)  # fmt: skip
def test_separators_of_older_fine_tuning_are_told(pairs: list[tuple[str, str]], said: str | None) -> None:
    result = parsed(*({"prompt": prompt, "completion": completion} for prompt, completion in pairs))
    assert (said in result.notes[0]) if said else not result.notes
