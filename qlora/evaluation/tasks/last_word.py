"""Last word: whether the model, going on greedily behind a context, says the word that stands there (LAMBADA).

    accuracy   every token of the word is the likeliest
    loss       −ln p(word | context), nats a word; its exponential is lm-eval's perplexity

Knows a record's fields; must not know how likelihoods are computed.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from qlora.evaluation.tasks.result import Json
from qlora.evaluation.tasks.task import Asked, Better, Form, Reply, Unusable, column, filled, said


class LastWord:
    """See the file's docstring."""

    metrics: Mapping[str, Better] = {"accuracy": "higher", "loss": "lower"}

    def ask(self, fields: Mapping[str, Any], form: Form) -> Asked:
        word = said(column(fields, form.answer, "the word"), form.answer or "").strip()
        if not word:
            raise Unusable(f"has nothing in '{form.answer}'; expected the word that follows")
        return Asked(((filled(form.prompt or "", fields, "the context"), form.delimiter + word),))

    def answer(self, asked: Asked, reply: Reply) -> Json:
        (found,) = reply.likelihoods
        return {"log_likelihood": found.nats, "greedy": found.greedy, "tokens": found.tokens}

    def scores(self, answer: Json) -> dict[str, float]:
        return {"accuracy": float(answer["greedy"]), "loss": -answer["log_likelihood"]}

    def together(self, answers: Sequence[Json]) -> dict[str, float]:
        return {}

    def chance(self, answers: Sequence[Json], vocabulary: int) -> dict[str, float]:
        tokens = [answer["tokens"] for answer in answers]
        of_all = sum(vocabulary**-count for count in tokens) / len(tokens)
        return {"accuracy": of_all, "loss": math.log(vocabulary) * sum(tokens) / len(tokens)}
