"""Chosen modules trained whole, in full precision: a head, a norm, the last layers (PEFT's ``modules_to_save``).

    y = module(x; W′)          W′ begins as W (dequantised where W is packed) and trains; W stays beside it, frozen

A norm or a classifier's head cannot be learned by a low-rank update, and a few whole layers may be trained where the
memory for all of them is lacking. A head that is tied to the embedding is untied by this, as with PEFT: only the copy
trains.

The copy is kept in the adapter's dtype and computed with in the base's, so that it begins as exactly what the base is. That
dtype is fp32 unless another is asked for: in bf16, which keeps 8 bits, a norm's weights near 1 would never change, since a
step of 1e-4 is rounded away there.

A causal language model gets the head of a classifier, ``score``, in this way too: where ``labels`` say what its outputs stand for,
it is made, beside the output head, with the values that transformers would draw.

Knows modules and their names; must not know what they compute, how W is stored (ask ``dense_weight``) or the training loop.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from qlora.errors import MethodError, listed, nearest
from qlora.files.durable import write_json
from qlora.files.strangers import MAX_OURS, Fault, read_object
from qlora.methods.layout import Fields, Layout
from qlora.methods.merge import Merge
from qlora.methods.method import Method
from qlora.methods.planted import Planted
from qlora.methods.targets import leaf, matches
from qlora.model import anatomy
from qlora.model.base import Base
from qlora.model.nf4 import FrozenLinear, at_hand, dense_weight, is_empty
from qlora.model.skeleton import classifier_of
from qlora.recipe.methods import Modules
from qlora.residence.ends import HostLinear, on_device

# PEFT adds both of these to every classifier's modules_to_save, whichever of them it has.
CLASSIFIERS = ("classifier", "score")
SCORE = "score"
LABELS = "labels.json"  # beside an adapter: what the outputs of its head stand for


class TrainedModule(Planted):
    """A module and its trainable copy, ``module``, of the same kind but dense, which answers in its place."""

    def __init__(self, base: nn.Module, module: nn.Module, dtypes: Mapping[str, torch.dtype]) -> None:
        super().__init__(base)
        self.module = module
        self.dtypes = dict(dtypes)
        """What each parameter of the copy is computed with in."""

    def __getattr__(self, name: str) -> Any:
        # a parent may read a weight instead of calling its module; it is to see the copy's
        modules = self.__dict__.get("_modules", {})
        if self.__dict__.get("enabled") and "module" in modules and name in modules["module"]._parameters:
            values = modules["module"]._parameters[name]
            return values if values is None else values.to(self.dtypes.get(name, values.dtype))
        return super().__getattr__(name)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """What the module takes and gives."""
        if not self.enabled:
            return self.base(*args, **kwargs)
        parameters = dict(self.module.named_parameters())
        if all(values.dtype == self.dtypes[name] for name, values in parameters.items()):
            return self.module(*args, **kwargs)
        cast = {name: values.to(self.dtypes[name]) for name, values in parameters.items()}
        return torch.func.functional_call(self.module, cast, args, kwargs)

    @torch.no_grad()
    def widen(self) -> None:
        """Compute in fp32 from here on, with the values that it computed with so far."""
        for name, values in self.module.named_parameters():
            if values.is_floating_point():
                values.data, self.dtypes[name] = values.to(self.dtypes[name]).float(), torch.float32

    def own_parameters(self) -> dict[str, nn.Parameter]:
        """By their names in the module that was copied."""
        return dict(self.module.named_parameters())

    @torch.no_grad()
    def merged(self, name: str, values: Tensor) -> Tensor:
        """The copy's tensor in the place of the base's."""
        trained = self.module.state_dict().get(name)
        return values if trained is None else trained.to(values)


class ScoreHead(nn.Linear):
    """Hidden states in any dtype to logits [..., labels] in the weight's, fp32: there are few of them."""

    def forward(self, input: Tensor) -> Tensor:
        return super().forward(input.to(self.weight.dtype))


class ModulesLayout(Layout):
    """PEFT's field ``modules_to_save``: each copy whole, under the module's own name."""

    method: ModulesMethod
    read = frozenset({"modules_to_save"})

    def save_beside(self, folder: Path) -> None:
        """PEFT's config has no place for the names of labels."""
        if labels := self.method.section.labels:
            write_json(folder / LABELS, {"labels": list(labels)})

    def tensors(self) -> dict[str, Tensor]:
        """The copies' whole state, as PEFT saves it: buffers too."""
        return {
            self.key(f"{path}.{name}"): values
            for path, layer in self.method.planted.items()
            for name, values in layer.module.state_dict().items()
        }

    def peft_config(self, every_path: list[str]) -> Fields:
        """PEFT matches the plain end of a path: ``norm`` would be ``input_layernorm`` too."""
        leaves = sorted({leaf(path) for path in self.method.planted})
        reached = {path for path in every_path if any(path.endswith(name) for name in leaves)}
        names = leaves if reached == set(self.method.planted) else sorted(self.method.planted)
        return {"modules_to_save": names} | ({"task_type": "SEQ_CLS"} if self.method.section.labels else {})

    @classmethod
    def section_of(cls, values: Fields, folder: Path) -> Fields | None:
        names = values.get("modules_to_save")
        if not names:
            return None
        try:
            labels = (read_object(folder / LABELS, MAX_OURS) or {}).get("labels", [])
        except Fault as fault:
            raise MethodError(f"'{folder / LABELS}' is damaged ({fault}); save the adapter again.") from None
        return {"name": "modules", "modules": names} | ({"labels": labels} if labels else {})


class ModulesMerge(Merge):
    """A head or an embedding that trained alone is tied to nothing any more."""

    method: ModulesMethod

    def config(self, values: dict[str, Any]) -> dict[str, Any]:
        if self.method.classifies:
            return {**values, **_classifier_config(self.method, values)}
        return {**values, "tie_word_embeddings": False} if self._untied() else values

    def drops(self, name: str) -> bool:
        """A classifier has no output head but ``score``."""
        path = anatomy.path_of(self.method.base.model, anatomy.head(self.method.base.model))
        return self.method.classifies and path is not None and name.startswith(f"{path}.")

    def finish(self, folder: Path) -> None:
        """The tokenizer of a classifier names the token that its config.json takes for padding."""
        if self.method.classifies and self.method.base.tokenizer is not None:
            self.method.base.tokenizer.save_pretrained(folder)

    def new_tensors(self) -> dict[str, Tensor]:
        """The classifier's head, and the weights that the checkpoint leaves out because they were tied to another one."""
        if self.method.classifies:
            return {f"{SCORE}.weight": self.method.parameters()[f"{SCORE}.weight"].detach()}
        base, group = self.method.base, self._untied()
        names = base.names or {}
        present = next((path for path in group if f"{path}.weight" in names), None)
        found: dict[str, Tensor] = {}
        for path in group:
            name, layer = f"{path}.weight", self.method.planted.get(path)
            if name in names:
                continue
            if isinstance(layer, TrainedModule):
                found[name] = layer.module.get_parameter("weight").detach()
            elif present is not None and base.checkpoint is not None:
                found[name] = base.checkpoint.read(names[f"{present}.weight"])
        return found

    def _untied(self) -> tuple[str, ...]:
        """The modules that shared a weight, where one of them trains now."""
        return self.method.tied if set(self.method.tied) & set(self.method.planted) else ()


class ModulesMethod(Method):
    """How chosen modules are copied; each copy is saved whole."""

    place = "modules"
    auto_dtype = torch.float32  # on CUDA too: see above
    layout_class = ModulesLayout
    merge_class = ModulesMerge
    section: Modules

    def __init__(self, section: Modules, base: Base, seed: int = 0, values_follow: bool = False) -> None:
        super().__init__(section, base, seed, values_follow)
        self.places: dict[str, str] = {}
        """Where each stands in the model as it is, inside what other methods planted around it."""
        self.tied = _tied(base.model)
        """The modules that shared one weight before: head and embedding."""
        self.classifies = bool(section.labels) and anatomy.score(base.model) is None
        """Whether it makes the head of a classifier."""

    def new_layers(self, model: nn.Module) -> dict[str, Planted]:
        """Raises MethodError for a name that matches nothing, modules inside one another, lists, the whole decoder, and
        modules in which another method has planted something."""
        if self.classifies:
            self.places = {SCORE: SCORE}
            return {SCORE: self.new_layer(self._new_head(model))}
        chosen = self._choose(model)
        self.places = {path: place for path, (place, _) in chosen.items()}
        return {path: self.new_layer(module) for path, (_, module) in chosen.items()}

    def put(self, model: nn.Module, path: str, module: nn.Module) -> None:
        """Inside what other methods planted around it."""
        model.set_submodule(self.places[path], module)

    def detach(self, model: nn.Module) -> None:
        """A head that was made here goes again."""
        super().detach(model)
        if self.classifies and self.planted:
            del model.score

    def _new_head(self, model: nn.Module) -> ScoreHead:
        """A head with one row for each label, drawn as transformers draws it. Raises MethodError where transformers has no such
        classifier for this model."""
        if classifier_of(model.config) is None:
            raise MethodError(
                f"transformers has no classifier with a head '{SCORE}' for this {anatomy.kind(model)} model, so none could be trained "
                "that it opens; take another model, as Llama, Qwen, Mistral or Gemma."
            )
        head = ScoreHead(anatomy.sizes(model).hidden, len(self.section.labels), bias=False, dtype=torch.float32)
        spread = getattr(anatomy.text_config(model), "initializer_range", 0.02)
        with torch.no_grad():
            head.weight.normal_(0.0, spread, generator=self.generator(SCORE))
        return head.requires_grad_(False).to(self.device)

    def parameters(self) -> dict[str, nn.Parameter]:
        """``lm_head.weight``, ``model.layers.31.mlp.up_proj.weight``, …"""
        return {name: values for name, values in super().parameters().items() if values.requires_grad}

    def _choose(self, model: nn.Module) -> dict[str, tuple[str, nn.Module]]:
        """By the untouched model's paths, (where it stands now, the module)."""
        every = {path: (place, module) for path, place, module in walk(model) if path}
        wanted = self.section.modules
        found = {name: [path for path in every if matches(name, path)] for name in wanted}
        classifies = any(found.get(name) for name in CLASSIFIERS)
        for name, paths in found.items():
            if not paths and not (name in CLASSIFIERS and classifies):
                # the numbers of layers and the insides of others are no names that anyone looks for
                names = sorted({leaf(path) for path in every if not leaf(path).isdigit()})
                raise MethodError(
                    f"method.modules names '{name}', which no module of {type(model).__name__} is called."
                    f"{nearest(name, names)} The names there are {listed(names, 20)}."
                )
        chosen = {path: every[path] for path in every if any(path in paths for paths in found.values())}
        self._refuse(model, chosen)
        return chosen

    def _refuse(self, model: nn.Module, chosen: dict[str, tuple[str, nn.Module]]) -> None:
        whole = anatomy.decoder(model)
        for path, (_, module) in chosen.items():
            if isinstance(module, nn.ModuleList | nn.ModuleDict):
                raise MethodError(
                    f"method.modules names '{path}', which is a list of modules; name its members, as '{path}.0'."
                )
            if inside := [other for other in chosen if other.startswith(f"{path}.")]:
                raise MethodError(
                    f"method.modules names '{path}' and, inside it, {listed(inside, 3)}; leave out one or the other."
                )
            if taken := [place for place, part in module.named_modules() if isinstance(part, Planted)]:
                names = [f"{path}.{place.replace('.base', '')}" if place else path for place in taken]
                raise MethodError(
                    f"method.modules names '{path}', but another method changes {listed(names, 3)}; give that one "
                    "method.target_modules that leave these out, or leave '" + path + "' out of method.modules."
                )
            if any(part is whole for part in module.modules()):
                raise MethodError(
                    f"method.modules names '{path}', which is the whole model but its head; name some of its layers, or set "
                    "method.name=full."
                )

    def new_layer(self, base: nn.Module) -> TrainedModule:
        """``base`` and its copy: dense, in the adapter's dtype; what transformers keeps in fp32 stays in fp32."""
        compute = self.base.compute_dtype
        module = dense_copy(base)
        if self.device.type != "meta" and any(v.is_meta for v in (*module.parameters(), *module.buffers())):
            module.to_empty(device=self.device)  # its values arrive by ``load``
        dtypes = {}
        for name, values in module.named_parameters():
            dtypes[name] = values.dtype
            if values.is_floating_point():
                values.data = values.data.to(self.dtype if values.dtype == compute else values.dtype)
                values.requires_grad_(True)
        return TrainedModule(base, module, dtypes)


def _classifier_config(method: ModulesMethod, values: Mapping[str, Any]) -> dict[str, Any]:
    """What a classifier's config.json has otherwise than its base's, ``values``."""
    names, tokenizer = dict(enumerate(method.section.labels)), method.base.tokenizer
    return {
        "architectures": [classifier_of(method.base.model.config)],
        "id2label": {str(number): name for number, name in names.items()},
        "label2id": {name: number for number, name in names.items()},
        "problem_type": "single_label_classification",
        # transformers finds a text's last token by it
        "pad_token_id": getattr(tokenizer, "pad_token_id", None),
        "tie_word_embeddings": False,
    }


def walk(model: nn.Module, path: str = "", place: str = "") -> Iterator[tuple[str, str, nn.Module]]:
    """(path in the untouched model, place in this one, module), as if what other methods planted were not there.

    The planted module itself stands for its base: that it is there must be seen.
    """
    yield path, place, model
    while isinstance(model, Planted):
        model, place = model.base, f"{place}.base" if place else "base"
    for name, child in model.named_children():
        yield from walk(child, f"{path}.{name}" if path else name, f"{place}.{name}" if place else name)


@torch.no_grad()
def dense_copy(module: nn.Module) -> nn.Module:
    """A copy of ``module`` that shares no memory with it, each packed linear in it as a plain one in its compute dtype.

    What ``module`` keeps in host memory, the copy has on the device: it is to train there.
    """
    whole = [part for part in module.modules() if isinstance(part, FrozenLinear | HostLinear)]
    packed: dict[int, nn.Module] = {id(part): dense_linear(part) for part in whole}
    streamed = [part for part in module.modules() if id(part) not in packed and getattr(part, "away", None) is not None]
    packed |= {id(part): _copy_of_streamed(part) for part in streamed}
    copied: nn.Module = copy.deepcopy(module, packed)  # deepcopy takes what its memo holds in the place of the original
    return on_device(copied)


def _copy_of_streamed(linear: Any) -> nn.Module:
    """A copy of a plain linear whose layer is streamed; the copy stays."""
    with at_hand(linear):
        away, linear.away = linear.away, None
        try:
            copied: nn.Module = copy.deepcopy(linear)
        finally:
            linear.away = away
    return copied


def dense_linear(linear: FrozenLinear | HostLinear) -> nn.Linear:
    """A plain linear that multiplies with what the packed one, or that in host memory, stands for."""
    dtype = linear.compute_dtype
    made = nn.Linear(linear.in_features, linear.out_features, linear.bias is not None, device="meta", dtype=dtype)
    if not is_empty(linear):
        made.weight = nn.Parameter(dense_weight(linear, dtype).clone())
        if linear.bias is not None:
            made.bias = nn.Parameter(linear.bias.detach().to(dtype).clone())
    return made.train(linear.training)


def _tied(model: nn.Module) -> tuple[str, ...]:
    """The module paths of an input embedding and an output head that share one weight; nothing where they do not."""
    pair = (anatomy.embedding(model), anatomy.head(model))
    weights = [getattr(module, "weight", None) for module in pair]
    if weights[0] is None or weights[0] is not weights[1]:
        return ()
    return tuple(path for path, module in model.named_modules() if any(module is part for part in pair))
