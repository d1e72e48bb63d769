"""How the pairs of LoRA and DoRA begin: at random, from the weight itself, or from what its quantisation lost.

    kaiming    A uniform in ±1/√in, B = 0                        He et al. 2015, as PEFT has it
    gaussian   A normal with deviation 1/r, B = 0
    eva        A from the training data, B = 0                   eva.py
    pissa      s·B A = the r leading parts of W's SVD,           Meng et al. 2024, arXiv:2404.02948, eq. 2–4
               frozen weight = quantised(W − s·B A)
    loftq      T times: Q = quantised(W − s·B A),                Li et al. 2023, arXiv:2310.08659, algorithm 1
               s·B A = the r leading parts of W − Q

s is the scaling, and W the checkpoint's own weight, one at a time. What A and B began as (A₀, B₀) is kept: it leads back from
the frozen weight to the original one, and rebuilds the frozen weight when an adapter is loaded, whatever a second SVD would
give:

    plant       W from the checkpoint → A₀, B₀ → the frozen weight of W − s·B₀ A₀
    remove      W from the checkpoint → the frozen weight as it was loaded
    load        A₀, B₀ from the file, W from the checkpoint → the frozen weight of W − s·B₀ A₀

Knows W, A and B as matrices, and when these things happen; must not know what the layers compute, or where an adapter is
saved.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from qlora.errors import MethodError, listed
from qlora.methods import eva
from qlora.methods.decomposition import leading
from qlora.methods.originals import copy_to_keep, knows_what_was_quantised, own_weight, put, put_back
from qlora.methods.planted import Planted
from qlora.model.nf4 import FrozenLinear, dense_weight, is_empty

if TYPE_CHECKING:
    from qlora.methods.lora import LoraLinear, LoraMethod

Pair = tuple[Tensor, Tensor]

UNSEEN = (
    "method.init is eva, but no data was looked at; call model.prepare with training batches, as trainer.batches(), before "
    "the first step."
)
UNLOADED = (
    "The adapter was planted with values_follow=True, but nothing was loaded into it; load its values before the first step, "
    "or plant it without."
)


class Beginning(nn.Module):
    """What a pair began as, and what the frozen weight gave up, where that is more than nothing.

    ``lora_A`` [r, in] and ``lora_B`` [out, r], as the pair was before training. The frozen weight was made from W minus
    ``given``: this pair in PiSSA, that of the last round but one in LoftQ, None where it is W's own quantisation.
    """

    lora_A: Tensor
    lora_B: Tensor
    given_A: Tensor | None
    given_B: Tensor | None

    def __init__(self, pair: Pair, scaling: float, pissa: bool, given: Pair | None, kept: Tensor | None) -> None:
        super().__init__()
        self.scaling, self.pissa = scaling, pissa
        self.kept = kept
        """The original weight, where no checkpoint holds it."""
        names = ("lora_A", "lora_B", "given_A", "given_B")
        for name, values in zip(names, (*pair, *(given or (None, None))), strict=True):
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


class Beginnings:
    """Those of all pairs of one method: made, saved, put away and put back."""

    def __init__(self, method: LoraMethod) -> None:
        self.method, self.base = method, method.base
        self.init, self.iterations = method.section.init, method.section.loftq_iterations

    @property
    def from_weight(self) -> bool:
        """Whether A and B mean nothing beside the original weight."""
        return self.init in ("pissa", "loftq")

    def refuse(self, targets: Mapping[str, nn.Module]) -> None:
        """Raise MethodError where the weights of ``targets`` cannot give what is asked for."""
        if not self.from_weight:
            return
        quantised = [path for path, linear in targets.items() if isinstance(linear, FrozenLinear)]
        if self.init == "loftq" and not quantised:
            raise MethodError(
                "method.init is loftq, which makes up for what quantisation lost, but none of the targets is quantised; "
                "use method.init=pissa, or quantise the base with model.quantization=nf4."
            )
        if is_empty(next(iter(targets.values()))):
            return
        if unknown := [path for path in quantised if not knows_what_was_quantised(self.base, path)]:
            if self.init == "loftq":
                raise MethodError(
                    f"method.init is loftq, but '{self.base.name}' came quantised, and what that lost at {listed(unknown, 2)} "
                    "is not known; name the 16-bit checkpoint that it was made from, or use another method.init."
                )
            if self.base.names is None:
                raise MethodError(
                    f"method.init is pissa, but the quantised weights at {listed(unknown, 2)} came from no folder, so they "
                    "could not be put back; load the base with load_base."
                )
        users = Counter(id(values) for _, values in self.base.model.named_parameters(remove_duplicate=False))
        if shared := [path for path, linear in targets.items() if users[id(linear.weight)] > 1]:
            raise MethodError(
                f"method.init is {self.init}, which changes the frozen weight, but that of {listed(shared, 2)} is shared with "
                "another module; leave it out of method.target_modules."
            )

    def begin(self, path: str, layer: Any) -> None:
        """Give the fresh pair of ``layer`` at ``path`` its first values, and change its frozen weight as they need it.

        On meta there are shapes alone. Where a file's values follow, the pair is zero and the frozen weight the base's own,
        until ``load_state``.
        """
        linear = layer.base
        if self.init == "eva":
            layer.lacks = UNSEEN
        if not self.from_weight or (self.init == "loftq" and not isinstance(linear, FrozenLinear)):
            return
        pair: Pair = (torch.zeros_like(layer.lora_A), torch.zeros_like(layer.lora_B))
        given = (pair[0].clone(), pair[1].clone()) if self.init == "loftq" and self.iterations > 1 else None
        kept = None if is_empty(linear) else copy_to_keep(self.base, path, linear)
        if self.method.values_follow:
            layer.lacks = UNLOADED
        elif not is_empty(linear):
            weight = own_weight(self.base, path, linear, kept)
            try:
                pair, given = self._from_weight(path, layer, weight)
            except BaseException:
                put_back(self.base, path, linear, kept)
                raise
        layer.beginning = Beginning(pair, layer.scaling, self.init == "pissa", given, kept)
        with torch.no_grad():
            layer.lora_A.copy_(pair[0])
            layer.lora_B.copy_(pair[1])

    def _from_weight(self, path: str, layer: LoraLinear, weight: Tensor) -> tuple[Pair, Pair | None]:
        """(the first pair, what the frozen weight gave up where that is another) for ``weight`` [out, in]."""

        def principal(matrix: Tensor) -> Pair:
            return principal_pair(matrix, len(layer.lora_A), layer.scaling, self.method.dtype, generator)

        generator = self.method.generator(path)
        if self.init == "pissa":
            pair = principal(weight)
            put(layer.base, minus(weight, pair, layer.scaling))
            return pair, None
        pair, given = principal(weight.float() - dense_weight(layer.base, torch.float32)), None
        for _ in range(self.iterations - 1):
            given = pair
            put(layer.base, minus(weight, given, layer.scaling))
            pair = principal(weight.float() - dense_weight(layer.base, torch.float32))
        return pair, given

    def prepare(self, batches: Iterable[Mapping[str, Tensor]]) -> None:
        """Let EVA look at the data; nothing to do for the others."""
        if self.init == "eva":
            eva.look(self.base.model, self.method.planted, batches, self.method.generator("eva"))
            self._may_train()

    def loaded(self) -> None:
        """A and B have come from a file; what is decided by the weight has its values with ``load_state`` only."""
        if self.init == "eva":
            self._may_train()

    def give_up(self) -> None:
        """Make the frozen weights what these beginnings need, from the original ones."""
        for path, layer, beginning in self._changed():
            put(layer.base, beginning.frozen_from(own_weight(self.base, path, layer.base, beginning.kept)))

    def put_back(self) -> None:
        """Make the frozen weights bit for bit the base's own again."""
        for path, layer, beginning in self._changed():
            put_back(self.base, path, layer.base, beginning.kept)

    def state(self) -> dict[str, Tensor]:
        """What the pairs began as, and what the frozen weights gave up where that is something else."""
        return {f"{path}.{name}": v for path, _, begun in self._begun() for name, v in begun.named_buffers()}

    def load_state(self, tensors: Mapping[str, Tensor]) -> None:
        """Copy in what ``state`` gave, and rebuild the frozen weights from the original ones with it."""
        for key, values in self.state().items():
            values.copy_(tensors[key])
        self.give_up()
        self._may_train()

    def _may_train(self) -> None:
        for layer in self.method.planted.values():
            layer.lacks = None  # type: ignore[assignment]

    def _begun(self) -> list[tuple[str, Planted, Beginning]]:
        """(path, layer, what it began as) where that is more than chance; an embedding's layer has none."""
        found = [(path, layer, getattr(layer, "beginning", None)) for path, layer in self.method.planted.items()]
        return [(path, layer, beginning) for path, layer, beginning in found if beginning is not None]

    def _changed(self) -> list[tuple[str, Planted, Beginning]]:
        """Those whose frozen weight is another than the base's and is here."""
        return [one for one in self._begun() if one[2].given is not None and not is_empty(one[1].base)]


def gives_up(layer: Planted) -> bool:
    """Whether the frozen weight under ``layer`` gives a part up while it stands there: PiSSA, and LoftQ of many rounds."""
    return getattr(getattr(layer, "beginning", None), "given", None) is not None


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
