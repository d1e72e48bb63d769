"""Training: one loop moves the parameters, whatever the method.

optim (AdamW, schedule) ─┐
checkpoint (save, load) ─┼─► loop (Trainer → Step) ─► log (metrics.jsonl, progress)
"""

from __future__ import annotations

from qlora.training.log import MetricsLog, Progress
from qlora.training.loop import Step, Trainer
from qlora.training.optim import learning_rate, make_optimizer

__all__ = ["MetricsLog", "Progress", "Step", "Trainer", "learning_rate", "make_optimizer"]
