"""Answers: greedy generation from token ids, for the before and after of a run and for chat.

Knows transformers' generate; must not know how a prompt was made.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch

from qlora.errors import DataError
from qlora.machine.device import total_memory_bytes
from qlora.methods import AdaptedModel, Adapters
from qlora.model.checks import position_limit
from qlora.model.nf4 import FrozenLinear, dense_cached


def room(model: AdaptedModel | Adapters, count: int) -> int | None:
    """How many more tokens have a position in the model behind a prompt of ``count``; None where nothing bounds them."""
    limit = position_limit(model.model)
    return None if limit is None else limit - model.first_position - count


def answers(
    model: AdaptedModel | Adapters, prompts: Sequence[Sequence[int]], max_new_tokens: int, streamer: Any = None
) -> list[str]:
    """The greedy continuation of each prompt (token ids), up to an end token or ``max_new_tokens``, as text.

    It also ends with the model's positions. Raises DataError, before anything is asked, for a prompt that leaves none.
    """
    lengths = [_length(model, len(prompt), max_new_tokens) for prompt in prompts]
    found: dict[int, str] = {}
    for length in set(lengths):  # mostly one
        places = [place for place, own in enumerate(lengths) if own == length]
        texts = _generate(model, [prompts[place] for place in places], length, streamer)
        found |= dict(zip(places, texts, strict=True))
    return [found[place] for place in range(len(prompts))]


def _length(model: AdaptedModel | Adapters, count: int, max_new_tokens: int) -> int:
    """How long the answer to a prompt of ``count`` tokens may become, at most ``max_new_tokens``."""
    left = room(model, count)
    if left is not None and left < 1:
        raise DataError(
            f"A prompt of {count} tokens leaves no position for an answer: '{model.base.name}' has {left + count} for both; "
            "shorten it, or lower data.max_length if it was made from the data."
        )
    return max_new_tokens if left is None else min(max_new_tokens, left)


@torch.no_grad()
def _generate(
    model: AdaptedModel | Adapters, prompts: Sequence[Sequence[int]], max_new_tokens: int, streamer: Any
) -> list[str]:
    """One batch of answers, each up to an end token or ``max_new_tokens``."""
    tokenizer: Any = model.tokenizer
    network: Any = model.model
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else 0
    # what the method puts before a text stands behind the padding
    prompts = [[*range(-model.virtual_tokens, 0), *prompt] for prompt in prompts]
    width = max(map(len, prompts))
    # transformers' idea of the model's device: host memory where the embedding lies there
    ids = torch.tensor([[pad] * (width - len(prompt)) + list(prompt) for prompt in prompts], device=network.device)
    mask = torch.tensor([[0] * (width - len(prompt)) + [1] * len(prompt) for prompt in prompts], device=network.device)
    ends = _end_tokens(model)
    was_training = network.training
    network.eval()
    try:
        with _fast_decoding(model):
            output = network.generate(
                input_ids=ids,
                attention_mask=mask,
                max_new_tokens=max_new_tokens,
                do_sample=False,
                temperature=None,
                top_p=None,
                top_k=None,
                use_cache=True,
                pad_token_id=pad,
                eos_token_id=ends or None,
                streamer=streamer,
            )
    finally:
        network.train(was_training)
    return [tokenizer.decode(_until(row[width:].tolist(), ends), skip_special_tokens=True).strip() for row in output]


def answer(
    model: AdaptedModel | Adapters, prompt: Sequence[int], max_new_tokens: int = 256, streamer: Any = None
) -> str:
    """One greedy answer; a transformers ``streamer`` gets the tokens as they come."""
    return answers(model, [prompt], max_new_tokens, streamer)[0]


def _end_tokens(model: AdaptedModel | Adapters) -> list[int]:
    """Every token that ends an answer: the checkpoint's own in config.json and generation_config.json, and the tokenizer's."""
    network: Any = model.model
    found = [model.tokenizer.eos_token_id, network.config.eos_token_id, list(model.base.end_tokens)]
    return sorted({end for item in found for end in (item if isinstance(item, list) else [item]) if end is not None})


def _until(ids: list[int], ends: Sequence[int]) -> list[int]:
    """``ids`` before the first end token: what follows is padding, which need not be a special token."""
    return ids[: next((place for place, token in enumerate(ids) if token in ends), len(ids))]


@contextmanager
def _fast_decoding(model: AdaptedModel | Adapters) -> Iterator[None]:
    """On a CPU, dequantise once for the whole answer instead of once a token, where a quarter of the free memory allows.

    Not where layers are streamed: their weights leave while the answer is made, and memory is what was to be saved.
    """
    linears = [module for module in model.model.modules() if isinstance(module, FrozenLinear)]
    dense = sum(linear.in_features * linear.out_features for linear in linears) * model.base.compute_dtype.itemsize
    free, _ = total_memory_bytes(model.device)
    if model.base.placement is None and model.device.type == "cpu" and 0 < dense < free // 4:
        with dense_cached(model.model):
            yield
    else:
        yield
