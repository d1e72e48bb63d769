"""Chat: a conversation becomes token ids and a mask of what the assistant said, through the tokenizer's own template.

    render(turns before the answer, generation prompt)   <|user|>Hi<|end|><|assistant|>
    render(turns up to the answer)                       <|user|>Hi<|end|><|assistant|>Hello<|end|>\\n
    the difference is the answer                                                       Hello<|end|>

Each rendering must be a prefix of the next; the whole text is then tokenised once, and a token that holds any character
of an answer carries loss. The end-of-turn token belongs to the answer (without it a model never stops), white space
after it does not. No special tokens are added to a rendered text, as in transformers' ``apply_chat_template``: the
template is the whole truth, so there is never a second bos. Masks come from positions, never from token ids.

- A template that rewrites earlier turns (Qwen3 removes their thoughts) makes a conversation of n answers n examples,
  each as the model would have seen it, with its last answer trained.
- A template with ``{% generation %}`` blocks states its own mask, except where a conversation has answers not to be trained.
- Without a template, ``DEFAULT_TEMPLATE``: plain text, existing tokens only, eos at the end of the assistant's turn.

A template comes from a stranger: it runs in a process of its own (rendering.py), which cuts it off.

Knows templates and tokenizers; must not know files of data, lengths or packing.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, NamedTuple

import numpy
from numpy.typing import NDArray

from qlora.data.dialect import Dialect
from qlora.data.examples import Example, make_example
from qlora.data.formats import Conversation, Message
from qlora.data.rendering import CutOff, Job, Refused, Rendered, Renderer, one_child
from qlora.data.values import capital
from qlora.errors import DataError
from qlora.files.durable import expanded

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Span = tuple[int, int]
"""(begin, end) in characters of a text."""

DEFAULT_TEMPLATE = """\
{%- for message in messages -%}
{{- '### ' + message['role'] | capitalize + ':\\n' + message['content'] -}}
{%- if message['role'] == 'assistant' -%}{{- eos_token -}}{%- endif -%}
{{- '\\n\\n' -}}
{%- endfor -%}
{%- if add_generation_prompt -%}{{- '### Assistant:\\n' -}}{%- endif -%}"""
"""The template of tokenizers without one. A tokenizer that begins every text with bos gets it here too."""

_GROUP = 64  # conversations rendered and tokenised at once: no more texts than theirs are in memory
_GENERATION = re.compile(r"\{%-?\s*generation\s*-?%\}")
# Templates that print today's date would give other tokens tomorrow, and a run could not be resumed. The date is the
# one that Llama's own template falls back to.
_DATE = "26 Jul 2024"
_FIXED_CLOCK = "{%- macro strftime_now(format) -%}" + _DATE + "{%- endmacro -%}"


class ChatTemplate:
    """A tokenizer's chat template, or the one that stands in for it.

    ``name`` says which it is, ``text`` is the Jinja source, ``end_of_turn`` the id of the token that ends an answer
    (None where the template has none). Raises DataError when the template file cannot be read or is not Jinja, and when the
    template is cut off: it loops, or asks for too much memory.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, file: str | None = None) -> None:
        if not getattr(tokenizer, "is_fast", False):
            raise DataError(
                f"{type(tokenizer).__name__} cannot say which characters a token covers, which the loss mask needs; "
                "use a checkpoint with a tokenizer.json."
            )
        self.tokenizer = tokenizer
        self.name, self.text = _find(tokenizer, file)
        source = _FIXED_CLOCK + self.text if "strftime_now" in self.text else self.text
        self.renderer = Renderer(source, {**tokenizer.special_tokens_map, "date_string": _DATE})
        self._special = tuple({*tokenizer.all_special_tokens, *tokenizer.get_added_vocab()})
        with one_child():
            try:
                self._require_jinja()
                self.dialect = Dialect(self.renderer.text)
                self.end_of_turn = self._end_of_turn()
            except CutOff as error:  # at the first time: every other question would cost as long
                raise self._cut_off("a short conversation, made up to try it,", error) from None
        self._states_mask = _GENERATION.search(self.text) is not None

    def encode(self, conversations: Sequence[Conversation], train_on: str) -> list[list[Example]]:
        """The examples of each conversation: one, or one for each answer where the template rewrites earlier turns.

        ``train_on``: ``assistant`` trains every answer, ``completion`` the last one, ``all`` everything. Raises DataError
        naming the record when the template refuses it, cannot be masked, or leaves the end-of-turn token untrained.
        """
        encoded: list[list[Example]] = []
        with one_child():
            for first in range(0, len(conversations), _GROUP):
                group = conversations[first : first + _GROUP]
                texts = list(self._texts(group, train_on))
                examples = iter(self._tokenised([text for several in texts for text in several], train_on))
                encoded += [list(itertools.islice(examples, len(several))) for several in texts]
        return encoded

    def prompt(self, conversation: Conversation) -> tuple[list[Message], list[int], str]:
        """The first question of a conversation whose answer is trained, as the template's messages, its ids with the generation prompt, and the
        answer that was given."""
        messages, tools = self.dialect.speak(conversation)
        first = conversation.answers(messages)[0]
        (((text, _),),) = self._checked([conversation.place], [Job(messages, tools, [(first, True)])])
        ids = self.tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
        given = conversation.messages[conversation.answers(conversation.messages)[0]]
        return messages[:first], ids, given["content"]

    # --- text and spans ----------------------------------------------------------------------------------------------

    def _texts(self, conversations: Sequence[Conversation], train_on: str) -> Iterator[list[_Text]]:
        """For each conversation the texts of the examples that it gives."""
        jobs, answers = [], []
        for conversation in conversations:
            messages, tools = self.dialect.speak(conversation)
            found = conversation.answers(messages)
            if train_on == "completion":
                found = found[-1:]
            if train_on == "all" or (self._states_mask and not conversation.untrained):
                found = []
            jobs.append(Job(messages, tools, _Renderings.cuts(len(messages), found)))
            answers.append(found)
        places = [conversation.place for conversation in conversations]
        for place, job, found, rendered in zip(places, jobs, answers, self._checked(places, jobs), strict=True):
            if not found:
                yield [_Text(place, *rendered[0])]
                continue
            whole, asked, upto = _Renderings.of(rendered)
            spans = [
                (self._start(place, job, at, before, text), self._end(text))
                for at, before, text in zip(found, asked, upto, strict=True)
            ]
            if all(whole.startswith(text) for text in upto):
                yield [_Text(place, whole, spans)]
            else:
                yield [_Text(place, text, [span]) for text, span in zip(upto, spans, strict=True)]

    def _start(self, place: str, job: Job, at: int, asked: str, upto: str) -> int:
        """Where the answer of message ``at`` begins in ``upto``, the rendering that ends with it; ``asked`` ends before it."""
        if upto.startswith(asked):
            return len(asked)
        # A generation prompt may hold more than a finished turn does (DeepSeek-R1 opens the thoughts in it): the answer
        # begins where the two part, but never before the end of the earlier turns.
        (((before, _),),) = self._checked([place], [Job(job.messages, job.tools, [(at, False)])])
        if not upto.startswith(before):
            raise DataError(
                f"{capital(place)} cannot be masked: the chat template ({self.name}) renders the turns before answer "
                f"{at + 1} differently once the answer follows. Give a data.chat_template with {{% generation %}} blocks, "
                "or set data.train_on=all."
            )
        alike = itertools.takewhile(lambda pair: pair[0] == pair[1], zip(asked, upto, strict=False))
        return max(len(before), sum(1 for _ in alike))

    def _end(self, text: str) -> int:
        """Where the answer that ends ``text`` ends: behind its end-of-turn token, before white space that follows it."""
        bare = text.rstrip()
        return len(bare) if bare.endswith(self._special) else len(text)

    # --- tokens ------------------------------------------------------------------------------------------------------

    def _tokenised(self, texts: Sequence[_Text], train_on: str) -> Iterator[Example]:
        """An example for each text."""
        batch = self.tokenizer(
            [text.text for text in texts], add_special_tokens=False, return_offsets_mapping=True, verbose=False
        )
        for text, ids, offsets in zip(texts, batch["input_ids"], batch["offset_mapping"], strict=True):
            if train_on == "all":
                trained = numpy.ones(len(ids), dtype=bool)
            else:
                begins, ends = numpy.asarray(offsets, dtype=numpy.int64).reshape(-1, 2).T
                spans = text.answers
                if self._states_mask:
                    spans = _runs(begins, ends, spans)[-1 if train_on == "completion" else 0 :]
                trained = self._mask(ids, begins, ends, spans, text.place)
            yield make_example(ids, trained)

    def _mask(
        self, ids: list[int], begins: NDArray[numpy.int64], ends: NDArray[numpy.int64], spans: list[Span], place: str
    ) -> NDArray[numpy.bool_]:
        """Which tokens hold a character of a span."""
        trained = numpy.zeros(len(ids), dtype=bool)
        for span in spans:
            inside = _holding(begins, ends, span)
            trained |= inside
            last = int(numpy.flatnonzero(inside)[-1]) if inside.any() else -1
            if self.end_of_turn is not None and (last < 0 or ids[last] != self.end_of_turn):
                token = self.tokenizer.convert_ids_to_tokens(self.end_of_turn)
                raise DataError(
                    f"{capital(place)} has an answer whose end-of-turn token {token} would carry no loss, and the model "
                    f"would never learn to stop; in the chat template ({self.name}) the token must belong to the answer."
                )
        return trained

    def _end_of_turn(self) -> int | None:
        """The special token that directly follows an answer, or None."""
        mark = "qlora-answer"
        try:
            text = self.renderer.text([{"role": "user", "content": "Hi"}, {"role": "assistant", "content": mark}])
        except Refused:
            return None
        tail = text[text.rfind(mark) + len(mark) :].lstrip()
        found = max((token for token in self._special if tail.startswith(token)), key=len, default=None)
        return None if found is None else int(self.tokenizer.convert_tokens_to_ids(found))

    # --- rendering ---------------------------------------------------------------------------------------------------

    def _require_jinja(self) -> None:
        try:
            self.renderer.text([{"role": "user", "content": "Hi"}])
        except Refused as error:  # it may refuse such a short conversation, which is its right
            if error.line is not None:
                raise DataError(
                    f"The chat template ({self.name}) is not valid Jinja: line {error.line}, {error}."
                ) from None

    def _checked(self, places: Sequence[str], jobs: Sequence[Job]) -> list[list[Rendered]]:
        """``Renderer.render``, whose exceptions become a DataError that names the record, of those at ``places``."""
        try:
            return self.renderer.render(jobs, mark_answers=self._states_mask)
        except Refused as error:
            place = capital(places[error.job])
            raise DataError(f"{place} is refused by the chat template ({self.name}): {error}.") from None
        except CutOff as error:
            raise self._cut_off(places[error.job], error) from None

    def _cut_off(self, place: str, error: CutOff) -> DataError:
        return DataError(
            f"The chat template ({self.name}) was stopped at {place} as {error}. A template is a program of its author's; "
            "give another one in data.chat_template."
        )


class _Text(NamedTuple):
    """A text of the record at ``place``, and where in it the answers are."""

    place: str
    text: str
    answers: list[Span]


class _Renderings(NamedTuple):
    """The texts that show where answers are. Of user, assistant, user, assistant, with p for the generation prompt:

    whole uaua      asked [u p, uau p], which end before an answer      upto [ua, uaua], which end with it
    """

    whole: str
    asked: list[str]
    upto: list[str]

    @staticmethod
    def cuts(length: int, answers: Sequence[int]) -> list[tuple[int, bool]]:
        """What to render of ``length`` messages, the last of them the last answer: whole, each asked, the rest of upto."""
        return [(length, False), *((at, True) for at in answers), *((at + 1, False) for at in answers[:-1])]

    @classmethod
    def of(cls, rendered: Sequence[Rendered]) -> _Renderings:
        """The texts of ``cuts``, of at least one answer."""
        (whole, *texts), count = [text for text, _ in rendered], len(rendered) // 2
        return cls(whole, texts[:count], [*texts[count:], whole])


def _holding(begins: NDArray[numpy.int64], ends: NDArray[numpy.int64], span: Span) -> NDArray[numpy.bool_]:
    """Which tokens, that begin and end at these characters, hold one of a span's."""
    start, end = span
    return (ends > start) & (begins < end) & (ends > begins)


def _runs(begins: NDArray[numpy.int64], ends: NDArray[numpy.int64], blocks: list[Span]) -> list[Span]:
    """``{% generation %}`` blocks as spans of whole tokens; those whose tokens are side by side as one."""
    trained = numpy.zeros(len(begins), dtype=bool)
    for start, end in blocks:
        if start < end:
            trained |= _holding(begins, ends, (start, end))
    edges = numpy.flatnonzero(numpy.diff(numpy.concatenate([[0], trained, [0]])))
    return [(int(begins[a]), int(ends[b - 1])) for a, b in zip(edges[::2], edges[1::2], strict=True)]


def _find(tokenizer: PreTrainedTokenizerBase, file: str | None) -> tuple[str, str]:
    """(name, Jinja source) of the template to use: the file, the tokenizer's own, or the default."""
    if file is not None:
        try:
            return f"'{file}'", expanded(file).read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise DataError(f"data.chat_template '{file}' cannot be read ({error}); expected a Jinja file.") from None
    if tokenizer.chat_template:
        return "the tokenizer's own", tokenizer.get_chat_template()
    if tokenizer.eos_token is None:
        raise DataError(
            "The tokenizer has neither a chat template nor an eos token to end a turn with; give a data.chat_template."
        )
    begins = tokenizer("a")["input_ids"][:1]
    bos = "{{- bos_token -}}" if tokenizer.bos_token_id is not None and begins == [tokenizer.bos_token_id] else ""
    return "the default, as the tokenizer has none", bos + DEFAULT_TEMPLATE
