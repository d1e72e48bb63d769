"""Methods: how the few trainable parameters are planted into a frozen base, and what every method answers to.

    base (frozen) + method section → AdaptedModel: the same model with planted layers inside

A new method is one file beside ``lora.py``, one section in ``config.py`` and one line in ``METHODS``. Knows names and
states of adapters; must not know their formulas, their files or the training loop.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from qlora import config
from qlora.errors import MethodError, listed
from qlora.methods.lora import LoraLinear, LoraMethod
from qlora.methods.targets import target_names
from qlora.model.load import Base

PREFIX = "base_model.model."  # PEFT puts this before every module path


class Method(Protocol):
    """What one way of planting trainable parameters answers to. A method changes the model, never the loop."""

    virtual_tokens: int
    """Tokens that the method puts before every text; 0 for most."""

    def inject(self, model: nn.Module) -> dict[str, LoraLinear]:
        """Plant the trainable layers in place of the model's own; return them by the module path they stand at."""

    def penalty(self) -> Tensor | None:
        """What is added to a step's loss, a scalar; None for most."""

    def after_step(self, step: int, total: int) -> None:
        """Called after optimizer step ``step`` (from 1) of ``total``: budgets move, ranks are cut."""


METHODS: dict[str, type[LoraMethod]] = {"lora": LoraMethod}


class AdaptedModel:
    """A frozen base with a method planted in it.

    ``planted`` maps the module paths of the untouched model, such as ``model.layers.0.self_attn.q_proj``, to the layers
    that stand there now. The paths are remembered here because layers may be wrapped later, which changes their paths but
    not an adapter's name. ``target_modules`` are the names that make PEFT adapt the same modules.
    """

    def __init__(self, base: Base, section: config.LoRA, method: Method) -> None:
        every_path = [path for path, _ in base.model.named_modules()]
        self.base = base
        self.method = section
        self.planted = method.inject(base.model)
        self.target_modules = target_names(self.planted, every_path)
        self.virtual_tokens = method.virtual_tokens
        self.penalty = method.penalty
        self.after_step = method.after_step

    @property
    def model(self) -> nn.Module:
        """The causal language model, adapters inside."""
        return self.base.model

    @property
    def tokenizer(self) -> Any:
        return self.base.tokenizer

    @property
    def device(self) -> torch.device:
        return self.base.device

    def trainable_parameters(self) -> dict[str, nn.Parameter]:
        """What trains, by name and in the model's order: ``model.layers.0.self_attn.q_proj.lora_A``, …"""
        return {
            f"{path}.{name}": parameter
            for path, layer in self.planted.items()
            for name, parameter in layer.named_parameters(recurse=False)
        }

    def count_trainable(self) -> int:
        """Trainable numbers in all."""
        return sum(parameter.numel() for parameter in self.trainable_parameters().values())

    def adapter_state(self) -> dict[str, Tensor]:
        """The adapter by PEFT's tensor keys. The tensors are the parameters' own memory: copy what must not change.

        Example: ``base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight`` [r, in]
        """
        return {f"{PREFIX}{name}.weight": values.detach() for name, values in self.trainable_parameters().items()}

    @torch.no_grad()
    def load_adapter_state(self, tensors: Mapping[str, Tensor]) -> None:
        """Copy an adapter's values in, by PEFT's tensor keys; they take the dtype and device that the adapter has here.

        Raises MethodError before anything is copied: keys that are missing, that nothing here is called, shapes that do
        not fit, values that are not finite.
        """
        state = self.adapter_state()
        check_adapter(tensors, {key: tuple(values.shape) for key, values in state.items()}, self.base.name)
        for key, values in state.items():
            values.copy_(tensors[key])

    @contextmanager
    def disabled(self) -> Iterator[None]:
        """Inside, the base answers alone, as if nothing had been planted."""
        before = {path: layer.enabled for path, layer in self.planted.items()}
        for layer in self.planted.values():
            layer.enabled = False
        try:
            yield
        finally:
            for path, enabled in before.items():
                self.planted[path].enabled = enabled

    def remove(self) -> Base:
        """Take the adapter out again and give the base back as it was. Not after its layers were wrapped."""
        for path, layer in self.planted.items():
            self.model.set_submodule(path, layer.base)
        return self.base


def check_adapter(tensors: Mapping[str, Tensor], expected: Mapping[str, tuple[int, ...]], base_name: str) -> None:
    """Raise MethodError unless ``tensors`` are finite and have exactly the ``expected`` keys and shapes."""
    missing = [key for key in expected if key not in tensors]
    unexpected = [key for key in tensors if key not in expected]
    shapes = [
        f"{key} {list(tensors[key].shape)} instead of {list(shape)}"
        for key, shape in expected.items()
        if key in tensors and tuple(tensors[key].shape) != shape
    ]
    problems = [
        f"{what} {listed(keys)}"
        for what, keys in (("it lacks", missing), ("it has unknown", unexpected), ("it has the wrong shape in", shapes))
        if keys
    ]
    if problems:
        raise MethodError(
            f"This adapter does not belong to '{base_name}' with these targets: {'; '.join(problems)}. "
            "Use the base and the method section that it was trained with."
        )
    if broken := [key for key, values in tensors.items() if not torch.isfinite(values).all()]:
        raise MethodError(f"This adapter holds values that are not finite, in {listed(broken)}; use an earlier one.")


def apply_method(base: Base, method: config.LoRA, seed: int = 0) -> AdaptedModel:
    """Plant ``method`` in ``base``, in place. Everything else in the model is frozen; ``seed`` decides the first values.

    Raises MethodError when a target matches nothing, when the rank is too large for a target, or when the base carries an
    adapter already.
    """
    if taken := [path for path, module in base.model.named_modules() if isinstance(module, LoraLinear)]:
        raise MethodError(
            f"'{base.name}' carries an adapter already, at {listed(taken, 3)}; remove that one or load the base again."
        )
    base.model.requires_grad_(False)
    return AdaptedModel(base, method, METHODS[method.name](method, base.device, base.compute_dtype, seed))
