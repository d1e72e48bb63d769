"""Numbers for people."""

from __future__ import annotations

import pytest

from qlora.reporting import figures, read_records
from tests.reporting.conftest import RunFolder, step_line


@pytest.mark.parametrize(
    ("value", "text"),
    [(None, "—"), (950, "950"), (9_999, "9\u202f999"), (48_213, "48.2 k"), (4_884_480, "4.88 M"), (7.24e9, "7.24 B")],
)
def test_count_text(value: float | None, text: str) -> None:
    assert figures.count_text(value) == text


@pytest.mark.parametrize(
    ("value", "digits", "text"),
    [(1.5, 4, "1.500"), (0.000123, 3, "0.000123"), (1.2e-7, 3, "1.20e−7"), (123456.0, 4, "123456"), (9.9996, 4, "10.00"),
     (0, 4, "0"), (-2.5, 2, "−2.5"), (float("inf"), 4, "∞")],
)  # fmt: skip
def test_significant(value: float, digits: int, text: str) -> None:
    assert figures.significant(value, digits) == text


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0.0, "0.0 s"),
        (0.0002, "1 ms"),
        (0.0416, "42 ms"),
        (0.0999, "0.1 s"),
        (4.26, "4.3 s"),
        (59.4, "59 s"),
        (59.7, "1 min 00 s"),
        (372, "6 min 12 s"),
        (11_100, "3 h 05 min"),
    ],
)
def test_duration_text(seconds: float, text: str) -> None:
    assert figures.duration_text(seconds) == text


def test_change_text() -> None:
    assert figures.change_text(2.0, 1.0) == "−50.0 %"
    assert figures.change_text(2.0, 2.2) == "+10.0 %"
    assert figures.change_text(0.0, 1.0) == "—"


def test_summary_sums_over_steps(finished: RunFolder) -> None:
    found = figures.summarise(read_records(finished.path))
    assert (found.tokens, found.target_tokens, found.seconds) == (4000, 2400, 20.0)
    assert found.tokens_per_second == 200.0
    assert found.matrix_share == pytest.approx(200.0 * 6e8 / 2e11)
    assert found.finished
    assert found.before
    assert found.after
    assert (found.before.loss, found.after.loss, found.after.step) == (3.2, 1.6, 40)


def test_an_unfinished_run_compares_with_its_latest_evaluation(begun: RunFolder) -> None:
    scores = [{"step": step, "held_out_loss": loss} for step, loss in ((0, 3.0), (5, 2.5), (10, 2.0))]
    begun.metrics([*scores, *(step_line(step) for step in range(1, 13))])
    found = figures.summarise(read_records(begun.path))
    assert not found.finished
    assert found.before
    assert found.after
    assert (found.before.loss, found.after.loss, found.after.step) == (3.0, 2.0, 10)


def test_a_resumed_run_counts_no_step_twice(begun: RunFolder) -> None:
    begun.metrics([step_line(1), step_line(2), step_line(3, loss=9.0), step_line(3, loss=2.0), step_line(4)])
    records = read_records(begun.path)
    assert [step.number for step in records.steps] == [1, 2, 3, 4]
    assert records.steps[2].values["loss"] == 2.0
    assert figures.summarise(records).tokens == 400
