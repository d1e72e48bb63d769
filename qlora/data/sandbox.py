"""The sandbox: a chat template rendered by transformers' own, which keeps it from Python's attributes, files and modules.

Knows transformers' rendering alone. It bounds neither time nor memory: whoever renders a stranger's template calls this in a
process of its own (data/rendering.py).
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Mapping, Sequence
from functools import cache
from typing import Any

# Jinja imports these when a template first needs them, which a process that may open no file cannot.
import jinja2.constants
import jinja2.debug
from transformers.utils.chat_template_utils import render_jinja_template

_TRIAL = (
    "{% for message in messages %}{% generation %}{{ message['content'] | tojson }}{% endgeneration %}{% endfor %}"
    "{{ messages | pprint }}{{ 'a b' | wordwrap(1) }}"
)


def render(
    template: str,
    variables: Mapping[str, Any],
    messages: Sequence[Mapping[str, Any]],
    tools: Sequence[Mapping[str, Any]] | None = None,
    add_generation_prompt: bool = False,
    mark_answers: bool = False,
) -> tuple[str, list[tuple[int, int]]]:
    """The text, and with ``mark_answers`` the (begin, end) characters of its ``{% generation %}`` blocks, as
    ``apply_chat_template`` finds them. ``variables``: the special tokens by name, and what else the template may read.

    Whatever the template raises comes out as it is.
    """
    texts, blocks = render_jinja_template(
        conversations=[list(messages)],
        tools=None if tools is None else list(tools),
        chat_template=template,
        return_assistant_tokens_mask=mark_answers,
        add_generation_prompt=add_generation_prompt,
        **variables,
    )
    return texts[0], [(int(begin), int(end)) for begin, end in blocks[0]] if mark_answers else []


@cache
def prepare() -> None:
    """Load everything that rendering opens files for: codecs, the time zone, modules that are imported late."""
    time.localtime()
    for template in (_TRIAL, "{{ raise_exception('no') }}"):
        with contextlib.suppress(jinja2.TemplateError):
            render(template, {}, [{"role": "user", "content": "Hi"}], mark_answers=template is _TRIAL)
