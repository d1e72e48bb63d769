"""Held-out loss: the same summed cross-entropy as in training, without gradients and without ever holding full logits.

Knows rows and the loss; must not know training.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from qlora.data import Row, collate
from qlora.errors import DataError
from qlora.methods import AdaptedModel
from qlora.model.checks import check_rows, packs_one_row
from qlora.model.loss import batch_loss


@dataclass(frozen=True)
class HeldOut:
    """Held-out loss in nats a target token, its exponential, and over how many target tokens."""

    loss: float
    perplexity: float
    target_tokens: int


@torch.no_grad()
def score(model: AdaptedModel, rows: Sequence[Row], rows_at_once: int = 4, chunk: int = 256) -> HeldOut:
    """The mean loss over all target tokens of ``rows``.

    Raises DataError when they hold none, and for tokens or positions that the model has not.

    Rows of like length share a batch, so that little is padded; the sum does not depend on it.
    """
    if packs_one_row(model.model) and any(len(row.examples) > 1 for row in rows):
        rows_at_once = 1
    pad = getattr(model.tokenizer, "pad_token_id", None)
    virtual = model.virtual_tokens
    check_rows(model.model, rows, model.first_position, virtual, "Held-out row")
    was_training = model.model.training
    model.model.eval()
    total, count = 0.0, 0
    try:
        ordered = sorted(rows, key=lambda row: len(row.ids) + virtual * len(row.examples))
        for start in range(0, len(ordered), rows_at_once):
            batch = collate(list(ordered[start : start + rows_at_once]), 0 if pad is None else int(pad), virtual)
            loss, targets = batch_loss(model.model, {k: v.to(model.device) for k, v in batch.items()}, chunk)
            total += loss.item()
            count += targets
    finally:
        model.model.train(was_training)
    if not count:
        raise DataError("The held-out rows have no target token to measure; give others, or raise data.max_length.")
    mean = total / count
    return HeldOut(mean, math.exp(mean) if mean < 700 else math.inf, count)
