"""Parsing: the records of a data set, each as a Conversation or a plain text, all by one form.

What has a value in a record and is not read is counted by its name; what is wrong is told of all records at once. Knows records
and forms; must not know a tokenizer or a template.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

from qlora.data.columns import Labels, fields_of
from qlora.data.columns import renamed as as_named
from qlora.data.detection import detect_form, form_of_pairs, found_form
from qlora.data.formats import FORMS, Conversation, Fields, Talk, is_switch, preference
from qlora.data.mistakes import BadRecords
from qlora.data.sources import Record
from qlora.data.suggestions import looks_note, separators_note
from qlora.data.turns import filled, is_flag, not_trained
from qlora.data.values import Mistake, kind
from qlora.errors import counted, listed

_PICTURE = re.compile(r"!\[[^\]\n]*\]\([^)\s]+\)|data:(?:image|audio|video)/\w+;base64,|<(?:image|video|audio)>")
"""What may be one, and may be what is spoken of."""


@dataclass(frozen=True)
class Parsed:
    """What ``parse`` returns: the form, and the records in their order, as texts where the form is ``text``."""

    form: str
    records: list[Conversation | str] = field(default_factory=list)
    notes: tuple[str, ...] = ()
    """Sentences about fields and records that were not read."""
    bad: BadRecords = field(default_factory=BadRecords)
    """Records that were left out, and those that will be."""
    read_as: str = ""
    """Why it has this form: ``line 1 of 'chat.jsonl' was read as chat``, or ``data.form is chat``."""

    @property
    def texts(self) -> list[str]:
        return [record for record in self.records if isinstance(record, str)]

    @property
    def conversations(self) -> list[Conversation]:
        """Those with an answer to train."""
        return [record for record in self.records if isinstance(record, Conversation) and record.messages]

    @property
    def skipped(self) -> list[Conversation]:
        """Conversations without a single answer: nothing to train on."""
        return [record for record in self.records if isinstance(record, Conversation) and not record.messages]

    def __len__(self) -> int:
        return len(self.records)


def parse(
    records: Sequence[Record],
    form: str = "auto",
    columns: Mapping[str, str] | None = None,
    on_bad_record: str = "stop",
    labels: Labels | None = None,
    pairs: bool = False,
    read_as: str | None = None,
) -> Parsed:
    """Give every record its meaning. ``columns`` and ``labels`` say where a form's fields are (``columns.py``). With ``pairs``
    every conversation has its ``rejected`` one, and no other form than ``preference`` is taken. ``read_as``: why ``form`` is what
    it is, where another part of the data decides it.

    ``auto`` takes the form of the first record, and every other record must have it too. All records are checked before
    DataError is raised; it says of the first five that are wrong what they hold, and how many more there are. With
    ``on_bad_record='skip'`` they are left out and counted by kind, if they are few.
    """
    columns, bad = columns or {}, BadRecords(len(records), on_bad_record)
    fields = sorted({name for one in FORMS.values() for name in (*one.needs, *one.takes)})
    renamed = as_named(records, columns, labels or {}, fields)
    readable = [record for record in renamed if record.fault is None]
    first = (readable or renamed)[0]
    asked = form != "auto"
    if pairs:
        form = form_of_pairs(first, form)
    elif form == "auto":
        form = found_form(readable) if readable else "text"  # of which no record will be
    read_as = read_as or (f"data.form is {form}" if asked else f"{first.place} was read as {form}")
    wanted = FORMS[form]
    own = [name for name in (*wanted.needs, *wanted.takes) if name not in columns]
    read_from = [
        theirs for name in (*wanted.needs, *wanted.takes) if name in columns for theirs in fields_of(columns[name])
    ]
    known = {*own, *read_from, *(name.partition(".")[0] for name in read_from)}
    parsed: list[Conversation | str] = []
    unread: Counter[str] = Counter()
    undesired = alike = others_marked = pictured = nulls = 0
    for before, record in zip(records, renamed, strict=True):
        try:
            if record.fault is not None:
                raise Mistake(record.fault)
            _require_form(record, form, read_as)
            _require_trained(record.fields)
            read = wanted.read(record.fields)
            one = read.conversation(record.place) if isinstance(read, Talk) else read
            if pairs and isinstance(one, Conversation):
                one = _paired(one, preference(record.fields, "rejected").conversation(record.place))
        except Mistake as mistake:
            bad.add(record.place, mistake)
            continue
        unread.update(f"'{name}' beside the records" for name in before.beside)
        unread.update(f"'{name}'" for name, value in before.fields.items() if name not in known and filled(value))
        if form != "text" and is_switch(record.fields.get("reasoning")):
            unread["'reasoning'"] += 1
        if isinstance(read, Talk):
            others_marked += read.marks_others
            pictured += any(_PICTURE.search(turn.message["content"]) for turn in read.turns)
            calls = [
                call["function"]["arguments"] for turn in read.turns for call in turn.message.get("tool_calls", [])
            ]
            nulls += any(value is None for arguments in calls for value in arguments.values())
            unread.update({f"'{name}' of turns" for turn in read.turns for name in turn.unread})
        if one is None:
            undesired += 1
        elif pairs and isinstance(one, Conversation) and one.rejected is None:
            alike += 1
        else:
            parsed.append(one)
    bad.settle()
    notes = [] if form != "text" else looks_note([one for one in parsed if isinstance(one, str)])
    spoken = [one.messages for one in parsed if isinstance(one, Conversation) and len(one.messages) > 1]
    notes += separators_note([(str(turns[-2]["content"]), str(turns[-1]["content"])) for turns in spoken])
    if count := sum(record.filled_in for record in records):
        notes.append(f"nulls that a table filled in are left out of {counted(count, 'record')}")
    if alike:
        notes.append(f"left out, as the chosen answer is the rejected one too: {counted(alike, 'record')}")
    if form == "preference" and not pairs:
        notes.append("data.form=preference trains the chosen answers alone; the rejected ones are not used")
    if form == "kto":
        notes.append(
            f"data.form=kto trains the desirable answers alone; left out as undesirable: {counted(undesired, 'record')}"
        )
    if others_marked:
        notes.append(
            f"only answers are trained: turns of others are marked as trained in {counted(others_marked, 'record')}, which has no effect"
        )
    if nulls:
        notes.append(f"arguments of calls are null in {counted(nulls, 'record')}, and learnt so")
    if pictured:
        notes.append(
            f"pictures are named in {counted(pictured, 'record')}, and read as text: a text model can't see them"
        )
    if unread:
        names = [f"{name} ({counted(count, 'record')})" for name, count in unread.most_common()]
        notes.append(f"fields that are not read: {listed(names, 12)}".encode(errors="replace").decode())
    return Parsed(form, parsed, tuple(notes), bad, read_as)


def _paired(chosen: Conversation, rejected: Conversation) -> Conversation:
    """``chosen`` with its ``rejected``, left out where both are the same. Raises Mistake unless they answer the same."""
    if not (chosen.messages and rejected.messages):
        raise Mistake(
            f"has no answer at the end of '{'rejected' if chosen.messages else 'chosen'}'; expected one in each"
        )
    if chosen.unanswered or rejected.unanswered:
        raise Mistake(
            f"has turns behind the last answer of '{'chosen' if chosen.unanswered else 'rejected'}'; expected it to end with one"
        )
    if chosen.messages[:-1] != rejected.messages[:-1]:
        raise Mistake(
            "has other turns before the chosen answer than before the rejected one; expected two answers to the same"
        )
    same = chosen.messages == rejected.messages
    return chosen if same else replace(chosen, rejected=rejected)


def _require_form(record: Record, form: str, read_as: str) -> None:
    fields, wanted = record.fields, FORMS[form]
    if wanted.matches(fields):
        return
    missing = [name for name in wanted.needs if fields.get(name) is None]
    other = detect_form(fields)
    if other not in (None, form):
        raise Mistake(f"has the form {other}, but {read_as}; put one form in a data set")
    if not missing or (wanted.turns and wanted.needs[0] in fields):
        raise Mistake(f"has {kind(fields[wanted.needs[0]])} in '{wanted.needs[0]}'; expected a list of turns")
    raise Mistake(f"lacks {listed(missing)} of the form {form}; its fields are {listed(fields, 12) or '(none)'}")


def _require_trained(fields: Fields) -> None:
    """Refuse a record that says of all of itself that it is not to be trained."""
    if name := not_trained(fields):
        raise Mistake(
            f"has the {name} {fields[name]} for all of it, and would be learnt all the same; leave the record out"
        )
    for name, value in fields.items():
        if isinstance(value, list) and value and all(is_flag(name, one) for one in value):
            raise Mistake(
                f"has a list '{name}', which may say of each turn whether it is trained; give it to the turns, as 'train' (false: the "
                "turn is not trained), or take it out"
            )
