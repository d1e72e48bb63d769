"""The ladder: the ways in which one run can be held in memory, from the fastest to the smallest.

    recipe + what the device has ─► rungs ─► each with its memory and its seconds a step ─► a ladder

A rung gives up a little more than the one above it: more layers are recomputed and fewer rows go at once, then the embedding
and the layer inputs go to host memory, then the MLP and the loss are cut finer, then layers leave the device, at last all of them. Both orders of
accumulation are tried. None of this changes what is computed: the rows of a step, its loss and its gradients are the same.

Knows recipes, estimates and rates; must not know how a rung is carried out, or a run.
"""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import nn

from qlora.errors import ModelError
from qlora.machine.disk import bytes_text
from qlora.methods.base import AdaptedModel
from qlora.model import anatomy
from qlora.model.attention import keeps_apart
from qlora.planning.memory import Estimate, estimate
from qlora.planning.rates import Rates
from qlora.planning.shapes import Shapes, shapes_of, trains
from qlora.planning.speed import Seconds, Work, step_seconds, work_of
from qlora.recipe import Recipe
from qlora.residence.load import shared_between
from qlora.residence.placement import resident_layers
from qlora.residence.tiles import find_mlp

Changes = dict[str, object]
"""Values of a recipe, by ``section.field``."""

FULL = 2048  # tokens at once, in each expert of a mixture, after which a device's products gain no more by further rows
UNIT = 256  # tokens in which contexts are counted
LONGEST = 2**16  # rows or units beyond which nothing is looked for
SPARE = {"cpu": 0.5, "cuda": 0.95}
"""Of what is free, the share up to which ``training.recompute: auto`` keeps activations. On a CPU others want memory too, and
a system that runs out of it ends processes without a word; on a GPU more is recomputed then, so the plan's own error counts."""
FLOPS_A_BYTE = 100
"""FLOPs that a machine does while it dequantises a byte, by which the orders of accumulation are compared: 80 to 160 on the
CPUs and GPUs that were looked at. Not measured each time, so that a run planned twice is the same run."""
NEAR = 1 / 32  # of the largest rows and contexts, within which a search ends


@dataclass(frozen=True)
class Target:
    """What is planned for: a device, here or not, what it can do, and what is free there and beside it."""

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
    workspace: int = 0
    """Bytes that cuBLAS takes there for the whole run."""
    capability: float = 0.0
    """CUDA's; 0 where it is no such device."""
    processes: int = 1
    """That train together, each on such a device."""
    sharing: int = 1
    """Of these, on one machine; ``host_free`` is what each may take."""

    def places(self, needed: Estimate) -> list[tuple[str, int, int]]:
        """(what a place is called, the bytes needed there, the bytes free), the device first."""
        if self.device.type == "cpu":
            here = [("this machine's memory", needed.total, self.free)]
        else:
            here = [("the GPU's memory", needed.total, self.free), ("host memory", needed.host_total, self.host_free)]
        return [*here, ("the disk", needed.disk_total, self.disk_free)]

    def lacking(self, needed: Estimate) -> list[str]:
        """What of ``needed`` is more than there is, as ``the disk: 25.1 GiB of 23.5 GiB``; nothing where it fits."""
        return [_over(*place) for place in self.places(needed) if _over(*place)]

    def lacking_beside(self, needed: Estimate) -> bool:
        """Whether it asks for more than there is of something else than the device's memory."""
        return any(_over(*place) for place in self.places(needed)[1:])


def _over(place: str, count: int, free: int) -> str:
    """A system that does not tell what is free says 0."""
    return f"{place}: {bytes_text(count)} of {bytes_text(free)}" if count > free > 0 else ""


@dataclass(frozen=True)
class Arrangement:
    """One way to hold a run in memory."""

    recipe: Recipe
    changes: Changes
    """What differs from the recipe that was asked for, by key: ``{"memory.embedding": "host"}``."""
    needed: Estimate
    work: Work
    """What a step of full rows asks for."""
    seconds: Seconds | None
    """A step's; None where nobody knows how fast the device is."""

    def __str__(self) -> str:
        """The changes as a command line has them."""
        return " ".join(f"{key}={value}" for key, value in self.changes.items()) or "as the recipe says"

    @property
    def tokens(self) -> int:
        """In a step of full rows."""
        return self.recipe.training.batch_size * self.recipe.row_length

    def share(self, tokens: int, rows: int) -> float:
        """What part of these the steps of an epoch have on average, of ``rows`` that hold so many tokens."""
        batch = self.recipe.training.batch_size
        full = -(-rows // batch) * batch * self.recipe.row_length
        return min(1.0, tokens / full) if full else 1.0


class Arranger:
    """Looks at one recipe in several arrangements, by one process's share of a step; the model is planted once, on meta."""

    def __init__(self, adapted: AdaptedModel, recipe: Recipe, target: Target) -> None:
        share = -(-recipe.training.batch_size // target.processes)
        self.adapted, self.recipe, self.target = adapted, changed(recipe, {"training.batch_size": share}), target
        model = adapted.model
        self.tied = anatomy.is_tied(model)
        embedding, head = anatomy.embedding(model), anatomy.head(model)
        plain = isinstance(embedding, nn.Embedding) and type(head) is nn.Linear
        self.ends = plain and not any(trains(module) for module in (embedding, head) if module is not None)
        """Whether the embedding and the head may go to host memory: nothing is planted on them, and they do not train."""
        try:
            layers = list(anatomy.layers(model))
        except ModelError:
            layers = []
        self.trained = recipe.trains_every_weight
        """Whether the layers train whole, so that they can be spread over processes, and wait nowhere else."""
        stays = (self.trained and target.processes == 1) or shared_between(model, layers)
        self.layers = 0 if stays else len(layers)
        """How many layers need not stay."""
        self.tiles = bool(layers) and all(has_mlp(layer) for layer in layers)
        self.depth = len(layers)
        self.keeps = recipe.training.recompute == "auto" and self.depth > 0 and target.free > 0
        """Whether layers may keep their activations where memory allows it."""
        self.recipe = self._settled()
        """As it was asked for, with ``training.recompute`` and ``accumulation`` decided."""

    @functools.cached_property
    def kept_whole(self) -> str | None:
        """Why layers cannot stand behind their boundary, so that nothing can be recomputed, streamed or cut; None where they can."""
        try:
            alone: Changes = {"memory.mlp_tile": None, "memory.embedding": "device", "memory.head": "device"}
            self.look(self._decided(self.depth, self.recipe.training.accumulation == "layer_major") | alone)
        except ModelError as error:
            return str(error).partition("; set ")[0]
        return None

    @functools.cached_property
    def shapes(self) -> Shapes:
        """The model's."""
        return shapes_of(self.adapted)

    def look(self, changes: Mapping[str, object] | None = None) -> Arrangement:
        """What the recipe with ``changes`` takes."""
        recipe, target = changed(self.recipe, changes or {}), self.target
        training, memory, data = recipe.training, recipe.memory, recipe.data
        length, size = recipe.row_length, self.adapted.base.compute_dtype.itemsize
        needed = estimate(
            self.adapted,
            training,
            length,
            target.device,
            data.packs,
            memory,
            workspace=target.workspace,
            processes=target.processes,
            sharing=target.sharing,
        )
        masked = data.packs and not keeps_apart(self.adapted.model)
        work = work_of(self.shapes, training, memory, length, dtype_bytes=size, masked=masked)
        seconds = None if target.rates is None else step_seconds(work, target.rates)
        differing = {key: value for key, value in (changes or {}).items() if value_of(self.recipe, key) != value}
        return Arrangement(recipe, differing, needed, work, seconds)

    def _settled(self) -> Recipe:
        """The recipe with as few layers recomputed as memory asks for, and the order of accumulation that goes with it.

        Activations that are kept are those of one micro-batch or, layer-major, of a whole step, so that the first order
        keeps more layers and the second dequantises less often.
        """
        training, memory = self.recipe.training, self.recipe.memory
        if not self.keeps:
            return changed(self.recipe, self._decided(training.recompute, training.layer_major))
        lowest = self.depth - len(resident_layers(memory.layers, self.depth))
        if memory.layer_inputs != "device" or memory.mlp_tile is not None:  # which is done at the boundary
            lowest = max(1, lowest)
        everything = self._decided(0, False)
        # each look at another arrangement costs a second of dry runs
        fits = not lowest and training.accumulation != "layer_major" and self._share_of(everything) <= 1
        if training.accumulation != "layer_major" and not fits and self.kept_whole:
            self.keeps = False
            return changed(self.recipe, everything)
        if training.accumulation != "auto":
            least = 0 if fits else self._least_recomputed(lowest, training.layer_major)
            return changed(self.recipe, self._decided(least, training.layer_major))
        best = everything if fits else self._decided(self._least_recomputed(lowest, False), False)
        whole = self._decided(self.depth, True)
        cheaper = self._cost(whole) <= self._cost(best) and "layer_major" in self._orders()
        return changed(self.recipe, whole if cheaper and not self.target.lacking(self.look(whole).needed) else best)

    def _decided(self, recompute: str | int, layer_major: bool) -> Changes:
        """Both values as a recipe has them."""
        words = {0: "none", self.depth: "all", "auto": "all"}
        order = "layer_major" if layer_major else "micro_batch_major"
        return {"training.recompute": words.get(recompute, recompute), "training.accumulation": order}

    def _least_recomputed(self, lowest: int, layer_major: bool, now: Mapping[str, object] | None = None) -> int:
        """How many layers, at least ``lowest``, have to be recomputed so that the others' activations fit."""

        def share(kept: int) -> float:
            return self._share_of({**(now or {}), **self._decided(self.depth - kept, layer_major)})

        return self.depth - (largest(share, 0, self.depth - lowest, self.depth - lowest) or 0)

    def _share_of(self, changes: Changes) -> float:
        """How much is taken of what layers may fill with their activations."""
        # a budget says itself how much may be taken
        spare = SPARE[self.target.device.type] if self.recipe.memory.budget is None else 1.0
        return self._on_device(changes) / spare

    def _cost(self, changes: Mapping[str, object]) -> float:
        """FLOPs of a step, with the bytes that are dequantised counted as such."""
        recipe = changed(self.recipe, changes)
        size = self.adapted.base.compute_dtype.itemsize
        work = work_of(self.shapes, recipe.training, recipe.memory, recipe.row_length, dtype_bytes=size)
        return sum(one.flops + FLOPS_A_BYTE * one.dequantised for one in work)

    def ladder(self) -> list[Arrangement]:
        """Every rung that is worth something: each needs less of the device than all that are faster.

        From the fastest to the smallest, whether or not it fits on the device; host memory and disk always do.
        """
        self.keeps = self.keeps and self.kept_whole is None
        found = [rung for order in self._orders() for rung in self._rungs(order)]
        found.sort(key=lambda one: one.seconds.expected if one.seconds else 0.0)
        steps: list[Arrangement] = []
        for one in found:
            if not self.target.lacking_beside(one.needed) and (not steps or one.needed.total < steps[-1].needed.total):
                steps.append(one)
        return steps

    def fastest(self, rungs: list[Arrangement] | None = None) -> Arrangement | None:
        """The fastest rung that fits; None where none does."""
        rungs = self.ladder() if rungs is None else rungs
        return next((one for one in rungs if not self.target.lacking(one.needed)), None)

    def _orders(self) -> list[str]:
        if self.depth and self.kept_whole:
            return ["micro_batch_major"]
        if self.recipe.training.batch_size == 1:
            return ["layer_major"]
        try:
            self.look({"training.accumulation": "layer_major", "training.recompute": "all"})
        except ModelError:  # Bloom's layers cannot be cut
            return ["micro_batch_major"]
        return ["layer_major", "micro_batch_major"]

    def _rungs(self, accumulation: str) -> Iterator[Arrangement]:
        """From the top down, for one order of accumulation."""
        training, length = self.recipe.training, self.recipe.row_length
        gpu = self.target.device.type != "cpu"
        rows = min(training.batch_size, max(1, int(FULL / self.shapes.visited) // length))
        # with one weight for both the embedding goes together with the head
        embedding = {"memory.embedding": "host"} if self.ends and not self.tied else {}
        fewer = [rows // 2**n for n in range(1, rows.bit_length())]
        now: Changes = {
            "training.accumulation": accumulation,
            "training.recompute": training.recompute,
            "training.micro_batch_size": rows,
            "memory.layers": "resident",
        }
        if self.keeps and (accumulation == "micro_batch_major" or training.batch_size == 1):
            yield from self._keeping(now, [rows, *fewer])
        whole = bool(self.depth) and self.kept_whole is not None
        inputs: Changes = {} if whole else {"memory.layer_inputs": "host"}
        now["training.recompute"] = "all" if self.keeps else training.recompute
        table: list[tuple[bool, Changes]] = [
            (True, {}),
            (not whole and training.recompute != "all", {"training.recompute": "all"}),
            (gpu, {**inputs, **embedding}),
            *((True, {"training.micro_batch_size": number}) for number in fewer),
            self._cut(64, 1024),
            # slices of the vocabulary are cut already, and each goes through all chunks
            (
                gpu and self.ends,
                {"memory.embedding": "host", "memory.head": "host", "training.loss_chunk": training.loss_chunk},
            ),
            self._cut(32, 256),
        ]
        for possible, changes in table:
            if possible:
                now |= changes if self.tiles else {**changes, "memory.mlp_tile": None}
                yield self._with_tiles(now)
        spread = ("processes",) if self.target.processes > 1 else ()
        # where experts travel with their layers there is room for more rows, whose tokens visit them together
        for number in (rows, *fewer) if self.layers and not whole and self.shapes.experts else ():
            yield from self._streamed(
                {**now, "training.micro_batch_size": number}, (*spread, "host") if gpu else ("disk",)
            )
        if self.layers and not whole:
            elsewhere = () if self.trained else ("host", "disk") if gpu else ("disk",)
            yield from self._streamed(now, (*(spread if gpu or self.trained else ()), *elsewhere))

    def _with_tiles(self, now: Changes) -> Arrangement:
        """``now``, whose MLPs stay whole where they answer with more than a tensor (gpt-oss, with the router's scores)."""
        try:
            return self.look(now)
        except ModelError:
            if now.get("memory.mlp_tile") is None:
                raise
            self.tiles, now["memory.mlp_tile"] = False, None
            return self.look(now)

    def _keeping(self, now: Changes, sizes: list[int]) -> Iterator[Arrangement]:
        """With as few layers recomputed as fit, for each number of rows at once."""
        for rows in sizes:
            here = {**now, "training.micro_batch_size": rows}
            least = self._least_recomputed(0, now["training.accumulation"] == "layer_major", here)
            if least < self.depth:
                yield self.look({**here, **self._decided(least, now["training.accumulation"] == "layer_major")})

    def _cut(self, chunk: int, tile: int) -> tuple[bool, Changes]:
        """Whether ``chunk`` positions that have logits at once, or ``tile`` tokens in an MLP, are fewer; and the changes."""
        before, length = self.recipe.training.loss_chunk, self.recipe.row_length
        tiles = tile if self.tiles and length > tile and not self.kept_whole else None
        changes: Changes = {"training.loss_chunk": min(chunk, before), "memory.mlp_tile": tiles}
        return before > chunk or length > tile, changes

    def _streamed(self, now: Changes, tiers: tuple[str, ...]) -> Iterator[Arrangement]:
        """As many layers on the device as fit; then none."""
        for tier in tiers:
            here: Changes = {**now, "memory.tier": tier}

            def share(stay: int, here: Changes = here) -> float:
                return self._on_device({**here, "memory.layers": stay})

            if stay := largest(share, 0, self.layers - 1):
                yield self.look({**here, "memory.layers": stay})
            yield self.look({**here, "memory.layers": "streamed"})

    def most_rows(self, one: Arrangement) -> int | None:
        """How many rows could go through a layer at once in this arrangement, near enough; None where not one fits."""
        batch = one.recipe.training.batch_size

        def with_rows(rows: int) -> Changes:  # beyond the step's own rows these grow too
            return {**one.changes, "training.micro_batch_size": rows, "training.batch_size": max(rows, batch)}

        return largest(lambda rows: self._taken(with_rows(rows)), 1, LONGEST, batch, NEAR)

    def longest_context(self, one: Arrangement) -> int | None:
        """The longest row, in tokens, that fits in this arrangement one at a time, near enough; None where none of 256 does."""

        def with_length(units: int) -> Changes:
            return {**one.changes, "training.micro_batch_size": 1, "data.max_length": UNIT * units}

        start = max(1, one.recipe.data.max_length // UNIT)
        found = largest(lambda units: self._taken(with_length(units)), 1, LONGEST, start, NEAR)
        return None if found is None else found * UNIT

    def _taken(self, changes: Changes) -> float:
        """The share of what there is that the recipe with ``changes`` takes, in the place where that is most."""
        return max(map(_share, self.target.places(self.look(changes).needed)))

    def _on_device(self, changes: Changes) -> float:
        """The same of the device's memory alone."""
        return _share(self.target.places(self.look(changes).needed)[0])


def _share(place: tuple[str, int, int]) -> float:
    """How much of what is free is taken; nothing where nobody knows what is free."""
    _, count, free = place
    return count / free if free > 0 else 0.0


def largest(
    share: Callable[[int], float], lowest: int, most: int, start: int | None = None, near: float = 0.0
) -> int | None:
    """The largest number from ``lowest`` to ``most`` of which ``share`` is at most 1, or one that is ``near`` below it; None
    where there is none.

    A share costs a second of dry runs, and grows nearly in a straight line: the line through what was seen says where to
    look next. After a number that fits the next one is at least ``near`` above it, so that the search ends from both sides;
    every third look halves what is left (on a scale of
    powers where that is much), should the line be of no use.
    """
    low, at_low = lowest, share(lowest)
    if at_low > 1:
        return None
    high, at_high = most + 1, math.inf
    guess = start or most
    for looks in itertools.count(1):
        if high - low <= max(1, near * low):
            return low
        guess = min(max(guess, low + 1), high - 1)
        taken, before, below = share(guess), low, at_low
        if taken <= 1:
            low, at_low = guess, taken
        else:
            high, at_high = guess, taken
        if not looks % 3 and high <= most:
            guess = math.isqrt(low * high) if high > 4 * low > 0 else (low + high) // 2
        elif math.isfinite(at_high):
            guess = low + int((high - low) * (1 - at_low) / (at_high - at_low))
        else:
            guess = low + int((low - before) * (1 - at_low) / (at_low - below)) if at_low > below else 2 * low
        if taken <= 1:
            guess = max(guess, low + math.ceil(near * low))
    return None


def has_mlp(layer: nn.Module) -> bool:
    """Whether the layer's MLP could be cut into tiles."""
    try:
        find_mlp(layer)
    except ModelError:
        return False
    return True


def changed(recipe: Recipe, changes: Mapping[str, object]) -> Recipe:
    """The recipe with other values, by ``section.field``."""
    sections: dict[str, dict[str, object]] = {}
    for key, value in changes.items():
        section, _, field = key.partition(".")
        sections.setdefault(section, {})[field] = value
    update = {name: getattr(recipe, name).model_copy(update=values) for name, values in sections.items()}
    return recipe.model_copy(update=update)


def value_of(recipe: Recipe, key: str) -> object:
    """What the recipe says at ``section.field``."""
    section, _, field = key.partition(".")
    return getattr(getattr(recipe, section), field)
