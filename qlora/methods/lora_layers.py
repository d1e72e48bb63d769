"""LoRA beside what is no linear: an embedding, whose input is a number, and a convolution.

    embedding     y = W[i] + scaling · A[:, i]ᵀ Bᵀ                       A [r, vocabulary] zero, B [width, r] normal
    convolution   y = W ∗ x + b + scaling · B ∗ (A ∗ dropout(x))         A [r, in, h, w], B [out, r, 1, 1] zero

Names, shapes and first values are PEFT's, which drops nothing out at an embedding either. A row of an embedding lies on its
dtype's grid as it is, so there what is less than half a step of it is lost in 16 bits; a convolution's sum is rounded once. Knows these two formulas; must
not know which modules are chosen, or how the adapter is saved.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from qlora.methods.planted import Planted
from qlora.model.nf4 import features, is_linear

KINDS = "linear, embedding or convolution"


def is_adaptable(module: nn.Module) -> bool:
    """Whether LoRA has a form for ``module``."""
    return is_linear(module) or isinstance(module, nn.Embedding | nn.Conv2d)


def sides(module: nn.Module) -> tuple[int, int]:
    """(outputs, inputs) of what LoRA can adapt, as the two sides of one matrix."""
    if isinstance(module, nn.Embedding):
        return module.embedding_dim, module.num_embeddings
    if isinstance(module, nn.Conv2d):
        return module.out_channels, module.in_channels * math.prod(module.kernel_size)
    return features(module)


def why_not(module: nn.Module) -> str | None:
    """What about ``module`` rules an adapter out that could be merged; None for most."""
    if isinstance(module, nn.Conv2d) and module.groups != 1:
        return f"has groups={module.groups}"
    if isinstance(module, nn.Conv2d) and module.padding_mode != "zeros":
        return f"has padding_mode={module.padding_mode}"
    if isinstance(module, nn.Embedding) and module.max_norm is not None:
        return f"has max_norm={module.max_norm:g}"
    return None


class LoraEmbedding(Planted):
    """A frozen embedding with an adapter beside it: ``lora_embedding_A`` [r, vocabulary], ``lora_embedding_B`` [width, r]."""

    base: nn.Embedding

    def __init__(self, base: nn.Embedding, lora_A: Tensor, lora_B: Tensor, scaling: float) -> None:
        super().__init__(base)
        self.lora_embedding_A = nn.Parameter(lora_A)
        self.lora_embedding_B = nn.Parameter(lora_B)
        self.scaling = scaling

    def forward(self, ids: Tensor) -> Tensor:
        """[…] → […, width] in the dtype of the base."""
        base = self.base
        y: Tensor = base(ids)
        if not self.enabled:
            return y
        low = F.embedding(
            ids,
            self.lora_embedding_A.t(),
            padding_idx=base.padding_idx,  # the padding's column gets no gradient, as in the base
            scale_grad_by_freq=base.scale_grad_by_freq,
        )
        added = low.to(y.dtype) @ self.lora_embedding_B.to(y.dtype).t() * self.scaling
        if (scale := getattr(base, "embed_scale", None)) is not None:  # Gemma 3 scales inside the module
            added = added * torch.as_tensor(scale).to(added)
        return y + added

    @torch.no_grad()
    def low_rank(self) -> tuple[Tensor, Tensor]:
        """Of the weight as it lies, [vocabulary, width]: (scaling · Bᵀ, Aᵀ)."""
        return self.lora_embedding_B.t().float() * self.scaling, self.lora_embedding_A.t().float()

    @torch.no_grad()
    def merged(self, name: str, values: Tensor) -> Tensor:
        """``weight`` [vocabulary, width] in fp32, plus scaling · (B A)ᵀ, in place."""
        if name == "weight":
            values.addmm_(
                self.lora_embedding_A.to(values).t(), self.lora_embedding_B.to(values).t(), alpha=self.scaling
            )
        return values

    def extra_repr(self) -> str:
        return f"r={self.lora_embedding_A.shape[0]}, scaling={self.scaling:g}"


class LoraConv2d(Planted):
    """A frozen convolution with an adapter beside it: ``lora_A`` [r, in, h, w], which slides as the base does, and
    ``lora_B`` [out, r, 1, 1]."""

    base: nn.Conv2d

    def __init__(self, base: nn.Conv2d, lora_A: Tensor, lora_B: Tensor, scaling: float, dropout: float) -> None:
        super().__init__(base)
        self.lora_A = nn.Parameter(lora_A)
        self.lora_B = nn.Parameter(lora_B)
        self.scaling = scaling
        self.dropout = dropout

    def forward(self, x: Tensor) -> Tensor:
        """[batch, in, height, width] → [batch, out, …] in the dtype of ``x``; in fp32 at least until it is summed, since an
        update that is less than half a step of what is rounded already would be lost."""
        base = self.base
        if not self.enabled:
            return base(x)
        wide, bias = torch.promote_types(x.dtype, torch.float32), base.bias
        values = x.to(wide)
        y = F.conv2d(values, base.weight.to(wide), None if bias is None else bias.to(wide), *self._slides())
        low = F.conv2d(F.dropout(values, self.dropout, self.training), self.lora_A.to(wide), None, *self._slides())
        return (y + F.conv2d(low, self.lora_B.to(wide)) * self.scaling).to(x.dtype)

    def _slides(self) -> tuple[Any, ...]:
        return self.base.stride, self.base.padding, self.base.dilation

    @torch.no_grad()
    def low_rank(self) -> tuple[Tensor, Tensor]:
        """Of the weight as [out, in · h · w]."""
        return self.lora_A.flatten(1).float(), self.lora_B.flatten(1).float() * self.scaling

    @torch.no_grad()
    def merged(self, name: str, values: Tensor) -> Tensor:
        """``weight`` [out, in, h, w] in fp32, plus scaling · B A, in place."""
        if name == "weight":
            values.flatten(1).addmm_(
                self.lora_B.to(values).flatten(1), self.lora_A.to(values).flatten(1), alpha=self.scaling
            )
        return values

    def extra_repr(self) -> str:
        return f"r={self.lora_A.shape[0]}, scaling={self.scaling:g}, dropout={self.dropout:g}"
