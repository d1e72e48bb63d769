"""What a study asks: arms, a grid of recipe fields, learning rates and seeds, and the recipe of every cell that they make.

    study.yaml ─► arms × grid ─► settings ─► × rates, seeds ─► cells, each a recipe with a run folder of its own

Knows recipes and how a value goes into one; must not know results, or how a cell is run.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, field_validator

from qlora.errors import RecipeError, listed
from qlora.evaluation.tasks.presets import kind_of
from qlora.recipe import Recipe, Section, parts_of
from qlora.recipe.reading import read_file, validated, with_value

RATE, SEED, STEPS = "training.learning_rate", "training.seed", "training.steps"
OURS = {"folder": "the study gives every cell a folder of its own", "overwrite": "cells are gone on with"}
OWN_KEY = {RATE: "rates", SEED: "seeds"}


class StudySection(Section):
    """A study, whole."""

    about: str = ""
    """The question that it asks, shown above its table."""
    recipe: str | dict[str, Any]
    """What all cells share: a recipe's values, or the path of its file. Relative paths start at the working directory."""
    data_root: str | None = None
    """The folder that relative paths of data start at."""
    mistaken = dict.fromkeys(("model", "data", "training"), "a recipe, which qlora train takes")

    arms: dict[str, dict[str, Any]] = Field(default_factory=dict)
    """What is compared, by name: the values that make each differ, as `{method.r: 8}`, or `{method: {name: dora, r: 8}}`, which
    takes the place of the whole section; `rates` in an arm are its own. One arm with the recipe as it is when left out."""
    grid: dict[str, list[Any]] = Field(default_factory=dict)
    """Fields of a recipe and the values that each arm takes for them, in every combination. What changes together has any name
    and mappings for values, as `{rank: [{method.r: 8, method.alpha: 8}, {method.r: 16, method.alpha: 16}]}`."""
    rates: tuple[Annotated[float, Field(gt=0, le=10)], ...] = ()
    """Learning rates. Every arm is compared at the one with the least held-out loss. The recipe's own when left out."""
    seeds: tuple[Annotated[int, Field(ge=0, lt=2**32)], ...] = (0,)
    """`training.seed`: with the first the rates are tried, with each further one the best of them once more."""
    hours: float | None = Field(None, gt=0)
    """What the whole study may take. Where all cells at full length would take longer, rates are tried on a part of the steps
    first and the better half goes on; cells that would end later are left out, and named. No limit when left out."""
    forgetting: tuple[str, ...] = ()
    """Those of `evaluation.tasks` that are not about the data: what is scored less on them than by the base is forgotten."""
    measure: tuple[Literal["change", "divergence", "diversity", "latency"], ...] = ()
    """What is measured of each full-length cell beside held-out loss, the recipe's tasks and its cost: `change`, how each weight
    matrix changed; `divergence`, KL from the base on the texts of the recipe's tasks of kind `text`; `diversity`, how much answers
    drawn at random differ; `latency`, the time a generated token takes."""
    engine: str = Field("local", pattern=r"^(local|ray(://.+)?)$")
    """`local` runs one cell after the other. `ray` gives them to a Ray cluster: one that it starts here, or that of `RAY_ADDRESS`
    or of an address as `ray://host:10001`; run folders must lie where all its machines reach them."""
    sizes: dict[str, dict[str, Any]] = Field(default_factory=dict)
    """Other values for other machines, by name: `size=gpu` takes those of `gpu`."""
    size: str | None = None
    """Which of `sizes` holds."""
    folder: str | None = None
    """The study's folder; `studies/` and the file's name when left out."""

    @property
    def budget(self) -> float | None:
        """Seconds that the whole study may take; None: no limit."""
        return None if self.hours is None else self.hours * 3600

    @field_validator("grid")
    @classmethod
    def _not_empty(cls, grid: dict[str, list[Any]]) -> dict[str, list[Any]]:
        if empty := [key for key, values in grid.items() if not values]:
            raise ValueError(f"has no value for {listed(empty)}; expected a list of them, or no such key")
        return grid

    @classmethod
    def from_yaml(cls, path: str | Path, *overrides: str) -> StudySection:
        """Read a study's file; each override is ``key=value``, as ``hours=2`` or ``recipe.training.steps=50``. Raises RecipeError."""
        path = Path(path)
        values, lines = read_file(path, "study")
        values.setdefault("folder", str(Path("studies") / path.stem))
        section = validated(cls, values, overrides, str(path), lines)
        if section.size is None:
            return section
        if section.size not in section.sizes:
            raise RecipeError(f"{path}: size is '{section.size}'; expected one of {listed(section.sizes, 9)}.")
        sized = [f"{key}={json.dumps(value)}" for key, value in section.sizes[section.size].items()]
        return validated(cls, values, [*sized, *overrides], str(path), lines)


@dataclass(frozen=True)
class Cell:
    """One run of a study."""

    arm: str
    values: Mapping[str, Any]
    """Of the grid."""
    rate: float
    seed: int
    recipe: Recipe = field(compare=False, repr=False)
    steps: int | None = None
    """Of a cell that tries a rate on a part of the steps; None: all."""

    @property
    def setting(self) -> str:
        """What is compared: the arm and its values of the grid. ``lora r8 · epochs 2``."""
        return " · ".join(
            [self.arm, *(f"{key.rpartition('.')[2]} {_short(value)}" for key, value in self.values.items())]
        )

    @property
    def name(self) -> str:
        """The name of its run folder: what people would call it, and a digest of all that decides its result.

        Values that are left at their defaults are not in it, so that a study goes on after an upgrade brought new ones.
        """
        unlike = {"folder", "overwrite", "device", "memory"}
        recipe = self.recipe.model_dump(mode="json", exclude=unlike, exclude_defaults=True)
        if (method := method_of(self.recipe)) != "lora":  # a section's name is its default
            recipe["method.name"] = method
        digest = hashlib.sha256(json.dumps(recipe, sort_keys=True).encode()).hexdigest()[:8]
        words = [self.setting, f"{self.rate:g}", f"seed {self.seed}", *([f"{self.steps} steps"] if self.steps else [])]
        return f"{re.sub(r'[^a-z0-9.]+', '-', ' '.join(words).lower()).strip('-.')[:80]}-{digest}"

    def of_steps(self, steps: int) -> Cell:
        """The same with so many steps."""
        training = self.recipe.training.model_copy(update={"steps": steps})
        recipe = self.recipe.model_copy(update={"training": training})
        return Cell(self.arm, self.values, self.rate, self.seed, recipe, steps)

    def in_folder(self, folder: Path, data_root: str | None = None) -> Recipe:
        """Its recipe, with its run folder in the study's ``folder``, and its data in ``data_root``."""
        recipe = _rooted(self.recipe, data_root)
        return recipe.model_copy(update={"folder": str(folder / "cells" / self.name)})


@dataclass(frozen=True)
class Setting:
    """What is compared with others: an arm, at one combination of the grid. ``cells[seed, rate]`` are its runs."""

    name: str
    cells: Mapping[tuple[int, float], Cell]

    @property
    def first(self) -> Cell:
        """Its first cell; the others have another rate or seed."""
        return next(iter(self.cells.values()))

    @property
    def rates(self) -> tuple[float, ...]:
        """The rates that are tried."""
        return tuple(dict.fromkeys(rate for _, rate in self.cells))

    @property
    def seeds(self) -> tuple[int, ...]:
        """The first tries the rates."""
        return tuple(dict.fromkeys(seed for seed, _ in self.cells))


def settings_of(study: StudySection) -> list[Setting]:
    """Every setting with all its cells. Raises RecipeError naming the arm, or the field, that makes no recipe."""
    values, source = _shared(study)
    arms = study.arms or {"the recipe": {}}
    combinations = list(_combinations(study.grid))
    for key in {*(key for one in combinations for key in one), *(key for arm in arms.values() for key in arm)}:
        if key in OURS:
            raise RecipeError(f"'{key}' is set by an arm or the grid; leave it out: {OURS[key]}.")
    for key, other in OWN_KEY.items():
        if any(key in one for one in combinations):
            raise RecipeError(f"'{key}' is in the grid; expected its values as '{other}: […]'.")
    tasks = Recipe.from_dict({**values, "folder": None}, source=source).evaluation.tasks
    named = {task.name for task in tasks}
    if "divergence" in study.measure and not any(kind_of(task) == "text" for task in tasks):
        raise RecipeError(
            f"measure has divergence, but {source} has no task of kind text to measure it on; add one to evaluation.tasks."
        )
    if unknown := [name for name in study.forgetting if name not in named]:
        raise RecipeError(
            f"forgetting names {listed(unknown)}; expected names of evaluation.tasks in {source} ({listed(named) if named else 'it has none'})."
        )
    found: dict[str, Setting] = {}
    digests: dict[str, str] = {}
    for arm, changes in arms.items():
        for combination in combinations:
            cells = dict(_cells(study, values, source, arm, changes, combination))
            first = next(iter(cells.values()))
            if (same := digests.setdefault(first.name.rpartition("-")[2], first.setting)) != first.setting:
                raise RecipeError(f"'{first.setting}' and '{same}' are the same recipe; leave one of them out.")
            found[first.setting] = Setting(first.setting, cells)
    if len(found) < len(digests):
        raise RecipeError("Two settings have one name; give the arms names that differ in more than signs.")
    return list(found.values())


def _shared(study: StudySection) -> tuple[dict[str, Any], str]:
    """The values that every cell begins with, and where they are from."""
    if isinstance(study.recipe, str):
        values, _ = read_file(Path(study.recipe))
        return values, study.recipe
    return study.recipe, "the study's recipe"


def _combinations(grid: Mapping[str, list[Any]]) -> Iterator[dict[str, Any]]:
    """By key, what one setting takes of each of the grid's fields."""
    for chosen in itertools.product(*grid.values()):
        together: dict[str, Any] = {}
        for key, value in zip(grid, chosen, strict=True):
            several = isinstance(value, Mapping) and "name" not in value  # a section has a name
            together |= value if several else {key: value}
        yield together


def _cells(
    study: StudySection,
    shared: dict[str, Any],
    source: str,
    arm: str,
    changes: Mapping[str, Any],
    grid: Mapping[str, Any],
) -> Iterator[tuple[tuple[int, float], Cell]]:
    values, changes = shared, dict(changes)
    own_rates = changes.pop("rates", None)
    for key, value in {**changes, **grid}.items():
        values = with_value(Recipe, values, key.split("."), value, f"'{key}' of arm '{arm}'")
    where = f"arm '{arm}' of {source}" + (f" with {_short(dict(grid))}" if grid else "")
    recipe = Recipe.from_dict({**values, "folder": None, "overwrite": False}, source=where)
    try:
        rates = tuple(map(float, own_rates)) if own_rates else study.rates or (recipe.training.learning_rate,)
    except (TypeError, ValueError):
        raise RecipeError(f"rates of arm '{arm}' are {_short(own_rates)}; expected a list of learning rates.") from None
    if len(set(rates)) > 1 and not (recipe.data.held_out or recipe.data.held_out_fraction):
        raise RecipeError(f"{where} has several rates and holds nothing out to choose by; set data.held_out_fraction.")
    for seed, rate in itertools.product(dict.fromkeys(study.seeds), dict.fromkeys(rates)):
        training = recipe.training.model_copy(update={"learning_rate": rate, "seed": seed})
        yield (seed, rate), Cell(arm, grid, rate, seed, recipe.model_copy(update={"training": training}))


def _rooted(recipe: Recipe, root: str | None) -> Recipe:
    """The recipe with relative paths of data inside ``root``, also those of tasks; a hub id stays one."""
    if root is None:
        return recipe
    folder = Path(root).expanduser()

    def inside(path: str) -> str:
        there = folder / path
        return str(there) if there.suffix or there.exists() else path

    data, evaluation = recipe.data, recipe.evaluation
    train = inside(data.train) if isinstance(data.train, str) else [inside(path) for path in data.train]
    held_out = None if data.held_out is None else inside(data.held_out)
    tasks = tuple(
        task if task.data is None else task.model_copy(update={"data": inside(task.data)}) for task in evaluation.tasks
    )
    return recipe.model_copy(
        update={
            "data": data.model_copy(update={"train": train, "held_out": held_out}),
            "evaluation": evaluation.model_copy(update={"tasks": tasks}),
        }
    )


def held_equal(settings: list[Setting]) -> tuple[dict[str, Any], list[str]]:
    """(what every cell has alike, by key; the keys that differ): the page says both."""
    flat = [_flat(cell.recipe.model_dump(mode="json")) for setting in settings for cell in setting.cells.values()]
    keys = dict.fromkeys(key for one in flat for key in one)
    differ = [key for key in keys if len({json.dumps(one.get(key, "—"), sort_keys=True) for one in flat}) > 1]
    return {key: flat[0][key] for key in keys if key not in differ}, differ


def _flat(values: Mapping[str, Any], before: str = "") -> dict[str, Any]:
    found: dict[str, Any] = {}
    for key, value in values.items():
        found |= _flat(value, f"{before}{key}.") if isinstance(value, Mapping) and value else {f"{before}{key}": value}
    return found


def method_of(recipe: Recipe) -> str:
    """Its method's name, or those of several."""
    return " + ".join(part.name for part in parts_of(recipe.method))


def _short(value: Any) -> str:
    """A value of the grid for people: ``{'name': 'dora', 'r': 8}`` → ``dora r 8``."""
    if isinstance(value, Mapping):
        return " ".join(
            _short(part) if key == "name" else f"{key.rpartition('.')[2]} {_short(part)}" for key, part in value.items()
        )
    if isinstance(value, list | tuple):
        return "+".join(map(_short, value)) or "none"
    return f"{value:g}" if isinstance(value, float) else str(value)
