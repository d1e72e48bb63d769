"""A task: its items, and of each what the model is asked; and what a kind of task has to say.

    a record ─► Kind.ask ─► Asked: pairs whose likelihood is wanted, a prompt to answer, a text to read
    what the model gave (Reply) ─► Kind.answer ─► Kind.scores, Kind.together

Knows texts and numbers; must not know a file, a tokenizer or a model.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from qlora.data.values import filled_in
from qlora.data.values import kind as kind_of
from qlora.evaluation.likelihood import Ids, Likelihood, Pair
from qlora.evaluation.tasks.result import Json

Better = Literal["higher", "lower"]


class Unusable(Exception):
    """Why a record gives no item, as the end of a sentence that begins with its place."""


@dataclass(frozen=True)
class Form:
    """How a task's records are read: a recipe's section with everything that its public set or its kind decides."""

    prompt: str | None = None
    choices: str | tuple[str, ...] | None = None
    answer: str | None = None
    labels: Mapping[str, str] | None = None
    positive: str | None = None
    blank: str | None = None
    delimiter: str = " "
    stop: tuple[str, ...] = ()
    max_new_tokens: int = 256


@dataclass(frozen=True)
class Asked:
    """What one item asks. ``gold`` is what is right, in the words of its kind: plain JSON."""

    pairs: tuple[tuple[str, str], ...] = ()
    """(context, continuation) texts whose likelihood is wanted."""
    prompt: str | None = None
    """What the model is to go on with."""
    text: str | None = None
    """What the model is to read from its beginning."""
    gold: Json | None = None


@dataclass(frozen=True)
class Reply:
    """What the model gave: a Likelihood for each pair or window, and the text behind the prompt."""

    likelihoods: Sequence[Likelihood] = ()
    text: str = ""


@dataclass(frozen=True)
class Item:
    """One item: its id by content, its place for messages, and what it asks, also in token ids."""

    id: str
    place: str
    asked: Asked
    pairs: tuple[Pair, ...]
    prompt: Ids | None = None

    @property
    def longest(self) -> int:
        """Tokens of its longest row, with the first that is generated behind a prompt."""
        return max([len(self.prompt or ()) + 1, *(len(context) + len(rest) for context, rest in self.pairs)])


@dataclass(frozen=True)
class Kind:
    """A kind of task."""

    metrics: Mapping[str, Better]
    """Which way each metric is better; the first stands for the task."""
    ask: Callable[[Mapping[str, Any], Form], Asked]
    """What a record asks. Raises Unusable."""
    answer: Callable[[Asked, Reply], Json]
    """What is kept of a reply, with all that scores follow from, as plain JSON."""
    scores: Callable[[Json], dict[str, float]] = lambda _: {}
    """What one item scores in each metric of items."""
    together: Callable[[Sequence[Json]], dict[str, float]] = lambda _: {}
    """The metrics of all items; empty for most kinds."""
    chance: Callable[[Sequence[Json], int], dict[str, float]] = lambda _, vocabulary: {}
    """What guessing scores, by metric, where that means something: a choice at random, a token of ``vocabulary``."""


@dataclass(frozen=True)
class Task:
    """An opened task: ``open_task`` makes it, ``score`` asks a model."""

    name: str
    kind: str
    settings: str
    """What it asks, by a hash."""
    items: tuple[Item, ...]
    form: Form
    vocabulary: int
    """Tokens that there are to guess from."""


def filled(text: str, fields: Mapping[str, Any], what: str) -> str:
    """``text`` with each ``{column}`` replaced by what the record has there. Raises Unusable. ``{{`` is a brace."""
    return filled_in(text, lambda name: text_in(fields, name, what))


def text_in(fields: Mapping[str, Any], name: str | None, what: str) -> str:
    """What a record has in a column, as text. Raises Unusable."""
    return said(column(fields, name, what), name or "")


def column(fields: Mapping[str, Any], name: str | None, what: str) -> Any:
    """What a record has in a column. Raises Unusable where there is none."""
    if name is None:
        raise Unusable(f"needs {what}, and the task names none")
    if name not in fields:
        raise Unusable(f"has no '{name}' for {what}; its columns are {', '.join(map(repr, fields))}")
    return fields[name]


def said(value: Any, name: str) -> str:
    """A column's value as text. Raises Unusable for a list, an object or nothing."""
    if isinstance(value, bool) or not isinstance(value, str | int | float):
        raise Unusable(f"has {kind_of(value)} in '{name}'; expected text")
    return str(value)


def judged(asked: Asked, reply: Reply) -> Json:
    """What is kept of a choice: how likely each answer is, in nats, and what is right."""
    return {"log_likelihoods": [one.nats for one in reply.likelihoods], **(asked.gold or {})}


def written(asked: Asked, reply: Reply) -> Json:
    """What is kept of a generated answer: its text, and what is right."""
    return {"text": reply.text, **(asked.gold or {})}
