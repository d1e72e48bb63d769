"""The doctor: every line comes, whatever is broken, and a bad round trip is seen."""

from __future__ import annotations

import builtins
import contextlib
import sys
from collections.abc import Iterable
from importlib import metadata
from pathlib import Path
from typing import Any

import pytest
import torch

import qlora.machine.device
import qlora.model.nf4
from qlora import doctor
from qlora.doctor import Finding, examine, exit_status, print_findings


def _by_name(findings: list[Finding]) -> dict[str, Finding]:
    return {finding.name: finding for finding in findings}


def only(findings: Iterable[Finding]) -> Finding:
    (finding,) = findings
    return finding


def test_names_what_it_looked_at() -> None:
    found = _by_name(examine())
    expected = {
        "Python",
        "torch",
        "CUDA",
        "bf16",
        "bitsandbytes",
        "NF4 on cpu",
        "8-bit on cpu",
        "memory",
        "disk here",
        "cache",
    }
    assert expected <= found.keys()
    for name in ("Python", "torch", "transformers", "NF4 on cpu", "8-bit on cpu"):
        assert found[name].state == "ok", found[name]
    assert all(finding.advice for finding in found.values() if finding.state != "ok")
    assert all("\n" not in str(finding) for finding in found.values())


@pytest.mark.parametrize("broken", ["torch", "bitsandbytes", "packaging", "datasets"])
def test_a_library_that_breaks_on_import_makes_wrong_lines_and_no_crash(
    broken: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = builtins.__import__

    def breaking(name: str, *args: Any, **kwargs: Any) -> Any:
        if name == broken or name.startswith(f"{broken}."):
            raise OSError(f"lib{broken}.so: cannot open\nshared object file")
        return real(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", breaking)
    # Modules that were loaded before would hide the breakage. Their parents' attributes are set to what they are, so that
    # monkeypatch puts them back too: other tests must not meet a second Linear4bit.
    for parent, child in ((qlora.machine, "device"), (qlora, "model"), (qlora.model, "nf4")):
        monkeypatch.setattr(parent, child, getattr(parent, child))
        monkeypatch.delitem(sys.modules, f"{parent.__name__}.{child}")
    findings = examine()
    assert exit_status(findings) == 2
    wrong = [finding for finding in findings if finding.state == "wrong"]
    assert any("cannot open shared object file" in finding.found for finding in wrong)
    assert all(finding.advice for finding in wrong)
    assert {"torch", "CUDA", "NF4 on cpu", "memory", "cache"} <= {finding.name for finding in findings}


def test_a_checkout_that_is_not_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a machine without a network, where pip installs nothing: what is needed stands in pyproject.toml."""
    installed = doctor._needs()

    def missing(name: str) -> None:
        raise metadata.PackageNotFoundError(name)

    monkeypatch.setattr(metadata, "metadata", missing)
    python, needs = doctor._needs()
    assert (python, needs) == (installed[0], [line for line in installed[1] if "extra ==" not in line])
    assert only(doctor._library("transformers")).state == "ok"


def test_a_library_that_is_too_old_or_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    real = metadata.version

    def version(name: str) -> str:
        if name == "accelerate":
            raise metadata.PackageNotFoundError(name)
        return "0.1.0" if name == "transformers" else real(name)

    monkeypatch.setattr(metadata, "version", version)
    old, missing = only(doctor._library("transformers")), only(doctor._library("accelerate"))
    assert (old.state, missing.state) == ("wrong", "wrong")
    assert old.found.startswith("0.1.0, needs >=5")
    assert "pip install" in old.advice
    assert "accelerate>=1" in missing.advice


@pytest.mark.parametrize(
    ("cpuinfo", "says", "advice"),
    [
        ("flags\t: fpu avx512_bf16 amx_tile amx_bf16", "fast (avx512_bf16, amx_bf16); what a run takes", ""),
        ("flags\t: fpu avx512f avx512_bf16", "fast (avx512_bf16); what a run takes", ""),
        ("flags\t: fpu avx2\nbugs\t: amx_bf16", "slow (neither avx512_bf16 nor amx_bf16)", "compute_dtype at auto"),
        ("Features\t: fp asimd", "does not tell how fast", "compute_dtype at auto"),
        (None, "does not tell how fast", "compute_dtype at auto"),
    ],
)
def test_bf16_on_a_cpu(
    cpuinfo: str | None, says: str, advice: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(doctor, "_cuda_count", lambda: 0)
    monkeypatch.setattr(doctor, "CPUINFO", tmp_path / "cpuinfo")
    if cpuinfo is not None:
        (tmp_path / "cpuinfo").write_text(f"processor\t: 0\n{cpuinfo}\n")
    found = only(doctor._bf16())
    assert found.state == "ok"
    assert found.found.startswith("supported")
    assert says in found.found
    assert ("fp32 is the default" in found.found) == bool(advice)
    assert advice in found.advice


@pytest.mark.parametrize(
    ("has", "says"),
    [
        ([True, True], "in hardware, and the default"),
        ([True, False], "not in the hardware of cuda:1, where fp16 with loss scaling is the default"),
    ],
)
def test_bf16_on_gpus(has: list[bool], says: str, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = iter(has)
    monkeypatch.setattr(doctor, "_cuda_count", lambda: len(has))
    monkeypatch.setattr(torch.cuda, "device", contextlib.nullcontext)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: next(asked))
    assert only(doctor._bf16()).found == says


def test_a_round_trip_that_errs_is_wrong(monkeypatch: pytest.MonkeyPatch) -> None:
    from qlora.model import nf4

    real = nf4.dense_weight
    monkeypatch.setattr(nf4, "dense_weight", lambda linear, dtype: real(linear, dtype).flip(0))
    assert only(doctor._nf4("cpu")).state == "wrong"
    monkeypatch.setattr(nf4, "dense_weight", lambda linear, dtype: torch.full((128, 256), float("nan")))
    assert only(doctor._nf4("cpu")).state == "wrong"


def test_an_8_bit_product_that_errs_is_wrong(monkeypatch: pytest.MonkeyPatch) -> None:
    from qlora.model.nf4 import Linear8bit

    real = Linear8bit.product
    monkeypatch.setattr(Linear8bit, "product", lambda self, x: 1.1 * real(self, x))
    assert only(doctor._int8("cpu")).state == "wrong"


def test_the_error_bounds_are_near_what_is_measured() -> None:
    """A bound that nothing comes near would see nothing."""
    numbers = [float(word.strip(",")) for word in only(doctor._nf4("cpu")).found.split() if word[0].isdigit()]
    typical, worst = numbers
    assert doctor.NF4_TYPICAL / 2 < typical < doctor.NF4_TYPICAL
    assert doctor.NF4_WORST * 0.7 < worst < doctor.NF4_WORST


def test_disk_and_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cache = tmp_path / "not" / "yet"
    monkeypatch.setenv("QLORA_CACHE", str(cache))
    assert _by_name(examine())["cache"].state in ("ok", "warning")
    assert not cache.exists()
    file = tmp_path / "file"
    file.write_text("")
    monkeypatch.setenv("QLORA_CACHE", str(file / "cache"))
    found = _by_name(examine())["cache"]
    assert found.state == "wrong"
    assert "QLORA_CACHE" in found.advice
    monkeypatch.setattr(doctor, "NO_DISK", 1 << 62)
    assert only(doctor._disk("disk here", tmp_path)).state == "wrong"


def test_exit_status_and_printing(capsys: pytest.CaptureFixture[str]) -> None:
    findings = [Finding("a", "ok", "fine"), Finding("b", "warning", "[red]meh[/]", "do this")]
    assert exit_status(findings) == 0
    assert exit_status([*findings, Finding("c", "wrong", "bad", "do that")]) == 2
    print_findings(findings)
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].split() == ["ok", "a", "fine"]
    assert "[red]meh[/] → do this" in lines[1]
    assert lines[2] == "1 ok, 1 warning"
