"""Memory: what a run will hold, by kind and by place, from shapes alone.

    skeleton, recipe ─► what stays (weights, moments: counted) ─┐
                   └──► a step (dry_run.py: the code's own)  ───┴─► Estimate: bytes by kind, as a table

Everything is counted from the model on the meta device with its method planted, so no weight is read. What stays for the
whole run is counted exactly. What comes and goes is what the true step's code allocates on fake tensors, laid out over
all layers. The estimate is of the moment that takes most; its kinds add up to its total, and ``peak_phase`` names it.

Three places: the device, host memory (``pinned`` is the part that is locked for copies), the disk. On a CPU the host's
memory is the device's, and there is one column.
"""

from __future__ import annotations

import weakref
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn

from qlora.machine.device import GIB, bytes_text
from qlora.methods import AdaptedModel
from qlora.model.nf4 import FrozenLinear
from qlora.planning.accounting import bytes_of, moments
from qlora.planning.dry_run import DryRun, Moment, Shape, dry_run
from qlora.recipe import MemorySection, TrainingSection
from qlora.residence.image import ALIGNMENT, frozen_linears
from qlora.residence.layers import decoder_layers
from qlora.residence.placement import resident_layers

RUNTIME = {"cpu": int(0.8 * GIB), "cuda": int(0.6 * GIB)}
"""What a process holds beside what is counted here: on a CPU the libraries (0.45 GiB) and what the C heap keeps of freed
tensors (0.3 to 0.4 GiB in the quickstart); on a GPU the CUDA context, and what the allocator cannot
use between its pieces."""
HOST_RUNTIME = 2 * GIB  # what a process that computes on a GPU holds in host memory: torch's CUDA libraries, the data
STAGING = 2
"""Pieces of pinned host memory between the file cache and a GPU, each as large as the largest layer (cache.py)."""
PIECES = 2
"""Parts of layer inputs on the device in backward while the others wait elsewhere: one in use, the next on its way."""

BITSANDBYTES_STEP, EIGHT_BIT_STEP = 12, 20
"""Bytes that bitsandbytes' AdamW on a CPU takes for each number of a parameter while it moves it, measured; 4 more below fp32."""

WAITING = {
    "forward": "layer_working_set",
    "loss": "loss_chunk",
    "backward": "layer_working_set",
    "penalty": "penalty",
    "optimizer": "optimizer_step",
}
"""By the phase of the peak, what its own bytes are called."""


@dataclass(frozen=True)
class Estimate:
    """Bytes by kind on the device, in host memory and on the disk, at the moment that takes most on the device."""

    device: dict[str, int]
    host: dict[str, int]
    """Empty on a CPU, where it is the device's."""
    disk: dict[str, int]
    peak_phase: str
    """``forward``, ``loss``, ``backward``, ``penalty`` or ``optimizer``."""
    phases: dict[str, int] = field(default_factory=dict)
    """The most on the device in each phase of a step."""

    @property
    def total(self) -> int:
        """The most on the device at one time."""
        return sum(self.device.values())

    @property
    def step(self) -> int:
        """Of ``total``, what comes and goes in a step; the rest stays for the whole run."""
        return sum(self.device.get(kind, 0) for kind in {"gradients", "layer_inputs", *WAITING.values()})

    @property
    def host_total(self) -> int:
        """What is held in host memory; on a CPU what the device holds."""
        return sum(self.host.values()) if self.host else self.total

    @property
    def pinned(self) -> int:
        """Of the host's memory, what is locked for copies."""
        return sum(count for kind, count in self.host.items() if kind.startswith("pinned"))

    @property
    def disk_total(self) -> int:
        """What is written to the disk, checkpoints left out."""
        return sum(self.disk.values())

    def as_dict(self) -> dict[str, int]:
        """Kinds and their ``total``; the host's begin with ``host_``, the disk's with ``disk_``."""
        host = {f"host_{kind}": count for kind, count in self.host.items()}
        disk = {f"disk_{kind}": count for kind, count in self.disk.items()}
        return {**self.device, "total": self.total, **host, **disk}

    def __str__(self) -> str:
        columns = {"device": self.device, "host": self.host, "disk": self.disk}
        columns = {name: {**kinds, "total": sum(kinds.values())} for name, kinds in columns.items() if kinds}
        rows = list(dict.fromkeys(kind for kinds in columns.values() for kind in kinds if kind != "total"))
        lines = []
        if len(columns) > 1:
            lines.append(f"  {'':<20}{''.join(f'{name:>12}' for name in columns)}")
        for kind in [*rows, "total"]:
            found = [bytes_text(kinds[kind]) if kind in kinds else "" for kinds in columns.values()]
            lines.append(f"  {kind.replace('_', ' '):<20}{''.join(f'{text:>12}' for text in found)}".rstrip())
        phases = ", ".join(f"{phase} {bytes_text(count)}" for phase, count in self.phases.items())
        lines.append(f"  most in the {self.peak_phase} ({phases})")
        return "\n".join(lines)


def estimate(
    adapted: AdaptedModel,
    training: TrainingSection,
    length: int,
    device: torch.device,
    packing: bool = False,
    memory: MemorySection = MemorySection(),  # noqa: B008 (frozen)
) -> Estimate:
    """What training ``adapted`` (weights may be on meta) takes on ``device``, for rows of ``length`` tokens.

    ``packing`` says that rows hold several examples, which SDPA keeps apart by a mask [rows, T, T]. ``memory`` says where
    the frozen weights and the layer inputs wait. Evaluation is never more: it takes as many rows at once and keeps nothing.
    """
    place = "cuda" if device.type == "cuda" else "cpu"
    device_kinds, host, disk = holdings(adapted, training, place, memory)
    run = _dry_run(adapted, shape_of(training, length, packing, memory), place)
    kept = sum(run.graph[index] for index in run.place) if training.gradient_checkpointing else 0
    away = memory.layer_inputs if place == "cuda" or memory.layer_inputs == "disk" else "device"
    if away != "device" and kept:
        where, kind = (disk, "layer_inputs") if away == "disk" else (host, "pinned_layer_inputs")
        where[kind] = kept * run.input_bytes
        if away == "disk" and place == "cuda":
            host["pinned_layer_inputs"] = run.input_bytes  # on its way to the file
    found = run.moments()
    steps = {
        layer: optimizer_step_bytes(together, training, place)
        for layer, together in _moved_together(adapted, training).items()
    }
    placed = [_placed(moment, run, steps.get(moment.layer, 0), away != "device") for moment in found]
    most = max(placed, key=lambda kinds: sum(kinds[1].values()))
    phases: dict[str, int] = {}
    still = sum(device_kinds.values()) + RUNTIME[place]
    for phase, kinds in placed:
        phases[phase] = max(phases.get(phase, 0), still + sum(kinds.values()))
    device_kinds = {**device_kinds, **most[1], "runtime": RUNTIME[place]}
    if place == "cuda":
        host["runtime"] = HOST_RUNTIME
    return Estimate(
        {kind: count for kind, count in device_kinds.items() if count},
        {kind: count for kind, count in host.items() if count},
        {kind: count for kind, count in disk.items() if count},
        most[0],
        phases,
    )


def _placed(moment: Moment, run: DryRun, step: int, away: bool) -> tuple[str, dict[str, int]]:
    """The phase, and what is held in it on the device, by kind."""
    elsewhere = _elsewhere(moment, run) if away else 0
    more = step if moment.phase == "optimizer" else moment.more
    waiting = moment.held - moment.gradients - elsewhere
    return moment.phase, {"gradients": moment.gradients, "layer_inputs": waiting, WAITING[moment.phase]: more}


def _elsewhere(moment: Moment, run: DryRun) -> int:
    """Bytes of layer inputs that wait elsewhere (layer_inputs.py). The newest is whole on the device, until it was used."""
    piece = run.input_bytes * run.shape.at_once // run.shape.rows
    if moment.phase == "forward" or not moment.inputs:  # its own layer's input is not among these yet
        return moment.inputs * run.input_bytes
    if moment.phase == "loss":
        return (moment.inputs - 1) * run.input_bytes
    kept = sum(run.graph[index] for index in run.place)
    newest = moment.inputs == kept
    return moment.inputs * run.input_bytes - (run.input_bytes + piece if newest else PIECES * piece)


def shape_of(training: TrainingSection, length: int, packing: bool, memory: MemorySection) -> Shape:
    """What a step puts through the model."""
    at_once = min(training.micro_batch_size, training.batch_size)
    together = training.gradient_checkpointing and training.accumulation == "layer_major"
    return Shape(
        rows=training.batch_size if together else at_once,
        at_once=at_once,
        length=length,
        passes=1 if together else -(-training.batch_size // at_once),
        chunk=training.loss_chunk,
        checkpointing=training.gradient_checkpointing,
        packed=packing,
        mlp_tile=memory.mlp_tile,
        embedding_on_host=memory.embedding == "host",
        head_on_host=memory.head == "host",
    )


_DONE: weakref.WeakKeyDictionary[AdaptedModel, dict[Any, DryRun]] = weakref.WeakKeyDictionary()


def _dry_run(adapted: AdaptedModel, shape: Shape, device: str) -> DryRun:
    """``dry_run``, once for each model and shape."""
    done = _DONE.setdefault(adapted, {})
    key = shape, device
    if key not in done:
        done[key] = dry_run(adapted, shape, device)
    return done[key]


def holdings(
    adapted: AdaptedModel, training: TrainingSection, device: str, memory: MemorySection
) -> tuple[dict[str, int], dict[str, int], dict[str, int]]:
    """What stays for the whole run, by kind: (on the device, in host memory, on the disk). On a CPU the host's is the device's."""
    model: Any = adapted.model
    trained = adapted.trainable_parameters()
    beside = beside_parameters(adapted)
    elsewhere = {values.untyped_storage()._cdata for values in beside}  # PiSSA keeps these in its layers
    counted = {id(values) for values in model.buffers() if values.untyped_storage()._cdata in elsewhere}
    quantised, other = weight_bytes(model, counted | {id(p) for p in trained.values()})
    host: dict[str, int] = {}
    disk: dict[str, int] = {}
    slots = 0
    locked = "pinned_" if device == "cuda" else ""
    images, plain, packed = _images(model, memory)
    if images:
        quantised, other = quantised - packed, other - plain
        largest = max(images.values())
        slots = min(memory.slots, len(images)) * largest
        if memory.tier == "disk":
            disk["file_cache"] = sum(_images(model, memory.model_copy(update={"layers": "streamed"}))[0].values())
            if device == "cuda":
                host["pinned_staging"] = STAGING * largest
        else:
            host[f"{locked}layers"] = sum(images.values())
    head, embedding = _ends(model, memory, {id(p) for p in trained.values()})
    other -= head + embedding
    host |= {f"{locked}head": head, "embedding": embedding}
    states = [moments(p.numel(), training.optimizer) for p in trained.values()]
    state = sum(states)
    if device == "cuda" and training.optimizer.startswith("paged"):  # it comes by itself, one matrix at a time
        host["paged_optimizer"], state = state, max(states, default=0)
    kinds = {
        "quantised_weights": quantised,
        "layer_slots": slots,
        "other_weights": other,
        "adapter": sum(p.numel() * p.dtype.itemsize for p in trained.values()),
        "optimizer": state,
        "method_state": bytes_of(beside),
        "workspaces": _workspace() if device == "cuda" else 0,
    }
    if device == "cpu":
        return {**kinds, **{f"host_{kind}": count for kind, count in host.items()}}, {}, disk
    return kinds, host, disk


def _images(model: Any, memory: MemorySection) -> tuple[dict[int, int], int, int]:
    """For the layers that do not stay: (bytes of each one's image, by number; of plain weights and of quantised ones in them).

    What trains is no part of an image, since images are made before a method is planted.
    """
    if memory.layers == "resident":
        return {}, 0, 0
    layers = decoder_layers(model)
    stay = resident_layers(memory.layers, len(layers))
    images: dict[int, int] = {}
    plain = packed = 0
    for number in set(range(len(layers))) - stay:
        images[number] = 0
        for linear in frozen_linears([layers[number]]):
            sizes = [values.numel() * values.dtype.itemsize for values in _frozen(linear)]
            images[number] += sum(-(-size // ALIGNMENT) * ALIGNMENT for size in sizes)
            if isinstance(linear, FrozenLinear):
                packed += sum(sizes)
            else:
                plain += sum(sizes)
    return images, plain, packed


def _frozen(linear: nn.Module) -> list[Tensor]:
    """What of a linear travels with its layer."""
    if isinstance(linear, FrozenLinear):
        return list(linear.buffers(recurse=False))
    weight = linear.weight
    assert isinstance(weight, Tensor)
    return [] if weight.requires_grad else [weight]


def _ends(model: Any, memory: MemorySection, trained: set[int]) -> tuple[int, int]:
    """Bytes of (head, embedding) in host memory; where they are one matrix it is the head's."""
    modules = [model.get_output_embeddings() if memory.head == "host" else None]
    modules.append(model.get_input_embeddings() if memory.embedding == "host" else None)
    found = []
    seen = set(trained)
    for module in modules:
        weights = [] if module is None else [p for p in module.parameters() if p.dim() > 1 and id(p) not in seen]
        seen |= {id(p) for p in weights}
        found.append(bytes_of(weights))
    return found[0], found[1]


def _workspace() -> int:
    """What cuBLAS gets from torch's allocator, for as long as the process runs: 32 MiB on Hopper, 8.1 MiB on other GPUs."""
    hopper = torch.cuda.is_available() and torch.cuda.get_device_capability()[0] >= 9
    return 32 * 1024**2 if hopper else 8 * 1024**2 + 128 * 1024


def optimizer_step_bytes(parameters: list[nn.Parameter], training: TrainingSection, device: str) -> int:
    """What AdamW takes for itself while it moves ``parameters``, beyond its moments.

    On a CPU it goes over one parameter after the other, and its arithmetic is torch's: so many tensors of its size. On a
    GPU torch's goes over a whole group at once, with one tensor for each parameter, and matrices and vectors are two
    groups; bitsandbytes' kernels take nothing.
    """
    ours = training.optimizer == "adamw" and all(p.dtype == torch.float32 for p in parameters)
    if device == "cpu" and not ours:
        each = EIGHT_BIT_STEP if training.optimizer.endswith("8bit") else BITSANDBYTES_STEP
        return max((p.numel() * (each + (4 if p.dtype.itemsize < 4 else 0)) for p in parameters), default=0)
    if not ours:
        return 0
    matrices, vectors = ([bytes_of([p]) for p in parameters if (p.dim() <= 1) is kind] for kind in (False, True))
    if device == "cpu":  # two tensors of its own size, and one of the parameter before
        return max(
            (2 * size + before for group in (matrices, vectors) for before, size in pairwise([0, *group])), default=0
        )
    return max(sum(matrices), sum(vectors))


def _moved_together(adapted: AdaptedModel, training: TrainingSection) -> dict[int | None, list[nn.Parameter]]:
    """The parameters that the optimizer moves in one call: all of them, or a layer's by its number and the others at the end."""
    trained = list(adapted.trainable_parameters().values())
    return {None: trained}


def beside_parameters(adapted: AdaptedModel) -> list[Tensor]:
    """What the methods keep for a resume that does not train, as running averages."""
    # by storage: the same memory has the same one, on meta too
    trained = {values.untyped_storage()._cdata for values in adapted.trainable_parameters().values()}
    return [kept for kept in adapted.method_state().values() if kept.untyped_storage()._cdata not in trained]


def weight_bytes(model: nn.Module, trainable: set[int]) -> tuple[int, int]:
    """(bytes of quantised linears with their scales, bytes of every other frozen weight); shared weights count once."""
    quantised = other = 0
    seen = set(trainable)
    for module in model.modules():
        packed = isinstance(module, FrozenLinear)
        for tensor in (*module.parameters(recurse=False), *module.buffers(recurse=False)):
            if id(tensor) in seen:
                continue
            seen.add(id(tensor))
            size = tensor.numel() * tensor.dtype.itemsize
            if packed:
                quantised += size
            else:
                other += size
    return quantised, other
