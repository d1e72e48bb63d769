"""What a run folder holds, read without trusting it: a run may be going on, stopped, torn or written by someone else.

Knows the names of the run folder's files and of their fields; must not know HTML, and imports nothing that trains.
Whatever is missing is empty, whatever is broken is left out and *said* in ``notes``. No secret gets further than this file,
but what the data and the models said stays as it is.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from qlora.errors import RecipeError, RunError, listed, redacted
from qlora.recipe import Recipe


@dataclass(frozen=True)
class HeldOut:
    """One held-out evaluation. ``loss`` is summed over ``target_tokens`` and divided by them."""

    step: int
    loss: float
    perplexity: float
    target_tokens: int | None


@dataclass(frozen=True)
class Records:
    """A run folder's content. Lists are in the order of the steps; mappings are empty where the file is not there."""

    name: str
    recipe: Recipe | None
    """None when ``recipe.yaml`` does not validate with this version; its text is in ``recipe_text`` either way."""
    recipe_text: str
    plan: dict[str, Any] = field(default_factory=dict)
    environment: dict[str, Any] = field(default_factory=dict)
    evaluation: dict[str, Any] = field(default_factory=dict)
    method: dict[str, Any] = field(default_factory=dict)
    steps: list[dict[str, Any]] = field(default_factory=list)
    """One a step, ascending, every ``step`` an int and at most once."""
    held_out: list[HeldOut] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    """Sentences about what could not be read."""


def read_records(folder: Path) -> Records:
    """Read ``folder``. Raises RunError when it is no run folder, that is, has no ``recipe.yaml``."""
    if not folder.is_dir():
        raise RunError(f"There is no run folder at '{folder}'; expected a folder that 'qlora train' made.")
    recipe_file = folder / "recipe.yaml"
    if not recipe_file.is_file() or not any((folder / name).is_file() for name in ("plan.json", "metrics.jsonl")):
        raise RunError(
            f"'{folder}' is not a run folder: recipe.yaml with plan.json or metrics.jsonl was expected in it. "
            "Give the folder that 'qlora train' printed."
        )
    notes: list[str] = []
    try:
        text = recipe_file.read_text(encoding="utf-8", errors="replace")
    except OSError as error:
        raise RunError(f"'{recipe_file}' cannot be read ({error}); a report needs the run's recipe.") from None
    recipe: Recipe | None = None
    try:
        recipe = Recipe.from_yaml(recipe_file)
    except (RecipeError, RecursionError) as error:
        reason = " ".join(str(error).replace(str(recipe_file), "recipe.yaml").split())
        notes.append(f"recipe.yaml does not validate with this version and is shown as it is. {reason}")
    evaluation = _mapping(folder / "evaluation.json", notes)
    steps, held_out = _metrics(folder / "metrics.jsonl", notes)
    return Records(
        name=redacted(folder.absolute().name),
        recipe=recipe,
        recipe_text=redacted(text),
        plan=redacted(_mapping(folder / "plan.json", notes)),
        environment=redacted(_mapping(folder / "environment.json", notes)),
        evaluation=evaluation,
        method=redacted(_mapping(folder / "method.json", notes)),
        steps=steps,
        held_out=_with_before_and_after(held_out, evaluation, steps[-1]["step"] if steps else 0),
        notes=redacted(notes),
    )


def number(mapping: Mapping[str, Any], key: str) -> float | None:
    """The finite number under ``key``, else None: text, NaN and truth values are no numbers."""
    value = mapping.get(key)
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    try:
        result = float(value)
    except OverflowError:  # JSON integers have no upper end
        return None
    return result if math.isfinite(result) else None


def whole(mapping: Mapping[str, Any], key: str) -> int | None:
    """The finite number under ``key`` as an int, else None."""
    value = number(mapping, key)
    return None if value is None else int(value)


def section(mapping: Mapping[str, Any], *keys: str) -> dict[str, Any]:
    """The mapping at ``keys`` inside ``mapping``; empty when anything on the way is not one."""
    here: Any = mapping
    for key in keys:
        here = here.get(key) if isinstance(here, dict) else None
    return here if isinstance(here, dict) else {}


def _mapping(file: Path, notes: list[str]) -> dict[str, Any]:
    try:
        value = json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}
    except (OSError, ValueError, RecursionError) as error:
        notes.append(f"{file.name} could not be read and is left out ({error}).")
        return {}
    if not isinstance(value, dict):
        notes.append(f"{file.name} holds {type(value).__name__} where an object was expected, and is left out.")
        return {}
    return value


def _metrics(file: Path, notes: list[str]) -> tuple[list[dict[str, Any]], list[HeldOut]]:
    """metrics.jsonl → (training steps, held-out evaluations).

    A resumed run may have written a step twice, before it was stopped and after; the later line is the one that counts.
    """
    try:
        raw = file.read_bytes()
    except FileNotFoundError:
        return [], []
    except OSError as error:
        notes.append(f"metrics.jsonl could not be read and is left out ({error}).")
        return [], []
    lines = raw.split(b"\n")
    steps: dict[int, dict[str, Any]] = {}
    held_out: dict[int, HeldOut] = {}
    broken: list[int] = []
    twice = 0
    for index, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            record = json.loads(line.decode("utf-8"))
        except (ValueError, RecursionError):
            record = None
        step = whole(record, "step") if isinstance(record, dict) else None
        if record is None or step is None:
            # Only the last line can be torn by a stop in the middle of a write; it then lacks its line break.
            if index == len(lines):
                notes.append(f"The last line of metrics.jsonl (line {index}) is torn and was skipped.")
            else:
                broken.append(index)
            continue
        loss = number(record, "held_out_loss")
        if loss is not None:
            held_out[step] = HeldOut(
                step, loss, _perplexity(record, "held_out_perplexity", loss), whole(record, "held_out_target_tokens")
            )
        if "held_out_loss" not in record:
            twice += step in steps
            steps[step] = {**record, "step": step}
    if broken:
        notes.append(f"Lines of metrics.jsonl that are not objects with a step were skipped: {listed(broken)}.")
    if twice:
        notes.append(f"Steps that stand twice in metrics.jsonl ({twice}) are shown as their later line tells.")
    return [steps[step] for step in sorted(steps)], [held_out[step] for step in sorted(held_out)]


def _with_before_and_after(held_out: list[HeldOut], evaluation: dict[str, Any], last_step: int) -> list[HeldOut]:
    """Add evaluation.json's ``before`` at step 0 and ``after`` at the last step where metrics.jsonl has no point."""
    points = {point.step: point for point in held_out}
    for when, step in (("before", 0), ("after", last_step)):
        values = section(evaluation, "held_out", when)
        loss = number(values, "loss")
        if loss is not None:
            point = HeldOut(step, loss, _perplexity(values, "perplexity", loss), whole(values, "target_tokens"))
            points.setdefault(step, point)
    return [points[step] for step in sorted(points)]


def _perplexity(values: dict[str, Any], key: str, loss: float) -> float:
    given = number(values, key)
    if given is not None:
        return given
    return math.exp(loss) if loss < 700 else math.inf
