"""Forgetting: what a model scores less than before on tasks that it was not trained on, and how far its text is from the base's.

    before = Before.of(model, tasks, text)          # adapter off, or before the first step of full fine-tuning
    … training …
    found = before.forgotten(model)
    found.tasks["hellaswag"]["accuracy"]            # Paired(value, error, items): negative where it was forgotten
    found.text.divergence                           # KL of the model's next tokens from the base's, nats a token

Knows tasks and the model; must not know a run or what was trained.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass

import numpy
import torch
from torch import Tensor

from qlora.data.examples import make_example
from qlora.data.packing import Row, make_rows
from qlora.evaluation.divergence import Divergence
from qlora.evaluation.likelihood import states
from qlora.evaluation.tasks.result import Paired, Result, difference
from qlora.evaluation.tasks.scoring import score, windows
from qlora.evaluation.tasks.task import Task
from qlora.methods.base import AdaptedModel
from qlora.methods.planted import Planted
from qlora.methods.switching import Adapters
from qlora.model.base import evaluating
from qlora.model.loss import Head, token_head

ROW = 512  # tokens of general text that are read at once


@dataclass(frozen=True)
class Forgotten:
    """By task and metric the difference to before, item by item; and the text's loss and divergence from before."""

    tasks: dict[str, dict[str, Paired]]
    results: dict[str, Result]
    text: Divergence | None


@dataclass(frozen=True)
class Before:
    """What a model scored on ``tasks``, and its hidden states of ``rows``, kept on the CPU (2 or 4 bytes · tokens · hidden size), with
    its head where that may change."""

    tasks: tuple[Task, ...]
    results: dict[str, Result]
    rows: tuple[Row, ...]
    states: tuple[Tensor, ...]
    head: Head | None

    @classmethod
    def of(
        cls, model: AdaptedModel | Adapters, tasks: Sequence[Task], text: Task | None = None, keep_head: bool = False
    ) -> Before:
        """Look at ``model`` as it stands now. ``text``: a task of kind ``text`` whose texts are general. ``keep_head``: the head is
        frozen now and will be another one, as where a base is trained whole later."""
        rows = () if text is None else tuple(text_rows(text))
        found = tuple(_states(model, row).cpu() for row in rows)
        head = token_head(model.model)
        # one that trains, or holds what trains, is kept as it is now
        changes = (
            keep_head or isinstance(head.module, Planted) or any(one.requires_grad for one in head.module.parameters())
        )
        results = {task.name: score(model, task) for task in tasks}
        return cls(tuple(tasks), results, rows, found, copy.deepcopy(head) if changes else None)

    def forgotten(self, model: AdaptedModel | Adapters) -> Forgotten:
        """The same of ``model`` now, and the differences."""
        results = {task.name: score(model, task) for task in self.tasks}
        apart = {name: difference(result, self.results[name]) for name, result in results.items()}
        text = Divergence()
        for row, before in zip(self.rows, self.states, strict=True):
            now, labels = _states(model, row), torch.from_numpy(row.labels).to(model.device)
            text.add(now, before.to(model.device), labels, token_head(model.model), self.head)
        return Forgotten(apart, results, text if self.rows else None)


def text_rows(task: Task, width: int = ROW) -> list[Row]:
    """The texts of a task as rows of at most ``width`` tokens, each token a target once."""
    examples = [
        make_example([*context, *rest], numpy.arange(len(context) + len(rest)) >= len(context))
        for item in task.items
        for pair in item.pairs
        for context, rest in windows(pair, width)
    ]
    return make_rows(examples, width + 1, packing=False)


@torch.no_grad()
def _states(model: AdaptedModel | Adapters, row: Row) -> Tensor:
    """A row's hidden states [T, D], without those of what a method puts before it."""
    with evaluating(model.model):
        return states(model, [tuple(row.ids.tolist())])[0, model.virtual_tokens :]
