"""LoRA on the experts of a mixture: a low-rank pair for every expert beside one of its two packed matrices.

    y = x Wₑᵀ + bₑ + scaling · (x Aₑᵀ) Bₑᵀ        A [E · r, in], B [out, r · E]: of expert e rows e·r … and columns e, e + E, …

The products are the experts' own (``model/experts.py``), expert by expert; B A is formed nowhere but in a merge. The tensors are those of
PEFT's ``target_parameters``. By default no expert is adapted: a pair for each of a hundred experts takes more memory than the rest
of a run, and a token trains only the few that it visits. Knows packed experts and PEFT's names; must not know linears or files.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import torch
from torch import Tensor, nn

from qlora.errors import MethodError, listed
from qlora.methods.planted import Planted, modules_unplanted, unplanted
from qlora.methods.targets import matches
from qlora.model.anatomy import fused_experts
from qlora.model.experts import PackedExperts


class LoraExperts(Planted):
    """Packed matrices of E experts with a pair beside each. Its experts' module reads both; it is never called itself."""

    base: PackedExperts

    def __init__(self, base: PackedExperts, lora_A: Tensor, lora_B: Tensor, scaling: float) -> None:
        super().__init__(base)
        self.lora_A = nn.Parameter(lora_A)
        self.lora_B = nn.Parameter(lora_B)
        self.scaling = scaling

    def factors(self) -> tuple[Tensor, Tensor] | None:
        """(A, B); None while the base answers alone."""
        return (self.lora_A, self.lora_B) if self.enabled else None

    @torch.no_grad()
    def pair(self, expert: int) -> tuple[Tensor, Tensor]:
        """One expert's A [r, in] and B [out, r]."""
        rank = len(self.lora_A) // self.base.count
        return self.lora_A[expert * rank : (expert + 1) * rank], self.lora_B[:, expert :: self.base.count]

    @torch.no_grad()
    def merged_expert(self, expert: int, values: Tensor) -> Tensor:
        """One expert's matrix, [rows, columns] in fp32, plus scaling · B A, in place."""
        lora_A, lora_B = (half.to(values) for half in self.pair(expert))
        turned = values.t() if self.base.transposed else values
        turned.addmm_(lora_B, lora_A, alpha=self.scaling)
        return values

    def extra_repr(self) -> str:
        return f"r={len(self.lora_A) // self.base.count}, scaling={self.scaling:g}"


def experts_named(model: nn.Module, wanted: Iterable[str]) -> dict[str, PackedExperts]:
    """The packed matrices that ``wanted`` names as PEFT's ``target_parameters``, in the model's order.

    Example: ``mlp.experts.down_proj``. Raises MethodError for a name that nothing has.
    """
    every = packed_experts(model)
    for name in wanted:
        if any(matches(name, path) for path in every):
            continue
        if dense := [path for path in fused_experts(model) if matches(name, path)]:
            raise MethodError(
                f"method.target_parameters names '{name}', but {listed(dense, 1)} is not quantised, and experts are adapted "
                "beside packed matrices only; set model.quantization=nf4."
            )
        there = sorted({".".join(path.split(".")[-3:]) for path in every})
        raise MethodError(
            f"method.target_parameters names '{name}', which no parameter of experts in {type(model).__name__} is called. "
            f"The names there are {listed(there) if there else 'none: it has no experts'}."
        )
    return {path: packed for path, packed in every.items() if any(matches(name, path) for name in wanted)}


def packed_experts(model: nn.Module) -> dict[str, PackedExperts]:
    """Every packed matrix of experts, by its parameter's name in the untouched model."""
    found = ((path, unplanted(module)) for path, module in modules_unplanted(model))
    return {path: packed for path, packed in found if isinstance(packed, PackedExperts)}


def experts_key(path: str, name: str, planted: Mapping[str, Planted]) -> str:
    """PEFT's key, without its prefix, of the tensor ``name`` of the pair at ``path``.

    PEFT wraps the module and not its parameter: the first to be wrapped is the innermost, in the order in which they stand in it.
    """
    module, _, parameter = path.rpartition(".")
    inside = [other for other in planted if other.rpartition(".")[0] == module]
    depth = len(inside) - 1 - inside.index(f"{module}.{parameter}")
    return f"{module}.{'base_layer.' * depth}{name}.weight"
