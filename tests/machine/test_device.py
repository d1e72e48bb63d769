"""The ground: devices by name, dtypes by device, random state put back, bytes for people, room on the disk."""

from __future__ import annotations

import gc
import shutil
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace

import numpy
import pytest
import torch

from qlora.errors import DoesNotFitError, RecipeError
from qlora.machine import cores, device, disk
from qlora.machine.processes import Processes

CPU = torch.device("cpu")
NAMES = (  # of a control group's files, in version 2 and 1
    {"limit": "memory.max", "used": "memory.current", "stat": "memory.stat"},
    {"limit": "memory.limit_in_bytes", "used": "memory.usage_in_bytes", "stat": "memory.stat"},
)


def test_devices_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    assert device.resolve_device("cpu") == CPU
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert device.resolve_device("auto") == CPU
    for name in ("cuda", "cuda:3"):
        with pytest.raises(RecipeError, match="0 CUDA devices"):
            device.resolve_device(name)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "set_device", lambda chosen: None)
    assert device.resolve_device("auto") == torch.device("cuda", 0)
    assert device.resolve_device("cuda:1") == torch.device("cuda", 1)
    for name in ("cuda:2", "cuda:999"):  # torch.device("cuda:999").index is -25
        with pytest.raises(RecipeError, match="2 CUDA devices"):
            device.resolve_device(name)


def test_each_of_several_processes_takes_its_own_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setattr(device, "here", lambda: Processes(rank=3, size=4, local_rank=1))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "set_device", lambda chosen: None)
    assert device.resolve_device("auto") == device.resolve_device("cuda") == torch.device("cuda", 1)
    assert device.resolve_device("cpu") == CPU
    with pytest.raises(RecipeError, match="each of which takes a GPU of its own"):
        device.resolve_device("cuda:0")
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    with pytest.raises(
        RecipeError, match="Process 1 of this machine wants a GPU, but this machine shows 1 CUDA device"
    ):
        device.resolve_device("auto")


def test_a_containers_limit_counts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def write(folder: Path, limit: str, **files: str) -> None:
        folder.mkdir(exist_ok=True)
        for name, text in {"limit": limit, **files}.items():
            (folder / NAMES[folder.name == "memory"][name]).write_text(text + "\n")

    assert device._container(tmp_path) == (0, 0)
    write(tmp_path, "max", used="700000000", stat="anon 1\ninactive_file 200000000")
    assert device._container(tmp_path) == (0, 0)
    write(tmp_path / "memory", str(2**63 - 4096), used="5", stat="total_inactive_file 1")
    assert device._container(tmp_path) == (0, 0)
    write(tmp_path / "memory", "900", used="500", stat="total_inactive_file 100")
    assert device._container(tmp_path) == (900, 400)
    write(tmp_path, "1000000000")
    assert device._container(tmp_path) == (10**9, 5 * 10**8)
    monkeypatch.setattr(device, "_container", lambda: (10**9, 5 * 10**8))
    assert device.total_memory_bytes(CPU) == (5 * 10**8, 10**9)
    monkeypatch.setattr(device, "_container", lambda: (10**9, 2 * 10**9))
    assert device.total_memory_bytes(CPU)[0] == 0


def test_a_containers_cores_are_known(tmp_path: Path) -> None:
    (tmp_path / "cpu").mkdir()

    def write(name: str, text: str) -> None:
        (tmp_path / name).write_text(text + "\n")

    assert cores.allowed_cores(tmp_path) is None
    write("cpu/cpu.cfs_quota_us", "-1")
    write("cpu/cpu.cfs_period_us", "100000")
    assert cores.allowed_cores(tmp_path) is None
    write("cpu/cpu.cfs_quota_us", "50000")
    assert cores.allowed_cores(tmp_path) == 1
    write("cpu.max", "max 100000")
    assert cores.allowed_cores(tmp_path) == 1  # version 1 still says so
    write("cpu.max", "350000 100000")
    assert cores.allowed_cores(tmp_path) == 4
    write("cpu.max", "not a number")
    assert cores.allowed_cores(tmp_path) == 1


def test_compute_dtype_is_what_the_device_does_well(monkeypatch: pytest.MonkeyPatch) -> None:
    cuda = torch.device("cuda", 0)
    assert device.resolve_compute_dtype(CPU) == torch.float32
    assert device.resolve_compute_dtype(CPU, "bf16") == torch.bfloat16
    for supported, expected in ((True, torch.bfloat16), (False, torch.float16)):  # a T4 would emulate bf16
        monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation, s=supported: s)
        assert device.resolve_compute_dtype(cuda) == expected
    assert [device.dtype_name(dtype) for dtype in device.DTYPES.values()] == ["fp32", "bf16", "fp16"]


def test_random_state_comes_back() -> None:
    state = device.rng_state(CPU)
    again = torch.rand(3)
    assert not torch.equal(torch.rand(3), again)
    device.set_rng_state(state, CPU)
    assert torch.equal(torch.rand(3), again)


def test_bytes_for_people() -> None:
    shown = {512: "512 B", 2048: "2.0 KiB", 12 * 1024**2: "12.0 MiB", 5 * 1024**3 // 4: "1.25 GiB"}
    assert {count: disk.bytes_text(count) for count in shown} == shown


def test_memory_of_this_process_and_machine() -> None:
    free, total = device.total_memory_bytes(CPU)
    assert 0 < free <= total
    before = device.peak_memory_bytes(CPU)
    block = numpy.ones(60_000_000 + before // 8)  # more than was ever held
    assert device.peak_memory_bytes(CPU) >= before + 400_000_000
    assert block[-1] == 1
    assert 2**20 < before < total


def test_room_on_the_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda place: SimpleNamespace(free=1000 if place == tmp_path else 0))
    disk.require_disk(tmp_path / "not" / "yet", 1000, "It")
    with pytest.raises(DoesNotFitError, match=r"It needs 1001 B"):
        disk.require_disk(tmp_path / "not" / "yet", 1001, "It")
    assert not (tmp_path / "not").exists()


def test_cache_folder(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("QLORA_CACHE", "/somewhere")
    assert disk.cache_folder() == Path("/somewhere")
    monkeypatch.delenv("QLORA_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", "/cache")
    assert disk.cache_folder() == Path("/cache/qlora")
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert disk.cache_folder() == Path.home() / ".cache/qlora"


class FakeCuda:
    """A machine with two cards, of which each thread's current one is the first. What is called is kept with that card."""

    def __init__(self, patched: pytest.MonkeyPatch, answer: int = 0) -> None:
        self.calls: list[tuple[str, int | None]] = []
        self.answer, self.current = answer, threading.local()
        patched.setattr(torch.cuda, "cudart", lambda: self)
        patched.setattr(torch.cuda, "device", self.device)
        patched.setattr(torch, "zeros", lambda count, device: self.calls.append(("zeros", torch.device(device).index)))

    @contextmanager
    def device(self, chosen: torch.device) -> Iterator[None]:
        self.current.index = chosen.index
        yield
        self.current.index = 0

    def __getattr__(self, name: str) -> Callable[..., int]:
        def call(*_: int) -> int:
            self.calls.append((name, getattr(self.current, "index", 0)))
            return self.answer

        return call


def test_host_memory_is_locked_for_the_runs_card(monkeypatch: pytest.MonkeyPatch) -> None:
    """A thread that streams layers has the first card as its own, and a context there takes memory of another's run."""
    second, fake = torch.device("cuda", 1), FakeCuda(monkeypatch)
    with ThreadPoolExecutor(1) as worker:
        memory = worker.submit(device.host_bytes, 4096, second).result()
    assert memory.numel() == 4096
    del memory
    gc.collect()
    assert fake.calls == [("cudaHostRegister", 1), ("cudaHostUnregister", 1)]


def test_a_refusal_to_lock_is_heard_on_the_runs_card(monkeypatch: pytest.MonkeyPatch) -> None:
    fake = FakeCuda(monkeypatch, answer=2)
    with pytest.warns(UserWarning, match="refuses to lock"):
        device.host_bytes(4096, torch.device("cuda", 1))
    assert fake.calls == [("cudaHostRegister", 1), ("zeros", 1)]


def test_versions_name_what_decides_the_numbers() -> None:
    found = device.versions()
    assert found["torch"] == torch.__version__
    assert all(found[name] for name in ("python", "qlora", "transformers", "bitsandbytes", "safetensors"))


def test_the_heap_is_trimmed_where_rows_left_a_twentieth_in_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    """By the most that a micro-batch left in a trimmed heap: what one left in pieces is no measure, a longer row's own is."""
    held, trims = [0], []
    monkeypatch.setattr(device, "_fields", lambda path: {"VmRSS": held[0]})
    monkeypatch.setattr(device, "trim_heap", lambda: trims.append(held[0]))
    monkeypatch.setattr(device.sys, "platform", "linux")
    heap = device.TrimmedHeap(torch.device("cpu"))
    measured = [(300, 100), (100, 104), (104, 106), (106, 115), (115, 120), (120, 122), (122, 118), (118, 118)]
    for before, after in measured:
        held[0] = before
        with heap:
            held[0] = after
    assert trims == [300, 106, 122]  # 115 after a trim is a longer row's own, by which the next are measured
    with device.TrimmedHeap(torch.device("cuda")):
        held[0] = 500
    assert len(trims) == 3  # asks nobody


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="only Linux forgets a process's peak")
def test_a_peak_that_is_forgotten_tells_of_what_follows() -> None:
    """Of two cells of a study in one process the second has no part of the first one's peak."""
    device.forget_peak_memory(CPU)
    before = device.peak_memory_bytes(CPU)
    large = torch.ones(100 * 2**20)
    assert device.peak_memory_bytes(CPU) > before + 300 * 2**20
    del large
    high = device.peak_memory_bytes(CPU)
    assert device.reset_peak_memory(CPU)
    assert device.peak_memory_bytes(CPU) == high  # as if nothing had happened
    device.forget_peak_memory(CPU)
    assert device.peak_memory_bytes(CPU) < high - 300 * 2**20
