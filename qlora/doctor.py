"""The doctor: can this machine train, and if not, what to do about it.

One line per check, with the fix. A check uses what it looks at where that is cheap, and stands alone: a library that is
missing or broken makes its own line *wrong* and no other. So this file imports nothing heavy at its top, not even torch.
Only the command line may need it.
"""

from __future__ import annotations

import os
import platform
import shutil
import subprocess
import tempfile
import tomllib
from collections.abc import Callable, Iterable, Iterator
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Literal, NamedTuple

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


class Finding(NamedTuple):
    """One line: what was looked at, how it is, what was found, and the fix where it is not ok."""

    name: str
    state: State
    found: str
    advice: str = ""

    def __str__(self) -> str:
        return f"{self.state:<8} {self.name:<22} {self.found}" + (f" → {self.advice}" if self.advice else "")


def _graded(name: str, found: str, *, wrong: str = "", warning: str = "") -> Finding:
    """Wrong or a warning where there is a fix for it, else ok."""
    return Finding(name, "wrong" if wrong else "warning" if warning else "ok", found, wrong or warning)


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
    findings += _isolated("disk here", "choose another folder", _disk, "disk here", Path())
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


def _isolated(name: str, advice: str, check: Callable[..., Iterable[Finding]], *given: object) -> list[Finding]:
    """The check's findings up to where it fails; the failure itself becomes a last, wrong one."""
    findings: list[Finding] = []
    try:
        for finding in check(*given):
            findings.append(finding)  # one by one, to keep what was found before a failure
    except (Exception, SystemExit) as error:  # a broken library raises anything on import
        reason = " ".join(f"{type(error).__name__}: {error}".split())[:300].rstrip(": ")
        findings.append(Finding(name, "wrong", reason, advice))
    return findings


def _python() -> Iterator[Finding]:
    from packaging.specifiers import SpecifierSet

    wanted, _ = _needs()
    version = platform.python_version()
    fix = "" if SpecifierSet(wanted).contains(version, prereleases=True) else f"install {wanted}, and qlora into it"
    machine = f"{platform.system()} {platform.machine()}, {os.cpu_count()} cores"
    yield _graded("Python", f"{version} on {machine}", wrong=fix)


def _torch() -> Iterator[Finding]:
    import torch

    yield from _library("torch")
    if not _multiplies("cpu", torch.float32):
        yield Finding("torch", "wrong", "a matrix product came out wrong", "reinstall torch")


def _multiplies(device: str, dtype: torch.dtype) -> bool:
    import torch

    ones = torch.ones(64, 64, dtype=dtype, device=device)
    return float((ones @ ones).float().sum()) == 64.0**3


def _cuda() -> Iterator[Finding]:
    import torch

    driver, built = _driver(), torch.version.cuda
    if torch.cuda.is_available():
        yield Finding("CUDA", "ok", f"{built}, driver {driver or 'unknown'}")
        advice = "this torch has no code for the device, or another process holds it: see 'nvidia-smi'"
        for index in range(torch.cuda.device_count()):
            yield from _isolated(f"cuda:{index}", advice, _cuda_device, index)
        return
    found, advice = "no device", "training runs on the CPU, which suits small models such as the quickstart's"
    if driver and built:
        found = f"driver {driver}, but torch sees no device"
        advice = f"the driver may be too old for CUDA {built}: update it, or see CUDA_VISIBLE_DEVICES"
    elif driver:
        found = f"driver {driver}, but this torch is built without CUDA"
        advice = "install torch with CUDA, see pytorch.org/get-started"
    yield Finding("CUDA", "warning", found, advice)


def _cuda_device(index: int) -> Iterator[Finding]:
    import torch

    from qlora.machine.disk import bytes_text

    name, gpu = f"cuda:{index}", torch.cuda.get_device_properties(index)
    free, total = torch.cuda.mem_get_info(index)
    memory = f"{bytes_text(free)} of {bytes_text(total)} free"
    found = f"{gpu.name}, compute capability {gpu.major}.{gpu.minor}, {memory}"
    wrong = "" if _multiplies(name, torch.float32) else "a matrix product came out wrong: test the device"
    busy = "end what else uses the device: see 'nvidia-smi'" if free < 0.5 * total else ""
    yield _graded(name, found, wrong=wrong, warning=busy)


def _bf16() -> Iterator[Finding]:
    """Whether bf16 is supported and fast, and what ``model.compute_dtype=auto`` is here. Slow is no fault: auto avoids it."""
    import torch

    found, fix = "in hardware, and the default", ""
    if count := _cuda_count():
        without = []
        for index in range(count):
            with torch.cuda.device(index):
                if not torch.cuda.is_bf16_supported(including_emulation=False):
                    without.append(f"cuda:{index}")
        if without:
            found = f"not in the hardware of {', '.join(without)}, where fp16 with loss scaling is the default"
            fix = "leave model.compute_dtype at auto"
    elif not _multiplies("cpu", torch.bfloat16):
        yield Finding("bf16", "wrong", "a matrix product came out wrong", "set model.compute_dtype=fp32")
        return
    else:
        flags = _cpu_flags()
        fast = [flag for flag in BF16_FLAGS if flag in (flags or ())]
        speed = f" and fast ({', '.join(fast)})" if fast else f" but slow (neither {' nor '.join(BF16_FLAGS)})"
        speed = ", this system does not tell how fast" if flags is None else speed
        found = f"supported{speed}; {'what a run takes by default, if it is clearly faster' if fast else 'fp32 is the default on such a CPU'}"
        fix = "" if fast else "leave model.compute_dtype at auto"
    yield Finding("bf16", "ok", found, fix)


def _cpu_flags() -> set[str] | None:
    """The instruction sets of an x86 CPU where Linux tells them; None elsewhere."""
    try:
        lines = CPUINFO.read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return None
    return next((set(line.partition(":")[2].split()) for line in lines if line.startswith("flags")), None)


def _driver() -> str | None:
    """The NVIDIA driver's version, None without one."""
    query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        answer = subprocess.run(query, capture_output=True, text=True, timeout=20, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    return answer.stdout.partition("\n")[0].strip() or None


def _cuda_count() -> int:
    try:
        import torch

        return torch.cuda.device_count() if torch.cuda.is_available() else 0
    except Exception:  # the torch and CUDA lines have said so already
        return 0


def _needs() -> tuple[str, list[str]]:
    """(the Python, the packages) that this package asks for: by its metadata, or, run from a checkout, by pyproject.toml."""
    try:
        return metadata.metadata(DISTRIBUTION)["Requires-Python"], metadata.requires(DISTRIBUTION) or []
    except metadata.PackageNotFoundError:
        with (Path(__file__).parents[1] / "pyproject.toml").open("rb") as file:
            project = tomllib.load(file)["project"]
        return project["requires-python"], project["dependencies"]


def _library(name: str) -> Iterator[Finding]:
    """The installed version against the minimum that our own package metadata asks for."""
    from packaging.requirements import Requirement

    needs = [Requirement(line) for line in _needs()[1]]
    need = next((need for need in needs if need.name == name and need.marker is None), Requirement(name))
    install = f"install it with 'pip install --upgrade \"{need}\"'"
    try:
        version = metadata.version(name)
    except metadata.PackageNotFoundError:
        yield Finding(name, "wrong", "is not installed", install)
        return
    if not need.specifier.contains(version, prereleases=True):
        yield Finding(name, "wrong", f"{version}, needs {need.specifier}", install)
        return
    __import__(name)  # metadata may be there without a library that loads
    yield Finding(name, "ok", f"{version} (needs {need.specifier})" if need.specifier else version)


def _sample(device: str) -> torch.Tensor:
    import torch

    return torch.randn(128, 256, generator=torch.Generator().manual_seed(0)).to(device)


def _nf4(device: str) -> Iterator[Finding]:
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
    expected = f"at most {NF4_TYPICAL} and {NF4_WORST:.3f} are right: reinstall bitsandbytes, or train elsewhere"
    fine = worst <= NF4_WORST and 0 < typical <= NF4_TYPICAL
    yield _graded(f"NF4 on {device}", found, wrong="" if fine else expected)


def _int8(device: str) -> Iterator[Finding]:
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
    expected = f"at most {INT8_TYPICAL} is right: use model.quantization=nf4, or reinstall bitsandbytes"
    found = f"a product errs by {typical:.4f} of its size"
    yield _graded(f"8-bit on {device}", found, wrong="" if typical <= INT8_TYPICAL else expected)  # NaN is not


def _memory() -> Iterator[Finding]:
    import torch

    from qlora.machine.device import total_memory_bytes
    from qlora.machine.disk import bytes_text

    free, total = total_memory_bytes(torch.device("cpu"))
    found = f"{bytes_text(free)} of {bytes_text(total)} free" if total else "this system does not tell"
    little = "the quickstart takes 2 GiB: see that 3 GiB are free" if free < LITTLE_MEMORY else ""
    yield _graded("memory", found, warning=little)


def _disk(name: str, folder: Path) -> Iterator[Finding]:
    from qlora.machine.disk import bytes_text

    free = shutil.disk_usage(_existing(folder)).free
    none = "free some: not even a small model fits" if free < NO_DISK else ""
    little = "enough for the quickstart, not for a larger model" if free < LITTLE_DISK else ""
    yield _graded(name, f"{bytes_text(free)} free under {folder.absolute()}", wrong=none, warning=little)


def _cache() -> Iterator[Finding]:
    from qlora.machine.disk import cache_folder

    folder = cache_folder()
    with tempfile.TemporaryFile(dir=_existing(folder)) as file:  # leaves nothing behind, not even the cache folder
        file.write(b"qlora")
    yield from _disk("cache", folder)


def _existing(folder: Path) -> Path:
    """The folder, or the nearest one above it that exists: where it would be made."""
    folder = folder.absolute()
    return next(place for place in (folder, *folder.parents) if place.exists())
