"""What a study measures of a trained cell beside its losses and tasks: the weights' change, KL from the base, diversity, latency.

Knows run folders and the base in memory; must not know which cells there are.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import asdict
from pathlib import Path
from typing import Any

from qlora.data.load import Data
from qlora.errors import RunError
from qlora.evaluation.change import MatrixChange, change_of
from qlora.evaluation.diversity import diversity
from qlora.evaluation.forgetting import Before
from qlora.evaluation.latency import latency_of
from qlora.evaluation.tasks.opening import open_task
from qlora.evaluation.tasks.presets import kind_of
from qlora.files.durable import write_json
from qlora.files.strangers import JsonObject
from qlora.methods.base import AdaptedModel
from qlora.methods.switching import Adapters
from qlora.model.checkpoint import Checkpoint
from qlora.planning.rows import load_recipe_data
from qlora.recipe import Recipe
from qlora.runs.bases import Bases, changes_its_base
from qlora.runs.evaluate import load_run
from qlora.runs.folder import device_here, open_base, open_run
from qlora.runs.session import limited
from qlora.studies.overlap import keep_directions

PROMPTS, SAMPLES = 40, 8
"""Of diversity: held-out prompts, and answers drawn to each (arXiv 2405.09673 draws 50)."""


def measured(place: Path, what: Sequence[str], bases: Bases) -> JsonObject:
    """What is looked at of the run in ``place``. The change of every matrix, with all its values, goes into ``change.json``."""
    found = dict[str, Any]()
    recipe, environment = open_run(place)
    checkpoint = open_base(recipe, environment, place)
    before = _before(recipe, checkpoint, bases) if "divergence" in what else {}
    model = load_run(place, quiet=True, bases=bases)
    if "divergence" in what:
        found["divergence"] = {name: _apart(one, model) for name, one in before.items()}
    if "change" in what:
        change = change_of(model)
        write_json(place / "change.json", change.to_json())
        keep_directions(model, place)
        found["change"] = {"matrices": [_in_short(one) for one in change.matrices], "left_out": list(change.left_out)}
    if "latency" in what:
        found["latency"] = asdict(latency_of(model))
    if "diversity" in what:
        found["diversity"] = _diversity(recipe, load_recipe_data(recipe, checkpoint), model)
    bases.give_back(recipe, model)
    return found


def _before(recipe: Recipe, checkpoint: Checkpoint, bases: Bases) -> dict[str, Before]:
    """By text task, what the base alone computes of its texts: once for all cells that share a base."""
    texts = [one for one in recipe.evaluation.tasks if kind_of(one) == "text"]
    base = bases.take(recipe, checkpoint, limited(device_here(recipe), recipe), quiet=True)
    assert base.tokenizer is not None
    alone, opened = Adapters(base), [open_task(one, base.tokenizer) for one in texts]
    changes = changes_its_base(recipe)

    def look() -> dict[str, Before]:
        return {task.name: Before.of(alone, (), task, keep_head=changes) for task in opened}

    found = bases.once(("states", repr(texts), changes), look)
    bases.keep(recipe, base)
    return found


def _apart(before: Before, model: AdaptedModel) -> JsonObject:
    """How far the model's next tokens are from the base's: nats a token, and how often both think the same one likeliest."""
    text = before.forgotten(model).text
    assert text is not None
    value, error = text.difference
    return {
        "divergence": text.divergence,
        "same_choice": text.same_choice,
        "loss": {"value": value, "error": error},
        "tokens": text.tokens,
    }


def _diversity(recipe: Recipe, data: Data, model: AdaptedModel) -> JsonObject:
    """How different drawn answers to held-out prompts are, of the trained model and, where it can answer alone, of the base."""
    prompts = [prompt.ids for prompt in data.held_out_prompts(PROMPTS)]
    if not prompts:
        raise RunError("measure: diversity needs held-out prompts, and this recipe holds out none; leave it out.")

    def drawn() -> JsonObject:
        metrics = diversity(model, prompts, SAMPLES, recipe.evaluation.max_new_tokens).metrics
        return {name: {"value": metric.value, "error": metric.error} for name, metric in metrics.items()}

    alone = all(method.why_not_disabled() is None for method in model.methods)
    trained = drawn()
    with model.disabled() if alone else nullcontext():
        return {"trained": trained, "base": drawn() if alone else None}


def _in_short(one: MatrixChange) -> JsonObject:
    """The figures of one matrix."""
    shares = {
        key: None if part is None else part.energy
        for key, part in (("intruders", one.intruders), ("control", one.control))
    }
    names = ("path", "layer", "module", "relative", "effective_rank", "rank_90")
    return {name: getattr(one, name) for name in names} | shares
