"""What the cells of a study came to: rows, and the settings compared, each at its best rate.

    results/*.json ─► rows ─► best rate ─► mean over seeds, difference from the first setting ─► table, study.csv

Knows the files that cells leave; must not know how a cell is run, or HTML.
"""

from __future__ import annotations

import csv
import io
import math
import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from qlora.errors import RunError
from qlora.evaluation.score import HeldOut, difference, plus_minus
from qlora.files.strangers import MAX_OURS, Fault, JsonObject, read_object
from qlora.runs.session import held_out_of
from qlora.studies.spec import Cell, Setting

Number = float | None


@dataclass(frozen=True)
class Row:
    """One cell that has ended. Losses are nats a target token, sizes bytes."""

    cell: str
    arm: str
    setting: str
    values: Mapping[str, Any]
    method: str
    rate: float
    seed: int
    steps: int | None
    """Of a cell that tried its rate on a part of the steps."""
    error: str
    """Why it failed; empty where it did not."""
    before: HeldOut | None = field(repr=False, default=None)
    after: HeldOut | None = field(repr=False, default=None)
    trainable: Number = None
    seconds: float = 0.0
    """Of the whole cell, its measurements among it."""
    train_seconds: Number = None
    tokens: Number = None
    tokens_per_second: Number = None
    peak_memory: Number = None
    adapter_bytes: Number = None
    more: Mapping[str, Any] = field(default_factory=dict, repr=False)
    """What else was measured: tasks, change, diversity, latency."""

    def score(self, task: str) -> Mapping[str, Any] | None:
        """The row of the table of tasks that stands for a task: that of its first metric; None where it was not scored."""
        return next((row for row in self.more.get("tasks", ()) if row["task"] == task), None)

    @property
    def tasks(self) -> list[str]:
        """The names of its tasks."""
        return list(dict.fromkeys(str(row["task"]) for row in self.more.get("tasks", ())))

    @property
    def loss(self) -> float:
        """The held-out loss; infinite where there is none, so that such a cell is never the best."""
        return math.inf if self.after is None or not math.isfinite(self.after.loss) else self.after.loss

    def plain(self) -> JsonObject:
        """Its line in ``study.csv``."""
        return {
            "cell": self.cell, "arm": self.arm, "setting": self.setting, **self.values, "method": self.method,
            "learning_rate": self.rate, "seed": self.seed, "part_of_steps": self.steps, "error": self.error,
            "held_out_before": self.before and self.before.loss, "held_out_after": self.after and self.after.loss,
            "trainable_parameters": self.trainable, "seconds": self.seconds, "train_seconds": self.train_seconds,
            "tokens": self.tokens, "tokens_per_second": self.tokens_per_second, "peak_memory_bytes": self.peak_memory,
            "adapter_bytes": self.adapter_bytes,
            **{
                f"{row['task']}.{row['metric']}{'' if when == 'trained' else '.base'}": row[when]["value"]
                for row in self.more.get("tasks", ()) for when in ("base", "trained") if row[when]
            },
        }  # fmt: skip


def read_row(folder: Path, cell: Cell) -> Row | None:
    """The row of a cell that has ended; None before. Raises RunError for a damaged result."""
    path = folder / "results" / f"{cell.name}.json"
    try:
        values = read_object(path, MAX_OURS)
        return None if values is None else _row(cell, values)
    except (Fault, AttributeError, KeyError, TypeError):
        raise RunError(f"'{path}' is damaged; delete it, and the cell is measured again.") from None


def _row(cell: Cell, values: JsonObject) -> Row:
    run, trained, found = values["run_info"], values["train_info"], values["study"]
    done = trained["status"] == "success"
    last = trained["metrics"][-1] if done else {}
    known = {"arm", "setting", "values", "rate", "seed", "steps", "method", "before", "after"}
    return Row(
        cell.name, cell.arm, cell.setting, cell.values, found["method"], cell.rate, cell.seed, cell.steps,
        error="" if done else run["error_msg"] or "failed",
        before=held_out_of(found.get("before")),
        after=held_out_of(found.get("after")),
        trainable=trained.get("num_trainable_params"),
        seconds=run["total_time"],
        train_seconds=trained.get("train_time"),
        tokens=last.get("train total tokens"),
        tokens_per_second=trained.get("tokens_per_second"),
        peak_memory=trained.get("accelerator_memory_max"),
        adapter_bytes=trained.get("file_size"),
        more={key: value for key, value in found.items() if key not in known},
    )  # fmt: skip


@dataclass(frozen=True)
class Compared:
    """A setting at its best rate, over its seeds."""

    setting: str
    rows: tuple[Row, ...]
    """At the best rate, the first seed first."""
    tried: tuple[Row, ...]
    """Every row of the first seed at full length: what the rate does."""
    at_edge: bool
    """Whether the best rate is the smallest or the largest of several, so that a better one may lie outside."""
    against: tuple[float, float] | None
    """(how much more held-out loss than the reference, its standard error), over the rows of the first seed; None where the
    held-out rows are not the same."""

    @property
    def best(self) -> Row:
        """Its row of the first seed."""
        return self.rows[0]

    @property
    def loss(self) -> float:
        """The mean over the seeds."""
        return statistics.fmean(row.loss for row in self.rows)

    @property
    def loss_error(self) -> Number:
        """Its standard error over the seeds; None with one."""
        losses = [row.loss for row in self.rows]
        return statistics.stdev(losses) / math.sqrt(len(losses)) if len(losses) > 1 else None


def compared(settings: Sequence[Setting], rows: Mapping[str, Row], best: Mapping[str, float]) -> list[Compared]:
    """Every setting whose best rate is known, in the study's order. The first of these is what the others are told against."""
    found: list[Compared] = []
    for setting in settings:
        if (rate := best.get(setting.name)) is None:
            continue
        cells = (setting.cells[seed, rate] for seed in setting.seeds)
        done = tuple(row for cell in cells if (row := rows.get(cell.name)) is not None and math.isfinite(row.loss))
        tried = (rows.get(setting.cells[setting.seeds[0], one].name) for one in setting.rates)
        if not done:
            continue
        reference = found[0].best if found else done[0]
        edge = len(setting.rates) > 1 and rate in (min(setting.rates), max(setting.rates))
        against = None if done[0] is reference else _against(done[0], reference)
        found.append(Compared(setting.name, done, tuple(row for row in tried if row is not None), edge, against))
    return found


def forgotten(one: Row, tasks: Sequence[str]) -> tuple[str, float] | None:
    """(a metric, the mean over ``tasks`` of how much worse than the base it became): over those with the first one's metric."""
    rows = [row for name in tasks if (row := one.score(name)) is not None and row["difference"]]
    if not rows:
        return None
    alike = [row for row in rows if row["metric"] == rows[0]["metric"]]
    worse = [row["difference"]["value"] * (-1 if row["better"] == "higher" else 1) for row in alike]
    return str(alike[0]["metric"]), statistics.fmean(worse)


def _against(row: Row, reference: Row) -> tuple[float, float] | None:
    try:
        assert row.after is not None
        assert reference.after is not None
        return difference(row.after, reference.after)
    except (AssertionError, ValueError):  # packed otherwise, for virtual tokens take room in a row
        return None


def csv_text(rows: Iterable[Row]) -> str:
    """``study.csv``: a line a cell."""
    lines = [row.plain() for row in rows]
    names = list(dict.fromkeys(name for line in lines for name in line))
    text = io.StringIO()
    writer = csv.DictWriter(text, names, lineterminator="\n")
    writer.writeheader()
    writer.writerows(lines)
    return text.getvalue()


def table(found: Sequence[Compared]) -> str:
    """The comparison as Markdown."""
    if not found:
        return "No setting has ended yet."
    lines = [
        "| | rate | held-out loss | against the first | trainable | tokens/s | peak memory | adapter |",
        "|---|--:|--:|--:|--:|--:|--:|--:|",
    ]
    for one in found:
        row, error = one.best, one.loss_error
        loss = f"{one.loss:.4f}" + (f" ± {error:.4f}" if error is not None else "")
        against = "—" if one.against is None else plus_minus(*one.against)
        speed = "—" if row.tokens_per_second is None else f"{row.tokens_per_second:,.0f}"
        lines.append(
            f"| {one.setting} | {row.rate:g}{' (edge)' if one.at_edge else ''} | {loss} | {against} | {row.trainable or 0:,} | {speed} "
            f"| {(row.peak_memory or 0) / 2**30:.2f} GiB | {(row.adapter_bytes or 0) / 2**20:.2f} MiB |"
        )
    return "\n".join(lines)
