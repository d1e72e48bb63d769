"""Forms: what a record's fields mean. Every form becomes a Conversation or a plain text.

    messages            messages: [{role, content}], optional tools
    sharegpt            conversations: [{from, value}], optional system and tools (a list, or a JSON string of one)
    alpaca              instruction, optional input and system, output
    prompt_completion   prompt, completion
    text                text

An Alpaca record and a prompt/completion pair are conversations of one user turn (Alpaca's input two lines below its
instruction) and one answer. Other fields of a record are metadata and not read. Knows records; must not know a
tokenizer or a template. *New data format* → one function here and one line in ``_FORMS``.
"""

from __future__ import annotations

import reprlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Required, TypedDict, cast

from qlora.data.sources import Record
from qlora.data.values import Mistake, capital, function_calls, kind, objects, text
from qlora.errors import DataError, listed, nearest
from qlora.files.strangers import JsonObject

Fields = Mapping[str, object]
"""What a record holds."""
ROLES = ("system", "user", "assistant", "tool")

_SHAREGPT_ROLES = {
    "system": "system",
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "assistant": "assistant",
    "function_call": "function_call",
    "observation": "tool",
    "tool": "tool",
}
_TEXTS = ("reasoning_content", "name", "tool_call_id")
"""What else a turn may hold, as text, for the template to use."""


class Message(TypedDict, total=False):
    """A turn, in the shape that chat templates take."""

    role: Required[str]
    """One of ``ROLES``."""
    content: Required[str]
    tool_calls: list[JsonObject]
    """The assistant's, each with a function of name and arguments."""
    is_call: bool
    """The content is a call, as ShareGPT's function_call has it; dialect.py puts it as the template likes."""
    reasoning_content: str
    name: str
    tool_call_id: str


@dataclass(frozen=True)
class Conversation:
    """What was said, the last message the assistant's."""

    messages: tuple[Message, ...]
    tools: tuple[JsonObject, ...] = ()
    place: str = ""
    """Where its record is, for messages: ``line 7 of 'train.jsonl'``."""
    unanswered: tuple[str, ...] = ()
    """The contents of the turns after the last answer, which were left off: nobody learns from them."""


@dataclass(frozen=True)
class Parsed:
    """What ``parse`` returns: the form, and the records in their order, as texts where the form is ``text``."""

    form: str
    records: list[Conversation | str] = field(default_factory=list)

    @property
    def texts(self) -> list[str]:
        return [record for record in self.records if isinstance(record, str)]

    @property
    def conversations(self) -> list[Conversation]:
        """Those with an answer."""
        return [record for record in self.records if isinstance(record, Conversation) and record.messages]

    @property
    def skipped(self) -> list[Conversation]:
        """Conversations without a single answer: nothing to train on."""
        return [record for record in self.records if isinstance(record, Conversation) and not record.messages]

    def __len__(self) -> int:
        return len(self.records)


def parse(records: Sequence[Record], form: str = "auto", columns: Mapping[str, str] | None = None) -> Parsed:
    """Give every record its meaning. ``columns`` maps a form's field to the name it has in the records.

    ``auto`` takes the form of the first record, and every other record must have it too. All records are checked before
    DataError is raised; it names the first that is wrong, what it holds, and how many more there are.
    """
    renamed = _renamed(records, columns or {})
    first = renamed[0]
    if form == "auto":
        form = detect_form(first.fields) or ""
    if not form:
        forms = "; ".join(f"{name} ({', '.join(form.needs)})" for name, form in _FORMS.items())
        raise DataError(
            f"{capital(first.place)} has the fields {listed(first.fields, 12) or '(none)'}, which are no known form. The forms "
            f"are {forms}; name other fields with data.columns, as in {{prompt: question, completion: answer}}."
        )
    parsed = Parsed(form)
    mistakes: list[str] = []
    for record in renamed:
        try:
            _require_form(record, form, first.place)
            read = _FORMS[form].read(record.fields)
            parsed.records.append(read if isinstance(read, str) else _answered(replace(read, place=record.place)))
        except Mistake as mistake:
            mistakes.append(f"{capital(record.place)} {mistake}.")
    if mistakes:
        others = len(mistakes) - 1
        more = f" {others} more {'records have mistakes' if others > 1 else 'record has a mistake'}." if others else ""
        raise DataError(mistakes[0] + more)
    return parsed


def detect_form(fields: Fields) -> str | None:
    """The first form whose fields are all there, in the order of the table above; None when none is.

    One whose turns are of another kind is named only when no form matches, so that it can be said what is wrong.
    """
    there = [name for name, form in _FORMS.items() if fields.keys() >= set(form.needs)]
    return next((name for name in there if _FORMS[name].matches(fields)), there[0] if there else None)


def _renamed(records: Sequence[Record], columns: Mapping[str, str]) -> Sequence[Record]:
    known = sorted({name for form in _FORMS.values() for name in (*form.needs, *form.takes)})
    for name in columns:
        if name not in known:
            raise DataError(
                f"data.columns maps '{name}', which is no form's field.{nearest(name, known)} Write the form's field "
                f"first, as in {{prompt: question}}; the fields are {listed(known, 20)}."
            )
    needed = {name for form in _FORMS.values() for name in form.needs}
    for name, theirs in columns.items():
        # a field that a form needs must be in every record, another one (Alpaca's input) in at least one
        lacking = [record for record in records if theirs not in record.fields]
        if lacking and (name in needed or len(lacking) == len(records)):
            raise DataError(
                f"{capital(lacking[0].place)} has no field '{theirs}', which data.columns names for '{name}'."
                f"{nearest(theirs, lacking[0].fields)} Its fields: {listed(lacking[0].fields, 12)}."
            )
    renamed = []
    for record in records:
        fields = {name: value for name, value in record.fields.items() if name not in columns.values()}
        fields |= {name: record.fields[theirs] for name, theirs in columns.items() if theirs in record.fields}
        renamed.append(Record(fields, record.source, record.unit, record.number))
    return renamed


def _require_form(record: Record, form: str, first: str) -> None:
    fields, wanted = record.fields, _FORMS[form]
    if wanted.matches(fields):
        return
    missing = [name for name in wanted.needs if name not in fields]
    other = detect_form(fields)
    if other not in (None, form):
        raise Mistake(f"has the form {other}, but {first} was read as {form}; put one form in a data set")
    if not missing:  # turns, but none of this form: no list, or one of objects with other fields
        turns = fields[wanted.needs[0]]
        found = f"a list of {{{listed(turns[0])}}}" if isinstance(turns, list) else kind(turns)
        raise Mistake(f"has {found} in '{wanted.needs[0]}'; expected {wanted.shape}")
    raise Mistake(f"lacks {listed(missing)} of the form {form}; its fields are {listed(fields, 12) or '(none)'}")


# --- one function a form ---------------------------------------------------------------------------------------------


def _messages(fields: Fields) -> Conversation:
    messages: list[Message] = []
    for number, turn in _turns(fields, "messages", "role", "content"):
        role = "system" if turn["role"] == "developer" else _known_role(turn["role"], ROLES, number)
        message: dict[str, object] = {"role": role, "content": _content(turn.get("content"), number)}
        if calls := function_calls(turn.get("tool_calls"), f"'tool_calls' of turn {number}"):
            if role != "assistant":
                raise Mistake(f"has 'tool_calls' in turn {number}, the {role}'s; expected them in the assistant's")
            message["tool_calls"] = calls
        for name in _TEXTS:
            if turn.get(name) is not None and (value := text(turn[name], f"'{name}' of turn {number}")):
                message[name] = value
        messages.append(cast(Message, message))
    return Conversation(tuple(messages), _tools(fields.get("tools")))


def _sharegpt(fields: Fields) -> Conversation:
    messages = _system(_string(fields, "system") if fields.get("system") else "")
    for number, turn in _turns(fields, "conversations", "from", "value"):
        role = _SHAREGPT_ROLES[_known_role(turn["from"], _SHAREGPT_ROLES, number)]
        content = _content(turn.get("value"), number)
        if role == "function_call":
            messages.append({"role": "assistant", "content": content, "is_call": True})
        else:
            messages.append({"role": role, "content": content})
    return Conversation(tuple(messages), _tools(fields.get("tools")))


def _alpaca(fields: Fields) -> Conversation:
    asked = [_string(fields, "instruction"), _string(fields, "input", needed=False)]
    system = _string(fields, "system", needed=False)
    question = "\n\n".join(part for part in asked if part.strip())
    return _pair(question, _string(fields, "output"), system if system.strip() else "")


def _prompt_completion(fields: Fields) -> Conversation:
    return _pair(_string(fields, "prompt"), _string(fields, "completion"))


def _text(fields: Fields) -> str:
    if not (found := _string(fields, "text")).strip():
        raise Mistake("has an empty 'text'")
    return found


def _pair(question: str, answer: str, system: str = "") -> Conversation:
    asked: Message = {"role": "user", "content": question}
    return Conversation((*_system(system), asked, {"role": "assistant", "content": answer}))


def _system(content: str) -> list[Message]:
    return [{"role": "system", "content": content}] if content else []


def _turns(fields: Fields, field: str, who: str, what: str) -> Iterator[tuple[int, JsonObject]]:
    """The turns of a conversation, numbered from 1."""
    turns = fields[field]
    assert isinstance(turns, list)  # the form was required
    for number, turn in enumerate(turns, start=1):
        if not isinstance(turn, dict) or who not in turn:
            raise Mistake(f"has a turn without {who} and {what} (turn {number}: {_shown(turn)})")
        yield number, turn


@dataclass(frozen=True)
class _Form:
    needs: tuple[str, ...]
    takes: tuple[str, ...]
    shape: str
    read: Callable[[Fields], Conversation | str]
    turn: str | None = None
    """For forms made of turns: the field that every turn has, which tells messages from ShareGPT."""
    trains: str = "assistant"
    """What carries loss where the recipe leaves it open."""

    def matches(self, fields: Fields) -> bool:
        if any(name not in fields for name in self.needs):
            return False
        if self.turn is None:
            return True
        turns = fields[self.needs[0]]
        return isinstance(turns, list) and (not turns or not isinstance(turns[0], dict) or self.turn in turns[0])


_FORMS = {
    "messages": _Form(("messages",), ("tools",), "a list of {role, content}", _messages, turn="role"),
    "sharegpt": _Form(("conversations",), ("system", "tools"), "a list of {from, value}", _sharegpt, turn="from"),
    "alpaca": _Form(("instruction", "output"), ("input", "system"), "text", _alpaca, trains="completion"),
    "prompt_completion": _Form(("prompt", "completion"), (), "text", _prompt_completion, trains="completion"),
    "text": _Form(("text",), (), "text", _text, trains="all"),
}


def trains(form: str) -> str:
    """What carries loss in records of ``form`` where the recipe leaves it open: assistant, completion or all."""
    return _FORMS[form].trains


# --- checks ----------------------------------------------------------------------------------------------------------


def _answered(read: Conversation) -> Conversation:
    """Check the order of a conversation and leave off what follows its last answer."""
    messages = read.messages
    if not messages:
        raise Mistake("has no turns")
    for number, message in enumerate(messages, start=1):
        if not message["content"].strip() and not message.get("tool_calls"):
            raise Mistake(f"has an empty turn (turn {number}, {message['role']})")
    first = next((message["role"] for message in messages if message["role"] != "system"), "system")
    if first in ("assistant", "tool"):
        raise Mistake(f"begins with the {first}; expected a user's turn first")
    last = max((at for at, message in enumerate(messages) if message["role"] == "assistant"), default=-1)
    rest = tuple(message["content"] for message in messages[last + 1 :])
    return replace(read, messages=messages[: last + 1], unanswered=rest)


def _known_role(role: object, known: Sequence[str] | Mapping[str, str], number: int) -> str:
    if not isinstance(role, str):
        raise Mistake(f"has {kind(role)} as the role of turn {number}; expected {listed(known, 9)}")
    if role not in known:
        raise Mistake(
            f"has an unknown role {_shown(role)!r} in turn {number};{nearest(_shown(role), known).lower()} "
            f"expected {listed(known, 9)}"
        )
    return role


def _content(content: object, number: int) -> str:
    """A turn's text. Content may also be a list of text parts, as in ``[{"type": "text", "text": "Hi"}]``."""
    if content is None:
        return ""
    if isinstance(content, list) and all(
        isinstance(part, dict) and isinstance(part.get("text"), str) for part in content
    ):
        content = "".join(part["text"] for part in content)
    return text(content, f"the content of turn {number}")


def _string(fields: Fields, name: str, needed: bool = True) -> str:
    value = fields.get(name)
    return "" if value is None and not needed else text(value, f"'{name}'")


def _tools(value: object) -> tuple[JsonObject, ...]:
    """The functions a conversation may call: a list of JSON schemas, or that list as a JSON string."""
    tools = objects(value, "'tools'")
    for tool in tools:
        if not isinstance(tool.get("function", {}), dict):
            raise Mistake(f"has a tool with {kind(tool['function'])} as its 'function'; expected an object")
    return tuple(tools)


def _shown(value: object) -> str:
    """The beginning of a value of any size and depth."""
    return (value if isinstance(value, str) else reprlib.repr(value))[:40]
