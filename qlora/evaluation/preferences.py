"""Held-out pairs: how often the chosen answer is ahead of the rejected one, and by how much.

    losses, rewards, cross-entropies of pairs ─► HeldOut with Preferences

An objective says what the loss and the reward of a pair are (``training/objectives``). Knows numbers alone.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from torch import Tensor

from qlora.evaluation.score import HeldOut, Preferences


def held_out_pairs(
    losses: Tensor, rewards: Tensor, sums: Tensor, counts: Tensor, pairs_of_rows: Sequence[int]
) -> HeldOut:
    """The measurement of P pairs by their ``losses`` [P] in nats and ``rewards`` [P, 2], and by the summed cross-entropy and the
    tokens, ``sums`` and ``counts`` [P, 2 or more], of the chosen and the rejected answers; all in float64.

    Perplexity and target tokens are those of the chosen answers.
    """
    margins, tokens = rewards[:, 0] - rewards[:, 1], int(counts[:, 0].sum())
    each = sums[:, :2] / counts[:, :2]
    mean = float(sums[:, 0].sum()) / tokens
    return HeldOut(
        loss=float(losses.mean()),
        perplexity=math.exp(mean) if mean < 700 else math.inf,
        target_tokens=tokens,
        rows=tuple(
            (float(part.sum()), pairs)
            for part, pairs in zip(losses.split(list(pairs_of_rows)), pairs_of_rows, strict=True)
        ),
        preferences=Preferences(len(losses), _share(margins), float(margins.mean()), _share(each[:, 1] - each[:, 0])),
    )


def _share(ahead: Tensor) -> float:
    """The share that is positive; what is zero counts half."""
    return float((ahead > 0).double().mean() + (ahead == 0).double().mean() / 2)
