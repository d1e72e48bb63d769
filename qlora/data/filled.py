"""Nulls that Arrow filled in: which they are, and records without them.

A table's column has one type, so objects in the same place are given each other's keys. The arguments of two calls,
``{"city": "Oslo"}`` and ``{"a": 1}``, come back as ``{"city": "Oslo", "a": null}`` and ``{"city": null, "a": 1}``: from
Parquet, from the hub, and from JSON lines that were written from either. Learnt so, a model gives arguments that no call had.

The rule: inside a record's fields, a key that is null is dropped where other objects in the same place have a value for it.

    a table    has a type for that value; a key of the type null is null in every row, so that somebody gave it: it stays
    a file     counts as written from a table when all objects in the same place have the same keys, everywhere in it;
               otherwise nothing was filled in and every null stays, and so does a key that is null in every row

Where the record's own tools give a function's schema, that decides more: an argument for which it allows null stays, and a
null for one that it does not name is another function's, and goes.

Knows JSON and Arrow's types; must not know a form.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, KeysView
from typing import Any, TypeAlias

from qlora.data.values import DEEPEST
from qlora.files.strangers import JsonObject

Place: TypeAlias = tuple[str | None, ...]
"""Where in a record: keys, and None for whichever item of a list."""


def filled_in_table(features: Any) -> set[Place]:
    """The keys that Arrow may have filled in, by the ``features`` of a `datasets` table."""
    import pyarrow as pa

    found: set[Place] = set()

    def walk(kind: Any, path: Place) -> None:
        if pa.types.is_struct(kind):
            for inner in kind:
                if not pa.types.is_null(inner.type):
                    found.add((*path, inner.name))
                    walk(inner.type, (*path, inner.name))
        elif pa.types.is_list(kind) or pa.types.is_large_list(kind) or pa.types.is_fixed_size_list(kind):
            walk(kind.value_type, (*path, None))

    for column in features.arrow_schema:
        walk(column.type, (column.name,))
    return found


def filled_in_file(records: Iterable[JsonObject]) -> set[Place]:
    """The keys that are null in some places and not in others, if all of the file looks as if it came from a table."""
    keys: dict[Place, KeysView[str]] = {}
    valued: set[Place] = set()
    null: set[Place] = set()

    def alike(value: object, path: Place) -> bool:
        if len(path) > DEEPEST:
            return True
        if isinstance(value, list):
            return all(alike(inner, (*path, None)) for inner in value)
        if not isinstance(value, dict):
            return True
        if keys.setdefault(path, value.keys()) != value.keys():
            return False
        for key, inner in value.items():
            (null if inner is None else valued).add((*path, key))
        return all(alike(inner, (*path, key)) for key, inner in value.items())

    if not all(alike(record, ()) for record in records):
        return set()
    return {path for path in null & valued if len(path) > 1}


def without(filled: set[Place], fields: JsonObject) -> JsonObject:
    """A record's fields without the nulls at ``filled``; the fields themselves stay."""
    functions = _functions(fields)

    def clean(value: object, path: Place, schema: JsonObject) -> object:
        if len(path) > DEEPEST:
            return value
        if isinstance(value, list):
            return [clean(inner, (*path, None), _object(schema.get("items"))) for inner in value]
        if not isinstance(value, dict):
            return value
        declared = _object(schema.get("properties"))
        kept = {}
        for key, inner in value.items():
            called = functions.get(str(value.get("name"))) if key == "arguments" else None
            own = called or _object(declared.get(key))
            foreign = bool(declared) and not own  # no argument of this function
            if inner is not None or not (foreign or ((*path, key) in filled and not _allows_null(own))):
                kept[key] = clean(inner, (*path, key), own)
        return kept

    return {key: clean(value, (key,), {}) for key, value in fields.items()}


def _functions(fields: JsonObject) -> dict[str, JsonObject]:
    """The schema of each function's arguments, by its name, from whichever field lists the tools, also as JSON text."""
    found: dict[str, JsonObject] = {}
    for value in fields.values():
        if isinstance(value, str) and '"parameters"' in value:
            try:
                value = json.loads(value)
            except (ValueError, RecursionError):  # said where the field is read
                continue
        for tool in value if isinstance(value, list) else []:
            function = _object(_object(tool).get("function", tool))
            found[str(function.get("name"))] = _object(function.get("parameters"))
    return found


def _allows_null(schema: JsonObject) -> bool:
    kinds, options = schema.get("type"), schema.get("enum")
    choices = [one for name in ("anyOf", "oneOf") for one in schema.get(name) or [] if isinstance(one, dict)]
    return (
        "null" in (kinds if isinstance(kinds, list) else [kinds])
        or schema.get("nullable") is True
        or (isinstance(options, list) and None in options)
        or any(one.get("type") == "null" for one in choices)
    )


def _object(value: object) -> JsonObject:
    return value if isinstance(value, dict) else {}
