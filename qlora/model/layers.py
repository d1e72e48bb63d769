"""The recompute boundary: a decoder layer that keeps only its input, and runs a step's micro-batches one by one.

    forward    input [R, T, D] kept ─► micro-batch 1, 2, … through the layer, without a graph ─► output [R, T, D]
    backward   micro-batch 1, 2, … again, with a graph, each freed before the next

Given all R rows of a step at once, every layer is visited twice a step however many micro-batches there are, and its
frozen weights are dequantised once a visit (layer-major accumulation). Given one micro-batch it is plain gradient
checkpointing (Chen et al. 2016, arXiv:1604.06174).

The recompute leaves out the layer's last product where nothing but the output reads it (``unread_linears``): nobody
reads that output again.

Three facts decide the form. A KV cache would be appended to a second time by the recompute, so there is none here.
Parameters inside the layer get their gradients by an inner backward, straight into ``.grad``. Everything with a row for
each row of the batch (masks, positions, rotary tables) must be cut along with the rows.

Knows modules and tensors; must not know what is quantised, what is adapted, or where rows come from.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from qlora.device import rng_state, set_rng_state
from qlora.errors import ModelError
from qlora.model.nf4 import dense_cached


class RecomputedLayer(nn.Module):
    """A decoder layer behind the boundary. Without gradients, or outside training, it is the layer itself."""

    def __init__(self, layer: nn.Module, rows: int) -> None:
        super().__init__()
        self.layer = layer
        self.rows = rows
        """Rows that go through the layer at once."""
        self.unread: list[nn.Module] | None = None
        """Linears whose products the recompute may leave out; None until the first recompute has found them."""

    def forward(self, hidden: Tensor, *args: Any, **kwargs: Any) -> Any:
        """[R, T, D] → [R, T, D]"""
        if not (torch.is_grad_enabled() and self.training):
            return self.layer(hidden, *args, **kwargs)
        trains = any(parameter.requires_grad for parameter in self.layer.parameters())
        anchor = torch.empty(0, device=hidden.device, requires_grad=trains)
        return _Recompute.apply(hidden, anchor, self, args, kwargs)

    def __getattr__(self, name: str) -> Any:
        # transformers asks its layers for things such as their attention type
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(super().__getattr__("layer"), name)

    def micro_batches(self, count: int) -> Iterator[slice]:
        """Row slices that cover ``count`` rows; the last may be short."""
        for start in range(0, count, self.rows):
            yield slice(start, min(start + self.rows, count))


class _Recompute(torch.autograd.Function):
    """``anchor`` needs a gradient where the layer trains, so that there is a graph even though the first layer's input
    needs none. Below the lowest layer that trains there is no graph, and nothing is recomputed."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        anchor: Tensor,
        boundary: RecomputedLayer,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
    ) -> Tensor:
        ctx.boundary, ctx.args, ctx.kwargs = boundary, args, kwargs
        ctx.random = [] if _draws(boundary.layer) else None
        output = torch.empty_like(hidden)
        with torch.no_grad(), _visit(boundary, len(hidden)):
            for part in boundary.micro_batches(len(hidden)):
                if ctx.random is not None:
                    ctx.random.append(rng_state(hidden.device))
                output[part] = _run(boundary.layer, hidden, part, args, kwargs)
        ctx.save_for_backward(hidden)
        return output

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        (hidden,) = ctx.saved_tensors
        boundary: RecomputedLayer = ctx.boundary
        grad_hidden = torch.empty_like(hidden) if ctx.needs_input_grad[0] else None
        after = None if ctx.random is None else rng_state(hidden.device)
        with torch.enable_grad(), _visit(boundary, len(hidden)):
            for number, part in enumerate(boundary.micro_batches(len(hidden))):
                if ctx.random is not None:
                    set_rng_state(ctx.random[number], hidden.device)
                rows = hidden.detach()
                inputs = rows[part].requires_grad_(grad_hidden is not None)
                with _left_out(boundary.unread or []):
                    output = _run(boundary.layer, inputs, part, ctx.args, ctx.kwargs, len(rows))
                if boundary.unread is None:
                    boundary.unread = unread_linears(output)
                torch.autograd.backward(output, grad[part])
                if grad_hidden is not None:
                    grad_hidden[part] = inputs.grad
                del inputs, output
        if after is not None:
            set_rng_state(after, hidden.device)
        return grad_hidden, None, None, None, None


def wrap_layers(model: Any, rows: int) -> None:
    """Put every decoder layer of a causal language model behind the boundary, in place, ``rows`` rows at a time.

    After the method is planted, since paths change: ``model.layers.0.mlp`` becomes ``model.layers.0.layer.mlp``. Wrapping
    again changes the rows alone.
    """
    layers = decoder_layers(model)
    for index, layer in enumerate(layers):
        if isinstance(layer, RecomputedLayer):
            layer.rows = rows
        else:
            layers[index] = RecomputedLayer(layer, rows).train(layer.training)


def unwrap_layers(model: Any) -> None:
    """Take the boundary away again; the model's paths are as they were."""
    for parent in list(model.modules()):
        for name, child in list(parent.named_children()):
            if isinstance(child, RecomputedLayer):
                setattr(parent, name, child.layer)


def decoder_layers(model: Any) -> nn.ModuleList:
    """The decoder layers of a causal language model. Raises ModelError when it has no such list."""
    depth = model.config.num_hidden_layers
    for module in model.get_decoder().modules():
        if isinstance(module, nn.ModuleList) and len(module) == depth:
            return module
    raise ModelError(
        f"No list of {depth} decoder layers was found in this {model.config.model_type} model; "
        "set training.gradient_checkpointing=false."
    )


def unread_linears(output: Tensor) -> list[nn.Module]:
    """The linears whose products are added to something to give ``output``, and are read nowhere else.

    Most families end a layer in ``residual + down_proj(…)``. No gradient depends on the values of a sum's terms, so a
    recompute that is after the gradients alone need not multiply them out: a twelfth of a step's arithmetic in Llama.
    The autograd graph is the proof: the product's node is a direct term of the sum and has no other reader, and its
    linear is used once. A family that normalises after it (Gemma 2 and 3) has another node between, so nothing is left
    out. A linear takes part by having a flag ``unread`` and by being ``ctx.linear`` of its autograd function.
    """
    total: Any = output.grad_fn
    if type(total).__name__ != "AddBackward0":
        return []
    readers: dict[Any, int] = {total: 0}
    waiting = [total]
    while waiting:
        for node, _ in waiting.pop().next_functions:
            if node is not None and node not in readers:
                readers[node] = 0
                waiting.append(node)
            if node is not None:
                readers[node] += 1
    uses = [getattr(node, "linear", None) for node in readers]
    found: list[nn.Module] = []
    for node, _ in total.next_functions:
        linear = getattr(node, "linear", None)
        if (
            isinstance(linear, nn.Module)
            and hasattr(linear, "unread")
            and readers[node] == 1
            and sum(use is linear for use in uses) == 1
        ):
            found.append(linear)
    return found


@contextmanager
def _left_out(linears: list[nn.Module]) -> Iterator[None]:
    """Inside, these linears answer zeros where their product would stand; their gradients are right all the same."""
    for linear in linears:
        linear.unread = True  # type: ignore[assignment]
    try:
        yield
    finally:
        for linear in linears:
            linear.unread = False  # type: ignore[assignment]


@contextmanager
def _visit(boundary: RecomputedLayer, count: int) -> Iterator[None]:
    """Dequantise once for all micro-batches of a visit; with only one, each matrix is dropped as soon as it was used."""
    if count <= boundary.rows:
        yield
    else:
        with dense_cached(boundary.layer):
            yield


def _draws(layer: nn.Module) -> bool:
    """Whether the layer may draw random numbers in training, so that the recompute must draw the same ones."""
    for module in layer.modules():
        chance = module.p if isinstance(module, nn.Dropout) else getattr(module, "dropout", 0.0)
        chance = chance or getattr(module, "attention_dropout", 0.0)
        if isinstance(chance, float) and chance > 0:
            return True
    return False


def _run(
    layer: nn.Module,
    hidden: Tensor,
    part: slice,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    count: int | None = None,
) -> Tensor:
    """The layer on rows ``part``. With ``count``, ``hidden`` is cut already and came from so many rows."""
    rows = hidden if count is not None else hidden[part]
    total = len(hidden) if count is None else count
    output = layer(rows, *_cut(args, part, total), **_cut(kwargs, part, total))
    if isinstance(output, tuple):
        output = output[0]
    return output


def _cut(value: Any, part: slice, count: int) -> Any:
    """Rows ``part`` of every tensor that has ``count`` rows, inside tuples, lists and dicts too.

    Example, 4 rows cut to 0:2: mask [4, 1, T, T] → [2, 1, T, T]; shared rotary table [1, T, 64] → as it is.
    """
    if isinstance(value, Tensor):
        return value[part] if value.dim() > 1 and len(value) == count and count > 1 else value
    if isinstance(value, dict):
        return {key: _cut(item, part, count) for key, item in value.items()}
    if isinstance(value, tuple | list):
        return type(value)(_cut(item, part, count) for item in value)
    return value
