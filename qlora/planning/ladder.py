"""Arrangements: the ways in which one run can be held in memory, from the fastest to the smallest.

    recipe + what the device has ─► rungs ─► each with its memory and its seconds a step ─► a ladder

A rung gives up a little more than the one above it: fewer rows at once, then the embedding and the layer inputs go to host
memory, then the MLP and the loss are cut finer, then layers leave the device, at last all of them. Both orders of
accumulation are tried. None of this changes what is computed: the rows of a step, its loss and its gradients are the same.

Knows recipes, estimates and rates; must not know how a rung is carried out, or a run.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from qlora.errors import ModelError
from qlora.machine.device import bytes_text
from qlora.methods import AdaptedModel
from qlora.planning.memory import Estimate, estimate
from qlora.planning.speed import Rates, Seconds, Work, step_seconds, work_of
from qlora.recipe import Recipe, parts_of
from qlora.residence.ends import is_tied
from qlora.residence.layers import decoder_layers
from qlora.residence.tiles import find_mlp

FULL = 2048  # tokens at once after which a device's products gain no more by further rows
FINE, FINER = (
    (64, 1024),
    (32, 256),
)  # positions that have logits at once, and tokens in an MLP at once, on the lower rungs
CLOSER = 3  # times that a largest number is looked at again
UNIT = 256  # tokens in which contexts are counted
LONGEST = 2**22  # rows or units beyond which nothing is looked for


@dataclass(frozen=True)
class Target:
    """What is planned for: a device, here or not, and what is free there and beside it."""

    name: str
    """As ``RTX 4090`` or ``this machine``."""
    device: torch.device
    """Its type counts; a card that is planned for need not be here."""
    free: int
    total: int
    host_free: int
    disk_free: int
    rates: Rates | None
    """How fast it is; None where that is not known."""

    def lacking(self, needed: Estimate) -> list[str]:
        """What of ``needed`` is more than there is, as ``the device: 25.1 GiB of 23.5 GiB``; nothing where it fits."""
        asked = [(self.place, needed.total, self.free), ("the disk", needed.disk_total, self.disk_free)]
        if self.device.type != "cpu":
            asked.insert(1, ("host memory", needed.host_total, self.host_free))
        # a system that does not tell what is free says 0
        return [
            f"{place}: {bytes_text(count)} of {bytes_text(free)}" for place, count, free in asked if count > free > 0
        ]

    @property
    def place(self) -> str:
        """What the device's memory is called."""
        return "this machine's memory" if self.device.type == "cpu" else "the GPU's memory"


@dataclass(frozen=True)
class Arrangement:
    """One way to hold a run in memory."""

    recipe: Recipe
    changes: dict[str, Any]
    """What differs from the recipe that was asked for, by key: ``{"memory.embedding": "host"}``."""
    needed: Estimate
    seconds: Seconds | None
    """A step's; None where nobody knows how fast the device is."""

    def __str__(self) -> str:
        """The changes as a command line has them."""
        return " ".join(f"{key}={value}" for key, value in self.changes.items()) or "as the recipe says"

    @property
    def tokens_per_second(self) -> float | None:
        """Of full rows."""
        training = self.recipe.training
        return training.batch_size * self.recipe.data.max_length / self.seconds.expected if self.seconds else None


class Arranger:
    """Looks at one recipe in several arrangements; the model is planted once, on meta."""

    def __init__(self, adapted: AdaptedModel, recipe: Recipe, target: Target) -> None:
        self.adapted, self.recipe, self.target = adapted, recipe, target
        model: Any = adapted.model
        self.tied = is_tied(model)
        ends = (model.get_input_embeddings(), model.get_output_embeddings())
        self.ends = isinstance(ends[0], nn.Embedding) and type(ends[1]) is nn.Linear and not any(map(trains, ends))
        """Whether the embedding and the head may go to host memory: nothing is planted on them, and they do not train."""
        try:
            layers = list(decoder_layers(model))
        except ModelError:
            layers = []
        self.layers = 0 if any(part.name == "full" for part in parts_of(recipe.method)) else len(layers)
        """How many frozen layers could be streamed."""
        self.tiles = bool(layers) and all(has_mlp(layer) for layer in layers)

    def look(self, changes: dict[str, Any] | None = None) -> Arrangement:
        """What the recipe with ``changes`` takes."""
        recipe = changed(self.recipe, changes or {})
        length, training, memory = recipe.data.max_length, recipe.training, recipe.memory
        needed = estimate(self.adapted, training, length, self.target.device, recipe.data.packing, memory)
        seconds = None
        if self.target.rates is not None:
            seconds = step_seconds(self.work(recipe), self.target.rates)
        differing = {key: value for key, value in (changes or {}).items() if value_of(self.recipe, key) != value}
        return Arrangement(recipe, differing, needed, seconds)

    def work(self, recipe: Recipe) -> Work:
        """What a step asks of the machine."""
        return work_of(
            self.adapted,
            recipe.training,
            recipe.memory,
            recipe.data.max_length,
            dtype_bytes=self.adapted.base.compute_dtype.itemsize,
            packing=recipe.data.packing,
        )

    def ladder(self) -> list[Arrangement]:
        """Every rung that is worth something: each needs less of the device than all that are faster.

        From the fastest to the smallest, whether or not it fits on the device; host memory and disk always do.
        """
        found = [rung for order in self._orders() for rung in self._rungs(order)]
        known = [one for one in found if one.seconds is not None]
        if known:
            found = sorted(known, key=lambda one: one.seconds.expected if one.seconds else 0.0)
        steps: list[Arrangement] = []
        for one in found:
            if not self._beside(one) and (not steps or one.needed.total < steps[-1].needed.total):
                steps.append(one)
        return steps

    def fastest(self, rungs: list[Arrangement] | None = None) -> Arrangement | None:
        """The fastest rung that fits; None where none does."""
        rungs = self.ladder() if rungs is None else rungs
        return next((one for one in rungs if not self.target.lacking(one.needed)), None)

    def _beside(self, one: Arrangement) -> bool:
        """Whether it asks for more host memory or disk than there is."""
        return any(not text.startswith(self.target.place) for text in self.target.lacking(one.needed))

    def _orders(self) -> list[str]:
        training = self.recipe.training
        if training.batch_size == 1:
            return ["layer_major"]
        try:
            self.look({"training.accumulation": "layer_major", "training.gradient_checkpointing": True})
        except ModelError:  # Bloom's layers cannot be cut
            return ["micro_batch_major"]
        return ["layer_major", "micro_batch_major"]

    def _rungs(self, accumulation: str) -> Iterator[Arrangement]:
        """From the fastest down, for one order of accumulation."""
        gpu, training, length = self.target.device.type != "cpu", self.recipe.training, self.recipe.data.max_length
        rows = min(training.batch_size, max(1, FULL // length))
        now: dict[str, Any] = {
            "training.accumulation": accumulation,
            "training.gradient_checkpointing": training.gradient_checkpointing,
            "training.micro_batch_size": rows,
            "memory.layers": "resident",
        }
        if not training.gradient_checkpointing:
            yield from self._elsewhere(now)
            now["training.gradient_checkpointing"] = True
        yield from self._elsewhere(now)
        if gpu:
            if self.ends and not self.tied:  # with one weight for both the embedding goes together with the head, below
                now["memory.embedding"] = "host"
            now["memory.layer_inputs"] = "host"
            yield from self._elsewhere(now)
        while rows > 1:
            rows //= 2
            now["training.micro_batch_size"] = rows
            yield from self._elsewhere(now)
        for chunk, tile in (FINE, FINER):
            if training.loss_chunk > chunk or length > tile:
                now["training.loss_chunk"] = min(chunk, training.loss_chunk)
                now["memory.mlp_tile"] = tile if self.tiles and length > tile else None
                yield from self._elsewhere(now)
            if gpu and self.ends and (chunk, tile) == FINE:
                # slices of the vocabulary are cut already, and each goes through all chunks
                now |= {"memory.embedding": "host", "memory.head": "host", "training.loss_chunk": training.loss_chunk}
                yield from self._elsewhere(now)
        if self.layers:
            yield from self._streamed(now)

    def _streamed(self, now: dict[str, Any]) -> Iterator[Arrangement]:
        """As many layers on the device as fit; then none."""
        gpu, count = self.target.device.type != "cpu", self.layers
        for tier in ("host", "disk") if gpu else ("disk",):
            fits = self._most(
                lambda stay, tier=tier: {**now, "memory.layers": stay, "memory.tier": tier},  # type: ignore[misc]
                count - 1,
            )
            if fits is not None and fits > 0:
                yield from self._elsewhere({**now, "memory.layers": fits, "memory.tier": tier})
            yield from self._elsewhere({**now, "memory.layers": "streamed", "memory.tier": tier})

    def _most(self, changes: Callable[[int], dict[str, Any]], most: int, lowest: int = 0) -> int | None:
        """The largest number up to ``most`` that fits on the device, by halving; None where not even ``lowest`` does."""

        def fits(number: int) -> bool:
            return self.look(changes(number)).needed.total <= self.target.free

        if self.target.free and not fits(lowest):
            return None
        low, high = lowest, most
        while low < high:
            middle = (low + high + 1) // 2
            low, high = (middle, high) if fits(middle) else (low, middle - 1)
        return low

    def _elsewhere(self, now: dict[str, Any]) -> Iterator[Arrangement]:
        """The rung, and the same with layer inputs on the disk where host memory may not do."""
        one = self.look(now)
        yield one
        if now.get("memory.layer_inputs") == "host" and self._beside(one):
            yield self.look({**now, "memory.layer_inputs": "disk"})

    def most_rows(self, one: Arrangement) -> int | None:
        """How many rows could go through a layer at once in this arrangement; None where not one fits."""

        def with_rows(rows: int) -> dict[str, Any]:
            batch = max(rows, one.recipe.training.batch_size)
            return {**one.changes, "training.micro_batch_size": rows, "training.batch_size": batch}

        batch = one.recipe.training.batch_size
        if self.lacks(with_rows(batch)):
            return self._most(with_rows, batch, lowest=1)
        return self._beyond(with_rows, batch)  # from here on the step's own rows grow too

    def longest_context(self, one: Arrangement) -> int | None:
        """The longest row, in tokens, that fits in this arrangement one at a time; None where none of 256 does."""
        length = one.recipe.data.max_length

        def with_length(units: int) -> dict[str, Any]:
            return {**one.changes, "training.micro_batch_size": 1, "data.max_length": UNIT * units}

        units = max(1, length // UNIT)
        if self.lacks(with_length(units)):
            found = self._most(with_length, units, lowest=1)
        else:
            found = self._beyond(with_length, units)
        return None if found is None else found * UNIT

    def lacks(self, changes: dict[str, Any]) -> bool:
        """Whether the recipe with ``changes`` does not fit."""
        return bool(self.target.lacking(self.look(changes).needed))

    def _beyond(self, changes: Callable[[int], dict[str, Any]], start: int) -> int:
        """The largest number from ``start`` on that fits, by the parabola through three estimates of each place.

        Memory grows with rows in a straight line, and with the length by a mask's square at most; but which part of a step
        takes most may change on the way, so what was found is estimated itself, and the parabola drawn again from there.
        """
        points = [start, 2 * start, 4 * start]
        found = [self.look(changes(point)).needed for point in points]
        for _ in range(CLOSER):
            reached = min(_reached(points[-3:], counts, free) for counts, free in self._places(found[-3:]))
            if reached <= points[-1] or reached >= LONGEST:
                break
            points.append(reached)
            found.append(self.look(changes(reached)).needed)
        fitting = [point for point, needed in zip(points, found, strict=True) if not self.target.lacking(needed)]
        last = min(_reached(points[-3:], counts, free) for counts, free in self._places(found[-3:]))
        return max([start, *fitting, last if last < points[-1] else 0])

    def _places(self, found: list[Estimate]) -> list[tuple[list[int], int]]:
        """For the device, the disk and host memory: what each of these estimates takes there, and what is free."""
        target = self.target
        places = [([one.total for one in found], target.free), ([one.disk_total for one in found], target.disk_free)]
        if target.device.type != "cpu":
            places.append(([one.host_total for one in found], target.host_free))
        return places


def _reached(points: list[int], counts: list[int], free: int) -> int:
    """Where the parabola through three (point, count) reaches ``free``; ``LONGEST`` where it does not."""
    (a, b, c), (x, y, z) = points, counts
    slope, other = (y - x) / (b - a), (z - y) / (c - b)
    bend = max(0.0, (other - slope) / (c - a))
    low, high = a, LONGEST
    while high - low > 1:
        middle = (low + high) // 2
        count = x + slope * (middle - a) + bend * (middle - a) * (middle - b)
        low, high = (middle, high) if count <= free or not free else (low, middle)
    return low


def trains(module: nn.Module) -> bool:
    """Whether anything in it does."""
    return any(values.requires_grad for values in module.parameters())


def has_mlp(layer: nn.Module) -> bool:
    """Whether the layer's MLP could be cut into tiles."""
    try:
        find_mlp(layer)
    except ModelError:
        return False
    return True


def changed(recipe: Recipe, changes: dict[str, Any]) -> Recipe:
    """The recipe with other values, by ``section.field``."""
    sections: dict[str, dict[str, Any]] = {}
    for key, value in changes.items():
        section, _, field = key.partition(".")
        sections.setdefault(section, {})[field] = value
    update = {name: getattr(recipe, name).model_copy(update=values) for name, values in sections.items()}
    return recipe.model_copy(update=update)


def value_of(recipe: Recipe, key: str) -> Any:
    """What the recipe says at ``section.field``."""
    section, _, field = key.partition(".")
    return getattr(getattr(recipe, section), field)
