"""A merged model in 4 bits: a bitsandbytes checkpoint that from_pretrained opens, and this program as a base.

    for each linear of a layer:  the checkpoint's own weight + what was learned ─► NF4 ─► written      all else: in bf16

Of the weights that the adapter was trained beside, which lie on the grid already, the old codes would come back, and with
them the model from before training. The checkpoint's own lie anywhere between two codes, so that a small update moves some
of them over, in proportion to it. One tensor is dense at a time. Knows checkpoints and adapters; must not know runs.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from qlora.errors import ModelError
from qlora.export.merged import Merged, made_of, write_beside, write_plain
from qlora.export.source import CARRYING, Source
from qlora.files.durable import file_written_aside, folder_written_aside, keep_apart
from qlora.machine.device import trim_heap
from qlora.machine.disk import require_disk
from qlora.methods.planted import modules_unplanted, unplanted
from qlora.model import anatomy
from qlora.model.checkpoint import INDEX, Checkpoint
from qlora.model.nf4 import FrozenLinear, is_plain_linear, is_transposed, quantised
from qlora.model.tensor_file import read_header
from qlora.recipe import ModelSection

SHARD = 1024**3  # bytes after which another file begins


def linears_of(layer: nn.Module, quantised: bool) -> dict[str, nn.Module]:
    """The linears of a decoder layer that are in few bits, by their paths in it; all plain ones where the base has none."""
    return {
        path: module
        for path, module in modules_unplanted(layer)
        if (isinstance(unplanted(module), FrozenLinear) if quantised else is_plain_linear(unplanted(module)))
    }


def export_nf4(
    checkpoint: Checkpoint,
    adapter_folder: str | Path,
    out: str | Path,
    *,
    section: ModelSection,
    overwrite: bool = False,
    chat_template: str | None = None,
    ends: Sequence[int] = (),
) -> Merged:
    """Write ``checkpoint`` and the adapter into the new folder ``out``: linears of its layers in NF4, all else in bf16.

    ``section`` says what the adapter was trained on. Nothing is at ``out`` before everything is written.

    Raises ModelError for a base that is itself quantised, for a mixture of experts, and where weights are fused or stored as
    [in, out], which bitsandbytes packs no more; MethodError for a method that cannot be merged; RunError when ``out`` is
    taken; DoesNotFitError when the disk is too small.
    """
    out = Path(out)
    keep_apart(out, checkpoint.folder, Path(adapter_folder), replaces="config.json" if overwrite else None)
    source, dtype = Source(checkpoint, section, Path(adapter_folder)), torch.bfloat16
    if source.empty.scheme.prequantised:
        raise ModelError(
            f"'{checkpoint.name}' is itself quantised and does not hold the original weights, and on its own codes most of what was "
            "learned would be rounded away; export it merged."
        )
    if source.rearranged or any(map(is_transposed, source.model.modules())):
        raise ModelError(
            f"'{checkpoint.name}' has experts, fused weights or weights stored as [in, out], which bitsandbytes does not pack in "
            "transformers; export it merged, and quantise it where it is served."
        )
    entries = {name: entry for file in source.promise(dtype).values() for name, entry in file.items()}
    require_disk(out, sum(torch.Size(shape).numel() * 2 for _, shape in entries.values()), "The model")
    layers = anatomy.layers(source.model)
    paths = anatomy.path_of(source.model, layers)
    packed = {
        f"{paths}.{number}.{path}"
        for number, layer in enumerate(layers)
        for path in linears_of(layer, bool(source.quantised))
    }
    made = made_of(checkpoint, Path(adapter_folder), section, "nf4")
    with folder_written_aside(out, overwrite, made) as aside:
        shards = _Shards(aside, source)
        for name, (kind, _) in entries.items():
            if name in shards.places:
                continue
            values = source.tensor(name, kind, requantise=False)
            if source.names.get(name, "").removesuffix(".weight") in packed:
                codes, state = quantised(values.contiguous(), "nf4", section.double_quant)
                parts = state.as_dict(packed=True).items()  # as bitsandbytes writes them
                shards.add({name: codes} | {f"{name}.{key}": part for key, part in parts})
            else:
                shards.add({name: values})
            trim_heap()
        total = shards.end()
        config = source.plain_config("bf16") | {
            "quantization_config": _quantisation(source, packed, section.double_quant)
        }
        new_ends = write_beside(aside, source, config, "nf4", "bf16", chat_template, ends)
    return Merged(out, len(entries), len(source.carrying), 0, total, dtype, new_ends=new_ends)


class _Shards:
    """Safetensors files of about ``SHARD`` bytes, written as they fill, and their index; with those that a killed export left."""

    def __init__(self, folder: Path, source: Source) -> None:
        self.folder, self.source = folder, source
        self.waiting, self.places, self.total, self.files = dict[str, Tensor](), dict[str, str](), 0, 0
        source.recall(folder)
        for file in sorted(folder.glob("model-*.safetensors")):
            entries = read_header(file).entries
            self._count(file.name, {name: entry.bytes for name, entry in entries.items()})

    def add(self, tensors: Mapping[str, Tensor]) -> None:
        """Take these, and write what there is where it is enough for a file."""
        self.waiting |= {name: values.detach().cpu().contiguous() for name, values in tensors.items()}
        if sum(values.nbytes for values in self.waiting.values()) >= SHARD:
            self._write(f"model-{self.files + 1:05}.safetensors")

    def _write(self, file: str) -> None:
        self.source.remember(self.folder)
        with file_written_aside(self.folder / file) as aside:
            save_file(self.waiting, aside, metadata={"format": "pt"})
        self._count(file, {name: values.nbytes for name, values in self.waiting.items()})
        self.waiting = {}

    def _count(self, file: str, sizes: Mapping[str, int]) -> None:
        self.files += 1
        self.places |= dict.fromkeys(sizes, file)
        self.total += sum(sizes.values())

    def end(self) -> int:
        """Write the rest; the bytes of all tensors."""
        self._write(f"model-{self.files + 1:05}.safetensors" if self.files else "model.safetensors")
        if self.files > 1:
            write_plain(
                self.folder / INDEX,
                {"metadata": {"total_size": self.total}, "weight_map": dict(sorted(self.places.items()))},
            )
        (self.folder / CARRYING).unlink()
        return self.total


def _quantisation(source: Source, packed: Collection[str], double_quant: bool) -> dict[str, Any]:
    """config.json's ``quantization_config``; every linear that is not packed is named, as transformers would pack it."""
    plain = [
        path
        for path, module in modules_unplanted(source.model)
        if isinstance(unplanted(module), nn.Linear | FrozenLinear) and path not in packed
    ]
    return {
        "quant_method": "bitsandbytes", "load_in_4bit": True, "_load_in_4bit": True, "load_in_8bit": False, "_load_in_8bit": False,
        "bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": double_quant, "bnb_4bit_compute_dtype": "bfloat16",
        "bnb_4bit_quant_storage": "uint8", "llm_int8_threshold": 6.0, "llm_int8_skip_modules": [*plain, *source.empty.towers],
        "llm_int8_enable_fp32_cpu_offload": False, "llm_int8_has_fp16_weight": False,
    }  # fmt: skip
