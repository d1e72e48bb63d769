"""The way a step takes through the model, and the smaller ways that are tried, one after the other, when memory runs out.

    layers that keep their activations  30 ► 15 ► 7 ► 3 ► 1 ► 0   ►   rows at once  8 ► 4 ► 2 ► 1   ►   micro-batch-major
    ►   loss chunk  256 ► 128 ► 64 ► 32 ► 16   ►   nothing is left

No way changes which rows a step takes, what its loss is divided by, or what its random draws are seeded with; only the
order of sums differs. A way that was left is not taken again: what did not fit once may not fit the next time.

Knows four numbers of the recipe; must not know tensors, rows or devices.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TypeVar

from qlora.machine.device import SMALLEST_CHUNK
from qlora.recipe import TrainingSection

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
    kept: int = 0
    """Layers that keep their activations; the others are recomputed."""

    @classmethod
    def of(cls, section: TrainingSection, layers: int) -> Way:
        """What the recipe asks for, of a model of so many layers; of one without layers there is nothing to cut or keep."""
        kept = layers - section.recomputed(layers)
        return cls(section.micro_batch_size, section.layer_major and layers > 0, section.loss_chunk, kept)

    def behind_boundary(self, layers: int, batch_size: int) -> bool:
        """Whether something is recomputed, or cut inside a layer, for steps of so many rows; else the model stays plain."""
        return self.kept < layers or (self.layer_major and batch_size > self.micro_batch_size)

    def micro_batches(self, rows: Sequence[Some]) -> list[Sequence[Some]]:
        """How rows enter the model: all together where the layers cut them (layer-major), else so many at once."""
        size = max(1, len(rows)) if self.layer_major else self.micro_batch_size
        return [rows[start : start + size] for start in range(0, len(rows), size)]

    def smaller(self, rows: int) -> Way | None:
        """The next smaller way for a step of ``rows`` rows; None when there is none."""
        if self.kept:
            return replace(self, kept=self.kept // 2)
        return self.fewer_rows(rows)

    def fewer_rows(self, rows: int) -> Way | None:
        """The same without recomputing more, for a model that cannot."""
        at_once = min(self.micro_batch_size, rows)
        if at_once > 1:
            half = self.micro_batch_size // 2
            while half >= at_once:  # a short step: what it did not fit with is what it has
                half //= 2
            return replace(self, micro_batch_size=half)
        if self.layer_major and rows > 1:
            return replace(self, layer_major=False)
        if self.loss_chunk > SMALLEST_CHUNK:
            return replace(self, loss_chunk=max(SMALLEST_CHUNK, self.loss_chunk // 2))
        return None

    def beside(self, before: Way) -> str:
        """What is different from ``before``, as ``2 rows at once instead of 8``."""
        changed = []
        if self.kept != before.kept:
            changed.append(f"activations kept in {self.kept} layers instead of {before.kept}")
        if self.micro_batch_size != before.micro_batch_size:
            rows = "1 row" if self.micro_batch_size == 1 else f"{self.micro_batch_size} rows"
            changed.append(f"{rows} at once instead of {before.micro_batch_size}")
        if self.layer_major != before.layer_major:
            changed.append("micro_batch_major accumulation instead of layer_major")
        if self.loss_chunk != before.loss_chunk:
            changed.append(f"a loss chunk of {self.loss_chunk} instead of {before.loss_chunk}")
        return " and ".join(changed)

    def values(self) -> dict[str, object]:
        """For JSON, by the names of the recipe's section ``training`` where it has them."""
        major = "layer_major" if self.layer_major else "micro_batch_major"
        return {
            "micro_batch_size": self.micro_batch_size,
            "accumulation": major,
            "loss_chunk": self.loss_chunk,
            "layers_kept": self.kept,
        }

    @classmethod
    def from_values(cls, values: Mapping[str, object]) -> Way:
        """What ``values`` gave, or did before layers could keep. Raises KeyError, TypeError or ValueError for anything else."""
        known = {"layers_kept": 0, **values}
        rows, chunk, kept = (int(str(known[key])) for key in ("micro_batch_size", "loss_chunk", "layers_kept"))
        if rows < 1 or chunk < 1 or kept < 0:
            raise ValueError(f"no way of going through a step: {dict(values)}")
        return cls(rows, values["accumulation"] == "layer_major", chunk, kept)
