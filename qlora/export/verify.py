"""An export that lies there, against the export made anew: every tensor of it, one at a time.

Knows checkpoints, adapters, GGUF files and the stream of merged tensors; what the model answers is measured elsewhere.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch import Tensor

from qlora.errors import DiffersError, MethodError, QloraError, RunError, listed
from qlora.export.adapter import export_adapter
from qlora.export.gguf import WEIGHTS, bytes_of, described, entries_of, export_gguf_adapter
from qlora.export.gguf_models import Converted
from qlora.export.gguf_types import TYPES
from qlora.export.source import Source
from qlora.machine.device import DTYPES, trim_heap
from qlora.methods.files import CONFIG, read_adapter_tensors, read_config
from qlora.model.checkpoint import Checkpoint
from qlora.model.names import packed_parts
from qlora.recipe import ModelSection

STEPS = 2.0  # of the dtype, that a number may be off
FEW = 1e-3  # of the numbers that are rounded to codes anew: another machine may take the other of two at a tie
CHUNK = 2**20  # numbers that are compared at once, in fp64
ABOUT = ("base_model_name_or_path", "revision", "peft_version")
"""What an adapter's config says of other things than the adapter."""


class GgufFile:
    """A GGUF file: its tensors by llama.cpp's names, and what else it says. Raises DiffersError for one that cannot be read."""

    def __init__(self, file: Path) -> None:
        import gguf

        try:
            reader = gguf.GGUFReader(file)
            self.tensors = {tensor.name: tensor for tensor in reader.tensors}
            self.said = {name: field.contents() for name, field in reader.fields.items()}
        except (ValueError, OSError, IndexError, KeyError) as error:
            raise DiffersError(f"'{file}' is no whole GGUF file ({error}). Export it again.") from error
        self.file = file
        self.weights = self.said.get(WEIGHTS)
        """Which base it was merged into."""

    def tensor(self, name: str) -> Tensor:
        """A tensor's values in fp32, as the gguf library reads them."""
        import gguf

        tensor = self.tensors[name]
        values = gguf.quants.dequantize(tensor.data, tensor.tensor_type)
        return torch.from_numpy(values.copy() if values.base is not None else values).reshape(self.shape(name))

    def shape(self, name: str) -> tuple[int, ...]:
        """As torch has it."""
        return tuple(int(size) for size in reversed(self.tensors[name].shape))

    def linear(self, target: str, converted: Converted) -> Tensor:
        """The weight [out, in] called ``target`` in the model, in the model's order."""
        values = self.tensor(str(converted.name(target)))
        if (order := converted.order(target, values.size)) is not None:
            values = values.index_select(order[0], order[1].argsort())
        return values


def verify(source: Source, folder: Path) -> int:
    """How many tensors of ``folder`` are the merge's own, of the base that its note names.

    Those that are packed in 4 bits are counted and not compared: other codes may answer alike. Raises DiffersError, which
    names the tensors that are missing, too many, of another shape, not finite, or off: those whose codes are chosen anew in more
    than ``FEW`` of their numbers, any other in one.
    """
    checkpoint = Checkpoint(folder, str(folder))
    note = checkpoint.merge
    original = note.get("weights") == "original"
    dtype = DTYPES[str(note.get("dtype", "bf16"))]
    promised = {name: entry for file in source.promise(dtype).values() for name, entry in file.items()}
    packed = {name: packed_parts(name, checkpoint) for name in promised}
    there = checkpoint.entries.keys() - {part for parts in packed.values() for part in parts}
    wrong = dict.fromkeys(promised.keys() ^ there, math.inf)
    for name, (kind, shape) in promised.items():
        if name in wrong or packed[name]:
            continue
        found = checkpoint.read(name)
        if found.dtype != kind or found.shape != torch.Size(shape):
            wrong[name] = math.inf
        else:
            few = FEW if not original and source.chooses_codes(name) else 0.0
            wrong |= _off(name, found, source.tensor(name, kind, requantise=not original).cpu(), kind, few)
        trim_heap()
    return _counted(folder, promised, wrong)


def verify_gguf(source: Source, found: GgufFile, chat_template: str | None, ends: Sequence[int]) -> int:
    """The same of a GGUF file: each tensor against the merge in the type that it has, and what it says of itself.

    K types are counted and not compared.
    """
    import gguf

    if found.weights not in ("dequantized", "original"):
        raise RunError(f"'{found.file}' does not say which base it was merged into ({WEIGHTS}); export it again.")
    converted = Converted(source.model.config.get_text_config())
    entries, factors = entries_of(source, converted, "f32"), converted.factors()
    promised = {name: stored for stored, (name, _, _) in entries.items()} | dict.fromkeys(factors, "")
    wrong = dict.fromkeys(promised.keys() ^ found.tensors.keys(), math.inf)
    writer, _ = described(source, converted, entries, found.weights, chat_template, ends)
    for key, expected in writer.kv_data[0].items():
        if not _says(found.said.get(key), expected.value):
            wrong[key] = math.inf
    for name, stored in promised.items():
        if name in wrong:
            continue
        kind = found.tensors[name].tensor_type
        if stored:
            values = source.tensor(stored, source.exact(stored), requantise=found.weights == "dequantized")
            values = converted.values(source.names.get(stored, stored), values)
        else:
            values = factors[name]
        if found.shape(name) != tuple(values.shape):
            wrong[name] = math.inf
        elif kind.name.lower() in TYPES:
            values = torch.from_numpy(gguf.quants.dequantize(bytes_of(values, kind, name), kind)).reshape(values.shape)
            # a scale of each block is fp16; what is stored in fp32 need not be held closer
            step = torch.bfloat16 if kind.name == "BF16" else torch.float16
            again = found.weights == "dequantized" or kind.name.startswith("Q")
            few = FEW if stored and again and source.chooses_codes(stored) else 0.0
            wrong |= _off(name, found.tensor(name), values, step, few)
        del values
        trim_heap()
    return _counted(found.file, promised, wrong)


def verify_adapter(section: ModelSection, base: Checkpoint, adapter: Path, place: Path) -> int:
    """How many tensors of the adapter in ``place``, a folder or a GGUF file, are the run's own in one of its forms."""
    with TemporaryDirectory() as scratch:
        made = Path(scratch)
        if place.suffix == ".gguf":
            written = export_gguf_adapter(section, base, adapter, made / "gguf").file
            found = _of_gguf(place)
            forms = [_of_gguf(written)]
        else:
            try:
                found = _of_folder(place)
            except QloraError as error:
                raise DiffersError(str(error)) from error
            export_adapter(section, base, adapter, made / "whole")
            with suppress(MethodError):  # what is no plain LoRA has no keys of the text's class
                export_adapter(section, base, adapter, made / "text", keys="text")
            forms = [_of_folder(form) for form in (made / "whole", made / "text", adapter) if form.is_dir()]
        wrongs = []
        for said, tensors in forms:
            wrong = dict.fromkeys(tensors.keys() ^ found[1].keys(), math.inf)
            for name in tensors.keys() & found[1].keys():
                ours, theirs = tensors[name], found[1][name]
                wrong |= {name: math.inf} if ours.shape != theirs.shape else _off(name, theirs, ours, ours.dtype, 0.0)
            wrong |= {
                f"{CONFIG}'s {key}": math.inf
                for key in said.keys() | found[0].keys()
                if key not in ABOUT and not _says(found[0].get(key), said.get(key))
            }
            wrongs.append(wrong)
    return _counted(place, found[1], min(wrongs, key=len))


def _of_folder(folder: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    return read_config(folder), read_adapter_tensors(folder)


def _of_gguf(file: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    found = GgufFile(file)
    said = {
        key: value for key, value in found.said.items() if key.startswith(("adapter.", "general.a", "general.type"))
    }
    return said, {name: found.tensor(name) for name in found.tensors}


def _says(found: Any, expected: Any) -> bool:
    """Whether a file's value is what would be written, numbers within fp32."""
    if isinstance(expected, float):
        return isinstance(found, float) and math.isclose(found, expected, rel_tol=1e-6)
    if isinstance(expected, list | tuple) and isinstance(found, list):
        return len(found) == len(expected) and all(map(_says, found, expected))
    return bool(found == expected)


def _off(name: str, found: Tensor, expected: Tensor, kind: torch.dtype, few: float) -> dict[str, float]:
    """``{name: the share of its numbers that is off}``, in steps of ``kind``, where that is more than ``few``, or one is not finite."""
    if not found.numel():
        return {}
    step, least, off = torch.finfo(kind).eps if kind.is_floating_point else 0.0, 1e-3 * expected.abs().max().double(), 0
    for theirs, ours in zip(found.flatten().split(CHUNK), expected.flatten().split(CHUNK), strict=True):
        if not theirs.isfinite().all():
            return {name: math.inf}
        bound = STEPS * step * (ours.double().abs() + least)
        off += int(((theirs.double() - ours.double()).abs() > bound).sum())
    share = off / found.numel()
    return {name: share} if share > few else {}


def _counted(place: Path, promised: Mapping[str, Any], wrong: Mapping[str, float]) -> int:
    if wrong:
        worst = sorted(wrong, key=lambda name: (-wrong[name], name))
        every = len(promised.keys() | wrong.keys())
        raise DiffersError(
            f"'{place}' is not what this run exports: {listed(worst)} differ ({len(wrong)} of {every} tensors). Export it "
            "again; if it was copied, the copy is damaged."
        )
    return len(promised)
