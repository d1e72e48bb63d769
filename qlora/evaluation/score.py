"""Held-out loss: the same summed cross-entropy as in training, without gradients and without ever holding full logits.

Knows rows and the loss; must not know training.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch

from qlora.data.batches import collate
from qlora.data.packing import Row
from qlora.errors import DataError
from qlora.machine.device import in_smaller_parts
from qlora.methods.base import AdaptedModel
from qlora.model.checks import check_rows, packs_one_row
from qlora.model.loss import head_of, hidden_states, token_loss


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
    unit = "pair" if after.preferences else "token"
    way, among = "more" if more > 0 else "less", f"over {sum(count for _, count in after.rows):,} held-out {unit}s"
    if math.isinf(error):
        said = f"{abs(more):.4f} nats a {unit} {way}, {among} in one row, which has no standard error; hold more out"
    else:
        said = f"{abs(more):.4f} ± {error:.4f} nats a {unit} {way}, {among}"
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
    was_training = model.model.training
    model.model.eval()
    # Rows of like length share a batch, so that little is padded; a row's loss does not depend on it.
    places = sorted(range(len(rows)), key=lambda place: len(rows[place].ids) + virtual * len(rows[place].examples))

    def measured(start: int, stop: int, chunk: int) -> list[tuple[float, int]]:
        return _losses(model, [rows[place] for place in places[start:stop]], chunk)

    try:
        lengths = [len(rows[place].ids) for place in places]
        found = in_smaller_parts(lengths, rows_at_once, chunk, measured, model.device, "held-out row")
    finally:
        model.model.train(was_training)
    if not (count := sum(targets for _, targets in found)):
        raise DataError("The held-out rows have no target token to measure; give others, or raise data.max_length.")
    mean = math.fsum(loss for loss, _ in found) / count
    by_place = dict(zip(places, found, strict=True))
    return HeldOut(
        mean, math.exp(mean) if mean < 700 else math.inf, count, tuple(by_place[place] for place in range(len(rows)))
    )


def _losses(model: AdaptedModel, rows: list[Row], chunk: int) -> list[tuple[float, int]]:
    """Of each row its summed loss in nats, and its target tokens."""
    pad = getattr(model.tokenizer, "pad_token_id", None)
    batch = collate(rows, 0 if pad is None else int(pad), model.virtual_tokens)
    given = {key: values if key == "labels" else values.to(model.device) for key, values in batch.items()}
    hidden, head = hidden_states(model.model, given), head_of(model.model)
    each = [
        token_loss(hidden[place : place + 1], head, given["labels"][place : place + 1], chunk)
        for place in range(len(rows))
    ]
    return [(loss.item(), targets) for loss, targets in each]
