"""Strangers' JSON and YAML: what their own libraries read, or a fault; and what a message shows of it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from qlora.files.strangers import Fault, json_object, read_object, shown, yaml_values


def test_no_file_is_none_and_any_other_is_an_object_or_a_fault(tmp_path: Path) -> None:
    place = tmp_path / "a.json"
    assert read_object(place) is None
    place.write_text('{"a": [1, null]}', encoding="utf-8")
    assert read_object(place) == {"a": [1, None]}
    for content, most, said in (
        ("", 9, "no JSON"),
        ("[]", 9, "holds list"),
        ("{}" * 9, 9, "18 bytes; expected at most 9"),
    ):
        place.write_text(content, encoding="utf-8")
        with pytest.raises(Fault, match=said):
            read_object(place, most)
    with pytest.raises(Fault, match="no ordinary file"):
        read_object(tmp_path)


def test_yaml_of_a_recipe_knows_its_lines() -> None:
    text = "data: {train: a.jsonl, limit: 5}\nx:\n- a: 2024-01-01\n  b: ~\n"
    values, lines = yaml_values("\ufeff" + text)
    assert values == yaml.safe_load(text)
    assert (lines["data", "limit"], lines["x", "0", "b"]) == (1, 4)


@settings(max_examples=40, deadline=None, database=None, derandomize=True)
@given(st.recursive(st.none() | st.booleans() | st.integers() | st.floats() | st.text() | st.binary(), st.lists))
def test_what_is_shown_of_a_value_is_short_and_printable(value: object) -> None:
    assert len(shown(value)) < 800
    assert shown(value).isprintable()


@settings(max_examples=100, deadline=None, database=None, derandomize=True)
@given(st.binary(max_size=60) | st.text(alphabet='{}[]":,0123456789eE+-.aNI\\ud', max_size=60).map(str.encode))
def test_json_is_what_the_json_module_reads_or_a_fault(content: bytes) -> None:
    try:
        values = json_object(content)
    except Fault:
        return
    assert str(values) == str(json.loads(content))


@settings(max_examples=150, deadline=None, database=None, derandomize=True)
@given(st.text(alphabet="{}[]\"',:?-&*!|>#\n ab01<=.~%", max_size=40))
def test_yaml_is_what_pyyaml_reads_or_a_fault(text: str) -> None:
    try:
        values, _ = yaml_values(text)
    except Fault:
        return
    assert str(values) == str(yaml.safe_load(text))
