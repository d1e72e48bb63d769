"""The loss: summed cross-entropy over target tokens, in chunks, never the full logits.

The logits of a step are its largest tensor by far (vocabulary × tokens × 12 bytes and more). Here only ``chunk`` positions
have logits at a time, only positions that are targets have them at all, and the gradient of the hidden states is made in
the forward, while the chunk's logits are at hand; nothing but that gradient is kept. The head is frozen and needs none.

Knows a model's decoder and head; must not know adapters, optimizers or where batches come from.

Shape suffixes: B rows, T positions, D hidden size, N target positions, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

IGNORE_INDEX = -100


@dataclass(frozen=True)
class Head:
    """What turns hidden states into logits: ``softcap · tanh(multiplier · (h Wᵀ + b) / softcap)``."""

    weight_VD: Tensor
    bias_V: Tensor | None = None
    multiplier: float = 1.0
    softcap: float | None = None

    def logits(self, hidden_ND: Tensor) -> Tensor:
        """Logits [N, V] in fp32. Only the product has the head's dtype: a model that caps in bf16 rounds twice more."""
        logits_NV = torch.nn.functional.linear(hidden_ND, self.weight_VD, self.bias_V).float()
        if self.multiplier != 1.0:
            logits_NV = logits_NV * self.multiplier
        if self.softcap is not None:
            logits_NV = torch.tanh(logits_NV / self.softcap) * self.softcap
        return logits_NV


def head_of(model: Any) -> Head:
    """The output head of a causal language model, with the scaling that its family puts on logits."""
    head = model.get_output_embeddings()
    config = model.config
    multiplier = 1.0
    if scale := getattr(config, "logit_scale", None):  # Cohere multiplies
        multiplier *= scale
    if scale := getattr(config, "logits_scaling", None):  # Granite divides
        multiplier /= scale
    softcap = getattr(config, "final_logit_softcapping", None)  # Gemma 2
    return Head(head.weight, getattr(head, "bias", None), multiplier, softcap)


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
    loss: Tensor = _TokenLoss.apply(flat_ND, head, wanted, places, chunk)
    return loss, len(places)


class _TokenLoss(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, hidden_ND: Tensor, head: Head, wanted: Tensor, places: Tensor, chunk: int) -> Tensor:
        total = torch.zeros((), dtype=torch.float64, device=hidden_ND.device)
        # fp32 even under fp16: the gradient is not scaled against underflow until backward multiplies it
        grad_ND = torch.zeros_like(hidden_ND, dtype=torch.float32) if ctx.needs_input_grad[0] else None
        for rows in places.split(chunk):
            targets = wanted[rows, None]
            logits_NV = head.logits(hidden_ND[rows])
            log_sum = logits_NV.logsumexp(1, keepdim=True)
            total += (log_sum - logits_NV.gather(1, targets)).double().sum()
            if grad_ND is None:
                continue
            # d loss / d logits = softmax - one hot; through tanh: times 1 - (logits / softcap)²
            slope_NV = None if head.softcap is None else 1 - (logits_NV / head.softcap) ** 2
            grad_NV = logits_NV.sub_(log_sum).exp_()
            grad_NV.scatter_add_(1, targets, torch.full_like(log_sum, -1.0))
            if slope_NV is not None:
                grad_NV *= slope_NV
            if head.multiplier != 1.0:
                grad_NV *= head.multiplier
            grad_ND[rows] = (grad_NV.to(head.weight_VD.dtype) @ head.weight_VD).float()
            del logits_NV, grad_NV, slope_NV  # before the next chunk's are made
        if grad_ND is not None:
            ctx.save_for_backward(grad_ND)
        ctx.dtype = hidden_ND.dtype
        return total.float()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        (grad_ND,) = ctx.saved_tensors
        return (grad_ND * grad).to(ctx.dtype), None, None, None, None
