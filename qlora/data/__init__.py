"""Data: files become rows of tokens.

    sources     files, hub data sets                  → records              (read_records)
    formats     records                               → conversations, texts (parse)
    dialect     conversations                         → the template's words (Dialect.speak)
    chat        conversations                         → ids + mask           (ChatTemplate.encode)
    examples    texts → pieces; every example         → at most max_length   (text_examples, fit)
    packing     examples                              → rows                 (make_rows)
    batches     rows, step number                     → tensors              (step_rows, collate)

``load_data`` runs them in this order and returns ``Data``: rows to train on, rows held out, and a report in which every
token is accounted for. This room knows tokenizers; it must not know a model or a method.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy

from qlora.config import DataSection
from qlora.data.batches import collate, step_rows, steps_per_epoch
from qlora.data.chat import ChatTemplate
from qlora.data.examples import IGNORE_INDEX, Example, fit, text_examples
from qlora.data.formats import Parsed, parse
from qlora.data.packing import Row, make_rows
from qlora.data.preview import Preview, make_preview
from qlora.data.report import Counts, Report
from qlora.data.sources import Record, read_records
from qlora.errors import DataError

__all__ = [
    "IGNORE_INDEX",
    "Counts",
    "Data",
    "Example",
    "Preview",
    "Prompt",
    "Report",
    "Row",
    "collate",
    "load_data",
    "step_rows",
    "steps_per_epoch",
]


@dataclass(frozen=True)
class Prompt:
    """A held-out question: what the model is asked, and the answer that the data gives."""

    text: str
    """For people: the last user turn of a conversation, or the beginning of a text."""
    ids: list[int]
    """What the model reads, ending in the template's generation prompt."""
    answer: str
    messages: list[dict[str, Any]] | None = None
    """The conversation up to the answer; None for raw text."""


@dataclass(frozen=True)
class Data:
    """What a run trains on and is measured on."""

    train: list[Row]
    held_out: list[Row]
    report: Report
    fingerprint: str
    """SHA-256 over every token, label and position of all rows: another value is other data."""
    tokenizer: Any
    template: ChatTemplate | None
    """The chat template in use; None for raw text."""
    max_length: int
    held_out_parsed: Parsed

    def preview(self, index: int) -> Preview:
        """Training example ``index`` as the model sees it. Raises DataError when there is no such example."""
        count = self.report.train.examples
        if not 0 <= index < count:
            raise DataError(f"There is no example {index}; the training data has {count}, counted from 0.")
        number, row = next((n, row) for n, row in enumerate(self.train) if index in row.examples)
        begin, end = row.spans()[row.examples.index(index)]
        example = Example(row.ids[begin:end], row.labels[begin:end])
        return make_preview(
            example, self.tokenizer, f"{self.report.form} example {index} of {count:,}, in row {number}"
        )

    def held_out_prompts(self, count: int) -> list[Prompt]:
        """At most ``count`` held-out prompts, spread evenly over the held-out records; the same ones every time.

        A conversation asks its first question. A text gives its first half, at most 64 tokens, and asks for as many
        more. Prompts that leave no room below ``max_length`` are passed over.
        """
        parsed = self.held_out_parsed
        total = len(parsed.texts or parsed.conversations)
        order = [place * total // count for place in range(min(count, total))] if count < total else list(range(total))
        order += [index for index in range(total) if index not in set(order)]
        prompts: list[Prompt] = []
        for index in order:
            if len(prompts) == count:
                break
            prompt = self._text_prompt(parsed.texts[index]) if parsed.texts else self._question(index)
            if 0 < len(prompt.ids) < self.max_length:
                prompts.append(prompt)
        return prompts

    def _question(self, index: int) -> Prompt:
        assert self.template is not None
        messages, ids, answer = self.template.prompt(self.held_out_parsed.conversations[index])
        return Prompt(messages[-1]["content"], ids, answer, messages)

    def _text_prompt(self, text: str) -> Prompt:
        ids = self.tokenizer(text, verbose=False)["input_ids"][:128]
        half = (len(ids) + 1) // 2
        begin, rest = (self.tokenizer.decode(part, skip_special_tokens=True) for part in (ids[:half], ids[half:]))
        return Prompt(begin, ids[:half], rest)


def load_data(section: DataSection, tokenizer: Any, seed: int = 0) -> Data:
    """Read, check, tokenise and pack what a recipe's `data` section names.

    ``tokenizer`` is a transformers tokenizer with a fast implementation and is left as it is; ``seed`` draws the
    held-out part. Raises DataError, in a sentence that names the place, for data that is missing, broken, of no known
    form, or that would train on nothing.
    """
    records = read_records(section.train, section.subset, section.split, section.limit)
    if section.held_out is not None:
        held = read_records(section.held_out, section.subset, section.held_out_split)
    else:
        records, held = _split(records, section.held_out_fraction, seed)
    parsed = parse(records, section.form, section.columns)
    held_parsed = parse(held, parsed.form, section.columns) if held else Parsed(parsed.form)
    train_on = _resolve_train_on(section.train_on, parsed.form)
    template = ChatTemplate(tokenizer, section.chat_template) if parsed.form != "text" else None

    train, counts = _rows(parsed, tokenizer, template, train_on, section)
    held_out, held_counts = _rows(held_parsed, tokenizer, template, train_on, section)
    if held and not held_out:
        raise DataError(
            f"None of the {len(held)} held-out records leaves a token to measure ({'; '.join(held_counts.losses())}); "
            "give others, or raise data.max_length."
        )
    notes = tuple(template.dialect.notes) if template else ()
    report = Report(parsed.form, train_on, template.name if template else None, counts, held_counts, notes)
    _require_targets(report, section)
    return Data(
        train, held_out, report, _fingerprint(train, held_out), tokenizer, template, section.max_length, held_parsed
    )


def _split(records: list[Record], fraction: float, seed: int) -> tuple[list[Record], list[Record]]:
    """(train, held out): whole records, drawn by ``seed``, each part in the order of the data."""
    if not fraction:
        return records, []
    count = max(1, round(len(records) * fraction))
    if count >= len(records):
        raise DataError(
            f"data.held_out_fraction={fraction} of {len(records)} records leaves none to train on; "
            "give a data.held_out file instead."
        )
    drawn = set(numpy.random.Generator(numpy.random.PCG64(seed)).permutation(len(records))[:count].tolist())
    train = [record for index, record in enumerate(records) if index not in drawn]
    return train, [records[index] for index in sorted(drawn)]


def _resolve_train_on(train_on: str, form: str) -> str:
    if form == "text":
        if train_on in ("assistant", "completion"):
            raise DataError(
                f"data.train_on is '{train_on}', but the data is raw text without turns; use 'auto' or 'all'."
            )
        return "all"
    if train_on == "auto":
        return "completion" if form in ("alpaca", "prompt_completion") else "assistant"
    return train_on


def _rows(
    parsed: Parsed, tokenizer: Any, template: ChatTemplate | None, train_on: str, section: DataSection
) -> tuple[list[Row], Counts]:
    """One part of the data as rows, with its counts."""
    split = 0
    if template is None:
        examples = text_examples(parsed.texts, tokenizer, section.max_length)
    else:
        encoded = template.encode(parsed.conversations, train_on)
        examples = [example for several in encoded for example in several]
        split = sum(len(several) > 1 for several in encoded)
    fitted = fit(examples, section.max_length, section.too_long)
    rows = make_rows(fitted.examples, section.max_length, section.packing)
    left_off = [turn for one in (*parsed.conversations, *parsed.skipped) for turn in one.unanswered]
    counts = Counts(
        records=len(parsed),
        examples=len(fitted.examples),
        rows=len(rows),
        tokens=sum(len(row.ids) for row in rows),
        target_tokens=sum(row.target_tokens for row in rows),
        truncated=fitted.truncated,
        truncated_tokens=fitted.truncated_tokens,
        dropped=fitted.dropped,
        dropped_tokens=fitted.dropped_tokens,
        skipped=len(parsed.skipped),
        unanswered_turns=len(left_off),
        unanswered_tokens=sum(map(len, tokenizer(left_off, add_special_tokens=False)["input_ids"])) if left_off else 0,
        split_conversations=split,
    )
    return rows, counts


def _require_targets(report: Report, section: DataSection) -> None:
    """Refuse data that trains on nothing, or a chat set that trains on the questions too without being asked to."""
    counts = report.train
    if not counts.target_tokens:
        if counts.dropped and section.too_long == "drop":
            raise DataError(
                f"All {counts.dropped} examples are longer than data.max_length={section.max_length} or have nothing to "
                "train on; raise data.max_length, or set data.too_long=truncate."
            )
        raise DataError(
            f"No token of the data carries loss ({'; '.join(counts.losses()) or 'no records'}); "
            f"raise data.max_length={section.max_length} or look at the records' answers."
        )
    # the first token of an example is never a target, so 'every token' is all the others
    if report.template and report.train_on != "all" and counts.target_tokens >= counts.tokens - counts.examples:
        raise DataError(
            f"Every token of this {report.form} data would be trained, the questions too: the chat template "
            f"({report.template}) marks everything as the assistant's. Correct the template, or set data.train_on=all."
        )


def _fingerprint(*parts: Sequence[Row]) -> str:
    digest = hashlib.sha256()
    for part in parts:
        digest.update(f"{len(part)} rows;".encode())
        for row in part:
            digest.update(f"{len(row.ids)};".encode())
            for array in (row.ids, row.labels, row.positions):
                digest.update(array.astype("<i4").tobytes())
    return digest.hexdigest()
