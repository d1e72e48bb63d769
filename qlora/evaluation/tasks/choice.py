"""Multiple choice: which of several answers is likeliest behind the prompt.

    accuracy        the largest ln p(choice | prompt) is the right one's
    accuracy_norm   … of ln p / characters of the choice, so that long ones are not worse for being long

With a ``blank`` each choice takes its place in the prompt, and what follows is scored (partial evaluation, Trinh & Le 2018,
as for WinoGrande): the continuation is one, so there is nothing to normalise by. As in EleutherAI's lm-eval.

Knows a record's fields; must not know how likelihoods are computed.
"""

from __future__ import annotations

import string
from collections.abc import Mapping, Sequence
from typing import Any

from qlora.evaluation.tasks.result import Json
from qlora.evaluation.tasks.task import Asked, Form, Kind, Unusable, column, filled, judged, said


def _ask(fields: Mapping[str, Any], form: Form) -> Asked:
    choices = _choices(fields, form)
    gold = {"right": _place(column(fields, form.answer, "the right answer"), choices, form.answer or "")}
    if form.blank is None:
        prompt = filled(form.prompt or "", fields, "the prompt")
        pairs = [(prompt, form.delimiter + choice) for choice in choices]
        return Asked(tuple(pairs), gold={**gold, "characters": [len(choice) for choice in choices]})
    before, blank, behind = filled(form.prompt or "", fields, "the prompt").partition(form.blank)
    if not blank or not behind.strip():
        raise Unusable(f"has a prompt without {form.blank!r} and something behind it, which is what is scored")
    return Asked(tuple((before + choice, form.delimiter + behind.strip()) for choice in choices), gold=gold)


def _scores(answer: Json) -> dict[str, float]:
    found = {"accuracy": float(likeliest(answer["log_likelihoods"]) == answer["right"])}
    if "characters" in answer:
        each = [nats / size for nats, size in zip(answer["log_likelihoods"], answer["characters"], strict=True)]
        found["accuracy_norm"] = float(likeliest(each) == answer["right"])
    return found


def _chance(answers: Sequence[Json], vocabulary: int) -> dict[str, float]:
    mean = sum(1 / len(answer["log_likelihoods"]) for answer in answers) / len(answers)
    return {"accuracy": mean, "accuracy_norm": mean}


def likeliest(values: Sequence[float]) -> int:
    """The place of the largest, the first of equal ones."""
    return max(range(len(values)), key=values.__getitem__)


def _choices(fields: Mapping[str, Any], form: Form) -> list[str]:
    if isinstance(form.choices, tuple):
        found = [filled(text, fields, "a choice") for text in form.choices]
    else:
        listed = column(fields, form.choices, "the choices")
        if not isinstance(listed, list):
            raise Unusable(f"has no list in '{form.choices}'; expected the choices")
        found = [said(one, form.choices or "") for one in listed]
    if len(found) < 2 or not all(one.strip() for one in found):
        raise Unusable(
            f"has {len(found)} choices, of which {sum(not one.strip() for one in found)} are empty; expected at least two texts"
        )
    return found


def _place(value: Any, choices: Sequence[str], name: str) -> int:
    """Which choice is meant by its text, its letter or its number from 0."""
    told = said(value, name).strip()
    if isinstance(value, str) and told in choices:
        return choices.index(told)
    if len(told) == 1 and told in string.ascii_uppercase[: len(choices)]:
        return string.ascii_uppercase.index(told)
    if told.isdecimal() and int(told) < len(choices):
        return int(told)
    raise Unusable(
        f"has {told!r} in '{name}'; expected one of its {len(choices)} choices: the text, a letter from A, or a number from 0"
    )


CHOICE = Kind({"accuracy": "higher", "accuracy_norm": "higher"}, _ask, judged, _scores, chance=_chance)
