"""The page: what each of its parts shows, handed to ``report.html.jinja``, which says how.

Everything that a stranger wrote becomes text, or a list of it, here: the template escapes text, and looks up nothing in a
stranger's objects. Knows what belongs together and in which words; must not read a run's file or draw a curve.
"""

from __future__ import annotations

import json
import re
import shlex
from pathlib import Path

from jinja2 import Environment, FileSystemLoader, StrictUndefined

from qlora.errors import redacted
from qlora.machine.disk import bytes_text
from qlora.recipe import Recipe, Section, parts_of
from qlora.reporting import charts, figures
from qlora.reporting.answers import CUT, Piece, compared
from qlora.reporting.curves import loss_chart, small_charts
from qlora.reporting.figures import exact_text
from qlora.reporting.records import Json, Records, number, objects, section, whole

# Nothing is fetched and nothing runs: should a text ever get past the escaping, the browser still refuses it.
POLICY = "default-src 'none'; style-src 'unsafe-inline'; base-uri 'none'; form-action 'none'"

# Control characters are not allowed in HTML, and one half of a surrogate pair cannot be written as UTF-8 at all:
# json.loads('"\\ud800"') gives one. Both are shown as the replacement character.
NOT_TEXT = re.compile("[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f\ud800-\udfff\ufffe\uffff]")

# Counts that are shown at zero too: that nothing was lost is what a reader looks for.
_ALWAYS = ("records", "examples", "tokens", "target_tokens", "target_fraction", "truncated", "dropped")

# plan.json's memory may hold these beside the kinds; they are sums and limits.
_SUMS = {"total": "planned in all", "budget": "budget", "free": "free before the run", "capacity": "on the device"}

MOST_NOTES = 20  # of single steps, that the page shows

Bar = tuple[str, float, str]  # label, percent of the width, text
Pairs = list[tuple[str, str]]


def templates(*folders: Path) -> Environment:
    """The templates in some folders, which escape all that is put into them and refuse what nobody gave them."""
    places = FileSystemLoader(folders)
    found = Environment(loader=places, autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    found.globals["POLICY"] = POLICY
    return found


def pages() -> Environment:
    """The templates beside this file, with all that they draw and write by."""
    pages = templates(Path(__file__).parent)
    pages.filters |= {"count": figures.count_text, "exact": exact_text, "significant": figures.significant}
    pages.filters |= {"duration": figures.duration_text, "bytes": bytes_text, "thinned": charts.thinned}
    pages.globals |= {
        "WIDE": charts.WIDE,
        "SMALL": charts.SMALL,
        "change": figures.change_text,
        "ahead": figures.shares_text,
    }
    pages.globals |= {"axes": charts.axes, "columns": charts.columns, "read_out": charts.read_out}
    return pages


def filled(template: str, **parts: object) -> str:
    """A template with its parts put in, as a complete HTML document."""
    return NOT_TEXT.sub("\ufffd", pages().get_template(template).render(parts))


def render(records: Records) -> str:
    """Records → a complete HTML document."""
    summary = figures.summarise(records)
    verdict = _verdict(records, summary)
    ahead, repeat = _commands(records, summary.finished, verdict is not None and verdict[0] == "worse")
    return filled(
        "report.html.jinja",
        name=records.name,
        figures=summary,
        facts=_facts(records),
        notes=records.notes,
        loss_chart=loss_chart(records),
        small_charts=small_charts(records),
        held_out=records.held_out,
        answers=_answers(records.evaluation.get("generations")),
        classes=_classes(records.evaluation),
        tasks=[_task(row) for row in records.tasks],
        ranks=_ranks(section(records.method, "ranks")),
        data=_data(section(records.plan, "data")),
        memory=_memory(section(records.plan, "memory"), summary.peak_memory),
        why=_sentences(records.plan.get("why")),
        recipe=_recipe(records.recipe) if records.recipe else [],
        recipe_text=records.recipe_text,
        verdict=verdict,
        happened=_happened(records),
        cut=CUT in json.dumps(records.evaluation.get("generations"), ensure_ascii=False),
        next=ahead,
        reproduce=repeat,
        environment=_environment(records.environment),
    )


def _facts(records: Records) -> list[str]:
    """What was trained: the base, how it is held, the method, the device."""
    model, recipe = section(records.plan, "model"), records.recipe
    name = model.get("name") or (recipe and recipe.model.name) or ""
    held = str(model.get("quantization") or (recipe and recipe.model.quantization) or "")
    held = {"none": "not quantised", "nf4": "NF4", "fp4": "FP4"}.get(held, held)
    device = records.environment.get("device_name") or records.environment.get("device") or records.plan.get("device")
    if isinstance(device, dict):
        device = device.get("name")
    method = " + ".join(map(_method, parts_of(recipe.method))) if recipe else ""
    return [redacted(fact) for fact in (str(name), held, method, device) if fact and isinstance(fact, str)]


def _method(part: Section) -> str:
    """``LoRA r 16, alpha 32``."""
    values = [(key, getattr(part, key, None)) for key in ("r", "alpha", "size", "tokens")]
    facts = [f"{key} {value:g}" for key, value in values if isinstance(value, int | float)]
    return " ".join([type(part).__name__, ", ".join(facts)]).strip()


def _verdict(records: Records, summary: figures.Figures) -> tuple[str, str, str] | None:
    """The strip under the title: (its class, the outcome, by how much and what to do); None where there is nothing to judge."""
    found, diverges = (
        section(records.evaluation, "verdict"),
        [note for _, note in _noted(records) if "diverges" in note],
    )
    outcome, by = (said(found[key]) if key in found else "" for key in ("outcome", "said"))
    if records.stopped:
        return "worse", "Stopped", records.stopped
    if outcome:
        kind = {"better": "better", "worse": "worse", "diverged": "worse"}.get(outcome, "unsure")
        return kind, outcome[:1].upper() + outcome[1:], by
    if diverges:
        return "worse", "Diverges", diverges[-1]
    if summary.finished and summary.before is None:
        return (
            "unsure",
            "Not known",
            "Nothing is held out, so whether training helped cannot be known; data.held_out_fraction=0.05, or data.held_out.",
        )
    return None


def _noted(records: Records) -> list[tuple[int, str]]:
    """What was said of single steps."""
    notes = ((step.number, step.values.get("note")) for step in records.steps)
    return [(number, redacted(note)) for number, note in notes if isinstance(note, str) and note]


def _happened(records: Records) -> list[str]:
    noted = [
        note if note.startswith(f"Step {number} ") else f"Step {exact_text(number)}: {note}"
        for number, note in _noted(records)
    ]
    return noted[:MOST_NOTES] + [f"And {len(noted) - MOST_NOTES} more, in metrics.jsonl."] * (len(noted) > MOST_NOTES)


def _answers(generations: object) -> list[tuple[str, list[tuple[str, str, list[Piece] | None]]]]:
    """Each prompt, and under it the data's answer, the base model's and the trained model's: (key, title, pieces)."""
    found = []
    for item in objects(generations):
        expected, before, after = (
            None if item.get(key) is None else said(item[key]).strip() for key in ("expected", "before", "after")
        )
        pieces = compared(before, after)
        shown = [("before", "Before", pieces[0]), ("after", "After training", pieces[1])]
        if expected is not None:
            shown.insert(0, ("expected", "Expected", compared(expected, None)[0]))
        found.append((said(item.get("prompt")), shown))
    return found


def _classes(evaluation: Json) -> list[tuple[str, ...]]:
    """The rows of a classifier's table as text, each share before and after: of all its classes and of each one."""
    found = [part for when in ("before", "after") if (part := section(evaluation, "held_out", when, "classes"))]
    if not found:
        return []

    def row(name: str, parts: list[Json], *more: str) -> tuple[str, ...]:
        shares = [[number(part, key) for part in parts] for key in ("precision", "recall", "f1")]
        told = (" → ".join("—" if one is None else f"{one:.3f}" for one in each) for each in shares)
        return (name, exact_text(whole(parts[-1], "examples")), *more, *told)

    accuracy = " → ".join("—" if (one := number(part, "accuracy")) is None else f"{one:.1%}" for part in found)
    every = zip(*(objects(part["each"]) for part in found if isinstance(part.get("each"), list)), strict=False)
    return [row("all", found, accuracy), *(row(said(parts[-1].get("label")), [*parts], "") for parts in every)]


def _task(row: Json) -> tuple[str, ...]:
    """A row of the tasks' table as text: task, items, metric, chance, base, trained, difference."""
    chance = number(row, "chance")
    measured = (_measured(section(row, key), "+" * (key == "difference")) for key in ("base", "trained", "difference"))
    name, metric = (said(row.get(key)) for key in ("task", "metric"))
    return (name, exact_text(whole(row, "items")), metric, "—" if chance is None else f"{chance:.3f}", *measured)


def _measured(values: Json, sign: str) -> str:
    """``0.312 ± 0.027``."""
    value, error = number(values, "value"), number(values, "error")
    return "—" if value is None else f"{value:{sign}.3f}" + ("" if error is None else f" ± {error:.3f}")


def said(value: object) -> str:
    """A prompt or an answer as text: a conversation line by line, anything else that is no text as JSON."""
    if isinstance(value, str):
        return value
    if isinstance(value, list) and value and all(isinstance(turn, dict) and "content" in turn for turn in value):
        return "\n".join(f"{turn.get('role', '')}: {said(turn['content'])}".lstrip(": ") for turn in value)
    return json.dumps(value, ensure_ascii=False, default=str)


def _sentences(value: object) -> list[str]:
    if isinstance(value, str):
        return [value]
    return [said(sentence) for sentence in value] if isinstance(value, list) else []


def _ranks(ranks: Json) -> list[Bar]:
    """AdaLoRA's final ranks, on average over the layers, by the name of the linear."""
    by_name: dict[str, list[float]] = {}
    for path in ranks:
        if (rank := number(ranks, path)) is not None:
            by_name.setdefault(path.rpartition(".")[2], []).append(rank)
    means = {name: sum(values) / len(values) for name, values in by_name.items()}
    texts = {name: f"{means[name]:.1f} ({min(values):.0f} to {max(values):.0f})" for name, values in by_name.items()}
    return _bars(means, texts, max([*means.values(), 1.0]))


def _bars(amounts: dict[str, float], texts: dict[str, str], full: float) -> list[Bar]:
    """The largest first; ``full`` fills the width."""
    largest_first = sorted(amounts, key=lambda name: -amounts[name])
    return [(name, round(max(0.4, 100 * amounts[name] / full), 1), texts[name]) for name in largest_first]


def _data(report: Json) -> dict[str, object] | None:
    """What the data room counted: plan.json's ``data``, with its parts ``train`` and ``held_out``."""
    if not report:
        return None
    parts = {name: part for name in ("train", "held_out") if (part := section(report, name))}
    if not parts:
        parts = {"train": {key: value for key, value in report.items() if number(report, key) is not None}}
    keys = dict.fromkeys(key for part in parts.values() for key in part)
    shown = [key for key in keys if key in _ALWAYS or any(number(part, key) for part in parts.values())]
    about = [("Form: ", "form"), ("loss on ", "train_on"), ("chat template: ", "template")]
    return {
        "lead": ", ".join(f"{title}{report[key]}" for title, key in about if report.get(key)),
        "parts": [_words(name) for name in parts],
        "kept": [(_words(name), _kept(part)) for name, part in parts.items()],
        "rows": [(_words(key), [_amount(key, part) for part in parts.values()]) for key in shown],
        "lengths": _lengths(section(report, "train").get("lengths")),
        "notes": _sentences(report.get("notes")),
    }


def _lengths(bins: object) -> list[Bar]:
    """How many training examples have at most so many tokens, a bar for each pair of the two."""
    pairs = [pair for pair in bins if _is_bin(pair)] if isinstance(bins, list) else []
    most = max((count for _, count in pairs), default=0) or 1
    return [(f"up to {tokens:,} tokens", round(100 * count / most, 1), f"{count:,}") for tokens, count in pairs]


def _is_bin(pair: object) -> bool:
    return isinstance(pair, list) and len(pair) == 2 and all(type(one) is int and 0 <= one < 2**53 for one in pair)


def _amount(key: str, values: Json) -> str:
    share = number(values, key)
    if key.endswith("_fraction") and share is not None:
        return f"{100 * share:.1f} %"
    return exact_text(whole(values, key))


def _memory(memory: Json, peak: float | None) -> tuple[list[Bar], Pairs] | None:
    """Planned memory by kind as bars; the sums below them as (bytes, title)."""
    kinds = {_words(key): value for key in memory if key not in _SUMS and (value := number(memory, key)) and value > 0}
    if not kinds:
        return None
    sums = {title: number(memory, key) for key, title in _SUMS.items()}
    sums[_SUMS["total"]] = sums[_SUMS["total"]] or sum(kinds.values())
    sums["measured at its peak"] = peak
    bars = _bars(kinds, {key: bytes_text(value) for key, value in kinds.items()}, max(kinds.values()))
    return bars, [(bytes_text(value), title) for title, value in sums.items() if value]


def _recipe(recipe: Recipe) -> list[tuple[str, list[tuple[str, str, str, bool]]]]:
    """A card for every section, and for each method: (name, meaning, value, whether it differs from the default)."""
    cards = []
    for name in Recipe.model_fields:
        value = getattr(recipe, name)
        for part in parts_of(value) if isinstance(value, Section) else ():
            rows = []
            for key, field in type(part).model_fields.items():
                chosen = field.is_required() or getattr(part, key) != field.get_default(call_default_factory=True)
                meaning = " ".join((field.description or "").split())
                rows.append((field.alias or key, meaning, shown_value(getattr(part, key)), chosen))
            cards.append((f"method: {part.name}" if name == "method" else name, rows))
    return cards


def _kept(part: Json) -> list[Bar]:
    """What became of the records of one part, as shares of all."""
    counts = {
        name: whole(part, name) or 0 for name in ("examples", "truncated", "dropped", "skipped", "truncated_tokens")
    }
    told = {
        "kept whole": counts["examples"] - counts["truncated"],
        "truncated at max_length": counts["truncated"],
        "dropped, too long": counts["dropped"],
        "skipped, no answer": counts["skipped"],
    }
    total = max(1, sum(told.values()))
    return [(name, round(100 * count / total, 1), exact_text(count)) for name, count in told.items() if count > 0]


def _commands(records: Records, finished: bool, worse: bool) -> tuple[Pairs, Pairs]:
    """What to do next, and what makes the same run again: (why, command)."""
    # The run folder as its owner typed it, where the recipe still tells; else its name. Never the absolute path.
    told = redacted(records.recipe.folder or "").rstrip("/") if records.recipe else ""
    folder = told if told.rpartition("/")[2] == records.name else records.name
    here, recipe = shlex.quote(folder), shlex.quote(f"{folder}/recipe.yaml")
    again = f"qlora train {recipe} folder={shlex.quote(f'{folder}-again')}"
    repeat = [("The same run once more, in a folder of its own", again)]
    slower = records.recipe.training.slower if records.recipe else 1e-5
    if worse:
        return [("Train anew with a lower learning rate", f"{again} training.learning_rate={slower:g}")], repeat
    if not finished:
        ahead = [
            ("Go on from the last checkpoint", f"qlora resume {here}"),
            ("Watch it while it trains", f"qlora watch {here}"),
        ]
        return ahead, repeat
    classifies = records.recipe is not None and records.recipe.objective.classifies
    ahead = [
        ("Measure it again", f"qlora evaluate {here}")
        if classifies
        else ("Talk to the trained model", f"qlora chat {here}"),
        ("Base and adapter as one plain checkpoint", f"qlora export {here} merged"),
        ("More epochs, in a folder of its own", f"qlora train {recipe} method.from={here}"),
    ]
    return ahead, repeat


def _environment(values: Json) -> list[tuple[str, Pairs]]:
    """Everything that environment.json tells: a card for each object in it, one for the rest."""
    cards = {key: section(values, key) for key in values}
    cards["environment"] = {key: value for key, value in values.items() if not isinstance(value, dict)}
    shown = {title: card for title, card in cards.items() if card}
    return [
        (_words(title), [(_words(key), shown_value(value)) for key, value in card.items()])
        for title, card in shown.items()
    ]


def shown_value(value: object) -> str:
    """A value as a recipe spells it: ``true``, ``null``, ``2e-04``, ``a, b``. A recipe may name an address with a password."""
    if value is None or isinstance(value, bool):
        return json.dumps(value)
    if isinstance(value, list | tuple):
        return ", ".join(map(shown_value, value))
    if isinstance(value, Section):  # in a list of such, as tasks
        value = value.model_dump(mode="json", exclude_defaults=True)
    if isinstance(value, dict):
        return ", ".join(f"{key}: {shown_value(item)}" for key, item in value.items()) or "{}"
    return str(redacted(str(value)))


def _words(key: str) -> str:
    """``target_tokens`` → ``target tokens``."""
    return key.replace("_", " ")
