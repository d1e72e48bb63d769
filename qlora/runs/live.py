"""Live: a run's bar and curve in a notebook's cell while it trains, drawn again from its metrics.jsonl.

Knows the run folder's files and IPython's display; must not know what trains.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from statistics import median_high
from threading import Event, Thread

from qlora.errors import RunError
from qlora.files.durable import expanded
from qlora.reporting.figures import column
from qlora.reporting.records import Records, number, read_records, whole

WIDTH, HEIGHT = 640, 200  # pixels


@contextmanager
def live(folder: str | Path, every: float = 2.0) -> Iterator[None]:
    """While the block runs, show how far the run in ``folder`` is, and its losses; again ``every`` so many seconds.

        with qlora.live(recipe.folder):
            run = qlora.train(recipe, quiet=True)

    Nothing is shown outside of a notebook. Raises ImportError where IPython is not installed.
    """
    from IPython.display import HTML, display

    place, begun, ended = expanded(folder), time.time(), Event()
    cell = display(HTML("Loading …"), display_id=True)  # type: ignore[no-untyped-call]

    def show() -> None:
        if (
            cell is not None
            and (place / "metrics.jsonl").is_file()
            and (place / "metrics.jsonl").stat().st_mtime >= begun
        ):
            cell.update(HTML(drawn(read_records(place))))  # type: ignore[no-untyped-call]

    def again() -> None:
        while not ended.wait(every):
            try:
                show()
            except (OSError, RunError):  # between two files of a folder that is being made
                continue

    drawer = Thread(target=again, daemon=True)
    drawer.start()
    try:
        yield
    finally:
        ended.set()
        drawer.join()
    show()


def drawn(records: Records) -> str:
    """The bar, in words what it stands for, and the curve of losses as SVG."""
    steps = whole(records.plan, "steps") or len(records.steps) or 1
    losses = [(step.number, loss) for step in records.steps if (loss := number(step.values, "loss")) is not None]
    done = records.steps[-1].number if records.steps else 0
    said = f"step {done:,} of {steps:,}" + (f", loss {losses[-1][1]:.4f}" if losses else "")
    if (seconds := column(records, "seconds")) and done < steps:
        said += f", {math.ceil(median_high(seconds) * (steps - done) / 60)} min left"
    return f'<progress max="{steps}" value="{done}"></progress> {said}<br>{_curve(losses, steps)}'


def _curve(losses: list[tuple[int, float]], steps: int) -> str:
    if len(losses) < 2:
        return ""
    low, high = min(loss for _, loss in losses), max(loss for _, loss in losses)
    across, up = (WIDTH - 60) / max(steps - 1, 1), (HEIGHT - 20) / ((high - low) or 1)
    points = " ".join(f"{50 + (step - 1) * across:.1f},{10 + (high - loss) * up:.1f}" for step, loss in losses)
    labels = "".join(
        f'<text x="46" y="{y}" text-anchor="end" font-size="11" fill="currentColor">{value:.2f}</text>'
        for value, y in ((high, 14), (low, HEIGHT - 6))
    )
    line = f'<polyline points="{points}" fill="none" stroke="#1f77b4" stroke-width="2"/>'
    return f'<svg width="{WIDTH}" height="{HEIGHT}" role="img" aria-label="training loss by step">{labels}{line}</svg>'
