"""What a run folder holds, read without trusting it: the run may be going on, stopped, torn, or written by someone else.

Knows the names of the run folder's files and of their fields; must not know HTML, and imports nothing that trains.
What is missing is empty; what is broken is left out and *said* in ``notes``. No secret gets past this file, but what the
data and the models said stays as it is.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from qlora.errors import RecipeError, RunError, listed, redacted
from qlora.recipe import Recipe

Json = dict[str, object]


class HeldOut(NamedTuple):
    """One held-out evaluation. ``loss`` in nats per target token, a mean over ``target_tokens``; of pairs a mean over these, and
    the shares of them whose chosen answer is ``ahead`` by its reward and ``likelier`` a token."""

    step: int
    loss: float
    perplexity: float
    target_tokens: int | None
    pairs: int | None = None
    ahead: float | None = None
    likelier: float | None = None


@dataclass(frozen=True)
class Records:
    """A run folder's content. Lists are in the order of the steps; mappings are empty where the file is not there."""

    name: str
    recipe: Recipe | None  # None when recipe.yaml does not validate with this version
    recipe_text: str
    plan: Json
    environment: Json
    evaluation: Json
    method: Json
    tasks: list[Json]  # the rows of tasks.json
    steps: list[Step]  # ascending, every step at most once
    held_out: list[HeldOut]
    notes: list[str]  # sentences about what could not be read
    stopped: str = ""  # why the step after the last could not be taken


class Step(NamedTuple):
    """A training step's line in metrics.jsonl."""

    number: int
    values: Json


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
    recipe = None
    try:
        text = recipe_file.read_text(encoding="utf-8", errors="replace")
        recipe = Recipe.from_yaml(recipe_file)
    except OSError as error:
        raise RunError(f"'{recipe_file}' cannot be read ({error}); a report needs the run's recipe.") from None
    except (RecipeError, RecursionError) as error:
        reason = " ".join(str(error).replace(str(recipe_file), "recipe.yaml").split())
        notes.append(f"recipe.yaml does not validate with this version and is shown as it is. {reason}")
    evaluation = _object(folder / "evaluation.json", notes)
    steps, held_out, stopped = _metrics(folder / "metrics.jsonl", notes)
    for when, step in (("before", 0), ("after", steps[-1].number if steps else 0)):
        if point := _held_out(section(evaluation, "held_out", when), step):
            held_out.setdefault(step, point)
    return Records(
        name=redacted(folder.absolute().name),
        recipe=recipe,
        recipe_text=redacted(text),
        plan=redacted(_object(folder / "plan.json", notes)),
        environment=redacted(_object(folder / "environment.json", notes)),
        evaluation=evaluation,
        method=redacted(_object(folder / "method.json", notes)),
        tasks=objects(redacted(_object(folder / "tasks.json", notes)).get("tasks")),
        steps=steps,
        held_out=[held_out[step] for step in sorted(held_out)],
        notes=redacted(notes),
        stopped=redacted(stopped),
    )


def number(values: Mapping[str, object], key: str) -> float | None:
    """The finite number under ``key``, else None: text, NaN and truth values are no numbers."""
    value = values.get(key)
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    try:
        result = float(value)
    except OverflowError:  # JSON integers have no upper end
        return None
    return result if math.isfinite(result) else None


def whole(values: Mapping[str, object], key: str) -> int | None:
    """The finite number under ``key`` as an int, else None."""
    value = number(values, key)
    return None if value is None else int(value)


def section(values: Json, *keys: str) -> Json:
    """The object at ``keys`` inside ``values``; empty when anything on the way is not one."""
    here: object = values
    for key in keys:
        here = here.get(key) if isinstance(here, dict) else None
    return here if isinstance(here, dict) else {}


def _object(file: Path, notes: list[str]) -> Json:
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


def objects(value: object) -> list[Json]:
    """The objects in a list; none in anything else."""
    return [row for row in value if isinstance(row, dict)] if isinstance(value, list) else []


def _metrics(file: Path, notes: list[str]) -> tuple[list[Step], dict[int, HeldOut], str]:
    """metrics.jsonl → training steps, held-out evaluations by step, and why it stopped where it had to.

    A resumed run may have written a step twice, before it was stopped and after; the later line counts.
    """
    try:
        lines = file.read_bytes().split(b"\n")
    except FileNotFoundError:
        return [], {}, ""
    except OSError as error:
        notes.append(f"metrics.jsonl could not be read and is left out ({error}).")
        return [], {}, ""
    stopped = ""
    steps: dict[int, Step] = {}
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
        if step is not None and isinstance(record.get("stopped"), str):
            stopped = record["stopped"]
        elif step is not None and "held_out_loss" not in record:
            twice += step in steps
            steps[step] = Step(step, record)
        elif step is not None:
            if point := _held_out(record, step, "held_out_"):
                held_out[step] = point
        elif index == len(lines):  # a stop in the middle of a write leaves a last line without its line break
            notes.append(f"The last line of metrics.jsonl (line {index}) is torn and was skipped.")
        else:
            broken.append(index)
    if broken:
        notes.append(f"Lines of metrics.jsonl that are not objects with a step were skipped: {listed(broken)}.")
    if twice:
        notes.append(f"Steps that stand twice in metrics.jsonl ({twice}) are shown as their later line tells.")
    return [steps[step] for step in sorted(steps)], held_out, stopped


def _held_out(values: Json, step: int, prefix: str = "") -> HeldOut | None:
    loss = number(values, f"{prefix}loss")
    if loss is None:
        return None
    perplexity = number(values, f"{prefix}perplexity")
    if perplexity is None:
        perplexity = math.exp(loss) if loss < 700 else math.inf
    pairs = values if prefix else section(values, "preferences")  # side by side in a line, apart in evaluation.json
    return HeldOut(
        step, loss, perplexity, whole(values, f"{prefix}target_tokens"),
        whole(pairs, f"{prefix}pairs"), number(pairs, f"{prefix}accuracy"), number(pairs, f"{prefix}likelier"),
    )  # fmt: skip
