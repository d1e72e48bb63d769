"""The recipe's ``evaluation.tasks``: what is asked of a model beside held-out loss, one section for each task.

Knows pydantic; must not know how a task is scored, or the public sets by name (``evaluation/tasks``).
"""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field, field_validator

from qlora.recipe.schema import Section, by_text


class TaskSection(Section):
    """A set of items that the model is scored on. A text may name a column of the data, as in `{question}`."""

    name: str = Field(
        pattern=r"^[\w.-]+$", json_schema_extra={"expected": "a name of letters, digits, dots, dashes and underscores"}
    )
    """What tables call it. That of a [public set](evaluation.md#public-sets), as `hellaswag`, brings everything but `data`."""
    preset: str | None = None
    """The public set whose columns it has, where `name` is another one."""
    data: str | None = Field(None, min_length=1)
    """A file (.jsonl, .json, .csv, .tsv, .parquet, .txt), a folder or pattern, or a hub id; the public set's hub id when left out."""
    subset: str | None = None
    """A hub data set's configuration name."""
    split: str | None = None
    """A hub data set's split; `test` when left out."""
    limit: int | None = Field(None, ge=1)
    """Only the first N items."""
    kind: Literal["choice", "last_word", "classification", "numeric", "generation", "json", "text"] | None = None
    """`choice`: which of several answers is likeliest. `classification`: the same with one set of `labels`. `last_word`: whether
    greedy decoding gives the answer. `numeric`: loss of the answer, and the last number of a generated one. `generation`: BLEU, NIST,
    ROUGE-L and chrF of generated texts. `json`: whether a generated answer is the JSON that was expected, and how many of its fields
    are right. `text`: loss and bits per byte."""
    prompt: str | None = None
    """What stands before the answer, as `"Question: {question}\\nAnswer:"`; for `text` what is read."""
    choices: str | tuple[str, ...] | None = None
    """For `choice`: the column that lists the answers, or a text for each."""
    answer: str | None = None
    """The column of the right answer: for `choice` its text, its letter or its number from 0; for `generation` a text or a
    list; for `json` a value, or JSON as text."""
    labels: dict[str, str] | None = None
    """For `classification`: what the model is to say for each value of the answer's column, as `{0: negative, 1: positive}`."""
    positive: str | None = None
    """For `classification`: the value that precision, recall and F1 are about; their mean over all labels when left out."""
    blank: str | None = Field(None, min_length=1)
    """For `choice`: what in `prompt` each choice takes the place of; then what follows it is scored (WinoGrande)."""
    delimiter: str | None = None
    """What stands between prompt and answer; a space when left out."""
    chat: bool = False
    """Ask in the chat template, the prompt as the user's turn. For models that were trained on conversations."""
    stop: tuple[str, ...] | None = None
    """Where a generated answer is cut off, if it gets there."""
    max_new_tokens: int | None = Field(None, ge=1)
    """The longest generated answer in tokens; 256 when left out."""

    @field_validator("labels", mode="before")
    @classmethod
    def _by_text(cls, values: Any) -> Any:
        return by_text(values)
