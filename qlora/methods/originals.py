"""The weight that a frozen linear was loaded with, after a method put another one in its place.

    own_weight → what was quantised       put → another weight is quantised, or written       put_back → as it was loaded

One weight is in memory at a time; it is read from the checkpoint again. Knows checkpoints and how a linear keeps its weight;
must not know what is put there, or why.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from qlora.model.base import Base
from qlora.model.checkpoint import Checkpoint
from qlora.model.load import checkpoint_weight, read_packed
from qlora.model.names import packed_parts
from qlora.model.nf4 import FrozenLinear, at_hand, dense_weight, is_away, is_transposed


def copy_to_keep(base: Base, path: str, linear: Any) -> Tensor | None:
    """A copy of the weight on the CPU, for ``put_back``, where no checkpoint holds it; else None."""
    if _source(base, path) is not None:
        return None
    with at_hand(linear):
        return linear.weight.detach().to("cpu", copy=True)


def knows_what_was_quantised(base: Base, path: str) -> bool:
    """Whether the checkpoint holds this quantised weight as it was before."""
    source = _source(base, path)
    return source is not None and not packed_parts(source[1], source[0])


@torch.no_grad()
def own_weight(base: Base, path: str, linear: Any, kept: Tensor | None = None) -> Tensor:
    """The weight [out, in] that the linear at ``path`` of the untouched model was loaded with, before it was quantised.

    What came quantised already is put back, and what it stands for is the answer.
    """
    if isinstance(linear, FrozenLinear) and knows_what_was_quantised(base, path):
        return checkpoint_weight(base, path, linear)
    put_back(base, path, linear, kept)
    return dense_weight(linear, base.compute_dtype if isinstance(linear, FrozenLinear) else linear.weight.dtype).clone()


@torch.no_grad()
def put(linear: nn.Module, weight: Tensor) -> None:
    """Give ``linear`` the weight [out, in]: quantised as its own was, or written over it."""
    if isinstance(linear, FrozenLinear):
        linear.place(weight, _device(linear))
    else:
        _write(linear, weight.t() if is_transposed(linear) else weight)


@torch.no_grad()
def put_back(base: Base, path: str, linear: nn.Module, kept: Tensor | None = None) -> None:
    """Make the frozen weight bit for bit what was loaded. ``kept`` is what ``copy_to_keep`` gave."""
    source = _source(base, path)
    if source is None:
        assert kept is not None
        _write(linear, kept)
        return
    checkpoint, name = source
    if isinstance(linear, FrozenLinear):
        read_packed(checkpoint, name, linear, _device(linear), base.compute_dtype)
    else:
        _write(linear, checkpoint.read(name))


def _write(linear: Any, values: Tensor) -> None:
    """Overwrite the weight, in the layout that it has."""
    with at_hand(linear, changed=True):
        linear.weight.copy_(values)


def _device(linear: Any) -> torch.device:
    """Where the weight is quantised; that of a streamed layer may be elsewhere at the moment."""
    return linear.away.device if is_away(linear) else linear.weight.device


def _source(base: Base, path: str) -> tuple[Checkpoint, str] | None:
    """The checkpoint and the weight's name there; None where no file holds it."""
    name = (base.names or {}).get(f"{path}.weight")
    return None if name is None or base.checkpoint is None else (base.checkpoint, name)
