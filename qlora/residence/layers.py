"""The recompute boundary: a decoder layer that keeps only its input, and runs a step's micro-batches one by one.

    forward    input [R, T, D] kept ─► micro-batch 1, 2, … through the layer, without a graph ─► output [R, T, D]
    backward   micro-batch 1, 2, … again, with a graph, each freed before the next

Where memory suffices a layer may keep the graphs of its micro-batches instead (``keeps``), so that nothing is computed
twice. Backward goes through the same graphs in the same order, so gradients are the same bit for bit. The last layers are
those that keep: backward begins with them, and their graphs are gone when the others are recomputed.

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

Whole tensors [R, T, D] alive at one time, beside what a micro-batch needs inside the layer (m: rows of a micro-batch):

                                  inputs on the device            inputs in host memory
    forward, in layer i of L      i + 1 inputs, the output        1 input, the output
    the turn: loss                L inputs, the last output       1 input, the last output
    backward, in layer i          i + 1 inputs, 2 gradients       2 · m / R inputs, 2 gradients

With one micro-batch (m = R) the output is the layer's own and the input's gradient autograd's own; with several, each is
gathered in a tensor beside that of the micro-batch at hand. The gradient that came in is not written over: a hook or a
second reader of the same states may hold it.

Knows modules and tensors; must not know what is quantised, what is adapted, or where rows come from.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, MutableMapping
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor
from torch.autograd.graph import get_gradient_edge

from qlora.errors import ModelError
from qlora.machine.device import rng_state, set_rng_state
from qlora.model import anatomy
from qlora.model.attention import PackedMask, packed_now, packed_rows
from qlora.model.nf4 import dense_cached
from qlora.residence.boundary import Boundary, draw, draws, having, left_out, take_away, unread_linears
from qlora.residence.layer_inputs import KeptInput, LayerInputs
from qlora.residence.tiles import TiledMLP, tile_mlps


class RecomputedLayer(Boundary):
    """A decoder layer behind the boundary. Outside training, or without gradients for no more rows than go through it at once, it
    is the layer itself."""

    inside = "layer"

    def __init__(
        self, layer: nn.Module, rows: int, inputs: LayerInputs | None = None, keeps: bool = False, number: int = 0
    ) -> None:
        super().__init__()
        self.layer = layer
        self.number = number
        """Of the layer in its model, from 0."""
        self.rows = rows
        """Rows that go through the layer at once."""
        self.inputs = inputs
        """Where the input waits for backward; None for the device."""
        self.keeps = keeps
        """Whether all activations wait, and nothing is recomputed."""
        self.unread: list[nn.Module] | None = None
        """Linears whose products the recompute may leave out; None until the first recompute has found them."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """[R, T, D] → [R, T, D], in a tuple where the layer gives one. Raises ModelError if a gradient would be lost."""
        cut = not torch.is_grad_enabled() and bool(args) and len(args[0]) > self.rows
        if not (self.training and (torch.is_grad_enabled() or cut)):
            return self.layer(*args, **kwargs)
        if not args:
            raise ModelError(
                f"A {type(self.layer).__name__} takes its hidden states by name, which the recompute boundary does not know; "
                "set training.recompute=none training.accumulation=micro_batch_major."
            )
        hidden, others = args[0], args[1:]
        if _wants_gradient((others, kwargs)):
            raise ModelError(
                f"A {type(self.layer).__name__} takes more than its hidden states from layers that train, and the recompute "
                "boundary would lose those gradients; set training.recompute=none training.accumulation=micro_batch_major."
            )
        return _Recompute.apply(hidden, self.anchor(hidden.device), self, others, kwargs)

    def micro_batches(self, count: int) -> Iterator[slice]:
        """Row slices that cover ``count`` rows; the last may be short."""
        for start in range(0, count, self.rows):
            yield slice(start, min(start + self.rows, count))


class _Recompute(torch.autograd.Function):
    """``anchor`` needs a gradient where the layer trains, so that there is a graph even though the first layer's input
    needs none. Below the lowest layer that trains there is no graph, and nothing is kept or recomputed."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        anchor: Tensor,
        boundary: RecomputedLayer,
        args: tuple[object, ...],
        kwargs: dict[str, object],
    ) -> Tensor | tuple[Tensor | None, ...]:
        ctx.boundary, ctx.args, ctx.kwargs, ctx.packed = boundary, args, kwargs, packed_now()
        ctx.parts = list(boundary.micro_batches(len(hidden)))
        ctx.graphs = [] if boundary.keeps and any(ctx.needs_input_grad) else None
        by_row = draws(boundary.layer)
        ctx.random = [] if ctx.graphs is None and by_row else None
        ctx.kept = None
        if any(ctx.needs_input_grad) and ctx.graphs is None:
            if boundary.inputs is None or boundary.inputs.place == "device":
                ctx.save_for_backward(hidden)
            else:  # on its way while the layer computes
                ctx.kept = boundary.inputs.keep(hidden, ctx.parts)
        output: Tensor | None = None
        handed: list[tuple[Tensor | None, ...] | None] = []
        with torch.no_grad(), _visit(boundary, len(hidden)):
            for part in ctx.parts:
                if by_row:
                    draw(1 + boundary.number, part.start)
                if ctx.random is not None:
                    ctx.random.append(rng_state(hidden.device))
                inputs = hidden[part]
                if ctx.graphs is not None:
                    inputs = inputs.detach().requires_grad_(ctx.needs_input_grad[0])
                with torch.set_grad_enabled(ctx.graphs is not None):
                    answer, others = _run(boundary.layer, inputs, part, len(hidden), args, kwargs, ctx.packed)
                handed.append(others)
                if ctx.graphs is not None:
                    ctx.graphs.append((inputs, get_gradient_edge(answer) if answer.requires_grad else None))
                del inputs
                # a view could not be written over, and may be the input
                if len(ctx.parts) == 1 and not answer._is_view():
                    output = answer.detach()
                    break
                if output is None:
                    output = answer.new_empty(len(hidden), *answer.shape[1:])
                output[part] = answer
                del answer  # before the next one is made
        assert output is not None
        if others is None:
            return output
        whole = zip(*(others for others in handed if others is not None), strict=True)
        return output, *(None if parts[0] is None else torch.cat(parts) for parts in whole)  # type: ignore[arg-type]

    @staticmethod
    def backward(ctx: Any, grad: Tensor, *others: None) -> tuple[Tensor | None, ...]:
        boundary: RecomputedLayer = ctx.boundary
        kept: KeptInput | None = ctx.kept
        graphs: list[tuple[Tensor, Any]] | None = ctx.graphs
        hidden: Tensor | None = None if kept is not None or graphs is not None else ctx.saved_tensors[0].detach()
        needed, device, whole = ctx.needs_input_grad[0], grad.device, len(ctx.parts) == 1
        grad_hidden: Tensor | None = None
        after = None if ctx.random is None else rng_state(device)
        with torch.enable_grad(), _visit(boundary, len(grad)):
            for number, part in enumerate(ctx.parts):
                if graphs is not None:
                    inputs, edge = graphs.pop(0)
                else:
                    if ctx.random is not None:
                        set_rng_state(ctx.random[number], device)
                    rows = hidden[part] if hidden is not None else kept.rows(number)  # type: ignore[union-attr]
                    inputs = rows.detach().requires_grad_(needed)
                    del rows
                    edge = _recomputed(boundary, inputs, part, grad, ctx.args, ctx.kwargs, ctx.packed)
                if edge is not None:  # else what trains here is switched off, and nothing below asks
                    torch.autograd.backward(edge, grad[part])
                    del edge
                if whole:
                    grad_hidden = inputs.grad
                elif inputs.grad is not None:
                    if grad_hidden is None:
                        grad_hidden = inputs.grad.new_zeros(len(grad), *inputs.shape[1:])
                    grad_hidden[part] = inputs.grad
                del inputs
        if after is not None:
            set_rng_state(after, device)
        if kept is not None:
            kept.forget()
        del hidden, kept
        return grad_hidden, None, None, None, None


def _recomputed(
    boundary: RecomputedLayer,
    inputs: Tensor,
    part: slice,
    grad: Tensor,
    args: tuple[object, ...],
    kwargs: dict[str, object],
    packed: PackedMask | None,
) -> Any:
    """Where backward begins in the graph of rows ``part``, computed again; None where no gradient is asked for."""
    with left_out(boundary.unread or []):
        output = _run(boundary.layer, inputs, part, len(grad), args, kwargs, packed)[0]
    if not output.requires_grad:
        return None
    if boundary.unread is None:
        boundary.unread = [one for one in unread_linears(output) if not _drew_after(one, grad)]
    return get_gradient_edge(output)  # nobody reads the output itself


def layers_that_keep(kept: int, count: int, away: Collection[int] = ()) -> tuple[int, ...]:
    """Which of ``count`` layers keep their activations, so that ``kept`` do: the last ones, and none that is ``away``.

    A layer that does not stay on the device has other weights in its place when backward comes. Example: 2 of 5, of which
    layer 3 is away → (2, 4)
    """
    able = [layer for layer in range(count) if layer not in away]
    return tuple(able[max(0, len(able) - kept) :])


def wrap_layers(
    model: nn.Module,
    rows: int,
    inputs: LayerInputs | None = None,
    mlp_tile: int | None = None,
    keep: Collection[int] = (),
) -> None:
    """Put every decoder layer of a causal language model behind the boundary, in place, ``rows`` rows at a time.

    ``inputs`` says where their inputs wait for backward (None: on the device), ``mlp_tile`` how many tokens go through
    an MLP at once (None: all), and ``keep`` which layers are not recomputed. After the method is planted, since paths change:
    ``model.layers.0.mlp`` becomes ``model.layers.0.layer.mlp``, with tiles ``model.layers.0.layer.mlp.whole``. Wrapping again
    changes these alone. Raises ModelError before anything is changed, where the model has no such layers or MLPs.
    """
    layers = anatomy.layers(model)
    tile_mlps([layer.layer if isinstance(layer, RecomputedLayer) else layer for layer in layers], mlp_tile)
    for index, layer in enumerate(layers):
        if isinstance(layer, RecomputedLayer):
            layer.rows, layer.inputs, layer.keeps, layer.unread = rows, inputs, index in keep, None
        else:
            layers[index] = RecomputedLayer(layer, rows, inputs, index in keep, index).train(layer.training)


def recomputing(model: nn.Module) -> AbstractContextManager[None]:
    """Inside, a model in eval mode goes through the boundaries as in training, but without dropout."""
    return having((module for module in model.modules() if isinstance(module, Boundary)), "training", True)


def kept_by(model: nn.Module) -> set[LayerInputs]:
    """What keeps the inputs of the model's layers, where that is not the device."""
    boundaries = (module for module in model.modules() if isinstance(module, RecomputedLayer))
    return {boundary.inputs for boundary in boundaries if boundary.inputs is not None}


def unwrap_layers(model: nn.Module) -> None:
    """Take the boundaries away again; the model's paths are as they were."""
    take_away(model, TiledMLP)
    take_away(model, RecomputedLayer)


def _visit(boundary: RecomputedLayer, count: int) -> AbstractContextManager[None]:
    """Dequantise once for all micro-batches of a visit; with only one, each matrix is dropped as soon as it was used."""
    return dense_cached(boundary.layer) if count > boundary.rows else nullcontext()


def _drew_after(linear: nn.Module, grad: Tensor) -> bool:
    """Whether numbers were drawn since ``linear``, an MLP in tiles, drew its own: left out, it would leave others to them.

    ``grad`` is what came into the layer's backward; in a dry run it is fake, nothing is drawn, and no bits can be compared.
    """
    if not isinstance(linear, TiledMLP) or linear.left is None or isinstance(grad, FakeTensor):
        return False
    return any(not torch.equal(state, linear.left[kind]) for kind, state in rng_state(grad.device).items())


def _run(
    layer: nn.Module,
    inputs: Tensor,
    part: slice,
    count: int,
    args: tuple[object, ...],
    kwargs: dict[str, object],
    packed: PackedMask | None = None,
) -> tuple[Tensor, tuple[Tensor | None, ...] | None]:
    """(hidden states, what else the layer's tuple holds) for ``inputs``, which are rows ``part`` of ``count``. ``packed``
    says where the examples of all of these begin, as it did in the forward, whose word is gone when backward comes.

    The second is None where the layer gives a bare tensor. In a tuple whole numbers are handed on, as the tokens that an indexer
    chose for later layers; the others stand empty: attention weights would be those of one micro-batch.
    """
    tokens = inputs.shape[1]
    given = _cut(kwargs, part, count, tokens)
    written = {key: len(value) for key, value in given.items() if isinstance(value, MutableMapping)}
    with packed_rows(_cut(packed, part, count, tokens)):
        output = layer(inputs, *_cut(args, part, count, tokens), **given)
    if any(len(given[key]) != count for key, count in written.items()):
        raise ModelError(
            f"A {type(layer).__name__} hands keys and values on to later layers, and the recompute boundary would lose their "
            "gradients; set training.recompute=none training.accumulation=micro_batch_major."
        )
    if not isinstance(output, tuple | list):
        return output, None
    if any(isinstance(one, Tensor) and one.is_floating_point() and one.dim() == 3 for one in output[1:]):
        raise ModelError(  # Zaya's routers read the states of those below
            f"A {type(layer).__name__} hands more than its hidden states on to later layers, and the recompute boundary would "
            "lose their gradients; set training.recompute=none training.accumulation=micro_batch_major."
        )
    return output[0], tuple(
        one if isinstance(one, Tensor) and not one.is_floating_point() else None for one in output[1:]
    )


def _cut(value: Any, part: slice, count: int, tokens: int) -> Any:
    """Rows ``part`` of every tensor that has one for each of ``count`` rows, inside tuples, lists and dicts too.

    Example, 4 rows of T tokens cut to 0:2: positions [4, T] → [2, T]; rotary table [4, T, 64] → [2, T, 64]; mask
    [4, 1, T, T] → [2, 1, T, T]. As they are: a shared table [1, T, 64]; MPT's bias for its 4 heads [4, 1, 2048]; and
    Bloom's for each row and head [4 · 4, 1, T], whose shape could as well be one for 16 heads.
    """
    if isinstance(value, PackedMask):
        return value[part]
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


def _wants_gradient(value: object) -> bool:
    """Whether a tensor in here, inside tuples, lists and dicts too, is to get a gradient."""
    if isinstance(value, Tensor):
        return value.requires_grad
    if isinstance(value, dict):
        return any(_wants_gradient(item) for item in value.values())
    return isinstance(value, tuple | list) and any(_wants_gradient(item) for item in value)
