"""Dialect: what a chat template understands, found by trying it, and a conversation put in those words.

    system turn      refused or ignored (Gemma) → its text stands before the first user turn
    tools, calls     the template knows them → passed as `tools` and `tool_calls`
                     it does not → the tools as JSON at the end of the system turn, a call as its JSON text
    tool turn        refused or ignored → a user turn

Nothing that a conversation holds is left out. Knows how to ask a template; must not know tokens or masks.
"""

from __future__ import annotations

import json
from collections.abc import Callable

from qlora.data.formats import Conversation, Message
from qlora.data.rendering import Refused
from qlora.data.values import Mistake, capital, function_calls, json_inside
from qlora.errors import DataError
from qlora.files.strangers import JsonObject

TOOLS_INTRODUCTION = "You can call these functions. To call one, answer with a JSON object of its name and arguments."
"""Stands before the tools' JSON in the system turn of a template without tools."""

_MARK = "qlora_probe"


class Dialect:
    """Which roles and fields a template renders. ``render(messages, tools)`` gives a text or raises Refused."""

    def __init__(self, render: Callable[..., str]) -> None:
        user, answer = {"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}
        mark = {"content": _MARK}
        call = {"id": "call00000", "type": "function", "function": {"name": _MARK, "arguments": {"a": 1}}}
        calling = {"role": "assistant", "content": "", "tool_calls": [call]}
        tool = {"type": "function", "function": {"name": _MARK, "description": "", "parameters": {"type": "object"}}}
        result = {"role": "tool", "content": "result", "tool_call_id": "call00000", "name": "f"}

        def shows(messages: list[JsonObject], tools: list[JsonObject] | None = None) -> bool:
            try:
                return _MARK in render(messages, tools)
            except Refused:
                return False

        self.system = shows([{"role": "system", **mark}, user])
        self.tools = shows([user], [tool])
        self.calls = self.tools and shows([user, calling, result, answer])
        self.tool_turn = shows([user, answer, {"role": "tool", **mark, "tool_call_id": "call00000"}, answer])
        self.notes: dict[str, None] = {}
        """What was put in other words, as sentences for the report, in order and each once."""

    def speak(self, conversation: Conversation) -> tuple[list[Message], list[JsonObject] | None]:
        """The conversation's messages and tools as the template takes them; as many assistant turns as before.

        Raises DataError when a function call is not JSON and the template needs it to be.
        """
        messages: list[Message] = []
        number = 0
        for message in conversation.messages:
            if message.get("is_call") or message.get("tool_calls"):
                number += 1
                message = self._call(message, number, conversation.place)
            elif message["role"] == "tool":
                message = self._result(message, number)
            messages.append(message)
        tools = [tool if "function" in tool else {"type": "function", "function": tool} for tool in conversation.tools]
        if tools and not self.calls:
            self._note("tools stand as JSON in the system turn, since the chat template has no place for them")
            text = f"{TOOLS_INTRODUCTION}\n{json.dumps(list(conversation.tools), ensure_ascii=False)}"
            messages = _with_system(messages, text)
            tools = []
        if messages[0]["role"] == "system" and not self.system:
            self._note("the system text stands before the first user turn, since the chat template has no system turn")
            messages = _without_system(messages)
        return messages, tools or None

    def _call(self, message: Message, number: int, place: str) -> Message:
        """A message with a function call, as `tool_calls` or as text."""
        if message.get("is_call"):
            if not self.calls:
                return {"role": "assistant", "content": message["content"]}
            return {"role": "assistant", "content": "", "tool_calls": _calls(message["content"], number, place)}
        if self.calls:
            return message
        self._note("function calls stand as JSON text, since the chat template has no place for them")
        calls = [json.dumps(call["function"], ensure_ascii=False) for call in message["tool_calls"]]
        return {"role": "assistant", "content": "\n".join(part for part in (message["content"], *calls) if part)}

    def _result(self, message: Message, number: int) -> Message:
        if self.calls:  # Mistral's template wants an id of nine letters and digits on both sides
            return {"tool_call_id": f"call{number:05d}", **message}
        if self.tool_turn:
            return message
        self._note("results of functions stand in user turns, since the chat template has no tool turn")
        return {"role": "user", "content": message["content"]}

    def _note(self, sentence: str) -> None:
        self.notes[sentence] = None


def _calls(content: str, number: int, place: str) -> list[JsonObject]:
    """``{"name": …, "arguments": {…}}``, or a list of those, as `tool_calls`."""
    try:
        found = json_inside(content, "a function call")
        calls = function_calls(found if isinstance(found, list) else [found], "a function call")
    except Mistake:
        calls = []
    if not calls:
        raise DataError(
            f"{capital(place)} has a function call that is not a JSON object with name and arguments: {content[:60]}"
        )
    return [{"id": f"call{number:05d}", **call} for call in calls]


def _with_system(messages: list[Message], text: str) -> list[Message]:
    """``text`` at the end of the system turn, which is made where there is none."""
    if messages[0]["role"] == "system":
        return [{**messages[0], "content": f"{messages[0]['content']}\n\n{text}"}, *messages[1:]]
    return [{"role": "system", "content": text}, *messages]


def _without_system(messages: list[Message]) -> list[Message]:
    """The leading system texts moved before the first user turn's."""
    first = next(at for at, message in enumerate(messages) if message["role"] != "system")
    text = "\n\n".join(message["content"] for message in messages[: first + 1])
    return [{**messages[first], "content": text}, *messages[first + 1 :]]
