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
from qlora.evaluation.tasks.task import Asked, Form, Kind, Reply, Unusable, filled, text_in


def _ask(fields: Mapping[str, Any], form: Form) -> Asked:
    word = text_in(fields, form.answer, "the word").strip()
    if not word:
        raise Unusable(f"has nothing in '{form.answer}'; expected the word that follows")
    return Asked(((filled(form.prompt or "", fields, "the context"), form.delimiter + word),))


def _answer(asked: Asked, reply: Reply) -> Json:
    (found,) = reply.likelihoods
    return {"log_likelihood": found.nats, "greedy": found.greedy, "tokens": found.tokens}


def _scores(answer: Json) -> dict[str, float]:
    return {"accuracy": float(answer["greedy"]), "loss": -answer["log_likelihood"]}


def _chance(answers: Sequence[Json], vocabulary: int) -> dict[str, float]:
    tokens = [answer["tokens"] for answer in answers]
    of_all = sum(vocabulary**-count for count in tokens) / len(tokens)
    return {"accuracy": of_all, "loss": math.log(vocabulary) * sum(tokens) / len(tokens)}


LAST_WORD = Kind({"accuracy": "higher", "loss": "lower"}, _ask, _answer, _scores, chance=_chance)
