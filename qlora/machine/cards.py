"""Cards: what graphics cards that need not be here can hold and do, and how people write amounts of memory.

    card("rtx 4090") → Card(24 GB, of which torch sees 23.5 GiB, 165 TFLOP/s, …)        parse_memory("24GiB") → bytes

Nothing here was measured by us. Arithmetic and bandwidth are data sheet values as they are commonly quoted, for dense 16-bit
matrices summed up in fp32, which GeForce cards do at half the rate that is advertised; figures "with sparsity" are halved.
They were compared with public tables for the 4090, 5090, L4 and A10 alone: correct the one that you know better. What torch
reports as a card's total is from users' reports for T4, 4090, 5090 and A100-40, and set beside these for the others.

Knows names and numbers; must not know models, or what is in this machine.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType

from qlora.errors import RecipeError, listed, nearest
from qlora.machine.disk import GIB

WORKSPACE, WORKSPACE_OF_9 = 8 * 1024**2 + 128 * 1024, 32 * 1024**2
"""Bytes that torch gives cuBLAS for as long as the process runs: on GPUs before compute capability 9 (Hopper), and since."""
AMPERE = 8.0
"""The compute capability that bf16 and FlashAttention begin with."""
PCIE_3, PCIE_4, PCIE_5 = 12e9, 25e9, 50e9
"""Bytes/s that copies from pinned memory reach over 16 lanes: some 76 to 80 % of the 15.8, 31.5 and 63 GB/s on paper."""


@dataclass(frozen=True)
class Card:
    """One graphics card."""

    name: str
    gigabytes: int
    """What it is sold as; of memory chips vendors' gigabytes are GiB."""
    memory: int
    """Bytes that torch reports as its total: what is left beside the driver's own part and, on server cards, error
    correction. On the low side, since newer drivers keep up to 0.2 GiB more than older ones."""
    capability: float
    """CUDA's compute capability, which says what the hardware has."""
    flops: float
    """FLOP/s at the peak, dense, 16 bits in and fp32 sums."""
    bandwidth: float
    """Bytes/s of its own memory, at the peak."""
    to_device: float
    """Bytes/s from pinned host memory that are reached in practice."""

    @property
    def dtype(self) -> str:
        """``bf16``, or ``fp16`` where the hardware has no bf16."""
        return "bf16" if self.capability >= AMPERE else "fp16"

    @property
    def workspace(self) -> int:
        """Bytes that cuBLAS takes for the whole run."""
        return workspace_bytes(self.capability)


def _card(
    name: str, gigabytes: int, seen: float, capability: float, tera: float, giga: float, to_device: float
) -> Card:
    return Card(name, gigabytes, int(seen * GIB), capability, tera * 1e12, giga * 1e9, to_device)


# name, sold as GB, GiB that torch sees, compute capability, peak TFLOP/s, GB/s of its memory, bytes/s over PCIe
_ALL = (
    _card("T4", 16, 14.56, 7.5, 65.0, 320, PCIE_3),
    _card("V100-16", 16, 15.77, 7.0, 125.0, 900, PCIE_3),
    _card("V100-32", 32, 31.73, 7.0, 125.0, 900, PCIE_3),
    _card("2080-Ti", 11, 10.57, 7.5, 53.8, 616, PCIE_3),
    _card("3060-12", 12, 11.63, 8.6, 25.5, 360, PCIE_4),
    _card("3070", 8, 7.65, 8.6, 40.6, 448, PCIE_4),
    _card("3080-10", 10, 9.64, 8.6, 59.5, 760, PCIE_4),
    _card("3090", 24, 23.55, 8.6, 71.0, 936, PCIE_4),
    _card("3090-Ti", 24, 23.55, 8.6, 80.0, 1008, PCIE_4),
    _card("4060", 8, 7.62, 8.9, 30.2, 272, PCIE_4 / 2),  # eight lanes, as the next one
    _card("4060-Ti-16", 16, 15.57, 8.9, 44.1, 288, PCIE_4 / 2),
    _card("4070", 12, 11.60, 8.9, 58.3, 504, PCIE_4),
    _card("4070-Ti-Super", 16, 15.57, 8.9, 88.2, 672, PCIE_4),
    _card("4080", 16, 15.57, 8.9, 97.5, 717, PCIE_4),
    _card("4090", 24, 23.52, 8.9, 165.2, 1008, PCIE_4),
    _card("5060-Ti-16", 16, 15.47, 12.0, 47.4, 448, PCIE_5 / 2),
    _card("5070-Ti", 16, 15.45, 12.0, 87.9, 896, PCIE_5),
    _card("5080", 16, 15.46, 12.0, 112.6, 960, PCIE_5),
    _card("5090", 32, 31.36, 12.0, 209.5, 1792, PCIE_5),
    _card("A10", 24, 21.98, 8.6, 125.0, 600, PCIE_4),
    _card("A10G", 24, 21.98, 8.6, 70.0, 600, PCIE_4),
    _card("A30", 24, 23.50, 8.0, 165.0, 933, PCIE_4),
    _card("A40", 48, 44.34, 8.6, 149.7, 696, PCIE_4),
    _card("RTX-A6000", 48, 47.40, 8.6, 154.8, 768, PCIE_4),
    _card("A100-40", 40, 39.38, 8.0, 312.0, 1555, PCIE_4),
    _card("A100-80", 80, 79.14, 8.0, 312.0, 2039, PCIE_4),
    _card("L4", 24, 22.03, 8.9, 121.0, 300, PCIE_4),
    _card("L40S", 48, 44.39, 8.9, 362.0, 864, PCIE_4),
    _card("RTX-6000-Ada", 48, 47.38, 8.9, 364.2, 960, PCIE_4),
    _card("H100", 80, 79.11, 9.0, 989.4, 3350, PCIE_5),
    _card("H100-PCIe", 80, 79.11, 9.0, 756.0, 2000, PCIE_5),
    _card("H200", 141, 139.72, 9.0, 989.4, 4800, PCIE_5),
    _card("RTX-PRO-6000", 96, 94.97, 12.0, 503.8, 1792, PCIE_5),
    _card("B200", 180, 178.35, 10.0, 2250.0, 7700, PCIE_5),
)
CARDS: Mapping[str, Card] = MappingProxyType({one.name: one for one in _ALL})

# What vendors, shops and torch put around a card's own name: "NVIDIA GeForce RTX 4090", "Tesla T4", "NVIDIA A100-SXM4-80GB".
_AROUND = re.compile(r"^(nvidia|geforce|quadro|tesla|rtx|gtx)+|sxm\d?|hbm\de?|(?<=\d)gi?b")
_UNITS = {"b": 1, **{f"{letter}b": 1000**n for n, letter in enumerate("kmgt", 1)}}
_UNITS |= {f"{letter}ib": 1024**n for n, letter in enumerate("kmgt", 1)}
_AMOUNT = re.compile(r"\s*([-+]?(?:[0-9]{1,18}\.?[0-9]{0,18}|\.[0-9]{1,18}))\s*([a-z]+)\s*", re.IGNORECASE)


def card(name: str) -> Card:
    """The card of that name, however it is written: ``4090``, ``rtx-4090``, ``NVIDIA GeForce RTX 4090``.

    The size may be left out where there is one alone (``3060``). Raises RecipeError, with the names that are near, where
    the name fits no card or several (``A100``).
    """
    wanted = _plain(name)
    for one in CARDS.values():
        if wanted in (_plain(one.name), f"{_plain(one.name)}{one.gigabytes}"):
            return one
    # but for the size alone: "3060" is 3060-12, while 5070 and 5070-Ti are two cards
    begun = [one for one in CARDS.values() if wanted == _plain(re.sub(r"-[0-9]+$", "", one.name))]
    if len(begun) == 1:
        return begun[0]
    if begun:
        names = listed([one.name for one in begun], 9)
        raise RecipeError(f"'{name:.60}' comes in several sizes: {names}; give one of them.")
    hint = nearest(wanted, [_plain(known) for known in CARDS])
    for known in CARDS:
        hint = hint.replace(f"'{_plain(known)}'", f"'{known}'")
    near = hint or f" The names are {listed(CARDS, len(CARDS))}."
    raise RecipeError(f"'{name:.60}' is not a card that is known here.{near} Or give its memory, as in 24GiB.")


def workspace_bytes(capability: float) -> int:
    """What cuBLAS takes from torch's allocator on a GPU of this compute capability."""
    return WORKSPACE_OF_9 if capability >= 9 else WORKSPACE


def several(text: str) -> tuple[int, str]:
    """``2x4090`` → (2, ``4090``): so many processes, each on such a card; one for anything else."""
    match = re.fullmatch(r"([1-9][0-9]{0,3})\s*[x×]\s*(.+)", text)
    return (int(match.group(1)), match.group(2)) if match else (1, text)


def parse_memory(text: str) -> int:
    """``24GiB`` → bytes. KiB, MiB, GiB and TiB count in steps of 1024; kB, MB, GB and TB in steps of 1000; or plain B.

    Raises RecipeError for anything else, and for nothing at all (0 or less).
    """
    match = _AMOUNT.fullmatch(text)
    unit = _UNITS.get(match.group(2).lower()) if match else None
    if match is None or unit is None:
        raise RecipeError(
            f"'{text:.60}' is not an amount of memory; expected a number with its unit, as in 24GiB or 800MB."
        )
    count = int(float(match.group(1)) * unit)
    if count <= 0:
        raise RecipeError(f"'{text:.60}' is no memory at all; expected more than 0, as in 24GiB.")
    return count


def is_memory(text: str) -> bool:
    """Whether it is an amount of memory, and no card's name."""
    return _AMOUNT.fullmatch(text) is not None


def amount(text: str) -> int:
    """Bytes of ``24GiB``, or of a card's name, or of each of ``2x4090``. Raises RecipeError for what is neither."""
    _, text = several(text)
    try:
        return parse_memory(text)
    except RecipeError:
        return card(text).memory


def _plain(name: str) -> str:
    """A name without case, spaces and what stands around it: ``NVIDIA GeForce RTX 4090`` → ``4090``."""
    return _AROUND.sub("", re.sub(r"[^a-z0-9]", "", name.lower()))
