"""Which cells come next, of cells that nobody runs."""

from __future__ import annotations

import math
from typing import Any

import pytest

from qlora.errors import RunError
from qlora.studies.schedule import Expected, due, halvings_within, needed, rungs, within
from qlora.studies.spec import Cell, Setting, StudySection, settings_of


def study(**values: Any) -> StudySection:
    recipe = {"data": {"train": "some.jsonl", "held_out": "other.jsonl"}, "training": {"steps": 100}}
    return StudySection.model_validate({"recipe": recipe, "arms": {"a": {}, "b": {"method.r": 8}}, **values})


def run(settings: list[Setting], rounds: dict[str, list[int | None]], loss: Any) -> list[Cell]:
    """Every cell in the order in which it would run alone, with ``loss(cell)``."""
    losses: dict[str, float] = {}
    order = []
    while waiting := due(settings, rounds, losses):
        order.append(waiting[0])
        losses[waiting[0].name] = loss(waiting[0])
    return order


def test_rates_are_tried_with_the_first_seed_and_the_best_is_repeated() -> None:
    settings = settings_of(study(rates=[1e-4, 1e-3, 1e-2], seeds=[3, 5]))
    best = {"a": 1e-3, "b": 1e-2}
    order = run(settings, {"a": [None], "b": [None]}, lambda cell: abs(math.log(cell.rate / best[cell.arm])))
    assert [(cell.arm, cell.rate, cell.seed) for cell in order] == [
        *(("a", rate, 3) for rate in (1e-4, 1e-3, 1e-2)),
        *(("b", rate, 3) for rate in (1e-4, 1e-3, 1e-2)),
        ("a", 1e-3, 5),
        ("b", 1e-2, 5),
    ]


def test_of_each_round_the_better_half_goes_on() -> None:
    (setting,) = settings_of(study(arms={}, rates=[1e-5, 1e-4, 1e-3, 1e-2, 1e-1]))
    rounds = rungs(setting, 100, 2)
    assert rounds == [25, 50, None]
    order = run([setting], {setting.name: rounds}, lambda cell: abs(math.log(cell.rate / 1e-3)) + (cell.rate > 1e-3))
    tried = [(cell.steps, cell.rate) for cell in order]
    assert tried == [
        *((25, rate) for rate in (1e-5, 1e-4, 1e-3, 1e-2, 1e-1)),
        *((50, rate) for rate in (1e-4, 1e-3, 1e-2)),
        *((None, rate) for rate in (1e-4, 1e-3)),
    ]
    assert [cell.recipe.training.steps for cell in order[:1] + order[-1:]] == [25, 100]


def test_a_failed_rate_is_never_the_best_and_a_setting_that_only_failed_has_no_repeats() -> None:
    settings = settings_of(study(rates=[1e-3, 1e-2], seeds=[0, 1]))
    order = run(settings, {"a": [None], "b": [None]}, lambda c: math.inf if c.arm == "b" or c.rate == 1e-3 else 9.0)
    assert [(cell.arm, cell.rate) for cell in order if cell.seed == 1] == [("a", 1e-2)]


@pytest.mark.parametrize(
    ("hours", "halvings", "cells"),
    # 2 arms of 4 rates: 8 · 110 s; with 1 halving 8 · 60 + 4 · 110; with 2 8 · 35 + 4 · 60 + 2 · 110
    [(880, 0, 8), (879, 2, 14), (740, 2, 14), (200, 2, 14)],
)
def test_the_fewest_halvings_that_keep_to_the_budget(hours: float, halvings: int, cells: int) -> None:
    settings = settings_of(study(rates=[1e-4, 1e-3, 1e-2, 1e-1]))
    expected = {one.name: Expected(100, 1.0, 10.0, 0, 0) for one in settings}
    found = halvings_within(settings, expected, hours)
    assert (found if found < 3 else 2, needed(settings, expected, found)[0]) == (halvings, cells)


def test_a_budget_below_one_cell_is_refused_in_hours() -> None:
    settings = settings_of(study())
    expected = {one.name: Expected(3600, 1.0, 0.0, 0, 0) for one in settings}
    with pytest.raises(RunError, match=r"One cell takes about 1 hours .* hours is 0.5; give it more"):
        halvings_within(settings, expected, 1800)


def test_what_would_end_after_the_budget_is_left_out() -> None:
    settings = settings_of(study(rates=[1e-3, 1e-2]))
    cells = due(settings, {"a": [None], "b": [None]}, {})
    fit, out = within(cells, lambda cell: 100.0, 250.0, 500.0)
    assert (fit, out) == (cells[:2], cells[2:])
