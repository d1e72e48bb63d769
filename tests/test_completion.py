"""Completion: what a shell is offered at a Tab, and that bash takes it."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from qlora import cli, completion
from qlora.cli import main
from qlora.exporting import TARGETS
from qlora.runs.folder import CHANGEABLE, LENGTH


@pytest.fixture
def offered(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]):  # type: ignore[no-untyped-def]
    """What follows the words, in a folder with a recipe and two runs."""
    monkeypatch.chdir(tmp_path)
    for name in ("runs/mine", "runs/other"):
        Path(name).mkdir(parents=True)
        Path(name, "recipe.yaml").touch()
    for name in ("mine.yaml", "my.jsonl", ".hidden.yaml"):
        Path(name).touch()

    def ask(*words: str) -> list[str]:
        assert main(["completion", "words", *words]) == 0
        return capfd.readouterr().out.split()

    return ask


def test_verbs_files_and_keys(offered) -> None:  # type: ignore[no-untyped-def]
    assert offered("") == [*cli.VERBS, "--help", "--version"]
    assert offered("tr") == ["train"]
    assert offered("train", "m") == ["mine.yaml"]
    assert offered("train", "") == ["mine.yaml", "runs/"]
    assert offered("chat", "ru") == ["runs/"]
    assert offered("resume", "runs/m") == ["runs/mine"]
    assert offered("train", "mine.yaml", "training.lear") == ["training.learning_rate="]
    assert offered("train", "mine.yaml", "--training.lear") == ["--training.learning_rate="]
    assert offered("train", "mine.yaml", "training.schedule=c") == [
        "training.schedule=cosine",
        "training.schedule=constant",
    ]
    assert {"model.", "data.", "training."} <= set(offered("plan", "mine.yaml", ""))
    assert offered("export", "runs/mine", "") == list(TARGETS)
    assert offered("export", "runs/mine", "adapter", "k") == ["keys="]
    assert offered("export", "runs/mine", "gguf", "type=q8") == ["type=q8_0"]
    assert set(offered("resume", "runs/mine", "training.")) < {f"{key}=" for key in CHANGEABLE + LENGTH}
    assert offered("recipe", "da") == ["data"]
    assert offered("init", "--mod") == ["--model=", "--model."]
    assert {"--model=", "--card=", "--training."} <= set(offered("init", "--"))
    assert offered("init", "--model", "x", "--card", "409") == ["4090"]
    assert offered("plan", "mine.yaml", "device.memory=H1") == ["device.memory=H100", "device.memory=H100-PCIe"]
    assert offered("report", "runs/mine", "runs/o") == ["runs/other"]
    assert offered("completion", "") == list(completion.SCRIPTS)
    assert offered("no-such-verb", "x", "y") == []


def test_a_shell_that_is_not_known(capfd: pytest.CaptureFixture[str]) -> None:
    assert main(["completion", "tcsh"]) == 2
    assert "expected bash, zsh, fish" in capfd.readouterr().err


@pytest.mark.parametrize("shell", completion.SCRIPTS)
def test_scripts_are_what_their_shell_reads(shell: str) -> None:
    if shutil.which(shell) is None:
        pytest.skip(f"{shell} is not installed")
    subprocess.run([shell, "-n"], input=completion.script(shell), text=True, check=True)


@pytest.mark.skipif(shutil.which("bash") is None, reason="bash is not installed")
def test_bash_is_offered_what_there_is() -> None:
    command = f'"{sys.executable}" -m qlora.cli "$@"'
    lines = f"""qlora() {{ {command}; }}
{completion.script("bash")}
try() {{ COMP_LINE="$1"; COMP_POINT=${{#1}}; COMPREPLY=(); _qlora 2>/dev/null; echo "${{COMPREPLY[@]}}"; }}
try "qlora tra"; try "qlora train x.yaml training.schedule=co"
"""
    root = str(Path(__file__).parents[1])
    done = subprocess.run(
        ["bash"], input=lines, capture_output=True, text=True, check=True, env={**os.environ, "PYTHONPATH": root}
    )
    assert done.stdout.splitlines() == ["train", "cosine constant"], done.stderr


@pytest.mark.skipif(shutil.which("fish") is None, reason="fish is not installed")
def test_fish_is_offered_what_there_is(tmp_path: Path) -> None:
    (tmp_path / "with space.yaml").touch()
    lines = f"""function qlora; "{sys.executable}" -m qlora.cli $argv; end
{completion.script("fish")}
complete -C "qlora tra"; complete -C "qlora train x.yaml training.schedule=co"; complete -C "qlora train wi"
"""
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[1])}
    done = subprocess.run(
        ["fish"], input=lines, capture_output=True, text=True, check=True, env=environment, cwd=tmp_path
    )
    assert done.stdout.splitlines() == [
        "train", "training.schedule=constant", "training.schedule=cosine", "with space.yaml",
    ], done.stderr  # fmt: skip


@pytest.mark.skipif(shutil.which("zsh") is None, reason="zsh is not installed")
def test_zsh_quotes_what_is_offered() -> None:
    """In a script there is no line to complete, so what would be offered is looked at."""
    lines = f"""compdef() {{ :; }}; compadd() {{ print -r -- "$@"; }}; _files() {{ print files; }}
qlora() {{ print -r -- "with space.yaml"; print -r -- "w.yaml"; }}
{completion.script("zsh").replace("#compdef qlora", "")}
words=(qlora train w); CURRENT=3; _qlora
qlora() {{ :; }}
_qlora
"""
    done = subprocess.run(["zsh", "-f"], input=lines, capture_output=True, text=True, check=True)
    assert done.stdout.splitlines() == ["-S  -- with space.yaml w.yaml", "files"], done.stderr
