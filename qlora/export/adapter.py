"""The adapter alone, in the form that PEFT and servers load: plain LoRA, one rank, the scaling inside B.

A skeleton on the meta device says where the adapter belongs, so no weight of the base is read and none is in memory.
Knows checkpoints' shapes and adapter folders; must not know runs, recipes or a loaded model.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Literal

from torch import nn

from qlora.export.source import CPU
from qlora.files.durable import folder_written_aside, keep_apart
from qlora.machine.device import resolve_compute_dtype
from qlora.methods.files import CONFIG, save_portable
from qlora.methods.loading import load_adapter
from qlora.model import anatomy
from qlora.model.checkpoint import Checkpoint
from qlora.model.skeleton import bare, language_model
from qlora.model.tokenizer import TEMPLATE
from qlora.recipe import ModelSection


def export_adapter(
    section: ModelSection,
    base: Checkpoint,
    adapter_folder: str | Path,
    out: str | Path,
    overwrite: bool = False,
    chat_template: str | None = None,
    keys: Literal["whole", "text"] = "whole",
) -> str | None:
    """Write the adapter in ``adapter_folder`` into the new folder ``out``; return why it is no plain LoRA, or None.

    ``chat_template``: written beside it. ``keys``: of an adapter on the language model inside a wrapper, whether they are those
    of the ``whole`` class or of the ``text`` model's own; elsewhere these are one. Nothing is at ``out`` before everything is written.
    Raises MethodError for an adapter that does not belong to the base, RunError when ``out`` is taken (``overwrite``
    replaces it, if it is an adapter).
    """
    out = Path(out)
    keep_apart(out, base.folder, Path(adapter_folder), replaces=CONFIG if overwrite else None)
    dtype = resolve_compute_dtype(CPU, section.compute_dtype)
    # the model stays on meta, the adapter is here
    model = load_adapter(bare(base, section, dtype).base(CPU, base.tokenizer), adapter_folder)
    with folder_written_aside(out, overwrite) as aside:
        if keys == "text" and model.base.towers:
            text = language_model(model.model)
            why = save_portable(model, aside, _renaming(model.model, text), text)
        else:
            why = save_portable(model, aside)
        if chat_template is not None:
            (aside / TEMPLATE).write_text(chat_template, encoding="utf-8")
    return why


def _renaming(whole: nn.Module, text: nn.Module) -> Callable[[str], str]:
    """What gives a module's path in ``whole`` its path in the class of the language model alone."""
    ends = {anatomy.path_of(whole, anatomy.head(whole)): anatomy.path_of(text, anatomy.head(text))}
    inside, there = anatomy.path_of(whole, anatomy.decoder(whole)), anatomy.path_of(text, anatomy.decoder(text))

    def renamed(path: str) -> str:
        return ends.get(path) or f"{there}{path.removeprefix(str(inside))}"

    return renamed
