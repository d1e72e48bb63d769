"""What each kind of task makes of what a model answers: by hand, or by a library that is known to be right."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy
import pytest
from sklearn.metrics import precision_recall_fscore_support
from tokenizers.normalizers import Replace

from qlora.data.chat import ChatTemplate
from qlora.errors import DataError, RecipeError
from qlora.evaluation.generate import answers
from qlora.evaluation.tasks.kinds import KINDS
from qlora.evaluation.tasks.numeric import number_in
from qlora.evaluation.tasks.opening import open_task
from qlora.evaluation.tasks.result import Result, difference, jackknifed, mean_and_error
from qlora.evaluation.tasks.scoring import score, windows
from qlora.methods.base import AdaptedModel
from qlora.recipe import TaskSection
from tests.evaluation.tasks.test_choice import by_hand
from tests.rounding import rounding
from tests.tiny import WORDS, write_lines


def scored(model: AdaptedModel, folder: Path, records: list[dict[str, Any]], **section: Any) -> Result:
    data = write_lines(folder / "data.jsonl", records)
    return score(model, open_task(TaskSection(name="own", data=str(data), **section), model.tokenizer))


def test_the_last_word(adapted: AdaptedModel, tmp_path: Path) -> None:
    context = "what does it"
    records = [{"context": context, "word": word} for word in ("copytree", "do", "fox")]
    result = scored(adapted, tmp_path, records, kind="last_word", prompt="{context}", answer="word")
    losses = [-by_hand(adapted, context, f" {record['word']}") for record in records]
    assert [one["loss"] for one in result.scores.values()] == pytest.approx(losses, rel=rounding())
    assert result.metrics["loss"].value == pytest.approx(sum(losses) / 3, rel=rounding())
    kind = KINDS["last_word"]
    for greedy in (True, False):
        assert kind.scores({"greedy": greedy, "log_likelihood": -1.0})["accuracy"] == float(greedy)


@pytest.mark.parametrize("positive", [None, 1])
def test_precision_recall_and_f1_are_those_of_scikit_learn(positive: int | None) -> None:
    random = numpy.random.default_rng(0)
    labels = 3 if positive is None else 2
    right, given = random.integers(0, labels, (2, 60))
    made = [
        {"log_likelihoods": [-1.0 - (label != two) for label in range(labels)], "right": int(one), "positive": positive}
        for one, two in zip(right, given, strict=True)
    ]
    found = KINDS["classification"].together(made)
    average = "macro" if positive is None else "binary"
    expected = precision_recall_fscore_support(right, given, average=average, zero_division=0)
    assert list(found.values()) == pytest.approx(expected[:3])
    # guessing: the same of labels drawn evenly, 2,000 times as many
    many = numpy.tile(right, 2000)
    drawn = precision_recall_fscore_support(many, random.integers(0, labels, len(many)), average=average)
    chance = KINDS["classification"].chance(made, 100)
    assert [chance[name] for name in ("precision", "recall", "f1")] == pytest.approx(
        drawn[:3], abs=5 / len(many) ** 0.5
    )


def test_labels_are_asked_for_by_their_words(adapted: AdaptedModel, tmp_path: Path) -> None:
    records = [{"text": f"{WORDS[n]} {WORDS[n + 3]}", "label": n % 2} for n in range(6)]
    section = {
        "kind": "classification",
        "prompt": "{text}:",
        "answer": "label",
        "labels": {0: "fine", 1: "hello there"},
    }
    result = scored(adapted, tmp_path, records, **section)
    for record, answer in zip(records, result.answers.values(), strict=True):
        expected = [by_hand(adapted, f"{record['text']}:", f" {label}") for label in ("fine", "hello there")]
        assert answer["log_likelihoods"] == pytest.approx(expected, rel=rounding())
    assert set(result.metrics) == {"accuracy", "precision", "recall", "f1"}
    assert difference(result, result)["f1"].value == 0
    with pytest.raises(DataError, match="has '2' in 'label', which is none of the task's labels: 0, 1"):
        scored(adapted, tmp_path, [*records, {"text": "x", "label": 2}], **section)
    with pytest.raises(DataError, match="fewer than two"):
        scored(adapted, tmp_path, records, **{**section, "labels": {0: "fine"}})


@pytest.mark.parametrize(
    ("text", "number"),
    [
        ("She has 3 + 4 = <<3+4=7>>7.\n#### 7", 7),
        ("#### $1,200.50", 1200.5),
        ("it is 3, no, -12.", -12),
        ("#### 5\nQuestion: 8", 5),
        ("#### none, so 4", 4),
        ("half: .5", 0.5),
        ("nothing", None),
    ],
)
def test_the_number_of_an_answer(text: str, number: float | None) -> None:
    found = number_in(text)
    assert (found is None) == (number is None)
    assert found is None or float(found) == number


def test_numeric_answers_have_a_loss_and_a_match(adapted: AdaptedModel, tmp_path: Path) -> None:
    """What the model says itself is right, if it says a number; the loss is a mean of nats a token."""
    records = [{"q": "what is it?", "a": "it is 3"}, {"q": "how are you?", "a": "#### 12"}]
    result = scored(adapted, tmp_path, records, kind="numeric", prompt="{q}", answer="a", max_new_tokens=6)
    for record, answer, scores in zip(records, result.answers.values(), result.scores.values(), strict=True):
        context, given = record["q"], f" {record['a']}"
        count = len(adapted.tokenizer(context + given)["input_ids"]) - len(adapted.tokenizer(context)["input_ids"])
        assert scores["answer_loss"] == pytest.approx(-by_hand(adapted, context, given) / count, rel=rounding())
        assert answer["text"] == answers(adapted, [adapted.tokenizer(context)["input_ids"]], 6)[0]
    kind, answer = KINDS["numeric"], next(iter(result.answers.values()))
    assert kind.scores({**answer, "text": "so 3.0"})["exact_match"] == 1
    assert kind.scores({**answer, "text": "so 4"})["exact_match"] == 0
    with pytest.raises(DataError, match="has no number in 'a'"):
        scored(adapted, tmp_path, [{"q": "x", "a": "none"}], kind="numeric", prompt="{q}", answer="a")


@pytest.mark.parametrize(
    ("text", "exact", "fields", "valid"),
    [
        ('{"b": {"c": [1, 2]}, "a": "x", "d": null, "e": true}', 1, 1, 1),  # in another order
        ('{"a": "x", "b": {"c": [1.0, 2]}, "d": null, "e": true}', 1, 1, 1),  # 1.0 is 1
        ('{"a": "x", "b": {"c": [1, 3]}, "d": null, "e": true}', 0, 4 / 5, 1),
        ('{"a": "x", "b": {"c": [1]}, "d": null, "e": true}', 0, 4 / 5, 1),
        ('{"a": "x", "b": {"c": [1, 2]}, "d": null, "e": true, "f": 0}', 0, 5 / 6, 1),  # a field that nobody asked for
        ('{"a": "x", "b": {"c": [1, 2]}, "d": "", "e": 1}', 0, 3 / 5, 1),  # neither is null "", nor true 1
        ('{"a": ["x"], "b": {}, "d": null, "e": true}', 0, 2 / 7, 1),
        ("[]", 0, 0, 1),
        ('Here you are: {"a": "x", "b": {"c": [1, 2]}, "d": null, "e": true}', 0, 0, 0),
        ('{"a": "x", "a": "x", "b": {"c": [1, 2]}, "d": null, "e": true}', 0, 0, 0),  # a key twice
        ("NaN", 0, 0, 0),
        ("[" * 100_000, 0, 0, 0),
        ("", 0, 0, 0),
    ],
)
def test_json_is_compared_field_by_field(text: str, exact: float, fields: float, valid: float) -> None:
    right = {"a": "x", "b": {"c": [1, 2]}, "d": None, "e": True}
    found = KINDS["json"].scores({"text": text, "right": right})
    assert found == {
        "exact_match": exact,
        "field_accuracy": pytest.approx(fields, rel=rounding()),
        "valid_json": valid,
    }


def test_json_is_asked_for_by_a_value_or_by_its_text(adapted: AdaptedModel, tmp_path: Path) -> None:
    records = [{"q": "what is it?", "a": {"n": 1}}, {"q": "how are you?", "a": '{"n": [2, null]}'}]
    result = scored(adapted, tmp_path, records, kind="json", prompt="{q}", answer="a", max_new_tokens=4)
    assert [answer["right"] for answer in result.answers.values()] == [{"n": 1}, {"n": [2, None]}]
    free = answers(adapted, [adapted.tokenizer("what is it?")["input_ids"]], 4)[0]
    assert next(iter(result.answers.values()))["text"] == free
    assert list(result.metrics) == ["exact_match", "field_accuracy", "valid_json"]
    with pytest.raises(DataError, match="broken JSON in 'a'"):
        scored(adapted, tmp_path, [{"q": "x", "a": "{none"}], kind="json", prompt="{q}", answer="a")


def test_generated_texts_against_several_references(adapted: AdaptedModel, tmp_path: Path) -> None:
    for name in ("sacrebleu", "nltk", "rouge_score"):
        pytest.importorskip(name, reason=f"{name} is not installed (the extra 'generation')")
    kind = KINDS["generation"]
    said = "The Eagle is a cheap coffee shop near Burger King ."
    near, far = {"text": said, "references": ["x y z", said]}, {"text": said, "references": ["Fine food elsewhere ."]}
    whole, mixed = kind.together([near, near]), kind.together([near, far])
    assert whole["bleu"] == pytest.approx(100)
    assert whole["chrf"] == pytest.approx(100)
    assert kind.scores(near)["rouge_l"] == 1
    assert all(mixed[name] < whole[name] for name in whole)
    records = [{"mr": f"name {n}", "refs": [said, "other"][: 1 + n % 2]} for n in range(4)]
    result = scored(
        adapted, tmp_path, records, kind="generation", prompt="{mr}", answer="refs", max_new_tokens=8, stop=["t"]
    )
    assert set(result.metrics) == set(kind.metrics)
    assert result.metrics["bleu"].error is not None
    for record, answer in zip(records, result.answers.values(), strict=True):
        assert answer["references"] == record["refs"]
        free = answers(adapted, [adapted.tokenizer(record["mr"])["input_ids"]], 8)[0]
        assert answer["text"] == free.partition("t")[0].strip()


def test_bits_per_byte_of_a_text_of_severalwindows(
    adapted: AdaptedModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    texts = ["what does copytree do?", "fine, thank you: ä " + " ".join(WORDS * 2)]
    records = [{"text": text} for text in texts]
    whole = scored(adapted, tmp_path, records, kind="text")
    begin = adapted.tokenizer.bos_token or adapted.tokenizer.eos_token
    nats = [-by_hand(adapted, begin, text) for text in texts]
    size = sum(len(text.encode()) for text in texts)
    assert whole.metrics["bits_per_byte"].value == pytest.approx(sum(nats) / math.log(2) / size, rel=rounding())
    monkeypatch.setattr("qlora.evaluation.tasks.scoring.WINDOW", 16)
    parts = scored(adapted, tmp_path, records, kind="text")
    assert parts.metrics["loss"].value != whole.metrics["loss"].value
    assert [one["tokens"] for one in parts.answers.values()] == [one["tokens"] for one in whole.answers.values()]
    with pytest.raises(DataError, match="is an empty text"):
        scored(adapted, tmp_path, [{"text": " "}], kind="text")


@pytest.mark.parametrize("count", [*range(1, 14)])
def test_windows_predict_each_token_once(count: int) -> None:
    tokens = tuple(range(count))
    parts = windows(((99,), tokens), 4)
    assert sum((rest for _, rest in parts), ()) == tokens
    whole = (99, *tokens)
    for context, rest in parts:
        read = (*context, *rest)
        assert len(read) - 1 == min(4, count)  # as much before each token as there is room for
        assert read == whole[read[-1] + 2 - len(read) : read[-1] + 2]


def test_a_jackknife_of_a_mean_is_its_standard_error() -> None:
    values = dict(zip("abcdefghijklmnopqrst", numpy.random.default_rng(1).normal(size=20).tolist(), strict=True))
    found = jackknifed(list(values), lambda ids: sum(values[key] for key in ids) / len(ids))
    assert found == pytest.approx(mean_and_error(list(values.values())))
    assert jackknifed(["a"], lambda ids: 3.0) == (3.0, None)


@pytest.mark.parametrize(
    ("section", "sentence"),
    [
        ({"name": "helaswag", "data": "x.jsonl"}, "is no public set and has no kind.*Did you mean 'hellaswag'"),
        ({"name": "own", "preset": "arc", "data": "x.jsonl"}, "has the preset 'arc'; expected one of"),
        ({"name": "own", "kind": "text"}, "has no data"),
        ({"name": "hellaswag", "data": "x.jsonl", "chat": True}, "asks for chat, and this run has no chat template"),
        ({"name": "own", "kind": "text", "data": "x.jsonl", "chat": "yes"}, "a text is no turn of a conversation"),
    ],
)
def test_a_task_that_cannot_be_opened(adapted: AdaptedModel, section: dict[str, Any], sentence: str) -> None:
    template = ChatTemplate(adapted.tokenizer) if section.get("chat") == "yes" else None
    with pytest.raises(RecipeError, match=sentence):
        open_task(TaskSection(**section), adapted.tokenizer, template)


def test_an_answer_without_a_token_is_told(adapted: AdaptedModel, tmp_path: Path) -> None:
    section = {"kind": "choice", "prompt": "{query}", "choices": "choices", "answer": "gold", "delimiter": ""}
    records = [{"query": "what does", "choices": ["it do", "\u200b"], "gold": 0}]
    adapted.tokenizer.backend_tokenizer.normalizer = Replace("\u200b", "")
    try:
        with pytest.raises(DataError, match=r"^Line 1 of .* has an answer that adds no token to its prompt"):
            scored(adapted, tmp_path, records, **section)
    finally:
        adapted.tokenizer.backend_tokenizer.normalizer = None
