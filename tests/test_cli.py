"""The command line: every kind of bad input is one message and the right exit status, with nothing half-written."""

from __future__ import annotations

import errno
import json
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file

from qlora import cli
from qlora.cli import main
from qlora.planning import plan as planner
from qlora.runs import train as run
from qlora.training.log import MetricsLog
from tests.tiny import conversations, tiny_values, write_lines

Spoil = Callable[[dict[str, Any], Path], None]


def refused(capfd: pytest.CaptureFixture[str], *words: str, status: int = 2) -> str:
    """Run a command that must fail, and return its message: the last thing on standard error."""
    capfd.readouterr()
    assert main(list(words)) == status
    errors = capfd.readouterr().err
    assert "Traceback" not in errors
    assert errors.count("qlora: ") == 1, errors
    message = errors[errors.index("qlora: ") :].strip()
    assert len(message) < 2000
    return message


# --- the recipe ------------------------------------------------------------------------------------------------------

RECIPES = {
    "not YAML": ("model: [", "not valid YAML at line"),
    "a tab": ("model:\n\tname: x", "not valid YAML at line 2, column 1: a tab; indent with spaces"),
    "an impossible date": ("folder: 2024-13-45", "not valid YAML"),
    "nothing": ("", "holds nothing"),
    "a list": ("- a\n- b", "holds a list"),
    "a sentence": ("hello", "holds nothing but 'hello'"),
    "no data": ("model: {name: x}", "'data' is missing"),
    "an unknown key": ("data: {train: x}\nmethod:\n  alhpa: 8", "'method.alhpa' (line 3) is not a known key. Did you mean 'alpha'?"),
    "a wrong type": ("data: {train: x}\ntraining:\n  epochs: many", "'training.epochs' (line 3) is 'many'; expected"),
    "a truth for a number": ("data: {train: x}\ntraining: {epochs: true}", "'training.epochs' (line 2) is true; expected whole number"),
    "out of range": ("data: {train: x}\nmethod: {r: 8193}", "'method.r' (line 2) is 8193; expected"),
    "not a number": ("data: {train: x}\ntraining: {learning_rate: .nan}", "finite number"),
    "a key twice": ("data: {train: x}\ntraining: {seed: 1}\ntraining: {epochs: 2}", "'training' stands twice"),
    "numbers as keys": ("data: {train: x}\n1: 2", "1"),
    "an anchor": ("data: &a {train: x, columns: *a}", "it has '&a' at line 1, column 7; write the values out"),
    "both ways to hold out": ("data: {train: x, held_out: y, held_out_fraction: 0.5}", "both held_out and held_out_fraction"),
    "Python": ("data: !!python/object:os.system {}", "not valid YAML"),
}  # fmt: skip


@pytest.mark.parametrize("name", RECIPES)
def test_bad_recipe(
    name: str, tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    text, expected = RECIPES[name]
    path = tmp_path / "bad.yaml"
    path.write_text(text, encoding="utf-8")
    assert expected in refused(capfd, "train", str(path))
    assert [item.name for item in tmp_path.iterdir()] == ["bad.yaml"]


def test_recipe_that_cannot_be_read(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    assert "There is no recipe" in refused(capfd, "train", str(tmp_path / "none.yaml"))
    assert "is a folder" in refused(capfd, "train", str(tmp_path))
    latin = tmp_path / "latin.yaml"
    latin.write_bytes(b"folder: \xe9")
    assert "UTF-8" in refused(capfd, "train", str(latin))


def test_bad_overrides(recipe_file: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    recipe = str(recipe_file)
    assert "expected section.key=value" in refused(capfd, "train", recipe, "epochs")
    assert "Did you mean 'epochs'?" in refused(capfd, "train", recipe, "training.epoch=2")
    assert "goes into 'name'" in refused(capfd, "train", recipe, "model.name.x=2")
    assert "not valid YAML" in refused(capfd, "train", recipe, "training.epochs=[")
    assert "not valid YAML" in refused(capfd, "train", recipe, "folder=2024-13-45")
    # the mistake is on the command line, so no line of the file is blamed
    assert "(line" not in refused(capfd, "train", recipe, "training.steps=x")
    assert "'method.r' is given 2 times" in refused(capfd, "train", recipe, "method.r=8", "method.r=16")
    assert "gives no value; leave it out, or write folder=null" in refused(capfd, "train", recipe, "folder=")
    both = refused(capfd, "train", recipe, "training.steps=x", "method.r=0")
    assert both.startswith("qlora: 2 mistakes in")
    assert not (tmp_path / "run").exists()


# --- the words -------------------------------------------------------------------------------------------------------


def test_help(capfd: pytest.CaptureFixture[str]) -> None:
    for words in (["help"], ["--help"], ["-h"]):
        assert main(words) == 0
        told = capfd.readouterr().out
        assert all(f"\n  {verb} " in told for verb in cli.VERBS)
    assert main([]) == 2
    assert capfd.readouterr().out == told
    for verb, takes in (
        ("train", "RECIPE"),
        ("export", "RUN merged|nf4|adapter|gguf|gguf-adapter|check|hub"),
        ("doctor", ""),
    ):
        assert main([verb, "--help"]) == 0
        told = capfd.readouterr().out
        assert told.splitlines()[0] == f"qlora {verb} {takes}".strip()
        assert main([verb, "anything", "-h"]) == 0
        assert capfd.readouterr().out == told
    assert main(["--version"]) == 0
    assert re.fullmatch(r"qlora \d+\.\d+\S*\n", capfd.readouterr().out)


@pytest.mark.parametrize("verb", [None, *cli.VERBS])
def test_help_has_two_examples(verb: str | None, capfd: pytest.CaptureFixture[str]) -> None:
    assert main(["--help"] if verb is None else [verb, "--help"]) == 0
    shown = capfd.readouterr().out.partition("Examples:\n")[2].splitlines()
    assert len([line for line in shown if f"qlora {verb or ''}" in line]) >= 2


@pytest.mark.parametrize("verb", [None, *cli.VERBS])
@pytest.mark.parametrize("width", [40, 60, 80, 100])
def test_help_is_as_wide_as_the_terminal(
    verb: str | None, width: int, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("COLUMNS", str(width))
    assert main(["--help"] if verb is None else [verb, "--help"]) == 0
    typed = re.compile(r"qlora |    .*\bqlora |  \w")  # commands, and a verb with what it takes, stay in one line
    prose = [line for line in capfd.readouterr().out.splitlines() if line and not typed.match(line)]
    assert prose
    assert max(map(len, prose)) <= width


def test_recipe_verb_tells_of_a_section_or_a_key(capfd: pytest.CaptureFixture[str]) -> None:
    assert main(["recipe", "data"]) == 0
    told = capfd.readouterr().out
    assert "\ndata.max_length  (default 1024)\n    The length of a row" in told
    assert "\ntraining." not in told
    assert max(map(len, told.splitlines())) <= 100
    assert main(["recipe", "method.dora"]) == 0
    assert "magnitude" in capfd.readouterr().out
    assert main(["recipe", "training.epochs"]) == 0
    assert capfd.readouterr().out.startswith("training.epochs  (default 1)\n")
    assert "Did you mean 'training'?" in refused(capfd, "recipe", "trainin")
    assert "one section or key" in refused(capfd, "recipe", "data", "model")


def test_values_may_be_written_as_flags(recipe_file: Path, capfd: pytest.CaptureFixture[str]) -> None:
    assert main(["preview", str(recipe_file), "--count=3", "--data.held_out_fraction=0.5"]) == 0
    assert "example 2 of 20" in capfd.readouterr().out
    assert "'training.epoch' " in refused(capfd, "train", str(recipe_file), "--training.epoch=2")
    for flag in ("--epochs", "-v"):
        assert f"'{flag}' is not a flag of qlora train; expected --help," in refused(
            capfd, "train", "a.yaml", flag, "3"
        )
    assert "'--training.steps' has no value; expected one" in refused(capfd, "train", "a.yaml", "--training.steps", "3")
    assert "'--verbose' is not a verb" in refused(capfd, "--verbose")


def test_words(recipe_file: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    assert "Did you mean 'train'?" in refused(capfd, "trian")
    for verb in ("plan", "preview", "train"):
        assert f"qlora {verb} needs a recipe" in refused(capfd, verb)
    for verb in ("resume", "evaluate", "chat", "report"):
        assert f"qlora {verb} needs a run folder" in refused(capfd, verb)
        assert "There is no run folder" in refused(capfd, verb, str(tmp_path / "none"))
        if verb not in ("resume", "report"):  # which take overrides, and further runs
            assert "nothing more" in refused(capfd, verb, str(tmp_path), "more")
        assert str(tmp_path) in refused(capfd, verb, str(tmp_path))  # a folder, but no run
    for count in ("0", "-1", "x", "²"):
        assert "whole number from 1" in refused(capfd, "preview", str(recipe_file), f"count={count}")
    assert "expected 'merged'" in refused(capfd, "export", str(tmp_path))
    assert "expected 'merged'" in refused(capfd, "export", str(tmp_path), "onnx")
    assert "type is 'q9'" in refused(capfd, "export", str(tmp_path), "gguf", "type=q9")
    assert "gguf takes base, type, out and overwrite" in refused(capfd, "export", str(tmp_path), "gguf", "dtype=fp16")
    assert "for and base say the same" in refused(
        capfd, "export", str(tmp_path), "merged", "for=serving", "base=original"
    )
    assert "dtype is 'int3'" in refused(capfd, "export", str(tmp_path), "merged", "dtype=int3")
    assert "takes keys, out and overwrite" in refused(capfd, "export", str(tmp_path), "adapter", "--dtype=fp16")
    assert "no run folder" in refused(capfd, "export", str(tmp_path), "merged")
    assert "nothing more" in refused(capfd, "doctor", "now")


def test_recipe_verb_prints_the_reference(capfd: pytest.CaptureFixture[str]) -> None:
    from qlora.recipe import reference

    assert main(["recipe"]) == 0
    assert capfd.readouterr().out.strip() == reference().strip()


def test_preview_marks_what_is_trained(recipe_file: Path, capfd: pytest.CaptureFixture[str]) -> None:
    assert main(["preview", str(recipe_file), "count=3"]) == 0
    printed, told = capfd.readouterr()
    assert printed.count("<|start|>assistant") == 3
    assert "example 2 of 32" in printed
    assert "train: 32 records, 32 examples" in told  # what training says of the data


# --- the model, the data, the method ---------------------------------------------------------------------------------


def _edit_shard(folder: Path, edit: Callable[[bytes], bytes]) -> None:
    path = folder / "model.safetensors"
    path.write_bytes(edit(path.read_bytes()))


def _drop_tensors(folder: Path) -> None:
    tensors = load_file(folder / "model.safetensors")
    kept = {name: tensor for name, tensor in tensors.items() if ".layers.1." not in name}
    save_file(kept, folder / "model.safetensors", metadata={"format": "pt"})


def _pickles_only(folder: Path) -> None:
    torch.save(load_file(folder / "model.safetensors"), folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()


MODELS: dict[str, tuple[Callable[[Path], object], str]] = {
    "missing": (shutil.rmtree, "There is no model folder"),
    "without safetensors": (lambda folder: (folder / "model.safetensors").unlink(), "has no weights"),
    "pickles only": (_pickles_only, "pickled weights only (pytorch_model.bin)"),
    "truncated": (lambda folder: _edit_shard(folder, lambda b: b[:-100]), "is truncated"),
    "empty shard": (lambda folder: _edit_shard(folder, lambda b: b""), "is damaged"),
    "corrupt header": (lambda folder: _edit_shard(folder, lambda b: b[:8] + b"\xff" * 9 + b[17:]), "is damaged"),
    "missing tensors": (_drop_tensors, "lacks 9 tensors"),
    "without config": (lambda folder: (folder / "config.json").unlink(), "has no config.json"),
    "broken config": (lambda folder: (folder / "config.json").write_text("{"), "config.json' is not readable JSON"),
    "without tokenizer": (lambda folder: (folder / "tokenizer.json").unlink(), "has no tokenizer"),
    "broken tokenizer": (lambda folder: (folder / "tokenizer.json").write_text("{"), "cannot be loaded"),
}


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.sampled
def test_bad_model(
    name: str, tiny_model: Path, chat_data: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    spoil, expected = MODELS[name]
    folder = tmp_path / "model"
    shutil.copytree(tiny_model, folder)
    spoil(folder)
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(yaml.safe_dump(tiny_values(folder, chat_data, tmp_path / "run")), encoding="utf-8")
    message = refused(capfd, "train", str(recipe))
    assert expected in message
    if name == "missing tensors":
        assert message.count("model.layers.1.") == 5
    assert not (tmp_path / "run").exists()


def _turns(*turns: tuple[str, str]) -> dict[str, Any]:
    return {"messages": [{"role": role, "content": content} for role, content in turns]}


GOOD = json.dumps(conversations(1)[0]).encode() + b"\n"
DATA: dict[str, tuple[bytes | list[dict[str, Any]], str]] = {
    "empty": (b"", "is empty"),
    "not UTF-8": (GOOD + b'{"messages": "\xe9"}', "is not UTF-8"),
    "broken JSON": (
        GOOD + GOOD + b'{"messages": [}\n',
        'has broken JSON (Expecting value): {"messages": [}. Mend it',
    ),
    "other fields": ([{"question": "a", "reply": "b"}], "no known form"),
    "fields missing later": ([*conversations(2), {"chat": []}], "Line 3 of"),
    "assistant first": (
        [_turns(("assistant", "Hi"), ("user", "Hi"), ("assistant", "Hi"))],
        "begins with the assistant",
    ),
    "empty turn": ([_turns(("user", " "), ("assistant", "Hi"))], "has an empty turn (turn 1, user)"),
    "no answer": ([_turns(("user", "Hi"))], "No token of the data carries loss"),
    "not records": (b"[1, 2]\n", "Record 1 of"),
}


@pytest.mark.parametrize("name", DATA)
def test_bad_data(name: str, recipe_file: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    content, expected = DATA[name]
    path = tmp_path / "bad.jsonl"
    if isinstance(content, bytes):
        path.write_bytes(content)
    else:
        write_lines(path, content)
    assert expected in refused(capfd, "train", str(recipe_file), f"data.train={path}", "data.held_out_fraction=0")
    assert not (tmp_path / "run").exists()


def test_data_missing_or_too_long(recipe_file: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    recipe = str(recipe_file)
    missing = refused(capfd, "train", recipe, f"data.train={tmp_path / 'none.jsonl'}")
    assert "none.jsonl" in missing
    assert "longer than data.max_length=8" in refused(
        capfd, "train", recipe, "data.max_length=8", "data.too_long=drop", "data.held_out_fraction=0"
    )
    refused(capfd, "train", recipe, "data.max_length=8", "data.held_out_fraction=0")  # truncated to questions alone
    refused(capfd, "train", recipe, "data.held_out_fraction=0.999")
    refused(capfd, "train", recipe, f"data.chat_template={tmp_path / 'none.jinja'}")
    assert not (tmp_path / "run").exists()


def test_bad_method_and_device(recipe_file: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    recipe = str(recipe_file)
    message = refused(capfd, "train", recipe, "method.target_modules=[q_prj]")
    assert "Did you mean 'q_proj'?" in message
    assert "down_proj, embed_tokens, gate_proj, k_proj" in message
    assert "method.r is 64" in refused(capfd, "train", recipe, "method.r=64")
    if not torch.cuda.is_available():
        without = "the build without CUDA" if torch.__version__.endswith("+cpu") else "0 CUDA devices"
        assert without in refused(capfd, "train", recipe, "device.name=cuda:999")
    assert "device.name" in refused(capfd, "train", recipe, "device.name=tpu")
    assert not (tmp_path / "run").exists()


# --- the run folder --------------------------------------------------------------------------------------------------


def test_existing_folder_is_refused_unless_told(
    recipe_file: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "run"
    folder.mkdir()
    (folder / "thesis.txt").write_text("dear")
    assert "holds other files and is no run folder; choose another place" in refused(capfd, "train", str(recipe_file))
    # told, but what is there was never a run
    assert "is not a run folder" in refused(capfd, "train", str(recipe_file), "overwrite=true")
    assert [path.name for path in folder.iterdir()] == ["thesis.txt"]
    file = tmp_path / "file"
    file.write_text("")
    assert "is a file" in refused(capfd, "train", str(recipe_file), f"folder={file}")
    assert str(file) in refused(capfd, "train", str(recipe_file), f"folder={file}/run")


def test_resume_of_no_run(tmp_path: Path, recipe_file: Path, capfd: pytest.CaptureFixture[str]) -> None:
    assert "is no run folder" in refused(capfd, "resume", str(tmp_path))
    assert "is a file; expected a folder" in refused(capfd, "resume", str(recipe_file))
    assert "There is no run folder" in refused(capfd, "resume", str(tmp_path / "none"))


def test_diverging_run_is_named(recipe_file: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """A step that is not finite is refused with its number and rows, and its report says so until it goes on."""
    message = refused(capfd, "train", str(recipe_file), "method.alpha=1e38", "evaluation.prompts=0")
    assert "No step was taken" in message
    assert "on rows" in message
    page = (tmp_path / "run/report.html").read_text(encoding="utf-8")
    assert '<p class="verdict worse"><b>Stopped</b> Step ' in page
    assert "No step was taken" in page
    assert "training.learning_rate=" in page  # what to do next
    log = tmp_path / "run/metrics.jsonl"
    last = json.loads(log.read_text(encoding="utf-8").splitlines()[-1])
    assert last["stopped"].startswith(f"Step {last['step']} gave")
    MetricsLog(log).rewind(last["step"] - 1)
    assert '"stopped"' not in log.read_text(encoding="utf-8")


# --- what does not fit -----------------------------------------------------------------------------------------------


def test_full_disk_is_found_first(
    recipe_file: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda place: SimpleNamespace(total=2**30, used=2**30, free=1000))
    message = refused(capfd, "train", str(recipe_file), status=3)
    assert "but 1000 B are free" in message
    assert not (tmp_path / "run").exists()


def test_too_little_memory_is_found_first(
    recipe_file: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(planner, "total_memory_bytes", lambda device: (2**20, 2**30))
    for verb in ("plan", "train"):
        message = refused(capfd, verb, str(recipe_file), status=3)
        assert "of whose 1.00 GiB 1.0 MiB are free" in message
        assert "runtime" in message
        assert "No arrangement fits. The smallest" in message
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("error", "status", "words"),
    [
        (OSError(errno.ENOSPC, "No space left on device"), 3, "disk is full"),
        (RuntimeError("I/O error: No space left on device (os error 28)"), 3, "disk is full"),
        (PermissionError(errno.EACCES, "Permission denied"), 2, "Permission denied"),
        (MemoryError("no room"), 3, "Out of memory"),
        (MemoryError(), 3, "Out of memory (MemoryError)"),
        (RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried"), 3, "Out of memory"),
        (KeyboardInterrupt(), 130, "stopped"),
    ],
)
def test_errors_of_the_system(
    error: BaseException,
    status: int,
    words: str,
    recipe_file: Path,
    capfd: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def fail(*arguments: object) -> None:
        raise error

    monkeypatch.setattr(run, "train", fail)
    assert words in refused(capfd, "train", str(recipe_file), status=status)


def test_defect_shows_where_it_is(
    recipe_file: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(run, "train", lambda recipe: 1 / 0)
    assert main(["train", str(recipe_file)]) == 1
    errors = capfd.readouterr().err
    assert "ZeroDivisionError" in errors
    assert "defect of qlora" in errors


def test_command_in_a_process(tmp_path: Path) -> None:
    """What a shell sees: the status and one line, from ``python -m`` as from the installed command."""
    done = subprocess.run(
        [sys.executable, "-m", "qlora.cli", "train", str(tmp_path / "none.yaml")],
        capture_output=True,
        text=True,
        check=False,
        cwd=Path(__file__).parents[1],
    )
    assert done.returncode == 2
    assert done.stdout == ""
    assert done.stderr.startswith("qlora: There is no recipe")
    assert done.stderr.count("\n") == 1


@pytest.mark.parametrize("words", [["plan", "hours=2"], ["hours=2", "plan"]])
def test_a_study_is_planned_wherever_the_word_stands(
    words: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("qlora.studies.first.look_at_study", lambda *given: print("looked at", *given))
    monkeypatch.setattr("qlora.studies.run.plan_study", lambda *given: f"planned {' '.join(given)}")
    assert main(["study", "rank.yaml", *words]) == 0
    assert capsys.readouterr().out.splitlines() == ["looked at rank.yaml hours=2", "planned rank.yaml hours=2"]
