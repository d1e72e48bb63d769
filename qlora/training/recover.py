"""Recovering: what happens when a step's gradients cannot be had. Every decision about a step is taken here, in one place.

    attempt ─► done                                                  the gradients are there
            ├► memory ran out          ─► the same step, a smaller way     or stop, when none is left
            ├► overflow under fp16     ─► the same step, half the loss scale
            └► NaN or infinity         ─► skipped                          or stop, as the recipe says

A step that is taken again has the same rows, random draws and denominator, so nothing changes but the order of sums. Where
several processes train together, an attempt is what all of them saw, so that ``decide`` comes to the same in each.

Knows a training's state and its passage; must not know files, learning rates or what the optimizer does.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from enum import Enum

from torch import Tensor

from qlora.data.packing import Row
from qlora.errors import DoesNotFitError, NonFiniteError, first_line, listed
from qlora.machine.device import ran_out_of_memory, release_memory
from qlora.training.not_finite import Blame, find_blame
from qlora.training.objectives import Objective
from qlora.training.passage import Passage, alone_in_memory
from qlora.training.state import LARGEST_SCALE, TrainState
from qlora.training.step import add_up, gradients, random_draws, unscale
from qlora.training.way import Way

SCALE_GROWTH = 500  # steps after which a loss scale that fell is doubled


class Verdict(Enum):
    """What follows from an attempt at a step."""

    DONE = "the gradients are there"
    SMALLER = "the same step again, in a smaller way through the model"
    RESCALED = "the same step again, with half the loss scale"
    SKIPPED = "no step is taken, and the next one follows"
    STOP = "the run ends here"


@dataclass(frozen=True)
class Attempt:
    """What one try at a step's gradients gave."""

    loss: float = math.nan
    """Mean."""
    norm: float = math.nan
    """Of all gradients together."""
    out_of_memory: str = ""
    """The reason, where memory ran out."""
    broken: tuple[str, ...] = ()
    """The parameters whose gradients are not finite."""

    @property
    def finite(self) -> bool:
        """Whether loss and gradients are."""
        return math.isfinite(self.loss) and math.isfinite(self.norm)


@dataclass(frozen=True)
class Outcome:
    """How a step ended: gradients, or a step that is skipped (both numbers are NaN then)."""

    loss: float
    norm: float
    note: str = ""
    """What the user should know of it."""
    skipped: bool = False


class Recovery:
    """Gets a step's gradients, whatever stands in the way. ``save`` saves the last whole state and says where it is."""

    def __init__(
        self, state: TrainState, objective: Objective, passage: Passage, save: Callable[[], str] = lambda: ""
    ) -> None:
        self.state, self.objective, self.passage, self.save = state, objective, passage, save
        self.unreached: list[str] = []
        """The parameters that no process's gradient reached in the last attempt."""

    def step(self, rows: Sequence[Row], places: Sequence[int]) -> Outcome:
        """The gradients of ``rows``, which are number ``places`` of the data, in ``.grad``.

        Raises DoesNotFitError and NonFiniteError when the run has to stop; what was done until then is saved.
        """
        state, notes = self.state, list[str]()
        before, way = state.loss_scale, state.way
        if before != 1.0 and state.step % SCALE_GROWTH == SCALE_GROWTH - 1:
            state.loss_scale = min(2 * before, LARGEST_SCALE)
        grown = state.loss_scale
        while True:
            found = self.attempt(rows)
            verdict = self.decide(found)
            if verdict is Verdict.DONE:
                return Outcome(found.loss, found.norm, " ".join(notes))
            state.masters.drop_gradients()
            if verdict is Verdict.SMALLER:
                state.loss_scale = grown
                notes.append(self._smaller(way, len(rows), found.out_of_memory))
            elif verdict is Verdict.RESCALED:
                state.loss_scale = max(1.0, state.loss_scale / 2)
            else:
                what = self._what(found, rows, places)
                if verdict is Verdict.STOP:
                    raise self._stopped(what)
                state.loss_scale = before  # what no scale cured says nothing of the next step's
                state.skipped += 1
                limit = state.training.skip_limit
                notes.append(f"{what}. No step was taken; it is skipped ({state.skipped} of at most {limit}).")
                return Outcome(math.nan, math.nan, " ".join(notes), skipped=True)

    def attempt(self, rows: Sequence[Row]) -> Attempt:
        """Try once, each process with its share of ``rows``."""
        state, processes = self.state, self.state.processes
        part, short = math.nan, ""
        try:
            part = gradients(state, self.objective, rows, processes.share(len(rows)))
        except BaseException as error:  # Ctrl-C too leaves no gradients behind
            state.masters.drop_gradients()
            if not ran_out_of_memory(error):
                raise
            short = first_line(error)
            if state.lockstep:
                raise DoesNotFitError(alone_in_memory(f"Step {state.step + 1}", short)) from None
        reached = [p.grad is not None for p in state.parameters.values()]
        failed, parts, *anywhere = zip(*processes.gather(bool(short), part, *reached), strict=True)
        if any(failed):
            return Attempt(out_of_memory=short or f"in process {failed.index(1)} of {processes.size}")
        self.unreached = [name for name, each in zip(state.parameters, anywhere, strict=True) if not any(each)]
        loss = math.fsum(parts) if all(map(math.isfinite, parts)) else sum(parts)  # fsum refuses inf - inf
        try:
            add_up(state, [any(each) for each in anywhere])
            norm = unscale(state)
        except BaseException:
            state.masters.drop_gradients()
            raise
        grads = {name: p.grad for name, p in state.parameters.items() if p.grad is not None}
        finite = math.isfinite(loss) and math.isfinite(norm)
        broken = () if finite else tuple(name for name, grad in grads.items() if not grad.isfinite().all())
        return Attempt(loss, norm, broken=broken)

    def decide(self, found: Attempt) -> Verdict:
        """What follows. Changes nothing."""
        state = self.state
        if found.out_of_memory:
            return Verdict.SMALLER
        if found.finite:
            return Verdict.DONE
        if math.isfinite(found.loss) and state.loss_scale > 1.0:
            return Verdict.RESCALED
        skips = state.training.not_finite == "skip" and state.skipped < state.training.skip_limit
        return Verdict.SKIPPED if skips else Verdict.STOP

    def blame(self, rows: Sequence[Row], places: Sequence[int]) -> Blame:
        """Which of the rows give what is not finite, and which module; nothing where memory does not suffice to look."""
        state, network = self.state, self.state.model.model
        whole = max(1, self.objective.denominator(rows))

        def loss_of(row: Row) -> Tensor:
            with random_draws(state):
                return self.objective.loss([row], state.way.loss_chunk) * (state.loss_scale / whole)

        network.train()
        try:
            return find_blame(network, rows, places, loss_of)
        except Exception as error:
            if not ran_out_of_memory(error):
                raise
            return Blame()
        finally:
            network.eval()
            state.masters.drop_gradients()

    def _smaller(self, before: Way, rows: int, reason: str) -> str:
        """Take the next smaller way; return a sentence. Raises DoesNotFitError where there is none, with the state saved."""
        state = self.state
        release_memory(state.model.device)  # the frames that held the failed try's tensors are gone by now
        rows = state.processes.most(rows)
        try:
            state.way, note = self.passage.smaller(state.way, rows, f"Step {state.step + 1}", reason)
        except DoesNotFitError as error:
            state.way = before  # where there is more memory the run goes on as it was
            self.passage.take(before)
            raise DoesNotFitError(f"{error}{self.save()}") from None
        return note

    def _what(self, found: Attempt, rows: Sequence[Row], places: Sequence[int]) -> str:
        """What was not finite, in words, without a full stop."""
        blame = self.blame(rows, places)
        where = f"; the first bad value is {blame.where}" if blame.where else ""
        if found.broken:
            where += f"; the first gradients that are not finite: {listed(found.broken, 2)}"
        numbers = f"loss {found.loss:g} and gradient norm {found.norm:g}"
        return f"Step {self.state.step + 1} gave {numbers} on rows {listed(blame.rows or places, 8)}{where}"

    def _stopped(self, what: str) -> NonFiniteError:
        """The error that ends the run, with what to do."""
        state, kept = self.state, ""
        advice = (
            "lower training.learning_rate, look at those rows, or set training.not_finite=skip to go on without them"
        )
        if state.training.not_finite == "skip":
            advice = f"training.skip_limit={state.training.skip_limit} steps were skipped before; look at those rows"
        broken = state.not_finite()
        if state.processes.any(bool(broken)):
            advice = f"{listed(broken, 3) or 'Parameters'} hold values that are not finite: go back to the newest checkpoint, which is whole"
        else:
            kept = self.save()
        return NonFiniteError(f"{what}. No step was taken; {advice}.{kept}")
