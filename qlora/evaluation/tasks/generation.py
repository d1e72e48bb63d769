"""Generation: how near generated texts are to reference texts, of which an item may have several.

    bleu      sacrebleu's corpus BLEU, 13a tokens, 0 to 100
    nist      nltk's corpus NIST, n-grams up to 5, on the same tokens
    rouge_l   rouge-score's ROUGE-L F1 with stemming, of the nearest reference, a mean over items, 0 to 1
    chrf      sacrebleu's corpus chrF2, 0 to 100

METEOR is left out: it needs WordNet, which no package brings. The libraries are the extra ``generation``.

Knows texts; must not know how they were made.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cache
from typing import Any

from qlora.errors import InputError
from qlora.evaluation.tasks.result import Json
from qlora.evaluation.tasks.task import Asked, Form, Kind, Unusable, column, filled, said, written

LONGEST = 5  # n-grams of NIST


def _ask(fields: Mapping[str, Any], form: Form) -> Asked:
    _libraries()  # before a model is loaded
    given = column(fields, form.answer, "the references")
    references = [said(one, form.answer or "") for one in (given if isinstance(given, list) else [given])]
    if not references or not all(one.strip() for one in references):
        raise Unusable(f"has an empty reference in '{form.answer}', or none; expected a text or several")
    return Asked(prompt=filled(form.prompt or "", fields, "the prompt"), gold={"references": references})


def _scores(answer: Json) -> dict[str, float]:
    scorer = _libraries()[2]
    return {"rouge_l": max(scorer.score(one, answer["text"])["rougeL"].fmeasure for one in answer["references"])}


def _together(answers: Sequence[Json]) -> dict[str, float]:
    sacrebleu, corpus_nist, _ = _libraries()
    texts = [answer["text"] for answer in answers]
    most = max(len(answer["references"]) for answer in answers)
    # the n-th reference of every item in a list of its own; None where an item has fewer
    columns = [[(*answer["references"], *[None] * most)[n] for answer in answers] for n in range(most)]
    tokens = _tokenizer()
    split = [[tokens(one).split() for one in answer["references"]] for answer in answers]
    said = [tokens(text).split() for text in texts]
    enough = max(map(len, said)) >= LONGEST  # nltk divides by the number of n-grams
    return {
        "bleu": sacrebleu.corpus_bleu(texts, columns).score,
        "nist": float(corpus_nist(split, said, n=LONGEST)) if enough else 0.0,
        "chrf": sacrebleu.corpus_chrf(texts, columns).score,
    }


@cache
def _libraries() -> tuple[Any, Any, Any]:
    """sacrebleu, nltk's corpus_nist and a scorer of ROUGE-L. Raises InputError where one is not installed."""
    try:
        import sacrebleu
        from nltk.translate.nist_score import corpus_nist
        from rouge_score.rouge_scorer import RougeScorer
    except ImportError as error:
        raise InputError(
            f"BLEU, NIST, ROUGE-L and chrF need {error.name}, which is not installed: pip install sacrebleu nltk rouge-score"
        ) from None
    return sacrebleu, corpus_nist, RougeScorer(["rougeL"], use_stemmer=True)


@cache
def _tokenizer() -> Any:
    from sacrebleu.tokenizers.tokenizer_13a import Tokenizer13a

    return Tokenizer13a()


GENERATION = Kind(
    {"bleu": "higher", "nist": "higher", "rouge_l": "higher", "chrf": "higher"}, _ask, written, _scores, _together
)
