"""LoRA: a low-rank update beside each frozen linear (Hu et al. 2021, arXiv:2106.09685).

    y = x Wᵀ + b + scaling · dropout(x) Aᵀ Bᵀ          A [r, in], B [out, r], scaling = alpha / r

Knows this formula, its gradients and how it is planted; must not know how W is stored (ask ``dense_weight``), adapter
files, or the training loop.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from qlora.errors import MethodError, listed
from qlora.methods.beginning import Beginning, Beginnings, first_A
from qlora.methods.layout import PREFIX, Fields, Layout, whole
from qlora.methods.lora_experts import LoraExperts, experts_key, experts_named, packed_experts
from qlora.methods.lora_layers import KINDS, LoraConv2d, LoraEmbedding, is_adaptable, sides, why_not
from qlora.methods.merge import Merge
from qlora.methods.method import Method
from qlora.methods.planted import Planted
from qlora.methods.targets import (
    check_pattern,
    choose_targets,
    leaf,
    linears_of,
    pattern_value,
    peft_targets,
    sorted_pattern,
    target_names,
)
from qlora.model import anatomy
from qlora.model.base import Base
from qlora.model.experts import PackedExperts
from qlora.model.loss import fp32_product
from qlora.model.nf4 import add_product, dense_weight, is_linear, is_transposed
from qlora.recipe.methods import LowRankSection
from qlora.residence.boundary import one_draw

NARROW = 32
"""Gates of a few numbers (Doge's ``dt_proj``, Gemma 3n's router) hold no adapter of a higher rank, and are no layer's matrices."""
BARE = ("lora_embedding_A", "lora_embedding_B", "lora_magnitude_vector")
"""Parameters whose keys on disk end with their own name, where PEFT has no module that holds a ``weight``."""


class LoraLinear(Planted):
    """A frozen linear with an adapter beside it.

    ``base`` is the frozen linear (GPT-2's Conv1D is one too); ``lora_A`` [r, in] and ``lora_B`` [out, r] train. While
    ``enabled`` is off, the base answers alone. While ``unread`` is on, nobody reads the answer but its gradient is wanted
    (see ``residence/layers.py``).
    """

    def __init__(self, base: nn.Module, lora_A: Tensor, lora_B: Tensor, scaling: float, dropout: float) -> None:
        super().__init__(base)
        self.in_features, self.out_features = lora_A.shape[1], lora_B.shape[0]
        self.lora_A = nn.Parameter(lora_A)
        self.lora_B = nn.Parameter(lora_B)
        self.scaling = scaling
        self.dropout = dropout
        self.unread = False
        self.beginning: Beginning | None = None
        """What A and B began as, where the frozen weight or B did not begin as the base's own and zero."""
        self.lacks: str | None = None
        """What must happen before this may train, in a sentence; None where nothing must."""

    def forward(self, x: Tensor) -> Tensor:
        """[…, in] → […, out] in the dtype of ``x``, or in that of ``torch.autocast``."""
        if not self.enabled:
            return self.alone(x)
        if self.lacks is not None and self.training:
            raise MethodError(self.lacks)
        return self.adapted(as_autocast(x), self.dropout if self.training else 0.0)

    def adapted(self, x: Tensor, dropout: float) -> Tensor:
        """The formula above."""
        return AdaptedLinear.apply(x, self.lora_A, self.lora_B, self, dropout)

    def alone(self, x: Tensor) -> Tensor:
        """What the base answers without the adapter. What its frozen weight gave up to begin with is multiplied back in.

        Then this is the adapted layer of step 0, bit for bit. On an unquantised base that is W but for rounding; on a
        quantised one it is as far from the checkpoint's W as the residual's quantisation is, mostly less than W's own.
        """
        if self.beginning is None or self.beginning.given is None:
            return self.base(x)
        return AdaptedLinear.apply(as_autocast(x), self.beginning.lora_A, self.beginning.lora_B, self, 0.0)

    def before_quantising(self, weight: Tensor) -> Tensor:
        """What the frozen weight was made from; ``weight`` has the checkpoint's layout."""
        return weight if self.beginning is None else self._turned(weight, self.beginning.frozen_from)

    def original(self, weight: Tensor) -> Tensor:
        """The checkpoint's own ``weight`` without what A and B began as."""
        return weight if self.beginning is None else self._turned(weight, self.beginning.before)

    def _turned(self, weight: Tensor, act: Callable[[Tensor], Tensor]) -> Tensor:
        """``act`` on ``weight`` as [out, in]; a bias stays as it is."""
        if weight.dim() != 2:
            return weight
        return act(weight.t()).t() if is_transposed(self.base) else act(weight)

    @torch.no_grad()
    def at_first(self, weight: Tensor) -> Tensor:
        """With what the pair began as, in place."""
        if (begun := self.beginning) is not None:
            weight.addmm_(begun.lora_B.to(weight), begun.lora_A.to(weight), alpha=self.scaling)
        return weight

    @torch.no_grad()
    def low_rank(self) -> tuple[Tensor, Tensor] | None:
        """(A, scaling · B); where the pair began as more than nothing (A over A₀, scaling · B beside −scaling · B₀)."""
        lora_A, lora_B = self.lora_A.float(), self.lora_B.float() * self.scaling
        if (begun := self.beginning) is not None:
            lora_A = torch.cat([lora_A, begun.lora_A.float()])
            lora_B = torch.cat([lora_B, begun.lora_B.float() * -self.scaling], 1)
        return lora_A, lora_B

    @torch.no_grad()
    def merged(self, name: str, values: Tensor) -> Tensor:
        """``weight``, [out, in] (Conv1D: [in, out]) in fp32, plus scaling · B A, in place."""
        if name == "weight":
            add_delta(self, values, self.lora_A, self.lora_B)
        return values

    def extra_repr(self) -> str:
        return f"r={self.lora_A.shape[0]}, scaling={self.scaling:g}, dropout={self.dropout:g}"


def add_delta(layer: Planted, values: Tensor, lora_A: Tensor, lora_B: Tensor) -> Tensor:
    """Add scaling · B A to ``layer``'s fp32 weight in place, without a second matrix of its size; return it as [out, in]."""
    weight = values.t() if is_transposed(layer.base) else values
    return weight.addmm_(lora_B.to(weight), lora_A.to(weight), alpha=layer.scaling)


# ── the product and its gradients ─────────────────────────────────────────────────────────────────────────────────────


class AdaptedLinear(torch.autograd.Function):
    """The frozen linear and its adapter as one step of the graph.

    Kept for backward: x, A, B and x Aᵀ (r numbers a token, a few percent of x), with dropout also one byte for each
    element of x. The frozen weight is never kept: backward asks the base for it again, so a packed weight is unpacked
    only while it is used, and a streamed one may leave the device in between.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, lora_A: Tensor, lora_B: Tensor, linear: LoraLinear, dropout: float) -> Tensor:
        rows, kept = dropped(x, dropout)
        low = rows @ lora_A.to(x.dtype).t()
        if linear.unread:
            y = x.new_zeros(*x.shape[:-1], linear.out_features)
        else:
            y = update(x, low, lora_B, linear.scaling)
            add_product(linear.base, x, y)
        ctx.linear, ctx.dropout = linear, dropout
        ctx.save_for_backward(x, lora_A, lora_B, low, kept)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_y: Tensor) -> tuple[Tensor | None, ...]:
        x, lora_A, _, _, kept = saved = ctx.saved_tensors
        grad, grad_x = grad_y.reshape(-1, grad_y.shape[-1]), None
        grad_low, grad_A, grad_B = pair_gradients(ctx, ctx.linear.scaling, grad, saved)
        if ctx.needs_input_grad[0]:
            grad_x = grad_low @ lora_A.to(grad.dtype)  # the small part first, as in forward
            if kept is not None:
                grad_x.mul_(kept).mul_(stretch(ctx.dropout))
            grad_x = grad_x.addmm_(grad, dense_weight(ctx.linear.base, grad.dtype)).view(x.shape)
        return grad_x, grad_A, grad_B, None, None


def dropped(x: Tensor, dropout: float) -> tuple[Tensor, Tensor | None]:
    """(dropout(x) as rows [n, in], which elements were kept)."""
    rows = x.reshape(-1, x.shape[-1])
    if dropout == 0:
        return rows, None
    with one_draw(x.device):
        return torch.native_dropout(rows, dropout, True)


def update(x: Tensor, low: Tensor, lora_B: Tensor, scaling: float) -> Tensor:
    """What an adapter adds to x Wᵀ: scaling · low Bᵀ, [..., out] for x [..., in] and low [n, r]."""
    y = x.new_empty(*x.shape[:-1], len(lora_B))
    y.view(-1, len(lora_B)).addmm_(low, lora_B.to(low.dtype).t(), beta=0, alpha=scaling)
    return y


def stretch(dropout: float) -> float:
    """What dropout leaves is multiplied with, to keep the mean."""
    return 1 / (1 - dropout)


def pair_gradients(
    ctx: Any, scaling: float, grad: Tensor, saved: Sequence[Any]
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """(the gradient of ``low`` = dropout(x) Aᵀ, of A, of B) for ``grad`` [n, out], of what is added as scaling · low Bᵀ.

    ``saved`` is (x, A, B, low, which elements dropout kept). Those of A and B are in fp32 where the products are in 16 bits:
    torch adds them up in the dtype that their parameter wants its gradient in.
    """
    x, _, lora_B, low, kept = saved
    grad_low = (grad @ lora_B.to(grad.dtype)).mul_(scaling)
    product = fp32_product if grad.dtype.itemsize < 4 else torch.mm
    grad_A = grad_B = None
    if ctx.needs_input_grad[1]:
        rows = x.reshape(-1, x.shape[-1])
        if kept is not None:
            rows = (rows * kept).mul_(stretch(ctx.dropout))
        grad_A = product(grad_low.t(), rows)
        del rows
    if ctx.needs_input_grad[2]:
        grad_B = product(grad.t(), low).mul_(scaling)
    return grad_low, grad_A, grad_B


# torch.autocast, which a loop of your own may have on, casts what goes into each product, one by one; inside a function
# that adds in place, fp32 and bf16 would meet. Cast once before it, everything inside agrees.


def as_autocast(x: Tensor) -> Tensor:
    """``x`` in the dtype that autocast computes products in; as it is where that is off, and in fp64, which torch leaves."""
    kind = x.device.type
    return x.to(torch.get_autocast_dtype(kind)) if _autocasts(kind) and x.dtype != torch.float64 else x


def without_autocast(device: torch.device) -> AbstractContextManager[None]:
    """Inside, products are computed in the dtype of what is multiplied."""
    return torch.autocast(device.type, enabled=False) if _autocasts(device.type) else nullcontext()


def _autocasts(kind: str) -> bool:
    return kind != "meta" and torch.is_autocast_enabled(kind)  # torch knows no autocast on meta, and raises


# ── planting, on disk and merged ──────────────────────────────────────────────────────────────────────────────────────


class LoraLayout(Layout):
    """PEFT's LoraConfig and its keys."""

    method: LoraMethod
    peft_type: str | None = "LORA"
    only = {  # noqa: RUF012
        "bias": ("none", None),
        "init_lora_weights": (True, False, None, "gaussian", "eva", "orthogonal"),
    }
    read = frozenset(
        [
            "r",
            "lora_alpha",
            "lora_dropout",
            "target_modules",
            "use_rslora",
            "rank_pattern",
            "alpha_pattern",
            "fan_in_fan_out",
            "target_parameters",
        ]
    )

    def __init__(self, method: Method) -> None:
        super().__init__(method)
        if method.section.init in ("pissa", "loftq"):
            # A and B alone say too little: they belong on a frozen weight that no checkpoint holds (PiSSA), or begin with
            # what another quantisation lost (LoftQ). Under PEFT's name they would load on the base and answer wrongly.
            self.peft_type, self.needs_state = None, True

    def key(self, name: str) -> str:
        path, _, own = name.rpartition(".")
        if isinstance(self.method.planted.get(path), LoraExperts):
            return f"{PREFIX}{experts_key(path, own, self.method.planted)}"
        return f"{PREFIX}{name}" if own in BARE else f"{PREFIX}{name}.weight"

    @torch.no_grad()
    def load(self, tensors: Mapping[str, Tensor]) -> None:
        super().load(tensors)
        self.method.beginnings.loaded()

    def peft_config(self, every_path: list[str]) -> Fields:
        section, planted = self.method.section, self.method.planted
        experts = [path for path, layer in planted.items() if isinstance(layer, LoraExperts)]
        linears = {path: layer for path, layer in planted.items() if path not in experts}
        every = packed_experts(self.method.base.model)
        targets = peft_targets(linears, every_path, mixture=anatomy.is_mixture(self.method.base.model))
        if experts:
            targets["target_parameters"] = [
                *target_names(experts, every, parts=2),
                *targets.get("target_parameters", ()),
            ]
        return {
            **plain_config(section.r, targets, section.dropout, any_transposed(linears)),
            "lora_alpha": whole(section.alpha),
            "use_rslora": section.rslora,
            "rank_pattern": sorted_pattern(section.rank_pattern, planted),
            "alpha_pattern": sorted_pattern(section.alpha_pattern, planted),
        }

    @classmethod
    def is_of(cls, values: Fields) -> bool:
        return not values.get("use_dora")  # DoRA is a LoraConfig too

    @classmethod
    def section_of(cls, values: Fields, folder: Path) -> Fields:
        modules, parameters = values.get("target_modules"), values.get("target_parameters") or []
        experts = [name for name in parameters if not str(name).endswith(".weight")]
        linears = linears_of(parameters)
        return {
            "name": "lora",
            "r": values.get("r"),
            "alpha": values.get("lora_alpha"),
            "dropout": values.get("lora_dropout", 0.0),
            "target_modules": [*modules, *linears] if linears and isinstance(modules, list) else modules,
            **({"target_parameters": experts} if experts else {}),
            "rslora": bool(values.get("use_rslora")),
            "rank_pattern": values.get("rank_pattern") or {},
            "alpha_pattern": values.get("alpha_pattern") or {},
        }

    def why_not_portable(self) -> str | None:
        others = [path for path, layer in self.method.planted.items() if not isinstance(layer, LoraLinear)]
        if not others:
            return None
        return f"LoRA on {listed(others, 3)} is on no linear, which not every program loads"

    def pairs(self) -> dict[str, tuple[Tensor, Tensor]]:
        """(A, scaling · B); where W gave a part up, on top of W itself: (A over A₀, scaling · B beside −scaling · B₀).

        Those have twice the rank. On the unquantised W that PiSSA was trained with, that is the trained model. Trained on a
        quantised base, it differs on any W', the 16-bit one or its NF4, by the frozen weight + scaling · B₀ A₀ − W'.
        """
        found = {path: layer.low_rank() for path, layer in self.method.planted.items()}
        return {path: pair for path, pair in found.items() if pair is not None}


class LoraMerge(Merge):
    """LoRA's ΔW in the base's weights."""

    def unties(self, one: str, other: str) -> bool:
        """An adapter on a tied embedding or head changes that alone, as PEFT's does."""
        return any(name.removesuffix(".weight") in self.method.planted for name in (one, other))

    def merged_expert(self, name: str, expert: int, values: Tensor) -> Tensor:
        layer = self.method.planted.get(name)
        return layer.merged_expert(expert, values) if isinstance(layer, LoraExperts) else values


class LoraMethod(Method):
    """How LoRA is planted; nothing happens in the loss or between steps."""

    by_rows: bool = True  # type: ignore[misc]
    layout_class = LoraLayout
    merge_class = LoraMerge
    section: LowRankSection

    fits = staticmethod(is_adaptable)
    kinds = KINDS
    """What may be named in ``target_modules``."""
    layer = LoraLinear
    """What is planted on a linear."""

    def __init__(self, section: LowRankSection, base: Base, seed: int = 0, values_follow: bool = False) -> None:
        super().__init__(section, base, seed, values_follow)
        self.beginnings = Beginnings(self)

    def inject(self, model: nn.Module) -> None:
        """Raises MethodError before anything is replaced: a name that matches nothing, a rank above a target's sides."""
        targets = choose_targets(model, self.section.target_modules, self.fits, self.kinds)
        experts = experts_named(model, getattr(self.section, "target_parameters", ()))
        if self.section.target_modules == "all-linear":
            narrow = [
                path
                for path, linear in targets.items()
                if min(sides(linear)) < min(rank_of(self.section, path), NARROW)
            ]
            if len(narrow) < len(targets):
                self.left_out = narrow
                targets = {path: linear for path, linear in targets.items() if path not in narrow}
        self.check(targets, experts)
        self.beginnings.refuse(targets)
        for path, linear in targets.items():
            # remembered before its frozen weight changes, so that ``detach`` undoes this too
            self.planted[path] = self.new_layer(path, linear)
            self.begin(path, self.planted[path])
        for path, packed in experts.items():
            self.planted[path] = self.new_experts(path, packed)
        self.by_rows = not experts  # in a mixture rows cannot be told apart
        super().attach(model)

    def begin(self, path: str, layer: Planted) -> None:
        """Give a new ``layer`` the first values that its weight decides."""
        self.beginnings.begin(path, layer)

    def check(self, targets: Mapping[str, nn.Module], experts: Mapping[str, PackedExperts]) -> None:
        """Raise MethodError for targets, ranks and patterns that cannot be."""
        check_pattern("rank_pattern", self.section.rank_pattern, [*targets, *experts])
        check_pattern("alpha_pattern", self.section.alpha_pattern, [*targets, *experts])
        if experts and (self.section.dropout or self.section.init not in ("kaiming", "gaussian")):
            field = "dropout" if self.section.dropout else "init"
            raise MethodError(
                f"method.{field} is {getattr(self.section, field)}, which PEFT has not for experts (target_parameters "
                f"{listed(experts, 2)}); expected {'0' if field == 'dropout' else 'kaiming or gaussian'}."
            )
        if odd := [f"{path} {why}" for path, module in targets.items() if (why := why_not(module)) is not None]:
            raise MethodError(
                f"LoRA has no form that could be merged where a target {listed(odd, 3)}; leave it out of "
                "method.target_modules."
            )
        others = [path for path, module in targets.items() if not is_linear(module)]
        if others and self.section.init not in ("kaiming", "gaussian"):
            raise MethodError(
                f"method.init is {self.section.init}, which begins adapters on linears only, but the targets "
                f"{listed(others, 3)} are none; use method.init=kaiming or leave them out of method.target_modules."
            )
        both = {path: sides(module) for path, module in targets.items()} | {
            path: e.sides for path, e in experts.items()
        }
        ranks = {path: rank_of(self.section, path) for path in both}
        if thin := [path for path, size in both.items() if ranks[path] > min(size)]:
            field = f"method.r is {self.section.r}"
            if {ranks[path] for path in thin} != {self.section.r}:
                field = f"method.rank_pattern gives {max(ranks[path] for path in thin)}"
            raise MethodError(
                f"{field}, more than the smaller side of {listed([f'{p} {list(both[p])}' for p in thin], 3)}; "
                "lower it or leave these out of method.target_modules."
            )

    def new_layer(self, path: str, linear: nn.Module) -> Planted:
        """A new adapter on ``linear``: A random, B zero, so that it starts as no change at all.

        On an embedding it is A that is zero, and B normal. What is random is drawn on the CPU in fp32 whatever the device
        and dtype are: every device starts from the same values.
        """
        outputs, inputs = sides(linear)
        rank, scaling, meta = rank_of(self.section, path), scaling_of(self.section, path), self.device.type == "meta"
        lora_A = torch.zeros(rank, inputs, device="meta" if meta else None)
        lora_B = torch.zeros(outputs, rank, device=lora_A.device)
        if isinstance(linear, nn.Embedding) and not meta:
            lora_B.normal_(generator=self.generator(path))
        elif not meta:
            lora_A = first_A(self.section.init, rank, inputs, self.generator(path))
        lora_A, lora_B = lora_A.to(self.device, self.dtype), lora_B.to(self.device, self.dtype)
        if isinstance(linear, nn.Embedding):
            return LoraEmbedding(linear, lora_A, lora_B, scaling)
        if isinstance(linear, nn.Conv2d):
            lora_A, lora_B = lora_A.view(rank, -1, *linear.kernel_size), lora_B.view(outputs, rank, 1, 1)
            return LoraConv2d(linear, lora_A, lora_B, scaling, self.section.dropout)
        return self.layer(linear, lora_A, lora_B, scaling, self.section.dropout)

    def new_experts(self, path: str, packed: PackedExperts) -> LoraExperts:
        """New adapters on the matrices of several experts: every A random, every B zero."""
        (outputs, inputs), rank, generator = packed.sides, rank_of(self.section, path), self.generator(path)
        device = torch.device("meta") if self.device.type == "meta" else None
        lora_A = torch.zeros(packed.count * rank, inputs, device=device)
        if device is None:
            for expert in range(packed.count):
                lora_A[expert * rank : (expert + 1) * rank] = first_A(self.section.init, rank, inputs, generator)
        lora_B = torch.zeros(outputs, rank * packed.count, device=device)
        scaling = scaling_of(self.section, path)
        return LoraExperts(packed, lora_A.to(self.device, self.dtype), lora_B.to(self.device, self.dtype), scaling)

    def prepare(self, batches: Iterable[Mapping[str, Tensor]]) -> None:
        """EVA takes A from the inputs that the targets get."""
        self.beginnings.prepare(batches)

    def state(self) -> dict[str, Tensor]:
        """What A and B began as, where the original weight is not what they stand beside."""
        return self.beginnings.state()

    @torch.no_grad()
    def load_state(self, tensors: Mapping[str, Tensor]) -> None:
        """Copy in what ``state`` gave, and rebuild the frozen weights with it."""
        self.beginnings.load_state(tensors)

    def attach(self, model: nn.Module) -> None:
        self.beginnings.give_up()
        super().attach(model)

    def detach(self, model: nn.Module) -> None:
        super().detach(model)
        self.beginnings.put_back()

    def learning_rate_ratio(self, name: str) -> float:
        """LoRA+: B learns faster, by the section's ratio; an embedding's halves and DoRA's magnitudes do not."""
        return float(self.section.learning_rate_ratio) if leaf(name) == "lora_B" else 1.0


def plain_config(r: int, targets: Fields, dropout: float = 0.0, transposed: bool = False) -> Fields:
    """PEFT's LoraConfig of a plain adapter with alpha = r; ``transposed`` for GPT-2's Conv1D.

    Beside ``target_parameters`` PEFT takes no dropout, which matters in training alone; our own section still says it.
    """
    return {
        "r": r,
        "lora_alpha": r,
        "lora_dropout": 0.0 if targets.get("target_parameters") else dropout,
        **targets,
        "bias": "none",
        "fan_in_fan_out": transposed,
        "init_lora_weights": True,
        "use_dora": False,
        "use_rslora": False,
        "modules_to_save": None,
        "rank_pattern": {},
        "alpha_pattern": {},
        "layers_to_transform": None,
        "layers_pattern": None,
    }


def rank_of(section: LowRankSection, path: str) -> int:
    """The rank that a LoRA section gives the target at ``path``."""
    return int(pattern_value(section.rank_pattern, path, section.r))


def scaling_of(section: LowRankSection, path: str) -> float:
    """alpha / r of a LoRA section's target at ``path``, or alpha / √r."""
    rank, alpha = rank_of(section, path), pattern_value(section.alpha_pattern, path, section.alpha)
    return float(alpha / rank**0.5 if section.rslora else alpha / rank)


def any_transposed(planted: Mapping[str, Planted]) -> bool:
    """PEFT's ``fan_in_fan_out``: whether some weights are stored as [in, out]; PEFT then looks at each."""
    return any(is_transposed(layer.base) for layer in planted.values())
