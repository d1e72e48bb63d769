"""Few layers: a copy of an adapted model with fake tensors and one decoder layer of each kind, for a dry run.

Two layers are of one kind when their modules and shapes are the same and something trains below both of them or below
neither. The first and the last layer are kinds of their own, since the decoder's own variables hold what goes into the one
and comes out of the other.

Knows modules, configurations and attention masks; must not know a step.
"""

from __future__ import annotations

import copy
import hashlib
from collections.abc import Collection, Hashable
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface, PretrainedConfig
from transformers.masking_utils import sdpa_mask, sliding_window_causal_mask_function

from qlora.errors import ModelError
from qlora.methods.base import AdaptedModel
from qlora.methods.method import Method
from qlora.model import anatomy
from qlora.model.attention import EACH, PLAIN, VARLEN, attention_of
from qlora.model.base import Base
from qlora.residence.layers import unwrap_layers

UNPACKED = "qlora_unpacked"
"""SDPA for rows of one example each. transformers takes fake tensors for tracing, and then writes out masks that a real
step does without, because it cannot look whether positions restart."""


def shortened(
    adapted: AdaptedModel, packed: bool, keep: Collection[int] = (), more: int = 0
) -> tuple[AdaptedModel, list[int]]:
    """A copy of fake tensors with one decoder layer of each kind, and for each of the model's layers the one that stands for it.

    Layers ``keep`` are of another kind than those that are recomputed. ``more`` layers are copied beside these.
    """
    model: Any = adapted.model
    layers = layers_of(model)
    kinds = kinds_of(adapted, keep)
    first = {kinds.index(kind) for kind in kinds}
    kept = sorted(first.union([index for index in range(len(layers)) if index not in first][:more]))
    config = copy.deepcopy(model.config)
    memo: dict[int, Any] = {id(model.config): config, id(anatomy.text_config(model)): anatomy.text_config(config)}
    _shorten(anatomy.text_config(config), kept, len(layers))
    if getattr(model, "_supports_attention_backend", True):  # else its attention knows no name but transformers' own
        _choose_attention(anatomy.text_config(config), packed)
    gone = {id(part) for layer in layers for part in layer.modules()}
    gone -= {id(part) for index in kept for part in layers[index].modules()}  # layers may share a module
    for module in model.modules():
        if id(module) not in gone:
            _fake_tensors(module, memo)
    memo[id(layers)] = nn.ModuleList(copy.deepcopy(layers[index], memo) for index in kept)
    base = copy.copy(adapted.base)
    base.model, base.device = copy.deepcopy(model, memo), torch.device("cpu")
    short = copy.copy(adapted)
    short.base = base
    short.methods = [_of_copy(method, base, memo) for method in adapted.methods]
    if len(kept) < len(layers) and anatomy.layers(base.model) is not memo[id(layers)]:
        return shortened(adapted, packed, keep, more + 1)  # another list in it has as many entries: P-tuning's network
    if anatomy.embeds_by_layer(config):  # its decoder cuts them by the number of all layers
        decoder: Any = anatomy.decoder(base.model)
        decoder.config = copy.copy(decoder.config)
        decoder.config.num_hidden_layers = len(layers)
    unwrap_layers(base.model)
    return short, [kept.index(kinds.index(kind)) for kind in kinds]


def kinds_of(adapted: AdaptedModel, keep: Collection[int]) -> list[Hashable]:
    """For each decoder layer what it is, equal where one takes the memory that another takes."""
    layers = layers_of(adapted.model)
    types = anatomy.layer_kinds(adapted.model) if len(layers) else []
    below = False
    found: list[Hashable] = []
    for index, layer in enumerate(layers):
        found.append((_structure(layer), types[index], below, index in keep, index == 0, index == len(layers) - 1))
        below = below or any(values.requires_grad for values in layer.parameters())
    return found


def sketch_of(adapted: AdaptedModel) -> Hashable:
    """What a dry run sees of a model, in few bytes: of models that were loaded or planned apart, the same where they are alike."""
    model: Any = adapted.model
    forwards = [getattr(vars(module).get("forward"), "operator", None) for module in model.modules()]
    seen = repr((_structure(model), forwards, attention_of(model), adapted.section, adapted.base.compute_dtype))
    config = model.config.to_dict() | {"_name_or_path": ""}  # wherever it lies
    return hashlib.sha256((seen + repr(config)).encode()).digest()


def _of_copy(method: Method, base: Base, memo: dict[int, Any]) -> Method:
    """``method`` over what of its planted modules is in the copy."""
    found = copy.copy(method)
    found.base, found.device = base, base.device
    found.planted = {path: memo[id(layer)] for path, layer in method.planted.items() if id(layer) in memo}
    for layer in found.planted.values():
        if hasattr(layer, "lacks"):  # values that EVA takes from data, and others from a file
            layer.lacks = None  # type: ignore[assignment]
    return found


def _structure(layer: nn.Module) -> Hashable:
    """Modules, their plain settings, and the shapes of what they hold."""
    found = []
    for module in layer.modules():
        settings = tuple(
            (key, value)
            for key, value in vars(module).items()
            if isinstance(value, bool | int | float | str) and key not in ("layer_idx", "training")
        )
        shapes = tuple(
            (key, tuple(values.shape), values.dtype, values.requires_grad)
            for key, values in (*module._parameters.items(), *module._buffers.items())
            if values is not None
        )
        found.append((type(module), settings, shapes))
    return tuple(found)


def _shorten(config: PretrainedConfig, kept: list[int], count: int) -> None:
    """Let the copy's configuration be one of the kept layers: their number, and whatever has an entry for each layer."""
    if not count:
        return
    by_layer = config.to_dict().get("per_layer_config") or {}
    for key, value in list(vars(config).items()):
        if isinstance(value, list) and len(value) == count and not key.endswith("_id") and key != "architectures":
            setattr(config, key, [value[index] for index in kept])
    try:
        config.num_hidden_layers = len(kept)
    except NotImplementedError:  # ProphetNet counts two halves
        config.num_decoder_layers = len(kept)
    if by_layer:
        config.per_layer_config = {
            kept.index(int(index)): sizes for index, sizes in by_layer.items() if int(index) in kept
        }


def _choose_attention(config: PretrainedConfig, packed: bool) -> None:
    """Have the copy attend as a real step of such rows does (see ``UNPACKED``). Flash attention never has a mask."""
    name = str(getattr(config, "_attn_implementation", None))
    if "flash" in name or (name in (PLAIN, EACH, VARLEN) and not packed):
        config._attn_implementation = UNPACKED


def _unpacked_mask(
    batch_size: int, q_length: int, kv_length: int, *args: Any, local_size: int | None = None, **kwargs: Any
) -> Tensor | None:
    """No mask, as SDPA hides the future by itself; but a window that is shorter than the rows is written out."""
    if local_size is None or kv_length < local_size:
        return None
    window = sliding_window_causal_mask_function(local_size)
    kwargs |= {"mask_function": window, "allow_is_causal_skip": False}
    return sdpa_mask(batch_size, q_length, kv_length, *args, local_size=local_size, **kwargs)


def _unpacked_attention(module: nn.Module, *args: Any, **kwargs: Any) -> Any:
    return AttentionInterface()[PLAIN](module, *args, **kwargs)


AttentionInterface.register(UNPACKED, _unpacked_attention)
AttentionMaskInterface.register(UNPACKED, _unpacked_mask)


def _fake_tensors(module: nn.Module, memo: dict[int, Any]) -> None:
    """Put into ``memo`` a fake CPU tensor for each one that ``module`` holds itself, in whatever way."""
    for values in [*module._parameters.values(), *module._buffers.values(), *vars(module).values()]:
        if isinstance(values, Tensor) and id(values) not in memo:
            made = torch.empty(values.shape, dtype=values.dtype)
            whole = isinstance(values, nn.Parameter)
            memo[id(values)] = nn.Parameter(made, requires_grad=values.requires_grad) if whole else made


def layers_of(model: nn.Module) -> nn.ModuleList:
    """The decoder layers; none where they stand in no list."""
    try:
        return anatomy.layers(model)
    except ModelError:
        return nn.ModuleList()
