"""What objects look like in a notebook, in one place: ``_repr_html_`` returns what these make.

Knows HTML; must not know what is shown.
"""

from __future__ import annotations

from html import escape


def as_text(*parts: tuple[str, bool] | str) -> str:
    """Text as it stands, in a fixed width; a part beside True is marked."""
    pairs = [(part, False) if isinstance(part, str) else part for part in parts]
    inside = "".join(f"<mark>{escape(text)}</mark>" if marked else escape(text) for text, marked in pairs)
    return f'<pre style="white-space: pre-wrap">{inside}</pre>'


def as_frame(page: str) -> str:
    """A page of its own inside the notebook, whose styles stay in it."""
    return f'<iframe srcdoc="{escape(page)}" style="width: 100%; height: 40em; border: 1px solid #ccc" loading="lazy"></iframe>'
