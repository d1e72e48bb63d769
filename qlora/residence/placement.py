"""Streamed layers: frozen weights that wait elsewhere and come to the device for each visit.

    home: host memory, or the file cache        slots on the device                 the layer
    ┌───────┬───────┬───────┬──────────┐  one   ┌────────┬────────┐   views of    ┌──────────────────┐
    │ 0     │ 1     │ 2     │ 3  …     │ ─────► │ slot 0 │ slot 1 │ ────────────► │ its linears'     │
    └───────┴───────┴───────┴──────────┘  piece └────────┴────────┘   the slot    │ weights, scales  │
                                                                                  └──────────────────┘

A layer's frozen linears are one image of bytes (``image.py``), which travels in one piece. Calling a layer brings it in
(a hook before its forward), so that forward, recompute, evaluation and generation are one case; and begins to fetch the
next ones in the same direction, as many as there are other slots, on a thread and a stream of their own. Backward visits
the layers from the last to the first, and begins with those that the forward left in the slots.

While a layer is away its linears hold tensors on meta: whatever reads them then fails loudly instead of reading what
another layer left in the slot. ``dense_weight`` and ``at_hand`` (nf4.py) fetch a single linear all the same.

Knows decoder layers, bytes and devices; must not know what is adapted, how a step is cut, or where the cache came from.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from typing import Literal, TypeVar

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from qlora.errors import ModelError
from qlora.machine.processes import here
from qlora.model.base import StreamedLayers
from qlora.residence.homes import Home
from qlora.residence.image import Image, Piece, give, take, view_of
from qlora.residence.spread import Led

Some = TypeVar("Some")
Tier = Literal["host", "disk", "processes"]

POISON = 0xFF  # in every byte it is NaN, in fp32, fp16 and bf16 alike
NONE = -1  # instead of a layer's number


def resident_layers(layers: str | int, count: int) -> set[int]:
    """Which of ``count`` layers stay, by the recipe's ``memory.layers``: all, none, or so many, evenly spread.

    Spread, so that a layer that has to come has the time of those that stay. Example: 3 of 6 → {1, 3, 5}
    """
    stay = count if layers == "resident" else 0 if layers == "streamed" else min(int(layers), count)
    return {layer for layer in range(count) if (layer + 1) * stay // count > layer * stay // count}


def next_layers(order: Sequence[int], layer: int, before: int, direction: int, slots: int) -> tuple[int, Sequence[int]]:
    """(which way it goes on, 1 or -1; the layers to have in the slots: ``layer`` and those that come next).

    ``order`` are the numbers of the streamed layers, ``before`` is the one that was called before or ``NONE``, and
    ``direction`` the way until now. Example, layers 0 to 5 and 3 slots: 2 after 1 → 1, (2, 3, 4); 5 after 4 → -1, (5, 4, 3),
    as backward begins there
    """
    place = order.index(layer)
    if place in (0, len(order) - 1):
        direction = 1 if place == 0 else -1  # from either end there is one way to go
    elif before != NONE:
        direction = 1 if layer > before else -1
    stop = place + direction * slots
    return direction, order[place : stop if stop >= 0 else None : direction]


class Slot:
    """A place on the device: ``empty``, with a layer ``coming``, or with its layer ``here``."""

    def __init__(self, size: int, device: torch.device) -> None:
        self.memory = torch.empty(size, dtype=torch.uint8, device=device)
        self.layer = NONE
        self.arrival: Future[torch.cuda.Event | None] | None = None
        """Gives the event after which the layer's bytes are there; None on a CPU, where they are then."""

    @property
    def failed(self) -> bool:
        """Whether its layer will not come."""
        return self.arrival is not None and self.arrival.done() and self.arrival.exception() is not None

    def clear(self) -> None:
        """Be empty, after whatever was on its way has come or failed."""
        if self.arrival is not None and not self.arrival.cancel():
            wait([self.arrival])
        self.layer, self.arrival = NONE, None


class Placement:
    """The layers of a model that do not stay on the device.

    ``images`` are theirs by number. After ``stream`` every call of such a layer brings its weights in. Collected with its
    model, it ends its thread and closes its home; ``close`` does so at once.
    """

    poison = False
    """Fill a slot with NaN when its layer leaves: for tests, so that whoever still reads it is found out."""

    def __init__(self, images: dict[int, Image], home: Home, slots: int, device: torch.device, tier: Tier) -> None:
        self.images, self.home, self.device, self.tier = images, home, device, tier
        self.order = sorted(images)
        self.count = min(slots, len(self.order))
        self.slots: list[Slot] = []
        self.direction, self.current = 1, NONE
        self.fetched = 0
        """Layers fetched so far."""
        self.hooks: list[RemovableHandle] = []
        for layer, image in images.items():
            for linear in image.linears:
                linear.away = Away(self, layer, image.of(linear))  # type: ignore[assignment]

    def stream(self, layers: nn.ModuleList) -> None:
        """From now on a call of one of ``layers`` brings its weights in."""
        largest = max(image.bytes for image in self.images.values())
        self.slots = [Slot(largest, self.device) for _ in range(self.count)]
        self.worker = ThreadPoolExecutor(1, thread_name_prefix="qlora-layers")
        self.side = torch.cuda.Stream(self.device) if self.device.type == "cuda" else None
        weakref.finalize(self, _end, self.worker, self.side).atexit = False
        for layer in self.order:
            self.hooks.append(layers[layer].register_forward_pre_hook(self._bringing(layer, layers[layer])))

    def _bringing(self, layer: int, own: nn.Module) -> Callable[[nn.Module, tuple[object, ...]], None]:
        """The hook of a layer."""

        def bring(module: nn.Module, args: tuple[object, ...]) -> None:
            if module is own:  # a copy of it, which trains whole, took the hook along and has weights of its own
                self.visit(layer)

        return bring

    def visit(self, layer: int) -> None:
        """Have ``layer`` on the device when this returns, its linears ready, and those that come next on their way."""
        if layer == self.current:  # another micro-batch, or backward's recompute
            return
        self.direction, wanted = next_layers(self.order, layer, self.current, self.direction, self.count)
        self.current = NONE  # until it is there
        for slot in self.slots:
            if slot.failed:  # fetched again if it is wanted
                slot.clear()
        held = {slot.layer for slot in self.slots}
        for one in wanted:
            if one not in held:
                self._fetch(one, next(slot for slot in self.slots if slot.layer not in wanted))
        self._await(next(slot for slot in self.slots if slot.layer == layer))
        self.current = layer

    def _fetch(self, layer: int, slot: Slot) -> None:
        """Begin to bring ``layer`` into ``slot``, whose own layer leaves."""
        if slot.layer != NONE:
            self._leave(slot)
        # a reader of files writes behind autograd's back; a graph that kept this memory must fail instead of using it
        torch.autograd.graph.increment_version(slot.memory)
        if self.poison:
            slot.memory.fill_(POISON)
        left = None
        if self.side is not None:  # what reads the slot was given to the compute stream before this moment
            left = torch.cuda.current_stream(self.device).record_event()
        slot.arrival = self.worker.submit(self._bring, layer, slot.memory[: self.images[layer].bytes], left)
        slot.layer = layer
        self.fetched += 1

    def _await(self, slot: Slot) -> None:
        """Have the slot's layer here, its linears' tensors views of the slot."""
        if slot.arrival is None:
            return
        try:
            arrived = slot.arrival.result()
        except BaseException:
            slot.clear()  # the next visit tries again
            raise
        slot.arrival = None
        if arrived is not None:
            torch.cuda.current_stream(self.device).wait_event(arrived)
        self.images[slot.layer].attach(slot.memory)

    def _leave(self, slot: Slot) -> None:
        """Empty the slot; the linears of its layer have no weights then."""
        layer = slot.layer
        if self.spread:
            self.settle()  # what one process no longer waits for another may have begun to send
        slot.clear()
        self.images[layer].detach()

    @property
    def spread(self) -> bool:
        """Whether all processes have to visit the same layers together."""
        return self.tier == "processes"

    def settle(self) -> None:
        """Wait for what is on its way."""
        wait([slot.arrival for slot in self.slots if slot.arrival is not None])

    def forget(self) -> None:
        """Be as before the first visit."""
        for slot in self.slots:
            if slot.layer != NONE:
                self._leave(slot)
        self.direction, self.current = 1, NONE

    def out_of_date(self, layer: int) -> None:
        """The layer's weights changed where they wait: a copy in a slot is not to be used any more."""
        for slot in self.slots:
            if slot.layer == layer:
                self._leave(slot)
        if self.current == layer:
            self.current = NONE

    def _bring(self, layer: int, memory: Tensor, left: torch.cuda.Event | None) -> torch.cuda.Event | None:
        """On the thread: copy, and give the event after which the copy is there."""
        with torch.no_grad():
            if self.side is None or left is None:
                self.home.read(layer, memory)
                return None
            with torch.cuda.stream(self.side):
                self.side.wait_event(left)
                self.home.read(layer, memory)
                return self.side.record_event()

    def bytes_on_device(self) -> int:
        """What the slots take."""
        return sum(len(slot.memory) for slot in self.slots)

    def close(self) -> None:
        """Forget the hooks, the thread and the home. The layers stay away for good."""
        for hook in self.hooks:
            hook.remove()
        self.worker.shutdown(wait=True, cancel_futures=True)
        _end(self.worker, self.side)
        self.home.close()


def _end(worker: ThreadPoolExecutor, side: torch.cuda.Stream | None) -> None:
    """Let the thread go, and have no copy under way; it may be that thread itself that collects garbage."""
    worker.shutdown(wait=False, cancel_futures=True)
    if side is not None:
        side.synchronize()


class Away:
    """What a linear of a streamed layer knows of its weights: where they wait. Its ``away``; None on all other linears."""

    def __init__(self, placement: Placement, layer: int, pieces: list[Piece]) -> None:
        self.placement, self.layer, self.pieces = placement, layer, pieces

    @property
    def device(self) -> torch.device:
        """Where the weights are computed with."""
        return self.placement.device

    @property
    def names(self) -> list[str]:
        """The linear's tensors that wait."""
        return [piece.name for piece in self.pieces]

    def bring(self) -> None:
        """Give the linear its weights, in memory of their own, until ``keep`` or ``drop``."""
        if self.placement.spread:
            self.placement.settle()  # in the same order everywhere
        for piece in self.pieces:
            memory = torch.empty(piece.bytes, dtype=torch.uint8, device=self.device)
            self.placement.home.read(self.layer, memory, piece.start)
            give(piece, view_of(memory, piece, 0))

    def keep(self) -> None:
        """Send the weights that the linear has now to where they wait. Raises ModelError where they do not fit there."""
        for piece in self.pieces:
            values = getattr(piece.linear, piece.name)
            if values is None or (tuple(values.shape), values.dtype) != (piece.shape, piece.dtype):
                found = "nothing" if values is None else f"{values.dtype} {list(values.shape)}"
                raise ModelError(
                    f"A weight of this checkpoint is packed otherwise than its config.json says ({piece.name}: {found} "
                    f"instead of {piece.dtype} {list(piece.shape)}), so its layer cannot be streamed; set memory.layers=resident."
                )
            self.placement.home.write(
                self.layer, piece.start, values.detach().contiguous().reshape(-1).view(torch.uint8)
            )
        self.drop()
        self.placement.out_of_date(self.layer)

    def drop(self) -> None:
        """Leave the linear without weights again."""
        for piece in self.pieces:
            take(piece)


def by_main(placement: StreamedLayers | None, work: Callable[[], Some]) -> Some | None:
    """What ``work`` gives in the main process, which alone does it; None in the others, which wait until it is done. It may call
    the model, whose layers these are."""
    led = placement.home if isinstance(placement, Placement) else placement
    if placement is None or not isinstance(led, Led):
        found = work() if here().main else None
        here().barrier()  # one that went on and ended would take the main one along
        return found
    placement.forget()
    if not here().main:
        led.serve()
        return None
    with led.alone():
        found = work()
        placement.forget()
    return found


def settle(image: Image, home: Home, layer: int, device: torch.device) -> None:
    """Bring a layer in to stay: memory of its own on ``device``, and its linears are ordinary ones again."""
    memory = torch.empty(image.bytes, dtype=torch.uint8, device=device)
    home.read(layer, memory)
    image.attach(memory)
    for linear in image.linears:
        linear.away = None  # type: ignore[assignment]
