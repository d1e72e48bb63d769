"""Chat: a conversation becomes token ids and a mask of what the assistant said, through the tokenizer's own template.

    render(turns before the answer, generation prompt)   <|user|>Hi<|end|><|assistant|>
    render(turns up to the answer)                       <|user|>Hi<|end|><|assistant|>Hello<|end|>\\n
    the difference is the answer                                                       Hello<|end|>

Each rendering must be a prefix of the next; the whole text is then tokenised once, and a token that holds any character
of an answer carries loss. The end-of-turn token belongs to the answer (without it a model never stops), and so does a
token that follows it in the same turn; white space after it does not. No special tokens are added to a rendered text, as
in transformers' ``apply_chat_template``: the template is the whole truth, so there is never a second bos. Masks come from
positions, never from token ids.

- A template that rewrites earlier turns (Qwen3 removes their thoughts) makes a conversation of n answers n examples,
  each as the model would have seen it, with its last answer trained. So does one that rewrites the question once it is
  answered (Mistral moves the system text into the last turn of all): each example is the prompt, and the answer behind it.
- A template with ``{% generation %}`` blocks states its own mask, except where a conversation has answers not to be trained.
- Where a template leaves the last answer without an end (GLM), it gets the token that would follow if somebody went on.
- Without a template, ``DEFAULT_TEMPLATE``: plain text, existing tokens only, eos at the end of the assistant's turn.

A template comes from a stranger: it runs in a process of its own (rendering.py), which cuts it off.

Knows templates and tokenizers; must not know files of data, lengths or packing.
"""

from __future__ import annotations

import itertools
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from typing import TYPE_CHECKING, NamedTuple

import numpy
from numpy.typing import NDArray

from qlora.data.dialect import Dialect, shown
from qlora.data.dropped import lost_around, lost_of_answers
from qlora.data.endings import Endings, alike
from qlora.data.examples import Example, adds_bos, doubled_note, make_example, without_begin, without_end
from qlora.data.formats import Conversation
from qlora.data.mistakes import BadRecords
from qlora.data.rendering import CutOff, Job, Refused, Rendered, Renderer, one_child
from qlora.data.suggestions import ENDS, MARKS
from qlora.data.turns import Message
from qlora.data.values import Mistake, capital
from qlora.errors import DataError, counted, listed
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
_PROMPT_END = 16  # characters by which the end of a prompt is found again: more than a generation prompt's last word
_ANSWER = "qlora-answer"
_GENERATION = re.compile(r"\{%-?\s*generation\s*-?%\}")
# Templates that print today's date would give other tokens tomorrow, and a run could not be resumed. The date is the
# one that Llama's own template falls back to.
_DATE = "26 Jul 2024"
_FIXED_CLOCK = "{%- macro strftime_now(format) -%}" + _DATE + "{%- endmacro -%}"


class ChatTemplate:
    """A tokenizer's chat template, or the one that stands in for it.

    ``name`` says which it is, ``text`` is the Jinja source, ``end_tokens`` the ids of the tokens that end an answer, and
    one that calls functions (none where the template has none), of the template for tools as well. ``named``: which one of a
    tokenizer that has several; the one for tools is used for conversations with tools. ``dropped_content``: as in the recipe.
    Raises DataError when the template file cannot be read, is not Jinja or writes no answers, and when the template is cut off:
    it loops, or asks for too much memory.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        file: str | None = None,
        dropped_content: str = "keep",
        named: str = "default",
    ) -> None:
        if not getattr(tokenizer, "is_fast", False):
            raise DataError(
                f"{type(tokenizer).__name__} cannot say which characters a token covers, which the loss mask needs; "
                "use a checkpoint with a tokenizer.json."
            )
        self.tokenizer = tokenizer
        self._refuses_losses = dropped_content == "refuse"
        self.name, self.text = _find(tokenizer, file, named)
        source = _FIXED_CLOCK + self.text if "strftime_now" in self.text else self.text
        self.renderer = Renderer(source, {**tokenizer.special_tokens_map, "date_string": _DATE})
        self._special = tuple({*tokenizer.all_special_tokens, *tokenizer.get_added_vocab()})
        self._states_mask = _GENERATION.search(self.text) is not None
        with one_child():
            try:
                self._require_jinja()
                self.dialect = Dialect(self._tried, dropped_content == "keep")
                self._require_answers()
                self.endings = Endings(self._tried, self.dialect, self._special, tokenizer.eos_token, self._states_mask)
            except CutOff as error:  # at the first time: every other question would cost as long
                raise self._cut_off("a short conversation, made up to try it,", error) from None
        self.end_tokens = tuple(
            map(int, tokenizer.convert_tokens_to_ids([*self.endings.tokens[:1], *self.endings.calls]))
        )
        bos = tokenizer.bos_token
        asked = self.endings.text([{"role": "user", "content": "Hi"}])
        self._begin = bos if bos and asked.startswith(bos) else None
        own = {*tokenizer.all_special_tokens, *(token for token in self._special if token in asked)}
        words = sorted((token for token in own if not token.isalnum()), key=len, reverse=True)
        self._marks = re.compile("|".join([MARKS.pattern, ENDS.pattern, *map(re.escape, words)]))
        self._doubled = 0
        several = file is None and named == "default" and isinstance(tokenizer.chat_template, dict)
        self._for_tools = (
            ChatTemplate(tokenizer, None, dropped_content, "tool_use")
            if several and "tool_use" in tokenizer.chat_template
            else None
        )
        if self._for_tools:
            self._for_tools.dialect.notes, self._for_tools.dialect.records = self.dialect.notes, self.dialect.records
            self.end_tokens = tuple(dict.fromkeys((*self.end_tokens, *self._for_tools.end_tokens)))

    @property
    def notes(self) -> list[str]:
        """What became of the conversations encoded so far, as sentences for the report."""
        doubled = self._doubled + (self._for_tools._doubled if self._for_tools else 0)
        told = [f"{sentence} ({counted(count, 'record')})" for sentence, count in self.dialect.records.items()]
        return [*self.dialect.notes, *told, *doubled_note(doubled)]

    def encode(
        self, conversations: Sequence[Conversation], train_on: str, bad: BadRecords | None = None
    ) -> list[list[Example]]:
        """The examples of each conversation: one, or one for each answer where the template rewrites earlier turns.

        ``train_on``: ``assistant`` trains every answer, ``completion`` the last one, ``all`` everything. Where the template
        refuses a conversation, cannot be masked, or leaves the end-of-turn token untrained, it has no examples and goes to
        ``bad``; without ``bad``, DataError is raised.
        """
        found = BadRecords() if bad is None else bad
        with one_child():
            if self._for_tools is None:
                encoded = self._encode(conversations, train_on, found)
            else:
                plain = iter(self._encode([one for one in conversations if not one.tools], train_on, found))
                using = iter(self._for_tools._encode([one for one in conversations if one.tools], train_on, found))
                encoded = [next(using if one.tools else plain) for one in conversations]
        if bad is None:
            found.settle()
        return encoded

    def _encode(self, conversations: Sequence[Conversation], train_on: str, bad: BadRecords) -> list[list[Example]]:
        encoded: list[list[Example]] = []
        for first in range(0, len(conversations), _GROUP):
            group = conversations[first : first + _GROUP]
            try:
                encoded += self._examples(group, train_on)
            except Mistake:  # of one of them at least
                encoded += [self._alone(one, train_on, bad) for one in group]
        return encoded

    def _alone(self, conversation: Conversation, train_on: str, bad: BadRecords) -> list[Example]:
        try:
            return self._examples([conversation], train_on)[0]
        except Mistake as mistake:
            bad.add(conversation.place, mistake)
            return []

    def _examples(self, group: Sequence[Conversation], train_on: str) -> list[list[Example]]:
        """The examples of each. Raises Mistake when one of them cannot be had; then nothing was counted."""
        told, doubled = self.dialect.records.copy(), self._doubled
        try:
            texts = list(self._texts(group, train_on))
            examples = iter(self._tokenised([text for several in texts for text in several], train_on))
            return [list(itertools.islice(examples, len(several))) for several in texts]
        except Mistake:
            self.dialect.records.clear()
            self.dialect.records.update(told)
            self._doubled = doubled
            raise

    def prompt(self, conversation: Conversation) -> tuple[list[Message], list[int], str]:
        """The first question of a conversation whose answer is trained, as the template's messages, its ids with the
        generation prompt, and the answer that was given."""
        if self._for_tools and conversation.tools:
            return self._for_tools.prompt(conversation)
        conversation = self._without_doubles(conversation)
        try:
            messages, tools = self.dialect.speak(conversation)
            first = conversation.answers(messages)[0]
            (((text, _),),) = self._checked([conversation.place], [Job(messages, tools, [(first, True)])])
        except Mistake as mistake:
            raise DataError(f"{capital(conversation.place)} {mistake}.") from None
        ids = self.tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
        given = conversation.messages[conversation.answers(conversation.messages)[0]]
        calls = [json.dumps(call["function"], ensure_ascii=False) for call in given.get("tool_calls") or ()]
        return messages[:first], ids, "\n".join(filter(None, [given["content"], *calls]))

    # --- text and spans ----------------------------------------------------------------------------------------------

    def _texts(self, conversations: Sequence[Conversation], train_on: str) -> Iterator[list[_Text]]:
        """For each conversation the texts of the examples that it gives."""
        if self.endings.always_asks and train_on != "all":
            raise Mistake(
                f"cannot be masked: the chat template ({self.name}) begins a next answer behind every text, asked or not. Give "
                "another data.chat_template, or set data.train_on=all"
            )
        jobs: list[Job] = []
        answers: list[list[int]] = []
        said: list[list[tuple[Message, Message]]] = []
        for conversation in conversations:
            single = self._without_doubles(conversation)
            self._doubled += single != conversation
            if any(self._marks.search(message["content"]) for message in single.messages):
                sentence = (
                    "turns hold special tokens, or other marks of a chat template, as if one had been applied already"
                )
                self.dialect.records[sentence] += 1
            messages, tools = self.dialect.speak(single)
            found, given = single.answers(messages), single.answers(single.messages)
            if train_on == "completion":
                found, given = found[-1:], given[-1:]
            said.append([(single.messages[one], messages[at]) for one, at in zip(given, found, strict=True)])
            if train_on == "all" or (self._states_mask and not single.untrained):
                found = []
            jobs.append(Job(messages, tools, _Renderings.cuts(len(messages), found)))
            answers.append(found)
        places = [conversation.place for conversation in conversations]
        rendered = self._checked(places, jobs)
        for place, job, found, texts, spoken in zip(places, jobs, answers, rendered, said, strict=True):
            made = self._made(place, job, found, texts)
            lost = lost_of_answers(spoken, _parts_of(made, train_on)[0])
            if lost and self._states_mask and train_on == "assistant":  # in earlier turns? then an answer at a time
                apart = self._apart(place, job)
                if len(fewer := lost_of_answers(spoken, _parts_of(apart, train_on)[0])) < len(lost):
                    made, lost = apart, fewer
            around = "".join(_parts_of(made[-1:], train_on)[1])  # the last text has all turns before its answer
            self._tell([f"{kind} of answers" for kind in lost])
            self._tell(lost_around(job.messages, job.tools, around, self.dialect.names))
            if self.endings.thoughts_alike and any(given.get("reasoning_content") for given, _ in spoken):
                sentence = f"{self.endings.tokens[0]} ends the reasoning as well as the answer, so that generation stops behind the reasoning"
                self.dialect.records[sentence] += 1
            yield made

    def _made(self, place: str, job: Job, found: list[int], rendered: list[Rendered]) -> list[_Text]:
        """The texts of one conversation; ``found`` are the messages that are answers to train, as far as we find them."""
        if not found:
            text, blocks = rendered[0]
            closing = "" if self._states_mask else self.endings.unclosed(text, job.messages[-1])
            return [_Text(place, text + closing, blocks)]
        whole, asked, upto = _Renderings.of(rendered)
        alone = [
            self._answer(place, job, at, before, text) for at, before, text in zip(found, asked, upto, strict=True)
        ]
        whole += self.endings.unclosed(whole, job.messages[found[-1]])
        spans = [(one.answers[0][0], self.endings.end_within(whole, one.text)) for one in alone]
        return alone if any(end < 0 for _, end in spans) else [_Text(place, whole, spans)]

    def _apart(self, place: str, job: Job) -> list[_Text]:
        """A text for each answer, with the blocks that come with it."""
        ats = [at for at, message in enumerate(job.messages) if message["role"] == "assistant"]
        cuts = [(at + more, False) for at in ats for more in (0, 1)]
        (texts,) = self._checked([place], [Job(job.messages, job.tools, cuts)])
        made = []
        for before, upto in zip(texts[::2], texts[1::2], strict=True):
            last = upto.answers[-1][0] if upto.answers else 0
            start = max(alike(before.text, upto.text), upto.text.rfind(before.text[-_PROMPT_END:], 0, last))
            made.append(_Text(place, upto.text, [block for block in upto.answers if block[1] > start]))
        return made

    def _tell(self, lost: Sequence[str]) -> None:
        """Count the record among those of which something is lost, or refuse it."""
        for kind in lost:
            if self._refuses_losses:
                raise Mistake(
                    f"has {kind.replace('of answers', 'in an answer')}, which the chat template ({self.name}) leaves out. data.dropped_content=keep "
                    "trains on it as text where that is possible, drop trains without it; or give another data.chat_template"
                )
            self.dialect.records[f"the chat template leaves out {kind}"] += 1

    def _without_doubles(self, conversation: Conversation) -> Conversation:
        """A conversation without the tokens that the template would write a second time: bos before its first text, the end
        of a turn behind an answer that is more than that."""
        ends = [*self.endings.tokens, self.tokenizer.eos_token or self.endings.tokens[0]] if self.endings.tokens else []
        messages: list[Message] = []
        for message in conversation.messages:
            content = message["content"]
            if not messages:
                content = without_begin(content, self._begin)
            if message["role"] == "assistant":
                content = without_end(content, ends)
            messages.append({**message, "content": content})
        return replace(conversation, messages=tuple(messages))

    def _answer(self, place: str, job: Job, at: int, asked: str, upto: str) -> _Text:
        """The answer of message ``at`` behind its prompt. ``asked``: the rendering that ends before it, ``upto``: with it."""
        start = len(asked)
        if not upto.startswith(asked):
            before = self._render(place, job, job.messages[:at])
            # A generation prompt may hold more than a finished turn does (DeepSeek-R1 opens the thoughts in it): the
            # answer begins where the two part, but never before the end of the earlier turns.
            if upto.startswith(before):
                start = max(len(before), alike(asked, upto))
            else:
                upto = asked + upto[self._behind(place, job, at, asked, upto) :]
        upto += self.endings.unclosed(upto, job.messages[at])
        return _Text(place, upto, [(start, self.endings.end(upto))])

    def _behind(self, place: str, job: Job, at: int, asked: str, upto: str) -> int:
        """Where answer ``at`` begins in ``upto``, in which the turns before it are not those of its prompt ``asked``: behind the
        last place that reads as the prompt's end does, before anything that another answer would change."""
        other = self._render(place, job, [*job.messages[:at], {"role": "assistant", "content": _ANSWER}])
        question = job.messages[at - 1]["content"]
        assert isinstance(question, str)
        # of a short question the turns before it may be what was rewritten: its last character and all behind it is the least
        least = len(asked.rpartition(question.strip())[2]) + 1 if question.strip() in asked else _PROMPT_END
        ends = (asked[-length:] for length in range(max(least, _PROMPT_END), least - 1, -1))
        same = upto[: alike(upto, other)]
        found = max((_last_end(end, same) for end in ends), default=-1)
        if found < 0:
            raise Mistake(
                f"cannot be masked: the chat template ({self.name}) renders the turns before answer {at + 1} differently once "
                "the answer follows. Give a data.chat_template with {% generation %} blocks, or set data.train_on=all"
            )
        return found

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
                self._require_ends(text, spans)
                trained = numpy.zeros(len(ids), dtype=bool)
                for span in spans:
                    trained |= _holding(begins, ends, span)
            yield make_example(ids, trained)

    def _require_ends(self, text: _Text, spans: Sequence[Span]) -> None:
        """The model learns to stop only if the end of a turn is trained, wherever in the answer's span it is.

        A call may end otherwise than an answer does (``<|call|>``), and thoughts may be a span of their own.
        """
        for number, (begin, end) in enumerate(spans, start=1):
            said = text.text[begin:end]
            if self.endings.calls and text.text[end:].lstrip().startswith(self.endings.calls):
                sentence = f"the chat template leaves {self.endings.calls[0]}, which ends function calls, untrained"
                self.dialect.records[sentence] += 1
            if not self.endings.tokens or any(token in said for token in self.endings.tokens):
                continue
            left = text.text[end:].lstrip().startswith(self.endings.tokens)
            if left or (number == len(spans) and not said.rstrip().endswith(self._special)):
                raise Mistake(
                    f"has an answer whose end-of-turn token {self.endings.tokens[0]} would carry no loss, and the model would never learn "
                    f"to stop; in the chat template ({self.name}) the token must belong to the answer"
                )

    def _tried(
        self,
        messages: Sequence[Mapping[str, object]],
        tools: Sequence[Mapping[str, object]] | None = None,
        asked: bool = False,
    ) -> str:
        """The renderer's text. A template for tools alone (Hermes' tool_use) does not take none, and is tried with no tool."""
        try:
            return self.renderer.text(messages, tools, asked)
        except Refused:
            if tools is not None:
                raise
            return self.renderer.text(messages, [], asked)

    # --- rendering ---------------------------------------------------------------------------------------------------

    def _require_jinja(self) -> None:
        try:
            self.renderer.text([{"role": "user", "content": "Hi"}])
        except Refused as error:  # it may refuse such a short conversation, which is its right
            if error.line is not None:
                raise DataError(
                    f"The chat template ({self.name}) is not valid Jinja: line {error.line}, {error}."
                ) from None

    def _require_answers(self) -> None:
        """Refuse a template that writes nothing of an answer: it reads another variable than the messages (Kimi-Audio's in vLLM)."""
        talk = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": _ANSWER}]
        with suppress(Refused):
            if _ANSWER not in self._tried(self.dialect.parted(talk)).lower():
                raise DataError(
                    f"The chat template ({self.name}) writes nothing of what the assistant says; give another data.chat_template."
                )

    def _render(self, place: str, job: Job, messages: Sequence[Mapping[str, object]]) -> str:
        """The text of other messages in a job's place."""
        (((text, _),),) = self._checked([place], [Job(messages, job.tools, [(len(messages), False)])])
        return text

    def _checked(self, places: Sequence[str], jobs: Sequence[Job]) -> list[list[Rendered]]:
        """``Renderer.render``: raises Mistake where the template refuses one of the ``jobs``, and DataError, which names its
        place, where it was cut off."""
        jobs = [job._replace(messages=self.dialect.parted(job.messages)) for job in jobs]
        try:
            rendered = self.renderer.render(jobs, mark_answers=self._states_mask)
            return [[Rendered(*shown(*one)) for one in several] for several in rendered]
        except Refused as error:
            raise Mistake(f"is refused by the chat template ({self.name}): {error}") from None
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


def _parts_of(texts: Sequence[_Text], train_on: str) -> tuple[list[str], list[str]]:
    """(what is trained, what is not) of texts, in pieces."""
    trained, others = [], []
    for one in texts:
        at = 0
        for begin, end in [(0, len(one.text))] if train_on == "all" else one.answers:
            others.append(one.text[at:begin])
            trained.append(one.text[begin:end])
            at = end
        others.append(one.text[at:])
    return trained, trained if train_on == "all" else others


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


def _last_end(words: str, text: str) -> int:
    """Where ``words`` end for the last time in ``text``, white space inside them aside (Hermes has less of it behind the last
    result); -1 where they are not."""
    bare = words.rstrip()
    spaced = r"\s*".join(map(re.escape, "".join(bare.split()))) + re.escape(words[len(bare) :])
    return max((found.end() for found in re.finditer(spaced, text)), default=-1)


def _find(tokenizer: PreTrainedTokenizerBase, file: str | None, named: str) -> tuple[str, str]:
    """(name, Jinja source) of the template to use: the file, the tokenizer's own, or the default."""
    if file is not None:
        try:
            return f"'{file}'", expanded(file).read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise DataError(f"data.chat_template '{file}' cannot be read ({error}); expected a Jinja file.") from None
    if isinstance(several := tokenizer.chat_template, dict) and several:
        if named not in several:
            raise DataError(
                f"The tokenizer has several chat templates ({listed(several)}), none of them named '{named}'; write the one "
                "to use to a file, and name it in data.chat_template."
            )
        return f"the tokenizer's own, '{named}'", several[named]
    if tokenizer.chat_template:
        return "the tokenizer's own", tokenizer.chat_template
    if tokenizer.eos_token is None:
        raise DataError(
            "The tokenizer has neither a chat template nor an eos token to end a turn with; give a data.chat_template."
        )
    bos = "{{- bos_token -}}" if adds_bos(tokenizer) else ""
    return "the default, as the tokenizer has none", bos + DEFAULT_TEMPLATE
