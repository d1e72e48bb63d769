"""Export: a run's adapter merged into its base, or alone, and how far what was exported is from what was trained.

run folder ─► adapter + base ─► merged (plain safetensors)  ─► compared with the trained model on held-out text
                            ├─► the adapter as plain LoRA
                            └─► either as a GGUF file
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor, nn

from qlora.errors import RunError, listed
from qlora.export import Merged, Written, export_gguf_adapter
from qlora.export import export_adapter as write_adapter
from qlora.export import export_gguf as write_gguf
from qlora.export import merge as merge_files
from qlora.export.programs import Verdict, programs
from qlora.files.durable import expanded
from qlora.machine.device import bytes_text, dtype_name, resolve_compute_dtype, total_memory_bytes
from qlora.model import anatomy
from qlora.model.checkpoint import open_checkpoint
from qlora.model.config import is_wrapper
from qlora.model.load import end_tokens as known_ends
from qlora.model.nf4 import FrozenLinear
from qlora.planning.rows import load_recipe_data
from qlora.reporting.card import write_card
from qlora.runs.evaluate import load_run
from qlora.runs.folder import (
    check_data,
    device_here,
    end_tokens,
    full_disk_said,
    open_base,
    open_run,
    read_adapter,
    shown,
    template_of,
)


@dataclass(frozen=True)
class Difference:
    """How far the merged model's logits are from the adapter model's, on held-out text."""

    prompts: int
    largest: float
    """Largest absolute difference of a logit."""
    largest_logit: float
    divergence: float
    """Mean Kullback-Leibler divergence, in nats per token."""
    same_choice: float
    """Share of positions at which both choose the same token."""


def merge(
    folder: str | Path,
    out: str | Path | None = None,
    *,
    base: Literal["dequantized", "original"] = "dequantized",
    dtype: Literal["bf16", "fp16", "fp32"] = "bf16",
    overwrite: bool = False,
) -> Merged:
    """Merge a run's adapter into its base: plain safetensors in ``out`` (``RUN/merged`` when left out).

    One tensor in memory at a time. ``base="dequantized"`` merges into the weights that the adapter was trained beside,
    ``"original"`` into the checkpoint's own.
    """
    folder = Path(folder)
    recipe, environment = open_run(folder)
    section = recipe.model
    source = open_base(recipe, environment, folder)
    template, ends = template_of(recipe, folder, source), end_tokens(recipe, folder, source)
    place = expanded(out) if out is not None else folder / "merged"
    with full_disk_said(place, "export it again"):
        return read_adapter(
            folder,
            lambda adapter: merge_files(
                source.folder,
                adapter,
                place,
                quantization=section.quantization,
                double_quant=section.double_quant,
                compute_dtype=section.compute_dtype,
                base=base,
                dtype=dtype,
                overwrite=overwrite,
                trust_remote_code=section.trust_remote_code,
                chat_template=template,
                ends=ends,
                checkpoint=source,
            ),
        )


def export_adapter(
    folder: str | Path, out: str | Path, *, overwrite: bool = False, keys: Literal["whole", "text"] = "whole"
) -> str | None:
    """Write a run's adapter, or its newest checkpoint's, into ``out`` as plain LoRA, which every server loads.

    ``keys``: of a multimodal base, for the ``whole`` class or for that of its ``text`` model alone.

    Returns None, or why the method is no plain LoRA; its own form is written then.
    """
    folder, out = Path(folder), expanded(out)
    recipe, environment = open_run(folder)
    base = open_base(recipe, environment, folder)
    template = template_of(recipe, folder, base)
    with full_disk_said(out, "export it again"):
        return read_adapter(
            folder,
            lambda adapter: write_adapter(
                recipe.model, base, adapter, out, overwrite, chat_template=template, keys=keys
            ),
        )


def export_gguf(
    folder: str | Path,
    out: str | Path | None = None,
    *,
    type: str = "q8_0",
    base: Literal["dequantized", "original"] = "dequantized",
    adapter: bool = False,
    overwrite: bool = False,
) -> Written:
    """Write a run's merged model, or with ``adapter`` its adapter alone, as GGUF into ``out``.

    ``out`` is ``RUN/gguf-TYPE`` or ``RUN/gguf-adapter`` when left out. ``type`` and ``base`` are the merged model's.
    """
    folder = Path(folder)
    recipe, environment = open_run(folder)
    source = open_base(recipe, environment, folder)
    place = expanded(out) if out is not None else folder / ("gguf-adapter" if adapter else f"gguf-{type}")
    with full_disk_said(place, "export it again"):
        if adapter:
            return read_adapter(
                folder, lambda found: export_gguf_adapter(recipe.model, source, found, place, overwrite)
            )
        template, ends = template_of(recipe, folder, source), end_tokens(recipe, folder, source)
        return read_adapter(
            folder,
            lambda found: write_gguf(
                source.folder,
                found,
                place,
                section=recipe.model,
                type=type,
                base=base,
                overwrite=overwrite,
                chat_template=template,
                ends=ends,
                checkpoint=source,
            ),
        )


def loaded_by(folder: str | Path, adapter: str | Path) -> list[Verdict]:
    """Which programs load the exported ``adapter`` of a run, and how."""
    base = open_checkpoint(open_run(Path(folder))[0].model, weights=False)
    return programs(expanded(adapter), bool(anatomy.text_config(base.model_config()).tie_word_embeddings))


EXPORTS = ("merged", "nf4", "portable", "gguf-*")
"""The folders in a run's that exports go into."""


def to_publish(folder: str | Path, source: str | None) -> Path:
    """The folder to publish of a run: ``source``, in the run or anywhere, or the one that was exported."""
    folder = Path(folder)
    if source is not None:
        return folder / source if (folder / source).is_dir() else expanded(source)
    found = sorted(path for name in EXPORTS for path in folder.glob(name) if path.is_dir())
    if len(found) == 1:
        return found[0]
    there = (
        f"Of '{folder}' {listed([path.name for path in found])} were exported"
        if found
        else f"Nothing of '{folder}' was exported yet"
    )
    advice = (
        f"say which of them: from={found[0].name}"
        if found
        else f"do that first, as in: qlora export {shown(folder)} merged"
    )
    raise RunError(f"{there}; {advice}")


def write_card_of(folder: str | Path, out: str | Path, form: str, told: Sequence[str] = ()) -> Path:
    """Write the model card of what a run exported as ``form`` into ``out``."""
    base = open_checkpoint(open_run(Path(folder))[0].model, weights=False)
    return write_card(Path(folder), expanded(out), form, base_folder=base.folder, told=told)


def foreign_ends(folder: str | Path) -> list[str]:
    """The tokens that end a run's answers and are no ends by the base's own files, which is what generates with an adapter."""
    folder = Path(folder)
    recipe, environment = open_run(folder)
    base = open_base(recipe, environment, folder)
    new = [end for end in end_tokens(recipe, folder, base) if end not in known_ends(base)]
    return list(base.tokenizer.convert_ids_to_tokens(new))


def compare_merged(folder: str | Path, merged: Merged, count: int = 20) -> Difference:
    """Logits of the merged model in plain transformers against the adapter model's, on ``count`` held-out prompts.

    Raises RunError, with the reason, where that cannot be measured here.
    """
    folder = Path(folder)
    recipe, environment = open_run(folder)
    data = load_recipe_data(recipe, open_checkpoint(recipe.model, weights=False))
    check_data(data, environment, folder)
    prompts = [prompt.ids for prompt in data.held_out_prompts(count)]
    if not prompts:
        raise RunError("the run has no held-out text.")
    device = device_here(recipe)
    trained = load_run(folder, quiet=True)
    widened = device.type == "cpu" and trained.base.placement is None
    dtype = torch.float32 if widened else resolve_compute_dtype(device, recipe.model.compute_dtype)
    free, _ = total_memory_bytes(device)
    if free and merged.bytes / merged.dtype.itemsize * dtype.itemsize > free / 2:
        raise RunError(f"in {dtype_name(dtype)} it would take more than half of the {bytes_text(free)} that are free.")
    if widened:
        _widen(trained.model)
    expected = _logits(trained.model, prompts, device)
    del trained
    found = _logits(_plain(merged.folder, dtype, recipe.model.trust_remote_code).to(device).eval(), prompts, device)
    return _difference(found, expected)


def _widen(model: nn.Module) -> None:
    """Have ``model`` compute in fp32 with the weights that it has: two ways to round 16 bits would be told as a difference."""
    for module in model.float().modules():
        if isinstance(module, FrozenLinear):
            module.kept = {torch.float32: module.dequantise(module.compute_dtype).float()}
            module.compute_dtype = torch.float32


def _plain(folder: Path, dtype: torch.dtype, trust_remote_code: bool) -> nn.Module:
    """The merged model as anyone would load it."""
    from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForMultimodalLM
    from transformers.utils import logging

    logging.disable_progress_bar()
    try:
        config = AutoConfig.from_pretrained(folder, trust_remote_code=trust_remote_code)
        maker = AutoModelForMultimodalLM if is_wrapper(config) else AutoModelForCausalLM
        model: nn.Module = maker.from_pretrained(folder, dtype=dtype, trust_remote_code=trust_remote_code)
    except Exception as error:
        raise RunError(f"transformers does not load '{folder}': {error}") from error
    return model


@torch.no_grad()
def _logits(network: nn.Module, prompts: list[list[int]], device: torch.device) -> list[Tensor]:
    """Of each prompt [T], its logits [T, V] in fp32 on the CPU."""
    batches = [torch.tensor([ids], device=device) for ids in prompts]
    return [network(ids, use_cache=False).logits[0].float().cpu() for ids in batches]


def _difference(found: list[Tensor], expected: list[Tensor]) -> Difference:
    largest = scale = divergence = 0.0
    same = positions = 0
    for logits, reference in zip(found, expected, strict=True):
        largest = max(largest, (logits - reference).abs().max().item())
        scale = max(scale, reference.abs().max().item())
        ours, theirs = reference.log_softmax(-1), logits.log_softmax(-1)
        divergence += (ours.exp() * (ours - theirs)).sum().item()
        same += int((logits.argmax(-1) == reference.argmax(-1)).sum())
        positions += len(reference)
    return Difference(len(found), largest, scale, divergence / positions, same / positions)
