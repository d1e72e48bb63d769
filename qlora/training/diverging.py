"""Whether the loss diverges: said while it happens, when stopping still saves time.

Knows losses alone; must not know rows, models or what is done about it.
"""

from __future__ import annotations

import math
from collections import deque
from statistics import median

STEPS = 5  # in a row: one hard batch is no divergence


class Divergence:
    """Watches the loss of each step, and says it once when ``STEPS`` in a row are far above the least that it had been.

    Far: by half of it, and by at least 1 nat a token. The least is that of the first step, or a median of ``STEPS``.
    """

    def __init__(self, slower: float) -> None:
        self.slower = slower
        self.least = math.inf
        self.diverges = False
        """Whether it does, after what was looked at last."""
        self._last: deque[float] = deque(maxlen=STEPS)

    def look(self, loss: float) -> str:
        """A sentence at the step where it begins to diverge; empty at every other one. ``loss`` is in nats a target token."""
        self._last.append(loss)
        bound = self.least + max(1.0, self.least / 2)
        begins = not self.diverges and len(self._last) == STEPS and min(self._last) > bound
        said = self._sentence() if begins else ""
        self.diverges = begins or (self.diverges and median(self._last) > bound)
        if len(self._last) == STEPS or math.isinf(self.least):
            self.least = min(self.least, median(self._last))
        return said

    def _sentence(self) -> str:
        return (
            f"The loss diverges: for {STEPS} steps it was at least {min(self._last):.2f}, and it had been {self.least:.2f}. Stop "
            f"here, and train anew with a lower rate, such as training.learning_rate={self.slower:g}."
        )
