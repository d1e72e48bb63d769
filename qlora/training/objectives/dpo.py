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


def dpo_loss(section: DPO, sums: Tensor, counts: Tensor, reference: Tensor) -> Compared:
    """The sigmoid loss; see ``Comparison``."""
    rewards = section.beta * (answers(sums) - reference)
    margin, smoothing = rewards[:, 0] - rewards[:, 1], section.label_smoothing
    return Compared(-(1 - smoothing) * F.logsigmoid(margin) - smoothing * F.logsigmoid(-margin), rewards)


def ipo_loss(section: IPO, sums: Tensor, counts: Tensor, reference: Tensor) -> Compared:
    """The squared loss; see ``Comparison``. Sums are divided by the answers' lengths, as its authors do it."""
    more = answers(sums) - reference
    each = more / counts[:, :2]
    return Compared((each[:, 0] - each[:, 1] - 1 / (2 * section.beta)).square(), section.beta * more)
