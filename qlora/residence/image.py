"""A layer's frozen linears as one piece of bytes, so that they travel in one copy.

    linear ─► weight, scales, codes ─► pieces ─► image: each at a multiple of 256 bytes, one behind the other

Knows linears and bytes; must not know where an image waits or when it travels.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from qlora.model.nf4 import Packed, is_linear

ALIGNMENT = 256  # bytes; what CUDA's allocator gives, and more than any kernel asks for


class Piece(NamedTuple):
    """One tensor of a linear in its layer's image."""

    linear: nn.Module
    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    start: int
    bytes: int


class Image:
    """How a layer's frozen linears lie in one piece of memory. Made while they are empty: shapes are enough."""

    def __init__(self, layer: nn.Module) -> None:
        self.pieces: list[Piece] = []
        self.bytes = 0
        for linear in layer.modules():
            if _travels(linear):
                for name, values in _weights(linear).items():
                    piece = Piece(linear, name, values.dtype, tuple(values.shape), self.bytes, values.nbytes)
                    self.pieces.append(piece)
                    self.bytes += -(-piece.bytes // ALIGNMENT) * ALIGNMENT

    @property
    def linears(self) -> list[nn.Module]:
        """The linears in it."""
        return list(dict.fromkeys(piece.linear for piece in self.pieces))

    def of(self, linear: nn.Module) -> list[Piece]:
        """What belongs to ``linear``."""
        return [piece for piece in self.pieces if piece.linear is linear]

    def attach(self, memory: Tensor) -> None:
        """Make the linears' tensors views of ``memory``, uint8 [bytes or more], which holds the image."""
        for piece in self.pieces:
            give(piece, view_of(memory, piece, piece.start))

    def detach(self) -> None:
        """Leave the linears with tensors on meta, without memory."""
        for piece in self.pieces:
            take(piece)


def view_of(memory: Tensor, piece: Piece, start: int) -> Tensor:
    """The tensor of ``piece`` whose bytes begin at ``start`` of ``memory``."""
    return memory[start : start + piece.bytes].view(piece.dtype).view(piece.shape)


def frozen_linears(layers: Iterable[nn.Module]) -> Iterator[nn.Module]:
    """Every linear that has an image in its layer, and the experts' matrices as if they were some."""
    for layer in layers:
        yield from (linear for linear in layer.modules() if _travels(linear))


def _travels(module: nn.Module) -> bool:
    return is_linear(module) or isinstance(module, Packed)


def _weights(linear: Any) -> dict[str, Tensor]:
    """What of a linear travels: a quantised one's weight, scales and codes; a plain one's weight. Biases stay."""
    if isinstance(linear, Packed):
        return dict(linear.named_buffers(recurse=False))
    return {"weight": linear.weight}


def give(piece: Piece, values: Tensor) -> None:
    """Set a linear's tensor without a look at what was there; a plain linear's weight is a parameter."""
    if piece.name in piece.linear._buffers:
        piece.linear._buffers[piece.name] = values
    else:
        parameter = nn.Parameter(values, requires_grad=False)
        parameter._is_hf_initialized = True  # type: ignore[attr-defined]
        piece.linear._parameters[piece.name] = parameter


def take(piece: Piece) -> None:
    """Leave the linear with a tensor on meta in its place: whoever reads it then fails loudly."""
    give(piece, torch.empty(piece.shape, dtype=piece.dtype, device="meta"))
