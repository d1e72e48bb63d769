"""Latency: how long an answer takes, to its first token and for each one after it.

For an adapter beside its base, and for a merged model (``Adapters(load_base(…))``, which holds none). Knows how answers are generated;
must not know what a model was trained for.
"""

from __future__ import annotations

import statistics
import time
from dataclasses import dataclass

import torch

from qlora.evaluation.generate import Ids, generated
from qlora.methods import AdaptedModel, Adapters


@dataclass(frozen=True)
class Latency:
    """Medians over repeats, in seconds: until the first token, and for each that follows."""

    first_token: float
    each_token: float


def latency(model: AdaptedModel | Adapters, prompt: Ids, new_tokens: int = 32, repeats: int = 3) -> Latency:
    """How long ``new_tokens`` ≥ 2 greedy tokens behind ``prompt`` take; whatever the model says, it is not stopped before."""
    generated(model, [prompt], 2)  # kernels are built and weights made ready
    first = statistics.median(_seconds(model, prompt, 1) for _ in range(repeats))
    whole = statistics.median(_seconds(model, prompt, new_tokens) for _ in range(repeats))
    return Latency(first, max(whole - first, 0.0) / (new_tokens - 1))


def _seconds(model: AdaptedModel | Adapters, prompt: Ids, count: int) -> float:
    begun = time.perf_counter()
    generated(model, [prompt], count)
    if model.device.type == "cuda":
        torch.cuda.synchronize(model.device)
    return time.perf_counter() - begun
