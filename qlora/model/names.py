"""Which tensor of a checkpoint is which weight of its model, and what bitsandbytes wrote beside a weight that it packed.

    model.layers.0.mlp.up_proj.weight          in the file  ─►  the parameter of that name, or one that transformers 5 renamed
    model.layers.0.mlp.up_proj.weight.absmax                ─►  goes with its weight
    model.layers.0.mlp.experts.7.up_proj.weight             ─►  with others the matrix of expert 7 in one parameter for all of them

Knows how transformers names the weights of a checkpoint; must not read a tensor or know where weights go.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Collection, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import (
    Chunk,
    Concatenate,
    Interleave,
    MergeModulelist,
    Transpose,
    WeightConverter,
    WeightRenaming,
    dot_natural_key,
    rename_source_key,
)

from qlora.errors import ModelError, listed
from qlora.model import anatomy
from qlora.model.arranged import Arranged, arranged, settled
from qlora.model.checkpoint import Checkpoint
from qlora.model.config import FOUR_BIT, Scheme
from qlora.model.mxfp4 import BLOCKS, SCALES, FromMxfp4
from qlora.model.towers import within

# What bitsandbytes writes beside a weight that it packed: P.weight and P.weight.absmax, … in 4 bits, P.SCB, … in 8.
FOUR_BIT_PARTS = (
    "weight.absmax", "weight.quant_map", "weight.nested_absmax", "weight.nested_quant_map",
    *(f"weight.quant_state.bitsandbytes__{kind}" for kind in FOUR_BIT),
)  # fmt: skip
EIGHT_BIT_PARTS = ("SCB", "weight_format")
FP8 = (torch.float8_e4m3fn, torch.float8_e5m2)


@dataclass(frozen=True)
class Stack:
    """A parameter [E, …] that holds a matrix of each of E experts, and where a checkpoint keeps these."""

    parts: dict[str, list[str]]
    """What one matrix is made of, by transformers' pattern of their names: E tensors, or one [E, …] for all experts."""
    operations: list[Any]
    """Transformers' own, which make the parameter from its parts; each does the same to every expert."""
    pattern: str
    """Transformers' pattern of the parameter's name."""

    @property
    def unpacked(self) -> str | None:
        """What it is called in a checkpoint of 16 bits, where this one holds it in MXFP4; None elsewhere."""
        if not any(isinstance(operation, FromMxfp4) for operation in self.operations):
            return None
        return self.sources[0].removesuffix(BLOCKS)

    @property
    def sources(self) -> list[str]:
        """Every tensor that it is made from."""
        return [name for names in self.parts.values() for name in names]

    def matrix(self, expert: int, read: Callable[[str, int | None], Tensor]) -> Tensor:
        """The matrix of one expert as the model has it. ``read`` gives a tensor of the checkpoint, or of one that holds all experts
        the part of this one."""
        tensors: dict[str, Any] = {
            pattern: [read(names[expert], None) if len(names) > 1 else read(names[0], expert)[None]]
            for pattern, names in self.parts.items()
        }
        for operation in self.operations:
            tensors = operation.convert(tensors, source_patterns=list(self.parts), target_patterns=[self.pattern])
        (made,) = tensors.values()
        matrix: Tensor = made[0] if isinstance(made, list) else made
        return matrix[0]

    def misfit(self, checkpoint: Checkpoint, shape: tuple[int, ...]) -> str | None:
        """The first of its sources of which no parameter of ``shape`` can be made; None where all fit. Nothing is read."""
        for names in self.parts.values():
            usual = checkpoint.entries[names[0]].shape
            for name in names:
                if checkpoint.entries[name].shape != usual or (len(names) == 1 and usual[:1] != shape[:1]):
                    return name

        def empty(name: str, part: int | None) -> Tensor:
            entry = checkpoint.entries[name]
            kind = torch.float32 if name in checkpoint.scales else entry.dtype
            return torch.empty(entry.shape if part is None else entry.shape[1:], dtype=kind, device="meta")

        try:
            fits = self.matrix(0, empty).shape == shape[1:]
        except (RuntimeError, IndexError):  # parts that cannot be laid beside each other
            fits = False
        return None if fits else self.sources[0]


def match_names(
    model: PreTrainedModel, checkpoint: Checkpoint, scheme: Scheme, name: str, towers: Collection[str] = ()
) -> tuple[Checkpoint, dict[str, str], dict[str, Stack], list[str]]:
    """(the checkpoint in the model's arrangement; each tensor's name in it → its name in the still unquantised skeleton ``model``;
    of ``towers`` any part; the parameters of several experts by their names there; those of
    ``towers`` that are absent, which they may be whole).

    Follows transformers 5, which renames some old checkpoints on load and fuses experts. The parts of a packed weight (its
    scales and codes) are left out, they go with it. Raises ModelError for experts that transformers would have to compute otherwise than one by one, for tensors that have no place in the model, and for integers
    that nobody could scale back to weights.
    """
    expected = model.state_dict()
    stacked = set(anatomy.fused_experts(model))
    transforms = get_model_conversion_mapping(model)
    renamings = [item for item in transforms if isinstance(item, WeightRenaming)]
    converters = [item for item in transforms if isinstance(item, WeightConverter)]
    alone = {one for item in converters for one in item.source_patterns if "*" not in one and item.target_patterns[1:]}
    names: dict[str, str] = {}
    matrices: dict[str, dict[str, list[str]]] = {}
    elsewhere: dict[tuple[str, str], list[str]] = {}
    unexpected: list[str] = []
    carried: set[str] = set()
    kinds = EIGHT_BIT_PARTS if scheme.quantization == "int8" else FOUR_BIT_PARTS
    parts = tuple(f".{part}" for part in kinds) if scheme.prequantised else ()
    scales = set(checkpoint.scales.values())
    for source in checkpoint.entries:
        if source.endswith(parts) or source in scales:
            continue
        stem = source.removesuffix(BLOCKS).removesuffix(SCALES)
        target, pattern = rename_source_key(stem, renamings, converters, model.base_model_prefix, expected)
        if stem != source:
            target, pattern = (target, source[len(stem) :]) if target in stacked else (source, None)
        if target not in expected and source in expected:
            target, pattern = source, None
        if within(target, towers):  # copied as it is, so that nothing has to be computed from it
            names |= {source: target} if target in expected and pattern is None else {}
            carried |= {target, *_beside(target, pattern, converters)}
            continue
        if pattern is not None and target in expected and (target not in stacked or pattern in alone):
            elsewhere.setdefault((target, pattern), []).append(source)
            continue
        if target in stacked:
            matrices.setdefault(target, {}).setdefault(pattern or target, []).append(source)
        if target in expected:
            names[source] = target
        elif not _ignored(model, target):
            unexpected.append(source)
    if unexpected:
        raise ModelError(
            f"'{name}' has {len(unexpected)} tensors that its {type(model).__name__} has no place for: "
            f"{listed(unexpected)}; its config.json and its weights do not belong together."
        )
    checkpoint = arranged(checkpoint, model, elsewhere, converters)
    if isinstance(checkpoint, Arranged):
        made = checkpoint.group_of.keys()
        names = {key: names.get(key, key) for key in checkpoint.entries if key in names or key in made}
        matrices |= {key: {key: [key]} for key in made & stacked}
    stacks = {target: _stack(model, checkpoint, target, found, converters, name) for target, found in matrices.items()}
    if doubled := [target for target, count in Counter(names.values()).items() if count > 1 and target not in stacks]:
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
        and not (target in stacks and stacks[target].unpacked)
    ]:
        raise ModelError(
            f"'{name}' holds whole numbers without their scales in {listed(whole)}; expected floating-point weights, or "
            "such as bitsandbytes packed. Fetch the checkpoint again."
        )
    found = set(names.values()) | carried
    tied = anatomy.tied_names(model)
    allowed = getattr(model, "_keys_to_ignore_on_load_missing", None)
    # of weights that are tied to each other one is enough, whichever it is
    filled = found | {tied[key] for key in found & tied.keys()}
    lacking = [key for key in expected if tied.get(key, key) not in filled and not matches_any(key, allowed)]
    absent = [path for path in towers if not any(within(key, [path]) for key in carried)]
    lacking = [key for key in lacking if not within(key, absent)]
    if lacking:
        raise ModelError(
            f"'{name}' lacks {len(lacking)} tensors of the {type(model).__name__} in its config.json: {listed(lacking)}; the "
            "checkpoint is incomplete, or its config.json is another model's. Fetch both again."
        )
    return checkpoint, names, stacks, absent


def _beside(target: str, pattern: str | None, converters: list[WeightConverter]) -> list[str]:
    """What else is made of the tensor that goes to ``target`` by ``pattern``, where it is cut into several."""
    return [
        target.replace(item.target_patterns[0], other)
        for item in converters
        if pattern in item.source_patterns
        for other in item.target_patterns[1:]
    ]


def _stack(
    model: PreTrainedModel,
    checkpoint: Checkpoint,
    target: str,
    parts: dict[str, list[str]],
    converters: list[WeightConverter],
    name: str,
) -> Stack:
    """How the parameter ``target`` of several experts is made from its ``parts``. Raises ModelError where that is not known, or
    parts are missing."""
    if parts.keys() == {BLOCKS, SCALES} and all(len(names) == 1 for names in parts.values()):
        return Stack({end: parts[end] for end in (BLOCKS, SCALES)}, [FromMxfp4()], target)
    count = model.get_parameter(target).shape[0]
    converter = next((item for item in converters if set(parts) <= set(item.source_patterns)), None)
    operations = [] if converter is None else list(converter.operations)
    several = bool(operations) and isinstance(operations[0], MergeModulelist)
    stored = checkpoint.entries[next(iter(parts.values()))[0]].shape
    operations = settled(operations, stored, tuple(model.get_parameter(target).shape))
    if not all(_by_expert(operation, first=number == 0) for number, operation in enumerate(operations)):
        raise ModelError(
            f"'{name}' (model type '{model.config.model_type}') arranges its experts as transformers computes '{target}' by "
            f"{listed([type(operation).__name__ for operation in operations])}, which is not known to go expert by expert; "
            "take another model."
        )
    if prequantised := [source for names in parts.values() for source in names if packed_parts(source, checkpoint)]:
        raise ModelError(
            f"'{name}' holds experts that bitsandbytes packed one by one ({listed(prequantised, 2)}), and transformers computes "
            "with all of them as one; name the 16-bit checkpoint that it was made from."
        )
    patterns = parts if converter is None else converter.source_patterns
    ordered = {pattern: sorted(parts.get(pattern, []), key=dot_natural_key) for pattern in patterns}
    wanted = count if several else 1
    if lacking := [pattern for pattern, names in ordered.items() if len(names) != wanted]:
        raise ModelError(
            f"'{name}' holds {len(ordered[lacking[0]])} tensors '{lacking[0]}' for '{target}'; its config.json asks for "
            f"{wanted}. The checkpoint is incomplete, fetch it again."
        )
    return Stack(ordered, operations, target if converter is None else converter.target_patterns[0])


def _by_expert(operation: Any, first: bool) -> bool:
    """Whether one of transformers' conversions does the same to each of the experts, which are the first dimension."""
    if isinstance(operation, MergeModulelist):
        return first and operation.dim == 0
    if isinstance(operation, Transpose):
        return operation.dim0 > 0 and operation.dim1 > 0
    return isinstance(operation, Concatenate | Chunk | Interleave) and operation.dim > 0


class OnLoad:
    """What becomes of the name of an adapter's tensor where PEFT loads it: since 0.19 it goes through transformers' renamings, made
    for old checkpoints, some of which take today's names for yesterday's (``shared_experts`` for ``shared_expert``)."""

    def __init__(self, model: nn.Module) -> None:
        known = isinstance(model, PreTrainedModel)
        there = get_model_conversion_mapping(model) if known else []
        back = get_model_conversion_mapping(model, add_legacy=False) if known else []
        self._there = [item for item in there if isinstance(item, WeightRenaming)]
        self._back = [item.reverse_transform() for item in reversed(back) if isinstance(item, WeightRenaming)]

    def arrives(self, path: str) -> str:
        """The path of the module that what is written for ``path`` is loaded into."""
        found: str = rename_source_key(f"{path}{_OF_ADAPTER}", self._there, [])[0].removesuffix(_OF_ADAPTER)
        return path if f"model.{path}".endswith(found) else found  # PEFT undoes what takes a beginning away

    def written(self, path: str) -> str | None:
        """What to write for the module at ``path`` so that it arrives there: its own path, else an old checkpoint's; None where
        neither does."""
        old = f"{path}{_OF_ADAPTER}"
        for item in self._back:
            old = item.rename_source_key(old)[0]
        return next((name for name in (path, old.removesuffix(_OF_ADAPTER)) if self.arrives(name) == path), None)


_OF_ADAPTER = ".lora_A.default.weight"


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
