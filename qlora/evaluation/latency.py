"""How long a generated token takes: of the model with its adapter beside it, and of what a merge makes of it.

    unmerged     as it stands: packed weights, and what is planted beside them
    merged       the same model with nothing planted and every linear dense, as an export in 16 bits has it; its values do not matter

Knows adapted models and their answers; must not know files.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from statistics import median

from torch import nn

from qlora.evaluation.generate import answer_length, generated
from qlora.machine.device import total_memory_bytes
from qlora.methods.base import AdaptedModel
from qlora.methods.modules import dense_linear
from qlora.methods.planted import modules_unplanted, unplanted
from qlora.methods.switching import Adapters
from qlora.model.nf4 import FrozenLinear, Packed, is_linear
from qlora.model.walk import standing

PROMPT = range(100, 116)
TOKENS = 16  # of an answer
ANSWERS = 3  # after one that warms up
NEVER = 2**31 - 1  # no token: answers run to their last


@dataclass(frozen=True)
class Latency:
    """Median seconds for each token of greedy answers of ``TOKENS`` to one prompt of as many."""

    unmerged: float
    merged: float | None
    """None where it cannot be merged, or where 16 bits of every linear do not fit beside the model."""


def latency_of(model: AdaptedModel) -> Latency:
    """Measured here and now; the model stays as it is."""
    unmerged = seconds_a_token(model)
    if any(method.merge.why_not() is not None for method in model.methods):
        return Latency(unmerged, None)
    if any(method.why_not_disabled() is not None for method in model.methods):
        return Latency(unmerged, unmerged)  # full fine-tuning: it is merged as it stands
    packed = [module for module in model.model.modules() if isinstance(module, Packed)]
    linears = {
        path: unplanted(module) for path, module in modules_unplanted(model.model) if is_linear(unplanted(module))
    }
    dense = sum(one.in_features * one.out_features for one in packed) * model.base.compute_dtype.itemsize
    free, _ = total_memory_bytes(model.device)
    experts = len(packed) - sum(isinstance(linear, FrozenLinear) for linear in linears.values())
    if experts or model.base.placement is not None or dense > free / 2:
        return Latency(unmerged, None)
    with model.disabled(), standing(model.model, {path: _dense(linear) for path, linear in linears.items()}):
        return Latency(unmerged, seconds_a_token(model))


def seconds_a_token(model: AdaptedModel | Adapters) -> float:
    """The median over ``ANSWERS`` of the seconds for each token that was generated, the prompt's own time in it."""
    vocabulary = int(model.model.get_input_embeddings().num_embeddings)  # type: ignore[operator, union-attr]
    prompt = [token % vocabulary for token in PROMPT]
    count, seconds = answer_length(model, len(prompt), TOKENS), []
    for _ in range(ANSWERS + 1):
        begin = time.perf_counter()
        generated(model, [prompt], count, ends=(NEVER,)).sequences.tolist()
        seconds.append((time.perf_counter() - begin) / count)
    return median(seconds[1:])


def _dense(linear: nn.Module) -> nn.Module:
    return dense_linear(linear) if isinstance(linear, FrozenLinear) else linear
