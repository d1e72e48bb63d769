"""The trained model in 4 bits: a bitsandbytes checkpoint that from_pretrained opens, and this program as a base.

    for each decoder layer:  inputs of its linears, as trained and as made so far ─► codes ─► written ─► what the made layer gives

Rounding a merged model plainly gives the old codes back, and with them the model from before training. Here codes are
chosen for the inputs that the linears get (``rounding.py``), one layer after the other, so that each makes good what those
before it lost. One layer is dense at a time. Knows the trained model, its checkpoint and its rows; must not know runs.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from bitsandbytes.functional import QuantState
from safetensors.torch import save_file
from torch import Tensor, nn

from qlora.errors import ModelError, RunError
from qlora.export.merge import Merged, write_beside, write_plain
from qlora.export.rounding import Inputs, rounded
from qlora.export.source import Source
from qlora.files.durable import folder_written_aside
from qlora.machine.device import require_disk, resolve_compute_dtype, trim_heap
from qlora.methods import AdaptedModel
from qlora.methods.files import keep_apart
from qlora.methods.planted import modules_unplanted, unplanted
from qlora.model import anatomy
from qlora.model.checkpoint import INDEX, Checkpoint
from qlora.model.nf4 import FrozenLinear, dense_cached, dequantised, is_plain_linear, is_transposed
from qlora.model.walk import Walk, standing
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
    trained: AdaptedModel,
    checkpoint: Checkpoint,
    adapter_folder: str | Path,
    out: str | Path,
    batches: Sequence[Mapping[str, Tensor]],
    *,
    section: ModelSection,
    overwrite: bool = False,
    chat_template: str | None = None,
    ends: Sequence[int] = (),
) -> Merged:
    """Write the model that ``trained`` is into the new folder ``out``: linears of its layers in NF4, all else in bf16.

    ``trained`` is ``checkpoint`` with the adapter of ``adapter_folder``, as ``section`` says; ``batches`` are rows without
    padding (``input_ids``, ``position_ids``) of what it was trained on. Nothing is at ``out`` before everything is written.

    Raises ModelError for a mixture of experts, and where weights are fused or stored as [in, out], which bitsandbytes packs no
    more; MethodError for a method that cannot be merged; RunError when ``out`` is taken; DoesNotFitError when the disk is full.
    """
    out = Path(out)
    keep_apart(out, checkpoint.folder, Path(adapter_folder))
    if overwrite and out.is_dir() and any(out.iterdir()) and not (out / "config.json").is_file():
        raise RunError(f"'{out}' holds no model (no config.json), so it is not overwritten; choose another folder.")
    device, dtype = trained.device, torch.bfloat16
    source = Source(
        checkpoint, section, Path(adapter_folder), device, resolve_compute_dtype(device, section.compute_dtype)
    )
    if source.rearranged or any(map(is_transposed, source.model.modules())):
        raise ModelError(
            f"'{checkpoint.name}' has experts, fused weights or weights stored as [in, out], which bitsandbytes does not pack in "
            "transformers; export it merged, and quantise it where it is served."
        )
    entries = {name: entry for file in source.promise(dtype).values() for name, entry in file.items()}
    require_disk(out, sum(torch.Size(shape).numel() * 2 for _, shape in entries.values()), "The model")
    walk = Walk(trained.model, batches)
    paths = anatomy.path_of(trained.model, walk.layers)
    names = {target: name for name, target in source.names.items()}
    packed: list[str] = []
    with folder_written_aside(out, overwrite) as aside:
        shards = _Shards(aside)
        made, seen = list(walk.first), list(walk.first)
        for number, layer in enumerate(walk.layers):
            linears = linears_of(layer, bool(source.quantised))
            with dense_cached(layer):
                inputs, seen = _inputs(walk, number, linears, made, seen)
            instead: dict[str, nn.Module] = {}
            for path in linears:
                whole = f"{paths}.{number}.{path}"
                name = names[f"{whole}.weight"]
                codes, state = rounded(
                    source.tensor(name, torch.float32, requantise=True), inputs.pop(path), section.double_quant, dtype
                )
                shards.add(_tensors(name, codes, state))
                packed.append(whole)
                instead[path] = dense_linear(dequantised(codes, state), source.bias(whole), made[0].dtype)
                trim_heap()
            with standing(layer, instead):
                made = [walk.visit(number, batch, hidden) for batch, hidden in enumerate(made)]
        written = {names[f"{path}.weight"] for path in packed}
        for name, (kind, _) in entries.items():
            if name not in written:
                shards.add({name: source.tensor(name, kind, requantise=True)})
        total = shards.end()
        config = source.plain_config("bf16") | {
            "quantization_config": _quantisation(source, packed, section.double_quant)
        }
        new_ends = write_beside(aside, source, config, "nf4", "bf16", chat_template, ends)
    return Merged(out, len(entries), len(source.carrying), 0, total, dtype, new_ends=new_ends)


def dense_linear(weight: Tensor, bias: Tensor | None, dtype: torch.dtype) -> nn.Linear:
    """A plain linear that computes in ``dtype`` with these values."""
    linear = nn.Linear(weight.shape[1], weight.shape[0], bias=bias is not None, device="meta")
    linear.weight = nn.Parameter(weight.to(dtype), requires_grad=False)
    if bias is not None:
        linear.bias = nn.Parameter(bias.to(dtype), requires_grad=False)
    return linear


def _inputs(
    walk: Walk, number: int, linears: Mapping[str, nn.Module], made: list[Tensor], seen: list[Tensor]
) -> tuple[dict[str, Inputs], list[Tensor]]:
    """(what the linears of a layer get, by path; what the layer gives in the trained model). Linears with one input share it."""
    found: dict[str, Inputs] = {}
    after = []
    for batch, (ours, theirs) in enumerate(zip(made, seen, strict=True)):
        with _caught(linears) as trained:
            after.append(walk.visit(number, batch, theirs))
        with _caught(linears) as now:
            walk.visit(number, batch, ours)
        leaders: dict[int, str] = {}
        for path, x in now.items():
            leader = leaders.setdefault(id(x), path)
            if path not in found:
                found[path] = found[leader] if leader != path else Inputs.none_yet(x.shape[-1], x.device)
            if leader == path:
                found[path].add(x.reshape(-1, x.shape[-1]), trained[path].reshape(-1, x.shape[-1]))
    return found, after


@contextmanager
def _caught(linears: Mapping[str, nn.Module]) -> Iterator[dict[str, Tensor]]:
    """Inside, the inputs of the linears are put into what is yielded, by their paths."""
    found: dict[str, Tensor] = {}

    def catch(path: str) -> Any:
        return lambda module, args: found.__setitem__(path, args[0])

    hooks = [linear.register_forward_pre_hook(catch(path)) for path, linear in linears.items()]
    try:
        yield found
    finally:
        for hook in hooks:
            hook.remove()


class _Shards:
    """Safetensors files of about ``SHARD`` bytes, written as they fill, and their index."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.waiting, self.places, self.total = folder, dict[str, Tensor](), dict[str, str](), 0
        self.files = 0

    def add(self, tensors: Mapping[str, Tensor]) -> None:
        """Take these, and write what there is where it is enough for a file. Raises ModelError for a name that came before."""
        for name, values in tensors.items():
            if name in self.waiting or name in self.places:
                raise ModelError(f"Two layers share '{name}', so that it cannot be rounded for both; export it merged.")
            self.waiting[name] = values.detach().cpu().contiguous()
        if sum(values.nbytes for values in self.waiting.values()) >= SHARD:
            self._write(f"model-{self.files + 1:05}.safetensors")

    def _write(self, file: str) -> None:
        save_file(self.waiting, self.folder / file, metadata={"format": "pt"})
        self.files += 1
        self.places |= dict.fromkeys(self.waiting, file)
        self.total += sum(values.nbytes for values in self.waiting.values())
        self.waiting = {}

    def end(self) -> int:
        """Write the rest; the bytes of all tensors."""
        self._write(f"model-{self.files + 1:05}.safetensors" if self.files else "model.safetensors")
        if self.files > 1:
            write_plain(self.folder / INDEX, {"metadata": {"total_size": self.total}, "weight_map": self.places})
        return self.total


def _tensors(name: str, codes: Tensor, state: QuantState) -> dict[str, Tensor]:
    """A packed weight as bitsandbytes writes it, by the names in a checkpoint."""
    return {name: codes} | {f"{name}.{key}": values for key, values in state.as_dict(packed=True).items()}


def _quantisation(source: Source, packed: Sequence[str], double_quant: bool) -> dict[str, Any]:
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
