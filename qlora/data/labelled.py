"""Labelled texts, for a classifier: a text and a label of every record, and the classes that these labels are.

Knows records; must not know a tokenizer, nor import torch: ``runs/first.py`` reads here before it is there.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field

from qlora.data.columns import renamed
from qlora.data.mistakes import BadRecords
from qlora.data.sources import Record
from qlora.data.values import Mistake, capital, kind, label_key, text
from qlora.errors import DataError, counted, listed
from qlora.recipe import DataSection

TEXTS = (
    "text", "prompt", "sentence", "content", "review", "tweet", "comment", "question", "query", "utterance", "body", "document",
)  # fmt: skip
LABELS = ("label", "completion", "class", "category", "sentiment", "intent", "emotion", "topic", "target", "labels")  # fmt: skip
"""What people call the two; ``data.columns`` gives one of the first two of each."""
ELSEWHERE = "a head that predicts numbers, or several labels at once, is left to the API (qlora.apply_method on a transformers model)"
_WHOLE, _NUMBER = re.compile(r"[+-]?\d+"), re.compile(r"[+-]?(\d+\.\d*|\.?\d+)([eE][+-]?\d+)?")


@dataclass(frozen=True)
class Labelled:
    """What a part of the data holds."""

    records: list[tuple[str, str, str]] = field(default_factory=list)
    """(text, label, where it stands) of each."""
    notes: tuple[str, ...] = ()
    bad: BadRecords = field(default_factory=BadRecords)


def read_labelled(records: Sequence[Record], section: DataSection) -> Labelled:
    """The text and the label of every record. Raises DataError for records that have none, as ``formats.parse`` does."""
    fields, bad = sorted({*TEXTS, *LABELS}), BadRecords(len(records), section.on_bad_record)
    named = renamed(records, section.columns, section.labels, fields)
    readable = [record for record in named if record.fault is None]
    wanted = [_field(readable, names, section) for names in (TEXTS, LABELS)] if readable else ["text", "label"]
    found, unread = list[tuple[str, str, str]](), Counter[str]()
    for before, record in zip(records, named, strict=True):
        try:
            if record.fault is not None:
                raise Mistake(record.fault)
            said, label = (record.fields.get(name) for name in wanted)
            found.append((_text(said, wanted[0]), _label(label, wanted[1]), record.place))
        except Mistake as mistake:
            bad.add(record.place, mistake)
            continue
        unread.update(name for name in record.fields if name not in wanted and name in before.fields)
    bad.settle()
    names = listed([f"'{name}' ({counted(count, 'record')})" for name, count in unread.most_common()], 12)
    return Labelled(found, (f"fields that are not read: {names}",) if unread else (), bad)


def classes_of(labels: Sequence[str]) -> tuple[str, ...]:
    """The classes, numbers in their order and anything else by the alphabet. Raises DataError where these are no classes."""
    names = sorted(set(labels))
    if all(_NUMBER.fullmatch(name) for name in names) and not all(_WHOLE.fullmatch(name) for name in names):
        raise DataError(
            f"The labels are numbers such as {names[0]}; expected names or whole numbers of classes. Name them in data.labels, or write "
            f"classes; {ELSEWHERE}."
        )
    if len(names) < 2:
        raise DataError(
            f"All {len(labels):,} training records have the label '{names[0]}'; expected two classes at least. Give records of the "
            "others, or name the right field in data.columns={label: …}."
        )
    if 2 * len(names) > len(labels):
        raise DataError(
            f"The {len(labels):,} training records have {len(names):,} different labels, as {listed(names, 3)}; expected classes of two "
            f"records or more. Name the right field in data.columns={{label: …}}; {ELSEWHERE}."
        )
    return tuple(sorted(names, key=int) if all(_WHOLE.fullmatch(name) for name in names) else names)


def require_known(part: Labelled, classes: Sequence[str]) -> None:
    """Raise DataError for a label that is none of the ``classes``."""
    if strange := [(label, place) for _, label, place in part.records if label not in classes]:
        label, place = strange[0]
        more = f" In all {len(strange):,} records have such labels." if len(strange) > 1 else ""
        raise DataError(
            f"{capital(place)} has the label '{label}', which no training record has; expected one of {listed(classes, 12)}.{more} Leave "
            "it out, or hold out other records."
        )


def classes_note(classes: Sequence[str], train: Labelled, held_out: Labelled) -> str:
    """``2 classes: negative 470, positive 530; held out: negative 51, positive 49``."""

    def counted(part: Labelled) -> str:
        counts = Counter(label for _, label, _ in part.records)
        return listed([f"{name} {counts[name]:,}" for name in classes], 12)

    held = f"; held out: {counted(held_out)}" if held_out.records else ""
    return f"{len(classes):,} classes: {counted(train)}{held}"


def _field(records: Sequence[Record], names: Sequence[str], section: DataSection) -> str:
    """Which of ``names`` the records call it by. Raises DataError where it is none, or one of several."""
    ours, other = names[:2]
    first = records[0]
    if asked := [name for name in (ours, other) if name in section.columns]:
        there = asked
    else:
        there = [name for name in names if any(name in record.fields for record in records)]
    if len(there) != 1:
        what = f"several that may be its {ours} ({listed(there)})" if there else f"none that is known as its {ours}"
        raise DataError(
            f"{capital(first.place)} has the fields {listed(first.fields, 12) or '(none)'}, {what}; a classifier learns from a text and "
            f"its label. Say which: data.columns={{{ours}: …}}."
        )
    return there[0]


def _text(value: object, name: str) -> str:
    said = "" if value is None else text(value, f"'{name}'")
    if not said.strip():
        raise Mistake(f"has nothing in '{name}'; expected a text")
    return said


def _label(value: object, name: str) -> str:
    if value is None or (isinstance(value, str) and not value.strip()):
        raise Mistake(f"has nothing in '{name}'; expected the label of its class")
    if not isinstance(value, str | int) and not (isinstance(value, float) and value.is_integer()):
        raise Mistake(f"has {kind(value)} in '{name}'; expected one class, as text or a whole number: {ELSEWHERE}")
    return text(label_key(value), f"'{name}'")
