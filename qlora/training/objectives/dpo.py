"""DPO and IPO: how much likelier an answer became than before training, the chosen one beside the rejected one.

    reward r = β (log p(answer) − log p before training)         margin m = r⁺ − r⁻
    DPO   −(1 − ε) log σ(m) − ε log σ(−m)                        (Rafailov et al. 2023, arXiv:2305.18290, equation 7)
    IPO   (d⁺ − d⁻ − 1 / 2β)², d = r / β a token of the answer   (Azar et al. 2023, arXiv:2310.12036, equation 17)

Knows numbers alone.
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from qlora.recipe import DPO, IPO
from qlora.training.objectives.pairs import Compared, answers


class DPOComparison:
    """The sigmoid loss."""

    prompts = False

    def __init__(self, section: DPO) -> None:
        self.beta, self.smoothing = section.beta, section.label_smoothing

    def __call__(self, sums: Tensor, counts: Tensor, reference: Tensor) -> Compared:
        """See ``Comparison``."""
        rewards = self.beta * (answers(sums) - reference)
        margin = rewards[:, 0] - rewards[:, 1]
        losses = -(1 - self.smoothing) * F.logsigmoid(margin) - self.smoothing * F.logsigmoid(-margin)
        return Compared(losses, rewards)


class IPOComparison:
    """The squared loss. Sums are divided by the answers' lengths, as its authors do it."""

    prompts = False

    def __init__(self, section: IPO) -> None:
        self.beta = section.beta

    def __call__(self, sums: Tensor, counts: Tensor, reference: Tensor) -> Compared:
        """See ``Comparison``."""
        more = answers(sums) - reference
        each = more / counts[:, :2]
        return Compared((each[:, 0] - each[:, 1] - 1 / (2 * self.beta)).square(), self.beta * more)
