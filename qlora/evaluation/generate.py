"""Answers: generation from token ids, for the before and after of a run, for tasks and for chat.

Knows transformers' generate; must not know how a prompt was made.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch

from qlora.errors import DataError
from qlora.machine.device import total_memory_bytes
from qlora.methods.base import AdaptedModel
from qlora.methods.switching import Adapters
from qlora.model import anatomy
from qlora.model.base import evaluating
from qlora.model.nf4 import FrozenLinear, dense_cached

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase
    from transformers.generation.streamers import BaseStreamer

Ids = Sequence[int]


def room(model: AdaptedModel | Adapters, count: int) -> int | None:
    """How many tokens may follow a prompt of ``count`` tokens before positions run out; None where nothing bounds them."""
    limit = anatomy.position_limit(model.model)
    return None if limit is None else limit - model.first_position - count


def answer(
    model: AdaptedModel | Adapters, prompt: Ids, max_new_tokens: int = 256, streamer: BaseStreamer | None = None
) -> str:
    """One greedy answer; a transformers ``streamer`` gets the tokens as they come."""
    return answers(model, [prompt], max_new_tokens, streamer)[0]


def answers(
    model: AdaptedModel | Adapters,
    prompts: Sequence[Ids],
    max_new_tokens: int,
    streamer: BaseStreamer | None = None,
    stop: Sequence[str] = (),
    temperature: float | None = None,
    stripped: bool = True,
    cut: str = "",
) -> list[str]:
    """The continuation of each prompt (token ids) as text, up to an end token, one of the texts in ``stop``, or ``max_new_tokens``.

    ``cut`` stands behind one that was cut off. Without the spaces around it unless ``stripped`` is False. Greedy, or with a ``temperature`` drawn by torch's random state. It also ends where the model's positions do. Raises DataError,
    before generating, for a prompt that leaves none.
    """
    lengths = [answer_length(model, len(prompt), max_new_tokens) for prompt in prompts]
    padded, found = _takes_padding(model, prompts, min([2, *lengths])), dict[int, str]()
    # mostly one: how long the answers may become, and how long prompts are where they cannot be padded
    kinds = [(length, padded or len(prompt)) for prompt, length in zip(prompts, lengths, strict=True)]
    ends = _end_tokens(model)
    for kind in dict.fromkeys(kinds):
        places = [place for place, own in enumerate(kinds) if own == kind]
        together, length = [prompts[place] for place in places], kind[0]
        output = generated(model, together, length, streamer, ends, stop, temperature).sequences
        width = model.virtual_tokens + max(map(len, together))
        for place, row in zip(places, output[:, width:].tolist(), strict=True):
            ids = _until(row, ends)
            text = model.tokenizer.decode(ids, skip_special_tokens=True) + (cut if len(ids) == length else "")
            text = text[: min((text.find(one) for one in stop if one in text), default=len(text))]
            found[place] = text.strip() if stripped else text
    return [found[place] for place in range(len(prompts))]


def answer_length(model: AdaptedModel | Adapters, count: int, max_new_tokens: int) -> int:
    """How long the answer to a prompt of ``count`` tokens may become, at most ``max_new_tokens``."""
    left = room(model, count)
    if left is not None and left < 1:
        raise DataError(
            f"A prompt of {count} tokens leaves no position for an answer: '{model.base.name}' has {left + count} for both; "
            "shorten it, or lower data.max_length if it was made from the data."
        )
    return max_new_tokens if left is None else min(max_new_tokens, left)


def _takes_padding(model: AdaptedModel | Adapters, prompts: Sequence[Ids], count: int) -> bool:
    """Whether prompts of these lengths can be answered together, with padding in front of the shorter ones: not where it
    goes into a state (RWKV, xLSTM) or moves learned positions (BART), or the cache loses count of it (MiniMax, from the second
    token on). By the logits of ``count`` tokens after the shortest, behind the padding and alone; how far rounding parts them is
    measured by the same prompt twice in a batch."""
    shortest, longest = (choose(prompts, key=len, default=()) for choose in (min, max))
    if len(shortest) == len(longest) or (isinstance(model, Adapters) and model.mixing):  # there rows go together anyway
        return True

    def logits(*rows: Ids) -> torch.Tensor:
        return torch.stack([of_token[-1].float() for of_token in generated(model, rows, count).logits])

    found = [logits(shortest), logits(longest, shortest), logits(shortest, shortest)]
    alone, padded, again = (one[: min(map(len, found))] for one in found)  # an end may come early
    known = alone.isfinite()  # what is never chosen is -inf
    size, apart, rounding = ((one[known]).square().mean().sqrt() for one in (alone, padded - alone, again - alone))
    return bool(apart <= max(4 * rounding, 2 * torch.finfo(model.base.compute_dtype).eps * size))


@torch.no_grad()
def generated(
    model: AdaptedModel | Adapters,
    prompts: Sequence[Ids],
    max_new_tokens: int,
    streamer: BaseStreamer | None = None,
    ends: Ids = (),
    stop: Sequence[str] = (),
    temperature: float | None = None,
) -> Any:
    """What transformers' generate gives for one batch: ``sequences`` [prompts, width + new tokens], until every prompt has met
    one of ``ends``; with none, ``logits`` of each new token."""
    tokenizer: PreTrainedTokenizerBase = model.tokenizer
    network: PreTrainedModel = model.model
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else 0
    # Padded on the left. Negative ids stand for what the method puts before a text, behind the padding: [0 0 -2 -1 5 6].
    rows = [[*range(-model.virtual_tokens, 0), *prompt] for prompt in prompts]
    width = max(map(len, rows))
    # On transformers' idea of the model's device, which is the host where the embedding is kept there.
    ids = torch.tensor([[pad] * (width - len(row)) + row for row in rows], device=network.device)
    mask = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in rows], device=network.device)
    with evaluating(network), fast_decoding(model), _whole_for_the_head(network):
        return network.generate(
            input_ids=ids,
            attention_mask=mask,
            max_new_tokens=max_new_tokens,
            do_sample=temperature is not None,
            temperature=temperature,
            top_p=None if temperature is None else 1.0,
            top_k=None if temperature is None else 0,
            use_cache=True,
            pad_token_id=pad,
            eos_token_id=list(ends) or None,
            stop_strings=list(stop) or None,
            tokenizer=tokenizer if stop else None,
            streamer=streamer,
            return_dict_in_generate=True,
            output_logits=not ends,
        )


@contextmanager
def _whole_for_the_head(network: PreTrainedModel) -> Iterator[None]:
    """Inside, the head is given the last hidden states of the prompts as a tensor of their own, not as every so many rows of one: of
    these a CPU multiplies each with a copy of the head, which for 16 prompts of a model of 135M is 900 MB."""
    head = anatomy.head(network)
    if head is None:
        yield
        return
    hook = head.register_forward_pre_hook(lambda _, given: (given[0].contiguous(), *given[1:]))
    try:
        yield
    finally:
        hook.remove()


def _end_tokens(model: AdaptedModel | Adapters) -> list[int]:
    """Every token that ends an answer: by the tokenizer, by config.json (one or a list), and by generation_config.json."""
    network: PreTrainedModel = model.model
    named = getattr(anatomy.text_config(network), "eos_token_id", None)
    found = [model.tokenizer.eos_token_id, *model.base.end_tokens, *(named if isinstance(named, list) else [named])]
    return sorted({end for end in found if end is not None})


def _until(ids: list[int], ends: Ids) -> list[int]:
    """``ids`` before the first end token: what follows is padding, which need not be a special token."""
    return ids[: next((place for place, token in enumerate(ids) if token in ends), len(ids))]


@contextmanager
def fast_decoding(model: AdaptedModel | Adapters) -> Iterator[None]:
    """On a CPU, dequantise once per answer instead of once per token, where that takes at most a quarter of the free memory.

    Not where layers are streamed: they are there to save memory, and their weights leave while the answer is made.
    """
    linears = [module for module in model.model.modules() if isinstance(module, FrozenLinear)]
    dense = sum(linear.in_features * linear.out_features for linear in linears) * model.base.compute_dtype.itemsize
    free, _ = total_memory_bytes(model.device)
    if model.base.placement is None and model.device.type == "cpu" and 0 < dense < free // 4:
        with dense_cached(model.model):
            yield
    else:
        yield
