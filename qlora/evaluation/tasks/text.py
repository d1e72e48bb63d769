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
from qlora.evaluation.tasks.task import Asked, Better, Form, Reply, Unusable, filled


class Text:
    """See the file's docstring."""

    metrics: Mapping[str, Better] = {"bits_per_byte": "lower", "loss": "lower"}

    def ask(self, fields: Mapping[str, Any], form: Form) -> Asked:
        text = filled("{text}" if form.prompt is None else form.prompt, fields, "the text")
        if not text.strip():
            raise Unusable("is an empty text")
        return Asked((("", text),), gold={"bytes": len(text.encode())})

    def answer(self, asked: Asked, reply: Reply) -> Json:
        (found,) = reply.likelihoods
        return {"log_likelihood": found.nats, "tokens": found.tokens, **(asked.gold or {})}

    def scores(self, answer: Json) -> dict[str, float]:
        return {}

    def together(self, answers: Sequence[Json]) -> dict[str, float]:
        nats, tokens, size = (math.fsum(one[key] for one in answers) for key in ("log_likelihood", "tokens", "bytes"))
        return {"bits_per_byte": -nats / math.log(2) / size, "loss": -nats / tokens}

    def chance(self, answers: Sequence[Json], vocabulary: int) -> dict[str, float]:
        tokens, size = (sum(answer[key] for answer in answers) for key in ("tokens", "bytes"))
        return {"bits_per_byte": math.log2(vocabulary) * tokens / size, "loss": math.log(vocabulary)}
