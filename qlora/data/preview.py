"""A preview: one example as the model sees it, special tokens and all, with the trained tokens marked.

Plain text puts trained tokens in ⟦…⟧; in a terminal, through rich, they stand out in colour. Control characters of the
data are shown, not sent to the terminal. Knows ids, labels and how to decode; must not know forms or templates.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy
from rich.text import Text

from qlora.data.examples import Example
from qlora.files.html import as_text
from qlora.model.loss import IGNORE_INDEX

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

TRAINED_STYLE = "bold green"
OTHER_STYLE = "dim"


@dataclass(frozen=True)
class Preview:
    """``str()`` gives plain text with ⟦…⟧; ``rich.print`` and a rich console give colours."""

    title: str
    runs: tuple[tuple[str, bool], ...]
    """(text, trained) of each run of tokens that are all trained or all not; together they are the whole example."""

    def __str__(self) -> str:
        body = "".join(f"⟦{text}⟧" if trained else text for text, trained in self.runs)
        return f"{self.title}\n{body}"

    __repr__ = __str__

    def _repr_html_(self) -> str:
        return as_text(self.title + "\n", *self.runs)

    def __rich__(self) -> Text:
        text = Text(self.title + "\n", style="")
        for part, trained in self.runs:  # Text takes the data as it is: no markup is read from it
            text.append(part, style=TRAINED_STYLE if trained else OTHER_STYLE)
        return text


def make_preview(example: Example, tokenizer: PreTrainedTokenizerBase, name: str) -> Preview:
    """The preview of one example, titled with ``name`` and its counts."""
    trained = example.labels != IGNORE_INDEX
    edges = [*numpy.flatnonzero(numpy.diff(trained, prepend=not trained[0])).tolist(), len(trained)]
    ids = example.ids.tolist()
    runs = []
    shown = ""
    for begin, end in itertools.pairwise(edges):
        # decode from the start and take what is new: a run decoded alone may lose the space before its first word
        upto = tokenizer.decode(ids[:end], skip_special_tokens=False, clean_up_tokenization_spaces=False)
        if upto.startswith(shown):
            part, shown = upto[len(shown) :], upto
        else:
            part = tokenizer.decode(ids[begin:end], skip_special_tokens=False, clean_up_tokenization_spaces=False)
            shown += part
        runs.append((_visible(part), bool(trained[begin])))
    count = example.target_tokens
    return Preview(f"{name}: {len(ids):,} tokens, {count:,} trained ({count / len(ids):.0%})", tuple(runs))


def _visible(text: str) -> str:
    """Control characters as their escapes (``\\x1b``), except line breaks and tabs."""
    return "".join(c if c.isprintable() or c in "\n\t" else c.encode("unicode_escape").decode() for c in text)
