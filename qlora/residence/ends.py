"""The two largest matrices that are not quantised, in host memory: the input embedding and the output head.

    ids ──────────► host: embedding[ids] ──────────► rows [.., D] on the device     only the rows of the tokens at hand travel
    head on the host ─► slice of the vocabulary ─► device                           two places: one computes, one is filled

A head that is tied to the embedding is the same matrix, so both go together and it lies there once. Nothing of a matrix in
host memory trains. On a CPU nothing moves, and the slices are views: the same code, so the same numbers.

Why a ``HostLinear`` is an ``nn.Linear`` and no ``FrozenLinear``: it is the plain dense head, which every method knows how to
treat; only ``dense_weight`` (nf4.py) must know that its weight is to be had on ``compute_device``.

Knows modules, devices and streams; must not know the loss that is summed over the slices, adapters or checkpoints.

Shape suffixes: V vocabulary, D hidden size.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor
from torch.autograd.function import once_differentiable

from qlora.errors import ModelError
from qlora.machine.device import host_bytes
from qlora.model import anatomy
from qlora.model.loss import fp32_product

SLICE = 64 * 1024**2
"""Bytes of the head that travel at once: 2 to 5 ms on PCI Express, against which a copy's start is nothing. Two of them lie
on the device."""


class HostLinear(nn.Linear):
    """A dense output head whose frozen ``weight`` [V, D] lies in host memory, and whose products are made on ``compute_device``.

    ``forward`` takes [.., D] to [.., V] and fetches the head once, slice by slice; its backward fetches it once more. The loss
    knows better (see ``loss.py``). What is planted around it, as LoRA, asks for it once a chunk of positions, and in backward
    for the whole of it. A ``bias`` [V] stays on the device.
    """

    bias: nn.Parameter | None  # type: ignore[assignment]

    def __init__(self, weight: nn.Parameter, bias: nn.Parameter | None, device: torch.device) -> None:
        super().__init__(weight.shape[1], weight.shape[0], bias=False, device="meta")
        self.weight = weight
        self.bias = bias
        self.compute_device = device
        self.travels = weight.device != device
        count = -(-weight.nbytes // SLICE)
        self.rows = -(-self.out_features // max(1, count))
        """Rows of a slice; the last one may have fewer."""

    @property
    def compute_dtype(self) -> torch.dtype:
        """What it computes in: its own."""
        return self.weight.dtype

    def dequantise(self, dtype: torch.dtype) -> Tensor:
        """The whole weight [V, D] on the device."""
        return self.weight.detach().to(self.compute_device, dtype)

    def slices(self, dtype: torch.dtype) -> Iterator[tuple[int, int, Tensor]]:
        """(start, stop, weight[start:stop] on the device), over the whole vocabulary.

        A slice is only good until the next one is asked for: its place is filled anew. Not to be taken while another thread
        computes with the same head.
        """
        weight = self.weight.detach()
        spans = [(start, min(start + self.rows, len(weight))) for start in range(0, len(weight), self.rows)]
        if not self.travels:
            for start, stop in spans:
                yield start, stop, weight[start:stop].to(dtype)
            return
        places = [weight.new_empty(self.rows, weight.shape[1], device=self.compute_device) for _ in spans[:2]]
        streams = self._streams()
        arrived: dict[int, torch.cuda.Event] = {}

        def fetch(number: int) -> None:
            start, stop = spans[number]
            place = places[number % 2][: stop - start]
            if streams is None:
                place.copy_(weight[start:stop])
                return
            side, current = streams
            side.wait_stream(current)  # all that reads this place's last slice was queued before the next is asked for
            with torch.cuda.stream(side):
                place.copy_(weight[start:stop], non_blocking=True)
                arrived[number] = side.record_event()

        try:
            fetch(0)
            for number, (start, stop) in enumerate(spans):
                if number + 1 < len(spans):
                    fetch(number + 1)
                if streams is not None:
                    streams[1].wait_event(arrived.pop(number))
                yield start, stop, places[number % 2][: stop - start].to(dtype)
        finally:
            if streams is not None:  # whatever gets this memory next is queued behind the last copy into it
                streams[1].wait_stream(streams[0])

    def _streams(self) -> tuple[torch.cuda.Stream, torch.cuda.Stream] | None:
        """(the stream that copies, the one that computes); None without a GPU, or in a rehearsal without memory."""
        if self.compute_device.type != "cuda" or isinstance(self.weight, FakeTensor) or self.weight.is_meta:
            return None
        return torch.cuda.Stream(self.compute_device), torch.cuda.current_stream(self.compute_device)

    def product(self, x: Tensor) -> Tensor:
        """x Wᵀ + b for x [.., D], outside any graph."""
        y = x.new_empty(*x.shape[:-1], self.out_features)
        for start, stop, weight in self.slices(x.dtype):
            y[..., start:stop] = F.linear(x, weight, self.bias_of(start, stop, x.dtype))
        return y

    def bias_of(self, start: int, stop: int, dtype: torch.dtype) -> Tensor | None:
        """The bias of a slice."""
        return None if self.bias is None else self.bias[start:stop].detach().to(dtype)

    def forward(self, x: Tensor) -> Tensor:
        """[.., D] → [.., V]. Raises ModelError where something wants to train the weight."""
        if self.weight.requires_grad or (self.bias is not None and self.bias.requires_grad):
            raise ModelError(
                "The output head lies in host memory, where nothing trains, but something trains it; set memory.head=device."
            )
        return _Product.apply(x, self)


class _Product(torch.autograd.Function):
    """y = x Wᵀ + b. Nothing is saved: backward fetches the frozen W again."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, linear: HostLinear) -> Tensor:
        ctx.linear = linear
        return linear.product(x)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        rows = grad.reshape(-1, grad.shape[-1])
        total = rows.new_zeros(len(rows), ctx.linear.in_features, dtype=torch.float32)
        for start, stop, weight in ctx.linear.slices(grad.dtype):
            total += fp32_product(rows[:, start:stop], weight)
        return total.to(grad.dtype).view(*grad.shape[:-1], -1), None


def refuse_half(model: nn.Module, embedding: bool, head: bool) -> None:
    """Raise ModelError where the embedding or the head alone is to go to host memory, and both are one matrix.

    ``model`` may be on meta and its weights not yet tied.
    """
    if embedding != head and anatomy.is_tied(model):
        one, other = ("embedding", "head") if embedding else ("head", "embedding")
        raise ModelError(
            f"memory.{one} is host, but this {anatomy.kind(model)} model has one matrix for its embedding and its head, so "
            f"nothing would leave the device; set memory.{other}=host too, or memory.{one}=device."
        )


def embedding_on_host(model: nn.Module, device: torch.device | None = None) -> None:
    """Move the weight of the input embedding into host memory, in place; a head that is tied to it goes along.

    ``device`` is where the rows go, the weight's own when left out: give it where the weight was loaded into host memory.
    """
    embedding: Any = anatomy.embedding(model)
    if anatomy.is_tied(model):
        head_on_host(model, device)
    elif not gathers_on_host(embedding):
        weight: nn.Parameter = embedding.weight
        device = weight.device if device is None else device
        if not weight.is_meta:
            weight = nn.Parameter(weight.detach().to("cpu"), requires_grad=False)
        _gather_on_host(model, embedding, weight, device)


def head_on_host(model: nn.Module, device: torch.device | None = None) -> None:
    """Put a ``HostLinear`` in the place of the output head, in place; an embedding that is tied to it goes along.

    ``device`` is where it computes, the weight's own when left out. Raises ModelError for a head that is no plain linear.
    """
    head: Any = anatomy.head(model)
    embedding = anatomy.embedding(model)
    if isinstance(head, HostLinear):
        return
    path = anatomy.path_of(model, head)
    plain: bool = type(head) is nn.Linear
    if not plain or path is None:
        if head is not None and getattr(head, "weight", None) is getattr(embedding, "weight", head):
            raise ModelError(
                f"The embedding of this {anatomy.kind(model)} model is one matrix with its head, which is a {type(head).__name__}, not a "
                "plain linear that could wait in host memory; set memory.embedding=device and memory.head=device."
            )
        raise ModelError(
            f"memory.head is host, but the output head of this {anatomy.kind(model)} model is "
            f"{'missing' if head is None else 'a ' + type(head).__name__}, not a plain linear that could be cut into slices; set "
            "memory.head=device."
        )
    tied, device = anatomy.is_tied(model), head.weight.device if device is None else device
    weight, bias = _locked(head.weight, device), head.bias
    if bias is not None and bias.device != device:
        bias = nn.Parameter(bias.detach().to(device), requires_grad=False)
    model.set_submodule(path, HostLinear(weight, bias, device).train(head.training))
    if tied:
        _gather_on_host(model, embedding, weight, device)


def held_on_host(model: nn.Module) -> dict[int, str]:
    """The parameters of the modules that lie in host memory: id → the module's path."""
    found = {
        path: part for path, part in model.named_modules() if isinstance(part, HostLinear) or gathers_on_host(part)
    }
    return {id(values): path for path, part in found.items() for values in part.parameters(recurse=False)}


def gathers_on_host(module: nn.Module) -> bool:
    """Whether ``module`` is an embedding that ``embedding_on_host`` has moved."""
    return _rows_to_device in module._forward_hooks.values()


@torch.no_grad()
def on_device(module: nn.Module) -> nn.Module:
    """``module``, each embedding in it that lies in host memory moved to the device, as if it had never left: for copies."""
    for part in module.modules():
        if gathers_on_host(part):
            for hooks in (part._forward_hooks, part._forward_pre_hooks):
                for number in [number for number, hook in hooks.items() if hook in (_rows_to_device, _ids_to_host)]:
                    del hooks[number]
            part.to(part.compute_device)  # type: ignore[arg-type]
    return module


def _locked(weight: nn.Parameter, device: torch.device) -> nn.Parameter:
    """``weight`` in host memory from which ``device`` copies while it computes."""
    if device.type == "cpu" or weight.is_meta:
        return weight
    if isinstance(weight.data, FakeTensor):  # a rehearsal without memory
        return nn.Parameter(weight.detach().to("cpu"), requires_grad=False)
    memory = host_bytes(weight.nbytes, device)
    held = nn.Parameter(memory.view(weight.dtype).view(weight.shape), requires_grad=False)
    with torch.no_grad():
        held.copy_(weight)
    held.memory = memory  # type: ignore[attr-defined]  # it is locked for as long as this tensor lives
    return held


def _gather_on_host(model: nn.Module, embedding: Any, weight: nn.Parameter, device: torch.device) -> None:
    """Give ``embedding`` its ``weight`` in host memory, and have ids go there and rows come from there."""
    embedding.weight = weight
    for name, values in embedding.named_buffers(recurse=False):  # Gemma 3 scales inside its embedding
        setattr(embedding, name, values.to(weight.device))
    embedding.compute_device = device
    embedding.register_forward_pre_hook(_ids_to_host)
    embedding.register_forward_hook(_rows_to_device)
    # transformers takes the first parameter's device, which is the embedding's, for the model's, and generate() sends
    # positions and masks there
    anatomy.decoder(model).register_forward_pre_hook(
        lambda module, args, kwargs: (_moved(args, device), _moved(kwargs, device)), with_kwargs=True
    )


def _ids_to_host(embedding: Any, inputs: tuple[object, ...]) -> tuple[object, ...]:
    return tuple(value.to(embedding.weight.device) if isinstance(value, Tensor) else value for value in inputs)


def _rows_to_device(embedding: Any, inputs: tuple[object, ...], rows: Tensor) -> Tensor:
    return rows.to(embedding.compute_device)


def _moved(values: Any, device: torch.device) -> Any:
    """``values`` with every tensor in it on ``device``; a cache moves itself."""
    if isinstance(values, Tensor):
        return values.to(device)
    if type(values) is dict:
        return {key: _moved(value, device) for key, value in values.items()}
    return tuple(_moved(value, device) for value in values) if type(values) is tuple else values
