"""Files that are not what was written: cut short at random places, and with one bit that is another.

    checkpoints       every file: noticed by its checksum, the newest whole one taken, the loss said; none whole: one sentence
    file cache        noticed and made again
    everything else   in a run folder: refused in one sentence, or the trained numbers are the same

Knows the run folder's files and the command line; must not know how damage is noticed.
"""

from __future__ import annotations

import json
import random
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from benchmarks.survive.kills import Course, Trial, courses
from benchmarks.survive.nursery import Nursery, nurseries, row_of
from benchmarks.survive.scene import difference, metrics, one_sentence, row
from benchmarks.survive.size import Size
from qlora.files.durable import SEAL, damage

READERS = (["evaluate", "{run}"], ["export", "{run}", "adapter"], ["export", "{run}", "merged"], ["report", "{run}"])
OTHERS = ("recipe.yaml", "environment.json", "evaluation.json", "metrics.jsonl", "plan.json", "report.html")


def run(place: Path, size: Size, say: Callable[[str], None]) -> list[dict[str, Any]]:
    """Rows of the table: fault, trials, survived, lost."""
    chance, rows = random.Random(2), list[dict[str, Any]]()
    several = nurseries(size.of(1, 2))
    plain, cached = courses(place, several)

    def tried(fault: str, trials: Sequence[Any], work: Callable[[Nursery, Any], str | None]) -> None:
        rows.append(row_of(fault, several, trials, work, say))

    checkpoint = plain.expected / "checkpoints" / "000006"
    names = sorted(path.name for path in checkpoint.iterdir())
    every = [(name, chance.random(), how) for name in names for how in (_cut, _flip) for _ in range(size.of(5, 100))]
    copy = place / "damaged-checkpoint"
    shutil.rmtree(copy, ignore_errors=True)
    shutil.copytree(checkpoint, copy)
    rows.append(
        row("a file of a checkpoint cut short or with a flipped bit", [_noticed(copy, *case) for case in every])
    )
    say(f"{rows[-1]}")

    some = [(number, *case) for number, case in enumerate(chance.sample(every, size.of(1, 40)))]
    tried("… and the run is resumed", some, lambda nursery, case: _resumed(nursery, plain, *case))
    tried(
        "every checkpoint of a run damaged",
        [(number, chance.random()) for number in range(size.of(1, 5))],
        lambda nursery, case: _refused(nursery, plain, *case),
    )
    tried(
        "the NF4 file cache cut short or with a flipped bit",
        [
            (number, name, chance.random(), how)
            for number, (name, how) in enumerate(
                [("layers.bin", _flip), ("index.json", _flip), ("layers.bin", _cut), ("index.json", _cut)]
                * size.of(1, 8)
            )
        ][: size.of(1, 32)],
        lambda nursery, case: _made_again(nursery, cached, *case),
    )
    whole = [*OTHERS, *(f"adapter/{path.name}" for path in sorted((plain.expected / "adapter").iterdir()))]
    others = [(name, chance.random(), how) for name in whole for how in (_cut, _flip) for _ in range(size.of(1, 5))]
    chance.shuffle(others)
    others = others[: size.of(2, len(others))]
    tried(
        "another file of a run folder damaged, and the run resumed",
        [(number, *case) for number, case in enumerate(others)],
        lambda nursery, case: _gone_on(nursery, plain, *case),
    )
    tried(
        "another file of a run folder damaged, and the run evaluated, exported, reported",
        [
            (number, READERS[number % len(READERS)], number % 2 == 1, *case)
            for number, case in enumerate(others * size.of(1, 2))
        ],
        lambda nursery, case: _read(nursery, plain, *case),
    )
    return rows


def _cut(content: bytes, where: float) -> bytes:
    """Cut short at a share of the length."""
    return content[: int(where * len(content))]


def _flip(content: bytes, where: float) -> bytes:
    """One bit, at a share of the length, is another."""
    bit = int(where * len(content) * 8)
    return content[: bit // 8] + bytes([content[bit // 8] ^ 1 << bit % 8]) + content[bit // 8 + 1 :]


def _spoil(path: Path, where: float, how: Callable[[bytes, float], bytes]) -> bytes:
    """Damage a file; return what was in it."""
    content = path.read_bytes()
    path.write_bytes(how(content, where))
    return content


def _noticed(folder: Path, name: str, where: float, how: Callable[[bytes, float], bytes]) -> str | None:
    content = _spoil(folder / name, where, how)
    try:
        if damage(folder) is not None or _same(name, content, (folder / name).read_bytes()):
            return None
        return f"{name}, {how.__name__} at {where:.4f}: not noticed"
    finally:
        (folder / name).write_bytes(content)


def _same(name: str, before: bytes, after: bytes) -> bool:
    """Whether checksums say the same in other bytes: their last line break is cut."""
    try:
        return name == SEAL and json.loads(before) == json.loads(after)
    except ValueError:
        return False


def _copied(course: Course, name: str) -> Trial:
    """The finished run of a course, to be damaged."""
    trial = Trial(course, name)
    shutil.copytree(course.expected, trial.folder)
    if course.cache is not None:
        shutil.copytree(course.cache, trial.cache)
    return trial


def _resumed(
    nursery: Nursery, course: Course, number: int, name: str, where: float, how: Callable[[bytes, float], bytes]
) -> str | None:
    trial = _copied(course, f"resumed-{number}")
    newest = trial.folder / "checkpoints" / "000006"
    content = _spoil(newest / name, where, how)
    if _same(name, content, (newest / name).read_bytes()):
        trial.delete()
        return None
    ended = nursery.run("resume", trial.folder)
    if ended.status:
        return f"exit status {ended.status}: {ended.errors[-300:]}"
    if not any(str(newest) in line and "damaged" in line for line in ended.errors.splitlines()):
        return f"the loss was not said: {ended.errors}"
    if "after step 4 " not in ended.errors:
        return "it did not go on from the newest whole one"
    if lost := trial.lost_of(0):
        return lost
    trial.delete()
    return None


def _refused(nursery: Nursery, course: Course, number: int, where: float) -> str | None:
    trial = _copied(course, f"refused-{number}")
    for place in (trial.folder / "checkpoints").iterdir():
        names = sorted(path.name for path in place.iterdir())
        _spoil(place / names[int(where * len(names))], where, _flip)
    ended = nursery.run("evaluate", trial.folder)  # the finished adapter is whole still
    if ended.status or "The finished adapter is whole and is used" not in ended.errors:
        return f"evaluate beside a whole adapter: exit status {ended.status}, {ended.errors[-300:]}"
    _spoil(trial.folder / "adapter" / "adapter_model.safetensors", where, _flip)
    before = _content(trial.folder)
    for words in (["resume", trial.folder], ["evaluate", trial.folder], ["export", trial.folder, "merged"]):
        ended = nursery.run(*words)
        if ended.status != 2 or (why := one_sentence(ended.errors)):
            return f"{words[0]}: exit status {ended.status}, {ended.errors[-300:] if ended.status != 2 else why}"
        if "No checkpoint" not in ended.errors:
            return f"{words[0]} says {ended.errors}"
    if _content(trial.folder) != before:
        return "files were changed"
    trial.delete()
    return None


def _made_again(
    nursery: Nursery, course: Course, number: int, name: str, where: float, how: Callable[[bytes, float], bytes]
) -> str | None:
    trial = _copied(course, f"cache-{number}")
    shutil.rmtree(trial.folder)
    made = next(path for path in trial.cache.iterdir() if path.is_dir())
    _spoil(made / name, where, how)
    ended = trial.train(nursery)
    if ended.status == 0 and "damaged" not in ended.errors:
        return "it was not noticed"
    if lost := trial.lost_of(ended.status):
        return lost
    trial.delete()
    return None


def _gone_on(
    nursery: Nursery, course: Course, number: int, name: str, where: float, how: Callable[[bytes, float], bytes]
) -> str | None:
    """Resumed after its newest checkpoint is gone, so that there is something left to do."""
    trial = _copied(course, f"others-{number}")
    shutil.rmtree(trial.folder / "checkpoints" / "000006")
    _spoil(trial.folder / name, where, how)
    ended = nursery.run("resume", trial.folder)
    if ended.status not in (0, 2):
        return f"exit status {ended.status}: {ended.errors[-300:]}"
    if why := one_sentence(ended.errors) if ended.status else _loud(ended.errors):
        return why
    if ended.status == 0:
        what_people_read = {"evaluation.json", "metrics.jsonl", "plan.json"}
        if name not in what_people_read and (lost := difference(trial.folder, course.expected)):
            return lost
        parts = ("adapter", "checkpoints/000006")
        if any(_content(trial.folder / part) != _content(course.expected / part) for part in parts):
            return "other numbers were trained"
        steps = [line for line in metrics(trial.folder) if line["step"] > 4]
        if steps != [line for line in metrics(course.expected) if line["step"] > 4]:
            return "other steps were taken"
    trial.delete()
    return None


def _read(
    nursery: Nursery,
    course: Course,
    number: int,
    words: list[str],
    bare: bool,
    name: str,
    where: float,
    how: Callable[[bytes, float], bytes],
) -> str | None:
    """``bare``: without checkpoints, so that the adapter's own folder is read."""
    trial = _copied(course, f"read-{number}")
    if bare:
        shutil.rmtree(trial.folder / "checkpoints")
    content = _spoil(trial.folder / name, where, how)
    ended = nursery.run(*(word.format(run=trial.folder) for word in words))
    if ended.status not in (0, 2):
        return f"{words}: exit status {ended.status}: {ended.errors[-300:]}"
    if why := one_sentence(ended.errors) if ended.status else _loud(ended.errors):
        return f"{words}: {why}"
    used = bare and name.startswith("adapter/") and words[0] != "report"
    if used and ended.status == 0 and not _same(Path(name).name, content, (trial.folder / name).read_bytes()):
        return f"{words}: a damaged adapter was taken"
    trial.delete()
    return None


def _loud(errors: str) -> str | None:
    return "a traceback" if "Traceback" in errors else None


def _content(folder: Path) -> dict[str, bytes]:
    """Every file but the lock, which tells of the last process."""
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file() and path.name != ".lock"
    }
