"""Streamed layers: frozen weights that wait elsewhere and come to the device for each visit.

    home: host memory, or the file cache        slots on the device                 the layer
    ┌───────┬───────┬───────┬──────────┐  one   ┌────────┬────────┐   views of    ┌──────────────────┐
    │ 0     │ 1     │ 2     │ 3  …     │ ─────► │ slot 0 │ slot 1 │ ────────────► │ its linears'     │
    └───────┴───────┴───────┴──────────┘  piece └────────┴────────┘   the slot    │ weights, scales  │
                                                                                  └──────────────────┘

A layer's frozen linears are packed into one image of bytes, so that it travels in one piece. Calling a layer brings it in
(a hook before its forward), so that forward, recompute, evaluation and generation are one case; and begins to fetch the
next ones in the same direction, as many as there are other slots, on a thread and a stream of their own. Backward visits
the layers from the last to the first, and begins with those that the forward left in the slots.

While a layer is away its linears hold tensors on meta: whatever reads them then fails loudly instead of reading what
another layer left in the slot. ``dense_weight`` and ``at_hand`` (nf4.py) fetch a single linear all the same.

Knows decoder layers, bytes and devices; must not know what is adapted, how a step is cut, or where the cache came from.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor, wait
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor, nn

from qlora.errors import ModelError
from qlora.machine.device import host_bytes
from qlora.model.nf4 import FrozenLinear, is_linear

ALIGNMENT = 256  # bytes; what CUDA's allocator gives, and more than any kernel asks for
POISON = 0xFF  # in every byte it is NaN, in fp32, fp16 and bf16 alike


class Piece(NamedTuple):
    """One tensor of a linear in its layer's image."""

    linear: nn.Module
    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    start: int
    bytes: int


class Image:
    """How a layer's frozen linears lie in one piece of memory. Made while they are empty: shapes are enough."""

    def __init__(self, layer: nn.Module) -> None:
        self.pieces: list[Piece] = []
        self.bytes = 0
        for linear in layer.modules():
            if is_linear(linear):
                for name, values in _weights(linear).items():
                    size = values.numel() * values.dtype.itemsize
                    piece = Piece(linear, name, values.dtype, tuple(values.shape), self.bytes, size)
                    self.pieces.append(piece)
                    self.bytes += -(-size // ALIGNMENT) * ALIGNMENT

    @property
    def linears(self) -> list[nn.Module]:
        """The linears in it."""
        return list(dict.fromkeys(piece.linear for piece in self.pieces))

    def of(self, linear: nn.Module) -> list[Piece]:
        """What belongs to ``linear``."""
        return [piece for piece in self.pieces if piece.linear is linear]

    def attach(self, memory: Tensor) -> None:
        """Make the linears' tensors views of ``memory``, uint8 [bytes or more], which holds the image."""
        for piece in self.pieces:
            _give(piece, view_of(memory, piece, piece.start))

    def detach(self) -> None:
        """Leave the linears with tensors on meta, without memory."""
        for piece in self.pieces:
            _give(piece, torch.empty(piece.shape, dtype=piece.dtype, device="meta"))


class Home(Protocol):
    """Where the images of layers wait."""

    def read(self, layer: int, memory: Tensor, start: int = 0) -> None:
        """Copy the layer's bytes from ``start`` on into ``memory``, uint8 on any device, as many as it holds."""

    def write(self, layer: int, start: int, values: Tensor) -> None:
        """Replace the layer's bytes from ``start`` on by those of ``values``, uint8 on any device."""

    def close(self) -> None:
        """Give back what it holds; nothing is read any more."""


class HostHome:
    """Images in host memory, pinned where ``device`` is a GPU."""

    def __init__(self, sizes: dict[int, int], device: torch.device) -> None:
        self.images = {layer: host_bytes(size, device) for layer, size in sizes.items()}

    def read(self, layer: int, memory: Tensor, start: int = 0) -> None:
        image = self.images[layer]
        memory.copy_(image[start : start + len(memory)], non_blocking=True)

    def write(self, layer: int, start: int, values: Tensor) -> None:
        self.images[layer][start : start + len(values)].copy_(values)

    def close(self) -> None:
        self.images.clear()


class Slot:
    """A place on the device, the layer in it or on its way there, and what tells that it has arrived."""

    def __init__(self, size: int, device: torch.device) -> None:
        self.memory = torch.empty(size, dtype=torch.uint8, device=device)
        self.layer: int | None = None
        self.arrival: Future[Any] | None = None

    @property
    def failed(self) -> bool:
        """Whether its layer will not come."""
        return self.arrival is not None and self.arrival.done() and self.arrival.exception() is not None

    def settle_down(self) -> None:
        """Wait for a fetch that nobody wants any more, whether or not it fails."""
        if self.arrival is not None and not self.arrival.cancel():
            wait([self.arrival])
        self.arrival = None


class Placement:
    """The layers of a model that do not stay on the device.

    ``images`` are theirs by number. After ``stream`` every call of such a layer brings its weights in. Collected with its
    model, it ends its thread and closes its home; ``close`` does so at once.
    """

    poison = False
    """Fill a slot with NaN when its layer leaves: for tests, so that whoever still reads it is found out."""

    def __init__(self, images: dict[int, Image], home: Home, slots: int, device: torch.device, tier: str) -> None:
        self.images, self.home, self.device, self.tier = images, home, device, tier
        self.order = sorted(images)
        self.places = {layer: place for place, layer in enumerate(self.order)}
        self.count = min(slots, len(self.order))
        self.slots: list[Slot] = []
        self.direction, self.current = 1, -1
        self.fetched = 0
        """Layers fetched so far."""
        self.hooks: list[Any] = []
        for layer, image in images.items():
            for linear in image.linears:
                away: Any = linear
                away.away = Away(self, layer, image.of(linear))

    def stream(self, layers: nn.ModuleList) -> None:
        """From now on a call of one of ``layers`` brings its weights in."""
        largest = max(image.bytes for image in self.images.values())
        self.slots = [Slot(largest, self.device) for _ in range(self.count)]
        self.worker = ThreadPoolExecutor(1, thread_name_prefix="qlora-layers")
        self.side = torch.cuda.Stream(self.device) if self.device.type == "cuda" else None
        weakref.finalize(self, _end, self.worker, self.side).atexit = False
        for layer in self.order:
            self.hooks.append(layers[layer].register_forward_pre_hook(self._bringing(layer, layers[layer])))

    def _bringing(self, layer: int, own: nn.Module) -> Callable[[nn.Module, Any], None]:
        """The hook of a layer."""

        def bring(module: nn.Module, args: Any) -> None:
            if module is own:  # a copy of it, which trains whole, took the hook along and has weights of its own
                self.visit(layer)

        return bring

    def visit(self, layer: int) -> None:
        """Have ``layer`` on the device when this returns, its linears ready, and those that come next on their way."""
        if layer == self.current:  # another micro-batch, or backward's recompute
            return
        place, before = self.places[layer], self.current
        if place in (0, len(self.order) - 1):
            self.direction = 1 if place == 0 else -1  # from either end there is one way to go
        elif before >= 0:
            self.direction = 1 if place > self.places[before] else -1
        self.current = -1  # until it is there
        stop = place + self.direction * self.count
        wanted = self.order[place : stop if stop >= 0 else None : self.direction]
        for one in wanted:
            if all(slot.layer != one or slot.failed for slot in self.slots):
                self._fetch(one, self._free(one, wanted))
        slot = next(slot for slot in self.slots if slot.layer == layer)
        if slot.arrival is not None:
            try:
                arrived = slot.arrival.result()
            except BaseException:
                slot.layer, slot.arrival = None, None  # the next visit tries again
                raise
            slot.arrival = None
            if arrived is not None:
                torch.cuda.current_stream(self.device).wait_event(arrived)
            self.images[layer].attach(slot.memory)
        self.current = layer

    def _free(self, layer: int, wanted: list[int]) -> Slot:
        """Where ``layer`` is to come: where it failed to, else where none of the ``wanted`` is."""
        failed = (slot for slot in self.slots if slot.layer == layer)
        return next(failed, None) or next(slot for slot in self.slots if slot.layer not in wanted)

    def _fetch(self, layer: int, slot: Slot) -> None:
        """Begin to bring ``layer`` into ``slot``, whose own layer leaves."""
        slot.settle_down()
        if slot.layer is not None:
            self.images[slot.layer].detach()
            slot.layer = None
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

    def _bring(self, layer: int, memory: Tensor, left: Any) -> Any:
        """On the thread: copy, and give the event after which the copy is there; None on a CPU, where it is there."""
        with torch.no_grad():
            if self.side is None:
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


def _end(worker: ThreadPoolExecutor, side: Any) -> None:
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

    def bring(self) -> None:
        """Give the linear its weights, in memory of their own, until ``keep`` or ``drop``."""
        for piece in self.pieces:
            memory = torch.empty(piece.bytes, dtype=torch.uint8, device=self.device)
            self.placement.home.read(self.layer, memory, piece.start)
            _give(piece, view_of(memory, piece, 0))

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
        # a copy in a slot is out of date
        for slot in self.placement.slots:
            if slot.layer == self.layer:
                slot.settle_down()
                slot.layer = None
                self.placement.images[self.layer].detach()
        if self.placement.current == self.layer:
            self.placement.current = -1

    def drop(self) -> None:
        """Leave the linear without weights again."""
        for piece in self.pieces:
            _give(piece, torch.empty(piece.shape, dtype=piece.dtype, device="meta"))


def resident_layers(layers: str | int, count: int) -> set[int]:
    """Which of ``count`` layers stay, by the recipe's ``memory.layers``: all, none, or so many, evenly spread.

    Spread, so that a layer that has to come has the time of those that stay. Example: 3 of 6 → {1, 3, 5}
    """
    stay = count if layers == "resident" else 0 if layers == "streamed" else min(int(layers), count)
    return {layer for layer in range(count) if (layer + 1) * stay // count > layer * stay // count}


def settle(image: Image, home: Home, layer: int, device: torch.device) -> None:
    """Bring a layer in to stay: memory of its own on ``device``, and its linears are ordinary ones again."""
    memory = torch.empty(image.bytes, dtype=torch.uint8, device=device)
    home.read(layer, memory)
    image.attach(memory)
    for linear in image.linears:
        ordinary: Any = linear
        ordinary.away = None


def view_of(memory: Tensor, piece: Piece, start: int) -> Tensor:
    """The tensor of ``piece`` whose bytes begin at ``start`` of ``memory``."""
    return memory[start : start + piece.bytes].view(piece.dtype).view(piece.shape)


def frozen_linears(layers: Iterable[nn.Module]) -> Iterator[nn.Module]:
    """Every linear that has an image in its layer."""
    for layer in layers:
        yield from (linear for linear in layer.modules() if is_linear(linear))


def _weights(linear: nn.Module) -> dict[str, Tensor]:
    """What of a linear travels: a quantised one's weight, scales and codes; a plain one's weight. Biases stay."""
    if isinstance(linear, FrozenLinear):
        return dict(linear.named_buffers(recurse=False))
    weight = linear.weight
    assert isinstance(weight, Tensor)
    return {"weight": weight}


def _give(piece: Piece, values: Tensor) -> None:
    """Set a linear's tensor without a look at what was there; a plain linear's weight is a parameter."""
    if piece.name in piece.linear._buffers:
        piece.linear._buffers[piece.name] = values
    else:
        parameter = nn.Parameter(values, requires_grad=False)
        parameter._is_hf_initialized = True  # type: ignore[attr-defined]
        piece.linear._parameters[piece.name] = parameter
