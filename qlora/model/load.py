"""Loading a base: an empty skeleton is filled tensor by tensor, each quantised on the device as it comes from disk.

    config.json ─► skeleton on meta ─► empty linears ─► for each tensor: read → device → quantise → place → drop
                                                        ─► tie ─► compute what no file holds ─► nothing left on meta

Where layers do not stay on the device (``placement.py``), each of their linears goes to where it waits as soon as it is
packed; with a file cache only what is not in it is read from the checkpoint.

The law: the logits are those of ``from_pretrained`` with the same ``BitsAndBytesConfig``. Extra memory is one tensor.
Knows how transformers names the weights of a checkpoint; must not know adapters, data or training.
"""

from __future__ import annotations

import re
import sys
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import WeightConverter, WeightRenaming, rename_source_key

from qlora.errors import ModelError, listed
from qlora.machine.device import bytes_text, resolve_compute_dtype, resolve_device, trim_heap, versions
from qlora.model import anatomy
from qlora.model.checkpoint import Checkpoint, find_model, fingerprint, open_checkpoint, read_json
from qlora.model.nf4 import FrozenLinear, Linear4bit, dense_weight
from qlora.model.skeleton import (
    FOUR_BIT,
    Scheme,
    empty_linears,
    empty_model,
    fp32_names,
    load_skeleton,
    read_config,
    scheme_of,
)
from qlora.model.tokenizer import load_tokenizer
from qlora.recipe import MemorySection, ModelSection
from qlora.residence.cache import FileHome, cache_folder_of, cache_key, open_cache
from qlora.residence.ends import embedding_on_host, head_on_host, refuse_half
from qlora.residence.layers import decoder_layers
from qlora.residence.placement import Home, HostHome, Image, Placement, frozen_linears, resident_layers, settle

# What bitsandbytes writes beside a weight that it packed: P.weight and P.weight.absmax, … in 4 bits, P.SCB, … in 8.
FOUR_BIT_PARTS = (
    "weight.absmax", "weight.quant_map", "weight.nested_absmax", "weight.nested_quant_map",
    *(f"weight.quant_state.bitsandbytes__{kind}" for kind in FOUR_BIT),
)  # fmt: skip
EIGHT_BIT_PARTS = ("SCB", "weight_format")
INITIALISED = "_is_hf_initialized"  # transformers' mark on tensors and modules that its initialisation must leave alone


@dataclass
class Base:
    """A frozen base model in eval mode with its tokenizer, and how it was loaded."""

    model: nn.Module
    tokenizer: Any
    folder: Path
    name: str
    revision: str | None
    quantization: str
    double_quant: bool
    device: torch.device
    compute_dtype: torch.dtype
    end_tokens: tuple[int, ...] = ()
    """What ends an answer by the checkpoint's generation_config.json."""
    names: dict[str, str] | None = None
    """Each weight's name in the model → its name in the checkpoint; None for a model that came from no folder."""
    placement: Placement | None = None
    """The layers that do not stay on the device; None where all do."""


def load_base(
    section: ModelSection,
    device: torch.device | None = None,
    progress: bool = False,
    memory: MemorySection | None = None,
) -> Base:
    """Load, quantise and freeze the model of a recipe, on ``device`` (the default one when left out).

    ``memory`` says what does not stay on the device: layers, the embedding, the head. ``progress`` shows a bar on standard
    error, or two plain lines where that is no terminal. Raises ModelError, before any weight is read where that is possible,
    for whatever cannot be loaded whole and exactly.
    """
    device = resolve_device() if device is None else torch.device(device)
    dtype = resolve_compute_dtype(device, section.compute_dtype)
    folder = find_model(section.name, section.revision, progress, trust_remote_code=section.trust_remote_code)
    config = read_config(folder, section)
    checkpoint = open_checkpoint(folder)
    tokenizer = load_tokenizer(folder, section.trust_remote_code)
    ends = _end_tokens(folder)
    scheme = scheme_of(config, section)
    model = empty_model(config, section, dtype)
    names = match_names(model, checkpoint, scheme, section.name)
    packed = {target.removesuffix(".weight") for name, target in names.items() if packed_parts(name, checkpoint)}
    expected = set(model.state_dict())
    empty_linears(model, scheme, dtype, packed)
    _widen(model, dtype)
    wanted = memory or MemorySection()
    refuse_half(model, wanted.embedding == "host", wanted.head == "host")
    source = _Source(model, checkpoint, names, device, dtype)
    placement, left = _placed(source, section, scheme, wanted, progress)
    outside = _on_host(model, wanted)
    with _shown(section.name, scheme.quantization, checkpoint, left, progress) as advance:
        _fill(source, left, outside, advance)
    _finish(model, expected - set(names.values()), device, folder)
    model.eval().requires_grad_(False)
    if placement is not None:
        placement.stream(decoder_layers(model))
    if wanted.embedding == "host":
        embedding_on_host(model, device)
    if wanted.head == "host":
        head_on_host(model, device)
    double = scheme.double_quant
    if packed:  # config.json may not tell the truth about its weights; they do
        double = any(linear.double_quant for linear in model.modules() if isinstance(linear, Linear4bit))
    return Base(
        model=model,
        tokenizer=tokenizer,
        folder=folder,
        name=section.name,
        revision=section.revision,
        quantization=scheme.quantization,
        double_quant=double,
        device=device,
        compute_dtype=dtype,
        end_tokens=ends,
        names={target: name for name, target in names.items()},
        placement=placement,
    )


def skeleton_base(section: ModelSection, device: torch.device, dtype: torch.dtype, folder: Path | None = None) -> Base:
    """A base without weights: the model of ``section`` on meta. What is planted in it lies on ``device``.

    With ``folder``, the checkpoint's own, it has that checkpoint's tokenizer and fingerprint too.
    """
    return Base(
        model=load_skeleton(section, dtype),
        tokenizer=None if folder is None else load_tokenizer(folder, section.trust_remote_code),
        folder=folder or Path(),
        name=section.name,
        revision=section.revision,
        quantization=section.quantization,
        double_quant=section.double_quant,
        device=device,
        compute_dtype=dtype,
        names=None if folder is None else {},
    )


def checkpoint_weight(base: Base, path: str, linear: nn.Module | None = None) -> Tensor:
    """The weight of the linear at ``path`` as the checkpoint has it, [out, in] in the compute dtype, on the base's device.

    A prequantised checkpoint, or a model that came from no folder, has no other weight than the one in use. ``linear`` is
    the one that stood at ``path``, where something was planted or wrapped there since.
    """
    name = (base.names or {}).get(f"{path}.weight")
    linear = base.model.get_submodule(path) if linear is None else linear
    checkpoint = open_checkpoint(base.folder) if name else None
    if checkpoint is None or name is None or packed_parts(name, checkpoint) or not isinstance(linear, FrozenLinear):
        return dense_weight(linear, base.compute_dtype)
    return checkpoint.read(name).to(base.device, base.compute_dtype)


def quantised_names(model: nn.Module) -> set[str]:
    """The names of the weights that are held quantised, as ``model.layers.0.mlp.up_proj.weight``."""
    return {f"{name}.weight" for name, module in model.named_modules() if isinstance(module, FrozenLinear)}


def match_names(model: Any, checkpoint: Checkpoint, scheme: Scheme, name: str) -> dict[str, str]:
    """Each tensor's name in the checkpoint → its name in the still unquantised skeleton ``model``.

    Follows transformers 5, which renames some old checkpoints on load. The parts of a packed weight (its scales and
    codes) are left out, they go with it. Raises ModelError when transformers would have to compute a weight from
    several tensors (experts fused into one parameter), for tensors that have no place in the model, and for integers
    that nobody could scale back to weights.
    """
    expected = model.state_dict()
    transforms = get_model_conversion_mapping(model)
    renamings = [item for item in transforms if isinstance(item, WeightRenaming)]
    converters = [item for item in transforms if isinstance(item, WeightConverter)]
    names: dict[str, str] = {}
    unexpected: list[str] = []
    kinds = EIGHT_BIT_PARTS if scheme.quantization == "int8" else FOUR_BIT_PARTS
    parts = tuple(f".{part}" for part in kinds) if scheme.prequantised else ()
    for source in checkpoint.entries:
        if source.endswith(parts):
            continue
        target, converter = rename_source_key(source, renamings, converters, model.base_model_prefix, expected)
        if target not in expected and source in expected:
            target, converter = source, None
        if converter is not None:
            raise ModelError(
                f"'{name}' (model type '{model.config.model_type}') keeps its weights in another arrangement than "
                f"transformers computes with: '{source}' is fused with or split from others on load, as in mixtures of "
                "experts. That cannot be loaded one tensor at a time; take a model without experts."
            )
        if target in expected:
            names[source] = target
        elif not _ignored(model, target):
            unexpected.append(source)
    if unexpected:
        raise ModelError(
            f"'{name}' has {len(unexpected)} tensors that its {type(model).__name__} has no place for: "
            f"{listed(unexpected)}; its config.json and its weights do not belong together."
        )
    if doubled := [target for target, count in Counter(names.values()).items() if count > 1]:
        raise ModelError(f"'{name}' holds several tensors for {listed(doubled)}; fetch the checkpoint again.")
    if whole := [
        source
        for source, target in names.items()
        if expected[target].is_floating_point()
        and not checkpoint.entries[source].dtype.is_floating_point
        and not packed_parts(source, checkpoint)
    ]:
        raise ModelError(
            f"'{name}' holds whole numbers without their scales in {listed(whole)}; expected floating-point weights, or "
            "such as bitsandbytes packed. Fetch the checkpoint again."
        )
    found = set(names.values())
    tied = anatomy.tied_names(model)
    allowed = getattr(model, "_keys_to_ignore_on_load_missing", None)
    # of weights that are tied to each other one is enough, whichever it is
    filled = found | {tied[key] for key in found & tied.keys()}
    lacking = [key for key in expected if tied.get(key, key) not in filled and not _matches_any(key, allowed)]
    if lacking:
        raise ModelError(
            f"'{name}' lacks {len(lacking)} tensors of its {type(model).__name__}: {listed(lacking)}; the checkpoint is "
            "incomplete, fetch it again."
        )
    return names


def _matches_any(name: str, patterns: Any) -> bool:
    return any(re.search(pattern, name) for pattern in patterns or ())


def _ignored(model: Any, name: str) -> bool:
    """Whether transformers itself leaves this tensor out: its own lists, and buffers that older versions saved."""
    old_buffers = (r"rotary_emb\.inv_freq$", r"(^|\.)position_ids$")
    return _matches_any(name, getattr(model, "_keys_to_ignore_on_load_unexpected", None)) or _matches_any(
        name, old_buffers
    )


def packed_parts(name: str, checkpoint: Checkpoint) -> list[str]:
    """What bitsandbytes wrote beside the weight ``name`` when it packed it; nothing beside a dense weight.

    Example: ``P.weight`` → ``P.weight.absmax``, ``P.weight.quant_map``, …, or ``P.SCB`` and ``P.weight_format``
    """
    stem = name.removesuffix("weight")
    return [f"{stem}{part}" for part in (*FOUR_BIT_PARTS, *EIGHT_BIT_PARTS) if f"{stem}{part}" in checkpoint.entries]


def _end_tokens(folder: Path) -> tuple[int, ...]:
    """The end tokens of generation_config.json; Gemma's end of a turn, for example, stands there alone."""
    name = "generation_config.json"
    if not (folder / name).exists():
        return ()
    found = read_json(folder, name, "a generation configuration").get("eos_token_id")
    ends = found if isinstance(found, list) else [] if found is None else [found]
    if any(type(end) is not int for end in ends):
        raise ModelError(
            f"'{folder / name}' has the eos_token_id {found!r}; expected a token's number or a list of them. Correct it, "
            "or fetch it again."
        )
    return tuple(ends)


@dataclass(frozen=True)
class _Source:
    """An empty model, and where its tensors come from and go to."""

    model: Any
    checkpoint: Checkpoint
    names: dict[str, str]
    device: torch.device
    dtype: torch.dtype


def _placed(
    source: _Source, section: ModelSection, scheme: Scheme, memory: MemorySection, progress: bool
) -> tuple[Placement | None, dict[str, str]]:
    """(the layers that do not stay, None where all do; the names that are still to be read from the checkpoint).

    The file cache holds every layer, whichever stay, so that it serves every arrangement.
    """
    if memory.layers == "resident":
        return None, source.names
    try:
        layers = decoder_layers(source.model)
    except ModelError:
        raise ModelError(
            f"No list of decoder layers was found in '{section.name}', so they cannot be streamed; set memory.layers=resident."
        ) from None
    stay, device = resident_layers(memory.layers, len(layers)), source.device
    if len(stay) == len(layers):
        return None, source.names
    images = [Image(layer) for layer in layers]
    if not all(image.bytes for image in images):
        raise ModelError(
            f"'{section.name}' has layers without a linear, so they cannot be streamed; set memory.layers=resident."
        )
    if twice := _shared(source, layers):
        raise ModelError(
            f"Layers of '{section.name}' share {listed(twice, 3)}, so they cannot be streamed one by one; set "
            "memory.layers=resident."
        )
    streamed = {number: image for number, image in enumerate(images) if number not in stay}
    if memory.tier == "host":
        home: Home = HostHome({number: image.bytes for number, image in streamed.items()}, device)
        return Placement(streamed, home, memory.slots, device, memory.tier), source.names
    owners = {id(linear): linear for image in images for linear in image.linears}
    inside = {
        name: target
        for name, target in source.names.items()
        if id(source.model.get_submodule(target.rpartition(".")[0])) in owners and target.endswith(".weight")
    }

    def make(new: FileHome) -> None:
        every = Placement(dict(enumerate(images)), new, memory.slots, device, memory.tier)
        with _shown(section.name, scheme.quantization, source.checkpoint, inside, progress) as advance:
            _fill(source, inside, set(), advance)
        for image in every.images.values():
            image.detach()

    key, folder = _key(source.checkpoint, scheme, source.dtype, device), cache_folder_of(memory)
    file = open_cache(
        folder, key, images, device, make, lambda text: print(text, file=sys.stderr) if progress else None
    )
    for number in stay:
        settle(images[number], file, number, device)
    placement = Placement(streamed, file, memory.slots, device, memory.tier)
    return placement, {name: target for name, target in source.names.items() if name not in inside}


def cached_bytes(section: ModelSection, dtype: torch.dtype, device: torch.device, memory: MemorySection) -> int:
    """What the file cache of this base takes on the disk already; 0 where there is none, or no checkpoint here."""
    try:
        folder = find_model(section.name, section.revision, weights=False, trust_remote_code=section.trust_remote_code)
        checkpoint = open_checkpoint(folder)
        key = _key(checkpoint, scheme_of(read_config(folder, section), section), dtype, device)
        return sum(path.stat().st_size for path in (cache_folder_of(memory) / key).glob("*"))
    except (ModelError, OSError):
        return 0


def _key(checkpoint: Checkpoint, scheme: Scheme, dtype: torch.dtype, device: torch.device) -> str:
    """The name of the file cache that these decide."""
    return cache_key(
        base=fingerprint(checkpoint.folder),
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


def _shared(source: _Source, layers: nn.ModuleList) -> list[str]:
    """The linears that stand in several layers, and those whose weight is tied to another one."""
    owners = Counter(id(linear) for layer in layers for linear in frozen_linears([layer]))
    tied = anatomy.tied_names(source.model)
    names = {name.removesuffix(".weight") for name in (*tied, *tied.values())}
    return [
        path
        for path, module in source.model.named_modules()
        if owners[id(module)] > 1 or (path in names and id(module) in owners)
    ]


def _on_host(model: Any, memory: MemorySection) -> set[int]:
    """The ids of modules whose weights are read into host memory and stay there."""
    found = {id(anatomy.embedding(model))} if memory.embedding == "host" else set()
    return found | ({id(anatomy.head(model))} if memory.head == "host" else set())


def _fill(source: _Source, names: dict[str, str], outside: set[int], advance: Callable[[int], None]) -> None:
    """Read, place and drop one tensor after the other. Those of the modules ``outside`` stay in host memory."""
    model, checkpoint, device, dtype = source.model, source.checkpoint, source.device, source.dtype
    for source_name, target in names.items():
        owner, _, key = target.rpartition(".")
        module = model.get_submodule(owner)
        entry = checkpoint.entries[source_name]
        if _packs(module, key) and (parts := packed_parts(source_name, checkpoint)):
            stem = source_name.removesuffix("weight")
            tensors = {name.removeprefix(stem): checkpoint.read(name) for name in [source_name, *parts]}
            try:
                module.place_quantised(tensors, device)
            except ModelError as error:
                raise ModelError(f"'{source_name}' in '{checkpoint.folder}': {error}") from None
            advance(sum(checkpoint.entries[name].bytes for name in [source_name, *parts]))
            continue
        shape = (module.out_features, module.in_features) if _packs(module, key) else tuple(getattr(module, key).shape)
        if entry.shape != shape:
            raise ModelError(
                f"'{source_name}' in '{checkpoint.folder}' has the shape {list(entry.shape)}; its config.json asks for "
                f"{list(shape)}."
            )
        if _packs(module, key):
            # from_pretrained casts before it quantises; the scales of a tensor depend on the dtype that they came from
            module.place(checkpoint.read(source_name).to(device, dtype), device)
        else:
            place = torch.device("cpu") if id(module) in outside else device
            _put(module, key, checkpoint.read(source_name).to(place))
            if key == "weight" and getattr(module, "away", None) is not None:
                module.away.keep()
        trim_heap()
        advance(entry.bytes)


def _packs(module: nn.Module, key: str) -> bool:
    return isinstance(module, FrozenLinear) and key == "weight"


def _widen(model: nn.Module, dtype: torch.dtype) -> None:
    """Give what transformers keeps in fp32 that dtype in the skeleton, where it is still without memory."""
    names = [re.escape(part) for part in fp32_names(model, dtype)]
    for name, values in model.named_parameters():
        if values.is_floating_point() and _matches_any(name, names):
            values.data = values.data.float()


def _put(module: nn.Module, key: str, tensor: Tensor) -> None:
    """Replace a parameter or buffer on meta by a real tensor, in the dtype that the skeleton has for it."""
    old = getattr(module, key)
    value = tensor.to(old.dtype) if tensor.is_floating_point() else tensor
    if isinstance(old, nn.Parameter):
        value = nn.Parameter(value, requires_grad=False)
    setattr(value, INITIALISED, True)
    setattr(module, key, value)


def _finish(model: Any, missing: set[str], device: torch.device, folder: Path) -> None:
    """Tie what is tied, compute what no file holds (rotary frequencies, scales), and check that nothing was left out."""
    # transformers changes the set: a tied weight that it filled is no longer missing
    model.tie_weights(missing_keys=missing, recompute_mapping=False)
    blank: list[tuple[str, nn.Module, str]] = []
    for owner, module in model.named_modules():
        away = {piece.name for piece in module.away.pieces} if getattr(module, "away", None) is not None else ()
        for key, value in [*module.named_parameters(recurse=False), *module.named_buffers(recurse=False)]:
            if value.is_meta and key not in away:
                # poisoned, so that what transformers' initialisation then does not fill is found below
                poison = torch.full_like(value, float("nan") if value.is_floating_point() else -1, device=device)
                setattr(module, key, nn.Parameter(poison, False) if isinstance(value, nn.Parameter) else poison)
                blank.append((f"{owner}.{key}", module, key))
    for module in model.modules():
        if isinstance(module, FrozenLinear) or getattr(module, "away", None) is not None:
            setattr(module, INITIALISED, True)
    model.initialize_weights()
    empty = [name for name, module, key in blank if _is_poison(getattr(module, key))]
    if empty:
        raise ModelError(f"'{folder}' was read, but {listed(empty)} got no values; this model cannot be loaded.")
    for _, module, key in blank:
        value = getattr(module, key)
        if value.device != device:
            setattr(module, key, value.to(device))


def _is_poison(tensor: Tensor) -> bool:
    return bool(tensor.isnan().any() if tensor.is_floating_point() else (tensor == -1).all()) and tensor.numel() > 0


@contextmanager
def _shown(
    name: str, quantization: str, checkpoint: Checkpoint, names: Iterable[str], progress: bool
) -> Iterator[Callable[[int], None]]:
    """Yields ``advance(bytes)``, which moves a bar on a terminal, while the tensors ``names`` are read."""
    every = [part for source in names for part in (source, *packed_parts(source, checkpoint))]
    total = sum(checkpoint.entries[part].bytes for part in every)
    how = "unquantised" if quantization == "none" else f"to {quantization}"
    if not progress:
        yield lambda count: None
        return
    if not sys.stderr.isatty():
        print(f"Loading {name} {how}: {bytes_text(total)} in {len(checkpoint.shards)} files", file=sys.stderr)
        yield lambda count: None
        print(f"Loaded {name}", file=sys.stderr)
        return
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn

    columns = (BarColumn(), DownloadColumn(binary_units=True), TransferSpeedColumn(), TimeRemainingColumn())
    with Progress(TextColumn("{task.description}"), *columns, console=Console(stderr=True)) as bar:
        task = bar.add_task(f"Loading {name} {how}", total=total)
        yield lambda count: bar.advance(task, count)
