"""Values: what stands inside a record, checked before anybody relies on it.

    text              is text that UTF-8 can hold: half of an emoji cut in two is no character
    JSON inside text  is JSON that Python takes
    tools and calls   are lists of objects that hold JSON values alone; a call names its function

Knows JSON; must not know a form, a template, or where a record stands: a ``Mistake`` is the end of a sentence that begins
with that place.
"""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Callable

from qlora.files.strangers import JsonObject

_ARGUMENTS = ("arguments", "parameters", "args", "input", "kwargs")
"""What people call a call's arguments: OpenAI, Llama 3, LangChain, Anthropic."""
_VERDICTS = {
    **dict.fromkeys(("desirable", "good", "chosen", "accepted", "thumbs_up", "like", "correct", "positive"), True),
    **dict.fromkeys(("undesirable", "bad", "rejected", "thumbs_down", "dislike", "incorrect", "negative"), False),
}
DEEPEST = 64
"""Levels of lists and objects inside a field: above any function's schema, and far below the depth at which Python gives
up, which moves with the caller and with the version."""


class Mistake(Exception):
    """What is wrong with one record, as the end of a sentence that begins with its place."""


class KeyTwice(ValueError):
    """A JSON object that has a key twice."""


def capital(place: str) -> str:
    """A place at the beginning of a sentence."""
    return place[:1].upper() + place[1:]


def kind(value: object) -> str:
    """What a value is, in words: ``text``, ``a list``, ``a number (3)``."""
    kinds = {str: "text", list: "a list", dict: "an object", bytes: "bytes", bool: "true or false", type(None): "null"}
    other = f"a number ({str(value)[:40]})" if isinstance(value, int | float) else f"a {type(value).__name__}"
    return kinds.get(type(value), other)


def yes_or_no(value: object) -> bool | None:
    """What 0, 1, false or true says, also as the text that a CSV file has of it; None for anything else."""
    if isinstance(value, str):
        return {"0": False, "false": False, "1": True, "true": True}.get(value.strip().lower())
    return bool(value) if isinstance(value, int | float) and value in (0, 1) else None


def verdict(value: object) -> bool | None:
    """Whether a value says of an answer that it is good: true or false, 1 and -1, or a word for one of them; None for anything else."""
    said = value.strip().lower() if isinstance(value, str) else None
    return _VERDICTS[said] if said in _VERDICTS else False if value == -1 else yes_or_no(value)


def text(value: object, where: str) -> str:
    """``value``, which must be text. ``where`` is the field, as in ``'text'`` or ``the content of turn 2``."""
    if not isinstance(value, str):
        raise Mistake(f"has {kind(value)} in {where}; expected text")
    try:
        value.encode()
    except UnicodeEncodeError as error:
        raise Mistake(
            f"has a lone surrogate (U+{ord(value[error.start]):04X}, half of an emoji cut in two, at character "
            f"{error.start + 1}) in {where}; expected text that UTF-8 can hold, so mend it or leave it out"
        ) from None
    return value


def json_fault(error: ValueError | RecursionError) -> str:
    """Why ``json.loads`` failed. It raises JSONDecodeError, and also what Python's own limits raise."""
    if isinstance(error, json.JSONDecodeError):
        python = re.match(r"\s*\[?\s*\{'", error.doc)
        if error.msg == "Extra data" and error.doc[error.pos :].strip() == ",":
            return "a comma follows the object; a line of JSON lines ends without one"
        return "it is as Python prints it, not JSON; write it with json.dumps" if python else error.msg
    if isinstance(error, KeyTwice):
        return str(error)
    if isinstance(error, RecursionError):
        return "it is nested too deeply"
    return f"it has an integer of more than {sys.get_int_max_str_digits():,} digits"


def read_json(text: str) -> object:
    """``json.loads``, except that an object with a key twice is broken: Python would keep the second and say nothing."""
    found: object = json.loads(text, object_pairs_hook=once)
    return found


def once(pairs: list[tuple[str, object]]) -> JsonObject:
    """The object of these keys and values."""
    found = dict(pairs)
    if len(found) < len(pairs):
        twice = next(key for number, (key, _) in enumerate(pairs) if key in dict(pairs[:number]))
        raise KeyTwice(f"it names '{twice[:40]}' twice in one object")
    return found


def json_inside(value: str, where: str) -> object:
    """What the JSON text in a field holds."""
    try:
        found = read_json(value)
    except (ValueError, RecursionError) as error:
        raise Mistake(f"has broken JSON in {where} ({json_fault(error)})") from None
    _check(found, where)  # the escape \ud83d is text that UTF-8 can hold; what it stands for is not
    return found


def objects(value: object, where: str) -> list[JsonObject]:
    """A list of JSON objects, or that list as JSON text; none for null and for blank text."""
    if isinstance(value, str):
        value = json_inside(value, where) if value.strip() else None
    if value is None:
        return []
    if not isinstance(value, list):
        raise Mistake(f"has {kind(value)} in {where}; expected a list of objects")
    for item in value:
        if not isinstance(item, dict):
            raise Mistake(f"has a list with {kind(item)} in {where}; expected a list of objects")
    _check(value, where)
    return value


def function_calls(value: object, where: str) -> list[JsonObject]:
    """Calls as chat templates take them: ``{"type": "function", "function": {"name": "f", "arguments": {}}}``.

    Also taken: a call without that frame, ``{"name": "f", "arguments": {}}``; arguments as JSON text, which is how OpenAI
    writes them, or as JSON text of that text; by another name; and none, for a function without parameters.
    """
    calls = []
    for call in objects(value, where):
        function = call.get("function", call)
        if not isinstance(function, dict) or not isinstance(function.get("name"), str) or not function["name"]:
            raise Mistake(f"has a call without its function's name in {where}; expected name and arguments")
        given = next((function[name] for name in _ARGUMENTS if function.get(name) is not None), None)
        rest = {name: value for name, value in function.items() if name not in (*_ARGUMENTS, "id", "type")}
        frame = call if "function" in call else {**({"id": call["id"]} if call.get("id") else {}), "type": "function"}
        calls.append({**frame, "function": {**rest, "arguments": _arguments(given, where)}})
    return calls


def _arguments(value: object, where: str) -> JsonObject:
    for _ in range(2):  # some tools encode them twice: "{\"a\": 1}" as a JSON string
        if isinstance(value, str):
            value = json_inside(value, f"the arguments of {where}") if value.strip() else None
    if value is None:
        return {}
    if not isinstance(value, dict):
        raise Mistake(f"has {kind(value)} as the arguments of {where}; expected an object")
    return value


def _check(value: object, where: str, level: int = 0) -> None:
    """Refuse what JSON or UTF-8 cannot hold, at any level."""
    if level > DEEPEST:
        raise Mistake(f"is nested more than {DEEPEST} levels deep in {where}; expected plain values")
    if isinstance(value, str):
        text(value, where)
    elif isinstance(value, dict):
        for key, inner in value.items():
            _check(key, where, level + 1)
            _check(inner, where, level + 1)
    elif isinstance(value, list):
        for inner in value:
            _check(inner, where, level + 1)
    elif not (value is None or isinstance(value, int | float)):  # Parquet also has dates and bytes
        raise Mistake(f"has {kind(value)} in {where}; expected JSON values")


def label_key(value: object) -> str:
    """A value as the keys of ``labels`` have it: true as ``true``, 1 as ``1``, and so 1.0, as a table has whole numbers beside a gap."""
    said = str(value).lower() if isinstance(value, bool) else str(value).strip()
    return said.partition(".")[0] if re.fullmatch(r"[+-]?\d+\.0+", said) else said


_PLACE = re.compile(r"\{\{|\}\}|\{([^{}]+)\}")


def filled_in(text: str, of: Callable[[str], str]) -> str:
    """``text`` with what ``of`` says of each ``{field}``; ``{{`` and ``}}`` are braces."""
    return _PLACE.sub(lambda found: {"{{": "{", "}}": "}"}.get(found[0]) or of(found[1]), text)


def fields_in(text: str) -> list[str]:
    """The fields that ``filled_in`` asks for."""
    return [name for name in _PLACE.findall(text) if name]
