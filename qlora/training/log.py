"""What a run says while it goes: ``metrics.jsonl`` for programs, a progress bar or plain lines for people.

Knows steps as they come; must not know how they were made.
"""

from __future__ import annotations

import json
import sys
import time
from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from statistics import median
from typing import Any, Self

from rich.console import Console
from rich.progress import BarColumn, TextColumn
from rich.progress import Progress as Bar
from rich.table import Column

from qlora.errors import redacted, visible
from qlora.files.durable import write_text
from qlora.machine.disk import bytes_text, duration_text

STEPS_OF_THE_MEDIAN = 50  # a run that gets slower, as on a laptop that gets warm, is seen within so many
WIDE, LEAST_BAR = 70, 12  # letters: of a terminal that has room for a bar, and what that takes at least


@dataclass(frozen=True)
class Step:
    """What one optimizer step did. ``metrics.jsonl`` holds these fields."""

    number: int
    """Counted from 1."""
    epoch: float
    """Passes over the data done after this step."""
    loss: float
    """In nats: cross-entropy, summed over the step's target tokens and divided by them, or a mean over its pairs."""
    learning_rate: float
    grad_norm: float
    """Global L2 norm before clipping."""
    target_tokens: int
    tokens: int
    """Tokens of the data that went through the model: neither padding nor virtual tokens."""
    tokens_per_second: float
    peak_memory_bytes: int
    seconds: float
    micro_batch_size: int = 1
    """Rows that went through the model at once."""
    skipped: bool = False
    """Whether no step was taken, because the loss or a gradient was not finite (both are NaN here then)."""
    resumed: bool = False
    """Whether it is the first that this process took of a run that was stopped."""
    note: str = ""
    """What the user should know of this step: memory ran out, and what is smaller from here on."""
    measures: Mapping[str, float] = field(default_factory=dict)
    """What the objective has to say beside the loss: the rewards of pairs."""

    def metrics(self) -> dict[str, object]:
        """The line for ``metrics.jsonl``: a note only where there is one, and no loss of a step that was skipped."""
        left_out = {"loss", "grad_norm"} if self.skipped else {"skipped"}
        left_out |= {"number", "measures", *(name for name in ("note", "resumed") if not getattr(self, name))}
        told = {name: value for name, value in asdict(self).items() if name not in left_out}
        return {"step": self.number, **told, **self.measures}

    def in_short(self) -> list[str]:
        """The margin of pairs and how often the chosen answer is ahead; mostly nothing."""
        if "reward_margin" not in self.measures:
            return []
        return [f"margin {self.measures['reward_margin']:.3f}", f"ahead {self.measures['reward_accuracy']:.0%}"]

    def __str__(self) -> str:
        if self.skipped:
            return f"step {self.number}  skipped: {self.note}"
        return (
            f"step {'  '.join([str(self.number), f'loss {self.loss:.4f}', *self.in_short()])}  lr {self.learning_rate:.2e}  "
            f"grad {self.grad_norm:.3f}  {self.tokens_per_second:.0f} tokens/s"
        )


STOPPED = "stopped"  # in ``metrics.jsonl``, instead of a step that could not be taken: why


class MetricsLog:
    """``metrics.jsonl``, one JSON object a line, flushed line by line so that a killed run loses none."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.also: Callable[[Mapping[str, Any]], None] | None = None
        """What is told each line too."""

    def write(self, values: Mapping[str, Any]) -> None:
        """Append one object."""
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps({k: redacted(v) if isinstance(v, str) else v for k, v in values.items()}) + "\n")
        if self.also is not None:
            self.also(values)

    def rewind(self, step: int) -> None:
        """Drop the lines after ``step``, and a torn last one: a resumed run writes them again."""
        self._keep(lambda values: values["step"] <= step)

    def rewind_held_out(self, step: int) -> None:
        """Drop the held-out evaluation after ``step`` steps, which is about to be made again."""
        self._keep(lambda values: values["step"] != step or "held_out_loss" not in values)

    def told(self, key: str) -> list[float]:
        """What the lines there say under ``key``, in their order; those that say nothing are left out."""
        text = self.path.read_text(encoding="utf-8") if self.path.is_file() else ""
        return [float(values[key]) for values in map(json.loads, text.splitlines()) if key in values]

    def _keep(self, wanted: Callable[[dict[str, Any]], bool]) -> None:
        if not self.path.is_file():
            return
        kept = []
        for line in self.path.read_text(encoding="utf-8", errors="replace").splitlines():
            try:
                if wanted(json.loads(line)):
                    kept.append(line)
            except (ValueError, KeyError, TypeError):
                continue
        write_text(self.path, "".join(f"{line}\n" for line in kept))


class Progress:
    """A Rich bar on a terminal, as wide as that; elsewhere a plain line now and then. Writes to standard error.

    The time left follows from the median of the last steps: one slow step does not move it. The bar is blue while all is
    well, yellow after something to know of, red while the loss diverges, and never green: whether it was good shows later.
    """

    def __init__(self, total: int, done: int = 0, quiet: bool = False) -> None:
        self.total = total
        self.quiet = quiet
        self.bar: Bar | None = None
        self.last_line = 0.0
        self.seconds: deque[float] = deque(maxlen=STEPS_OF_THE_MEDIAN)
        self.console = Console(stderr=True)
        if self.console.is_terminal and not quiet:
            self.drawn = BarColumn(bar_width=None, complete_style="blue", finished_style="blue")
            wide = self.console.width >= WIDE
            self.room = self.console.width - LEAST_BAR * wide
            self.bar = Bar(
                TextColumn("{task.fields[text]}", markup=False, table_column=Column(no_wrap=True)),
                *([self.drawn] if wide else []),
                console=self.console,
                expand=wide,
            )
            self.task = self.bar.add_task("train", total=total, completed=done, text=f"{done}/{total}")

    def __enter__(self) -> Self:
        if self.bar:
            self.bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self.bar:
            self.bar.stop()

    def show(self, step: Step, diverges: bool = False) -> None:
        """Tell of one step, and above all of what was different about it; ``diverges``: whether the loss does."""
        self.seconds.append(step.seconds)
        if step.note:
            self.say(step.note, "bold red" if diverges else "yellow")
        left = duration_text((self.total - step.number) * median(self.seconds))
        facts = [
            f"{step.number}/{self.total}", "skipped" if step.skipped else f"loss {step.loss:.3f}", f"{left} left", *step.in_short(),
            bytes_text(step.peak_memory_bytes), f"{step.tokens_per_second:,.0f} tokens/s", f"lr {step.learning_rate:.1e}",
        ]  # fmt: skip
        if self.bar:
            colour = "red" if diverges else "yellow" if step.note else "blue"
            self.drawn.complete_style = self.drawn.finished_style = colour
            self.bar.update(self.task, completed=step.number, text=fitting(facts, self.room))
        elif not self.quiet:
            now = time.monotonic()
            if now - self.last_line >= 5 or step.number in (1, self.total):
                self.last_line = now
                print("step", "  ".join(facts), file=sys.stderr, flush=True)

    def say(self, text: str, style: str | None = None) -> None:
        """A line of its own, above the bar."""
        text = visible(redacted(text))
        if self.bar:
            self.bar.console.print(text, style=style, markup=False, highlight=False)
        elif not self.quiet:
            print(text, file=sys.stderr, flush=True)


def fitting(facts: list[str], width: int) -> str:
    """The first of ``facts``, and as many of the next as a line of so many letters has room for."""
    line, *more = facts
    for one in more:
        if len(line) + 2 + len(one) > width:
            break
        line += f"  {one}"
    return line
