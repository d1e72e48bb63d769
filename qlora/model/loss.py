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

from qlora.errors import ModelError

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


@torch.no_grad()
def check_loss_path(model: Any, ids: list[int]) -> None:
    """Raise ModelError unless our head gives the model's own logits on a few tokens.

    A family may do something to its logits that ``head_of`` does not know; its loss would then be wrong in silence.
    """
    input_ids = torch.tensor([ids[:8]], device=next(model.parameters()).device)
    position_ids = torch.arange(input_ids.shape[1], device=input_ids.device)[None]
    theirs = model(input_ids=input_ids, position_ids=position_ids, use_cache=False).logits.float()
    ours = head_of(model).logits(hidden_states(model, {"input_ids": input_ids, "position_ids": position_ids}))
    difference = (theirs - ours).abs().max().item()
    if not difference <= 1e-2 * max(1.0, theirs.abs().max().item()):
        raise ModelError(
            f"The logits of this {model.config.model_type} model differ from its hidden states times its head by "
            f"{difference:.3g}: it does something to them that qlora does not know, so its loss would be wrong. "
            "Take another model, or report the model type."
        )


def packs_one_row(model: Any) -> bool:
    """Whether packed rows must go through a layer one at a time.

    With FlashAttention transformers looks for positions that restart in batches of one row only; in larger ones packed
    examples see each other, without a word.
    """
    return "flash" in str(getattr(model.config, "_attn_implementation", None))


@torch.no_grad()
def check_packing(model: Any, ids: list[int], rows: int = 1) -> None:
    """Raise ModelError unless a packed example is blind to its neighbour: same hidden states packed as alone.

    ``rows`` is how many rows go through a layer at once in training.
    """
    half = max(2, len(ids[:16]) // 2)
    second = ids[half : 2 * half]
    if len(second) < 2:
        return
    device = next(model.parameters()).device
    positions = [*range(half), *range(len(second))]
    packed = {"input_ids": [ids[:half] + second] * rows, "position_ids": [positions] * rows}
    alone = {"input_ids": [second], "position_ids": [list(range(len(second)))]}
    states = [
        hidden_states(model, {key: torch.tensor(value, device=device) for key, value in batch.items()}).float()
        for batch in (packed, alone)
    ]
    difference = (states[0][:, half:] - states[1]).abs().max().item()
    if not difference <= 2e-2 * max(1.0, states[1].abs().max().item()):
        raise ModelError(
            f"Packed examples see each other in this {model.config.model_type} model (hidden states differ by "
            f"{difference:.3g} from the example alone, {rows} rows at once); set data.packing=false"
            + (" or training.micro_batch_size=1." if rows > 1 and packs_one_row(model) else ".")
        )
