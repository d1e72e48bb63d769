"""The ground: which device and dtype, random state, peak memory, bytes as text.

Knows torch and the operating system; must not know a model, a recipe's other sections or bitsandbytes.
"""

from __future__ import annotations

import os
import shutil
import sys
from pathlib import Path
from typing import Any

import torch

from qlora.errors import DoesNotFitError, RecipeError

GIB = 1024**3
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def resolve_device(name: str = "auto") -> torch.device:
    """``auto``, ``cpu``, ``cuda`` or ``cuda:N`` → the device. One device only; others are left alone.

    Raises RecipeError when a CUDA device is asked for and there is none by that number, and in one of several processes.
    """
    processes = os.environ.get("WORLD_SIZE", "1")
    if processes not in ("", "1"):
        raise RecipeError(
            f"A launcher started this as one of {processes} processes (WORLD_SIZE), but a run has one process and one "
            "device; start it without the launcher, and choose a GPU by device.name=cuda:1 or CUDA_VISIBLE_DEVICES."
        )
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    device = torch.device(name)
    if device.type == "cuda":
        count = torch.cuda.device_count() if torch.cuda.is_available() else 0
        index = int(name.partition(":")[2] or 0)  # torch.device reads 999 as -25
        if index >= count:
            raise RecipeError(
                f"device.name is '{name}', but this machine shows {count} CUDA devices; use 'auto' or 'cpu'."
            )
        device = torch.device("cuda", index)
        torch.cuda.set_device(device)
    return device


def resolve_compute_dtype(device: torch.device, requested: str = "auto") -> torch.dtype:
    """The dtype of activations. ``auto``: bf16 where CUDA has it in hardware, fp16 on older GPUs, fp32 on CPUs.

    A T4 says yes to bf16 through emulation, which is slower than fp16, so emulation does not count. On CPUs fp32 is the
    one dtype that is fast everywhere: the bf16 backward is up to 60 times slower without AVX512-BF16.
    """
    if requested != "auto":
        return DTYPES[requested]
    if device.type != "cuda":
        return torch.float32
    return torch.bfloat16 if torch.cuda.is_bf16_supported(including_emulation=False) else torch.float16


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


def peak_memory_bytes(device: torch.device) -> int:
    """The most memory held so far: allocated on the GPU, or resident in this process."""
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


def bytes_text(count: float) -> str:
    """Bytes for people, in binary units: ``1.25 GiB``, ``12.0 MiB``, ``512 B``."""
    if count >= GIB:
        return f"{count / GIB:.2f} GiB"
    if count >= 1024**2:
        return f"{count / 1024**2:.1f} MiB"
    return f"{count / 1024:.1f} KiB" if count >= 1024 else f"{int(count)} B"


def require_disk(folder: Path, needed: int, what: str) -> None:
    """Raise DoesNotFitError when the disk under ``folder`` has less than ``needed`` bytes free for ``what``."""
    place = folder.absolute()
    while not place.exists():
        place = place.parent
    free = shutil.disk_usage(place).free
    if free < needed:
        raise DoesNotFitError(
            f"{what} needs {bytes_text(needed)} under '{folder}', but {bytes_text(free)} are free; free some or choose another folder."
        )


def cache_folder() -> Path:
    """Where downloads are kept: ``$QLORA_CACHE``, else ``qlora`` in the user's cache folder."""
    if place := os.environ.get("QLORA_CACHE"):
        return Path(place).expanduser()
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache").expanduser() / "qlora"


def versions() -> dict[str, Any]:
    """What a run was made with: Python, torch and the libraries that decide its numbers."""
    from importlib.metadata import PackageNotFoundError, version

    found: dict[str, Any] = {"python": sys.version.split()[0], "torch": torch.__version__, "cuda": torch.version.cuda}
    for name in ("qlora", "transformers", "bitsandbytes", "accelerate", "safetensors", "datasets"):
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = None
    return found
