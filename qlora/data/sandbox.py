"""The child process that renders chat templates, run as a program: ``python -P sandbox.py SECONDS MEMORY CHARACTERS``.

    a line in:    {"template", "variables", "mark_answers", "jobs": [[messages, tools, cuts], …]}       as JSON
    a line out:   [[text, answers], …], one for each cut of a job, or {"refused": why} or {"cut": why}

A template is a program that comes with a model. Transformers' own renderer keeps it from Python's attributes, files and
modules; this process takes away what it could use if it got there all the same: files, sockets, processes, memory, time.

Knows transformers' rendering and what a process may be forbidden. Imports nothing of qlora, so that it starts in half a second.
"""

from __future__ import annotations

import contextlib
import faulthandler
import json
import signal
import sys
import time
from typing import Any, NamedTuple

# Jinja imports these when a template first needs them, which a process that may open no file cannot.
import jinja2.constants
import jinja2.debug
from transformers.utils.chat_template_utils import render_jinja_template

_TRIAL = (
    "{% for message in messages %}{% generation %}{{ message['content'] | tojson }}{% endgeneration %}{% endfor %}"
    "{{ messages | pprint }}{{ 'a b' | wordwrap(1) }}"
)
_REASON = 500  # characters of a template's own complaint


class Limits(NamedTuple):
    """Of one text: seconds of computing, bytes beyond what the process begins with, characters beyond those of the job."""

    seconds: float
    memory: int
    characters: int


def main(limits: Limits) -> None:
    """Answer requests until the parent closes the pipe, or ends."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's to answer
    prepare()
    confine(limits.memory)
    for line in sys.stdin.buffer:
        request = json.loads(line)
        for job in request.pop("jobs"):
            reply = _job(job, request, limits)
            sys.stdout.write(json.dumps(reply) + "\n")
            sys.stdout.flush()  # what is left in here is lost when the next job is cut off, and with it which one it was
            if isinstance(reply, dict):
                break  # the parent reads no further


def prepare() -> None:
    """Load everything that rendering opens files for: codecs, the time zone, modules that are imported late."""
    time.localtime()
    for template in (_TRIAL, "{{ raise_exception('no') }}"):
        with contextlib.suppress(jinja2.TemplateError):
            render(template, {}, [{"role": "user", "content": "Hi"}], None, False, template is _TRIAL)


def confine(memory: int) -> None:
    """Take from this process what rendering does not need: more than ``memory`` further bytes, files, sockets, processes."""
    try:
        import resource
    except ImportError:  # Windows
        return
    with contextlib.suppress(OSError):  # without /proc, as on macOS, nobody knows what it has
        with open("/proc/self/statm", encoding="ascii") as file:
            allowed = int(file.read().split()[0]) * resource.getpagesize() + memory
        most = resource.getrlimit(resource.RLIMIT_AS)[1]
        if most == resource.RLIM_INFINITY or most > allowed:
            resource.setrlimit(resource.RLIMIT_AS, (allowed, allowed))
    for limit in (resource.RLIMIT_CORE, resource.RLIMIT_FSIZE, resource.RLIMIT_NPROC, resource.RLIMIT_NOFILE):
        resource.setrlimit(limit, (0, 0))


def render(
    template: str, variables: dict[str, Any], messages: list[Any], tools: list[Any] | None, prompt: bool, mark: bool
) -> tuple[str, list[tuple[int, int]]]:
    """The text of ``messages``, and with ``mark`` the (begin, end) characters of its ``{% generation %}`` blocks.

    ``variables``: the special tokens by name, and what else the template may read. Raises what the template raises.
    """
    texts, blocks = render_jinja_template(
        conversations=[messages],
        tools=tools,
        chat_template=template,
        return_assistant_tokens_mask=mark,
        add_generation_prompt=prompt,
        **variables,
    )
    return texts[0], [(int(begin), int(end)) for begin, end in blocks[0]] if mark else []


def _job(job: list[Any], request: dict[str, Any], limits: Limits) -> object:
    """What to answer to a job: ``[text, answers]`` for each of its cuts, or why there is no text."""
    messages, tools, cuts = job
    texts = []
    try:
        for count, prompt in cuts:
            _clock(limits.seconds)
            text, answers = render(
                request["template"], request["variables"], messages[:count], tools, prompt, request["mark_answers"]
            )
            _clock(0)
            beyond = len(text) - limits.characters
            if beyond > 0 and beyond > len(json.dumps([messages, tools], ensure_ascii=False)):
                return {"cut": f"it wrote {len(text):,} characters"}
            text.encode()
            texts.append([text, answers])
    except MemoryError:
        return {"cut": f"it needed more than {limits.memory / 2**30:g} GiB of memory"}
    except UnicodeEncodeError:
        return {"refused": "it wrote a lone surrogate, which is no text"}
    except Exception as error:  # a template is a program of its author's: any exception means that it refuses
        found = str(error).encode(errors="replace").decode().strip().rstrip(".") or type(error).__name__
        why = found if len(found) <= _REASON else found[:_REASON] + "…"
        return {"refused": why, "line": error.lineno if isinstance(error, jinja2.TemplateSyntaxError) else None}
    finally:
        _clock(0)
    return texts


def _clock(seconds: float) -> None:
    """From here on the kernel ends this process after so many seconds of computing; 0 stops the clock."""
    if hasattr(signal, "setitimer"):
        signal.setitimer(signal.ITIMER_PROF, seconds)
    elif seconds:  # Windows: seconds by the clock on the wall, by a thread that needs no interpreter
        faulthandler.dump_traceback_later(seconds, exit=True)
    else:
        faulthandler.cancel_dump_traceback_later()


if __name__ == "__main__":
    main(Limits(float(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3])))
