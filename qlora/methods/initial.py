"""The beginnings of a method's pairs, over their life: made, looked up in the data, saved, loaded, put away and put back.

    plant       W from the checkpoint → A₀, B₀ → the frozen weight of W − s·B₀ A₀
    remove      W from the checkpoint → the frozen weight as it was loaded
    load        A₀, B₀ from the file, W from the checkpoint → the frozen weight of W − s·B₀ A₀

Knows planted layers and when these things happen; the formulas are in ``beginning.py`` and ``eva.py``. Must not know what
the layers compute, or where an adapter lies.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from qlora.errors import MethodError, listed
from qlora.methods import eva
from qlora.methods.beginning import Beginning, Pair, loftq, minus, principal_pair
from qlora.methods.originals import copy_to_keep, knows_what_was_quantised, own_weight, put, put_back
from qlora.model.load import Base
from qlora.model.nf4 import FrozenLinear, is_empty

UNSEEN = (
    "method.init is eva, but no data was looked at; call model.prepare with training batches, as trainer.batches(), before "
    "the first step."
)
UNLOADED = (
    "The adapter was planted with values_follow=True, but nothing was loaded into it; load its values before the first step, "
    "or plant it without."
)


class Initial:
    """The beginnings of all pairs of one method: made, saved, put away and put back."""

    def __init__(self, section: Any, base: Base, dtype: torch.dtype) -> None:
        self.init: str = getattr(section, "init", "kaiming")
        self.iterations: int = getattr(section, "loftq_iterations", 1)
        self.base, self.dtype = base, dtype

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
        if _on_meta(next(iter(targets.values()))):
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
        users: dict[int, int] = {}
        for _, values in self.base.model.named_parameters(remove_duplicate=False):
            users[id(values)] = users.get(id(values), 0) + 1
        if shared := [path for path, linear in targets.items() if users.get(id(linear.weight), 0) > 1]:
            raise MethodError(
                f"method.init is {self.init}, which changes the frozen weight, but that of {listed(shared, 2)} is shared with "
                "another module; leave it out of method.target_modules."
            )

    def begin(self, path: str, layer: Any, generator: torch.Generator, values_follow: bool = False) -> None:
        """Give the fresh pair of ``layer`` at ``path`` its first values, and change its frozen weight as they need it.

        On meta there are shapes alone. With ``values_follow`` the pair is zero and the frozen weight the base's own, until
        ``load_state``.
        """
        linear = layer.base
        if self.init == "eva":
            layer.lacks = UNSEEN
        if not self.from_weight or (self.init == "loftq" and not isinstance(linear, FrozenLinear)):
            return
        pair: Pair = (torch.zeros_like(layer.lora_A), torch.zeros_like(layer.lora_B))
        given = (pair[0].clone(), pair[1].clone()) if self.init == "loftq" and self.iterations > 1 else None
        kept = None if _on_meta(linear) else copy_to_keep(self.base, path, linear)
        if values_follow:
            layer.lacks = UNLOADED
        elif not _on_meta(linear):
            weight = own_weight(self.base, path, linear, kept)
            try:
                pair, given = self._from_weight(linear, weight, layer, generator)
            except BaseException:
                put_back(self.base, path, linear, kept)
                raise
        layer.beginning = Beginning(pair, layer.scaling, self.init == "pissa", given)
        layer.beginning.kept = kept
        with torch.no_grad():
            layer.lora_A.copy_(pair[0])
            layer.lora_B.copy_(pair[1])

    def _from_weight(
        self, linear: nn.Module, weight: Tensor, layer: Any, generator: torch.Generator
    ) -> tuple[Pair, Pair | None]:
        """(the first pair, what the frozen weight gave up where that is another) for ``weight`` [out, in]."""
        rank = len(layer.lora_A)
        if self.init == "loftq":
            return loftq(linear, weight, rank, self.iterations, layer.scaling, self.dtype, generator)
        pair = principal_pair(weight, rank, layer.scaling, self.dtype, generator)
        put(linear, minus(weight, pair, layer.scaling))
        return pair, None

    def prepare(
        self,
        model: nn.Module,
        planted: Mapping[str, Any],
        batches: Iterable[Mapping[str, Tensor]],
        generator: torch.Generator,
    ) -> None:
        """Let EVA look at the data; nothing to do for the others."""
        if self.init == "eva":
            eva.look(model, planted, batches, generator)
            _may_train(planted)

    def loaded(self, planted: Mapping[str, Any]) -> None:
        """A and B have come from a file; what is decided by the weight has its values with ``load_state`` only."""
        if self.init == "eva":
            _may_train(planted)

    def give_up(self, planted: Mapping[str, Any]) -> None:
        """Make the frozen weights what these beginnings need, from the original ones."""
        for path, layer in _changed(planted).items():
            weight = own_weight(self.base, path, layer.base, layer.beginning.kept)
            put(layer.base, layer.beginning.frozen_from(weight))

    def put_back(self, planted: Mapping[str, Any]) -> None:
        """Make the frozen weights bit for bit the base's own again."""
        for path, layer in _changed(planted).items():
            put_back(self.base, path, layer.base, layer.beginning.kept)

    @staticmethod
    def state(planted: Mapping[str, Any]) -> dict[str, Tensor]:
        """What the pairs began as, and what the frozen weights gave up where that is something else."""
        return {
            f"{path}.{name}": values
            for path, layer in planted.items()
            if (beginning := getattr(layer, "beginning", None)) is not None
            for name, values in beginning.named_buffers()
        }

    @torch.no_grad()
    def load_state(self, planted: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> None:
        """Copy in what ``state`` gave, and rebuild the frozen weights from the original ones with it."""
        for key, values in self.state(planted).items():
            values.copy_(tensors[key])
        self.give_up(planted)
        _may_train(planted)


def _may_train(planted: Mapping[str, Any]) -> None:
    for layer in planted.values():
        layer.lacks = None


def _changed(planted: Mapping[str, Any]) -> dict[str, Any]:
    """The layers whose frozen weight is another than the base's and is here."""
    return {
        path: layer
        for path, layer in planted.items()
        if (beginning := getattr(layer, "beginning", None)) is not None  # an embedding's layer has none
        and beginning.given is not None
        and not _on_meta(layer.base)
    }


def _on_meta(linear: nn.Module) -> bool:
    return is_empty(linear)
