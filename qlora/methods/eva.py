"""EVA: A from the directions in which the training data's activations vary most (Paischer et al. 2024, arXiv:2410.07170).

    x [n, in]  ─► [ Σ V of what came before ; x − mean(x) ; the means' shift ]  ─► SVD ─► Σ V, truncated
    A = the leading r rows of V, B = 0

The incremental SVD is that of Ross et al. 2008 (Incremental learning for robust visual tracking, section 3.1), about the
mean, as PEFT has it, with twice the rank kept between batches so that little is lost. Ranks are not moved from one target
to another (PEFT's rho = 1). Positions are taken whose token is a target of the loss, which leaves padding out. Knows
planted linears and batches; must not know which positions a loss reads, or what A is for.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from contextlib import ExitStack
from functools import partial

import torch
from torch import Tensor, nn

from qlora.errors import MethodError
from qlora.methods.decomposition import leading
from qlora.methods.planted import Planted
from qlora.methods.sublayers import arguments
from qlora.model.anatomy import decoder
from qlora.model.base import evaluating
from qlora.model.loss import IGNORE_INDEX, hidden_states

ALIKE = 0.99  # cosine of a direction before and after a batch from which on it counts as found; PEFT's tau
MOST_BATCHES = 64  # with flat tails the last directions never settle
MOST_ROWS = 2048  # that enter one SVD


class Directions:
    """The leading directions of rows [n, d] that come in batches, about their mean."""

    def __init__(self, rank: int, generator: torch.Generator) -> None:
        self.rank, self.generator = rank, generator
        self.count = 0
        """Rows so far."""
        self.mean: Tensor | None = None
        self.scaled: Tensor | None = None
        """Σ V [at most 2 · rank, d]."""
        self.found: Tensor | None = None
        """V [at most 2 · rank, d], orthonormal rows in fp32, the largest singular value first."""
        self.settled = False
        """Whether the last batch left the leading ``rank`` where they were."""

    def add(self, rows: Tensor) -> None:
        """Take rows [n, d] into account."""
        before = self.found
        for part in rows.float().split(MOST_ROWS):
            self._add(part)
        if before is not None and self.found is not None and min(len(before), len(self.found)) >= self.rank:
            cosines = (before[: self.rank] * self.found[: self.rank]).sum(1).abs()
            self.settled = bool((cosines >= ALIKE).all())

    def _add(self, rows: Tensor) -> None:
        new, mean = len(rows), rows.mean(0)
        stacked = [rows - mean]
        if self.mean is not None and self.scaled is not None:
            shift = (self.count * new / (self.count + new)) ** 0.5 * (self.mean - mean)
            stacked = [self.scaled, *stacked, shift[None]]
            mean = (self.count * self.mean + new * mean) / (self.count + new)
        _, values, self.found = leading(torch.cat(stacked), 2 * self.rank, self.generator)
        self.count, self.mean, self.scaled = self.count + new, mean, values[:, None] * self.found


class Watcher:
    """Collects the inputs of planted linears while batches go through the model; those that get the same share the work."""

    def __init__(self, planted: Mapping[str, Planted], generator: torch.Generator) -> None:
        self.planted, self.generator = planted, generator
        self.rank = max(len(layer.lora_A) for layer in planted.values())
        self.directions: dict[str, Directions] = {}
        self.leaders: dict[str, str] = {}
        """For each target, the one whose directions it has: q_proj's are k_proj's and v_proj's too."""
        self.wanted: Tensor | None = None
        """[B, T], the positions of this batch that count."""
        self.latest: tuple[str, Tensor] | None = None

    def see(self, path: str, layer: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        """A forward hook: the input [B, T, d] of the linear at ``path``."""
        (x, *_) = inputs
        if path not in self.leaders:
            same = self.latest is not None and self.latest[1] is x
            self.leaders[path] = self.latest[0] if same and self.latest is not None else path
        if self.leaders[path] != path:
            return
        self.latest = (path, x)
        directions = self.directions.setdefault(path, Directions(self.rank, self.generator))
        if not directions.settled and len(rows := self._rows(x)):
            directions.add(rows)

    def _rows(self, x: Tensor) -> Tensor:
        """The rows [n, d] of ``x`` at positions that count; all of them where x is not laid out as the batch, as an
        expert's tokens."""
        rows, wanted = x.reshape(-1, x.shape[-1]), self.wanted
        if wanted is None or wanted.numel() != len(rows):
            return rows
        return rows[wanted.reshape(-1)]

    @property
    def settled(self) -> bool:
        """Whether no target's directions change any more."""
        return len(self.leaders) == len(self.planted) and all(found.settled for found in self.directions.values())


@torch.no_grad()
def look(
    model: nn.Module,
    planted: Mapping[str, Planted],
    batches: Iterable[Mapping[str, Tensor]],
    generator: torch.Generator,
) -> None:
    """Put the leading directions of each target's inputs into its ``lora_A``; the batches go through ``model`` once.

    Stops when the directions settle, or after ``MOST_BATCHES``. Raises MethodError where ``model`` has no decoder that takes
    tokens, and where a target got fewer rows than its rank.
    """
    _refuse_without_tokens(model)
    watcher = Watcher(planted, generator)
    with evaluating(model), ExitStack() as hooks:
        for path, layer in planted.items():
            hooks.enter_context(layer.register_forward_pre_hook(partial(watcher.see, path)))
        count = 0
        for batch in batches:
            labels = batch.get("labels")
            watcher.wanted = None if labels is None else labels != IGNORE_INDEX
            if watcher.wanted is not None and not watcher.wanted.any():
                continue
            hidden_states(model, batch)
            watcher.latest = None
            count += 1
            if count == MOST_BATCHES or watcher.settled:
                break
    for path, layer in planted.items():
        directions = watcher.directions.get(watcher.leaders.get(path, path))
        found = None if directions is None else directions.found
        if directions is None or found is None or min(directions.count - 1, len(found)) < len(layer.lora_A):
            raise MethodError(
                f"method.init is eva, but '{path}' saw {0 if directions is None else directions.count} target tokens, too "
                f"few for {len(layer.lora_A)} directions; train on more data, lower method.r, or use another method.init."
            )
        layer.lora_A.copy_(found[: len(layer.lora_A)])


def _refuse_without_tokens(model: nn.Module) -> None:
    # a model that names no decoder counts as its own, so ask what it takes
    if not {"input_ids", "position_ids"} <= set(arguments(decoder(model))):
        raise MethodError(
            f"method.init is eva, which sends batches of tokens through a decoder, but {type(model).__name__} has none that "
            "takes input_ids and position_ids; use another method.init, as kaiming."
        )
