"""LoRA: a low-rank update beside each frozen linear (Hu et al. 2021, arXiv:2106.09685).

    y = x Wᵀ + b + scaling · dropout(x) Aᵀ Bᵀ          A [r, in], B [out, r], scaling = alpha / r

Knows this formula, its gradients and its initial values; must not know how W is stored (``dense_weight`` tells), how the
adapter is saved, or the training loop.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from qlora.errors import MethodError, listed
from qlora.methods.autocast import as_autocast
from qlora.methods.beginning import Beginning, first_A
from qlora.methods.initial import Initial
from qlora.methods.lora_layers import KINDS, LoraConv2d, LoraEmbedding, is_adaptable, sides, why_not
from qlora.methods.method import PREFIX, Method
from qlora.methods.planted import Planted
from qlora.methods.targets import check_pattern, choose_targets, leaf, pattern_value, sorted_pattern, target_names
from qlora.model.load import Base
from qlora.model.nf4 import dense_weight, is_linear, is_transposed

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
        self.refuse_unready()
        dropout = self.dropout if self.training else 0.0
        return _AdaptedLinear.apply(as_autocast(x), self.lora_A, self.lora_B, self, dropout)

    def refuse_unready(self) -> None:
        """Raise MethodError where training begins without the first values that were asked for."""
        if self.lacks is not None and self.training:
            raise MethodError(self.lacks)

    def alone(self, x: Tensor) -> Tensor:
        """What the base answers without the adapter. What its frozen weight gave up to begin with is multiplied back in.

        Then this is the adapted layer of step 0, bit for bit. On an unquantised base that is W but for rounding; on a
        quantised one it is as far from the checkpoint's W as the residual's quantisation is, mostly less than W's own.
        """
        if self.beginning is None or self.beginning.given is None:
            return self.base(x)
        return _AdaptedLinear.apply(as_autocast(x), self.beginning.lora_A, self.beginning.lora_B, self, 0.0)

    def before_quantising(self, weight: Tensor) -> Tensor:
        """What the frozen weight was made from; ``weight`` lies as the checkpoint has it."""
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
    def merged(self, name: str, values: Tensor) -> Tensor:
        """``weight``, [out, in] (Conv1D: [in, out]) in fp32, plus scaling · B A, in place."""
        if name == "weight":
            weight = values.t() if is_transposed(self.base) else values
            add_delta(weight, self.lora_A, self.lora_B, self.scaling)
        return values

    def extra_repr(self) -> str:
        return f"r={self.lora_A.shape[0]}, scaling={self.scaling:g}, dropout={self.dropout:g}"


def add_delta(weight: Tensor, lora_A: Tensor, lora_B: Tensor, scaling: float) -> Tensor:
    """Add scaling · B A to an fp32 ``weight`` [out, in] in place, without a second matrix of its size."""
    return weight.addmm_(lora_B.to(weight), lora_A.to(weight), alpha=scaling)


class _AdaptedLinear(torch.autograd.Function):
    """The frozen linear and its adapter as one step of the graph.

    Kept for backward: x, A, B and x Aᵀ (r numbers a token, a few percent of x), with dropout also one byte for each
    element of x. The frozen weight is never kept: backward asks the base for it again, so a packed weight is unpacked
    only while it is used, and a streamed one may leave the device in between.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, lora_A: Tensor, lora_B: Tensor, linear: LoraLinear, dropout: float) -> Tensor:
        rows = x.reshape(-1, x.shape[-1])
        kept = None
        if dropout > 0:
            rows, kept = torch.native_dropout(rows, dropout, True)
        low = rows @ lora_A.to(x.dtype).t()
        if linear.unread:
            y = x.new_zeros(*x.shape[:-1], linear.out_features)
        else:
            y = linear.base(x)
            y.view(-1, y.shape[-1]).addmm_(low, lora_B.to(x.dtype).t(), alpha=linear.scaling)
        ctx.linear, ctx.dropout = linear, dropout
        ctx.save_for_backward(x, lora_A, lora_B, low, kept)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_y: Tensor) -> tuple[Tensor | None, ...]:
        x, lora_A, lora_B, low, kept = ctx.saved_tensors
        grad = grad_y.reshape(-1, grad_y.shape[-1])
        stretch = 1 / (1 - ctx.dropout)  # what dropout leaves is stretched to keep the mean
        grad_x = grad_A = grad_B = None
        if ctx.needs_input_grad[0] or ctx.needs_input_grad[1]:
            grad_low = (grad @ lora_B.to(grad.dtype)).mul_(ctx.linear.scaling)
        if ctx.needs_input_grad[1]:
            rows = x.reshape(-1, x.shape[-1])
            if kept is not None:
                rows = (rows * kept).mul_(stretch)
            grad_A = (grad_low.t() @ rows).to(lora_A.dtype)
            del rows
        if ctx.needs_input_grad[2]:
            grad_B = (grad.t() @ low).mul_(ctx.linear.scaling).to(lora_B.dtype)
        if ctx.needs_input_grad[0]:
            grad_x = grad @ dense_weight(ctx.linear.base, grad.dtype)
            if kept is None:
                grad_x.addmm_(grad_low, lora_A.to(grad.dtype))
            else:
                grad_x.add_((grad_low @ lora_A.to(grad.dtype)).mul_(kept), alpha=stretch)
            grad_x = grad_x.view(x.shape)
        return grad_x, grad_A, grad_B, None, None, None


class LoraMethod(Method):
    """How LoRA is planted; nothing happens in the loss or between steps."""

    peft_type: str | None = "LORA"

    fits = staticmethod(is_adaptable)
    kinds = KINDS
    """What may be named in ``target_modules``."""

    def __init__(self, section: Any, base: Base, seed: int = 0) -> None:
        super().__init__(section, base, seed)
        self.initial = Initial(section, base, self.dtype)
        if self.initial.from_weight:
            # A and B alone say too little: they belong on a frozen weight that no checkpoint holds (PiSSA), or begin with
            # what another quantisation lost (LoftQ). Under PEFT's name they would load on the base and answer wrongly.
            self.peft_type, self.needs_state = None, True

    def inject(self, model: nn.Module) -> dict[str, Planted]:
        """Replace the targets inside ``model``; return what was planted, by the target's module path.

        Raises MethodError before anything is replaced: a name that matches nothing, a rank above a target's sides.
        """
        targets = choose_targets(model, self.section.target_modules, self.fits, self.kinds)
        self.check(targets)
        self.initial.refuse(targets)
        try:
            for path, linear in targets.items():
                layer = self.new_layer(path, linear)
                self.planted[path] = layer  # before its frozen weight changes, so that this is undone too
                self.begin(path, layer)
                self.plant(model, path, layer)
        except BaseException:  # an unreadable weight among many, or Ctrl-C
            self.detach(model)
            raise
        return self.planted

    def begin(self, path: str, layer: Planted) -> None:
        """Give a new ``layer`` the first values that its weight decides."""
        self.initial.begin(path, layer, self.generator(path), self.values_follow)

    def check(self, targets: Mapping[str, nn.Module]) -> None:
        """Raise MethodError for targets, ranks and patterns that cannot be."""
        check_pattern("rank_pattern", self.section.rank_pattern, targets)
        check_pattern("alpha_pattern", self.section.alpha_pattern, targets)
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
        ranks = {path: self.rank(path) for path, module in targets.items() if self.rank(path) > min(sides(module))}
        if ranks:
            thin = [f"{path} {list(sides(targets[path]))}" for path in ranks]
            field = f"method.r is {self.section.r}"
            if set(ranks.values()) != {self.section.r}:
                field = f"method.rank_pattern gives {max(ranks.values())}"
            raise MethodError(
                f"{field}, more than the smaller side of {listed(thin, 3)}; "
                "lower it or leave these out of method.target_modules."
            )

    def rank(self, path: str) -> int:
        """The rank at ``path``."""
        return rank_of(self.section, path)

    def scaling(self, path: str) -> float:
        """What B A is multiplied with at ``path``."""
        return scaling_of(self.section, path)

    def new_layer(self, path: str, linear: nn.Module) -> Planted:
        """A new adapter on ``linear``: A random, B zero, so that it starts as no change at all.

        On an embedding it is A that is zero, and B normal. What is random is drawn on the CPU in fp32 whatever the device
        and dtype are: every device starts from the same values.
        """
        outputs, inputs = sides(linear)
        rank, meta = self.rank(path), self.device.type == "meta"
        lora_A = torch.zeros(rank, inputs, device="meta" if meta else None)
        lora_B = torch.zeros(outputs, rank, device=lora_A.device)
        if isinstance(linear, nn.Embedding):
            if not meta:
                lora_B.normal_(generator=self.generator(path))
            lora_A, lora_B = lora_A.to(self.device, self.dtype), lora_B.to(self.device, self.dtype)
            return LoraEmbedding(linear, lora_A, lora_B, self.scaling(path))
        if not meta:
            lora_A = first_A(self.section.init, rank, inputs, self.generator(path))
        lora_A, lora_B = lora_A.to(self.device, self.dtype), lora_B.to(self.device, self.dtype)
        if isinstance(linear, nn.Conv2d):
            lora_A, lora_B = lora_A.view(rank, -1, *linear.kernel_size), lora_B.view(outputs, rank, 1, 1)
            return LoraConv2d(linear, lora_A, lora_B, self.scaling(path), self.section.dropout)
        return self.layer(linear, lora_A, lora_B, self.scaling(path), self.section.dropout)

    layer = LoraLinear
    """What is planted on a linear."""

    def prepare(self, batches: Iterable[Mapping[str, Tensor]]) -> None:
        """EVA takes A from the inputs that the targets get."""
        self.initial.prepare(self.base.model, self.planted, batches, self.generator("eva"))

    @torch.no_grad()
    def load(self, tensors: Mapping[str, Tensor]) -> None:
        super().load(tensors)
        self.initial.loaded(self.planted)

    def state(self) -> dict[str, Tensor]:
        """What A and B began as, where the original weight is not what they stand beside."""
        return self.initial.state(self.planted)

    @torch.no_grad()
    def load_state(self, tensors: Mapping[str, Tensor]) -> None:
        """Copy in what ``state`` gave, and rebuild the frozen weights with it."""
        self.initial.load_state(self.planted, tensors)

    def attach(self, model: nn.Module) -> None:
        self.initial.give_up(self.planted)
        super().attach(model)

    def detach(self, model: nn.Module) -> None:
        super().detach(model)
        self.initial.put_back(self.planted)

    def learning_rate_ratio(self, name: str) -> float:
        """LoRA+: B learns faster, by the section's ratio; an embedding's halves and DoRA's magnitudes do not."""
        return float(self.section.learning_rate_ratio) if leaf(name) == "lora_B" else 1.0

    def key(self, name: str) -> str:
        """PEFT's key of a parameter."""
        return f"{PREFIX}{name}" if leaf(name) in BARE else super().key(name)

    def unties(self, one: str, other: str) -> bool:
        """An adapter on a tied embedding or head changes that alone, as PEFT's does."""
        return any(name.removesuffix(".weight") in self.planted for name in (one, other))

    @staticmethod
    def plain_config(r: int, targets: list[str], dropout: float = 0.0, transposed: bool = False) -> dict[str, Any]:
        """PEFT's LoraConfig of a plain adapter with alpha = r; ``transposed`` for GPT-2's Conv1D."""
        return {
            "r": r,
            "lora_alpha": r,
            "lora_dropout": dropout,
            "target_modules": targets,
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

    def peft_config(self, every_path: list[str]) -> dict[str, Any]:
        """PEFT's LoraConfig."""
        section = self.section
        return {
            **self.plain_config(
                section.r, target_names(self.planted, every_path), section.dropout, any_transposed(self.planted)
            ),
            "lora_alpha": int(section.alpha) if section.alpha == int(section.alpha) else section.alpha,
            "use_rslora": section.rslora,
            "rank_pattern": sorted_pattern(section.rank_pattern, self.planted),
            "alpha_pattern": sorted_pattern(section.alpha_pattern, self.planted),
        }

    only = {  # noqa: RUF012
        "bias": ("none", None),
        "init_lora_weights": (True, False, None, "gaussian", "eva", "orthogonal"),
    }
    read = frozenset(
        {
            "r",
            "lora_alpha",
            "lora_dropout",
            "target_modules",
            "use_rslora",
            "rank_pattern",
            "alpha_pattern",
            "fan_in_fan_out",
        }
    )

    @classmethod
    def is_of(cls, values: Mapping[str, Any]) -> bool:
        """DoRA is a LoraConfig too."""
        return not values.get("use_dora")

    @classmethod
    def section_from(cls, values: Mapping[str, Any]) -> dict[str, Any]:
        """The section of a LoraConfig."""
        return {
            "name": "lora",
            "r": values.get("r"),
            "alpha": values.get("lora_alpha"),
            "dropout": values.get("lora_dropout", 0.0),
            "target_modules": values.get("target_modules"),
            "rslora": bool(values.get("use_rslora")),
            "rank_pattern": values.get("rank_pattern") or {},
            "alpha_pattern": values.get("alpha_pattern") or {},
        }

    def why_not_portable(self) -> str | None:
        """LoRA on linears is what servers load."""
        others = [path for path, layer in self.planted.items() if not isinstance(layer, LoraLinear)]
        if not others:
            return None
        return f"LoRA on {listed(others, 3)} is on no linear, and servers load it on linears only; export it merged"

    @torch.no_grad()
    def pairs(self) -> dict[str, tuple[Tensor, Tensor]]:
        """(A, scaling · B); where W gave a part up, on top of W itself: (A over A₀, scaling · B beside −scaling · B₀).

        Those have twice the rank. On the unquantised W that PiSSA was trained with, that is the trained model. Trained on a
        quantised base, it differs on any W', the 16-bit one or its NF4, by the frozen weight + scaling · B₀ A₀ − W'.
        """
        pairs = {}
        for path, layer in self.planted.items():
            lora_A, lora_B = layer.lora_A.float(), layer.lora_B.float() * layer.scaling
            if (begun := getattr(layer, "beginning", None)) is not None:
                lora_A = torch.cat([lora_A, begun.lora_A.float()])
                lora_B = torch.cat([lora_B, begun.lora_B.float() * -layer.scaling], 1)
            pairs[path] = (lora_A, lora_B)
        return pairs


def rank_of(section: Any, path: str) -> int:
    """The rank that a LoRA section gives the target at ``path``."""
    return int(pattern_value(section.rank_pattern, path, section.r))


def scaling_of(section: Any, path: str) -> float:
    """alpha / r of a LoRA section's target at ``path``, or alpha / √r."""
    rank, alpha = rank_of(section, path), pattern_value(section.alpha_pattern, path, section.alpha)
    return float(alpha / rank**0.5 if section.rslora else alpha / rank)


def any_transposed(planted: Mapping[str, Planted]) -> bool:
    """PEFT's ``fan_in_fan_out``: whether weights lie as [in, out] somewhere. PEFT itself then looks at each."""
    return any(is_transposed(layer.base) for layer in planted.values())
