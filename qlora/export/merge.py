"""Merging: a base and its adapter become one plain 16-bit checkpoint, tensor by tensor.

    for each tensor of each source file:  read → (quantise → dequantise) → + what was learned, in fp32 → round → write

The adapter was trained beside quantised weights, so by default it is added to exactly those: what the base lost in
quantisation is part of what the adapter learned to live with. Memory is one dense fp32 tensor, whatever the size of the
model, and no GPU is needed. Knows checkpoints, and asks the method what it adds; must not know runs, recipes or a loaded model.
"""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from qlora.errors import MethodError, ModelError, RunError
from qlora.export.spelling import both_spellings, older_tokenizer
from qlora.export.writer import SafetensorsWriter
from qlora.files.durable import folder_written_aside
from qlora.machine.device import DTYPES, require_disk, resolve_compute_dtype, trim_heap
from qlora.methods.files import keep_apart, load_adapter
from qlora.methods.planted import unplanted
from qlora.model import anatomy
from qlora.model.arranged import Arranged, Group
from qlora.model.checkpoint import INDEX, MERGE, Checkpoint, read_json
from qlora.model.config import FOUR_BIT
from qlora.model.experts import PackedExperts
from qlora.model.load import GENERATION, end_tokens, packed_tensors, quantised_names, read_expert, split_expert, turned
from qlora.model.names import packed_parts
from qlora.model.nf4 import FrozenLinear, dense_weight
from qlora.model.skeleton import assemble
from qlora.model.tokenizer import TEMPLATE
from qlora.recipe import ModelSection

# Everything beside the weights and config.json that loading, generating or converting to GGUF may ask for.
BESIDE = (
    "generation_config.json", "tokenizer*", "special_tokens_map.json", "added_tokens.json", "vocab.*", "merges.txt",
    "spiece.model", "tekken.json", "*.tiktoken", "chat_template*", "additional_chat_templates", "*.jinja", "*.py", "LICENSE*", "NOTICE*",
    "*processor_config.json",
)  # fmt: skip


@dataclass(frozen=True)
class Merged:
    """What a merge wrote: the folder, and how many of its tensors carry the adapter or only went through quantisation."""

    folder: Path
    tensors: int
    adapted: int
    dequantised: int
    bytes: int
    dtype: torch.dtype
    for_serving: bool = False
    """Whether it carries weights that were in 4 bits, which would not survive being quantised to them again."""
    new_ends: tuple[str, ...] = ()
    """The tokens that end an answer and did not by the base's configuration."""


def merge(
    base_folder: str | Path,
    adapter_folder: str | Path,
    out: str | Path,
    *,
    compute_dtype: Literal["auto", "bf16", "fp16", "fp32"],
    quantization: Literal["nf4", "fp4", "int8", "none"] = "nf4",
    double_quant: bool = True,
    base: Literal["dequantized", "original"] = "dequantized",
    dtype: Literal["bf16", "fp16", "fp32"] = "bf16",
    device: torch.device | None = None,
    overwrite: bool = False,
    trust_remote_code: bool = False,
    chat_template: str | None = None,
    ends: Sequence[int] = (),
    checkpoint: Checkpoint | None = None,
) -> Merged:
    """Write base + adapter into the new folder ``out`` as plain safetensors in ``dtype``, with config and tokenizer.

    ``quantization``, ``double_quant`` and ``compute_dtype`` say what the adapter was trained on; ``base="original"`` adds
    it to the weights as they were before quantisation instead. ``chat_template`` takes the place of the base's own, its
    ``ends`` are written into generation_config.json where they are not the base's end tokens, and
    ``checkpoint`` is the base's, where it was opened before. The files are split as the source's are. Nothing is at
    ``out`` before everything is written.

    Raises ModelError or MethodError for a base or an adapter that cannot be read or do not belong together, RunError
    when ``out`` is taken (``overwrite`` replaces it, if it is a model), DoesNotFitError when the disk is too small.
    """
    base_folder, adapter_folder, out = Path(base_folder), Path(adapter_folder), Path(out)
    keep_apart(out, base_folder, adapter_folder)
    if overwrite and out.is_dir() and any(out.iterdir()) and not (out / "config.json").is_file():
        raise RunError(f"'{out}' holds no model (no config.json), so it is not overwritten; choose another folder.")
    if checkpoint is None:
        checkpoint = Checkpoint(base_folder, str(base_folder), trust_remote_code=trust_remote_code)
    section = ModelSection(
        name=checkpoint.name,
        quantization=quantization,
        double_quant=double_quant,
        trust_remote_code=checkpoint.trust_remote_code,
    )
    device = torch.device("cpu") if device is None else device
    source = Source(checkpoint, section, adapter_folder, device, resolve_compute_dtype(device, compute_dtype))
    if base == "original" and source.empty.scheme.prequantised:
        raise ModelError(
            f"'{base_folder}' is itself quantised and does not hold the original weights; merge with base='dequantized'."
        )
    promised = source.promise(DTYPES[dtype])
    total = sum(math.prod(shape) * kind.itemsize for shard in promised.values() for kind, shape in shard.values())
    require_disk(out, total + 64 * 1024**2, "The merged model")
    with folder_written_aside(out, overwrite) as aside:
        for file, entries in promised.items():
            with SafetensorsWriter(aside / file, entries) as writer:
                for name, (kind, _) in entries.items():
                    writer.write(name, source.tensor(name, kind, requantise=base == "dequantized"))
                    trim_heap()
        if len(promised) > 1:
            weight_map = {name: file for file, entries in promised.items() for name in entries}
            _write_json(aside / INDEX, {"metadata": {"total_size": total}, "weight_map": weight_map})
        _write_json(aside / "config.json", both_spellings(source.plain_config(dtype), type(source.model).__name__))
        _copy_beside(base_folder, aside)
        new_ends = set(ends) - set(end_tokens(checkpoint))
        if new_ends:
            _write_json(aside / GENERATION, _generation(aside, checkpoint, new_ends))
        for method in source.adapted.methods:
            method.merge.finish(aside)
        own = checkpoint.tokenizer.chat_template if chat_template is not None else None
        # of a tokenizer with several templates the run's may be one: a file of it would hide the others, as tool_use
        if chat_template is not None and not (isinstance(own, dict) and chat_template in own.values()):
            (aside / TEMPLATE).write_text(chat_template, encoding="utf-8")
        older_tokenizer(aside)
        made = {"base": checkpoint.name, "revision": checkpoint.revision, "weights": base, "quantization": quantization}
        _write_json(aside / MERGE, made | {"double_quant": double_quant, "dtype": dtype})
    changed = source.quantised if base == "dequantized" else set()
    return Merged(
        folder=out,
        tensors=sum(len(entries) for entries in promised.values()),
        adapted=len(source.carrying),
        dequantised=len(changed - source.carrying),
        bytes=total,
        dtype=DTYPES[dtype],
        for_serving=bool(changed) and quantization in FOUR_BIT,
        new_ends=tuple(checkpoint.tokenizer.convert_ids_to_tokens(sorted(new_ends))),
    )


class Source:
    """The base's tensors as they were trained on, one at a time, and the adapter that belongs to them."""

    def __init__(
        self,
        checkpoint: Checkpoint,
        section: ModelSection,
        adapter: Path,
        device: torch.device,
        compute_dtype: torch.dtype,
    ) -> None:
        self.device, self.compute_dtype = device, compute_dtype
        self.empty = assemble(checkpoint, section, compute_dtype)
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
        self.untied = self._untied()
        """Tensors that the source has under the name of a tied one alone → its name in the checkpoint."""
        self.left = frozenset(self.empty.left)
        self.carrying: set[str] = set()
        """The tensors that carry something learned, as far as they were asked for."""

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
            if entry.shape != shape and not packed_parts(name, self.checkpoint):
                raise ModelError(
                    f"'{name}' in '{self.checkpoint.folder}' has the shape {list(entry.shape)}; its config.json asks for "
                    f"{list(shape)}."
                )
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
            rounded = self.split.pop(name).to(dtype)
        elif name in self.unpacked or self.names.get(name) in self.stacks:
            rounded = self._of_experts(name, dtype, requantise)
        else:
            rounded = self._whole(name, requantise).to(dtype)
        if dtype == torch.float16 and not torch.isfinite(rounded).all():
            raise MethodError(f"'{name}' has values beyond 65504, the largest of fp16; merge with dtype='bf16'.")
        return rounded

    def _made(self, name: str, dtype: torch.dtype, requantise: bool) -> Tensor:
        """A merged weight that the checkpoint has in another arrangement."""
        return self._of_experts(name, dtype, requantise) if name in self.stacks else self._whole(name, requantise)

    def _whole(self, name: str, requantise: bool) -> Tensor:
        """The merged tensor called ``name``, one that holds no experts, before it is rounded."""
        if name not in self.names and name not in self.untied:
            values = self._new_tensors()[name].to(self.device)
        else:
            target, source = (name, self.untied[name]) if name in self.untied else (self.names[name], name)
            values = self._requantised(name, target) if requantise and target in self.quantised else self._plain(source)
            if values.is_floating_point():
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
            return self.split.pop(name).to(dtype)
        shape = self.checkpoint.entries[name].shape if own else self.shapes[target]
        whole = torch.empty(shape, dtype=dtype, device=self.device)
        for expert in range(len(whole)):
            matrix = self._expert(target, expert, requantise)
            whole[expert] = split_expert(stack, expert, matrix)[name] if own else matrix
            trim_heap()
        return whole

    def _expert(self, target: str, expert: int, requantise: bool) -> Tensor:
        """One expert's merged matrix in fp32."""
        packed = unplanted(getattr(self.model.get_submodule(target.rpartition(".")[0]), target.rpartition(".")[2]))
        values = read_expert(self.checkpoint, self.stacks[target], expert).to(self.device)
        if requantise and isinstance(packed, PackedExperts):
            values = packed.stands_for(values.to(self.compute_dtype))
        values = values.to(torch.float32).clone()
        for method in self.adapted.methods:
            values, before = method.merge.merged_expert(target, expert, values), values.clone()
            if not torch.equal(values, before):
                self.carrying.add(target)
        return values

    def _plain(self, name: str) -> Tensor:
        """The checkpoint's own values, to be changed in place."""
        return self.checkpoint.read(name).to(self.device).clone()

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


def _generation(folder: Path, checkpoint: Checkpoint, ends: set[int]) -> dict[str, Any]:
    """The base's generation_config.json with more end tokens; what config.json says of such tokens where there is none."""
    said = {key: value for key, value in checkpoint.config.items() if key in ("bos_token_id", "pad_token_id")}
    values = read_json(folder, GENERATION, "a generation configuration") if (folder / GENERATION).is_file() else said
    return {**values, "eos_token_id": [*end_tokens(checkpoint), *sorted(ends)]}


def _copy_beside(source: Path, target: Path) -> None:
    for pattern in BESIDE:
        for path in source.glob(pattern):
            if path.is_file():
                shutil.copyfile(path, target / path.name)
            elif path.is_dir():
                shutil.copytree(path, target / path.name, dirs_exist_ok=True)


def _write_json(path: Path, values: dict[str, Any]) -> None:
    path.write_text(json.dumps(values, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
