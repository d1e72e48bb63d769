"""Accounting: how many numbers a method trains and how many bytes they take on disk, from shapes alone.

    config.json, configuration or module ─► skeleton on meta ─► method planted there ─► counted

No weight is read, made or drawn, so a model of 175 billion parameters is counted in a second. Knows skeletons, methods and
AdamW's moments; must not know data, activations or what fits.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from torch import nn

from qlora.machine.disk import bytes_text
from qlora.methods.base import AdaptedModel, apply_method
from qlora.model.base import count_parameters
from qlora.model.in_memory import as_base, on_meta, quantise
from qlora.model.skeleton import any_skeleton
from qlora.recipe import AnyMethod
from qlora.training.masters import master_bytes
from qlora.training.optim import state_bytes

if TYPE_CHECKING:
    from transformers import PretrainedConfig


@dataclass(frozen=True)
class Account:
    """What a method adds to a base."""

    parameters: int
    """Numbers in the base, packed ones counted one by one, shared ones once."""
    trainable: dict[str, int]
    """Numbers that train, by method."""
    adapter_bytes: int
    """The tensors of the adapter's file."""
    method_bytes: int
    """The tensors that a resumed run needs beside them; 0 for most methods."""
    optimizer_bytes: int
    """AdamW's two moments, and the fp32 masters of what computes in 16 bits."""

    @property
    def trainable_parameters(self) -> int:
        """Numbers that train, in all."""
        return sum(self.trainable.values())

    @property
    def checkpoint_bytes(self) -> int:
        """What a run continues from: adapter, method state, moments and masters."""
        return self.adapter_bytes + self.method_bytes + self.optimizer_bytes

    def __str__(self) -> str:
        each = " + ".join(name if len(self.trainable) == 1 else f"{name} {n:,}" for name, n in self.trainable.items())
        part = 100 * self.trainable_parameters / max(1, self.parameters)
        return "\n".join(
            [
                f"{each}: {self.trainable_parameters:,} trainable parameters ({part:.3g}% of {self.parameters:,})",
                f"  {'adapter on disk':<20}{bytes_text(self.adapter_bytes):>12}",
                f"  {'checkpoint on disk':<20}{bytes_text(self.checkpoint_bytes):>12}",
            ]
        )


def account(
    model: str | Path | nn.Module | PretrainedConfig,
    method: AnyMethod,
    quantization: str = "none",
    optimizer: str = "adamw",
) -> Account:
    """What ``method``, a section such as ``LoRA(r=8)``, trains in ``model``, and what that takes on disk.

    ``model`` is a folder with a config.json (it needs neither weights nor a tokenizer), a name on the hub, a transformers
    configuration, or a module of yours, which stays as it is. An ``adapter_dtype`` of ``auto`` counts as fp32: ask for bf16
    to count 16 bits. ``quantization`` decides what can be planted and changes no count: LoftQ wants nf4, full fine-tuning
    none. ``optimizer`` as in the recipe's ``training`` section.

    Raises ModelError where there is no such model, and MethodError where the method does not fit it.
    """
    skeleton = on_meta(model) if isinstance(model, nn.Module) else any_skeleton(model)
    if quantization != "none":
        quantise(skeleton, quantization)
    parameters = count_parameters(skeleton)
    return account_of(apply_method(as_base(skeleton), method), parameters, optimizer)


def account_of(adapted: AdaptedModel, parameters: int, optimizer: str) -> Account:
    """The same for what is planted already, in a base of ``parameters`` numbers; weights may be on meta."""
    trained = adapted.trainable_parameters().values()
    trainable: dict[str, int] = {}
    for method in adapted.methods:
        name = method.section.name
        count = sum(values.numel() for values in method.parameters().values())
        trainable[name] = trainable.get(name, 0) + count
    return Account(
        parameters=parameters,
        trainable=trainable,
        adapter_bytes=sum(values.nbytes for values in adapted.adapter_state().values()),
        method_bytes=sum(values.nbytes for values in adapted.method_state().values()),
        optimizer_bytes=sum(state_bytes(values.numel(), optimizer) for values in trained) + master_bytes(trained),
    )
