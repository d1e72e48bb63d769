"""Targets: which modules of a base a method adapts, and the names that tell PEFT the same.

Knows module paths and PEFT's matching rule; must not know what is planted there.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any, TypeVar

from torch import nn

from qlora.errors import MethodError, listed, nearest
from qlora.methods.planted import Planted, modules_unplanted, unplanted
from qlora.model.anatomy import OWN_USE, TO_ENCODER, fused_experts, is_router, kind, read_as_weights, repeated
from qlora.model.experts import PackedExperts
from qlora.model.names import OnLoad
from qlora.model.nf4 import is_linear
from qlora.recipe.methods import Targets

WITHOUT_OUT_PROJ = ("falcon_h1", "falcon_mamba", "mamba", "mamba2", "nemotron_h")
"""Types for which PEFT refuses adapters on ``out_proj``, a mixer's: kernels of others read its weight without calling it."""

Number = TypeVar("Number", int, float)


def find_linears(model: nn.Module) -> dict[str, nn.Module]:
    """Every linear below the layers, by module path: attention and MLP, not the head, the embeddings or a mixture's routers.

    Left out is what could not train: attention to an encoder, and linears whose weights a family uses by itself. A model without such layers, as an ``nn.Sequential``, gives all its linears but the last, which is its head.
    Example: ``{"model.layers.0.self_attn.q_proj": Linear4bit(…), …}``
    """
    # Layers are the members of a ModuleList; the output head and the embeddings stand outside of them. A number alone
    # does not tell: ResNet's head is ``classifier.1``, and diffusers' attention has ``to_out.0`` in a list of its own.
    layers = [
        f"{path}.{name}." if path else f"{name}."
        for path, module in model.named_modules()
        if isinstance(module, nn.ModuleList)
        for name, _ in module.named_children()
    ]
    linears = {path: module for path, module in modules_unplanted(model) if is_linear(unplanted(module))}
    paths, unused = {path for path, _ in modules_unplanted(model)}, set(read_as_weights(model))
    unused |= {path for path in linears if leaf(path) in OWN_USE or set(path.split(".")) & {*TO_ENCODER}}
    below = {
        path: module
        for path, module in linears.items()
        if path.startswith(tuple(layers)) and not is_router(path, paths) and path not in unused
    }
    return below or dict(list(linears.items())[:-1])


def choose_targets(
    model: nn.Module, wanted: Targets, fits: Callable[[nn.Module], bool] = is_linear, what: str = "linear"
) -> dict[str, nn.Module]:
    """The modules that ``wanted`` names, in the model's order. ``fits`` says what the method can adapt, in words ``what``.

    Raises MethodError when a name matches nothing that fits, listing the names that do, when it is of experts that are
    fused into one parameter, and when another method has planted something there already.
    """
    if wanted == "all-linear":
        without = _peft_refuses(model)
        chosen = {path: module for path, module in find_linears(model).items() if path not in without}
        if not chosen:
            raise MethodError(
                f"{type(model).__name__} has no linear below its layers to adapt; name modules in method.target_modules."
            )
    else:
        every = {path: module for path, module in modules_unplanted(model) if fits(unplanted(module))}
        shared = repeated(model)
        fused, packed = fused_experts(model), experts_without_adapter(model)
        for name in wanted:
            if not any(matches(name, path) for path in every) and any(matches(name, path) for path in packed):
                raise MethodError(
                    f"method.target_modules names '{name}', which is of experts, several matrices in one; LoRA adapts them by "
                    f"method.target_parameters=[{_short(packed, name)}]."
                )
            if found := [path for path in fused if matches(name, path) or matches(name, path.rpartition(".")[0])]:
                raise MethodError(
                    f"method.target_modules names '{name}', but the experts of {type(model).__name__} are fused into one "
                    f"parameter of three dimensions ({listed(found, 2)}), which is no linear and cannot be adapted; name "
                    f"linears, by more of their path where they share '{name}'."
                )
            if found := [path for path in every if path in shared and matches(name, path)]:
                raise MethodError(
                    f"method.target_modules names '{name}', but {kind(model)} has {listed(found, 2)} in several layers at once, and an "
                    "adapter of all of them would be several to PEFT; name linears of one layer, by more of their path."
                )
            if not any(matches(name, path) for path in every):
                raise _nothing(model, name, every, what)
        chosen = {path: module for path, module in every.items() if any(matches(name, path) for name in wanted)}
    if taken := [path for path, module in chosen.items() if isinstance(module, Planted)]:
        raise MethodError(
            f"Two methods want to change {listed(taken, 3)}; give each other method.target_modules, or leave one out."
        )
    return chosen


def left_out(model: nn.Module, wanted: Targets) -> list[str]:
    """A sentence for each kind of what ``all-linear`` leaves out: what PEFT could not load, and experts that are no linears."""
    if wanted != "all-linear":
        return []
    said = []
    if without := set(_peft_refuses(model)) - repeated(model):
        said.append(
            f"method.target_modules is all-linear without {listed(sorted({leaf(path) for path in without}))}: PEFT loads no "
            f"adapter there in {kind(model)} models. Name it to adapt it all the same."
        )
    if shared := repeated(model) & find_linears(model).keys():
        said.append(
            f"method.target_modules is all-linear without the {len(shared)} linears of blocks that several layers of {kind(model)} share "
            f"({listed(sorted(shared), 2)}): an adapter of all of them would be several to PEFT."
        )
    if uncalled := [path for path in read_as_weights(model) if path in dict(model.named_modules())]:
        said.append(
            f"method.target_modules is all-linear without {listed(sorted(set(map(leaf, uncalled))))}, whose weights {kind(model)} reads "
            "without calling them: an adapter there would never be asked."
        )
    if fused := fused_experts(model):
        said.append(
            f"method.target_modules is all-linear without {len(fused)} parameters of three dimensions, each of several experts "
            f"({listed(fused, 2)}), which are no linears: they stay as they are."
        )
    if packed := experts_without_adapter(model):
        said.append(
            f"method.target_modules is all-linear without the experts, which stay as they are; LoRA adapts them too where they are named: "
            f"method.target_parameters=[{_short(packed)}]."
        )
    return said


def experts_without_adapter(model: nn.Module) -> list[str]:
    """The packed matrices of experts that nothing was planted on, by their parameters' names in the untouched model."""
    return [path for path, module in modules_unplanted(model) if isinstance(module, PackedExperts)]


def _short(paths: Iterable[str], name: str = "") -> str:
    """The ends of paths that contain ``name``, once each: ``mlp.experts.gate_up_proj, mlp.experts.down_proj``."""
    return ", ".join(dict.fromkeys(".".join(path.split(".")[-3:]) for path in paths if not name or matches(name, path)))


def _peft_refuses(model: nn.Module) -> list[str]:
    """Linears that an adapter in PEFT's form cannot reach, or not as one."""
    shared = repeated(model)
    names, refused = OnLoad(model), getattr(getattr(model, "config", None), "model_type", None) in WITHOUT_OUT_PROJ
    linears = find_linears(model)
    return [
        path
        for path in linears
        if (refused and leaf(path) == "out_proj") or path in shared or names.written(path) is None
    ]


def _nothing(model: nn.Module, name: str, every: Iterable[str], what: str) -> MethodError:
    found = [(path, module) for path, module in modules_unplanted(model) if matches(name, path)]
    if found and not isinstance(
        unplanted(found[0][1]), nn.Linear
    ):  # as torch's attention has, which reads its weight itself
        path, module = found[0]
        return MethodError(
            f"method.target_modules names '{name}', but '{path}' ({type(unplanted(module)).__name__}) is no {what}; the method "
            f"modules trains it whole, also beside another: [{{name: lora}}, {{name: modules, modules: [{name}]}}]."
        )
    existing = sorted({leaf(path) for path in every})
    return MethodError(
        f"method.target_modules names '{name}', which no {what} of {type(model).__name__} is called."
        f"{nearest(name, existing)} The names there are {listed(existing, 12)}."
    )


def target_names(planted: Iterable[str], every_path: Iterable[str], parts: int = 1) -> list[str]:
    """The shortest names that make PEFT adapt ``planted`` and nothing else: the last ``parts`` of paths, or else the full ones.

    ``every_path`` are all module paths of the model before anything was planted: PEFT matches names against all of them.
    """
    chosen = set(planted)
    short = sorted({".".join(path.split(".")[-parts:]) for path in chosen})
    matched = {path for path in every_path if any(matches(name, path) for name in short)}
    return short if matched == chosen else sorted(chosen)


EXPERTS = ("gate", "w1", "w2", "w3", "gate_proj", "up_proj", "down_proj")
"""In a mixture of experts PEFT's LoRA takes these names of linears for experts that transformers has fused since."""


def peft_targets(planted: Iterable[str], every_path: Iterable[str], mixture: bool) -> dict[str, Any]:
    """PEFT's ``target_modules`` that reach ``planted`` and nothing else.

    In a ``mixture`` of experts the linears of shared experts and dense layers are no modules to PEFT, which turns their names
    into those of fused experts (peft 0.21, utils/transformers_weight_conversion.py), so their weights are ``target_parameters``:
    PEFT keeps those beside the same tensors, under the same keys.
    """
    chosen, every = set(planted), list(every_path)
    hidden = beside_experts(chosen, mixture)
    fields: dict[str, Any] = {"target_modules": target_names(chosen - hidden, every)}
    if hidden:
        fields["target_parameters"] = [f"{name}.weight" for name in target_names(hidden, every, parts=2)]
    return fields


def linears_of(parameters: Iterable[object]) -> tuple[str, ...]:
    """The linears whose weights PEFT's ``target_parameters`` name; experts' are no weights of linears."""
    return tuple(str(name).removesuffix(".weight") for name in parameters if str(name).endswith(".weight"))


def beside_experts(planted: Iterable[str], mixture: bool) -> set[str]:
    """Those of ``planted`` that PEFT takes for experts that transformers has fused since."""
    return {path for path in planted if mixture and leaf(path) in EXPERTS}


def pattern_value(pattern: Mapping[str, float], path: str, default: float) -> float:
    """The value of the first name in ``pattern`` that matches ``path``, else ``default``: PEFT's rank and alpha patterns."""
    return next((value for name, value in pattern.items() if matches(name, path)), default)


def check_pattern(field: str, pattern: Iterable[str], targets: Iterable[str]) -> None:
    """Raise MethodError when a name in the pattern ``method.<field>`` is never the first one that matches a target."""
    targets, names = list(targets), list(pattern)
    used = {next((name for name in names if matches(name, path)), None) for path in targets}
    for name in names:
        if name in used:
            continue
        if reached := [path for path in targets if matches(name, path)]:
            first = next(other for other in names if matches(other, reached[0]))
            raise MethodError(
                f"method.{field} names '{name}' after '{first}', which matches the same targets and counts first; put "
                f"'{name}' before it."
            )
        existing = sorted({leaf(path) for path in targets})
        raise MethodError(
            f"method.{field} names '{name}', which no target is called.{nearest(name, existing)} The targets are "
            f"{listed(existing, 12)}."
        )


def sorted_pattern(pattern: Mapping[str, Number], targets: Iterable[str]) -> dict[str, Number]:
    """``pattern`` by names whose order does not matter: config files sort them, and the first that matches counts."""
    targets = list(targets)
    by_name = dict(sorted(pattern.items()))
    if all(pattern_value(pattern, path, 0) == pattern_value(by_name, path, 0) for path in targets):
        return by_name
    first = {path: next((name for name in pattern if matches(name, path)), None) for path in targets}
    return {path: pattern[name] for path, name in first.items() if name is not None}


def matches(name: str, path: str) -> bool:
    """PEFT's rule: ``q_proj`` and ``self_attn.q_proj`` match ``model.layers.0.self_attn.q_proj``; ``proj`` does not."""
    return path == name or path.endswith(f".{name}")


def leaf(path: str) -> str:
    """The last component of a module path."""
    return path.rpartition(".")[2]
