"""Scoring: a task is put to a model, and what it answers is kept as it comes.

    items ─► without those that are kept already ─► batches by length ─► answers, a line each ─► Result

Knows tasks and the model; must not know a kind of task beyond what it asks.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import TextIO

from qlora.errors import DataError
from qlora.evaluation.likelihood import TOKENS_AT_ONCE, likelihoods
from qlora.evaluation.tasks.kinds import KINDS
from qlora.evaluation.tasks.result import Json, Metric, Result, jackknifed, mean_and_error
from qlora.evaluation.tasks.task import Item, Reply, Task
from qlora.files.durable import file_written_aside
from qlora.methods import AdaptedModel, Adapters
from qlora.model import anatomy

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
    with ExitStack() as stack:
        file = None
        if kept is not None and left:
            file = stack.enter_context(_continued(kept, task, whose, answers))
        for item, reply in _replies(model, left, tokens_at_once):
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
            value, error = jackknifed(list(answers), lambda ids: kind.together([answers[key] for key in ids])[name])  # noqa: B023
        else:
            continue
        metrics[name] = Metric(value, error, chance.get(name), better)
    return Result(task.name, task.kind, task.settings, metrics, scores, answers)


def _replies(model: AdaptedModel | Adapters, items: list[Item], tokens_at_once: int) -> Iterator[tuple[Item, Reply]]:
    for number, found in likelihoods(model, [item.pairs for item in items], tokens_at_once):
        yield items[number], Reply(found)


def _require_room(model: AdaptedModel | Adapters, task: Task) -> None:
    limit = anatomy.position_limit(model.model)
    if limit is None:
        return
    room = limit - model.first_position
    for item in task.items:
        if item.longest > room:
            raise DataError(
                f"{item.place[:1].upper()}{item.place[1:]} is {item.longest:,} tokens long, and '{model.base.name}' has {room:,} "
                "positions; leave it out of the data, or take a model with a longer context."
            )


def _head(task: Task, whose: str) -> Json:
    return {"task": task.name, "settings": task.settings, "whose": whose}


def _continued(kept: Path, task: Task, whose: str, answers: dict[str, Json]) -> TextIO:
    """The file, with what was read from it and nothing else, open for more."""
    kept.parent.mkdir(parents=True, exist_ok=True)
    with file_written_aside(kept) as aside:
        lines = [_head(task, whose), *({"id": key, "answer": answer} for key, answer in answers.items())]
        aside.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
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
