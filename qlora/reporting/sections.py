"""The sections of the page below its header, each a function from records to markup, or to nothing.

Knows what belongs together and in which words; must not read a file or draw a curve. A section with nothing to show is
left out, so that the page of a run that has just begun is short instead of full of dashes.
"""

from __future__ import annotations

import json
import shlex
from collections.abc import Mapping
from typing import Any, NamedTuple

from qlora.errors import redacted
from qlora.machine.device import bytes_text
from qlora.recipe import Recipe, Section, parts_of
from qlora.reporting.charts import WIDE, bars, draw
from qlora.reporting.curves import loss_chart, small_charts
from qlora.reporting.figures import MISSING, Figures, exact_text, significant
from qlora.reporting.markup import Child, Markup, tag
from qlora.reporting.records import Records, number, section, whole

# Shown at zero too: that nothing was lost is what a reader looks for. Other counts are shown where they are not zero.
_ALWAYS = ("records", "examples", "tokens", "target_tokens", "target_fraction", "truncated", "dropped")

# plan.json's memory may hold these beside the kinds; they are sums and limits, not kinds.
_SUMS = {"total": "planned in all", "budget": "budget", "free": "free before the run", "capacity": "on the device"}


def training(records: Records) -> Markup:
    """The curves; tables of the held-out evaluations where there are any besides before and after."""
    return _section(
        "Training",
        draw(loss_chart(records), WIDE),
        tag("div", (draw(chart) for chart in small_charts(records)), class_="charts"),
        _held_out_table(records) if len(records.held_out) > 2 else None,
    )


def answers(records: Records) -> Markup | None:
    """Each prompt once, and under it three answers: the data's, the base model's, the trained model's."""
    generations = records.evaluation.get("generations")
    if not isinstance(generations, list) or not generations:
        return None
    articles = [
        tag(
            "article",
            tag("h3", f"Prompt {index}"),
            tag("p", _said(item.get("prompt")), class_="said question", dir="auto"),
            tag(
                "div",
                (
                    tag("div", tag("h3", title), _answer(item.get(key)), class_=key)
                    for key, title in (("expected", "Expected"), ("before", "Before"), ("after", "After training"))
                    if key != "expected" or item.get(key) is not None
                ),
                class_="versions",
            ),
            class_="answer",
        )
        for index, item in enumerate(generations, start=1)
        if isinstance(item, dict)
    ]
    return _section("Answers", articles, lead="Prompts from the held-out data, which the model was not trained on.")


def data(records: Records) -> Markup | None:
    """What the data room counted: plan.json's ``data``, with its parts ``train`` and ``held_out``."""
    report = section(records.plan, "data")
    parts = {name: part for name in ("train", "held_out") if (part := section(report, name))}
    if not report:
        return None
    if not parts:
        parts = {"train": {key: value for key, value in report.items() if number(report, key) is not None}}
    keys = list(dict.fromkeys(key for part in parts.values() for key in part))
    shown = [key for key in keys if key in _ALWAYS or any(number(part, key) for part in parts.values())]
    rows = [
        tag("tr", tag("th", _words(key), scope="row"), (tag("td", _amount(key, part)) for part in parts.values()))
        for key in shown
    ]
    table = tag(
        "table",
        tag("thead", tag("tr", tag("th"), (tag("th", _words(name), scope="col") for name in parts))),
        tag("tbody", rows),
    )
    about = [
        f"Form: {report['form']}" if report.get("form") else None,
        f"loss on {report['train_on']}" if report.get("train_on") else None,
        f"chat template: {report['template']}" if report.get("template") else None,
    ]
    return _section(
        "Data",
        tag("div", table, class_="table"),
        _remarks(report.get("notes")),
        lead=", ".join(part for part in about if part) or None,
    )


def resources(records: Records, figures: Figures) -> Markup | None:
    """Planned memory by kind, and the sentences that say why the plan is what it is."""
    memory = section(records.plan, "memory")
    kinds = {key: value for key in memory if key not in _SUMS and (value := number(memory, key)) and value > 0}
    reasons = _remarks(records.plan.get("why"))
    halves: list[Markup] = []
    if kinds:
        rows = [(_words(key), value, bytes_text(value)) for key, value in kinds.items()]
        sums = [(title, value) for key, title in _SUMS.items() if (value := number(memory, key))]
        if not number(memory, "total"):
            sums.insert(0, (_SUMS["total"], sum(kinds.values())))
        if figures.peak_memory is not None:
            sums.append(("measured at its peak", figures.peak_memory))
        halves.append(
            tag(
                "div",
                bars(sorted(rows, key=lambda row: -row[1]), max(kinds.values())),
                tag(
                    "p", (tag("span", tag("b", bytes_text(value)), f" {title}") for title, value in sums), class_="sum"
                ),
            )
        )
    if reasons:
        halves.append(tag("div", reasons))
    if not halves:
        return None
    return _section("Memory and plan", tag("div", halves, class_="halves") if len(halves) > 1 else halves)


def method(records: Records) -> Markup | None:
    """AdaLoRA's final ranks, on average over the layers, by the name of the linear."""
    ranks = section(records.method, "ranks")
    by_name: dict[str, list[float]] = {}
    for path in ranks:
        if (rank := number(ranks, path)) is not None:
            by_name.setdefault(path.rpartition(".")[2], []).append(rank)
    if not by_name:
        return None
    means = {name: sum(values) / len(values) for name, values in by_name.items()}
    rows = [
        (name, mean, f"{mean:.1f} ({min(by_name[name]):.0f} to {max(by_name[name]):.0f})")
        for name, mean in sorted(means.items(), key=lambda item: -item[1])
    ]
    return _section(
        "Final ranks",
        bars(rows, max(*means.values(), 1.0)),
        lead="Average over the layers, with the smallest and the largest in brackets.",
    )


def recipe(records: Records) -> Markup:
    """Every value of the recipe, what differs from the default set off; the file itself below."""
    full = tag("details", tag("summary", "recipe.yaml"), tag("pre", records.recipe_text))
    if records.recipe is None:
        return _section("Recipe", tag("pre", records.recipe_text))
    cards = [
        tag(
            "div",
            tag("h3", name if part.name == name else f"{name}: {part.name}"),
            _values(part.section),
            class_="card",
        )
        for name in Recipe.model_fields
        for part in _parts(name, getattr(records.recipe, name))
    ]
    return _section(
        "Recipe",
        tag("div", cards, class_="cards"),
        full,
        lead="Values that differ from their default are set in bold.",
    )


def origin(records: Records, figures: Figures, folder: str) -> Markup:
    """The commands to go on with, and everything that environment.json tells."""
    again = shlex.quote(folder.rstrip("/") + "-again")
    here = shlex.quote(folder)
    commands = [("the same run once more, in a folder of its own", f"qlora train {_file(folder)} folder={again}")]
    if figures.finished:
        commands += [
            ("talk to the trained model", f"qlora chat {here}"),
            ("base and adapter as one plain checkpoint", f"qlora export {here} merged"),
        ]
    else:
        commands.insert(0, ("go on from the last checkpoint", f"qlora resume {here}"))
    lines = [[tag("span", f"# {why}", class_="comment"), f"\n{command}\n\n"] for why, command in commands]
    tables: list[Markup] = []
    flat = {key: value for key, value in records.environment.items() if not isinstance(value, dict)}
    nested = {key: value for key, value in records.environment.items() if isinstance(value, dict) and value}
    for title, values in [*nested.items(), *([("environment", flat)] if flat else [])]:
        tables.append(tag("div", tag("h3", _words(title)), _pairs(values), class_="card plain"))
    return _section(
        "Reproduce",
        tag("pre", lines),
        tag("div", tables, class_="cards") if tables else None,
    )


def _section(title: str, *content: Child, lead: str | None = None) -> Markup:
    return tag("section", tag("h2", title), tag("p", lead, class_="lead") if lead else None, content)


def _held_out_table(records: Records) -> Markup:
    rows = [
        tag(
            "tr",
            tag("td", exact_text(point.step)),
            tag("td", significant(point.loss)),
            tag("td", significant(point.perplexity)),
            tag("td", exact_text(point.target_tokens)),
        )
        for point in records.held_out
    ]
    head = tag("tr", (tag("th", name, scope="col") for name in ("step", "loss", "perplexity", "target tokens")))
    summary = tag("summary", f"All {len(rows)} held-out evaluations")
    return tag("details", summary, tag("div", tag("table", tag("thead", head), tag("tbody", rows)), class_="table"))


def _said(value: Any) -> str:
    """A prompt or an answer as text: a conversation line by line, anything else that is no text as JSON."""
    if isinstance(value, str):
        return value
    if isinstance(value, list) and value and all(isinstance(turn, dict) and "content" in turn for turn in value):
        return "\n".join(f"{turn.get('role', '')}: {_said(turn['content'])}".lstrip(": ") for turn in value)
    return json.dumps(value, ensure_ascii=False, default=str)


def _answer(value: Any) -> Markup:
    if value is None:
        return tag("p", "not yet", class_="said none")
    text = _said(value).strip()
    if not text:
        return tag("p", "(an empty answer)", class_="said none")
    return tag("p", text, class_="said", dir="auto")


def _remarks(sentences: Any) -> Markup | None:
    if isinstance(sentences, str):
        sentences = [sentences]
    if not isinstance(sentences, list) or not sentences:
        return None
    return tag("ul", (tag("li", _said(sentence)) for sentence in sentences), class_="remarks")


def _amount(key: str, values: Mapping[str, Any]) -> str:
    if key.endswith("_fraction"):
        share = number(values, key)
        return MISSING if share is None else f"{100 * share:.1f} %"
    return exact_text(whole(values, key))


class _Part(NamedTuple):
    name: str
    section: Section


def _parts(name: str, value: Any) -> list[_Part]:
    """The cards of one key of the recipe: one for a section, one for each method, none for a plain value."""
    if not isinstance(value, Section):
        return []
    return [_Part(part.name if name == "method" else name, part) for part in parts_of(value)]


def _values(part: Section) -> Markup:
    rows = []
    for name, field in type(part).model_fields.items():
        value = getattr(part, name)
        chosen = field.is_required() or value != field.get_default(call_default_factory=True)
        meaning = " ".join((field.description or "").split())
        row = (tag("dt", name, title=meaning), tag("dd", _value_text(value)))
        rows.append(tag("div", row, class_="chosen" if chosen else None))
    return tag("dl", rows, class_="pairs")


def _pairs(values: Mapping[Any, Any]) -> Markup:
    rows = [tag("div", tag("dt", _words(str(key))), tag("dd", _value_text(value))) for key, value in values.items()]
    return tag("dl", rows, class_="pairs")


def _value_text(value: Any) -> str:
    """A value as a recipe spells it: ``true``, ``null``, ``2e-04``, ``a, b``. A recipe may name an address with a password."""
    if value is None:
        return "null"
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, list | tuple):
        return ", ".join(_value_text(item) for item in value)
    if isinstance(value, dict):
        return ", ".join(f"{key}: {_value_text(item)}" for key, item in value.items()) or "{}"
    return str(redacted(str(value)))


def _words(key: str) -> str:
    """``target_tokens`` → ``target tokens``."""
    return key.replace("_", " ")


def _file(folder: str) -> str:
    return shlex.quote(folder.rstrip("/") + "/recipe.yaml")
