"""Changes to a whole file that keep most of its structure: what hypothesis draws inputs from, and how atheris mutates.

    a seed ► as JSON: a value replaced, dropped, doubled, nested; or as bytes: cut, repeated, flipped, spliced ► bytes

Knows bytes and JSON; must not know what reads them.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Sequence
from random import Random
from typing import Any

from hypothesis import strategies as st

# Values that break readers: edges of integers, floats that are none, names that lead elsewhere, orders to a terminal.
VALUES = (
    None, True, False, -1, 0, 1, 2, 1.5, -0.0, 1e308, math.nan, math.inf, 2**31, 2**53 + 1, 2**63, 2**64, 10**9, 10**40,
    "", "x", "../x", "/etc/passwd", "\0", "\ud800", "\x1b[2J", "a" * 300, "auto", "1", [], [[]], [None], [-1, 2], [0, 16],
    ["a", "a"], {}, {"a": 1}, {"name": "lora"}, {"": {}},
)  # fmt: skip
TOKENS = (
    b"-1", b"0", b"2.0", b"1e999", b"-0.0", b"NaN", b"Infinity", b"-Infinity", b"true", b"null", b"[]", b"{}", b'""',
    b"9007199254740993", b"9223372036854775808", b"18446744073709551615", b"1000000000", b"9" * 5000, b"0x" + b"f" * 400,
    b"1:" * 200 + b"1.5", b'"../../../etc/passwd"', b'"/etc/passwd"', b'".."', b'"\\u0000"', b'"\\ud800"',
    b'"\\u001b[2J"', b"\xef\xbb\xbf", b"\x00", b"\xff\xfe", b"[" * 2000, b'{"a":' * 500, b"&a [*a]", b"*a", b"<<: *a",
    b"!!python/object/apply:os.system ['true']", b"!!int ''", b"!!timestamp x", b"!!binary x", b"? [a]\n: b", b"a" * 3000,
    b'"__metadata__"', b'"dtype"', b'"shape"', b'"data_offsets"', b'"weight_map"', b'"auto_map"', b'"num_labels"', b"\n",
    b"=", b".", b",", b":", b'"',
)  # fmt: skip


@st.composite
def changed(draw: Any, seeds: Sequence[bytes]) -> bytes:
    """A seed after one to four changes; now and then bytes that never were a file."""
    if draw(st.integers(0, 20)) == 0:
        return bytes(draw(st.binary(max_size=64)))
    content: bytes = draw(st.sampled_from(list(seeds)))
    random = draw(st.randoms(use_true_random=False))  # hypothesis chooses what it returns
    for _ in range(draw(st.integers(1, 4))):
        content = change(random, content)
    return content


def change(random: Random, content: bytes) -> bytes:
    """``content`` with one change."""
    return (_in_values if random.random() < 0.6 else _in_bytes)(random, content)


def _in_values(random: Random, content: bytes) -> bytes:
    """Change a value of the JSON in ``content``, behind a first byte that may say what it is; bytes where there is none."""
    first = content[:1] if content[:1] in (b"\x00", b"\x01") else b""
    try:
        values = json.loads(content[len(first) :])
    except (ValueError, RecursionError):
        return _in_bytes(random, content)
    places = list(_places(values))
    if not places:
        return first + json.dumps(random.choice(VALUES)).encode()
    inside, key = random.choice(places)
    act = random.choice(("replace", "replace", "replace", "drop", "add", "nest", "swap", "twice"))
    if act == "drop":
        del inside[key]
    elif act == "add" and isinstance(inside, dict):
        inside[random.choice(("", "a", "name", "__metadata__", "\ud800", str(key) + "x"))] = random.choice(VALUES)
    elif act == "nest":
        inside[key] = [inside[key]]
    elif act == "swap":  # for the value of another place
        other, name = random.choice(places)
        inside[key] = json.loads(json.dumps(other[name]))
    elif act == "twice":  # the same key once more, with another value
        text = json.dumps(values)
        return (
            first + (text[:-1] + f", {json.dumps(str(key))}: {json.dumps(random.choice(VALUES))}" + text[-1]).encode()
        )
    else:
        inside[key] = random.choice(VALUES)
    return first + json.dumps(values).encode()


def _places(values: Any) -> Iterator[tuple[Any, Any]]:
    inside = [values]
    while inside:
        part = inside.pop()
        for key in part if isinstance(part, dict) else range(len(part)) if isinstance(part, list) else ():
            yield part, key
            inside.append(part[key])


def _in_bytes(random: Random, content: bytes) -> bytes:
    start = random.randint(0, len(content))
    end = random.randint(start, min(len(content), start + 16))
    act = random.choice(("put", "put", "cut", "repeat", "flip", "end"))
    if act == "put":
        return content[:start] + random.choice(TOKENS) + content[end:]
    if act == "cut":
        return content[:start] + content[end:]
    if act == "repeat":
        return content[:start] + content[start:end] * random.randint(2, 40) + content[end:]
    if act == "flip" and start < len(content):
        return content[:start] + bytes([content[start] ^ 1 << random.randint(0, 7)]) + content[start + 1 :]
    return content[:start]
