"""Forms: what a record's fields mean. Every form becomes a Conversation or a plain text.

    messages            messages: a list of turns, whatever their keys are called (turns.py)
    sharegpt            conversations: the same
    alpaca              instruction, optional input, output
    prompt_completion   prompt, completion: text, or lists of turns
    text                text
    preference          chosen and rejected, after a prompt, an instruction or turns, or with them inside
    kto                 one of the first four, with a label: was the answer desirable?

All but ``text`` may have beside them: system, history (earlier questions and answers), tools or functions. An Alpaca record
and a prompt/completion pair are conversations of one user turn (Alpaca's input two lines below its instruction) and one
answer. Where the objective compares answers, the form preference gives pairs: a conversation, and the same with the rejected
answer at its end. Elsewhere the last two forms train on the good answers alone, and only when they are asked for by name.
Knows one record; must not know the others, a tokenizer or a template. *New data format* → one function here and one line in
``FORMS``.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import cast

from qlora.data.turns import (
    UNSEEN,
    Message,
    Turn,
    filled,
    is_turn,
    read_turn,
    read_turns,
    say_thoughts_once,
    seen_in,
    tools_of,
)
from qlora.data.values import Mistake, function_calls, json_inside, kind, text, verdict
from qlora.errors import listed
from qlora.files.strangers import JsonObject

_PLACEHOLDER = re.compile(
    r"\A\s*<(?:image|video|audio)>|<(?:image|video|audio)>\s*\Z|<img>[^<\s]+</img>|<\|(?:image(?:_\d+|_pad)?|vision_start)\|>"
)
"""Where a question has its picture or sound, as LLaVA, Qwen-VL, Phi and Llama write it."""
Fields = Mapping[str, object]
"""What a record holds."""

_BESIDE = ("system", "history", "tools", "functions")
_SWITCHES = ("on", "off", "yes", "no", "true", "false", "none")
"""What a field called reasoning says that holds none: whether a model was asked for it (Nemotron's)."""


@dataclass(frozen=True)
class Conversation:
    """What was said, the last message the assistant's."""

    messages: tuple[Message, ...]
    tools: tuple[JsonObject, ...] = ()
    place: str = ""
    """Where its record is, for messages: ``line 7 of 'train.jsonl'``."""
    unanswered: tuple[str, ...] = ()
    """The contents of the turns after the last answer to train, which were left off: nobody learns from them."""
    untrained: frozenset[int] = frozenset()
    """Which answers, counted from 0, are marked not to be trained."""
    rejected: Conversation | None = None
    """The same with the worse answer at its end, where answers are compared."""

    def answers(self, messages: Sequence[Message]) -> list[int]:
        """Where the answers to train are in ``messages``, which are its own in the words of a template."""
        every = [at for at, message in enumerate(messages) if message["role"] == "assistant"]
        return [at for number, at in enumerate(every) if number not in self.untrained]


@dataclass(frozen=True)
class Talk:
    """A conversation as its record has it."""

    turns: list[Turn]
    tools: tuple[JsonObject, ...] = ()

    @property
    def marks_others(self) -> bool:
        """Whether a turn that is no answer is marked to be trained."""
        return any(turn.trained and turn.message["role"] != "assistant" for turn in self.turns)

    def conversation(self, place: str) -> Conversation:
        """Check the order of the turns and leave off what follows the last answer to train."""
        messages = tuple(turn.message for turn in self.turns)
        if not messages:
            raise Mistake("has no turns")
        first = next((message["role"] for message in messages if message["role"] != "system"), "system")
        if first in ("assistant", "tool"):
            raise Mistake(f"begins with the {first}; expected a user's turn first")
        trained = [turn.trained is not False for turn in self.turns if turn.message["role"] == "assistant"]
        answers = [at for at, message in enumerate(messages) if message["role"] == "assistant"]
        last = max((at for at, asked in zip(answers, trained, strict=True) if asked), default=-1)
        rest = tuple(message["content"] for message in messages[last + 1 :])
        untrained = frozenset(number for number, asked in enumerate(trained) if not asked and answers[number] < last)
        return Conversation(messages[: last + 1], self.tools, place, rest, untrained)


def _turns(name: str, fields: Fields) -> Talk:
    return _talk(fields, _thought(fields, turns_of(fields[name], name)))


def _alpaca(fields: Fields) -> Talk:
    answer = _answered(fields, text(fields["output"], "'output'"), "output")
    return _talk(fields, [_instruction(fields), *_thought(fields, answer)])


def _prompt_completion(fields: Fields) -> Talk:
    asked = _said(fields["prompt"], "user", "prompt")
    return _talk(fields, [*asked, *_thought(fields, _answered(fields, fields["completion"], "completion"))])


def _answered(fields: Fields, value: object, name: str) -> list[Turn]:
    """What answers; beside tools it may be their calls as JSON, by itself (xLAM)."""
    calls = value
    if isinstance(value, str) and value.lstrip()[:1] in ("[", "{"):
        try:
            calls = json_inside(value, f"'{name}'")
        except Mistake:  # text that begins like that
            return _said(value, "assistant", name)
    calls = [calls] if isinstance(calls, dict) else calls
    named = isinstance(calls, list) and calls and all(isinstance(one, dict) and "name" in one for one in calls)
    if not named or not (filled(fields.get("tools")) or filled(fields.get("functions"))):
        return _said(value, "assistant", name)
    return [Turn({"role": "assistant", "content": "", "tool_calls": function_calls(calls, f"'{name}'")})]


def _thought(fields: Fields, answer: list[Turn]) -> list[Turn]:
    """An answer with the reasoning that stands beside it."""
    if is_switch(fields.get("reasoning")) or not (reasoning := _optional(fields, "reasoning")).strip():
        return answer
    last = dict(answer[-1].message) if answer else {}
    if last.get("role") != "assistant" or last.get("reasoning_content", reasoning) != reasoning:
        raise Mistake("has 'reasoning' beside turns that do not end with its answer, or have another; keep one of them")
    last["reasoning_content"] = reasoning
    say_thoughts_once(last)
    return [*answer[:-1], answer[-1]._replace(message=cast(Message, last))]


def is_switch(value: object) -> bool:
    return isinstance(value, bool) or (isinstance(value, str) and value.strip().lower() in _SWITCHES)


def _text(fields: Fields) -> str:
    if not (found := text(fields["text"], "'text'")).strip():
        raise Mistake("has an empty 'text'")
    return found


def preference(fields: Fields, side: str = "chosen") -> Talk:
    """The chosen answer, or that of the other ``side``, behind what it answers."""
    answer, prompt = fields[side], fields.get("prompt")
    if isinstance(prompt, dict) and "messages" in prompt:  # OpenAI's input has the tools as well
        fields = {**{name: prompt[name] for name in _BESIDE if name in prompt}, **fields}
    if isinstance(answer, str) and (told := _transcript(f"{prompt}{answer}" if isinstance(prompt, str) else answer)):
        return _talk(fields, told)
    said = _said(answer, "assistant", side)
    if said[0].message["role"] in ("system", "user"):  # the whole conversation, the prompt in it
        if isinstance(prompt, str) and not any(prompt.strip() in turn.message["content"] for turn in said):
            raise Mistake(f"has a 'prompt' and another question in '{side}'; keep one of them")
        return _talk(fields, said)
    if prompt is not None:
        asked = _said(prompt, "user", "prompt")
    elif "instruction" in fields:
        asked = [_instruction(fields)]
    elif name := next((name for name in ("messages", "conversations") if fields.get(name)), None):
        asked = turns_of(fields[name], name)
    else:
        raise Mistake(
            f"has no 'prompt' before the {side} answer; name its field with data.columns, as in {{prompt: question}}"
        )
    return _talk(fields, [*asked, *said])


def _kto(fields: Fields) -> Talk | None:
    """None when the answer is not desirable."""
    if (desirable := verdict(fields["label"])) is None:
        raise Mistake(f"has {kind(fields['label'])} in 'label'; expected true or false")
    form = next((name for name in JUDGED if FORMS[name].matches(fields)), None)
    if form is None:
        raise Mistake(f"has a label and none of the forms {listed(JUDGED)}; its fields are {listed(fields, 12)}")
    talk = FORMS[form].read(fields)
    return talk if desirable and isinstance(talk, Talk) else None


def _instruction(fields: Fields) -> Turn:
    asked = [text(fields["instruction"], "'instruction'"), _optional(fields, "input")]
    (turn,) = _said("\n\n".join(part for part in asked if part.strip()), "user", "instruction")
    return turn


def _said(value: object, role: str, name: str) -> list[Turn]:
    """What a field says: text, in the words of ``role``, or turns."""
    if isinstance(value, dict):  # OpenAI's input has its messages inside; LLaMA-Factory's chosen is one turn
        value = value.get("messages", [value])
    if not isinstance(value, list):
        value = text(value, f"'{name}'").strip() and value
    if not value:
        raise Mistake(f"has an empty '{name}'")
    return turns_of(value, name) if isinstance(value, list) else [Turn({"role": role, "content": str(value)})]


def turns_of(value: object, name: str) -> list[Turn]:
    """A list of turns, or that list as JSON text, as a CSV file has it."""
    turns = json_inside(value, f"'{name}'") if isinstance(value, str) else value
    if not isinstance(turns, list):
        raise Mistake(f"has {kind(turns)} in '{name}'; expected a list of turns")
    return read_turns(turns)


def _transcript(told: str) -> list[Turn]:
    """The turns of a text that begins with ``Human:``, as Anthropic's preference data have them; none of another text."""
    before, *parts = re.split(r"(?:^|\n\n)(Human|Assistant):", told.strip())
    if before or not parts:
        return []
    return [
        read_turn({"role": who, "content": said.strip()}, number)
        for number, (who, said) in enumerate(zip(parts[::2], parts[1::2], strict=True), 1)
    ]


def _talk(fields: Fields, turns: Iterable[Turn]) -> Talk:
    """The turns, with what stands beside them in the record."""
    if seen := seen_in(fields):
        raise Mistake(f"has '{seen}', {UNSEEN}")
    turns = list(turns)
    asked = (turn.message["content"] for turn in turns if turn.message["role"] == "user")
    if shown := next((found for content in asked if (found := _PLACEHOLDER.search(content))), None):
        raise Mistake(f"has {shown[0].strip()} in a question, {UNSEEN}")
    tools = _tools(fields, "tools") or _tools(fields, "functions") or tuple(one for turn in turns for one in turn.tools)
    turns = [turn for turn in turns if turn.message["role"] != "system" or turn.message["content"].strip()]
    at = 1 if turns and turns[0].message["role"] == "system" else 0
    turns[at:at] = _history(fields.get("history"))
    if (system := _system(fields)).strip():
        if at and turns[0].message["content"].strip() != system.strip():
            raise Mistake("has a 'system' text and another one in its turns; keep one of them")
        turns[:at] = [Turn({"role": "system", "content": system})]
    return Talk(turns, tools)


def _history(value: object) -> list[Turn]:
    """Earlier turns: pairs of a question and its answer, or turns as they are."""
    if isinstance(value, str):
        value = json_inside(value, "'history'") if value.strip() else None
    if value is None:
        return []
    if not isinstance(value, list):
        raise Mistake(f"has {kind(value)} in 'history'; expected a list of [question, answer]")
    turns: list[Turn] = []
    for earlier in value:
        if isinstance(earlier, list) and len(earlier) == 2:
            for role, said in zip(("user", "assistant"), earlier, strict=True):
                turns += _said(text(said, "'history'"), role, "history")
        elif is_turn(earlier):
            turns.append(read_turn(earlier, len(turns) + 1))
        else:
            raise Mistake(f"has {kind(earlier)} in the list of 'history'; expected [question, answer]")
    return turns


def _tools(fields: Fields, name: str) -> tuple[JsonObject, ...]:
    return tuple(tools_of(fields.get(name), f"'{name}'"))


def _system(fields: Fields) -> str:
    """A system text, also in parts, as Bedrock and Anthropic have it."""
    value = fields.get("system")
    if isinstance(value, dict):  # Gemini's
        return read_turn({**value, "role": "system"}, 0).message["content"]
    if isinstance(value, list) and value and all(isinstance(part, dict) for part in value):
        return read_turn({"role": "system", "content": value}, 0).message["content"]
    return _optional(fields, "system")


def _optional(fields: Fields, name: str) -> str:
    return "" if fields.get(name) is None else text(fields[name], f"'{name}'")


@dataclass(frozen=True)
class Form:
    needs: tuple[str, ...]
    read: Callable[[Fields], Talk | str | None]
    takes: tuple[str, ...] = ("reasoning", *_BESIDE)
    trains: str = "assistant"
    """What carries loss where the recipe leaves it open: assistant, completion or all."""
    turns: bool = False
    """The field it needs is a list of turns."""

    def matches(self, fields: Fields) -> bool:
        if any(name not in fields for name in self.needs):
            return False
        value = fields[self.needs[0]]
        return not self.turns or isinstance(value, list) or (isinstance(value, str) and value.lstrip().startswith("["))


JUDGED = ("messages", "sharegpt", "alpaca", "prompt_completion")
FORMS = {
    "messages": Form(("messages",), partial(_turns, "messages"), turns=True),
    "sharegpt": Form(("conversations",), partial(_turns, "conversations"), turns=True),
    "alpaca": Form(("instruction", "output"), _alpaca, ("input", "reasoning", *_BESIDE), trains="completion"),
    "prompt_completion": Form(("prompt", "completion"), _prompt_completion, trains="completion"),
    "text": Form(("text",), _text, (), trains="all"),
    "preference": Form(
        ("chosen", "rejected"),
        preference,
        ("prompt", "instruction", "input", "messages", "conversations", *_BESIDE),
        trains="completion",
    ),
}
FORMS["kto"] = Form(
    ("label",),
    _kto,
    tuple(dict.fromkeys(name for form in JUDGED for name in (*FORMS[form].needs, *FORMS[form].takes))),
    trains="completion",
)
