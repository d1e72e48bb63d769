"""What every method answers to: what it plants in a model and how that trains. A method changes the *model*, never the loop.

    Method    what is planted, what trains                        the dozen members of this file
    Layout    the adapter on disk, PEFT's keys and config         layout.py
    Merge     what was learned, as part of the base's weights     merge.py

The defaults are those of a method that needs nothing special. A new method is one file beside ``lora.py``, one section in
``recipe/methods.py`` and one line in ``METHODS`` (``base.py``). Knows planted modules; must not know any formula or the
training loop.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from qlora.machine.device import DTYPES
from qlora.methods.layout import Layout
from qlora.methods.merge import Merge
from qlora.methods.planted import Planted
from qlora.model.base import Base

ORDER = ("linears", "embeddings", "containers", "modules", "prompt")
"""Methods are planted from the inside out, so that a module path means the same to each of them."""


class Method:
    """One way of planting trainable parameters in a base."""

    place: ClassVar[str] = "linears"
    """What it stands on, one of ``ORDER``."""
    auto_dtype: ClassVar[torch.dtype | None] = None
    """What ``adapter_dtype: auto`` means; None: bf16 beside bf16 compute on CUDA, fp32 elsewhere."""
    by_rows: ClassVar[bool] = False
    """Whether what is planted answers each row of a batch from that row alone, so that rows can be mixed."""
    unmergeable: ClassVar[str | None] = None
    """Why no weights of a base can hold what is planted, and what to do, without a full stop; None where they can."""
    layout_class: ClassVar[type[Layout]] = Layout
    merge_class: ClassVar[type[Merge]] = Merge

    def __init__(self, section: Any, base: Base, seed: int = 0, values_follow: bool = False) -> None:
        self.section = section
        self.base = base
        self.seed = seed
        self.values_follow = values_follow
        """Whether a file's values will be loaded: what takes long to begin with may be left out then."""
        self.device = base.device
        self.dtype = self.trained_dtype(section.adapter_dtype, base.device, base.compute_dtype)
        self.planted: dict[str, Planted] = {}
        """What ``inject`` planted, by the module path of the untouched model."""
        self.left_out: list[str] = []
        """What the recipe's targets would take and cannot hold an adapter of its size, by path."""
        self.layout = self.layout_class(self)
        self.merge = self.merge_class(self)

    @classmethod
    def trained_dtype(cls, requested: str, device: torch.device, compute_dtype: torch.dtype) -> torch.dtype:
        """What the method's parameters are kept in; ``requested`` is the section's ``adapter_dtype``.

        Beside fp16 compute ``auto`` is fp32, because small updates vanish in fp16.
        """
        if requested != "auto":
            return DTYPES[requested]
        narrow = device.type == "cuda" and compute_dtype == torch.bfloat16
        return cls.auto_dtype or (torch.bfloat16 if narrow else torch.float32)

    # ── planting ──────────────────────────────────────────────────────────────────────────────────────────────────────

    def inject(self, model: nn.Module) -> None:
        """Plant in ``model``, in place.

        Raises MethodError before anything is changed. Works on a model on the meta device too, where nothing is read.
        """
        self.planted = self.new_layers(model)
        self.attach(model)

    def new_layers(self, model: nn.Module) -> dict[str, Planted]:
        """What is to be planted in ``model``, by the module path that each stands at; ``model`` is not changed."""
        raise NotImplementedError

    def attach(self, model: nn.Module) -> None:
        """Put everything planted where its base stands."""
        for path, layer in self.planted.items():
            if layer.training != model.training:  # mostly it is the same when adapters are switched
                layer.train(model.training)
            self.put(model, path, layer)

    def detach(self, model: nn.Module) -> None:
        """Put every base back where it stood."""
        for path, layer in reversed(self.planted.items()):
            self.put(model, path, layer.base)

    def put(self, model: nn.Module, path: str, module: nn.Module) -> None:
        """Make ``module`` the one at ``path`` of the untouched model."""
        model.set_submodule(path, module)

    def generator(self, path: str) -> torch.Generator:
        """Draws on the CPU that depend on the seed and ``path`` alone, not on which other targets there are."""
        return generator_of(self.seed, path)

    # ── training ──────────────────────────────────────────────────────────────────────────────────────────────────────

    @property
    def virtual_tokens(self) -> int:
        """Tokens that stand in the stream before every text; 0 while the method is switched off."""
        return int(self.section.virtual_tokens) if any(layer.enabled for layer in self.planted.values()) else 0

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

    def learning_rate_ratio(self, name: str) -> float:
        """How many times the recipe's learning rate the parameter ``name`` learns with."""
        return 1.0

    def prepare(self, batches: Iterable[Mapping[str, Tensor]]) -> None:
        """Look at training batches before the first step of a new run; a resumed run reads what came of it instead."""

    def penalty(self) -> Tensor | None:
        """What is added to a step's mean loss, a scalar; None for most."""
        return None

    def after_step(self, step: int, total: int) -> None:
        """Called after optimizer step ``step`` (from 1) of ``total``, while ``.grad`` still holds that step's gradients."""

    def report(self) -> dict[str, object]:
        """What the method found out, for people, as plain values for JSON."""
        return {}

    def state(self) -> dict[str, Tensor]:
        """What a resumed run needs beside the adapter: running averages, networks that are dropped on export."""
        return {}

    def load_state(self, tensors: Mapping[str, Tensor]) -> None:
        """Copy in what ``state`` gave."""

    def why_not_disabled(self) -> str | None:
        """Why the base cannot answer alone any more, and what to do; None where it can."""
        return None


def generator_of(seed: int, name: str) -> torch.Generator:
    """Draws on the CPU that depend on ``seed`` and ``name`` alone."""
    digest = hashlib.sha256(f"{seed}:{name}".encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "little") >> 1)
