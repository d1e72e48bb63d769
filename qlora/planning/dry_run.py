"""The dry run: one step of the true code on fake tensors, every allocation counted, with a few of the model's layers.

    skeleton, L layers ─► copy with one layer of each kind ─► a step on fake tensors ─► spans ─► laid out over L layers

Fake tensors have shapes and no memory, so a step of a 70B model costs about a second on any machine. What is counted is
what the code allocates: decoder, methods, boundary and loss are the ones that train. Layers of one kind take the same, so
one of each kind runs. A span is what happens between two marks, of which each layer has one in each direction:

    forward    embedding │ layer 0 │ layer 1 │ … │ layer L−1, norm │ loss
    backward   rest      │ layer 0 │ layer 1 │ … │ layer L−1, norm │

It tells what was held when it began, the most that was held inside, and what is held when it ends. Two layers are of one
kind when their modules and shapes are the same and something trains below both of them or below neither; the first and
the last are kinds of their own, since the decoder's own variables hold what goes into the one and comes out of the other.

What a kernel allocates inside itself is not seen; what was found by measuring is counted by ``INSIDE`` and ``_mixed``. Not
counted: what oneDNN takes beside a product in bf16 on a CPU, half a MiB or so.

Knows adapted models and a step's order; must not know optimizers, tiers or what fits.
"""

from __future__ import annotations

import copy
import functools
import itertools
import sys
import weakref
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.masking_utils import sdpa_mask, sliding_window_causal_mask_function

from qlora.errors import ModelError, first_line
from qlora.methods import AdaptedModel
from qlora.methods.method import Method
from qlora.model.loss import IGNORE_INDEX, head_of, hidden_states, summed_loss
from qlora.residence.ends import HostLinear, embedding_on_host, head_on_host
from qlora.residence.layers import RecomputedLayer, decoder_layers, unwrap_layers, wrap_layers
from qlora.residence.tiles import TiledMLP

UNPACKED = "qlora_unpacked"
"""SDPA for rows of one example each. transformers takes fake tensors for tracing, and then writes out masks that a true
step does without, because it cannot look whether positions restart."""
ROUNDS = 2  # micro-batches after which each further one finds the memory as the one before
BLOCK = {"cpu": 1, "cuda": 512}  # bytes that an allocation is rounded up to


@dataclass(frozen=True)
class Shape:
    """What a step puts through the model."""

    rows: int
    """Rows that enter the model together."""
    at_once: int
    """Rows that go through a layer together."""
    length: int
    passes: int
    """How often rows enter the model in a step."""
    chunk: int
    checkpointing: bool
    packed: bool
    mlp_tile: int | None = None
    embedding_on_host: bool = False
    head_on_host: bool = False


@dataclass(frozen=True)
class Span:
    """A part of a step: bytes held when it begins, the most inside it, and when it ends; gradients among them."""

    begin: int
    most: int
    end: int
    gradients: int
    """Of ``begin``."""
    new_gradients: int
    """Gradients at the end less those at the beginning."""


@dataclass(frozen=True)
class Moment:
    """The same, laid out over the whole model: what is held in a part of the step, beyond weights and moments."""

    phase: str
    held: int
    """When it begins, gradients included."""
    more: int
    """The most inside it, beyond ``held``."""
    gradients: int
    inputs: int
    """Layer inputs that wait for backward in ``held``."""
    layer: int | None = None
    """The layer that is moved, where the optimizer runs in backward."""

    @property
    def most(self) -> int:
        """The most in it."""
        return self.held + self.more


@dataclass(frozen=True)
class DryRun:
    """The spans of a step with a few layers, and which of them stands for each of the model's own."""

    passes: list[dict[tuple[str, int], Span]]
    penalty: int
    """What the method's penalty takes, beside gradients, in the whole model."""
    place: list[int]
    """For each layer of the model, the one that ran for it."""
    graph: list[bool]
    """For each layer that ran, whether backward reaches it."""
    input_bytes: int
    """One layer's input, for all rows that enter together."""
    shape: Shape

    def moments(self, freed: bool = False) -> list[Moment]:
        """The whole model's step, part by part. ``freed``: the optimizer moves a layer and frees its gradients when it is done."""
        found: list[Moment] = []
        held = gradients = 0
        for number, spans in enumerate(self.passes):
            inputs = 0
            if not number:
                held, gradients = spans["before", 0].begin, spans["before", 0].gradients
            for key, layer in self._order(spans):
                kind, span = key[0], spans[key]
                phase = {"before": "forward", "rest": "backward"}.get(kind, kind)
                found.append(Moment(phase, held, span.most - span.begin, gradients, inputs))
                held += span.end - span.begin
                gradients += span.new_gradients
                back = kind in ("backward", "rest") and layer is not None
                if self.shape.checkpointing and layer is not None:
                    inputs += -1 if back else int(self.graph[self.place[layer]])
                if freed and back:
                    found.append(Moment("optimizer", held, 0, gradients, inputs, layer))
                    held, gradients = held - span.new_gradients, gradients - span.new_gradients
        if self.penalty:
            found.append(Moment("penalty", held, self.penalty, gradients, 0))
        found.append(Moment("optimizer", held, 0, gradients, 0))
        return found

    def _order(self, spans: Mapping[tuple[str, int], Span]) -> list[tuple[tuple[str, int], int | None]]:
        """The spans of a pass over the whole model, each with the layer that it is."""
        layers = list(enumerate(self.place))
        found: list[tuple[tuple[str, int], int | None]] = [(("before", 0), None)]
        found += [(("forward", place), layer) for layer, place in layers]
        found.append((("loss", 0), None))
        reached = [layer for layer, place in layers if self.graph[place]]
        for layer in reversed(reached):
            # below the lowest layer that trains no gradient tells that it is done: what is left is its own
            key = ("backward", self.place[layer])
            found.append((key, layer) if key in spans else (("rest", 0), layer))
        if found[-1][0][0] != "rest":
            found.append((("rest", 0), None))
        return found


def dry_run(adapted: AdaptedModel, shape: Shape, device: str) -> DryRun:
    """Run a step of ``adapted`` (weights may be on meta) on fake tensors. ``device``: "cpu" or "cuda", whose kernels count.

    The model is left as it is. Without a list of decoder layers all of it runs.
    """
    with FakeTensorMode(allow_non_fake_inputs=True):
        short, place = shortened(adapted, shape.packed)
        model: Any = short.model
        if shape.head_on_host:
            head_on_host(model)
        if shape.embedding_on_host:
            embedding_on_host(model)
        ledger = Ledger(model, device)
        graph: list[bool] = []
        try:
            passes = [_step(short, shape, ledger, graph) for _ in range(min(shape.passes, ROUNDS))]
        except RuntimeError as error:  # Bloom's biases have no row for each row, and cannot be cut with them
            raise ModelError(
                f"The layers of this {model.config.model_type} model do not take {shape.at_once} of {shape.rows} rows at once "
                f"({first_line(error)}); set training.accumulation=micro_batch_major."
            ) from error
        penalty = _penalty(short, ledger)
        whole, part = (sum(p.numel() for p in one.trainable_parameters().values()) for one in (adapted, short))
    width = model.config.hidden_size * adapted.base.compute_dtype.itemsize
    return DryRun(passes, penalty * whole // max(1, part), place, graph, shape.rows * shape.length * width, shape)


def shortened(adapted: AdaptedModel, packed: bool, more: int = 0) -> tuple[AdaptedModel, list[int]]:
    """A copy of fake tensors with one decoder layer of each kind, and for each of the model's layers the one that stands for it.

    ``more`` layers are kept beside these.
    """
    model: Any = adapted.model
    try:
        layers = decoder_layers(model)
    except ModelError:
        layers = nn.ModuleList()
    kinds = _kinds(model, layers)
    first = {kinds.index(kind) for kind in kinds}
    kept = sorted(first.union([index for index in range(len(layers)) if index not in first][:more]))
    config = copy.deepcopy(model.config)
    memo: dict[int, Any] = {id(model.config): config}
    _shorten(config, kept, len(layers))
    _choose_attention(config, packed)
    gone = {id(part) for layer in layers for part in layer.modules()}
    gone -= {id(part) for index in kept for part in layers[index].modules()}  # layers may share a module
    for module in model.modules():
        if id(module) not in gone:
            _fake_tensors(module, memo)
    memo[id(layers)] = nn.ModuleList(copy.deepcopy(layers[index], memo) for index in kept)
    base = copy.copy(adapted.base)
    base.model, base.device = copy.deepcopy(model, memo), torch.device("cpu")
    short = copy.copy(adapted)
    short.base = base
    short.methods = [_of_copy(method, base, memo) for method in adapted.methods]
    if len(kept) < len(layers) and decoder_layers(base.model) is not memo[id(layers)]:
        return shortened(adapted, packed, more + 1)  # another list in it has as many entries: P-tuning's network
    unwrap_layers(base.model)
    return short, [kept.index(kinds.index(kind)) for kind in kinds]


def _of_copy(method: Method, base: Any, memo: dict[int, Any]) -> Method:
    """``method`` over what of its planted modules is in the copy."""
    found = copy.copy(method)
    found.base, found.device = base, base.device
    found.planted = {path: memo[id(layer)] for path, layer in method.planted.items() if id(layer) in memo}
    for layer in found.planted.values():
        if hasattr(layer, "lacks"):  # values that EVA takes from data, and others from a file
            layer.lacks = None  # type: ignore[assignment]
    return found


def _kinds(model: Any, layers: nn.ModuleList) -> list[Any]:
    """For each layer what it is, equal where one takes the memory that another takes."""
    types = getattr(model.config, "layer_types", None) or [None] * len(layers)
    below = False
    found = []
    for index, layer in enumerate(layers):
        found.append((_structure(layer), types[index], below, index == 0, index == len(layers) - 1))
        below = below or any(values.requires_grad for values in layer.parameters())
    return found


def _structure(layer: nn.Module) -> tuple[Any, ...]:
    """Modules, their plain settings, and the shapes of what they hold."""
    found = []
    for module in layer.modules():
        tensors = (*module._parameters.items(), *module._buffers.items())
        settings = tuple(
            (key, value)
            for key, value in vars(module).items()
            if isinstance(value, bool | int | float | str) and key not in ("layer_idx", "training")
        )
        shapes = tuple(
            (key, tuple(values.shape), values.dtype, values.requires_grad)
            for key, values in tensors
            if values is not None
        )
        found.append((type(module), settings, shapes))
    return tuple(found)


def _shorten(config: Any, kept: list[int], count: int) -> None:
    """Let the copy's configuration be one of the kept layers: their number, and every list with an entry for each layer."""
    if not count:
        return
    for key, value in list(vars(config).items()):
        if isinstance(value, list) and len(value) == count and key.startswith(("layer", "no_rope", "attention")):
            setattr(config, key, [value[index] for index in kept])
    config.num_hidden_layers = len(kept)


def _choose_attention(config: Any, packed: bool) -> None:
    """Have the copy attend as a true step of such rows does (see ``UNPACKED``). Flash attention never has a mask."""
    name = str(getattr(config, "_attn_implementation", None))
    if "flash" in name or (name == "sdpa" and not packed):
        config._attn_implementation = UNPACKED


def _unpacked_mask(
    batch_size: int, q_length: int, kv_length: int, *args: Any, local_size: int | None = None, **kwargs: Any
) -> Tensor | None:
    """No mask, as SDPA hides the future by itself; but a window that is shorter than the rows is written out."""
    if local_size is None or kv_length < local_size:
        return None
    window = sliding_window_causal_mask_function(local_size)
    kwargs |= {"mask_function": window, "allow_is_causal_skip": False}
    mask: Tensor | None = sdpa_mask(batch_size, q_length, kv_length, *args, local_size=local_size, **kwargs)
    return mask


def _unpacked_attention(module: nn.Module, *args: Any, **kwargs: Any) -> Any:
    return AttentionInterface()["sdpa"](module, *args, **kwargs)


AttentionInterface.register(UNPACKED, _unpacked_attention)
AttentionMaskInterface.register(UNPACKED, _unpacked_mask)


def _fake_tensors(module: nn.Module, memo: dict[int, Any]) -> None:
    """Put into ``memo`` a fake CPU tensor for each one that ``module`` holds itself, in whatever way."""
    held = [*module._parameters.values(), *module._buffers.values(), *vars(module).values()]
    for values in held:
        if isinstance(values, Tensor) and id(values) not in memo:
            memo[id(values)] = _fake(values)


def _fake(values: Tensor) -> Tensor:
    made = torch.empty(values.shape, dtype=values.dtype)
    return nn.Parameter(made, requires_grad=values.requires_grad) if isinstance(values, nn.Parameter) else made


# ── counting ──────────────────────────────────────────────────────────────────────────────────────────────────────────


class Ledger(TorchDispatchMode):
    """Counts the bytes of every storage that is made inside, for as long as it lives. What ``model`` holds is not counted."""

    def __init__(self, model: nn.Module, device: str) -> None:
        super().__init__()
        self.device = device
        self.block = BLOCK[device]
        self.live = self.peak = 0
        self.storages: dict[int, tuple[Any, int]] = {}
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
        result = func(*args, **(kwargs or {}))
        # autograd adds up the gradients of a tensor in place, but never while a mode such as this one is on
        in_place = func is torch.ops.aten.add.Tensor and sys._getframe(1).f_code.co_name == "_engine_run_backward"
        before = self.live
        for values in tree_leaves(result):
            if isinstance(values, Tensor):
                self._track(values)
        inside = INSIDE.get(func)
        if inside is not None:
            self.peak = max(self.peak, before + inside(self.device, args, result))
        elif self.device == "cpu" and torch.Tag.pointwise in func.tags:
            self.peak = max(self.peak, self.live + _mixed(args, result))
        if not in_place:
            self.peak = max(self.peak, self.live)
        return result

    def _track(self, values: Tensor) -> None:
        storage = values.untyped_storage()
        if storage._cdata not in self.storages:
            size = -(-storage.nbytes() // self.block) * self.block
            self._meet(storage, size)
            self.live += size

    def _meet(self, storage: Any, size: int) -> None:
        key = storage._cdata
        self.storages[key] = weakref.ref(storage, lambda _: self._forget(key)), size

    def _forget(self, key: int) -> None:
        self.live -= self.storages.pop(key, (None, 0))[1]


def _dropout(device: str, args: Any, result: Any) -> int:
    # on a CPU the mask is turned into numbers before it is multiplied with
    return sum(map(_bytes, result)) + (_bytes(args[0]) if device == "cpu" else 0)


def _mean(device: str, args: Any, result: Any) -> int:
    narrow = args[0].dtype in (torch.bfloat16, torch.float16) and device == "cpu"
    return _bytes(result) + (4 * args[0].numel() if narrow else 0)


def _attention(device: str, args: Any, result: Any) -> int:
    """CPU: a block of scores and of the output for each thread; below fp32 rounded scores, and keys and values rearranged."""
    query_BHTE, key_BHTE, value_BHTE = args[:3]
    made = sum(map(_bytes, result))
    if device != "cpu":
        return made
    queries, keys = _tiles(query_BHTE, key_BHTE)
    size, width = query_BHTE.dtype.itemsize, query_BHTE.shape[3]
    block = 4 * queries * (keys + width + 2)
    if size == 4:
        return made + torch.get_num_threads() * block
    block += size * keys * (queries + width)
    return made + torch.get_num_threads() * block + _bytes(key_BHTE) + _bytes(value_BHTE)


def _attention_backward(device: str, args: Any, result: Any) -> int:
    """CPU: a tensor like the queries, and two blocks of scores for each thread. CUDA: the queries' gradient in fp32, one
    number a query, and the gradients of keys and values for every query head, where several share one."""
    query_BHTE, key_BHTE = args[1:3]
    made = sum(map(_bytes, result))
    if device == "cpu":
        queries, keys = _tiles(query_BHTE, key_BHTE)
        scores = 8 if query_BHTE.dtype.itemsize == 4 else 13  # fp32 twice, and rounded twice
        return made + _bytes(query_BHTE) + torch.get_num_threads() * scores * queries * keys
    shared = 2 * _bytes(query_BHTE) if query_BHTE.shape[1] != key_BHTE.shape[1] else 0
    return made + 4 * query_BHTE.numel() + 4 * query_BHTE.numel() // query_BHTE.shape[3] + shared


def _tiles(query_BHTE: Tensor, key_BHTE: Tensor) -> tuple[int, int]:
    """How many queries and keys torch's CPU kernel takes together."""
    tokens = query_BHTE.shape[2]
    return 256 if tokens >= 768 else 64 if tokens >= 192 else min(32, tokens), min(512, key_BHTE.shape[2])


INSIDE: dict[Any, Callable[[str, Any, Any], int]] = {
    torch.ops.aten.native_dropout.default: _dropout,
    torch.ops.aten.mean.dim: _mean,
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default: _attention,
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward.default: _attention_backward,
}
"""By operator, the most bytes that its kernel holds at a time, its result included: (device, arguments, result) → bytes."""


def _mixed(args: Any, result: Any) -> int:
    """What a CPU makes of the arguments of a pointwise operator that are not in the dtype that it computes in."""
    tensors = [values for values in tree_leaves(args) if isinstance(values, Tensor) and values.dim()]
    if not tensors or not isinstance(result, Tensor):
        return 0
    dtypes = {values.dtype for values in (*tensors, result)}
    if len(dtypes) == 1 or result.dtype == torch.bool:
        return 0
    wide = max((d for d in dtypes if d.is_floating_point), key=lambda dtype: dtype.itemsize, default=result.dtype)
    # a condition stays what it is
    taken = [v for v in tensors if v.dtype != wide and not (v.dtype == torch.bool and len(tensors) > 2)]
    written = [result] if result.dtype != wide else []
    return sum(values.numel() * wide.itemsize for values in (*taken, *written))


def _bytes(values: Tensor) -> int:
    return values.numel() * values.dtype.itemsize


# ── a step ────────────────────────────────────────────────────────────────────────────────────────────────────────────


class _Marks:
    """Cuts a pass into spans."""

    def __init__(self, ledger: Ledger) -> None:
        self.ledger = ledger
        self.spans: dict[tuple[str, int], Span] = {}
        ledger.take_peak()
        self.begin, self.gradients = ledger.live, ledger.gradients()

    def close(self, kind: str, place: int = 0) -> None:
        """End the span that began with the last mark."""
        most, end, gradients = self.ledger.take_peak(), self.ledger.live, self.ledger.gradients()
        self.spans[kind, place] = Span(self.begin, most, end, self.gradients, gradients - self.gradients)
        self.begin, self.gradients = end, gradients


def _step(adapted: AdaptedModel, shape: Shape, ledger: Ledger, graph: list[bool]) -> dict[tuple[str, int], Span]:
    """One pass of rows through the model and back, as the trainer does it."""
    model: Any = adapted.model
    if shape.checkpointing:
        _wrap(model, shape)
    model.train()
    with ledger:
        marks = _Marks(ledger)
        graph.clear()
        with _marked(model, marks, graph):
            batch = {
                "input_ids": torch.zeros(shape.rows, shape.length, dtype=torch.long),
                "labels": torch.zeros(shape.rows, shape.length, dtype=torch.long),
                "position_ids": torch.arange(shape.length).repeat(shape.rows, 1),
            }
            loss = _loss(model, batch, shape.chunk, marks)
            marks.close("loss")
            if loss.requires_grad:
                loss.backward()
            del loss, batch
            marks.close("rest")
    return marks.spans


def _loss(model: Any, batch: Mapping[str, Tensor], chunk: int, marks: _Marks) -> Tensor:
    """As ``batch_loss``, for rows in which every position is a target; two chunks stand for all that are alike."""
    hidden_BTD = hidden_states(model, batch)
    layers = _layers(model)
    marks.close("forward", max(0, len(layers) - 1))
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


def _slice_in(linear: HostLinear, device: str) -> None:
    """Have a head in host memory give its first slices alone; a GPU has places for two of them."""

    def slices(dtype: torch.dtype) -> Iterator[tuple[int, int, Tensor]]:
        count = min(ROUNDS, -(-linear.out_features // linear.rows)) if device == "cuda" else 0
        places = [linear.weight.new_empty(linear.rows, linear.in_features) for _ in range(count)]
        yield from itertools.islice(HostLinear.slices(linear, dtype), ROUNDS)
        del places

    linear.__dict__["slices"] = slices


def _penalty(adapted: AdaptedModel, ledger: Ledger) -> int:
    """The most that the method's penalty and its backward take, beside gradients."""
    with ledger:
        ledger.take_peak()
        before = ledger.live
        penalty = adapted.penalty()
        if penalty is not None:
            penalty.backward()
        del penalty
        return ledger.take_peak() - max(before, ledger.live)


def _layers(model: Any) -> nn.ModuleList:
    try:
        return decoder_layers(model)
    except ModelError:
        return nn.ModuleList()


def _wrap(model: Any, shape: Shape) -> None:
    """Put the layers behind the boundary; of its micro-batches, and of tiles, the first ones alone run."""
    wrap_layers(model, shape.at_once, mlp_tile=shape.mlp_tile)
    for boundary in decoder_layers(model):
        if isinstance(boundary, RecomputedLayer):
            boundary.__dict__["micro_batches"] = functools.partial(_first, shape.at_once)
    for module in model.modules():
        if isinstance(module, TiledMLP):
            module.__dict__["tiles"] = functools.partial(_first, module.tile)


def _first(at_once: int, count: int) -> Iterator[slice]:
    for start in range(0, min(count, ROUNDS * at_once), at_once):
        yield slice(start, min(start + at_once, count))


@contextmanager
def _marked(model: Any, marks: _Marks, graph: list[bool]) -> Iterator[None]:
    """Inside, each decoder layer tells when it is entered, and when its input's gradient is there."""
    handles = []
    for place, layer in enumerate(_layers(model)):
        handles.append(layer.register_forward_pre_hook(_enter(marks, place, graph), with_kwargs=True))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _enter(marks: _Marks, place: int, graph: list[bool]) -> Callable[..., None]:
    def enter(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        marks.close(*(("forward", place - 1) if place else ("before", 0)))
        hidden = args[0] if args else kwargs["hidden_states"]
        graph.append(hidden.requires_grad or any(values.requires_grad for values in module.parameters()))
        if hidden.requires_grad:
            hidden.register_hook(lambda grad: marks.close("backward", place))

    return enter
