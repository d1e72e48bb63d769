"""Where the inputs of the layers wait between forward and backward: on the device, or in host memory.

    forward     input of layer i   ──► device, one layer long ──► host memory         while layer i computes
    backward    layer i computes   ◄── device ◄─────────────────  host memory         the next piece on its way

They are the one thing of a long text that grows with depth: 2 · layers · d bytes a token. A *piece* is what a micro-batch
needs of an input, its rows. Backward asks for an input's pieces in order, and for the inputs from the last to the first;
each time the next piece is fetched while the one at hand is computed with.

On the device there are then, of whole inputs, the newest one (in forward that is the one its layer computes from, at the
turn of the step the one that backward begins with, which so is never fetched), and in backward one piece and the next.
Its copy out is waited for by the compute stream before that memory is given back, one layer later: torch's allocator then
knows the moment, and the peak does not depend on how far the CPU is ahead.

Host memory is page-locked and used again from step to step. On a CPU it is the memory that inputs lie in already, and
nothing is copied.

Knows tensors and streams; must not know a layer.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from qlora.errors import DoesNotFitError, ModelError
from qlora.machine.device import host_bytes
from qlora.machine.disk import bytes_text


class LayerInputs:
    """Keeps inputs in ``place``: "device" or "host"."""

    def __init__(self, place: str, device: torch.device) -> None:
        self.place = "device" if device.type == "cpu" else place
        self.device = device
        # without a GPU, as in a dry run on fake tensors, copies simply happen one after the other
        on_gpu = device.type == "cuda" and torch.cuda.is_available()
        self.side = torch.cuda.Stream(device) if on_gpu and self.place != "device" else None
        self.memory = HostMemory(device if on_gpu else torch.device("cpu"))
        self.waiting: weakref.WeakSet[KeptInput] = weakref.WeakSet()
        """Inputs that a backward is still to read."""
        self.newest: Callable[[], KeptInput | None] = _nothing

    def keep(self, hidden: Tensor, parts: Sequence[slice]) -> KeptInput:
        """Take the input ``hidden`` [R, T, D], whose rows will be asked for by ``parts``, before its layer runs.

        Raises DoesNotFitError where host memory is refused.
        """
        self.settle()
        kept = KeptInput(self, hidden, parts, self.newest)
        self.newest = weakref.ref(kept)
        self.waiting.add(kept)
        kept.send()
        return kept

    def settle(self) -> None:
        """Have the newest input where it is to wait, and its device memory free."""
        newest = self.newest()
        if newest is not None:
            newest.leave()

    def copy(self, target: Tensor, source: Tensor) -> torch.cuda.Event | None:
        """Copy on the side stream, after everything that the compute stream was given; what tells that it is done."""
        if self.side is None:
            target.copy_(source)
            return None
        self.side.wait_event(torch.cuda.current_stream(self.device).record_event())
        with torch.cuda.stream(self.side):
            target.copy_(source, non_blocking=True)
            return self.side.record_event()

    def arrive(self, arrival: torch.cuda.Event | None) -> None:
        """Let what is computed from now on find what ``arrival`` tells of."""
        if arrival is not None:
            torch.cuda.current_stream(self.device).wait_event(arrival)


class KeptInput:
    """One layer's input. Dropped without a backward, it leaves nothing behind."""

    def __init__(
        self,
        inputs: LayerInputs,
        hidden: Tensor,
        parts: Sequence[slice],
        before: Callable[[], KeptInput | None],
    ) -> None:
        self.inputs = inputs
        self.shape, self.dtype, self.parts = hidden.shape, hidden.dtype, list(parts)
        self.before = before
        self.host: Tensor | None = None  # uint8, its bytes in host memory
        self.sent: torch.cuda.Event | None = None
        """What tells that it has arrived there."""
        self.coming: dict[int, tuple[Tensor, torch.cuda.Event | None]] = {}
        """Pieces on their way back, and what tells that they have arrived."""
        self.here: Tensor | None = None
        """The input itself while it is still on the device."""
        self.here = hidden.detach().contiguous()
        self.version = self.here._version

    def send(self) -> None:
        """Begin to copy it out."""
        assert self.here is not None
        self.host = self.inputs.memory.take(self.here.nbytes)
        self.sent = self.inputs.copy(self._typed(self.host), self.here)

    def leave(self) -> None:
        """Give the device memory back, after what was sent from it has arrived."""
        if self.here is not None:
            self._refuse_changed()
            self.inputs.arrive(self.sent)
            self.here = self.sent = None

    def rows(self, number: int) -> Tensor:
        """The rows of part ``number`` on the device, and what comes after them on its way there."""
        if self not in self.inputs.waiting:
            raise RuntimeError("Backward a second time through a layer whose input is no longer kept.")
        if self.here is not None:
            self._refuse_changed()
            piece = self.here[self.parts[number]]
        else:
            self.fetch(number)
            piece, arrival = self.coming.pop(number)
            self.inputs.arrive(arrival)
        following, first = (self, number + 1) if number + 1 < len(self.parts) else (self.before(), 0)
        if following is not None:
            following.fetch(first)
        return piece

    def fetch(self, number: int) -> None:
        """Begin to bring the rows of part ``number`` back, unless they are there or on their way."""
        inputs, part = self.inputs, self.parts[number]
        if self.here is not None or number in self.coming or self not in inputs.waiting:
            return
        assert self.host is not None
        shape = torch.Size((part.stop - part.start, *self.shape[1:]))
        # of the compute stream's memory, so the side stream may write only after what ran there before
        piece = torch.empty(shape, dtype=self.dtype, device=inputs.device)
        self.coming[number] = piece, inputs.copy(piece, self._typed(self.host)[part])

    def forget(self) -> None:
        """Give back what it holds, once backward has read it or nobody will."""
        self.inputs.waiting.discard(self)
        for _, arrival in self.coming.values():  # its memory may not be anyone's before the copy into it is over
            self.inputs.arrive(arrival)
        self.coming.clear()
        self.here = None
        if self.host is not None:  # whoever takes it next copies on the same stream, after this one's copies
            self.inputs.memory.give(self.host)
            self.host = None

    def __del__(self) -> None:
        self.forget()

    def _typed(self, memory: Tensor) -> Tensor:
        """The first bytes of ``memory`` as a tensor like the input."""
        return memory[: self.shape.numel() * self.dtype.itemsize].view(self.dtype).view(self.shape)

    def _refuse_changed(self) -> None:
        if self.here is not None and self.here._version != self.version:
            raise ModelError(
                "A layer of this model writes over its own input, from which its gradients are to be computed again; set "
                "training.recompute=none."
            )


class HostMemory:
    """Pieces of host memory that are used again, page-locked where ``device`` is a GPU: locking takes long."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.free: list[Tensor] = []

    def take(self, size: int) -> Tensor:
        """At least ``size`` bytes: the smallest piece that is large enough, or a new one in the place of a smaller.

        Steps of many lengths so come to have one piece a layer, of the longest. Raises DoesNotFitError.
        """
        self.free.sort(key=len)
        for index, memory in enumerate(self.free):
            if len(memory) >= size:
                return self.free.pop(index)
        if self.free:
            self._wait()
            del self.free[-1]
        try:
            return host_bytes(size, self.device)
        except DoesNotFitError as error:
            raise DoesNotFitError(
                f"A layer's input takes {bytes_text(size)} of host memory, which were refused; set "
                "memory.layer_inputs=device, or lower data.max_length or training.batch_size."
            ) from error

    def give(self, memory: Tensor) -> None:
        """Take a piece back."""
        self.free.append(memory)

    def __del__(self) -> None:
        self._wait()

    def _wait(self) -> None:
        """Let copies end before memory under them is given back to the system."""
        if self.device.type == "cuda" and self.free:
            torch.cuda.synchronize(self.device)


def _nothing() -> None:
    """What a weak reference gives whose object is gone."""


def device_bytes(phase: str, waiting: int, kept: int, whole: int, piece: int) -> int:
    """Bytes of layer inputs on the device while the others wait in host memory, for a plan.

    ``waiting`` of all ``kept`` inputs, ``whole`` bytes each, are still to be read by backward; a micro-batch reads ``piece``
    bytes of one. The newest is whole on the device until it was used; in backward it is one piece and the next.
    """
    if phase == "forward" or not waiting:  # a layer's own input is not among these yet
        return 0
    if phase == "loss":
        return whole
    return whole + piece if waiting == kept else 2 * piece
