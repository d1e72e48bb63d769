"""The public sets: where each is on the hub, how it is asked, and its columns as its publishers and others name them.

    PRESETS["arc_easy"].tidy({"question": …, "choices": {"text": …, "label": …}, "answerKey": "B"})
        → {"query": "Question: …", "choices": […], "gold": 1}

Prompts are those of EleutherAI's lm-eval 0.4, so that scores can be compared. A set that has its columns already, as llm-foundry's
files have, goes through as it is. Knows records; must not know a tokenizer or a model.
"""

from __future__ import annotations

import re
import string
import typing
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from qlora.errors import RecipeError, nearest
from qlora.recipe import TaskSection

Fields = Mapping[str, Any]
Tidy = Callable[[Fields], Fields]


@dataclass(frozen=True)
class Preset:
    """A public set: its kind, the section's values that ask it, (hub id, subset, split), and what makes its columns plain."""

    kind: str
    values: Mapping[str, Any]
    hub: tuple[str, str | None, str]
    tidy: Tidy = field(default=lambda fields: fields)


def _hellaswag(fields: Fields) -> Fields:
    context = f"{fields['activity_label']}: {fields['ctx_a']} {fields['ctx_b'].capitalize()}"
    return {"ctx": _bare(context), "endings": [_bare(ending) for ending in fields["endings"]], "label": fields["label"]}


def _bare(text: str) -> str:
    """Without WikiHow's marks: ``He [title] Stands. [step] Then`` → ``He. Stands. Then``."""
    return re.sub(r"\[.*?\]", "", text.strip().replace(" [title]", ". ")).replace("  ", " ")


def _where(column: str, tidy: Tidy, others: Tidy = lambda fields: fields) -> Tidy:
    """``tidy`` for the publishers' own records, which have this column; ``others`` for all that are plain already."""
    return lambda fields: tidy(fields) if column in fields else others(fields)


def _asking(fields: Fields) -> Fields:
    """llm-foundry's form, whose queries end where the answer's mark begins."""
    return {**fields, "query": f"{fields['query'].strip()}\nAnswer:"} if "query" in fields else fields


def _arc(fields: Fields) -> Fields:
    return {**_lettered(fields), "query": f"Question: {fields['question']}\nAnswer:"}


def _openbookqa(fields: Fields) -> Fields:
    return {**_lettered(fields), "query": fields["question_stem"]}


def _lettered(fields: Fields) -> Fields:
    """AI2's choices, each with a label (A, B, … or 1, 2, …), and the right one by its label."""
    choices = fields["choices"]
    return {"choices": choices["text"], "gold": choices["label"].index(fields["answerKey"].strip())}


def _piqa(fields: Fields) -> Fields:
    choices = [fields["sol1"], fields["sol2"]]
    return {"query": f"Question: {fields['goal']}\nAnswer:", "choices": choices, "gold": fields["label"]}


def _winogrande(fields: Fields) -> Fields:
    before, _, behind = fields["sentence"].partition("_")
    options = [before + fields["option1"], before + fields["option2"]]
    return {"context_options": options, "continuation": behind.strip(), "gold": int(fields["answer"]) - 1}


def _boolq(fields: Fields) -> Fields:
    right = fields.get("label", fields.get("answer"))
    query = f"{fields['passage']}\nQuestion: {fields['question']}?\nAnswer:"
    return {"query": query, "choices": ["no", "yes"], "gold": int(right) if right is not None else None}


def _copa(fields: Fields) -> Fields:
    word = {"cause": "because", "effect": "therefore"}[fields["question"]]
    choices = [fields[name][:1].lower() + fields[name][1:] for name in ("choice1", "choice2")]
    return {"query": f"{fields['premise'].strip()[:-1]} {word}", "choices": choices, "gold": fields["label"]}


def _mmlu(fields: Fields) -> Fields:
    letters = string.ascii_uppercase[: len(fields["choices"])]
    listed = "\n".join(f"{letter}. {choice}" for letter, choice in zip(letters, fields["choices"], strict=True))
    return {**fields, "listed": listed, "letters": list(letters), "question": fields["question"].strip()}


def _lambada(fields: Fields) -> Fields:
    context, _, word = fields["text"].rpartition(" ")
    return {"context": context, "continuation": word}


def _rte(fields: Fields) -> Fields:
    return {**fields, "label": {0: "entailment", 1: "not_entailment"}.get(fields["label"], fields["label"])}


def _ag_news(fields: Fields) -> Fields:
    if "text" not in fields:
        return {**fields, "text": f"{fields['title']}\n{fields['description']}"}
    topics = dict(enumerate(("World", "Sports", "Business", "Sci/Tech")))
    return {**fields, "label": topics.get(fields["label"], fields["label"])}


def _e2e(fields: Fields) -> Fields:
    return {"mr": fields["meaning_representation"], "refs": fields["references"]}


def _wikitext(fields: Fields) -> Fields:
    return {"text": fields["page"]}


_LISTED = {"prompt": "{query}", "choices": "choices", "answer": "gold"}
_ARC = "allenai/ai2_arc"
PRESETS: dict[str, Preset] = {
    "hellaswag": Preset(
        "choice",
        {"prompt": "{ctx}", "choices": "endings", "answer": "label"},
        ("Rowan/hellaswag", None, "validation"),
        _where("ctx_a", _hellaswag),
    ),
    "arc_easy": Preset("choice", _LISTED, (_ARC, "ARC-Easy", "test"), _where("answerKey", _arc, _asking)),
    "arc_challenge": Preset("choice", _LISTED, (_ARC, "ARC-Challenge", "test"), _where("answerKey", _arc, _asking)),
    "piqa": Preset("choice", _LISTED, ("baber/piqa", None, "validation"), _where("goal", _piqa, _asking)),
    "openbookqa": Preset("choice", _LISTED, ("allenai/openbookqa", "main", "test"), _where("answerKey", _openbookqa)),
    "winogrande": Preset(
        "choice",
        {"prompt": "_ {continuation}", "choices": "context_options", "answer": "gold", "blank": "_"},
        ("allenai/winogrande", "winogrande_xl", "validation"),
        _where("sentence", _winogrande),
    ),
    "boolq": Preset("choice", _LISTED, ("aps/super_glue", "boolq", "validation"), _where("passage", _boolq, _asking)),
    "copa": Preset("choice", _LISTED, ("aps/super_glue", "copa", "validation"), _where("premise", _copa)),
    "mmlu": Preset(
        "choice",
        {"prompt": "{question}\n{listed}\nAnswer:", "choices": "letters", "answer": "answer"},
        ("cais/mmlu", "all", "test"),
        _mmlu,
    ),
    "lambada": Preset(
        "last_word",
        {"prompt": "{context}", "answer": "continuation"},
        ("EleutherAI/lambada_openai", "default", "test"),
        _where("text", _lambada),
    ),
    "sst2": Preset(
        "classification",
        {
            "prompt": "{sentence}\nQuestion: Is this sentence positive or negative?\nAnswer:",
            "answer": "label",
            "labels": {"0": "negative", "1": "positive"},
            "positive": "1",
        },
        ("nyu-mll/glue", "sst2", "validation"),
    ),
    "rte": Preset(
        "classification",
        {
            "prompt": "{sentence1}\nQuestion: {sentence2} True or False?\nAnswer:",
            "answer": "label",
            "labels": {"entailment": "True", "not_entailment": "False"},
            "positive": "entailment",
        },
        ("nyu-mll/glue", "rte", "validation"),
        _rte,
    ),
    "ag_news": Preset(
        "classification",
        {
            "prompt": "{text}\nTopic:",
            "answer": "label",
            "labels": {topic: topic for topic in ("World", "Sports", "Business", "Sci/Tech")},
        },
        ("fancyzhx/ag_news", None, "test"),
        _ag_news,
    ),
    "gsm8k": Preset(
        "numeric",
        {"prompt": "Question: {question}\nAnswer:", "answer": "answer", "stop": ("Question:",)},
        ("openai/gsm8k", "main", "test"),
    ),
    "e2e_nlg": Preset(
        "generation",
        {"prompt": "Data: {mr}\nText:", "answer": "refs", "stop": ("\n",), "max_new_tokens": 96},
        ("GEM/e2e_nlg", None, "test"),
        _where("meaning_representation", _e2e),
    ),
    "wikitext2": Preset(
        "text", {"prompt": "{text}"}, ("EleutherAI/wikitext_document_level", "wikitext-2-raw-v1", "test"), _where("page", _wikitext)
    ),
}  # fmt: skip


def preset_of(section: TaskSection) -> Preset | None:
    """The public set that a section names. Raises RecipeError for one that there is not."""
    if section.preset is not None and section.preset not in PRESETS:
        raise RecipeError(
            f"The task '{section.name}' has the preset {section.preset!r}; expected one of {', '.join(PRESETS)}."
            f"{nearest(section.preset, PRESETS)}"
        )
    return PRESETS.get(section.preset or section.name)


def named_kind(section: TaskSection) -> str:
    """The kind of a section's task. Raises RecipeError where neither it nor a public set says one."""
    if (kind := kind_of(section)) is None:
        kinds, _ = typing.get_args(TaskSection.model_fields["kind"].annotation)
        raise RecipeError(
            f"The task '{section.name}' is no public set and has no kind; expected one of {', '.join(typing.get_args(kinds))}, or the "
            f"name of a set: {', '.join(PRESETS)}.{nearest(section.name, PRESETS)}"
        )
    return kind


def kind_of(section: TaskSection) -> str | None:
    """The kind that a section names, or that of its public set."""
    preset = preset_of(section)
    return section.kind or (preset.kind if preset is not None else None)
