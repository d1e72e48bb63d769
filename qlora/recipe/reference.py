"""The reference: every field with its default and the text under it.

    reference()       all of them as Markdown tables, which the docs hold
    about("data")     a section or a key, for a terminal
    choices()         every key, with the values that it may have, for a shell to complete

Knows the recipe's classes; must not know what any field is for.
"""

from __future__ import annotations

import textwrap
import types
import typing
from collections.abc import Iterator
from typing import Literal

from pydantic.fields import FieldInfo

from qlora.errors import RecipeError, nearest
from qlora.recipe.config import Recipe
from qlora.recipe.reading import known_elsewhere
from qlora.recipe.schema import Section, sections_of, type_text


def reference() -> str:
    """One table a section, a method's with its name, and one for what stands at the top."""
    return "# Every value of a recipe\n\n" + "\n".join(_table(*table) for table in _tables())


def about(part: str, width: int) -> str:
    """A section (``data``, ``method.dora``) or a key (``data.max_length``) in lines of ``width`` characters. Raises RecipeError."""
    known: list[str] = []
    found = []
    for title, section, names in _tables():
        place, _, tag = title.partition(": ")
        top = "" if place == "(top level)" else f"{place}."
        whole = part in (place, f"{place}.{tag}", title)
        known += [place, *([f"{place}.{tag}"] if tag else [])] if top else []
        keys = {f"{top}{section.model_fields[name].alias or name}": section.model_fields[name] for name in names}
        known += keys
        shown = keys if whole else {key: field for key, field in keys.items() if key == part}
        if shown:
            text = " ".join((section.__doc__ or "").split()) if whole else ""
            found += [f"{title}\n{textwrap.fill(text, width)}\n"] if text else [f"{title}\n"] if tag else []
            found += [_lines(key, field, width) for key, field in shown.items()]
    if not found:
        meant = known_elsewhere(Recipe, [part.rpartition(".")[2]]) or part.lower()
        raise RecipeError(
            f"'{part}' is no section or key of a recipe.{nearest(meant, known)} `qlora recipe` lists them all."
        )
    return "\n".join(found)


def choices() -> dict[str, list[str]]:
    """Every key of a recipe, as ``data.max_length``, and the values that it can have, where they are few."""
    found: dict[str, list[str]] = {}
    for title, section, names in _tables():
        place = title.partition(": ")[0]
        if place != "evaluation.tasks":  # a list of sections, whose keys have numbers
            top = "" if place == "(top level)" else f"{place}."
            for name in names:
                key = f"{top}{section.model_fields[name].alias or name}"
                found[key] = [*found.get(key, []), *_values(section.model_fields[name].annotation)]
    return {key: [value for value in dict.fromkeys(values) if value != "combined"] for key, values in found.items()}


def _values(annotation: object) -> Iterator[str]:
    if annotation is bool:
        yield from ("true", "false")
    elif typing.get_origin(annotation) is Literal:
        yield from map(str, typing.get_args(annotation))
    elif typing.get_origin(annotation) in (typing.Union, types.UnionType):
        for part in typing.get_args(annotation):
            yield from _values(part)


def _tables() -> list[tuple[str, type[Section], list[str]]]:
    """(title, section, the names of its fields), the top level last."""
    tables: list[tuple[str, type[Section], list[str]]] = []
    top = []
    for name, field in Recipe.model_fields.items():
        sections = sections_of(field.annotation)
        if not sections:
            top.append(name)
        for tag, section in sections.items():
            fields = sorted(section.model_fields, key=lambda key: key != "name")
            tables.append((f"{name}: {tag}" if tag else name, section, fields))
            for key, inner in section.model_fields.items():
                if one := sections_of(inner.annotation).get(""):  # a list of sections, as evaluation.tasks
                    tables.append((f"{name}.{key}", one, list(one.model_fields)))
    tables.append(("(top level)", Recipe, top))
    return tables


def _table(title: str, section: type[Section], names: list[str]) -> str:
    about = " ".join((section.__doc__ or "").split())
    lines = [f"## `{title}`", "", about, "", "| key | default | meaning |", "|---|---|---|"]
    for name in names:
        field = section.model_fields[name]
        default = "required" if field.is_required() else f"`{_default(field)}`"
        lines.append(f"| `{field.alias or name}` | {default} | {_meaning(field)} |")
    return "\n".join(lines) + "\n"


def _lines(key: str, field: FieldInfo, width: int) -> str:
    default = "required" if field.is_required() else f"default {_default(field)}"
    meaning = textwrap.fill(_meaning(field).replace("`", ""), width, initial_indent="    ", subsequent_indent="    ")
    return f"{key}  ({default})\n{meaning}\n"


def _meaning(field: FieldInfo) -> str:
    return f"{' '.join((field.description or '').split())} Type: {type_text(field.annotation)}."


def _default(field: FieldInfo) -> str:
    value = field.get_default(call_default_factory=True)
    if value is None or isinstance(value, bool):
        return "null" if value is None else str(value).lower()
    return f"[{', '.join(map(str, value))}]" if isinstance(value, tuple) else str(value)
