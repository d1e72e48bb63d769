"""Faults in real processes: kills, signals, full disks, damage, locks, odd places, clocks, no network, and what survives.

The first three tests run a few of the trials of ``make survive``; the others are of faults that need no numbers.
"""

from __future__ import annotations

import json
import os
import shlex
import shutil
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from benchmarks.survive import damage, disk, kills
from benchmarks.survive.kills import Course, Trial, courses
from benchmarks.survive.size import Size
from benchmarks.survive.tiny import Ended, Nursery, Scene, broken, difference, metrics, nurseries, one_sentence
from qlora.files.durable import clear_leftovers, file_written_aside

OFFLINE = {"HF_HUB_OFFLINE": None, "TRANSFORMERS_OFFLINE": None}


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("faults")


@pytest.fixture(scope="module")
def nursery() -> Nursery:
    return nurseries(1)[0]


@pytest.fixture(scope="module")
def plain(place: Path, nursery: Nursery) -> Course:
    return courses(place, [nursery])[0]


@pytest.fixture(scope="module")
def cached(place: Path, nursery: Nursery) -> Course:
    return courses(place, [nursery])[1]


def at(course: Course, event: str, number: int = 1) -> str:
    """The number of the ``number``-th event whose name begins so, as a fault takes it."""
    return str(course.moments(lambda name: name.startswith(event))[number - 1])


def refused(ended: Ended, *words: str, status: int = 2) -> None:
    """Whether a command ended in one sentence that holds the words."""
    assert ended.status == status, ended.errors
    assert one_sentence(ended.errors) is None
    sentence = next(line for line in ended.errors.splitlines() if line.startswith("qlora: "))
    for word in words:
        assert word in sentence


def assert_same_numbers(folder: Path, expected: Path) -> None:
    """Where the model has another name, which an adapter holds too."""
    assert broken(folder) is None
    assert metrics(folder) == metrics(expected)
    ours, theirs = (load_file(run / "adapter" / "adapter_model.safetensors") for run in (folder, expected))
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(values, theirs[name]) for name, values in ours.items())


def half_done(course: Course, nursery: Nursery, name: str) -> Trial:
    """A run that was killed when its second checkpoint, after step 4, had been written."""
    trial = Trial(course, name)
    ended = trial.train(nursery, at={at(course, "line", 7): signal.SIGKILL})
    assert ended.status == -signal.SIGKILL, ended.errors
    assert sorted(path.name for path in (trial.folder / "checkpoints").iterdir()) == ["000002", "000004"]
    return trial


# --- a few trials of each fault that is counted ----------------------------------------------------------------------


@pytest.mark.parametrize("part", [kills, disk, damage], ids=lambda part: part.__name__.rpartition(".")[2])
def test_every_trial_survives(part: object, place: Path, plain: Course) -> None:
    rows = part.run(place, Size(small=True), print)  # type: ignore[attr-defined]
    assert len(rows) >= 2
    assert all(row["trials"] for row in rows)
    assert [row for row in rows if row["lost"] or row["survived"] != row["trials"]] == []


def test_the_trials_can_fail(plain: Course, nursery: Nursery) -> None:
    """What decides that a run survived notices one that did not."""
    trial = Trial(plain, "other")
    shutil.copytree(plain.expected, trial.folder)
    assert difference(trial.folder, plain.expected) is None
    (trial.folder / ".adapter.writing-1").mkdir()
    assert "left over" in str(difference(trial.folder, plain.expected))
    (trial.folder / ".adapter.writing-1").rmdir()
    lines = (trial.folder / "metrics.jsonl").read_text().splitlines()
    (trial.folder / "metrics.jsonl").write_text("\n".join(lines[:-1]))
    assert "metrics.jsonl" in str(difference(trial.folder, plain.expected))
    (trial.folder / "checkpoints" / "000006" / "optimizer.safetensors").unlink()
    assert "is missing" in str(broken(trial.folder))
    assert one_sentence("Traceback (most recent call last):\nqlora: x")
    assert one_sentence("qlora: a\nqlora: b")
    shutil.rmtree(trial.folder)
    assert "exit status -11" in str(trial.survives(nursery, [{"at": {"1": signal.SIGSEGV}}]))


def test_a_kill_while_an_old_checkpoint_is_deleted_leaves_nothing_of_it(plain: Course, nursery: Nursery) -> None:
    trial = Trial(plain, "deleting")
    assert trial.survives(nursery, [{"at": {at(plain, "rmdir .000002.gone"): signal.SIGKILL}}]) is None


# --- signals ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("number", "status"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_signal_while_the_model_is_loaded_ends_in_a_sentence(
    number: int, status: int, plain: Course, nursery: Nursery
) -> None:
    trial = Trial(plain, f"loading-{status}")
    refused(trial.train(nursery, hits=[(0.0, number)]), "nothing that was saved is lost", status=status)
    assert not trial.folder.exists()


def test_work_goes_on_when_nobody_reads_what_it_says(plain: Course, nursery: Nursery) -> None:
    trial = Trial(plain, "deaf")
    assert trial.lost_of(trial.train(nursery, deaf=True).status) is None


# --- two processes on one folder -------------------------------------------------------------------------------------


def test_a_second_process_is_refused_while_the_first_lives_and_takes_over_when_it_is_dead(
    plain: Course, nursery: Nursery
) -> None:
    trial = Trial(plain, "locked")
    first = trial.train(nursery, at={at(plain, "line", 7): signal.SIGSTOP})
    assert first.stopped
    try:
        refused(nursery.run("resume", trial.folder), "Another process", str(first.process), str(trial.folder))
        train = ["train", plain.recipe, f"folder={trial.folder}"]
        refused(nursery.run(*train, "overwrite=true"), "Another process", str(trial.folder))
        refused(nursery.run(*train), str(trial.folder))
        # what only reads goes on beside it
        for words in (["evaluate"], ["export", "adapter"], ["report"], ["chat"]):
            ended = nursery.run(words[0], trial.folder, *words[1:], asked="fox?\n")
            assert ended.status == 0, ended.errors
        assert (trial.folder / "portable" / "chat_template.jinja").is_file()
    finally:
        os.kill(first.process, signal.SIGKILL)
        dead = nursery.go_on(first.process)
    assert dead.status == -signal.SIGKILL
    shutil.rmtree(trial.folder / "portable")
    assert trial.lost_of(nursery.run("resume", trial.folder).status) is None


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


def test_of_two_at_the_same_moment_one_wins(plain: Course, nursery: Nursery) -> None:
    trial = Trial(plain, "race")
    words = ["train", plain.recipe, f"folder={trial.folder}"]
    ended = sorted(nursery.together([words, words]), key=lambda one: one.status)
    assert [one.status for one in ended] == [0, 2], [one.errors for one in ended]
    refused(ended[1], str(trial.folder))
    assert trial.lost_of(0) is None
    shutil.rmtree(trial.folder / "checkpoints" / "000006")
    words = ["resume", str(trial.folder)]
    ended = sorted(nursery.together([words, words]), key=lambda one: one.status)
    assert [one.status for one in ended] == [0, 2], [one.errors for one in ended]
    refused(ended[1], "Another process")
    assert trial.lost_of(0) is None


# --- what changes under a run ----------------------------------------------------------------------------------------


def test_a_data_file_that_changes_is_said_once_and_refused_afterwards(
    plain: Course, nursery: Nursery, tmp_path: Path
) -> None:
    trial, data = Trial(plain, "changed"), tmp_path / "mine.jsonl"
    shutil.copy(plain.scene.data, data)
    words = ["train", plain.recipe, f"folder={trial.folder}", f"data.train={data}"]
    stop = {at(plain, "line", 2): signal.SIGSTOP}
    first = nursery.run(*words, watch=str(trial.place), at=stop)
    assert first.stopped
    data.write_text(data.read_text().replace("copytree", "rmtree"))
    ended = nursery.go_on(first.process)
    assert ended.status == 0, ended.errors
    assert ended.errors.count(f"'{data}' has other content since this run read it") == 1
    refused(nursery.run("resume", trial.folder), "has changed", str(data))


def test_resume_takes_what_changes_no_number_and_refuses_the_rest(plain: Course, nursery: Nursery) -> None:
    trial = half_done(plain, nursery, "overrides")
    before = {path: path.read_bytes() for path in trial.folder.rglob("*") if path.is_file() and path.name != ".lock"}
    for override, word in (
        ("training.learning_rate=1", "training.learning_rate"),
        ("method.r=8", "method.r"),
        ("training.steps=60", "training.steps"),
        ("data.max_length=32", "data.max_length"),
        ("training.micro_batch=1", "micro_batch"),
        ("nonsense", "nonsense"),
    ):
        refused(nursery.run("resume", trial.folder, override), word)
    now = {path: path.read_bytes() for path in trial.folder.rglob("*") if path.is_file() and path.name != ".lock"}
    assert now == before
    ended = nursery.run("resume", trial.folder, "training.micro_batch_size=1", "training.save_every=5")
    assert ended.status == 0, ended.errors
    last = [line for line in metrics(trial.folder) if "loss" in line]
    expected = [line for line in metrics(plain.expected) if "loss" in line]
    assert [line["micro_batch_size"] for line in last] == [2, 2, 2, 2, 1, 1]
    # dropout draws otherwise for other micro-batches
    assert [line["loss"] for line in last] == pytest.approx([line["loss"] for line in expected], rel=1e-2)
    assert [line["target_tokens"] for line in last] == [line["target_tokens"] for line in expected]
    assert (trial.folder / "recipe.yaml").read_bytes() == before[trial.folder / "recipe.yaml"]
    names = [path.name for path in sorted((trial.folder / "checkpoints").iterdir())]
    assert names == ["000005", "000006"]


# --- where it runs ---------------------------------------------------------------------------------------------------

ODD = ["-a dash, two  spaces, 'q\" #: %s {x} [y] $HOME ;*", "Ünï文字🦊\nline"]


@pytest.mark.parametrize("name", ODD, ids=["signs", "unicode"])
def test_paths_may_be_odd(name: str, cached: Course, nursery: Nursery, tmp_path: Path) -> None:
    """Of the recipe, the run folder, the model, the data and the cache; also as a relative path."""
    scene = Scene.__new__(Scene)
    scene.place = tmp_path / name
    scene.model, scene.data = scene.place / "model", scene.place / f"{name}.jsonl"
    shutil.copytree(cached.scene.model, scene.model)
    shutil.copy(cached.scene.data, scene.data)
    recipe = scene.recipe(scene.place / f"{name}.yaml", Path(name), scene.place / f"cache {name}")
    ended = nursery.run("train", recipe.name, beside=str(scene.place))
    assert ended.status == 0, ended.errors
    folder = scene.place / name
    assert (scene.place / f"cache {name}").is_dir()
    assert_same_numbers(folder, cached.expected)
    shutil.rmtree(folder / "checkpoints" / "000006")
    ended = nursery.run("resume", name, hits=[(0.0, signal.SIGTERM)], beside=str(scene.place))
    assert ended.status == 143
    # what it says to do is done as a shell would do it
    refused_again = nursery.run("train", recipe.name, beside=str(scene.place))
    assert refused_again.status == 2
    advice = refused_again.errors.partition("qlora resume ")[2].partition("), choose another")[0]
    assert shlex.split(advice) == [name]
    ended = nursery.run("resume", *shlex.split(advice), beside=str(scene.place))
    assert ended.status == 0, ended.errors
    assert_same_numbers(folder, cached.expected)


@contextmanager
def read_only(nursery: Nursery, folder: Path) -> Iterator[None]:
    """Inside, the nursery's children cannot write into a folder."""
    if nursery.mounts:
        words = shlex.quote(str(folder))
        nursery.shell(f"mount --bind {words} {words} && mount -o remount,bind,ro {words}")
    elif os.geteuid():
        folder.chmod(0o555)
    else:
        pytest.skip("no mounts here, and nothing else stops root")
    try:
        yield
    finally:
        if nursery.mounts:
            nursery.shell(f"umount {words}")
        else:
            folder.chmod(0o755)


def test_a_run_folder_that_cannot_be_written_is_read(plain: Course, nursery: Nursery) -> None:
    trial = half_done(plain, nursery, "read-only")
    with read_only(nursery, trial.folder):
        assert nursery.run("evaluate", trial.folder).status == 0
        assert nursery.run("chat", trial.folder, asked="fox?\n").status == 0
        assert nursery.run("export", trial.folder, "adapter", f"out={trial.place / 'out'}").status == 0
        for words in (["resume"], ["report"], ["export", "adapter"]):
            refused(nursery.run(words[0], trial.folder, *words[1:]), str(trial.folder))
        train = ["train", plain.recipe, f"folder={trial.folder / 'inside'}"]
        refused(nursery.run(*train), str(trial.folder / "inside"), "folder=")
    assert trial.lost_of(nursery.run("resume", trial.folder).status) is None


def test_a_model_and_a_cache_that_cannot_be_written_are_read(cached: Course, nursery: Nursery, tmp_path: Path) -> None:
    model = shutil.copytree(cached.scene.model, tmp_path / "model")
    assert cached.cache is not None
    trial, cache = Trial(cached, "read-only"), shutil.copytree(cached.cache, tmp_path / "cache")
    words = ["train", cached.recipe, f"model.name={model}", f"memory.cache={cache}", f"folder={trial.folder}"]
    with read_only(nursery, model), read_only(nursery, cache):
        ended = nursery.run(*words)
        assert ended.status == 0, ended.errors
        assert_same_numbers(trial.folder, cached.expected)
        shutil.rmtree(trial.folder)
    shutil.rmtree(cache)
    cache.mkdir()
    with read_only(nursery, cache):
        refused(nursery.run(*words), str(cache), "memory.cache")


def test_no_home_is_needed(plain: Course, nursery: Nursery) -> None:
    trial = Trial(plain, "home")
    names = ("HOME", "XDG_CACHE_HOME", "QLORA_CACHE", "HF_HOME")
    ended = trial.train(nursery, environment={**dict.fromkeys(names), "HOME": "/dev/null"})
    assert trial.lost_of(ended.status) is None, ended.errors


def test_the_time_of_day_may_jump(plain: Course, nursery: Nursery) -> None:
    trial = Trial(plain, "clock")
    assert trial.lost_of(trial.train(nursery, clock=True).status) is None
    text = (trial.folder / "metrics.jsonl").read_text()
    assert all(0 < json.loads(line)["seconds"] < 60 for line in text.splitlines() if '"seconds"' in line)


def test_without_a_network_local_files_suffice_and_the_hub_is_missed_at_once(
    plain: Course, nursery: Nursery, tmp_path: Path
) -> None:
    trial = Trial(plain, "offline")
    ended = trial.train(nursery, offline=True)
    assert "CONNECTS" not in ended.errors
    assert trial.lost_of(ended.status) is None, ended.errors
    empty = {**OFFLINE, "HF_HOME": str(tmp_path), "QLORA_CACHE": str(tmp_path)}
    words = ["train", plain.recipe, f"folder={trial.place / 'second'}"]
    ended = nursery.run(*words, "model.name=nobody/nothing", offline=True, environment=empty)
    refused(ended, "nobody/nothing", "hub cannot be reached")
    assert ended.seconds < 15
    assert not (trial.place / "second").exists()
