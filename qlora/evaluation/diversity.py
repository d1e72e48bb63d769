"""Diversity: how different the answers are that a model draws to one prompt.

    unique        of the answers to a prompt, how many are different (of k)
    distinct_1    of all words of them, the share that is different; distinct_2: of all pairs of neighbours (Li et al. 2016)
    self_bleu     BLEU of each answer against the others, 0 to 100 (Zhu et al. 2018); where sacrebleu is installed

Each is a mean over prompts, so that two results differ prompt by prompt (``tasks.difference``). Knows prompts in token ids; must not
know what they ask.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress

import torch

from qlora.evaluation.generate import Ids, answers
from qlora.evaluation.tasks.result import Metric, Result, mean_and_error
from qlora.evaluation.tasks.task import Better
from qlora.methods.base import AdaptedModel
from qlora.methods.switching import Adapters

BETTER: dict[str, Better] = {"unique": "higher", "distinct_1": "higher", "distinct_2": "higher", "self_bleu": "lower"}


def diversity(
    model: AdaptedModel | Adapters,
    prompts: Sequence[Ids],
    samples: int = 8,
    max_new_tokens: int = 64,
    temperature: float = 1.0,
    stop: Sequence[str] = (),
    seed: int = 0,
) -> Result:
    """The diversity of ``samples`` answers drawn to each prompt. The random state is left as it was."""
    drawn, gpus = {}, [model.device] if model.device.type == "cuda" else []
    for number, prompt in enumerate(prompts):
        with torch.random.fork_rng(gpus):
            torch.manual_seed(seed + number)  # of the prompt alone: the same however many there are
            several = [prompt] * samples
            drawn[str(number)] = answers(model, several, max_new_tokens, stop=stop, temperature=temperature)
    return of_texts(drawn, f"{samples} samples at temperature {temperature:g}")


def of_texts(drawn: dict[str, list[str]], settings: str = "") -> Result:
    """The diversity of texts: by prompt, at least two answers."""
    scores = {key: _scores(texts) for key, texts in drawn.items()}
    metrics = {
        name: Metric(*mean_and_error([one[name] for one in scores.values()]), None, better)
        for name, better in BETTER.items()
        if name in next(iter(scores.values()))
    }
    kept = {key: {"texts": texts} for key, texts in drawn.items()}
    return Result("diversity", "diversity", settings, metrics, scores, kept)


def _scores(texts: Sequence[str]) -> dict[str, float]:
    words = [text.split() for text in texts]
    found = {"unique": float(len(set(texts)))}
    for size in (1, 2):
        grams = [tuple(one[at : at + size]) for one in words for at in range(len(one) - size + 1)]
        found[f"distinct_{size}"] = len(set(grams)) / len(grams) if grams else 0.0
    with suppress(ImportError):
        import sacrebleu

        others = [[*texts[:number], *texts[number + 1 :]] for number in range(len(texts))]
        each = [sacrebleu.sentence_bleu(text, rest).score for text, rest in zip(texts, others, strict=True)]
        found["self_bleu"] = sum(each) / len(each)
    return found
