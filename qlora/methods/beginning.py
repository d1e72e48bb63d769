"""How the pairs of LoRA and DoRA begin: at random, from the weight itself, or from what its quantisation lost.

    kaiming    A uniform in ±1/√in, B = 0                        He et al. 2015, as PEFT has it
    gaussian   A normal with deviation 1/r, B = 0
    eva        A from the training data, B = 0                   eva.py
    pissa      s·B A = the r leading parts of W's SVD,           Meng et al. 2024, arXiv:2404.02948, eq. 2–4
               frozen weight = quantised(W − s·B A)
    loftq      T times: Q = quantised(W − s·B A),                Li et al. 2023, arXiv:2310.08659, algorithm 1
               s·B A = the r leading parts of W − Q

s is the scaling, and W the checkpoint's own weight, one at a time. What A and B began as is kept: it leads back from the
frozen weight to the original one, and rebuilds the frozen weight when an adapter is loaded, whatever a second SVD would
give. Knows W, A and B as matrices; must not know where W comes from, the formula that uses A and B, or the data.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from qlora.methods.decomposition import leading
from qlora.methods.originals import put
from qlora.model.nf4 import dense_weight

Pair = tuple[Tensor, Tensor]


class Beginning(nn.Module):
    """What a pair began as, and what the frozen weight gave up, where that is more than nothing.

    ``lora_A`` [r, in] and ``lora_B`` [out, r], as the pair was before training. The frozen weight was made from W minus
    ``given``: this pair in PiSSA, the last round but one's in LoftQ, None where it is W's own quantisation.
    """

    lora_A: Tensor
    lora_B: Tensor
    given_A: Tensor | None
    given_B: Tensor | None

    def __init__(self, pair: Pair, scaling: float, pissa: bool, given: Pair | None = None) -> None:
        super().__init__()
        self.scaling, self.pissa = scaling, pissa
        self.kept: Tensor | None = None
        """The original weight, where no checkpoint holds it."""
        for name, values in zip(
            ("lora_A", "lora_B", "given_A", "given_B"), (*pair, *(given or (None, None))), strict=True
        ):
            self.register_buffer(name, values, persistent=False)

    @property
    def given(self) -> Pair | None:
        """What the frozen weight gave up."""
        if self.pissa:
            return self.lora_A, self.lora_B
        return None if self.given_A is None or self.given_B is None else (self.given_A, self.given_B)

    def frozen_from(self, weight: Tensor) -> Tensor:
        """What the frozen weight was made from, for the original ``weight`` [out, in]."""
        return weight if self.given is None else minus(weight, self.given, self.scaling)

    def before(self, weight: Tensor) -> Tensor:
        """``weight`` [out, in] without what the pair began as: the trained pair belongs on top of it."""
        return minus(weight, (self.lora_A, self.lora_B), self.scaling)


def minus(weight: Tensor, pair: Pair, scaling: float) -> Tensor:
    """weight − scaling · B A, [out, in], computed in fp32 and rounded once to ``weight``'s dtype."""
    lora_A, lora_B = pair
    return torch.addmm(weight.float(), lora_B.float(), lora_A.float(), alpha=-scaling).to(weight.dtype)


def first_A(init: str, rank: int, inputs: int, generator: torch.Generator) -> Tensor:
    """A before anything is known of W or the data, [rank, inputs] in fp32 on the CPU."""
    lora_A = torch.empty(rank, inputs)
    if init == "gaussian":
        return lora_A.normal_(std=1 / rank, generator=generator)
    bound = inputs**-0.5  # PEFT's Kaiming uniform with a = √5, written out
    return lora_A.uniform_(-bound, bound, generator=generator)


def principal_pair(matrix: Tensor, r: int, scaling: float, dtype: torch.dtype, generator: torch.Generator) -> Pair:
    """(A [r, in], B [out, r]) with scaling · B A the best approximation of rank ``r`` of ``matrix`` [out, in]."""
    left, values, right = leading(matrix.float(), r, generator)
    root = (values / scaling).sqrt()
    # contiguous, as they are after loading: another layout is multiplied in another order
    return (root[:, None] * right).to(dtype).contiguous(), (left * root).to(dtype).contiguous()


def loftq(
    linear: nn.Module,
    weight: Tensor,
    r: int,
    iterations: int,
    scaling: float,
    dtype: torch.dtype,
    generator: torch.Generator,
) -> tuple[Pair, Pair | None]:
    """(the pair that makes up for what ``linear`` lost of ``weight`` [out, in], what ``weight`` gave up to get there).

    ``linear`` holds the quantised ``weight``, and after more rounds than one what it was quantised to in the last.
    """
    pair = given = None
    for _ in range(iterations):
        if pair is not None:
            given = pair
            put(linear, minus(weight, pair, scaling))
        lost = weight.float() - dense_weight(linear, torch.float32)
        pair = principal_pair(lost, r, scaling, dtype, generator)
    assert pair is not None
    return pair, given
