"""What the two recompute boundaries share: standing around a module, drawing again, leaving out what nobody reads.

    RecomputedLayer (layers.py)   around a decoder layer        keeps its input, runs micro-batches of rows
    TiledMLP (tiles.py)           around the MLP inside it      keeps its input, runs tiles of tokens

Knows modules and autograd's graph; must not know layers, MLPs or where an input waits.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from functools import partial
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from qlora.machine.device import rng_state, seed_rng, set_rng_state

PASSED_ON = ("AddBackward0", "ViewBackward0", "UnsafeViewBackward0")
"""Nodes of a graph that pass a gradient on whatever the values were."""

_drawn: tuple[int, int, torch.device] | None = None
"""What a step's draws come from, the place in the step of the first row that entered the model, and where it computes."""


class Boundary(nn.Module):
    """Stands around the module that its attribute ``inside`` names, and answers to that module's names.

    A path of the untouched model so leads through it, to read and to replace: transformers asks its layers for things such
    as their attention type, and a method that is switched sets ``model.layers.0.mlp.down_proj``.
    """

    inside: ClassVar[str]

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(super().__getattr__(self.inside), name)

    def __setattr__(self, name: str, value: Any) -> None:
        inner = self.__dict__.get("_modules", {}).get(self.inside)
        if isinstance(value, nn.Module) and name != self.inside and inner is not None:
            setattr(inner, name, value)
        else:
            super().__setattr__(name, value)

    def anchor(self, device: torch.device) -> Tensor:
        """An empty tensor that needs a gradient where something inside trains.

        Given to the boundary's autograd function it makes a graph even where the input needs no gradient.
        """
        trains = any(parameter.requires_grad for parameter in getattr(self, self.inside).parameters())
        return torch.empty(0, device=device, requires_grad=trains)


def unread_linears(output: Tensor) -> list[nn.Module]:
    """The linears whose products are ``output``, or are added to something to give it, and are read nowhere else.

    For a recompute that is after gradients alone, whose output nobody reads. Most families end a layer in ``residual +
    down_proj(…)``, or in the answer of experts. No gradient depends on the values of a sum's terms, so the product need not be multiplied out: a twelfth
    of a step's arithmetic in Llama. The autograd graph is the proof: the product's node is the output's own or a direct
    term of the sum and has no other reader, and its linear is used once. A family that normalises after it (Gemma 2 and 3)
    has another node between, so nothing is left out. A linear takes part by having a flag ``unread`` and by being
    ``ctx.linear`` of its autograd function; so does a whole MLP behind its own boundary.
    """
    total: Any = output.grad_fn
    if total is None:
        return []
    readers: dict[Any, int] = {total: 1}  # whoever asks for the gradient
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
    terms = [total]
    for node in terms:  # grows: sums of sums, and views of them, are sums
        linear = getattr(node, "linear", None)
        if readers.get(node) != 1:
            continue
        if type(node).__name__ in PASSED_ON:
            terms += [inner for inner, _ in node.next_functions]
        elif isinstance(linear, nn.Module) and hasattr(linear, "unread") and sum(use is linear for use in uses) == 1:
            found.append(linear)
    return found


@contextmanager
def drawn_by_row(seed: int, step: int, first: int, device: torch.device, layers: Iterable[nn.Module]) -> Iterator[None]:
    """Inside, a step's micro-batch draws as (seed, step, place of its ``first`` row) say, and in each of ``layers`` anew (``draw``):
    those behind a boundary see to it themselves."""
    global _drawn
    with ExitStack() as hooks:
        for number, layer in enumerate(layers, 1):
            if not isinstance(layer, Boundary) and draws(layer):
                hooks.enter_context(layer.register_forward_pre_hook(partial(_draw_for, number)))
        before, _drawn = _drawn, (seed * 0x9E3779B97F4A7C15 + step * 0xD1B54A32D192ED03 + 1, first, device)
        draw()
        try:
            yield
        finally:
            _drawn = before


def _draw_for(number: int, *_: Any) -> None:
    draw(number)


def draw(layer: int = 0, row: int = 0) -> None:
    """From here on draw for ``layer`` (from 1) and the rows from ``row`` on, of those that entered the model together.

    So whichever rows go before it, in this process or another, a row draws the same. Nothing, outside of ``drawn_by_row``.
    """
    if _drawn is not None:
        step, first, device = _drawn
        seed_rng((step + layer * 0xBF58476D1CE4E5B9 + (first + row) * 0x94D049BB133111EB) % 2**63, device)


@contextmanager
def one_draw(device: torch.device) -> Iterator[None]:
    """Inside, numbers are drawn that take the place of one: padding beside a row makes it longer, and is not to decide what
    is drawn after it. Nothing, outside of ``drawn_by_row``."""
    if _drawn is None:
        yield
        return
    seed = int(torch.randint(2**62, ()))
    after = rng_state(device)
    seed_rng(seed, device)
    try:
        yield
    finally:
        set_rng_state(after, device)


@contextmanager
def having(modules: Iterable[nn.Module], name: str, value: object) -> Iterator[None]:
    """Inside, the attribute ``name`` of each of ``modules`` is ``value``."""
    before = [(module, getattr(module, name)) for module in modules]
    for module, _ in before:
        setattr(module, name, value)
    try:
        yield
    finally:
        for module, own in before:
            setattr(module, name, own)


def left_out(linears: list[nn.Module]) -> AbstractContextManager[None]:
    """Inside, these linears answer zeros where their product would stand; their gradients are right all the same."""
    return having(linears, "unread", True)


def take_away(model: nn.Module, kind: type[Boundary]) -> None:
    """Put what stands behind boundaries of this ``kind`` back in its place."""
    for parent in list(model.modules()):
        for name, child in list(parent.named_children()):
            if isinstance(child, kind):
                setattr(parent, name, getattr(child, kind.inside))


def draws(module: nn.Module) -> bool:
    """Whether ``module`` may draw random numbers in training, so that a recompute must draw the same ones.

    Chances are those of dropout modules and whatever else is called so: ``attention_dropout``, Bloom's ``hidden_dropout``,
    ``attn_pdrop``. One that is never drawn with costs no more than a look at the generator.
    """
    for inner in module.modules():
        chances = [value for name, value in vars(inner).items() if "dropout" in name or "pdrop" in name]
        if isinstance(inner, nn.modules.dropout._DropoutNd):
            chances.append(inner.p)
        if any(isinstance(chance, float) and chance > 0 for chance in chances):
            return True
    return False
