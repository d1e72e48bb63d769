"""Suggestions: the form that records may have whose fields have other names, and the line of a recipe that says so.

Knows what people call a form's fields; must not know what a form is, which is handed in.
"""

from __future__ import annotations

import json
import re
import shlex
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any, Protocol

from qlora.data.turns import REASONING, is_turn
from qlora.data.values import Mistake
from qlora.errors import listed

Fields = Mapping[str, object]
"""What a record holds."""

NOTHING = object()
"""What is found where there is no field."""

_ANSWERS = (
    "answer", "response", "reply", "solution", "canonical_solution", "assistant", "gpt", "target", "a", "code", "summary",
    "highlights", "answers", "targets", "ideal", "ground_truth",
)  # fmt: skip
_QUESTIONS = ("question", "query", "problem", "task", "user", "human", "inputs")
SURE_LABELS = ("label", "kto_tag", "desirable", "is_desirable")
OTHERS = {
    "messages": ("conversation", "dialog", "dialogue", "chat", "turns", "contents", "history"),
    "chosen": (
        "chosen_response", "chosen_messages", "response_j", "preferred_output", "preferred_response", "preferred", "accepted",
        "better_response", "better", "winning_response", "winner", "win",
    ),
    "rejected": (
        "rejected_response", "rejected_messages", "response_k", "non_preferred_output", "dispreferred_response", "dispreferred",
        "non_preferred", "worse_response", "worse", "losing_response", "loser", "lose",
    ),
    "prompt": ("instruction", *_QUESTIONS, "input", "source", "q", "text", "document", "article"),
    "instruction": ("prompt", *_QUESTIONS, "q", "text"),
    "completion": ("output", *_ANSWERS),
    "output": ("completion", *_ANSWERS),
    "input": ("context", "passage", "background", "query", "question"),
    "system": ("system_prompt", "system_message", "system_instruction", "systeminstruction"),
    "reasoning": REASONING[1:],
    "tools": ("available_tools", "available_functions", "tool_schemas", "tool_definitions", "tool_list", "function_definitions"),
    "text": ("content", "document", "body"),
}  # fmt: skip
"""What people call a form's fields, likeliest first."""


_LOOKED_AT = 20_000  # characters of a text
MARKS = re.compile(r"<\|im_start\|>|<\|start_header_id\|>|<start_of_turn>|<\|(?:user|assistant)\|>|\[INST\]|<｜User｜>")
"""What chat templates write before a turn."""
ENDS = re.compile(
    r"(?:</s>|<(?:\|im_end\||\|eot_id\||\|endoftext\||\|end\||end_of_turn|eos|｜end▁of▁sentence｜)>)\s*\Z"
)
"""What they write behind one, or a tokenizer behind a text."""
_ASKS = re.compile(r"(?:^|\n|### ?)(?:user|human|question|q|prompt|instruction|input) ?:", re.IGNORECASE)
_REPLIES = re.compile(r"(?:\n|### ?)(?:assistant|gpt|bot|ai|answer|a|response|output|completion) ?:", re.IGNORECASE)
_AFTER_PROMPTS = re.compile(r"(###|-->|->|=>|>>>|\n---)\s*\Z")
_AFTER_ANSWERS = re.compile(r"(###| END|<END>|\bSTOP|<stop>)\s*\Z")
_FIELDS = re.compile(
    r"""^\s*\{?\s*["'](?:question|prompt|instruction|input|messages|role|content)["']\s*:""", re.MULTILINE
)
_CODE = re.compile(
    r"[;{}]\s*$|^\s*(?:def |class |import |from \S+ import |return\b|if .*:$|else:$|for .*:$|while .*:$|#include|@\w+|//)|\w+\(.*\)\s*$"
)


_RIVAL = re.compile(
    r"(?:.*_)?(?:response|answer|output|completion|generation|reply|summary|candidate|conversation|messages?|ref|solution)(?:_.*)?"
)
_WHICH = re.compile(r"(?:^|[ _-])[0-9a-dijkA-D](?=$|[ _-])|(?<=[a-z])[0-9A-D]$")
_VERDICT = re.compile(r"prefer|better|best|winner|label|choice|chosen|rank|scor|rating|safer|vote", re.IGNORECASE)
_NAMELESS = re.compile(r"(?:.*_)?(?:id|ids|uuid|index|path|url|source|category|type|lang|language|split|name|title)")


class Form(Protocol):
    """Which fields it needs and may have, and how a record is read."""

    @property
    def needs(self) -> tuple[str, ...]: ...
    @property
    def takes(self) -> tuple[str, ...]: ...
    def matches(self, fields: Fields) -> bool: ...
    def read(self, fields: Fields) -> object: ...


def suggested(fields: Fields, forms: Mapping[str, Form]) -> tuple[str, dict[str, str]] | None:
    """The form that takes most of these fields by their other names, and which of them stands for which of its own."""
    lower = {name.strip().lower(): name for name in reversed(list(fields))}
    best: tuple[str, dict[str, str]] | None = None
    for name in ("messages", "preference", "prompt_completion", "alpaca", "text"):
        form = forms[name]
        found: dict[str, str] = {}
        for ours in (*form.needs, *(optional for optional in form.takes if optional in OTHERS)):
            names = (lower[other] for other in (ours, *OTHERS[ours]) if other in lower)
            if (theirs := next((column for column in names if column not in found.values()), None)) is not None:
                found[ours] = theirs
        renamed = {ours: fields[theirs] for ours, theirs in found.items()}
        if set(found) >= set(form.needs) and reads(form, renamed) and (best is None or len(found) > len(best[1])):
            best = name, dict(sorted(found.items(), key=lambda pair: list(fields).index(pair[1])))
    return best


def reads(form: Form, fields: Fields) -> bool:
    """Whether a record has this form, and no mistake in it."""
    try:
        return form.matches(fields) and form.read(fields) is not None
    except Mistake:
        return False


def rivals(fields: Fields) -> tuple[list[str], list[str]]:
    """(the fields that answer one question twice or more, or the list that does; those that seem to say which answer is better).

    As ``response_0`` and ``response_1``, ``answer_a`` and ``answer_b``, ``output 1`` and ``output 2``; ``responses`` with ``scores``.
    """
    verdicts = [name for name in fields if _VERDICT.search(name)]
    alike: dict[str, list[str]] = {}
    for name, value in fields.items():
        stem = _WHICH.sub("", name).lower()
        if stem != name.lower() and isinstance(value, str | list | dict) and _RIVAL.fullmatch(stem):
            alike.setdefault(stem, []).append(name)
        elif (
            isinstance(value, list) and len(value) > 1 and _RIVAL.fullmatch(re.sub(r"ie(?=s$)", "y", name.lower())[:-1])
        ):
            within = [key for key in value[0] if _VERDICT.search(key)] if isinstance(value[0], dict) else []
            if within or (isinstance(value[0], str) and verdicts):
                return [name], within or verdicts
    several = next((names for names in alike.values() if len(names) > 1), [])
    return several, [name for name in verdicts if name not in several]


def guess(fields: Fields) -> str:
    """What to try where no name is known: the two longest texts may be a question and its answer; one alone is a text."""
    flat: dict[str, Any] = {name: value for name, value in fields.items() if not isinstance(value, dict)}
    for outer, value in fields.items():
        flat |= {f"{outer}.{inner}": one for inner, one in value.items()} if isinstance(value, dict) else {}
    known = ("system", "tools", "functions", "history")
    flat = {name: one for name, one in flat.items() if name not in known and not _NAMELESS.fullmatch(name.lower())}
    texts = {name: value for name, value in flat.items() if isinstance(value, str) and re.search(r"[^\W\d_]", value)}
    longest = sorted(texts, key=lambda name: -len(texts[name]))[:2]
    theirs = [name for name in texts if name in longest]
    lists = [name for name, value in flat.items() if isinstance(value, list) and value]
    if turns := next((name for name in lists if is_turn(flat[name][0])), None):
        return f"If the turns of a conversation stand in '{turns}', set {columns_of({'messages': turns})}."
    if lists and (
        len(theirs) < 2 or any(_RIVAL.fullmatch(name.partition(".")[0].lower().removesuffix("s")) for name in lists)
    ):
        return (
            f"Lists stand in {listed(lists)}: of turns, each has to say who speaks ({{role, content}}); of several questions or answers, "
            "write a record for each."
        )
    if not theirs:
        return "Name their fields with data.columns, as in {prompt: question, completion: answer}."
    if len(theirs) == 1:
        return f"If '{theirs[0]}' is the text to learn, set {columns_of({'text': theirs[0]})}."
    asked, answered = theirs
    return (
        f"If '{answered}' answers '{asked}', set {columns_of({'prompt': asked, 'completion': answered})}; if others do, write "
        "their names there."
    )


def looks_note(texts: Sequence[str]) -> list[str]:
    """For the report: which texts look like something else than running text. They are learnt as text all the same."""
    found = Counter(kind for text in texts if (kind := _looks_like(text[:_LOOKED_AT])))
    what = listed([f"{count:,} look{'s' * (count == 1)} like {kind}" for kind, count in found.most_common()])
    of = "the one text" if len(texts) == 1 else f"{len(texts):,} texts"
    return [f"of {of}, {what}; read as plain text, every word is learnt, and no chat template is used"] if found else []


def separators_note(pairs: Sequence[tuple[str, str]]) -> list[str]:
    """For the report: marks behind (nearly) all prompts and answers that stood for what a chat template writes today."""
    found = []
    for which, marks, texts in (
        ("questions", _AFTER_PROMPTS, [asked for asked, _ in pairs]),
        ("answers", _AFTER_ANSWERS, [answer for _, answer in pairs]),
    ):
        ends = Counter(match[1] for text in texts if (match := marks.search(text)))
        if ends and (most := ends.most_common(1)[0])[1] > 0.9 * len(texts):
            found.append(f"{which} with '{most[0]}'")
    if not found:
        return []
    return [
        f"nearly all {' and '.join(found)} end, as older fine-tuning asked; a chat template has marks of its own, and these are read "
        "as words, in answers learnt: take them out"
    ]


def _looks_like(text: str) -> str | None:
    if MARKS.search(text) or (_ASKS.search(text) and _REPLIES.search(text)):
        return "questions with their answers (as messages, or as prompt and completion, the answers alone would be)"
    if _FIELDS.search(text):
        return "records (as .json or .jsonl, their fields would be read)"
    lines = [line for line in text.split("\n")[:50] if line.strip()]
    if len(lines) > 2 and all(line.count("||") == 1 for line in lines):
        return "pairs with || between them (as prompt and completion, the second halves alone would be)"
    blocks = [block.strip().count("\n") + 1 for block in re.split(r"\n\s*\n", text)[:25] if block.strip()]
    if len(blocks) > 2 and {*blocks[:-1]} == {2}:
        return "pairs of lines (as prompt and completion, the second lines alone would be)"
    for sign in "\t;|,":
        prose = f"{sign} " in lines[0] if lines else False  # as sentences have commas
        if len(lines) > 2 and lines[0].count(sign) and not prose and len({line.count(sign) for line in lines}) == 1:
            return "a table (name the file .csv, so that its columns are read)"
    return "code" if len(lines) > 2 and 2 * sum(map(bool, map(_CODE.search, lines))) > len(lines) else None


def columns_of(theirs: Mapping[str, str]) -> str:
    """What to write where a form's fields have other names; nothing where none has."""
    other = {ours: name for ours, name in theirs.items() if ours != name}
    plain = {
        name: name if re.fullmatch(r"[\w.-]+", name) else json.dumps(name, ensure_ascii=False)
        for name in other.values()
    }
    pairs = ", ".join(f"{ours}: {plain[name]}" for ours, name in other.items())
    return f"data.columns={shlex.quote(f'{{{pairs}}}')}" if pairs else ""


def inside(fields: Fields, path: str) -> object:
    """The field of this name, or the one inside another that ``translation.en`` leads to."""
    if path in fields:
        return fields[path]
    outer, _, inner = path.partition(".")
    value = fields.get(outer)
    return inside(value, inner) if inner and isinstance(value, dict) else NOTHING
