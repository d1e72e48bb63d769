"""`qlora train` and `resume` in several processes: one run folder, one voice, and whatever ends one ends all, with nothing lost."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import yaml
from safetensors.torch import load_file

from qlora.runs.train import _begun_before
from qlora.training.record import launcher
from tests import processes
from tests.processes import Started
from tests.steps import LATER
from tests.tiny import tiny_values
from tests.together import environments

SOON = 30.0  # seconds in which the others end, on a machine that is busy with other things; idle it is one or two


@pytest.fixture
def recipe(tiny_model: Path, chat_data: Path, tmp_path: Path) -> Path:
    """Twelve steps, a checkpoint after each second, rows one by one so that dropout is the same however many processes there are."""
    values = tiny_values(tiny_model, chat_data, tmp_path / "run")
    values["training"] |= {"steps": 12, "save_every": 2, "micro_batch_size": 1}
    values["evaluation"] |= {"every": 5}
    path = tmp_path / "tiny.yaml"
    path.write_text(yaml.safe_dump(values), encoding="utf-8")
    return path


def launch(size: int, *words: object, **faults: Any) -> list[Started]:
    """The processes of one run. ``faults`` befall the one named by ``victim``, or all."""
    victim = faults.pop("victim", None)
    return [
        processes.start(*words, environment=one, **(faults if victim in (None, rank) else {}))
        for rank, one in enumerate(environments(size))
    ]


def losses(folder: Path) -> dict[int, float]:
    lines = map(json.loads, (folder / "metrics.jsonl").read_text().splitlines())
    return {line["step"]: line["loss"] for line in lines if "loss" in line}


def reach(folder: Path, step: int) -> None:
    """Wait until so many steps are done."""
    end = time.monotonic() + processes.LONGEST
    while time.monotonic() < end:
        if (folder / "metrics.jsonl").is_file() and len(losses(folder)) >= step:
            return
        time.sleep(0.02)
    raise AssertionError("no step was taken")


def started_by_torchrun(*words: object, module: str = "torch.distributed.run", **options: Any) -> Any:
    command = [sys.executable, "-m", module, *map(str, words)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.run(command, capture_output=True, text=True, timeout=600, env=environment, **options)


@pytest.mark.slow
@pytest.mark.parametrize("launcher", ["torchrun", "accelerate"])
def test_a_launcher_starts_a_run_that_is_one_processs(launcher: str, recipe: Path, tmp_path: Path) -> None:
    alone = processes.run("train", recipe, f"folder={tmp_path / 'alone'}")
    assert alone.status == 0, alone.errors
    torchrun = ("--standalone", "--nproc-per-node", 2, "-m", "qlora", "train", recipe)
    accelerate = (
        "launch",
        "--cpu",
        "--num_processes",
        2,
        "--num_machines",
        1,
        "--mixed_precision",
        "no",
        "-m",
        "qlora",
        "train",
        recipe,
    )
    ended = (
        started_by_torchrun(*torchrun)
        if launcher == "torchrun"
        else started_by_torchrun(*accelerate, module="accelerate.commands.accelerate_cli")
    )
    assert ended.returncode == 0, ended.stderr[-2000:]
    one, several = tmp_path / "alone", tmp_path / "run"
    assert losses(several) == pytest.approx(losses(one), rel=LATER)
    names = [{path.relative_to(folder) for path in folder.rglob("*")} for folder in (one, several)]
    assert names[0] == names[1]
    assert (one / "adapter/adapter_config.json").read_bytes() == (several / "adapter/adapter_config.json").read_bytes()
    assert ended.stdout.count("Run folder") == 1
    assert ended.stderr.count("Measuring the held-out loss before training") == 1


@pytest.mark.slow
@pytest.mark.parametrize("method", ["full", "lora"])
def test_layers_that_are_spread_give_the_run_of_one_process(method: str, recipe: Path, tmp_path: Path) -> None:
    """Evaluated on the way, resumed by three, then evaluated and merged by one alone."""
    values = yaml.safe_load(recipe.read_text(encoding="utf-8"))
    if method == "full":
        values |= {"method": {"name": "full"}, "model": values["model"] | {"quantization": "none"}}
        values["training"]["learning_rate"] = 1e-4
    recipe.write_text(yaml.safe_dump(values), encoding="utf-8")
    one, several = tmp_path / "alone", tmp_path / "run"
    assert processes.run("train", recipe, f"folder={one}").status == 0
    started = launch(2, "train", recipe, "memory.layers=streamed", "memory.tier=processes")
    reach(several, 5)
    os.kill(started[1].pid, signal.SIGTERM)
    assert [ended.status for ended in [one.wait() for one in started]] == [128 + signal.SIGTERM] * 2
    again = [ended.wait() for ended in launch(3, "resume", several)]
    assert [ended.status for ended in again] == [0] * 3, again[0].errors
    assert losses(several) == pytest.approx(losses(one), rel=LATER)
    adapters = [load_file(folder / "adapter" / "adapter_model.safetensors") for folder in (one, several)]
    assert {key: values.shape for key, values in adapters[0].items()} == {
        key: values.shape for key, values in adapters[1].items()
    }
    evaluated = processes.run("evaluate", several)
    assert evaluated.status == 0, evaluated.errors
    merged = processes.run("export", several, "merged", f"out={tmp_path / 'merged'}")
    assert merged.status == 0, merged.errors


@pytest.mark.slow
@pytest.mark.parametrize("victim", [0, 1])
def test_when_one_is_killed_all_end_and_any_number_goes_on(victim: int, recipe: Path, tmp_path: Path) -> None:
    folder, size = tmp_path / "run", 2
    assert processes.run("train", recipe, f"folder={tmp_path / 'alone'}").status == 0
    started = launch(size, "train", recipe)
    reach(folder, 5)
    os.kill(started[victim].pid, signal.SIGKILL)
    killed = time.monotonic()
    ended = [one.wait() for one in started]
    assert time.monotonic() - killed < SOON
    assert ended[victim].status == -signal.SIGKILL
    assert ended[1 - victim].status == 5
    said = ended[1 - victim].errors
    assert said.count("Another of the 2 processes ended") == 1
    assert "go on with qlora resume RUN" in said
    assert "Traceback" not in said
    for other in (3, 1):
        again = (
            [one.wait() for one in launch(other, "resume", folder)] if other > 1 else [processes.run("resume", folder)]
        )
        assert [one.status for one in again] == [0] * other, again[0].errors
    assert losses(folder) == pytest.approx(losses(tmp_path / "alone"), rel=LATER)


@pytest.mark.slow
def test_a_signal_to_one_stops_all_with_the_step_saved(recipe: Path, tmp_path: Path) -> None:
    started = launch(2, "train", recipe)
    reach(tmp_path / "run", 3)
    os.kill(started[1].pid, signal.SIGTERM)
    ended = [one.wait() for one in started]
    assert [one.status for one in ended] == [128 + signal.SIGTERM] * 2
    assert sum(one.errors.count("the state is in") for one in ended) == 1
    done = max(losses(tmp_path / "run"))
    assert (tmp_path / "run" / "checkpoints" / f"{done:06d}" / "checksums.json").is_file()


@pytest.mark.slow
def test_a_disk_that_is_full_ends_all(recipe: Path, tmp_path: Path) -> None:
    """Of the main process, which writes: the others hear of it, and one sentence says it."""
    started = launch(2, "train", recipe, victim=0, limit=9000)
    ended = [one.wait() for one in started]
    assert [one.status for one in ended] == [3, 5]
    assert sum(one.errors.count("is full, or no file may be that large") for one in ended) == 1
    assert "Another of" not in ended[0].errors + ended[1].errors


@pytest.mark.slow
def test_a_mistake_is_said_once(recipe: Path) -> None:
    ended = [one.wait() for one in launch(2, "train", recipe, "training.batch_size=many")]
    assert [one.status for one in ended] == [2, 2]
    assert sum("training.batch_size" in one.errors for one in ended) == 1
    ended = [one.wait() for one in launch(2, "export", recipe)]
    assert sum("qlora export is done by one process" in one.errors for one in ended) == 1


def test_torchrun_starts_its_own_run_again_and_no_other(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """After a process ended, ``torchrun --max-restarts`` gives the same command anew: it goes on with what it began, and is refused in
    a folder where another run is."""
    monkeypatch.setattr("qlora.runs.train.here", lambda: SimpleNamespace(size=2, once=lambda make: make()))
    (tmp_path / "environment.json").write_text(json.dumps({"started_by": launcher()}))
    assert not _begun_before(tmp_path)
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "1")
    assert _begun_before(tmp_path)
    for other in ({"started_by": "elsewhere 1"}, {}):
        (tmp_path / "environment.json").write_text(json.dumps(other))
        assert not _begun_before(tmp_path)
    (tmp_path / "environment.json").unlink()
    assert not _begun_before(tmp_path)
