"""Columns: a form's fields by the names that they have in the records, or put together from several.

    {prompt: question}                        the field question is the prompt
    {prompt: "{title}\\n{body}"}              a text with the fields title and body in it
    labels {label: {0: negative}}             and what stands for a field's values

Knows records; must not know forms.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

from qlora.data.sources import Record
from qlora.data.suggestions import NOTHING, inside
from qlora.data.values import capital, fields_in, filled_in, label_key
from qlora.errors import DataError, listed, nearest
from qlora.files.strangers import shown

Labels = Mapping[str, Mapping[str, str]]


def fields_of(column: str) -> list[str]:
    """The record's fields that a column is read from: ``"{title}: {body}"`` → ``["title", "body"]``."""
    return fields_in(column) or [column]


def renamed(
    records: Sequence[Record], columns: Mapping[str, str], labels: Labels, known: Sequence[str]
) -> list[Record]:
    """The records with the fields of a form, of which ``known`` are all. Raises DataError for a column that nothing has."""
    for name in columns:
        if name not in known:
            raise DataError(
                f"data.columns maps '{name}', which is no form's field.{nearest(name, known)} Write the form's field "
                f"first, as in {{prompt: question}}; the fields are {listed(known, 30)}."
            )
    asked = [
        (theirs, f"data.columns names for '{name}'") for name, column in columns.items() for theirs in fields_of(column)
    ]
    asked += [(theirs, "data.labels names") for theirs in labels]
    readable = [record for record in records if record.fault is None]
    for theirs, where in asked:
        # what some records lack is a mistake of theirs, if their form needs it
        if readable and all(inside(record.fields, theirs) is NOTHING for record in readable):
            first = readable[0]
            raise DataError(
                f"{capital(first.place)} has no field '{theirs}', which {where}."
                f"{nearest(theirs, first.fields)} Its fields: {listed(first.fields, 12)}."
            )
    stands_for = {name: {label_key(key): text for key, text in texts.items()} for name, texts in labels.items()}
    return [
        record if record.fault is not None else _renamed(_labelled(record, stands_for), columns) for record in records
    ]


def _labelled(record: Record, labels: Labels) -> Record:
    """The record with the text that stands for each value."""
    fields = dict(record.fields)
    for name, texts in labels.items():
        value = inside(fields, name)
        if value is NOTHING:
            continue
        key = label_key(value)
        if key not in texts:
            return replace(record, fault=f"has {shown(value)} in '{name}', for which data.labels has no text")
        fields[name] = texts[key]
    return replace(record, fields=fields)


def _renamed(record: Record, columns: Mapping[str, str]) -> Record:
    used = {theirs for column in columns.values() for theirs in fields_of(column)}
    fields = {name: value for name, value in record.fields.items() if name not in used}
    found = {name: _value(record, column) for name, column in columns.items()}
    return replace(record, fields=fields | {name: value for name, value in found.items() if value is not NOTHING})


def _value(record: Record, column: str) -> object:
    """What a column holds in this record; nothing where it lacks a field of it."""
    if not fields_in(column):
        return inside(record.fields, column)
    parts = {name: inside(record.fields, name) for name in fields_of(column)}
    if not all(isinstance(part, str | int | float) for part in parts.values()):
        return NOTHING
    return filled_in(column, lambda name: str(parts[name]))
