"""Rates: the units of what is measured, what is said of a card that is not here, and disks that fail."""

from __future__ import annotations

import errno
import os
import time
from collections.abc import Callable
from dataclasses import astuple
from pathlib import Path

import pytest
import torch

from qlora.machine.cards import card
from qlora.planning import rates as machine
from qlora.planning.rates import NVME, SHARE_OF_MLP, Rate, matrix_rate, measure, rates_of

CPU = torch.device("cpu")


def test_a_card_that_is_not_here_says_what_is_assumed() -> None:
    rates = rates_of(card("4090"))
    assert (rates.matrix.low, rates.matrix.expected, rates.matrix.high) == pytest.approx((57.82e12, 82.6e12, 107.38e12))
    assert rates.copies.expected == 25e9
    assert rates.disk == Rate(*NVME)
    assert "Assumed: 50% (35% to 65%) of the data sheet's 165.2 TFLOP/s" in str(rates)
    assert "Assumed: an NVMe disk" in str(rates)
    lent = rates_of(card("4090"), Rate(5.0, 10.0, 20.0))
    assert lent.disk == Rate(5.0, 10.0, 20.0)
    assert "NVMe" not in str(lent)


def test_units_by_a_clock_that_ticks_a_second(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every measurement takes exactly one second, so every rate is its own amount."""
    ticks = iter(range(10**6))
    monkeypatch.setattr(machine.time, "perf_counter", lambda: float(next(ticks)))
    rates = measure(CPU, torch.float32, tmp_path)
    whole = [edge * 3 * 2 * 256 * 512 * 2048 for edge in (0.9, 1.0, 1.1)]
    assert astuple(rates.matrix) == pytest.approx([share * one for share, one in zip(SHARE_OF_MLP, whole, strict=True)])
    assert rates.dequantise.expected == 4 * 512 * 2048
    assert rates.disk is not None
    assert rates.copies.expected == rates.disk.expected == 16 * 2**20


def test_measured_quickly_and_nothing_is_left_behind(tmp_path: Path) -> None:
    state, begin = torch.get_rng_state(), time.process_time()
    rates = measure(CPU, torch.float32, tmp_path)
    assert time.process_time() - begin < 10  # half a second on an idle core
    assert list(tmp_path.iterdir()) == []
    assert torch.equal(torch.get_rng_state(), state)
    found = [rate for rate in vars(rates).values() if isinstance(rate, Rate)]
    assert len(found) == 4
    for rate in found:
        assert 0 < rate.low < rate.expected < rate.high
    # between an old core and a large server: a slip of a unit is further off
    assert 1e8 < rates.matrix.expected < 1e14
    assert "matrix products" in str(rates)
    assert 0.2 < matrix_rate(CPU, torch.float32) / rates.matrix.expected < 5


def test_a_folder_that_is_not_there_yet_is_measured_above_it(tmp_path: Path) -> None:
    assert measure(CPU, torch.float32, tmp_path / "not" / "yet").disk is not None
    assert list(tmp_path.iterdir()) == []


def refused(number: int) -> Callable[[int], None]:
    def fail(_: int) -> None:
        raise OSError(number, os.strerror(number))

    return fail


@pytest.mark.parametrize(("number", "reason"), [(errno.ENOSPC, "No space left"), (errno.EIO, "Input/output error")])
def test_a_disk_that_fails_is_a_sentence(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int, reason: str
) -> None:
    monkeypatch.setattr(machine.os, "fsync", refused(number))
    rates = measure(CPU, torch.float32, tmp_path)
    assert rates.disk is None
    assert f"The disk of '{tmp_path}' was not measured: {reason}" in str(rates)
    assert list(tmp_path.iterdir()) == []


def test_a_folder_that_cannot_be_written_to_is_a_sentence(tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.write_text("no folder")
    rates = measure(CPU, torch.float32, file)
    assert rates.disk is None
    assert "was not measured: Not a directory." in str(rates)
    assert file.read_text() == "no folder"


def test_a_system_without_fadvise_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(machine.os, "posix_fadvise")
    rates = measure(CPU, torch.float32, tmp_path)
    assert rates.disk is not None
    assert "the disk's reading rate is that of its cache" in str(rates)


def test_bf16_is_taken_where_the_processor_has_it_and_is_clearly_faster(monkeypatch: pytest.MonkeyPatch) -> None:
    """By the median of turns; a processor without instructions for it is not even asked."""

    def with_seconds(*pairs: tuple[float, float], flags: bool = True) -> bool:
        seconds = iter([[one] for pair in pairs for one in pair])
        monkeypatch.setattr(machine, "_times", lambda work, device, budget: (work(), next(seconds))[1])
        for name in ("_is_avx512_bf16_supported", "_is_amx_tile_supported"):
            monkeypatch.setattr(torch.cpu, name, lambda: flags)
        return machine.faster_in_bf16()

    assert with_seconds((3.0, 1.0), (1.0, 9.0), (2.0, 1.0), (2.0, 1.0), (1.0, 1.0))  # others took the cores twice
    assert not with_seconds(*[(1.2, 1.0)] * 5)
    assert not with_seconds(*[(0.02, 1.0)] * 5)
    assert not with_seconds(flags=False)


def test_measuring_this_processor_leaves_the_random_state_alone() -> None:
    before = torch.get_rng_state()
    assert machine.faster_in_bf16() in (True, False)
    assert torch.equal(torch.get_rng_state(), before)
