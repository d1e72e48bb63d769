"""Numeric answers (GSM8K): the loss of the answer that was given, and whether a generated one comes to the same number.

    answer_loss   nats a token of the given answer, a mean over items
    exact_match   the number in the generated answer is the one in the given answer: what follows ####, else the last one

Knows a record's fields and how numbers are written; must not know how likelihoods or texts are made.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from decimal import Decimal, InvalidOperation
from typing import Any

from qlora.evaluation.tasks.result import Json
from qlora.evaluation.tasks.task import Asked, Form, Kind, Reply, Unusable, filled, text_in

_NUMBER = re.compile(r"-?\$?\d[\d,]*(?:\.\d+)?|-?\$?\.\d+")


def _ask(fields: Mapping[str, Any], form: Form) -> Asked:
    prompt = filled(form.prompt or "", fields, "the prompt")
    given = text_in(fields, form.answer, "the answer").strip()
    number = number_in(given)
    if number is None:
        raise Unusable(f"has no number in '{form.answer}'")
    return Asked(((prompt, form.delimiter + given),), prompt, gold={"right": str(number)})


def _answer(asked: Asked, reply: Reply) -> Json:
    (found,) = reply.likelihoods
    return {"log_likelihood": found.nats, "tokens": found.tokens, "text": reply.text, **(asked.gold or {})}


def _scores(answer: Json) -> dict[str, float]:
    number = number_in(answer["text"])
    right = number is not None and number == Decimal(answer["right"])
    return {"answer_loss": -answer["log_likelihood"] / answer["tokens"], "exact_match": float(right)}


def _chance(answers: Sequence[Json], vocabulary: int) -> dict[str, float]:
    return {"answer_loss": math.log(vocabulary), "exact_match": 0.0}


def number_in(text: str) -> Decimal | None:
    """The number that an answer comes to: ``… #### 1,200`` → 1200; without that mark the last one; None where there is none."""
    marked = text.partition("####")[2]
    found = _NUMBER.findall(marked)[:1] or _NUMBER.findall(text)[-1:]
    try:
        return Decimal(found[0].replace(",", "").replace("$", "")) if found else None
    except InvalidOperation:
        return None


NUMERIC = Kind({"answer_loss": "lower", "exact_match": "higher"}, _ask, _answer, _scores, chance=_chance)
