"""Opening: a recipe's section becomes a task.

    section, public set ─► Form ─► records ─► asked ─► token ids ─► Task

Everything that can be wrong with a task's data is found here, before a model is loaded. Knows records, tokenizers and chat
templates; must not know a model.
"""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, fields, replace
from functools import partial
from typing import TYPE_CHECKING, Any

from qlora.data.rendering import CutOff, Job, Refused
from qlora.data.sources import Record, read_records
from qlora.data.values import capital
from qlora.errors import DataError, RecipeError, listed
from qlora.evaluation.likelihood import Ids, Pair
from qlora.evaluation.tasks.kinds import KINDS
from qlora.evaluation.tasks.presets import Preset, Tidy, named_kind, preset_of
from qlora.evaluation.tasks.task import Asked, Form, Item, Task, Unusable
from qlora.recipe import TaskSection

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from qlora.data.chat import ChatTemplate


def open_task(section: TaskSection, tokenizer: PreTrainedTokenizerBase, template: ChatTemplate | None = None) -> Task:
    """The task of a recipe's section, its items in token ids. ``template``: what ``chat: true`` asks in.

    Raises RecipeError for a section without a kind or without data, DataError for data that are missing or that give no item,
    with the first record's place.
    """
    preset, kind = preset_of(section), named_kind(section)
    if section.data is None and preset is None:
        raise RecipeError(f"The task '{section.name}' has no data; expected a file, a folder or a hub id.")
    if section.chat and template is None:
        raise RecipeError(
            f"The task '{section.name}' asks for chat, and this run has no chat template; leave chat out."
        )
    if section.chat and kind == "text":
        raise RecipeError(
            f"The task '{section.name}' asks for chat, but a text is no turn of a conversation; leave chat out."
        )
    preset = preset or Preset(kind, {}, ("", None, "test"))
    form = _form(section, preset)
    hub = preset.hub if section.data in (None, preset.hub[0]) else ("", None, "test")
    try:
        records = read_records(section.data or hub[0], section.subset or hub[1], section.split or hub[2], section.limit)
    except DataError as error:
        raise DataError(f"The task '{section.name}' cannot be read. {error}") from None
    asked = [_asked(section.name, kind, record, form, preset.tidy) for record in records]
    encode = partial(encoded_pair, tokenizer)
    if section.chat and template is not None:
        asked, encode = _in_chat(asked, template), partial(_encoded_chat, tokenizer)
    settings = _digest(kind, asdict(form), template.text if section.chat and template is not None else None)
    items, seen = [], Counter[str]()
    for record, one in zip(records, asked, strict=True):
        digest = _digest(asdict(one))
        seen[digest] += 1
        name = digest if seen[digest] == 1 else f"{digest}-{seen[digest]}"
        prompt = None if one.prompt is None else encode(one.prompt, "")[0]
        place = f"{record.place} of the task '{section.name}'"
        pairs = tuple(encode(*pair) for pair in one.pairs)
        if not all(before and rest for before, rest in pairs):
            raise DataError(
                f"{capital(place)} has an answer that adds no token to its prompt, so that nothing can be scored."
            )
        items.append(Item(name, place, one, pairs, prompt))
    return Task(section.name, kind, settings, tuple(items), form, len(tokenizer))


def _form(section: TaskSection, preset: Preset) -> Form:
    """What says how records are read: the section, and what it leaves out by its public set."""
    own = {one.name: getattr(section, one.name) for one in fields(Form)}
    chosen = {name: value for name, value in own.items() if value is not None}
    return Form(**{**preset.values, **chosen})


def _asked(task: str, kind: str, record: Record, form: Form, tidy: Tidy) -> Asked:
    try:
        if record.fault is not None:
            raise Unusable(record.fault)
        try:
            found = tidy(record.fields)
        except (AttributeError, IndexError, KeyError, TypeError, ValueError):
            raise Unusable(
                f"has the columns {listed(record.fields, 12)}, which are not those of the public set"
            ) from None
        return KINDS[kind].ask(found, form)
    except Unusable as error:
        raise DataError(f"{capital(record.place)} of the task '{task}' {error}.") from None


def _in_chat(asked: Sequence[Asked], template: ChatTemplate) -> list[Asked]:
    """The same with every prompt as the user's turn of a conversation, and behind it what begins an answer."""
    texts = list(
        {
            text: None
            for one in asked
            for text in (*(context for context, _ in one.pairs), one.prompt)
            if text is not None
        }
    )
    jobs = [Job([{"role": "user", "content": text}], None, [(1, True)]) for text in texts]
    try:
        found = {text: one.text for text, (one,) in zip(texts, template.renderer.render(jobs), strict=True)}
    except (Refused, CutOff) as error:
        raise DataError(f"The chat template ({template.name}) refuses a task's prompt: {error}.") from None
    return [
        replace(
            one,
            pairs=tuple((found[context], answer.lstrip()) for context, answer in one.pairs),
            prompt=None if one.prompt is None else found[one.prompt],
        )
        for one in asked
    ]


def _encoded_chat(tokenizer: PreTrainedTokenizerBase, context: str, continuation: str) -> Pair:
    """As training has it: the template writes its special tokens, and the answer begins right behind it."""
    whole, before = (
        tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
        for text in (context + continuation, context)
    )
    return tuple(before), tuple(whole[len(before) :])


def _digest(*values: Any) -> str:
    return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()[:16]


def encoded_pair(tokenizer: PreTrainedTokenizerBase, context: str, continuation: str) -> Pair:
    """The token ids of a context and of what follows it, tokenised as one text, so that a word is cut as it is in running text.

    As in lm-eval: spaces at the end of the context belong to the continuation, and an empty context is the token that texts
    begin with.
    """
    bare = context.rstrip()
    whole = encoded(tokenizer, context + continuation)
    if not bare:
        return begin(tokenizer), whole[len(encoded(tokenizer, "")) :]
    length = len(encoded(tokenizer, bare))
    return whole[:length], whole[length:]


def encoded(tokenizer: PreTrainedTokenizerBase, text: str) -> Ids:
    """A text's ids, with the bos token where the tokenizer has that habit, and without an end."""
    ids: list[int] = tokenizer(text, verbose=False)["input_ids"]
    return tuple(ids[:-1] if ids and ids[-1] == tokenizer.eos_token_id and text else ids)


def begin(tokenizer: PreTrainedTokenizerBase) -> Ids:
    """What a text without a context is behind: bos, or the end of the text before it."""
    token = tokenizer.bos_token_id if tokenizer.bos_token_id is not None else tokenizer.eos_token_id
    return (0 if token is None else int(token),)
