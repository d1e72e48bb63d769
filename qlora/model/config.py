"""A checkpoint's configuration: what transformers makes of it, which models are refused, and how its linears are stored.

Knows transformers' configurations; must not know model classes, files or tensors.
"""

from __future__ import annotations

import json
import re
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import transformers
from transformers import AutoConfig, PretrainedConfig
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING, MODEL_FOR_MULTIMODAL_LM_MAPPING

from qlora.errors import ModelError, first_line
from qlora.model.checkpoint import Checkpoint
from qlora.model.foreign_code import say_foreign_code
from qlora.recipe import ModelSection

FOUR_BIT = ("nf4", "fp4")


@dataclass(frozen=True)
class Scheme:
    """How the linears of a base are stored: the recipe's wish, or what a prequantised checkpoint brings along."""

    quantization: str
    double_quant: bool
    prequantised: bool


def parse_config(checkpoint: Checkpoint) -> PretrainedConfig:
    """The configuration of a decoder-only language model, or of a wrapper with one inside.

    Raises ModelError for a folder without config.json, a model type that transformers does not know, a checkpoint that
    needs its own Python code without leave to run it, and anything that neither is nor holds a decoder-only language model.
    """
    config, raw = any_config(checkpoint), checkpoint.config
    _refuse_other_kinds(config, raw, checkpoint.name, native=raw.get("model_type") in CONFIG_MAPPING)
    return config


def is_wrapper(config: PretrainedConfig) -> bool:
    """Whether it is of a model that holds more than its language model (Gemma 3 from 4B up, Llama 4, the VL models)."""
    try:
        return config.get_text_config(decoder=True) is not config
    except ValueError:  # several are inside
        return True


def any_config(checkpoint: Checkpoint) -> PretrainedConfig:
    """The configuration of whatever kind of model."""
    folder, raw, trusted = checkpoint.folder, checkpoint.config, checkpoint.trust_remote_code
    kind = raw.get("model_type")
    native = kind in CONFIG_MAPPING
    if not native and raw.get("auto_map") and not trusted:
        raise ModelError(
            f"'{checkpoint.name}' (model type '{kind}') comes with its own Python code, which is not run by default. Read "
            "that code, and if you trust it set model.trust_remote_code=true."
        )
    if not native and not raw.get("auto_map"):
        raise ModelError(
            f"'{checkpoint.name}' has the model type '{kind}', which transformers {transformers.__version__} does not know; "
            "a newer transformers may."
        )
    if trusted:
        say_foreign_code(folder)
    try:
        config: PretrainedConfig = AutoConfig.from_pretrained(folder, trust_remote_code=trusted)
    except Exception as error:  # a configuration class may raise anything over values it does not like
        raise ModelError(f"The configuration in '{folder}' is not valid: {first_line(error)}.") from error
    return config


def values_of(config: Mapping[str, Any]) -> dict[str, Any] | None:
    """What transformers reads in a config.json, in its own words; None where it does not know the type or refuses the values."""
    if config.get("model_type") not in CONFIG_MAPPING:
        return None
    known = AutoConfig.for_model(config["model_type"]).to_dict()
    with tempfile.TemporaryDirectory() as folder:  # from a file alone it decodes what JSON lacks, as Mamba 2's infinity
        (Path(folder) / "config.json").write_text(json.dumps(config), encoding="utf-8")
        try:
            values = AutoConfig.from_pretrained(folder).to_dict()
        except Exception:  # a configuration class may raise anything over values that it does not like
            return None
    rope = values.get("rope_parameters")
    if isinstance(rope, dict):
        for other in {"type", "original_max_position_embeddings"} & {"type", *known}:  # said elsewhere too
            rope.pop(other, None)
    return {key: values.get(key) for key in (*known, "rope_parameters") if key != "_name_or_path"}  # that of the file


def _refuse_other_kinds(config: PretrainedConfig, raw: Mapping[str, Any], name: str, native: bool) -> None:
    made = [str(item) for item in raw.get("architectures") or []]
    what = f"'{name}' is a {made[0] if made else config.model_type}"
    if getattr(config, "is_encoder_decoder", False):
        raise ModelError(f"{what}, an encoder-decoder model; expected a decoder-only language model.")
    wrapper = is_wrapper(config)
    if wrapper and not native:
        raise ModelError(
            f"{what}, which holds more than a text model (images or sound) and comes with its own Python code; of such "
            "models only transformers' own classes are supported. Name a checkpoint of its language model alone."
        )
    if wrapper and getattr(config.get_text_config(decoder=True), "is_encoder_decoder", False):
        raise ModelError(f"{what}, whose language model has an encoder; expected a decoder-only language model.")
    if not native:
        return
    known = classes_of(config)
    if type(config) not in known:
        raise ModelError(f"{what}, for which transformers has no causal language model; expected one.")
    # BERT has a causal class too, but a checkpoint made as BertForMaskedLM would not generate a word with it.
    chosen = known[type(config)]
    names = [cls.__name__ for cls in (chosen if isinstance(chosen, tuple) else (chosen,))]
    if made and not {item.lower() for item in made} & {item.lower() for item in names}:
        raise ModelError(f"{what} and not a {names[0]}; expected a decoder-only language model.")


def quantised_again(checkpoint: Checkpoint, section: ModelSection) -> str | None:
    """What it costs to quantise a model again that was merged into weights on the same 4-bit grid; None where it is no such.

    The grid's steps are wider than what an adapter adds to most weights, so they round back to where they were.
    """
    made = checkpoint.merge
    again = made.get("weights") == "dequantized" and made.get("quantization") == section.quantization
    if not again or section.quantization not in FOUR_BIT:
        return None
    return (
        f"'{checkpoint.name}' was merged into weights that had been {section.quantization} before: quantised to that again, most "
        "of what its adapter learned is rounded away. Merge that run with for=quantising and take this instead, or set "
        "model.quantization=none."
    )


def classes_of(config: PretrainedConfig) -> Any:
    """transformers' table that has the class of such a model: Mistral 4's is among the multimodal ones."""
    causal = type(config) in MODEL_FOR_CAUSAL_LM_MAPPING and not is_wrapper(config)
    return MODEL_FOR_CAUSAL_LM_MAPPING if causal else MODEL_FOR_MULTIMODAL_LM_MAPPING


def scheme_of(config: PretrainedConfig, section: ModelSection) -> Scheme:
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
    if method == "mxfp4":  # of experts, which are dequantised exactly while they are read
        return Scheme(section.quantization, section.double_quant, prequantised=False)
    if method == "fp8" and values.get("activation_scheme", "dynamic") == "dynamic":
        return Scheme(section.quantization, section.double_quant, prequantised=False)  # read as what it stands for
    if method != "bitsandbytes" or not (four or eight):
        of = re.match(r"(.+?)[-_.](?:gptq|awq)(?![a-z])", section.name.rstrip("/").rpartition("/")[2], re.IGNORECASE)
        whole = f", by its name '{of[1]}'" if of else ""
        raise ModelError(
            f"'{section.name}' is already quantised ({method}); only bitsandbytes' 4-bit and 8-bit checkpoints, MXFP4, FP8 with a "
            f"scale for each block, and unquantised ones can be loaded. Name the 16-bit checkpoint that it was made from{whole}."
        )
    kind = str(values.get("bnb_4bit_quant_type", "fp4")) if four else "int8"
    if section.quantization != kind:
        raise ModelError(
            f"'{section.name}' is already quantised to {kind}, but the recipe asks for {section.quantization}; set "
            f"model.quantization={kind}, or name the 16-bit checkpoint that it was made from."
        )
    return Scheme(kind, four and bool(values.get("bnb_4bit_use_double_quant")), prequantised=True)
