"""The doctor: can this machine train, and if not, what to do about it.

Each check looks at one thing, really uses it where that is cheap, and stands alone: a library that is missing or broken
makes one line *wrong* and no other line late. So this file imports nothing heavy at its top, not even torch; it must
not be needed by anything but the command line.
"""

from __future__ import annotations

import math
import os
import platform
import shutil
import subprocess
import tempfile
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from qlora.machine import DISTRIBUTION

if TYPE_CHECKING:
    import torch

State = Literal["ok", "warning", "wrong"]

LIBRARIES = ("transformers", "accelerate", "bitsandbytes", "safetensors", "datasets")
LITTLE_MEMORY, LITTLE_DISK = 3 * 1024**3, 5 * 1024**3  # the quickstart: 2 GiB of memory; model and environment on disk
NO_DISK = 512 * 1024**2

# The widest gap between neighbouring NF4 numbers is 1 − 0.6962 = 0.3038 of a block's largest weight (QLoRA paper,
# appendix E), so rounding errs by at most half of that; the rest is room for the scales' own rounding.
NF4_WORST = 0.3038 / 2 * 1.05
NF4_TYPICAL = 0.12  # root mean square error over that of normally distributed weights: 0.09 to 0.10 is what comes out
INT8_TYPICAL = 0.02

CPUINFO = Path("/proc/cpuinfo")
BF16_FLAGS = ("avx512_bf16", "amx_bf16")


@dataclass(frozen=True)
class Finding:
    """One line: what was looked at, how it is, what was found, and what to do where it is not ok."""

    name: str
    state: State
    found: str
    advice: str = ""

    def __str__(self) -> str:
        return f"{self.state:<8} {self.name:<22} {self.found}" + (f" → {self.advice}" if self.advice else "")


def examine() -> list[Finding]:
    """Look at everything, in the order in which one thing needs another. Never raises."""
    findings = [
        *_isolated("Python", "install qlora with 'pip install -e .'", _python),
        *_isolated("torch", "install it with 'pip install torch', see pytorch.org/get-started", _torch),
        *_isolated("CUDA", "see 'nvidia-smi' and pytorch.org/get-started for a build that suits the driver", _cuda),
        *_isolated("bf16", "set model.compute_dtype=fp32, or reinstall torch", _bf16),
    ]
    for name in LIBRARIES:
        findings += _isolated(name, f"install it with 'pip install --upgrade {name}'", _library, name)
    broken = "run 'python -m bitsandbytes' to see why, and 'pip install --upgrade bitsandbytes'"
    for device in ["cpu", *(f"cuda:{index}" for index in range(_cuda_count()))]:
        findings += _isolated(f"NF4 on {device}", broken, _nf4, device)
        findings += _isolated(f"8-bit on {device}", f"use model.quantization=nf4, or {broken}", _int8, device)
    findings += _isolated("memory", "see that at least 3 GiB are free", _memory)
    findings += _isolated("disk here", "choose another folder", _disk, "disk here", Path.cwd)
    findings += _isolated("cache", "set QLORA_CACHE to a folder that you may write to", _cache)
    return findings


def exit_status(findings: Iterable[Finding]) -> int:
    """2 when anything is wrong, else 0; a warning does not stop training."""
    return 2 if any(finding.state == "wrong" for finding in findings) else 0


def print_findings(findings: Iterable[Finding]) -> None:
    """One line each on standard output, coloured where that is a terminal."""
    from rich.console import Console
    from rich.text import Text

    console = Console(soft_wrap=True, highlight=False)
    colours = {"ok": "green", "warning": "yellow", "wrong": "bold red"}
    findings = list(findings)
    for finding in findings:
        text = Text(str(finding))  # Text, so that brackets in an error message are no markup
        text.stylize(colours[finding.state], 0, len(finding.state))
        console.print(text)
    counts = [f"{number} {state}" for state in colours if (number := sum(f.state == state for f in findings))]
    console.print(Text(", ".join(counts)))


def _isolated(name: str, advice: str, check: Callable[..., Finding | Iterable[Finding]], *given: Any) -> list[Finding]:
    """The check's findings up to where it fails; the failure itself becomes a last, wrong one."""
    findings: list[Finding] = []
    try:
        found = check(*given)
        for finding in [found] if isinstance(found, Finding) else found:
            findings.append(finding)  # one by one, to keep what was found before a failure
    except (Exception, SystemExit) as error:  # a broken library raises anything on import
        reason = " ".join(f"{type(error).__name__}: {error}".split())[:300].rstrip(": ")
        findings.append(Finding(name, "wrong", reason, advice))
    return findings


def _python() -> Finding:
    from packaging.specifiers import SpecifierSet

    wanted = metadata.metadata(DISTRIBUTION)["Requires-Python"]
    version = platform.python_version()
    found = f"{version} on {platform.system()} {platform.machine()}, {os.cpu_count()} cores"
    if not SpecifierSet(wanted).contains(version, prereleases=True):
        return Finding("Python", "wrong", f"{found}; {wanted} is needed", "install that, and qlora into it")
    return Finding("Python", "ok", found)


def _torch() -> Iterator[Finding]:
    import torch

    yield _library("torch")
    x = torch.arange(6.0).reshape(2, 3)
    if (x @ x.T).tolist() != [[5.0, 14.0], [14.0, 50.0]]:
        yield Finding("torch", "wrong", "a 2×3 matrix product came out wrong", "reinstall torch")


def _cuda() -> Iterator[Finding]:
    import torch

    if not torch.cuda.is_available():
        driver = _driver()
        if driver and torch.version.cuda is None:
            advice = "install torch with CUDA, see pytorch.org/get-started"
            yield Finding("CUDA", "warning", f"driver {driver}, but this torch is built without CUDA", advice)
        elif driver:
            advice = f"the driver may be too old for CUDA {torch.version.cuda}: update it, or see CUDA_VISIBLE_DEVICES"
            yield Finding("CUDA", "warning", f"driver {driver}, but torch sees no device", advice)
        else:
            advice = "training runs on the CPU, which suits small models such as the quickstart's"
            yield Finding("CUDA", "warning", "no device", advice)
        return
    yield Finding("CUDA", "ok", f"{torch.version.cuda}, driver {_driver() or 'unknown'}")
    for index in range(torch.cuda.device_count()):
        yield from _isolated(
            f"cuda:{index}",
            "this torch has no code for the device, or another process holds it: see 'nvidia-smi'",
            _cuda_device,
            index,
        )


def _cuda_device(index: int) -> Finding:
    import torch

    from qlora.machine.device import bytes_text

    properties = torch.cuda.get_device_properties(index)
    free, total = torch.cuda.mem_get_info(index)
    ones = torch.ones(64, 64, device=f"cuda:{index}")
    if float((ones @ ones).sum()) != 64.0**3:
        return Finding(
            f"cuda:{index}", "wrong", f"{properties.name}: a matrix product came out wrong", "test the device"
        )
    found = (
        f"{properties.name}, compute capability {properties.major}.{properties.minor}, "
        f"{bytes_text(free)} of {bytes_text(total)} free"
    )
    if free < 0.5 * total:
        return Finding(f"cuda:{index}", "warning", found, "end what else uses the device: see 'nvidia-smi'")
    return Finding(f"cuda:{index}", "ok", found)


def _bf16() -> Finding:
    """Whether bf16 is supported and fast, and what ``model.compute_dtype=auto`` is here. Slow is no fault: auto avoids it."""
    import torch

    leave = "leave model.compute_dtype at auto"
    without = []
    for index in range(_cuda_count()):
        with torch.cuda.device(index):
            if not torch.cuda.is_bf16_supported(including_emulation=False):
                without.append(f"cuda:{index}")
    if without:
        found = f"not in the hardware of {', '.join(without)}, where fp16 with loss scaling is the default"
        return Finding("bf16", "ok", found, leave)
    if _cuda_count():
        return Finding("bf16", "ok", "in hardware, and the default")
    ones = torch.ones(8, 8, dtype=torch.bfloat16)
    if float((ones @ ones).sum()) != 8.0**3:
        return Finding("bf16", "wrong", "a matrix product came out wrong", "set model.compute_dtype=fp32")
    flags, default = _cpu_flags(), "fp32 is the default on a CPU"
    if flags is None:
        return Finding("bf16", "ok", f"supported, this system does not tell how fast; {default}", leave)
    if fast := [flag for flag in BF16_FLAGS if flag in flags]:
        advice = "to use it, set model.compute_dtype=bf16"
        return Finding("bf16", "ok", f"supported and fast ({', '.join(fast)}); {default}", advice)
    return Finding("bf16", "ok", f"supported but slow (neither {' nor '.join(BF16_FLAGS)}); {default}", leave)


def _cpu_flags() -> set[str] | None:
    """The instruction sets of an x86 CPU where Linux tells them; None elsewhere."""
    try:
        lines = CPUINFO.read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return None
    return next((set(line.partition(":")[2].split()) for line in lines if line.startswith("flags")), None)


def _driver() -> str | None:
    """The NVIDIA driver's version, None without one."""
    command = shutil.which("nvidia-smi")
    if command is None:
        return None
    query = [command, "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        answer = subprocess.run(query, capture_output=True, text=True, timeout=20, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    return (answer.stdout.splitlines() or [""])[0].strip() or None


def _cuda_count() -> int:
    try:
        import torch

        return torch.cuda.device_count() if torch.cuda.is_available() else 0
    except Exception:  # the torch and CUDA lines have said so already
        return 0


def _library(name: str) -> Finding:
    """The installed version against the minimum that our own package metadata asks for."""
    from packaging.requirements import Requirement

    try:
        needs = [Requirement(line) for line in metadata.requires(DISTRIBUTION) or []]
    except metadata.PackageNotFoundError:
        return Finding(name, "wrong", "qlora itself is not installed", "install it with 'pip install -e .'")
    wanted = next((str(need.specifier) for need in needs if need.name == name and need.marker is None), "")
    try:
        version = metadata.version(name)
    except metadata.PackageNotFoundError:
        return Finding(name, "wrong", "is not installed", f"install it with 'pip install \"{name}{wanted}\"'")
    if not Requirement(f"{name}{wanted}").specifier.contains(version, prereleases=True):
        return Finding(
            name, "wrong", f"{version}, needs {wanted}", f"install it with 'pip install --upgrade \"{name}{wanted}\"'"
        )
    __import__(name)  # metadata may be there without a library that loads
    return Finding(name, "ok", f"{version} (needs {wanted})" if wanted else version)


def _sample(device: str) -> torch.Tensor:
    import torch

    return torch.randn(128, 256, generator=torch.Generator().manual_seed(0)).to(device)


def _nf4(device: str) -> Finding:
    """Quantise normally distributed weights, read them back, and hold the error against NF4's own bound."""
    import torch

    from qlora.model.nf4 import BLOCK, Linear4bit, dense_weight

    weight = _sample(device)
    shape = {"in_features": weight.shape[1], "out_features": weight.shape[0]}
    linear = Linear4bit.empty(**shape, bias=False, quant_type="nf4", double_quant=True, compute_dtype=torch.float32)
    linear.place(weight, torch.device(device))
    error = (dense_weight(linear, torch.float32) - weight).abs().reshape(-1, BLOCK)
    worst = float((error / weight.abs().reshape(-1, BLOCK).amax(1, keepdim=True)).max())
    typical = float(error.square().mean().sqrt() / weight.square().mean().sqrt())
    found = f"round trip errs by {typical:.3f} of the weights' size, at most {worst:.3f} of a block's largest"
    if not (worst <= NF4_WORST and 0 < typical <= NF4_TYPICAL):
        advice = "the results would be wrong: reinstall bitsandbytes, or train elsewhere"
        return Finding(
            f"NF4 on {device}", "wrong", f"{found}; at most {NF4_TYPICAL} and {NF4_WORST:.3f} expected", advice
        )
    return Finding(f"NF4 on {device}", "ok", found)


def _int8(device: str) -> Finding:
    """A product with an 8-bit weight against the same product in full."""
    import torch

    from qlora.model.nf4 import Linear8bit

    weight = _sample(device)
    dtype = torch.float16 if device != "cpu" else torch.float32
    linear = Linear8bit.empty(weight.shape[1], weight.shape[0], bias=False, compute_dtype=dtype)
    linear.place(weight, torch.device(device))
    x = _sample(device)[:32].to(dtype)
    with torch.no_grad():
        exact = x.float() @ weight.T
        typical = float((linear(x).float() - exact).norm() / exact.norm())
    found = f"a product errs by {typical:.4f} of its size"
    if not typical <= INT8_TYPICAL or math.isnan(typical):
        advice = "use 4 bits (model.quantization=nf4), or reinstall bitsandbytes"
        return Finding(f"8-bit on {device}", "wrong", f"{found}; at most {INT8_TYPICAL} expected", advice)
    return Finding(f"8-bit on {device}", "ok", found)


def _memory() -> Finding:
    import torch

    from qlora.machine.device import bytes_text, total_memory_bytes

    free, total = total_memory_bytes(torch.device("cpu"))
    if total == 0:
        return Finding("memory", "warning", "this system does not tell", "see that at least 3 GiB are free")
    found = f"{bytes_text(free)} of {bytes_text(total)} free"
    if free < LITTLE_MEMORY:
        return Finding("memory", "warning", found, "the quickstart takes 2 GiB: close other programs")
    return Finding("memory", "ok", found)


def _disk(name: str, where: Callable[[], Path]) -> Finding:
    from qlora.machine.device import bytes_text

    folder = where()
    free = shutil.disk_usage(_existing(folder)).free
    found = f"{bytes_text(free)} free under {folder}"
    if free < NO_DISK:
        return Finding(name, "wrong", found, "free some: not even a small model fits")
    if free < LITTLE_DISK:
        return Finding(name, "warning", found, "enough for the quickstart, not for a larger model")
    return Finding(name, "ok", found)


def _cache() -> Finding:
    from qlora.machine.device import cache_folder

    folder = cache_folder()
    with tempfile.TemporaryFile(dir=_existing(folder)) as file:  # leaves nothing behind, not even the cache folder
        file.write(b"qlora")
    return _disk("cache", lambda: folder)


def _existing(folder: Path) -> Path:
    """The folder, or the nearest one above it that exists: where it would be made."""
    folder = folder.absolute()
    while not folder.exists():
        folder = folder.parent
    return folder
