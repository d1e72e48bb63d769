"""A session: what one process holds while it works on a run, and what is left of it on disk.

    recipe ─► data, device, model (base + method) ─► trainer ─► measured, trained, handed over ─► Run

The verbs (``train.py``, ``evaluate.py``, ``export.py``) are written on these parts. Knows every room below; must not know
the command line.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from qlora.data.load import Data, Prompt
from qlora.data.packing import Row
from qlora.errors import RunError, redacted, visible
from qlora.evaluation.classes import Classes, OfClass
from qlora.evaluation.generate import answers
from qlora.evaluation.preferences import held_out_pairs
from qlora.evaluation.score import HeldOut, Preferences, Verdict, score, verdict
from qlora.evaluation.tasks.task import Task
from qlora.files.durable import write_json
from qlora.files.html import as_frame, as_text
from qlora.files.strangers import MAX_OURS, Fault, JsonObject, read_object
from qlora.machine.cards import amount
from qlora.machine.cores import allowed_cores, threads_for
from qlora.machine.device import resolve_device, total_memory_bytes
from qlora.machine.disk import bytes_text, duration_text
from qlora.machine.processes import here
from qlora.methods.base import AdaptedModel, apply_method
from qlora.model.checkpoint import Checkpoint
from qlora.planning.rows import new_ends_note
from qlora.recipe import Recipe
from qlora.runs.bases import Bases
from qlora.runs.folder import shown
from qlora.training.log import MetricsLog
from qlora.training.loop import Trainer
from qlora.training.objectives import Objective, Pairs
from qlora.training.objectives.pairs import pair_numbers
from qlora.training.rehearsal import Rehearsal

NOTHING_HELD_OUT = (
    "nothing is held out, so whether training helps cannot be known; set data.held_out_fraction=0.05, or name other records in "
    "data.held_out"
)


@dataclass(frozen=True)
class Generation:
    """A held-out prompt and its answers; ``after`` is None until training ends."""

    prompt: str
    expected: str
    before: str | None
    after: str | None = None


@dataclass(frozen=True)
class Run:
    """A run on disk, and what was measured."""

    folder: Path
    steps: int
    trainable_parameters: int
    before: HeldOut | None
    after: HeldOut | None
    generations: list[Generation] = field(default_factory=list)
    report: Path | None = None
    seconds: float = 0.0
    """In training steps, of every process that took one; of an evaluation, in all. The report and metrics.jsonl say the same."""
    peak_memory_bytes: int = 0
    tasks: list[JsonObject] = field(default_factory=list)
    """The rows of ``tasks.json``: what the base and the adapter scored on each task, in each metric."""

    def _repr_html_(self) -> str:
        return as_text(repr(self)) if self.report is None else as_frame(self.report.read_text(encoding="utf-8"))

    @property
    def verdict(self) -> Verdict | None:
        """What training came to; None where it was not measured before and after, row by row."""
        return compared(self.before, self.after)

    def __repr__(self) -> str:
        losses = [f"{one.loss:.4f} {when}" for when, one in (("before", self.before), ("after", self.after)) if one]
        return (
            f"Run in {self.folder}: {self.steps} steps in {duration_text(self.seconds)}, at most "
            f"{bytes_text(self.peak_memory_bytes)}\n"
            f"  {self.trainable_parameters:,} trainable parameters\n"
            f"  held-out loss {', '.join(losses) or 'not measured'}"
            + (f"\n  {told}" if self.after and (told := self.after.preferences or self.after.classes) else "")
        )


@dataclass
class Session:
    """A run that is being trained. ``recipe`` is what its steps follow: on resume, with the overrides of this call."""

    recipe: Recipe
    folder: Path
    data: Data
    prompts: list[Prompt]
    """What is asked before and after training."""
    model: AdaptedModel
    trainer: Trainer
    say: Callable[[str], None]
    quiet: bool
    tasks: list[Task] = field(default_factory=list)
    rehearsal: Rehearsal | None = None

    @property
    def log(self) -> MetricsLog:
        """The main process's ``metrics.jsonl``, once the run has begun."""
        assert self.trainer.log is not None
        return self.trainer.log

    def told(self, name: str) -> list[float]:
        """What ``metrics.jsonl`` says of every step so far; nothing to a process that writes none."""
        return [] if self.trainer.log is None else self.trainer.log.told(name)

    def answers(self) -> list[str]:
        """The model's answers to ``prompts``."""
        return asked(self.model, self.prompts, self.recipe)

    def result(
        self,
        before: HeldOut | None,
        after: HeldOut | None,
        generations: list[Generation],
        tasks: list[JsonObject],
        report: Path | None,
    ) -> Run:
        """What the caller gets."""
        return Run(
            folder=self.folder,
            steps=self.trainer.step_number,
            trainable_parameters=self.model.count_trainable(),
            before=before,
            after=after,
            generations=generations,
            report=report,
            seconds=sum(self.told("seconds")),
            peak_memory_bytes=int(max(self.told("peak_memory_bytes"), default=0)),
            tasks=tasks,
        )


def asked(model: AdaptedModel, prompts: Sequence[Prompt], recipe: Recipe) -> list[str]:
    """The model's answers, with a mark behind those that are longer than the recipe lets them be."""
    return answers(model, [prompt.ids for prompt in prompts], recipe.evaluation.max_new_tokens, cut=" […]")


def load_model(
    recipe: Recipe, checkpoint: Checkpoint, device: torch.device, quiet: bool, bases: Bases, values_follow: bool = False
) -> AdaptedModel:
    """The base with its method. ``values_follow``: an adapter will be loaded, so its first values need not be worked out."""
    base = bases.take(recipe, checkpoint, device, quiet)
    return apply_method(base, recipe.method, recipe.training.seed, values_follow=values_follow)


def stop_at(model: AdaptedModel, ends: Sequence[int]) -> str | None:
    """Have answers end at these tokens too. Returns what there is to say where the checkpoint does not name them as ends."""
    known = model.base.end_tokens
    model.base.end_tokens = (*known, *(end for end in ends if end not in known))
    return new_ends_note(ends, known, model.tokenizer)


def decided_by_main(recipe: Recipe) -> Recipe:
    """The recipe that the main process has resolved: another one's memory or speed may have decided otherwise."""
    if here().size == 1:
        return recipe
    return Recipe.from_dict(json.loads(here().once(recipe.model_dump_json)), source="the main process's recipe")


def use_threads(recipe: Recipe) -> None:
    """As many CPU threads as the recipe says, else no more than a container may keep busy; before anything is measured or loaded."""
    threads = recipe.device.threads or min(torch.get_num_threads(), allowed_cores() or sys.maxsize)
    if threads != torch.get_num_threads():
        torch.set_num_threads(threads)


def with_threads(recipe: Recipe, folder: Path, say: Callable[[str], None]) -> Recipe:
    """A new run's recipe, with the number of CPU threads in it where other programs leave cores for fewer than there are: the run
    in ``folder`` has that many from then on, since sums depend on it."""
    there = torch.get_num_threads()
    if recipe.device.threads is not None or here().size > 1 or resolve_device(recipe.device.name).type != "cpu":
        return recipe
    if (threads := threads_for(there)) == there:
        return recipe
    say(
        f"device.threads is {threads} of {there}: other programs keep cores busy, and threads that share one slow all of them down. "
        f"Once they have ended, go on with: qlora resume {shown(folder)} device.threads={there}"
    )
    return recipe.model_copy(update={"device": recipe.device.model_copy(update={"threads": threads})})


def limited(device: torch.device, recipe: Recipe) -> torch.device:
    """``device``, of whose memory this process takes no more than the recipe allows from here on (a CPU has no such limit),
    and with kernels that give the same bits every time where the recipe asks for them."""
    if recipe.device.deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # torch asks for it, before cuBLAS begins
        torch.use_deterministic_algorithms(True)
        torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]
    limit = recipe.device.memory
    if limit is not None and device.type == "cuda":
        _, total = total_memory_bytes(device)
        torch.cuda.set_per_process_memory_fraction(min(1.0, amount(limit) / total), device)
    return device


@contextmanager
def kernels_kept() -> Iterator[None]:
    """Inside, ``device.deterministic`` may choose other kernels; afterwards this process has those that it had."""
    before = torch.are_deterministic_algorithms_enabled()
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before)


def speaker(quiet: bool) -> Callable[[str], None]:
    """What says a sentence on standard error, without keys and control characters; or nothing, when ``quiet``."""

    def say(text: str) -> None:
        if not quiet:
            print(visible(redacted(text)), file=sys.stderr, flush=True)

    return say


def measured(
    objective: Objective, rows: Sequence[Row], reference: Mapping[str, Tensor], rows_at_once: int, chunk: int
) -> HeldOut:
    """Held-out ``rows`` by an objective, as its model stands; ``reference`` is the trainer's."""
    if not isinstance(objective, Pairs):
        return score(objective.model, rows, rows_at_once, chunk)
    sums, counts = objective.measure(rows, rows_at_once, chunk)
    numbers = pair_numbers(rows)
    before = reference["held_out"][numbers] if reference else sums.new_zeros(len(numbers), 2)
    compared = objective.compare(sums, counts, before)
    return held_out_pairs(*compared, sums, counts, [len(row.examples) // 2 for row in rows])


def read_evaluation(folder: Path) -> tuple[HeldOut | None, list[Generation]] | None:
    """(held out before, generations) from ``evaluation.json``; None before it is written. Raises RunError."""
    try:
        values = read_object(folder / "evaluation.json", MAX_OURS)
        if values is None:
            return None
        before = values.get("held_out", {}).get("before")
        generations = [Generation(**item) for item in values.get("generations", [])]
        return held_out_of(before), generations
    except (AttributeError, TypeError, Fault):
        raise damaged_evaluation(folder) from None


def compared(before: HeldOut | None, after: HeldOut | None) -> Verdict | None:
    """The verdict on two measurements; None where one is missing, or is an older release's, which kept no rows."""
    return verdict(before, after) if before and after and before.rows else None


def held_out_of(values: dict[str, Any] | None) -> HeldOut | None:
    """What ``evaluation.json`` says of one measurement; older ones have no rows."""
    if not values:
        return None
    pairs, classes = values.get("preferences"), values.get("classes")
    rows = tuple((loss, count) for loss, count in values.get("rows", ()))
    beside = {
        "preferences": Preferences(**pairs) if pairs else None,
        "classes": Classes(**{**classes, "each": tuple(OfClass(**one) for one in classes["each"])})
        if classes
        else None,
    }
    return HeldOut(**{**values, "rows": rows, **beside})


def write_evaluation(
    folder: Path, before: HeldOut | None, after: HeldOut | None, generations: list[Generation]
) -> None:
    """Write ``evaluation.json``: what was measured, the verdict on it, and the answers."""
    held_out = {
        key: {name: part for name, part in asdict(value).items() if part is not None}
        for key, value in (("before", before), ("after", after))
        if value is not None
    }
    found = compared(before, after)
    values = {
        "held_out": held_out,
        "verdict": found and found._asdict(),
        "generations": [asdict(item) for item in generations],
    }
    write_json(folder / "evaluation.json", values)


def damaged_evaluation(folder: Path) -> RunError:
    """What to say of an ``evaluation.json`` that is not what was written."""
    place = folder / "evaluation.json"
    return RunError(f"'{place}' is damaged; delete it, and what it holds is measured again, or train the run anew.")
