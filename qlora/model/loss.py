"""The loss: summed cross-entropy over target tokens, in chunks, never the full logits.

    resident head      for each chunk of positions: its logits, its part of the sum, the gradient of its hidden states
    head on the host   once over its slices: log-sum-exp and the targets' logits of every chunk
                       once more, where a gradient is wanted: every chunk's gradient

The logits of a step are its largest tensor by far (vocabulary × tokens × 12 bytes and more). Here only ``chunk`` positions
have logits at a time, only positions that are targets have them at all, and the gradient of the hidden states is made in
the forward, while the chunk's logits are at hand; nothing but that gradient is kept. A frozen head needs none; one that
trains (a head of its own, full fine-tuning, rows of new tokens) gets its own in the same way, summed up in fp32.

A head in host memory (``residence/ends.py``) comes in slices of the vocabulary, and fetching them is what costs: each comes once a
pass, for all positions, and logits exist for a chunk and a slice at a time.

Knows a model's decoder and head; must not know adapters, optimizers or where batches come from.

Shape suffixes: B rows, T positions, D hidden size, N positions of all rows (of a chunk, for what has a V too), V vocabulary
or a slice of it.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from qlora.model import anatomy
from qlora.model.attention import PackedMask, keeps_apart, packed_rows
from qlora.model.nf4 import dense_weight

IGNORE_INDEX = -100


class SlicedLinear(Protocol):
    """An output head that comes to the device a slice of the vocabulary at a time (``HostLinear`` of ``residence/ends.py``)."""

    out_features: int
    rows: int
    """Of the vocabulary, in a slice."""

    def slices(self, dtype: torch.dtype) -> Iterator[tuple[int, int, Tensor]]:
        """(start, stop, weight[start:stop] on the device), over the whole vocabulary, each good until the next is asked for."""

    def bias_of(self, start: int, stop: int, dtype: torch.dtype) -> Tensor | None:
        """The bias of a slice."""


def _sliced(module: nn.Module) -> SlicedLinear | None:
    """``module`` where it is such a head itself; what is planted on one only answers to its names."""
    found: Any = module
    return found if hasattr(type(module), "slices") else None


PIECES = 64  # of a gradient that is multiplied in fp32: few enough that nobody waits for them


@dataclass(frozen=True)
class Head:
    """What turns hidden states into logits: ``softcap · tanh(multiplier · module(h) / softcap)``."""

    module: nn.Module
    multiplier: float = 1.0
    softcap: float | None = None
    rows: int | None = None
    """How many of the module's rows are a token's, where others behind them only fill it up; None for all."""

    def logits(self, hidden_ND: Tensor) -> Tensor:
        """Logits [N, V] in fp32, of a model in float64 in that. Only the product has the head's dtype: a model that caps in bf16
        rounds twice more."""
        return self.scaled(self.module(hidden_ND))[..., : self.rows]

    def scaled(self, product_NV: Tensor) -> Tensor:
        """The logits in fp32 of what ``module`` gave."""
        logits_NV = product_NV if product_NV.dtype == torch.float64 else product_NV.float()
        if self.multiplier != 1.0:
            logits_NV = logits_NV * self.multiplier
        if self.softcap is not None:
            logits_NV = torch.tanh(logits_NV / self.softcap) * self.softcap
        return logits_NV

    def scale_(self, product_NV: Tensor, sloped: bool, first: int = 0) -> Tensor | float | None:
        """``scaled`` in place, for an fp32 product, of the rows from ``first`` on, that nobody else reads; what is no token's
        becomes -inf. Returns d logits / d product, where it is wanted (``sloped``) and is not 1: a number, or [N, V] under a cap."""
        slope: Tensor | float | None = self.multiplier if sloped and self.multiplier != 1.0 else None
        if self.multiplier != 1.0:
            product_NV.mul_(self.multiplier)
        if self.softcap is not None:
            product_NV.div_(self.softcap).tanh_()
            slope = product_NV.square().neg_().add_(1).mul_(self.multiplier) if sloped else None
            product_NV.mul_(self.softcap)
        if self.rows is not None:
            product_NV[:, max(0, self.rows - first) :] = -torch.inf
        return slope

    def trained(self) -> list[nn.Parameter]:
        """The head's parameters that want a gradient; mostly none."""
        return [values for values in self.module.parameters() if values.requires_grad]


def head_of(model: nn.Module) -> Head:
    """What gives a model's predictions: a classifier's head, or else the language model's own."""
    score = anatomy.score(model)
    return token_head(model) if score is None else Head(score)


def token_head(model: nn.Module) -> Head:
    """The output head of a causal language model, with the scaling that its family puts on logits."""
    module = anatomy.head(model)
    assert module is not None
    return Head(module, *anatomy.logit_scale(model), anatomy.logit_rows(model))


def hidden_states(model: nn.Module, batch: Mapping[str, Any]) -> Tensor:
    """The last hidden states [B, T, D] of ``input_ids`` and ``position_ids``, without logits and without a cache.

    Where examples begin is said by ``mask`` (``PackedMask``), or else by the positions, for which a GPU has to be waited for.
    """
    given = {"input_ids": batch["input_ids"], "position_ids": batch["position_ids"]}
    packed: AbstractContextManager[None] = nullcontext()
    mask = batch["mask"] if "mask" in batch else PackedMask.of(batch["position_ids"])
    if mask.packed:
        packed = packed_rows(mask)
        if keeps_apart(model):
            # with a mask of padding, of which there is none, transformers does not look for restarts
            given["attention_mask"] = torch.ones_like(given["input_ids"], dtype=torch.bool)
    with packed:
        output = anatomy.decoder(model)(**given, use_cache=False, return_dict=True)
    hidden_BTD: Tensor = output.last_hidden_state
    transform = anatomy.before_head(model)
    return hidden_BTD if transform is None else transform(hidden_BTD)


def batch_loss(model: nn.Module, batch: Mapping[str, Any], chunk: int = 256) -> tuple[Tensor, int]:
    """(summed cross-entropy, target tokens) of a batch with ``labels`` [B, T] aligned with its ``input_ids``."""
    return token_loss(hidden_states(model, batch), head_of(model), batch["labels"], chunk)


def token_loss(hidden_BTD: Tensor, head: Head, labels_BT: Tensor, chunk: int = 256) -> tuple[Tensor, int]:
    """(cross-entropy summed over target tokens, a scalar in fp32; how many they are).

    Position t predicts ``labels[t + 1]``; labels of ``IGNORE_INDEX`` count for nothing. ``chunk`` bounds how many
    positions have logits at the same time: 4 · chunk · V bytes, 8 with a cap, and the product in the head's dtype. Labels on
    the CPU are looked at there; of a GPU's the host would have to wait for all that was launched before.
    """
    # the last position predicts nothing; with it the hidden states are one matrix as they lie, without it a copy
    wanted_N = F.pad(labels_BT[:, 1:], (0, 1), value=IGNORE_INDEX).reshape(-1)
    places, device = (wanted_N != IGNORE_INDEX).nonzero().squeeze(1), hidden_BTD.device
    wanted_N, places = wanted_N.to(device, non_blocking=True), places.to(device, non_blocking=True)
    return summed_loss(hidden_BTD.flatten(0, 1), head, wanted_N, places, chunk), len(places)


def summed_loss(hidden_ND: Tensor, head: Head, wanted_N: Tensor, places: Tensor, chunk: int = 256) -> Tensor:
    """The cross-entropy, a scalar in fp32, summed over the positions ``places``, where ``wanted_N`` says which token follows.

    For whoever knows how many targets there are without a look at them, as a rehearsal on tensors without values.
    """
    trained = head.trained() if torch.is_grad_enabled() else []
    return _TokenLoss.apply(hidden_ND, head, wanted_N, places, chunk, *trained)


def grouped_loss(
    hidden_BTD: Tensor, head: Head, labels_BT: Tensor, groups: Tensor, count: int, chunk: int = 256
) -> Tensor:
    """The cross-entropy summed within each of ``count`` groups of target tokens, [count] in float64.

    ``labels_BT`` as in ``token_loss``, on the CPU; ``groups``, int64, says to which group each target belongs, in their order
    in ``labels_BT``. Any function of the sums has its gradient by one pass through the model: that of the hidden states is made
    in forward as if every weight were 1, and each position's is multiplied by its group's in backward.
    """
    wanted_N = F.pad(labels_BT[:, 1:], (0, 1), value=IGNORE_INDEX).reshape(-1)
    places, device = (wanted_N != IGNORE_INDEX).nonzero().squeeze(1), hidden_BTD.device
    given = (values.to(device, non_blocking=True) for values in (wanted_N, places, groups))
    trained = head.trained() if torch.is_grad_enabled() else []
    return _GroupedLoss.apply(hidden_BTD.flatten(0, 1), head, *given, count, chunk, *trained)


class _GroupedLoss(torch.autograd.Function):
    """A head that trains gets its gradient in backward, when the weights are known: each chunk's logits are made again."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden_ND: Tensor,
        head: Head,
        wanted: Tensor,
        places: Tensor,
        groups: Tensor,
        count: int,
        chunk: int,
        *trained: Tensor,
    ) -> Tensor:
        below = ctx.needs_input_grad[0] and not trained
        if (sliced := _sliced(head.module)) is not None and not trained:
            each, grad_ND = _over_slices(hidden_ND, head, sliced, wanted, places, chunk, below)
        else:
            each, grad_ND = _over_chunks(hidden_ND, head, wanted, places, chunk, below, (), [])
        ctx.head, ctx.chunk, ctx.trained, ctx.dtype = head, chunk, trained, hidden_ND.dtype
        ctx.save_for_backward(hidden_ND if trained else grad_ND, wanted, places, groups)
        return torch.zeros(count, dtype=torch.float64, device=each.device).index_add_(0, groups, each)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        kept_ND, wanted, places, groups = ctx.saved_tensors
        weights, trained = grad[groups].float(), ctx.trained
        grads = [torch.zeros_like(values, dtype=torch.float32) for values in trained]
        if trained:
            _, hidden = _over_chunks(
                kept_ND, ctx.head, wanted, places, ctx.chunk, ctx.needs_input_grad[0], trained, grads, weights
            )
        else:
            of_position = torch.zeros(len(kept_ND), 1, device=kept_ND.device)
            of_position[places, 0] = weights
            hidden = _times_(kept_ND, of_position, ctx.chunk)
        own = [values.to(parameter.dtype) for values, parameter in zip(grads, trained, strict=True)]
        return None if hidden is None else hidden.to(ctx.dtype), None, None, None, None, None, None, *own


class _TokenLoss(torch.autograd.Function):
    """``trained`` are the parameters of a head that trains; they get their gradients, like the hidden states, in forward."""

    @staticmethod
    def forward(
        ctx: Any, hidden_ND: Tensor, head: Head, wanted: Tensor, places: Tensor, chunk: int, *trained: Tensor
    ) -> Tensor:
        below = ctx.needs_input_grad[0]  # nothing below the head may train
        grads = [torch.zeros_like(values, dtype=torch.float32) for values in trained]
        if (sliced := _sliced(head.module)) is not None and not trained:
            each, grad_ND = _over_slices(hidden_ND, head, sliced, wanted, places, chunk, below)
        else:
            each, grad_ND = _over_chunks(hidden_ND, head, wanted, places, chunk, below, trained, grads)
        ctx.save_for_backward(grad_ND, *grads)
        ctx.chunk, ctx.dtypes = chunk, [hidden_ND.dtype, *(values.dtype for values in trained)]
        return each.sum().float()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        hidden, *trained = [
            None if values is None else _times_(values, grad, ctx.chunk).to(dtype)
            for values, dtype in zip(ctx.saved_tensors, ctx.dtypes, strict=True)
        ]
        return hidden, None, None, None, None, *trained


def _times_(values: Tensor, factor: Tensor, rows: int) -> Tensor:
    """``values`` times a scalar, or a number a row [N, 1], in place. A second backward through the same loss would find them
    changed; torch refuses it."""
    if values.dtype == torch.float32:
        return values.mul_(factor)
    size = max(rows, -(-len(values) // PIECES))
    factors = factor.expand(len(values), 1)
    for part, by in zip(values.split(size), factors.split(size), strict=True):
        part.copy_(part.float() * by)  # the factor, one over many tokens, is not to be rounded to 8 bits
    return values


def _empty_gradient(hidden_ND: Tensor) -> Tensor:
    """Zeros for the gradient of the hidden states, in their dtype.

    fp32 under fp16: the gradient is not scaled against underflow until backward multiplies it.
    """
    dtype = torch.float32 if hidden_ND.dtype == torch.float16 else hidden_ND.dtype
    return torch.zeros_like(hidden_ND, dtype=dtype, memory_format=torch.contiguous_format)


def _exp_(logits_NV: Tensor) -> tuple[Tensor, Tensor]:
    """(the log-sum-exp of each position [N, 1], what the logits' exponentials are divided by to be a softmax).

    The logits become these exponentials, so that no second tensor of their size is made.
    """
    top = logits_NV.amax(1, keepdim=True)
    sums = logits_NV.sub_(top).exp_().sum(1, keepdim=True)
    return top + sums.log(), sums


def _over_chunks(
    hidden_ND: Tensor,
    head: Head,
    wanted: Tensor,
    places: Tensor,
    chunk: int,
    below: bool,
    trained: tuple[Tensor, ...],
    grads: list[Tensor],
    weights: Tensor | None = None,
) -> tuple[Tensor, Tensor | None]:
    """(the loss of each of ``places`` in float64, the gradient of the hidden states where it is wanted), chunk by chunk;
    ``grads`` grow. ``weights``: what the loss of each place is multiplied by before these gradients, 1 where left out."""
    each = torch.empty(len(places), dtype=torch.float64, device=hidden_ND.device)
    grad_ND = _empty_gradient(hidden_ND) if below else None
    for start in range(0, len(places), chunk):
        at = slice(start, start + chunk)
        rows = places[at]
        targets = wanted[rows, None]
        with torch.set_grad_enabled(bool(trained)):
            chunk_ND = hidden_ND[rows].detach().requires_grad_(below and bool(trained))
            product_NV = head.module(chunk_ND)
        # a product that is fp32 already is not written over: its own backward may want it
        logits_NV = product_NV.detach().to(torch.float32, copy=bool(trained))
        if not trained:
            del product_NV
        slope = head.scale_(logits_NV, sloped=below or bool(trained))
        picked = logits_NV.gather(1, targets)
        log_sum, sums = _exp_(logits_NV)
        each[at] = (log_sum - picked).squeeze(1)
        if below or trained:
            # d loss / d logits = softmax - one hot; then through the cap and the multiplier
            grad_NV = logits_NV.div_(sums)
            grad_NV.scatter_add_(1, targets, torch.full_like(log_sum, -1.0))
            if weights is not None:
                grad_NV *= weights[at, None]
            if slope is not None:
                grad_NV *= slope
            if trained:
                _through_head(product_NV, grad_NV, chunk_ND, rows, grad_ND, trained, grads)
                del product_NV
            elif grad_ND is not None:
                weight_VD = dense_weight(head.module, hidden_ND.dtype)
                grad_ND[rows] = (grad_NV.to(weight_VD.dtype) @ weight_VD).to(grad_ND.dtype)
            del grad_NV
        del logits_NV, slope  # before the next chunk's are made
    return each, grad_ND


def _over_slices(
    hidden_ND: Tensor, head: Head, linear: SlicedLinear, wanted: Tensor, places: Tensor, chunk: int, below: bool
) -> tuple[Tensor, Tensor | None]:
    """(the loss of each of ``places`` in float64, the gradient of the hidden states where it is wanted), slice by slice of the head.

    A chunk takes as much memory as one of a whole head's logits: so many more positions as a slice has fewer columns. On
    an H100 a 70B model's step of 8,192 tokens took 2.9 s with chunks of 64 positions, most of it in launches.
    """
    chunk *= max(1, linear.out_features // max(linear.rows, hidden_ND.shape[1]))
    dtype, targets, count = hidden_ND.dtype, wanted[places, None], len(places)
    chunks = [slice(start, start + chunk) for start in range(0, count, chunk)]
    # in fp64 a sum of many slices' sums is rounded once; NaN until a target's slice was there
    log_sums = torch.full((count, 1), -torch.inf, dtype=torch.float64, device=hidden_ND.device)
    picked = torch.full((count, 1), torch.nan, device=hidden_ND.device)

    def logits_of(
        at: slice, start: int, stop: int, weight: Tensor, sloped: bool
    ) -> tuple[Tensor, Tensor | float | None]:
        bias = linear.bias_of(start, stop, dtype)
        logits_NV = F.linear(hidden_ND[places[at]], weight, bias).float()
        return logits_NV, head.scale_(logits_NV, sloped, start)

    def targets_in(at: slice, start: int, stop: int) -> tuple[Tensor, Tensor]:
        """(the targets' places in the slice, whether they are there at all)."""
        inside = (targets[at] >= start) & (targets[at] < stop)
        return (targets[at] - start).clamp(0, stop - start - 1), inside

    for start, stop, weight in linear.slices(dtype) if count else ():
        for at in chunks if head.rows is None or start < head.rows else ():
            logits_NV, _ = logits_of(at, start, stop, weight, sloped=False)
            place, inside = targets_in(at, start, stop)
            picked[at] = torch.where(inside, logits_NV.gather(1, place), picked[at])
            log_sums[at] = torch.logaddexp(log_sums[at], _exp_(logits_NV)[0].double())
            del logits_NV
    each = (log_sums - picked).squeeze(1)
    if not below:
        return each, None
    grads = torch.zeros(count, hidden_ND.shape[1], device=hidden_ND.device)  # fp32: a sum over the slices
    for start, stop, weight in linear.slices(dtype) if count else ():
        for at in chunks if head.rows is None or start < head.rows else ():
            logits_NV, slope = logits_of(at, start, stop, weight, sloped=True)
            place, inside = targets_in(at, start, stop)
            grad_NV = logits_NV.sub_(log_sums[at].float()).exp_()
            grad_NV.scatter_add_(1, place, -inside.to(grad_NV.dtype))
            if slope is not None:
                grad_NV *= slope
            grads[at] += fp32_product(grad_NV.to(dtype), weight)
            del logits_NV, slope, grad_NV
    grad_ND = _empty_gradient(hidden_ND)
    for at in chunks:
        grad_ND[places[at]] = grads[at].to(grad_ND.dtype)
    return each, grad_ND


def _through_head(
    product_NV: Tensor,
    grad_NV: Tensor,
    chunk_ND: Tensor,
    rows: Tensor,
    grad_ND: Tensor | None,
    trained: tuple[Tensor, ...],
    grads: list[Tensor],
) -> None:
    """The gradients of one chunk behind a head that trains: ``grad_ND[rows]`` is set, ``grads`` grow.

    Only the head itself is asked of autograd: its product has the graph, the arithmetic on logits has none.
    """
    if not product_NV.requires_grad:  # the head is switched off, and nothing below it trains
        return
    wanted = [*trained, chunk_ND] if grad_ND is not None else [*trained]
    found = torch.autograd.grad(product_NV, wanted, grad_NV.to(product_NV.dtype), allow_unused=True)
    for total, part in zip(grads, found, strict=False):
        if part is not None:
            total += part
    if grad_ND is not None:
        hidden = found[-1]
        assert hidden is not None
        grad_ND[rows] = hidden.to(grad_ND.dtype)


WIDENED = 256  # terms of each sum that a CPU has in fp32 at one time
_OPERATORS = torch.library.Library("qlora", "DEF")  # an operator, so that a plan sees one kernel and not what is inside
_OPERATORS.define("fp32_product(Tensor x, Tensor y) -> Tensor")


@torch.library.impl(_OPERATORS, "fp32_product", "CompositeExplicitAutograd")
def _fp32_product(x: Tensor, y: Tensor) -> Tensor:
    if x.dtype == torch.float32:
        return x @ y
    if x.is_cuda:
        return torch.mm(x, y, out_dtype=torch.float32)
    product = torch.zeros(len(x), y.shape[1])
    for start in range(0, len(y), WIDENED):  # a CPU has no such kernel: both factors in fp32, in pieces
        at = slice(start, start + WIDENED)
        product.addmm_(x[:, at].float(), y[at].float())
    return product


@torch.library.register_fake("qlora::fp32_product", lib=_OPERATORS)
def _shape_of_product(x: Tensor, y: Tensor) -> Tensor:
    return x.new_empty(len(x), y.shape[1], dtype=torch.float32)


def fp32_product(x: Tensor, y: Tensor) -> Tensor:
    """x y, the sums left in fp32 as they are made: what is summed up further is not to be rounded to 16 bits in between."""
    return torch.ops.qlora.fp32_product(x, y)
