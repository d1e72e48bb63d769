"""The recompute boundary: a decoder layer that keeps only its input, and runs a step's micro-batches one by one.

    forward    input [R, T, D] kept ─► micro-batch 1, 2, … through the layer, without a graph ─► output [R, T, D]
    backward   micro-batch 1, 2, … again, with a graph, each freed before the next

Given all R rows of a step at once, every layer is visited twice a step however many micro-batches there are, and its
frozen weights are dequantised once a visit (layer-major accumulation). Given one micro-batch it is plain gradient
checkpointing (Chen et al. 2016, arXiv:1604.06174).

The recompute leaves out the layer's last product where nothing but the output reads it (``unread_linears``): nobody
reads that output again.

Four facts decide the form. A KV cache would be appended to a second time by the recompute, so there is none here.
Parameters inside the layer get their gradients by an inner backward, straight into ``.grad``. Everything with a row for
each row of the batch (masks, positions, rotary tables) must be cut along with the rows. Some families' layers answer with
a tuple, of which their decoder reads the first entry (Falcon, GPT-J, Bloom, MPT): then so does the boundary.

A shape does not always tell what has a row for each row, so a trainer compares before it trains (``check_boundary``).

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
        """[R, T, D] → [R, T, D], in a tuple where the layer gives one. Raises ModelError if a gradient would be lost."""
        if not (torch.is_grad_enabled() and self.training):
            return self.layer(hidden, *args, **kwargs)
        if _wants_gradient((args, kwargs)):
            raise ModelError(
                f"A {type(self.layer).__name__} takes more than its hidden states from layers that train, and the recompute "
                "boundary would lose those gradients; set training.gradient_checkpointing=false."
            )
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
    ) -> Tensor | tuple[Tensor | None, ...]:
        ctx.boundary, ctx.args, ctx.kwargs = boundary, args, kwargs
        ctx.random = [] if _draws(boundary.layer) else None
        output = torch.empty_like(hidden)
        others: tuple[None, ...] | None = None
        with torch.no_grad(), _visit(boundary, len(hidden)):
            for part in boundary.micro_batches(len(hidden)):
                if ctx.random is not None:
                    ctx.random.append(rng_state(hidden.device))
                output[part], others = _run(boundary.layer, hidden[part], part, len(hidden), args, kwargs)
        ctx.save_for_backward(hidden)
        return output if others is None else (output, *others)

    @staticmethod
    def backward(ctx: Any, grad: Tensor, *others: None) -> tuple[Tensor | None, ...]:
        (hidden,) = ctx.saved_tensors
        boundary: RecomputedLayer = ctx.boundary
        grad_hidden = torch.empty_like(hidden) if ctx.needs_input_grad[0] else None
        after = None if ctx.random is None else rng_state(hidden.device)
        with torch.enable_grad(), _visit(boundary, len(hidden)):
            for number, part in enumerate(boundary.micro_batches(len(hidden))):
                if ctx.random is not None:
                    set_rng_state(ctx.random[number], hidden.device)
                inputs = hidden.detach()[part].requires_grad_(grad_hidden is not None)
                with _left_out(boundary.unread or []):
                    output = _run(boundary.layer, inputs, part, len(hidden), ctx.args, ctx.kwargs)[0]
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


@contextmanager
def recomputing(model: nn.Module) -> Iterator[None]:
    """Inside, a model in eval mode goes through the boundary as in training, but without dropout."""
    boundaries = [module for module in model.modules() if isinstance(module, RecomputedLayer)]
    for boundary in boundaries:
        boundary.training = True
    try:
        yield
    finally:
        for boundary in boundaries:
            boundary.training = False


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
    """Whether the layer may draw random numbers in training, so that the recompute must draw the same ones.

    Chances are those of dropout modules and whatever else is called so: ``attention_dropout``, Bloom's ``hidden_dropout``,
    ``attn_pdrop``. One that is never drawn with costs no more than a look at the generator.
    """
    for module in layer.modules():
        chances = [value for name, value in vars(module).items() if "dropout" in name or "pdrop" in name]
        if isinstance(module, nn.modules.dropout._DropoutNd):
            chances.append(module.p)
        if any(isinstance(chance, float) and chance > 0 for chance in chances):
            return True
    return False


def _run(
    layer: nn.Module, inputs: Tensor, part: slice, count: int, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[Tensor, tuple[None, ...] | None]:
    """(hidden states, what else the layer's tuple holds) for ``inputs``, which are rows ``part`` of ``count``.

    The second is None where the layer gives a bare tensor. In a tuple the others stand empty: attention weights would be
    those of one micro-batch, and without a cache there is nothing else.
    """
    tokens = inputs.shape[1]
    output = layer(inputs, *_cut(args, part, count, tokens), **_cut(kwargs, part, count, tokens))
    if not isinstance(output, tuple):
        return output, None
    return output[0], (None,) * (len(output) - 1)


def _cut(value: Any, part: slice, count: int, tokens: int) -> Any:
    """Rows ``part`` of every tensor that has one for each of ``count`` rows, inside tuples, lists and dicts too.

    Example, 4 rows of T tokens cut to 0:2: positions [4, T] → [2, T]; rotary table [4, T, 64] → [2, T, 64]; mask
    [4, 1, T, T] → [2, 1, T, T]. As they are: a shared table [1, T, 64]; MPT's bias for its 4 heads [4, 1, 2048]; and
    Bloom's for each row and head [4 · 4, 1, T], whose shape could as well be one for 16 heads.
    """
    if isinstance(value, Tensor):
        return value[part] if _has_rows(value, count, tokens) else value
    if isinstance(value, dict):
        return {key: _cut(item, part, count, tokens) for key, item in value.items()}
    if isinstance(value, tuple | list):
        return type(value)(_cut(item, part, count, tokens) for item in value)
    return value


def _has_rows(value: Tensor, count: int, tokens: int) -> bool:
    """Whether this surely has a row for each row: [R, T, …], or scores [R, …, …, T]."""
    if value.dim() < 2 or len(value) != count:
        return False
    return value.shape[1] == tokens or (value.dim() == 4 and value.shape[3] == tokens)


def _wants_gradient(value: Any) -> bool:
    """Whether a tensor in here, inside tuples, lists and dicts too, is to get a gradient."""
    if isinstance(value, Tensor):
        return value.requires_grad
    if isinstance(value, dict):
        return any(_wants_gradient(item) for item in value.values())
    return isinstance(value, tuple | list) and any(_wants_gradient(item) for item in value)
