"""The loop: one trainer for all methods, an iterator that the user drives.

    for step in trainer: ...

Each step takes its rows by its number, gets their gradients (``step.py``, with ``recover.py`` around it) and lets the
optimizer change the parameters. Several processes take the same steps, each its share of every step's rows. Knows rows, sections and a run folder's checkpoints; must not know evaluation or reports.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path

from torch import Tensor

from qlora.data.batches import step_rows, steps_per_epoch
from qlora.data.load import Data
from qlora.data.packing import Row
from qlora.errors import DataError, DoesNotFitError, NonFiniteError, RunError, first_line, listed
from qlora.machine.device import peak_memory_bytes, ran_out_of_memory
from qlora.methods.base import AdaptedModel
from qlora.recipe import AnyObjective, MemorySection, Recipe, TokensObjective, TrainingSection
from qlora.recipe.methods import labels_of
from qlora.residence.placement import by_main
from qlora.training import checkpoint
from qlora.training.diverging import Divergence
from qlora.training.log import STOPPED, MetricsLog, Step
from qlora.training.objectives import Pairs, make_objective
from qlora.training.optim import learning_rate
from qlora.training.passage import Passage, check_every_row, longest_row
from qlora.training.record import begin, recipe_of
from qlora.training.recover import Outcome, Recovery
from qlora.training.reference import prepare_reference, unknown
from qlora.training.rehearsal import Rehearsal, rehearse
from qlora.training.shares import spread_out
from qlora.training.state import TrainState
from qlora.training.step import update


def _require_its_data(data: Data | Sequence[Row], section: AnyObjective, labels: Sequence[str]) -> None:
    """Raise DataError where an objective of pairs has other rows, or pairs another objective, or where the data have other classes than
    the model's head, whose ``labels`` are there."""
    if isinstance(data, Data) and data.classes != tuple(labels):
        raise DataError(
            f"The model's head has the labels {listed(labels) or '(none)'}, and the data the classes {listed(data.classes) or '(none)'}; "
            "expected the same: objective.name=classification, or load_data(…, classifies=True, classes=…) and "
            "Modules(modules=['score'], labels=…)."
        )
    pairs = data.pairs if isinstance(data, Data) else section.pairs
    rows = data.train if isinstance(data, Data) else data
    if pairs != section.pairs or (pairs and any(len(row.examples) % 2 for row in rows)):
        what = "pairs of a chosen and a rejected answer" if section.pairs else "single examples"
        raise DataError(
            f"The objective {section.name} learns from {what}, and these data hold {'others' if section.pairs else 'pairs'}; load them "
            f"with load_data(…, pairs={section.pairs})."
        )


class Trainer:
    """Trains an adapted model on rows; iterate over it for steps.

    ``folder`` is the run folder; without one nothing is written. With ``Data`` that ``load_data`` gave, on a base that
    ``load_base`` gave, the folder is one that ``qlora report``, ``resume`` and ``export`` take. ``memory`` says where layer
    inputs wait and how an MLP is tiled; where the base's weights are was settled when it was loaded. ``recipe`` is what the
    folder keeps, and where the sections come from that are left out; without one it is put together from the parts.
    """

    def __init__(
        self,
        model: AdaptedModel,
        data: Data | Sequence[Row],
        training: TrainingSection | None = None,
        folder: str | Path | None = None,
        memory: MemorySection | None = None,
        recipe: Recipe | None = None,
    ) -> None:
        self.model, self.data, self.recipe = model, data, recipe
        self.rows: Sequence[Row] = data.train if isinstance(data, Data) else data
        self.training = training or (recipe.training if recipe else TrainingSection())
        self.memory = memory or (recipe.memory if recipe else MemorySection())
        self.folder = None if folder is None else Path(folder)
        self.environment: dict[str, object] = {}
        """What ``environment.json`` is to hold more than every run's does."""
        self.log: MetricsLog | None = None
        """The folder's ``metrics.jsonl``, once the run has begun."""
        if not self.rows:
            raise DataError("There are no rows to train on; give data with at least one example.")
        check_every_row(model, self.rows, data.held_out if isinstance(data, Data) else ())
        by_length = isinstance(data, Data) and data.section is not None and data.section.packing == "by_length"
        self._lengths = tuple(len(row.ids) for row in self.rows) if by_length else None
        self.steps_per_epoch = steps_per_epoch(len(self.rows), self.training.batch_size)
        self.total_steps = self.training.steps or self.training.epochs * self.steps_per_epoch
        spread_out(model, self.memory)
        self.state = TrainState.new(model, self.training, self.total_steps)
        section = recipe.objective if recipe else TokensObjective()
        _require_its_data(data, section, labels_of(model.section))
        self.objective = make_objective(section, model)
        self.reference: dict[str, Tensor] = {}
        """How likely the answers of pairs were before training, of ``train`` and ``held_out``, where the objective asks for it."""
        self.passage = Passage(model, self.rows, self.training, self.memory)
        self.recovery = Recovery(self.state, self.objective, self.passage, self._save_what_is_done)
        self.passage.take(self.state.way)
        self._alike = self.state.processes.size == 1
        self.divergence = Divergence(self.training.slower)
        self._resumed = False
        self._check()

    def __repr__(self) -> str:
        way = self.state.way
        return (
            f"Trainer: step {self.step_number} of {self.total_steps}, {len(self.rows):,} rows, "
            f"{self.training.batch_size} a step, {way.micro_batch_size} at once\n"
            f"  {self.training.optimizer}, learning rate {self.training.learning_rate:g} ({self.training.schedule})\n"
            f"  {self.model.count_trainable():,} trainable parameters on {self.model.device}, "
            f"{'no folder' if self.folder is None else f'folder {self.folder}'}"
        )

    @property
    def step_number(self) -> int:
        """Steps done."""
        return self.state.step

    @property
    def micro_batch_size(self) -> int:
        """Rows that go through the model at once, now."""
        return self.state.way.micro_batch_size

    def __iter__(self) -> Iterator[Step]:
        return self

    def __next__(self) -> Step:
        """Do one optimizer step.

        Raises NonFiniteError, with no step taken, when the loss or a gradient is not finite and the recipe does not skip such
        steps, and DoesNotFitError when memory runs out in the smallest way there is; what was done until then is saved.
        """
        state = self.state
        if state.step >= self.total_steps:
            raise StopIteration
        state.require_whole()
        self.begin()
        self._begin_alike()
        self.prepare()
        started = time.perf_counter()
        places = self._places(state.step)
        rows = [self.rows[place] for place in places]
        if not self.objective.denominator(rows):
            raise DataError(
                f"Step {state.step + 1} would train on nothing: its rows {listed(places, 8)} hold no target token; "
                "leave such rows out."
            )
        rate = learning_rate(self.training, state.step, self.total_steps)
        try:
            outcome = self.recovery.step(rows, places)
        except NonFiniteError as error:
            if self.log is not None:  # until the run goes on, which takes the line out again
                self.log.write({"step": state.step + 1, STOPPED: str(error)})
            raise
        if not outcome.skipped:
            unreached = "" if state.step else self._unreached()
            diverges = self.divergence.look(outcome.loss)
            outcome = replace(outcome, note=" ".join(filter(None, [outcome.note, unreached, diverges])))
            self._update(rate, outcome.norm)
        state.step += 1
        if not outcome.skipped:
            self.model.after_step(state.step, self.total_steps)
        state.masters.drop_gradients()
        state.torn = False
        step = self._told(rows, rate, outcome, time.perf_counter() - started)
        self._resumed = False
        if self.log is not None:
            self.log.write(step.metrics())
        return step

    def begin(self) -> None:
        """Write into the folder what run it is (``record.py``); the first step does so unless it was done before.

        Raises RunError when the folder holds another recipe's run.
        """
        if self.log is not None or self.folder is None or not isinstance(self.data, Data):
            return
        if not self.state.processes.main:
            return
        recipe = self.recipe or recipe_of(self.model, self.data, self.training, self.memory, self.folder)
        if recipe is None:
            return
        begin(self.folder, recipe, self.data, self.model.base, self.environment)
        self.log = MetricsLog(self.folder / "metrics.jsonl")
        self._resumed = self.step_number > 0
        self.log.rewind(self.step_number)  # lines of steps that are taken again
        for loss in self.log.told("loss"):
            self.divergence.look(loss)

    def _begin_alike(self) -> None:
        """Have every process begin with the main one's parameters: what they worked out from data or weights may differ in its
        last bits."""
        if not self._alike:
            everywhere = (values for name, values in self.state.parameters.items() if not self.state.is_apart(name))
            self.state.processes.copy(everywhere)
            self.state.masters.doubt()
            self._alike = True

    def prepare(self, say: Callable[[str], None] = lambda _: None) -> None:
        """Measure what the objective asks of the model before training, or read it from the folder; the first step does so
        unless it was done before. ``say`` is told where that takes its time. Raises RunError when it is not there any more and cannot be
        measured again."""
        if not (isinstance(objective := self.objective, Pairs) and objective.unmeasured):
            return
        held_out: Sequence[Row] = self.data.held_out if isinstance(self.data, Data) else ()
        if self.recipe is not None:
            held_out = held_out[: self.recipe.evaluation.held_out_rows]
        parts, folder = {"train": self.rows, "held_out": held_out}, self.folder if self.log is not None else None
        found = by_main(self.model.base.placement, lambda: prepare_reference(objective, self.state, parts, folder, say))
        self.reference = found or unknown(parts)
        self.state.processes.copy(self.reference.values())
        objective.reference = self.reference["train"]

    def _unreached(self) -> str:
        """A sentence that names the parameters that got no gradient; empty where all did."""
        if not (without := self.recovery.unreached):
            return ""
        return (
            f"No gradient reached {len(without)} of {len(self.state.parameters)} trainable parameters, {listed(without, 3)}: the "
            "model computes without them, so they stay as they began; leave them out of method.target_modules."
        )

    def _update(self, rate: float, norm: float) -> None:
        self.state.torn = True
        try:
            update(self.state, rate, norm)
        except Exception as error:
            self.state.masters.drop_gradients()
            if not ran_out_of_memory(error):
                raise
            raise DoesNotFitError(
                f"Memory ran out while step {self.step_number + 1} changed the parameters ({first_line(error)}), so part of "
                "it was taken. The newest checkpoint is whole: go on from it where there is more memory, or begin anew with "
                "training.optimizer=paged_adamw_8bit."
            ) from None

    def _told(self, rows: Sequence[Row], rate: float, outcome: Outcome, seconds: float) -> Step:
        tokens = sum(len(row.ids) for row in rows)
        return Step(
            number=self.step_number,
            epoch=self.step_number / self.steps_per_epoch,
            loss=outcome.loss,
            learning_rate=rate,
            grad_norm=outcome.norm,
            target_tokens=sum(row.target_tokens for row in rows),
            tokens=tokens,
            tokens_per_second=tokens / seconds,
            peak_memory_bytes=peak_memory_bytes(self.model.device),
            seconds=seconds,
            micro_batch_size=self.micro_batch_size,
            skipped=outcome.skipped,
            resumed=self._resumed,
            note=outcome.note,
            measures={} if outcome.skipped else self._measures(rows),
        )

    def _measures(self, rows: Sequence[Row]) -> dict[str, float]:
        """What the objective says of the whole step, from what each process knows of its own share."""
        processes = self.state.processes
        mine = self.objective.summed(rows[processes.share(len(rows))])
        shares = processes.gather(*mine) if mine else []
        return self.objective.told([sum(values) for values in zip(*shares, strict=True)])

    def rehearse(self) -> Rehearsal:
        """Take the most expensive step that the data can give, and take it back: does it fit, and what does it take?

        Where it does not fit, the smaller ways are tried, and the one that does is kept. Raises DoesNotFitError when none
        does; nothing is written either way.
        """
        self.state.require_whole()
        return rehearse(self.state, self.objective, self.passage)

    def save(self) -> Path:
        """Write a checkpoint of this moment into the run folder and return its place. Of several processes all call it, and
        the main one writes."""
        if self.folder is None:
            raise DataError("This trainer has no folder to save into; give one: Trainer(…, folder='runs/demo').")
        self.state.require_whole()
        self.begin()
        folder, keep = self.folder / "checkpoints", self.training.keep_checkpoints
        kept = None if self.state.shares is None else self.state.kept()  # which all collect
        by_main(self.model.base.placement, lambda: checkpoint.save(self.state, folder, keep, kept))
        return checkpoint.place_of(self.state, folder)

    def load(self, place: str | Path) -> None:
        """Continue from a checkpoint: adapter, optimizer, step. Raises RunError when it does not belong to this run."""
        checkpoint.load(self.state, Path(place))
        self._loaded()

    def load_newest(self) -> list[str]:
        """Continue from the folder's newest checkpoint that is whole; return a sentence for each newer one that is not.

        Raises RunError when there is none, or when it does not belong to this run.
        """
        if self.folder is None:
            raise DataError("This trainer has no folder to load from; give one: Trainer(…, folder='runs/demo').")
        lost = checkpoint.load_newest(self.state, self.folder / "checkpoints")
        self._loaded()
        return lost

    def _loaded(self) -> None:
        """Have rows go as what was loaded says, if every process found the same."""
        found = sorted({int(step) for (step,) in self.state.processes.gather(self.step_number)})
        if len(found) > 1:
            raise RunError(
                f"The processes found checkpoints after different steps ({listed(list(map(str, found)))}) in '{self.folder}'; give "
                "all of them the same run folder, on a disk that their machines share."
            )
        self.passage.take(self.state.way)

    def batches(self) -> Iterator[dict[str, Tensor]]:
        """The first epoch's micro-batches in the order of training, on the device: for methods that look at data first."""
        for step in range(self.steps_per_epoch):
            places = self._places(step)
            for start in range(0, len(places), self.micro_batch_size):
                yield self.objective.batch(
                    [self.rows[place] for place in places[start : start + self.micro_batch_size]]
                )

    def _places(self, step: int) -> list[int]:
        """The rows of a step."""
        return step_rows(len(self.rows), self.training.batch_size, step, self.training.seed, self._lengths)

    def _save_what_is_done(self) -> str:
        """Save before the run stops, where there is something to save; the sentence that says so, with a space before it."""
        if self.folder is None or not self.step_number:
            return ""
        return f" The state after step {self.step_number} is in '{self.save()}'."

    def _check(self) -> None:
        """The passage's checks, and which module is to blame where the model's own logits are not finite."""
        try:
            self.passage.check(self.state.way)
        except NonFiniteError as error:
            blame = self.recovery.blame([longest_row(self.rows)], [0])
            where = f": the first bad value is {blame.where}" if blame.where else ""
            raise NonFiniteError(
                f"{error}{where}. Fetch the checkpoint again, or take another model.compute_dtype."
            ) from None
