"""Which tensor of a checkpoint is which weight of its model, and what bitsandbytes wrote beside a weight that it packed.

    model.layers.0.mlp.up_proj.weight          in the file  ─►  the parameter of that name, or one that transformers 5 renamed
    model.layers.0.mlp.up_proj.weight.absmax                ─►  goes with its weight

Knows how transformers names the weights of a checkpoint; must not read a tensor or know where weights go.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable
from typing import TYPE_CHECKING

import torch
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import WeightConverter, WeightRenaming, rename_source_key

from qlora.errors import ModelError, listed
from qlora.model import anatomy
from qlora.model.checkpoint import Checkpoint
from qlora.model.config import FOUR_BIT, Scheme

if TYPE_CHECKING:
    from transformers import PreTrainedModel

# What bitsandbytes writes beside a weight that it packed: P.weight and P.weight.absmax, … in 4 bits, P.SCB, … in 8.
FOUR_BIT_PARTS = (
    "weight.absmax", "weight.quant_map", "weight.nested_absmax", "weight.nested_quant_map",
    *(f"weight.quant_state.bitsandbytes__{kind}" for kind in FOUR_BIT),
)  # fmt: skip
EIGHT_BIT_PARTS = ("SCB", "weight_format")
FP8 = (torch.float8_e4m3fn, torch.float8_e5m2)


def match_names(model: PreTrainedModel, checkpoint: Checkpoint, scheme: Scheme, name: str) -> dict[str, str]:
    """Each tensor's name in the checkpoint → its name in the still unquantised skeleton ``model``.

    Follows transformers 5, which renames some old checkpoints on load. The parts of a packed weight (its scales and
    codes) are left out, they go with it. Raises ModelError when transformers would have to compute a weight from
    several tensors (experts fused into one parameter), for tensors that have no place in the model, and for integers
    that nobody could scale back to weights.
    """
    expected = model.state_dict()
    transforms = get_model_conversion_mapping(model)
    renamings = [item for item in transforms if isinstance(item, WeightRenaming)]
    converters = [item for item in transforms if isinstance(item, WeightConverter)]
    names: dict[str, str] = {}
    unexpected: list[str] = []
    kinds = EIGHT_BIT_PARTS if scheme.quantization == "int8" else FOUR_BIT_PARTS
    parts = tuple(f".{part}" for part in kinds) if scheme.prequantised else ()
    scales = set(checkpoint.scales.values())
    for source in checkpoint.entries:
        if source.endswith(parts) or source in scales:
            continue
        target, converter = rename_source_key(source, renamings, converters, model.base_model_prefix, expected)
        if target not in expected and source in expected:
            target, converter = source, None
        if converter is not None:
            raise ModelError(
                f"'{name}' (model type '{model.config.model_type}') keeps its weights in another arrangement than "
                f"transformers computes with: '{source}' is fused with or split from others on load, as in mixtures of "
                "experts. That cannot be loaded one tensor at a time; take a model without experts."
            )
        if target in expected:
            names[source] = target
        elif not _ignored(model, target):
            unexpected.append(source)
    if unexpected:
        raise ModelError(
            f"'{name}' has {len(unexpected)} tensors that its {type(model).__name__} has no place for: "
            f"{listed(unexpected)}; its config.json and its weights do not belong together."
        )
    if doubled := [target for target, count in Counter(names.values()).items() if count > 1]:
        raise ModelError(f"'{name}' holds several tensors for {listed(doubled)}; fetch the checkpoint again.")
    if bare := [one for one in names if checkpoint.entries[one].dtype in FP8 and one not in checkpoint.scales]:
        raise ModelError(
            f"'{name}' holds FP8 without a scale for each block in {listed(bare)}; expected weights of 16 bits, or FP8 with "
            "weight_scale_inv beside it. Name the 16-bit checkpoint that it was made from."
        )
    if whole := [
        source
        for source, target in names.items()
        if expected[target].is_floating_point()
        and not checkpoint.entries[source].dtype.is_floating_point
        and not packed_parts(source, checkpoint)
    ]:
        raise ModelError(
            f"'{name}' holds whole numbers without their scales in {listed(whole)}; expected floating-point weights, or "
            "such as bitsandbytes packed. Fetch the checkpoint again."
        )
    found = set(names.values())
    tied = anatomy.tied_names(model)
    allowed = getattr(model, "_keys_to_ignore_on_load_missing", None)
    # of weights that are tied to each other one is enough, whichever it is
    filled = found | {tied[key] for key in found & tied.keys()}
    lacking = [key for key in expected if tied.get(key, key) not in filled and not matches_any(key, allowed)]
    if lacking:
        raise ModelError(
            f"'{name}' lacks {len(lacking)} tensors of its {type(model).__name__}: {listed(lacking)}; the checkpoint is "
            "incomplete, fetch it again."
        )
    return names


def matches_any(name: str, patterns: Iterable[str] | None) -> bool:
    """Whether one of the regular expressions fits."""
    return any(re.search(pattern, name) for pattern in patterns or ())


def _ignored(model: PreTrainedModel, name: str) -> bool:
    """Whether transformers itself leaves this tensor out: its own lists, and buffers that older versions saved."""
    old_buffers = (r"rotary_emb\.inv_freq$", r"(^|\.)position_ids$")
    return matches_any(name, getattr(model, "_keys_to_ignore_on_load_unexpected", None)) or matches_any(
        name, old_buffers
    )


def packed_parts(name: str, checkpoint: Checkpoint) -> list[str]:
    """What bitsandbytes wrote beside the weight ``name`` when it packed it; nothing beside a dense weight.

    Example: ``P.weight`` → ``P.weight.absmax``, ``P.weight.quant_map``, …, or ``P.SCB`` and ``P.weight_format``
    """
    stem = name.removesuffix("weight")
    return [f"{stem}{part}" for part in (*FOUR_BIT_PARTS, *EIGHT_BIT_PARTS) if f"{stem}{part}" in checkpoint.entries]
