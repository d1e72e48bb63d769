"""The reference: every field with its default and the text under it, as Markdown tables.

``qlora recipe`` prints it, and the docs hold it. Knows the recipe's classes; must not know what any field is for.
"""

from __future__ import annotations

from qlora.recipe.config import Recipe
from qlora.recipe.schema import Section, sections_of, type_text


def reference() -> str:
    """One table a section, a method's with its name, and one for what stands at the top."""
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
    return "# Every value of a recipe\n\n" + "\n".join(_table(*table) for table in tables)


def _table(title: str, section: type[Section], names: list[str]) -> str:
    about = " ".join((section.__doc__ or "").split())
    lines = [f"## `{title}`", "", about, "", "| key | default | meaning |", "|---|---|---|"]
    for name in names:
        field = section.model_fields[name]
        default = "required" if field.is_required() else f"`{_plain(field.get_default(call_default_factory=True))}`"
        meaning = " ".join((field.description or "").split())
        lines.append(f"| `{field.alias or name}` | {default} | {meaning} Type: {type_text(field.annotation)}. |")
    return "\n".join(lines) + "\n"


def _plain(value: object) -> str:
    if value is None or isinstance(value, bool):
        return "null" if value is None else str(value).lower()
    return f"[{', '.join(map(str, value))}]" if isinstance(value, tuple) else str(value)
