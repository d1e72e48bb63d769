"""Structured output: whether a generated answer is the JSON that was expected.

    exact_match      the whole answer is JSON and equals what is expected, in whatever order an object has its keys
    field_accuracy   right fields / fields that either has, a mean over items: what is missing, wrong or too much counts against it
    valid_json       the whole answer is JSON: nothing stands before or behind it, no key is there twice, no number is NaN

A field is a value with no other inside: ``{"a": {"b": [1, 2]}}`` has two, ``a.b.0`` and ``a.b.1``.

Knows JSON; must not know how a text was made.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from qlora.data.values import Mistake, json_inside, once
from qlora.evaluation.tasks.result import Json
from qlora.evaluation.tasks.task import Asked, Form, Kind, Unusable, column, filled, written
from qlora.files.strangers import json_values


def _ask(fields: Mapping[str, Any], form: Form) -> Asked:
    right = column(fields, form.answer, "the JSON that is right")
    try:
        right = json_inside(right, f"'{form.answer}'") if isinstance(right, str) else right
    except Mistake as mistake:
        raise Unusable(str(mistake)) from None
    return Asked(prompt=filled(form.prompt or "", fields, "the prompt"), gold={"right": right})


def _scores(answer: Json) -> dict[str, float]:
    right = dict(_fields(answer["right"]))
    try:
        found = dict(_fields(json_values(answer["text"], object_pairs_hook=once, parse_constant=_refuse)))
    except (ValueError, RecursionError):
        return dict.fromkeys(STRUCTURED.metrics, 0.0)
    alike = len(right.items() & found.items()) / len(right.keys() | found.keys())
    return {"exact_match": float(alike == 1), "field_accuracy": alike, "valid_json": 1.0}


def _fields(value: Any, path: tuple[str | int, ...] = ()) -> Iterator[tuple[tuple[str | int, ...], object]]:
    """(path, value) of every field. A value stands beside its type, since Python takes true for 1; 1 and 1.0 are one number."""
    if isinstance(value, dict | list) and value:
        for key, inside in value.items() if isinstance(value, dict) else enumerate(value):
            yield from _fields(inside, (*path, key))
    elif isinstance(value, dict | list):
        yield path, type(value)
    else:
        yield path, (isinstance(value, bool), value)


def _refuse(constant: str) -> None:
    raise ValueError(f"{constant} is no JSON")


STRUCTURED = Kind({"exact_match": "higher", "field_accuracy": "higher", "valid_json": "higher"}, _ask, written, _scores)
