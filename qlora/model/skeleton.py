"""The empty model: a checkpoint's configuration becomes a transformers causal LM on the meta device, its linears empty.

Knows transformers' configurations and model classes, and which linears are quantised; must not know files or tensors.
Whatever cannot be loaded correctly is refused here, before a weight is read.
"""

from __future__ import annotations

import copy
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import nn
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, PretrainedConfig
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING

from qlora.errors import ModelError, first_line, listed
from qlora.model import anatomy
from qlora.model.checkpoint import find_model, read_model_config
from qlora.model.foreign_code import say_foreign_code
from qlora.model.nf4 import FrozenLinear, Linear4bit, Linear8bit
from qlora.recipe import ModelSection

FOUR_BIT = ("nf4", "fp4")
# More than norms, biases and routers ever take; what is above it is a matrix that was passed over.
MOST_UNQUANTISED = 0.10


@dataclass(frozen=True)
class Scheme:
    """How the linears of a base are stored: the recipe's wish, or what a prequantised checkpoint brings along."""

    quantization: str
    double_quant: bool
    prequantised: bool


def load_config(section: ModelSection) -> Any:
    """The transformers configuration of ``section.name``, without its weights.

    Raises ModelError for a folder without config.json, a model type that transformers does not know, a checkpoint that
    needs its own Python code without leave to run it, and anything that is not a decoder-only language model.
    """
    folder = find_model(section.name, section.revision, weights=False, trust_remote_code=section.trust_remote_code)
    return read_config(folder, section)


def read_config(folder: Path, section: ModelSection) -> Any:
    """``load_config`` for a folder that is already found."""
    config, raw = _any_config(folder, section)
    _refuse_other_kinds(config, raw, section.name, native=raw.get("model_type") in CONFIG_MAPPING)
    return config


def _any_config(folder: Path, section: ModelSection) -> tuple[Any, dict[str, Any]]:
    """The configuration in ``folder``, of whatever kind of model, and config.json as it stands there."""
    raw = read_model_config(folder)
    kind = raw.get("model_type")
    native = kind in CONFIG_MAPPING
    if not native and raw.get("auto_map") and not section.trust_remote_code:
        raise ModelError(
            f"'{section.name}' (model type '{kind}') comes with its own Python code, which is not run by default. Read "
            "that code, and if you trust it set model.trust_remote_code=true."
        )
    if not native and not raw.get("auto_map"):
        raise ModelError(
            f"'{section.name}' has the model type '{kind}', which transformers {transformers.__version__} does not know; "
            "a newer transformers may."
        )
    if section.trust_remote_code:
        say_foreign_code(folder)
    try:
        config = AutoConfig.from_pretrained(folder, trust_remote_code=section.trust_remote_code)
    except Exception as error:  # a configuration class may raise anything over values it does not like
        raise ModelError(f"The configuration in '{folder}' is not valid: {first_line(error)}.") from error
    return config, raw


def _refuse_other_kinds(config: Any, raw: dict[str, Any], name: str, native: bool) -> None:
    made = [str(item) for item in raw.get("architectures") or []]
    what = f"'{name}' is a {made[0] if made else config.model_type}"
    if getattr(config, "is_encoder_decoder", False):
        raise ModelError(f"{what}, an encoder-decoder model; expected a decoder-only language model.")
    # A composite configuration (Gemma 3 from 4B up, Llama 4, the VL models) nests the text model's own inside.
    if config.get_text_config(decoder=True) is not config:
        raise ModelError(
            f"{what}, which holds more than a text model (images or sound); only text models are supported. Name a "
            "checkpoint of its language model alone."
        )
    if not native:
        return
    if type(config) not in MODEL_FOR_CAUSAL_LM_MAPPING:
        raise ModelError(f"{what}, for which transformers has no causal language model; expected one.")
    # BERT has a causal class too, but a checkpoint made as BertForMaskedLM would not generate a word with it.
    chosen = MODEL_FOR_CAUSAL_LM_MAPPING[type(config)]
    names = [cls.__name__ for cls in (chosen if isinstance(chosen, tuple) else (chosen,))]
    if made and not {item.lower() for item in made} & {item.lower() for item in names}:
        raise ModelError(f"{what} and not a {names[0]}; expected a decoder-only language model.")


def load_skeleton(section: ModelSection, dtype: torch.dtype) -> nn.Module:
    """The whole model on the meta device, its linears quantised as the recipe says: every shape and no weight."""
    config = load_config(section)
    scheme = scheme_of(config, section)
    model: Any = empty_model(config, section, dtype)
    empty_linears(model, Scheme(scheme.quantization, scheme.double_quant, prequantised=False), dtype, set())
    model.tie_weights()
    model.requires_grad_(False)
    skeleton: nn.Module = model
    return skeleton


def any_skeleton(model: str | Path | Any) -> nn.Module:
    """Whatever kind of model a folder, a name on the hub or a transformers configuration is of, on the meta device.

    Its class is the one that the configuration names in ``architectures``, else the causal language model of its type, else
    the bare model. Raises ModelError where there is none, or where transformers cannot build it.
    """
    name = str(model) if isinstance(model, str | Path) else type(model).__name__
    section = ModelSection(name=name)
    if isinstance(model, str | Path):
        config = _any_config(find_model(name, weights=False), section)[0]
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


def scheme_of(config: Any, section: ModelSection) -> Scheme:
    """Decide how the linears are stored. Raises ModelError where the recipe contradicts a prequantised checkpoint.

    How they are multiplied with is the recipe's and ours to say: a compute dtype or an outlier threshold that the
    checkpoint names is not taken over.
    """
    found = getattr(config, "quantization_config", None)
    if not found:
        return Scheme(section.quantization, section.double_quant, prequantised=False)
    values = found if isinstance(found, dict) else found.to_dict()
    four, eight = bool(values.get("load_in_4bit")), bool(values.get("load_in_8bit"))
    # the oldest 8-bit checkpoints do not name their method
    named = values.get("quant_method") or ("bitsandbytes" if four or eight else "unknown")
    method = str(named).rpartition(".")[2].lower()
    if method != "bitsandbytes" or not (four or eight):
        raise ModelError(
            f"'{section.name}' is already quantised ({method}); only bitsandbytes' 4-bit and 8-bit checkpoints and "
            "unquantised ones can be loaded. Name the 16-bit checkpoint that it was made from."
        )
    kind = str(values.get("bnb_4bit_quant_type", "fp4")) if four else "int8"
    if section.quantization != kind:
        raise ModelError(
            f"'{section.name}' is already quantised to {kind}, but the recipe asks for {section.quantization}; set "
            f"model.quantization={kind}, or name the 16-bit checkpoint that it was made from."
        )
    return Scheme(kind, four and bool(values.get("bnb_4bit_use_double_quant")), prequantised=True)


def empty_model(config: Any, section: ModelSection, dtype: torch.dtype) -> nn.Module:
    """The model on the meta device, every weight in ``dtype`` but those that transformers insists to keep in fp32."""
    return _built(AutoModelForCausalLM, config, section, dtype)


def _built(maker: Any, config: Any, section: ModelSection, dtype: torch.dtype) -> nn.Module:
    attention = None if section.attention == "auto" else section.attention
    config.quantization_config = None
    del config.quantization_config  # the base will be an ordinary module; transformers must not quantise it again
    try:
        with torch.device("meta"):
            make = maker.from_config if hasattr(maker, "from_config") else maker._from_config
            code = {"trust_remote_code": section.trust_remote_code} if hasattr(maker, "from_config") else {}
            model: nn.Module = make(config, dtype=dtype, attn_implementation=attention, **code)
    except Exception as error:  # over the sizes of a stranger's configuration a model class raises anything
        raise ModelError(
            f"transformers {transformers.__version__} cannot build '{section.name}' with attention "
            f"'{section.attention}': {first_line(error)}."
        ) from error
    return model


def empty_linears(model: Any, scheme: Scheme, dtype: torch.dtype, prequantised: set[str]) -> None:
    """Put an empty quantised linear in the place of every plain one but the output head, as bitsandbytes in transformers.

    ``prequantised`` names the linears that a prequantised checkpoint holds packed: exactly those are replaced.
    Raises ModelError when it holds none, and when much of a 4-bit model would stay in 16 bits (experts in 3-D
    parameters, GPT-2's Conv1D).
    """
    if scheme.quantization == "none":
        return
    if scheme.prequantised and not prequantised:
        raise ModelError(
            f"The config.json of this {model.config.model_type} model says that its weights are quantised to "
            f"{scheme.quantization}, but none is; if they are whole, take quantization_config out of it."
        )
    kept = dense_modules(model)
    for name, module in list(model.named_modules()):
        wanted = name in prequantised if scheme.prequantised else not matches(name, kept)
        if type(module) is not nn.Linear or not wanted:
            continue
        model.set_submodule(name, empty_linear(module, scheme, dtype))
    _refuse_mostly_dense(model, scheme.quantization)


def empty_linear(linear: nn.Linear, scheme: Scheme, dtype: torch.dtype) -> Linear4bit | Linear8bit:
    """A quantised linear on the meta device in the shapes of a plain one."""
    inputs, outputs, bias = linear.in_features, linear.out_features, linear.bias is not None
    if scheme.quantization == "int8":
        return Linear8bit.empty(inputs, outputs, bias=bias, compute_dtype=dtype)
    return Linear4bit.empty(
        inputs,
        outputs,
        bias=bias,
        quant_type=scheme.quantization,
        double_quant=scheme.double_quant,
        compute_dtype=dtype,
    )


def fp32_names(model: nn.Module, dtype: torch.dtype) -> list[str]:
    """Parts of names whose weights transformers keeps in fp32 whatever dtype is asked for (its ``_keep_in_fp32`` lists)."""
    names = list(getattr(model, "_keep_in_fp32_modules_strict", None) or []) if dtype != torch.float32 else []
    if dtype == torch.float16:
        names += list(getattr(model, "_keep_in_fp32_modules", None) or [])
    return names


def dense_modules(model: Any) -> list[str]:
    """What is never quantised: the head, what is tied to another weight, and what transformers keeps in fp32."""
    names = [path for path in (anatomy.path_of(model, anatomy.head(model)),) if path is not None]
    for target, source in anatomy.tied_names(model).items():
        names += [target.removesuffix(".weight"), source.removesuffix(".weight")]
    return names + list(getattr(model, "_keep_in_fp32_modules", None) or [])


def matches(name: str, patterns: list[str]) -> bool:
    """Whether one of ``patterns`` is a whole part of the module path ``name``: ``mlp`` of ``model.layers.0.mlp.up_proj``."""
    return any(re.search(rf"(^|\.){re.escape(pattern)}(\.|$)", name) for pattern in patterns)


def _refuse_mostly_dense(model: Any, quantization: str) -> None:
    """bitsandbytes passes over what is no nn.Linear without a word; a model of 30 GB instead of 8 is the first sign."""
    packed = sum(m.in_features * m.out_features for m in model.modules() if isinstance(m, FrozenLinear))
    outside = {id(module) for module in model.modules() if isinstance(module, nn.Embedding)}
    outside.add(id(anatomy.head(model)))
    dense = {
        f"{name}.{key}": weight.numel()
        for name, module in model.named_modules()
        if id(module) not in outside
        for key, weight in module.named_parameters(recurse=False)
    }
    total = packed + sum(dense.values())
    if sum(dense.values()) > MOST_UNQUANTISED * total:
        largest = sorted(dense, key=lambda name: -dense[name])
        raise ModelError(
            f"Only {packed / total:.0%} of the weights of this {model.config.model_type} model are linears that can be "
            f"quantised; these would stay in 16 bits: {listed(largest)}. Set model.quantization=none to load it unquantised "
            f"instead of {quantization}, or take another model."
        )
