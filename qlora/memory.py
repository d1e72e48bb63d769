"""Memory: what a run will hold, by kind, from shapes alone, and whether that fits.

    estimate(skeleton, …) → bytes by kind          check(…) → DoesNotFitError with the table

Everything is counted from the model on the meta device with its method planted, so no weight is read. What is counted
exactly: weights, adapter, gradients, optimizer. What is modelled: layer inputs, the working set of one layer, the loss
chunk, and the runtime that torch and its libraries take for themselves.

Shorthand: d hidden size, f intermediate size, V vocabulary, T length of a row, c bytes of a compute number.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from qlora.config import TrainingSection
from qlora.device import GIB, bytes_text, total_memory_bytes
from qlora.errors import DoesNotFitError
from qlora.methods import AdaptedModel
from qlora.model.layers import decoder_layers
from qlora.model.nf4 import FrozenLinear

RUNTIME = {"cpu": int(0.8 * GIB), "cuda": int(0.6 * GIB)}
"""What a process holds beside what is counted here: on a CPU the libraries (0.45 GiB) and what the C heap keeps of freed
tensors (0.3 to 0.4 GiB in the quickstart); on a GPU the CUDA context and its workspaces."""

SMALL = 4096  # bitsandbytes' 8-bit optimizers keep the moments of smaller matrices in 32 bits

EAGER_SCORES = 2  # attention's softmax and its gradient, [rows, heads, T, T], where no fused kernel does without them


@dataclass(frozen=True)
class Estimate:
    """Bytes by kind."""

    quantised_weights: int
    other_weights: int
    adapter: int
    gradients: int
    optimizer: int
    layer_inputs: int
    layer_working_set: int
    loss_chunk: int
    runtime: int

    @property
    def total(self) -> int:
        """The most at one time: the loss chunk is gone when the backward of the layers begins."""
        return sum(vars(self).values()) - min(self.layer_working_set, self.loss_chunk)

    def as_dict(self) -> dict[str, int]:
        """Kinds and their ``total``."""
        return {**vars(self), "total": self.total}

    def __str__(self) -> str:
        rows = [f"  {kind.replace('_', ' '):<20}{bytes_text(count):>12}" for kind, count in self.as_dict().items()]
        return "\n".join(rows)


def estimate(
    adapted: AdaptedModel, training: TrainingSection, length: int, device: torch.device, packing: bool = False
) -> Estimate:
    """What training ``adapted`` (weights may be on meta) takes on ``device``, for rows of ``length`` tokens.

    ``packing`` says that rows hold several examples, which SDPA keeps apart by a mask [rows, T, T].
    """
    model: Any = adapted.model
    config = model.config
    c = adapted.base.compute_dtype.itemsize
    trainable = adapted.trainable_parameters()
    adapter = sum(p.numel() * p.dtype.itemsize for p in trainable.values())
    quantised, other = weight_bytes(model, {id(p) for p in trainable.values()})

    d = config.hidden_size
    f = getattr(config, "intermediate_size", None) or 4 * d
    layers = config.num_hidden_layers
    layer_major = training.gradient_checkpointing and training.accumulation == "layer_major"
    micro = min(training.micro_batch_size, training.batch_size) * length
    in_model = training.batch_size * length if layer_major else micro

    # what autograd keeps of one layer: both norms' outputs, q, k and v for every head, attention's output, the residual
    # and the layer's output; gate, silu(gate), up and their product. Below fp32 the norms keep their inputs in fp32.
    kept = micro * (c * (8 * d + 4 * f) + (8 * d if c < 4 else 0))
    one = decoder_layers(model)[0] if training.gradient_checkpointing else model
    dense = [m.in_features * m.out_features * c for m in one.modules() if isinstance(m, FrozenLinear)]
    unpacked = sum(dense) if layer_major and training.batch_size > training.micro_batch_size else max(dense, default=0)
    # backward holds the gradients of silu(gate) and up before it drops what they were made from
    working = micro * c * 2 * f + unpacked
    if training.gradient_checkpointing:
        # every layer's input and the last one's output; in backward that place is the gradient's, which has two
        inputs, working = in_model * d * c * (layers + 2), working + kept
    else:
        inputs = kept * layers + in_model * d * c * 2
    attention = str(getattr(config, "_attn_implementation", None))
    if packing and "flash" not in attention:
        inputs += in_model * length  # one byte for every pair of positions
        working += micro * length * c  # and what the kernel makes of it
    if attention == "eager":
        scores = micro * length * config.num_attention_heads
        working += scores * EAGER_SCORES * c
        inputs += 0 if training.gradient_checkpointing else scores * c * (layers - 1)
    # a chunk has logits and the room of logsumexp
    logits = 8 * min(training.loss_chunk, in_model) * config.vocab_size
    return Estimate(
        quantised_weights=quantised,
        other_weights=other,
        adapter=adapter,
        gradients=adapter,
        optimizer=sum(_moments(p.numel(), training.optimizer) for p in trainable.values()),
        layer_inputs=inputs,
        layer_working_set=working,
        loss_chunk=logits + in_model * d * (4 + c),  # and the hidden states' gradient
        runtime=RUNTIME[device.type],
    )


def _moments(count: int, optimizer: str) -> int:
    """Bytes of the two moments of ``count`` parameters: in fp32, or in 8 bits with an fp32 scale for each block of 256."""
    return 2 * count + 8 * -(-count // 256) if optimizer.endswith("8bit") and count >= SMALL else 8 * count


def weight_bytes(model: nn.Module, trainable: set[int]) -> tuple[int, int]:
    """(bytes of quantised linears with their scales, bytes of every other frozen weight); shared weights count once."""
    quantised = other = 0
    seen = set(trainable)
    for module in model.modules():
        packed = isinstance(module, FrozenLinear)
        for tensor in (*module.parameters(recurse=False), *module.buffers(recurse=False)):
            if id(tensor) in seen:
                continue
            seen.add(id(tensor))
            size = tensor.numel() * tensor.dtype.itemsize
            if packed:
                quantised += size
            else:
                other += size
    return quantised, other


def check(needed: Estimate, device: torch.device, training: TrainingSection) -> str:
    """One sentence that says it fits. Raises DoesNotFitError with the table and the smallest change when it does not."""
    free, total = total_memory_bytes(device)
    if not free:
        return "The free memory of this device is not known, so the estimate was not checked against it."
    place = "this GPU" if device.type == "cuda" else "this machine"
    if needed.total > free:
        changes = ["training.micro_batch_size=1"] if training.micro_batch_size > 1 else []
        if training.accumulation == "layer_major":
            changes.append("training.accumulation=micro_batch_major")
        changes += ["data.max_length lower", "training.optimizer=paged_adamw_8bit"]
        raise DoesNotFitError(
            f"About {bytes_text(needed.total)} are needed, but {bytes_text(free)} of the {bytes_text(total)} of {place} "
            f"are free:\n{needed}\nTry {', '.join(changes)}, a smaller model, or stop what else is running."
        )
    return f"About {bytes_text(needed.total)} of the {bytes_text(free)} that are free on {place} will be needed."
