"""Our tasks and EleutherAI's lm-eval score the same items alike. Skipped where lm-eval is not installed (``make test-programs``).

Theirs is lm-eval's own HFLM on the very model, adapters in it; ours are our tasks, and lm-eval asking our class.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from qlora.evaluation.tasks.opening import open_task
from qlora.evaluation.tasks.result import Result
from qlora.evaluation.tasks.scoring import score
from qlora.methods.base import AdaptedModel, apply_method
from qlora.model.base import Base
from qlora.recipe import LoRA, TaskSection
from tests import tiny
from tests.evaluation.tasks.test_choice import records
from tests.rounding import _InDouble, no_worse
from tests.tiny import WORDS, write_lines

FOLDER = os.environ.get("QLORA_LM_EVAL", "/nonexistent")
sys.path.append(FOLDER)  # at the end: of what both have, it is ours that counts
lm_eval = pytest.importorskip("lm_eval", reason="QLORA_LM_EVAL names no folder of 'pip install --target' with lm-eval")
pytestmark = pytest.mark.slow

LISTED = {"prompt": "{query}", "choices": "choices", "answer": "gold"}
OURS: dict[str, dict[str, Any]] = {
    "choice": {"kind": "choice", **LISTED},
    "blank": {"kind": "choice", **LISTED, "prompt": "the _ {query}", "blank": "_"},
    "word": {"kind": "last_word", "prompt": "{query}", "answer": "word"},
    "text": {"kind": "text", "prompt": "{text}"},
    "numeric": {"kind": "numeric", "prompt": "{query}", "answer": "word", "max_new_tokens": 8, "stop": ["t"]},
}
ACCURACY = [{"metric": "acc"}, {"metric": "acc_norm"}]
THEIRS: dict[str, dict[str, Any]] = {
    "choice": {"output_type": "multiple_choice", "doc_to_text": "{{query}}", "doc_to_choice": "{{choices}}", "doc_to_target": "gold", "metric_list": ACCURACY},
    "blank": {
        "output_type": "multiple_choice", "doc_to_text": "gold", "doc_to_choice": "{{contexts}}", "doc_to_target": "{{query}}",
        "metric_list": ACCURACY[:1],
    },
    "word": {"output_type": "loglikelihood", "doc_to_text": "{{query}}", "doc_to_target": " {{word}}", "metric_list": [{"metric": "acc"}, {"metric": "perplexity"}]},
    "text": {"output_type": "loglikelihood_rolling", "doc_to_text": "", "doc_to_target": "{{text}}", "metric_list": [{"metric": "bits_per_byte"}]},
    "numeric": {
        "output_type": "generate_until", "doc_to_text": "{{query}}", "doc_to_target": "{{word}}", "metric_list": [{"metric": "exact_match"}],
        "generation_kwargs": {"until": ["t"], "max_gen_toks": 8, "do_sample": False},
    },
}  # fmt: skip


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = [
        {
            **record,
            "contexts": [f"the {choice}" for choice in record["choices"]],
            "word": f"{WORDS[number % 20]} {number}",
            "text": " ".join(WORDS[(number * 3 + n) % 20] for n in range(4 + 12 * number)),
        }
        for number, record in enumerate(records(14))
    ]
    return write_lines(tmp_path_factory.mktemp("data") / "items.jsonl", made)


@pytest.fixture(scope="module", params=["Llama", "Gemma2", "GPT2"])
def models(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> dict[torch.dtype, AdaptedModel]:
    """A model of a family with adapters that do something, in fp32 and in float64."""
    folder = tiny.chat_checkpoint(tmp_path_factory.mktemp("models") / "model", request.param)
    made = {}
    for dtype in (torch.float32, torch.float64):
        bare = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager").eval()
        base = Base(bare, AutoTokenizer.from_pretrained(folder), folder, "tiny", None, "none", False, tiny.CPU, dtype)
        made[dtype] = apply_method(base, LoRA(r=4))
        tiny.stir(made[dtype])
        bare.to(dtype)
    return made


def by_ours(model: AdaptedModel, data: Path) -> dict[str, Result]:
    return {
        name: score(model, open_task(TaskSection(name=name, data=str(data), **section), model.tokenizer))
        for name, section in OURS.items()
    }


def by_theirs(model: Any, data: Path) -> dict[str, Any]:
    tasks = [
        {"task": name, "dataset_path": "json", "dataset_kwargs": {"data_files": {"test": str(data)}}, "test_split": "test", **task}
        for name, task in THEIRS.items()
    ]  # fmt: skip
    found = lm_eval.simple_evaluate(model, tasks=tasks, bootstrap_iters=0, log_samples=True, verbosity="ERROR")
    json.dumps({name: found["results"][name] for name in THEIRS}, default=str)
    return found


def hflm(model: AdaptedModel) -> Any:
    from lm_eval.models.huggingface import HFLM

    return HFLM(pretrained=model.model, tokenizer=model.tokenizer, batch_size=4, max_length=256)


def numbers(found: dict[str, Any]) -> dict[str, torch.Tensor]:
    """Every log-likelihood that lm-eval was given, by task, item after item."""
    given: dict[str, torch.Tensor] = {}
    for name in ("choice", "blank", "word", "text"):
        samples = sorted(found["samples"][name], key=lambda sample: sample["doc_id"])
        flat = [one for sample in samples for one in sample["filtered_resps"]]
        given[name] = torch.tensor(
            [one[0] if isinstance(one, tuple | list) else one for one in flat], dtype=torch.float64
        )
    return given


def ours_as_numbers(found: dict[str, Result]) -> dict[str, torch.Tensor]:
    lists = {
        name: [value for answer in found[name].answers.values() for value in answer.get("log_likelihoods", [answer.get("log_likelihood")])]
        for name in ("choice", "blank", "word", "text")
    }  # fmt: skip
    return {name: torch.tensor(values, dtype=torch.float64) for name, values in lists.items()}


def same_scores(ours: dict[str, Result], theirs: dict[str, Any]) -> None:
    """The choices picked, and with them accuracy, are equal; texts too."""
    results = theirs["results"]
    assert ours["choice"].metrics["accuracy"].value == results["choice"]["acc,none"]
    assert ours["choice"].metrics["accuracy_norm"].value == results["choice"]["acc_norm,none"]
    assert ours["blank"].metrics["accuracy"].value == results["blank"]["acc,none"]
    assert ours["word"].metrics["accuracy"].value == results["word"]["acc,none"]
    samples = sorted(theirs["samples"]["choice"], key=lambda sample: sample["doc_id"])
    assert [one["accuracy"] for one in ours["choice"].scores.values()] == [sample["acc"] for sample in samples]
    said = sorted(theirs["samples"]["numeric"], key=lambda sample: sample["doc_id"])
    assert [one["text"] for one in ours["numeric"].answers.values()] == [
        sample["filtered_resps"][0].strip() for sample in said
    ]


def test_the_same_scores(models: dict[torch.dtype, AdaptedModel], data: Path) -> None:
    from qlora.evaluation.lm_eval import QloraLM

    with _InDouble():
        exact, theirs64 = by_ours(models[torch.float64], data), by_theirs(hflm(models[torch.float64]), data)
        asked64 = by_theirs(QloraLM(models[torch.float64]), data)
    ours, theirs = by_ours(models[torch.float32], data), by_theirs(hflm(models[torch.float32]), data)
    in_double, given, truth = ours_as_numbers(exact), numbers(theirs64), ours_as_numbers(exact)
    apart = {name: (values - given[name]).abs().max().item() for name, values in in_double.items()}
    print(f"largest difference in nats, float64: {max(apart.values()):.1e}")
    assert all(value <= 1e-9 for value in apart.values()), apart
    for name, values in numbers(asked64).items():  # lm-eval asking our class
        assert (values - in_double[name]).abs().max() <= 1e-9, name
    for found in (theirs64, asked64):
        same_scores(exact, found)
    single, their_single = ours_as_numbers(ours), numbers(theirs)
    for name, values in single.items():
        print(f"fp32, {name}: ours and theirs {(values - their_single[name]).abs().max():.1e} apart, from float64 "
              f"{(values - truth[name]).abs().max():.1e} and {(their_single[name] - truth[name]).abs().max():.1e}")  # fmt: skip
        no_worse(values, their_single[name], truth[name])
    same_scores(ours, theirs)
    bits = theirs64["results"]["text"]["bits_per_byte,none"]
    assert exact["text"].metrics["bits_per_byte"].value == pytest.approx(bits, rel=1e-9)
