"""Training: one loop trains the parameters, whatever the method.

objectives (rows → summed loss) ─► step (rows → gradients → parameters) ─► recover ─► loop (Trainer → Step)
way, passage (how rows go through the model)     state ─► checkpoint, rehearsal       log (metrics.jsonl, progress)
"""

from __future__ import annotations

from qlora.training.log import MetricsLog, Progress, Step
from qlora.training.loop import Trainer
from qlora.training.optim import learning_rate, make_optimizer
from qlora.training.rehearsal import Rehearsal

__all__ = ["MetricsLog", "Progress", "Rehearsal", "Step", "Trainer", "learning_rate", "make_optimizer"]
