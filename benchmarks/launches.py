"""Kernels that a layer of an 8B model launches, bytes that they read and write, and waits of a step: as transformers has them,
with packed rows kept apart, and with fused operators beside.

    python -m benchmarks.launches

Counted, not measured: a step on fake tensors, every operator that computes something taken for one kernel, its tensors for
its traffic. A middle layer is what three layers have more than two: a row forward, recomputed and back, with LoRA r 16 at
every linear, bf16, dequantising included. Whatever waited for the device would look at a value, which raises on fake tensors
(tests/training/test_loop.py holds a step to it): a layer waits never, and a step twice, for its losses and for the norm of its
gradients.
"""

from __future__ import annotations

from collections import Counter
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

from benchmarks.on_gpu.shapes import empty_base, llama
from qlora.methods.base import apply_method
from qlora.model.attention import keep_apart
from qlora.model.kernels import fuse
from qlora.planning import dry_run
from qlora.recipe import LoRA

HOPPER = 9.0
CASES = {"2k": (2048, False), "2k packed": (2048, True), "8k": (8192, False), "8k packed": (8192, True)}


class Kernels(dry_run.Ledger):
    """Counts kernels and their bytes by operator."""

    launches: ClassVar[Counter[str]]
    traffic: ClassVar[Counter[str]]

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = super().__torch_dispatch__(func, types, args, kwargs)
        inputs, outputs = (
            [one for one in tree_leaves(tree) if isinstance(one, Tensor)] for tree in ((args, kwargs), result)
        )
        storages = {one.untyped_storage()._cdata for one in inputs}
        made = any(one.untyped_storage()._cdata not in storages for one in outputs)
        allocates = "empty" in func.__name__
        if (made or func._schema.is_mutable) and not allocates:
            self.launches[str(func)] += 1
            self.traffic[str(func)] += sum(
                min(one.nbytes, one.untyped_storage().nbytes()) for one in (*inputs, *outputs)
            )
        return result


def counted(layers: int, length: int, packed: bool, apart: bool, fused: bool) -> tuple[Counter[str], Counter[str]]:
    """(launches, bytes) by operator, of a step of one row; ``apart``: packed rows without a mask of all pairs."""
    base = empty_base(llama("8b", length, layers), torch.device("meta"), torch.bfloat16)
    if apart:
        keep_apart(base.model, torch.bfloat16, HOPPER)
    fuse(base.model, torch.bfloat16, HOPPER if fused else 0)
    adapted = apply_method(base, LoRA(r=16, adapter_dtype="bf16"))
    shape = dry_run.Shape(rows=1, at_once=1, length=length, passes=1, chunk=256, kept=(), packed=packed)
    Kernels.launches, Kernels.traffic = Counter(), Counter()
    dry_run.dry_run(adapted, shape, "cuda")
    return Kernels.launches, Kernels.traffic


def main() -> None:
    dry_run.Ledger = Kernels  # type: ignore[misc]
    print("| a layer and row | before | GB | kept apart | GB | fused too | GB |\n|---|--:|--:|--:|--:|--:|--:|")
    for name, (length, packed) in CASES.items():
        cells = []
        for apart, fused in ((False, False), (True, False), (True, True)):
            two, three = (counted(layers, length, packed, apart, fused) for layers in (2, 3))
            cells += [f"{(three[0] - two[0]).total()}", f"{(three[1] - two[1]).total() / 1e9:.2f}"]
        print(f"| {name} | {' | '.join(cells)} |")


if __name__ == "__main__":
    main()
