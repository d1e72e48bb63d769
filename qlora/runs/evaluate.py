"""Evaluate, preview, and the trained model itself, for whoever wants to use it.

run folder ─► base + adapter ─► held-out loss and answers, measured now
recipe ─► the first examples as the model sees them
"""

from __future__ import annotations

import time
from pathlib import Path

from transformers import PreTrainedTokenizerBase

from qlora.data.preview import Preview
from qlora.errors import RunError
from qlora.machine.device import peak_memory_bytes
from qlora.machine.processes import here
from qlora.methods.base import AdaptedModel
from qlora.methods.loading import load_adapter
from qlora.model.checkpoint import Checkpoint, open_checkpoint
from qlora.model.tokenizer import with_new_tokens
from qlora.planning.continued import continued
from qlora.planning.rows import load_recipe_data, with_packing
from qlora.recipe import Recipe
from qlora.runs.bases import Bases
from qlora.runs.folder import (
    check_data,
    device_here,
    end_tokens,
    open_base,
    open_run,
    read_adapter,
    template_of,
)
from qlora.runs.session import (
    Generation,
    Run,
    asked,
    limited,
    load_model,
    measured,
    speaker,
    stop_at,
    use_threads,
)
from qlora.runs.tasks import open_tasks, score_base, score_tasks, write_table
from qlora.training.checkpoint import adapter_folder
from qlora.training.objectives import Pairs, make_objective
from qlora.training.reference import read_reference


def preview(recipe: Recipe, count: int = 2, quiet: bool = False) -> list[Preview]:
    """The first ``count`` training examples as the model sees them; unless ``quiet``, what training says of the data is said."""
    recipe, _ = continued(recipe)
    checkpoint = open_checkpoint(recipe.model, weights=False)
    data = load_recipe_data(recipe, checkpoint)
    _, by_length = with_packing(recipe, checkpoint)
    speaker(quiet)("\n".join(filter(None, [str(data.report), by_length, data.report.histogram()])))
    return [data.preview(index) for index in range(min(count, data.report.train.examples))]


def evaluate(folder: str | Path, quiet: bool = False) -> Run:
    """Held-out loss and answers of a run's adapter, measured now, and its tasks where the run folder does not hold their results
    yet: these are written there, all else stays as it is."""
    begun, folder = time.perf_counter(), Path(folder)
    recipe, environment = open_run(folder)
    checkpoint = open_base(recipe, environment, folder)
    data = load_recipe_data(recipe, checkpoint)
    check_data(data, environment, folder)
    tasks = open_tasks(recipe, data)
    if not data.held_out and not tasks:
        raise RunError(
            f"The recipe of '{folder}' holds nothing out and names no task; evaluate needs data.held_out, held_out_fraction or "
            "evaluation.tasks."
        )
    prompts = data.held_out_prompts(recipe.evaluation.prompts)
    model = _trained(recipe, checkpoint, folder, quiet)
    after = None
    if data.held_out:
        rows, training = data.held_out[: recipe.evaluation.held_out_rows], recipe.training
        objective = make_objective(recipe.objective, model)
        reference = read_reference(folder) if isinstance(objective, Pairs) and objective.unmeasured else {}
        after = measured(objective, rows, reference, training.micro_batch_size, training.loss_chunk)
    texts = asked(model, prompts, recipe)
    return Run(
        folder=folder,
        steps=0,
        trainable_parameters=model.count_trainable(),
        before=None,
        after=after,
        generations=[Generation(p.text, p.answer, None, text) for p, text in zip(prompts, texts, strict=True)],
        seconds=time.perf_counter() - begun,
        peak_memory_bytes=peak_memory_bytes(model.device),
        tasks=write_table(
            folder,
            score_base(model, tasks, folder, quiet),
            score_tasks(model, tasks, folder, adapter_folder(folder).name, quiet),
        ),
    )


def load_run(folder: str | Path, quiet: bool = False, bases: Bases | None = None) -> AdaptedModel:
    """The base of a run with its trained adapter, or that of its newest checkpoint."""
    folder = Path(folder)
    recipe, environment = open_run(folder)
    return _trained(recipe, open_base(recipe, environment, folder), folder, quiet, bases)


def _trained(
    recipe: Recipe, checkpoint: Checkpoint, folder: Path, quiet: bool, bases: Bases | None = None
) -> AdaptedModel:
    adapter, ends = adapter_folder(folder), end_tokens(recipe, folder, checkpoint)
    use_threads(recipe)
    if recipe.memory.tier == "processes" and here().size == 1 and not recipe.trains_every_weight:
        # what was spread over several waits beside the one
        recipe = recipe.model_copy(update={"memory": recipe.memory.model_copy(update={"tier": "host"})})
    device, bases = limited(device_here(recipe), recipe), bases or Bases()
    if adapter.parent.name != "checkpoints":  # the form for others: what it says of itself counts, not the recipe
        model = load_adapter(bases.take(recipe, checkpoint, device, quiet), adapter)
    else:
        empty = load_model(recipe, checkpoint, device, quiet, bases, values_follow=True)
        model = read_adapter(folder, lambda place: load_adapter(empty, place), adapter)
    stop_at(model, ends)
    return model


def chat_tokenizer(folder: str | Path) -> PreTrainedTokenizerBase:
    """The run's tokenizer with the chat template that the run was trained with; without one for a run on raw text."""
    recipe, _ = open_run(Path(folder))
    checkpoint = open_checkpoint(recipe.model, weights=False)
    tokenizer = with_new_tokens(checkpoint.tokenizer, recipe.method)
    tokenizer.chat_template = template_of(recipe, Path(folder), checkpoint)
    return tokenizer
