"""The passage: how rows pass through the model, set up for a way, and checked before anything is spent.

    way ─► boundary around every layer (rows at once, where layer inputs wait, MLP tiles) ─► a few short forwards: all equal?

Knows a model, rows and the boundary around its layers; must not know losses, optimizers or files.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import astuple

from qlora.data.batches import step_rows
from qlora.data.packing import Row
from qlora.errors import DoesNotFitError, ModelError, RecipeError, listed
from qlora.machine.device import ran_out_of_memory
from qlora.machine.processes import Processes, here
from qlora.methods.base import AdaptedModel
from qlora.model import anatomy
from qlora.model.base import evaluating
from qlora.model.checks import check_causal, check_loss_path, check_packing, check_rows
from qlora.recipe import MemorySection, TrainingSection
from qlora.residence.checks import check_boundary
from qlora.residence.layer_inputs import LayerInputs
from qlora.residence.layers import layers_that_keep, unwrap_layers, wrap_layers
from qlora.training.way import Way


class Passage:
    """Sets the model up for a way of going through it. ``rows`` are all that will be trained on."""

    def __init__(
        self, model: AdaptedModel, rows: Sequence[Row], training: TrainingSection, memory: MemorySection
    ) -> None:
        self.processes = here()
        self.model, self.rows, self.training, self.memory = model, rows, training, memory
        self.inputs = None if memory.layer_inputs == "device" else LayerInputs(memory.layer_inputs, model.device)
        self.layers = count_layers(model, training)
        self.away = () if model.base.placement is None else tuple(model.base.placement.order)
        refuse_without_boundary(model, training, memory)
        refuse_to_keep_what_leaves(training, self.layers, len(self.away))

    def behind_boundary(self, way: Way) -> bool:
        """Whether the layers stand behind their boundary in this way."""
        return way.behind_boundary(self.layers, self.training.batch_size)

    def take(self, way: Way) -> None:
        """Have rows go this way from now on."""
        if self.behind_boundary(way):
            keep = layers_that_keep(way.kept, self.layers, self.away)
            wrap_layers(
                self.model.model, self._sequences(way.micro_batch_size), self.inputs, self.memory.mlp_tile, keep
            )
        else:
            unwrap_layers(self.model.model)  # an earlier trainer may have left its boundary

    def smaller(self, before: Way, rows: int, what: str, reason: str) -> tuple[Way, str]:
        """Take the next smaller way for ``what``, a step of ``rows`` rows; return it and a sentence that says so.

        Several processes take the smallest that one of them needs. Raises DoesNotFitError when there is none, and leaves the
        way as it was.
        """
        own = self._smaller(before, rows)
        ways = [
            Way(int(at_once), bool(major), int(chunk), int(kept)) if there else None
            for there, at_once, major, chunk, kept in self.processes.gather(own is not None, *astuple(own or before))
        ]
        way = None if None in ways else min(filter(None, ways))
        if way is None:
            self.take(before)
            raise DoesNotFitError(
                f"{what} did not fit into memory ({reason}) with {before.micro_batch_size} at once and a loss chunk of "
                f"{before.loss_chunk}, and no smaller way is left. Lower data.max_length, let memory.budget=auto choose where "
                "weights and layer inputs wait, or ask 'qlora plan' for what fits."
            )
        self.take(way)
        changed = way.beside(before)
        return way, f"{what} did not fit into memory ({reason}): from here on {changed}, same rows and result."

    def _smaller(self, before: Way, rows: int) -> Way | None:
        """The next smaller way that this process can take, taken; None when there is none."""
        way, next_after = before, Way.smaller
        while smaller := next_after(way, rows):
            self.take(smaller)
            try:
                self.check(smaller, again=True)
                return smaller
            except Exception as error:
                if not (isinstance(error, ModelError) or ran_out_of_memory(error)):
                    raise
                if isinstance(error, ModelError) and not self.behind_boundary(way):
                    next_after = Way.fewer_rows  # this family's layers cannot be recomputed
                else:
                    way = smaller  # layers that cannot be cut so, or not even a few tokens fit
        return None

    def check(self, way: Way, again: bool = False) -> None:
        """A few short forwards before anything is spent: is the loss the model's own, is every token blind to
        what follows, are packed examples apart, and does the boundary change nothing? ``again``: only what depends on how many rows there are at once.

        Raises ModelError, or NonFiniteError where the model's own logits are not finite.
        """
        network, longest = self.model.model, longest_row(self.rows)
        ids = [int(token) for token in longest.ids[:16]]
        packed = any(row.packed for row in self.rows)
        with evaluating(network):  # dropout would tell two equal forwards apart
            if not again:
                check_loss_path(network, ids)
                check_causal(network, ids)
            if packed:
                check_packing(network, ids, way.micro_batch_size)
            if self.behind_boundary(way):
                for together in map(self._sequences, self._rows_together(way)):
                    check_boundary(network, ids, together, self._sequences(way.micro_batch_size), packed)

    def _sequences(self, rows: int) -> int:
        """How many rows of the model so many of the data are: one for each example that enters apart."""
        return rows * len(self.rows[0].sequences())

    def _rows_together(self, way: Way) -> list[int]:
        """How many rows enter the model together, in one process or another: in a whole step, and in the one that ends an epoch and may be short."""
        count, batch_size, seed = len(self.rows), self.training.batch_size, self.training.seed
        last = -(-count // batch_size) - 1
        if self.training.steps is not None:
            last = min(last, self.training.steps - 1)
        steps = [step_rows(count, batch_size, step, seed) for step in {0, last}]
        every = [Processes(rank, self.processes.size) for rank in range(self.processes.size)]
        shares = [places[one.share(len(places))] for places in steps for one in every]
        return sorted({len(way.micro_batches(places)[0]) for places in shares if places}, reverse=True)


def alone_in_memory(what: str, reason: str) -> str:
    """What to say where memory ran out in one of the processes that have to go through the model together."""
    return (
        f"{what} did not fit into memory ({reason}). Layers are spread over the processes (memory.tier=processes), so the others "
        "stand in the middle of it and no smaller way can be agreed on. Go on from the newest checkpoint in a smaller one: qlora "
        "resume RUN training.micro_batch_size=1 training.recompute=all"
    )


def longest_row(rows: Sequence[Row]) -> Row:
    """The row that tells most: a short one would tell too little."""
    return max(rows, key=lambda row: len(row.ids))


def check_every_row(model: AdaptedModel, rows: Sequence[Row], held_out: Sequence[Row]) -> None:
    """Has each token an embedding, and each position a place in the model? Raises DataError. Held-out rows are looked at
    before training, so that measuring them afterwards cannot fail."""
    check_rows(model.model, rows, model.first_position, model.virtual_tokens)
    check_rows(model.model, held_out, model.first_position, model.virtual_tokens, "Held-out row")


def refuse_without_boundary(model: AdaptedModel, training: TrainingSection, memory: MemorySection) -> None:
    """Raise RecipeError where the recipe asks for what works at the boundary of the layers, and has none."""
    asked = asked_at_boundary(memory, model.base.placement is not None)
    if asked and training.recompute in ("none", 0):
        raise RecipeError(
            f"The recipe asks for {listed(asked)}, which works at the recompute boundary of the layers, but has "
            f"training.recompute={training.recompute}; set it to all."
        )


def asked_at_boundary(memory: MemorySection, streamed: bool) -> list[str]:
    """What is asked for that works at the recompute boundary of the layers."""
    asked = ["layers that are streamed (memory.layers)"] if streamed else []
    if memory.layer_inputs != "device":
        asked.append(f"memory.layer_inputs={memory.layer_inputs}")
    return asked if memory.mlp_tile is None else [*asked, "memory.mlp_tile"]


def count_layers(model: AdaptedModel, training: TrainingSection) -> int:
    """The decoder layers. Raises ModelError where there is no list of them, unless none is to be recomputed."""
    try:
        return len(anatomy.layers(model.model))
    except ModelError:
        if training.recompute not in ("none", 0):
            raise
        return 0


def refuse_to_keep_what_leaves(training: TrainingSection, layers: int, away: int) -> None:
    """Raise RecipeError where a layer would keep activations whose weights do not stay on the device."""
    if training.recomputed(layers) < away:
        raise RecipeError(
            f"{away} of {layers} layers are streamed (memory.layers), and those have to be recomputed, but "
            f"training.recompute={training.recompute}; set it to all, or to {away} or more."
        )
