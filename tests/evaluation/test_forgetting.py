"""What is forgotten: nothing where nothing changed; else what the tasks say item by item, and KL by full softmaxes. And diversity."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from qlora.evaluation.diversity import diversity, of_texts
from qlora.evaluation.forgetting import Before, text_rows
from qlora.evaluation.generate import answers
from qlora.evaluation.tasks.opening import open_task
from qlora.evaluation.tasks.result import Result, difference
from qlora.evaluation.tasks.scoring import score
from qlora.evaluation.tasks.task import Task
from qlora.methods.base import AdaptedModel, apply_method
from qlora.recipe import Full, Modules, PromptTuning, TaskSection
from tests import tiny
from tests.evaluation.tasks.test_choice import PLAIN, records
from tests.rounding import rounding
from tests.tiny import WORDS, write_lines


@pytest.fixture(scope="module")
def tasks(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Task, Task]:
    place = tmp_path_factory.mktemp("data")
    tokenizer = tiny.tiny_base(tiny_model, "none").tokenizer
    assert tokenizer is not None
    choice = str(write_lines(place / "choice.jsonl", records()))
    text = str(write_lines(place / "text.jsonl", [{"text": " ".join(WORDS[n:])} for n in range(4)]))
    return (
        open_task(TaskSection(name="own", data=choice, kind="choice", **PLAIN), tokenizer),  # type: ignore[arg-type]
        open_task(TaskSection(name="text", data=text, kind="text"), tokenizer),
    )


@torch.no_grad()
def log_probabilities(model: AdaptedModel, ids: list[int]) -> torch.Tensor:
    virtual = list(range(-model.virtual_tokens, 0))
    given = torch.tensor([[*virtual, *ids]])
    logits = model.model(input_ids=given, use_cache=False).logits[0, len(virtual) :]
    return logits.double().log_softmax(-1)


@pytest.mark.parametrize("method", [None, Modules(modules=["lm_head"]), PromptTuning(tokens=3), Full()], ids=str)
def test_forgetting(tiny_model: Path, tasks: tuple[Task, Task], method: object) -> None:
    if method is None:
        model = tiny.tiny_model(tiny_model, quantization="none")
    else:
        model = apply_method(tiny.tiny_base(tiny_model, "none"), method)
    choice, text = tasks
    rows = text_rows(text)
    with model.disabled():
        before = Before.of(model, [choice], text)
        expected = [log_probabilities(model, row.ids.tolist()) for row in rows]
        nothing = before.forgotten(model)
    assert nothing.tasks["own"]["accuracy"].value == 0
    assert nothing.text is not None
    assert abs(nothing.text.divergence) < rounding()
    tiny.stir(model, 0.3)
    found = before.forgotten(model)
    divergence, count = 0.0, 0
    for row, theirs in zip(rows, expected, strict=True):
        ours = log_probabilities(model, row.ids.tolist())
        divergence += (theirs.exp() * (theirs - ours))[:-1].sum().item()
        count += len(row.ids) - 1
    assert found.text is not None
    assert found.text.tokens == count == sum(len(item.pairs[0][1]) for item in text.items)
    assert found.text.divergence == pytest.approx(divergence / count, rel=1e3 * rounding())
    assert found.tasks["own"] == difference(score(model, choice), before.results["own"])


def test_diversity_of_texts() -> None:
    result = of_texts({"a": ["x y", "x y", "x z", "w"], "b": ["p q r"] * 4})
    assert [one["unique"] for one in result.scores.values()] == [3, 1]
    assert [one["distinct_1"] for one in result.scores.values()] == pytest.approx([4 / 7, 3 / 12])
    assert [one["distinct_2"] for one in result.scores.values()] == pytest.approx([2 / 3, 2 / 8])
    if "self_bleu" in result.metrics:
        assert result.scores["b"]["self_bleu"] == pytest.approx(100)
        assert result.scores["a"]["self_bleu"] < 100
    assert Result.from_dict(json.loads(json.dumps(result.as_dict()))) == result
    assert difference(result, result)["unique"].value == 0


def test_drawn_answers_follow_the_seed_and_leave_the_random_state(adapted: AdaptedModel) -> None:
    prompts = [adapted.tokenizer(text)["input_ids"] for text in ("what does it", "how are you?")]
    state = torch.get_rng_state()
    one, again = (diversity(adapted, prompts, 4, max_new_tokens=5) for _ in range(2))
    assert torch.equal(torch.get_rng_state(), state)
    assert one == again
    assert one != diversity(adapted, prompts, 4, max_new_tokens=5, seed=9)
    assert diversity(adapted, prompts[:1], 4, max_new_tokens=5).answers["0"] == one.answers["0"]
    cold = diversity(adapted, prompts, 4, max_new_tokens=5, temperature=1e-4)  # as good as greedy
    assert cold.metrics["unique"].value == 1
    assert [texts["texts"][0] for texts in cold.answers.values()] == answers(adapted, prompts, 5)
