"""Where the inputs of the layers wait between forward and backward: on the device, in host memory, or on disk.

    forward     input of layer i   ──► device, one layer long ──► host memory ─► file         while layer i computes
    backward    layer i computes   ◄── device ◄─────────────────  host memory ◄─ file   ◄──   the next piece on its way

They are the one thing of a long text that grows with depth: 2 · layers · d bytes a token. A *piece* is what a micro-batch
needs of an input, its rows. Backward asks for an input's pieces in order, and for the inputs from the last to the first;
each time the next piece is fetched while the one at hand is computed with.

On the device there are then, of whole inputs, the newest one (in forward that is the one its layer computes from, at the
turn of the step the one that backward begins with, which so is never fetched), and in backward one piece and the next.
Its copy out is waited for by the compute stream before that memory is given back, one layer later: torch's allocator then
knows the moment, and the peak does not depend on how far the CPU is ahead.

The file has no name, so nothing of it is left whatever happens. Each input has a place of its own in it, and once none
is waited for the file is emptied. Host memory on the way of a GPU is page-locked and used again from step to step. On a
CPU ``host`` is the memory that inputs lie in already, and nothing is copied.

Knows tensors, streams and one file; must not know a layer.
"""

from __future__ import annotations

import tempfile
import weakref
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from qlora.errors import DoesNotFitError, ModelError, disk_is_full
from qlora.machine.device import bytes_text, host_bytes


class LayerInputs:
    """Keeps inputs in ``place``: "device", "host" or "disk" (a file in ``folder``, or the system's for temporary files).

    Raises ModelError where that folder cannot be written.
    """

    def __init__(self, place: str, device: torch.device, folder: Path | None = None) -> None:
        self.place = "device" if place == "host" and device.type == "cpu" else place
        self.device = device
        # without a GPU, as in a dry run on fake tensors, copies simply happen one after the other
        on_gpu = device.type == "cuda" and torch.cuda.is_available()
        self.side = torch.cuda.Stream(device) if on_gpu and self.place != "device" else None
        self.memory = HostMemory(device if on_gpu else torch.device("cpu"))
        self.file = SpillFile(folder) if self.place == "disk" else None
        self.waiting: weakref.WeakSet[KeptInput] = weakref.WeakSet()
        """Inputs that a backward is still to read."""
        self.newest: Callable[[], KeptInput | None] = _nothing

    def keep(self, hidden: Tensor, parts: Sequence[slice]) -> KeptInput:
        """Take the input ``hidden`` [R, T, D], whose rows will be asked for by ``parts``, before its layer runs.

        Raises DoesNotFitError or ModelError when the one before could not be written.
        """
        self.settle()
        self.tidy()
        kept = KeptInput(self, hidden, parts, self.newest)
        self.newest = weakref.ref(kept)
        self.waiting.add(kept)
        kept.send()
        return kept

    def settle(self) -> None:
        """Have the newest input where it is to wait, and its device memory free. Raises as ``keep``."""
        newest = self.newest()
        if newest is not None:
            newest.leave()

    def tidy(self) -> None:
        """Empty the file once nobody waits for anything in it."""
        if self.file is not None and not self.waiting:
            self.file.empty()


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
        self.start = 0  # its place in the file
        self.sent: Any = None  # what tells that it has arrived there: an event, or a future of the file
        self.coming: dict[int, tuple[Tensor, Any]] = {}
        """Pieces on their way back, and what tells that they have arrived."""
        self.here: Tensor | None = None
        """The input itself while it is still on the device."""
        self.here = hidden.detach().contiguous()
        self.version = self.here._version

    def send(self) -> None:
        """Begin to copy it out."""
        inputs, hidden = self.inputs, self.here
        assert hidden is not None
        size = hidden.numel() * hidden.element_size()
        if inputs.file is None:
            self.host = inputs.memory.take(size)
            self.sent = self._copy(self._typed(self.host, self.shape), hidden)
        else:
            self.start = inputs.file.place(size)
            self.sent = inputs.file.work(_write, inputs, self.start, hidden, _moment(inputs))

    def leave(self) -> None:
        """Give the device memory back, after what was sent from it has arrived."""
        if self.here is None:
            return
        self._refuse_changed()
        sent, self.sent = self.sent, None  # an error holds the graph by its traceback, so the graph must not hold it
        try:
            _arrive(sent, self.inputs.device)
        except BaseException:
            self.forget()
            raise
        self.here = None

    def rows(self, number: int) -> Tensor:
        """The rows of part ``number`` on the device, and what comes after them on its way there.

        Raises DoesNotFitError or ModelError when they could not be written or read.
        """
        if self not in self.inputs.waiting:
            raise RuntimeError("Backward a second time through a layer whose input is no longer kept.")
        if self.here is not None:
            self._refuse_changed()
            piece = self.here[self.parts[number]]
        else:
            self.fetch(number)
            piece, arrival = self.coming.pop(number)
            _arrive(arrival, self.inputs.device)
        following, first = (self, number + 1) if number + 1 < len(self.parts) else (self.before(), 0)
        if following is not None:
            following.fetch(first)
        return piece

    def fetch(self, number: int) -> None:
        """Begin to bring the rows of part ``number`` back, unless they are there or on their way."""
        inputs, part = self.inputs, self.parts[number]
        if self.here is not None or number in self.coming or self not in inputs.waiting:
            return
        shape = torch.Size((part.stop - part.start, *self.shape[1:]))
        # of the compute stream's memory, so the side stream may write only after what ran there before
        piece = torch.empty(shape, dtype=self.dtype, device=inputs.device)
        row = self.shape[1:].numel() * self.dtype.itemsize
        if inputs.file is None:
            assert self.host is not None
            self.coming[number] = piece, self._copy(piece, self._typed(self.host, self.shape)[part])
        else:
            start = self.start + part.start * row
            self.coming[number] = piece, inputs.file.work(_read, inputs, start, piece, _moment(inputs))

    def done(self) -> None:
        """Backward has read it."""
        self.forget()
        self.inputs.tidy()

    def forget(self) -> None:
        """Give back what it holds."""
        self.inputs.waiting.discard(self)
        if self.inputs.file is None:
            for _, arrival in self.coming.values():  # its memory may not be anyone's before the copy into it is over
                _arrive(arrival, self.inputs.device)
        self.coming.clear()  # what a file's reader still writes into, it holds itself
        self.here = None
        if self.host is not None:  # whoever takes it next copies on the same stream, after this one's copies
            self.inputs.memory.give(self.host)
            self.host = None

    def __del__(self) -> None:
        self.forget()

    def _copy(self, target: Tensor, source: Tensor) -> Any:
        """Copy on the side stream, after everything that the compute stream was given; what tells that it is done."""
        side = self.inputs.side
        if side is None:
            target.copy_(source)
            return None
        side.wait_event(_moment(self.inputs))
        with torch.cuda.stream(side):
            target.copy_(source, non_blocking=True)
            return side.record_event()

    def _typed(self, memory: Tensor, shape: torch.Size) -> Tensor:
        """The first bytes of ``memory`` as a tensor of this input's dtype."""
        return memory[: shape.numel() * self.dtype.itemsize].view(self.dtype).view(shape)

    def _refuse_changed(self) -> None:
        if self.here is not None and self.here._version != self.version:
            raise ModelError(
                "A layer of this model writes over its own input, from which its gradients are to be computed again; set "
                "training.gradient_checkpointing=false."
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
                "memory.layer_inputs=disk, or lower data.max_length or training.batch_size."
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


class SpillFile:
    """A file without a name and the thread that alone reads and writes it, in the order of asking."""

    def __init__(self, folder: Path | None) -> None:
        self.folder = Path(tempfile.gettempdir()) if folder is None else folder
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            self.file: Any = tempfile.TemporaryFile(buffering=0, dir=self.folder)  # noqa: SIM115
        except OSError as error:
            raise self.refusal(error) from error
        weakref.finalize(self, self.file.close)
        self.thread = ThreadPoolExecutor(1, thread_name_prefix="qlora-layer-inputs")
        self.end = 0

    def place(self, size: int) -> int:
        """Where the next ``size`` bytes begin."""
        self.end += size
        return self.end - size

    def empty(self) -> None:
        """Give the disk's space back. What was not written to the disk yet never is."""
        if self.end:
            self.end = 0
            self.work(self.file.truncate, 0)

    def work(self, act: Callable[..., object], *arguments: Any) -> Future[None]:
        """Let the thread do it after what it was asked before; the future raises what ``refusal`` makes of an error."""
        file, held = weakref.ref(self), list(arguments)  # the thread is not to keep the file open

        def run() -> None:
            try:
                act(*held)
            except OSError as error:
                found = file()
                raise error if found is None else found.refusal(error) from error
            finally:
                held.clear()  # before whoever waits goes on: the tensor's memory is free when it is written

        return self.thread.submit(run)

    def write(self, start: int, values: memoryview) -> None:
        """On the thread: write bytes from ``start`` on."""
        self.file.seek(start)
        while len(values):  # a nearly full disk takes a part first
            values = values[self.file.write(values) :]

    def read(self, start: int, values: memoryview) -> None:
        """On the thread: fill ``values`` with the bytes from ``start`` on."""
        self.file.seek(start)
        while len(values):
            count = self.file.readinto(values)
            if not count:
                raise OSError("the file ends too early")
            values = values[count:]

    def refusal(self, error: OSError) -> DoesNotFitError | ModelError:
        """The sentence for what the disk said."""
        if disk_is_full(error):
            return DoesNotFitError(
                f"The disk under '{self.folder}' is full: the inputs of the layers of one step take more than is free there. "
                "Free some, let memory.cache name a folder on a larger disk, or set memory.layer_inputs=host."
            )
        return ModelError(
            f"The inputs of the layers cannot be kept in a file under '{self.folder}' ({error.strerror or error}); let memory.cache "
            "name a folder that can be written, or set memory.layer_inputs=host."
        )


def _write(inputs: LayerInputs, start: int, hidden: Tensor, ready: Any) -> None:
    """On the thread: bring ``hidden`` into the file. On a GPU through host memory; done when both are."""
    assert inputs.file is not None
    if inputs.side is None:
        inputs.file.write(start, _bytes(hidden))
        return
    memory = inputs.memory.take(hidden.numel() * hidden.element_size())
    with torch.cuda.stream(inputs.side):
        inputs.side.wait_event(ready)
        whole = memory[: hidden.numel() * hidden.element_size()].view(hidden.dtype).view(hidden.shape)
        whole.copy_(hidden, non_blocking=True)
        inputs.side.synchronize()
    inputs.file.write(start, _bytes(whole))
    inputs.memory.give(memory)


def _read(inputs: LayerInputs, start: int, piece: Tensor, ready: Any) -> None:
    """On the thread: fill ``piece`` from the file. On a GPU through host memory, and it is there when this is done."""
    assert inputs.file is not None
    if inputs.side is None:
        inputs.file.read(start, _bytes(piece))
        return
    memory = inputs.memory.take(piece.numel() * piece.element_size())
    whole = memory[: piece.numel() * piece.element_size()].view(piece.dtype).view(piece.shape)
    inputs.file.read(start, _bytes(whole))
    with torch.cuda.stream(inputs.side):
        inputs.side.wait_event(ready)
        piece.copy_(whole, non_blocking=True)
        inputs.side.synchronize()
    inputs.memory.give(memory)


def _bytes(values: Tensor) -> memoryview:
    """The memory of a contiguous tensor on the CPU."""
    return values.view(-1).view(torch.uint8).numpy().data


def _moment(inputs: LayerInputs) -> Any:
    """An event after everything that the compute stream was given; None without a GPU."""
    return None if inputs.side is None else torch.cuda.current_stream(inputs.device).record_event()


def _arrive(arrival: Any, device: torch.device) -> None:
    """Let what is computed from now on find what ``arrival`` tells of."""
    if isinstance(arrival, Future):
        arrival.result()
    elif arrival is not None:
        torch.cuda.current_stream(device).wait_event(arrival)


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
