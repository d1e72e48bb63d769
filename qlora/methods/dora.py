"""DoRA: LoRA on the direction of a weight, and its magnitude apart (Liu et al. 2024, arXiv:2402.09353).

    W' = W + scaling · B A                            the direction, row by row
    y  = (m / ‖W'‖) ⊙ (W' x) + b                      m [out] trains and begins as ‖W‖; ‖W'‖ [out], the norm of each row

The norm is a constant to the gradient (section 4.3). Dropout, as PEFT has it, falls on the input of the part that the
magnitude changes, and W x itself is left whole:

    y  = W x + b + (m / ‖W'‖ − 1) ⊙ (W x̃) + (m / ‖W'‖) ⊙ scaling · B A x̃        x̃ = dropout(x)

Knows this formula and its gradients; must not know how W is stored, adapter files, or the training loop.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from qlora.methods.layout import Fields
from qlora.methods.lora import (
    LoraLayout,
    LoraLinear,
    LoraMethod,
    add_delta,
    dropped,
    pair_gradients,
    stretch,
    update,
    without_autocast,
)
from qlora.methods.planted import Planted
from qlora.methods.targets import beside_experts
from qlora.model import anatomy
from qlora.model.nf4 import add_product, dense_cached, dense_weight, is_empty, is_linear

SMALLEST = 1e-30  # a row of zeros has no direction; with this norm nothing is divided by zero


class DoraLinear(LoraLinear):
    """LoRA's linear with ``lora_magnitude_vector`` [out], which is fp32 whatever dtype A and B have.

    In bf16 it would be up to 0.4 % off the norm that it begins as, so that step 0 would not be the base.
    """

    def __init__(self, base: nn.Module, lora_A: Tensor, lora_B: Tensor, scaling: float, dropout: float) -> None:
        super().__init__(base, lora_A, lora_B, scaling, dropout)
        ones = torch.ones(self.out_features, dtype=torch.float32, device=lora_B.device)
        self.lora_magnitude_vector = nn.Parameter(ones)

    @torch.no_grad()
    def measure(self, dtype: torch.dtype) -> None:
        """Set the magnitudes to the norms that there are, so that they change nothing.

        ``dtype`` is the one that the forward computes in: unpacked to another, a weight has slightly other norms. A base
        on the meta device has no norms; the magnitudes are read from a file then.
        """
        if not is_empty(self.base):
            self.lora_magnitude_vector.copy_(self.norm(dense_weight(self.base, dtype)))

    @torch.no_grad()
    def norm(self, weight: Tensor) -> Tensor:
        """The norm of each row of W + scaling · B A [out], for a dense ``weight`` W [out, in]; in fp32, or W's fp64.

        Multiplied out, ‖w + s b A‖² = ‖w‖² + 2 s b (A w) + s² b (A Aᵀ) bᵀ, so that no second matrix of W's size is made.
        """
        wide = torch.promote_types(weight.dtype, torch.float32)
        lora_A, lora_B = self.lora_A.to(weight.dtype), self.lora_B.to(wide)
        plain = torch.linalg.vector_norm(weight, dim=1, dtype=wide)
        cross = (weight @ lora_A.t()).to(wide).mul_(lora_B).sum(1)
        own = (lora_B @ (lora_A.to(wide) @ lora_A.to(wide).t())).mul_(lora_B).sum(1)
        squares = plain.square_().add_(cross, alpha=2 * self.scaling).add_(own, alpha=self.scaling**2)
        return squares.clamp_min_(0).sqrt_().clamp_min_(SMALLEST)

    def adapted(self, x: Tensor, dropout: float) -> Tensor:
        """The formula above."""
        return _DirectedLinear.apply(x, self.lora_A, self.lora_B, self.lora_magnitude_vector, self, dropout)

    def low_rank(self) -> None:
        """The magnitudes change W as a whole."""

    @torch.no_grad()
    def merged(self, name: str, values: Tensor) -> Tensor:
        """``weight``, [out, in] (Conv1D: [in, out]) in fp32, as (m / ‖W'‖) ⊙ W', in place."""
        if name == "weight":
            weight = add_delta(self, values, self.lora_A, self.lora_B)
            norm = torch.linalg.vector_norm(weight, dim=1).clamp_min_(SMALLEST)
            weight.mul_((self.lora_magnitude_vector.to(weight) / norm).unsqueeze(1))
        return values


class _DirectedLinear(torch.autograd.Function):
    """The frozen linear, its direction's update and its magnitude as one step of the graph.

    Kept for backward: x, A, B, x Aᵀ, W'x̃ (as large as the output: the magnitude's gradient needs it, and to multiply it
    out again would cost as much as the forward), two vectors [out], with dropout one byte for each element of x. Never W.
    """

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, lora_A: Tensor, lora_B: Tensor, magnitude: Tensor, layer: DoraLinear, dropout: float
    ) -> Tensor:
        rows, kept = dropped(x, dropout)
        low = rows @ lora_A.to(x.dtype).t()
        y = update(x, low, lora_B, layer.scaling)
        flat = y.view(-1, y.shape[-1])
        with dense_cached(layer.base):  # the weight is unpacked once for its product and its norm
            weight = dense_weight(layer.base, x.dtype)
            with without_autocast(x.device):  # the norm is wider than x
                norm = layer.norm(weight)
            directed = flat.addmm(rows, weight.t()) if kept is not None else None
            del weight
            add_product(layer.base, x, y)
        scale = magnitude.to(norm.dtype) / norm
        if directed is None:
            bias: Any = layer.base.bias
            directed = flat.clone() if bias is None else flat - bias.to(x.dtype)
        # W'x + (m/‖W'‖ − 1) W'x: where the magnitude is the norm, this adds zero to what the base says
        flat.addcmul_(directed, (scale - 1).to(x.dtype))
        # not ctx.linear: by that name residence/boundary.py leaves answers out, and W'x is needed for the magnitudes
        ctx.layer, ctx.dropout = layer, dropout
        ctx.save_for_backward(x, lora_A, lora_B, low, kept, magnitude, directed, scale, norm)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_y: Tensor) -> tuple[Tensor | None, ...]:
        *pair, magnitude, directed, scale, norm = ctx.saved_tensors
        x, lora_A, _, _, kept = pair
        grad = grad_y.reshape(-1, grad_y.shape[-1])
        grad_x = grad_m = None
        if ctx.needs_input_grad[3]:
            grad_m = ((grad.to(norm.dtype) * directed).sum(0) / norm).to(magnitude.dtype)
        scaled = grad * scale.to(grad.dtype)
        grad_low, grad_A, grad_B = pair_gradients(ctx, ctx.layer.scaling, scaled, pair)
        if ctx.needs_input_grad[0]:
            weight = dense_weight(ctx.layer.base, grad.dtype)
            grad_x = grad_low @ lora_A.to(grad.dtype)
            if kept is None:
                grad_x.addmm_(scaled, weight)
            else:
                grad_x.addmm_(grad * (scale - 1).to(grad.dtype), weight).mul_(kept).mul_(stretch(ctx.dropout))
                grad_x.addmm_(grad, weight)
            grad_x = grad_x.view(x.shape)
        return grad_x, grad_A, grad_B, grad_m, None, None


class DoraLayout(LoraLayout):
    """PEFT's LoraConfig, in which DoRA is a flag."""

    read = LoraLayout.read | {"use_dora"}

    def peft_config(self, every_path: list[str]) -> Fields:
        return {**super().peft_config(every_path), "use_dora": True}

    @classmethod
    def is_of(cls, values: Fields) -> bool:
        return bool(values.get("use_dora"))

    @classmethod
    def section_of(cls, values: Fields, folder: Path) -> Fields:
        return {**super().section_of(values, folder), "name": "dora"}

    def why_not_portable(self) -> str | None:
        """Magnitudes are no product of two thin matrices."""
        mixture = anatomy.is_mixture(self.method.base.model)
        peft = ", nor has PEFT them beside a mixture's experts" if beside_experts(self.method.planted, mixture) else ""
        return f"DoRA's magnitudes are no plain LoRA, which is what servers load{peft}; export it merged"


class DoraMethod(LoraMethod):
    """LoRA's way of planting, with magnitudes."""

    layout_class = DoraLayout
    fits = staticmethod(is_linear)
    kinds = "linear"
    layer = DoraLinear

    def begin(self, path: str, layer: Planted) -> None:
        """LoRA's beginning; the magnitudes are the norms of what came of it."""
        super().begin(path, layer)
        assert isinstance(layer, DoraLinear)
        if not self.values_follow:
            layer.measure(self.base.compute_dtype)
