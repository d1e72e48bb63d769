"""A session: what one process holds while it works on a run, and what is left of it on disk.

    recipe ─► data, device, model (base + method) ─► trainer ─► measured, trained, handed over ─► Run

The verbs (``train.py``, ``evaluate.py``, ``export.py``) are written on these parts. Knows every room below; must not know
the command line.
"""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch

from qlora.data import Data, Prompt
from qlora.errors import RunError, redacted, visible
from qlora.evaluation import HeldOut, answers
from qlora.evaluation.tasks import Task
from qlora.files.durable import write_json
from qlora.files.strangers import MAX_OURS, Fault, JsonObject, read_object
from qlora.machine.cards import amount
from qlora.machine.device import bytes_text, peak_memory_bytes, total_memory_bytes
from qlora.methods import AdaptedModel, apply_method
from qlora.model.checkpoint import Checkpoint
from qlora.planning.rows import new_ends_note
from qlora.recipe import Recipe
from qlora.runs.bases import Bases
from qlora.training import Trainer


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
    peak_memory_bytes: int = 0
    tasks: list[JsonObject] = field(default_factory=list)
    """The rows of ``tasks.json``: what the base and the adapter scored on each task, in each metric."""

    def __repr__(self) -> str:
        losses = [f"{one.loss:.4f} {when}" for when, one in (("before", self.before), ("after", self.after)) if one]
        return (
            f"Run in {self.folder}: {self.steps} steps in {self.seconds:.0f} s, at most "
            f"{bytes_text(self.peak_memory_bytes)}\n"
            f"  {self.trainable_parameters:,} trainable parameters\n"
            f"  held-out loss {', '.join(losses) or 'not measured'}"
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
    begun: float = field(default_factory=time.perf_counter)
    tasks: list[Task] = field(default_factory=list)

    def answers(self) -> list[str]:
        """The model's answers to ``prompts``."""
        return answers(self.model, [prompt.ids for prompt in self.prompts], self.recipe.evaluation.max_new_tokens)

    def result(
        self,
        before: HeldOut | None,
        after: HeldOut | None,
        generations: list[Generation],
        tasks: list[JsonObject],
        report: Path,
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
            seconds=time.perf_counter() - self.begun,
            peak_memory_bytes=peak_memory_bytes(self.model.device),
            tasks=tasks,
        )


def held_out_prompts(data: Data, recipe: Recipe) -> list[Prompt]:
    """What is asked before and after training. Found before a model is loaded: rendering begins a process."""
    return data.held_out_prompts(recipe.evaluation.prompts) if data.held_out else []


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


def use_threads(recipe: Recipe) -> None:
    """As many CPU threads as the recipe says, before anything is measured or loaded."""
    if recipe.device.threads:
        torch.set_num_threads(recipe.device.threads)


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


def held_out_of(values: dict[str, Any] | None) -> HeldOut | None:
    """What ``evaluation.json`` says of one measurement; older ones have no rows."""
    if not values:
        return None
    return HeldOut(**{**values, "rows": tuple((loss, count) for loss, count in values.get("rows", ()))})


def write_evaluation(
    folder: Path, before: HeldOut | None, after: HeldOut | None, generations: list[Generation]
) -> None:
    """Write ``evaluation.json``."""
    held_out = {key: asdict(value) for key, value in (("before", before), ("after", after)) if value is not None}
    values = {"held_out": held_out, "generations": [asdict(item) for item in generations]}
    write_json(folder / "evaluation.json", values)


def damaged_evaluation(folder: Path) -> RunError:
    """What to say of an ``evaluation.json`` that is not what was written."""
    place = folder / "evaluation.json"
    return RunError(f"'{place}' is damaged; delete it, and what it holds is measured again, or train the run anew.")
