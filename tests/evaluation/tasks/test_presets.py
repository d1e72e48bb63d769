"""The public sets ask the same whatever their columns are called: as on the hub, and as llm-foundry and others write them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from qlora.data.chat import ChatTemplate
from qlora.data.sources import Record
from qlora.errors import DataError
from qlora.evaluation.tasks.opening import open_task
from qlora.evaluation.tasks.presets import PRESETS
from qlora.methods.base import AdaptedModel
from qlora.recipe import TaskSection
from tests.tiny import write_lines

AI2 = {"text": ["ice", "salt"], "label": ["A", "B"]}
# the set, a record as the hub has it, one as others do, and what both ask: the first pair and which choice is right
SETS: list[tuple[str, dict[str, Any], dict[str, Any], tuple[str, str], int | None]] = [
    (
        "hellaswag",
        {"activity_label": "Surf", "ctx_a": "He [title] stands.", "ctx_b": "he", "endings": ["falls. [step] x", "is"], "label": "1", "ctx": ""},
        {"ctx": "Surf: He. stands. He", "endings": ["falls. x", "is"], "label": 1},
        ("Surf: He. stands. He", " falls. x"), 1,
    ),
    (
        "arc_easy", {"question": "Why?", "choices": AI2, "answerKey": "B"},
        {"query": "Question: Why?", "choices": ["ice", "salt"], "gold": 1}, ("Question: Why?\nAnswer:", " ice"), 1,
    ),
    (
        "arc_challenge", {"question": "Why?", "choices": {"text": ["ice", "salt"], "label": ["1", "2"]}, "answerKey": "1"},
        {"query": "Question: Why?", "choices": ["ice", "salt"], "gold": 0}, ("Question: Why?\nAnswer:", " ice"), 0,
    ),
    (
        "piqa", {"goal": "To melt", "sol1": "heat", "sol2": "cool", "label": 0},
        {"query": "Question: To melt\n", "choices": ["heat", "cool"], "gold": 0}, ("Question: To melt\nAnswer:", " heat"), 0,
    ),
    (
        "openbookqa", {"question_stem": "Salt is", "choices": AI2, "answerKey": "B"},
        {"query": "Salt is", "choices": ["ice", "salt"], "gold": 1}, ("Salt is", " ice"), 1,
    ),
    (
        "winogrande", {"sentence": "Ann met Bo but _ was late.", "option1": "Ann", "option2": "Bo", "answer": "2"},
        {"context_options": ["Ann met Bo but Ann", "Ann met Bo but Bo"], "continuation": "was late.", "gold": 1},
        ("Ann met Bo but Ann", " was late."), 1,
    ),
    (
        "boolq", {"passage": "Passage: P.", "question": "is it", "label": 1},
        {"query": "Passage: P.\nQuestion: is it?", "choices": ["no", "yes"], "gold": 1}, ("Passage: P.\nQuestion: is it?\nAnswer:", " no"), 1,
    ),
    (
        "copa", {"premise": "It rained.", "question": "effect", "choice1": "We ran.", "choice2": "We sat.", "label": 0},
        {"query": "It rained therefore", "choices": ["we ran.", "we sat."], "gold": 0}, ("It rained therefore", " we ran."), 0,
    ),
    (
        "mmlu", {"question": "Which? ", "choices": ["x", "y"], "answer": 1, "subject": "s"}, {"question": "Which?", "choices": ["x", "y"], "answer": "B"},
        ("Which?\nA. x\nB. y\nAnswer:", " A"), 1,
    ),
    ("lambada", {"text": "He is okay"}, {"context": "He is", "continuation": "okay"}, ("He is", " okay"), None),
    (
        "sst2", {"sentence": "good", "label": 1}, {"sentence": "good", "label": "1"},
        ("good\nQuestion: Is this sentence positive or negative?\nAnswer:", " negative"), 1,
    ),
    (
        "rte", {"sentence1": "A.", "sentence2": "B.", "label": 1}, {"sentence1": "A.", "sentence2": "B.", "label": "not_entailment"},
        ("A.\nQuestion: B. True or False?\nAnswer:", " True"), 1,
    ),
    (
        "ag_news", {"text": "T\nD", "label": 3}, {"title": "T", "description": "D", "label": "Sci/Tech"}, ("T\nD\nTopic:", " World"), 3,
    ),
    (
        "gsm8k", {"question": "2+2?", "answer": "4\n#### 4"}, {"question": "2+2?", "answer": "4\n#### 4"},
        ("Question: 2+2?\nAnswer:", " 4\n#### 4"), None,
    ),
    ("wikitext2", {"page": "Words."}, {"text": "Words."}, ("", "Words."), None),
]  # fmt: skip


@pytest.mark.parametrize(("name", "hubs", "others", "pair", "right"), SETS, ids=[one[0] for one in SETS])
def test_a_public_set_in_both_columns(
    adapted: AdaptedModel, tmp_path: Path, name: str, hubs: dict[str, Any], others: dict[str, Any], pair: tuple[str, str], right: int | None
) -> None:  # fmt: skip
    items = []
    for record in (hubs, others):
        data = write_lines(tmp_path / "set.jsonl", [record])
        items.append(open_task(TaskSection(name=name, data=str(data)), adapted.tokenizer).items[0])
    assert items[0].asked == items[1].asked
    assert items[0].asked.pairs[0] == pair
    assert right is None or (items[0].asked.gold or {})["right"] == right
    assert items[0].id == items[1].id


def test_every_public_set_is_tested() -> None:
    assert {one[0] for one in SETS} == PRESETS.keys() - {"e2e_nlg"}  # whose libraries are an extra
    e2e = PRESETS["e2e_nlg"].tidy({"meaning_representation": "name[A]", "references": ["A.", "It is A."]})
    assert e2e == {"mr": "name[A]", "refs": ["A.", "It is A."]}


@pytest.mark.parametrize(
    ("section", "asked"),
    [
        ({"name": "winogrande"}, ("allenai/winogrande", "winogrande_xl", "validation")),
        ({"name": "w", "preset": "winogrande", "split": "train"}, ("allenai/winogrande", "winogrande_xl", "train")),
        ({"name": "winogrande", "data": "me/winogrande"}, ("me/winogrande", None, "test")),
    ],
)
def test_without_data_it_comes_from_the_hub(
    adapted: AdaptedModel, monkeypatch: pytest.MonkeyPatch, section: dict[str, Any], asked: tuple[str, str, str]
) -> None:
    given = list[Any]()
    hubs = next(one[1] for one in SETS if one[0] == "winogrande")

    def read(*names: Any) -> list[Record]:
        given.extend(names)
        return [Record(hubs, names[0], "row", 1)]

    monkeypatch.setattr("qlora.evaluation.tasks.opening.read_records", read)
    open_task(TaskSection(**section, limit=3), adapted.tokenizer)
    assert tuple(given) == (*asked, 3)


def test_other_columns_are_told(adapted: AdaptedModel, tmp_path: Path) -> None:
    data = write_lines(tmp_path / "set.jsonl", [{"goal": "To melt", "sol1": "heat"}])
    with pytest.raises(
        DataError, match=r"Line 1 of .* of the task 'piqa' has the columns .*, which are not those of the public set"
    ):
        open_task(TaskSection(name="piqa", data=str(data)), adapted.tokenizer)


def test_in_chat_the_prompt_is_a_users_turn(adapted: AdaptedModel, tmp_path: Path) -> None:
    """The context ends as the prompt of a training example does, and the answer's tokens are what is trained there."""
    record = {"text": "what does it do?", "label": 1}
    section = TaskSection(
        name="own", data=str(write_lines(tmp_path / "set.jsonl", [record])), kind="classification", prompt="{text}",
        answer="label", labels={"0": "fine", "1": "hello there"}, chat=True,
    )  # fmt: skip
    template = ChatTemplate(adapted.tokenizer)
    asked = [{"role": "user", "content": record["text"]}]
    expected = adapted.tokenizer(template.renderer.text(asked, None, True), add_special_tokens=False)["input_ids"]
    (item,) = open_task(section, adapted.tokenizer, template).items
    for (context, rest), label in zip(item.pairs, ("fine", "hello there"), strict=True):
        assert list(context) == expected
        assert adapted.tokenizer.decode(rest) == label
