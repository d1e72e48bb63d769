"""The empty model: a checkpoint becomes a transformers causal LM on the meta device, its linears quantised and empty.

    checkpoint ─► configuration ─► model on meta ─► names ─► quantised linears ─► Assembled
                                                                  │
                          load: filled from the files · plan: planted as it is · export: one tensor after the other

Knows transformers' model classes, and which linears are quantised; must not read a weight. Whatever cannot be loaded
correctly is refused here, before one is read.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import nn
from transformers import (
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForMultimodalLM,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.modeling_layers import GenericForSequenceClassification
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING,
)

from qlora.errors import ModelError, first_line, listed
from qlora.model import anatomy
from qlora.model.base import Base, StreamedLayers
from qlora.model.checkpoint import Checkpoint, open_checkpoint
from qlora.model.config import FOUR_BIT, Scheme, any_config, classes_of, is_wrapper, scheme_of
from qlora.model.experts import adopt, empty_experts, matrices
from qlora.model.mixers import begin_anew
from qlora.model.names import Stack, match_names, matches_any, packed_parts
from qlora.model.nf4 import (
    FrozenLinear,
    Linear4bit,
    Linear8bit,
    features,
    is_plain_linear,
    is_transposed,
    packed_numbers,
)
from qlora.model.towers import find_towers, take_out, within
from qlora.recipe import ModelSection

# More than norms, biases and routers ever take; what is above it is a matrix that was passed over.
MOST_UNQUANTISED = 0.10


@dataclass(frozen=True)
class Assembled:
    """An empty model and where each of its tensors is in the checkpoint."""

    model: PreTrainedModel
    checkpoint: Checkpoint
    section: ModelSection
    scheme: Scheme
    names: dict[str, str]
    """Each tensor's name in the checkpoint → its name in the model; empty without the weights."""
    stacks: dict[str, Stack]
    """Those of the model's tensors that hold a matrix of several experts each, and where these are in the checkpoint."""
    shapes: dict[str, tuple[int, ...]]
    """The shape of every tensor of the model, by its name there, before linears were quantised."""
    dtype: torch.dtype
    """What it computes in, and most weights have."""
    paths: tuple[str, ...]
    """Every module's path, those of towers that were taken out too."""
    towers: dict[str, int]
    """The towers that were taken out, by their paths → the numbers in their weights, 0 where the checkpoint has none of them."""

    packed_aside: Mapping[str, FrozenLinear]
    """The weights of towers that the checkpoint holds packed, by their names there → an empty linear of that shape."""

    @property
    def left(self) -> list[str]:
        """The tensors of the checkpoint that are not read: of towers, and what the model's class passes over (``mtp.…``)."""
        whole = (*self.names, *self.packed_aside)
        parts = {part for name in whole for part in packed_parts(name, self.checkpoint)}
        parts |= set(self.checkpoint.scales.values())  # of FP8, which is read as what it stands for
        return [name for name in self.checkpoint.entries if name not in self.names and name not in parts]

    def base(
        self,
        device: torch.device,
        tokenizer: PreTrainedTokenizerBase | None,
        double_quant: bool | None = None,
        end_tokens: tuple[int, ...] = (),
        placement: StreamedLayers | None = None,
    ) -> Base:
        """The model as a base on ``device``. ``double_quant``, left out, is what the scheme says."""
        return Base(
            model=self.model,
            tokenizer=tokenizer,
            folder=self.checkpoint.folder,
            name=self.checkpoint.name,
            revision=self.checkpoint.revision,
            quantization=self.scheme.quantization,
            double_quant=self.scheme.double_quant if double_quant is None else double_quant,
            device=device,
            compute_dtype=self.dtype,
            end_tokens=end_tokens,
            names={target: name for name, target in self.names.items()},
            paths=self.paths,
            towers=self.towers,
            placement=placement,
            checkpoint=self.checkpoint,
            section=self.section,
        )


def assemble(checkpoint: Checkpoint, section: ModelSection, dtype: torch.dtype, weights: bool = True) -> Assembled:
    """The one way from a checkpoint to its empty model: configuration, module, names, quantised linears, dtypes.

    Without ``weights`` the files of weights need not be there: nothing is matched, and every linear that the recipe would
    quantise is. Raises ModelError for whatever cannot be loaded whole and exactly.
    """
    config = checkpoint.model_config()
    scheme = scheme_of(config, section)
    model = empty_model(config, section, dtype)
    paths = tuple(path for path, _ in model.named_modules())
    towers = find_towers(model) if is_wrapper(config) else []
    names: dict[str, str] = {}
    stacks: dict[str, Stack] = {}
    absent: list[str] = []
    if weights:
        checkpoint, names, stacks, absent = match_names(model, checkpoint, scheme, checkpoint.name, towers)
    packed_aside = {
        name: empty_linear(model.get_submodule(target.removesuffix(".weight")), scheme, dtype)
        for name, target in names.items()
        if within(target, towers) and packed_parts(name, checkpoint)
    }
    names = {name: target for name, target in names.items() if not within(target, towers)}
    sizes = {path: sum(values.numel() for values in model.get_submodule(path).parameters()) for path in towers}
    sizes |= dict.fromkeys(absent, 0)
    take_out(model, towers)
    shapes = {name: tuple(values.shape) for name, values in model.state_dict().items()}
    anatomy.share_blocks(model)
    held = {name: target for name, target in names.items() if packed_parts(name, checkpoint)} if weights else {}
    for name, target in names.items():
        if name not in held and target not in stacks and checkpoint.entries[name].shape != shapes[target]:
            raise _other_models(checkpoint, name, f"for {list(shapes[target])}")
    for target, stack in stacks.items():
        if (odd := stack.misfit(checkpoint, shapes[target])) is not None:
            asked = f"for '{target}' of {shapes[target][0]} experts with {list(shapes[target][1:])} each"
            raise _other_models(checkpoint, odd, asked)
    packed = {target.removesuffix(".weight") for target in held.values()}
    empty_linears(model, scheme if weights else replace(scheme, prequantised=False), dtype, packed)
    _widen(model, dtype)
    begin_anew(model)
    return Assembled(model, checkpoint, section, scheme, names, stacks, shapes, dtype, paths, sizes, packed_aside)


def _other_models(checkpoint: Checkpoint, name: str, asked: str) -> ModelError:
    found = list(checkpoint.entries[name].shape)
    return ModelError(
        f"'{name}' in '{checkpoint.folder}' has the shape {found}; its config.json asks {asked}. One of them is another "
        "model's: fetch both again."
    )


def bare(checkpoint: Checkpoint, section: ModelSection, dtype: torch.dtype, weights: bool = False) -> Assembled:
    """The whole model on the meta device, frozen, its linears quantised as the recipe says: every shape and no weight.

    With ``weights`` it is checked that the checkpoint's files are of this model. Raises ModelError where they are not.
    """
    empty = assemble(checkpoint, section, dtype, weights)
    empty.model.tie_weights()
    empty.model.requires_grad_(False)
    return empty


def skeleton_base(
    section: ModelSection,
    device: torch.device,
    dtype: torch.dtype,
    checkpoint: Checkpoint | None = None,
    tokenizer: PreTrainedTokenizerBase | None = None,
) -> Base:
    """For a plan, a base without weights: the model of ``section`` on meta. What is planted in it is on ``device``.

    ``checkpoint`` is the section's, where it was opened before; nothing but its configuration is read, and of weights that are
    here what they are called and their shapes. Raises ModelError where these are another model's.
    """
    checkpoint = checkpoint or open_checkpoint(section, weights=False)
    base = bare(checkpoint, section, dtype, checkpoint.is_whole).base(device, tokenizer)
    base.folder, base.names, base.checkpoint = Path(), None, None
    return base


def classifier_of(config: PretrainedConfig) -> str | None:
    """transformers' classifier for a text model's configuration, with a head ``score`` that reads the last token; None where it
    has none, or one of another build."""
    maker = MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING.get(type(config), None)
    plain = isinstance(maker, type) and issubclass(maker, GenericForSequenceClassification) and not is_wrapper(config)
    return maker.__name__ if plain else None


def any_skeleton(model: str | Path | PretrainedConfig) -> nn.Module:
    """Whatever kind of model a folder, a name on the hub or a transformers configuration is of, on the meta device.

    Its class is the one that the configuration names in ``architectures``, else the causal language model of its type, else
    the bare model. Raises ModelError where there is none, or where transformers cannot build it.
    """
    name = str(model) if isinstance(model, str | Path) else type(model).__name__
    section = ModelSection(name=name)
    if isinstance(model, str | Path):
        config = any_config(open_checkpoint(section, weights=False))
    elif isinstance(model, PretrainedConfig):
        config = copy.deepcopy(model)
    else:
        raise ModelError(f"Found a {name}; expected a model folder, a name on the hub, a configuration or a module.")
    made = next(iter(config.architectures or []), "")
    maker = getattr(transformers, made, None)
    if maker is None and made:
        raise ModelError(f"'{name}' is a {made}, which transformers {transformers.__version__} does not know.")
    if maker is None:
        maker = AutoModelForCausalLM if type(config) in MODEL_FOR_CAUSAL_LM_MAPPING else AutoModel
    return _built(maker, config, section, torch.float32).requires_grad_(False)


def language_model(model: nn.Module) -> nn.Module:
    """The class of the language model inside the wrapper ``model`` alone, on the meta device. Raises ModelError where
    transformers has none."""
    config = copy.deepcopy(anatomy.text_config(model))
    if type(config) not in MODEL_FOR_CAUSAL_LM_MAPPING:
        raise ModelError(
            f"transformers has no class for the language model of a {type(model).__name__} alone; leave out keys=text."
        )
    return _built(AutoModelForCausalLM, config, ModelSection(name=type(config).__name__), torch.float32)


def empty_model(config: PretrainedConfig, section: ModelSection, dtype: torch.dtype) -> PreTrainedModel:
    """The model on the meta device, every weight in ``dtype`` but those that transformers insists to keep in fp32."""
    multimodal = classes_of(config) is not MODEL_FOR_CAUSAL_LM_MAPPING
    # what comes with its own code stands in no table
    multimodal = multimodal and type(config) in classes_of(config)
    return _built(AutoModelForMultimodalLM if multimodal else AutoModelForCausalLM, config, section, dtype)


def _built(maker: Any, config: PretrainedConfig, section: ModelSection, dtype: torch.dtype) -> PreTrainedModel:
    attention = None if section.attention == "auto" else section.attention
    config.quantization_config = None
    del config.quantization_config  # the base will be an ordinary module; transformers must not quantise it again
    if getattr(config, "rescale_every", 0):
        config.rescale_every = 0  # RWKV halves weights and states alike for the range of fp16: not packed bytes
    try:
        with torch.device("meta"):
            make = maker.from_config if hasattr(maker, "from_config") else maker._from_config
            code = {"trust_remote_code": section.trust_remote_code} if hasattr(maker, "from_config") else {}
            model: PreTrainedModel = make(config, dtype=dtype, attn_implementation=attention, **code)
    except Exception as error:  # over the sizes of a stranger's configuration a model class raises anything
        raise ModelError(
            f"transformers {transformers.__version__} cannot build '{section.name}' with attention "
            f"'{section.attention}': {first_line(error)}."
        ) from error
    return model


def empty_linears(model: PreTrainedModel, scheme: Scheme, dtype: torch.dtype, prequantised: set[str]) -> None:
    """Put an empty quantised linear in the place of every plain one but the output head, as bitsandbytes in transformers, and
    packed matrices in the place of a mixture's experts.

    ``prequantised`` names the linears that a prequantised checkpoint holds packed: exactly those are replaced, and experts, which it
    holds whole since transformers 5.
    Raises ModelError when it holds none, and when much of a 4-bit model would stay in 16 bits (experts in 3-D
    parameters).
    """
    if scheme.quantization == "none":
        return
    if scheme.prequantised and not prequantised:
        raise ModelError(
            f"The config.json of this {model.config.model_type} model says that its weights are quantised to "
            f"{scheme.quantization}, but none is; if they are whole, take quantization_config out of it."
        )
    adopt(model)
    kept = dense_modules(model)
    for name, module in list(model.named_modules()):
        wanted = name in prequantised if scheme.prequantised else not matches(name, kept)
        if not is_plain_linear(module) or not wanted:
            continue
        model.set_submodule(name, empty_linear(module, scheme, dtype))
    for name, module in model.named_modules():
        if scheme.quantization in FOUR_BIT and matrices(module) and not matches(name, kept):
            empty_experts(module, scheme.quantization, scheme.double_quant, dtype)
    _refuse_mostly_dense(model, scheme.quantization, scheme.prequantised)


def empty_linear(linear: nn.Module, scheme: Scheme, dtype: torch.dtype) -> Linear4bit | Linear8bit:
    """A quantised linear on the meta device in the shapes of a plain one."""
    (outputs, inputs), bias = features(linear), linear.bias is not None
    empty: Linear4bit | Linear8bit
    if scheme.quantization == "int8":
        empty = Linear8bit.empty(inputs, outputs, bias=bias, compute_dtype=dtype)
    else:
        empty = Linear4bit.empty(
            inputs,
            outputs,
            bias=bias,
            quant_type=scheme.quantization,
            double_quant=scheme.double_quant,
            compute_dtype=dtype,
        )
    empty.transposed = is_transposed(linear)
    return empty


def _widen(model: nn.Module, dtype: torch.dtype) -> None:
    """Give what transformers keeps in fp32 that dtype in the skeleton, where it is still without memory."""
    lists = ["_keep_in_fp32_modules_strict"] if dtype != torch.float32 else []
    lists += ["_keep_in_fp32_modules"] if dtype == torch.float16 else []
    names = [re.escape(part) for one in lists for part in getattr(model, one, None) or []]
    for name, values in model.named_parameters():
        if values.is_floating_point() and matches_any(name, names):
            values.data = values.data.float()


def dense_modules(model: PreTrainedModel) -> list[str]:
    """What is never quantised: the head, what is tied to another weight, and ``read_otherwise``."""
    names = [path for path in (anatomy.path_of(model, anatomy.head(model)),) if path is not None]
    for target, source in anatomy.tied_names(model).items():
        names += [target.removesuffix(".weight"), source.removesuffix(".weight")]
    return [*names, *read_otherwise(model)]


def read_otherwise(model: nn.Module) -> list[str]:
    """Linears that more than a product asks for: a mixture's routers, what is read without being called, what a family changes by
    itself, and what transformers keeps in fp32."""
    paths = {path for path, _ in model.named_modules()}
    names = [path for path in paths if anatomy.is_router(path, paths)] + anatomy.read_as_weights(model)
    return [*names, *anatomy.OWN_USE, *(getattr(model, "_keep_in_fp32_modules", None) or [])]


def matches(name: str, patterns: list[str]) -> bool:
    """Whether one of ``patterns`` is a whole part of the module path ``name``: ``mlp`` of ``model.layers.0.mlp.up_proj``."""
    return any(re.search(rf"(^|\.){re.escape(pattern)}(\.|$)", name) for pattern in patterns)


def _refuse_mostly_dense(model: PreTrainedModel, quantization: str, prequantised: bool) -> None:
    """bitsandbytes passes over what is no nn.Linear without a word; a model of 30 GB instead of 8 is the first sign."""
    packed = packed_numbers(model)
    outside = {id(module) for module in model.modules() if isinstance(module, nn.Embedding)}
    outside.add(id(anatomy.head(model)))
    dense = {
        f"{name}.{key}": weight.numel()
        for name, module in model.named_modules()
        if id(module) not in outside
        for key, weight in module.named_parameters(recurse=False)
    }
    total = packed + sum(dense.values())
    if quantization == "int8" and any(matrices(module) for module in model.modules()):
        raise ModelError(
            f"The experts of this {model.config.model_type} model can be held in nf4 or fp4, not in int8; "
            + ("name the 16-bit checkpoint that it was made from." if prequantised else "set model.quantization=nf4.")
        )
    if sum(dense.values()) > MOST_UNQUANTISED * total:
        largest = sorted(dense, key=lambda name: -dense[name])
        said = f"Only {packed / total:.0%} of the weights of this {model.config.model_type} model are linears"
        if prequantised:
            raise ModelError(
                f"{said} that its checkpoint holds in {quantization}; these are in 16 bits: {listed(largest)}. Name the 16-bit "
                "checkpoint that it was made from."
            )
        raise ModelError(
            f"{said} that can be quantised; these would stay in 16 bits: {listed(largest)}. Set model.quantization=none to load it "
            f"unquantised instead of {quantization}, or take another model."
        )
