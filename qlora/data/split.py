"""Split: which part of the training data is held out, drawn by a seed.

    conversations, pairs            whole records
    raw text, documents enough      whole documents: one of them is no more than the fraction asked for
    raw text, too few documents     pieces of at most max_length tokens, as examples.py cuts them

A single .txt file is one document, so its pieces are drawn: the document is then in both parts, each of its tokens in one.
Both parts keep the order of the data. Knows records and examples by their number; must not know what they hold.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Self

import numpy

from qlora.data.examples import Example
from qlora.data.parsing import Parsed
from qlora.errors import DataError, counted
from qlora.model.loss import IGNORE_INDEX


def needs_pieces(parsed: Parsed, fraction: float) -> bool:
    """Whether whole documents would be more than the fraction, or all there is."""
    wanted = len(parsed) * fraction
    return parsed.form == "text" and fraction > 0 and (wanted < 1 or round(wanted) >= len(parsed))


def split_records(parsed: Parsed, fraction: float, seed: int) -> tuple[Parsed, Parsed]:
    """(train, held out) in whole records."""
    held = drawn(len(parsed), fraction, seed, "record")
    train = [record for index, record in enumerate(parsed.records) if index not in held]
    return replace(parsed, records=train), Parsed(parsed.form, [parsed.records[index] for index in sorted(held)])


def split_pieces(
    documents: Sequence[list[Example]], fraction: float, seed: int
) -> tuple[list[list[Example]], list[list[Example]]]:
    """(train, held out), each with the pieces that it has of every document; of some it may have none."""
    held = drawn(sum(map(len, documents)), fraction, seed, "piece")
    parts: tuple[list[list[Example]], list[list[Example]]] = ([[] for _ in documents], [[] for _ in documents])
    pieces = ((document, piece) for document, several in enumerate(documents) for piece in several)
    for index, (document, piece) in enumerate(pieces):
        parts[index in held][document].append(piece)
    return parts


@dataclass(frozen=True)
class Seen:
    """What is compared of an example: all of it, and what stands before the first token that is trained, if anything does.

    As hashes of 64 bits: the texts themselves would fill the memory again.
    """

    whole: int
    asked: int | None = None

    @classmethod
    def of(cls, example: Example) -> Self:
        """Those of one of a conversation."""
        trained = numpy.flatnonzero(example.labels != IGNORE_INDEX)
        asks = len(trained) and trained[0] > 1
        return cls(hash(example.ids.tobytes()), hash(example.ids[: trained[0]].tobytes()) if asks else None)


def seen_note(train: Iterable[Seen], held_out: Sequence[Seen]) -> list[str]:
    """How many held-out examples are in the training data too, and how many only have a question of it."""
    if not held_out:
        return []
    train = list(train)
    whole, asked = {one.whole for one in train}, {one.asked for one in train} - {None}
    same = sum(one.whole in whole for one in held_out)
    alike = sum(one.asked in asked for one in held_out if one.whole not in whole)
    said = [f"{same:,} are in the training data too, word for word"] if same else []
    said += [f"{alike:,} have a question of the training data, with another answer"] if alike else []
    told = (
        f"of {len(held_out):,} held-out examples {' and '.join(said)}; their loss is that of what was learnt by heart"
    )
    return [told] if said else []


def drawn(count: int, fraction: float, seed: int, unit: str) -> set[int]:
    """The numbers of those of ``count`` that are held out: at least one, and never all."""
    held = max(1, round(count * fraction))
    if held >= count:
        raise DataError(
            f"data.held_out_fraction={fraction} of {counted(count, unit)} leaves none to train on; "
            "give a data.held_out file instead."
        )
    return set(numpy.random.Generator(numpy.random.PCG64(seed)).permutation(count)[:held].tolist())
