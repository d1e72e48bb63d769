"""The loss: summed cross-entropy over target tokens, in chunks, never the full logits.

The logits of a step are its largest tensor by far (vocabulary × tokens × 12 bytes and more). Here only ``chunk`` positions
have logits at a time, only positions that are targets have them at all, and the gradient of the hidden states is made in
the forward, while the chunk's logits are at hand; nothing but that gradient is kept. A frozen head needs none; one that
trains (a head of its own, full fine-tuning, rows of new tokens) gets its own in the same way, summed up in fp32.

Knows a model's decoder and head; must not know adapters, optimizers or where batches come from.

Shape suffixes: B rows, T positions, D hidden size, N target positions, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from qlora.model.nf4 import dense_weight

IGNORE_INDEX = -100


@dataclass(frozen=True)
class Head:
    """What turns hidden states into logits: ``softcap · tanh(multiplier · module(h) / softcap)``."""

    module: nn.Module
    multiplier: float = 1.0
    softcap: float | None = None

    def logits(self, hidden_ND: Tensor) -> Tensor:
        """Logits [N, V] in fp32. Only the product has the head's dtype: a model that caps in bf16 rounds twice more."""
        return self.scaled(self.module(hidden_ND))

    def scaled(self, product_NV: Tensor) -> Tensor:
        """The logits in fp32 of what ``module`` gave."""
        logits_NV = product_NV.float()
        if self.multiplier != 1.0:
            logits_NV = logits_NV * self.multiplier
        if self.softcap is not None:
            logits_NV = torch.tanh(logits_NV / self.softcap) * self.softcap
        return logits_NV

    def trained(self) -> list[nn.Parameter]:
        """The head's parameters that want a gradient; mostly none."""
        return [values for values in self.module.parameters() if values.requires_grad]


def head_of(model: Any) -> Head:
    """The output head of a causal language model, with the scaling that its family puts on logits."""
    config = model.config
    multiplier = 1.0
    if scale := getattr(config, "logit_scale", None):  # Cohere multiplies
        multiplier *= scale
    if scale := getattr(config, "logits_scaling", None):  # Granite divides
        multiplier /= scale
    softcap = getattr(config, "final_logit_softcapping", None)  # Gemma 2
    return Head(model.get_output_embeddings(), multiplier, softcap)


def hidden_states(model: Any, batch: Mapping[str, Tensor]) -> Tensor:
    """The last hidden states [B, T, D] of ``input_ids`` and ``position_ids``, without logits and without a cache."""
    output = model.get_decoder()(
        input_ids=batch["input_ids"], position_ids=batch["position_ids"], use_cache=False, return_dict=True
    )
    hidden_BTD: Tensor = output.last_hidden_state
    return hidden_BTD


def batch_loss(model: Any, batch: Mapping[str, Tensor], chunk: int = 256) -> tuple[Tensor, int]:
    """(summed cross-entropy, target tokens) of a batch with ``labels`` [B, T] aligned with its ``input_ids``."""
    return token_loss(hidden_states(model, batch), head_of(model), batch["labels"], chunk)


def token_loss(hidden_BTD: Tensor, head: Head, labels_BT: Tensor, chunk: int = 256) -> tuple[Tensor, int]:
    """(cross-entropy summed over target tokens, a scalar in fp32; how many they are).

    Position t predicts ``labels[t + 1]``; labels of ``IGNORE_INDEX`` count for nothing. ``chunk`` bounds how many
    positions have logits at the same time: 6 · chunk · V bytes or so.
    """
    flat_ND = hidden_BTD[:, :-1].reshape(-1, hidden_BTD.shape[-1])
    wanted = labels_BT[:, 1:].reshape(-1)
    places = (wanted != IGNORE_INDEX).nonzero().squeeze(1)
    trained = head.trained() if torch.is_grad_enabled() else []
    loss: Tensor = _TokenLoss.apply(flat_ND, head, wanted, places, chunk, *trained)
    return loss, len(places)


class _TokenLoss(torch.autograd.Function):
    """``trained`` are the parameters of a head that trains; they get their gradients, like the hidden states, in forward."""

    @staticmethod
    def forward(
        ctx: Any, hidden_ND: Tensor, head: Head, wanted: Tensor, places: Tensor, chunk: int, *trained: Tensor
    ) -> Tensor:
        total = torch.zeros((), dtype=torch.float64, device=hidden_ND.device)
        below = ctx.needs_input_grad[0]  # nothing below the head may train
        # fp32 even under fp16: the gradient is not scaled against underflow until backward multiplies it
        grad_ND = torch.zeros_like(hidden_ND, dtype=torch.float32) if below else None
        grads = [torch.zeros_like(values, dtype=torch.float32) for values in trained]
        for rows in places.split(chunk):
            targets = wanted[rows, None]
            with torch.set_grad_enabled(bool(trained)):
                chunk_ND = hidden_ND[rows].detach().requires_grad_(below and bool(trained))
                product_NV = head.module(chunk_ND)
            logits_NV = head.scaled(product_NV.detach())
            log_sum = logits_NV.logsumexp(1, keepdim=True)
            total += (log_sum - logits_NV.gather(1, targets)).double().sum()
            if not any(ctx.needs_input_grad):
                continue
            # d loss / d logits = softmax - one hot; through tanh: times 1 - (logits / softcap)²
            slope_NV = None if head.softcap is None else 1 - (logits_NV / head.softcap) ** 2
            # a product that is fp32 already is not written over: its own backward may want it
            grad_NV = (logits_NV - log_sum if trained else logits_NV.sub_(log_sum)).exp_()
            del logits_NV
            grad_NV.scatter_add_(1, targets, torch.full_like(log_sum, -1.0))
            if slope_NV is not None:
                grad_NV *= slope_NV
            if head.multiplier != 1.0:
                grad_NV *= head.multiplier
            if trained:
                _through_head(product_NV, grad_NV, chunk_ND, rows, grad_ND, trained, grads)
            elif grad_ND is not None:
                weight_VD = dense_weight(head.module, hidden_ND.dtype)
                grad_ND[rows] = (grad_NV.to(weight_VD.dtype) @ weight_VD).float()
            del product_NV, grad_NV, slope_NV  # before the next chunk's are made
        ctx.save_for_backward(grad_ND, *grads)
        ctx.dtypes = [hidden_ND.dtype, *(values.dtype for values in trained)]
        return total.float()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        hidden, *trained = [
            None if values is None else (values * grad).to(dtype)
            for values, dtype in zip(ctx.saved_tensors, ctx.dtypes, strict=True)
        ]
        return hidden, None, None, None, None, *trained


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
        grad_ND[rows] = hidden.float()
