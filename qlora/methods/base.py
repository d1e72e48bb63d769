"""The adapted model: a frozen base with one or several methods planted in it.

    base (frozen) + method section → AdaptedModel: the same model with planted modules inside

Knows names and states of adapters; must not know their formulas, their files or the training loop.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from qlora.errors import MethodError, listed
from qlora.machine.device import dtype_name
from qlora.machine.disk import bytes_text
from qlora.methods.adalora import AdaLoraMethod
from qlora.methods.bitfit import BitFitMethod
from qlora.methods.bottleneck import BottleneckMethod
from qlora.methods.dora import DoraMethod
from qlora.methods.full import FullMethod
from qlora.methods.ia3 import Ia3Method
from qlora.methods.lora import LoraMethod
from qlora.methods.method import ORDER, Method
from qlora.methods.modules import ModulesMethod
from qlora.methods.new_tokens import NewTokensMethod
from qlora.methods.planted import Planted
from qlora.methods.prefix import PrefixMethod
from qlora.methods.prompt import PromptTuningMethod, PTuningMethod
from qlora.methods.targets import leaf
from qlora.model.base import Base
from qlora.model.experts import PackedExperts
from qlora.model.in_memory import as_base
from qlora.model.nf4 import Packed, features, is_linear
from qlora.recipe import parts_of
from qlora.residence.boundary import having

if TYPE_CHECKING:
    from qlora.recipe.methods import MethodSection

METHODS: dict[str, type[Method]] = {
    "lora": LoraMethod,
    "dora": DoraMethod,
    "adalora": AdaLoraMethod,
    "ia3": Ia3Method,
    "bitfit": BitFitMethod,
    "prompt_tuning": PromptTuningMethod,
    "p_tuning": PTuningMethod,
    "prefix_tuning": PrefixMethod,
    "bottleneck": BottleneckMethod,
    "full": FullMethod,
    "modules": ModulesMethod,
    "new_tokens": NewTokensMethod,
}

MOST_SHOWN = 100  # characters of a method's settings in a repr


class OnBase:
    """What stands wherever a model answers: a base, with methods planted in it or not."""

    base: Base

    @property
    def model(self) -> nn.Module:
        """The model, with what is planted in it at the moment."""
        return self.base.model

    @property
    def tokenizer(self) -> Any:
        """The base's tokenizer, as transformers has it; None for a module of yours."""
        return self.base.tokenizer

    @property
    def device(self) -> torch.device:
        return self.base.device


class AdaptedModel(OnBase):
    """A frozen base with methods planted in it.

    Each method remembers what it planted by the module paths of the untouched model, such as
    ``model.layers.0.self_attn.q_proj``, because layers may be wrapped later, which changes their paths but not an
    adapter's name.
    """

    def __init__(self, base: Base, section: Any, seed: int = 0, values_follow: bool = False) -> None:
        self.base = base
        self.section = section
        """The recipe's ``method`` section."""
        here = [path for path, part in base.model.named_modules() if not isinstance(part, PackedExperts)]
        # with those of towers that were not loaded: what is to match names will have them
        self.paths = list(base.paths or here)
        """Every module path of the untouched model, in which experts' matrices are parameters."""
        parts = [METHODS[part.name](part, base, seed, values_follow) for part in parts_of(section)]
        self.methods: list[Method] = sorted(parts, key=_order)
        """From the inside out."""
        self._freeze()
        begun: list[Method] = []
        try:
            for method in self.methods:
                method.layout.alone = len(self.methods) == 1
                begun.append(method)  # one that fails half-way is taken out too
                method.inject(base.model)
        except BaseException:
            _detach(base.model, begun)
            self._thaw()
            raise

    def __repr__(self) -> str:
        """Three lines: the methods and their base, what trains, where it is planted."""
        trained = self.trainable_parameters().values()
        numbers, kinds = self.count_trainable(), sorted({dtype_name(values.dtype) for values in trained})
        size = sum(values.nbytes for values in trained)
        names = sorted({leaf(path) for path in self.planted})
        base = self.base
        return "\n".join(
            [
                f"AdaptedModel: {' and '.join(map(_described, parts_of(self.section)))} on {base.name} "
                f"({'unquantised' if base.quantization == 'none' else base.quantization}, {base.device})",
                f"  trains {numbers:,} numbers, {100 * numbers / _numbers_in(self):.3g} % of all, in {' and '.join(kinds)} "
                f"({bytes_text(size)})",
                f"  planted at {len(self.layers()):,} modules: {listed(names, 8)}" if names else "  nothing is planted",
            ]
        )

    @property
    def virtual_tokens(self) -> int:
        """Tokens that stand in the stream before every text, with the ids −P … −1; 0 while the methods are disabled."""
        return sum(method.virtual_tokens for method in self.methods)

    @property
    def first_position(self) -> int:
        """The position of a text's own first token, with all that the methods put before it."""
        return sum(method.first_position for method in self.methods)

    @property
    def planted(self) -> dict[str, Planted]:
        """What is planted, by the untouched model's module paths; the outermost where methods stand on each other."""
        return {path: layer for method in self.methods for path, layer in method.planted.items()}

    def layers(self) -> list[Planted]:
        """Every planted module, of all methods."""
        return [layer for method in self.methods for layer in method.planted.values()]

    def trainable_parameters(self) -> dict[str, nn.Parameter]:
        """What trains, by name and in the model's order: ``model.layers.0.self_attn.q_proj.lora_A``, …"""
        return {name: values for method in self.methods for name, values in method.parameters().items()}

    def count_trainable(self) -> int:
        """Trainable numbers in all."""
        return sum(parameter.numel() for parameter in self.trainable_parameters().values())

    def learning_rate_ratios(self) -> dict[str, float]:
        """By parameter, how many times the recipe's learning rate it learns with."""
        return {name: method.learning_rate_ratio(name) for method in self.methods for name in method.parameters()}

    def prepare(self, batches: Iterable[Mapping[str, Tensor]]) -> None:
        """Let the methods look at training batches, once, before the first step of a new run; each sees the same ones."""
        # what the first to look has taken is held for the others: token ids of some dozens of batches
        for method, same in zip(self.methods, itertools.tee(batches, len(self.methods)), strict=True):
            method.prepare(same)

    def penalty(self) -> Tensor | None:
        """What is added to a step's mean loss, a scalar; None where no method asks for anything."""
        found = [penalty for method in self.methods if (penalty := method.penalty()) is not None]
        return torch.stack(found).sum() if found else None

    def after_step(self, step: int, total: int) -> None:
        """Called after optimizer step ``step`` (from 1) of ``total``, while the gradients are still there."""
        for method in self.methods:
            method.after_step(step, total)

    def report(self) -> dict[str, object]:
        """What the methods found out, for people: AdaLoRA's ranks. Empty for most."""
        return {key: value for method in self.methods for key, value in method.report().items()}

    def adapter_state(self) -> dict[str, Tensor]:
        """The adapter by PEFT's tensor keys. The tensors may be the parameters' own memory: copy what must not change.

        Example: ``base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight`` [r, in]
        """
        return {key: values for method in self.methods for key, values in method.layout.tensors().items()}

    def load_adapter_state(self, tensors: Mapping[str, Tensor], what: str = "This adapter") -> None:
        """Copy an adapter's values in, by PEFT's tensor keys; they take the dtype and device that the adapter has here.

        Raises MethodError before anything is copied: keys that are missing, that nothing here is called, shapes that do
        not fit, values that are not finite. ``what`` is what such a message calls the adapter.
        """
        self._load(self.fitted(tensors, what), [])

    def method_state(self) -> dict[str, Tensor]:
        """What a resumed run needs beside ``adapter_state``; empty for most methods."""
        return {
            f"{method.section.name}/{key}": values for method in self.methods for key, values in method.state().items()
        }

    def load_state(
        self, adapter: Mapping[str, Tensor], method: Mapping[str, Tensor], what: str = "This adapter"
    ) -> None:
        """Copy in what ``adapter_state`` and ``method_state`` gave. Raises MethodError, before either is copied, when one of
        them does not fit."""
        fitted = self.fitted(adapter, what)
        self._load(fitted, self._by_method(method))

    def fitted(self, tensors: Mapping[str, Tensor], what: str) -> Mapping[str, Tensor]:
        """An adapter's ``tensors`` as they are copied. Raises MethodError unless they fit."""
        for method in self.methods:
            tensors = method.layout.fitted(tensors)
        shapes = {key: tuple(values.shape) for key, values in self.adapter_state().items()}
        check_adapter(tensors, shapes, self.base.name, what)
        return tensors

    def _by_method(self, tensors: Mapping[str, Tensor]) -> list[dict[str, Tensor]]:
        """The ``tensors`` of ``method_state``, for each method its own. Raises MethodError unless they fit."""
        found = []
        expected: dict[str, tuple[int, ...]] = {}
        for method in self.methods:
            stem = f"{method.section.name}/"
            found.append({k.removeprefix(stem): v for k, v in tensors.items() if k.startswith(stem)})
            expected |= {f"{stem}{key}": shape for key, shape in method.layout.state_shapes(found[-1]).items()}
        check_adapter(tensors, expected, self.base.name)
        return found

    @torch.no_grad()
    def _load(self, adapter: Mapping[str, Tensor], states: list[dict[str, Tensor]]) -> None:
        for method in self.methods:
            method.layout.load(adapter)
        for method, values in zip(self.methods, states, strict=False):  # there is one for each, or none
            method.load_state(values)

    @contextmanager
    def disabled(self) -> Iterator[None]:
        """Inside, the base answers alone, as if nothing had been planted.

        Raises MethodError where a method has changed the base itself: full fine-tuning, after its first step.
        """
        if why := next((why for method in self.methods if (why := method.why_not_disabled()) is not None), None):
            raise MethodError(f"'{self.base.name}' cannot answer alone any more: {why}.")
        with having(self.layers(), "enabled", False):
            yield

    def remove(self) -> Base:
        """Take the adapter out again and give the base back as it was. Not after its layers were wrapped."""
        _detach(self.model, self.methods)
        self._thaw()
        return self.base

    def attach(self) -> None:
        """Put what ``remove`` took out back in. Raises MethodError when another adapter is there."""
        refuse_adapted(self.base)
        self._freeze()
        for method in self.methods:
            method.attach(self.model)

    def _freeze(self) -> None:
        """Take the gradients from everything in the base, and remember what had one: a module of yours may have been training."""
        self._wanted = [values for values in self.model.parameters() if values.requires_grad]
        self.model.requires_grad_(False)

    def _thaw(self) -> None:
        for values in self._wanted:
            values.requires_grad_(True)


def _order(method: Method) -> tuple[int, str]:
    """From the inside out; bottlenecks of several forms in the order of these, not in that of the recipe."""
    return ORDER.index(method.place), getattr(method.section, "form", "")


def _detach(model: nn.Module, methods: list[Method]) -> None:
    for method in reversed(methods):
        method.detach(model)


def _described(section: MethodSection) -> str:
    """A method for people, with what its section sets: ``lora (r=8, alpha=16.0)``."""
    chosen = {key: value for key, value in section.model_dump(exclude_defaults=True).items() if key != "name"}
    text = f"{section.name}" + (f" ({', '.join(f'{key}={value}' for key, value in chosen.items())})" if chosen else "")  # type: ignore[attr-defined]
    return text if len(text) <= MOST_SHOWN else f"{text[:MOST_SHOWN]}…"


def _numbers_in(adapted: AdaptedModel) -> int:
    """All numbers of the model and its adapters, those of a packed or streamed weight as many as it stands for."""
    found: dict[int, int] = {}
    for module in adapted.model.modules():
        for name, values in module.named_parameters(recurse=False):
            if not (name == "weight" and is_linear(module)):
                found[id(values)] = values.numel()
        if is_linear(module) or isinstance(module, Packed):
            size, weight = math.prod(features(module)), module.weight
            shared = isinstance(weight, Tensor) and weight.numel() == size  # with an embedding, perhaps
            found[id(weight) if shared else id(module)] = size
    return sum(found.values())


def refuse_adapted(base: Base) -> None:
    """Raise MethodError when ``base`` carries an adapter."""
    if taken := [path for path, module in base.model.named_modules() if isinstance(module, Planted)]:
        raise MethodError(
            f"'{base.name}' carries an adapter already, at {listed(taken, 3)}; remove that one or load the base again."
        )


def check_adapter(
    tensors: Mapping[str, Tensor], expected: Mapping[str, tuple[int, ...]], base_name: str, what: str = "This adapter"
) -> None:
    """Raise MethodError unless ``tensors`` are finite and have exactly the ``expected`` keys and shapes."""
    missing = [key for key in expected if key not in tensors]
    unexpected = [key for key in tensors if key not in expected]
    shapes = [
        f"{key} {list(tensors[key].shape)} instead of {list(shape)}"
        for key, shape in expected.items()
        if key in tensors and tuple(tensors[key].shape) != shape
    ]
    remedy = "use the base and the method section that it was trained with."
    other = f"{what} was trained on another base than '{base_name}'"
    if shapes:
        raise MethodError(f"{other}, or with another rank: it has the wrong shape in {listed(shapes)}; {remedy}")
    if missing and unexpected:
        raise MethodError(
            f"{other}, or with other targets: it lacks {listed(missing)} and has unknown {listed(unexpected)}; {remedy}"
        )
    if missing:
        raise MethodError(
            f"{what} lacks {listed(missing)}, which '{base_name}' with these targets needs: it is incomplete or of "
            f"another base; {remedy}"
        )
    if unexpected:
        raise MethodError(
            f"{what} has unknown {listed(unexpected)}, for which '{base_name}' with these targets has no place: it is of "
            f"another base or method; {remedy}"
        )
    if broken := [key for key, values in tensors.items() if not torch.isfinite(values).all()]:
        raise MethodError(f"{what} holds values that are not finite, in {listed(broken)}; use an earlier one.")


def apply_method(base: Base | nn.Module, method: Any, seed: int = 0, *, values_follow: bool = False) -> AdaptedModel:
    """Plant ``method``, a section such as ``LoRA(r=8)``, in ``base``, in place. All else in the model is frozen.

    ``base`` is a loaded base or any ``nn.Module`` of yours: a classifier, a vision model. ``seed`` decides the first values;
    ``values_follow`` says that a file's will be loaded over them, so that none are taken from the weights (PiSSA, LoftQ).
    Raises MethodError when a target matches nothing, when the method cannot serve such a base, or when it carries an
    adapter already; the base is as it was then.
    """
    base = base if isinstance(base, Base) else as_base(base)
    refuse_adapted(base)
    return AdaptedModel(base, method, seed, values_follow)


__all__ = ["METHODS", "AdaptedModel", "apply_method", "check_adapter", "refuse_adapted"]
