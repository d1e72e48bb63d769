"""Recurrences over packed rows, example by example: a state that would run from one example into the next begins anew.

    row   a a a a b b c c        through the mixer as rows of their own,      a a a a     b b
                                 those of like length together                            c c

Gated DeltaNet, Mamba, Mamba-2 and short convolutions pass on a state from token to token, and know nothing of positions
that restart; kernels that take the places of restarts (``seq_idx``, ``cu_seqlens``) are on some GPUs only, and the torch
code of the same families passes over these words in silence. So a mixer gets every example as a row of its own, padded on
the right, where nothing that counts sees it. Everything around it, norms, projections of attention, MLPs, stays packed.

A mixer is what holds a convolution over tokens, or a part that is known by name (``anatomy.is_mixer``). What mixes tokens
without is found by ``check_packing``. Which examples go through now is said by ``packed_rows``; rows of one example
each go through as they are.

Knows modules and where examples begin; must not know what is quantised, adapted or recomputed.

Shape suffixes: R rows, T tokens of a row, D hidden size, E examples, L tokens of the longest of them.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
from torch import Tensor, nn

from qlora.model import anatomy
from qlora.model.attention import packed_now


def begin_anew(model: nn.Module) -> None:
    """Have every mixer of ``model`` take packed rows example by example, in place; module paths stay as they are."""
    for module in list(anatomy.decoder(model).modules()):
        if anatomy.is_mixer(module) and not isinstance(module, _Apart):
            module.__class__ = _apart(type(module))  # type: ignore[assignment, arg-type]


class _Apart(nn.Module):
    """What a mixer's class gets in front of its own forward."""

    def train(self, mode: bool = True) -> Any:
        """The mixer itself is never in training, what it holds is: a fused kernel, taken in training alone, would read the
        weights of its linears, packed and without adapters, instead of calling them."""
        super().train(mode)
        self.training = False
        return self

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        mask = packed_now()
        if mask is None or not mask.packed:
            return super().forward(*args, **kwargs)  # type: ignore[misc]
        hidden_RTD: Tensor = args[0] if args else kwargs["hidden_states"]
        shape = hidden_RTD.shape[:2]
        found: list[list[Tensor | None]] = []
        for tokens, places, size in mask.groups(hidden_RTD.device):

            def rows(value: Any, tokens: Tensor = tokens, places: Tensor = places, size: Any = size) -> Any:
                """[R, T, …] → [E, L, …], zeros where an example is shorter; what has no tokens is left as it is."""
                if not isinstance(value, Tensor) or value.shape[:2] != shape:
                    return value
                inner = value.shape[2:]
                padded = value.new_zeros(size[0] * size[1], *inner)
                return padded.index_copy(0, places, value.flatten(0, 1)[tokens]).view(*size, *inner)

            answer = super().forward(*map(rows, args), **{key: rows(value) for key, value in kwargs.items()})  # type: ignore[misc]
            parts = answer if isinstance(answer, tuple) else (answer,)  # Zaya's gives queries, keys and values
            has_tokens = [isinstance(one, Tensor) and one.shape[:2] == torch.Size(size) for one in parts]
            found.append(
                [one.flatten(0, 1)[places] if has else None for one, has in zip(parts, has_tokens, strict=True)]
            )
        back = mask.back(hidden_RTD.device)
        whole = tuple(
            None if parts[0] is None else torch.cat(parts)[back].view(*shape, *parts[0].shape[1:])  # type: ignore[arg-type]
            for parts in zip(*found, strict=True)
        )
        return whole if isinstance(answer, tuple) else whole[0]


@cache
def _apart(family: type[nn.Module]) -> type[nn.Module]:
    """The same class for every mixer of a family: a dry run asks which layers are alike."""
    return type(family.__name__, (_Apart, family), {"__module__": family.__module__})
