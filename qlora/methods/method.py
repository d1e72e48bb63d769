"""What every method answers to. A method changes the *model*, never the loop.

The defaults are those of a method that needs nothing special: it plants modules, their parameters train, and each is
one tensor on disk. A new method is one file beside ``lora.py``, one section in ``method_sections.py`` and one line in
``METHODS`` (``base.py``). Knows planted modules and disk keys; must not know any formula or the training loop.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from qlora.errors import MethodError, listed
from qlora.machine.device import DTYPES
from qlora.methods.planted import Planted
from qlora.model.load import Base

PREFIX = "base_model.model."  # PEFT puts this before every module path
ORDER = ("linears", "embeddings", "containers", "modules", "prompt")
"""Methods are planted from the inside out, so that a module path means the same to each of them."""


class Method:
    """One way of planting trainable parameters in a base."""

    place: ClassVar[str] = "linears"
    """What it stands on, one of ``ORDER``."""
    peft_type: str | None = None
    """PEFT's name of the method; None where PEFT has none, and then our own file is written. A method that starts from
    weights which PEFT's file does not tell of has none for itself alone."""
    reads_gradients: ClassVar[bool] = False
    """Whether ``after_step`` or ``penalty`` needs all gradients at once, so that none may be freed in backward."""
    needs_state: bool = False
    """Whether an adapter without what ``state`` gives means nothing; elsewhere only a resumed run misses it."""
    only: ClassVar[Mapping[str, tuple[Any, ...]]] = {}
    """Fields of PEFT's config that may only have these values here."""
    read: ClassVar[frozenset[str]] = frozenset()
    """Fields of PEFT's config that ``section_from`` reads."""

    def __init__(self, section: Any, base: Base, seed: int = 0) -> None:
        self.section = section
        self.base = base
        self.seed = seed
        self.device = base.device
        self.dtype = self.trained_dtype(section.adapter_dtype, base.device, base.compute_dtype)
        self.planted: dict[str, Planted] = {}
        """What ``inject`` planted, by the module path of the untouched model."""
        self.alone = True
        """Whether it is the only method of its model; PEFT's keys may depend on that."""
        self.values_follow = False
        """Whether a file's values will be loaded: what takes long to begin with may be left out by ``inject`` then."""

    @classmethod
    def trained_dtype(cls, requested: str, device: torch.device, compute_dtype: torch.dtype) -> torch.dtype:
        """What the method's parameters are kept in; ``requested`` is the section's ``adapter_dtype``."""
        return adapter_dtype(requested, device, compute_dtype)

    def inject(self, model: nn.Module) -> dict[str, Planted]:
        """Plant in ``model``, in place, and return what was planted by the module path that it stands at.

        Raises MethodError before anything is changed. Works on a model on the meta device too, where nothing is read.
        """
        raise NotImplementedError

    def prepare(self, batches: Iterable[Mapping[str, Tensor]]) -> None:
        """Look at training batches before the first step of a new run; a resumed run reads what came of it instead."""

    @property
    def virtual_tokens(self) -> int:
        """Tokens that stand in the stream before every text; 0 while the method is switched off."""
        on = any(layer.enabled for layer in self.planted.values())
        return int(self.section.virtual_tokens) if on else 0

    @property
    def first_position(self) -> int:
        """How many positions are taken before every text, by tokens of the stream or without them."""
        return self.virtual_tokens

    def parameters(self) -> dict[str, nn.Parameter]:
        """What trains, by name: ``model.layers.0.self_attn.q_proj.lora_A``."""
        return {
            f"{path}.{name}": values
            for path, layer in self.planted.items()
            for name, values in layer.own_parameters().items()
        }

    def penalty(self) -> Tensor | None:
        """What is added to a step's mean loss, a scalar; None for most."""
        return None

    def after_step(self, step: int, total: int) -> None:
        """Called after optimizer step ``step`` (from 1) of ``total``, while ``.grad`` still holds that step's gradients."""

    def learning_rate_ratio(self, name: str) -> float:
        """How many times the recipe's learning rate the parameter ``name`` learns with."""
        return 1.0

    def key(self, name: str) -> str:
        """The tensor's key on disk, for a parameter's name."""
        return f"{PREFIX}{name}.weight"

    def tensors(self) -> dict[str, Tensor]:
        """The adapter by its keys on disk. The tensors may be the parameters' own memory: copy what must not change."""
        return {self.key(name): values.detach() for name, values in self.parameters().items()}

    def without_base(self, tensors: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        """``tensors`` without the frozen weights that PEFT saves beside the adapter of an embedding or a head.

        Raises MethodError where such a weight is not the base's own: a vocabulary that was resized, another base.
        """
        found = {f"{PREFIX}{path}.base_layer.weight": layer for path, layer in self.planted.items()}
        brought = {key: getattr(layer.base, "weight", None) for key, layer in found.items() if key in tensors}
        known = {key: ours for key, ours in brought.items() if isinstance(ours, Tensor)}
        if other := [key for key, ours in known.items() if not _same_weight(tensors[key], ours)]:
            paths = [key.removeprefix(PREFIX).removesuffix(".base_layer.weight") for key in other]
            raise MethodError(
                f"This adapter brings along a weight of {listed(paths)} that is not this base's; load the base, with the "
                "vocabulary, that it was trained on."
            )
        return {key: values for key, values in tensors.items() if key not in known}

    def fitted(self, tensors: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        """``tensors`` in the shapes that they have here, where other software leaves out what does nothing."""
        return tensors

    @torch.no_grad()
    def load(self, tensors: Mapping[str, Tensor]) -> None:
        """Copy in what ``tensors`` of such a method gave. Keys and shapes were checked before."""
        for key, values in self.tensors().items():
            values.copy_(tensors[key])

    def state(self) -> dict[str, Tensor]:
        """What a resumed run needs beside ``tensors``: running averages, networks that are dropped on export."""
        return {}

    def state_shapes(self, tensors: Mapping[str, Tensor]) -> dict[str, tuple[int, ...]]:
        """The keys and shapes that ``tensors``, of a ``state``, must have; they may differ with how far training was."""
        return {key: tuple(values.shape) for key, values in self.state().items()}

    def load_state(self, tensors: Mapping[str, Tensor]) -> None:
        """Copy in what ``state`` gave."""

    def report(self) -> dict[str, Any]:
        """What the method found out, for people, as plain values for JSON."""
        return {}

    def save_beside(self, folder: Path) -> None:
        """Write into an adapter's ``folder`` what its user needs beside the adapter, as a tokenizer with new tokens."""

    def peft_config(self, every_path: list[str]) -> dict[str, Any]:
        """This method's fields of PEFT's ``adapter_config.json``. ``every_path``: the untouched model's module paths."""
        raise NotImplementedError

    @classmethod
    def is_of(cls, values: Mapping[str, Any]) -> bool:
        """Whether this method, and not another of the same ``peft_type``, wrote PEFT's ``adapter_config.json``."""
        return True

    @classmethod
    def section_from(cls, values: Mapping[str, Any]) -> dict[str, Any] | None:
        """The recipe section, as plain values, of PEFT's ``adapter_config.json``; None where it asks for nothing of this
        method. Its fields are checked afterwards."""
        raise NotImplementedError

    @classmethod
    def section_of(cls, values: Mapping[str, Any], folder: Path) -> dict[str, Any] | None:
        """``section_from`` for the adapter in ``folder``, where other files may tell more than its config."""
        return cls.section_from(values)

    def merged(self, name: str, values: Tensor) -> Tensor:
        """The model's tensor ``name`` (as ``model.layers.0.mlp.up_proj.weight``), in fp32, with what was learned added."""
        return self._at(name, lambda layer, inside: layer.merged(inside, values), values)

    def before_quantising(self, name: str, weight: Tensor) -> Tensor:
        """What the frozen weight ``name`` was quantised from, given the checkpoint's own values."""
        return self._at(name, lambda layer, inside: layer.before_quantising(weight), weight)

    def original(self, name: str, weight: Tensor) -> Tensor:
        """What ``merged`` is added to where the checkpoint's own weight ``name`` is to carry the adapter."""
        return self._at(name, lambda layer, inside: layer.original(weight), weight)

    def merged_shape(self, name: str, shape: tuple[int, ...]) -> tuple[int, ...]:
        """The shape of the merged tensor ``name``: another one where tokens were added."""
        return shape

    def unties(self, one: str, other: str) -> bool:
        """Whether what was learned makes different tensors of ``one`` and ``other``, of which the base has one for both."""
        return False

    def merged_config(self, values: dict[str, Any]) -> dict[str, Any]:
        """The merged model's config.json, given the base's."""
        return values

    def new_tensors(self) -> dict[str, Tensor]:
        """Tensors that the merged model has and the base has not, by name."""
        return {}

    def finish_merge(self, folder: Path) -> None:
        """Write into the merged model's ``folder`` what else it needs, as a tokenizer with new tokens."""

    def _at(self, name: str, act: Callable[[Planted, str], Tensor], otherwise: Tensor) -> Tensor:
        """``act(layer, name inside it)`` for the planted module that ``name`` lies in."""
        parts = name.split(".")
        for count in range(len(parts) - 1, 0, -1):
            layer = self.planted.get(".".join(parts[:count]))
            if layer is not None:
                return act(layer, ".".join(parts[count:]))
        return otherwise

    def why_not_disabled(self) -> str | None:
        """Why the base cannot answer alone any more, and what to do; None where it can."""
        return None

    def why_not_merged(self) -> str | None:
        """Why the trained method cannot become part of the base's weights, and what to do, without a full stop; None where
        it can."""
        return None

    def why_not_portable(self) -> str | None:
        """Why this is no plain LoRA that every server loads, and what to do; None where it is."""
        return (
            f"{self.section.name} is no LoRA, which is what servers load; {self.why_not_merged() or 'export it merged'}"
        )

    def pairs(self) -> dict[str, tuple[Tensor, Tensor]]:
        """As plain LoRA: fp32 (A [r, in], B [out, r]) by module path, the scaling folded into B: ΔW = B A.

        What is added to the *original* weights, where the method changed those. Only where ``why_not_portable`` is None.
        """
        raise NotImplementedError

    def generator(self, path: str) -> torch.Generator:
        """Draws on the CPU that depend on the seed and ``path`` alone, not on which other targets there are."""
        return generator_of(self.seed, path)

    def plant(self, model: nn.Module, path: str, layer: Planted) -> None:
        """Put ``layer`` where its base stands."""
        if layer.training != model.training:  # mostly it is the same when adapters are switched
            layer.train(model.training)
        model.set_submodule(path, layer)

    def attach(self, model: nn.Module) -> None:
        """Put everything planted where its base stands."""
        for path, layer in self.planted.items():
            self.plant(model, path, layer)

    def detach(self, model: nn.Module) -> None:
        """Put every base back where it stood."""
        for path, layer in reversed(self.planted.items()):
            model.set_submodule(path, layer.base)


def _same_weight(theirs: Tensor, ours: Tensor) -> bool:
    """Whether two frozen weights are the same in the coarser of their dtypes. On meta only the shape can be compared."""
    if theirs.shape != ours.shape or ours.device.type == "meta":
        return theirs.shape == ours.shape
    coarse = min(theirs.dtype, ours.dtype, key=lambda dtype: dtype.itemsize)
    return torch.equal(theirs.to(ours.device, coarse), ours.to(coarse))


def generator_of(seed: int, name: str) -> torch.Generator:
    """Draws on the CPU that depend on ``seed`` and ``name`` alone."""
    digest = hashlib.sha256(f"{seed}:{name}".encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "little") >> 1)


def adapter_dtype(requested: str, device: torch.device, compute_dtype: torch.dtype) -> torch.dtype:
    """The dtype that adapters are kept in. ``auto``: bf16 on CUDA with bf16 compute, fp32 elsewhere.

    With fp16 compute the adapters stay fp32, because small updates vanish in fp16.
    """
    if requested != "auto":
        return DTYPES[requested]
    return torch.bfloat16 if device.type == "cuda" and compute_dtype == torch.bfloat16 else torch.float32
