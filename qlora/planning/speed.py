"""The machine: how fast it is, what a step asks of it, and so how long the step will take.

    measure(here) or rates_of(card) ─► Rates ─┐
                                              ├─► step_seconds ─► Seconds, with a range
    work_of(skeleton with its method) ─► Work ┘

A step is four passes: forward, loss, backward, update. Within a pass, copies and reads run beside the arithmetic, so that
the slower of them counts; one pass does not begin another's copies. What therefore no arithmetic hides: a pass that has
more to bring than to compute; and the first layers of a run's very first step, which is not counted here, since from then
on each pass begins with the layers that the one before left in the slots.

Shorthand, per token and in numbers: N the linears of the decoder layers, N_h the head, N_a what trains in the layers, L
layers, d hidden size, f intermediate size, k width of keys, a width of attention, s length of a row, V vocabulary.

    FLOPs a token           forward            loss                   backward           and with recompute
    frozen linears          2 N                –                      2 N                + 2 N, less each layer's last
    head                    –                  4 N_h (6 if it trains) –                  –
    what trains             2 N_a              –                      4 N_a              + 2 N_a
    attention, causal       2 L·a·s            –                      4 L·a·s            + 2 L·a·s

Knows shapes, clocks and bytes; must not know what fits, a recipe's whole, or which arrangement is best.
"""

from __future__ import annotations

import math
import os
import random
import statistics
import tempfile
import time
import weakref
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from qlora.errors import DoesNotFitError, ModelError, RecipeError, first_line
from qlora.machine.cards import Card
from qlora.machine.device import bytes_text
from qlora.methods import AdaptedModel
from qlora.model.nf4 import FrozenLinear, Linear4bit, features, is_linear
from qlora.recipe import MemorySection, TrainingSection
from qlora.residence.image import Image
from qlora.residence.layers import decoder_layers
from qlora.residence.placement import resident_layers

# --- how fast -------------------------------------------------------------------------------------------------------------

SHARE_OF_PEAK = (0.35, 0.50, 0.65)
"""What a card that is not here is taken to reach of its data sheet's matrix rate, over a whole layer with all that stands
between the products: an assumption. For comparison, torchtune's
8B on a 4090 comes to 64 % by its FLOP count."""
SHARE_OF_BANDWIDTH = (0.40, 0.60, 0.80)
"""The same of its memory's bandwidth, in dequantising: an assumption."""
SHARE_OF_COPIES = (0.75, 1.00, 1.10)
"""The same of what its PCIe slot mostly reaches: boards and their lanes differ."""
PAGEABLE = (0.15, 0.25, 0.50)
"""Copies from memory that is not pinned, over those from pinned memory: an assumption around a published 1 / 6.6."""
NVME = (2e9, 3.5e9, 7e9)
"""Bytes/s of a disk that is not known: an NVMe disk from an old to a new one. An assumption."""
NARROWEST = 0.10  # what is measured within a tenth of a second is never surer than that

LITTLE, LARGE = 1024, 4096  # sides of the matrix that is measured with, on a CPU and on a GPU
DISK_PARTS, DISK_BYTES = 3, 16 * 1024**2


@dataclass(frozen=True)
class Rate:
    """So much a second: what is expected, and the range that it is in."""

    low: float
    expected: float
    high: float

    @classmethod
    def around(cls, amount: float, shares: tuple[float, float, float]) -> Rate:
        """``amount`` times a low, an expected and a high share."""
        return cls(*(amount * share for share in shares))

    @classmethod
    def of(cls, amount: float, seconds: list[float]) -> Rate:
        """``amount`` in each of these times: by the median, from the slowest to the fastest."""
        middle = amount / statistics.median(seconds)
        low, high = amount / max(seconds), amount / min(seconds)
        return cls(min(low, (1 - NARROWEST) * middle), middle, max(high, (1 + NARROWEST) * middle))


@dataclass(frozen=True)
class Rates:
    """How fast a machine is."""

    matrix: Rate
    """FLOP/s of a product in the shape of a decoder's linear, in the compute dtype."""
    dequantise: Rate
    """Bytes/s of dense weights made from NF4."""
    elementwise: Rate | None
    """Bytes/s read and written by what stands between the products; None where ``matrix`` contains that."""
    to_device: Rate
    """Bytes/s from pinned host memory; on a CPU, a copy within its memory."""
    to_device_pageable: Rate
    """The same from memory that is not pinned."""
    to_host: Rate
    """Bytes/s from the device into pinned host memory."""
    disk_read: Rate | None
    """Bytes/s of a file that the page cache does not hold: what it does hold comes faster. None where it is not known."""
    disk_write: Rate | None
    """Bytes/s, until they are on the disk."""
    source: str
    """Where these rates come from."""
    notes: tuple[str, ...] = ()
    """What is not as one would think, a sentence each."""

    def __str__(self) -> str:
        rows = [
            ("matrix products", self.matrix, "FLOP/s"),
            ("dequantising", self.dequantise, "B/s"),
            ("between products", self.elementwise, "B/s"),
            ("host to device", self.to_device, "B/s"),
            ("  not pinned", self.to_device_pageable, "B/s"),
            ("device to host", self.to_host, "B/s"),
            ("disk, reading", self.disk_read, "B/s"),
            ("disk, writing", self.disk_write, "B/s"),
        ]
        lines = [self.source]
        for name, rate, unit in rows:
            if rate is not None:
                low, middle, high = (f"{value / 1e9:.3g}" for value in (rate.low, rate.expected, rate.high))
                lines.append(f"  {name:<18}{middle:>8} G{unit}  ({low} to {high})")
        return "\n".join([*lines, *self.notes])


def rates_of(card: Card, here: Rates | None = None) -> Rates:
    """The rates of a card that is not here: data sheet values times stated shares. ``here`` lends the disk of this machine."""
    read, written = (here.disk_read, here.disk_write) if here else (None, None)
    notes = [
        f"Assumed: {SHARE_OF_PEAK[1]:.0%} ({SHARE_OF_PEAK[0]:.0%} to {SHARE_OF_PEAK[2]:.0%}) of the data sheet's "
        f"{card.flops / 1e12:.4g} TFLOP/s, and {card.to_device / 1e9:.4g} GB/s from pinned host memory."
    ]
    if read is None or written is None:
        notes.append(f"Assumed: an NVMe disk of {NVME[1] / 1e9:.2g} GB/s ({NVME[0] / 1e9:.2g} to {NVME[2] / 1e9:.2g}).")
    # a dense number of 2 bytes is written, and half a byte read for it
    dequantised = card.bandwidth / (1 + 0.5159 / 2)
    to_device = Rate.around(card.to_device, SHARE_OF_COPIES)
    return Rates(
        matrix=Rate.around(card.flops, SHARE_OF_PEAK),
        dequantise=Rate.around(dequantised, SHARE_OF_BANDWIDTH),
        elementwise=None,
        to_device=to_device,
        to_device_pageable=Rate.around(card.to_device, PAGEABLE),
        to_host=to_device,
        disk_read=read or Rate(*NVME),
        disk_write=written or Rate(*NVME),
        source=f"{card.name}, from its data sheet",
        notes=tuple(notes),
    )


def measure(device: torch.device, dtype: torch.dtype, folder: str | Path) -> Rates:
    """Measure this machine within a second or two: products and dequantising in ``dtype``, copies, and the disk of ``folder``.

    Takes some 0.3 GB of the device while it lasts, and leaves nothing behind, in ``folder`` or in torch's random state.
    Raises DoesNotFitError where the device has not even that. A disk that cannot be written to is a rate of None and a note.
    """
    try:
        with torch.no_grad():
            matrix, dequantise, elementwise = _arithmetic(device, dtype)
            to_device, pageable, to_host, notes = _copies(device)
    except torch.OutOfMemoryError as error:
        raise DoesNotFitError(
            f"Not even the 0.3 GB that a measurement takes are free on {device}; stop what else is running there."
        ) from error
    read, written, about = _disk(Path(folder))
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else f"CPU, {torch.get_num_threads()} threads"
    return Rates(
        matrix,
        dequantise,
        elementwise,
        to_device,
        pageable,
        to_host,
        read,
        written,
        f"{name}, measured",
        (*notes, *about),
    )


def _arithmetic(device: torch.device, dtype: torch.dtype) -> tuple[Rate, Rate, Rate]:
    """(FLOP/s of a product, bytes/s dequantised, bytes/s of an addition)."""
    side = LARGE if device.type == "cuda" else LITTLE
    rows = side // 2 if device.type == "cuda" else side // 4
    draw = torch.Generator(device).manual_seed(0)  # the run's own random state stays as it is
    weight = torch.randn(side, side, generator=draw, device=device)
    x = torch.randn(rows, side, generator=draw, device=device).to(dtype)
    linear = Linear4bit.empty(side, side, bias=False, quant_type="nf4", double_quant=True, compute_dtype=dtype)
    linear.place(weight.to(dtype), device)
    dense = linear.dequantise(dtype)
    # twice the matrix is out of the caches of most CPUs, and of a GPU's
    one, two, three = (torch.ones(2 * side * side, dtype=dtype, device=device) for _ in range(3))
    return (
        Rate.of(2 * rows * side * side, _times(lambda: torch.nn.functional.linear(x, dense), device)),
        Rate.of(dense.nbytes, _times(lambda: linear.dequantise(dtype), device)),
        Rate.of(3 * one.nbytes, _times(lambda: torch.add(one, two, out=three), device)),
    )


def _copies(device: torch.device) -> tuple[Rate, Rate, Rate, list[str]]:
    """(host to device, the same without pinning, device to host, notes), in bytes/s."""
    count = (64 if device.type == "cuda" else 16) * 1024**2
    there = torch.ones(count, dtype=torch.uint8, device=device)
    plain = torch.ones(count, dtype=torch.uint8)
    pageable = Rate.of(count, _times(lambda: there.copy_(plain), device))
    if device.type != "cuda":
        return pageable, pageable, pageable, []
    try:
        pinned = torch.ones(count, dtype=torch.uint8, pin_memory=True)
    except RuntimeError as error:
        note = f"The system refuses to pin host memory ({first_line(error)}), so copies take the time that they take without."
        return pageable, pageable, Rate.of(count, _times(lambda: plain.copy_(there), device)), [note]
    down = _times(lambda: there.copy_(pinned, non_blocking=True), device)
    up = _times(lambda: pinned.copy_(there, non_blocking=True), device)
    return Rate.of(count, down), pageable, Rate.of(count, up), []


def _times(work: Callable[[], object], device: torch.device, budget: float = 0.1) -> list[float]:
    """Seconds of ``work``, measured 3 to 9 times over about ``budget`` seconds. Short work is done several times at once."""

    def timed(times: int) -> float:
        begin = time.perf_counter()
        for _ in range(times):
            work()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        return (time.perf_counter() - begin) / times

    timed(1)  # warms up: libraries choose their kernels, the allocator finds its memory
    times = max(1, min(100, math.ceil(0.004 / max(timed(1), 1e-9))))
    found: list[float] = []
    until = time.perf_counter() + budget
    while len(found) < 3 or (len(found) < 9 and time.perf_counter() < until):
        found.append(timed(times))
    return found


def _disk(folder: Path) -> tuple[Rate | None, Rate | None, list[str]]:
    """(reading, writing, notes): a file without a name, written through to the disk, dropped from memory, read again."""
    place = folder.absolute()
    while not place.exists():
        place = place.parent
    data = random.Random(0).randbytes(DISK_BYTES)  # a file system may compress what is not random
    target = bytearray(DISK_BYTES)
    writes, reads, notes = [], [], []
    try:
        with tempfile.TemporaryFile(dir=place, buffering=0) as file:
            for _ in range(DISK_PARTS):
                begin = time.perf_counter()
                rest = memoryview(data)
                while rest:
                    rest = rest[file.write(rest) :]
                os.fsync(file.fileno())
                writes.append(time.perf_counter() - begin)
            drop = getattr(os, "posix_fadvise", None)
            if drop is None:
                notes.append(
                    "This system cannot drop a file from memory, so the disk's reading rate is that of its cache."
                )
            for part in range(DISK_PARTS):
                if drop is not None:
                    drop(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
                file.seek(part * DISK_BYTES)
                begin = time.perf_counter()
                view = memoryview(target)
                while view and (count := file.readinto(view)):
                    view = view[count:]
                reads.append(time.perf_counter() - begin)
    except OSError as error:
        note = f"The disk of '{folder}' was not measured: {error.strerror or first_line(error)}."
        return None, None, [note]
    return Rate.of(DISK_BYTES, reads), Rate.of(DISK_BYTES, writes), notes


# --- how much -------------------------------------------------------------------------------------------------------------

# What a token reads and writes between a layer's products, in numbers: two norms (15 of d each, in fp32 for half of it),
# two residual sums (3 each), attention's copies and the gradients' sums (14 of d); turning queries and keys (10 of a and
# of k); silu and its product (5 of f). An adapter adds to what its linear gave, in place: 3 of every output. From the code of
# Llama in transformers.
OF_D, OF_TURNED, OF_F, OF_ADAPTED = 50, 10, 5, 3
OF_LOGITS = 40  # bytes that the loss moves for each logit: product, fp32, logsumexp, softmax, back to the head's dtype
OF_PARAMETER = 32  # bytes that AdamW and the clipping move for each number that trains, in fp32

# Where a family normalises after the MLP, the last product is read, and the recompute does it again (residence/layers.py).
READ_AGAIN = ("post_feedforward_layernorm", "post_mlp_layernorm")


@dataclass(frozen=True)
class Shapes:
    """What of an adapted model decides how much a step computes and moves. Counts of numbers, in all layers together."""

    blocks: int
    """N, in the frozen linears of the decoder layers."""
    packed: int
    """How many of them are quantised."""
    left_out: int
    """How many of them a recompute does not multiply with: each layer's last linear, where only the output reads it."""
    trained: int
    """N_a, in the matrices that train inside the layers."""
    parameters: int
    """All that trains."""
    head: int
    """N_h."""
    head_trains: bool
    layers: int
    with_graph: int
    """Layers that a gradient goes through, from the last one down."""
    d: int
    f: int
    k: int
    a: int
    adapted: int
    """Outputs of the linears that an adapter stands at, in all layers."""
    image_bytes: tuple[int, ...]
    """By layer, what travels when it is streamed."""


@dataclass(frozen=True)
class Pass:
    """What one pass of a step asks for: bytes, and FLOPs."""

    flops: float = 0.0
    dequantised: float = 0.0
    """Dense weights made from packed ones."""
    elementwise: float = 0.0
    """Read and written between the products."""
    to_device: float = 0.0
    to_host: float = 0.0
    read: float = 0.0
    """From the disk."""
    written: float = 0.0
    """To the disk."""


@dataclass(frozen=True)
class Work:
    """What one optimizer step asks for, pass by pass."""

    tokens: int
    forward: Pass
    loss: Pass
    backward: Pass
    update: Pass

    @property
    def passes(self) -> dict[str, Pass]:
        """By name, in their order."""
        return {"forward": self.forward, "loss": self.loss, "backward": self.backward, "update": self.update}

    def total(self, kind: str) -> float:
        """All passes' ``flops``, ``dequantised``, ``to_device``, …"""
        return float(sum(getattr(one, kind) for one in self.passes.values()))


def shapes_of(adapted: AdaptedModel) -> Shapes:
    """Count ``adapted``, whose weights may be on meta and whose layers must not be wrapped yet."""
    model: Any = adapted.model
    config = model.config
    try:
        layers = list(decoder_layers(model))
    except ModelError:  # they stand in no list: the decoder counts as one of so many equal parts
        layers = [model.get_decoder()]
    depth = config.num_hidden_layers
    trainable = adapted.trainable_parameters()
    ids = {id(values) for values in trainable.values()}
    head = model.get_output_embeddings()
    blocks = packed = left_out = trained = adapted_outputs = 0
    planted = {id(getattr(layer, "base", None)) for layer in adapted.layers()}
    for layer in layers:
        frozen = [m for m in layer.modules() if is_linear(m) and not _trains(m, ids)]
        sizes = [math.prod(features(linear)) for linear in frozen]
        blocks += sum(sizes)
        packed += sum(size for size, linear in zip(sizes, frozen, strict=True) if isinstance(linear, FrozenLinear))
        if sizes and isinstance(frozen[-1], FrozenLinear) and not any(hasattr(layer, name) for name in READ_AGAIN):
            left_out += sizes[-1]
        trained += sum(p.numel() for p in layer.parameters() if id(p) in ids and p.dim() > 1)
        adapted_outputs += sum(features(m)[0] for m in layer.modules() if is_linear(m) and id(m) in planted)
    d = config.hidden_size
    heads = config.num_attention_heads
    width = getattr(config, "head_dim", None) or d // heads
    return Shapes(
        blocks=blocks,
        packed=packed,
        left_out=left_out,
        trained=trained,
        parameters=sum(values.numel() for values in trainable.values()),
        head=math.prod(features(head)) if is_linear(head) else config.vocab_size * d,
        head_trains=_trains(head, ids),
        layers=depth,
        with_graph=depth - _without_graph(model, layers, ids) * depth // len(layers),
        d=d,
        f=getattr(config, "intermediate_size", None) or 4 * d,
        k=(getattr(config, "num_key_value_heads", None) or heads) * width,
        a=heads * width,
        adapted=adapted_outputs,
        image_bytes=tuple(Image(layer).bytes * len(layers) // depth for layer in layers) * (depth // len(layers)),
    )


_COUNTED: weakref.WeakKeyDictionary[AdaptedModel, Shapes] = weakref.WeakKeyDictionary()


def work_of(
    adapted: AdaptedModel,
    training: TrainingSection,
    memory: MemorySection,
    length: int,
    *,
    dtype_bytes: int,
    packing: bool = False,
) -> Work:
    """What an optimizer step of full rows of ``length`` tokens asks for, from shapes alone. ``adapted`` may be on meta.

    ``dtype_bytes`` are those of a compute number; ``packing`` says that rows hold several examples, whose mask makes
    attention compute every pair of positions. Every token counts as a target. Not counted: what a method computes from
    whole weights (DoRA's norms), and attention windows, which compute less.
    """
    if adapted not in _COUNTED:
        _COUNTED[adapted] = shapes_of(adapted)
    return work_of_shapes(_COUNTED[adapted], training, memory, length, dtype_bytes=dtype_bytes, packing=packing)


def work_of_shapes(
    shapes: Shapes,
    training: TrainingSection,
    memory: MemorySection,
    length: int,
    *,
    dtype_bytes: int,
    packing: bool = False,
) -> Work:
    """``work_of`` for a model that is counted already, as one that is asked about in many arrangements."""
    recomputed, c, tokens = training.gradient_checkpointing, dtype_bytes, training.batch_size * length
    micro_batches = -(-training.batch_size // training.micro_batch_size)
    layer_major = recomputed and training.accumulation == "layer_major"
    turns = 1 if layer_major else micro_batches  # how often the layers are gone through, up and down
    deep = shapes.with_graph / shapes.layers

    attention = (4 if packing else 2) * shapes.layers * shapes.a * length
    forward = 2 * shapes.blocks + 2 * shapes.trained + attention
    backward = deep * (2 * shapes.blocks + 2 * attention) + 4 * shapes.trained
    if recomputed:
        backward += deep * (2 * (shapes.blocks - shapes.left_out) + attention) + 2 * shapes.trained
    # a head in slices has the logits made twice: for their sum, and for the gradient (model/loss.py)
    sweeps = 1 + (memory.head == "host" and not shapes.head_trains)
    loss = (2 * sweeps + 2 * (shapes.with_graph > 0) + 2 * shapes.head_trains) * shapes.head

    # a visit keeps the dense weights for all its micro-batches; with one alone they are made for each product
    up, down = float(turns), float(turns) * deep
    if recomputed and not (layer_major and micro_batches > 1):
        down *= 2 - shapes.left_out / max(1, shapes.packed)

    between = shapes.layers * (OF_D * shapes.d + OF_TURNED * (shapes.a + shapes.k) + OF_F * shapes.f)
    between = tokens * c * (between + OF_ADAPTED * shapes.adapted)

    to_device, read = _fetched(shapes, memory)
    kept = tokens * c * shapes.d * shapes.with_graph if recomputed and memory.layer_inputs != "device" else 0
    on_disk = kept if memory.layer_inputs == "disk" else 0
    rows = tokens * c * shapes.d if memory.embedding == "host" else 0
    head = 2 * turns * c * shapes.head if memory.head == "host" else 0
    return Work(
        tokens=tokens,
        forward=Pass(
            flops=tokens * forward,
            dequantised=up * c * shapes.packed,
            elementwise=between,
            to_device=turns * to_device[0] + rows,
            to_host=kept,
            read=turns * read[0],
            written=on_disk,
        ),
        loss=Pass(
            flops=tokens * loss, elementwise=sweeps * tokens * OF_LOGITS * shapes.head / shapes.d, to_device=head
        ),
        backward=Pass(
            flops=tokens * backward,
            dequantised=down * c * shapes.packed,
            elementwise=between * deep * (3 if recomputed else 2),
            to_device=turns * to_device[1] + kept,
            read=turns * read[1] + on_disk,
        ),
        update=Pass(elementwise=OF_PARAMETER * shapes.parameters),
    )


def _fetched(shapes: Shapes, memory: MemorySection) -> tuple[tuple[float, float], tuple[float, float]]:
    """((bytes to the device, up and down), (bytes from the disk, up and down)) of one turn through the layers.

    Each way begins with the layers that the other one left in the slots.
    """
    stay = resident_layers(memory.layers, shapes.layers)
    away = [layer for layer in range(shapes.layers) if layer not in stay]
    ways = []
    for visited in (away, [layer for layer in away if layer >= shapes.layers - shapes.with_graph]):
        size = sum(shapes.image_bytes[layer] for layer in visited)
        ways.append(size * max(0, len(visited) - memory.slots) / max(1, len(visited)))
    up, down = ways
    return (up, down), ((up, down) if memory.tier == "disk" else (0.0, 0.0))


def _without_graph(model: Any, layers: list[nn.Module], ids: set[int]) -> int:
    """How many layers from the first on have nothing that trains in them or before them: no gradient goes so far down.

    ``ids`` are of what trains. Outside of the layers and the head, a vector is the last norm's, behind them.
    """
    inside = {id(values) for module in (*layers, model.get_output_embeddings()) for values in module.parameters()}
    rest = [p for p in model.parameters() if id(p) in ids and id(p) not in inside]
    if _trains(model.get_input_embeddings(), ids) or any(values.dim() > 1 for values in rest):
        return 0
    holding = (n for n, layer in enumerate(layers) if any(id(values) in ids for values in layer.parameters()))
    return next(holding, len(layers))


def _trains(module: nn.Module, ids: set[int]) -> bool:
    return any(id(values) in ids for values in module.parameters(recurse=False))


# --- how long -------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Seconds:
    """How long a step takes."""

    expected: float
    low: float
    """With every rate at its best, and copies beside the arithmetic."""
    high: float
    """With every rate at its worst, and nothing beside anything else."""
    bound: str
    """What takes most of it: ``arithmetic``, ``copies to the device``, ``copies to the host`` or ``the disk``."""

    def __str__(self) -> str:
        return f"{self.expected:.3g} s a step ({self.low:.3g} to {self.high:.3g}), bound by {self.bound}"


def step_seconds(work: Work, rates: Rates) -> Seconds:
    """How long ``work`` takes on a machine of these ``rates``.

    Raises RecipeError where it reads or writes a disk whose speed is not known.
    """
    expected = low = high = 0.0
    bounds: dict[str, float] = {}
    for one in work.passes.values():
        parts = _parts(one, rates, "expected")
        longest = max(parts, key=lambda kind: parts[kind])
        bounds[longest] = bounds.get(longest, 0.0) + parts[longest]
        expected += parts[longest]
        low += max(_parts(one, rates, "high").values())
        high += sum(_parts(one, rates, "low").values())
    return Seconds(expected, low, high, max(bounds, key=lambda kind: bounds[kind]))


def _parts(one: Pass, rates: Rates, end: str) -> dict[str, float]:
    """Seconds of what runs side by side, with every rate at its ``low``, ``expected`` or ``high``."""

    def seconds(amount: float, rate: Rate | None) -> float:
        if not amount:
            return 0.0
        if rate is None:
            raise RecipeError(
                f"{bytes_text(amount)} a step go through the disk, whose speed is not known. {' '.join(rates.notes)} Give a "
                "folder that can be written to, or leave memory.tier and memory.layer_inputs off the disk."
            )
        return float(amount / getattr(rate, end))

    between = one.elementwise if rates.elementwise is not None else 0.0
    return {
        "arithmetic": seconds(one.flops, rates.matrix)
        + seconds(one.dequantised, rates.dequantise)
        + seconds(between, rates.elementwise),
        "copies to the device": seconds(one.to_device, rates.to_device),
        "copies to the host": seconds(one.to_host, rates.to_host),
        "the disk": seconds(one.read, rates.disk_read) + seconds(one.written, rates.disk_write),
    }
