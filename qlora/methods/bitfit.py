"""BitFit: the biases alone (Ben Zaken et al. 2021, arXiv:2106.10199).

    y = base(x) + (b − b₀)              b [out] trains and begins as b₀, the base's own bias; without one, b₀ = 0

The base may be a linear, 4-bit or not, or a LayerNorm: all add their bias last. b is kept in full, as it goes into the
merged model, and computed with as a difference, so that step 0 is the base exactly. PEFT has no such method; the file on
disk is ours. Knows biases, and how an architecture is asked for them; must not know how W is stored, or the training loop.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn

from qlora.errors import MethodError, listed
from qlora.methods.layout import PREFIX, Layout
from qlora.methods.merge import Merge
from qlora.methods.method import Method
from qlora.methods.planted import Planted, modules_unplanted, unplanted
from qlora.methods.targets import choose_targets, leaf, matches
from qlora.model.nf4 import features, is_linear
from qlora.recipe.methods import BitFit


class BiasLayer(Planted):
    """A frozen linear or LayerNorm with a ``trained_bias`` [out]; ``bias`` is the base's own."""

    base: nn.Linear | nn.LayerNorm

    def __init__(self, base: nn.Module, bias: Tensor) -> None:
        super().__init__(base)
        self.trained_bias = nn.Parameter(bias)

    def forward(self, x: Tensor) -> Tensor:
        """[…, in] → […, out] in the dtype of ``x``."""
        y: Tensor = self.base(x)
        if not self.enabled:
            return y
        bias, own = self.trained_bias, self.base.bias
        change = bias if own is None else bias - own.to(bias.dtype)
        return y + change.to(y.dtype)

    @torch.no_grad()
    def merged(self, name: str, values: Tensor) -> Tensor:
        """``bias`` as it was learned; the weight stays."""
        return self.trained_bias.to(values, copy=True) if name == "bias" else values


class BitFitLayout(Layout):
    """PEFT has no such method: each bias has the name that it has in a plain model."""

    def key(self, name: str) -> str:
        return f"{PREFIX}{name.removesuffix('trained_bias')}bias"


class BitFitMerge(Merge):
    """Learned biases in the place of the base's, and new ones where the architecture has a setting for them."""

    @property
    def new(self) -> dict[str, Tensor]:
        """The biases that the base has not, by name: ``model.layers.0.mlp.up_proj.bias`` [out]."""
        layers: dict[str, Any] = {path: layer for path, layer in self.method.planted.items() if layer.base.bias is None}
        return {f"{path}.bias": layer.trained_bias.detach() for path, layer in layers.items()}

    @cached_property
    def settings(self) -> dict[str, dict[str, tuple[int, ...]]]:
        """What of the model's configuration gives it biases that are needed, each with the shapes of all it adds.

        Found by building the architecture, on the meta device, with each setting that is off and has ``bias`` in its name.
        Example: ``{"attention_bias": {"model.layers.0.self_attn.q_proj.bias": (4096,), …}, "mlp_bias": …}``
        """
        model: Any = self.method.base.model
        found: dict[str, dict[str, tuple[int, ...]]] = {}
        config: Any = getattr(model, "config", None)
        if not self.new or not hasattr(config, "to_dict"):
            return found
        plain = _shapes(type(model), config)
        for name, value in config.to_dict().items():
            if value is not False or "bias" not in name:
                continue
            changed = copy.deepcopy(config)
            setattr(changed, name, True)
            shapes = _shapes(type(model), changed)
            added = {key: shape for key, shape in shapes.items() if key not in plain}
            only_biases = plain.keys() <= shapes.keys() and all(key.endswith(".bias") for key in added)
            if only_biases and added.keys() & self.new.keys():
                found[name] = added
        return found

    def why_not(self) -> str | None:
        """A plain model has biases where its architecture has a place for them."""
        holds = {name for added in self.settings.values() for name in added}
        lacking = [name.removesuffix(".bias") for name in self.new if name not in holds]
        if not lacking:
            return None
        kind = getattr(
            getattr(self.method.base.model, "config", None), "model_type", type(self.method.base.model).__name__
        )
        return (
            f"a {kind} model has no place for biases in {_leaves(lacking)}; keep the adapter beside its base, or train with "
            "method.target_modules that have a place for one"
        )

    def new_tensors(self) -> dict[str, Tensor]:
        """The new biases, and zeros for those that the same settings ask for beside them."""
        new = self.new
        shapes = {name: shape for added in self.settings.values() for name, shape in added.items()}
        values = {name: new[name] if name in new else torch.zeros(shape) for name, shape in shapes.items()}
        return {self._in_checkpoint(name): bias for name, bias in values.items()}

    def _in_checkpoint(self, name: str) -> str:
        """What the checkpoint would call a bias: as it calls the weight beside it."""
        weight = f"{name.removesuffix('bias')}weight"
        return f"{(self.method.base.names or {}).get(weight, weight).removesuffix('weight')}bias"

    def config(self, values: dict[str, Any]) -> dict[str, Any]:
        """With the settings that give the model its biases."""
        return {**values, **dict.fromkeys(self.settings, True)}


class BitFitMethod(Method):
    """How the biases are planted; nothing happens in the loss or between steps."""

    auto_dtype = torch.float32  # beside a large bias, bf16 has no number close enough for a small step
    by_rows = True
    layout_class = BitFitLayout
    merge_class = BitFitMerge
    section: BitFit

    def new_layers(self, model: nn.Module) -> dict[str, Planted]:
        return {path: self.new_layer(module) for path, module in self.targets(model).items()}

    def targets(self, model: nn.Module) -> dict[str, nn.Module]:
        """What is to carry a bias that trains; ``all-linear`` means the LayerNorms too.

        Raises MethodError where there is no bias, unless ``new_biases`` is on.
        """
        wanted = self.section.target_modules
        if wanted == "all-linear":
            norms = {path: module for path, module in modules_unplanted(model) if has_norm_bias(unplanted(module))}
            if taken := [path for path, module in norms.items() if isinstance(module, Planted)]:
                raise MethodError(
                    f"Two methods want to change {listed(taken, 3)}; name BitFit's targets in method.target_modules."
                )
            chosen = choose_targets(model, wanted) | norms
        else:
            chosen = choose_targets(
                model, wanted, lambda one: is_linear(one) or has_norm_bias(one), "linear or LayerNorm"
            )
        if self.section.new_biases:
            return chosen
        found = {path: module for path, module in chosen.items() if module.bias is not None}
        if not found:
            raise MethodError(
                f"BitFit trains biases, and no target in {type(model).__name__} has one ({_leaves(chosen)}); set "
                "method.new_biases=true to add new ones that begin at zero."
            )
        bare = [] if wanted == "all-linear" else [n for n in wanted if not any(matches(n, path) for path in found)]
        if bare:
            raise MethodError(
                f"method.target_modules names {listed(bare)}, which has no bias in {type(model).__name__}; leave it out, or "
                "set method.new_biases=true to add new ones that begin at zero."
            )
        return found

    def new_layer(self, module: nn.Module) -> BiasLayer:
        """A bias on ``module`` that begins as its own, or at zero."""
        old = module.bias
        size = old.shape if isinstance(old, Tensor) else (features(module)[0],)
        bias = torch.zeros(size, device=self.device, dtype=self.dtype)
        if isinstance(old, Tensor) and not old.is_meta:
            bias.copy_(old)
        return BiasLayer(module, bias)


def has_norm_bias(module: nn.Module) -> bool:
    """Whether ``module`` is a LayerNorm over the last dimension with a bias."""
    last = getattr(module, "data_format", "channels_last") == "channels_last"
    return isinstance(module, nn.LayerNorm) and module.bias is not None and last


def _shapes(architecture: Any, config: Any) -> dict[str, tuple[int, ...]]:
    with torch.device("meta"):
        model = architecture(copy.deepcopy(config))
    return {name: tuple(values.shape) for name, values in model.state_dict().items()}


def _leaves(paths: Iterable[str]) -> str:
    return listed(sorted({leaf(path) for path in paths}), 8)
