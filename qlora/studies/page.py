"""The study's page: what was asked, what came of it, what was held equal, and what this can and cannot say.

Everything that a stranger wrote is text here, and ``study.html.jinja`` escapes it. Knows rows and what was compared; must not
know how cells are run.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from qlora.evaluation.score import plus_minus
from qlora.files.durable import write_text
from qlora.machine.disk import bytes_text, duration_text
from qlora.reporting import page
from qlora.reporting.figures import count_text, exact_text, significant
from qlora.reporting.page import templates
from qlora.studies.overlap import overlaps_of
from qlora.studies.plots import COLOURS, SIZE, Given, HeatMap, Plot, heat_map, of_loss, plot
from qlora.studies.results import Compared, Row, forgotten
from qlora.studies.spec import Setting, StudySection, held_equal

PAGE = "study.html"
LOSS = "held-out loss, nats a token"


class Line(NamedTuple):
    """One setting in the table: its texts, in the order of the columns."""

    texts: tuple[str, ...]
    best: bool
    """Whether no other one has less held-out loss."""


class Order(NamedTuple):
    """The table in one order."""

    name: str
    lines: list[Line]


COLUMNS = (
    "setting",
    "rate",
    "held-out loss",
    "against the first",
    "trainable",
    "tokens/s",
    "time",
    "peak memory",
    "adapter",
)


def write_page(
    folder: Path,
    study: StudySection,
    settings: Sequence[Setting],
    rows: Sequence[Row],
    found: Sequence[Compared],
    finished: bool,
) -> Path:
    """Write the page into the study's folder and return its path. ``finished``: nothing is left to run."""
    pages = templates(Path(__file__).parent, Path(page.__file__).parent)
    pages.globals |= {"SIZE": SIZE, "COLOURS": COLOURS}
    equal, differ = held_equal(list(settings))
    html = pages.get_template("study.html.jinja").render(
        name=folder.name,
        about=study.about,
        finished=finished,
        done=f"{sum(not row.error for row in rows)} of at most {sum(len(one.cells) for one in settings)} cells at full length",
        spent=duration_text(sum(row.seconds for row in rows)),
        columns=COLUMNS,
        orders=orders(found),
        plots=[one for one in plots(study, settings, rows, found) if one is not None],
        tasks=task_table(study, found),
        diversities=diversities(found),
        divergences=divergences(found),
        maps=maps(found),
        overlaps=[
            (one, other, f"{value:.2f}", f"{chance:.2f}") for one, other, value, chance in overlaps_of(folder, found)
        ],
        latencies=[(one.setting, *_latency(one.best)) for one in found if "latency" in one.best.more],
        unchanged=[
            (one.setting, said) for one in found for said in one.best.more.get("change", {}).get("left_out", ())
        ],
        failed=[(row.setting, f"rate {row.rate:g}, seed {row.seed}", row.error) for row in rows if row.error],
        grid=grid(settings, rows),
        says=says(study, settings, found),
        equal=[(key, _text(value)) for key, value in equal.items() if not key.startswith(("folder", "overwrite"))],
        differ=_in_short(differ),
    )
    path = folder / PAGE
    write_text(path, html)
    return path


def orders(found: Sequence[Compared]) -> list[Order]:
    """The table in several orders, since nothing on the page runs that could sort it."""
    if not found:
        return []
    least = min(one.loss for one in found)
    lines = {one.setting: Line(_texts(one), one.loss == least) for one in found}

    def ordered(name: str, key: Any) -> Order:
        return Order(name, [lines[one.setting] for one in sorted(found, key=key)])

    return [
        Order("as given", list(lines.values())),
        ordered("loss", lambda one: one.loss),
        ordered("trainable", lambda one: one.best.trainable or 0),
        ordered("speed", lambda one: -(one.best.tokens_per_second or 0)),
        ordered("memory", lambda one: one.best.peak_memory or 0),
    ]


def _texts(one: Compared) -> tuple[str, ...]:
    row, error = one.best, one.loss_error
    return (
        one.setting,
        f"{row.rate:g}" + (" (edge)" if one.at_edge else ""),
        significant(one.loss) + (f" ± {error:.4f}" if error is not None else ""),
        "—" if one.against is None else plus_minus(*one.against),
        count_text(row.trainable),
        exact_text(row.tokens_per_second and round(row.tokens_per_second)),
        duration_text(row.seconds),
        "—" if row.peak_memory is None else bytes_text(row.peak_memory),
        "—" if row.adapter_bytes is None else bytes_text(row.adapter_bytes),
    )


def grid(settings: Sequence[Setting], rows: Sequence[Row]) -> list[tuple[str, list[tuple[str, str]]]]:
    """Every rate that was tried, by setting: its loss, or why there is none."""
    found = []
    for setting in settings:
        tried = [row for row in rows if row.setting == setting.name]
        cells = [
            (
                f"{row.rate:g}"
                + (f", {row.steps} steps" if row.steps else "")
                + (f", seed {row.seed}" if len(setting.seeds) > 1 else ""),
                significant(row.loss) if math.isfinite(row.loss) else "failed" if row.error else "not finite",
            )
            for row in tried
        ]
        if cells:
            found.append((setting.name, cells))
    return found


def plots(
    study: StudySection, settings: Sequence[Setting], rows: Sequence[Row], found: Sequence[Compared]
) -> list[Plot | None]:
    """The drawings that there is something for."""
    before = [row.before.loss for row in rows if row.before is not None]
    base = (before[0], "the base") if before and max(before) - min(before) < 1e-9 else None
    drawn: list[Plot | None] = []
    if any(len(one.rates) > 1 for one in settings):
        curves: Given = {}
        for one in found:
            curves[one.setting] = [
                (row.rate, row.loss, f"{one.setting}, rate {row.rate:g}: {of_loss(row.loss)}", 0.0, 0.0)
                for row in sorted(one.tried, key=lambda row: row.rate)
            ]
        note = "each setting's best is compared"
        drawn.append(plot("Loss by learning rate", "learning rate", LOSS, curves, log=True, note=note))
    for key in dict.fromkeys(_number_of(values) for values in study.grid.items()):
        if key is not None:
            drawn += [
                _by_field(key, found, task)
                for task in (None, *dict.fromkeys(name for one in found for name in one.best.tasks))
            ]
    lost = [(one, worse) for one in found if (worse := forgotten(one.best, study.forgetting)) is not None]
    if lost:
        metric = lost[0][1][0]
        against: Given = {}
        for one, (_, more) in lost:
            about = f"{one.setting}: {more:+.3f} {metric} forgotten, {of_loss(one.best.loss)}"
            against[one.setting] = [(more, one.best.loss, about, 0.0, _share(one, found))]
        title, x_title = "Learning against forgetting", f"{metric} lost on {', '.join(study.forgetting)}"
        note = "best is to the left and low; area: peak memory"
        drawn.append(plot(title, x_title, LOSS, against, line=False, front=True, reference=base, note=note))
    trained = [one for one in found if one.best.trainable]
    if len(trained) > 1:
        points: Given = {}
        for one in trained:
            count, error = float(one.best.trainable or 1), one.loss_error or 0.0
            about = f"{one.setting}: {count_text(count)} numbers, {of_loss(one.loss)}"
            points[one.setting] = [(count, one.loss, about, error, _share(one, trained))]
        title, x_title, note = "Loss by what trains", "trainable numbers", "area: peak memory"
        drawn.append(
            plot(title, x_title, LOSS, points, log=True, line=False, reference=base, x_text=count_text, note=note)
        )
    return drawn


def _number_of(field: tuple[str, Sequence[Any]]) -> str | None:
    """The key of a field of the grid, or of the first that changes together there, if its values are several numbers."""
    key, values = field
    if isinstance(values[0], Mapping):
        key = next(iter(values[0]), key)
        values = [value.get(key) for value in values]
    numbers = all(isinstance(value, int | float) and not isinstance(value, bool) for value in values)
    return key if numbers and len(set(values)) > 1 else None


def _by_field(key: str, found: Sequence[Compared], task: str | None) -> Plot | None:
    """The held-out loss of each arm by a numeric field of the grid, or what it scores on a task."""
    arms: dict[str, list[tuple[float, float, str, float, float]]] = {}
    title, base = LOSS, None
    for one in found:
        score, error = one.loss, one.loss_error
        if task is not None:
            row = one.best.score(task)
            if row is None or row["trained"] is None:
                continue
            title, score, error = f"{task}, {row['metric']}", row["trained"]["value"], row["trained"]["error"]
            base = (row["base"]["value"], "the base") if row["base"] else None
        value = float(one.best.values[key])
        arms.setdefault(one.best.arm, []).append(
            (value, score, f"{one.setting}: {significant(score)}", error or 0.0, 0.0)
        )
    log = min((point[0] for points in arms.values() for point in points), default=0) > 0
    name = key.rpartition(".")[2]
    return plot(f"{'Loss' if task is None else task} by {name}", name, title, arms, log=log, reference=base)


def _share(one: Compared, others: Sequence[Compared]) -> float:
    """Its memory as a share of the most that any took."""
    most = max(other.best.peak_memory or 0 for other in others)
    return (one.best.peak_memory or 0) / most if most else 0.0


def task_table(
    study: StudySection, found: Sequence[Compared]
) -> list[tuple[str, str, str, list[tuple[str, str, str]]]]:
    """Of every task (name, what, what the base and a guess score), a row for each setting: its score and the difference."""
    told = []
    for name in dict.fromkeys(task for one in found for task in one.best.tasks):
        rows = [(one.setting, row) for one in found if (row := one.best.score(name)) is not None]
        first = rows[0][1]
        base = f"base {_scored(first['base'])}" + ("" if first["chance"] is None else f", chance {first['chance']:.3f}")
        what = f"{first['metric']} over {first['items']:,} items, {first['better']} is better"
        title = f"{name} (forgetting)" if name in study.forgetting else name
        told.append(
            (
                title,
                what,
                base,
                [(setting, _scored(row["trained"]), _scored(row["difference"], "+")) for setting, row in rows],
            )
        )
    return told


def _scored(value: Any, sign: str = "") -> str:
    if value is None:
        return "—"
    return f"{value['value']:{sign}.3f}" + ("" if value["error"] is None else f" ± {value['error']:.3f}")


def diversities(found: Sequence[Compared]) -> list[tuple[str, list[tuple[str, str]]]]:
    """By setting, each metric of the answers that were drawn, the base's first."""
    known = [(one.setting, one.best.more["diversity"]) for one in found if "diversity" in one.best.more]
    rows = [(setting, values["trained"]) for setting, values in known]
    if known and (base := next((values["base"] for _, values in known if values["base"]), None)):
        rows.insert(0, ("the base", base))
    return [
        (setting, [(metric.replace("_", " "), _scored(value)) for metric, value in values.items()])
        for setting, values in rows
    ]


def divergences(found: Sequence[Compared]) -> list[tuple[str, str, str, str, str]]:
    """By setting and text: KL from the base, how often both think the same token likeliest, how much more loss."""
    return [
        (one.setting, name, f"{of['divergence']:.4f}", f"{of['same_choice']:.1%}", _scored(of["loss"], "+"))
        for one in found
        for name, of in one.best.more.get("divergence", {}).items()
    ]


def maps(found: Sequence[Compared]) -> list[HeatMap]:
    """How each weight matrix changed, two figures for every setting; all settings' colours mean the same."""
    drawn: list[HeatMap | None] = []
    changes = {one.setting: one.best.more["change"]["matrices"] for one in found if "change" in one.best.more}
    for figure, text in (("relative", "‖ΔW‖ / ‖W₀‖"), ("rank_90", "rank at 90 % of the energy")):
        most = max((float(one[figure]) for matrices in changes.values() for one in matrices), default=0.0)
        drawn += [heat_map(setting, figure, matrices, most, text) for setting, matrices in changes.items()]
    return [one for one in drawn if one is not None]


def _latency(row: Row) -> tuple[str, str]:
    """Milliseconds a generated token, beside the base and merged."""
    found = row.more["latency"]
    return f"{1000 * found['unmerged']:.0f}", "—" if found["merged"] is None else f"{1000 * found['merged']:.0f}"


def says(study: StudySection, settings: Sequence[Setting], found: Sequence[Compared]) -> list[str]:
    """What this can and cannot say, in sentences."""
    said = []
    if edges := [one.setting for one in found if one.at_edge]:
        said.append(
            f"The best rate of {', '.join(edges)} is the smallest or the largest that was tried: a better one may lie beyond it."
        )
    if any(len(one.rates) > 1 for one in settings):
        said.append(
            "Rates were chosen by the same held-out rows that the losses are of, so each setting is a little flattered, the one with most "
            "rates the most."
        )
    else:
        said.append(
            "One rate was tried for each setting. Methods want different rates, so this compares rates as much as methods."
        )
    if len(study.seeds) == 1:
        said.append("There is one seed: ± is what other held-out rows would change, not what another run would.")
    else:
        said.append(
            f"± of a loss is the standard error over {len(study.seeds)} seeds; that of a difference is over held-out rows, paired, with the first seed."
        )
    if len(study.seeds) > 1 and any(
        cell.recipe.data.held_out_fraction for one in settings for cell in one.cells.values()
    ):
        said.append(
            "Each seed holds out other rows (data.held_out_fraction), so the error over seeds has their difference in it too."
        )
    unclear = [one.setting for one in found if one.against and abs(one.against[0]) < 2 * one.against[1]]
    if unclear:
        said.append(
            f"Less than two standard errors from the first setting, so no clear difference: {', '.join(unclear)}."
        )
    if any(one.best.after and one.against is None for one in found[1:]):
        said.append(
            "Where no difference from the first is given, the held-out rows are not the same (virtual tokens take room in a row)."
        )
    return said


def _in_short(keys: Sequence[str]) -> list[str]:
    """Keys for people: a section of which much differs by its name alone."""
    sections = [key.partition(".")[0] for key in keys]
    return list(
        dict.fromkeys(name if sections.count(name) > 3 else key for key, name in zip(keys, sections, strict=True))
    )


def _text(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value)
