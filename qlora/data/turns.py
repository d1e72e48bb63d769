"""Turns: one turn of a conversation, by whatever names the tool that wrote it has for who, what and whether.

    who       role, from, speaker, sender, author      user is also human; assistant also gpt, model, bot; tool also observation …
    what      content, value, text, message, parts            text, or a list of parts: texts are joined, reasoning and calls taken
    whether   weight 0 or 1 (OpenAI, Mistral, Together), train and training (Axolotl), loss and loss_scale (ms-swift), loss and
              output_with_loss (XTuner), loss_mask, trainable, loss_weight; masked (torchtune), which says the opposite; a number or truth value by
              another name that speaks of the same (``ignore``, ``train_on_turn``) is asked about

A list of tools in a turn (GLM, Kimi) is the conversation's; pictures and sounds in one are refused.

Firefly, ms-swift and XTuner write a question and its answer as one turn, ``{"human": "Hi", "assistant": "Hello"}`` or
``{"input": "Hi", "output": "Hello"}``: these are two.

Knows a turn; must not know a form, a record's place, or a template.
"""

from __future__ import annotations

import json
import re
import reprlib
from collections.abc import Iterable, Mapping
from typing import NamedTuple, Required, TypedDict, cast

from qlora.data.values import Mistake, function_calls, json_inside, kind, objects, text, verdict, yes_or_no
from qlora.errors import listed, nearest
from qlora.files.strangers import JsonObject

_ROLES = {
    **dict.fromkeys(("system", "developer"), "system"),
    **dict.fromkeys(("user", "human", "prompter"), "user"),
    **dict.fromkeys(("assistant", "gpt", "model", "bot", "chatbot", "chatgpt", "ai"), "assistant"),
    **dict.fromkeys(("tool", "observation", "function", "tool_response", "ipython"), "tool"),
    **dict.fromkeys(("function_call", "tool_call"), "function_call"),
}
_PAIRS = {
    **dict.fromkeys(("question", "query", "input", "prompt", "instruction"), "user"),
    **dict.fromkeys(("answer", "response", "output", "completion"), "assistant"),
}
"""Who speaks by the name of what they say, in a turn that holds a question and its answer."""
_EXPECTED = "expected system, user (or human), assistant (or gpt) or tool"
_WHO = ("role", "from", "speaker", "sender", "author")
_WHAT = ("content", "value", "text", "message", "parts", "refusal")
_TRAINED = (
    "weight",
    "train",
    "training",
    "trainable",
    "loss",
    "loss_mask",
    "loss_scale",
    "loss_weight",
    "output_with_loss",
)
_MASKED = ("masked",)
_LIKE_A_FLAG = re.compile(r"train|loss|mask|ignore|weight|learn|supervis|skip|is_target|exclud", re.IGNORECASE)
LIKE_A_LABEL = re.compile(
    r"correct|accept|approv|good|success|passed|valid$|verified|solved|reward|score|rating|vote|feedback|thumb|desir|verdict",
    re.IGNORECASE,
)
"""The names of what judges an answer."""
_DETAILS = ("train_detail", "training_detail")
_CALLS = ("tool_calls", "function_call")
REASONING = (
    "reasoning", "reasoning_content", "thinking", "thoughts", "thought", "reasoning_text", "complex_cot", "chain_of_thought", "cot",
    "rationale",
)  # fmt: skip
_TEXTS = {
    **dict.fromkeys(REASONING, "reasoning_content"),
    "name": "name",
    "tool_call_id": "tool_call_id",
}
"""What else a turn may hold, as text, for the template to use."""
_TOOLS = ("tools", "functions")
_SEEN = re.compile(
    r"(?:input_)?(?:image|img|picture|photo|video|audio|wav)s?(?:_(?:path|file|url|name|id|bytes|data)s?)?"
)
"""What a text model can't see; an answer about it would be made up."""
THOUGHTS = re.compile(r"\s*<think>(.*?)</think>(.*)", re.DOTALL)
"""Thoughts at the beginning of an answer, and the rest of it."""
_PARTS = {
    **dict.fromkeys(("text", "input_text", "output_text", "refusal"), "text"),
    **dict.fromkeys(("reasoning", "thinking"), "reasoning"),
    **dict.fromkeys(("tool_call", "tool_use", "function_call"), "call"),
}
"""What the types of a content's parts are, of those that are text."""


class Message(TypedDict, total=False):
    """A turn, in the shape that chat templates take."""

    role: Required[str]
    """system, user, assistant or tool."""
    content: Required[str]
    tool_calls: list[JsonObject]
    """The assistant's, each with a function of name and arguments."""
    is_call: bool
    """The content is a call, as ShareGPT's function_call has it; dialect.py puts it as the template likes."""
    reasoning_content: str
    name: str
    tool_call_id: str


class Turn(NamedTuple):
    """A turn that was read."""

    message: Message
    trained: bool | None = None
    """What its flag says; None without one."""
    unread: tuple[str, ...] = ()
    """Its fields that have a value and no meaning here."""
    tools: tuple[JsonObject, ...] = ()
    """The functions that it says may be called."""


def is_turn(value: object) -> bool:
    """Whether it names who speaks."""
    return isinstance(value, dict) and any(isinstance(value.get(name), str) for name in _WHO)


def is_spoken(fields: Mapping[str, object]) -> bool:
    """Whether a record is a turn: a known role, and beside it what was said."""
    roles = (fields.get(name) for name in ("role", "from", "speaker"))
    known = any(isinstance(role, str) and role.lower() in _ROLES for role in roles)
    return known and any(isinstance(fields.get(name), str) for name in _WHAT)


def spoken_in(fields: Mapping[str, object]) -> str:
    """The field of a turn that holds what was said."""
    return next(name for name in _WHAT if isinstance(fields.get(name), str))


def read_turns(turns: Iterable[object]) -> list[Turn]:
    """The turns of a conversation."""
    single = [one for turn in turns for one in _apart(turn)]
    return [read_turn(turn, number) for number, turn in enumerate(single, start=1)]


def _apart(turn: object) -> list[object]:
    """The turns in one that names who speaks by its keys, with what they say; any other turn as it is."""
    if not isinstance(turn, dict) or any(name in turn for name in _WHO):
        return [turn]
    roles = {name: role for name in turn if (role := {**_ROLES, **_PAIRS}.get(name.lower()))}
    said = {role: turn[name] for name, role in roles.items() if role in ("system", "user", "assistant")}
    order = [role for role in ("system", "user", "assistant") if said.get(role) is not None]
    others = {name: value for name, value in turn.items() if name not in roles}
    if len(order) < 2 or len(said) < len(roles):
        return [turn]
    return [{"role": role, "content": said[role], **(others if role == "assistant" else {})} for role in order]


def read_turn(turn: object, number: int) -> Turn:
    """The turn ``number`` of a conversation, from 1. Only a system text and a tool's result may be empty."""
    fields: JsonObject = turn if isinstance(turn, dict) else {}
    who, what = (next((name for name in names if fields.get(name) is not None), names[0]) for names in (_WHO, _WHAT))
    if isinstance(turn, str):
        raise Mistake(
            f"has turns that are plain text (turn {number}: {shown(turn)}), and nothing that says who speaks; expected {{role, content}}, "
            'so name the speakers, as in [{"role": "user", "content": …}, {"role": "assistant", "content": …}]'
        )
    if who not in fields:
        raise Mistake(
            f"has a turn without role and content (turn {number}: {shown(turn)}); expected {{role, content}} or {{from, value}}"
        )
    role, parts = _role(fields[who], number), _parts(fields.get(what), number)
    content = "".join(one for kind, one in parts if kind == "text")
    message: dict[str, object] = {"role": role, "content": content}
    if role == "function_call":
        message |= {"role": "assistant", "is_call": True}
    if thoughts := "".join(one for kind, one in parts if kind == "reasoning"):
        message["reasoning_content"] = thoughts
    inside = [json_inside(one, f"a call of turn {number}") for kind, one in parts if kind == "call"]
    if calls := _calls(fields, number) or function_calls(inside, f"the calls of turn {number}"):
        if role != "assistant":
            raise Mistake(f"has 'tool_calls' in turn {number}, the {role}'s; expected them in the assistant's")
        message["tool_calls"] = calls
    if seen := seen_in(fields):
        raise Mistake(f"has '{seen}' in turn {number}, {UNSEEN}")
    if not content.strip() and not calls and role not in ("system", "tool"):
        raise Mistake(f"has an empty turn (turn {number}, {message['role']})")
    unread = {name for name in _CALLS if fields.get("tool_calls") and fields.get(name)} - {"tool_calls"}
    for theirs, name in _TEXTS.items():
        if fields.get(theirs) is not None and (value := text(fields[theirs], f"'{theirs}' of turn {number}")):
            spoken = name != "reasoning_content" or message["role"] == "assistant"
            if not spoken or message.setdefault(name, value) != value:
                unread.add(theirs)
    say_thoughts_once(message)
    known = {who, what, *_TRAINED, *_MASKED, *_DETAILS, *_CALLS, *_TEXTS, *_TOOLS}
    unread |= {name for name, value in fields.items() if name not in known and filled(value)}
    if role == "assistant" and (flag := next((name for name in sorted(unread) if is_flag(name, fields[name])), None)):
        raise Mistake(
            f"has '{flag}' in turn {number}, which may say whether the turn is trained, and by that name is not known here; "
            "call it 'train' (false: the turn is not trained), or take it out"
        )
    if role == "assistant" and (label := next((name for name in sorted(unread) if _says_no(name, fields[name])), None)):
        raise Mistake(
            f"has {label} {shown(fields[label])} in turn {number}, which would be learnt all the same; set 'train' to false in that "
            "turn, or take the field out"
        )
    if fields.get("channel") == "analysis":  # gpt-oss's
        raise Mistake(f"has thoughts as turn {number}, in the channel analysis; write them as 'thinking' of the answer")
    tools = [tool for name in _TOOLS for tool in tools_of(fields.get(name), f"'{name}' of turn {number}")]
    return Turn(cast(Message, message), _trained(fields, number), tuple(sorted(unread)), tuple(tools))


def say_thoughts_once(message: dict[str, object]) -> None:
    """Take thoughts out of the content that has them a second time."""
    found = THOUGHTS.match(str(message["content"]))
    if found and found[2].strip() and found[1].strip() == str(message.get("reasoning_content", "")).strip():
        message["content"] = found[2].lstrip()


def _says_no(name: str, value: object) -> bool:
    """Whether a field of an answer says that it is bad. A 0 may be any score."""
    return LIKE_A_LABEL.search(name) is not None and (value is False or (str(value) != "0" and verdict(value) is False))


def is_flag(name: str, value: object) -> bool:
    """Whether a field that is not known looks as if it decided what is trained."""
    return _LIKE_A_FLAG.search(name) is not None and (isinstance(value, float) or yes_or_no(value) is not None)


def tools_of(value: object, where: str) -> list[JsonObject]:
    """The functions that may be called: a list of JSON schemas, or that list as JSON text."""
    tools = objects(value, where)
    for tool in tools:
        if not isinstance(tool.get("function", {}), dict):
            raise Mistake(f"has a tool with {kind(tool['function'])} as its 'function'; expected an object")
    return tools


def _role(role: object, number: int) -> str:
    if not isinstance(role, str):
        raise Mistake(f"has {kind(role)} as the role of turn {number}; {_EXPECTED}")
    if role.strip().lower() not in _ROLES:
        raise Mistake(
            f"has an unknown role {shown(role)!r} in turn {number};{nearest(shown(role), _ROLES).lower()} {_EXPECTED}"
        )
    return _ROLES[role.strip().lower()]


def _parts(content: object, number: int) -> list[tuple[str, str]]:
    """What a turn says, as (``text``, ``reasoning`` or ``call``, its text): a text, or a list of parts of several types."""
    if isinstance(content, list):
        return [_part(part, number) for part in content]
    return [] if content is None else [("text", text(content, f"the content of turn {number}"))]


def _part(part: object, number: int) -> tuple[str, str]:
    if isinstance(part, str):
        return "text", text(part, f"the content of turn {number}")
    if not isinstance(part, dict):
        raise Mistake(f"has a list with {kind(part)} in the content of turn {number}; expected parts of type text")
    what = _PARTS.get("thinking" if part.get("thought") is True else str(part.get("type", "text")))  # Gemini's thoughts
    if flag := next((name for name in (*_TRAINED, *_MASKED) if part.get(name) is not None), None):
        raise Mistake(
            f"has '{flag}' in a part of turn {number}'s content; here a turn is trained whole or not at all, so give it to the "
            "turn, or make turns of the parts"
        )
    if what == "call" and "input" in part:  # Anthropic's
        return "call", json.dumps({name: part.get(name) for name in ("id", "name", "input")})
    names = ("text", "value", "thinking", "refusal", "content")
    said = next((part[name] for name in names if part.get(name) is not None), None)
    if what is None or not isinstance(said, str):
        raise Mistake(
            f"has a part of type '{shown(part.get('type', listed(part)))}' in the content of turn {number}, which is no text; "
            "expected parts of type text, so leave the record out or say it in words"
        )
    return what, text(said, f"the content of turn {number}")


def _calls(fields: Mapping[str, object], number: int) -> list[JsonObject]:
    """Its ``tool_calls``, or the one ``function_call`` that OpenAI had before them."""
    one = fields.get("function_call")
    return function_calls(fields.get("tool_calls"), f"'tool_calls' of turn {number}") or function_calls(
        [one] if isinstance(one, dict) else one, f"'function_call' of turn {number}"
    )


def _trained(fields: Mapping[str, object], number: int) -> bool | None:
    """Whether its flags say that it is trained; None without one."""
    said = {}
    for name in (*_TRAINED, *_MASKED):
        if (value := fields.get(name)) is None:
            continue
        if (flag := yes_or_no(value)) is None:
            raise Mistake(
                f"has {shown(value)} as '{name}' of turn {number}; a turn is trained or is not, so expected 0, 1, false or true"
            )
        said[name] = flag != (name in _MASKED)
    if len(set(said.values())) > 1:
        raise Mistake(f"has {listed(said)} in turn {number}, which contradict each other; keep one of them")
    for name in _DETAILS:
        parts = fields.get(name)
        if isinstance(parts, list) and not all(isinstance(part, dict) and part.get("train") for part in parts):
            raise Mistake(
                f"has '{name}' in turn {number}, which trains a part of it; here a turn is trained whole or not at all, "
                "so take the field out, or set 'train' to false"
            )
    return next(iter(said.values()), None)


def not_trained(fields: Mapping[str, object]) -> str | None:
    """The flag by which a record says of all of itself that it is not to be trained."""
    for name in (*_TRAINED, *_MASKED):
        value = fields.get(name)
        if yes_or_no(value) is (name in _MASKED) or (isinstance(value, int | float) and value < 0):
            return name
    return None


def may_decide(name: str, value: object) -> bool:
    """Whether a record's field may say whether, or how much, the record is trained, and nobody knows in which way."""
    known = name in (*_TRAINED, *_MASKED) and yes_or_no(value) is not None
    return not known and is_flag(name, value)


def seen_in(fields: Mapping[str, object]) -> str | None:
    """The field with what a text model can't see."""
    return next(
        (n for n, one in fields.items() if _SEEN.fullmatch(n.lower()) and filled(one) and one is not False), None
    )


def filled(value: object) -> bool:
    """Whether a field says anything: neither null nor empty."""
    return value is not None and value not in ("", [], {})


UNSEEN = (
    "which a text model can't see, and would learn to make up answers about; leave the record out, or take the field out if "
    "the answers don't need it"
)


def shown(value: object) -> str:
    """The beginning of a value of any size and depth."""
    return (value if isinstance(value, str) else reprlib.repr(value))[:40]
