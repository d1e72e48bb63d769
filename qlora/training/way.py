"""The way a step takes through the model, and the smaller ways that are tried, one after the other, when memory runs out.

    rows at once  8 ► 4 ► 2 ► 1   ►   micro-batch-major   ►   loss chunk  256 ► 128 ► 64 ► 32 ► 16   ►   nothing is left

No way changes which rows a step takes, what its loss is divided by, or what its random draws are seeded with; only the
order of sums differs. A way that was left is not taken again: what did not fit once may not fit the next time.

Knows three numbers of the recipe; must not know tensors, rows or devices.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TypeVar

from qlora.recipe import TrainingSection

SMALLEST_CHUNK = 16  # positions; below it the head is read too often for what is saved
Some = TypeVar("Some")


@dataclass(frozen=True, order=True)
class Way:
    """How a step goes through the model. Of two ways from the same beginning the lesser takes less memory."""

    micro_batch_size: int
    """Rows at once."""
    layer_major: bool
    """Whether the whole step's rows enter the model together, to be cut inside each layer."""
    loss_chunk: int
    """Target positions whose logits exist at the same time."""

    @classmethod
    def of(cls, section: TrainingSection) -> Way:
        """What the recipe asks for. Without the boundary nothing can be cut inside a layer."""
        layer_major = section.gradient_checkpointing and section.accumulation == "layer_major"
        return cls(section.micro_batch_size, layer_major, section.loss_chunk)

    def micro_batches(self, rows: Sequence[Some]) -> list[Sequence[Some]]:
        """How rows enter the model: all together where the layers cut them (layer-major), else so many at once."""
        if self.layer_major:
            return [rows]
        size = self.micro_batch_size
        return [rows[start : start + size] for start in range(0, len(rows), size)]

    def smaller(self, rows: int) -> Way | None:
        """The next smaller way for a step of ``rows`` rows; None when there is none."""
        at_once = min(self.micro_batch_size, rows)
        if at_once > 1:
            half = self.micro_batch_size // 2
            while half >= at_once:  # a short step: what it did not fit with is what it has
                half //= 2
            return Way(half, self.layer_major, self.loss_chunk)
        if self.layer_major and rows > 1:
            return Way(self.micro_batch_size, False, self.loss_chunk)
        if self.loss_chunk > SMALLEST_CHUNK:
            return Way(self.micro_batch_size, self.layer_major, max(SMALLEST_CHUNK, self.loss_chunk // 2))
        return None

    def beside(self, before: Way) -> str:
        """What is different from ``before``, as ``2 rows at once instead of 8``."""
        changed = []
        if self.micro_batch_size != before.micro_batch_size:
            rows = "1 row" if self.micro_batch_size == 1 else f"{self.micro_batch_size} rows"
            changed.append(f"{rows} at once instead of {before.micro_batch_size}")
        if self.layer_major != before.layer_major:
            changed.append("micro_batch_major accumulation instead of layer_major")
        if self.loss_chunk != before.loss_chunk:
            changed.append(f"a loss chunk of {self.loss_chunk} instead of {before.loss_chunk}")
        return " and ".join(changed)

    def values(self) -> dict[str, object]:
        """As the recipe's section ``training`` has it, for JSON."""
        major = "layer_major" if self.layer_major else "micro_batch_major"
        return {"micro_batch_size": self.micro_batch_size, "accumulation": major, "loss_chunk": self.loss_chunk}

    @classmethod
    def from_values(cls, values: Mapping[str, object]) -> Way:
        """What ``values`` gave. Raises KeyError, TypeError or ValueError for anything else."""
        rows, chunk = (int(str(values[key])) for key in ("micro_batch_size", "loss_chunk"))
        if rows < 1 or chunk < 1:
            raise ValueError(f"no way of going through a step: {dict(values)}")
        return cls(rows, values["accumulation"] == "layer_major", chunk)
