"""Dropped: what a conversation says that its rendering does not hold.

    answers     their reasoning, text and calls, in order, in what is trained         (lost_of_answers)
    the rest    system texts, users' turns, results, names, tools, in what is read    (lost_around)

White space aside, and also where the template quotes it as JSON. Knows words and texts; must not know a template or a token.
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Collection, Iterator, Mapping, Sequence

from qlora.data.dialect import parts
from qlora.data.turns import Message

_AROUND = {"system": "a system text", "user": "a user's turn", "tool": "the result of a function"}


def lost_of_answers(said: Sequence[tuple[Message, Message]], trained: Sequence[str]) -> list[str]:
    """What kinds of things the answers say that are not in what is ``trained``, in order. ``said``: each answer as it was given,
    and as it was put for the template. It may write text behind the calls beside it (Gemma 4), and a call's arguments in any
    order, but not where another answer is: that one often says the same words again."""
    spans = ["".join(span.split()) for span in trained]
    text, ends, at = "".join(spans), list(itertools.accumulate(map(len, spans))), 0
    lost: dict[str, None] = {}
    for given, spoken in said:
        begin = named = at
        calls = given.get("tool_calls") or spoken.get("tool_calls", [])
        for kind, one in [] if given.get("is_call") and calls else parts(given):
            end = _end_of(one, text, at)
            at = max(at, end)
            if end < 0:
                lost[kind] = None
        for function in (call["function"] for call in calls):
            end = _end_of(function["name"], text, named)
            named = max(named, end)
            near = text[begin : next((edge for edge in ends if edge >= named), None)]
            if end < 0 or any(_end_of(value, near, 0) < 0 for value in _values(function["arguments"])):
                lost["a function call"] = None
        at = max(at, named)
    return list(lost)


def lost_around(
    messages: Sequence[Mapping[str, object]],
    tools: Sequence[Mapping[str, object]] | None,
    text: str,
    names: Collection[str],
) -> list[str]:
    """What kinds of things others say in ``messages`` that are not in the ``text`` around the answers, wherever it has them: a
    turn that says the same as another has to be there as often. ``names``: the roles whose speakers' names the template shows."""
    others = [message for message in messages if message["role"] != "assistant"]
    said = ["".join(str(message["content"]).split()) for message in others]
    text, whole = "".join(text.split()), "\0".join(said)
    lost: dict[str, None] = {}
    for message, words in zip(others, said, strict=True):
        often = whole.count(words) if words else 0
        if text.count(words) < often and all(text.count(form) < often for form in _forms(str(message["content"]))):
            lost[_AROUND[str(message["role"])]] = None
    if any(message.get("name") and message["role"] not in (*names, "tool") for message in messages):
        lost["the name of who speaks"] = None
    functions = [tool["function"] for tool in tools or []]
    if any(isinstance(one, dict) and str(one.get("name", "")) not in text for one in functions):
        lost["a function that may be called"] = None
    return list(lost)


def _end_of(words: str, text: str, begin: int) -> int:
    """Where ``words`` end in ``text``, which has no white space; -1 where they are not."""
    for form in _forms(words):
        if (found := text.find(form, begin)) >= 0:
            return found + len(form)
    return -1


def _forms(words: str) -> Iterator[str]:
    """``words``, and what JSON, JSON in JSON or Python makes of them, without white space."""
    quoted = json.dumps(words, ensure_ascii=False)[1:-1]
    twice = json.dumps(quoted, ensure_ascii=False)[1:-1]
    for form in (words, quoted, json.dumps(words)[1:-1], twice, repr(words)[1:-1]):
        yield "".join(form.split())


def _values(arguments: object) -> Iterator[str]:
    """The texts and numbers in a call's arguments. Templates spell true, false and null as they like."""
    if isinstance(arguments, dict | list):
        for value in arguments.values() if isinstance(arguments, dict) else arguments:
            yield from _values(value)
    elif isinstance(arguments, str):
        yield arguments
    elif isinstance(arguments, int | float) and not isinstance(arguments, bool):
        yield json.dumps(arguments)
