"""Disks that are full: at every write of a run, of the file cache, of an export and of a report.

A small tmpfs is filled up at some moment, to the last byte or to some pages; where nothing can be mounted, no file may
have more than so many bytes (RLIMIT_FSIZE), which is tried either way. Each time: exit status 3, one sentence that names
the disk and what to do, everything that has a name that is used whole. Then room is made, and what was asked for is done.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from benchmarks.survive.kills import Course, Trial, courses
from benchmarks.survive.nursery import Ended, Nursery, nurseries, row_of
from benchmarks.survive.scene import difference, one_sentence
from benchmarks.survive.size import Size

PAGE = 4096  # bytes in which a tmpfs gives room
EXPORTS = ("merged", "portable")
ROOM = "size=96m"  # a merged model asks for 64 MiB more than it takes


def run(place: Path, size: Size, say: Callable[[str], None]) -> list[dict[str, Any]]:
    """Rows of the table: fault, trials, survived, lost."""
    chance, rows = random.Random(1), list[dict[str, Any]]()
    several = nurseries(size.of(1, 2))
    first = several[0]
    plain, cached = courses(place, several)

    def tried(fault: str, trials: Sequence[Any], work: Callable[[Nursery, Any], str | None]) -> None:
        rows.append(row_of(fault, several, trials, work, say))

    if first.mounts:
        disks = {id(nursery): _Disk(nursery, place / f"tmpfs{n}") for n, nursery in enumerate(several)}
        at_events = [(0, number) for number in range(1, len(plain.events) + 1)]
        pages = [(count * PAGE, 1) for count in range(size.of(0, 60))]
        tried(
            "disk full (tmpfs) at every write of a run",
            [*chance.sample(at_events, size.of(2, len(at_events))), *pages],
            lambda nursery, trial: disks[id(nursery)].train(plain, *trial),
        )
        cache_events = [
            n for n, event in enumerate(cached.events, 1) if event.startswith(("reserve", "pwrite", "open"))
        ]
        tried(
            "disk full (tmpfs) while the NF4 file cache is written",
            chance.sample(cache_events, size.of(1, min(40, len(cache_events)))),
            lambda nursery, number: disks[id(nursery)].train(cached, 0, number),
        )
        for what, words in (
            ("the merged model is exported", ["export", "{run}", "merged"]),
            ("the adapter is exported", ["export", "{run}", "adapter"]),
            ("the report is written", ["report", "{run}"]),
        ):
            count = disks[id(first)].count_events(plain, words)
            tried(
                f"disk full (tmpfs) while {what}",
                chance.sample(range(1, count + 1), size.of(1, min(count, 40))),
                lambda nursery, number, words=words: disks[id(nursery)].command(plain, words, number),
            )
        for disk in disks.values():
            disk.close()
    sizes = sorted({path.stat().st_size for path in plain.expected.rglob("*") if path.is_file()})
    limits = sorted({0, 1, *(max(0, count + more) for count in sizes for more in (-1, 0, 1))})
    tried(
        "no file may be larger (RLIMIT_FSIZE), at every size of a file",
        [limits[len(limits) // 2]] if size.small else limits,
        lambda nursery, limit: _limited(nursery, plain, limit),
    )
    return rows


def _limited(nursery: Nursery, course: Course, limit: int) -> str | None:
    trial = Trial(course, f"limit-{limit}")
    ended = trial.train(nursery, limit=limit)
    lost = _said(ended, trial.folder.name) or trial.torn() or trial.lost_of(trial.go_on(nursery).status)
    if lost is None:
        trial.delete()
    return lost


def _said(ended: Ended, name: str) -> str | None:
    """What is wrong with how a full disk was said, or None; nothing is where all was done before it was full."""
    if ended.status == 0:
        return None
    if ended.status != 3:
        return f"exit status {ended.status}: {ended.errors.strip()[-300:]}"
    if why := one_sentence(ended.errors):
        return why
    sentence = next(line for line in ended.errors.splitlines() if line.startswith("qlora: "))
    if name not in sentence or not any(word in sentence for word in ("room", "free some")):
        return f"the sentence names no disk or nothing to do: {sentence}"
    return None


class _Disk:
    """A small disk that one nursery has mounted."""

    def __init__(self, nursery: Nursery, place: Path) -> None:
        self.nursery, self.place = nursery, place
        place.mkdir(exist_ok=True)
        nursery.shell(f"mount -t tmpfs -o {ROOM} tmpfs '{place}'")

    def close(self) -> None:
        self.nursery.shell(f"umount '{self.place}'")

    def train(self, course: Course, left: int, number: int) -> str | None:
        """A run on a disk that has ``left`` bytes from its ``number``-th event on; what was lost, or None."""
        nursery, folder = self.nursery, self.place / "run"
        self.nursery.shell(f"rm -rf '{self.place}'/* '{self.place}'/.[!.]*")
        words: list[object] = ["train", course.recipe, f"folder={folder}"]
        if course.cache is not None:
            words.append(f"memory.cache={self.place / 'cache'}")
        ended = nursery.run(*words, watch=str(self.place), fill=(str(self.place), left, number))
        trial = Trial(course, f"full-{left}-{number}")
        trial.folder, trial.cache = nursery.seen(folder), nursery.seen(self.place / "cache")
        if lost := _said(ended, str(self.place)) or trial.torn():
            return lost
        nursery.shell(f"rm '{self.place}/ballast'")
        if (trial.folder / "environment.json").is_file():
            words = ["resume", folder]
        ended = nursery.run(*words)
        if ended.status:
            return f"after room was made, exit status {ended.status}: {ended.errors.strip()[-300:]}"
        lost = trial.lost_of(0)
        trial.delete()
        return lost

    def _lay(self, course: Course, words: Sequence[str]) -> list[str]:
        """Put a finished run on the disk; return the command for it."""
        self.nursery.shell(f"rm -rf '{self.place}'/* && cp -a '{course.expected}' '{self.place}/run'")
        return [word.format(run=self.place / "run") for word in words]

    def count_events(self, course: Course, words: Sequence[str]) -> int:
        """How often a command that nothing disturbs is about to do something to the disk."""
        record = course.expected.parent / "events-of-command"
        ended = self.nursery.run(*self._lay(course, words), watch=str(self.place), record=str(record))
        if ended.status:
            raise RuntimeError(ended.errors)
        return len(record.read_text().splitlines())

    def command(self, course: Course, words: Sequence[str], number: int) -> str | None:
        """A command for a finished run whose disk is full from its ``number``-th event on; what was lost, or None."""
        command, seen = self._lay(course, words), self.nursery.seen(self.place / "run")
        before = {path.name for path in seen.iterdir()}
        ended = self.nursery.run(*command, watch=str(self.place), fill=(str(self.place), 0, number))
        if lost := _said(ended, str(self.place)) or difference(seen, course.expected, EXPORTS):
            return lost
        if ended.status and (strange := {path.name for path in seen.iterdir()} - before):
            return f"left over: {sorted(strange)}"
        self.nursery.shell(f"rm '{self.place}/ballast'")
        again = self.nursery.run(*command, *(["overwrite=true"] if len(command) > 2 else []))
        return f"exit status {again.status} when there was room: {again.errors[-300:]}" if again.status else None
