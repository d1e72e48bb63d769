"""What a study's drawings do with what is drawn."""

from __future__ import annotations

import pytest

from qlora.studies.plots import Plot, plot


def drawn(*values: float, error: float = 0.0) -> Plot:
    made = plot("t", "x", "y", {"a": [(float(at), value, "", error, 0.0) for at, value in enumerate(values)]})
    assert made is not None
    return made


def heights(of: Plot) -> list[float]:
    return [point.y for point in of.series[0].points]


def test_losses_that_lie_far_apart_are_drawn_by_their_logarithm() -> None:
    near = heights(drawn(0.2, 0.4, 0.8))
    assert near[0] - near[1] == pytest.approx((near[1] - near[2]) / 2, abs=0.2)
    far = drawn(0.02, 0.2, 2.0)
    at = heights(far)
    assert at[0] - at[1] == pytest.approx(at[1] - at[2], abs=0.2)
    ticks = {label: place for place, label in far.y_ticks}
    assert ticks["0.02"] == at[0]
    assert ticks["2"] == at[2]
    _, _, top, bottom = far.frame
    assert all(top <= place <= bottom for place in ticks.values())


@pytest.mark.parametrize("values", [(-1.0, 20.0), (0.0, 20.0), (20.0, 20.0)])
def test_what_has_no_logarithm_is_drawn_as_it_is(values: tuple[float, float]) -> None:
    assert len(drawn(*values).y_ticks) > 2
    assert drawn(0.5, 20.0, error=0.6).y_ticks[0][1].startswith("−")
