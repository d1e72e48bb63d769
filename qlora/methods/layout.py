"""How a method's adapter looks on disk: PEFT's tensor keys and config, and the plain LoRA that every server loads.

The defaults: each parameter is one tensor under PEFT's prefix and its own name, and PEFT has no such method. Knows names,
keys and config fields; must not know files or any formula.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor, nn

from qlora.errors import MethodError, listed

if TYPE_CHECKING:
    from qlora.methods.method import Method

PREFIX = "base_model.model."  # PEFT puts this before every module path

Fields = dict[str, Any]
"""Fields of PEFT's ``adapter_config.json``, or of a recipe's method section: plain values, as JSON has them."""


class Layout:
    """One method's adapter on disk."""

    peft_type: str | None = None
    """PEFT's name of the method; None where PEFT has none, and then our own file is written."""
    needs_state: bool = False
    """Whether an adapter means nothing without the method's ``state``; elsewhere only a resumed run misses it."""
    only: ClassVar[Mapping[str, tuple[object, ...]]] = {}
    """Fields of PEFT's config that may only have these values here."""
    read: ClassVar[frozenset[str]] = frozenset()
    """Fields of PEFT's config that ``section_of`` reads."""

    def __init__(self, method: Method) -> None:
        self.method = method
        self.alone = True
        """Whether the method is the only one of its model; PEFT's keys may depend on that."""

    # ── tensors ───────────────────────────────────────────────────────────────────────────────────────────────────────

    def key(self, name: str) -> str:
        """The tensor's key on disk, for a parameter's name."""
        return f"{PREFIX}{name}"

    def tensors(self) -> dict[str, Tensor]:
        """The adapter by its keys on disk. The tensors may be the parameters' own memory: copy what must not change."""
        return {self.key(name): values.detach() for name, values in self.method.parameters().items()}

    def fitted(self, tensors: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        """``tensors`` as they are here, where other software adds to them or leaves out what does nothing.

        By default without the frozen weights that PEFT saves beside the adapter of an embedding or a head. Raises
        MethodError where such a weight is not the base's own: a vocabulary that was resized, another base.
        """
        found = {f"{PREFIX}{path}.base_layer.weight": layer for path, layer in self.method.planted.items()}
        brought = {key: getattr(layer.base, "weight", None) for key, layer in found.items() if key in tensors}
        known = {key: ours for key, ours in brought.items() if isinstance(ours, Tensor)}
        if other := [key for key, ours in known.items() if not same_weight(tensors[key], ours)]:
            paths = [key.removeprefix(PREFIX).removesuffix(".base_layer.weight") for key in other]
            raise MethodError(
                f"This adapter brings along a weight of {listed(paths)} that is not this base's; load the base, with the "
                "vocabulary, that it was trained on."
            )
        return {key: values for key, values in tensors.items() if key not in known}

    @torch.no_grad()
    def load(self, tensors: Mapping[str, Tensor]) -> None:
        """Copy in what ``tensors`` of such a method gave. Keys and shapes were checked before."""
        for key, values in self.tensors().items():
            values.copy_(tensors[key])

    def state_shapes(self, tensors: Mapping[str, Tensor]) -> dict[str, tuple[int, ...]]:
        """The keys and shapes that ``tensors``, of a method's ``state``, must have; how far training was may decide."""
        return {key: tuple(values.shape) for key, values in self.method.state().items()}

    def save_beside(self, folder: Path) -> None:
        """Write into an adapter's ``folder`` what its user needs beside the adapter, as a tokenizer with new tokens."""

    # ── config ────────────────────────────────────────────────────────────────────────────────────────────────────────

    def peft_config(self, every_path: list[str]) -> Fields:
        """This method's fields of PEFT's ``adapter_config.json``. ``every_path``: the untouched model's module paths."""
        raise NotImplementedError

    @classmethod
    def is_of(cls, values: Fields) -> bool:
        """Whether this method, and not another of the same ``peft_type``, wrote PEFT's ``adapter_config.json``."""
        return True

    @classmethod
    def section_of(cls, values: Fields, folder: Path) -> Fields | None:
        """The recipe section of the adapter in ``folder`` whose ``adapter_config.json`` has ``values``; its fields are
        checked afterwards. None where it asks for nothing of this method."""
        raise NotImplementedError

    # ── as plain LoRA ─────────────────────────────────────────────────────────────────────────────────────────────────

    def why_not_portable(self) -> str | None:
        """Why this is no plain LoRA that every server loads, and what to do; None where it is."""
        name, why = self.method.section.name, self.method.merge.why_not()
        return f"{name} is no LoRA, which is what servers load; {why or 'export it merged'}"

    def pairs(self) -> dict[str, tuple[Tensor, Tensor]]:
        """As plain LoRA: fp32 (A [r, in], B [out, r]) by module path, the scaling folded into B: ΔW = B A.

        What is added to the *original* weights, where the method changed those. Only where ``why_not_portable`` is None.
        """
        raise NotImplementedError


def whole(number: float) -> int | float:
    """8.0 → 8, as PEFT's configs have it."""
    return int(number) if number == int(number) else number


def same_weight(theirs: Tensor, ours: Tensor) -> bool:
    """Whether two frozen weights are the same in the coarser of their dtypes. On meta only the shape can be compared."""
    if theirs.shape != ours.shape or ours.device.type == "meta":
        return theirs.shape == ours.shape
    coarse = min(theirs.dtype, ours.dtype, key=lambda dtype: dtype.itemsize)
    return torch.equal(theirs.to(ours.device, coarse), ours.to(coarse))


def padded(values: Tensor, rows: int, columns: int) -> Tensor:
    """``values`` with zeros below and to the right, up to [rows, columns]."""
    return nn.functional.pad(values, (0, columns - values.shape[1], 0, rows - values.shape[0]))
