"""Scoring: a task is put to a model, and what it answers is kept as it comes.

    items ─► without those that are kept already ─► batches by length ─► answers, a line each ─► Result

Knows tasks and the model; must not know a kind of task beyond what it asks.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from functools import partial
from itertools import chain, islice
from pathlib import Path
from typing import TextIO

from qlora.data.values import capital
from qlora.errors import DataError
from qlora.evaluation.generate import answers as generated
from qlora.evaluation.generate import room
from qlora.evaluation.likelihood import TOKENS_AT_ONCE, Likelihood, Pair, likelihoods
from qlora.evaluation.tasks.kinds import KINDS
from qlora.evaluation.tasks.result import Json, Metric, Result, jackknifed, mean_and_error
from qlora.evaluation.tasks.task import Item, Kind, Reply, Task
from qlora.files.durable import write_text
from qlora.methods.base import AdaptedModel
from qlora.methods.switching import Adapters

WINDOW = 2048  # tokens that a long text is read by
ANSWERS_AT_ONCE = 16  # that are generated together
Show = Callable[[int, int], None]


def score(
    model: AdaptedModel | Adapters,
    task: Task,
    kept: Path | None = None,
    whose: str = "",
    show: Show | None = None,
    tokens_at_once: int = TOKENS_AT_ONCE,
) -> Result:
    """What ``model`` scores on ``task``.

    ``kept``: a file to which each answer is added as it comes. Those that are there are not asked again, if they are of the same
    task and of the same model, which ``whose`` says: any text, such as the step. ``show``: told (items done, items in all).
    ``tokens_at_once`` go through the model together; it changes memory and speed, the result by rounding alone.
    Raises DataError, before anything is scored, for an item that is longer than the model's context.
    """
    _require_room(model, task)
    answers = _read(kept, task, whose)
    left = [item for item in task.items if item.id not in answers]
    with _continued(kept, task, whose, answers) if kept is not None and left else nullcontext() as file:
        for item, reply in _replies(model, left, task, tokens_at_once):
            answers[item.id] = KINDS[task.kind].answer(item.asked, reply)
            if file is not None:
                file.write(json.dumps({"id": item.id, "answer": answers[item.id]}) + "\n")
                file.flush()
            if show is not None:
                show(len(answers), len(task.items))
    return measured(task, {item.id: answers[item.id] for item in task.items})


def measured(task: Task, answers: dict[str, Json]) -> Result:
    """The result that answers come to."""
    kind, given = KINDS[task.kind], list(answers.values())
    scores = {key: kind.scores(answer) for key, answer in answers.items()}
    chance = kind.chance(given, task.vocabulary)
    metrics = {}
    whole = kind.together(given)
    for name, better in kind.metrics.items():
        if name in next(iter(scores.values())):
            value, error = mean_and_error([one[name] for one in scores.values()])
        elif name in whole:
            value, error = jackknifed(list(answers), partial(_whole, kind, answers, name))
        else:
            continue
        metrics[name] = Metric(value, error, chance.get(name), better)
    return Result(task.name, task.kind, task.settings, metrics, scores, answers)


def _whole(kind: Kind, answers: Mapping[str, Json], name: str, ids: Sequence[str]) -> float:
    """A metric of all items, where these are ``ids``."""
    return kind.together([answers[key] for key in ids])[name]


def _replies(
    model: AdaptedModel | Adapters, items: list[Item], task: Task, tokens_at_once: int
) -> Iterator[tuple[Item, Reply]]:
    """What the model gives for each item, as it comes: the shortest first."""
    generates = any(item.prompt is not None for item in items)
    ordered = sorted(items, key=lambda item: item.longest)
    # answers of like prompts together, so that little is padded; what has none goes to likelihoods as a whole
    size = ANSWERS_AT_ONCE if generates else max(len(ordered), 1)
    for start in range(0, len(ordered), size):
        some = ordered[start : start + size]
        prompts = [item.prompt for item in some if item.prompt is not None]
        texts = (
            generated(model, prompts, task.form.max_new_tokens, stop=task.form.stop) if prompts else [""] * len(some)
        )
        if not any(item.pairs for item in some):
            yield from ((item, Reply(text=text)) for item, text in zip(some, texts, strict=True))
            continue
        width = window(model) if task.kind == "text" else None
        rows = [[windows(pair, width) for pair in item.pairs] for item in some]
        for number, found in likelihoods(model, [list(chain(*row)) for row in rows], tokens_at_once):
            pieces = iter(found)
            whole = [joined(list(islice(pieces, len(parts)))) for parts in rows[number]]
            yield some[number], Reply(whole, texts[number])


def window(model: AdaptedModel | Adapters) -> int:
    """How many tokens of a long text the model reads at once."""
    left = room(model, 0)
    return WINDOW if left is None else min(WINDOW, left)


def windows(pair: Pair, width: int | None) -> list[Pair]:
    """A long text as pairs of at most ``width`` tokens to read, so that each token is predicted once, as in lm-eval: the last
    window is as long as the others, and what it shares with them is context.

    Example, 10 tokens by 4 behind b → b 012|0123, 3 456|4567, 67 8|89 (read | predicted): 5678 are read for the last
    """
    context, tokens = pair
    if width is None or len(context) + len(tokens) - 1 <= width:
        return [pair]
    whole = (*context, *tokens)
    ends = [*range(width, len(whole) - 1, width), len(whole) - 1]
    begins = [0, *ends[:-1]]
    return [
        (whole[max(end - width, 0) : begin + 1], whole[begin + 1 : end + 1])
        for begin, end in zip(begins, ends, strict=True)
    ]


def joined(pieces: list[Likelihood]) -> Likelihood:
    nats, greedy = math.fsum(one.nats for one in pieces), all(one.greedy for one in pieces)
    return Likelihood(nats, greedy, sum(one.tokens for one in pieces))


def _require_room(model: AdaptedModel | Adapters, task: Task) -> None:
    limit = room(model, 0)
    if limit is None or task.kind == "text":
        return
    for item in task.items:
        if item.longest > limit:
            raise DataError(
                f"{capital(item.place)} is {item.longest:,} tokens long, and '{model.base.name}' has {limit:,} positions; leave it "
                "out of the data, or take a model with a longer context."
            )


def _head(task: Task, whose: str) -> Json:
    return {"task": task.name, "settings": task.settings, "whose": whose}


def _continued(kept: Path, task: Task, whose: str, answers: dict[str, Json]) -> TextIO:
    """The file, with what was read from it and nothing else, open for more."""
    kept.parent.mkdir(parents=True, exist_ok=True)
    lines = [_head(task, whose), *({"id": key, "answer": answer} for key, answer in answers.items())]
    write_text(kept, "".join(json.dumps(line) + "\n" for line in lines))
    return kept.open("a", encoding="utf-8")


def _read(kept: Path | None, task: Task, whose: str) -> dict[str, Json]:
    """The answers that are kept already; none from a file of something else. A torn last line is left out."""
    if kept is None or not kept.is_file():
        return {}
    lines = []
    for line in kept.read_text(encoding="utf-8", errors="replace").splitlines():
        try:
            lines.append(json.loads(line))
        except ValueError:
            break
    if not lines or lines[0] != _head(task, whose):
        return {}
    known = {item.id for item in task.items}
    return {line["id"]: line["answer"] for line in lines[1:] if line["id"] in known}
