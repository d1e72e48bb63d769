"""EleutherAI's lm-eval on a model of ours: the class that it asks, answered by the same likelihoods and answers as our tasks.

    import lm_eval, qlora
    from qlora.evaluation.lm_eval import QloraLM

    lm_eval.simple_evaluate(QloraLM(qlora.load_run("runs/mine")), tasks=["arc_easy"])
    lm_eval.simple_evaluate(QloraLM(model), tasks=["mbpp"], confirm_run_unsafe_code=True)    # it runs what the model writes

Knows lm-eval's requests; nothing else imports this file, since lm-eval is an extra (``pip install '.[lm-eval]'``).
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from lm_eval.api.model import LM

from qlora.errors import DataError
from qlora.evaluation.generate import answers, room
from qlora.evaluation.likelihood import Likelihood, Pair, likelihoods
from qlora.evaluation.tasks.opening import begin, encoded, encoded_pair
from qlora.evaluation.tasks.scoring import ANSWERS_AT_ONCE, joined, window, windows
from qlora.methods.base import AdaptedModel
from qlora.methods.switching import Adapters

LONGEST = 256  # tokens of an answer, where a task does not say


class QloraLM(LM):
    """An adapted model, as it stands (``model.disabled()`` and ``adapters.using(…)`` count), for lm-eval's evaluators."""

    def __init__(self, model: AdaptedModel | Adapters) -> None:
        super().__init__()
        self.model = model

    @property
    def tokenizer_name(self) -> str:
        return str(self.model.base.name).replace("/", "__")

    def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        """The text of a conversation, by the tokenizer's template."""
        text: str = self.model.tokenizer.apply_chat_template(
            chat_history, tokenize=False, add_generation_prompt=add_generation_prompt,
            continue_final_message=not add_generation_prompt,
        )  # fmt: skip
        return text

    def loglikelihood(self, requests: list[Any], disable_tqdm: bool = False) -> list[tuple[float, bool]]:
        """(ln p(continuation | context), whether it is greedy) of each request. Those after one context share it."""
        pairs = [encoded_pair(self.model.tokenizer, *request.args) for request in requests]
        limit = room(self.model, 0)
        if longest := [
            len(one) + len(rest) for one, rest in pairs if limit is not None and len(one) + len(rest) > limit
        ]:
            raise DataError(
                f"{len(longest):,} items are longer than the model's {limit:,} positions, up to {max(longest):,} tokens; leave them out."
            )
        together: dict[tuple[int, ...], list[int]] = {}
        for number, (context, _) in enumerate(pairs):
            together.setdefault(context, []).append(number)
        found = self._found([[pairs[number] for number in numbers] for numbers in together.values()])
        ordered = {
            number: one
            for numbers, several in zip(together.values(), found, strict=True)
            for number, one in zip(numbers, several, strict=True)
        }
        return [(ordered[number].nats, ordered[number].greedy) for number in range(len(pairs))]

    def loglikelihood_rolling(self, requests: list[Any], disable_tqdm: bool = False) -> list[float]:
        """ln p of each text from its beginning, by windows."""
        tokenizer, width = self.model.tokenizer, window(self.model)
        texts = [windows((begin(tokenizer), encoded(tokenizer, request.args[0])), width) for request in requests]
        return [joined(pieces).nats for pieces in self._found(texts)]

    def generate_until(self, requests: list[Any], disable_tqdm: bool = False) -> list[str]:
        """The answer to each request, cut off at its stop texts; greedy unless it asks for a temperature."""
        texts = [""] * len(requests)
        prompts = [encoded_pair(self.model.tokenizer, request.args[0], "")[0] for request in requests]
        kinds: dict[Any, list[int]] = {}
        for number, request in enumerate(requests):
            kinds.setdefault(_manner(request.args[1]), []).append(number)
        for (stop, longest, temperature), numbers in kinds.items():
            ordered = sorted(numbers, key=lambda number: len(prompts[number]))
            for start in range(0, len(ordered), ANSWERS_AT_ONCE):
                some = ordered[start : start + ANSWERS_AT_ONCE]
                said = answers(
                    self.model,
                    [prompts[number] for number in some],
                    longest,
                    stop=stop,
                    temperature=temperature,
                    stripped=False,
                )
                for number, text in zip(some, said, strict=True):
                    texts[number] = text
        return texts

    def _found(self, groups: list[list[Pair]]) -> Iterable[list[Likelihood]]:
        found = dict(likelihoods(self.model, groups))
        return [found[number] for number in range(len(groups))]


def _manner(given: dict[str, Any]) -> tuple[tuple[str, ...], int, float | None]:
    """(stop texts, most tokens, temperature or None) of a request's generation arguments."""
    until = given.get("until") or ()
    stop = (until,) if isinstance(until, str) else tuple(until)
    temperature = float(given.get("temperature") or 0)
    drawn = bool(given.get("do_sample", temperature > 0)) and temperature > 0
    return stop, int(given.get("max_gen_toks", LONGEST)), temperature if drawn else None
