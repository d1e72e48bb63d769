"""Dialect: what a chat template understands, found by trying it, and a conversation put in those words.

    system turn      refused or ignored (Gemma) → its text stands before the first user turn; a later one before the next
    tools, calls     the template knows them → passed as `tools` and `tool_calls`
                     it does not → the tools as JSON at the end of the system turn, a call as its JSON text
    tool turn        refused or ignored → a user turn, one for the results of parallel calls
    ids of calls     the template wants nine letters and digits (Mistral) → renamed; missing ones are made up
    content          the template reads parts only (Idefics3) → each text as `[{"type": "text", "text": …}]`

    reasoning        the template has a field for it → there
                     it has none → as `<think>` text at the beginning of the answer
    <think> inside   the template cuts it out (DeepSeek-R1) → hidden from it, see ``hidden``
    text and calls   the template leaves out the text beside calls (Llama 3.1) → the text, then the calls as it writes them

The last three are for ``data.dropped_content=keep``. Knows how to ask a template; must not know tokens or masks.
"""

from __future__ import annotations

import json
import re
import secrets
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import cast

from qlora.data.formats import Conversation
from qlora.data.rendering import Refused
from qlora.data.turns import THOUGHTS, Message
from qlora.data.values import Mistake, function_calls, json_inside
from qlora.files.strangers import JsonObject

TOOLS_INTRODUCTION = "You can call these functions. To call one, answer with a JSON object of its name and arguments."
"""Stands before the tools' JSON in the system turn of a template without tools."""

_MARK = "qlora_probe"
_REASONING = ("reasoning_content", "reasoning", "thinking")
_SECRET = secrets.token_hex(8)  # no data can hold it, and no text that leaves here does
_HIDDEN = re.compile(rf"qlora-{_SECRET}-([0-9a-f]*)-")


def hidden(text: str) -> str:
    """A word that a template passes on as it is, for a text that it would change; ``shown`` puts the text in its place."""
    return f"qlora-{_SECRET}-{text.encode().hex()}-"


def shown(text: str, spans: Sequence[tuple[int, int]] = ()) -> tuple[str, list[tuple[int, int]]]:
    """A rendered text with what was hidden from the template, and where ``spans`` of it are now."""
    moves, grown = [], 0
    for word in _HIDDEN.finditer(text):
        grown += len(bytes.fromhex(word[1]).decode()) - len(word[0])
        moves.append((word.end(), grown))

    def moved(at: int) -> int:
        return at + next((by for end, by in reversed(moves) if at >= end), 0)

    text = _HIDDEN.sub(lambda word: bytes.fromhex(word[1]).decode(), text)
    return text, [(moved(begin), moved(end)) for begin, end in spans]


def parts(message: Message) -> list[tuple[str, str]]:
    """What an answer says, as (``reasoning`` or ``text``, its text) in order: thoughts may be a field or inside the content."""
    found = THOUGHTS.match(message["content"])
    inside = [("reasoning", found[1]), ("text", found[2])] if found else [("text", message["content"])]
    return [one for one in [("reasoning", message.get("reasoning_content", "")), *inside] if one[1].strip()]


class Dialect:
    """Which roles and fields a template renders. ``render(messages, tools)`` gives a text or raises Refused."""

    def __init__(self, render: Callable[..., str], keep: bool = True) -> None:
        self.render, self.keep = render, keep
        user, answer = {"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}
        mark = {"content": _MARK}
        tool = {"type": "function", "function": {"name": _MARK, "description": "", "parameters": {"type": "object"}}}

        def called(id: str, name: str = _MARK, result: str = "result") -> list[JsonObject]:
            call = {"id": id, "type": "function", "function": {"name": name, "arguments": {"a": 1}}}
            calling = {"role": "assistant", "content": "", "tool_calls": [call]}
            return [user, calling, {"role": "tool", "content": result, "tool_call_id": id, "name": name}, answer]

        def shows(messages: list[JsonObject], tools: list[JsonObject] | None = None, mark: str = _MARK) -> bool:
            try:
                return mark in render(self.parted(messages), tools)
            except Refused:
                return False

        self.parts = False
        asked = [{"role": "user", **mark}]
        if not shows(asked):
            self.parts = True
            self.parts = shows(asked)
        self.system = shows([{"role": "system", **mark}, user])
        rules = [{"role": "system", "content": "Be brief"}, {"role": "system", **mark}]
        self.later_system = self.system and all(  # it may show the last alone (DeepSeek)
            shows([one, user, answer, other, user, answer]) for one, other in (rules, rules[::-1])
        )
        self.tools = shows([user], [tool])
        self.calls = self.tools and shows(called("call00000"))
        self.renames = self.calls and not shows(called("call_qlora_probe"))
        self.results = self.calls and shows(called("call00000", "f", _MARK))
        self.tool_turn = shows([user, answer, {"role": "tool", **mark, "tool_call_id": "call00000"}, answer])
        thinking = {"role": "assistant", "content": f"<think>\n{_MARK}\n</think>\n\nHello"}
        self.reasoning = next((name for name in _REASONING if shows([user, {**answer, name: _MARK}])), None)
        self.thoughts = shows([user, thinking])
        call = {"id": "call00000", "type": "function", "function": {"name": "f", "arguments": {"a": 1}}}
        self.beside = not self.calls or shows([user, {"role": "assistant", **mark, "tool_calls": [call]}])
        spoken = [{"role": "system", "content": "Hi"}, user, answer]
        self.names = [
            turn["role"]
            for at, turn in enumerate(spoken)
            if shows([*spoken[not self.system : at], {**turn, "name": _MARK}, *spoken[at + 1 :]])
        ]
        word = hidden("Hello")  # a template that changes words (| upper) would have the hidden one trained
        self.hides = keep and shows([user, {**answer, "content": word}], mark=word)
        self.records: Counter[str] = Counter()
        """The same as ``notes``, of what is told with the number of records."""
        self.notes: dict[str, None] = {}
        """What was put in other words, as sentences for the report, in order and each once."""

    def speak(self, conversation: Conversation) -> tuple[list[Message], list[JsonObject] | None]:
        """The conversation's messages and tools as the template takes them; as many assistant turns as before.

        Contents are texts still: ``parted`` comes last. Raises Mistake when a function call is not JSON and the template needs
        it to be.
        """
        messages: list[Message] = []
        ids = _Ids(self.renames)
        told: set[str] = set()
        after_result = False
        for message in conversation.messages:
            is_result = message["role"] == "tool"
            if message.get("is_call") or message.get("tool_calls"):
                message = self._call(message, ids)
            elif is_result:
                message = self._result(message, ids)
                if after_result and message["role"] == "user":  # many templates take one user turn at a time
                    messages[-1] = {**messages[-1], "content": f"{messages[-1]['content']}\n\n{message['content']}"}
                    continue
            after_result = is_result
            messages.append(self._kept(message, told) if message["role"] == "assistant" else message)
        self.records.update(told)
        tools = [tool if "function" in tool else {"type": "function", "function": tool} for tool in conversation.tools]
        if tools and not self.calls:
            self._note("tools stand as JSON in the system turn, since the chat template has no place for them")
            text = f"{TOOLS_INTRODUCTION}\n{json.dumps(list(conversation.tools), ensure_ascii=False)}"
            messages = _with_system(messages, text)
            tools = []
        if messages[0]["role"] == "system" and not self.system:
            self._note("the system text stands before the first user turn, since the chat template has no system turn")
            messages = _without_system(messages, 0)
        if self.keep and not self.later_system and any(one["role"] == "system" for one in messages[1:]):
            self.records["a later system text stands in a user turn, since the chat template has no place for it"] += 1
            messages = _without_system(messages, 1)
        return messages, tools or None

    def parted(self, messages: Sequence[Mapping[str, object]]) -> list[dict[str, object]]:
        """Messages with their contents as the template reads them: as they are, or as parts."""
        if not self.parts:
            return [dict(message) for message in messages]
        return [{**message, "content": [{"type": "text", "text": message["content"]}]} for message in messages]

    def _call(self, message: Message, ids: _Ids) -> Message:
        """A message with function calls, as `tool_calls` or as text."""
        if self.calls:
            inside = message.get("is_call")
            calls = _calls(message["content"]) if inside else message["tool_calls"]
            if self.renames:
                self._note("function calls have ids of nine letters and digits, since the chat template takes no other")
            named: Message = {**message, "content": "" if inside else message["content"], "tool_calls": ids.name(calls)}
            named.pop("is_call", None)
            return named
        if message.get("is_call"):
            return {"role": "assistant", "content": message["content"]}
        self._note("function calls stand as JSON text, since the chat template has no place for them")
        texts = [json.dumps(call["function"], ensure_ascii=False) for call in message["tool_calls"]]
        text: Message = {**message, "content": "\n".join(part for part in (message["content"], *texts) if part)}
        del text["tool_calls"]
        return text

    def _kept(self, message: Message, told: set[str]) -> Message:
        """An answer that the template renders whole; ``told`` takes what was done for it."""
        changed, as_text = dict(message), False
        if thoughts := changed.pop("reasoning_content", ""):
            if self.reasoning or not self.keep:
                changed[self.reasoning or "reasoning_content"] = thoughts
            else:
                changed["content"] = f"<think>\n{thoughts}\n</think>\n\n{message['content']}"
                as_text = True
        content, calls = str(changed["content"]), message.get("tool_calls")
        if (
            self.hides
            and calls
            and content
            and not self.beside
            and self.tool_turn
            and (written := self._written(calls))
        ):
            changed = {"role": "assistant", "content": hidden(f"{content}\n\n{written}")}
            told.add("text stands before the function calls, since the chat template has no place for it")
        elif calls and not self.beside:  # chat.py tells what the template leaves out
            as_text = False
        elif self.hides and not self.thoughts and "</think>" in content:
            # an answer of a model whose prompt opened the thoughts (DeepSeek-R1) holds their end alone
            changed["content"] = hidden(content if "<think>" in content else f"<think>\n{content}")
            told.add("reasoning stays in the answer, from which the chat template would take it")
        if as_text:
            told.add("reasoning stands as text in the answer, since the chat template has no place for it")
        return cast(Message, changed)

    def _written(self, calls: list[JsonObject]) -> str:
        """Function calls as the template writes them in the place of an answer's text; nothing if they stand elsewhere."""
        user, answer = {"role": "user", "content": "Hi"}, {"role": "assistant", "content": _MARK}
        try:
            before, _, behind = self.render(self.parted([user, answer]), None).partition(_MARK)
            written = self.render(self.parted([user, {**answer, "content": "", "tool_calls": calls}]), None)
        except Refused:
            return ""
        fits = written.startswith(before) and written.endswith(behind)
        return written[len(before) : len(written) - len(behind)] if fits else ""

    def _result(self, message: Message, ids: _Ids) -> Message:
        if self.results:
            return {**message, "tool_call_id": ids.answered(message.get("tool_call_id"))}
        if self.tool_turn:
            return message
        self._note("results of functions stand in user turns, since the chat template has no tool turn")
        return {"role": "user", "content": message["content"]}

    def _note(self, sentence: str) -> None:
        self.notes[sentence] = None


class _Ids:
    """The ids of a conversation's calls: each call has one, and with ``rename`` one of its own of nine characters."""

    def __init__(self, rename: bool) -> None:
        self.rename = rename
        self.count = 0
        self.waiting: list[tuple[object, str]] = []
        """Calls of the last turn without a result: (the id that the data gives, the id in use)."""

    def name(self, calls: Sequence[JsonObject]) -> list[JsonObject]:
        """The calls of a turn, each with its id."""
        self.waiting, named = [], []
        for call in calls:
            self.count += 1
            given = call.get("id")
            named.append({**call, "id": given if given and not self.rename else f"call{self.count:05d}"})
            self.waiting.append((given, named[-1]["id"]))
        return named

    def answered(self, given: str | None) -> str:
        """The id of the call that a result belongs to: the call that it names, else the first one that still waits."""
        same = [pair for pair in self.waiting if pair[0] == given]
        if given and not same and not self.rename:
            return given
        if not (same or self.waiting):
            return f"call{self.count:05d}"
        pair = (same or self.waiting)[0]
        self.waiting.remove(pair)
        return pair[1]


def _calls(content: str) -> list[JsonObject]:
    """``{"name": …, "arguments": {…}}``, or a list of those, as `tool_calls`."""
    try:
        found = json_inside(content, "a function call")
        calls = function_calls(found if isinstance(found, list) else [found], "a function call")
    except Mistake:
        calls = []
    if not calls:
        raise Mistake(f"has a function call that is not a JSON object with name and arguments: {content[:60]}")
    return calls


def _with_system(messages: list[Message], text: str) -> list[Message]:
    """``text`` at the end of the system turn, which is made where there is none."""
    if messages[0]["role"] == "system":
        return [{**messages[0], "content": f"{messages[0]['content']}\n\n{text}"}, *messages[1:]]
    return [{"role": "system", "content": text}, *messages]


def _without_system(messages: list[Message], first: int) -> list[Message]:
    """The system texts from message ``first`` on in user turns: at the beginning of the next, or else in one of their own."""
    kept, waiting = messages[:first], list[str]()
    for message in messages[first:]:
        if message["role"] == "system":
            waiting.append(message["content"])
            continue
        if waiting and message["role"] != "user":
            kept.append({"role": "user", "content": "\n\n".join(waiting)})
        elif waiting:
            message = {**message, "content": "\n\n".join([*waiting, message["content"]])}
        kept.append(message)
        waiting = []
    return kept
