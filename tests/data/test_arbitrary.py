"""Whatever JSON a record holds, loading it gives data or a sentence, and never another exception."""

from __future__ import annotations

import contextlib
import copy
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from qlora.data.load import load_data
from qlora.errors import DataError
from qlora.recipe import DataSection
from tests.data import conftest as families
from tests.data.conftest import make_tokenizer

CALL = {"id": "call1", "type": "function", "function": {"name": "f", "arguments": {"a": [1]}}}
TOOLS = [{"type": "function", "function": {"name": "f", "parameters": {"type": "object"}}}]
RECORDS: list[Any] = [
    {
        "messages": [
            {"role": "system", "content": "S"},
            {"role": "user", "content": [{"type": "text", "text": "Hi"}], "name": "me"},
            {"role": "assistant", "content": None, "tool_calls": [CALL], "reasoning_content": "R"},
            {"role": "tool", "content": "20", "tool_call_id": "call1"},
            {"role": "assistant", "content": "Yo"},
            {"role": "user", "content": "Bye"},
        ],
        "tools": TOOLS,
    },
    {
        "conversations": [
            {"from": "human", "value": "Hi"},
            {"from": "function_call", "value": json.dumps({"name": "f", "arguments": {"a": 1}})},
            {"from": "observation", "value": "20"},
            {"from": "gpt", "value": "Yo"},
        ],
        "system": "S",
        "tools": json.dumps(TOOLS),
    },
    {"instruction": "Hi", "input": "there", "output": "Yo", "system": "S"},
    {"prompt": "Hi", "completion": "Yo"},
    {"text": "Hello there"},
]
TEXTS = st.text(max_size=6) | st.sampled_from(
    [
        *("\ud83d", "Hi \udc00", "", " ", "\x00", "user", "assistant", "tool", "gpt", "function_call", "</s>"),
        *(
            '[{"name": "f"}]',
            '{"name": "f", "arguments": "{}"}',
            '{"name": "\\ud83d", "arguments": {}}',
            "null",
            "[" * 9999,
        ),
        *("9" * 5000, '{"a": %s}' % ("9" * 5000)),
    ]
)
VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | TEXTS,
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(
            TEXTS | st.sampled_from(["name", "arguments", "function", "role", "content"]), inner, max_size=3
        )
    ),
    max_leaves=6,
)
TOKENIZERS = {name: make_tokenizer(getattr(families, name)) for name in ("CHATML", "TOOLS", "GEMMA", "GENERATION")}


def places(value: Any, place: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """The way to every value inside a value, the outermost first."""
    yield place
    inner = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, one in inner:
        yield from places(one, (*place, key))


def changed(value: Any, place: tuple[Any, ...], new: Any) -> Any:
    if not place:
        return new
    value = copy.deepcopy(value)
    at = value
    for key in place[:-1]:
        at = at[key]
    at[place[-1]] = new
    return value


@st.composite
def records(draw: Any) -> Any:
    """A record of one of the forms in which one or two values, at any depth, are any JSON."""
    record = draw(st.sampled_from(RECORDS))
    for _ in range(draw(st.integers(1, 2))):
        record = changed(record, draw(st.sampled_from(list(places(record)))), draw(VALUES))
    return record


def load(folder: Path, record: Any, name: str, **fields: Any) -> None:
    path = folder / "a.jsonl"
    path.write_text(json.dumps(record) + "\n", encoding="utf-8")
    data = load_data(DataSection(train=str(path), held_out=str(path), max_length=1024, **fields), TOKENIZERS[name])
    assert str(data.preview(0))
    assert str(data.report)
    data.held_out_prompts(1)
    json.dumps(data.report.as_dict()).encode()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("arbitrary")


@pytest.mark.parametrize("name", TOKENIZERS)
@pytest.mark.parametrize("record", RECORDS, ids=lambda record: next(iter(record)))
def test_the_records_are_good_before_they_are_changed(folder: Path, record: Any, name: str) -> None:
    load(folder, record, name)


@settings(max_examples=120, deadline=None)
@given(records(), st.sampled_from(sorted(TOKENIZERS)), st.sampled_from(["auto", "all"]))
@example({"text": "\ud83d"}, "CHATML", "auto")
@example({"messages": [RECORDS[0]["messages"][1], {"role": "assistant", "tool_calls": [None]}]}, "TOOLS", "auto")
def test_only_our_own_sentences_come_out(folder: Path, record: Any, name: str, train_on: str) -> None:
    with contextlib.suppress(DataError):
        load(folder, record, name, train_on=train_on)


@settings(max_examples=100, deadline=None)
@given(
    st.text(alphabet='[]{}",:0123456789-e.\\ud truefalsn\n', max_size=40),
    st.sampled_from([".json", ".jsonl", ".csv", ".txt"]),
)
def test_only_our_own_sentences_come_out_of_broken_files(folder: Path, content: str, suffix: str) -> None:
    path = folder / f"a{suffix}"
    path.write_text(content, encoding="utf-8")
    with contextlib.suppress(DataError):
        load_data(DataSection(train=str(path), max_length=64), TOKENIZERS["CHATML"])
