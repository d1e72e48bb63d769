"""A loss that diverges is said at the step where it does, once; noise and slow runs are not."""

from __future__ import annotations

import pytest

from qlora.training.diverging import Divergence


def said(losses: list[float]) -> list[int]:
    """The steps at which something is said."""
    watch = Divergence(0.001)
    return [step for step, loss in enumerate(losses, 1) if watch.look(loss)]


@pytest.mark.parametrize(
    ("losses", "steps"),
    [
        ([2.0, 1.9, 1.8, 1.7, 1.8] * 4, []),
        ([2.0] + [9.0] * 20, [6]),  # from the first update on: the base's own loss is what it is compared with
        ([2.0] * 10 + [9.0] * 20, [15]),
        ([2.0] * 10 + [9.0] * 4 + [2.0] * 10, []),  # four hard batches
        ([0.2, 1.1] * 10, []),
        ([0.3] * 8 + [1.2] * 9, []),  # three times as much, and not yet a nat more
        ([2.0] * 6 + [9.0] * 9 + [2.0] * 9 + [9.0] * 9, [11, 29]),  # it came back, and diverges again
    ],
)
def test_it_is_said_once_and_only_where_it_diverges(losses: list[float], steps: list[int]) -> None:
    assert said(losses) == steps


def test_the_sentence_says_what_was_found_and_what_to_do() -> None:
    watch = Divergence(0.001)
    sentence = [watch.look(loss) for loss in [2.0] * 5 + [8.0, 7.5, 9.0, 8.0, 8.0]][-1]
    assert "for 5 steps it was at least 7.50, and it had been 2.00" in sentence
    assert sentence.endswith("training.learning_rate=0.001.")
    assert watch.diverges
