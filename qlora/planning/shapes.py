"""Shapes: what of a model decides how much a step computes and moves, counted without reading a weight.

Knows modules and their sizes; must not know a recipe, a rate or what fits.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

from torch import Tensor, nn

from qlora.errors import ModelError
from qlora.methods import AdaptedModel
from qlora.model import anatomy
from qlora.model.experts import PackedExperts
from qlora.model.nf4 import Packed, features, is_linear
from qlora.residence.image import ALIGNMENT, Image, Piece


@dataclass(frozen=True)
class Shapes:
    """Counts of numbers, in all decoder layers together where nothing else is said."""

    blocks: int
    """N, in the frozen linears; of experts those that a token visits."""
    packed: int
    """How many of them are quantised."""
    trained: int
    """N_a, in the matrices that train."""
    head: int
    """N_h."""
    head_trains: bool
    layers: int
    with_graph: int
    """Layers that a gradient goes through, from the last one down."""
    width: int
    """d, of the hidden states."""
    attention: int
    """a, of all query heads together."""
    layer_bytes: tuple[int, ...]
    """By layer, what travels when it is streamed."""


def shapes_of(adapted: AdaptedModel) -> Shapes:
    """Count ``adapted``, whose weights may be on meta and whose layers must not be wrapped yet."""
    model, sizes = adapted.model, anatomy.sizes(adapted.model)
    depth = sizes.layers
    try:
        layers: list[nn.Module] = list(anatomy.layers(model))
    except ModelError:  # they stand in no list: the decoder counts as one of so many equal parts
        layers = [anatomy.decoder(model)]
    linears = [module for layer in layers for module in layer.modules() if is_frozen_linear(module)]
    counts = [math.prod(features(linear)) for linear in linears]
    head = anatomy.head(model)
    experts = [
        (linear, count) for linear, count in zip(linears, counts, strict=True) if isinstance(linear, PackedExperts)
    ]
    unvisited = sum(count - count * anatomy.experts_visited(model, one.count) // one.count for one, count in experts)
    return Shapes(
        blocks=sum(counts) - unvisited,
        packed=sum(count for count, linear in zip(counts, linears, strict=True) if isinstance(linear, Packed)),
        trained=sum(p.numel() for layer in layers for p in layer.parameters() if p.requires_grad and p.dim() > 1),
        head=math.prod(features(head)) if head is not None and is_linear(head) else sizes.vocabulary * sizes.hidden,
        head_trains=head is not None and trains(head),
        layers=depth,
        with_graph=depth - _without_graph(model, layers) * depth // len(layers),
        width=sizes.hidden,
        attention=sizes.attention,
        layer_bytes=tuple(image_bytes(layer) * len(layers) // depth for layer in layers) * (depth // len(layers)),
    )


def _without_graph(model: nn.Module, layers: list[nn.Module]) -> int:
    """How many layers from the first on have nothing that trains in them or before them: no gradient goes so far down.

    Outside of the layers and the head, a vector is the last norm's, behind them.
    """
    head, embedding = anatomy.head(model), anatomy.embedding(model)
    inside = {id(values) for module in (*layers, head) if module is not None for values in module.parameters()}
    rest = [p for p in model.parameters() if p.requires_grad and id(p) not in inside]
    if (embedding is not None and trains(embedding)) or any(values.dim() > 1 for values in rest):
        return 0
    return next((number for number, layer in enumerate(layers) if trains(layer)), len(layers))


def image_bytes(layer: nn.Module) -> int:
    """What travels when ``layer`` is streamed, each tensor rounded up as in its image."""
    return sum(-(-piece.bytes // ALIGNMENT) * ALIGNMENT for piece in image_pieces(layer))


def image_pieces(layer: nn.Module) -> list[Piece]:
    """The tensors that travel when ``layer`` is streamed.

    Images are made before a method is planted, so what trains is in none of them: a bottleneck's linears stay.
    """
    return [piece for piece in Image(layer).pieces if is_frozen_linear(piece.linear)]


def is_frozen_linear(module: nn.Module) -> bool:
    """Whether it is a linear whose weight stays as it is; a bias of it may train."""
    return isinstance(module, Packed) or (is_linear(module) and not module.weight.requires_grad)


def trains(module: nn.Module) -> bool:
    """Whether anything in it does."""
    return any(values.requires_grad for values in module.parameters())


def count_parameters(model: nn.Module) -> int:
    """Numbers in the model, packed ones counted one by one, shared ones once."""
    packed = sum(m.in_features * m.out_features for m in model.modules() if isinstance(m, Packed))
    return packed + sum(p.numel() for p in model.parameters())


def bytes_of(tensors: Iterable[Tensor]) -> int:
    """Bytes of tensors, on meta too."""
    return sum(values.numel() * values.dtype.itemsize for values in tensors)
