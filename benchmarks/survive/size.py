"""How much of each fault is tried: a few for the tests, all of it for ``make survive``."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TypeVar

Some = TypeVar("Some")


@dataclass(frozen=True)
class Size:
    """``small`` takes seconds and is what the tests run; the rest takes minutes and is what gets reported."""

    small: bool = False

    def of(self, few: Some, many: Some) -> Some:
        """The one of two counts that this size means."""
        return few if self.small else many
