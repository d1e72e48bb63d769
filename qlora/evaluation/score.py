"""Held-out loss: the same summed cross-entropy as in training, without gradients and without ever holding full logits.

Knows rows and the loss; must not know training.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from qlora.data import Row, collate
from qlora.errors import DataError, DoesNotFitError, first_line
from qlora.machine.device import ran_out_of_memory, release_memory
from qlora.methods import AdaptedModel
from qlora.model.checks import check_rows, packs_one_row
from qlora.model.loss import batch_loss

SMALLEST_CHUNK = 16  # target positions whose logits exist at the same time


@dataclass(frozen=True)
class HeldOut:
    """Held-out loss in nats per target token, its exponential, and how many target tokens it is a mean over."""

    loss: float
    perplexity: float
    target_tokens: int


@torch.no_grad()
def score(model: AdaptedModel, rows: Sequence[Row], rows_at_once: int = 4, chunk: int = 256) -> HeldOut:
    """The mean loss over all target tokens of ``rows``, ``rows_at_once`` to a batch, ``chunk`` targets' logits at a time.

    Raises DataError when there is no target token, and for tokens or positions that the model doesn't have. Where memory
    runs out it goes on with half as many rows, and in the end with smaller chunks; DoesNotFitError when one row is too much.
    """
    if packs_one_row(model.model) and any(len(row.examples) > 1 for row in rows):
        rows_at_once = 1
    virtual = model.virtual_tokens
    check_rows(model.model, rows, model.first_position, virtual, "Held-out row")
    was_training = model.model.training
    model.model.eval()
    total, count, start = 0.0, 0, 0
    # Rows of like length share a batch, so that little is padded; the sum does not depend on it.
    ordered = sorted(rows, key=lambda row: len(row.ids) + virtual * len(row.examples))
    try:
        while start < len(ordered):
            together = ordered[start : start + rows_at_once]
            try:
                loss, targets = _batch_loss(model, together, chunk)
                total, count, start = total + loss, count + targets, start + len(together)
                continue
            except Exception as error:
                if not ran_out_of_memory(error):
                    raise
                reason = first_line(error)
            release_memory(model.device)  # out here, where the exception no longer holds the tensors of its frames
            if len(together) > 1:
                rows_at_once = len(together) // 2
            elif chunk > SMALLEST_CHUNK:
                chunk = max(SMALLEST_CHUNK, chunk // 2)
            else:
                raise DoesNotFitError(
                    f"Measuring one held-out row of {len(together[0].ids):,} tokens did not fit into memory ({reason}), and no "
                    "smaller way is left; lower data.max_length, or hold out shorter rows."
                )
    finally:
        model.model.train(was_training)
    if not count:
        raise DataError("The held-out rows have no target token to measure; give others, or raise data.max_length.")
    mean = total / count
    return HeldOut(mean, math.exp(mean) if mean < 700 else math.inf, count)


def _batch_loss(model: AdaptedModel, rows: list[Row], chunk: int) -> tuple[float, int]:
    """The summed loss of some rows in nats, and their target tokens."""
    pad = getattr(model.tokenizer, "pad_token_id", None)
    batch = collate(rows, 0 if pad is None else int(pad), model.virtual_tokens)
    loss, targets = batch_loss(
        model.model,
        {key: values if key == "labels" else values.to(model.device) for key, values in batch.items()},
        chunk,
    )
    return loss.item(), targets
