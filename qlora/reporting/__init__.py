"""Reporting: a run folder becomes one page for people.

    records     the folder's files       → Records, with a note on everything that could not be read
    figures     Records                  → the headline figures; numbers as text
    curves      Records                  → charts to draw
    charts      a chart                  → its axes, lines and read-outs (axes: round ticks)
    page        all of these             → HTML, through report.html.jinja and report.css
    compare     several runs' records    → one page of them all

``write_report`` runs them. The page needs no network, no script and no other file, and can be written at any time, also
while the run goes on. This room knows the run folder's files alone; it must not know a model, or what wrote them.
"""

from __future__ import annotations

import shlex
from pathlib import Path

from qlora.errors import DoesNotFitError, RunError, disk_is_full
from qlora.files.durable import write_text
from qlora.reporting.compare import write_comparison
from qlora.reporting.page import render
from qlora.reporting.records import Records, read_records

__all__ = ["Records", "read_records", "render", "write_comparison", "write_report"]


def write_report(folder: Path) -> Path:
    """Write ``report.html`` into the run folder, from its other files alone, and return its path.

    A report that is there is replaced in one move, so a browser never sees half a page. Raises RunError when ``folder``
    is no run folder or cannot be written to.
    """
    folder = Path(folder)
    html = render(read_records(folder))
    report = folder / "report.html"
    try:
        write_text(report, html)
    except OSError as error:
        if disk_is_full(error):
            raise DoesNotFitError(
                f"The disk of '{report}' is full ({error}); make room, then write it: qlora report {shlex.quote(str(folder))}"
            ) from None
        raise RunError(
            f"'{report}' cannot be written ({error}); free some space or change the folder's rights."
        ) from None
    return report
