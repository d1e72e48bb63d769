"""Rows: what the data of a recipe come to, in rows, steps and time.

    recipe, tokenizer ─► data ─► rows ─► steps ─► with the seconds of one: how long it trains

Knows the data room and how many rows a step takes; must not know memory.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from transformers import PreTrainedTokenizerBase

from qlora.data.batches import steps_per_epoch
from qlora.data.load import Data, load_data
from qlora.data.report import Report
from qlora.data.sources import data_files
from qlora.errors import DataError, MethodError, ModelError, counted, listed
from qlora.files.durable import from_here
from qlora.machine.disk import duration_text
from qlora.model.anatomy import position_limit, text_config, why_not_packed
from qlora.model.checkpoint import Checkpoint
from qlora.model.checks import check_tokens
from qlora.model.load import end_tokens
from qlora.model.tokenizer import with_new_tokens
from qlora.recipe import Combined, Modules, Recipe, parts_of


@dataclass(frozen=True)
class Reading:
    """What was read, or why nothing was."""

    report: Report | None = None
    steps: int = 0
    epoch: int = 0
    """Steps in a pass over the data."""
    new_ends: str | None = None
    """What there is to say of the tokens that end an answer."""
    why_not: str = ""
    unread: str | None = None
    """What was left unread beside the rows that are trained on."""
    packed: bool = True
    """Whether rows are as long as those of a full step."""

    def said(self, seconds: float | None, reference: float | None = None) -> str:
        """In some lines; ``seconds``: those of a full step, where they are known, and those that measuring a ``reference`` on its
        rows takes beforehand, once."""
        if self.report is None:
            return f"The data were not read: {self.why_not}"
        counts = self.report.train
        about = "about" if self.packed else "at most"
        time = "" if seconds is None else f", {about} {duration_text(self.steps * seconds)}"
        lines = [
            str(self.report),
            f"{counted(counts.records, 'record')} → {counted(counts.rows, 'row')} → {counted(self.steps, 'step')}{time}",
        ]
        if reference is not None:
            lines.append(
                f"before the first step, the answers' likelihoods: {about} {duration_text(self.epoch * reference)}"
            )
        return "\n".join([*lines, *filter(None, [self.unread, self.new_ends])])


def with_packing(recipe: Recipe, checkpoint: Checkpoint) -> tuple[Recipe, str | None]:
    """The recipe with ``data.packing`` decided, and a sentence where the model cannot pack."""
    if recipe.data.packing != "auto":
        return recipe, None
    config = checkpoint.model_config()
    why = why_not_packed(config)
    data = recipe.data.model_copy(update={"packing": True if why is None else "by_length"})
    said = f"data.packing is by_length, since examples cannot share a row in this {config.model_type} model: {why}."
    return recipe.model_copy(update={"data": data}), None if why is None else said


def load_recipe_data(recipe: Recipe, checkpoint: Checkpoint) -> Data:
    """The data of a recipe, tokenised as its method needs it and checked against the model's positions and embeddings."""
    recipe, _ = with_packing(recipe, checkpoint)
    tokenizer = with_new_tokens(checkpoint.tokenizer, recipe.method)
    config = checkpoint.model_config()
    method, seed, objective = recipe.method, recipe.training.seed, recipe.objective
    data = load_data(
        recipe.data,
        tokenizer,
        seed,
        method.virtual_tokens,
        position_limit(config),
        objective.pairs,
        objective.classifies,
        recipe.classes,
    )
    embeddings = getattr(text_config(config), "vocab_size", None)
    if embeddings and tokenizer is checkpoint.tokenizer:  # new tokens make new embeddings
        check_tokens(config.model_type, embeddings, data.train)
        check_tokens(config.model_type, embeddings, data.held_out, "Held-out row")
    return data


def with_head(recipe: Recipe, classes: Sequence[str]) -> Recipe:
    """A classifier's recipe with the head that its method lacks, one output for each of ``classes``; any other as it is.
    Raises MethodError where it goes on from an adapter that has none."""
    if not recipe.objective.classifies or recipe.classes:
        return recipe
    if recipe.method.from_ is not None:
        raise MethodError(
            f"The adapter in '{recipe.method.from_}' has no head of a classifier; go on from one that has, or begin without method.from."
        )
    head = Modules(modules=("score",), labels=tuple(classes))
    return recipe.model_copy(update={"method": Combined(parts=(*parts_of(recipe.method), head))})


def with_known_head(recipe: Recipe, checkpoint: Checkpoint) -> tuple[Recipe, str | None]:
    """The same for a plan, which holds without data: with their classes if they can be read, else with two, which it says."""
    if not recipe.objective.classifies or recipe.classes:
        return recipe, None
    unknown = "The labels of the data are not known, so a head of two classes is planned."
    try:
        known = load_recipe_data(recipe, checkpoint).classes if not _elsewhere(recipe) else ()
    except (DataError, ModelError):  # which reading them for the plan says
        known = ()
    return with_head(recipe, known or ("0", "1")), None if known else unknown


def _elsewhere(recipe: Recipe) -> list[str]:
    """Those of the data that are no files here, and would have to be fetched."""
    return [source for source in (*recipe.data.sources, *recipe.data.held_out_sources) if not data_files(source)]


def read(recipe: Recipe, checkpoint: Checkpoint) -> Reading:
    """Read the data for a plan, which holds without them: what is wrong with them is said. Nothing is fetched for it."""
    try:
        elsewhere, unread = _elsewhere(recipe), None
        if elsewhere and not any(source in elsewhere for source in recipe.data.sources):
            unread = f"The held-out data were not read: {_not_here(elsewhere)}"
            section = recipe.data.model_copy(update={"held_out": None})
            recipe, elsewhere = recipe.model_copy(update={"data": section}), []
        if elsewhere:
            return Reading(why_not=_not_here(elsewhere))
        data = load_recipe_data(recipe, checkpoint)
    except (DataError, ModelError) as error:
        return Reading(why_not=str(error))
    training = recipe.training
    epoch = steps_per_epoch(len(data.train), training.batch_size)
    steps = training.steps or training.epochs * epoch
    ends = data.template.end_tokens if data.template else ()
    packed = data.section is not None and data.section.packs
    return Reading(
        data.report,
        steps,
        epoch,
        new_ends_note(ends, end_tokens(checkpoint), data.tokenizer),
        unread=unread,
        packed=packed,
    )


def _not_here(sources: Sequence[str]) -> str:
    """Why ``sources`` are not read for a plan."""
    names = [*dict.fromkeys(sources)]
    told = listed(map(repr, names))
    if all("/" in name and not Path(name).suffix for name in names):
        return (
            f"{told} {'is' if len(names) == 1 else 'are'} not in files here, and a plan fetches nothing from the hub."
        )
    return f"no file here is {told}.{from_here(names[0])}"


def new_ends_note(ends: Sequence[int], known: Sequence[int], tokenizer: PreTrainedTokenizerBase) -> str | None:
    """A sentence where the chat template ends an answer with tokens that the checkpoint does not name as ends."""
    new = tokenizer.convert_ids_to_tokens([end for end in ends if end not in known])
    return (
        f"An answer ends with {listed(new)}, which the model's own files do not name as an end: chat, evaluation and a merged "
        "model stop there too."
        if new
        else None
    )
