"""The MLP of a layer, a tile of tokens at a time: its wide intermediates exist for one tile only.

    forward     x [T, D] kept ─► tile 1, 2, … of n tokens through the MLP, without a graph ─► output [T, D]
    backward    tile 1, 2, … again, with a graph, each freed before the next

An MLP takes each token alone, and holds some four times the intermediate size f for it (gate, its activation, up, their
product, and their gradients): of a long text far more than all else in a layer. Behind this boundary that is 4 · f · n
numbers instead of 4 · f · T, and x, the output and their gradients, [T, D] each.

Inside a layer's recompute the output is mostly read by nobody (``residual + mlp(x)``). Then it is left out as one
product would be (``unread_linears``), and the tile's own recompute leaves out its last product: a step multiplies no more
than without tiles. A family that normalises the output (Gemma 2 and 3) runs the MLP's forward once more.

A step over so many tokens would dequantise the MLP's weights for each tile. They are dequantised once a visit instead,
so that all of them (3 · d · f numbers in Llama) lie there dense while the MLP runs or is differentiated.

With dropout the tiles draw one after the other, in backward the same again. Knows one module that is called with a tensor
[…, T, D] and gives one of the same shape; must not know what is quantised, what is adapted, or what stands around it.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.autograd.graph import get_gradient_edge

from qlora.errors import ModelError
from qlora.machine.device import rng_state, set_rng_state
from qlora.model import anatomy
from qlora.model.nf4 import dense_cached
from qlora.residence.boundary import Boundary, draws, having, left_out, take_away, unread_linears


class TiledMLP(Boundary):
    """An MLP behind the boundary. Outside training, with a graph, it is the MLP itself.

    While ``unread`` is on, nobody reads the answer but its gradient is wanted.
    """

    inside = "whole"

    def __init__(self, mlp: nn.Module, tile: int) -> None:
        super().__init__()
        self.whole = mlp
        self.tile = tile
        """Tokens that go through the MLP at once."""
        self.unread = False
        self.unread_inside: list[nn.Module] | None = None
        """Linears whose products a tile's recompute may leave out; None until the first recompute has found them."""
        self.answers: torch.dtype | None = None
        self.left: dict[str, Tensor] | None = None
        """The random state that the last forward left behind, where it drew."""

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """[…, D] → […, D]. Raises ModelError where the MLP takes or gives something else."""
        if args or kwargs:
            raise _not_a_function_of_tokens(self.whole, "is called with more than its hidden states")
        if not torch.is_grad_enabled():
            return self.in_tiles(x)
        return _Tiled.apply(x, self.anchor(x.device), self) if self.training else self.whole(x)

    def in_tiles(self, x: Tensor) -> Tensor:
        """The answer, tile by tile and without a graph."""
        rows = x.reshape(-1, x.shape[-1])
        if len(rows) <= self.tile:
            return self._checked(x)
        answer: Tensor | None = None
        with torch.no_grad(), dense_cached(self.whole):
            for part in self.tiles(len(rows)):
                found = self._checked(rows[None, part])
                if answer is None:
                    answer = found.new_empty(x.shape)
                answer.view(rows.shape)[part] = found[0]
                del found  # before the next one is made
        assert answer is not None
        return answer

    def _checked(self, x: Tensor) -> Tensor:
        """What the MLP answers."""
        answer = self.whole(x)
        if not isinstance(answer, Tensor) or answer.shape != x.shape:
            found = list(answer.shape) if isinstance(answer, Tensor) else f"a {type(answer).__name__}"
            raise _not_a_function_of_tokens(self.whole, f"answers {list(x.shape)} with {found}")
        return answer

    def tiles(self, count: int) -> Iterator[slice]:
        """Slices that cover ``count`` tokens; the last may be short."""
        for start in range(0, count, self.tile):
            yield slice(start, min(start + self.tile, count))


class _Tiled(torch.autograd.Function):
    """``ctx.linear`` makes it one of those that a layer's recompute may leave out."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, anchor: Tensor, mlp: TiledMLP) -> Tensor:
        ctx.linear = mlp
        ctx.random = rng_state(x.device) if draws(mlp.whole) else None
        ctx.save_for_backward(x)
        if mlp.unread:
            return x.new_zeros(x.shape, dtype=mlp.answers)
        with torch.no_grad():
            answer = mlp.in_tiles(x)
        answer = answer.clone() if answer._is_view() else answer  # Falcon's layers add to it in place
        mlp.answers = answer.dtype
        mlp.left = None if ctx.random is None else rng_state(x.device)
        return answer

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        mlp: TiledMLP = ctx.linear
        (x,) = ctx.saved_tensors
        rows, grad_rows = x.reshape(-1, x.shape[-1]), grad.reshape(-1, grad.shape[-1])
        grad_x = torch.zeros_like(rows) if ctx.needs_input_grad[0] else None
        after = None if ctx.random is None else rng_state(x.device)
        if ctx.random is not None:
            set_rng_state(ctx.random, x.device)
        with torch.enable_grad(), dense_cached(mlp.whole) if len(rows) > mlp.tile else nullcontext():
            for part in mlp.tiles(len(rows)):
                tile = rows[part].detach().requires_grad_(grad_x is not None)
                with left_out(mlp.unread_inside or []):
                    answer = mlp._checked(tile[None])
                if not answer.requires_grad:  # what trains here is switched off, and nothing below asks
                    continue
                if mlp.unread_inside is None:
                    mlp.unread_inside = unread_linears(answer)
                edge = get_gradient_edge(answer)
                del answer  # nobody reads it
                torch.autograd.backward(edge, grad_rows[None, part])
                if grad_x is not None and tile.grad is not None:
                    grad_x[part] = tile.grad
                del tile, edge
        if after is not None:
            set_rng_state(after, x.device)
        return None if grad_x is None else grad_x.view(x.shape), None, None


def tile_mlps(layers: Iterable[nn.Module], tile: int | None) -> None:
    """Put the MLP of every layer behind the boundary, in place, ``tile`` tokens at a time; None takes it away again.

    Raises ModelError before anything is changed, where a layer has none that takes its tokens alone.
    """
    if tile is None:
        for layer in layers:
            take_away(layer, TiledMLP)
        return
    for holder, name in [find_mlp(layer) for layer in layers]:
        mlp = getattr(holder, name)
        if isinstance(mlp, TiledMLP):
            mlp.tile = tile
        else:
            setattr(holder, name, TiledMLP(mlp, tile).train(mlp.training))


def tiles_of(model: nn.Module, tile: int) -> AbstractContextManager[None]:
    """Inside, ``tile`` tokens at a time go through every MLP that is cut into tiles."""
    return having((module for module in model.modules() if isinstance(module, TiledMLP)), "tile", tile)


def find_mlp(layer: nn.Module) -> tuple[nn.Module, str]:
    """(the module that holds it, its name there) of a layer's MLP, with whatever is planted on it.

    Raises ModelError where there is none, or one that takes more than its hidden states.
    """
    holder, name = anatomy.innermost(layer), anatomy.first(layer, anatomy.MLP)
    if name is None:
        there = ", ".join(name for name, _ in holder.named_children())
        raise ModelError(
            f"A {type(holder).__name__} has no MLP under the names {', '.join(anatomy.MLP)}, only {there}, so there is "
            "nothing to cut into tiles; leave memory.mlp_tile out."
        )
    mlp = anatomy.innermost(getattr(holder, name))
    parameters = inspect.signature(mlp.forward).parameters.values()
    wanted = [one.name for one in parameters if one.default is one.empty and one.kind is one.POSITIONAL_OR_KEYWORD]
    if len(wanted) > 1:
        raise _not_a_function_of_tokens(mlp, f"takes {', '.join(wanted)}")
    return holder, name


def _not_a_function_of_tokens(mlp: nn.Module, found: str) -> ModelError:
    return ModelError(
        f"A {type(mlp).__name__} cannot be cut into tiles of tokens, since it {found} where one tensor for one was expected; "
        "leave memory.mlp_tile out."
    )
