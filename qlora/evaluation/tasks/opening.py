"""Opening: a recipe's section becomes a task.

    section, public set ─► Form ─► records ─► asked ─► token ids ─► Task

Everything that can be wrong with a task's data is found here, before a model is loaded. Knows records, tokenizers and chat
templates; must not know a model.
"""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from dataclasses import asdict, fields
from typing import TYPE_CHECKING, Any

from qlora.data.sources import Record, read_records
from qlora.data.values import capital
from qlora.errors import DataError, RecipeError
from qlora.evaluation.likelihood import Ids, Pair
from qlora.evaluation.tasks.kinds import KINDS
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
    kind = section.kind
    if kind not in KINDS:
        raise RecipeError(f"The task '{section.name}' has no kind; expected one of {', '.join(KINDS)}.")
    if section.data is None:
        raise RecipeError(f"The task '{section.name}' has no data; expected a file, a folder or a hub id.")
    form = _form(section)
    try:
        records = read_records(section.data, section.subset, section.split or "test", section.limit)
    except DataError as error:
        raise DataError(f"The task '{section.name}' cannot be read. {error}") from None
    asked = [_asked(section.name, kind, record, form) for record in records]
    settings = _digest(kind, asdict(form), section.chat)
    items, seen = [], Counter[str]()
    for record, one in zip(records, asked, strict=True):
        digest = _digest(asdict(one))
        seen[digest] += 1
        name = digest if seen[digest] == 1 else f"{digest}-{seen[digest]}"
        pairs = tuple(encoded_pair(tokenizer, *pair) for pair in one.pairs)
        items.append(Item(name, f"{record.place} of the task '{section.name}'", one, pairs))
    return Task(section.name, kind, settings, tuple(items), form, len(tokenizer))


def _form(section: TaskSection) -> Form:
    """What of a section says how records are read."""
    own = {one.name: getattr(section, one.name) for one in fields(Form)}
    return Form(**{name: value for name, value in own.items() if value is not None})


def _asked(task: str, kind: str, record: Record, form: Form) -> Asked:
    try:
        if record.fault is not None:
            raise Unusable(record.fault)
        return KINDS[kind].ask(record.fields, form)
    except Unusable as error:
        raise DataError(f"{capital(record.place)} of the task '{task}' {error}.") from None


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
