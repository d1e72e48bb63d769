"""Which cells come next: rates are tried with the first seed, the best of them is repeated with the others, within a budget.

    all rates, a part of the steps ─► the better half, twice as many ─► … ─► the best at full length ─► its other seeds

Successive halving (Jamieson and Talwalkar, AISTATS 2016) over the learning rate alone, on held-out loss; without a budget, or
where it suffices, every rate goes the whole length at once. Pure: knows cells, losses and seconds, and starts nothing.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from qlora.errors import RunError, counted, listed
from qlora.studies.spec import Cell, Setting

HALVINGS = 3  # at most: an eighth of the steps tells little of a rate at full length


@dataclass(frozen=True)
class Expected:
    """What one full-length cell of a setting takes."""

    steps: int
    step_seconds: float
    fixed_seconds: float
    """Whatever the number of steps: loading, planning, measuring before and after."""
    memory_bytes: int
    disk_bytes: int

    def seconds(self, steps: int | None = None) -> float:
        """Of a cell of so many steps; None: of all."""
        return self.fixed_seconds + (steps or self.steps) * self.step_seconds


Losses = Mapping[str, float]
"""By cell name, the held-out loss of those that are done: infinite where one failed."""


def rungs(setting: Setting, steps: int, halvings: int) -> list[int | None]:
    """The steps of each round of tries, None for all of them: 4 rates, 100 steps, 2 halvings → [25, 50, None]."""
    halvings = min(halvings, math.ceil(math.log2(len(setting.rates))))
    parts = [max(1, steps >> count) for count in range(halvings, 0, -1)]
    return [*dict.fromkeys(part for part in parts if part < steps), None]


def tries(setting: Setting, rounds: Sequence[int | None], losses: Losses) -> tuple[list[Cell], float | None]:
    """(the cells of the round that is under way and not done; the best rate once all rounds are done).

    Of each round the better half goes on: 5 rates → 3 → 2. Two that are equal go in the order they are given. The best rate
    is None where not one of the last round came to a loss.
    """
    rates, seed = list(setting.rates), setting.seeds[0]
    for steps in rounds:
        cells = [one if steps is None else one.of_steps(steps) for one in (setting.cells[seed, rate] for rate in rates)]
        if missing := [cell for cell in cells if cell.name not in losses]:
            return missing, None
        by_loss = sorted(cells, key=lambda cell: losses[cell.name])
        kept = [cell.rate for cell in by_loss[: 1 if steps is None else math.ceil(len(cells) / 2)]]
        if steps is None:
            return [], kept[0] if math.isfinite(losses[by_loss[0].name]) else None
        rates = [rate for rate in rates if rate in kept]
    raise AssertionError("the last round is of all steps")


def due(settings: Sequence[Setting], rounds: Mapping[str, Sequence[int | None]], losses: Losses) -> list[Cell]:
    """Every cell that may run now, the first round of all settings before the second of any, and other seeds last."""
    found: list[tuple[int, int, Cell]] = []
    for place, setting in enumerate(settings):
        of_setting = rounds[setting.name]
        missing, best = tries(setting, of_setting, losses)
        for cell in missing:
            found.append((of_setting.index(cell.steps), place, cell))
        if best is None:
            continue
        others = [setting.cells[seed, best] for seed in setting.seeds[1:]]
        found += [
            (len(of_setting) + place_of, place, cell) for place_of, cell in enumerate(others) if cell.name not in losses
        ]
    return [cell for _, _, cell in sorted(found, key=lambda one: one[:2])]


def needed(settings: Sequence[Setting], expected: Mapping[str, Expected], halvings: int) -> tuple[int, float]:
    """(cells, seconds) of a whole study with so many halvings."""
    cells: list[float] = []
    for setting in settings:
        one, left = expected[setting.name], len(setting.rates)
        for steps in rungs(setting, one.steps, halvings):
            cells += [one.seconds(steps)] * left
            left = math.ceil(left / 2)
        cells += [one.seconds()] * (len(setting.seeds) - 1)
    return len(cells), sum(cells)


def halvings_within(settings: Sequence[Setting], expected: Mapping[str, Expected], budget: float | None) -> int:
    """The fewest halvings with which all of it takes at most ``budget`` seconds, or the most there are.

    Raises RunError where not even the shortest full-length cell fits into the budget.
    """
    if budget is None:
        return 0
    shortest = min((one.name for one in settings), key=lambda name: expected[name].seconds())
    if (least := expected[shortest].seconds()) > budget:
        raise RunError(
            f"One cell takes about {least / 3600:.2g} hours ('{shortest}', the shortest), and hours is "
            f"{budget / 3600:g}; give it more, or lower training.steps."
        )
    return next((count for count in range(HALVINGS) if needed(settings, expected, count)[1] <= budget), HALVINGS)


def within(
    cells: Sequence[Cell], seconds: Callable[[Cell], float], spent: float, budget: float | None
) -> tuple[list[Cell], list[Cell]]:
    """(those that end within the budget, started one after the other; those that don't)."""
    if budget is None:
        return list(cells), []
    fit: list[Cell] = []
    for cell in cells:
        if spent + seconds(cell) <= budget:
            fit.append(cell)
            spent += seconds(cell)
    return fit, [cell for cell in cells if cell not in fit]


def left_out(cells: Sequence[Cell]) -> str:
    """A sentence of the cells that the budget had no room for."""
    return (
        f"hours leaves {counted(len(cells), 'cell')} out: {listed([cell.name for cell in cells], 4)}. "
        "The same command with more hours goes on with them."
    )
