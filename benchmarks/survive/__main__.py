"""Faults injected for real, inputs fuzzed, a long run watched; and the table of it.

    make survive        python -m benchmarks.survive [--small] [--folder DIR] [--out FILE] [PART …]

    kills  disk  damage                      fault, trials, survived, lost
    fuzz                                     inputs by parser
    soak                                     memory, open files and threads of a long run

What is done is kept in DIR, so that an interrupted call goes on with the next part. Exits with 1 when anything was lost.
"""

from __future__ import annotations

import argparse
import importlib
import json
import os
import platform
import sys
import time
from datetime import date
from pathlib import Path
from typing import Any

from benchmarks.survive.size import Size
from qlora.files.durable import write_json
from qlora.machine.device import versions

PARTS = ("kills", "disk", "damage", "fuzz", "soak")
FAULTS = PARTS[:3]


def main() -> int:
    """Run what is not done yet, write the table, and return the exit status."""
    options = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    options.add_argument("--small", action="store_true", help="a few trials of each, in minutes")
    options.add_argument(
        "--folder", type=Path, default=Path("runs/survive"), help="where it works and keeps what is done"
    )
    options.add_argument("--out", type=Path, help="the table's file; standard output when left out")
    options.add_argument("parts", nargs="*", metavar="PART", help=f"{', '.join(PARTS)}; all when left out")
    chosen = options.parse_args()
    if unknown := [part for part in chosen.parts if part not in PARTS]:
        options.error(f"there is no part {', '.join(unknown)}; expected {', '.join(PARTS)}")
    size = Size(small=chosen.small)
    for part in chosen.parts or PARTS:
        kept = chosen.folder / f"{part}{'-small' if size.small else ''}.json"
        if not kept.is_file():
            measure(part, chosen.folder / part, size, kept)
    found = {part: json.loads(path.read_text(encoding="utf-8")) for part in PARTS if (path := chosen.folder / f"{part}{'-small' if size.small else ''}.json").is_file()}  # fmt: skip
    text = table(found, size)
    if chosen.out is None:
        print(text)
    else:
        chosen.out.write_text(text, encoding="utf-8")
        print(f"Written to {chosen.out}.", file=sys.stderr)
    return 0 if all(row_holds(part, row) for part, values in found.items() for row in values["rows"]) else 1


def measure(part: str, place: Path, size: Size, kept: Path) -> None:
    """Run one part in ``place`` and keep its rows and seconds in ``kept``."""
    place.mkdir(parents=True, exist_ok=True)
    print(f"{part} …", file=sys.stderr, flush=True)
    begin = time.perf_counter()
    rows = importlib.import_module(f"benchmarks.survive.{part}").run(
        place.resolve(), size, lambda text: print(f"  {text}", file=sys.stderr, flush=True)
    )
    write_json(
        kept,
        {
            "seconds": round(time.perf_counter() - begin),
            "rows": rows,
            "versions": versions(),
            "date": date.today().isoformat(),
        },
    )


def row_holds(part: str, row: dict[str, Any]) -> bool:
    """Whether nothing was lost in what a row tells of."""
    if part in FAULTS:
        return bool(row["survived"] == row["trials"])
    if part == "fuzz":
        return not row["failures"]
    return not row["grows"]


# --- the table -------------------------------------------------------------------------------------------------------


def table(found: dict[str, Any], size: Size) -> str:
    """Everything that was found, as Markdown."""
    seen = next(iter(found.values()))["versions"]
    machine = f"{os.cpu_count()} CPU cores, {platform.machine()}"
    made = ", ".join(f"{name} {seen[name]}" for name in ("torch", "transformers", "bitsandbytes", "python"))
    spent = ", ".join(f"{part} {values['seconds']:,} s" for part, values in found.items())
    lines = [
        "# What a run survives",
        "",
        f"`make survive`{' (small)' if size.small else ''} on {machine}; {made}; {', '.join(sorted({values.get('date', '') for values in found.values()}))}. Not measured on a "
        f"GPU. Time: {spent}.",
        "",
    ]
    faults = [row for part in FAULTS if part in found for row in found[part]["rows"]]
    if faults:
        lines += ["## Faults", "", "| fault | trials | survived | lost |", "|---|--:|--:|---|"]
        lines += [
            f"| {row['fault']} | {row['trials']:,} | {row['survived']:,} | {row['lost'] or 'nothing'} |"
            for row in faults
        ]
        total, survived = (sum(row[key] for row in faults) for key in ("trials", "survived"))
        lines += [f"| **all** | **{total:,}** | **{survived:,}** | |", ""]
    if "fuzz" in found:
        lines += fuzz_lines(found["fuzz"]["rows"])
    if "soak" in found:
        lines += soak_lines(found["soak"]["rows"])
    return "\n".join(lines)


def fuzz_lines(rows: list[dict[str, Any]]) -> list[str]:
    lines = [
        "## Hostile input",
        "",
        "A failure is anything but an answer or one sentence: another exception, more than two seconds, memory above the "
        "bound, a file outside of the input's folder.",
        "",
        "| parser | engine | inputs | seconds | failures | memory grown by |",
        "|---|---|--:|--:|--:|--:|",
    ]
    for row in rows:
        lines.append(
            f"| {row['parser']} | {row['engine']} | {row['inputs']:,} | {row['seconds']:.0f} | {row['failures']} "
            f"| {row['peak_memory_mib']:.0f} MiB |"
        )
    inputs, seconds, failures = (sum(row[key] for row in rows) for key in ("inputs", "seconds", "failures"))
    return [*lines, f"| **all** | | **{inputs:,}** | **{seconds:.0f}** | **{failures}** | |", ""]


def soak_lines(rows: list[dict[str, Any]]) -> list[str]:
    keys = list(rows[0])
    lines = ["## Soak", "", f"| {' | '.join(key.replace('_', ' ') for key in keys)} |", f"|{'---|' * len(keys)}"]
    for row in rows:
        lines.append(f"| {' | '.join(_value(row.get(key)) for key in keys)} |")
    return [*lines, ""]


def _value(value: Any) -> str:
    if isinstance(value, bool) or value is None:
        return {True: "yes", False: "no", None: ""}[value]
    return f"{value:,.1f}" if isinstance(value, float) else f"{value:,}" if isinstance(value, int) else str(value)


if __name__ == "__main__":
    sys.exit(main())
