"""Training: one loop moves the parameters, whatever the method.

optim (AdamW, schedule) ─────────┐
checkpoint (save, load) ─────────┼─► loop (Trainer → Step) ─► log (metrics.jsonl, progress)
in_backward (a layer at a time) ─┤
smaller, rehearsal (does it fit) ┘
"""

from __future__ import annotations

from qlora.training.log import MetricsLog, Progress
from qlora.training.loop import Step, Trainer
from qlora.training.optim import learning_rate, make_optimizer
from qlora.training.rehearsal import Rehearsal

__all__ = ["MetricsLog", "Progress", "Rehearsal", "Step", "Trainer", "learning_rate", "make_optimizer"]
