"""A frozen base model: what loading gives and every method plants into.

Knows what a base is made of; must not know how it was loaded or what will be planted in it.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

import torch
from torch import nn

from qlora.errors import counted
from qlora.machine.device import dtype_name
from qlora.machine.disk import bytes_text
from qlora.model.nf4 import away_of, packed_numbers

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from qlora.model.checkpoint import Checkpoint
    from qlora.recipe import ModelSection


class StreamedLayers(Protocol):
    """The layers of a base that do not stay on the device (``residence/placement.py``)."""

    @property
    def tier(self) -> str:
        """Where they wait: ``host``, ``disk``, or ``processes``, on the devices of all."""

    @property
    def order(self) -> Sequence[int]:
        """Their numbers."""

    def bytes_on_device(self) -> int:
        """What they take there while they come and go."""

    def forget(self) -> None:
        """Let go of those that are there for a visit."""

    def close(self) -> None:
        """Give back what they hold; the base is of no use any more."""


@dataclass(repr=False)
class Base:
    """A frozen base model in eval mode with its tokenizer, and how it was loaded."""

    model: nn.Module
    tokenizer: PreTrainedTokenizerBase | None
    """transformers' own; None for a module that reads no text."""
    folder: Path
    name: str
    revision: str | None
    quantization: str
    double_quant: bool
    device: torch.device
    compute_dtype: torch.dtype
    end_tokens: tuple[int, ...] = ()
    """What ends an answer: the checkpoint's end tokens, and the end of a turn of the chat template that it is trained with."""
    names: dict[str, str] | None = None
    """Each weight's name in the model → its name in the checkpoint; None for a model that came from no folder."""
    paths: tuple[str, ...] | None = None
    """Every module's path in the checkpoint's class, where that has towers beside its language model."""
    towers: Mapping[str, int] = field(default_factory=dict)
    """What of the checkpoint's class was not loaded, by its paths → the numbers in its weights."""
    placement: StreamedLayers | None = None
    """The layers that do not stay on the device; None where all do."""
    checkpoint: Checkpoint | None = None
    """The opened folder; None for a model that came from none."""
    section: ModelSection | None = None
    """The recipe's section that it was loaded by; None where there was none."""

    def __repr__(self) -> str:
        """Name, architecture, parameters, quantisation and bytes, device, and where layers wait; three or four lines."""
        count, held = count_parameters(self.model), bytes_here(self.model)
        how = "unquantised" if self.quantization == "none" else f"in {self.quantization}"
        how += " (scales quantised too)" if self.double_quant and self.quantization != "none" else ""
        lines = [
            f"Base '{self.name}'{f' at {self.revision}' if self.revision else ''}: {type(self.model).__name__}",
            f"  {count:,} parameters {how}, {bytes_text(held) if held else 'no weights'}",
            f"  on {self.device}, computing in {dtype_name(self.compute_dtype)}",
        ]
        if self.placement is not None:
            where = {"host": "in host memory", "disk": "on disk"}.get(self.placement.tier, "spread over all processes")
            slots = bytes_text(self.placement.bytes_on_device())
            lines.append(
                f"  {counted(len(self.placement.order), 'layer')} kept {where}, {slots} on the device for them"
            )
        return "\n".join(lines)


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Inside, ``model`` is in eval mode; then in the mode from before."""
    training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(training)


def count_parameters(model: nn.Module) -> int:
    """Numbers in the model, packed ones counted one by one, shared ones once."""
    return packed_numbers(model) + sum(values.numel() for values in model.parameters())


def bytes_here(model: nn.Module) -> int:
    """Bytes of what stays where it is."""
    staying = [module for module in model.modules() if away_of(module) is None]
    tensors = {
        id(values): values
        for module in staying
        for values in (*module.parameters(recurse=False), *module.buffers(recurse=False))
    }
    return sum(values.nbytes for values in tensors.values() if not values.is_meta)
