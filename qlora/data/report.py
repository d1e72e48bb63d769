"""The report: how many records, examples and tokens there are, and what was lost on the way.

Knows numbers and how to print them; must not know where they come from.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass

from qlora.data.lengths import Bins, histogram
from qlora.errors import counted
from qlora.files.html import as_text
from qlora.files.strangers import JsonObject


@dataclass(frozen=True)
class Counts:
    """One part of the data, training or held-out. Tokens that came in = ``tokens`` + truncated + dropped tokens."""

    records: int = 0
    """A document that has pieces in both parts counts in both."""
    examples: int = 0
    """Conversations, pairs, or pieces of text that are kept."""
    rows: int = 0
    tokens: int = 0
    """Tokens in the rows, without padding."""
    target_tokens: int = 0
    """Tokens that carry loss."""
    truncated: int = 0
    """Examples cut at `max_length`."""
    truncated_tokens: int = 0
    cut_answers: int = 0
    """Examples cut inside an answer, whose end is not learnt then."""
    dropped: int = 0
    """Examples left out: above `max_length`, or with nothing left to train on."""
    dropped_tokens: int = 0
    skipped: int = 0
    """Records without an answer to train."""
    unanswered_turns: int = 0
    """Turns after the last answer to train, of skipped records too; left off before the template."""
    unanswered_tokens: int = 0
    split_conversations: int = 0
    """Conversations that became one example an answer, as the chat template rewrites earlier turns."""
    lengths: Bins = ()
    """How long the examples were before any was cut or left out."""

    @property
    def target_fraction(self) -> float:
        """The part of the tokens that carries loss."""
        return self.target_tokens / self.tokens if self.tokens else 0.0

    def losses(self) -> list[str]:
        """What was lost or changed, a phrase each; empty when nothing was."""
        inside = f", {self.cut_answers:,} of them inside an answer, whose end is not learnt" if self.cut_answers else ""
        phrases = [
            (
                self.truncated,
                f"{counted(self.truncated, 'example')} truncated ({self.truncated_tokens:,} tokens){inside}",
            ),
            (self.dropped, f"{counted(self.dropped, 'example')} dropped ({self.dropped_tokens:,} tokens)"),
            (self.skipped, f"{counted(self.skipped, 'record')} skipped, which hold no answer to train"),
            (
                self.unanswered_turns,
                f"{counted(self.unanswered_turns, 'turn')} after the last answer to train left off ({self.unanswered_tokens:,} tokens)",
            ),
            (self.split_conversations, f"{self.split_conversations:,} conversations split into one example an answer"),
        ]
        return [phrase for count, phrase in phrases if count]


@dataclass(frozen=True)
class Report:
    """What ``load_data`` found. ``print(report)`` tells it in a few lines; ``as_dict()`` gives the same numbers."""

    form: str
    """The form of the records, as ``data.form`` names it."""
    train_on: str
    """Which tokens carry loss: assistant, completion or all."""
    template: str | None
    """Which chat template was used; None for raw text."""
    train: Counts
    held_out: Counts
    notes: tuple[str, ...] = ()
    """Sentences about fields and records that were not read, what was put in other words for the template's sake, and how text
    was held out."""
    pairs: bool = False
    """Whether two examples each are a chosen answer and the rejected one."""

    def as_dict(self) -> JsonObject:
        """Plain values for JSON: form, train_on, template, train and held_out counts, notes."""
        values = asdict(self) | {"notes": list(self.notes)}
        for name in ("train", "held_out"):
            values[name]["target_fraction"] = round(getattr(self, name).target_fraction, 6)
        return values

    def histogram(self) -> str:
        """How long the training examples are, for a terminal."""
        what = "documents" if self.form == "text" else "examples"
        return f"lengths of the training {what}, before any is cut:\n{histogram(self.train.lengths)}"

    def _repr_html_(self) -> str:
        return as_text(f"{self}\n{self.histogram()}")

    def __str__(self) -> str:
        template = f", chat template: {self.template}" if self.template else ""
        lines = [f"form {self.form}, loss on {self.train_on}{template}"]
        for name, counts in (("train", self.train), ("held out", self.held_out)):
            if not counts.records:
                continue
            examples = counted(counts.examples // 2, "pair") if self.pairs else counted(counts.examples, "example")
            lines.append(
                f"{name}: {counted(counts.records, 'record')}, {examples} in {counted(counts.rows, 'row')}, "
                f"{counted(counts.tokens, 'token')}, {counts.target_tokens:,} of them trained ({counts.target_fraction:.0%})"
            )
            lines += [f"  {phrase}" for phrase in counts.losses()]
        return "\n".join([*lines, *(f"note: {note}" for note in self.notes)])
