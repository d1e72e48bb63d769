"""LoRA: a low-rank update beside each frozen linear (Hu et al. 2021, arXiv:2106.09685).

    y = x Wᵀ + b + scaling · dropout(x) Aᵀ Bᵀ          A [r, in], B [out, r], scaling = alpha / r

Knows this formula, its gradients and its initial values; must not know how W is stored (``dense_weight`` tells), how the
adapter is saved, or the training loop.
"""

from __future__ import annotations

import hashlib
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from qlora import config
from qlora.device import DTYPES
from qlora.errors import MethodError, listed
from qlora.methods.targets import Linear, choose_targets
from qlora.model.nf4 import dense_weight


class LoraLinear(nn.Module):
    """A frozen linear with an adapter beside it.

    ``base`` is the frozen linear; ``lora_A`` [r, in] and ``lora_B`` [out, r] train. While ``enabled`` is off, the base
    answers alone. While ``unread`` is on, nobody reads the answer but its gradient is wanted (see ``model/layers.py``).
    """

    def __init__(self, base: Linear, lora_A: Tensor, lora_B: Tensor, scaling: float, dropout: float) -> None:
        super().__init__()
        self.base = base
        self.in_features, self.out_features = lora_A.shape[1], lora_B.shape[0]
        self.lora_A = nn.Parameter(lora_A)
        self.lora_B = nn.Parameter(lora_B)
        self.scaling = scaling
        self.dropout = dropout
        self.enabled = True
        self.unread = False

    @classmethod
    def from_base(
        cls, base: Linear, spec: config.LoRA, generator: torch.Generator, device: torch.device, dtype: torch.dtype
    ) -> LoraLinear:
        """Plant a new adapter on ``base``: A uniform in ±1/√in, B zero, so that it starts as no change at all.

        A is drawn on the CPU in fp32 whatever ``device`` and ``dtype`` are: every device starts from the same values.
        """
        bound = base.in_features**-0.5  # PEFT's Kaiming uniform with a = √5, written out
        lora_A = torch.empty(spec.r, base.in_features).uniform_(-bound, bound, generator=generator)
        lora_B = torch.zeros(base.out_features, spec.r)
        return cls(base, lora_A.to(device, dtype), lora_B.to(device, dtype), spec.alpha / spec.r, spec.dropout)

    def forward(self, x: Tensor) -> Tensor:
        """[…, in] → […, out] in the dtype of ``x``."""
        if not self.enabled:
            return self.base(x)
        dropout = self.dropout if self.training else 0.0
        return _AdaptedLinear.apply(x, self.lora_A, self.lora_B, self, dropout)

    @torch.no_grad()
    def delta(self) -> Tensor:
        """What the adapter adds to the weight: scaling · B A, [out, in] in fp32."""
        zero = torch.zeros(self.out_features, self.in_features, device=self.lora_A.device)
        return add_delta(zero, self.lora_A, self.lora_B, self.scaling)

    @torch.no_grad()
    def merged_weight(self, dtype: torch.dtype) -> Tensor:
        """The dense base weight plus ``delta()``, [out, in], summed in fp32 and rounded once to ``dtype``."""
        weight = dense_weight(self.base, torch.float32).clone()  # a clone: it may be the base's own
        return add_delta(weight, self.lora_A, self.lora_B, self.scaling).to(dtype)

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


class LoraMethod:
    """How LoRA is planted; nothing happens in the loss or between steps."""

    virtual_tokens = 0

    def __init__(self, section: config.LoRA, device: torch.device, compute_dtype: torch.dtype, seed: int) -> None:
        self.section = section
        self.device = device
        self.dtype = adapter_dtype(section.adapter_dtype, device, compute_dtype)
        self.seed = seed

    def inject(self, model: nn.Module) -> dict[str, LoraLinear]:
        """Replace the targets inside ``model``; return what was planted, by the target's module path.

        Raises MethodError before anything is replaced: a name that matches nothing, a rank above a target's sides.
        """
        targets = choose_targets(model, self.section.target_modules)
        thin = [
            f"{path} [{linear.out_features}, {linear.in_features}]"
            for path, linear in targets.items()
            if self.section.r > min(linear.in_features, linear.out_features)
        ]
        if thin:
            raise MethodError(
                f"method.r is {self.section.r}, more than the smaller side of {listed(thin, 3)}; "
                "lower method.r or leave these out of method.target_modules."
            )
        planted = {}
        for path, linear in targets.items():
            generator = torch.Generator().manual_seed(_seed_of(self.seed, path))
            planted[path] = LoraLinear.from_base(linear, self.section, generator, self.device, self.dtype)
            planted[path].train(model.training)
            model.set_submodule(path, planted[path])
        return planted

    def penalty(self) -> Tensor | None:
        """LoRA adds nothing to the loss."""
        return None

    def after_step(self, step: int, total: int) -> None:
        """LoRA changes nothing between steps."""


def adapter_dtype(requested: str, device: torch.device, compute_dtype: torch.dtype) -> torch.dtype:
    """The dtype that adapters are kept in. ``auto``: bf16 on CUDA with bf16 compute, fp32 elsewhere.

    With fp16 compute the adapters stay fp32, because small updates vanish in fp16.
    """
    if requested != "auto":
        return DTYPES[requested]
    return torch.bfloat16 if device.type == "cuda" and compute_dtype == torch.bfloat16 else torch.float32


def _seed_of(seed: int, path: str) -> int:
    """A seed of its own for each target, so that its initial values do not depend on which others there are."""
    return int.from_bytes(hashlib.sha256(f"{seed}:{path}".encode()).digest()[:8], "little") >> 1
