"""The law of choices: ln p by torch's own log-softmax on the model's own logits, one at a time; the likeliest is picked."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from qlora.errors import DataError
from qlora.evaluation.tasks.opening import open_task
from qlora.evaluation.tasks.result import Result, difference
from qlora.evaluation.tasks.scoring import score
from qlora.methods.base import AdaptedModel
from qlora.recipe import TaskSection
from tests.rounding import rounding
from tests.tiny import WORDS, write_lines

PLAIN = {"prompt": "{query}", "choices": "choices", "answer": "gold"}
BLANK = {"prompt": "the _ {query}", "choices": "choices", "answer": "gold", "blank": "_"}


def records(count: int = 12) -> list[dict[str, Any]]:
    """Items of two to four choices of one to three words."""
    return [
        {
            "query": " ".join(WORDS[(number + n) % 20] for n in range(2 + number % 5)) + "?" * (number % 2),
            "choices": [" ".join(WORDS[(number * 7 + n * 3 + k) % 20] for k in range(1 + n % 3)) for n in range(2 + number % 3)],
            "gold": number % 2,
        }
        for number in range(count)
    ]  # fmt: skip


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_lines(tmp_path_factory.mktemp("data") / "choice.jsonl", records())


@torch.no_grad()
def by_hand(model: AdaptedModel, context: str, continuation: str) -> float:
    ids = model.tokenizer(context + continuation)["input_ids"]
    behind = len(model.tokenizer(context)["input_ids"])
    logits = model.model(input_ids=torch.tensor([ids]), use_cache=False).logits[0].double().log_softmax(-1)
    return sum(logits[place - 1, ids[place]].item() for place in range(behind, len(ids)))


@pytest.mark.parametrize("form", [PLAIN, BLANK], ids=["behind the prompt", "in its blank"])
@pytest.mark.parametrize("tokens_at_once", [1, 100, 4096])
def test_the_likeliest_choice_is_picked(
    adapted: AdaptedModel, data: Path, form: dict[str, str], tokens_at_once: int
) -> None:
    task = open_task(TaskSection(name="own", data=str(data), kind="choice", **form), adapted.tokenizer)
    result = score(adapted, task, tokens_at_once=tokens_at_once)
    right = []
    for record, answer in zip(records(), result.answers.values(), strict=True):
        query, choices = record["query"], record["choices"]
        if form is PLAIN:
            expected = [by_hand(adapted, query, f" {choice}") for choice in choices]
        else:
            expected = [by_hand(adapted, f"the {choice}", f" {query}") for choice in choices]
        assert answer["log_likelihoods"] == pytest.approx(expected, rel=rounding())
        right.append(expected.index(max(expected)) == record["gold"])
    accuracy = result.metrics["accuracy"]
    assert accuracy.value == pytest.approx(sum(right) / 12)
    assert accuracy.error == pytest.approx((accuracy.value * (1 - accuracy.value) / 11) ** 0.5)  # of a proportion
    assert accuracy.chance == pytest.approx((1 / 2 + 1 / 3 + 1 / 4) / 3)
    assert ("accuracy_norm" in result.metrics) == (form is PLAIN)


def test_a_result_is_plain_json_and_pairs_item_by_item(adapted: AdaptedModel, data: Path) -> None:
    section = TaskSection(name="own", data=str(data), kind="choice", **PLAIN)  # type: ignore[arg-type]
    task = open_task(section, adapted.tokenizer)
    trained = score(adapted, task)
    with adapted.disabled():
        base = score(adapted, open_task(section.model_copy(update={"limit": 8}), adapted.tokenizer))
    assert Result.from_dict(json.loads(json.dumps(trained.as_dict()))) == trained
    found = difference(trained, base)["accuracy"]
    each = [trained.scores[key]["accuracy"] - base.scores[key]["accuracy"] for key in base.scores]
    assert found.items == 8
    assert found.value == pytest.approx(sum(each) / 8)
    assert found.error == pytest.approx(torch.tensor(each).double().std().item() / 8**0.5)
    assert difference(trained, trained)["accuracy"].value == 0


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"choices": []}, "has 0 choices, of which 0 are empty"),
        ({"choices": ["a", " "]}, "has 2 choices, of which 1 are empty"),
        ({"choices": "a"}, "has no list in 'choices'"),
        ({"gold": 7}, "has '7' in 'gold'; expected one of its 2 choices"),
        ({"query": None}, "has null in 'query'; expected text"),
    ],
)
def test_an_item_without_choices_is_told_by_its_line(
    adapted: AdaptedModel, tmp_path: Path, change: dict[str, Any], sentence: str
) -> None:
    data = write_lines(tmp_path / "bad.jsonl", [records()[0], {**records()[0], **change}])
    with pytest.raises(DataError) as caught:
        open_task(TaskSection(name="own", data=str(data), kind="choice", **PLAIN), adapted.tokenizer)  # type: ignore[arg-type]
    caught.match("^Line 2 of '.*' of the task 'own' ")
    caught.match(sentence)


def test_missing_data_and_an_item_beyond_the_context_are_told(adapted: AdaptedModel, tmp_path: Path) -> None:
    section = TaskSection(name="own", data=str(tmp_path / "none.jsonl"), kind="choice", **PLAIN)  # type: ignore[arg-type]
    with pytest.raises(DataError, match=r"^The task 'own' cannot be read\. There is no data file"):
        open_task(section, adapted.tokenizer)
    data = write_lines(tmp_path / "long.jsonl", [{**records()[0], "query": "fox " * 300}])
    task = open_task(section.model_copy(update={"data": str(data)}), adapted.tokenizer)
    with pytest.raises(
        DataError, match=r"^Line 1 of .* of the task 'own' is \d+ tokens long, and .* has 256 positions"
    ):
        score(adapted, task)


def test_answers_that_are_kept_are_not_asked_again(
    adapted: AdaptedModel, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    task = open_task(TaskSection(name="own", data=str(data), kind="choice", **PLAIN), adapted.tokenizer)  # type: ignore[arg-type]
    kept, seen = tmp_path / "tasks" / "own.jsonl", list[int]()

    def stopped(done: int, of: int) -> None:
        seen.append(done)
        if done == 5:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        score(adapted, task, kept, "step 3", stopped)
    kept.write_text(kept.read_text()[:-9])  # torn in the middle of a line
    result = score(adapted, task, kept, "step 3", lambda done, of: seen.append(done))
    assert seen == [1, 2, 3, 4, 5, *range(5, 13)]
    assert result.metrics == score(adapted, task).metrics
    assert list(result.answers) == [item.id for item in task.items]
    score(adapted, task, kept, "step 3", lambda done, of: seen.append(0))
    assert seen[-1] == 12  # nothing was left to ask
    score(adapted, task, kept, "step 4", lambda done, of: seen.append(done))
    assert seen[-12:] == list(range(1, 13))  # of another model nothing is taken
