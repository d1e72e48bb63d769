"""The processes of a run: who they are, what each gets, and what one alone tells itself."""

from __future__ import annotations

import itertools
import time
from pathlib import Path

import pytest
import torch

from qlora.errors import RecipeError
from qlora.machine import processes
from qlora.machine.processes import ALONE, Processes, buckets, here
from tests.together import together


@pytest.mark.parametrize("size", [1, 2, 3, 7])
@pytest.mark.parametrize("count", [0, 1, 5, 16])
def test_shares_are_all_there_is_in_order_and_even(size: int, count: int) -> None:
    things, each = list(range(count)), [Processes(rank, size) for rank in range(size)]
    shares = [things[one.share(count)] for one in each]
    assert list(itertools.chain(*shares)) == things
    assert max(map(len, shares)) == each[0].most(count)
    assert max(map(len, shares)) - min(map(len, shares)) <= 1


def test_one_alone_tells_itself() -> None:
    values = torch.tensor([1.5])
    ALONE.sum([values])
    ALONE.copy([values])
    ALONE.barrier()
    assert ALONE.main
    assert values.item() == 1.5
    assert ALONE.gather(1, 2) == [[1, 2]]
    assert ALONE.any(True)
    assert not ALONE.any(False)
    assert ALONE.once(lambda: "said") == "said"


def test_what_travels_together_is_of_one_dtype_and_not_too_much(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(processes, "BUCKET", 40)
    tensors = [torch.zeros(5), torch.zeros(4, dtype=torch.float64), torch.zeros(5), torch.zeros(1), torch.zeros(100)]
    found = list(buckets(tensors))
    assert [[one.nbytes for one in bucket] for bucket in found] == [[20, 20], [4], [400], [32]]
    assert all(len({one.dtype for one in bucket}) == 1 for bucket in found)
    assert list(buckets([])) == []


def test_an_environment_that_no_launcher_made(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("RANK", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT", "WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    assert here() is ALONE
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(RecipeError, match="RANK, LOCAL_RANK, MASTER_ADDR, MASTER_PORT are not set"):
        here()
    monkeypatch.setenv("WORLD_SIZE", "two")
    with pytest.raises(RecipeError, match="WORLD_SIZE is 'two'"):
        here()


def one_is_late(folder: Path) -> None:
    """Nobody is through a barrier before the last one has come."""
    for number in range(3):
        if here().main:
            time.sleep(0.2)
            (folder / str(number)).touch()
        here().barrier()
        assert (folder / str(number)).is_file()


@pytest.mark.slow
def test_a_barrier_is_waited_at(tmp_path: Path) -> None:
    together(3, one_is_late, tmp_path)
