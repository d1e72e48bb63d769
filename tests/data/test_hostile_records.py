"""Records of any size, depth and spelling: data or a sentence, in seconds, and never another exception."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from qlora.data.load import Data, load_data
from qlora.errors import DataError
from qlora.recipe import DataSection
from tests.data import conftest as families
from tests.data.conftest import make_tokenizer

TALK = '[{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Yo"}]'
TOOL = '{"type": "function", "function": {"name": "f", "parameters": %s}}'
MEGABYTE = 2**20


def load(path: Path, content: str | bytes, template: str = families.CHATML, **fields: Any) -> Data:
    path.write_bytes(content if isinstance(content, bytes) else content.encode("utf-8", "surrogatepass"))
    return load_data(DataSection(train=str(path), **{"max_length": 64, **fields}), make_tokenizer(template))


REFUSED = {
    "a deep value": ('{"text": ' + "[" * 100_000 + "]" * 100_000 + "}", "nested too deeply|lists"),
    "a deep text": ('{"messages": ' + "[" * 900 + "]" * 900 + "}", "turn without role|has a list"),
    "a key twice": ('{"text": "lost", "text": "hello"}', "names 'text' twice in one object"),
    "NaN for text": ('{"text": NaN}', "a number"),
    "half a character as it is": ('{"text": "\ud83d"}', "not UTF-8"),
    "half a character in a key": ('{"\\ud83d": 1}', "no known form"),
    "many fields, none known": (json.dumps({f"field{n}": n for n in range(200_000)}), "and 199988 more"),
    "a field of a megabyte": (json.dumps({"x" * MEGABYTE: 1}), "no known form"),
    "a role of a megabyte": (json.dumps({"messages": [{"role": "x" * MEGABYTE, "content": "y"}]}), "unknown role"),
    "many turns without content": (json.dumps({"messages": [{"role": "user"}] * 100_000}), "empty turn"),
    "no object": ("1e999", "is a number"),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_read_is_said(tmp_path: Path, name: str) -> None:
    content, expected = REFUSED[name]
    with pytest.raises(DataError, match=expected) as caught:
        load(tmp_path / "a.jsonl", content + "\n")
    assert len(str(caught.value)) < 4000
    str(caught.value).encode("utf-8", "surrogatepass")


READ = {
    "many fields beside": json.dumps({f"field{n}": n for n in range(100_000)} | {"text": "hello"}),
    "numbers beside": '{"text": "hello", "score": 1e999, "other": NaN, "less": -Infinity, "huge": 1' + "0" * 4000 + "}",
    "deep values beside": '{"text": "hello", "meta": ' + "[" * 500 + "]" * 500 + "}",
    "controls": json.dumps({"text": "hello\0\x1b[2J\u202e\u2028\ufeff"}),
}


@pytest.mark.parametrize("name", READ)
def test_what_is_beside_the_point_is_not_read(tmp_path: Path, name: str) -> None:
    data = load(tmp_path / "a.jsonl", READ[name] + "\n")
    assert data.tokenizer.decode(data.train[0].ids).startswith("hello")
    shown = str(data.preview(0))
    assert not {"\0", "\x1b", "\u202e"} & set(shown)


def test_a_line_of_ten_megabytes(tmp_path: Path) -> None:
    """Half a megabyte of it an answer: a tokenizer takes seconds for each."""
    talk = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "fox " * (MEGABYTE // 8)}]
    record = {"messages": talk, "notes": "ü" * (10 * MEGABYTE // 6)}
    data = load(tmp_path / "a.jsonl", json.dumps(record) + "\n", max_length=1024)
    assert (tmp_path / "a.jsonl").stat().st_size > 10 * MEGABYTE
    assert data.report.train.truncated == 1
    assert data.report.train.truncated_tokens > 100_000


@pytest.mark.parametrize("template", [families.CHATML, families.TOOLS], ids=["told as text", "told as tools"])
def test_numbers_that_json_has_not_reach_the_template_as_python_writes_them(tmp_path: Path, template: str) -> None:
    """1e999 in a tool is infinity to Python, and goes through the process that renders as such."""
    tool = TOOL % '{"maximum": 1e999, "minimum": NaN, "default": 1.0, "n": -0.0, "big": 12345678901234567890123}'
    call = '{"type": "function", "function": {"name": "f", "arguments": {"x": -1e999}}}'
    talk = f'[{{"role": "user", "content": "Hi"}}, {{"role": "assistant", "tool_calls": [{call}]}}]'
    data = load(tmp_path / "a.jsonl", f'{{"messages": {talk}, "tools": [{tool}]}}\n', template, max_length=2048)
    text = data.tokenizer.decode(data.train[0].ids)
    assert "-Infinity" in text
    if template is families.CHATML:
        assert (
            '{"maximum": Infinity, "minimum": NaN, "default": 1.0, "n": -0.0, "big": 12345678901234567890123}' in text
        )


def test_a_conversation_of_many_turns(tmp_path: Path) -> None:
    turns = [{"role": ("user", "assistant")[n % 2], "content": str(n)} for n in range(600)]
    data = load(tmp_path / "a.jsonl", json.dumps({"messages": turns}) + "\n", max_length=20_000)
    assert data.report.train.examples == 1
    assert data.report.train.target_tokens > 600
