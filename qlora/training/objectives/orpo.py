"""ORPO: cross-entropy of the chosen text, and the odds of its answer beside those of the rejected one.

    l = log p a token of an answer       log-odds = l − log(1 − eˡ)
    loss = cross-entropy a token of the chosen text − β log σ(log-odds⁺ − log-odds⁻)      reward = β l

(Hong et al. 2024, arXiv:2403.07691, equations 6 and 7.) As in the authors' code and TRL, the chosen text's prompt counts in
the first part. Knows numbers alone.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from qlora.recipe import ORPO
from qlora.training.objectives.pairs import Compared, answers

CERTAIN = -1e-12  # a log-probability a token above it has no odds


def orpo_loss(section: ORPO, sums: Tensor, counts: Tensor, reference: Tensor) -> Compared:
    """The odds-ratio loss; see ``Comparison``. There is no reference, and what is given as one is not read."""
    likely = (answers(sums) / counts[:, :2]).clamp(max=CERTAIN)
    log_odds = likely - torch.log(-torch.expm1(likely))
    text = (sums[:, 0] + sums[:, 2]) / (counts[:, 0] + counts[:, 2])
    return Compared(text - section.beta * F.logsigmoid(log_odds[:, 0] - log_odds[:, 1]), section.beta * likely)
