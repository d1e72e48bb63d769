"""The whole way of the data: what a recipe's `data` section names is read, checked, tokenised, split and packed.

Calls every other file of this room, in the order that ``qlora/data/__init__.py`` draws; must not know a model or a method.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING

from qlora.data.chat import ChatTemplate
from qlora.data.examples import (
    Example,
    doubled_note,
    fit,
    labelled_examples,
    special_end,
    text_examples,
    without_doubles,
)
from qlora.data.files import DataFile, DataFolder
from qlora.data.formats import FORMS, Conversation
from qlora.data.labelled import Labelled, classes_note, classes_of, read_labelled, require_known
from qlora.data.lengths import bins_of, require_positions, too_long_note
from qlora.data.packing import Row, make_rows
from qlora.data.parsing import Parsed, parse
from qlora.data.preview import Preview, make_preview
from qlora.data.rendering import one_child
from qlora.data.report import Counts, Report
from qlora.data.sources import data_files, not_read, read_records
from qlora.data.split import Seen, drawn, needs_pieces, seen_note, split_pieces, split_records
from qlora.errors import DataError, counted, listed
from qlora.files.durable import expanded
from qlora.recipe import DataSection

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True)
class Prompt:
    """A held-out question: what the model is asked, and the answer that the data gives."""

    text: str
    """For people: the last user turn of a conversation, or the beginning of a piece of text."""
    ids: list[int]
    """What the model reads, ending in the template's generation prompt."""
    answer: str


@dataclass(frozen=True, repr=False)
class Data:
    """What a run trains on and is measured on."""

    train: list[Row]
    held_out: list[Row]
    report: Report
    fingerprint: str
    """SHA-256 over every token, label and position of all rows: another value is other data."""
    tokenizer: PreTrainedTokenizerBase
    template: ChatTemplate | None
    """The chat template in use; None for raw text."""
    max_length: int
    """The longest example, virtual tokens counted; a row is as long, or twice that, of pairs."""
    held_out_conversations: list[Conversation]
    """Those with an answer; none for raw text."""
    virtual_tokens: int = 0
    """How many the rows leave room for, before every example."""
    files: tuple[DataFile | DataFolder, ...] = ()
    """The files it was read from, in the recipe's order, a folder before its files; a hub data set has none here."""
    section: DataSection | None = None
    """The recipe's section that it was read by."""
    seed: int = 0
    """What is held out was drawn by it."""
    pairs: bool = False
    """Whether examples 0 and 1, 2 and 3, … are a chosen answer and the rejected one."""
    classes: tuple[str, ...] = ()
    """What the labels of a classifier's examples stand for, by their number."""

    def __repr__(self) -> str:
        train, held = self.report.train, self.report.held_out
        out = f"{held.examples:,} examples in {held.rows:,} rows" if held.rows else "nothing"
        return (
            f"Data({self.report.form}: {train.examples:,} examples in {train.rows:,} rows of at most {self.max_length * (1 + self.pairs):,} tokens, "
            f"{train.target_tokens:,} target tokens; {out} held out)"
        )

    def _repr_html_(self) -> str:
        return self.report._repr_html_()

    def preview(self, index: int) -> Preview:
        """Training example ``index`` as the model sees it. Raises DataError when there is no such example."""
        count = self.report.train.examples
        if not 0 <= index < count:
            raise DataError(f"There is no example {index}; the training data has {count}, counted from 0.")
        number, row = next((n, row) for n, row in enumerate(self.train) if index in row.examples)
        begin, end = row.spans()[row.examples.index(index)]
        example = Example(row.ids[begin:end], row.labels[begin:end])
        which = f"{self.report.form} example {index} of {count:,}"
        if self.classes:
            which = f"{which}, of the class '{self.classes[example.labels[-1]]}'"
        if self.pairs:
            which = f"pair {index // 2} of {count // 2:,}, {('chosen', 'rejected')[index % 2]}"
        return make_preview(example, self.tokenizer, f"{which}, in row {number}")

    def held_out_prompts(self, count: int) -> list[Prompt]:
        """At most ``count`` held-out prompts, spread evenly over what is held out; the same ones every time.

        A conversation asks its first question. A piece of text gives its first half, at most 64 tokens, and asks for as
        many more. A prompt that is no shorter than the longest held-out example is passed over: those are known to fit into
        ``max_length`` and into the model's positions, and an answer needs room.
        """
        if self.classes:  # which answers no question
            return []
        longest = max((int(row.positions.max()) + 1 for row in self.held_out), default=0)
        pieces = [] if self.template else _in_order(self.held_out)
        total = len(pieces or self.held_out_conversations)
        order = [place * total // count for place in range(min(count, total))] if count < total else list(range(total))
        chosen = set(order)
        order += [index for index in range(total) if index not in chosen]
        prompts: list[Prompt] = []
        with one_child():
            for index in order:
                if len(prompts) == count:
                    break
                prompt = (
                    self._continuation(pieces[index]) if pieces else self._question(self.held_out_conversations[index])
                )
                if 0 < len(prompt.ids) < longest:
                    prompts.append(prompt)
        return prompts

    def _question(self, conversation: Conversation) -> Prompt:
        assert self.template is not None
        messages, ids, answer = self.template.prompt(conversation)
        return Prompt(messages[-1]["content"], ids, answer)

    def _continuation(self, piece: list[int]) -> Prompt:
        ids = piece[:128]
        half = (len(ids) + 1) // 2
        begin, rest = (self.tokenizer.decode(part, skip_special_tokens=True) for part in (ids[:half], ids[half:]))
        return Prompt(begin, ids[:half], rest)


def load_data(
    section: DataSection,
    tokenizer: PreTrainedTokenizerBase,
    seed: int = 0,
    virtual_tokens: int = 0,
    positions: int | None = None,
    pairs: bool = False,
    classifies: bool = False,
    classes: Sequence[str] = (),
) -> Data:
    """Read, check, tokenise and pack what a recipe's `data` section names.

    ``tokenizer`` is a transformers tokenizer with a fast implementation and is left as it is; ``seed`` draws the
    held-out part; ``virtual_tokens`` is the room, out of ``max_length``, that the method needs before every example;
    ``positions`` is how many of them an example may have in the model, None where there is no bound; ``pairs`` says that the
    objective compares a chosen answer with a rejected one, which then stay in one row; ``classifies``,
    that records are texts with labels, which are ``classes``, or those of the training data where none are given.
    Raises DataError, in a sentence that names the place, for data that is missing, broken, of no known
    form, or that would train on nothing.
    """
    longest = section.max_length - virtual_tokens
    if longest < 2:
        raise DataError(
            f"data.max_length={section.max_length} leaves no room for a text beside the method's {virtual_tokens} virtual "
            "tokens; raise data.max_length, or lower method.tokens."
        )
    files = _look(section)
    labelled: list[Labelled] = _labelled(section, seed) if classifies else []
    in_pieces = False
    parts: Sequence[Parsed] = [Parsed("labelled", [], one.notes, one.bad) for one in labelled]
    if not classifies:
        parts, in_pieces = _read(section, seed, pairs)
    if changed := [file.name for file in files if file.change()]:
        raise DataError(f"{listed(changed)} changed while it was read; wait until it is written, then begin again.")
    form = parts[0].form
    train_on = "the label" if classifies else _resolve_train_on(section.train_on, form, pairs)
    if classifies:
        template, classes = None, tuple(classes) or classes_of([label for _, label, _ in labelled[0].records])
        for one in labelled:
            require_known(one, classes)
        numbered = [[(text, classes.index(label)) for text, label, _ in one.records] for one in labelled]
        examples = tuple(labelled_examples(part, tokenizer) for part in numbered)
        notes = [classes_note(classes, *labelled)]
    elif form == "text":
        template = None
        examples = tuple(text_examples(part.texts, tokenizer, longest) for part in parts)
        texts = [text for part in parts for text in part.texts]
        single = without_doubles(texts, tokenizer)
        notes = doubled_note(sum(one != other for one, other in zip(texts, single, strict=True)))
    else:
        marked = next((one for part in parts for one in part.conversations if one.untrained), None)
        if marked and train_on == "all":
            raise DataError(
                f"data.train_on is 'all', but {marked.place} has answers that are marked not to be trained; "
                "use 'assistant', or take the marks out of the data."
            )
        with one_child():
            template = ChatTemplate(tokenizer, section.chat_template, section.dropped_content)
            parts, examples = zip(*(_encoded(part, template, train_on) for part in parts), strict=True)
        notes = template.notes
    apart = parts[1].bad is not parts[0].bad
    told = [[*(part.bad.notes if part is parts[0] or apart else []), *part.notes] for part in parts]
    for source in (*section.sources, *section.held_out_sources):
        if others := not_read(source):
            told[0].append(f"not read in the folder '{source}': {listed(others)}")
    notes = [*told[0], *(f"held-out data: {note}" for note in told[1]), *notes]
    if in_pieces:
        examples = split_pieces(examples[0], section.held_out_fraction, seed)
        few = "one document is" if len(parts[0]) == 1 else f"{len(parts[0]):,} documents are"
        notes.append(
            f"pieces of text are held out, not whole documents: {few} too few for "
            f"held_out_fraction={section.held_out_fraction:g}"
        )
    flat = [[example for several in part for example in several] for part in examples]
    lengths = [len(example.ids) for example in flat[0]]
    if positions is not None:
        for part in flat:
            require_positions([len(example.ids) for example in part], section, virtual_tokens, positions)
        if section.max_length > positions:
            notes.append(
                f"data.max_length={section.max_length:,} is above the {positions:,} positions of the model: a row may be as long as "
                "that, a single example may not"
            )
    notes += (too_long := too_long_note(lengths, section.max_length, virtual_tokens, positions))
    if form == "text":
        notes += [] if in_pieces else seen_note(*([Seen(hash(text)) for text in part.texts] for part in parts))
    else:
        notes += seen_note(*([Seen.of(example) for example in part] for part in flat))
    end = 1 + special_end(tokenizer) if classifies else 0
    (train, counts), (held_out, held_counts) = (
        _rows(part, several, tokenizer, section, virtual_tokens, 1 + pairs, end)
        for part, several in zip(parts, examples, strict=True)
    )
    report = Report(form, train_on, template.name if template else None, counts, held_counts, tuple(notes), pairs)
    _require_targets(report, section, too_long, positions)
    return Data(
        train=train,
        held_out=held_out,
        report=report,
        fingerprint=_fingerprint(train, held_out),
        tokenizer=tokenizer,
        template=template,
        max_length=section.max_length,
        held_out_conversations=parts[1].conversations,
        virtual_tokens=virtual_tokens,
        files=files,
        section=section.model_copy(update={"packing": True}) if section.packing == "auto" else section,
        seed=seed,
        pairs=pairs,
        classes=tuple(classes),
    )


def _labelled(section: DataSection, seed: int) -> list[Labelled]:
    """[texts to train on, texts held out]."""
    train = read_labelled(read_records(section.train, section.subset, section.split, section.limit), section)
    if section.held_out is not None:
        return [train, read_labelled(read_records(section.held_out, section.subset, section.held_out_split), section)]
    if not section.held_out_fraction:
        return [train, Labelled()]
    held = drawn(len(train.records), section.held_out_fraction, seed, "record")
    stay = [record for index, record in enumerate(train.records) if index not in held]
    return [replace(train, records=stay), Labelled([train.records[index] for index in sorted(held)], bad=train.bad)]


def _read(section: DataSection, seed: int, pairs: bool) -> tuple[tuple[Parsed, Parsed], bool]:
    """((records to train on, records held out), whether pieces of the first are still to be held out)."""
    how = section.columns, section.on_bad_record, section.labels, pairs
    parsed = parse(read_records(section.train, section.subset, section.split, section.limit), section.form, *how)
    if section.held_out is not None:
        given = read_records(section.held_out, section.subset, section.held_out_split)
        return (parsed, parse(given, parsed.form, *how, parsed.read_as)), False
    in_pieces = needs_pieces(parsed, section.held_out_fraction)
    if section.held_out_fraction and not in_pieces:
        return split_records(parsed, section.held_out_fraction, seed), False
    return (parsed, Parsed(parsed.form)), in_pieces


def _encoded(part: Parsed, template: ChatTemplate, train_on: str) -> tuple[Parsed, list[list[Example]]]:
    """The part without the conversations that the template refuses, and the examples of the others: of a pair both."""
    asked = part.conversations
    encoded = template.encode(asked, train_on, part.bad)
    if pairs := [one.rejected for one in asked if one.rejected]:
        others = template.encode(pairs, train_on, part.bad)
        encoded = [[*one, *other] if one and other else [] for one, other in zip(encoded, others, strict=True)]
    part.bad.settle()
    refused = {id(one) for one, examples in zip(asked, encoded, strict=True) if not examples}
    kept = replace(part, records=[record for record in part.records if id(record) not in refused])
    return kept, [examples for examples in encoded if examples]


def _look(section: DataSection) -> tuple[DataFile | DataFolder, ...]:
    """The data files of a recipe, before they are read."""
    train, held_out = section.sources, section.held_out_sources
    files = {source: data_files(source) for source in (*train, *held_out)}
    if any(names not in ([], [source]) for source, names in files.items()):  # who names one file twice means it
        places = [{expanded(name).resolve() for source in part for name in files[source]} for part in (train, held_out)]
        if both := sorted(str(place) for place in places[0] & places[1]):
            raise DataError(
                f"Both data.train and data.held_out hold {listed(both)}; name the files of each, or move some."
            )
    found: dict[str, DataFile | DataFolder] = {}
    for source, names in files.items():
        if names not in ([], [source]):
            found[source] = DataFolder.look(source, partial(data_files, str(expanded(source).absolute())))
        found |= {name: file for name in names if (file := DataFile.look(name))}
    if section.chat_template is not None and (file := DataFile.look(section.chat_template)):
        found[section.chat_template] = file
    return tuple(found.values())


def _resolve_train_on(train_on: str, form: str, pairs: bool) -> str:
    if pairs and train_on not in ("auto", "completion"):
        raise DataError(
            f"data.train_on is '{train_on}', but the objective compares the last answers of conversations; use 'auto' or 'completion'."
        )
    if form == "text":
        if train_on in ("assistant", "completion"):
            raise DataError(
                f"data.train_on is '{train_on}', but the data is raw text without turns; use 'auto' or 'all'."
            )
        return "all"
    return FORMS[form].trains if train_on == "auto" else train_on


def _rows(
    parsed: Parsed,
    examples: Sequence[list[Example]],
    tokenizer: PreTrainedTokenizerBase,
    section: DataSection,
    virtual_tokens: int,
    together: int,
    end: int,
) -> tuple[list[Row], Counts]:
    """One part of the data as rows, with its counts. ``examples``: of each record, those that belong to this part; ``together``:
    so many of them share a row and a fate; ``end``: so many tokens at the end of each are never cut off."""
    longest = section.max_length - virtual_tokens
    fitted = fit([example for several in examples for example in several], longest, section.too_long, together, end)
    rows = make_rows(fitted.examples, section.max_length, section.packs, virtual_tokens, together)
    lengths = [len(example.ids) for several in examples for example in several]
    if parsed.form == "text":  # of documents: their pieces are as long as a row
        lengths = [sum(len(piece.ids) for piece in pieces) for pieces in examples if pieces]
    left_off = [turn for one in (*parsed.conversations, *parsed.skipped) for turn in one.unanswered]
    counts = Counts(
        records=sum(map(bool, examples)) + len(parsed.skipped),
        examples=len(fitted.examples),
        rows=len(rows),
        tokens=sum(len(row.ids) for row in rows),
        target_tokens=sum(row.target_tokens for row in rows),
        truncated=fitted.truncated,
        truncated_tokens=fitted.truncated_tokens,
        cut_answers=fitted.cut_answers,
        dropped=fitted.dropped,
        dropped_tokens=fitted.dropped_tokens,
        skipped=len(parsed.skipped),
        unanswered_turns=len(left_off),
        unanswered_tokens=sum(map(len, tokenizer(left_off, add_special_tokens=False)["input_ids"])) if left_off else 0,
        split_conversations=0 if parsed.form == "text" else sum(len(several) > together for several in examples),
        lengths=bins_of(lengths),
    )
    return rows, counts


def _require_targets(report: Report, section: DataSection, too_long: Sequence[str], positions: int | None) -> None:
    """Refuse data that trains on nothing, or a chat set that trains on the questions too without being asked to.

    ``too_long``: what there is to say of the examples that are longer than a row; ``positions``: how many the model has.
    """
    counts, held = report.train, report.held_out
    longer = positions is None or section.max_length < positions
    raise_it = ", or raise data.max_length" if too_long and longer else ""
    if not counts.target_tokens:
        if counts.dropped and section.too_long == "drop":
            raise DataError(
                f"All {counts.dropped} examples are too long or have nothing to train on ({'; '.join(too_long)}); "
                f"{'raise data.max_length, or ' if longer else ''}set data.too_long=truncate."
            )
        left_out = (note for note in report.notes if note.startswith("left out"))
        told = "; ".join([*counts.losses(), *too_long, *left_out]) or "no records"
        raise DataError(f"No token of the data carries loss ({told}); look at the records' answers{raise_it}.")
    if held.records and not held.rows:
        raise DataError(
            f"None of the {counted(held.records, 'held-out record')} leaves a token to measure "
            f"({'; '.join(held.losses())}); give others{raise_it}."
        )
    # the first token of an example is never a target, so 'every token' is all the others
    if report.template and report.train_on != "all" and counts.target_tokens >= counts.tokens - counts.examples:
        raise DataError(
            f"Every token of this {report.form} data would be trained, the questions too: the chat template "
            f"({report.template}) marks everything as the assistant's. Correct the template, or set data.train_on=all."
        )


def _in_order(rows: Sequence[Row]) -> list[list[int]]:
    """The ids of every example in these rows, in the order of the data."""
    found = {
        index: row.ids[begin:end].tolist()
        for row in rows
        for index, (begin, end) in zip(row.examples, row.spans(), strict=True)
    }
    return [found[index] for index in sorted(found)]


def _fingerprint(*parts: Sequence[Row]) -> str:
    digest = hashlib.sha256()
    for part in parts:
        digest.update(f"{len(part)} rows;".encode())
        for row in part:
            digest.update(f"{len(row.ids)};".encode())
            for array in (row.ids, row.labels, row.positions):
                digest.update(array.astype("<i4").tobytes())
    return digest.hexdigest()
