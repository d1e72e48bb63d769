"""Rows that go through a decoder a layer at a time, as often as a layer is wanted, with other weights in its linears.

    once whole: what every layer is given beside its hidden states, and what comes out at the end
    then        hidden states ─► layer 0 ─► … ─► layer i, with these linears or those ─► … ─► what stands behind the layers

So several versions of a model are followed side by side with one layer of each in memory. Knows a decoder and its layers;
must not know what is planted in them, where they wait, or why weights differ.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from qlora.errors import ModelError
from qlora.model import anatomy
from qlora.model.attention import PackedMask, packed_now, packed_rows
from qlora.model.loss import hidden_states


@dataclass(frozen=True)
class _Call:
    """What one layer is given for one batch beside hidden states, and how it answers."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    packed: PackedMask | None
    in_tuple: bool


class Walk:
    """``batches`` (``input_ids``, ``position_ids``) through ``model``, in the mode that it is in, without gradients."""

    @torch.no_grad()
    def __init__(self, model: nn.Module, batches: Sequence[Mapping[str, Tensor]]) -> None:
        self.model, self.batches, self.layers = model, batches, anatomy.layers(model)
        self.first: list[Tensor] = []
        """Of each batch, the hidden states [B, T, D] that enter the first layer."""
        self.last: list[Tensor] = []
        """Of each batch, those that the head gets."""
        self._calls: list[dict[int, _Call]] = []
        with ExitStack() as hooks:
            for number, layer in enumerate(self.layers):
                hooks.enter_context(layer.register_forward_hook(self._noting(number), with_kwargs=True))
            for batch in batches:
                self._calls.append({})
                self.last.append(hidden_states(model, batch))

    def _noting(self, number: int) -> Any:
        def note(layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], out: Any) -> None:
            if not args:
                raise ModelError(
                    f"A {type(layer).__name__} takes its hidden states by name; expected them as its first argument."
                )
            if not number:
                self.first.append(args[0])
            self._calls[-1][number] = _Call(args[1:], kwargs, packed_now(), isinstance(out, tuple))

        return note

    @torch.no_grad()
    def visit(self, number: int, batch: int, hidden: Tensor) -> Tensor:
        """What layer ``number`` makes of ``hidden`` [B, T, D] of that batch."""
        call = self._calls[batch][number]
        with packed_rows(call.packed):
            out = self.layers[number](hidden, *call.args, **call.kwargs)
        return out[0] if isinstance(out, tuple) else out

    @torch.no_grad()
    def behind(self, batch: int, hidden: Tensor) -> Tensor:
        """What the head gets [B, T, D] where the last layer gave ``hidden``."""
        real = list(self.layers)
        try:
            for number, layer in enumerate(real):
                in_tuple = self._calls[batch][number].in_tuple
                self.layers[number] = _Given(layer, (hidden,) if in_tuple else hidden)
            return hidden_states(self.model, self.batches[batch])
        finally:
            for number, layer in enumerate(real):
                self.layers[number] = layer


class _Given(nn.Module):
    """In the place of a layer: answers with what is given, whatever it is asked, and has what the layer has."""

    def __init__(self, layer: nn.Module, given: Any) -> None:
        super().__init__()
        self.__dict__["layer"], self.given = layer, given

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(self.__dict__["layer"], name)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.given


@contextmanager
def standing(layer: nn.Module, instead: Mapping[str, nn.Module]) -> Iterator[None]:
    """Inside, these modules stand at these paths of ``layer``."""
    before = {path: layer.get_submodule(path) for path in instead}
    try:
        for path, module in instead.items():
            layer.set_submodule(path, module)
        yield
    finally:
        for path, module in before.items():
            layer.set_submodule(path, module)
