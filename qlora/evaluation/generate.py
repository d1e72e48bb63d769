"""Answers: greedy generation from token ids, for the before and after of a run and for chat.

Knows transformers' generate; must not know how a prompt was made.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch

from qlora.device import total_memory_bytes
from qlora.methods import AdaptedModel
from qlora.model.nf4 import FrozenLinear, dense_cached


@torch.no_grad()
def answers(
    model: AdaptedModel, prompts: Sequence[Sequence[int]], max_new_tokens: int, streamer: Any = None
) -> list[str]:
    """The greedy continuation of each prompt (token ids), up to an end token or ``max_new_tokens``, as text."""
    if not prompts:
        return []
    tokenizer: Any = model.tokenizer
    network: Any = model.model
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else 0
    width = max(map(len, prompts))
    ids = torch.tensor([[pad] * (width - len(prompt)) + list(prompt) for prompt in prompts], device=model.device)
    mask = torch.tensor([[0] * (width - len(prompt)) + [1] * len(prompt) for prompt in prompts], device=model.device)
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


def answer(model: AdaptedModel, prompt: Sequence[int], max_new_tokens: int = 256, streamer: Any = None) -> str:
    """One greedy answer; a transformers ``streamer`` gets the tokens as they come."""
    return answers(model, [prompt], max_new_tokens, streamer)[0]


def _end_tokens(model: AdaptedModel) -> list[int]:
    """Every token that ends an answer: the checkpoint's own in config.json and generation_config.json, and the tokenizer's."""
    network: Any = model.model
    found = [model.tokenizer.eos_token_id, network.config.eos_token_id, list(model.base.end_tokens)]
    return sorted({end for item in found for end in (item if isinstance(item, list) else [item]) if end is not None})


def _until(ids: list[int], ends: Sequence[int]) -> list[int]:
    """``ids`` before the first end token: what follows is padding, which need not be a special token."""
    return ids[: next((place for place, token in enumerate(ids) if token in ends), len(ids))]


@contextmanager
def _fast_decoding(model: AdaptedModel) -> Iterator[None]:
    """On a CPU, dequantise once for the whole answer instead of once a token, where a quarter of the free memory allows."""
    linears = [module for module in model.model.modules() if isinstance(module, FrozenLinear)]
    dense = sum(linear.in_features * linear.out_features for linear in linears) * model.base.compute_dtype.itemsize
    free, _ = total_memory_bytes(model.device)
    if model.device.type == "cpu" and 0 < dense < free // 4:
        with dense_cached(model.model):
            yield
    else:
        yield
