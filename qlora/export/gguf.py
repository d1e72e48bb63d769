"""A merged model, or an adapter, as one GGUF file, which llama.cpp and Ollama open.

    for each tensor:  merged in fp32 → llama.cpp's order → quantised → write

The tensors come from where a merge takes them, one in memory at a time, and go to the file without a 16-bit copy between.
Knows checkpoints, adapters and the gguf library; how a model or a tokenizer looks there is in gguf_models and gguf_tokenizer.
Must not know runs, recipes or a loaded model.
"""

from __future__ import annotations

import math
import shutil
import subprocess
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from qlora.errors import MethodError, ModelError, RunError
from qlora.export.adapter import export_adapter
from qlora.export.gguf_models import Converted
from qlora.export.gguf_tokenizer import add_tokenizer
from qlora.export.gguf_types import BY_QUANTISER, TYPES
from qlora.export.merged import made_of
from qlora.export.modelfile import write_adapter_modelfile, write_modelfile
from qlora.export.rounding import dithered
from qlora.export.source import CPU, Source
from qlora.files.durable import folder_written_aside, keep_apart, sync, write_text
from qlora.machine.device import resolve_compute_dtype, trim_heap
from qlora.machine.disk import require_disk
from qlora.methods.files import read_adapter_tensors, read_config
from qlora.methods.layout import PREFIX
from qlora.model.checkpoint import Checkpoint, read_json
from qlora.model.load import GENERATION, end_tokens
from qlora.model.skeleton import bare
from qlora.recipe import ModelSection

QUANTISER = "llama-quantize"
WEIGHTS = "qlora.weights"  # the key that says which base it was merged into, as qlora_merge.json does of safetensors
CHUNK = 2**23  # numbers that are in fp32 at once
TOLD = "written"  # beside a file that grows: how many of its tensors are on the disk
TOLD_EVERY = 2**26  # bytes written between two such words
# small and decisive, or read as fp32 by llama.cpp's kernels, like all vectors
ALWAYS_F32 = ("ssm_conv1d.weight", "_norm.weight")


@dataclass(frozen=True)
class Written:
    """A GGUF file: where, how large, of how many tensors, and how it was made."""

    file: Path
    tensors: int
    bytes: int
    type: str
    command: str | None = None
    """What makes the type that was asked for out of this file, where llama.cpp's quantiser was not found."""


def export_gguf(
    base_folder: str | Path,
    adapter_folder: str | Path,
    out: str | Path,
    *,
    section: ModelSection,
    type: str = "q8_0",
    base: Literal["dequantized", "original"] = "dequantized",
    overwrite: bool = False,
    chat_template: str | None = None,
    ends: Sequence[int] = (),
    checkpoint: Checkpoint | None = None,
) -> Written:
    """Write base + adapter into the new folder ``out`` as ``model-TYPE.gguf``, with a Modelfile for Ollama beside it.

    ``section`` says what the adapter was trained on, ``base`` is as in ``merge``. ``type`` is one of ``TYPES``, or of
    ``BY_QUANTISER``, for which llama.cpp's ``llama-quantize`` is called on a bf16 file where it is found; elsewhere that
    file is what is written. Matrices whose rows are no whole blocks stay f16, vectors and norms f32; in q4_0 embedding
    and head are q8_0. Nothing is at ``out`` before everything is written; an export that was killed goes on behind the tensors
    that it had written.

    Raises ModelError for an architecture or a tokenizer that llama.cpp does not have, MethodError for a method that
    cannot be merged, RunError when ``out`` is taken, DoesNotFitError when the disk is too small.
    """
    import gguf

    base_folder, adapter_folder, out = Path(base_folder), Path(adapter_folder), Path(out)
    keep_apart(out, base_folder, adapter_folder, replaces="*.gguf" if overwrite else None)
    checkpoint = checkpoint or Checkpoint(base_folder, str(base_folder), trust_remote_code=section.trust_remote_code)
    source = Source(checkpoint, section, adapter_folder)
    if base == "original" and source.empty.scheme.prequantised:
        raise ModelError(
            f"'{base_folder}' is itself quantised and does not hold the original weights; merge into it as it is: for=serving (base=dequantized)."
        )
    converted = Converted(source.model.config.get_text_config())
    later, type = (type, "bf16") if type in BY_QUANTISER else (None, type)
    entries = entries_of(source, converted, type)
    factors = converted.factors()
    total = sum(
        gguf.quant_shape_to_byte_shape(shape, kind)[-1] * math.prod(shape[:-1]) for _, shape, kind in entries.values()
    )
    require_disk(out, total * (2 if later else 1) + 64 * 1024**2, "The GGUF file")
    writer, stops = described(source, converted, entries, base, chat_template, ends)
    made = made_of(checkpoint, adapter_folder, section, base, type, stops, template_of(checkpoint, chat_template))
    with folder_written_aside(out, overwrite, made) as aside:
        file = aside / f"model-{type}.gguf"
        writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
        writer.add_file_type(gguf.LlamaFileType[TYPES[type]])
        for name in factors:
            _promise(writer, name, tuple(factors[name].shape), gguf.GGMLQuantizationType.F32)
        for name, shape, kind in entries.values():
            _promise(writer, name, shape, kind)
        there = _begin(writer, file)
        for values in list(factors.values())[there:]:
            writer.write_tensor_data(values.numpy())
        since = 0
        for number, (stored, (_, _, kind)) in enumerate(entries.items(), len(factors)):
            if number < there:
                continue
            target = source.names.get(stored, stored)
            merged = source.tensor(stored, source.exact(stored), requantise=base == "dequantized")
            values = bytes_of(converted.values(target, merged), kind, stored)
            writer.write_tensor_data(values)
            since += values.nbytes
            if since >= TOLD_EVERY:
                writer.fout[0].flush()
                sync(file)
                write_text(aside / TOLD, str(number + 1))
                since = 0
            del merged, values
            trim_heap()
        writer.close()
        (aside / TOLD).unlink(missing_ok=True)
        command = None
        if later is not None:
            file, type, command = _by_quantiser(file, later, out)
        kept = checkpoint.folder / GENERATION
        write_modelfile(
            aside,
            file.name,
            checkpoint.tokenizer.convert_ids_to_tokens(stops),
            checkpoint.tokenizer,
            template_of(checkpoint, chat_template),
            read_json(kept.parent, kept.name, "a generation configuration") if kept.is_file() else {},
        )
        size = file.stat().st_size
    return Written(out / file.name, len(entries) + len(factors), size, type, command)


def described(
    source: Source,
    converted: Converted,
    entries: Mapping[str, tuple[str, tuple[int, ...], Any]],
    base: str,
    chat_template: str | None,
    ends: Sequence[int],
) -> tuple[Any, list[int]]:
    """A gguf.GGUFWriter that knows all that the file says but its tensors and their types; the tokens that end an answer."""
    import gguf

    checkpoint = source.checkpoint
    stops = sorted({*ends, *end_tokens(checkpoint)})
    writer = gguf.GGUFWriter(None, converted.family.arch)
    writer.add_name(Path(checkpoint.name).name)
    writer.add_string(WEIGHTS, base)
    rows = next(shape[0] for name, shape, _ in entries.values() if name == "token_embd.weight")
    converted.describe(writer, rows)
    add_tokenizer(writer, checkpoint.tokenizer, rows, stops, template_of(checkpoint, chat_template))
    return writer, stops


def entries_of(source: Source, converted: Converted, type: str) -> dict[str, tuple[str, tuple[int, ...], Any]]:
    """For each tensor of the merge its GGUF name, shape and type, in order."""
    entries = {}
    for promised in source.promise(torch.float32).values():
        for stored, (_, shape) in promised.items():
            target = source.names.get(stored, stored)
            name = converted.name(target)
            if name is None:
                raise ModelError(
                    f"llama.cpp's '{converted.family.arch}' has no place for '{target}', so there is no GGUF of it."
                )
            if name == "output.weight" and not converted.family.own_head:
                raise MethodError(
                    f"llama.cpp's '{converted.family.arch}' reads the embedding as its head, but this model's head was "
                    "trained apart from it; export it merged instead."
                )
            shape = converted.shape(target, shape)
            entries[stored] = (name, shape, _type(name, shape, type))
    return entries


def _type(name: str, shape: tuple[int, ...], type: str) -> Any:
    """The type in which one tensor is stored in a file of ``type``."""
    from gguf import GGML_QUANT_SIZES, GGMLQuantizationType

    if len(shape) == 1 or name.endswith(ALWAYS_F32) or not name.endswith(".weight"):
        return GGMLQuantizationType.F32
    if type == "q4_0" and name in ("token_embd.weight", "output.weight"):
        type = "q8_0"
    kind = GGMLQuantizationType[type.upper()]
    return kind if shape[-1] % GGML_QUANT_SIZES[kind][0] == 0 else GGMLQuantizationType.F16


def _promise(writer: Any, name: str, shape: tuple[int, ...], kind: Any) -> None:
    import gguf
    import numpy

    stored = gguf.quant_shape_to_byte_shape(shape, kind)
    writer.add_tensor_info(name, stored, numpy.dtype(numpy.uint8), stored[-1] * math.prod(shape[:-1]), raw_dtype=kind)


def _write_head(writer: Any, file: Path) -> None:
    writer.write_header_to_file(file)
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()


def _begin(writer: Any, file: Path) -> int:
    """Write the head of ``file``, or go on behind the tensors that a killed process told were there; how many these are."""
    _write_head(writer, file.with_suffix(".head"))
    writer.fout[0].close()
    head = file.with_suffix(".head").read_bytes()
    file.with_suffix(".head").unlink()
    told = file.with_name(TOLD)
    there = int(told.read_text(encoding="utf-8")) if told.exists() else 0
    grown = file.open("r+b" if there else "w+b")
    if grown.read(len(head)) != head:
        there = 0
        grown.seek(0)
        grown.write(head)
    writer.fout = [grown]
    waiting = writer.tensors[0]  # each is taken out as it is written
    if there:
        bytes_each = [
            writer.ggml_pad(waiting.pop(name).nbytes, writer.data_alignment) for name in list(waiting)[:there]
        ]
        grown.seek(writer.ggml_pad(len(head), writer.data_alignment) + sum(bytes_each))
    grown.truncate()
    return there


def bytes_of(values: Tensor, kind: Any, name: str) -> Any:
    """A tensor as the bytes of a GGUF type, a few rows in fp32 at a time. Raises MethodError for values that fp16 does not have."""
    import gguf
    import numpy

    types = gguf.GGMLQuantizationType
    half = {types.F16: torch.float16, types.BF16: torch.bfloat16}.get(kind)
    rows = max(1, CHUNK // values[0].numel()) if values.ndim > 1 else len(values)
    made = None
    for start in range(0, len(values), rows):
        part = values[start : start + rows].float().cpu().contiguous()
        if kind == types.F16 and part.abs().max() > torch.finfo(torch.float16).max:
            raise MethodError(f"'{name}' has values beyond 65504, the largest of fp16; export it with type=bf16.")
        if half is not None:
            part = dithered(part, half).float()
        found = gguf.quants.quantize(part.numpy(), kind)
        if made is None:
            made = numpy.empty((len(values), *found.shape[1:]), found.dtype) if len(part) < len(values) else found
        made[start : start + rows] = found
    return made


def stands_for(values: Tensor, type: str) -> Tensor:
    """What a layer's matrix [out, in] in fp32 is in a file of ``type``, one of ``TYPES``, as the gguf library reads it."""
    import gguf

    kind = _type("blk.0.weight", tuple(values.shape), type)
    return torch.from_numpy(gguf.quants.dequantize(bytes_of(values, kind, "a weight"), kind)).to(values.device)


def _by_quantiser(file: Path, type: str, out: Path) -> tuple[Path, str, str | None]:
    """``file`` in one of llama.cpp's K types; or as it is, with the command that makes it one."""
    made = file.with_name(f"model-{type}.gguf")
    program = shutil.which(QUANTISER)
    if program is None:
        return file, "bf16", f"{QUANTISER} {out / file.name} {out / made.name} {type.upper()}"
    done = subprocess.run(
        [program, str(file), str(made), type.upper()], capture_output=True, text=True, errors="replace"
    )
    if done.returncode != 0 or not made.is_file():
        lines = done.stderr.strip().splitlines() or ["it gave no reason"]
        raise RunError(f"{program} did not quantise '{file}' to {type} (status {done.returncode}: {lines[-1]}).")
    file.unlink()
    return made, type, None


def template_of(checkpoint: Checkpoint, given: str | None) -> str | None:
    """The chat template that was ``given``, or the tokenizer's own."""
    own = checkpoint.tokenizer.chat_template
    return given if given is not None else own.get("default") if isinstance(own, dict) else own


def export_gguf_adapter(
    section: ModelSection,
    base: Checkpoint,
    adapter_folder: str | Path,
    out: str | Path,
    overwrite: bool = False,
) -> Written:
    """Write the adapter alone into the new folder ``out`` as ``adapter.gguf``, in fp32, for llama.cpp's ``--lora``.

    Raises MethodError for what llama.cpp does not take: anything but LoRA, and LoRA on an embedding or a tied head.
    """
    import gguf

    out = Path(out)
    keep_apart(out, base.folder, Path(adapter_folder), replaces="*.gguf" if overwrite else None)
    model = bare(base, section, resolve_compute_dtype(CPU, section.compute_dtype)).model
    converted = Converted(model.config.get_text_config())
    with tempfile.TemporaryDirectory() as scratch:
        plain = Path(scratch) / "plain"
        if why := export_adapter(section, base, adapter_folder, plain):
            raise MethodError(f"llama.cpp takes plain LoRA alone: {why.rstrip('.')}.")
        pairs, alpha = read_adapter_tensors(plain), read_config(plain)["lora_alpha"]
    tied = bool(getattr(model.config.get_text_config(), "tie_word_embeddings", False))
    tensors: dict[str, Tensor] = {}
    for key, values in pairs.items():
        target, _, part = key.removeprefix(PREFIX).partition(".lora_")
        name = converted.name(f"{target}.weight") if part in ("A.weight", "B.weight") else None
        if name is None or (name == "output.weight" and (tied or not converted.family.own_head)):
            raise MethodError(f"llama.cpp takes no LoRA on '{target}' of this model; export it merged, or as gguf.")
        ordered = converted.order(f"{target}.weight", partial(_size, pairs, target))
        if ordered is not None and (ordered[0] == 0) == (part == "B.weight"):
            values = values.index_select(ordered[0], ordered[1])
        tensors[f"{name}.lora_{part[0].lower()}"] = values.float().contiguous()
    require_disk(out, sum(values.nbytes for values in tensors.values()) + 1024**2, "The GGUF file")
    with folder_written_aside(out, overwrite) as aside:
        writer = gguf.GGUFWriter(None, converted.family.arch)
        writer.add_type(gguf.GGUFType.ADAPTER)
        writer.add_string(gguf.Keys.Adapter.TYPE, "lora")
        writer.add_float32(gguf.Keys.Adapter.LORA_ALPHA, float(alpha))
        for name, values in tensors.items():
            _promise(writer, name, tuple(values.shape), gguf.GGMLQuantizationType.F32)
        _write_head(writer, aside / "adapter.gguf")
        for values in tensors.values():
            writer.write_tensor_data(values.numpy())
        writer.close()
        write_adapter_modelfile(aside, "adapter.gguf", base.name)
        size = (aside / "adapter.gguf").stat().st_size
    return Written(out / "adapter.gguf", len(tensors), size, "f32")


def _size(pairs: dict[str, Tensor], target: str, dim: int) -> int:
    part = "B" if dim == 0 else "A"
    return pairs[f"{PREFIX}{target}.lora_{part}.weight"].shape[dim]
