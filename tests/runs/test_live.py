"""A run in a notebook: its bar and curve, and pages and texts that stay what they are."""

from __future__ import annotations

import json
import re
from pathlib import Path

from qlora.files.html import as_frame, as_text
from qlora.reporting import read_records
from qlora.runs.live import HEIGHT, WIDTH, drawn


def folder_with(place: Path, losses: list[float], steps: int) -> Path:
    (place / "recipe.yaml").write_text("data: {train: my.jsonl}", encoding="utf-8")
    (place / "plan.json").write_text(json.dumps({"steps": steps}), encoding="utf-8")
    lines = [{"step": number, "loss": loss, "seconds": 30.0} for number, loss in enumerate(losses, 1)]
    (place / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    return place


def test_the_bar_and_the_curve_are_those_of_the_metrics(tmp_path: Path) -> None:
    shown = drawn(read_records(folder_with(tmp_path, [3.0, 2.5, 1.0], steps=9)))
    assert '<progress max="9" value="3">' in shown
    assert "step 3 of 9, loss 1.0000, 3 min left" in shown
    (points,) = re.findall(r'points="([^"]*)"', shown)
    across, down = zip(*[map(float, point.split(",")) for point in points.split()], strict=True)
    assert list(across) == sorted(across)
    assert list(down) == sorted(down)  # losses fall, and so does the line
    assert all(0 <= x <= WIDTH for x in across)
    assert all(0 <= y <= HEIGHT for y in down)


def test_before_there_is_a_curve_there_is_the_bar(tmp_path: Path) -> None:
    for losses in ([], [2.0]):
        shown = drawn(read_records(folder_with(tmp_path, losses, steps=5)))
        assert f"step {len(losses)} of 5" in shown
        assert "<svg" not in shown


def test_what_stands_in_data_stays_text() -> None:
    hostile = '<script>alert(1)</script> & "quotes"'
    shown = as_text(hostile, (hostile, True))
    assert "<script" not in shown
    assert shown.count("&lt;script&gt;") == 2
    assert shown.count("<mark>") == 1
    assert '"quotes"' not in as_frame(hostile)
