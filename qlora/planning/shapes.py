"""Shapes: what of a model decides how much a step computes and moves, counted without reading a weight.

Knows modules and their sizes; must not know a recipe, a rate or what fits.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

from torch import nn

from qlora.errors import ModelError
from qlora.machine.disk import bytes_text
from qlora.methods.base import AdaptedModel
from qlora.methods.planted import unplanted
from qlora.model import anatomy
from qlora.model.experts import PackedExperts, is_packed, packed_of
from qlora.model.nf4 import Packed, features, is_linear, packed_numbers
from qlora.residence.image import ALIGNMENT, Image, Piece
from qlora.training.shares import shared_out


@dataclass(frozen=True)
class Shapes:
    """Counts of numbers, in all decoder layers together where nothing else is said."""

    blocks: int
    """N, in the frozen linears; of experts those that a token visits."""
    packed: int
    """Quantised numbers in linears."""
    experts: int
    """Quantised numbers in experts, visited or not."""
    experts_up: int
    """Of these, in the first of an expert's two products, which its backward computes again."""
    experts_again: int
    """Of these, what a recompute computes again: elsewhere it is the last product of its layer, and left out."""
    visited: float
    """The share of a layer's experts that a token visits; 1 where there are none."""
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
    """By layer, what travels when it is streamed, or spread where it trains whole."""
    layer_gradients: tuple[int, ...]
    """By layer, the gradients that travel with it where it trains whole."""


@dataclass(frozen=True)
class Dense:
    """What of a quantised model is not: it stays in the compute dtype, or in fp32."""

    bytes: dict[str, int]
    """By what it is: ``embeddings``, ``head``, ``routers``, ``linears``, ``rest`` (norms, biases, convolutions)."""
    share: float
    """Of all weights but embeddings and head, which nobody quantises. Above a tenth a model is refused (model/skeleton.py)."""

    def __str__(self) -> str:
        """A line of the plan's table."""
        kinds = ", ".join(f"{kind} {bytes_text(size)}" for kind, size in self.bytes.items())
        whole = bytes_text(sum(self.bytes.values()))
        return (
            f"  {'not quantised':<20}{whole:>12}  {kinds}; beside embeddings and head {self.share:.2%} of the weights"
        )


def dense_of(model: nn.Module) -> Dense | None:
    """What of ``model`` is not quantised; None where nothing is. Weights may be on meta; nothing is planted yet."""
    packed, head = packed_numbers(model), anatomy.head(model)
    paths = {path for path, _ in model.named_modules()}
    sizes = dict.fromkeys(("embeddings", "head", "routers", "linears", "rest"), 0)
    numbers, seen = 0, set()
    for path, module in model.named_modules():
        kind = "embeddings" if isinstance(module, nn.Embedding) else "head" if module is head else "rest"
        if kind == "rest" and anatomy.is_router(path, paths):
            kind = "routers"
        elif kind == "rest" and is_linear(module) and not isinstance(module, Packed):
            kind = "linears"
        for values in module.parameters(recurse=False):
            if id(values) not in seen:
                seen.add(id(values))
                sizes[kind] += values.nbytes
                numbers += values.numel() if kind not in ("embeddings", "head") else 0
    return Dense({kind: size for kind, size in sizes.items() if size}, numbers / (packed + numbers)) if packed else None


def shapes_of(adapted: AdaptedModel) -> Shapes:
    """Count ``adapted``, whose weights may be on meta and whose layers must not be wrapped yet."""
    model, sizes = adapted.model, anatomy.sizes(adapted.model)
    depth, head = sizes.layers, anatomy.score(model) or anatomy.head(model)
    plain = None if head is None else unplanted(head)
    try:
        layers: list[nn.Module] = list(anatomy.layers(model))
    except ModelError:  # they stand in no list: the decoder counts as one of so many equal parts
        layers = [anatomy.decoder(model)]
    linears = [module for layer in layers for module in layer.modules() if is_frozen_linear(module)]
    counts = [math.prod(features(linear)) for linear in linears]
    experts = [
        (linear, count) for linear, count in zip(linears, counts, strict=True) if isinstance(linear, PackedExperts)
    ]
    unvisited = sum(count - count * anatomy.experts_visited(model, one.count) // one.count for one, count in experts)
    in_experts = sum(count for _, count in experts)
    whole = shared_out(adapted)
    trained = [[p for p in layer.parameters() if p.requires_grad] if whole else [] for layer in layers]

    def by_layer(bytes_each: list[int]) -> tuple[int, ...]:
        return tuple(count * len(layers) // depth for count in bytes_each) * (depth // len(layers))

    return Shapes(
        blocks=sum(counts) - unvisited,
        packed=sum(count for count, one in zip(counts, linears, strict=True) if isinstance(one, Packed)) - in_experts,
        experts=in_experts,
        experts_up=sum(one.count * math.prod(one.sides) for layer in layers for one in _first_products(layer)),
        experts_again=sum(
            count
            for layer in layers
            if anatomy.first(layer, anatomy.BEHIND)
            for count in (math.prod(features(one)) for one in layer.modules() if isinstance(one, PackedExperts))
        ),
        visited=1 - unvisited / in_experts if in_experts else 1.0,
        trained=sum(p.numel() for layer in layers for p in layer.parameters() if p.requires_grad and p.dim() > 1),
        head=math.prod(features(plain)) if plain is not None and is_linear(plain) else sizes.vocabulary * sizes.hidden,
        head_trains=head is not None and trains(head),
        layers=depth,
        with_graph=depth - _without_graph(model, layers) * depth // len(layers),
        width=sizes.hidden,
        attention=sizes.attention,
        layer_bytes=by_layer(
            [image_bytes(layer) + sum(p.nbytes for p in own) for layer, own in zip(layers, trained, strict=True)]
        ),
        layer_gradients=by_layer([sum(4 * p.numel() for p in own) for own in trained]),
    )


def _first_products(layer: nn.Module) -> Iterator[PackedExperts]:
    """The packed matrices that a layer's experts begin with."""
    for module in layer.modules():
        if is_packed(module):
            yield packed_of(module, 0)


def _without_graph(model: nn.Module, layers: list[nn.Module]) -> int:
    """How many layers from the first on have nothing that trains in them or before them: no gradient goes so far down.

    Outside of the layers and the heads, a vector is the last norm's, behind them.
    """
    head, embedding = anatomy.head(model), anatomy.embedding(model)
    heads = (head, anatomy.score(model))
    inside = {id(values) for module in (*layers, *heads) if module is not None for values in module.parameters()}
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
