"""Text: how well the model predicts running text, from the beginning of each document on.

    bits_per_byte   −log2 p(text) / bytes of UTF-8: the same measure for every tokenizer
    loss            nats a token

Each token is predicted once. A document that is longer than a window goes through in several (``scoring.py``).

Knows a record's fields; must not know how likelihoods are computed.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from qlora.evaluation.tasks.result import Json
from qlora.evaluation.tasks.task import Asked, Form, Kind, Reply, Unusable, filled


def _ask(fields: Mapping[str, Any], form: Form) -> Asked:
    text = filled("{text}" if form.prompt is None else form.prompt, fields, "the text")
    if not text.strip():
        raise Unusable("is an empty text")
    return Asked((("", text),), gold={"bytes": len(text.encode())})


def _answer(asked: Asked, reply: Reply) -> Json:
    (found,) = reply.likelihoods
    return {"log_likelihood": found.nats, "tokens": found.tokens, **(asked.gold or {})}


def _together(answers: Sequence[Json]) -> dict[str, float]:
    nats, tokens, size = (math.fsum(one[key] for one in answers) for key in ("log_likelihood", "tokens", "bytes"))
    return {"bits_per_byte": -nats / math.log(2) / size, "loss": -nats / tokens}


def _chance(answers: Sequence[Json], vocabulary: int) -> dict[str, float]:
    tokens, size = (sum(answer[key] for answer in answers) for key in ("tokens", "bytes"))
    return {"bits_per_byte": math.log2(vocabulary) * tokens / size, "loss": math.log(vocabulary)}


TEXT = Kind({"bits_per_byte": "lower", "loss": "lower"}, _ask, _answer, together=_together, chance=_chance)
