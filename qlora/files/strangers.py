"""JSON and YAML that strangers wrote: bounded before it is believed, and only plain values come out.

    file ► its size ► text ► parsed once ► depth and number of its values ► plain values

Checkpoints, adapters and recipes are downloaded and sent about. Whatever such a file holds, reading it ends, in time and
memory that its size bounds, and what is wrong with it is a ``Fault``: the end of a sentence that begins with the file's
name. Knows JSON and YAML; must not know what the values mean.
"""

from __future__ import annotations

import gc
import json
import os
import reprlib
import sys
from pathlib import Path
from typing import Any, TypeAlias

import yaml

JsonObject: TypeAlias = dict[str, Any]
"""An object as JSON has it: what its values are has yet to be asked."""

MAX_JSON = 4 * 1024**2  # bytes of a configuration; the largest that are published have under one million
MAX_OURS = 256 * 1024**2  # bytes of what a run wrote of itself, its answers among it
MAX_RECIPE = 256 * 1024  # bytes of a recipe; PyYAML reads 36,000 a second at worst, so that the worst takes seconds
MAX_VALUES = 20_000  # values and keys of a recipe
MAX_DEPTH = 64  # levels of lists and objects in JSON; Python gives up below 1,000, which moves with the caller
MAX_LEVELS = 16  # in YAML: a recipe has five, and PyYAML looks at all that are open once more for every sign it reads
MAX_NUMBER = 64  # characters of a number: the time to read one grows with the square of its length
MAX_SHOWN = 100  # characters of a text that a message repeats
PLAIN_TAGS = {f"tag:yaml.org,2002:{kind}" for kind in ("null", "bool", "int", "float", "str", "seq", "map")}
PLAIN_TAGS.add("tag:yaml.org,2002:timestamp")


class Fault(ValueError):
    """What is wrong with a file, as the end of a sentence that begins with its name."""


def read_bytes(path: Path, most: int) -> bytes:
    """The content of a file of at most ``most`` bytes. Raises Fault for a larger one, or for what is no file (a pipe would
    be waited for, a device never ends), and OSError."""
    if path.exists() and not path.is_file():
        raise Fault("it is no ordinary file")
    with path.open("rb") as file:
        size = os.fstat(file.fileno()).st_size
        if size > most:
            raise Fault(f"it has {size:,} bytes; expected at most {most:,}")
        return file.read(size)  # and no more: Python takes the memory for what it is asked to read at once


def read_object(path: Path, most: int = MAX_JSON) -> JsonObject | None:
    """The object in a JSON file of at most ``most`` bytes; None where there is no file. Raises Fault for anything else."""
    try:
        return json_object(read_bytes(path, most))
    except FileNotFoundError:
        return None
    except OSError as error:
        raise Fault(f"it cannot be read ({error})") from None


def json_values(text: str, **how: Any) -> Any:
    """What ``json.loads`` finds. No garbage is collected meanwhile: deep nesting uses the stack up, and the finalizers of others
    that a collection ran at its end would fail."""
    collects = gc.isenabled()
    gc.disable()
    try:
        return json.loads(text, **how)
    finally:
        if collects:
            gc.enable()


def json_object(content: bytes, strict: bool = False, most: int | None = None) -> JsonObject:
    """The object in UTF-8 ``content``. Raises Fault for anything else, and for what is deeper than ``MAX_DEPTH``.

    A key that stands twice with different values is refused: which of them counts differs between readers. ``strict`` is
    for formats that forbid more, safetensors' header among them: the same key twice at all, and NaN and infinity, which
    some models' configurations hold. ``most`` bounds how many values there may be.
    """

    def once(pairs: list[tuple[str, object]]) -> JsonObject:
        values = dict(pairs)
        if len(values) != len(pairs):
            seen: JsonObject = {}
            for key, value in pairs:
                if key in seen and (strict or seen[key] != value):
                    raise Fault(f"it has the key {shown(key)} twice")
                seen[key] = value
        return values

    try:
        values = json_values(
            content.decode("utf-8"), object_pairs_hook=once, parse_constant=_refuse if strict else float
        )
    except Fault:
        raise
    except RecursionError:
        raise Fault(f"it is nested more than {MAX_DEPTH} levels deep") from None
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise Fault(f"it is no JSON ({error})") from None
    except ValueError:  # int() refuses long digits, which take it quadratic time
        raise Fault(f"it has a whole number of more than {sys.get_int_max_str_digits():,} digits") from None
    if not isinstance(values, dict):
        raise Fault(f"it holds {type(values).__name__} instead of an object")
    _bound(values, most)
    return values


def _refuse(constant: str) -> float:
    raise Fault(f"it holds {constant}, which is no JSON")


def _bound(values: object, most: int | None) -> None:
    """Raise Fault where plain values are too deep or too many. Level by level: recursion has a bound of its own."""
    level, count = [values], 0
    for _ in range(MAX_DEPTH + 1):
        inside: list[object] = []
        for value in level:
            if isinstance(value, dict):
                inside += value.values()
            elif isinstance(value, list):
                inside += value
        count += len(inside)
        if most is not None and count > most:
            raise Fault(f"it has more than {most:,} values")
        if not inside:
            return
        level = inside
    raise Fault(f"it is nested more than {MAX_DEPTH} levels deep")


class _Composer(yaml.SafeLoader):
    """PyYAML's safe loader, which stops at what no recipe needs: anchors and aliases among it, since ten lines of nine aliases
    each are 9¹⁰ values."""

    values = 0

    def fetch_flow_collection_start(self, TokenClass: Any) -> None:
        """The scanner opens a bracket."""
        super().fetch_flow_collection_start(TokenClass)
        self._refuse_depth(self.flow_level)

    def add_indent(self, column: int) -> bool:
        """The scanner goes one level in."""
        self._refuse_depth(len(self.indents))
        return bool(super().add_indent(column))

    def _refuse_depth(self, levels: int) -> None:
        if levels > MAX_LEVELS:
            raise Fault(f"it is nested more than {MAX_LEVELS} levels deep at line {self.line + 1}")

    def compose_node(self, parent: yaml.Node | None, index: int) -> yaml.Node | None:
        """One node. Raises Fault for what stands for no plain value, and for too many."""
        event = self.peek_event()
        place = f"at line {event.start_mark.line + 1}, column {event.start_mark.column + 1}"
        if event.anchor is not None:
            sign = "*" if isinstance(event, yaml.AliasEvent) else "&"
            raise Fault(f"it has {shown(sign + event.anchor)} {place}; write the values out, anchors are not followed")
        self.values += 1
        if self.values > MAX_VALUES:
            raise Fault(f"it has more than {MAX_VALUES:,} values {place}")
        node = super().compose_node(parent, index)
        if node is not None:
            _require_plain(node, place)
        return node


def _require_plain(node: yaml.Node, place: str) -> None:
    if node.tag not in PLAIN_TAGS:
        tag = node.tag.replace("tag:yaml.org,2002:", "!!")
        raise Fault(f"it is not valid YAML for a recipe: {shown(tag)} {place} stands for no plain value")
    if isinstance(node, yaml.ScalarNode):
        if node.tag.endswith((":int", ":float")) and len(node.value) > MAX_NUMBER:
            raise Fault(f"it has a number of more than {MAX_NUMBER} characters {place}")
        if "\0" in node.value or any("\ud800" <= letter <= "\udfff" for letter in node.value):
            raise Fault(f"it has a character that no text may hold (NUL, or half of a surrogate pair) {place}")
    elif isinstance(node, yaml.MappingNode) and not all(isinstance(key, yaml.ScalarNode) for key, _ in node.value):
        raise Fault(f"it has a key that is no plain text {place}")


Lines: TypeAlias = dict[tuple[str, ...], int]
"""Of every key, by its path, the line that it stands in, from 1."""


def yaml_values(text: str) -> tuple[object, Lines]:
    """The plain values of a YAML document, None for an empty one, and where its keys stand; a list's parts are numbered from 0.

    Raises Fault for what is no YAML, for more than ``MAX_RECIPE`` bytes, ``MAX_VALUES`` values or ``MAX_LEVELS`` levels, for
    tags of other than plain values, anchors and aliases, and a key that stands twice.
    """
    if len(text) > MAX_RECIPE or len(text.encode("utf-8", "surrogatepass")) > MAX_RECIPE:
        raise Fault(f"it is larger than {MAX_RECIPE:,} bytes")
    lines: Lines = {}
    try:
        loader = _Composer(text)
        try:
            node = loader.get_single_node()
            if node is None:
                return None, {}
            _lines(node, (), lines)
            return loader.construct_document(node), lines
        finally:
            loader.dispose()
    except Fault:
        raise
    except Exception as error:  # over values such as `!!int ""` PyYAML lets through what int(), dict and re raise
        mark = getattr(error, "problem_mark", None)
        place = f" at line {mark.line + 1}, column {mark.column + 1}" if mark else ""
        problem = str(getattr(error, "problem", None) or error or type(error).__name__)
        if r"character '\t'" in problem:
            problem = "a tab; indent with spaces"
        raise Fault(f"it is not valid YAML{place}: {problem.splitlines()[0][: 2 * MAX_SHOWN]}") from None


def _lines(node: yaml.Node, path: tuple[str, ...], lines: Lines) -> None:
    if isinstance(node, yaml.MappingNode):
        for key, value in node.value:
            here = (*path, key.value)
            line = key.start_mark.line + 1
            if here in lines:
                raise Fault(f"{shown('.'.join(here))} stands twice, at lines {lines[here]} and {line}; keep one")
            lines[here] = line
            _lines(value, here, lines)
    elif isinstance(node, yaml.SequenceNode):
        for number, value in enumerate(node.value):
            _lines(value, (*path, str(number)), lines)


class _Shown(reprlib.Repr):
    def __init__(self) -> None:
        super().__init__()
        self.maxlevel, self.maxstring, self.maxother = 2, MAX_SHOWN, MAX_SHOWN

    def repr_int(self, x: int, level: int) -> str:
        """Python refuses to write out an int of more than 4,300 digits."""
        return super().repr_int(x, level) if abs(x) < 10**40 else f"a number of {x.bit_length():,} bits"


def shown(value: object) -> str:
    """The beginning of a value of any size and depth, as Python writes it: ``'text'``, ``[1, 2, …]``; control characters
    are escaped."""
    return _SHOWN.repr(value)


_SHOWN = _Shown()
