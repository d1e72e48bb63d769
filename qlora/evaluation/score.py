"""Held-out loss: the same summed cross-entropy as in training, without gradients and without ever holding full logits.

Knows rows and the loss; must not know training.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from qlora.data.batches import collate
from qlora.data.packing import Row
from qlora.errors import DataError
from qlora.evaluation.classes import Classes, classes_of
from qlora.evaluation.generate import in_eval_mode
from qlora.machine.device import in_smaller_parts
from qlora.methods.base import AdaptedModel
from qlora.model.checks import check_rows, packs_one_row
from qlora.model.loss import IGNORE_INDEX, Head, head_of, hidden_states, token_loss
from qlora.recipe.methods import labels_of


@dataclass(frozen=True)
class Preferences:
    """What is measured of pairs of answers beside their loss."""

    pairs: int
    accuracy: float
    """The share of pairs whose chosen answer has the higher reward; where both have the same, half. DPO's rewards are how much
    likelier an answer became, so it is 0.5 before training."""
    margin: float
    """How much higher its reward is, on average."""
    likelier: float
    """The share of pairs whose chosen answer is likelier a token."""

    def __str__(self) -> str:
        return f"chosen answer ahead in {self.accuracy:.1%} of {self.pairs:,} pairs (margin {self.margin:.3f}), likelier a token in {self.likelier:.1%}"


@dataclass(frozen=True)
class HeldOut:
    """Held-out loss in nats per target token, its exponential, and how many target tokens it is a mean over. Of pairs: the
    objective's loss per pair, and the other two of the chosen answers."""

    loss: float
    perplexity: float
    target_tokens: int
    rows: tuple[tuple[float, int], ...] = ()
    """Of each row, as they were given, its summed loss in nats and its target tokens or pairs: what a comparison row by row needs."""
    preferences: Preferences | None = None
    """Of pairs."""
    classes: Classes | None = None
    """Of a classifier, whose target tokens are its examples."""


def difference(one: HeldOut, other: HeldOut) -> tuple[float, float]:
    """(how much more loss ``one`` has than ``other`` in nats a target token or pair, its standard error), paired row by row.

    The error is that of a ratio of sums over rows, infinite for a single row. Raises ValueError unless both are of the same rows.
    """
    if not one.rows or [count for _, count in one.rows] != [count for _, count in other.rows]:
        raise ValueError("Two measurements of the same held-out rows were expected.")
    more = [mine - theirs for (mine, _), (theirs, _) in zip(one.rows, other.rows, strict=True)]
    whole, count = sum(tokens for _, tokens in one.rows), len(more)
    mean = math.fsum(more) / whole
    spread = math.fsum((each - mean * tokens) ** 2 for each, (_, tokens) in zip(more, one.rows, strict=True))
    return mean, math.sqrt(spread * count / (count - 1)) / whole if count > 1 else math.inf


class Verdict(NamedTuple):
    """What training came to on what is held out."""

    outcome: Literal["better", "no clear change", "worse", "diverged"]
    said: str
    """By how much, with its paired standard error and over how many tokens, and what to do where it is not better."""

    def __str__(self) -> str:
        return f"{self.outcome}: {self.said}"


def verdict(before: HeldOut, after: HeldOut) -> Verdict:
    """Better, worse, or no clear change where the difference is below two standard errors; of a single row, which has none, by
    its sign. Raises ValueError unless both are of the same rows."""
    if not math.isfinite(after.loss):
        return Verdict("diverged", "the loss is not finite any more; lower training.learning_rate")
    more, error = difference(after, before)
    unit = "pair" if after.preferences else "example" if after.classes else "token"
    each = f"{'an' if unit == 'example' else 'a'} {unit}"
    way, among = "more" if more > 0 else "less", f"over {sum(count for _, count in after.rows):,} held-out {unit}s"
    if math.isinf(error):
        said = f"{abs(more):.4f} nats {each} {way}, {among} in one row, which has no standard error; hold more out"
    else:
        said = f"{abs(more):.4f} ± {error:.4f} nats {each} {way}, {among}"
    if abs(more) < 2 * error < math.inf or not more:
        return Verdict("no clear change", said)
    return (
        Verdict("worse", f"{said}; lower training.learning_rate, or train for fewer steps")
        if more > 0
        else Verdict("better", said)
    )


@torch.no_grad()
def score(model: AdaptedModel, rows: Sequence[Row], rows_at_once: int = 4, chunk: int = 256) -> HeldOut:
    """The mean loss over all target tokens of ``rows``, ``rows_at_once`` to a batch, ``chunk`` targets' logits at a time.

    Raises DataError when there is no target token, and for tokens or positions that the model doesn't have. Where memory
    runs out it goes on with half as many rows, and in the end with smaller chunks; DoesNotFitError when one row is too much.
    """
    if packs_one_row(model.model) and any(row.packed for row in rows):
        rows_at_once = 1
    virtual = model.virtual_tokens
    check_rows(model.model, rows, model.first_position, virtual, "Held-out row")
    # Rows of like length share a batch, so that little is padded; a row's loss does not depend on it.
    places = sorted(range(len(rows)), key=lambda place: len(rows[place].ids) + virtual * len(rows[place].examples))

    def measured(start: int, stop: int, chunk: int) -> list[_Measured]:
        return _losses(model, [rows[place] for place in places[start:stop]], chunk)

    lengths = [len(rows[place].ids) for place in places]
    with in_eval_mode(model.model):
        found = in_smaller_parts(lengths, rows_at_once, chunk, measured, model.device, "held-out row")
    if not (count := sum(one.targets for one in found)):
        raise DataError("The held-out rows have no target token to measure; give others, or raise data.max_length.")
    mean = math.fsum(one.loss for one in found) / count
    by_place = dict(zip(places, found, strict=True))
    labels = labels_of(model.section)
    return HeldOut(
        mean,
        math.exp(mean) if mean < 700 else math.inf,
        count,
        tuple((by_place[place].loss, by_place[place].targets) for place in range(len(rows))),
        classes=classes_of([pair for one in found for pair in one.chosen], labels) if labels else None,
    )


class _Measured(NamedTuple):
    """One row: its summed loss in nats, its target tokens, and of a classifier's examples the (chosen, right) class of each."""

    loss: float
    targets: int
    chosen: list[tuple[int, int]]


def _losses(model: AdaptedModel, rows: list[Row], chunk: int) -> list[_Measured]:
    pad = getattr(model.tokenizer, "pad_token_id", None)
    batch = collate(rows, 0 if pad is None else int(pad), model.virtual_tokens)
    given = {key: values if key == "labels" else values.to(model.device) for key, values in batch.items()}
    hidden, head = hidden_states(model.model, given), head_of(model.model)
    classifies, found = bool(labels_of(model.section)), []
    for place in range(len(rows)):
        labels = given["labels"][place]
        loss, targets = token_loss(hidden[place : place + 1], head, labels[None], chunk)
        chosen = _chosen(hidden[place], head, labels) if classifies else []
        found.append(_Measured(loss.item(), targets, chosen))
    return found


def _chosen(hidden_TD: Tensor, head: Head, labels_T: Tensor) -> list[tuple[int, int]]:
    """The (chosen, right) class of each example of a row."""
    places = (labels_T[1:] != IGNORE_INDEX).nonzero().squeeze(1)
    logits = head.logits(hidden_TD[places.to(hidden_TD.device)])
    return list(zip(logits.argmax(-1).tolist(), labels_T[places + 1].tolist(), strict=True))
