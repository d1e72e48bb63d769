"""Attention over packed rows, example by example: no pair of tokens of two examples is computed, and no mask of pairs is made.

    rows      a a a a b b         PackedMask: examples begin at 0, 4 in row 0 and at 0 in row 1
              c c c c · ·
    VARLEN    one call of torch's variable-length FlashAttention over the rows one behind the other, lengths 4, 2, 6
    EACH      SDPA, causal, once an example: where that kernel is not, on CPUs, in fp32, and on GPUs before Ampere
    OWN       the family's own function, once an example: sinks (gpt-oss) and soft caps (Gemma 2), which SDPA has not

transformers asks by name for a mask, and then for the attention that is given it (``AttentionMaskInterface``,
``AttentionInterface``): ours answers with the lengths of the examples. They are found once a batch, in the rows' positions on
the CPU, so no layer asks a GPU for them. Rows of one example each, and generation, are left to what transformers takes.

Every other family that asks for a mask gets transformers' own, of pairs, in which examples do not see each other whether or not
the family says where positions restart: Falcon and gpt-oss do not, and their packed examples would see each other.

Measured on one core of a Xeon with AVX-512 and AMX, forward and backward in fp32, SDPA with a mask against once an example:
9 heads of 64, rows of 512 tokens: 24.0 and 5.7 ms in examples of 32, 23.2 and 7.7 ms in examples of 128; rows of 2,048: 334
and 27 ms in examples of 20, 316 and 81 ms in examples of 512, 322 and 180 ms in a single one; 32 heads of 128: 2,252 and
673 ms in examples of 512. In bf16 1.1 to 4 times as fast.

Knows transformers' attention and torch's kernels; must not know what a layer is behind, or where rows come from.

Shape suffixes: R rows, T tokens of a row, N of all rows, H query heads, K key-value heads, E size of a head.
"""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import numpy
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn.attention.varlen import varlen_attn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.masking_utils import and_masks, causal_mask_function, packed_sequence_mask_function

from qlora.machine.cards import AMPERE
from qlora.model import anatomy

EACH, VARLEN, OWN = "qlora_each_example", "qlora_varlen", "qlora_own_each_example"
"""By what name transformers knows them."""
RECURRENT = ("linear_attention", "conv", "hybrid")
"""Kinds of layers that are no attention, or hold some beside another mixer (``mixers.py``)."""
PLAIN, EAGER = "sdpa", "eager"  # transformers' own, and ours where rows are not packed
FAMILYS = "eager_attention_forward"
"""What a family's file calls its attention, written out."""
SHARES_HEADS = "enable_gqa" in inspect.signature(varlen_attn).parameters
"""From torch 2.13 on; before it every query head needs its own keys."""


class PackedMask:
    """Which tokens of packed rows see each other, said by where their examples begin."""

    def __init__(self, starts: Sequence[Sequence[int]], width: int, window: int | None = None) -> None:
        self.starts = starts
        """By row, the places where an example begins: ``[[0, 4], [0]]``."""
        self.width = width
        """Tokens of a row."""
        self.window = window
        """How many tokens a token sees, itself the last of them; None for all before it."""
        ends = [place for row in starts for place in (*row[1:], width)]
        self.lengths = [end - start for start, end in zip((s for row in starts for s in row), ends, strict=True)]
        """Tokens of each example, row after row; padding belongs to the example before it."""
        self._rows: dict[tuple[int, int], PackedMask] = {}
        self._bounds: dict[torch.device, Tensor] = {}
        self._numbers: dict[torch.device, Tensor] = {}
        self._groups: dict[torch.device, tuple[list[tuple[Tensor, Tensor, tuple[int, int]]], Tensor]] = {}

    @classmethod
    def of(cls, positions_RT: Any) -> PackedMask:
        """By positions, which restart where the next example begins: an array, or a tensor that is best on the CPU."""
        if isinstance(positions_RT, Tensor):
            positions_RT = positions_RT.numpy(force=True)
        restarts = positions_RT[:, 1:] != positions_RT[:, :-1] + 1
        starts = [[0, *(numpy.flatnonzero(row) + 1).tolist()] for row in restarts]
        return cls(starts, positions_RT.shape[1])

    @property
    def alike(self) -> bool:
        """Whether examples begin in the same places of every row."""
        return all(row == self.starts[0] for row in self.starts)

    @property
    def packed(self) -> bool:
        """Whether a row has several examples."""
        return len(self.lengths) > len(self.starts)

    def within(self, window: int | None) -> PackedMask:
        """The same for layers that see so many tokens."""
        return self if window is None else PackedMask(self.starts, self.width, window)

    def __getitem__(self, rows: slice | tuple[slice, ...]) -> PackedMask:
        """The mask of some rows; the same object each time, so that its bounds are made once for all layers.

        As a mask [R, 1, T, T] it may be cut as a whole, where all tokens are asked for (Gemma 4 with shared keys).
        """
        if isinstance(rows, tuple):
            if any(part.indices(self.width) != (0, self.width, 1) for part in rows[1:]):
                raise IndexError("The mask of packed rows is cut by rows alone.")
            rows = rows[0]
        first, last, _ = rows.indices(len(self.starts))
        if (first, last) not in self._rows:
            self._rows[first, last] = PackedMask(self.starts[first:last], self.width, self.window)
        return self._rows[first, last]

    def to(self, device: torch.device | str, **_: Any) -> PackedMask:
        """Itself: where a batch is sent, its lengths stay where they can be read."""
        return self

    def bounds(self, device: torch.device) -> Tensor:
        """[examples + 1], where each example begins once the rows are one behind the other, and where the last one ends."""
        if device not in self._bounds:
            places = torch.tensor([0, *numpy.cumsum(self.lengths).tolist()], dtype=torch.int32)
            self._bounds[device] = places.to(device, non_blocking=True)
        return self._bounds[device]

    def numbers(self, device: torch.device) -> Tensor:
        """[R, T], which example of all rows each token belongs to."""
        if device not in self._numbers:
            numbers = numpy.repeat(numpy.arange(len(self.lengths)), self.lengths).reshape(-1, self.width)
            self._numbers[device] = _sent(numbers, device)
        return self._numbers[device]

    def groups(self, device: torch.device) -> list[tuple[Tensor, Tensor, tuple[int, int]]]:
        """The examples as rows of their own, those of like length together: (tokens among those of all rows, their places
        among those of E · L padded ones, (E, L)), the longest first. An example is more than half as long as its group's
        longest, so less than half of what goes through is padding, and there are at most log2 of the width of them.

        Example, lengths 4, 2, 2 → [0 1 2 3], [0 1 2 3], (1, 4) and [4 5 6 7], [0 1 2 3], (2, 2)
        """
        if device not in self._groups:
            begins = numpy.cumsum([0, *self.lengths[:-1]])
            order = numpy.argsort([-length for length in self.lengths], kind="stable").tolist()
            gathered: list[list[int]] = []
            for example in order:
                if not gathered or 2 * self.lengths[example] <= self.lengths[gathered[-1][0]]:
                    gathered.append([])
                gathered[-1].append(example)
            found, tokens_of_all = [], []
            for group in gathered:
                longest = self.lengths[group[0]]
                spans = [numpy.arange(self.lengths[example]) for example in group]
                tokens = numpy.concatenate([begins[example] + span for example, span in zip(group, spans, strict=True)])
                places = numpy.concatenate([row * longest + span for row, span in enumerate(spans)])
                tokens_of_all.append(tokens)
                found.append((_sent(tokens, device), _sent(places, device), (len(group), longest)))
            back = numpy.argsort(numpy.concatenate(tokens_of_all))
            self._groups[device] = (found, _sent(back, device))
        return self._groups[device][0]

    def back(self, device: torch.device) -> Tensor:
        """[R · T], where each token stands among those of ``groups``, one group behind the other."""
        self.groups(device)
        return self._groups[device][1]

    def dense(self, device: torch.device) -> Tensor:
        """It as pairs, bool [R, 1, T, T]: for whoever has more to put into it, as a prefix."""
        starts = [start for row in self.starts for start in row]
        first = numpy.repeat(starts, self.lengths).reshape(len(self.starts), self.width)
        if self.window is not None:
            first = numpy.maximum(first, numpy.arange(self.width) - self.window + 1)
        place = torch.arange(self.width, device=device)
        seen = (place >= torch.tensor(first.tolist(), device=device)[:, :, None]) & (place <= place[:, None])
        return seen[:, None]


_CURRENT: ContextVar[PackedMask | None] = ContextVar("packed rows", default=None)
"""Of the rows that go through a decoder now: what transformers asks a mask of is told everything but this."""


def _sent(values: Any, device: torch.device) -> Tensor:
    """Indices on a device, without waiting for it."""
    return torch.from_numpy(numpy.ascontiguousarray(values, dtype=numpy.int64)).to(device, non_blocking=True)


def packed_now() -> PackedMask | None:
    """Of the rows that go through a decoder, or through one of its layers, now; None where it was not said."""
    return _CURRENT.get()


@contextmanager
def packed_rows(mask: PackedMask | None) -> Iterator[None]:
    """Inside, ``mask`` is what a model that keeps examples apart gets in the place of a mask."""
    token = _CURRENT.set(mask)
    try:
        yield
    finally:
        _CURRENT.reset(token)


def _lengths_or(theirs: Callable[..., Any]) -> Callable[..., Any]:
    """What our own attention is given: the lengths of the examples; ``local_size`` is the layer's window."""

    def mask(*args: Any, local_size: int | None = None, **kwargs: Any) -> Any:
        current = _CURRENT.get()
        return theirs(*args, local_size=local_size, **kwargs) if current is None else current.within(local_size)

    return mask


def _in_blocks(theirs: Callable[..., Any]) -> Callable[..., Any]:
    """transformers' mask, in which nothing sees an example that it does not belong to."""

    def mask(*args: Any, **kwargs: Any) -> Any:
        current = _CURRENT.get()
        if current is not None:
            same = packed_sequence_mask_function(current.numbers(torch.device(kwargs.get("device", "cpu"))))
            seen = and_masks(kwargs.get("mask_function", causal_mask_function), same)
            kwargs |= {"mask_function": seen, "allow_is_causal_skip": False}
        return theirs(*args, **kwargs)

    return mask


# ── the three ways ────────────────────────────────────────────────────────────────────────────────────────────────────


def _varlen(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Any,
    dropout: float = 0.0,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """All examples of all rows in one call. Heads that the kernel does not take, and dropout, go example by example."""
    if not isinstance(attention_mask, PackedMask) or dropout or not _fits(query, value):
        return _each(module, query, key, value, attention_mask, dropout=dropout, **kwargs)
    groups = query.shape[1] // key.shape[1]
    query_NHE, key_NKE, value_NKE = (_one_behind_the_other(heads) for heads in (query, key, value))
    more: dict[str, Any] = {}
    if groups > 1 and SHARES_HEADS:
        more["enable_gqa"] = True
    elif groups > 1:
        key_NKE, value_NKE = (heads.repeat_interleave(groups, dim=1) for heads in (key_NKE, value_NKE))
    bounds, longest = attention_mask.bounds(query.device), max(attention_mask.lengths)
    # a token sees itself and as many before it; -1 is all of them
    before = -1 if attention_mask.window is None or attention_mask.window >= longest else attention_mask.window - 1
    output_NHE = varlen_attn(
        query_NHE,
        key_NKE,
        value_NKE,
        bounds,
        bounds,
        longest,
        longest,
        scale=kwargs.get("scaling"),
        window_size=(before, 0),
        **more,
    )
    return output_NHE.view(len(query), -1, *output_NHE.shape[1:]), None  # type: ignore[union-attr]


def _each(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Any,
    dropout: float = 0.0,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """One example after the other, in all rows at once where they are cut in the same places."""
    if not isinstance(attention_mask, PackedMask):
        plain = AttentionInterface()[PLAIN]
        return plain(module, query, key, value, attention_mask, dropout=dropout, **kwargs)
    shared = query.shape[1] != key.shape[1]
    if shared and query.is_cuda:  # the kernels of fp32 and of older GPUs cannot, and SDPA would write out all scores
        key, value = (heads.repeat_interleave(query.shape[1] // key.shape[1], dim=1) for heads in (key, value))
    lengths, heads = _cut(query, key, value, attention_mask)
    if not dropout and (attention_mask.window or max(lengths)) >= max(lengths) and _mostly_short(heads, lengths):
        output = _ShortExamples.apply(*heads, lengths, kwargs.get("scaling"))
        return output.view(len(query), -1, *output.shape[2:]), None

    def kernel(query_RHTE: Tensor, key_RKTE: Tensor, value_RKTE: Tensor, window: int | None) -> Tensor:
        mask = None if window is None else PackedMask([[0]], query_RHTE.shape[2], window).dense(query.device)
        return F.scaled_dot_product_attention(
            query_RHTE,
            key_RKTE,
            value_RKTE,
            attn_mask=mask,
            dropout_p=dropout,
            is_causal=mask is None,
            scale=kwargs.get("scaling"),
            enable_gqa=shared,
        ).transpose(1, 2)

    return _one_by_one(kernel, query, key, value, attention_mask), None


def _own(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Any, **kwargs: Any
) -> tuple[Tensor, Tensor | None]:
    """The same by the function in the family's own file, which adds its mask to the scores."""
    forward = next(
        getattr(sys.modules[part.__module__], FAMILYS)
        for part in type(module).__mro__
        if hasattr(sys.modules[part.__module__], FAMILYS)
    )
    smallest = torch.finfo(query.dtype).min
    if not isinstance(attention_mask, PackedMask):
        if attention_mask is not None and attention_mask.dtype == torch.bool:  # of a prefix before packed rows
            attention_mask = torch.where(attention_mask, 0.0, smallest).to(query.dtype)
        return forward(module, query, key, value, attention_mask, **kwargs)

    def kernel(query_RHTE: Tensor, key_RKTE: Tensor, value_RKTE: Tensor, window: int | None) -> Tensor:
        seen = PackedMask([[0]], query_RHTE.shape[2], window).dense(query.device)
        mask = torch.where(seen, 0.0, smallest).to(query.dtype)
        return forward(module, query_RHTE, key_RKTE, value_RKTE, mask, **kwargs)[0]

    return _one_by_one(kernel, query, key, value, attention_mask), None


def _one_by_one(
    kernel: Callable[[Tensor, Tensor, Tensor, int | None], Tensor],
    query: Tensor,
    key: Tensor,
    value: Tensor,
    packed: PackedMask,
) -> Tensor:
    """[R, T, H, E] of a kernel that is given the heads of one example [R, H, T, E], of all rows where they are cut alike, and
    the window where it is narrower than they are long."""
    outputs = []
    lengths, heads = _cut(query, key, value, packed)
    for query_RHTE, key_RKTE, value_RKTE in zip(*(one.split(lengths, dim=2) for one in heads), strict=True):
        narrow = packed.window is not None and packed.window < query_RHTE.shape[2]
        outputs.append(kernel(query_RHTE, key_RKTE, value_RKTE, packed.window if narrow else None))
    output = torch.cat(outputs, dim=1)
    return output.view(len(query), -1, *output.shape[2:])


def _cut(query: Tensor, key: Tensor, value: Tensor, packed: PackedMask) -> tuple[list[int], list[Tensor]]:
    """(examples' lengths, the heads [R or 1, H, T, E] to cut by them): the first examples of all rows together, then the
    second ones, where rows are cut alike; else all rows one behind the other."""
    if packed.alike:
        return packed.lengths[: len(packed.starts[0])], [query, key, value]
    return packed.lengths, [_one_behind_the_other(one).transpose(0, 1)[None] for one in (query, key, value)]


SHORT = 192  # tokens, from which on torch's 16-bit kernel for CPUs computes a gradient faster than its fp32 kernel does
# torch's own, from 2.11 to 2.13 at least; without them SDPA's gradient is taken
_CPU_FORWARD: Any = getattr(torch.ops.aten, "_scaled_dot_product_flash_attention_for_cpu", None)
CPU_BACKWARD: Any = getattr(torch.ops.aten, "_scaled_dot_product_flash_attention_for_cpu_backward", None)


def _mostly_short(heads: Sequence[Tensor], lengths: Sequence[int]) -> bool:
    """Whether a CPU, in 16 bits, has mostly examples whose gradient it finds faster in fp32."""
    query, _, value = heads
    short = sum(length for length in lengths if length < SHORT)
    if _CPU_FORWARD is None or CPU_BACKWARD is None:
        return False
    half = query.device.type == "cpu" and query.dtype.itemsize == 2 and query.shape[3] == value.shape[3]
    return half and 2 * short > sum(lengths) and all(one.stride(3) == 1 for one in heads)


class _ShortExamples(torch.autograd.Function):
    """SDPA, causal, example by example; forward is torch's, and backward in fp32 from what forward kept in 16 bits.

    torch's own backward takes 23 ms for 8 examples of 128 tokens with 9 heads of 64 on one core with AMX, this 10, and rounds
    less; from ``SHORT`` tokens on it takes another way, and is left to it.
    """

    @staticmethod
    def forward(
        ctx: Any, query_RHTE: Tensor, key_RKTE: Tensor, value_RKTE: Tensor, lengths: list[int], scale: float | None
    ) -> Tensor:
        heads = [one.split(lengths, dim=2) for one in (query_RHTE, key_RKTE, value_RKTE)]
        found = [_CPU_FORWARD(*example, 0.0, True, scale=scale) for example in zip(*heads, strict=True)]
        output_RTHE = torch.cat([output.transpose(1, 2) for output, _ in found], dim=1)
        ctx.save_for_backward(query_RHTE, key_RKTE, value_RKTE, output_RTHE, *(log_sum for _, log_sum in found))
        ctx.lengths, ctx.scale = lengths, scale
        return output_RTHE

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_RTHE: Tensor) -> tuple[Tensor | None, ...]:
        query_RHTE, key_RKTE, value_RKTE, output_RTHE, *log_sums = ctx.saved_tensors
        inputs = [query_RHTE, key_RKTE, value_RKTE]
        grads = [one.new_empty(one.transpose(1, 2).shape).transpose(1, 2) for one in inputs]
        heads = [grad_RTHE.transpose(1, 2), *inputs, output_RTHE.transpose(1, 2)]
        parts, places = (zip(*(one.split(ctx.lengths, dim=2) for one in many), strict=True) for many in (heads, grads))
        for example, log_sum, into in zip(parts, log_sums, places, strict=True):
            wide = [one.float() for one in example] if example[0].shape[2] < SHORT else example
            for place, found in zip(into, CPU_BACKWARD(*wide, log_sum, 0.0, True, scale=ctx.scale), strict=True):
                place.copy_(found)
        return *grads, None, None


def _one_behind_the_other(heads_RHTE: Tensor) -> Tensor:
    """[R, H, T, E] → [R · T, H, E]; mostly a view, since projections give [R, T, H · E]."""
    return heads_RHTE.transpose(1, 2).flatten(0, 1)


def _fits(query: Tensor, value: Tensor) -> bool:
    """Whether FlashAttention 2 takes such heads, with their backward, on every GPU that it runs on."""
    size = query.shape[3]
    half = query.dtype in (torch.float16, torch.bfloat16)
    # between 192 and 224 consumer cards have too little shared memory for the backward (torch's own bound)
    return half and value.shape[3] == size and size % 8 == 0 and (size <= 192 or 224 < size <= 256)


_MASKS = AttentionMaskInterface()
for _name, _way, _theirs in ((EACH, _each, PLAIN), (VARLEN, _varlen, PLAIN), (OWN, _own, EAGER)):
    AttentionInterface.register(_name, _way)
    AttentionMaskInterface.register(_name, _lengths_or(_MASKS[_theirs]))
# in the place of theirs, for some families ask for the name; outside of packed rows they are theirs
for _name in (PLAIN, EAGER):
    AttentionMaskInterface.register(_name, _in_blocks(_MASKS[_name]))


# ── which models, and which way ───────────────────────────────────────────────────────────────────────────────────────


def keep_apart(model: nn.Module, dtype: torch.dtype, capability: float) -> None:
    """Have ``model`` attend to packed rows example by example, if its family's attention is a plain one.

    ``capability`` is CUDA's, 0 where it does not compute on such a GPU; it need not be here. A plain attention is one that
    FlashAttention could be, by transformers' word: queries, keys, values, causal, a window; with sinks or soft caps the
    family's own function is asked. Biases by position, chunks and layers that are no attention keep transformers' mask.
    """
    config, decoder = anatomy.text_config(model), anatomy.decoder(model)
    # by the second it asks AttentionInterface for its function
    plain = all(getattr(decoder, name, False) for name in ("_supports_flash_attn", "_supports_attention_backend"))
    plain = plain and all(getattr(module, "is_causal", True) for module in model.modules())  # BERT sees what follows
    if not plain or not set(anatomy.layer_kinds(model)) <= {None, "full_attention", "sliding_attention", *RECURRENT}:
        return
    if attention_of(model) == PLAIN:
        half = dtype in (torch.float16, torch.bfloat16)
        config._attn_implementation = VARLEN if half and capability >= AMPERE else EACH
    elif attention_of(model) == EAGER and hasattr(sys.modules[type(decoder).__module__], FAMILYS):
        config._attn_implementation = OWN


def attention_of(model: nn.Module) -> str | None:
    """By what name transformers knows the attention of ``model``; None where it has no choice."""
    return getattr(anatomy.text_config(model), "_attn_implementation", None)


def keeps_apart(model: nn.Module) -> bool:
    """Whether it attends to packed rows example by example, and so takes a ``PackedMask``."""
    return attention_of(model) in (EACH, VARLEN, OWN)
