"""The table: what the base and the trained model scored, beside chance, and the difference item by item.

Knows results; must not know a run folder or a page.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

from qlora.evaluation.tasks.result import Json, Result, difference

HEADER = ("task", "items", "metric", "chance", "base", "trained", "difference")


def table(base: Mapping[str, Result], trained: Mapping[str, Result]) -> list[Json]:
    """A row for each metric of each task, as plain JSON. ``base`` or ``trained`` may lack a task; then a row has null there."""
    rows = []
    for name in dict.fromkeys([*base, *trained]):
        before, after = base.get(name), trained.get(name)
        apart = difference(after, before) if before is not None and after is not None else {}
        whole = after or before
        assert whole is not None
        for metric, measured in whole.metrics.items():
            rows.append(
                {
                    "task": name,
                    "kind": whole.kind,
                    "items": len(whole.scores),
                    "metric": metric,
                    "better": measured.better,
                    "chance": measured.chance,
                    "base": None if before is None else _number(before.metrics[metric]),
                    "trained": None if after is None else _number(after.metrics[metric]),
                    "difference": _number(apart[metric]) if metric in apart else None,
                }
            )
    return rows


def _number(measured: Any) -> Json:
    return {key: value for key, value in asdict(measured).items() if key in ("value", "error")}


def lines(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """The rows for a terminal, under their header; ± is one standard error."""
    cells = [HEADER, *(_cells(row) for row in rows)]
    widths = [max(len(row[place]) for row in cells) for place in range(len(HEADER))]
    left = (0, 2)  # texts; numbers stand on the right
    return [
        "  ".join(cell.ljust(width) if place in left else cell.rjust(width) for place, (cell, width) in enumerate(zip(row, widths, strict=True))).rstrip()
        for row in cells
    ]  # fmt: skip


def _cells(row: Mapping[str, Any]) -> tuple[str, ...]:
    chance = row["chance"]
    numbers = [shown(row[key], "+" * (key == "difference")) for key in ("base", "trained", "difference")]
    return (row["task"], f"{row['items']:,}", row["metric"], "–" if chance is None else f"{chance:.3f}", *numbers)


def shown(measured: Mapping[str, Any] | None, sign: str = "") -> str:
    """``0.312 ± 0.027``; a dash for nothing."""
    if measured is None:
        return "–"
    error = "" if measured["error"] is None else f" ± {measured['error']:.3f}"
    return f"{measured['value']:{sign}.3f}{error}"
