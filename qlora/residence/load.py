"""Loading a base for a run: what stays on the device is read there, and the rest to where it waits.

    assemble (model/) ─► plan_placement ─► file cache made or opened ─► fill (model/) ─► finish ─► streamed, ends on the host

Knows which arrangement the recipe asks for and what it needs of a model; must not know adapters, data or training.
"""

from __future__ import annotations

import os
import re
import sys
from collections import Counter
from collections.abc import Collection, Iterable
from pathlib import Path

import torch
from torch import nn

from qlora.errors import ModelError, listed
from qlora.machine.device import capability, resolve_compute_dtype, resolve_device, versions
from qlora.machine.processes import here
from qlora.model import anatomy
from qlora.model.attention import keep_apart
from qlora.model.base import Base
from qlora.model.checkpoint import Checkpoint, open_checkpoint
from qlora.model.config import Scheme, scheme_of
from qlora.model.kernels import fuse
from qlora.model.load import end_tokens, fill, finish, progress_of
from qlora.model.nf4 import Linear4bit
from qlora.model.skeleton import Assembled, assemble
from qlora.recipe import MemorySection, ModelSection
from qlora.residence.cache import cache_folder_of, cache_key, open_cache
from qlora.residence.ends import embedding_on_host, head_on_host, refuse_half
from qlora.residence.homes import FileHome, HostHome, SharedHostHome
from qlora.residence.image import Image, frozen_linears
from qlora.residence.placement import Placement, resident_layers, settle
from qlora.residence.spread import SpreadHome


def load_base(
    section: ModelSection,
    device: torch.device | None = None,
    progress: bool = False,
    memory: MemorySection | None = None,
    checkpoint: Checkpoint | None = None,
    elsewhere: Collection[str] = (),
) -> Base:
    """Load, quantise and freeze the model of a recipe, on ``device`` (the default one when left out).

    ``memory`` says what does not stay on the device: layers, the embedding, the head. ``progress`` shows a bar on standard
    error, or two plain lines where that is no terminal. ``checkpoint`` is the section's, where it was opened before. Parameters
    ``elsewhere``, by their names in the model, are left out: another process has them (``owned.py``). Raises
    ModelError, before any weight is read where that is possible, for whatever cannot be loaded whole and exactly.
    """
    device = resolve_device() if device is None else torch.device(device)
    memory = memory or MemorySection()
    checkpoint = checkpoint or open_checkpoint(section)
    tokenizer, ends = checkpoint.tokenizer, end_tokens(checkpoint)
    empty = assemble(checkpoint, section, resolve_compute_dtype(device, section.compute_dtype))
    if section.attention == "auto":
        keep_apart(empty.model, empty.dtype, capability(device))
    fuse(empty.model, empty.dtype, capability(device), device)
    model, missing = empty.model, empty.shapes.keys() - set(empty.names.values())
    refuse_half(model, memory.embedding == "host", memory.head == "host")
    placement, left = plan_placement(empty, memory, device, progress)
    ends_on_host = {anatomy.embedding(model): memory.embedding, anatomy.head(model): memory.head}
    on_host = [module for module, place in ends_on_host.items() if module is not None and place == "host"]
    with progress_of(empty, left, progress) as advance:
        fill(empty, left, device, advance, on_host, elsewhere)
    finish(model, missing, device, str(checkpoint.folder))
    model.eval().requires_grad_(False)
    if placement is not None:
        if isinstance(placement.home, SharedHostHome):
            placement.home.share()
        placement.stream(anatomy.layers(model))
    if memory.embedding == "host":
        embedding_on_host(model, device)
    if memory.head == "host":
        head_on_host(model, device)
    double = empty.scheme.double_quant
    if empty.scheme.prequantised:  # config.json may not tell the truth about its weights; they do
        double = any(linear.double_quant for linear in model.modules() if isinstance(linear, Linear4bit))
    return empty.base(device, tokenizer=tokenizer, double_quant=double, end_tokens=ends, placement=placement)


def plan_placement(
    empty: Assembled, memory: MemorySection, device: torch.device, progress: bool
) -> tuple[Placement | None, Collection[str]]:
    """(the layers that do not stay, None where all do; the names that are still to be read from the checkpoint).

    The file cache holds every layer, whichever stay, so that it serves every arrangement.
    """
    if memory.layers == "resident":
        return None, empty.names
    name = empty.checkpoint.name
    try:
        layers = anatomy.layers(empty.model)
    except ModelError:
        raise ModelError(
            f"No list of decoder layers was found in '{name}', so they cannot be streamed; set memory.layers=resident."
        ) from None
    stay = resident_layers(memory.layers, len(layers))
    if len(stay) == len(layers):
        return None, empty.names
    images = [Image(layer) for layer in layers]
    if not all(image.bytes for image in images):
        raise ModelError(
            f"'{name}' has layers without a linear, so they cannot be streamed; set memory.layers=resident."
        )
    refuse_shared(empty.model, layers, name)
    streamed = {number: image for number, image in enumerate(images) if number not in stay}
    if memory.tier == "host":
        shares = here().local_size > 1 and hasattr(os, "memfd_create")  # Linux
        sizes = {number: image.bytes for number, image in streamed.items()}
        home = SharedHostHome(sizes, device) if shares else HostHome(sizes, device)
        return Placement(streamed, home, memory.slots, device, "host"), empty.names
    if memory.tier == "processes":
        spread = SpreadHome({number: image.bytes for number, image in streamed.items()}, device)
        return Placement(streamed, spread, memory.slots, device, "processes"), empty.names
    inside = _names_inside(empty, layers)
    file = _file_home(empty, images, inside, memory, device, progress)
    for number in stay:
        settle(images[number], file, number, device)
    return Placement(streamed, file, memory.slots, device, "disk"), [n for n in empty.names if n not in inside]


def _file_home(
    empty: Assembled, images: list[Image], names: set[str], memory: MemorySection, device: torch.device, progress: bool
) -> FileHome:
    """The file cache of all layers, read from the checkpoint where there is none yet."""

    def make(new: FileHome) -> None:
        Placement(dict(enumerate(images)), new, memory.slots, device, "disk")  # tells the linears where they wait
        ordered = [name for name in empty.names if name in names]
        with progress_of(empty, ordered, progress) as advance:
            fill(empty, ordered, device, advance)
        for image in images:
            image.detach()

    def say(text: str) -> None:
        if progress:
            print(text, file=sys.stderr)

    key = _key(empty.checkpoint, empty.scheme, empty.dtype, device)
    return open_cache(cache_folder_of(memory), key, images, device, make, say)


def _names_inside(empty: Assembled, layers: nn.ModuleList) -> set[str]:
    """The names in the checkpoint of what the layers' images hold: the weights of their linears."""
    owners = {id(linear) for linear in frozen_linears(layers)}
    return {
        name
        for name, target in empty.names.items()
        if (target.endswith(".weight") or target in empty.stacks)
        and id(_at(empty.model, target.removesuffix(".weight"))) in owners
    }


def _at(model: nn.Module, path: str) -> object:
    """The module, or the parameter of several experts that nothing packed, at ``path``."""
    owner, _, name = path.rpartition(".")
    return getattr(model.get_submodule(owner), name)


def refuse_shared(model: nn.Module, layers: Iterable[nn.Module], name: str) -> None:
    """Raise ModelError where layers that are to be streamed have a linear together."""
    if twice := shared_between(model, layers):
        raise ModelError(
            f"Layers of '{name}' share {listed(twice, 3)}, so they cannot be streamed one by one; set "
            "memory.layers=resident."
        )


def shared_between(model: nn.Module, layers: Iterable[nn.Module]) -> list[str]:
    """The linears that stand in several layers, and those whose weight is tied to another one."""
    owners = Counter(id(linear) for layer in layers for linear in frozen_linears([layer]))
    tied = anatomy.tied_names(model)
    names = {name.removesuffix(".weight") for name in (*tied, *tied.values())}
    return [
        path
        for path, module in model.named_modules()
        if owners[id(module)] > 1 or (path in names and id(module) in owners)
    ]


def cached_bytes(
    section: ModelSection,
    dtype: torch.dtype,
    device: torch.device,
    memory: MemorySection,
    checkpoint: Checkpoint | None = None,
) -> int:
    """What the file cache of this base takes on the disk already; 0 where there is none, or no checkpoint here."""
    try:
        checkpoint = checkpoint or open_checkpoint(section, weights=False)
        key = _key(checkpoint, scheme_of(checkpoint.model_config(), section), dtype, device)
        return sum(path.stat().st_size for path in (cache_folder_of(memory) / key).glob("*"))
    except (ModelError, OSError):
        return 0


def _key(checkpoint: Checkpoint, scheme: Scheme, dtype: torch.dtype, device: torch.device) -> str:
    """The name of the file cache that these decide."""
    return cache_key(
        base=checkpoint.fingerprint,
        files=[_version(shard) for shard in checkpoint.shards],
        quantization=scheme.quantization,
        double_quant=scheme.double_quant,
        dtype=str(dtype),
        device=device.type,
        bitsandbytes=versions()["bitsandbytes"],
    )


def _version(path: Path) -> str:
    """What changes when a file of weights does, however little: its hash, by which the hub's cache names it, or its time.

    ``fingerprint`` alone reads samples, between which a few weights may differ.
    """
    real = path.resolve()
    return real.name if re.fullmatch("[0-9a-f]{64}", real.name) else str(real.stat().st_mtime_ns)
