"""The tensors of a merged model, one at a time: as the base was trained on, plus what was learned.

    read → (quantise → dequantise) → + what was learned, in fp32 → round

A skeleton on the meta device says what belongs where, so one dense fp32 tensor is in memory, whatever the model's size. Knows
checkpoints, and asks the method what it adds; must not know which format the tensors are written in.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from qlora.errors import MethodError
from qlora.export.rounding import dithered
from qlora.files.durable import write_text
from qlora.machine.device import DTYPES, resolve_compute_dtype, trim_heap
from qlora.methods.loading import load_adapter
from qlora.methods.planted import unplanted
from qlora.model import anatomy
from qlora.model.arranged import Arranged, Group
from qlora.model.checkpoint import Checkpoint
from qlora.model.experts import PackedExperts
from qlora.model.load import packed_tensors, quantised_names, split_expert, turned
from qlora.model.names import packed_parts
from qlora.model.nf4 import FrozenLinear, dense_weight
from qlora.model.skeleton import assemble
from qlora.recipe import ModelSection

CPU = torch.device("cpu")
CARRYING = ".carrying"  # while an export is written: the tensors that the adapter changed, so far


class Source:
    """The base's tensors as they were trained on, one at a time, and the adapter that belongs to them."""

    def __init__(
        self,
        checkpoint: Checkpoint,
        section: ModelSection,
        adapter: Path,
        device: torch.device = CPU,
    ) -> None:
        self.device, self.compute_dtype = device, resolve_compute_dtype(device, section.compute_dtype)
        self.empty = assemble(checkpoint, section, self.compute_dtype)
        self.checkpoint = self.empty.checkpoint
        self.model, self.names, self.shapes = self.empty.model, self.empty.names, self.empty.shapes
        self.stacks = self.empty.stacks
        self.split: dict[str, Tensor] = {}
        """What else the expert's matrix, or the group of weights, was split into that was merged last."""
        self.groups: dict[str, Group] = {}
        """Tensors that transformers makes others from → what it makes."""
        self.unpacked: dict[str, str] = {}
        """Tensors that stand for two of MXFP4 → their names in the model."""
        self._untie()
        self.quantised = quantised_names(self.model)
        # the model stays on meta, the adapter is on the device
        self.adapted = load_adapter(self.empty.base(device, tokenizer=checkpoint.tokenizer), adapter)
        for method in self.adapted.methods:
            if why := method.merge.why_not():
                raise MethodError(f"{method.section.name} cannot be merged: {why}.")
        merges = [method.merge for method in self.adapted.methods]
        self.names = {name: to for name, to in self.names.items() if not any(merge.drops(to) for merge in merges)}
        self.untied = self._untied()
        """Tensors that the source has under the name of a tied one alone → its name in the checkpoint."""
        self.left = frozenset(self.empty.left)
        self.carrying: set[str] = set()
        """The tensors that carry something learned, as far as they were asked for."""

    def recall(self, folder: Path) -> None:
        """Know what the adapter changed in the files that a process before this one finished in ``folder``."""
        if (told := folder / CARRYING).exists():
            self.carrying.update(json.loads(told.read_text(encoding="utf-8")))

    def remember(self, folder: Path) -> None:
        """Leave in ``folder``, where one more file is finished, what the adapter changed so far."""
        write_text(folder / CARRYING, json.dumps(sorted(self.carrying)))

    def _untied(self) -> dict[str, str]:
        """What the adapter made different from the tensor that it was tied to, as ``{"lm_head.weight": "model.embed…"}``."""
        names = {target: name for name, target in self.names.items()}
        tied = anatomy.tied_names(self.model)
        return {
            lacking: names[present]
            for pair in tied.items()
            for present, lacking in (pair, pair[::-1])
            if present in names and lacking not in names and any(m.merge.unties(*pair) for m in self.adapted.methods)
        }

    def _untie(self) -> None:
        """Where the checkpoint holds different weights for what its config.json ties, they are two, as in ``load_base``."""
        stored = {target: name for name, target in self.names.items()}
        for target, origin in anatomy.tied_names(self.model).items():
            if {target, origin} <= stored.keys():
                first, second = (self.checkpoint.read(stored[name]) for name in (target, origin))
                if not torch.equal(first, second):
                    module = self.model.get_submodule(target.rpartition(".")[0])
                    module.weight = nn.Parameter(torch.empty_like(module.weight), requires_grad=False)

    def promise(self, dtype: torch.dtype) -> dict[str, dict[str, tuple[torch.dtype, tuple[int, ...]]]]:
        """For each file to write, its tensors' dtypes and shapes: the source's files and order, floats in ``dtype``."""
        files: dict[str, dict[str, tuple[torch.dtype, tuple[int, ...]]]] = {}
        single = len(self.checkpoint.shards) == 1
        for name, target in self.names.items():
            entry = self.checkpoint.entries[name]
            plain = entry.dtype.is_floating_point or target in self.quantised
            if isinstance(self.checkpoint, Arranged) and (group := self.checkpoint.group_of.get(name)) is not None:
                if any(method.merge.shape(target, entry.shape) != entry.shape for method in self.adapted.methods):
                    raise MethodError(
                        f"'{target}' is one of several that '{self.checkpoint.name}' holds as one, so it cannot grow."
                    )
                for source in group.parts.values():
                    stored = self.checkpoint.stored.entries[source]
                    file = "model.safetensors" if single else stored.file.name
                    files.setdefault(file, {})[source] = (dtype, stored.shape)
                    self.groups[source] = group
                continue
            stack = self.stacks.get(target)
            written = None if stack is None else stack.unpacked
            if written is not None:  # two tensors of MXFP4 become one in 16 bits
                if name != stack.sources[0]:  # type: ignore[union-attr]
                    continue
                self.unpacked[written] = target
                entry = entry._replace(shape=self.shapes[target], dtype=dtype)
            # the part of an expert, or of all in another arrangement, is checked when it is read
            shape = entry.shape if target in self.stacks else self.shapes[target]
            for method in self.adapted.methods:
                shape = method.merge.shape(target, shape)
            # transformers looks for model.safetensors where there is no index
            file = "model.safetensors" if single else entry.file.name
            files.setdefault(file, {})[written or name] = (dtype if plain else entry.dtype, shape)
            files[file] |= {new: files[file][name] for new, source in self.untied.items() if source == name}
        for name in sorted(self.left):
            entry, packed = self.checkpoint.entries[name], self.empty.packed_aside.get(name)
            kept = (dtype if name in self.checkpoint.scales else entry.dtype, entry.shape)
            if packed is not None:
                kept = dtype, (packed.out_features, packed.in_features)
            files.setdefault("model.safetensors" if single else entry.file.name, {})[name] = kept
        last = files[next(reversed(files))]
        for target, values in self._new_tensors().items():
            last[target] = (dtype, tuple(values.shape))
        return files

    def _new_tensors(self) -> dict[str, Tensor]:
        return {name: values for method in self.adapted.methods for name, values in method.merge.new_tensors().items()}

    @torch.no_grad()
    def tensor(self, name: str, dtype: torch.dtype, requantise: bool) -> Tensor:
        """The merged tensor called ``name`` in the checkpoint, in ``dtype``, on the device; what was not loaded as it is there."""
        if name in self.left:
            return self._left(name, dtype)
        if (group := self.groups.get(name)) is not None:
            if name not in self.split:
                self.split = group.split({made: self._made(made, dtype, requantise) for made in group.made.values()})
            rounded = dithered(self.split.pop(name), dtype)
        elif name in self.unpacked or self.names.get(name) in self.stacks:
            rounded = self._of_experts(name, dtype, requantise)
        else:
            whole = self._whole(name, requantise)
            rounded = dithered(whole, dtype) if self._touched(self.names.get(name, name)) else whole.to(dtype)
        if dtype == torch.float16 and not torch.isfinite(rounded).all():
            raise MethodError(f"'{name}' has values beyond 65504, the largest of fp16; merge with dtype='bf16'.")
        return rounded

    @property
    def rearranged(self) -> bool:
        """Whether the checkpoint keeps some of its linears otherwise than the model has them: as experts, or fused."""
        return bool(self.stacks) or isinstance(self.checkpoint, Arranged)

    def bias(self, path: str) -> Tensor | None:
        """The merged bias in fp32 of the linear at ``path`` in the model; None where it has none."""
        name = next((name for name, target in self.names.items() if target == f"{path}.bias"), None)
        return None if name is None else self.tensor(name, torch.float32, requantise=True)

    def chooses_codes(self, name: str) -> bool:
        """Whether the merged tensor ``name`` of the checkpoint is computed: where it is rounded to codes, others may be near as well."""
        target = self.names.get(name, name)
        computed = target in {*self.quantised, *self.stacks} or name in self.groups or name in self.unpacked
        return computed or self._touched(target)

    def _made(self, name: str, dtype: torch.dtype, requantise: bool) -> Tensor:
        """A merged weight that the checkpoint has in another arrangement."""
        return self._of_experts(name, dtype, requantise) if name in self.stacks else self._whole(name, requantise)

    def _whole(self, name: str, requantise: bool) -> Tensor:
        """The merged tensor called ``name``, one that holds no experts, before it is rounded."""
        if name not in self.names and name not in self.untied:
            values = self._new_tensors()[name].to(self.device)
        else:
            target, source = (name, self.untied[name]) if name in self.untied else (self.names[name], name)
            again = requantise and target in self.quantised
            values = self._requantised(name, target) if again else self.checkpoint.read(source).to(self.device)
            if values.is_floating_point() and self._touched(target):
                values = values.to(torch.float32)
                for method in self.adapted.methods:
                    if not requantise or target not in self.quantised:
                        values = method.merge.original(target, values)
                    before, version = values, values._version
                    values = method.merge.merged(target, values)
                    if values is not before or values._version != version:
                        self.carrying.add(target)
        return values

    def _of_experts(self, name: str, dtype: torch.dtype, requantise: bool) -> Tensor:
        """The merged tensor ``name`` that holds one expert's matrix, a part of it, or those of all."""
        target = self.unpacked.get(name) or self.names[name]
        stack = self.stacks[target]
        own = next((names for names in stack.parts.values() if name in names), [])
        if len(own) > 1:
            if name not in self.split:  # an expert's gate and its up are halves of one matrix, and mostly neighbours
                self.split = split_expert(stack, own.index(name), self._expert(target, own.index(name), requantise))
            return dithered(self.split.pop(name), dtype)
        shape = self.checkpoint.entries[name].shape if own else self.shapes[target]
        whole = torch.empty(shape, dtype=dtype, device=self.device)
        for expert in range(len(whole)):
            matrix = self._expert(target, expert, requantise)
            whole[expert] = dithered(split_expert(stack, expert, matrix)[name] if own else matrix, dtype)
            trim_heap()
        return whole

    def _expert(self, target: str, expert: int, requantise: bool) -> Tensor:
        """One expert's merged matrix in fp32."""
        packed = unplanted(getattr(self.model.get_submodule(target.rpartition(".")[0]), target.rpartition(".")[2]))
        values = self.stacks[target].matrix(expert, self.checkpoint.read).to(self.device)
        if requantise and isinstance(packed, PackedExperts):
            values = packed.stands_for(values.to(self.compute_dtype))
        values = values.to(torch.float32).clone()
        for method in self.adapted.methods:
            values, before = method.merge.merged_expert(target, expert, values), values.clone()
            if not torch.equal(values, before):
                self.carrying.add(target)
        return values

    def _touched(self, target: str) -> bool:
        return any(method.merge.touches(target) for method in self.adapted.methods)

    def exact(self, name: str) -> torch.dtype:
        """The dtype that has the merged tensor ``name`` unrounded: the checkpoint's own of a matrix to which nothing is added."""
        entry, target = self.checkpoint.entries.get(name), self.names.get(name, name)
        plain = name in self.names and not self._touched(target) and target not in {*self.quantised, *self.stacks}
        kept = entry is not None and len(entry.shape) > 1 and entry.dtype in (torch.bfloat16, torch.float16)
        return entry.dtype if entry and plain and kept else torch.float32

    def _left(self, name: str, dtype: torch.dtype) -> Tensor:
        """What was not loaded: as it is there, or dense where bitsandbytes packed it."""
        if (linear := self.empty.packed_aside.get(name)) is None:
            values = self.checkpoint.read(name)
            return values.to(dtype) if name in self.checkpoint.scales else values
        linear.place_quantised(packed_tensors(self.checkpoint, name), self.device)
        dense = dense_weight(linear, self.compute_dtype).to(dtype)
        linear.to("meta")
        return dense

    def _requantised(self, name: str, target: str) -> Tensor:
        """The dense values that the quantised linear stood for while the adapter was trained."""
        linear = unplanted(self.model.get_submodule(target.removesuffix(".weight")))
        assert isinstance(linear, FrozenLinear)
        if parts := packed_parts(name, self.checkpoint):
            linear.place_quantised(packed_tensors(self.checkpoint, name), self.device)
            whole = turned(linear, dense_weight(linear, self.compute_dtype))
        else:
            # cast before quantising, as the loader does: the scales depend on the dtype they came from
            whole = self.checkpoint.read(name).to(self.device).to(self.compute_dtype)
        weight = whole
        for method in self.adapted.methods:
            weight = method.merge.before_quantising(target, weight)
        if not parts or weight is not whole:
            linear.place(turned(linear, weight), self.device)
            whole = turned(linear, dense_weight(linear, self.compute_dtype))
        linear.to("meta")  # drops the packed copy
        return whole

    def plain_config(self, dtype: str) -> dict[str, Any]:
        """The source's config.json without quantisation, in ``dtype``, tying embeddings only if the files do."""
        name = str(DTYPES[dtype]).removeprefix("torch.")
        values = {
            key: value
            for key, value in self.checkpoint.config.items()
            if key not in ("quantization_config", "torch_dtype")
        }
        tied = anatomy.tied_names(self.model)
        present = set(self.names.values())
        both = bool(self.untied) or any(target in present and origin in present for target, origin in tied.items())
        said = {"dtype": name, "tie_word_embeddings": bool(tied) and not both}
        values = {**values, **said}
        if isinstance(inside := values.get("text_config"), dict):  # a wrapper's language model has its own
            values["text_config"] = {**{key: value for key, value in inside.items() if key != "torch_dtype"}, **said}
        for method in self.adapted.methods:
            values = method.merge.config(values)
        return values
