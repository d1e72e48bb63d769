"""Weights that transformers fuses or splits on load: a checkpoint that gives each of them under the model's own name.

    q_conv1d.weight, k_conv1d.weight, v_conv1d.weight  ─►  conv1d.weight            concatenated (OLMo hybrid, Kimi Linear)
    gqkv_proj.weight  ─►  gate_proj.weight, q_proj.weight, k_proj.weight, …         in pieces (HRM, Molmo 2)

What is made belongs to one layer, so a group is made as a whole and dropped: loading stays one tensor after the other, and a merge
splits it again. Knows transformers' conversions; must not know a mixture's experts (``names.Stack``) or where weights go.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.core_model_loading import Transpose, WeightConverter

from qlora.errors import ModelError
from qlora.model.checkpoint import Checkpoint
from qlora.model.tensor_file import Entry


@dataclass(frozen=True)
class Group:
    """Weights of a model that are made together from tensors of its checkpoint."""

    parts: dict[str, str]
    """Transformers' pattern of a tensor's name → its name in the checkpoint."""
    made: dict[str, str]
    """Transformers' pattern of a weight's name → its name in the model."""
    operations: list[Any]
    """Transformers' own."""
    shapes: dict[str, tuple[int, ...]]
    """Of both, by their names there."""
    config: Any
    """The model's configuration, which some conversions ask."""

    def make(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The weights by their names in the model, of ``tensors`` by their names in the checkpoint."""
        return self._converted(tensors, self.parts, self.made, self.operations)

    def split(self, weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The tensors by their names in the checkpoint that ``weights`` would be made from."""
        return self._converted(weights, self.made, self.parts, [op.reverse_op for op in reversed(self.operations)])

    def _converted(
        self, tensors: Mapping[str, Tensor], sources: dict[str, str], targets: dict[str, str], operations: list[Any]
    ) -> dict[str, Tensor]:
        held: dict[str, Any] = {pattern: [tensors[name]] for pattern, name in sources.items()}
        for operation in operations:
            if type(operation).__name__ in ("Chunk", "Split"):  # into pieces that need not be equal, of whatever model
                sizes = [self.shapes[name][operation.dim] for name in targets.values()]
                held = dict(zip(targets, _only(held).split(sizes, operation.dim), strict=True))
            else:
                held = operation.convert(
                    held, source_patterns=[*sources], target_patterns=[*targets], config=self.config
                )
        return {targets[pattern]: _only(values).contiguous() for pattern, values in held.items()}


def _only(held: Any) -> Tensor:
    """A tensor, also where it is the only one of a list or of a mapping."""
    held = next(iter(held.values())) if isinstance(held, dict) else held
    return held[0] if isinstance(held, list) else held


def settled(operations: list[Any], stored: tuple[int, ...], wanted: tuple[int, ...]) -> list[Any]:
    """``operations`` without those that depend on shapes: a transposition is made only where the stored shape is another one."""
    found = []
    for operation in operations:
        if not (isinstance(operation, Transpose) and operation.check_dims):
            found.append(operation)
        elif stored != wanted:
            found.append(Transpose(operation.dim0, operation.dim1))
    return found


@dataclass(frozen=True)
class Arranged(Checkpoint):
    """A checkpoint in the arrangement of its model: what ``groups`` make stands in the place of what it is made from."""

    stored: Checkpoint = field(kw_only=True)
    groups: tuple[Group, ...] = field(kw_only=True)
    _held: dict[str, Tensor] = field(default_factory=dict)
    """The group that was made last, as far as nobody asked for it."""

    @cached_property
    def group_of(self) -> dict[str, Group]:
        """Which group gives a weight of the model."""
        return {name: group for group in self.groups for name in group.made.values()}

    @cached_property
    def entries(self) -> dict[str, Entry]:  # type: ignore[override]
        """Every tensor, file by file; those that are made stand where the first of what they are made from does."""
        begins = {next(iter(group.parts.values())): group for group in self.groups}
        gone = {name for group in self.groups for name in group.parts.values()}
        gone |= {self.stored.scales[name] for name in gone & self.stored.scales.keys()}
        found: dict[str, Entry] = {}
        for name, entry in self.stored.entries.items():
            if name not in gone:
                found[name] = entry
            elif name in begins:
                group = begins[name]
                kind = torch.float32 if name in self.stored.scales else entry.dtype
                found |= {made: entry._replace(shape=group.shapes[made], dtype=kind) for made in group.made.values()}
        return found

    def read(self, name: str, part: int | None = None) -> Tensor:
        if (group := self.group_of.get(name)) is None:
            return self.stored.read(name, part)
        if name not in self._held:
            self._held.clear()
            self._held.update(group.make({one: self.stored.read(one) for one in group.parts.values()}))
        values = self._held[name]
        if part is not None:
            values = values[part].clone()
        if part is None or part == len(self._held[name]) - 1:  # others are asked for one after the other
            del self._held[name]
        if part is None and tuple(values.shape) != group.shapes[name]:
            raise ModelError(
                f"'{next(iter(group.parts.values()))}' in '{self.folder}' gives '{name}' the shape {list(values.shape)}; its "
                f"config.json asks for {list(group.shapes[name])}."
            )
        return values


def arranged(
    checkpoint: Checkpoint,
    model: PreTrainedModel,
    found: Mapping[tuple[str, str], Collection[str]],
    converters: Collection[WeightConverter],
) -> Checkpoint:
    """``checkpoint`` with what ``converters`` make of it; ``found`` are the names in it for each (weight of the model, pattern).

    Raises ModelError where a weight cannot be made, because of what it would be made from something is missing.
    """
    if not found:
        return checkpoint
    shapes = {name: tuple(values.shape) for name, values in model.state_dict().items()}
    by_pattern = {pattern: item for item in converters for pattern in item.source_patterns}
    groups = []
    for target in dict.fromkeys(target for target, _ in found):
        converter = next(by_pattern[pattern] for name, pattern in found if name == target)
        first, *others = converter.target_patterns
        made = {first: target, **{other: target.replace(first, other) for other in others}}
        parts = {pattern: [*found.get((target, pattern), ())] for pattern in converter.source_patterns}
        if any(len(names) != 1 for names in parts.values()) or not shapes.keys() >= {*made.values()}:
            raise ModelError(
                f"'{checkpoint.name}' (model type '{model.config.model_type}') has other tensors for '{target}' than transformers "
                f"makes it from ({', '.join(converter.source_patterns)}); the checkpoint is incomplete, fetch it again."
            )
        names = {pattern: one for pattern, (one,) in parts.items()}
        stored = {name: checkpoint.entries[name].shape for name in names.values()}
        operations = settled(list(converter.operations), next(iter(stored.values())), shapes[target])
        both = {**stored, **{name: shapes[name] for name in made.values()}}
        groups.append(Group(names, made, operations, both, model.config))
    place = (checkpoint.folder, checkpoint.name, checkpoint.revision, checkpoint.trust_remote_code)
    return Arranged(*place, stored=checkpoint, groups=tuple(groups))
