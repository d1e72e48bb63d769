"""The page: a header that sums the run up, then the sections in the order in which they are asked about.

    header      name, status, what was trained on what, held-out loss before → after, the other headline figures
    training    the curves
    answers     the same held-out prompts before and after, beside the expected answer
    data        examples, tokens, what was truncated or dropped
    resources   memory by kind as planned, and why the plan is what it is
    recipe      every value
    origin      the command that trains it again, versions

Knows the document and its header; must not read a file.
"""

from __future__ import annotations

from typing import Any

from qlora.errors import redacted
from qlora.machine.device import bytes_text
from qlora.recipe import parts_of
from qlora.reporting import sections
from qlora.reporting.figures import (
    MISSING,
    Figures,
    change_text,
    count_text,
    duration_text,
    exact_text,
    share_text,
    significant,
    summarise,
)
from qlora.reporting.markup import Markup, join, tag
from qlora.reporting.records import Records, section
from qlora.reporting.style import STYLE

# Nothing is fetched and nothing runs: should a text ever get past the escaping, the browser still refuses it.
POLICY = "default-src 'none'; style-src 'unsafe-inline'; base-uri 'none'; form-action 'none'"


def render(records: Records) -> str:
    """Records → a complete HTML document."""
    figures = summarise(records)
    folder = _folder(records)
    head = tag(
        "head",
        tag("meta", charset="utf-8"),
        Markup(f'<meta http-equiv="Content-Security-Policy" content="{POLICY}"/>'),
        tag("meta", name="viewport", content="width=device-width, initial-scale=1"),
        tag("meta", name="referrer", content="no-referrer"),
        tag("title", f"{records.name} · qlora"),
        tag("style", Markup(STYLE)),
    )
    body = tag(
        "body",
        _header(records, figures),
        tag(
            "main",
            sections.training(records),
            sections.answers(records),
            sections.method(records),
            sections.data(records),
            sections.resources(records, figures),
            sections.recipe(records),
            sections.origin(records, figures, folder),
        ),
        tag("footer", tag("p", "Made by qlora from the files of the run folder alone. This page loads nothing.")),
    )
    return f"<!DOCTYPE html>\n{tag('html', join(head, body), lang='en')}\n"


def _folder(records: Records) -> str:
    """The run folder as its owner typed it, where the recipe still tells; else its name. Never the absolute path."""
    told = redacted(records.recipe.folder) if records.recipe else None
    return told if told and told.rstrip("/").rpartition("/")[2] == records.name else records.name


def _header(records: Records, figures: Figures) -> Markup:
    return tag(
        "header",
        tag("div", tag("span", "qlora run"), _status(figures), class_="eyebrow"),
        tag("h1", records.name),
        tag("ul", (tag("li", fact) for fact in _facts(records)), class_="facts"),
        tag("ul", (tag("li", note) for note in records.notes), class_="notes") if records.notes else None,
        tag("div", _result(figures), _tiles(figures), class_="headline"),
    )


def _status(figures: Figures) -> Markup:
    if figures.finished:
        return tag("span", "Finished", class_="status finished")
    of = f" of {exact_text(figures.steps_planned)}" if figures.steps_planned else ""
    text = f"Not finished, at step {exact_text(figures.steps_done)}{of}" if figures.steps_done else "Not begun"
    return tag("span", text, class_="status")


def _facts(records: Records) -> list[str]:
    """One line about what was trained: the base, how it is held, the method, the device."""
    model = section(records.plan, "model")
    quantization = str(model.get("quantization") or "")
    facts = [str(model.get("name") or "")]
    recipe = records.recipe
    if recipe is not None:
        facts[0] = facts[0] or recipe.model.name
        quantization = quantization or recipe.model.quantization
        facts.append(
            {"none": "not quantised", "nf4": "NF4", "fp4": "FP4", "int8": "int8"}.get(quantization, quantization)
        )
        facts.append(_method_text(recipe.method))
    else:
        facts.append(quantization)
    device = records.environment.get("device_name") or records.environment.get("device") or records.plan.get("device")
    if isinstance(device, dict):
        device = device.get("name")
    facts.append(device if isinstance(device, str) else "")
    return [redacted(fact) for fact in facts if fact]


def _method_text(section: Any) -> str:
    """``LoRA r 16, alpha 32``; several methods with a plus between them."""
    texts = []
    for part in parts_of(section):
        facts = [f"{key} {getattr(part, key):g}" for key in ("r", "alpha", "size", "tokens") if _is_number(part, key)]
        texts.append(" ".join([type(part).__name__, ", ".join(facts)]).strip())
    return " + ".join(texts)


def _is_number(part: Any, key: str) -> bool:
    return isinstance(getattr(part, key, None), int | float)


def _result(figures: Figures) -> Markup:
    """Held-out loss before → after, large; perplexity below."""
    before, after = figures.before, figures.after
    if before is None and after is None:
        return tag("div", tag("p", "Held-out loss", class_="label"), tag("p", MISSING, class_="loss"), class_="result")
    when = "" if figures.finished else f", so far (step {exact_text((after or before).step)})"  # type: ignore[union-attr]
    loss = tag(
        "p",
        tag("span", significant(before.loss if before else None), class_="was"),
        tag("span", "→", class_="arrow"),
        tag("span", significant(after.loss if after else None), class_="now"),
        class_="loss",
    )
    change = None
    if before and after:
        change = tag(
            "p",
            tag("b", change_text(before.loss, after.loss)),
            f"perplexity {significant(before.perplexity)} → {significant(after.perplexity)}",
            class_="change",
        )
    tokens = (after or before).target_tokens  # type: ignore[union-attr]
    measured = tag("p", f"over {exact_text(tokens)} target tokens", class_="label") if tokens else None
    return tag("div", tag("p", f"Held-out loss{when}", class_="label"), loss, change, measured, class_="result")


def _tiles(figures: Figures) -> Markup:
    planned = figures.steps_planned
    unfinished = planned is not None and planned > figures.steps_done
    tiles = [
        (
            "Trainable parameters",
            count_text(figures.trainable),
            f"{share_text(figures.trainable, figures.parameters)} of {count_text(figures.parameters)}"
            if figures.trainable and figures.parameters
            else "",
        ),
        (
            "Steps",
            exact_text(figures.steps_done),
            f"of {exact_text(planned)} planned" if unfinished else "as planned" if planned else "",
        ),
        (
            "Tokens trained",
            count_text(figures.tokens),
            f"{count_text(figures.target_tokens)} with loss" if figures.target_tokens is not None else "",
        ),
        ("Time", duration_text(figures.seconds), "in training steps" if figures.seconds is not None else ""),
        (
            "Speed",
            exact_text(figures.tokens_per_second),
            "tokens a second, median" if figures.tokens_per_second is not None else "",
        ),
        ("Peak memory", MISSING if figures.peak_memory is None else bytes_text(figures.peak_memory), ""),
    ]
    return tag(
        "dl",
        (
            tag("div", tag("dt", name), tag("dd", value, tag("small", about) if about else None))
            for name, value, about in tiles
        ),
        class_="tiles",
    )
