"""An example: the token ids of one conversation, pair or piece of text, and which of them carry loss.

Knows arrays of ids and labels, how raw text becomes pieces, and what happens to an example above the limit. Must not
know a chat template, a file or a packed row. The law: every token that comes in goes out, or is counted as lost.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy
from numpy.typing import ArrayLike, NDArray

from qlora.errors import counted
from qlora.model.loss import IGNORE_INDEX

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_BATCH = 512  # texts given to the tokenizer at once: enough to use it fully, and the offsets of no more are in memory


@dataclass(frozen=True)
class Example:
    """Token ids and labels of one example, both int32 ``[n]``, n ≥ 1.

    ``labels[i]`` is ``ids[i]`` (of a classifier's text, at its end, the class) or ``IGNORE_INDEX``; the shift by one happens in
    the loss. ``labels[0]`` is always ``IGNORE_INDEX``: nothing precedes the first token, and in a packed row its predecessor is another example's last.
    """

    ids: NDArray[numpy.int32]
    labels: NDArray[numpy.int32]

    @property
    def target_tokens(self) -> int:
        """How many tokens carry loss."""
        return int(numpy.count_nonzero(self.labels != IGNORE_INDEX))


def make_example(ids: ArrayLike, trained: ArrayLike) -> Example:
    """An example from ids ``[n]`` and, for each, whether it carries loss ``[n]``."""
    array = numpy.asarray(ids, dtype=numpy.int32)
    labels = numpy.where(numpy.asarray(trained, dtype=bool), array, IGNORE_INDEX).astype(numpy.int32)
    labels[:1] = IGNORE_INDEX
    return Example(array, labels)


def text_examples(texts: Sequence[str], tokenizer: PreTrainedTokenizerBase, max_length: int) -> list[list[Example]]:
    """Raw text: the pieces of each document, of at most ``max_length`` tokens, all trained, nothing cut off.

    A document is tokenised with the special tokens that the tokenizer itself adds (a bos token, where it has that
    habit) and ends in the eos token, so that the model learns where texts end. Those that it holds there already are not
    doubled. Documents are never joined.
    """
    examples: list[list[Example]] = []
    for start in range(0, len(texts), _BATCH):
        several = without_doubles(texts[start : start + _BATCH], tokenizer)
        for ids in tokenizer(several, verbose=False)["input_ids"]:
            if tokenizer.eos_token_id is not None and (not ids or ids[-1] != tokenizer.eos_token_id):
                ids = [*ids, tokenizer.eos_token_id]
            examples.append([make_example(piece, numpy.ones(len(piece))) for piece in _pieces(ids, max_length)])
    return examples


def labelled_examples(labelled: Sequence[tuple[str, int]], tokenizer: PreTrainedTokenizerBase) -> list[list[Example]]:
    """Texts and their classes, by number: one example each, the text's tokens and one more, whose label is the class.

    The loss predicts a label from the token before it, so the class is read at the text's last token, as transformers'
    ``…ForSequenceClassification`` does. That takes the tokens of its padding for none; at the end of a text they are left off. Texts are
    read as they will be then: with the special tokens that the tokenizer itself adds, and no chat template.
    """
    pad, examples = tokenizer.pad_token_id, list[list[Example]]()
    for start in range(0, len(labelled), _BATCH):
        several = labelled[start : start + _BATCH]
        read = tokenizer([text for text, _ in several], verbose=False)["input_ids"]
        for ids, (_, number) in zip(read, several, strict=True):
            length = next((end for end in range(len(ids), 0, -1) if ids[end - 1] != pad), 1)
            array = numpy.array([*ids[:length], (ids or [0])[0] if pad is None else pad], dtype=numpy.int32)
            labels = numpy.full(len(array), IGNORE_INDEX, dtype=numpy.int32)
            labels[max(1, len(array) - 1) :] = number  # a text of no token has no target, and is dropped
            examples.append([Example(array, labels)])
    return examples


def special_end(tokenizer: PreTrainedTokenizerBase) -> int:
    """How many special tokens the tokenizer itself puts behind every text; one that is cut keeps them, as where it cuts."""
    special = tokenizer("a", return_special_tokens_mask=True)["special_tokens_mask"]
    return next((count for count, one in enumerate(reversed(special)) if not one), 0)


def without_doubles(texts: Sequence[str], tokenizer: PreTrainedTokenizerBase) -> list[str]:
    """Texts without the bos and eos tokens that they would have twice once they are tokenised."""
    begin = tokenizer.bos_token if adds_bos(tokenizer) else None
    ends = [tokenizer.eos_token] if tokenizer.eos_token else []
    return [without_end(without_begin(text, begin), ends) for text in texts]


def without_begin(text: str, token: str | None) -> str:
    """``text`` without this token, however often, at its beginning."""
    while token and text.lstrip().startswith(token):
        text = text.lstrip()[len(token) :]
    return text


def without_end(text: str, tokens: Sequence[str]) -> str:
    """``text`` without any of these tokens, however often, at its end."""
    while found := next((token for token in tokens if text.rstrip().endswith(token)), None):
        text = text.rstrip()[: -len(found)]
    return text


def adds_bos(tokenizer: PreTrainedTokenizerBase) -> bool:
    """Whether the tokenizer begins every text with bos by itself."""
    return tokenizer.bos_token_id is not None and tokenizer("a")["input_ids"][:1] == [tokenizer.bos_token_id]


def doubled_note(count: int) -> list[str]:
    """For the report: how many records would have had a token twice."""
    return (
        [f"{counted(count, 'record')} with a token at an end that is written there anyway; it stands there once"]
        if count
        else []
    )


def _pieces(ids: list[int], max_length: int) -> list[list[int]]:
    """``ids`` cut into pieces of ``max_length``. A last piece of one token would have nothing to predict it from, so
    it takes one from its neighbour: 9 tokens by 4 → 4, 3, 2."""
    cuts = list(range(max_length, len(ids), max_length))
    if cuts and len(ids) - cuts[-1] == 1:
        cuts[-1] -= 1
    return [ids[a:b] for a, b in zip([0, *cuts], [*cuts, len(ids)], strict=True)]


@dataclass(frozen=True)
class Fitted:
    """What ``fit`` returns: the examples that stay, and what was lost, in examples and in tokens."""

    examples: list[Example]
    truncated: int = 0
    truncated_tokens: int = 0
    cut_answers: int = 0
    """Truncated in the middle of what is trained."""
    dropped: int = 0
    dropped_tokens: int = 0


def fit(examples: Sequence[Example], max_length: int, too_long: str, together: int = 1, end: int = 0) -> Fitted:
    """Bring every example to at most ``max_length`` tokens; ``too_long`` is ``truncate`` or ``drop``. ``together``: so many that
    follow each other stay or are dropped as one, as the two sides of a pair. ``end``: so many tokens at the end are never cut off.

    An example with no target token, or with none left after truncation, is dropped: it would cost a forward and teach
    nothing. Tokens in = tokens of the examples returned + ``truncated_tokens`` + ``dropped_tokens``.
    """
    stay: list[Example] = []
    truncated = truncated_tokens = cut_answers = dropped = dropped_tokens = 0
    for start in range(0, len(examples), together):
        whole = examples[start : start + together]
        kept = [_cut(example, max_length, end) for example in whole] if too_long == "truncate" else whole
        if any(len(example.ids) > max_length or not example.target_tokens for example in kept):
            dropped, dropped_tokens = dropped + together, dropped_tokens + sum(len(example.ids) for example in whole)
            continue
        for example in whole:
            if (more := len(example.ids) - max_length) > 0:
                truncated, truncated_tokens = truncated + 1, truncated_tokens + more
                cut_answers += bool((example.labels[max_length - 1 : max_length + 1] != IGNORE_INDEX).all()) and not end
        stay += kept
    return Fitted(stay, truncated, truncated_tokens, cut_answers, dropped, dropped_tokens)


def _cut(example: Example, length: int, end: int) -> Example:
    if (whole := len(example.ids)) <= length:
        return example
    kept = numpy.r_[: length - end, whole - end : whole]
    return Example(example.ids[kept], example.labels[kept])
