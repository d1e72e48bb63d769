"""What a run says while it goes: lines that survive a kill, and plain text where there is no terminal."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest

from qlora.training.log import MetricsLog, Progress, Step


def make_step(number: int, **values: Any) -> Step:
    defaults: dict[str, Any] = {
        "epoch": number / 4, "loss": 1.2345, "learning_rate": 2e-4, "grad_norm": 0.5, "target_tokens": 10, "tokens": 20,
        "tokens_per_second": 1234.5, "peak_memory_bytes": 3 * 1024**3, "seconds": 2.0,
    }  # fmt: skip
    return Step(number=number, **{**defaults, **values})


def test_one_object_a_line_and_whole_after_each_write(tmp_path: Path) -> None:
    log = MetricsLog(tmp_path / "metrics.jsonl")
    for number in (1, 2):
        log.write(make_step(number).metrics())
        lines = (tmp_path / "metrics.jsonl").read_text().splitlines(keepends=True)
        assert len(lines) == number
        assert lines[-1].endswith("}\n")
        assert json.loads(lines[-1])["step"] == number
    MetricsLog(tmp_path / "metrics.jsonl").write({"step": 2, "held_out_loss": 1.5})
    assert len((tmp_path / "metrics.jsonl").read_text().splitlines()) == 3


def test_rewind_drops_what_came_after_and_a_torn_line(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    kept = ['{"step": 0, "held_out_loss": 3.0}', '{"step": 1, "loss": 2.0}', '{"step": 2, "loss": 1.9}']
    path.write_text("\n".join([*kept, '{"step": 3, "loss": 1.8}', "[1]", '{"loss": 1}', '{"step": 2, "lo']), "utf-8")
    log = MetricsLog(path)
    log.rewind(2)
    assert path.read_text().splitlines() == kept
    log.write({"step": 3})
    assert path.read_text().splitlines() == [*kept, '{"step": 3}']
    assert [item.name for item in tmp_path.iterdir()] == ["metrics.jsonl"]


def test_rewind_of_what_is_not_there_is_nothing(tmp_path: Path) -> None:
    MetricsLog(tmp_path / "metrics.jsonl").rewind(5)
    assert not list(tmp_path.iterdir())


def test_plain_lines_for_the_first_and_last_step_and_now_and_then(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = iter([100.0, 101.0, 102.0, 106.0, 107.0])
    monkeypatch.setattr("qlora.training.log.time.monotonic", lambda: next(clock))
    with Progress(5) as progress:
        for number in range(1, 6):
            progress.show(make_step(number))
        progress.say("saved [here]")
    captured = capsys.readouterr()
    assert captured.out == ""
    lines = captured.err.splitlines()
    assert [line.split("  ")[0] for line in lines] == ["step 1/5", "step 4/5", "step 5/5", "saved [here]"]
    assert lines[0] == "step 1/5  loss 1.234  8.0 s left  3.00 GiB  1,234 tokens/s  lr 2.0e-04"
    assert "\x1b" not in captured.err


def test_quiet_says_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    with Progress(2, quiet=True) as progress:
        progress.show(make_step(1))
        progress.say("something")
    assert capsys.readouterr() == ("", "")


def test_a_bar_on_a_terminal(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "120")
    with Progress(5, done=2) as progress:
        progress.show(make_step(3))
        progress.say("saved [here]")
    error = capsys.readouterr().err
    assert "saved [here]" in error
    assert "3/5" in error
    assert "loss 1.234" in error


def test_the_time_left_is_that_of_the_median_step(capsys: pytest.CaptureFixture[str]) -> None:
    progress = Progress(10)
    for number, seconds in enumerate([90.0, 2.0, 2.0, 2.0, 30.0], 1):  # compiling, and a pause
        progress.last_line = 0.0
        progress.show(make_step(number, seconds=seconds))
    assert "  10 s left" in capsys.readouterr().err.splitlines()[-1]


@pytest.mark.parametrize("columns", [20, 40, 69, 70, 120])
def test_a_line_fits_its_terminal(
    columns: int, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in (("FORCE_COLOR", "1"), ("TERM", "xterm"), ("COLUMNS", str(columns))):
        monkeypatch.setenv(name, value)
    with Progress(40_000) as progress:
        progress.show(make_step(12_345, seconds=1.0))
    lines = [re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", line) for line in re.split("[\r\n]+", capsys.readouterr().err)]
    told = next(line for line in lines if "12345/40000" in line)
    assert max(map(len, lines)) <= columns
    assert "…" not in told
    assert ("loss 1.234" in told) == (columns >= 40)
    assert ("7 h 41 min left" in told) == (columns >= 40)
    assert ("━" in told) == (columns >= 70)


@pytest.mark.parametrize(
    ("values", "diverges", "colour"), [({}, False, "34"), ({"note": "It is late."}, False, "33"), ({}, True, "31")]
)
def test_a_bar_is_never_green(
    values: dict[str, str],
    diverges: bool,
    colour: str,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for name, value in (("FORCE_COLOR", "1"), ("TERM", "xterm"), ("COLUMNS", "100")):
        monkeypatch.setenv(name, value)
    with Progress(2) as progress:
        progress.show(make_step(1, **values), diverges)
        progress.show(make_step(2, **values), diverges)
    bars = set(re.findall("\x1b\\[([0-9;]+)m━", capsys.readouterr().err))
    assert colour in bars
    assert not {bar for bar in bars if "32" in bar.split(";")}
