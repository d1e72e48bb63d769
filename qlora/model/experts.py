"""Experts of a mixture in 4 bits: how their matrices are packed, and what a token's experts answer from them.

    family's experts module ─┬─ gate_up_proj [E, 2I, H]  ─►  PackedExperts: E matrices, each packed as a linear's weight is
                             ├─ down_proj    [E, H, I]   ─►  PackedExperts
                             └─ gate, activation, biases: the family's own

    tokens ─► sorted by expert ─► for each expert that is visited: its two matrices dequantised, multiplied with, dropped

Transformers keeps a mixture's experts in one module with parameters of three dimensions and asks a function for its answer, by a
name in the configuration. Ours is such a function. Never are two experts dense at once, and an expert that no token visits is not
touched. What a graph keeps is the tokens and their scores: backward reads the packed matrices again and computes what lies
between the two products anew. Of a mixture with a hundred small experts that is a hundredth of the activations of its tokens.

Knows transformers' experts interface and bitsandbytes' bytes; must not know checkpoints, where packed matrices wait, or what
is trained beside them.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import cache
from typing import Any, NamedTuple, Protocol, Self, runtime_checkable

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor
from torch.autograd.function import once_differentiable
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

from qlora.model import anatomy
from qlora.model.loss import fp32_product
from qlora.model.nf4 import BLOCK, FourBit, at_hand, dequantised, quantised

PACKED = "qlora_packed"
"""What transformers calls our function."""


class PackedExperts(FourBit):
    """One matrix of every expert, in NF4 or FP4: the buffers of ``FourBit`` for E matrices of n = rows · columns weights.

    Each expert's are what ``Linear4bit`` has for its matrix, byte for byte. ``transposed`` says that y = x W and not x Wᵀ.
    """

    @classmethod
    def empty(
        cls,
        shape: tuple[int, int, int],
        *,
        transposed: bool,
        quant_type: str,
        double_quant: bool,
        compute_dtype: torch.dtype,
    ) -> Self:
        """Matrices of ``shape`` [experts, rows, columns] on the meta device. ``place`` fills them, one after the other."""
        count, rows, columns = shape
        made = cls(columns, count * rows, compute_dtype=compute_dtype)
        made.count, made.rows, made.columns, made.transposed = count, rows, columns, transposed
        made.hold(rows * columns, quant_type, double_quant, count)
        return made

    count: int
    rows: int
    columns: int
    transposed: bool

    @property
    def sides(self) -> tuple[int, int]:
        """(outputs, inputs) of each expert's matrix."""
        return (self.columns, self.rows) if self.transposed else (self.rows, self.columns)

    def place(self, expert: int, weight: Tensor, device: torch.device) -> None:
        """Quantise the dense [rows, columns] matrix of one expert on ``device`` and keep the result there."""
        if self.weight.is_meta:
            for name, buffer in list(self.named_buffers(recurse=False)):
                setattr(self, name, torch.empty_like(buffer, device=device))
        packed, state = quantised(weight.to(device).contiguous(), self.quant_type, self.double_quant)
        self.weight[expert] = packed.view(-1)
        self.absmax[expert] = state.absmax
        self.code.copy_(state.code)
        if self.nested_absmax is not None and self.nested_code is not None and self.offset is not None:
            self.nested_absmax[expert] = state.state2.absmax
            self.nested_code.copy_(state.state2.code)
            self.offset[expert] = state.offset

    def stands_for(self, weight: Tensor) -> Tensor:
        """What is left of one expert's dense matrix once it is packed; nothing is kept."""
        packed, state = quantised(weight.contiguous(), self.quant_type, self.double_quant)
        return dequantised(packed, state)

    def dequantise(self, expert: int, dtype: torch.dtype) -> Tensor:
        """One expert's matrix, [rows, columns], made anew."""
        return dequantised(self.weight[expert], self.state(self.rows, self.columns, BLOCK, dtype, expert))

    def extra_repr(self) -> str:
        how = f"{self.quant_type}{', double_quant' if self.double_quant else ''}"
        return f"{self.count} × [{self.rows}, {self.columns}], {how}"


# ── in the place of a family's parameters ─────────────────────────────────────────────────────────────────────────────


def matrices(module: nn.Module) -> tuple[str, str] | None:
    """What a family's experts module calls its two matrices, as (``gate_up_proj``, ``down_proj``); None for any other module."""
    if not hasattr(module, "_apply_gate") or not hasattr(module, "has_gate") or not hasattr(module, "is_transposed"):
        return None
    names = ("gate_up_proj" if module.has_gate else "up_proj", "down_proj")
    return names if all(hasattr(module, name) for name in names) else None


def empty_experts(module: nn.Module, quant_type: str, double_quant: bool, dtype: torch.dtype) -> None:
    """Put empty packed matrices in the place of an experts module's own, on meta, and have it answer from them."""
    for name in matrices(module) or ():
        shape = tuple(getattr(module, name).shape)
        delattr(module, name)
        packed = PackedExperts.empty(
            shape,  # type: ignore[arg-type]
            transposed=bool(module.is_transposed),
            quant_type=quant_type,
            double_quant=double_quant,
            compute_dtype=dtype,
        )
        setattr(module, name, packed)
    module.unread = False  # type: ignore[assignment]
    if not isinstance(module, _Adopted):
        module.config._experts_implementation = PACKED  # type: ignore[union-attr]


def adopt(model: nn.Module) -> None:
    """Have experts that do not ask transformers' interface, and are known, answer as those that do, in place."""
    for module in list(model.modules()):
        if (how := ADOPTED.get(type(module).__name__)) is not None:
            module.__class__ = _adopted(how, type(module))  # type: ignore[arg-type]


class _Adopted(nn.Module):
    """Experts that are given where tokens go, in the interface's own words, and compute it themselves."""

    has_gate, has_bias, is_transposed = True, False, False

    def forward(self, x: Tensor, index: Tensor, scores: Tensor) -> Any:
        return answer(self, x, index, scores) if is_packed(self) else super().forward(x, index, scores)


class _Llama4Experts(_Adopted):
    """Experts whose matrices stand the other way round; those who ask are ``_Llama4Mixture``."""

    is_transposed = True
    act_fn: Any

    def _apply_gate(self, gate_up: Tensor) -> Tensor:
        gate, up = gate_up.chunk(2, dim=-1)
        return up * self.act_fn(gate)


class _Llama4Mixture(nn.Module):
    """Llama 4 hands every expert all tokens, those that are not its own times zero: here only its own, times their scores."""

    hidden_dim: int
    top_k: int
    router: Any
    shared_expert: Any

    def forward(self, hidden_states: Tensor) -> Any:
        if not is_packed(self.experts):  # type: ignore[arg-type]
            return super().forward(hidden_states)
        x = hidden_states.reshape(-1, self.hidden_dim)
        scores, logits = self.router(x)
        chosen, index = scores.topk(self.top_k)
        found: Tensor = self.shared_expert(x)
        for score, one in zip(chosen.split(1, -1), index.split(1, -1), strict=True):
            found = found + answer(self.experts, x * score, one, torch.ones_like(score))
        return found, logits


ADOPTED = {"Llama4TextExperts": _Llama4Experts, "Llama4TextMoe": _Llama4Mixture, "Step3p7Experts": _Adopted}
"""Classes of transformers' whose experts are of the interface's arrangement, and do not ask it."""


@cache
def _adopted(how: type[nn.Module], family: type[nn.Module]) -> Any:
    """The same class for every module of a family: a dry run asks which layers are alike."""
    return type(family.__name__, (how, family), {"__module__": family.__module__})


def is_packed(module: nn.Module) -> bool:
    """Whether it is a family's experts module with packed matrices."""
    names = matrices(module)
    return names is not None and isinstance(anatomy.innermost(getattr(module, names[0])), PackedExperts)


# ── what the experts answer ───────────────────────────────────────────────────────────────────────────────────────────


@runtime_checkable
class Adapted(Protocol):
    """What may stand in a packed matrix's place: low-rank matrices beside those of every expert."""

    def factors(self) -> tuple[Tensor, Tensor] | None:
        """(A [E · r, in], B [out, r · E]), as PEFT stores them; None while the base is to answer alone."""

    @property
    def scaling(self) -> float:
        """What B A is multiplied with."""


class _Side(NamedTuple):
    """One of the two products of an experts module, with what is beside it."""

    packed: PackedExperts
    bias: Tensor | None
    A: Tensor | None
    B: Tensor | None
    scaling: float

    def weight(self, expert: int, dtype: torch.dtype) -> Tensor:
        """[out, in]"""
        dense = self.packed.dequantise(expert, dtype)
        return dense.t() if self.packed.transposed else dense

    def pair(self, expert: int, dtype: torch.dtype) -> tuple[Tensor, Tensor] | None:
        """(A [r, in], B [out, r]) of one expert."""
        if self.A is None or self.B is None:
            return None
        rank = self.A.shape[0] // self.packed.count
        return self.A[expert * rank : (expert + 1) * rank].to(dtype), self.B[:, expert :: self.packed.count].to(dtype)

    def product(self, expert: int, x: Tensor, weight: Tensor) -> Tensor:
        """x Wᵀ + b + scaling · (x Aᵀ) Bᵀ"""
        bias = None if self.bias is None else self.bias[expert].to(x.dtype)
        if (pair := self.pair(expert, x.dtype)) is None:
            return F.linear(x, weight, bias)
        y = (x @ pair[0].t() @ pair[1].t()).mul_(self.scaling)  # the small part first: see nf4.add_product
        return (y if bias is None else y.add_(bias)).addmm_(x, weight.t())

    def back(self, expert: int, grad: Tensor, weight: Tensor) -> Tensor:
        """What ``grad`` of the product means for its x."""
        if (pair := self.pair(expert, grad.dtype)) is None:
            return grad @ weight
        return (grad @ pair[1] @ pair[0]).mul_(self.scaling).addmm_(grad, weight)

    def learn(self, expert: int, x: Tensor, grad: Tensor, grad_A: Tensor | None, grad_B: Tensor | None) -> None:
        """Write the gradients of one expert's A and B into those of all."""
        if (pair := self.pair(expert, grad.dtype)) is None:
            return
        product = fp32_product if grad.dtype.itemsize < 4 else torch.mm
        rank = len(pair[0])
        if grad_A is not None:
            grad_A[expert * rank : (expert + 1) * rank] = product((grad @ pair[1]).t(), x) * self.scaling
        if grad_B is not None:
            grad_B[:, expert :: self.packed.count] = product(grad.t(), x @ pair[0].t()) * self.scaling


class _Answer(torch.autograd.Function):
    """Σ over a token's experts of score · down(gate(up(x))). Keeps x, the scores and who goes where.

    A score's gradient needs no answer of the expert: dL/ds = g · y = (g W) · h + g · b, and g W is there anyway.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, scores: Tensor, index: Tensor, experts: Any, *factors: Tensor | None) -> Tensor:
        ctx.linear, ctx.some = experts, index.shape[1]
        order, counts = _sorted(index, packed_of(experts, 0).count)
        ctx.counts = counts
        ctx.save_for_backward(x, scores, order, *factors)
        if experts.unread:
            return torch.zeros_like(x)
        up, down = _sides(experts, factors)
        answer = x.new_zeros(x.shape, dtype=_wide(x.dtype))
        flat = scores.reshape(-1, 1)
        for expert, places in _visits(order, counts):
            tokens = places // ctx.some
            given = _answer_of(experts, up, down, expert, x[tokens]) * flat[places]
            # no token stands in it twice, so the sum is always the same one
            answer.index_add_(0, tokens, given.to(answer.dtype))
            del given  # before the next expert is asked
        return answer.to(x.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, scores, order, *factors = ctx.saved_tensors
        experts, flat = ctx.linear, scores.reshape(-1, 1)
        up, down = _sides(experts, factors)
        grad_x = x.new_zeros(x.shape, dtype=_wide(x.dtype)) if ctx.needs_input_grad[0] else None
        grad_scores = torch.zeros_like(flat, dtype=_wide(flat.dtype)) if ctx.needs_input_grad[1] else None
        wanted = zip(factors, ctx.needs_input_grad[4:], strict=True)
        # in fp32 where the products are in 16 bits: torch adds them up in the dtype that their parameter wants its gradient in
        grads = [torch.zeros_like(one, dtype=_wide(grad.dtype)) if want else None for one, want in wanted]
        with at_hand(up.packed), at_hand(down.packed):
            for expert, places in _visits(order, ctx.counts):
                tokens = places // ctx.some
                found = _gradients_of(experts, up, down, expert, x[tokens], grad[tokens], flat[places], grads)
                if grad_scores is not None:
                    grad_scores[places] = found[1].to(grad_scores.dtype)
                if grad_x is not None:
                    grad_x.index_add_(0, tokens, found[0].to(grad_x.dtype))
                del found
        return (
            None if grad_x is None else grad_x.to(x.dtype),
            None if grad_scores is None else grad_scores.view(scores.shape).to(scores.dtype),
            None,
            None,
            *grads,
        )


def answer(experts: Any, x: Tensor, index: Tensor, scores: Tensor) -> Tensor:
    """What packed ``experts`` answer for x [T, H]: token t asks ``index`` [T, k] and weighs them by ``scores`` [T, k]."""
    dtype = packed_of(experts, 0).compute_dtype
    factors: list[Tensor | None] = []
    for name in matrices(experts) or ():
        adapted = getattr(experts, name)
        pair = adapted.factors() if isinstance(adapted, Adapted) else None
        factors += (None, None) if pair is None else pair
    given: Tensor = _Answer.apply(x.to(dtype), scores, index, experts, *factors)
    return given.to(x.dtype)


ALL_EXPERTS_FUNCTIONS.register(PACKED, answer)


def _answer_of(experts: Any, up: _Side, down: _Side, expert: int, x: Tensor) -> Tensor:
    """What one expert answers for x [n, H], before it is weighed."""
    hidden = _gate(experts, up.product(expert, x, up.weight(expert, x.dtype)))
    found = down.product(expert, hidden, down.weight(expert, x.dtype))
    return found if (norm := _norm(experts)) is None else norm(found)


def _gradients_of(
    experts: Any,
    up: _Side,
    down: _Side,
    expert: int,
    x: Tensor,
    grad: Tensor,
    score: Tensor,
    grads: list[Tensor | None],
) -> tuple[Tensor, Tensor]:
    """(of x [n, H], of the scores [n, 1]) for ``grad`` of one expert's weighed answer; those of its A and B go into ``grads``."""
    weight = up.weight(expert, x.dtype)
    with torch.enable_grad():
        between = up.product(expert, x, weight).detach().requires_grad_()
        gated = _gate(experts, between)
    hidden = gated.detach()
    if (norm := _norm(experts)) is None:
        weighed = (grad * score).to(x.dtype)
        inner = down.back(expert, grad, down.weight(expert, x.dtype))  # of an answer that counts whole
        grad_score = (inner * hidden).sum(-1, keepdim=True, dtype=_wide(x.dtype))
        if down.bias is not None:
            grad_score = grad_score + (grad @ down.bias[expert].to(grad.dtype)).unsqueeze(-1)
        inner = (inner * score).to(x.dtype)
    else:  # what the score weighs is no longer a product, and is computed again
        weight_down = down.weight(expert, x.dtype)
        with torch.enable_grad():
            bare = down.product(expert, hidden, weight_down).detach().requires_grad_()
            normed = norm(bare)
        grad_score = (normed.detach() * grad).sum(-1, keepdim=True, dtype=_wide(x.dtype))
        (weighed,) = torch.autograd.grad(normed, bare, (grad * score).to(x.dtype))
        inner = down.back(expert, weighed, weight_down)
    down.learn(expert, hidden, weighed, *grads[2:])
    (through,) = torch.autograd.grad(gated, between, inner)
    del gated, hidden, inner
    up.learn(expert, x, through, *grads[:2])
    return up.back(expert, through, weight), grad_score


def _sides(experts: Any, factors: Sequence[Tensor | None]) -> list[_Side]:
    made = []
    for number, name in enumerate(matrices(experts) or ()):
        adapted = getattr(experts, name)
        bias = getattr(experts, f"{name}_bias") if experts.has_bias else None
        scaling = adapted.scaling if isinstance(adapted, Adapted) else 0.0
        made.append(_Side(packed_of(experts, number), bias, factors[2 * number], factors[2 * number + 1], scaling))
    return made


def _gate(experts: Any, hidden: Tensor) -> Tensor:
    return experts._apply_gate(hidden) if experts.has_gate else experts.act_fn(hidden)


def _norm(experts: Any) -> Any:
    """What every expert's answer goes through before it is weighed (Muse Spark); None for most families."""
    return experts.post_expert_norm if getattr(experts, "has_post_expert_norm", False) else None


def packed_of(experts: Any, number: int) -> PackedExperts:
    """The first or the second of its matrices."""
    names = matrices(experts)
    assert names is not None
    packed = anatomy.innermost(getattr(experts, names[number]))
    assert isinstance(packed, PackedExperts)
    return packed


def _sorted(index: Tensor, count: int) -> tuple[Tensor, list[int]]:
    """(the places of ``index`` [T, k], counted through, sorted by the expert that stands there; how many each expert has).

    Telling the counts is the one moment at which a GPU is waited for. In a dry run nobody knows them, and the largest that
    there can be are taken: one expert that every token visits, which is what can need most memory at once.
    """
    order = torch.argsort(index.reshape(-1), stable=True)
    if isinstance(index, FakeTensor) or index.is_meta:
        return order, [len(index)]
    return order, torch.bincount(index.reshape(-1), minlength=count)[:count].tolist()


def _visits(order: Tensor, counts: list[int]) -> Iterator[tuple[int, Tensor]]:
    """(an expert, its places in the index) for every expert that somebody visits."""
    start = 0
    for expert, count in enumerate(counts):  # what stands behind the last expert's places asks nobody
        if count:
            yield expert, order[start : start + count]
        start += count


def _wide(dtype: torch.dtype) -> torch.dtype:
    """What sums of many terms in ``dtype`` are added up in."""
    return torch.float32 if dtype.itemsize < 4 else dtype
