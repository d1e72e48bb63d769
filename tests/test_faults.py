"""Faults in real processes: kills, signals, full disks, damage, locks, odd places, clocks, no network, and what survives.

Of each law one instance is fast; the others, and the long campaign of ``make survive``, need more time.
"""

from __future__ import annotations

import json
import os
import shlex
import shutil
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file

from qlora.files.durable import clear_leftovers, damage, file_written_aside
from qlora.files.lock import LOCK
from qlora.files.strangers import Fault, read_object
from qlora.runs.folder import RUN_FILES
from tests.processes import NO_MOUNTS, Ended, run, start
from tests.tiny import conversations, write_lines

CLOCKED = ("tokens_per_second", "seconds", "peak_memory_bytes", "resumed")  # what two equal runs need not share
OFFLINE = {"HF_HUB_OFFLINE": None, "TRANSFORMERS_OFFLINE": None}
slow = pytest.mark.slow


class Course:
    """A run that nothing disturbed: six steps, evaluations after 3 and at the end, checkpoints after 2, 4 and 6, two kept."""

    def __init__(self, place: Path, model: Path, data: Path, streamed: bool = False) -> None:
        self.place, self.model, self.data = place, model, data
        self.cache = place / "cache" if streamed else None
        self.recipe, self.expected = place / "recipe.yaml", place / "run"
        self.write(self.recipe, self.expected, self.cache)
        ended = run("train", self.recipe)
        assert ended.status == 0, ended.errors

    def write(self, path: Path, folder: Path, cache: Path | None) -> Path:
        memory = {"layers": "streamed", "tier": "disk", "cache": str(cache)} if cache else {}
        values = {
            "model": {"name": str(self.model)},
            "method": {"r": 4, "alpha": 8, "dropout": 0.1},
            "data": {"train": str(self.data), "held_out_fraction": 0.2, "max_length": 64, "packing": False},
            "training": {
                "steps": 6, "batch_size": 4, "micro_batch_size": 2, "learning_rate": 0.02, "save_every": 2,
                "keep_checkpoints": 2,
            },
            "evaluation": {"every": 3, "held_out_rows": 4, "prompts": 1, "max_new_tokens": 4},
            "device": {"name": "cpu", "threads": 1},
            "memory": {"rehearse": False, **memory},
            "folder": str(folder),
        }  # fmt: skip
        path.write_text(yaml.safe_dump(values, allow_unicode=True), encoding="utf-8")
        return path

    def words(self, folder: Path) -> list[object]:
        """The command that trains it anew in another folder."""
        return ["train", self.recipe, f"folder={folder}"]

    def train(self, folder: Path, **faults: Any) -> Ended:
        return run(*self.words(folder), **faults)

    def half_done(self, folder: Path) -> None:
        """A run that was killed when its second checkpoint, after step 4, had been written."""
        ended = self.train(folder, at=("line", 7, signal.SIGKILL))
        assert ended.status == -signal.SIGKILL, ended.errors
        assert sorted(path.name for path in (folder / "checkpoints").iterdir()) == ["000002", "000004"]


@pytest.fixture(scope="module")
def plain(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Course:
    place = tmp_path_factory.mktemp("plain")
    return Course(place, tiny_model, write_lines(place / "chat.jsonl", conversations(24)))


@pytest.fixture(scope="module")
def cached(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Course:
    """Every layer is streamed from a file cache."""
    place = tmp_path_factory.mktemp("cached")
    return Course(place, tiny_model, write_lines(place / "chat.jsonl", conversations(24)), streamed=True)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tmp_path / "run"


# --- what must come out ------------------------------------------------------------------------------------------------


def broken(folder: Path) -> str | None:
    """What in a run folder has a name that is used and is not what was written, in a few words, or None."""
    for place in (*(folder / "checkpoints").glob("[0-9]*"), folder / "adapter"):
        if place.is_dir() and (why := damage(place)):
            return f"{place.name}: {why}"
    for name in ("environment.json", "plan.json", "evaluation.json", "method.json"):
        try:
            read_object(folder / name)
        except Fault:
            return f"{name} is torn"
    report = folder / "report.html"
    if report.is_file() and not report.read_text(encoding="utf-8").rstrip().endswith("</html>"):
        return "report.html is torn"
    return None


def difference(folder: Path, expected: Path) -> str | None:
    """In what a finished run differs from ``expected``, in a few words, or None. Clocks and memory may differ."""
    if why := broken(folder):
        return why
    if strange := {path.name for path in folder.iterdir()} - {*RUN_FILES, LOCK}:
        return f"left over: {sorted(strange)}"
    ours, theirs = (sorted(place.name for place in (run / "checkpoints").iterdir()) for run in (folder, expected))
    if any(not name.isdecimal() for name in ours) or ours[-1] != theirs[-1]:
        return f"checkpoints {ours} instead of {theirs}"
    for part in ("adapter", f"checkpoints/{theirs[-1]}"):
        found, wanted = ({p.name: p.read_bytes() for p in (run / part).iterdir()} for run in (folder, expected))
        if found != wanted:
            return f"{part} is other: {sorted(n for n in {*found, *wanted} if found.get(n) != wanted.get(n))}"
    if metrics(folder) != metrics(expected):
        return "metrics.jsonl tells other numbers"
    if (folder / "evaluation.json").read_bytes() != (expected / "evaluation.json").read_bytes():
        return "evaluation.json tells other numbers"
    return None


def metrics(folder: Path) -> list[dict[str, Any]]:
    """The lines of ``metrics.jsonl`` without what the clock and the machine decide."""
    lines = (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    return [{key: value for key, value in json.loads(line).items() if key not in CLOCKED} for line in lines]


def same(ended: Ended, folder: Path, course: Course) -> None:
    """A command ended well, and the run is the one that nothing disturbed."""
    assert ended.status == 0, ended.errors
    assert difference(folder, course.expected) is None


def refused(ended: Ended, *words: str, status: int = 2) -> None:
    """A command ended in one sentence that holds the words."""
    assert ended.status == status, ended.errors
    assert "Traceback" not in ended.errors
    (sentence,) = (line for line in ended.errors.splitlines() if line.startswith("qlora: "))
    for word in words:
        assert word in sentence


def assert_same_numbers(folder: Path, expected: Path) -> None:
    """Where the model has another name, which an adapter holds too."""
    assert broken(folder) is None
    assert metrics(folder) == metrics(expected)
    ours, theirs = (load_file(run / "adapter" / "adapter_model.safetensors") for run in (folder, expected))
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(values, theirs[name]) for name, values in ours.items())


@pytest.mark.slow
def test_a_difference_would_be_seen(plain: Course, folder: Path) -> None:
    shutil.copytree(plain.expected, folder)
    assert difference(folder, plain.expected) is None
    (folder / ".adapter.writing-1").mkdir()
    assert "left over" in str(difference(folder, plain.expected))
    (folder / ".adapter.writing-1").rmdir()
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    (folder / "metrics.jsonl").write_text("\n".join(lines[:-1]))
    assert "metrics.jsonl" in str(difference(folder, plain.expected))
    (folder / "checkpoints" / "000006" / "optimizer.safetensors").unlink()
    assert "is missing" in str(broken(folder))


# --- kills -------------------------------------------------------------------------------------------------------------

KILLS = [
    ("tensors optimizer", 2, True),  # with the second checkpoint half-written
    pytest.param("line", 3, True, marks=slow),
    pytest.param("line", 1, False, marks=slow),  # before the first step
    pytest.param("rename", 2, False, marks=slow),
    pytest.param("rmdir .000002.gone", 1, False, marks=slow),  # while an old checkpoint is deleted
    pytest.param("rename .evaluation.json", 1, False, marks=slow),
    pytest.param("flush", 9, False, marks=slow),
]


@pytest.mark.parametrize(("event", "number", "torn"), KILLS)
def test_a_killed_run_goes_on_and_is_the_run_that_was_not(
    plain: Course, folder: Path, event: str, number: int, torn: bool
) -> None:
    ended = plain.train(folder, at=(event, number, signal.SIGKILL), torn=torn)
    assert ended.status == -signal.SIGKILL, ended.errors
    assert broken(folder) is None
    began = (folder / "environment.json").is_file()
    same(run("resume", folder) if began else plain.train(folder), folder, plain)


@slow
def test_a_kill_while_the_file_cache_is_written(cached: Course, folder: Path, tmp_path: Path) -> None:
    words = [*cached.words(folder), f"memory.cache={tmp_path / 'cache'}"]
    assert run(*words, at=("flush", 1, signal.SIGKILL)).status == -signal.SIGKILL
    same(run(*words), folder, cached)


# --- full disks and damage ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("share", [0.5, *(pytest.param(share, marks=slow) for share in (0.05, 0.25, 0.9))])
@pytest.mark.slow
def test_a_full_disk_is_one_sentence_and_the_run_goes_on_when_there_is_room(
    plain: Course, folder: Path, share: float
) -> None:
    """A limit on the size of files stands for it: the same error at the same calls."""
    largest = max(path.stat().st_size for path in plain.expected.rglob("*") if path.is_file())
    ended = plain.train(folder, limit=int(share * largest))
    refused(ended, str(folder), status=3)
    assert any(word in ended.errors for word in ("room", "free some"))
    assert broken(folder) is None
    began = (folder / "environment.json").is_file()
    same(run("resume", folder) if began else plain.train(folder), folder, plain)


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


@pytest.mark.parametrize("file", ["optimizer.safetensors", *(pytest.param(name, marks=slow) for name in (
    "adapter_model.safetensors", "adapter_config.json", "state.json", "checksums.json"))])  # fmt: skip
def test_a_flipped_bit_of_the_newest_checkpoint_costs_the_steps_since_the_one_before(
    plain: Course, folder: Path, file: str
) -> None:
    shutil.copytree(plain.expected, folder)
    flip(folder / "checkpoints" / "000006" / file)
    ended = run("resume", folder)
    assert any("000006" in line and "damaged" in line for line in ended.errors.splitlines())
    assert "after step 4 " in ended.errors
    same(ended, folder, plain)


@slow
def test_with_every_checkpoint_damaged_nothing_is_changed(plain: Course, folder: Path) -> None:
    shutil.copytree(plain.expected, folder)
    for place in (folder / "checkpoints").iterdir():
        flip(place / "optimizer.safetensors")
    ended = run("evaluate", folder)
    assert ended.status == 0, ended.errors
    assert "The finished adapter is whole and is used" in ended.errors
    flip(folder / "adapter" / "adapter_model.safetensors")
    before = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file() and path.name != LOCK}
    for words in (["resume"], ["evaluate"], ["export"]):
        refused(run(words[0], folder, *(["merged"] if words == ["export"] else [])), "No checkpoint")
    assert before == {path: path.read_bytes() for path in folder.rglob("*") if path.is_file() and path.name != LOCK}


# --- signals -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("number", "status"), [(signal.SIGTERM, 143), pytest.param(signal.SIGINT, 130, marks=slow)])
def test_a_signal_before_anything_is_saved_ends_in_a_sentence(
    number: int, status: int, plain: Course, folder: Path
) -> None:
    refused(plain.train(folder, at=("line", 1, number)), status=status)
    assert broken(folder) is None


@slow
def test_work_goes_on_when_nobody_reads_what_it_says(plain: Course, folder: Path) -> None:
    same(plain.train(folder, deaf=True), folder, plain)


# --- two processes on one folder ---------------------------------------------------------------------------------------


@slow
def test_a_second_process_is_refused_while_the_first_lives_and_takes_over_when_it_is_dead(
    plain: Course, folder: Path
) -> None:
    first = start(*plain.words(folder), at=("line", 7, signal.SIGSTOP))
    first.wait_until_it_stands()
    try:
        refused(run("resume", folder), "Another process", str(first.pid), str(folder))
        refused(run(*plain.words(folder), "overwrite=true"), "Another process", str(folder))
        refused(run(*plain.words(folder)), str(folder))
        # what only reads goes on beside it
        for words in (["evaluate"], ["export", "adapter"], ["report"], ["chat"]):
            ended = run(words[0], folder, *words[1:], asked="fox?\n")
            assert ended.status == 0, ended.errors
        assert (folder / "portable" / "chat_template.jinja").is_file()
    finally:
        os.kill(first.pid, signal.SIGKILL)
        os.kill(first.pid, signal.SIGCONT)
        dead = first.wait()
    assert dead.status == -signal.SIGKILL
    shutil.rmtree(folder / "portable")
    same(run("resume", folder), folder, plain)


def test_a_leftover_of_a_process_with_this_number_is_cleared(tmp_path: Path) -> None:
    """In a container the next process often has the number of the one before."""
    for name in (f".a.writing-{os.getpid()}", f".b.old-{os.getpid()}", f".c.gone-{os.getpid()}"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "x").touch()
    (tmp_path / f".d.json.writing-{os.getpid()}").touch()
    with file_written_aside(tmp_path / "e") as aside:
        aside.touch()
        clear_leftovers(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["b", "e"]  # b was moved aside and has no successor


@pytest.mark.slow
def test_of_two_at_the_same_moment_one_wins(plain: Course, folder: Path) -> None:
    both = [start(*plain.words(folder)) for _ in range(2)]
    ended = sorted((one.wait() for one in both), key=lambda one: one.status)
    assert [one.status for one in ended] == [0, 2], [one.errors for one in ended]
    refused(ended[1], str(folder))
    same(ended[0], folder, plain)


# --- what changes under a run ------------------------------------------------------------------------------------------


@slow
def test_a_data_file_that_changes_is_said_once_and_refused_afterwards(
    plain: Course, folder: Path, tmp_path: Path
) -> None:
    data = tmp_path / "mine.jsonl"
    shutil.copy(plain.data, data)
    first = start(*plain.words(folder), f"data.train={data}", at=("line", 2, signal.SIGSTOP))
    first.wait_until_it_stands()
    data.write_text(data.read_text().replace("copytree", "rmtree"))
    os.kill(first.pid, signal.SIGCONT)
    ended = first.wait()
    assert ended.status == 0, ended.errors
    assert ended.errors.count(f"'{data}' has other content since this run read it") == 1
    refused(run("evaluate", folder), "has changed", str(data))


@slow
def test_resume_takes_what_changes_no_number_and_refuses_the_rest(plain: Course, folder: Path) -> None:
    plain.half_done(folder)
    before = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file() and path.name != LOCK}
    for override, word in (
        ("training.learning_rate=1", "training.learning_rate"),
        ("method.r=8", "method.r"),
        ("training.steps=60", "training.steps"),
        ("data.max_length=32", "data.max_length"),
        ("training.micro_batch=1", "micro_batch"),
        ("nonsense", "nonsense"),
    ):
        refused(run("resume", folder, override), word)
    assert before == {path: path.read_bytes() for path in folder.rglob("*") if path.is_file() and path.name != LOCK}
    ended = run("resume", folder, "training.micro_batch_size=1", "training.save_every=5")
    assert ended.status == 0, ended.errors
    last = [line for line in metrics(folder) if "loss" in line]
    expected = [line for line in metrics(plain.expected) if "loss" in line]
    assert [line["micro_batch_size"] for line in last] == [2, 2, 2, 2, 1, 1]
    assert last[:4] == expected[:4]
    # dropout draws otherwise for other micro-batches
    assert [line["loss"] for line in last] == pytest.approx([line["loss"] for line in expected], rel=0.1)
    assert [line["target_tokens"] for line in last] == [line["target_tokens"] for line in expected]
    assert (folder / "recipe.yaml").read_bytes() == before[folder / "recipe.yaml"]
    assert sorted(path.name for path in (folder / "checkpoints").iterdir()) == ["000005", "000006"]


# --- where it runs -----------------------------------------------------------------------------------------------------

ODD = ["-a dash, two  spaces, 'q\" #: %s {x} [y] $HOME ;*", "Ünï文字🦊\nline"]


@slow
@pytest.mark.parametrize("name", ODD, ids=["signs", "unicode"])
def test_paths_may_be_odd(name: str, cached: Course, tmp_path: Path) -> None:
    """Of the recipe, the run folder, the model, the data and the cache; also as a relative path."""
    place = tmp_path / name
    course = Course.__new__(Course)
    course.model, course.data = place / "model", place / f"{name}.jsonl"
    shutil.copytree(cached.model, course.model)
    shutil.copy(cached.data, course.data)
    recipe = course.write(place / f"{name}.yaml", Path(name), place / f"cache {name}")
    ended = run("train", recipe.name, beside=str(place))
    assert ended.status == 0, ended.errors
    folder = place / name
    assert (place / f"cache {name}").is_dir()
    assert_same_numbers(folder, cached.expected)
    shutil.rmtree(folder / "checkpoints" / "000006")
    # what it says to do is done as a shell would do it
    again = run("train", recipe.name, beside=str(place))
    assert again.status == 2
    advice = again.errors.partition("qlora resume ")[2].partition("), choose another")[0]
    assert shlex.split(advice) == [name]
    ended = run("resume", *shlex.split(advice), beside=str(place))
    assert ended.status == 0, ended.errors
    assert_same_numbers(folder, cached.expected)


def mounted(ended: Ended) -> Ended:
    if ended.status == NO_MOUNTS:
        pytest.skip("no mounts here, and nothing else stops root")
    return ended


@slow
def test_a_run_folder_that_cannot_be_written_is_read(plain: Course, folder: Path, tmp_path: Path) -> None:
    plain.half_done(folder)
    closed = {"read_only": (str(folder),)}
    for words in (["evaluate"], ["chat"], ["export", "adapter", f"out={tmp_path / 'out'}"]):
        ended = mounted(run(words[0], folder, *words[1:], asked="fox?\n", **closed))
        assert ended.status == 0, ended.errors
    for words in (["resume"], ["report"], ["export", "adapter"]):
        refused(run(words[0], folder, *words[1:], **closed), str(folder))
    refused(plain.train(folder / "inside", **closed), str(folder / "inside"), "folder=")
    folder.chmod(0o755)
    same(run("resume", folder), folder, plain)


@slow
def test_a_model_and_a_cache_that_cannot_be_written_are_read(cached: Course, folder: Path, tmp_path: Path) -> None:
    model = shutil.copytree(cached.model, tmp_path / "model")
    assert cached.cache is not None
    cache = shutil.copytree(cached.cache, tmp_path / "cache")
    words = [*cached.words(folder), f"model.name={model}", f"memory.cache={cache}"]
    ended = mounted(run(*words, read_only=(str(model), str(cache))))
    assert ended.status == 0, ended.errors
    assert_same_numbers(folder, cached.expected)
    shutil.rmtree(folder)
    cache.chmod(0o755)
    shutil.rmtree(cache)
    cache.mkdir()
    refused(run(*words, read_only=(str(cache),)), str(cache), "memory.cache")


@slow
def test_no_home_is_needed(plain: Course, folder: Path) -> None:
    names = ("HOME", "XDG_CACHE_HOME", "QLORA_CACHE", "HF_HOME")
    same(plain.train(folder, environment={**dict.fromkeys(names), "HOME": "/dev/null"}), folder, plain)


@slow
def test_the_time_of_day_may_jump(plain: Course, folder: Path) -> None:
    same(plain.train(folder, clock=True), folder, plain)
    text = (folder / "metrics.jsonl").read_text()
    assert all(0 < json.loads(line)["seconds"] < 60 for line in text.splitlines() if '"seconds"' in line)


@slow
def test_without_a_network_local_files_suffice_and_the_hub_is_missed_at_once(
    plain: Course, folder: Path, tmp_path: Path
) -> None:
    ended = plain.train(folder, offline=True)
    assert "CONNECTS" not in ended.errors
    same(ended, folder, plain)
    empty = {**OFFLINE, "HF_HOME": str(tmp_path), "QLORA_CACHE": str(tmp_path)}
    second = tmp_path / "second"
    ended = run(*plain.words(second), "model.name=nobody/nothing", offline=True, environment=empty)
    refused(ended, "nobody/nothing", "hub cannot be reached")
    assert ended.seconds < 15
    assert not second.exists()
