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
answer at its end. Elsewhere the last two forms train on the good answers alone, and only when they are asked for by name. What else has a value in a record is counted by its name and not read. Knows records; must not know a
tokenizer or a template. *New data format* → one function here and one line in ``_FORMS``.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import cast

from qlora.data.columns import Labels, fields_of
from qlora.data.columns import renamed as as_named
from qlora.data.mistakes import BadRecords
from qlora.data.sources import Record
from qlora.data.suggestions import (
    OTHERS,
    SURE_LABELS,
    columns_of,
    guess,
    looks_note,
    reads,
    rivals,
    separators_note,
    suggested,
)
from qlora.data.turns import (
    LIKE_A_LABEL,
    UNSEEN,
    Turn,
    filled,
    is_flag,
    is_spoken,
    is_turn,
    may_decide,
    not_trained,
    read_turn,
    read_turns,
    say_thoughts_once,
    seen_in,
    spoken_in,
    tools_of,
)
from qlora.data.turns import Message as Message
from qlora.data.values import Mistake, capital, function_calls, json_inside, kind, text, verdict
from qlora.errors import DataError, listed
from qlora.files.strangers import JsonObject

_PLACEHOLDER = re.compile(
    r"\A\s*<(?:image|video|audio)>|<(?:image|video|audio)>\s*\Z|<img>[^<\s]+</img>|<\|(?:image(?:_\d+|_pad)?|vision_start)\|>"
)
"""Where a question has its picture or sound, as LLaVA, Qwen-VL, Phi and Llama write it."""
_PICTURE = re.compile(r"!\[[^\]\n]*\]\([^)\s]+\)|data:(?:image|audio|video)/\w+;base64,|<(?:image|video|audio)>")
"""What may be one, and may be what is spoken of."""
Fields = Mapping[str, object]
"""What a record holds."""

_DOCUMENTS = ("documents", "contexts", "passages", "chunks", "context")
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
class Parsed:
    """What ``parse`` returns: the form, and the records in their order, as texts where the form is ``text``."""

    form: str
    records: list[Conversation | str] = field(default_factory=list)
    notes: tuple[str, ...] = ()
    """Sentences about fields and records that were not read."""
    bad: BadRecords = field(default_factory=BadRecords)
    """Records that were left out, and those that will be."""

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
) -> Parsed:
    """Give every record its meaning. ``columns`` and ``labels`` say where a form's fields are (``columns.py``). With ``pairs``
    every conversation has its ``rejected`` one, and no other form than ``preference`` is taken.

    ``auto`` takes the form of the first record, and every other record must have it too. All records are checked before
    DataError is raised; it says of the first five that are wrong what they hold, and how many more there are. With
    ``on_bad_record='skip'`` they are left out and counted by kind, if they are few.
    """
    columns, bad = columns or {}, BadRecords(len(records), on_bad_record)
    fields = sorted({name for one in _FORMS.values() for name in (*one.needs, *one.takes)})
    renamed = as_named(records, columns, labels or {}, fields)
    readable = [record for record in renamed if record.fault is None]
    first = (readable or renamed)[0]
    if pairs:
        form = _form_of_pairs(first, form)
    elif form == "auto":
        form = _found_form(readable) if readable else "text"  # of which no record will be
    wanted = _FORMS[form]
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
            _require_form(record, form, first.place)
            _require_trained(record.fields)
            read = wanted.read(record.fields)
            one = read.conversation(record.place) if isinstance(read, _Talk) else read
            if pairs and isinstance(one, Conversation):
                one = _paired(one, _preference(record.fields, "rejected").conversation(record.place))
        except Mistake as mistake:
            bad.add(record.place, mistake)
            continue
        unread.update(f"'{name}' beside the records" for name in before.beside)
        unread.update(f"'{name}'" for name, value in before.fields.items() if name not in known and filled(value))
        if form != "text" and _is_switch(record.fields.get("reasoning")):
            unread["'reasoning'"] += 1
        if isinstance(read, _Talk):
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
        notes.append(f"nulls that a table filled in are left out of {_counted(count)}")
    if alike:
        notes.append(f"left out, as the chosen answer is the rejected one too: {_counted(alike)}")
    if form == "preference" and not pairs:
        notes.append("data.form=preference trains the chosen answers alone; the rejected ones are not used")
    if form == "kto":
        notes.append(
            f"data.form=kto trains the desirable answers alone; left out as undesirable: {_counted(undesired)}"
        )
    if others_marked:
        notes.append(
            f"only answers are trained: turns of others are marked as trained in {_counted(others_marked)}, which has no effect"
        )
    if nulls:
        notes.append(f"arguments of calls are null in {_counted(nulls)}, and learnt so")
    if pictured:
        notes.append(f"pictures are named in {_counted(pictured)}, and read as text: a text model can't see them")
    if unread:
        names = [f"{name} ({_counted(count)})" for name, count in unread.most_common()]
        notes.append(f"fields that are not read: {listed(names, 12)}".encode(errors="replace").decode())
    return Parsed(form, parsed, tuple(notes), bad)


def _counted(count: int) -> str:
    return f"{count:,} record{'s' * (count != 1)}"


def detect_form(fields: Fields) -> str | None:
    """The first form whose fields are all there, in the order of ``_FORMS``; None when none is.

    One whose turns are no list is named only when no form matches, so that it can be said what is wrong.
    """
    there = [name for name, form in _FORMS.items() if name != "kto" and fields.keys() >= set(form.needs)]
    return next((name for name in there if _FORMS[name].matches(fields)), there[0] if there else None)


def _form_of_pairs(record: Record, form: str) -> str:
    """The form of pairs, where the recipe's is that or left open, and the first record has both answers. Raises DataError."""
    fields = record.fields
    if form not in ("auto", "preference"):
        raise DataError(
            f"data.form is {form}, and the objective compares a chosen answer with a rejected one; leave data.form out, or set "
            "objective.name=tokens to learn from single answers."
        )
    if record.fault is None and form == "auto" and not (fields.keys() >= {"chosen", "rejected"}):
        name, theirs = suggested(fields, _FORMS) or ("", {})
        several, _ = rivals(fields)
        do = "Give records with a 'chosen' and a 'rejected' answer"
        if name == "preference":
            do = f"Set {columns_of(theirs)} to read it so"
        elif several:
            do = f"Write the better one of {listed(several)} as 'chosen' and another as 'rejected'"
        raise DataError(
            f"{capital(record.place)} has the fields {listed(fields, 12) or '(none)'}; the objective compares answers, and expected "
            f"'chosen' and 'rejected' among them. {do}, or set objective.name=tokens to learn from single answers."
        )
    return "preference"


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


def _found_form(records: Sequence[Record]) -> str:
    """The form of the first record. A preference set is refused, as to learn the next token from all of it would be wrong."""
    first = records[0]
    plain = detect_form({name: value for name, value in first.fields.items() if name not in ("chosen", "rejected")})
    if pairs := next((one for one in records if filled(one.fields.get("chosen")) and "rejected" in one.fields), None):
        other = f", or data.form={plain} to read the records as {plain} and leave both aside" if plain else ""
        name, theirs = suggested(pairs.fields, _FORMS) or ("", {})
        asked = "instruction" in pairs.fields or name != "preference"
        columns = "" if asked or not columns_of(theirs) else f" and {columns_of(theirs)}"
        raise DataError(
            f"{capital(pairs.place)} has the form preference, an answer that was chosen and one that was rejected. Set "
            f"objective.name=dpo{columns} to learn from both, or data.form=preference{columns} to train the chosen answers alone{other}."
        )
    if plain in _JUDGED:
        _require_desired(records, plain)
    tree = next((name for name, value in first.fields.items() if isinstance(value, dict) and is_spoken(value)), None)
    if plain is None and tree:
        raise DataError(
            f"{capital(first.place)} has one turn of a conversation in its field {tree}; expected all turns of a conversation in one "
            'record, as in {"messages": [{"role": …, "content": …}, …]}: of a tree of answers (OpenAssistant), a record for each path.'
        )
    if plain in (None, "text") and is_spoken(first.fields):
        raise DataError(
            f"{capital(first.place)} is one turn of a conversation ({listed(first.fields, 12)}); expected all turns of a conversation in one record, "
            'as in {"messages": [{"role": …, "content": …}, …]}. To learn each as a text of its own, set data.form=text'
            f"{'' if plain else ' ' + columns_of({'text': spoken_in(first.fields)})}."
        )
    _require_one_answer(first, plain)
    nearest_form = suggested(first.fields, _FORMS)
    if plain == "text" and nearest_form and nearest_form[0] != "text":
        name, theirs = nearest_form
        raise DataError(
            f"{capital(first.place)} has a text, and beside it {listed(theirs[one] for one in theirs if theirs[one] != 'text')}. Set "
            f"data.form=text to learn the text alone, or {columns_of(theirs)} to read the records as {name}."
        )
    if plain:
        if _FORMS[plain].turns and reads(_FORMS[plain], first.fields):
            _require_last_answer(first, plain)
        _require_all_read(records, plain)
        return plain
    heads = ", by the file's first row" if first.unit == "row" else ""
    found = (
        f"{capital(first.place)} has the fields {listed(first.fields, 12) or '(none)'}{heads}, which are no known form."
    )
    if nearest_form:
        name, theirs = nearest_form
        raise DataError(f"{found} As {name} they are read with {columns_of(theirs)}.")
    for outer, value in first.fields.items():
        if isinstance(value, dict) and (within := detect_form(value)) and reads(_FORMS[within], value):
            theirs = {
                name: f"{outer}.{name}" for name in (*_FORMS[within].needs, *_FORMS[within].takes) if name in value
            }
            raise DataError(
                f"{capital(first.place)} has the form {within} inside its field {outer}; set {columns_of(theirs)}."
            )
    forms = "; ".join(f"{name} ({', '.join(form.needs)})" for name, form in _FORMS.items())
    raise DataError(f"{found} {guess(first.fields)} The forms are {forms}.")


def _require_desired(records: Sequence[Record], form: str) -> None:
    """Refuse a set that says of some answers that they are bad, or not to be trained, by a field of the record."""
    place = capital(records[0].place)
    for name in dict.fromkeys(name for record in records for name in record.fields):
        values = [value for record in records if (value := record.fields.get(name)) is not None]
        if name in ("rejected", *OTHERS["rejected"]) and any(map(filled, values)):
            raise DataError(
                f"{place} has the form preference, {form} with '{name}'. Write its better answer as 'chosen' and that as 'rejected', "
                f"and set objective.name=dpo, to learn from both; or set data.form={form} to train the other answers alone."
            )
        if name in SURE_LABELS or LIKE_A_LABEL.search(name):
            said = [verdict(value) for value in values]
            if said and None not in said and (name in SURE_LABELS or False in said):
                columns = f" {columns_of({'label': name})}" if name != "label" else ""
                raise DataError(
                    f"{place} has the form kto, {form} with '{name}', which says whether the answer is desirable, and "
                    f"no objective learns from undesirable ones yet. Set data.form=kto{columns} to train the desirable answers "
                    f"alone, or data.form={form} if '{name}' says something else, and is not to be read."
                )
        if any(may_decide(name, value) for value in values):
            raise DataError(
                f"{place} has '{name}', which may say whether a record is trained, and by that name or value is not known here. "
                f"Leave out what is not to be trained, and set data.form={form} to train all the others alike."
            )


def _require_last_answer(record: Record, form: str) -> None:
    """Refuse turns that end with a question whose answer stands beside them."""
    turns = _FORMS[form].needs[0]
    said = _turns(record.fields[turns], turns)
    answer = next((n for n in ("completion", *OTHERS["completion"]) if str(record.fields.get(n) or "").strip()), None)
    if answer and said and said[-1].message["role"] == "user":
        raise DataError(
            f"{capital(record.place)} has turns that end with a question, and beside them {answer}. Set "
            f"{columns_of({'prompt': turns, 'completion': answer})} to read that as the answer, or data.form={form} to leave it out."
        )


def _require_one_answer(record: Record, form: str | None) -> None:
    """Refuse a preference set whose two answers have names of their own, or stand in a list."""
    several, verdicts = rivals(record.fields)
    if not several or not (form in (None, "text") or _FORMS[form].turns):
        return
    others = suggested({name: value for name, value in record.fields.items() if name not in several}, _FORMS)
    if form is None and others and others[0] != "text":
        return
    if form in ("messages", "sharegpt"):
        turns = record.fields[_FORMS[form].needs[0]]
        if not isinstance(turns, list) or not turns or read_turn(turns[-1], len(turns)).message["role"] == "assistant":
            return
    says = f", of which {listed(verdicts)} may say which is better" if verdicts else ""
    raise DataError(
        f"{capital(record.place)} has the form preference, several answers to one question ({listed(several, 12)}){says}. Write the "
        "better one of each record as 'chosen' and another as 'rejected'; then set objective.name=dpo to learn from both, or "
        "data.form=preference to train the better ones alone."
    )


def _require_all_read(records: Sequence[Record], form: str) -> None:
    """Refuse records of a form in which a text stands that the form has a place for, by another name."""
    known, seen = {*_FORMS[form].needs, *_FORMS[form].takes}, set[str]()
    for record in records:
        if name := next(
            (name for name in _DOCUMENTS if isinstance(record.fields.get(name), list) and record.fields[name]), None
        ):
            raise DataError(
                f"{capital(record.place)} has the form {form}, and beside it {name}, which its answer may be about. Write them into "
                f"the question, or set data.form={form} to leave them out."
            )
        apart = [
            name
            for name, value in record.fields.items()
            if (isinstance(value, dict) and name.lower() in OTHERS["system"])
            or (isinstance(value, list) and value and name.lower() in OTHERS["tools"])
        ]
        new = {name for name, value in record.fields.items() if isinstance(value, str) and value.strip()}
        new = {*new, *apart} - known - seen
        seen |= new
        said = {name: value for name, value in record.fields.items() if filled(value)}
        best = suggested(said, _FORMS) if new else None
        if best is None or not set(best[1].values()) >= set(_FORMS[form].needs):
            continue
        name, theirs = best
        read = json.dumps([record.fields[one] for one in known if one in record.fields], default=str)
        more = [
            one
            for one in theirs.values()
            if one in new and (one in apart or json.dumps(record.fields[one].strip())[1:-1] not in read)
        ]
        if more:
            raise DataError(
                f"{capital(record.place)} has the form {form}, and beside it {listed(more)}. Set {columns_of(theirs)} to read that "
                f"as well (as {name}), or data.form={form} to leave it out."
            )


def _require_form(record: Record, form: str, first: str) -> None:
    fields, wanted = record.fields, _FORMS[form]
    if wanted.matches(fields):
        return
    missing = [name for name in wanted.needs if fields.get(name) is None]
    other = detect_form(fields)
    if other not in (None, form):
        raise Mistake(f"has the form {other}, but {first} was read as {form}; put one form in a data set")
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


# --- one function a form ---------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Talk:
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


def _messages(fields: Fields) -> _Talk:
    return _talk(fields, _thought(fields, _turns(fields["messages"], "messages")))


def _sharegpt(fields: Fields) -> _Talk:
    return _talk(fields, _thought(fields, _turns(fields["conversations"], "conversations")))


def _alpaca(fields: Fields) -> _Talk:
    answer = _answered(fields, text(fields["output"], "'output'"), "output")
    return _talk(fields, [_instruction(fields), *_thought(fields, answer)])


def _prompt_completion(fields: Fields) -> _Talk:
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
    if _is_switch(fields.get("reasoning")) or not (reasoning := _optional(fields, "reasoning")).strip():
        return answer
    last = dict(answer[-1].message) if answer else {}
    if last.get("role") != "assistant" or last.get("reasoning_content", reasoning) != reasoning:
        raise Mistake("has 'reasoning' beside turns that do not end with its answer, or have another; keep one of them")
    last["reasoning_content"] = reasoning
    say_thoughts_once(last)
    return [*answer[:-1], answer[-1]._replace(message=cast(Message, last))]


def _is_switch(value: object) -> bool:
    return isinstance(value, bool) or (isinstance(value, str) and value.strip().lower() in _SWITCHES)


def _text(fields: Fields) -> str:
    if not (found := text(fields["text"], "'text'")).strip():
        raise Mistake("has an empty 'text'")
    return found


def _preference(fields: Fields, side: str = "chosen") -> _Talk:
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
        asked = _turns(fields[name], name)
    else:
        raise Mistake(
            f"has no 'prompt' before the {side} answer; name its field with data.columns, as in {{prompt: question}}"
        )
    return _talk(fields, [*asked, *said])


def _kto(fields: Fields) -> _Talk | None:
    """None when the answer is not desirable."""
    if (desirable := verdict(fields["label"])) is None:
        raise Mistake(f"has {kind(fields['label'])} in 'label'; expected true or false")
    form = next((name for name in _JUDGED if _FORMS[name].matches(fields)), None)
    if form is None:
        raise Mistake(f"has a label and none of the forms {listed(_JUDGED)}; its fields are {listed(fields, 12)}")
    talk = _FORMS[form].read(fields)
    return talk if desirable and isinstance(talk, _Talk) else None


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
    return _turns(value, name) if isinstance(value, list) else [Turn({"role": role, "content": str(value)})]


def _turns(value: object, name: str) -> list[Turn]:
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


def _talk(fields: Fields, turns: Iterable[Turn]) -> _Talk:
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
    return _Talk(turns, tools)


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
class _Form:
    needs: tuple[str, ...]
    read: Callable[[Fields], _Talk | str | None]
    takes: tuple[str, ...] = ("reasoning", *_BESIDE)
    trains: str = "assistant"
    """What carries loss where the recipe leaves it open."""
    turns: bool = False
    """The field it needs is a list of turns."""

    def matches(self, fields: Fields) -> bool:
        if any(name not in fields for name in self.needs):
            return False
        value = fields[self.needs[0]]
        return not self.turns or isinstance(value, list) or (isinstance(value, str) and value.lstrip().startswith("["))


_JUDGED = ("messages", "sharegpt", "alpaca", "prompt_completion")
_FORMS = {
    "messages": _Form(("messages",), _messages, turns=True),
    "sharegpt": _Form(("conversations",), _sharegpt, turns=True),
    "alpaca": _Form(("instruction", "output"), _alpaca, ("input", "reasoning", *_BESIDE), trains="completion"),
    "prompt_completion": _Form(("prompt", "completion"), _prompt_completion, trains="completion"),
    "text": _Form(("text",), _text, (), trains="all"),
    "preference": _Form(
        ("chosen", "rejected"),
        _preference,
        ("prompt", "instruction", "input", "messages", "conversations", *_BESIDE),
        trains="completion",
    ),
}
_FORMS["kto"] = _Form(
    ("label",),
    _kto,
    tuple(dict.fromkeys(name for form in _JUDGED for name in (*_FORMS[form].needs, *_FORMS[form].takes))),
    trains="completion",
)


def trains(form: str) -> str:
    """What carries loss in records of ``form`` where the recipe leaves it open: assistant, completion or all."""
    return _FORMS[form].trains
