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

from qlora.errors import ModelError
from qlora.export.source import CARRYING, Source
from qlora.export.spelling import both_spellings, older_tokenizer
from qlora.export.writer import SafetensorsWriter
from qlora.files.durable import checksums, file_written_aside, folder_written_aside, keep_apart, sha256_of
from qlora.machine.device import DTYPES, trim_heap
from qlora.machine.disk import require_disk
from qlora.model.checkpoint import INDEX, MERGE, Checkpoint, read_json
from qlora.model.config import FOUR_BIT
from qlora.model.load import GENERATION, end_tokens
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
    ``out`` before everything is written; a merge that was killed goes on with the files that it had finished.

    Raises ModelError or MethodError for a base or an adapter that cannot be read or do not belong together, RunError
    when ``out`` is taken (``overwrite`` replaces it, if it is a model), DoesNotFitError when the disk is too small.
    """
    base_folder, adapter_folder, out = Path(base_folder), Path(adapter_folder), Path(out)
    keep_apart(out, base_folder, adapter_folder, replaces="config.json" if overwrite else None)
    checkpoint = checkpoint or Checkpoint(base_folder, str(base_folder), trust_remote_code=trust_remote_code)
    section = ModelSection(
        name=checkpoint.name,
        quantization=quantization,
        double_quant=double_quant,
        compute_dtype=compute_dtype,
        trust_remote_code=checkpoint.trust_remote_code,
    )
    source = Source(checkpoint, section, adapter_folder)
    if base == "original" and source.empty.scheme.prequantised:
        raise ModelError(
            f"'{base_folder}' is itself quantised and does not hold the original weights; merge into it as it is: for=serving (base=dequantized)."
        )
    promised = source.promise(DTYPES[dtype])
    total = sum(math.prod(shape) * kind.itemsize for shard in promised.values() for kind, shape in shard.values())
    require_disk(out, total + 64 * 1024**2, "The merged model")
    with folder_written_aside(out, overwrite, made_of(checkpoint, adapter_folder, section, base, dtype)) as aside:
        source.recall(aside)
        for file, entries in promised.items():
            if not (aside / file).exists():
                with file_written_aside(aside / file) as part:
                    with SafetensorsWriter(part, entries) as writer:
                        for name, (kind, _) in entries.items():
                            writer.write(name, source.tensor(name, kind, requantise=base == "dequantized"))
                            trim_heap()
                    source.remember(aside)
        (aside / CARRYING).unlink()
        if len(promised) > 1:
            weight_map = {name: file for file, entries in promised.items() for name in entries}
            write_plain(aside / INDEX, {"metadata": {"total_size": total}, "weight_map": weight_map})
        new_ends = write_beside(aside, source, source.plain_config(dtype), base, dtype, chat_template, ends)
    changed = source.quantised if base == "dequantized" else set()
    return Merged(
        folder=out,
        tensors=sum(len(entries) for entries in promised.values()),
        adapted=len(source.carrying),
        dequantised=len(changed - source.carrying),
        bytes=total,
        dtype=DTYPES[dtype],
        for_serving=bool(changed) and quantization in FOUR_BIT,
        new_ends=new_ends,
    )


def made_of(checkpoint: Checkpoint, adapter: Path, *settings: object) -> str:
    """All that decides the weights of an export."""
    shards = [(str(file), (at := file.stat()).st_size, at.st_mtime_ns) for file in checkpoint.shards]
    return repr((shards, checksums(adapter), settings))


def write_beside(
    folder: Path,
    source: Source,
    config: dict[str, Any],
    weights: str,
    dtype: str,
    chat_template: str | None,
    ends: Sequence[int],
) -> tuple[str, ...]:
    """Write into ``folder`` whatever a model needs beside its weights, and that it was made of these ``weights`` in ``dtype``.

    Returns the tokens that end an answer and did not by the base's own files.
    """
    checkpoint = source.checkpoint
    write_plain(folder / "config.json", both_spellings(config, type(source.model).__name__))
    _copy_beside(checkpoint.folder, folder)
    new_ends = set(ends) - set(end_tokens(checkpoint))
    if new_ends:
        write_plain(folder / GENERATION, _generation(folder, checkpoint, new_ends))
    for method in source.adapted.methods:
        method.merge.finish(folder)
    own = checkpoint.tokenizer.chat_template if chat_template is not None else None
    # of a tokenizer with several templates the run's may be one: a file of it would hide the others, as tool_use
    if chat_template is not None and not (isinstance(own, dict) and chat_template in own.values()):
        (folder / TEMPLATE).write_text(chat_template, encoding="utf-8")
    older_tokenizer(folder)
    section = source.empty.section
    made: dict[str, Any] = {
        "base": checkpoint.name,
        "revision": checkpoint.revision,
        "weights": weights,
        "quantization": section.quantization,
        "double_quant": section.double_quant,
        "dtype": dtype,
    }
    files = {str(file.relative_to(folder)): sha256_of(file) for file in sorted(folder.rglob("*")) if _answers(file)}
    write_plain(folder / MERGE, made | {"files": files})
    return tuple(checkpoint.tokenizer.convert_ids_to_tokens(sorted(new_ends)))


def _answers(file: Path) -> bool:
    """Whether a file decides what a merged model answers, and is none of its weights, which are compared by themselves."""
    return (
        file.is_file()
        and file.suffix in (".json", ".jinja", ".model", ".txt", ".py")
        and file.name not in (INDEX, MERGE)
    )


def changed_since(folder: Path) -> list[str]:
    """The files beside a merged model's weights that are not what was written there; none where an older release wrote it."""
    written = read_json(folder, MERGE, "how a model was merged").get("files", {})
    return [
        name for name, digest in written.items() if not (folder / name).is_file() or sha256_of(folder / name) != digest
    ]


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


def write_plain(path: Path, values: dict[str, Any]) -> None:
    """Write a configuration as JSON, infinities as Python has them, which transformers 4 reads and writes so."""
    path.write_text(json.dumps(values, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
