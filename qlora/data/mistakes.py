"""Mistakes: records that cannot be read, wherever that shows: told all at once, or left out when they are few.

    add(place, what is wrong)  ► settle  ► on_bad_record=stop   DataError: the first five, how many, and of which kinds
                                         ► on_bad_record=skip   a note with the same counts; DataError when they are many

Knows sentences about records; must not know where a record comes from or what reads it.
"""

from __future__ import annotations

import re
from collections import Counter

from qlora.data.values import capital
from qlora.errors import DataError, counted, listed

_MOST_SKIPPED = 0.1
"""The share of records that ``skip`` may skip: above it the data, or the form, is another than was thought."""


class BadRecords:
    """What is wrong with single ones of ``count`` records, and whether they may be left out."""

    def __init__(self, count: int = 0, on_bad_record: str = "stop") -> None:
        self.count, self.on_bad_record = count, on_bad_record
        self.found: list[tuple[str, str]] = []
        """(place, mistake) of each; together they are a sentence."""

    def add(self, place: str, mistake: object) -> None:
        """``mistake``: the end of a sentence that begins with the place."""
        self.found.append((place, str(mistake)))

    def settle(self) -> None:
        """Raise DataError where there are records that may not be left out, or are too many."""
        if not self.found or (self._skips and self._few):
            return
        several = len(self.found) > 1
        shown: dict[str, list[str]] = {}
        for place, mistake in self.found[:5]:
            shown.setdefault(mistake.removesuffix("."), []).append(place)
        told = []
        for mistake, (first, *more) in shown.items():
            here = first[first.index(" of ") :]
            also = f" (and {', '.join(place.removesuffix(here) for place in more)})" if more else ""
            told.append(f"{capital(first)}{also} {mistake}.")
        if several:
            told.append(f"In all, {self._counted} {'have' if self.count > 1 else 'has'} mistakes: {self._kinds}.")
        if self._skips:
            told.append(f"data.on_bad_record=skip leaves out at most {_MOST_SKIPPED:.0%} of the records.")
        else:
            told.append(f"Mend {'them' if several else 'it'}{', or set data.on_bad_record=skip' if self._few else ''}.")
        raise DataError(" ".join(told))

    @property
    def notes(self) -> list[str]:
        """The sentence that says what was left out; none where nothing was."""
        return [f"data.on_bad_record=skip left out {self._counted}: {self._kinds}"] if self.found else []

    @property
    def _skips(self) -> bool:
        return self.on_bad_record == "skip"

    @property
    def _few(self) -> bool:
        return len(self.found) <= _MOST_SKIPPED * self.count

    @property
    def _counted(self) -> str:
        return f"{len(self.found):,} of {counted(self.count, 'record')}"

    @property
    def _kinds(self) -> str:
        """How many there are of each, without what differs from record to record."""
        kinds = Counter(re.sub(r" \(.*|[;:,] .*| of turn \d+| in turn \d+", "", mistake) for _, mistake in self.found)
        return listed([f"{kind} ({number:,})" for kind, number in kinds.most_common()], 12)
