"""Speed: what a step asks of a machine, and so how long it will take.

    shapes, the recipe's sections ─► work_of ─► Work ─┐
                              rates.py ─► Rates ──────┴─► step_seconds ─► Seconds, with a range

Within forward, loss and backward, copies and reads run beside the arithmetic, so that the slower of them counts. FLOPs a
token, in the counts of ``Shapes`` and a row of s tokens:

                            forward     loss                      backward     and with recompute
    frozen linears          2 N         –                         2 N          + 2 N
    head                    –           4 N_h (6 if it trains)    –            –
    what trains             2 N_a       –                         4 N_a        + 2 N_a
    attention, causal       2 L·a·s     –                         4 L·a·s      + 2 L·a·s

Of a mixture's E experts, of which a token visits k, T tokens that go through a layer together visit a share 1 − (1 − k/E)^T, if
all are as likely: of Qwen3's 128, with k = 8, 64 % at T = 16 and 98 % at T = 64. So whole layers travel, and not experts one by
one: a step of a thousand tokens visits them all. Those that are visited are dequantised once for each micro-batch and way, in
either order of accumulation, since never more than one is dense at a time.

A recompute leaves out each layer's last product where it can (residence/layers.py). Experts are one whole, and not counted
then; of other layers it is some 9 % of all, and is. Experts' backward makes their first product again. Not counted is the optimizer.

Knows counts of FLOPs and bytes; must not know what fits, a recipe's whole, or which arrangement is best.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import NamedTuple

from qlora.errors import RecipeError
from qlora.machine.disk import bytes_text, duration_text
from qlora.planning.rates import Rate, Rates
from qlora.planning.shapes import Shapes
from qlora.recipe import MemorySection, TrainingSection
from qlora.residence.placement import resident_layers


class Pass(NamedTuple):
    """What a part of a step asks for, in FLOPs and bytes."""

    flops: float = 0.0
    dequantised: float = 0.0
    """Dense weights made from packed ones."""
    copied: float = 0.0
    """To the device or from it, which run side by side: the larger of the two."""
    read: float = 0.0
    """From the disk."""


class Work(NamedTuple):
    """What one optimizer step asks for."""

    forward: Pass
    loss: Pass
    backward: Pass


def work_of(
    shapes: Shapes,
    training: TrainingSection,
    memory: MemorySection,
    length: int,
    *,
    dtype_bytes: int,
    masked: bool = False,
) -> Work:
    """What an optimizer step of full rows of ``length`` tokens asks for.

    ``dtype_bytes`` are those of a compute number; ``masked`` says that rows hold several examples that a mask keeps apart, so
    that attention computes every pair of positions; without one it computes less the more there are. Every token counts as a
    target. Not counted: what a method computes from whole weights (DoRA's norms), and attention windows, which compute less.
    """
    tokens = training.batch_size * length
    micro_batches = -(-training.batch_size // training.micro_batch_size)
    layer_major = training.layer_major
    # of all layers, those that are recomputed; the others are the last ones, and those below the adapters have no backward
    recomputed = max(0, training.recomputed(shapes.layers) - (shapes.layers - shapes.with_graph)) / shapes.layers
    turns = 1 if layer_major else micro_batches  # how often the layers are gone through, up and down
    deep = shapes.with_graph / shapes.layers

    attention = (4 if masked else 2) * shapes.layers * shapes.attention * length
    forward = 2 * shapes.blocks + 2 * shapes.trained + attention
    backward = deep * (2 * shapes.blocks + 2 * attention) + 4 * shapes.trained
    backward += deep * 2 * shapes.visited * shapes.experts_up
    left_out = shapes.visited * (shapes.experts - shapes.experts_again)
    backward += recomputed * (2 * (shapes.blocks - left_out) + attention + 2 * shapes.trained)
    # a head in slices has the logits made twice: for their sum, and for the gradient (model/loss.py)
    sweeps = 1 + (memory.head == "host" and not shapes.head_trains)
    loss = (2 * sweeps + 2 * (shapes.with_graph > 0) + 2 * shapes.head_trains) * shapes.head

    dense = turns * dtype_bytes * shapes.packed
    # a visit keeps the dense weights for all its micro-batches; with one alone they are made for each product
    again = (deep if layer_major and micro_batches > 1 else deep + recomputed) * dense
    share = 1 - (1 - shapes.visited) ** (min(training.micro_batch_size, training.batch_size) * length)
    experts = micro_batches * share * dtype_bytes
    up, down = _fetched(shapes, memory)
    on_disk = memory.tier == "disk"
    away = recomputed * shapes.layers if memory.layer_inputs == "host" else 0
    inputs = tokens * dtype_bytes * shapes.width * away
    head = 2 * turns * dtype_bytes * shapes.head if memory.head == "host" else 0
    return Work(
        Pass(tokens * forward, dense + experts * shapes.experts, max(turns * up, inputs), turns * up if on_disk else 0),
        Pass(tokens * loss, copied=head),
        Pass(
            tokens * backward,
            again + experts * (deep * shapes.experts + recomputed * shapes.experts_again),
            turns * down + inputs,
            turns * down if on_disk else 0,
        ),
    )


def _fetched(shapes: Shapes, memory: MemorySection) -> tuple[float, float]:
    """Bytes of layers that come in one turn through the layers, up and down.

    Each way begins with the layers that the other one left in the slots.
    """
    stay = resident_layers(memory.layers, shapes.layers)
    away = [layer for layer in range(shapes.layers) if layer not in stay]
    ways = []
    for visited in (away, [layer for layer in away if layer >= shapes.layers - shapes.with_graph]):
        size = sum(shapes.layer_bytes[layer] for layer in visited)
        ways.append(size * max(0, len(visited) - memory.slots) / max(1, len(visited)))
    return ways[0], ways[1] + sum(shapes.layer_gradients[layer] for layer in away)


@dataclass(frozen=True)
class Seconds:
    """How long a step takes."""

    expected: float
    low: float
    """With every rate at its best, and copies beside the arithmetic."""
    high: float
    """With every rate at its worst, and nothing beside anything else."""
    bound: str
    """What takes most of it: ``arithmetic``, ``copies`` or ``the disk``."""

    def __str__(self) -> str:
        low, expected, high = map(duration_text, (self.low, self.expected, self.high))
        return f"{expected} a step of full rows ({low} to {high}), bound by {self.bound}"


def step_seconds(work: Iterable[Pass], rates: Rates) -> Seconds:
    """How long ``work``, a step's or some passes of it, takes on a machine of these ``rates``.

    Raises RecipeError where it reads a disk whose speed is not known.
    """
    expected = low = high = 0.0
    bounds: dict[str, float] = {}
    for one in work:
        parts = _parts(one, rates, "expected")
        longest = max(parts, key=lambda kind: parts[kind])
        bounds[longest] = bounds.get(longest, 0.0) + parts[longest]
        expected += parts[longest]
        low += max(_parts(one, rates, "high").values())
        high += sum(_parts(one, rates, "low").values())
    return Seconds(expected, low, high, max(bounds, key=lambda kind: bounds[kind]))


def _parts(one: Pass, rates: Rates, end: str) -> dict[str, float]:
    """Seconds of what runs side by side, with every rate at its ``low``, ``expected`` or ``high``."""
    if one.read and rates.disk is None:
        raise RecipeError(
            f"{bytes_text(one.read)} a step come from the disk, whose speed is not known. {' '.join(rates.notes)} Give a "
            "folder that can be written to, or leave memory.tier off the disk."
        )

    def seconds(amount: float, rate: Rate | None) -> float:
        return float(amount / getattr(rate, end)) if amount else 0.0

    return {
        "arithmetic": seconds(one.flops, rates.matrix) + seconds(one.dequantised, rates.dequantise),
        "copies": seconds(one.copied, rates.copies),
        "the disk": seconds(one.read, rates.disk),
    }
