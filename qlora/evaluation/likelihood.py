"""Likelihoods: how likely a model finds a continuation of a context, for many of them, in batches of like length.

    pairs of items ─► rows, each distinct one once ─► sorted by length ─► batches ─► ln p of every continuation's tokens

Where an item's continuations share their context, and the model has plain keys and values to keep of it, the context goes
through once and the continuations behind it. Logits exist for ``chunk`` positions at a time, never for whole rows.

Knows token ids and the model; must not know what a task is.

Shape suffixes: R rows, T positions, N continuation tokens of all rows, D hidden size, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy
import torch
from torch import Tensor
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

from qlora.data.batches import collate
from qlora.data.packing import Row
from qlora.errors import DoesNotFitError, NonFiniteError, first_line
from qlora.evaluation.generate import fast_decoding
from qlora.machine.device import ran_out_of_memory, release_memory
from qlora.methods.base import AdaptedModel
from qlora.methods.switching import Adapters
from qlora.model import anatomy
from qlora.model.base import evaluating
from qlora.model.loss import Head, hidden_states, token_head

Ids = tuple[int, ...]
Pair = tuple[Ids, Ids]
"""(context, continuation), neither of them empty."""
TOKENS_AT_ONCE = 4096  # that go through the model together
WORTH = 32  # tokens a group that need not go through again: with fewer, a second pass is not worth it
CHUNK = 256  # positions whose logits exist at the same time


@dataclass(frozen=True)
class Likelihood:
    """Of one continuation: ln p(continuation | context) in nats, whether each token of it was the likeliest, how many they are."""

    nats: float
    greedy: bool
    tokens: int


@torch.no_grad()
def likelihoods(
    model: AdaptedModel | Adapters, groups: Sequence[Sequence[Pair]], tokens_at_once: int = TOKENS_AT_ONCE
) -> Iterator[tuple[int, list[Likelihood]]]:
    """(a group's number, a Likelihood for each of its pairs), as groups are done: the shortest first, in no other order.

    A group is what belongs to one item. The model is in eval mode meanwhile, and left as it was. Where memory runs out it goes
    on with fewer tokens at once; DoesNotFitError where one group is too much.
    """
    shared = [_shared(group) if _keeps_keys(model) else 0 for group in groups]
    waiting = sorted(range(len(groups)), key=lambda number: (shared[number], _width(groups[number])))
    with evaluating(model.model), fast_decoding(model):
        while waiting:
            together = _fitting(groups, shared, waiting, tokens_at_once)
            try:
                several = [groups[number] for number in together]
                found = (_behind_contexts if shared[together[0]] else _found)(model, several)
            except Exception as error:
                if not ran_out_of_memory(error):
                    raise
                reason = first_line(error)
            else:
                yield from zip(together, found, strict=True)
                waiting = waiting[len(together) :]
                continue
            release_memory(model.device)  # out here, where the exception no longer holds the tensors of its frames
            if len(together) == 1:
                raise DoesNotFitError(
                    f"Scoring one item of {_width(groups[together[0]]):,} tokens did not fit into memory ({reason}); leave out "
                    "the longest items."
                )
            tokens_at_once = sum(_width(groups[number]) * len(groups[number]) for number in together) // 2


def _width(group: Sequence[Pair]) -> int:
    return max(len(context) + len(continuation) for context, continuation in group)


def _fitting(
    groups: Sequence[Sequence[Pair]], shared: Sequence[int], waiting: Sequence[int], tokens_at_once: int
) -> list[int]:
    """The first of ``waiting`` that go through together: at least one, and no two that share contexts of other lengths."""
    together, rows = [waiting[0]], len(groups[waiting[0]])
    for number in waiting[1:]:
        rows += len(groups[number])
        # sorted, so that the last is the longest
        if shared[number] != shared[waiting[0]] or rows * _width(groups[number]) > tokens_at_once:
            break
        together.append(number)
    return together


def _shared(group: Sequence[Pair]) -> int:
    """The length of the context that all pairs of a group have, where it pays to put it through once; else 0."""
    contexts, inputs = {context for context, _ in group}, {(context, rest[:-1]) for context, rest in group}
    length = len(group[0][0])
    return length if len(contexts) == 1 and length * (len(inputs) - 1) >= WORTH else 0


def _keeps_keys(model: AdaptedModel | Adapters) -> bool:
    """Whether all that a model keeps of a context is keys and values, by place: not where a method puts something before it,
    rows have an adapter each, or a layer has a state."""
    if model.first_position or (isinstance(model, Adapters) and model.mixing):
        return False
    layers = getattr(DynamicCache(config=anatomy.text_config(model.model)), "layers", [])
    return bool(layers) and all(type(layer) in (DynamicLayer, DynamicSlidingWindowLayer) for layer in layers)


def _behind_contexts(model: AdaptedModel | Adapters, groups: Sequence[Sequence[Pair]]) -> list[list[Likelihood]]:
    """As ``_found``, for groups of one context each, all of one length: the contexts go through once, and what follows each goes
    behind its keys and values."""
    device, length = model.device, len(groups[0][0][0])
    cache = DynamicCache(config=anatomy.text_config(model.model))
    places = torch.arange(length, device=device)[None]
    last_GD = _through(model, torch.tensor([group[0][0] for group in groups], device=device), places, cache)[:, -1]
    pairs = [(number, rest) for number, group in enumerate(groups) for _, rest in group]
    owners = torch.tensor([number for number, _ in pairs], device=device)
    width = max(len(rest) for _, rest in pairs) - 1
    cache.batch_select_indices(owners)
    rows = torch.tensor([[*rest[:-1], *[rest[0]] * (width - len(rest) + 1)] for _, rest in pairs], device=device)
    after_RTD = _through(model, rows, length + torch.arange(width, device=device)[None], cache)
    states_RTD = torch.cat([last_GD[owners, None], after_RTD], 1)  # position t judges token t of what follows
    wanted = torch.arange(width + 1)[None] < torch.tensor([len(rest) for _, rest in pairs])[:, None]
    found = iter(_judged(states_RTD[wanted.to(device)], token_head(model.model), [rest for _, rest in pairs]))
    return [[next(found) for _ in group] for group in groups]


def _through(model: AdaptedModel | Adapters, ids_RT: Tensor, places: Tensor, cache: DynamicCache) -> Tensor:
    """The last hidden states of ``ids_RT`` behind what ``cache`` holds, which grows."""
    output = anatomy.decoder(model.model)(
        input_ids=ids_RT, position_ids=places.expand_as(ids_RT), past_key_values=cache, use_cache=True, return_dict=True
    )
    transform = anatomy.before_head(model.model)
    states: Tensor = output.last_hidden_state
    return states if transform is None else transform(states)


def _found(model: AdaptedModel | Adapters, groups: Sequence[Sequence[Pair]]) -> list[list[Likelihood]]:
    """The likelihoods of some groups, all in one batch. Pairs that give the model the same row, as those of one token after
    the same context, share it."""
    pairs = [pair for group in groups for pair in group]
    inputs = [(*context, *continuation[:-1]) for context, continuation in pairs]
    rows = {ids: number for number, ids in enumerate(dict.fromkeys(inputs))}
    hidden_RTD = states(model, list(rows))
    # the token after position t is judged by the state at t: a continuation of n tokens by the last n of its row
    behind = model.virtual_tokens
    at = [
        (rows[ids], behind + len(ids) - len(continuation) + place)
        for ids, (_, continuation) in zip(inputs, pairs, strict=True)
        for place in range(len(continuation))
    ]
    row, place = torch.tensor(at, device=hidden_RTD.device).unbind(1)
    found = iter(_judged(hidden_RTD[row, place], token_head(model.model), [rest for _, rest in pairs]))
    return [[next(found) for _ in group] for group in groups]


def states(model: AdaptedModel | Adapters, rows: Sequence[Ids]) -> Tensor:
    """The last hidden states [R, T, D] of rows of token ids, padded on the right, where nothing is seen that follows."""
    made = []
    for ids in rows:
        array = numpy.asarray(ids, dtype=numpy.int32)
        made.append(Row(array, array, numpy.arange(len(ids), dtype=numpy.int32), (0,)))
    pad = getattr(model.tokenizer, "pad_token_id", None)
    batch: dict[str, Any] = collate(made, 0 if pad is None else int(pad), model.virtual_tokens)
    return hidden_states(model.model, {key: values.to(model.device) for key, values in batch.items()})


def _judged(hidden_ND: Tensor, head: Head, continuations: Sequence[Ids]) -> list[Likelihood]:
    """A Likelihood for each continuation, whose tokens' states follow one another in ``hidden_ND``."""
    wanted_N = torch.tensor([token for ids in continuations for token in ids], device=hidden_ND.device)
    nats, greedy = [], []
    for start in range(0, len(wanted_N), CHUNK):
        part = slice(start, start + CHUNK)
        logits_NV = head.logits(hidden_ND[part])
        index = wanted_N[part, None]
        # ln p in float64: a sum of many tokens is rounded once
        nats.append((logits_NV.gather(1, index).double() - logits_NV.logsumexp(1, keepdim=True).double()).squeeze(1))
        greedy.append(logits_NV.argmax(1) == wanted_N[part])
        del logits_NV
    lengths = [len(ids) for ids in continuations]
    if not all(part.isfinite().all() for part in nats):
        raise NonFiniteError(
            "The model's log-likelihoods are not finite, so there is nothing to compare; nothing was kept of these items"
        )
    each = zip(torch.cat(nats).cpu().split(lengths), torch.cat(greedy).cpu().split(lengths), lengths, strict=True)
    return [Likelihood(ours.sum().item(), bool(best.all()), count) for ours, best, count in each]
