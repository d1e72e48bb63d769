"""A study: its cells run one after the other, or side by side, and its page is written anew after each.

    study.yaml ─► settings ─► (budget ─► halvings) ─► due cells ─► engine ─► results ─► table, study.csv, study.html
                                                       ▲                        │
                                                       └────────────────────────┘

What lies in the folder is gone on with: cells that ended are not run again, cells that began go on. Knows all of this room.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, wait
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qlora.data.batches import steps_per_epoch
from qlora.errors import DoesNotFitError, InputError, RunError, Stopped, listed
from qlora.files.durable import expanded, write_json, write_text
from qlora.files.html import as_frame
from qlora.files.lock import run_lock
from qlora.files.strangers import MAX_OURS, Fault, read_object
from qlora.machine.disk import bytes_text, duration_text
from qlora.model.checkpoint import open_checkpoint
from qlora.planning.plan import timed
from qlora.planning.rows import load_recipe_data
from qlora.runs.session import speaker
from qlora.runs.tasks import open_tasks
from qlora.studies.cell import Outcome, fail
from qlora.studies.engines import Engine, engine_of
from qlora.studies.page import write_page
from qlora.studies.results import Compared, Row, compared, csv_text, read_row, table
from qlora.studies.schedule import Expected, due, halvings_within, left_out, needed, rungs, tries, within
from qlora.studies.spec import Cell, Setting, StudySection, settings_of
from qlora.training.stopping import stoppable

SPEC = "study.json"
"""What the study in a folder asked."""
SCHEDULE = "schedule.json"
"""In how many rounds rates are tried: decided once, since a cell's number of steps depends on it."""
FIXED = 30.0
"""Seconds of a cell beside its steps, before one has been measured: loading, planning, held-out loss twice."""


@dataclass(frozen=True)
class Study:
    """A study on disk."""

    folder: Path
    rows: list[Row]
    """Every cell that has ended, in the study's order."""
    compared: list[Compared]
    """Every setting whose best rate is known."""
    page: Path

    def __str__(self) -> str:
        return table(self.compared)

    def _repr_html_(self) -> str:
        return as_frame(self.page.read_text(encoding="utf-8"))

    def frame(self) -> Any:
        """The rows as a pandas frame. Raises ImportError where pandas is not installed."""
        import pandas

        return pandas.DataFrame([row.plain() for row in self.rows])


def study(given: str | Path | StudySection, *overrides: str, quiet: bool = False) -> Study:
    """Run a study, or go on with it. ``given`` is its file or section, an override ``key=value``.

    Failed cells are kept, shown, and tried again by the next call. Raises InputError for a study that makes no sense, RunError for a
    folder that holds another one, and Stopped after a signal, with everything saved.
    """
    section = StudySection.from_yaml(given, *overrides) if isinstance(given, str | Path) else given
    settings, say = settings_of(section), speaker(quiet)
    folder = expanded(section.folder or "studies/study")
    folder.mkdir(parents=True, exist_ok=True)
    with run_lock(folder):
        _require_own(folder, settings)
        if not (folder / "results").is_dir():  # a study that goes on has read them before
            require_data(settings, section)
        (folder / "results").mkdir(exist_ok=True)
        write_json(folder / SPEC, section.model_dump(mode="json", exclude_defaults=True))
        expected = None if section.hours is None else expectations(settings, section)
        rounds = _rounds(folder, section, settings, expected)
        going = _Going(section, settings, rounds, folder, expected or {}, quiet)
        command = f"qlora study {given}" if isinstance(given, str | Path) else "the same study"
        with stoppable(command):
            going.run(say)
        found = going.written()
        say(f"\n{found}\n\nStudy   {folder}\nPage    {found.page}")
        return found


def plan_study(given: str | Path | StudySection, *overrides: str) -> str:
    """What a study will take: cells, time, memory and disk, setting by setting, for people. Nothing is trained or written."""
    section = StudySection.from_yaml(given, *overrides) if isinstance(given, str | Path) else given
    settings = settings_of(section)
    expected = expectations(settings, section)
    halvings = halvings_within(settings, expected, section.budget)
    cells, seconds = needed(settings, expected, halvings)
    lines = ["| setting | rates | seeds | steps | s a step | a cell | memory |", "|---|--:|--:|--:|--:|--:|--:|"]
    for one in settings:
        of = expected[one.name]
        lines.append(
            f"| {one.name} | {len(one.rates)} | {len(one.seeds)} | {of.steps:,} | {of.step_seconds:.2g} | "
            f"{duration_text(of.seconds())} | {bytes_text(of.memory_bytes)} |"
        )
    disk = sum(expected[one.name].disk_bytes for one in settings for _ in one.cells)
    lines.append(
        f"{cells} cells in {duration_text(seconds)}, at most {bytes_text(max(one.memory_bytes for one in expected.values()))} of "
        f"memory, and {bytes_text(disk)} on disk if every cell is run."
    )
    if halvings:
        lines.append(
            f"To keep to {section.hours:g} hours, rates are tried in {halvings + 1} rounds, from {100 / 2**halvings:g} % of the steps."
        )
    if section.budget is not None and seconds > section.budget:
        lines.append(f"That is more than {section.hours:g} hours: the last cells will be left out, and named.")
    return "\n".join(lines)


def expectations(settings: Sequence[Setting], section: StudySection) -> dict[str, Expected]:
    """By setting, what a cell of it takes, by the plan. Raises InputError or DoesNotFitError, naming the setting."""
    rows: dict[str, int] = {}  # by what decides it: settings mostly share their data
    found = {}
    for setting in settings:
        recipe = setting.first.in_folder(Path(section.folder or "studies/study"), section.data_root)
        try:
            planned = timed(recipe)
            data = repr((recipe.model, recipe.data, recipe.method.virtual_tokens))
            if data not in rows:
                rows[data] = len(load_recipe_data(recipe, open_checkpoint(recipe.model, weights=False)).train)
        except (InputError, DoesNotFitError) as error:
            raise type(error)(f"{setting.name}: {error}") from None
        training, seconds = recipe.training, planned.chosen.seconds
        steps = training.steps or training.epochs * steps_per_epoch(rows[data], training.batch_size)
        a_step = seconds.expected if seconds is not None else 0.0
        found[setting.name] = Expected(steps, a_step, FIXED, planned.memory.total, planned.disk_bytes)
    return found


def require_data(settings: Sequence[Setting], section: StudySection) -> None:
    """Open what the settings read, each once: data or tasks that cannot be used are said now, and not by every cell.

    Raises InputError naming the setting.
    """
    seen = set()
    for setting in settings:
        recipe = setting.first.in_folder(Path("studies"), section.data_root)
        what = repr((recipe.model, recipe.data, recipe.method.virtual_tokens, recipe.evaluation.tasks))
        if what in seen:
            continue
        seen.add(what)
        try:
            data = load_recipe_data(recipe, open_checkpoint(recipe.model, weights=False))
            open_tasks(recipe, data)
        except InputError as error:
            raise type(error)(f"{setting.name}: {error}") from None


def _require_own(folder: Path, settings: Sequence[Setting]) -> None:
    """Raise RunError where the folder holds another study: its cells would be gone from the page."""
    path = folder / SPEC
    if not path.is_file():
        return
    try:
        before = settings_of(StudySection.from_yaml(path))
    except InputError as error:
        raise RunError(
            f"'{path}' says which study this folder holds, and cannot be used ({error}); choose another folder."
        ) from None
    there, here = ({cell.name for one in some for cell in one.cells.values()} for some in (before, settings))
    if there.isdisjoint(here):
        raise RunError(
            f"'{folder}' holds another study, of {listed([one.name for one in before], 4)}, and not one cell of this one; choose another "
            "folder (folder=studies/…)."
        )


def _rounds(
    folder: Path, section: StudySection, settings: Sequence[Setting], expected: Mapping[str, Expected] | None
) -> dict[str, list[int | None]]:
    """The rounds of tries of every setting, as they were decided when the study began."""
    try:
        kept = (read_object(folder / SCHEDULE, MAX_OURS) or {}).get("rounds", {})
    except Fault:
        raise RunError(f"'{folder / SCHEDULE}' is damaged; delete it, and the rounds are decided anew.") from None
    halvings = 0 if expected is None else halvings_within(settings, expected, section.budget)
    rounds = {
        one.name: kept.get(one.name) or (rungs(one, expected[one.name].steps, halvings) if expected else [None])
        for one in settings
    }
    write_json(folder / SCHEDULE, {"rounds": rounds})
    return rounds


class _Going:
    """A study that runs."""

    def __init__(
        self,
        section: StudySection,
        settings: Sequence[Setting],
        rounds: Mapping[str, Sequence[int | None]],
        folder: Path,
        expected: Mapping[str, Expected],
        quiet: bool,
    ) -> None:
        self.section, self.settings, self.rounds, self.folder = section, settings, rounds, folder
        self.expected, self.quiet = expected, quiet
        self.rows: dict[str, Row] = {}
        for cell in self._all():
            if (row := read_row(folder, cell)) is not None:
                self.rows[cell.name] = row
        self.failed_before = {name for name, row in self.rows.items() if row.error}

    def _all(self) -> list[Cell]:
        """Every cell that there may be, in the study's order."""
        found: list[Cell] = []
        for setting in self.settings:
            for steps in self.rounds[setting.name]:
                cells = [cell for (seed, _), cell in setting.cells.items() if steps is None or seed == setting.seeds[0]]
                found += cells if steps is None else [cell.of_steps(steps) for cell in cells]
        return found

    @property
    def losses(self) -> dict[str, float]:
        """Of the cells that are done; one that failed in an earlier call is due again."""
        return {
            name: row.loss if not row.error else math.inf
            for name, row in self.rows.items()
            if name not in self.failed_before
        }

    def seconds(self, cell: Cell) -> float:
        """What a cell will take: by the plan, held to what cells of this study took so far."""
        if not self.expected:
            return 0.0
        done = [row for row in self.rows.values() if not row.error and row.seconds]
        asked = sum(self.expected[row.setting].seconds(row.steps) for row in done)
        scale = sum(row.seconds for row in done) / asked if asked else 1.0
        return self.expected[cell.setting].seconds(cell.steps) * scale

    def run(self, say: Any) -> None:
        """Until nothing is due, or the budget is spent. Raises Stopped."""
        running: dict[Future[Outcome], Cell] = {}
        engine: Engine | None = None
        out: list[Cell] = []
        total = len([cell for cell in self._all() if cell.steps is None])
        try:
            while True:
                taken = {cell.name for cell in running.values()}
                waiting = [cell for cell in due(self.settings, self.rounds, self.losses) if cell.name not in taken]
                spent = sum(row.seconds for row in self.rows.values()) + sum(map(self.seconds, running.values()))
                waiting, out = within(waiting, self.seconds, spent, self.section.budget)
                engine = engine or (engine_of(self.section) if waiting else None)
                for cell in waiting[: engine.workers - len(running) if engine else 0]:
                    assert engine is not None
                    say(
                        f"── {cell.setting}, rate {cell.rate:g}, seed {cell.seed}{f', {cell.steps} steps' if cell.steps else ''} "
                        f"({len(self.rows)} done, at most {total} cells at full length)"
                    )
                    running[engine.submit(cell, self.section, self.folder, self.quiet)] = cell
                if not running:
                    break
                done, _ = wait(running, return_when=FIRST_COMPLETED)
                for future in done:
                    self._ended(running.pop(future), future.result(), say)
        except KeyboardInterrupt:
            if engine is not None and running:
                engine.stop()
                wait(running, timeout=600)  # their states are saved
            raise
        finally:
            if engine is not None:
                engine.close()
        if out:
            say(left_out(out))

    def _ended(self, cell: Cell, outcome: Outcome, say: Any) -> None:
        if outcome.signal > 0:
            raise Stopped(f"{outcome.error} The study goes on with the same command.", outcome.signal)
        if outcome.signal < 0:
            raise DoesNotFitError(outcome.error)
        if outcome.error:
            say(f"{cell.name} failed: {outcome.error}")
            if read_row(self.folder, cell) is None or cell.name in self.failed_before:
                fail(cell, self.folder, outcome.error)
        self.failed_before.discard(cell.name)
        row = read_row(self.folder, cell)
        assert row is not None
        self.rows[cell.name] = row
        self.written()

    def written(self) -> Study:
        """What has ended so far, with its page and its table on disk."""
        rows = [self.rows[cell.name] for cell in self._all() if cell.name in self.rows]
        best = {}
        for setting in self.settings:
            missing, rate = tries(
                setting, self.rounds[setting.name], {name: row.loss for name, row in self.rows.items()}
            )
            if not missing and rate is not None:
                best[setting.name] = rate
        found = compared(self.settings, self.rows, best)
        write_text(self.folder / "study.csv", csv_text(rows))
        finished = not due(self.settings, self.rounds, self.losses)
        page = write_page(self.folder, self.section, self.settings, rows, found, finished)
        return Study(self.folder, rows, found, page)
