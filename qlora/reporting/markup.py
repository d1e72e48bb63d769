"""Markup that is safe by construction: text is escaped unless it was built here.

``tag("p", "1 < 2")`` → ``<p>1 &lt; 2</p>``. Whatever a recipe, a data set or a model wrote arrives as plain ``str`` and
cannot become a tag, an attribute or a script. Knows HTML and SVG syntax; must not know a run or a chart.
"""

from __future__ import annotations

import html
import re
from collections.abc import Iterable
from typing import TypeAlias

# Control characters are not allowed in HTML, and one half of a surrogate pair cannot be written as UTF-8 at all:
# json.loads('"\\ud800"') gives one. Both are shown as the replacement character instead of breaking the page.
_NOT_TEXT = re.compile("[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f\ud800-\udfff\ufffe\uffff]")
_VOID = {"meta", "br", "rect", "line", "circle", "path", "polyline"}


class Markup(str):
    """Text that is markup already. Only this file makes one out of pieces; ``str`` operations give plain ``str``."""

    __slots__ = ()


Child: TypeAlias = "str | int | Iterable[Child] | None"


def escape(text: str) -> str:
    """Plain text → text that is safe between tags and inside a quoted attribute."""
    return html.escape(_NOT_TEXT.sub("\ufffd", text), quote=True)


def join(*children: Child) -> Markup:
    """Children side by side; ``None`` is nothing, an iterable is its items, plain text is escaped."""
    parts: list[str] = []
    for child in children:
        if child is None:
            continue
        if isinstance(child, Markup):
            parts.append(child)
        elif isinstance(child, str):
            parts.append(escape(child))
        elif isinstance(child, int):
            parts.append(str(child))
        else:
            parts.append(join(*child))
    return Markup("".join(parts))


def tag(name: str, /, *children: Child, **attributes: str | int | float | None) -> Markup:
    """One element. ``class_`` → ``class``, ``stroke_width`` → ``stroke-width``; an attribute that is ``None`` is left out.

    Example: ``tag("rect", x=1.25, class_="hit")`` → ``<rect x="1.2" class="hit"/>``. Floats are written to a tenth,
    because they are coordinates in pixels.
    """
    opening = name
    for key, value in attributes.items():
        if value is None:
            continue
        text = f"{value:.1f}".removesuffix(".0") if isinstance(value, float) else escape(str(value))
        opening += f' {key.rstrip("_").replace("_", "-")}="{text}"'
    if name in _VOID and not children:
        return Markup(f"<{opening}/>")
    return Markup(f"<{opening}>{join(*children)}</{name}>")
