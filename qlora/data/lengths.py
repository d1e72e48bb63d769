"""Lengths: how long the examples are before any is cut, and what another ``data.max_length`` would keep.

Knows numbers of tokens; must not know what an example holds.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

from qlora.errors import DataError
from qlora.recipe import DataSection

LONGEST_ROW = 2**20
"""The most that ``data.max_length`` may be."""
_ALL_BUT = 0.01
"""The share of the examples that a length may leave too long and still be worth a name beside the one that keeps all."""

Bins = tuple[tuple[int, int], ...]
"""(tokens, examples that have at most so many and are in no earlier bin), up to the longest example."""


def bins_of(lengths: Sequence[int]) -> Bins:
    """The lengths by powers of two from 8 on, the empty ones between the shortest and the longest too."""
    counts = Counter(max(3, (length - 1).bit_length()) for length in lengths)
    return tuple((2**power, counts[power]) for power in range(min(counts), max(counts) + 1)) if counts else ()


def histogram(bins: Bins) -> str:
    """A line a bin, for a terminal."""
    most = max(count for _, count in bins)
    wide, high = len(f"{bins[-1][0]:,}"), len(f"{most:,}")
    return "\n".join(
        f"  up to {tokens:>{wide},} tokens  {count:>{high},} {'█' * -(-32 * count // most)}".rstrip()
        for tokens, count in bins
    )


def too_long_note(lengths: Sequence[int], max_length: int, taken: int, positions: int | None) -> list[str]:
    """What would keep the examples that are longer than a row, as a sentence for the report; none where all fit.

    ``taken``: tokens of a row that the method needs before every example; ``positions``: how many the model has.
    """
    longer = [length + taken for length in lengths if length + taken > max_length]
    if not longer:
        return []
    most = min(LONGEST_ROW, positions or LONGEST_ROW)
    offers = [offer for power in range(21) if max_length < (offer := 2**power) <= most]
    left = {offer: sum(length > offer for length in longer) for offer in offers}
    few = next((offer for offer, count in left.items() if count <= _ALL_BUT * len(lengths)), None)
    whole = next((offer for offer, count in left.items() if not count), None)
    said = [f"{few:,} would keep all but {left[few]:,} of them whole"] if few is not None and left[few] else []
    said += [f"{whole:,} would keep them all whole"] if whole is not None else []
    said += [f"the model has {positions:,} positions"] if whole is None and positions else []
    told = f": {', '.join(said)}" if said else ""
    return [f"{len(longer):,} of {len(lengths):,} examples are longer than data.max_length={max_length:,}{told}"]


def require_positions(lengths: Sequence[int], section: DataSection, taken: int, positions: int) -> None:
    """Raise DataError where an example of a row would have more tokens than the model has positions."""
    whole = [length + taken for length in lengths]
    if section.too_long == "drop":
        whole = [length for length in whole if length <= section.max_length]
    beyond = [length for length in whole if length > positions]
    if beyond and section.max_length > positions:
        does = "cuts them off there" if section.too_long == "truncate" else "leaves them out"
        raise DataError(
            f"{len(beyond):,} of {len(lengths):,} examples are longer than the {positions:,} positions that the model has, the "
            f"longest {max(beyond):,} tokens; set data.max_length={positions}, which {does}, or take a model with a longer context."
        )
