"""Tasks of a run: opened before a model is loaded, scored with the adapter off and on, and kept in the run folder.

    recipe ─► tasks ─► tasks/base/NAME.json, tasks/000200/NAME.json ─► tasks.json, the table

What is being scored lies beside these as NAME.jsonl, an answer a line, so that a stopped run goes on there. Knows the run folder
and tasks; must not know how either is made.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Column

from qlora.data.load import Data
from qlora.data.rendering import one_child
from qlora.errors import InputError, RunError
from qlora.evaluation.tasks.opening import open_task
from qlora.evaluation.tasks.result import Result
from qlora.evaluation.tasks.scoring import score
from qlora.evaluation.tasks.table import table
from qlora.evaluation.tasks.task import Task
from qlora.files.durable import write_json
from qlora.files.strangers import Fault, JsonObject, read_object
from qlora.methods.base import AdaptedModel
from qlora.recipe import Recipe
from qlora.runs.session import speaker

TASKS, TABLE = "tasks", "tasks.json"
BASE = "base"
MAX_RESULT = 1 << 30  # bytes: a result holds every item


def open_tasks(recipe: Recipe, data: Data) -> list[Task]:
    """The recipe's tasks. Raises RecipeError and DataError, before a model is loaded, for one that cannot be asked."""
    with one_child():
        return [open_task(section, data.tokenizer, data.template) for section in recipe.evaluation.tasks]


def score_tasks(model: AdaptedModel, tasks: Sequence[Task], folder: Path, whose: str, quiet: bool) -> dict[str, Result]:
    """What ``model`` scores on each task, from the run folder where that is known. ``whose``: ``base``, or the checkpoint's name."""
    found = {}
    for task in tasks:
        place = folder / TASKS / whose / f"{task.name}.json"
        known = read_result(place, task)
        if known is None:
            model_is = (
                "the base"
                if whose == BASE
                else f"the adapter after step {int(whose):,}"
                if whose.isdecimal()
                else "the adapter"
            )
            speaker(quiet)(f"Scoring {model_is} on {task.name} ({len(task.items):,} items) …")
            with _bar(task.name, quiet) as show:
                known = score(model, task, place.with_suffix(".jsonl"), whose, show)
            write_json(place, known.as_dict())
            place.with_suffix(".jsonl").unlink(missing_ok=True)
        found[task.name] = known
    return found


def score_base(model: AdaptedModel, tasks: Sequence[Task], folder: Path, quiet: bool) -> dict[str, Result]:
    """What the base alone scores: known already, or now, as long as it can answer alone."""
    if any(method.why_not_disabled() is not None for method in model.methods):
        read = {task.name: read_result(folder / TASKS / BASE / f"{task.name}.json", task) for task in tasks}
        return {name: result for name, result in read.items() if result is not None}
    with model.disabled():
        return score_tasks(model, tasks, folder, BASE, quiet)


def keep_base(base: Mapping[str, Result], folder: Path) -> None:
    """Write what the base scored into the run folder, where another run found it."""
    for name, result in base.items():
        place = folder / TASKS / BASE / f"{name}.json"
        if not place.is_file():
            place.parent.mkdir(parents=True, exist_ok=True)
            write_json(place, result.as_dict())


def read_result(place: Path, task: Task) -> Result | None:
    """A result in the run folder, if it is of just these items asked in just this way; None where there is none."""
    try:
        values = read_object(place, MAX_RESULT)
        result = None if values is None else Result.from_dict(values)
    except (Fault, InputError):
        raise RunError(f"'{place}' is damaged; delete it, and the task is scored again.") from None
    if result is None or result.settings != task.settings or list(result.scores) != [item.id for item in task.items]:
        return None
    return result


def write_table(folder: Path, base: dict[str, Result], trained: dict[str, Result]) -> list[JsonObject]:
    """Write ``tasks.json``, and return its rows."""
    rows = table(base, trained)
    if rows:
        write_json(folder / TABLE, {"tasks": rows})
    return rows


@contextmanager
def _bar(name: str, quiet: bool) -> Iterator[Callable[[int, int], None]]:
    """What shows how many items are done: a bar on a terminal, nothing elsewhere."""
    console = Console(stderr=True)
    columns = (
        TextColumn("{task.description}", table_column=Column(no_wrap=True, overflow="ellipsis", ratio=2)),
        MofNCompleteColumn(table_column=Column(no_wrap=True)),
        BarColumn(None, table_column=Column(ratio=1)),
        TimeRemainingColumn(table_column=Column(no_wrap=True)),
    )
    off = quiet or not console.is_terminal
    with Progress(*columns, console=console, disable=off, transient=True, expand=True) as bar:
        number = bar.add_task(name, total=None)
        yield lambda done, of: bar.update(number, completed=done, total=of)
