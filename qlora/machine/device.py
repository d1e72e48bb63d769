"""The ground: which device and dtype, random state, peak memory.

Knows torch and the operating system; must not know a model, a recipe's other sections or bitsandbytes.
"""

from __future__ import annotations

import contextlib
import ctypes
import gc
import mmap
import os
import sys
import warnings
import weakref
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TypeVar

import torch

from qlora.errors import DoesNotFitError, RecipeError, first_line
from qlora.machine import DISTRIBUTION
from qlora.machine.disk import bytes_text
from qlora.machine.processes import count, here

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
REFUSALS = (
    "can't allocate memory",  # DefaultCPUAllocator on Linux and macOS
    "not enough memory: you tried to allocate",  # and on Windows
    "CUDA error: out of memory",  # the driver: pinned memory, a kernel's own
    "CUBLAS_STATUS_ALLOC_FAILED",
)
"""What libraries say when memory is refused."""
SMALLEST_CHUNK = 16  # target positions that have logits at once; below it the head is read too often for what is saved
Some = TypeVar("Some")


def resolve_device(name: str = "auto") -> torch.device:
    """``auto``, ``cpu``, ``cuda`` or ``cuda:N`` → the device. One device only; others are left alone. Of several processes
    each takes the GPU of its own number on its machine.

    Raises RecipeError when a CUDA device is asked for and there is none by that number.
    """
    several = count() > 1
    if several and name.startswith("cuda:"):
        raise RecipeError(
            f"device.name is '{name}', but a launcher started {count()} processes, each of which takes a GPU of its own; leave it "
            "out, and choose GPUs by CUDA_VISIBLE_DEVICES."
        )
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    device = torch.device(name)
    if device.type == "cuda":
        there = torch.cuda.device_count() if torch.cuda.is_available() else 0
        index = here().local_rank if several else int(name.partition(":")[2] or 0)  # torch.device reads 999 as -25
        if index >= there:
            wanted = f"Process {index} of this machine wants a GPU" if several else f"device.name is '{name}'"
            raise RecipeError(f"{wanted}, but this machine shows {there} CUDA devices; use 'auto' or 'cpu'.")
        device = torch.device("cuda", index)
        torch.cuda.set_device(device)
    return device


def resolve_compute_dtype(device: torch.device, requested: str = "auto") -> torch.dtype:
    """The dtype of activations. ``auto``: bf16 where CUDA has it in hardware, fp16 on older GPUs, fp32 on CPUs.

    A T4 says yes to bf16 through emulation, which is slower than fp16, so emulation does not count. On CPUs fp32 is the
    one dtype that is fast everywhere: the bf16 backward is up to 60 times slower without AVX512-BF16. A run's plan may find
    that this one is good at bf16 (planning/rates.py).
    """
    if requested != "auto":
        return DTYPES[requested]
    if device.type != "cuda":
        return torch.float32
    return torch.bfloat16 if torch.cuda.is_bf16_supported(including_emulation=False) else torch.float16


def capability(device: torch.device) -> float:
    """CUDA's compute capability, as 8.9, which says what the hardware has; 0 where it is no such device."""
    if device.type != "cuda":
        return 0.0
    major, minor = torch.cuda.get_device_capability(device)
    return major + minor / 10


def dtype_name(dtype: torch.dtype) -> str:
    """``torch.bfloat16`` → ``bf16``."""
    return {value: key for key, value in DTYPES.items()}[dtype]


def rng_state(device: torch.device) -> dict[str, torch.Tensor]:
    """torch's random state, as byte tensors: ``cpu`` and, on a GPU, ``cuda``."""
    state = {"cpu": torch.get_rng_state()}
    if device.type == "cuda":
        state["cuda"] = torch.cuda.get_rng_state(device)
    return state


def set_rng_state(state: dict[str, torch.Tensor], device: torch.device) -> None:
    """Put back what ``rng_state`` returned."""
    torch.set_rng_state(state["cpu"].cpu())
    if device.type == "cuda" and "cuda" in state:
        torch.cuda.set_rng_state(state["cuda"].cpu(), device)


def seed_rng(seed: int, device: torch.device) -> None:
    """``torch.manual_seed`` for the CPU and ``device`` alone; that one looks at every kind of device, for a millisecond each time."""
    torch.default_generator.manual_seed(seed)
    if device.type == "cuda":
        torch.cuda.default_generators[
            torch.cuda.current_device() if device.index is None else device.index
        ].manual_seed(seed)


def peak_memory_bytes(device: torch.device) -> int:
    """The most memory held so far: allocated on the GPU, or resident in this process."""
    return max(peak_since_reset(device), _earlier_peaks.get(str(device), 0))


def reset_peak_memory(device: torch.device) -> bool:
    """Let ``peak_since_reset`` begin anew; False where the system cannot, so that it tells of the whole process.

    ``peak_memory_bytes`` goes on as if nothing had happened.
    """
    before = peak_memory_bytes(device)
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    else:
        try:  # 5 sets the high-water mark of the resident set to what is resident now (Linux 4.0)
            Path("/proc/self/clear_refs").write_text("5")
        except OSError:
            return False
    _earlier_peaks[str(device)] = before
    return True


def forget_peak_memory(device: torch.device) -> None:
    """Let ``peak_memory_bytes`` tell of what follows alone; of the whole process where the system cannot."""
    release_memory(device)
    if reset_peak_memory(device):
        del _earlier_peaks[str(device)]


_earlier_peaks: dict[str, int] = {}
"""By device, the peak before the last reset, which torch and the system forget."""


def peak_since_reset(device: torch.device) -> int:
    """The most memory held since ``reset_peak_memory``."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    try:  # Linux; its ru_maxrss is inherited from the process that started this one
        return _fields("/proc/self/status")["VmHWM"]
    except (OSError, KeyError, ValueError):
        pass
    try:
        import resource
    except ImportError:  # Windows keeps no such count
        return 0
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def ran_out_of_memory(error: BaseException) -> bool:
    """Whether an exception says that memory was refused, of the GPU or of the host, and not something else.

    torch has a class for its own CUDA allocator alone; the CPU's, the driver and cuBLAS complain in words. DoesNotFitError is
    a MemoryError: host memory or a disk for layer inputs.
    """
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return True
    return isinstance(error, RuntimeError) and any(words in str(error) for words in REFUSALS)


def release_memory(device: torch.device) -> None:
    """Give back what nobody holds any more, after memory was refused.

    Only outside of the ``except`` block is that true of the tensors in the frames that the exception went through.
    """
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
    trim_heap()


def in_smaller_parts(
    lengths: Sequence[int],
    at_once: int,
    chunk: int,
    measure: Callable[[int, int, int], list[Some]],
    device: torch.device,
    what: str,
) -> list[Some]:
    """What ``measure(start, stop, chunk)`` gives over rows of ``lengths`` tokens, ``at_once`` of them at a time. Where memory
    runs out it goes on with half as many, and in the end with smaller chunks.

    Raises DoesNotFitError, which names ``what`` was measured, when one row is too much.
    """
    count, start, found = len(lengths), 0, list[Some]()
    while start < count:
        stop = min(start + at_once, count)
        try:
            found += measure(start, stop, chunk)
            start = stop
            continue
        except Exception as error:
            if not ran_out_of_memory(error):
                raise
            reason = first_line(error)
        release_memory(device)  # out here, where the exception no longer holds the tensors of its frames
        if stop - start > 1:
            at_once = (stop - start) // 2
        elif chunk > SMALLEST_CHUNK:
            chunk = max(SMALLEST_CHUNK, chunk // 2)
        else:
            raise DoesNotFitError(
                f"Measuring one {what} of {lengths[start]:,} tokens did not fit into memory ({reason}), and no smaller way is "
                "left; lower data.max_length, or hold out shorter rows."
            )
    return found


def trim_heap() -> None:
    """Give freed memory of the C heap back to the system.

    glibc keeps freed blocks below 32 MiB and cuts them up: merging a 324 MiB file of 8 MiB matrices grew the process by
    180 MiB without this call and by 1 MiB with it, at half a millisecond a call; quantising 7B in pieces grew it by more
    than a GiB. Other systems need no such call.
    """
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None) if sys.platform == "linux" else None
    if trim is not None:
        trim(0)


class TrimmedHeap:
    """Around each micro-batch: trims the C heap of a process that computes on a CPU where rows of many lengths have left it in pieces.

    Rows of other lengths ask for blocks of other sizes, so that what is freed seldom fits again: 5 steps of 4 pairs with a 135M
    model took 1.95 GiB at first and 2.37 at last, with this 1.95 and 2.13. A trim costs a tenth of a second, and as much again while
    the memory comes back; rows of one length do not need any.
    """

    GROWN = 1.05  # of the most that a micro-batch left behind in a heap that was trimmed before it

    def __init__(self, device: torch.device) -> None:
        self._here = device.type == "cpu" and sys.platform == "linux"
        self._most = 0
        self._trimmed = False

    def __enter__(self) -> None:
        if self._here and self._held() > self.GROWN * self._most:
            trim_heap()
            self._trimmed = True

    def __exit__(self, *unused: object) -> None:
        if self._trimmed:
            self._most, self._trimmed = max(self._most, self._held()), False

    def _held(self) -> int:
        return _fields("/proc/self/status")["VmRSS"]


def total_memory_bytes(device: torch.device) -> tuple[int, int]:
    """(free, total) bytes of the device: the GPU's memory, or the machine's. (0, 0) where the system does not tell.

    A container's limit counts where it is lower than the machine's memory.
    """
    if device.type == "cuda":
        free, total = torch.cuda.mem_get_info(device)
        return free, total
    try:
        fields = _fields("/proc/meminfo")
        free, total = fields["MemAvailable"], fields["MemTotal"]
    except (OSError, KeyError, ValueError):
        return 0, 0
    limit, used = _container()
    return (min(free, max(0, limit - used)), min(total, limit)) if limit else (free, total)


def _fields(path: str) -> dict[str, int]:
    """The sizes that a file of ``name: count kB`` lines gives, in bytes."""
    lines = (line.split() for line in Path(path).read_text().splitlines())
    return {words[0].rstrip(":"): int(words[1]) * 1024 for words in lines if len(words) == 3 and words[2] == "kB"}


def _container(root: Path = Path("/sys/fs/cgroup")) -> tuple[int, int]:
    """(limit, used) bytes of the control group that a container runs in, version 2 or 1; (0, 0) without a limit.

    Files that the kernel can drop are not counted as used.
    """
    for folder, limit, used, cache in (
        (root, "memory.max", "memory.current", "inactive_file"),
        (root / "memory", "memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"),
    ):
        try:
            most, held = (folder / limit).read_text().strip(), int((folder / used).read_text())
            counts = dict(line.split() for line in (folder / "memory.stat").read_text().splitlines())
            if most.isdecimal() and int(most) < 2**60:  # version 1 says "none" by a number near 2**63
                return int(most), max(0, held - int(counts.get(cache, 0)))
        except (OSError, ValueError):
            continue
    return 0, 0


def host_bytes(count: int, device: torch.device) -> torch.Tensor:
    """``count`` bytes of host memory, uint8, from which ``device`` copies: page-locked where that is a GPU.

    Locked in place, because torch's own pinned memory is rounded up to a power of two. Where the system refuses (a limit on
    locked memory, a container), it is ordinary memory, with a warning that says what copies from it cost.
    Raises DoesNotFitError where there is no such memory.
    """
    try:
        memory = torch.empty(count, dtype=torch.uint8)
    except RuntimeError as error:
        raise DoesNotFitError(
            f"{bytes_text(count)} of host memory were refused; stop what else is running, or set memory.tier=disk."
        ) from error
    _locked(memory, device)
    return memory


def shared_bytes(count: int, device: torch.device) -> torch.Tensor:
    """``count`` bytes of host memory, uint8, all zero, that are the same for all processes of this machine; locked likewise.

    All of them call it. The memory has no name that a killed run could leave behind (Linux).
    """
    processes = here()
    file = os.memfd_create("qlora") if processes.local_rank == 0 else -1
    if file >= 0:
        os.ftruncate(file, max(1, count))
    pid, number = processes.gather(os.getpid(), file)[processes.rank - processes.local_rank]
    if file < 0:
        file = os.open(f"/proc/{pid:.0f}/fd/{number:.0f}", os.O_RDWR)
    memory = torch.frombuffer(mmap.mmap(file, max(1, count)), dtype=torch.uint8)[:count]
    processes.barrier()  # all have opened it
    os.close(file)
    _locked(memory, device)
    return memory


def _locked(memory: torch.Tensor, device: torch.device) -> None:
    """Page-lock host memory from which a GPU copies; with a warning where the system refuses."""
    if device.type == "cuda" and len(memory) and not _lock(memory, device):
        warnings.warn(
            "The system refuses to lock host memory (ulimit -l?), so copies to the GPU are slow and nothing computes "
            "meanwhile. Raise the limit to have them overlap.",
            stacklevel=3,
        )


def _lock(memory: torch.Tensor, device: torch.device) -> bool:
    """Page-lock ``memory`` for as long as this tensor lives (its views may not outlive it); False where the system refuses.

    For ``device``: each thread has a current GPU of its own, the first one, and would take some hundred MiB of that one.
    """
    runtime: Any = torch.cuda.cudart()
    place, size = memory.data_ptr(), memory.numel()
    with torch.cuda.device(device):
        refused = int(runtime.cudaHostRegister(place, size, 0)) != 0
    if refused:
        with contextlib.suppress(RuntimeError):  # CUDA reports the refusal once more, to whoever asks next
            torch.zeros(1, device=device)
        return False
    weakref.finalize(memory, _unlock, place, device)  # runs before the memory is given back
    return True


def _unlock(place: int, device: torch.device) -> None:
    """Undo ``_lock``, from whatever thread collects garbage."""
    runtime: Any = torch.cuda.cudart()
    with torch.cuda.device(device):
        runtime.cudaHostUnregister(place)


def versions() -> dict[str, str | None]:
    """What a run was made with: Python, torch and the libraries that decide its numbers."""
    from importlib.metadata import PackageNotFoundError, version

    found: dict[str, str | None] = {
        "python": sys.version.split()[0],
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
    }
    for name in ("qlora", "transformers", "bitsandbytes", "accelerate", "safetensors", "datasets"):
        try:
            found[name] = version(DISTRIBUTION if name == "qlora" else name)
        except PackageNotFoundError:
            found[name] = None
    return found
