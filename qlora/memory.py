"""Memory: what a run will hold, by kind, from shapes alone, and whether that fits.

    estimate(skeleton, …) → bytes by kind          check(…) → DoesNotFitError with the table

Everything is counted from the model on the meta device with its method planted, so no weight is read. What is counted
exactly: weights, adapter, gradients, optimizer, method state. What is modelled: layer inputs, the working set of one layer, the loss
chunk, and the runtime that torch and its libraries take for themselves.

Shorthand: d hidden size, f intermediate size, V vocabulary, T length of a row, c bytes of a compute number.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from qlora.accounting import bytes_of, moments
from qlora.config import TrainingSection
from qlora.device import GIB, bytes_text, total_memory_bytes
from qlora.errors import DoesNotFitError, ModelError
from qlora.methods import AdaptedModel
from qlora.model.layers import decoder_layers
from qlora.model.nf4 import FrozenLinear

RUNTIME = {"cpu": int(0.8 * GIB), "cuda": int(0.6 * GIB)}
"""What a process holds beside what is counted here: on a CPU the libraries (0.45 GiB) and what the C heap keeps of freed
tensors (0.3 to 0.4 GiB in the quickstart); on a GPU the CUDA context and its workspaces."""

EAGER_SCORES = 2  # attention's softmax and its gradient, [rows, heads, T, T], where no fused kernel does without them


@dataclass(frozen=True)
class Estimate:
    """Bytes by kind."""

    quantised_weights: int
    other_weights: int
    adapter: int
    gradients: int
    optimizer: int
    method_state: int
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
    beside = beside_parameters(adapted)
    elsewhere = {values.untyped_storage()._cdata for values in beside}  # PiSSA keeps these in its layers
    counted = {id(values) for values in model.buffers() if values.untyped_storage()._cdata in elsewhere}
    quantised, other = weight_bytes(model, counted | {id(p) for p in trainable.values()})

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
    with_graph = layers - untrained_layers(model, {id(p) for p in trainable.values()})
    if training.gradient_checkpointing:
        # every layer's input from the lowest that trains, and the last one's output; in backward that place is the
        # gradient's, which has two
        inputs, working = in_model * d * c * (with_graph + 2), working + kept
    else:
        inputs = kept * with_graph + in_model * d * c * 2
    if not with_graph:  # a head alone: what a forward holds, of the MLP three and of attention two
        working = micro * c * (2 * d + 3 * f) + unpacked
    attention = str(getattr(config, "_attn_implementation", None))
    if packing and "flash" not in attention:
        inputs += in_model * length  # one byte for every pair of positions
        working += micro * length * c  # and what the kernel makes of it
    if attention == "eager":
        scores = micro * length * config.num_attention_heads
        working += scores * EAGER_SCORES * c
        inputs += 0 if training.gradient_checkpointing else scores * c * max(0, with_graph - 1)
    # the head's own gradient, where it trains, is summed up in fp32 and once more while it is handed over
    head = model.get_output_embeddings()
    trained_head = 8 * sum(p.numel() for p in head.parameters() if id(p) in {id(t) for t in trainable.values()})
    # a chunk has logits and the room of logsumexp
    logits = 8 * min(training.loss_chunk, in_model) * config.vocab_size
    loss = logits + in_model * d * (4 + c) + trained_head  # and the hidden states' gradient
    if in_model >= training.batch_size * length:
        # one pass a step: the loss is taken before there are gradients, in the room that they will need
        loss = max(0, loss - adapter)
    return Estimate(
        quantised_weights=quantised,
        other_weights=other,
        adapter=adapter,
        gradients=adapter,
        optimizer=sum(moments(p.numel(), training.optimizer) for p in trainable.values()),
        method_state=bytes_of(beside),
        layer_inputs=inputs,
        layer_working_set=working,
        loss_chunk=loss,
        runtime=RUNTIME[device.type],
    )


def untrained_layers(model: Any, trained: set[int]) -> int:
    """How many layers from the first on have nothing that trains in them or before them: no gradient goes so far down.

    ``trained`` are the ids of what trains. Outside of the layers and the head, a vector is the last norm's, behind them.
    Layers that stand in no list count as trained.
    """
    try:
        layers = decoder_layers(model)
    except ModelError:
        return 0
    inside = {id(values) for module in (*layers, model.get_output_embeddings()) for values in module.parameters()}
    rest = [p for p in model.parameters() if id(p) in trained and id(p) not in inside]
    first = [id(values) for values in model.get_input_embeddings().parameters()]
    if trained & set(first) or any(values.dim() > 1 for values in rest):
        return 0
    holding = (n for n, layer in enumerate(layers) if any(id(values) in trained for values in layer.parameters()))
    return next(holding, len(layers))


def beside_parameters(adapted: AdaptedModel) -> list[Tensor]:
    """What the methods keep for a resume that does not train, as running averages."""
    # by storage: the same memory has the same one, on meta too
    trained = {values.untyped_storage()._cdata for values in adapted.trainable_parameters().values()}
    return [kept for kept in adapted.method_state().values() if kept.untyped_storage()._cdata not in trained]


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
