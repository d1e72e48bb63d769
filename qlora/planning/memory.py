"""Memory: what a run will hold, by kind and by place, from shapes alone.

    skeleton, recipe ─► what stays (weights, moments: counted) ─┐
                   └──► a step (dry_run.py: the code's own)  ───┴─► Estimate: bytes by kind, as a table

Three places: the device, host memory (``pinned`` is the part that is locked for copies), the disk. On a CPU the host's
memory is the device's, and there is one column. The estimate is of the moment that takes most; its kinds add up to its
total, and ``peak_phase`` names it.

Knows models on meta, dry runs and what the optimizer takes; must not know what fits, or this machine.
"""

from __future__ import annotations

import weakref
from collections.abc import Collection, Hashable, Iterable, Mapping
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor, nn

from qlora.machine.cards import WORKSPACE
from qlora.machine.disk import GIB, bytes_text
from qlora.machine.processes import BUCKET
from qlora.methods.base import AdaptedModel
from qlora.model import anatomy
from qlora.model.nf4 import Packed
from qlora.planning.dry_run import ROUNDS, DryRun, Moment, Phase, Shape, dry_run
from qlora.planning.few_layers import kinds_of, layers_of, sketch_of
from qlora.planning.shapes import image_bytes, image_pieces
from qlora.recipe import MemorySection, TrainingSection
from qlora.residence.layer_inputs import device_bytes
from qlora.residence.layers import layers_that_keep
from qlora.residence.placement import resident_layers
from qlora.training.masters import master_bytes
from qlora.training.optim import state_bytes, step_bytes
from qlora.training.passage import count_layers
from qlora.training.shares import owners, shared_out, spread_weights
from qlora.training.way import Way

RUNTIME = {"cpu": int(0.55 * GIB), "cuda": int(0.5 * GIB)}
"""What a process holds beside what is counted here: on a CPU the libraries (0.48 GiB) and what the C heap keeps of freed
tensors; on a GPU the CUDA context with its kernels, which is assumed."""
WIDE_HEAP = int(0.2 * GIB)
"""What the C heap keeps more where a CPU computes in fp32. By the quickstart's model, planned against rehearsed: bf16 1,337 and
1,331 MiB, recomputing 835 and 842; fp32 2,289 and 2,401, recomputing 1,107 and 1,053."""
FRAGMENTS = {"cpu": 0, "cuda": 4}
"""Of what comes and goes in a step, the part (one in so many) that torch's allocator reserves beside it and cannot use: on an
H100 a tenth mostly, and a quarter at most, over 11 arrangements of 8B and 70B, none with segments that expand
(benchmarks/results/2026-11-26-h100.md)."""
HOST_RUNTIME = 2 * GIB  # what a process that computes on a GPU holds in host memory: torch's CUDA libraries, the data
STAGING = 2
"""Pieces of pinned host memory between the file cache and a GPU, each as large as the largest layer (cache.py)."""

WAITING = {
    Phase.FORWARD: "layer_working_set",
    Phase.LOSS: "loss_chunk",
    Phase.BACKWARD: "layer_working_set",
    Phase.PENALTY: "penalty",
    Phase.OPTIMIZER: "optimizer_step",
}
"""By the phase of the peak, what its own bytes are called."""

Kinds = dict[str, int]
"""Bytes by kind."""


@dataclass(frozen=True)
class Estimate:
    """Bytes by kind on the device, in host memory and on the disk, at the moment that takes most on the device."""

    device: Kinds
    host: Kinds
    """Empty on a CPU, where it is the device's."""
    disk: Kinds
    peak_phase: str
    """``forward``, ``loss``, ``backward``, ``penalty`` or ``optimizer``."""
    phases: Kinds = field(default_factory=dict)
    """The most on the device in each phase of a step."""

    @property
    def total(self) -> int:
        """The most on the device at one time."""
        return sum(self.device.values())

    @property
    def allocated(self) -> int:
        """Of ``total``, what tensors take: what torch's allocator gives out on a GPU."""
        return self.total - self.device["runtime"] - self.device.get("fragments", 0)

    @property
    def step(self) -> int:
        """Of ``total``, what comes and goes in a step; the rest stays for the whole run."""
        return sum(self.device.get(kind, 0) for kind in {"gradients", "layer_inputs", *WAITING.values()})

    @property
    def host_total(self) -> int:
        """What is held in host memory; on a CPU what the device holds."""
        return sum(self.host.values()) if self.host else self.total

    @property
    def disk_total(self) -> int:
        """What is written to the disk, checkpoints left out."""
        return sum(self.disk.values())

    def as_dict(self) -> Kinds:
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
    *,
    workspace: int = WORKSPACE,
    processes: int = 1,
    sharing: int = 1,
) -> Estimate:
    """What training ``adapted`` (weights may be on meta) takes on ``device``, for rows of ``length`` tokens.

    ``packing`` says that rows hold several examples, for which a model that does not keep them apart itself has a mask
    [rows, T, T]. ``memory`` says where the frozen weights and the layer inputs wait. Of ``device`` the type counts; ``workspace`` is what cuBLAS takes on that
    GPU (``Card.workspace``). Of several ``processes``, so many of them ``sharing`` a machine, this is one.
    Evaluation is never more: it takes as many rows at once and keeps nothing.
    """
    kind = "cuda" if device.type == "cuda" else "cpu"
    stays, host, disk = holdings(adapted, training, kind, memory, processes, sharing)
    if kind == "cuda":
        stays["workspaces"], host["runtime"] = workspace, HOST_RUNTIME
    layers = count_layers(adapted, training)
    run = _dry_run(adapted, shape_of(training, length, packing, memory, layers), kind)
    inputs_away = kind == "cuda" and memory.layer_inputs == "host"
    if inputs_away:
        host["pinned_layer_inputs"] = run.inputs * run.input_bytes
    optimizer = step_bytes(adapted.trainable_parameters().values(), training.optimizer, kind)
    moments = [(moment.phase, _by_kind(moment, run, optimizer, inputs_away)) for moment in run.moments()]
    if away := trained_away(adapted, memory, processes):
        mine = largest_share(adapted.trainable_parameters(), processes)
        elsewhere = [4 * sum(values.numel() for values in others(inside, mine)) for inside in away]
        most_kept = max(kinds["gradients"] for _, kinds in moments) - sum(elsewhere) + max(elsewhere)
        for _, kinds in moments:  # of the layer at work all, of the others what this process owns
            kinds["gradients"] = min(kinds["gradients"], most_kept)
    for _, kinds in moments:
        kinds["fragments"] = sum(kinds.values()) // FRAGMENTS[kind] if FRAGMENTS[kind] else 0
    runtime = RUNTIME[kind] + (WIDE_HEAP if kind == "cpu" and adapted.base.compute_dtype.itemsize > 2 else 0)
    still = sum(stays.values()) + runtime
    phases: Kinds = {}
    for phase, kinds in moments:
        phases[phase.value] = max(phases.get(phase.value, 0), still + sum(kinds.values()))
    peak_phase, most = max(moments, key=lambda moment: sum(moment[1].values()))
    device_kinds = stays | most | {"runtime": runtime}
    return Estimate(_some(device_kinds), _some(host), _some(disk), peak_phase.value, phases)


def _by_kind(moment: Moment, run: DryRun, optimizer: int, inputs_away: bool) -> Kinds:
    """What comes and goes in a step, at one moment of it."""
    waiting = moment.held - moment.gradients
    if inputs_away:
        piece = run.input_bytes * run.shape.at_once // run.shape.rows
        here = device_bytes(moment.phase.value, moment.inputs, run.inputs, run.input_bytes, piece)
        waiting += here - moment.inputs * run.input_bytes
    more = optimizer if moment.phase is Phase.OPTIMIZER else moment.more
    return {"gradients": moment.gradients, "layer_inputs": waiting, WAITING[moment.phase]: more}


def _some(kinds: Kinds) -> Kinds:
    """Without those that are 0."""
    return {kind: count for kind, count in kinds.items() if count}


def shape_of(training: TrainingSection, length: int, packing: bool, memory: MemorySection, layers: int) -> Shape:
    """What a step puts through a model of so many layers."""
    at_once = min(training.micro_batch_size, training.batch_size)
    way = Way.of(training, layers)
    together, boundary = way.layer_major, way.behind_boundary(layers, training.batch_size)
    away = set(range(layers)) - resident_layers(memory.layers, layers)
    return Shape(
        rows=training.batch_size if together else at_once,
        at_once=at_once,
        length=length,
        passes=1 if together else min(-(-training.batch_size // at_once), ROUNDS),
        chunk=training.loss_chunk,
        kept=layers_that_keep(way.kept, layers, away) if boundary else None,
        packed=packing,
        mlp_tile=memory.mlp_tile,
        embedding_on_host=memory.embedding == "host",
        head_on_host=memory.head == "host",
    )


_SKETCHES: weakref.WeakKeyDictionary[AdaptedModel, Hashable] = weakref.WeakKeyDictionary()
_DONE: dict[tuple[Hashable, Shape, str], DryRun] = {}


def _dry_run(adapted: AdaptedModel, shape: Shape, device: str) -> DryRun:
    """``dry_run``, once a process for each shape of models that are alike; where some layers keep and some do not, once for any
    number of them."""
    if adapted not in _SKETCHES:
        _SKETCHES[adapted] = sketch_of(adapted)
    count = len(layers_of(adapted.model))
    half = layers_that_keep(count // 2, count)
    if shape.kept and len(shape.kept) < count and shape.kept != half:
        run = _dry_run(adapted, replace(shape, kept=half), device)
        ran = dict(zip(kinds_of(adapted, half), run.place, strict=True))
        kinds = kinds_of(adapted, shape.kept)
        if ran.keys() >= set(kinds):
            return replace(run, place=[ran[kind] for kind in kinds])
    key = _SKETCHES[adapted], shape, device
    if key not in _DONE:
        _DONE[key] = dry_run(adapted, shape, device)
    return _DONE[key]


# ── what stays for the whole run ──────────────────────────────────────────────────────────────────────────────────────


def holdings(
    adapted: AdaptedModel,
    training: TrainingSection,
    device: str,
    memory: MemorySection,
    processes: int = 1,
    sharing: int = 1,
) -> tuple[Kinds, Kinds, Kinds]:
    """What stays for the whole run: (on the device, in host memory, on the disk). On a CPU the host's is the device's."""
    trained = adapted.trainable_parameters()
    # what the methods keep for a resume that does not train, as running averages; by storage: the same memory has the same one
    of_trained = {values.untyped_storage()._cdata for values in trained.values()}
    beside = [v for v in adapted.method_state().values() if v.untyped_storage()._cdata not in of_trained]
    elsewhere = {values.untyped_storage()._cdata for values in beside}  # PiSSA keeps these in its layers
    counted = {id(values) for values in adapted.model.buffers() if values.untyped_storage()._cdata in elsewhere}
    quantised, other = weight_bytes(adapted.model, counted | {id(p) for p in trained.values()})
    packed, plain, slots, host, disk = _streamed(adapted.model, memory, device)
    # layers in host memory are there once for all who share it
    host = {kind: -(-count // sharing) if kind.endswith("layers") else count for kind, count in host.items()}
    parts = -(-host.pop("parts", 0) // processes)
    sums = min(BUCKET, sum(4 * p.numel() for p in trained.values())) if processes > 1 else 0
    head, embedding = _ends(adapted.model, memory, {id(p) for p in trained.values()})
    host |= {"pinned_head" if device == "cuda" else "head": head, "embedding": embedding}
    mine = largest_share(trained, processes) if processes > 1 and shared_out(adapted) else trained
    away = trained_away(adapted, memory, processes)
    states = [state_bytes(p.numel(), training.optimizer) for p in mine.values()]
    optimizer = sum(states)
    if device == "cuda" and training.optimizer.startswith("paged"):  # it comes by itself, one matrix at a time
        host["paged_optimizer"], optimizer = optimizer, max(states, default=0)
    kinds = {
        "quantised_weights": quantised - packed,
        "layer_slots": slots or 2 * max((_bytes(others(inside, mine)) for inside in away), default=0),
        "layer_parts": parts,
        "other_weights": other - plain - head - embedding,
        "adapter": _bytes(trained.values()) - sum(_bytes(others(inside, mine)) for inside in away),
        "masters": master_bytes(mine.values()),
        "optimizer": optimizer,
        "gradient_sums": sums,
        "method_state": sum(values.nbytes for values in beside),
    }
    if device == "cpu":
        return kinds | {f"host_{kind}": count for kind, count in host.items()}, {}, disk
    return kinds, host, disk


def trained_away(adapted: AdaptedModel, memory: MemorySection, processes: int) -> list[dict[str, nn.Parameter]]:
    """The parameters of each layer that trains and is spread over the processes; none where layers stay, or are frozen."""
    return list(spread_weights(adapted, memory).values()) if processes > 1 else []


def others(inside: Mapping[str, Tensor], mine: Collection[str]) -> list[Tensor]:
    """Of these parameters those that are not ``mine``."""
    return [values for name, values in inside.items() if name not in mine]


def _bytes(tensors: Iterable[Tensor]) -> int:
    return sum(values.nbytes for values in tensors)


def largest_share(trained: Mapping[str, Tensor], processes: int) -> dict[str, Tensor]:
    """Of which parameters the process keeps masters and moments that has most of them."""
    owner = owners(trained, processes)
    shares = [{name: p for name, p in trained.items() if owner[name] == rank} for rank in range(processes)]
    return max(shares, key=lambda share: sum(p.numel() for p in share.values()))


def _streamed(model: nn.Module, memory: MemorySection, device: str) -> tuple[int, int, int, Kinds, Kinds]:
    """For the layers that do not stay: (bytes of quantised weights, of plain ones, of the slots, in host memory, on the disk).

    ``parts`` of what is in host memory are on the devices of all processes instead.
    """
    layers = [] if memory.layers == "resident" else list(anatomy.layers(model))
    away = sorted(set(range(len(layers))) - resident_layers(memory.layers, len(layers)))
    if not away:
        return 0, 0, 0, {}, {}
    pieces = [piece for number in away for piece in image_pieces(layers[number])]
    packed = sum(piece.bytes for piece in pieces if isinstance(piece.linear, Packed))
    plain = sum(piece.bytes for piece in pieces) - packed
    images = [image_bytes(layers[number]) for number in away]
    slots = min(memory.slots, len(away)) * max(images)
    if memory.tier == "host":
        return packed, plain, slots, {"pinned_layers" if device == "cuda" else "layers": sum(images)}, {}
    if memory.tier == "processes":
        return packed, plain, slots, {"parts": sum(images)}, {}
    file = {"file_cache": sum(image_bytes(layer) for layer in layers)}
    return packed, plain, slots, {"pinned_staging": STAGING * max(images)} if device == "cuda" else {}, file


def _ends(model: nn.Module, memory: MemorySection, trained: set[int]) -> tuple[int, int]:
    """Bytes of (head, embedding) in host memory; where they are one matrix it is the head's."""
    modules = [anatomy.head(model) if memory.head == "host" else None]
    modules.append(anatomy.embedding(model) if memory.embedding == "host" else None)
    found = []
    seen = set(trained)
    for module in modules:
        weights = [] if module is None else [p for p in module.parameters() if p.dim() > 1 and id(p) not in seen]
        seen |= {id(p) for p in weights}
        found.append(sum(values.nbytes for values in weights))
    return found[0], found[1]


def weight_bytes(model: nn.Module, trainable: set[int]) -> tuple[int, int]:
    """(bytes of quantised linears with their scales, bytes of every other frozen weight); shared weights count once."""
    quantised = other = 0
    seen = set(trainable)
    for module in model.modules():
        for tensor in (*module.parameters(recurse=False), *module.buffers(recurse=False)):
            if id(tensor) in seen:
                continue
            seen.add(id(tensor))
            if isinstance(module, Packed):
                quantised += tensor.nbytes
            else:
                other += tensor.nbytes
    return quantised, other
