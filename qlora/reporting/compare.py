"""Runs side by side on one page: their curves over each other, what their recipes have otherwise, their answers beside each other.

Knows records; must not know how a run is made. Of runs that were not held out alike, losses are not to be compared, which the
page says.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

from qlora.errors import InputError, RunError
from qlora.files.durable import write_text
from qlora.machine.disk import bytes_text
from qlora.recipe import Recipe, Section, parts_of
from qlora.reporting.charts import Chart, Curve
from qlora.reporting.curves import loss_chart
from qlora.reporting.figures import MISSING, change_text, count_text, duration_text, exact_text, significant, summarise
from qlora.reporting.page import filled, said, shown_value
from qlora.reporting.records import Records, objects, read_records, section

MOST = 6  # runs: more colours are not told apart


def write_comparison(folders: Sequence[Path], out: Path) -> Path:
    """Write one page of the runs in ``folders`` to ``out``. Raises RunError for what is no run, InputError for too many."""
    if len(folders) > MOST:
        raise InputError(f"{len(folders)} runs were given; expected at most {MOST} on one page.")
    page = render_comparison([read_records(Path(folder)) for folder in folders])
    try:
        out.absolute().parent.mkdir(parents=True, exist_ok=True)
        write_text(out, page)
    except OSError as error:
        raise RunError(f"'{out}' cannot be written ({error.strerror}); give another place with out=FILE.") from None
    return out


def render_comparison(runs: Sequence[Records]) -> str:
    """Records of several runs → a complete HTML document."""
    names = [f"{chr(ord('A') + place)} {records.name}" for place, records in enumerate(runs)]
    measured_on = {
        json.dumps([_files(records), *(point.target_tokens for point in records.held_out[:1])]) for records in runs
    }
    return filled(
        "compare.html.jinja",
        names=names,
        charts=[chart for chart in _charts(names, runs) if chart.curves],
        columns=COLUMNS,
        rows=[_row(records) for records in runs],
        differences=_differences([records.recipe for records in runs]),
        answers=_answers(names, runs),
        same_data=len(measured_on) == 1,
    )


def _files(records: Records) -> list[str]:
    """The checksums of what a run read; its names may be other ones."""
    return sorted(map(str, section(records.environment, "data_files").values()))


def _charts(names: Sequence[str], runs: Sequence[Records]) -> list[Chart]:
    """Held-out loss and training loss (smoothed where it can be), a curve for each run."""
    held_out, training = [], []
    for place, (name, records) in enumerate(zip(names, runs, strict=True)):
        curves = {curve.name: curve.points for curve in loss_chart(records).curves}
        if points := curves.get("held out"):
            held_out.append(Curve(name, points, f"run{place}"))
        if points := curves.get("smoothed") or curves.get("training loss"):
            training.append(Curve(name, points, f"run{place}"))
    unit = "nats per target token"
    return [Chart("Held-out loss", unit, held_out), Chart("Training loss", f"{unit}, smoothed", training)]


COLUMNS = ("verdict", "held-out before", "after", "change", "trainable", "steps", "time", "tokens/s", "peak memory")


def _row(records: Records) -> tuple[str, ...]:
    """A run's figures, in the order of ``COLUMNS``."""
    found = summarise(records)
    before, after = (None if one is None else one.loss for one in (found.before, found.after))
    return (
        "stopped" if records.stopped else said(section(records.evaluation, "verdict").get("outcome") or MISSING),
        significant(before),
        significant(after),
        MISSING if before is None or after is None else change_text(before, after),
        count_text(found.trainable),
        exact_text(found.steps_done),
        duration_text(found.seconds),
        exact_text(found.tokens_per_second),
        MISSING if found.peak_memory is None else bytes_text(found.peak_memory),
    )


def _differences(recipes: Sequence[Recipe | None]) -> list[tuple[str, list[str]]]:
    """The recipe's keys that not all runs agree on, with each run's value; where they write to is no difference."""
    values = [_by_key(recipe) if recipe else {} for recipe in recipes]
    keys = dict.fromkeys(key for one in values for key in one if key not in ("folder", "overwrite"))
    table = [(key, [one.get(key, MISSING) for one in values]) for key in keys]
    return [(key, each) for key, each in table if len(set(each)) > 1]


def _by_key(recipe: Recipe) -> dict[str, str]:
    """``training.epochs`` → ``3``; of several methods each by its name."""
    found: dict[str, str] = {}
    for name in type(recipe).model_fields:
        value = getattr(recipe, name)
        if not isinstance(value, Section):
            found[name] = shown_value(value)
            continue
        parts = parts_of(value)
        for part in parts:
            inside = f"{name}.{part.name}" if name == "method" and len(parts) > 1 else name
            fields = type(part).model_fields.items()
            found |= {f"{inside}.{field.alias or key}": shown_value(getattr(part, key)) for key, field in fields}
    return found


def _answers(names: Sequence[str], runs: Sequence[Records]) -> list[tuple[str, list[tuple[str, str]]]]:
    """Each prompt of the first run that another one answered too: (title, answer) of the data and of each run."""
    given = (objects(records.evaluation.get("generations")) for records in runs)
    by_prompt = [{said(item.get("prompt")): item for item in items} for items in given]
    found = []
    for prompt, item in by_prompt[0].items() if by_prompt else ():
        answers = [
            (name, said(one[prompt].get("after") or MISSING))
            for name, one in zip(names, by_prompt, strict=True)
            if prompt in one
        ]
        if len(answers) > 1:
            expected = item.get("expected")
            found.append((prompt, [("Expected", said(expected))] * (expected is not None) + answers))
    return found
