"""Threads by what other programs leave free."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from qlora.machine import cores

STAT = (
    "cpu  0 0 0 0\ncpu0 {} 0 {} 900 50 0 0 0 0 0\ncpu1 10 5 0 900 50 1 2 3 0 0\ncpu12 9999 0 0 0 0 0 0 0 0 0\nintr 5\n"
)


@pytest.mark.skipif(not Path("/proc/stat").exists(), reason="only Linux says how busy its cores are")
def test_processes_that_keep_every_core_busy_are_seen() -> None:
    """However busy this machine is otherwise."""
    count = len(os.sched_getaffinity(0))
    busy = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(count)]
    try:
        assert (found := cores.used_by_others()) is not None
        assert found > 0.5 * count
        assert cores.threads_for(count) <= 1 + count // 2
    finally:
        for process in busy:
            process.kill()
            process.wait()


def test_time_is_counted_of_the_cores_that_this_process_has(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cores, "_cores", lambda: {0, 1})
    (tmp_path / "stat").write_text(STAT.format(100, 20))
    assert cores._busy_seconds(tmp_path / "stat") == 141 / os.sysconf("SC_CLK_TCK")


@pytest.mark.parametrize(
    ("there", "busy", "threads"),
    [(2, 0.0, 2), (2, 0.29, 2), (2, 0.31, 1), (2, 1.0, 1), (2, 9.0, 1), (16, 0.2, 16), (16, 1.0, 15), (16, 3.5, 12), (4, None, 4)],
)  # fmt: skip
def test_a_thread_has_a_core_for_itself(
    monkeypatch: pytest.MonkeyPatch, there: int, busy: float | None, threads: int
) -> None:
    monkeypatch.setattr(cores, "_cores", lambda: set(range(there)))
    monkeypatch.setattr(cores, "used_by_others", lambda: busy)
    assert cores.threads_for(there) == threads


def test_fewer_threads_than_are_free_stay_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cores, "_cores", lambda: set(range(16)))
    monkeypatch.setattr(cores, "used_by_others", lambda: 3.0)
    assert [cores.threads_for(number) for number in (1, 8, 13, 14)] == [1, 8, 13, 13]


def test_this_process_is_none_of_the_others(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two core-seconds more, of which it used half of one, in a quarter of a second."""
    told, spent, clock = iter([5.0, 7.0]), iter([1.0, 1.5]), iter([10.0, 10.25])
    monkeypatch.setattr(cores, "_busy_seconds", lambda: next(told))
    monkeypatch.setattr("time.process_time", lambda: next(spent))
    monkeypatch.setattr("time.perf_counter", lambda: next(clock))
    monkeypatch.setattr("time.sleep", lambda _: None)
    assert cores.used_by_others() == 6.0


def test_nothing_is_known_elsewhere(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr("os.sched_getaffinity", raising=False)
    assert cores.used_by_others() is None
    assert cores.threads_for(8) == 8
