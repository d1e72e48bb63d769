"""Rates: how fast a machine multiplies, dequantises, copies and reads, measured here or taken from a card's data sheet.

Knows clocks, bytes and one MLP; must not know a model, a recipe or what a step asks for.
"""

from __future__ import annotations

import contextlib
import math
import os
import random
import statistics
import tempfile
import time
from collections.abc import Callable
from dataclasses import astuple, dataclass
from pathlib import Path

import torch
from torch import nn

from qlora.errors import DoesNotFitError, counted, first_line
from qlora.machine.cards import Card
from qlora.model.nf4 import Linear4bit

Shares = tuple[float, float, float]
"""(low, expected, high)"""

SHARE_OF_PEAK: Shares = (0.35, 0.50, 0.65)
"""What a card that is not here is taken to reach of its data sheet's matrix rate, over a whole layer with all that stands
between the products: an assumption. For comparison, torchtune's 8B on a 4090 comes to 64 % by its FLOP count."""
SHARE_OF_BANDWIDTH: Shares = (0.40, 0.60, 0.80)
"""The same of its memory's bandwidth, in dequantising: an assumption."""
SHARE_OF_COPIES: Shares = (0.75, 1.00, 1.10)
"""The same of what its PCIe slot mostly reaches: boards and their lanes differ."""
SHARE_OF_MLP: Shares = (0.40, 0.53, 0.70)
"""What a step on a CPU reaches of the rate of the MLP that is measured, whose weights stay in its caches. Found with a model of 135M
on 2 cores of an AMD EPYC: 0.48 to 0.62 in bf16, 0.46 to 0.60 in fp32 (``tokens_per_second`` in metrics.jsonl times
``flops_per_token`` over ``matrix_flops_per_second`` in plan.json)."""
NVME: Shares = (2e9, 3.5e9, 7e9)
"""Bytes/s of a disk that is not known: an NVMe disk from an old to a new one. An assumption."""
NARROWEST = 0.10  # what is measured within a tenth of a second is never surer than that

LITTLE, LARGE = 512, 2048  # hidden sizes of the MLP that is measured with, on a CPU and on a GPU
WIDER = 4  # its intermediate size over its hidden size
CLEARLY = 1.5
"""Times as fast as fp32 that bf16 has to be on a CPU. Processors with instructions for it reach 2.3 (AMD Zen 4) and 2.7 to 3.3
(Intel with AMX, while others use the same cores), those without stay below 0.1: what is in between decides nothing by chance."""
DISK_PARTS, DISK_BYTES = 3, 16 * 1024**2


@dataclass(frozen=True)
class Rate:
    """So much a second: what is expected, and the range that it is in."""

    low: float
    expected: float
    high: float

    @classmethod
    def around(cls, amount: float, shares: Shares) -> Rate:
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
    """FLOP/s of a decoder layer's products in the compute dtype, with all that stands between them."""
    dequantise: Rate
    """Bytes/s of dense weights made from NF4."""
    copies: Rate
    """Bytes/s from pinned host memory to the device, and as many back; on a CPU, a copy within its memory."""
    disk: Rate | None
    """Bytes/s read from a file that the page cache does not hold. None where it is not known."""
    source: str
    """Where these rates come from."""
    notes: tuple[str, ...] = ()
    """What else is to be said about them, a sentence each."""

    def __str__(self) -> str:
        rows = [
            ("matrix products", self.matrix, "FLOP/s"),
            ("dequantising", self.dequantise, "B/s"),
            ("copies", self.copies, "B/s"),
            ("disk, reading", self.disk, "B/s"),
        ]
        lines = [self.source]
        for name, rate, unit in rows:
            if rate is not None:
                low, middle, high = (f"{value / 1e9:,.{0 if value >= 1e11 else 2}f}" for value in astuple(rate))
                lines.append(f"  {name:<18}{middle:>8} G{unit}  ({low} to {high})")
        return "\n".join([*lines, *self.notes])


def rates_of(card: Card, disk: Rate | None = None) -> Rates:
    """The rates of a card that is not here: data sheet values times stated shares. ``disk`` is this machine's."""
    notes = [
        f"Assumed: {SHARE_OF_PEAK[1]:.0%} ({SHARE_OF_PEAK[0]:.0%} to {SHARE_OF_PEAK[2]:.0%}) of the data sheet's "
        f"{card.flops / 1e12:.4g} TFLOP/s, and {card.to_device / 1e9:.4g} GB/s from pinned host memory."
    ]
    if disk is None:
        disk = Rate(*NVME)
        notes.append(f"Assumed: an NVMe disk of {NVME[1] / 1e9:.2g} GB/s ({NVME[0] / 1e9:.2g} to {NVME[2] / 1e9:.2g}).")
    return Rates(
        matrix=Rate.around(card.flops, SHARE_OF_PEAK),
        # a dense number of 2 bytes is written, and half a byte read for it
        dequantise=Rate.around(card.bandwidth / (1 + 0.5159 / 2), SHARE_OF_BANDWIDTH),
        copies=Rate.around(card.to_device, SHARE_OF_COPIES),
        disk=disk,
        source=f"{card.name}, from its data sheet",
        notes=tuple(notes),
    )


def measure(device: torch.device, dtype: torch.dtype, folder: str | Path) -> Rates:
    """Measure this machine within a second or two: an MLP and dequantising in ``dtype``, copies, and the disk of ``folder``.

    Takes some 0.3 GB of the device while it lasts, and leaves nothing behind, in ``folder`` or in torch's random state.
    Raises DoesNotFitError where the device has not even that. A disk that cannot be written to is a rate of None and a note.
    """
    try:
        with torch.no_grad():
            matrix, dequantise = _arithmetic(device, dtype)
            if device.type == "cpu":
                matrix = Rate(*(rate * share for rate, share in zip(astuple(matrix), SHARE_OF_MLP, strict=True)))
            copies = _copies(device)
    except torch.OutOfMemoryError as error:
        raise DoesNotFitError(
            f"Not even the 0.3 GB that a measurement takes are free on {device}; stop what else is running there."
        ) from error
    disk, notes = measure_disk(folder)
    name = (
        torch.cuda.get_device_name(device)
        if device.type == "cuda"
        else f"CPU, {counted(torch.get_num_threads(), 'thread')}"
    )
    return Rates(matrix, dequantise, copies, disk, f"{name}, measured", notes)


def matrix_rate(device: torch.device, dtype: torch.dtype) -> float:
    """FLOP/s of a decoder's MLP on ``device``, measured within half a second: the rate that a run's speed is a share of."""
    with torch.no_grad():
        return _arithmetic(device, dtype)[0].expected


def faster_in_bf16() -> bool:
    """Whether this machine's processor has instructions for bf16 and multiplies clearly faster with them than in fp32.

    The two are measured by turns, so that whatever else runs slows both; within half a second.
    """
    if not (torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()):
        return False
    cpu = torch.device("cpu")

    def product(dtype: torch.dtype) -> Callable[[], object]:
        x, weight = (torch.ones(rows, LITTLE, dtype=dtype) for rows in (LITTLE, WIDER * LITTLE))
        return lambda: x @ weight.T

    turns = [product(dtype) for dtype in (torch.float32, torch.bfloat16)]
    plain, short = zip(
        *([statistics.median(_times(turn, cpu, budget=0)) for turn in turns] for _ in range(5)), strict=True
    )
    ratios = [one / other for one, other in zip(plain, short, strict=True)]
    return statistics.median(ratios) > CLEARLY


def _arithmetic(device: torch.device, dtype: torch.dtype) -> tuple[Rate, Rate]:
    """(FLOP/s of a decoder's MLP with its norm and sum, bytes/s dequantised)."""
    width = LARGE if device.type == "cuda" else LITTLE
    wide, rows = WIDER * width, width if device.type == "cuda" else width // 2
    draw = torch.Generator(device).manual_seed(0)  # the run's own random state stays as it is
    weight = torch.randn(wide, width, generator=draw, device=device)
    linear = Linear4bit.empty(width, wide, bias=False, quant_type="nf4", double_quant=True, compute_dtype=dtype)
    linear.place(weight.to(dtype), device)
    up = linear.dequantise(dtype)
    gate, down, x = up.clone(), up.T.contiguous(), torch.randn(rows, width, generator=draw, device=device).to(dtype)

    def mlp() -> torch.Tensor:
        normed = nn.functional.rms_norm(x, (width,))
        return x + (nn.functional.silu(normed @ gate.T) * (normed @ up.T)) @ down.T

    return (
        Rate.of(3 * 2 * rows * width * wide, _times(mlp, device)),
        Rate.of(up.nbytes, _times(lambda: linear.dequantise(dtype), device)),
    )


def _copies(device: torch.device) -> Rate:
    """Bytes/s from host memory to the device; from memory that is not pinned where the system refuses to pin any."""
    there = torch.ones((64 if device.type == "cuda" else 16) * 1024**2, dtype=torch.uint8, device=device)
    here = torch.ones_like(there, device="cpu")
    if device.type == "cuda":
        with contextlib.suppress(RuntimeError):  # in a run copies then take that time too
            here = here.pin_memory()
    return Rate.of(there.nbytes, _times(lambda: there.copy_(here, non_blocking=True), device))


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


def measure_disk(folder: str | Path) -> tuple[Rate | None, tuple[str, ...]]:
    """(bytes/s read, notes): a file without a name, written through to the disk, dropped from memory, read again."""
    place = Path(folder).absolute()
    while not place.exists():
        place = place.parent
    data = random.Random(0).randbytes(DISK_BYTES)  # a file system may compress what is not random
    target, notes, reads = bytearray(DISK_BYTES), [], []
    drop = getattr(os, "posix_fadvise", None)
    if drop is None:
        notes.append("This system cannot drop a file from memory, so the disk's reading rate is that of its cache.")
    try:
        with tempfile.TemporaryFile(dir=place) as file:
            for _ in range(DISK_PARTS):
                file.write(data)
            file.flush()
            os.fsync(file.fileno())
            file.seek(0)
            for _ in range(DISK_PARTS):
                if drop is not None:
                    drop(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
                begin = time.perf_counter()
                file.readinto(target)
                reads.append(time.perf_counter() - begin)
    except OSError as error:
        return None, (f"The disk of '{folder}' was not measured: {error.strerror or first_line(error)}.",)
    return Rate.of(DISK_BYTES, reads), tuple(notes)
