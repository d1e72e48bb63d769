"""The dry run: one step of the real code on fake tensors, every allocation counted, with a few of the model's layers.

    skeleton, L layers ─► copy with one layer of each kind ─► a step on fake tensors ─► spans ─► laid out over L layers

Fake tensors have shapes and no memory, so a step of a 70B model takes about a second on any machine. What runs is the code
that trains: decoder, methods, boundary and loss.

A span is what happens between two marks; each layer has one in each direction:

    forward    embedding │ layer 0 │ layer 1 │ … │ layer L−1, norm │ loss
    backward   rest      │ layer 0 │ layer 1 │ … │ layer L−1, norm │

What kernels allocate inside themselves is not counted, apart from masks and attention's backward (``INSIDE``); the rest is
within a percent or two of a step.

Knows adapted models and a step's order; must not know optimizers, tiers or what fits.
"""

from __future__ import annotations

import functools
import itertools
import logging
import weakref
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from enum import StrEnum
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from qlora.errors import ModelError, first_line
from qlora.methods.base import AdaptedModel
from qlora.model import anatomy
from qlora.model.attention import CPU_BACKWARD, PackedMask
from qlora.model.kernels.language import PIECE
from qlora.model.loss import IGNORE_INDEX, WIDENED, head_of, hidden_states, summed_loss
from qlora.planning.few_layers import layers_of, shortened
from qlora.residence.ends import HostLinear, embedding_on_host, head_on_host
from qlora.residence.layers import RecomputedLayer, wrap_layers
from qlora.residence.tiles import TiledMLP
from qlora.training.masters import wide_gradients

ROUNDS = 2  # micro-batches after which each further one finds the memory as the one before
BLOCK = {"cpu": 1, "cuda": 512}  # bytes that an allocation is rounded up to


logging.getLogger("torch._subclasses.fake_tensor").setLevel(logging.CRITICAL)  # what fails here is said below


class Phase(StrEnum):
    """A part of a step."""

    FORWARD = "forward"
    LOSS = "loss"
    BACKWARD = "backward"
    PENALTY = "penalty"
    OPTIMIZER = "optimizer"


@dataclass(frozen=True)
class Shape:
    """What a step puts through the model."""

    rows: int
    """Rows that enter the model together."""
    at_once: int
    """Rows that go through a layer together."""
    length: int
    passes: int
    """How often rows enter the model in a step, as far as that is told apart: at most ``ROUNDS``."""
    chunk: int
    kept: tuple[int, ...] | None
    """The layers that keep their activations behind the boundary; None where there is no boundary."""
    packed: bool
    mlp_tile: int | None = None
    embedding_on_host: bool = False
    head_on_host: bool = False


class Span(NamedTuple):
    """A part of a pass, in bytes: held when it begins, the most inside it, and held when it ends."""

    phase: Phase
    layer: int | None
    """Of the layers that ran; None for what comes before the first one, on the way back after it, and for the loss."""
    begin: int
    most: int
    end: int
    gradients: int
    """Of ``begin``."""
    new_gradients: int
    """Gradients at the end less those at the beginning."""


class Moment(NamedTuple):
    """A span laid out over the whole model, in bytes beyond weights and moments."""

    phase: Phase
    held: int
    """When it begins, gradients included."""
    more: int
    """The most inside it, beyond ``held``."""
    gradients: int
    inputs: int
    """How many layer inputs in ``held`` wait for backward."""


@dataclass(frozen=True)
class DryRun:
    """The spans of a step with a few layers, and which of these stands for each of the model's own."""

    passes: list[list[Span]]
    penalty: int
    """Bytes that the method's penalty takes, beside gradients, in the whole model."""
    place: list[int]
    """For each layer of the model, the one that ran for it."""
    graph: list[bool]
    """For each layer that ran, whether backward reaches it."""
    waits: list[bool]
    """For each layer that ran, whether its input waits for backward, where it is recomputed from."""
    input_bytes: int
    """One layer's input, for all rows that enter together."""
    shape: Shape

    @property
    def inputs(self) -> int:
        """How many layer inputs are kept for backward."""
        return sum(self.waits[place] for place in self.place)

    def moments(self) -> list[Moment]:
        """The whole model's step, part by part."""
        found: list[Moment] = []
        held, gradients = self.passes[0][0].begin, self.passes[0][0].gradients
        for spans in self.passes:
            inputs = 0
            for span, place in self._laid_out(spans):
                found.append(Moment(span.phase, held, span.most - span.begin, gradients, inputs))
                held += span.end - span.begin
                gradients += span.new_gradients
                if place is not None and self.waits[place]:
                    inputs += -1 if span.phase is Phase.BACKWARD else 1
        if self.penalty:
            found.append(Moment(Phase.PENALTY, held, self.penalty, gradients, 0))
        found.append(Moment(Phase.OPTIMIZER, held, 0, gradients, 0))
        return found

    def _laid_out(self, spans: list[Span]) -> Iterator[tuple[Span, int | None]]:
        """A pass over the whole model, in its order, with the layer that ran for each span, where it is a layer's.

        Example: layers 0, 1 and 2 ran for [0, 1, 1, 2], all with a graph → before, 0, 1, 1, 2, loss, 2, 1, 1, 0, rest
        """
        by_place = {(span.phase, span.layer): span for span in spans}
        rest = by_place[Phase.BACKWARD, None]
        yield by_place[Phase.FORWARD, None], None
        for place in self.place:
            yield by_place[Phase.FORWARD, place], place
        yield by_place[Phase.LOSS, None], None
        span = None
        for place in reversed([place for place in self.place if self.graph[place]]):
            # below the lowest layer that trains no gradient tells that it is done: what is left is its own
            span = by_place.get((Phase.BACKWARD, place), rest)
            yield span, place
        if span is not rest:
            yield rest, None


def dry_run(adapted: AdaptedModel, shape: Shape, device: str) -> DryRun:
    """Run a step of ``adapted`` (weights may be on meta) on fake tensors. ``device``: "cpu" or "cuda", whose kernels count.

    The model is left as it is. Without a list of decoder layers all of it runs. Raises ModelError where the layers do not
    take a part of the rows.
    """
    with FakeTensorMode(allow_non_fake_inputs=True):
        short, place = shortened(adapted, shape.packed, shape.kept or ())
        model: Any = short.model
        wide_gradients(values for values in model.parameters() if values.requires_grad)
        if shape.head_on_host:
            head_on_host(model)
        if shape.embedding_on_host:
            embedding_on_host(model)
        ledger = Ledger(model, device)
        graph: list[bool] = []
        try:
            keep = {place[layer] for layer in shape.kept or ()}
            passes = [_pass(model, shape, keep, ledger, graph) for _ in range(shape.passes)]
        except RuntimeError as error:  # Bloom's biases have no row for each row, and cannot be cut with them
            what = f"this {anatomy.kind(model)} model"
            if shape.at_once < shape.rows:
                what = f"The layers of {what} do not take {shape.at_once} of {shape.rows} rows at once ({first_line(error)})"
                raise ModelError(f"{what}; set training.accumulation=micro_batch_major.") from error
            if shape.kept is not None:  # Gemma 3n's have four states a token, and so no row where others have it
                raise ModelError(
                    f"The layers of {what} do not take rows behind their recompute boundary ({first_line(error)}); set "
                    "training.recompute=none training.accumulation=micro_batch_major."
                ) from error
            raise ModelError(
                f"A step of {what} cannot be gone through without its weights ({first_line(error)}), so that nobody could say "
                "what it needs; take another model, or report the model type."
            ) from error
        penalty = _penalty(short, ledger)
        whole, part = (sum(p.numel() for p in one.trainable_parameters().values()) for one in (adapted, short))
    width = anatomy.sizes(model).hidden * adapted.base.compute_dtype.itemsize
    waits = [reached and shape.kept is not None and ran not in keep for ran, reached in enumerate(graph)]
    inputs = shape.rows * shape.length * width
    return DryRun(passes, penalty * whole // max(1, part), place, graph, waits, inputs, shape)


# ── counting ──────────────────────────────────────────────────────────────────────────────────────────────────────────


class Ledger(TorchDispatchMode):
    """Counts the bytes of every storage that is made inside, for as long as it lives. What ``model`` holds is not counted."""

    def __init__(self, model: nn.Module, device: str) -> None:
        super().__init__()
        self.device = device
        self.block = BLOCK[device]
        self.live = self.peak = 0
        self.storages: dict[int, tuple[weakref.ref[Any], int]] = {}
        self.trained = [values for values in model.parameters() if values.requires_grad]
        for values in [*model.parameters(), *model.buffers()]:
            self._meet(values.untyped_storage(), 0)

    def gradients(self) -> int:
        """Bytes of the gradients that are there."""
        return sum(values.grad.untyped_storage().nbytes() for values in self.trained if values.grad is not None)

    def take_peak(self) -> int:
        """The most since this was last asked."""
        peak, self.peak = max(self.peak, self.live), self.live
        return peak

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.prim.device.default:  # more than half of all calls; it makes nothing
            return args[0].fake_device
        if func.overloadpacket in BY_MASK:
            args = (args[0], _without_masks(args[1]), *args[2:])
        result = INSTEAD.get(func, func)(*args, **(kwargs or {}))
        for values in tree_leaves(result):
            if isinstance(values, Tensor):
                self._track(values.untyped_storage())
        inside = INSIDE[self.device].get(func)
        more = inside(args) if inside is not None else 0
        if not (func is torch.ops.aten.add.Tensor and _in_backward()):
            self.peak = max(self.peak, self.live + more)
        return result

    def _track(self, storage: torch.UntypedStorage) -> None:
        if storage._cdata not in self.storages:
            size = -(-storage.nbytes() // self.block) * self.block
            self._meet(storage, size)
            self.live += size

    def _meet(self, storage: torch.UntypedStorage, size: int) -> None:
        key = storage._cdata
        self.storages[key] = weakref.ref(storage, lambda _: self._forget(key)), size

    def _forget(self, key: int) -> None:
        if key in self.storages:
            self.live -= self.storages.pop(key)[1]


BY_MASK = (torch.ops.aten.index, torch.ops.aten.index_put, torch.ops.aten.index_put_, torch.ops.aten._index_put_impl_)
"""Operators whose second argument are indices, masks among them."""


def _all_of(mask: Tensor) -> Tensor:
    """Where ``mask`` is true: nobody knows how often that is, and everywhere is what takes most."""
    return torch.empty(mask.numel(), mask.dim(), dtype=torch.long)


def _grouped(rows: Tensor, weights: Tensor, offs: Tensor, *_: Any, **__: Any) -> Tensor:
    """The product of each group of rows with its own matrix, or where both have two dimensions a matrix for each group."""
    groups = [len(offs)] if rows.dim() == weights.dim() == 2 else []
    return rows.new_empty([*groups, rows.shape[-2], weights.shape[-1]])


INSTEAD: dict[Any, Callable[..., Tensor]] = {
    torch.ops.aten.nonzero.default: _all_of,
    torch.ops.aten._grouped_mm.default: _grouped,  # which torch's fake tensors know in bf16 alone
}


def _without_masks(indices: list[Tensor | None]) -> list[Tensor | None]:
    """Numbers in the place of masks, as many as these could choose."""
    found: list[Tensor | None] = []
    for index in indices:
        is_mask = index is not None and index.dtype in (torch.bool, torch.uint8)
        found += _all_of(index).unbind(1) if is_mask else [index]  # type: ignore[arg-type]
    return found


def _in_backward() -> bool:
    """Whether autograd runs and makes no graph. The sums that it forms then are of a tensor's gradients, which a real step
    adds up in place, though never while a mode such as the ledger is on."""
    return torch._C._current_graph_task_id() != -1 and not torch.is_grad_enabled()


def _attention_backward(args: tuple[Any, ...]) -> int:
    """The queries' gradient in fp32, one number a query, and keys' and values' gradients for every query head, where several
    share one. Queries are [B, H, T, E], or [N, H, E] in one call for all examples."""
    query, key = args[1:3]
    shared = 2 * query.nbytes if query.shape[1] != key.shape[1] else 0
    return int(4 * query.numel() + 4 * query.numel() // query.shape[-1] + shared)


def _masked(args: tuple[Any, ...]) -> int:
    """The mask of dropout as numbers, where it was kept: ``x * mask``."""
    tensors = [values for values in args if isinstance(values, Tensor)]
    return sum(values.numel() * tensors[0].itemsize for values in tensors if values.dtype == torch.bool)


def _widened(args: tuple[Any, ...]) -> int:
    """A piece of both factors in fp32, where a kernel cannot leave the sums of 16-bit ones in it."""
    x, y = args
    return 0 if x.dtype == torch.float32 else 4 * min(WIDENED, len(y)) * (len(x) + y.shape[1])


def _normed(args: tuple[Any, ...]) -> int:
    """A piece in fp32; on the way back its norm, its gradient and their product."""
    rows = 1 if isinstance(args[2], float) else 3
    return rows * 4 * min(args[0].numel(), PIECE)


INSIDE: dict[str, dict[Any, Callable[[tuple[Any, ...]], int]]] = {
    "cpu": {
        torch.ops.aten.native_dropout.default: lambda args: args[0].nbytes,  # its mask as numbers
        torch.ops.aten.mul.Tensor: _masked,
        torch.ops.aten.mul_.Tensor: _masked,
        torch.ops.qlora.fp32_product.default: _widened,
        torch.ops.qlora.rms_norm.default: _normed,
        torch.ops.qlora.rms_norm_backward.default: _normed,
        torch.ops.qlora.glu_backward_.default: lambda args: 2 * args[0].nbytes,  # two products
    },
    # fake tensors are on the CPU: its operator stands for the GPU's
    "cuda": {
        **({CPU_BACKWARD.default: _attention_backward} if CPU_BACKWARD is not None else {}),
        torch.ops.torch_attn._varlen_attn_backward.default: _attention_backward,
    },
}
"""By operator, what its kernel holds beside its result: arguments → bytes."""


# ── a step ────────────────────────────────────────────────────────────────────────────────────────────────────────────


class _Marks:
    """Cuts a pass into spans."""

    def __init__(self, ledger: Ledger) -> None:
        self.ledger = ledger
        self.spans: list[Span] = []
        ledger.take_peak()
        self.begin, self.gradients = ledger.live, ledger.gradients()

    def close(self, phase: Phase, layer: int | None = None) -> None:
        """End the span that began with the last mark."""
        most, end, gradients = self.ledger.take_peak(), self.ledger.live, self.ledger.gradients()
        self.spans.append(Span(phase, layer, self.begin, most, end, self.gradients, gradients - self.gradients))
        self.begin, self.gradients = end, gradients


def _pass(model: Any, shape: Shape, keep: set[int], ledger: Ledger, graph: list[bool]) -> list[Span]:
    """Rows go through the model and back, as the trainer does it; layers ``keep`` are not recomputed."""
    if shape.kept is not None:
        _wrap(model, shape, keep)
    model.train()
    for module in model.modules():
        if "layerdrop" in vars(module):
            module.training = (
                False  # OPT draws whether to skip a layer, and a fake number is neither above nor below it
            )
    with ledger:
        marks = _Marks(ledger)
        graph.clear()
        with _marked(model, marks, graph):
            batch = {
                "input_ids": torch.zeros(shape.rows, shape.length, dtype=torch.long),
                "labels": torch.zeros(shape.rows, shape.length, dtype=torch.long),
                "position_ids": torch.arange(shape.length).repeat(shape.rows, 1),
                "mask": PackedMask([_examples(shape)] * shape.rows, shape.length),
            }
            loss = _loss(model, batch, shape.chunk, marks)
            marks.close(Phase.LOSS)
            if loss.requires_grad:
                loss.backward()  # type: ignore[no-untyped-call]
            del loss, batch
            marks.close(Phase.BACKWARD)
    return marks.spans


def _examples(shape: Shape) -> list[int]:
    """Where the examples of a row begin. One as long as can be beside another: a window is written out for its length."""
    return [0, shape.length - 1] if shape.packed and shape.length > 1 else [0]


def _loss(model: Any, batch: Mapping[str, Any], chunk: int, marks: _Marks) -> Tensor:
    """As ``batch_loss``, for rows in which every position is a target; two chunks stand for all that are alike."""
    hidden_BTD = hidden_states(model, batch)
    marks.close(Phase.FORWARD, len(layers_of(model)) - 1 if len(layers_of(model)) else None)
    flat_ND, head = hidden_BTD.flatten(0, 1), head_of(model)
    wanted = nn.functional.pad(batch["labels"][:, 1:], (0, 1), value=IGNORE_INDEX).reshape(-1)
    del hidden_BTD
    places = torch.arange(len(wanted))[: ROUNDS * chunk]
    others: Tensor | None = None
    if isinstance(head.module, HostLinear):  # each slice is seen by every position, and all slices are alike
        _slice_in(head.module, marks.ledger.device)
        # it sums up the gradient of every position, in fp32, until the last slice was there
        others = torch.empty(len(wanted) - len(places), flat_ND.shape[1]) if flat_ND.requires_grad else None
    loss = summed_loss(flat_ND, head, wanted, places, chunk)
    del others
    return loss


def _penalty(adapted: AdaptedModel, ledger: Ledger) -> int:
    """The most that the method's penalty and its backward take, beside gradients."""
    with ledger:
        ledger.take_peak()
        before = ledger.live
        penalty = adapted.penalty()
        if penalty is not None:
            penalty.backward()  # type: ignore[no-untyped-call]
        del penalty
        return ledger.take_peak() - max(before, ledger.live)


def _wrap(model: nn.Module, shape: Shape, keep: set[int]) -> None:
    """Put the layers behind the boundary; of its micro-batches, and of tiles, the first ones alone run.

    Of a layer that keeps the activations of all its micro-batches, all run."""
    wrap_layers(model, shape.at_once, mlp_tile=shape.mlp_tile, keep=keep)
    for module in model.modules():
        if isinstance(module, RecomputedLayer) and not module.keeps:
            module.__dict__["micro_batches"] = functools.partial(_first, shape.at_once)
        elif isinstance(module, TiledMLP):
            module.__dict__["tiles"] = functools.partial(_first, module.tile)


def _first(at_once: int, count: int) -> Iterator[slice]:
    for start in range(0, min(count, ROUNDS * at_once), at_once):
        yield slice(start, min(start + at_once, count))


def _slice_in(linear: HostLinear, device: str) -> None:
    """Have a head in host memory give its first slices alone; a GPU has places for two of them."""

    def slices(dtype: torch.dtype) -> Iterator[tuple[int, int, Tensor]]:
        count = min(ROUNDS, -(-linear.out_features // linear.rows)) if device == "cuda" else 0
        places = [linear.weight.new_empty(linear.rows, linear.in_features) for _ in range(count)]
        yield from itertools.islice(HostLinear.slices(linear, dtype), ROUNDS)
        del places

    linear.__dict__["slices"] = slices


@contextmanager
def _marked(model: nn.Module, marks: _Marks, graph: list[bool]) -> Iterator[None]:
    """Inside, each decoder layer tells when it is entered, and when its input's gradient is there."""
    with ExitStack() as hooks:
        for place, layer in enumerate(layers_of(model)):
            hooks.enter_context(layer.register_forward_pre_hook(_enter(marks, place, graph), with_kwargs=True))
        yield


def _enter(marks: _Marks, place: int, graph: list[bool]) -> Callable[..., None]:
    def enter(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        marks.close(Phase.FORWARD, place - 1 if place else None)
        hidden: Tensor = args[0] if args else kwargs["hidden_states"]
        graph.append(hidden.requires_grad or any(values.requires_grad for values in module.parameters()))
        if hidden.requires_grad:
            hidden.register_hook(lambda grad: marks.close(Phase.BACKWARD, place))

    return enter
