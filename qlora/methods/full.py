"""Full fine-tuning: every weight of an unquantised base trains, as in pre-training; nothing is planted.

    y = x (W + ΔW)ᵀ + b + Δb          ΔW, Δb: what the optimizer's steps add to the model's own parameters

This is the measure that the other methods are held against, and their price list: a gradient and two moments for every
weight. The weights are changed in place, so after the first step the base is gone: it cannot answer alone (``disabled``),
and ``remove`` freezes and gives back the model as it was trained.

The weights compute in the compute dtype. In bf16, which keeps 8 bits, an update below 1/512 of its weight would be rounded
away: at a learning rate of 1e-5 most weights would stand still while the loss looks healthy. So training keeps a second copy
of them in fp32 (``training/masters.py``), as of every parameter in 16 bits: 18 bytes a number with gradient and moments,
where fp32 takes 16 and an 8-bit optimizer 12 or 10; several processes share the copy and the moments out
(``training/shares.py``), and the weights with it where they are spread. A resumed run has that copy from its checkpoint. In fp16 small gradients
vanish altogether, so it is refused.

Knows the parameters of a model; must not know how they are stored, or the training loop.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TypeVar

import torch
from torch import Tensor, nn

from qlora.errors import MethodError, listed
from qlora.machine.device import DTYPES, dtype_name
from qlora.methods.layout import Layout
from qlora.methods.merge import Merge
from qlora.methods.method import Method
from qlora.methods.planted import Planted
from qlora.model import anatomy
from qlora.model.base import Base
from qlora.model.nf4 import Packed
from qlora.recipe.methods import Full
from qlora.residence.ends import held_on_host

Values = TypeVar("Values", bound=Tensor)


class FullLayout(Layout):
    """PEFT has no such method: every trained weight, and the buffers that a model is saved with, by their names."""

    method: FullMethod

    def tensors(self) -> dict[str, Tensor]:
        return {**super().tensors(), **{self.key(name): values for name, values in self.method.averages.items()}}

    def load(self, tensors: Mapping[str, Tensor]) -> None:
        """Copy the weights in; the base's own are gone then."""
        super().load(tensors)
        self.method.moved = True


class FullMerge(Merge):
    """Every tensor is the trained one."""

    method: FullMethod

    def touches(self, name: str) -> bool:
        return name in self.method.aliases

    def merged(self, name: str, values: Tensor) -> Tensor:
        """In the place of the base's, under whichever of its names the checkpoint has it."""
        trained = self.method.aliases.get(name)
        return values if trained is None else trained.detach().to(values)


class FullMethod(Method):
    """How a whole model trains: its parameters are set free, and are the adapter."""

    place = "containers"
    layout_class = FullLayout
    merge_class = FullMerge
    section: Full

    def __init__(self, section: Full, base: Base, seed: int = 0, values_follow: bool = False) -> None:
        super().__init__(section, base, seed, values_follow)
        self.trained: dict[str, nn.Parameter] = {}
        """What trains, by name, tied weights once."""
        self.aliases: dict[str, nn.Parameter] = {}
        """The same by every name that the model has for it."""
        self.averages: dict[str, Tensor] = {}
        """Buffers that are saved with a model: a batch norm's running means change in training too."""
        self.moved = False
        """Whether the weights are known to be no longer the base's."""
        self.versions: list[int] = []

    @classmethod
    def trained_dtype(cls, requested: str, device: torch.device, compute_dtype: torch.dtype) -> torch.dtype:
        """The compute dtype: there are no other weights than the model's."""
        return compute_dtype if requested == "auto" else DTYPES[requested]

    def new_layers(self, model: nn.Module) -> dict[str, Planted]:
        """Set the parameters free; nothing is planted. Raises MethodError for a base that is quantised, streamed or in
        fp16."""
        self._refuse(model)
        frozen = set() if self.section.embeddings else _embeddings_and_head(model)
        if held := {path for number, path in held_on_host(model).items() if number not in frozen}:
            raise MethodError(
                f"Full fine-tuning trains {listed(sorted(held))} too, but nothing trains in host memory; set "
                "memory.embedding=device and memory.head=device, or method.embeddings=false."
            )
        found: dict[int, nn.Parameter] = {}
        for name, values in model.named_parameters(remove_duplicate=False):
            if id(values) in frozen or not values.is_floating_point():
                continue
            if id(values) not in found:
                found[id(values)] = self.trained[name] = self._real(values)
                found[id(values)].requires_grad_(True)
            self.aliases[name] = found[id(values)]
        saved = model.state_dict(keep_vars=True)
        self.averages = {name: self._real(values) for name, values in model.named_buffers() if name in saved}
        self.versions = self._versions()
        return {}

    def _refuse(self, model: nn.Module) -> None:
        name = self.base.name
        if self.base.placement is not None:
            raise MethodError(
                f"Full fine-tuning trains every weight, but layers of '{name}' are streamed (memory.layers), so that they are "
                "not on the device to be trained; set memory.layers=resident, or method.name=lora. Several processes may share its layers "
                "(memory.tier=processes)."
            )
        if self.base.quantization != "none" or any(isinstance(module, Packed) for module in model.modules()):
            raise MethodError(
                f"Full fine-tuning changes the weights themselves, but those of '{name}' are packed ({self.base.quantization}) "
                "and get no gradient; set model.quantization=none, or method.name=lora, which trains beside packed weights."
            )
        if self.base.compute_dtype == torch.float16:
            raise MethodError(
                f"Full fine-tuning in fp16 loses most updates, which are too small for it, and '{name}' computes in fp16; "
                "set model.compute_dtype to bf16 or fp32."
            )
        if self.dtype != self.base.compute_dtype:
            raise MethodError(
                f"method.adapter_dtype is {self.section.adapter_dtype}, but full fine-tuning trains the weights in the dtype "
                f"that '{name}' computes in, {dtype_name(self.base.compute_dtype)}; leave it out, or set model.compute_dtype."
            )

    def _real(self, values: Values) -> Values:
        """The tensor itself, or in its place memory for what will be loaded, where the model has no memory (merging)."""
        if not values.is_meta or self.device.type == "meta":
            return values
        empty = torch.empty_like(values, device=self.device, requires_grad=False)
        return nn.Parameter(empty) if isinstance(values, nn.Parameter) else empty  # type: ignore[return-value]

    def parameters(self) -> dict[str, nn.Parameter]:
        """The model's own, by their names there: ``model.layers.0.mlp.up_proj.weight``."""
        return dict(self.trained)

    def after_step(self, step: int, total: int) -> None:
        """Remember that the base is gone."""
        self.moved = True

    def _versions(self) -> list[int]:
        # torch counts what is written into a tensor; bitsandbytes' optimizers write behind its back, hence ``moved``
        return [values._version for values in self.trained.values()]

    def why_not_disabled(self) -> str | None:
        """Before the first step the model is the base."""
        if not self.moved and self._versions() == self.versions:
            return None
        return "full fine-tuning has changed its weights in place; load the base again to ask it alone"

    def attach(self, model: nn.Module) -> None:
        """Set the parameters free again."""
        for values in self.trained.values():
            values.requires_grad_(True)

    def detach(self, model: nn.Module) -> None:
        """Freeze the parameters, as trained as they are."""
        for values in self.trained.values():
            values.requires_grad_(False)


def _embeddings_and_head(model: nn.Module) -> set[int]:
    """The ids of the parameters of every embedding and of the output head."""
    modules = [module for module in model.modules() if isinstance(module, nn.Embedding)]
    head = anatomy.head(model)
    return {id(values) for module in (*modules, *([head] if head else [])) for values in module.parameters()}
