"""Data for recipes/docstrings.yaml and recipes/methods: questions and answers from the docstrings of the Python that runs this.

A record is one conversation: "What does `shutil.copytree` do in Python?", answered by the first paragraph of that
function's docstring. One Python version gives the same bytes every time; one answer is never in both files. It reads
only the modules named here (each imports without side effects), and ships nothing. Must not import torch or transformers.
"""

from __future__ import annotations

import hashlib
import importlib
import inspect
import itertools
import json
import re
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

from qlora.errors import InputError
from qlora.quickstart.data import written

TRAIN, HELD_OUT = Path("data/docstrings/train.jsonl"), Path("data/docstrings/held_out.jsonl")
HELD_OUT_FRACTION = 0.05
LENGTH = range(20, 301)  # characters of an answer: a sentence or three

# Written out, not walked: importing `this`, `antigravity` or `idlelib` does things, `curses`, `sqlite3` and others are
# missing from some builds or systems, and two dozen modules left after Python 3.11. These are in 3.11 to 3.14.
MODULES = """
    builtins abc argparse array ast asyncio atexit base64 binascii bisect calendar cmath cmd code codecs codeop
    collections collections.abc colorsys compileall concurrent.futures configparser contextlib contextvars copy
    copyreg csv dataclasses datetime decimal difflib dis doctest email.charset email.errors email.generator
    email.header email.headerregistry email.message email.mime.base email.parser email.policy email.utils enum
    errno filecmp fileinput fnmatch fractions ftplib functools gc getopt getpass gettext glob graphlib gzip
    hashlib heapq hmac html html.parser http http.client http.cookiejar http.cookies http.server imaplib
    importlib importlib.abc importlib.machinery importlib.metadata importlib.util inspect io ipaddress itertools
    json json.decoder json.encoder keyword linecache locale logging logging.config logging.handlers mailbox
    marshal math mimetypes mmap multiprocessing multiprocessing.connection multiprocessing.managers
    multiprocessing.pool multiprocessing.shared_memory multiprocessing.synchronize netrc numbers operator
    optparse os os.path pathlib pickle pkgutil platform plistlib poplib pprint profile pstats py_compile queue
    quopri random re reprlib runpy sched secrets select selectors shelve shlex shutil signal site smtplib socket
    socketserver stat statistics string struct subprocess symtable sys sysconfig tarfile tempfile textwrap
    threading time timeit token tokenize tomllib trace traceback tracemalloc types typing unicodedata unittest
    unittest.case unittest.loader unittest.mock unittest.result unittest.runner unittest.suite urllib.error
    urllib.parse urllib.request urllib.response urllib.robotparser uuid warnings wave weakref webbrowser
    wsgiref.handlers wsgiref.headers wsgiref.simple_server wsgiref.util xml.dom xml.dom.minidom
    xml.etree.ElementTree xml.sax xml.sax.handler xml.sax.saxutils xml.sax.xmlreader zipapp zipfile zipimport
    zoneinfo
""".split()  # noqa: SIM905 - two hundred quotes would say no more

SIGNATURE = re.compile(r"[\w.]+\(.*|.*\) ?-> ?.*")


def pairs() -> Iterator[tuple[str, str]]:
    """(question, answer) of every documented public name, in the order of ``MODULES`` and then of the alphabet."""
    for module_name in MODULES:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # a module on its way out says so when imported
            module = importlib.import_module(module_name)
            prefix = "" if module_name == "builtins" else f"{module_name}."
            for name, thing in _public(module):
                yield from _pair(prefix + name, thing)
                if inspect.isclass(thing):
                    for member_name, member in sorted(vars(thing).items()):
                        if not member_name.startswith("_"):
                            yield from _pair(f"{prefix}{name}.{member_name}", member)


def _public(module: ModuleType) -> Iterator[tuple[str, object]]:
    """The module's own functions and classes: its ``__all__``, else what was defined under its name."""
    declared = getattr(module, "__all__", None)
    for name in sorted(declared if declared is not None else vars(module)):
        thing = getattr(module, name, None)
        if name.startswith("_") or not (inspect.isroutine(thing) or inspect.isclass(thing)):
            continue
        home = str(getattr(thing, "__module__", "")).lstrip("_")  # C halves: `_io`, `_datetime`
        if declared is not None or home == module.__name__:
            yield name, thing


def _pair(name: str, thing: object) -> Iterator[tuple[str, str]]:
    is_action = inspect.isroutine(thing) or isinstance(thing, (classmethod, staticmethod))
    if not (is_action or inspect.isclass(thing) or inspect.isdatadescriptor(thing)):
        return
    if answer := first_paragraph(getattr(thing, "__doc__", None)):
        yield (f"What does `{name}` do in Python?" if is_action else f"What is `{name}` in Python?"), answer


def first_paragraph(docstring: object) -> str | None:
    """The first paragraph in one line; None when there is none, or when it is no sentence of a fit length.

    Example: ``"f(x) -> int\\n\\nReturn the number\\nof things.\\n\\nMore."`` → ``"Return the number of things."``
    """
    if not isinstance(docstring, str):
        return None
    lines = inspect.cleandoc(docstring).splitlines()
    # C docstrings may begin with signatures, in lines of their own or with an empty line behind them.
    while lines and (not lines[0].strip() or SIGNATURE.fullmatch(lines[0].strip())):
        lines.pop(0)
    text = " ".join(" ".join(itertools.takewhile(str.strip, lines)).split())
    if len(text) not in LENGTH or not text[0].isupper() or text.endswith(":") or text.startswith("Alias for field"):
        return None  # a small letter goes on from what is cut off, a colon announces what is
    return text if text[-1] in ".!?" else f"{text}."


def records() -> tuple[list[str], list[str]]:
    """(train, held out) as JSON lines. The order is that of the questions' SHA-256, so both files mix all modules."""
    answers: dict[str, tuple[str, str]] = {}
    for question, answer in pairs():
        # The first name keeps an answer that several share; case and punctuation make no new one.
        answers.setdefault(" ".join(re.findall(r"\w+", answer.casefold())), (question, answer))
    once = dict(sorted(answers.values()))
    order = sorted(once, key=lambda question: hashlib.sha256(question.encode()).digest())
    lines = [
        json.dumps(
            {"messages": [{"role": "user", "content": each}, {"role": "assistant", "content": once[each]}]},
            ensure_ascii=False,
        )
        for each in order
    ]
    held_out = round(len(lines) * HELD_OUT_FRACTION)
    return lines[held_out:], lines[:held_out]


def write_data(train: Path = TRAIN, held_out: Path = HELD_OUT) -> tuple[int, int]:
    """Write both files and return their numbers of records. Raises InputError where docstrings are stripped, and OSError."""
    if sys.flags.optimize >= 2:
        raise InputError(
            "Python runs with -OO, which strips the docstrings that the data is made from; run it without."
        )
    return written(records(), train, held_out)
