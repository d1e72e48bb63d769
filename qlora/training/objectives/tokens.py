"""The next token: cross-entropy in nats, summed over target tokens and divided by how many there are in the whole step.

The denominator is the whole step's, so how rows are split into micro-batches, and a short last one, change nothing
(transformers#34191 is what happens otherwise). Knows rows and a model's loss; must not know steps or optimizers.
"""

from __future__ import annotations

from collections.abc import Sequence

from accelerate.utils import send_to_device
from torch import Tensor

from qlora.data.batches import collate
from qlora.data.packing import Row
from qlora.methods.base import AdaptedModel
from qlora.model.loss import batch_loss


class Tokens:
    """Cross-entropy of a model over the target tokens of rows."""

    def __init__(self, model: AdaptedModel) -> None:
        self.model = model

    def denominator(self, rows: Sequence[Row]) -> int:
        """Target tokens."""
        return sum(row.target_tokens for row in rows)

    def batch(self, rows: Sequence[Row]) -> dict[str, Tensor]:
        """Rows as tensors [R, T] on the model's device, padded on the right, the method's virtual tokens before them.
        ``labels`` stay on the CPU, where the loss looks for its targets."""
        pad = getattr(self.model.tokenizer, "pad_token_id", None)
        batch = collate(list(rows), 0 if pad is None else int(pad), self.model.virtual_tokens)
        return send_to_device(batch, self.model.device, skip_keys="labels")

    def loss(self, rows: Sequence[Row], chunk: int) -> Tensor:
        """The cross-entropy of rows that enter the model together, summed over their target tokens."""
        return batch_loss(self.model.model, self.batch(rows), chunk)[0]

    def summed(self, rows: Sequence[Row]) -> list[float]:
        """Nothing."""
        return []

    def told(self, sums: Sequence[float]) -> dict[str, float]:
        """Nothing."""
        return {}
