"""Where a loss or a gradient that is not finite comes from: which rows, and which module first.

    the step's rows, one by one ► forward ► the first module whose output is not finite
                                ► backward ► the first module with a gradient that is not finite

Runs after the fact and changes nothing. Knows modules and their outputs; must not know the optimizer or what happens next.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor, nn

from qlora.data.packing import Row
from qlora.methods.planted import Planted
from qlora.model.nf4 import dense_weight
from qlora.residence.layers import RecomputedLayer


@dataclass(frozen=True)
class Blame:
    """What was found. ``rows`` is empty where no row alone gives a value that is not finite."""

    rows: tuple[int, ...] = ()
    """Places of the rows that give it alone."""
    where: str = ""
    """The first bad value, in words: ``the output of model.layers.2.mlp.down_proj, whose weight is not finite``."""


def find_blame(
    network: nn.Module, rows: Sequence[Row], places: Sequence[int], loss_of: Callable[[Row], Tensor]
) -> Blame:
    """Look at each of ``rows`` alone; ``places`` are their numbers in the data.

    ``loss_of`` gives a row's summed loss with the step's random draws. Gradients are left in ``.grad`` of the parameters,
    for the caller to drop.
    """
    bad: list[int] = []
    where = ""
    for row, place in zip(rows, places, strict=True):
        network.zero_grad(set_to_none=True)
        with _watched(network) as watch:
            loss = loss_of(row)
            finite = math.isfinite(loss.item())
            if finite and loss.requires_grad:
                loss.backward()  # type: ignore[no-untyped-call]
                finite = all(p.grad is None or bool(p.grad.isfinite().all()) for p in network.parameters())
        if not finite:
            bad.append(place)
            where = where or watch.first
    if not where:  # the head's loss reads the weight itself, and rows alone have no padding
        where = next((f"the weight of {name}" for name, module in _named(network) if _of_weight(module)), "")
    return Blame(tuple(bad), where)


class _Watch:
    """Remembers the first value that was not finite, in words."""

    def __init__(self) -> None:
        self.first = ""

    def output(self, name: str, module: nn.Module, inputs: Any, output: Any) -> None:
        """A forward hook; inner modules call before those around them."""
        if self.first:
            return
        if not _finite(output):
            side = "output" if _finite(inputs) else "input"
            self.first = f"the {side} of {name}{_of_weight(module)}"
            return
        for side, values in (("output", output), ("input", inputs)):
            for tensor in _floats(values):
                if tensor.requires_grad:
                    tensor.register_hook(partial(self.gradient, f"{side} of {name}"))

    def gradient(self, what: str, values: Tensor) -> None:
        """A tensor hook: what comes back to a module's output, and what leaves it by its input."""
        if not self.first and not _finite(values):
            self.first = f"the gradient of the {what}"


@contextmanager
def _watched(network: nn.Module) -> Iterator[_Watch]:
    watch = _Watch()
    with ExitStack() as hooks:
        for name, module in _named(network):
            hooks.enter_context(module.register_forward_hook(partial(watch.output, name)))
        yield watch


def _named(network: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Every module below ``network`` by its path in the checkpoint: without the boundary and what methods planted."""
    inside = {
        f"{name}.{attribute}"
        for name, module in network.named_modules()
        for kind, attribute in ((RecomputedLayer, "layer"), (Planted, "base"))
        if isinstance(module, kind)
    }
    for name, module in network.named_modules():
        if not name:
            continue
        parts = name.split(".")
        paths = accumulate(parts, "{}.{}".format)
        yield ".".join(part for part, path in zip(parts, paths, strict=True) if path not in inside), module


def _of_weight(module: nn.Module) -> str:
    if isinstance(module, Planted) and (frozen := _of_weight(module.base)):
        return frozen  # an adapted linear asks its base for the weight and does not call it
    own = [*module.parameters(recurse=False), *module.buffers(recurse=False)]
    own += module.own_parameters().values() if isinstance(module, Planted) else []
    finite = all(_finite(values) for values in own if not values.is_meta)
    if finite and hasattr(module, "dequantise"):
        finite = _finite(dense_weight(module, torch.float32))
    return "" if finite else ", whose weight is not finite"


def _floats(values: Any) -> Iterator[Tensor]:
    if isinstance(values, Tensor):
        if values.is_floating_point():
            yield values
    elif isinstance(values, dict):
        for value in values.values():
            yield from _floats(value)
    elif isinstance(values, list | tuple):
        for value in values:
            yield from _floats(value)


def _finite(values: Any) -> bool:
    return all(bool(tensor.isfinite().all()) for tensor in _floats(values))
