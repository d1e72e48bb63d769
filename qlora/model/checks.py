"""Checks of a model before a run spends anything: two or more quick forwards, each held against another way to the same.

    its own logits      against   hidden states times its head
    packed examples     against   each of them alone
    a row's beginning   against   the same with another end, or padding, behind it
    rows to read        against   its embeddings and positions

A family may do something that this package does not know; without a check the run would go wrong in silence. Knows a
model and its loss; must not know adapters, optimizers or where batches come from.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import numpy as np
import torch
from torch import nn

from qlora.errors import DataError, ModelError, NonFiniteError, PackingError
from qlora.model import anatomy
from qlora.model.loss import hidden_states, token_head


@torch.no_grad()
def check_loss_path(model: nn.Module, ids: list[int]) -> None:
    """Raise ModelError unless our head gives the model's own logits on a few tokens, of a classifier those of its language model;
    NonFiniteError where they are NaN.

    A family may do something to its logits that ``token_head`` does not know; its loss would then be wrong in silence.
    """
    input_ids = torch.tensor([ids[:8]], device=next(model.parameters()).device)
    position_ids = torch.arange(input_ids.shape[1], device=input_ids.device)[None]
    theirs = model(input_ids=input_ids, position_ids=position_ids, use_cache=False).logits.float()
    ours = token_head(model).logits(hidden_states(model, {"input_ids": input_ids, "position_ids": position_ids}))
    if not theirs.isfinite().all():
        raise NonFiniteError("The model's logits are not finite on the data's first tokens, before any step")
    difference = (theirs - ours).abs().max().item()
    if not difference <= 1e-2 * max(1.0, theirs.abs().max().item()):
        raise ModelError(
            f"The logits of this {anatomy.kind(model)} model differ from its hidden states times its head by "
            f"{difference:.3g}: it does something to them that qlora does not know, so its loss would be wrong. "
            "Take another model, or report the model type."
        )


def packs_one_row(model: nn.Module) -> bool:
    """Whether packed rows must go through a layer one at a time.

    With FlashAttention transformers looks for positions that restart in batches of one row only; in larger ones packed
    examples see each other, without a word.
    """
    return "flash" in str(getattr(model.config, "_attn_implementation", None))


class HasIds(Protocol):
    """A row of the data, as far as a model is concerned: int arrays [n] of token ids and positions."""

    @property
    def ids(self) -> np.ndarray: ...

    @property
    def positions(self) -> np.ndarray: ...


def check_rows(model: nn.Module, rows: Sequence[HasIds], first: int = 0, virtual: int = 0, what: str = "Row") -> None:
    """Raise DataError unless every token of ``rows`` has an embedding in ``model``, and every position a place.

    ``first``: positions taken before every text; ``virtual``: how many of these are tokens of the stream. ``what`` is what
    a message calls a row.
    """
    check_tokens(anatomy.kind(model), anatomy.embedding_rows(model), rows, what)
    positions = anatomy.position_limit(model)
    for number, row in enumerate(rows):
        longest = first + int(row.positions.max()) + 1
        if positions is not None and longest > positions:
            behind = f" behind the method's {first} virtual tokens" if first else ""
            room = positions - first + virtual  # max_length counts those of the stream
            raise DataError(
                f"{what} {number} holds an example of {longest - first} tokens{behind}, but this "
                f"{anatomy.kind(model)} model has {positions} positions; set data.max_length={room}."
            )


def check_tokens(kind: str, embeddings: int, rows: Sequence[HasIds], what: str = "Row") -> None:
    """Raise DataError unless every token of ``rows`` is one of the ``embeddings`` that a model of this ``kind`` has."""
    for number, row in enumerate(rows):
        if (largest := int(row.ids.max())) >= embeddings:
            raise DataError(
                f"{what} {number} holds token {largest}, but this {kind} model has embeddings for tokens "
                f"0 to {embeddings - 1} alone; use the tokenizer that belongs to it, or a checkpoint whose embeddings "
                "were resized for the tokens added to this one."
            )


@torch.no_grad()
def check_packing(model: nn.Module, ids: list[int], rows: int = 1) -> None:
    """Raise PackingError unless a packed example is blind to its neighbour: same hidden states packed as alone.

    ``rows`` is how many rows go through a layer at once in training. How far rounding alone may part them is measured: an
    example at the front of the same rows sees nothing of what follows in any causal model, yet goes through the same
    kernels. In bf16 that is much in a model whose states hang on small differences, and nearly nothing in fp32. The same
    example behind another neighbour goes through the same kernels, so there a leak that is less than bf16 rounds shows.
    """
    do = "Set data.packing=by_length" + (
        " or training.micro_batch_size=1." if rows > 1 and packs_one_row(model) else "."
    )
    if why := anatomy.why_not_packed(model):
        raise PackingError(f"Examples cannot share a row in this {anatomy.kind(model)} model: {why}. {do}")
    half = max(2, len(ids[:16]) // 2)
    first, second = ids[:half], ids[half : 2 * half]
    if len(second) < 2:
        return
    device = next(model.parameters()).device

    def states(*examples: list[int], times: int = rows) -> torch.Tensor:
        positions = [place for example in examples for place in range(len(example))]
        batch = {
            "input_ids": [[token for example in examples for token in example]] * times,
            "position_ids": [positions] * times,
        }
        return hidden_states(model, {key: torch.tensor(value, device=device) for key, value in batch.items()})

    alone = states(second, times=1)
    behind, in_front = states(first, second)[:, half:], states(second, first)[:, : len(second)]
    difference, rounding = _apart(behind, alone), _apart(in_front, alone)
    other = first[::-1] if first != first[::-1] else second
    by_neighbour = _apart(behind, states(other, second)[:, half:])
    beside = _apart(in_front, states(second, other)[:, : len(second)])
    allowed, allowed_by_neighbour = _allowed(model, alone, rounding, beside)
    if not (difference <= allowed and by_neighbour <= allowed_by_neighbour):
        raise PackingError(
            f"Packed examples see each other in this {anatomy.kind(model)} model (hidden states differ by "
            f"{max(difference, by_neighbour):.3g} from the example alone, {rows} rows at once, where rounding gives {rounding:.1g}). "
            f"{do}"
        )


@torch.no_grad()
def check_causal(model: nn.Module, ids: list[int]) -> None:
    """Raise ModelError unless tokens are blind to what follows them, be it padding, in a short row beside a longer one.

    There is no mask of padding, since in a causal model no token sees it. One that sees what follows, as PaliGemma's text does,
    would read the tokens that it is to predict: with no padding at all the loss would be wrong in silence. Measured as in
    ``check_packing``: rounding by the same row in a batch of other rows of its own length.
    """
    length = len(ids := ids[:16])
    short = length // 2
    if short < 2:
        return
    device, row = next(model.parameters()).device, ids[:short]

    def states(*rows: list[int]) -> torch.Tensor:
        places = [list(range(len(row))) for row in rows]
        batch = {"input_ids": list(rows), "position_ids": places}
        return hidden_states(model, {key: torch.tensor(value, device=device) for key, value in batch.items()})

    alone = states(row)[0]
    rounding = _apart(states(row, ids[short : 2 * short], row)[2], alone)
    filled, otherwise = row + ids[:1] * (length - short), row + ids[: short - 1 : -1]
    padded = states(ids, filled)[1, :short]
    beside = _apart(padded, states(ids[::-1], filled)[1, :short])
    allowed, allowed_otherwise = _allowed(model, alone, rounding, beside)
    difference, by_filling = _apart(padded, alone), _apart(padded, states(ids, otherwise)[1, :short])
    if not (difference <= allowed and by_filling <= allowed_otherwise):
        raise ModelError(
            f"In this {anatomy.kind(model)} model a token sees what follows it (hidden states differ by "
            f"{max(difference, by_filling):.3g} from the beginning alone, where rounding gives {rounding:.1g}), so it would be "
            "trained to copy what it is to predict. Take another model."
        )


def _apart(found: torch.Tensor, other: torch.Tensor) -> float:
    """The root of the mean squared difference; NaN, which no bound holds, where there is one. A leak moves all numbers, and
    rounding a few by much, so that the largest difference would tell them apart badly."""
    return (found.float() - other.float()).square().mean().sqrt().item()


def _allowed(model: nn.Module, states: torch.Tensor, rounding: float, beside: float) -> tuple[float, float]:
    """(how far rounding may take states from those of another shape, and from those of the same shape beside other tokens).

    Both by what was measured: ``rounding`` between shapes, ``beside`` between neighbours that cannot be seen. Where that is
    nothing, other shapes may still go through other kernels, whose results part by some of the dtype's eps: SmolLM2's 30 layers
    in fp32, in rows of 8 tokens and of 16, by 20 eps. In fp32 1e-4 is far above that and far below any leak. What stands beside
    an example changes no kernel and mostly no bit: half of eps is 0.4 % in bf16, where the weakest leak that was met, of a state
    that decays (Falcon-H1), is 2.5 %. Only in a mixture of experts it changes how many tokens visit one, and so kernels.
    """
    if anatomy.is_mixture(model) or any(path.endswith(anatomy.EXPERTS) for path, _ in model.named_modules()):
        beside = max(beside, rounding)
    eps, size = torch.finfo(states.dtype).eps, states.float().square().mean().sqrt().item()
    return max(4 * rounding, max(16 * eps, 1e-4) * size), max(4 * beside, max(eps / 2, 2e-6) * size)
