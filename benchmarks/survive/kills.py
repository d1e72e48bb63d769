"""Runs that are killed or asked to stop, at moments that nobody chose, and what comes out when they are resumed.

    kill -9      at random times; right before a file is opened, renamed, deleted or flushed; with a file half-written; while
                 a held-out loss is measured; while the NF4 file cache is made; two and three times in a row
    SIGTERM, SIGINT, and each of them twice

After each: whatever has a name that is used is whole, the run goes on (or begins again, where it had not begun), and ends in
the bytes of a run that nothing disturbed, with nothing left over.
"""

from __future__ import annotations

import random
import shutil
import signal
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from benchmarks.survive.nursery import Nursery, in_turns, nurseries
from benchmarks.survive.scene import Scene, broken, difference, one_sentence, row
from benchmarks.survive.size import Size

STATUS = {signal.SIGTERM: 143, signal.SIGINT: 130}


@dataclass
class Course:
    """A run that nothing disturbed: its recipe, what it left, and the moments at which a fault may hit another one."""

    scene: Scene
    name: str
    recipe: Path
    expected: Path
    cache: Path | None
    seconds: float
    events: list[str] = field(default_factory=list)

    @classmethod
    def take(cls, nursery: Nursery, scene: Scene, name: str, cached: bool) -> Course:
        """Train undisturbed, twice: once for the time it takes and once for its events, and compare the two."""
        place = scene.place / name
        shutil.rmtree(place, ignore_errors=True)
        cache = place / "cache" if cached else None
        recipe = scene.recipe(place / "recipe.yaml", place / "run", cache)
        nursery.warm(recipe)
        course = cls(scene, name, recipe, place / "run", cache, 0.0)
        first = nursery.run("train", recipe)
        if first.status:
            raise RuntimeError(first.errors)
        trial = Trial(course, "recorded")
        again = trial.train(nursery, record=str(place / "events"))
        if why := trial.lost_of(again.status):
            raise RuntimeError(f"two undisturbed runs differ: {why}")
        course.seconds = again.seconds
        course.events = [line.partition(" ")[2] for line in (place / "events").read_text().splitlines()]
        trial.delete()
        return course

    def moments(self, wanted: Callable[[str], bool]) -> list[int]:
        """The numbers of the events of some kind, counted from 1."""
        return [number for number, event in enumerate(self.events, 1) if wanted(event)]


_KNOWN: dict[Path, tuple[Course, Course]] = {}


def courses(place: Path, several: Sequence[Nursery]) -> tuple[Course, Course]:
    """(a plain run, one whose layers are streamed from a file cache), made once in ``place`` and known to the nurseries."""
    if place not in _KNOWN:
        scene = Scene(place / "scene")
        plain = Course.take(several[0], scene, "plain", cached=False)
        _KNOWN[place] = plain, Course.take(several[0], scene, "cached", cached=True)
    for nursery in several:
        nursery.warm(_KNOWN[place][0].recipe)
    return _KNOWN[place]


class Trial:
    """One disturbed run of a course, in folders of its own."""

    def __init__(self, course: Course, name: str) -> None:
        self.course = course
        self.place = course.scene.place / course.name / name
        shutil.rmtree(self.place, ignore_errors=True)
        self.place.mkdir()
        self.folder, self.cache = self.place / "run", self.place / "cache"

    def delete(self) -> None:
        shutil.rmtree(self.place)

    def train(self, nursery: Nursery, **faults: Any) -> Any:
        words = ["train", self.course.recipe, f"folder={self.folder}"]
        if self.course.cache is not None:
            words.append(f"memory.cache={self.cache}")
        return nursery.run(*words, watch=str(self.place), **faults)

    def go_on(self, nursery: Nursery, **faults: Any) -> Any:
        """Resume, or train again where the run had not begun."""
        if (self.folder / "environment.json").is_file():
            return nursery.run("resume", self.folder, watch=str(self.place), **faults)
        return self.train(nursery, **faults)

    def torn(self) -> str | None:
        """What looks whole now and is not."""
        if self.folder.is_dir() and (why := broken(self.folder)):
            return why
        if self.course.cache is None or not self.cache.is_dir():
            return None
        for made in self.cache.iterdir():
            if (
                made.is_dir()
                and not made.name.startswith(".")
                and _bytes(made) != _bytes(self.course.cache / made.name)
            ):
                return "a file cache looks whole and is not"
        return None

    def lost_of(self, status: int) -> str | None:
        """What a run that ended lost, in a few words, or None."""
        if status:
            return f"exit status {status}"
        if why := self.torn() or difference(self.folder, self.course.expected):
            return why
        if self.course.cache is None:
            return None
        names = [sorted(path.name for path in cache.iterdir()) for cache in (self.cache, self.course.cache)]
        return None if names[0] == names[1] else f"left over beside the file cache: {names[0]}"

    def survives(self, nursery: Nursery, hits: Sequence[dict[str, Any]]) -> str | None:
        """Train with the first fault, go on with each of the others, then undisturbed; what was lost, or None."""
        for number, faults in enumerate([*hits, {}]):
            ended = self.train(nursery, **faults) if number == 0 else self.go_on(nursery, **faults)
            if why := self.torn():
                return f"after fault {number + 1}, {why}"
            if ended.status not in (0, -signal.SIGKILL):
                return f"exit status {ended.status}: {ended.errors.strip()[-300:]}"
        return self.lost_of(ended.status)

    def stops(self, nursery: Nursery, hits: list[tuple[float, int]]) -> str | None:
        """Train and send signals; what was lost of the status, the sentence, the checkpoint or the run, or None."""
        ended = self.train(nursery, hits=hits)
        expected = STATUS[signal.Signals(hits[-1][1])]
        if ended.status != 0:  # a signal may come when all is done
            if ended.status != expected:
                return f"exit status {ended.status} instead of {expected}"
            if why := one_sentence(ended.errors):
                return why
            saved = "the state is in" in ended.errors
            if saved and not list((self.folder / "checkpoints").glob("[0-9]*")):
                return "no checkpoint"
        return self.torn() or self.lost_of(self.go_on(nursery).status)


def run(place: Path, size: Size, say: Callable[[str], None]) -> list[dict[str, Any]]:
    """Rows of the table: fault, trials, survived, lost."""
    chance, rows = random.Random(0), list[dict[str, Any]]()
    several = nurseries(size.of(1, 2))
    plain, cached = courses(place, several)

    def tried(fault: str, trials: Sequence[tuple[Course, Callable[[Trial, Nursery], str | None]]]) -> None:
        def one(nursery: Nursery, numbered: tuple[int, Any]) -> str | None:
            number, (course, work) = numbered
            trial = Trial(course, f"kill-{len(rows)}-{number}")
            lost: str | None = work(trial, nursery)
            if lost is None:
                trial.delete()
            else:
                say(f"{fault}: {trial.place.name}: {lost}")
            return lost

        rows.append(row(fault, in_turns(several, list(enumerate(trials)), one)))
        say(f"{fault}: {rows[-1]['survived']} of {rows[-1]['trials']} survived")

    def killed(*hits: dict[str, Any]) -> Callable[[Trial, Nursery], str | None]:
        return lambda trial, nursery: trial.survives(nursery, hits)

    def stopped(*hits: tuple[float, int]) -> Callable[[Trial, Nursery], str | None]:
        return lambda trial, nursery: trial.stops(nursery, list(hits))

    def sometime(course: Course) -> float:
        return chance.uniform(0, course.seconds)

    def at_time(course: Course) -> dict[str, Any]:
        return {"hits": [(sometime(course), signal.SIGKILL)]}

    def at_event(number: int, torn: bool = False) -> dict[str, Any]:
        return {"at": {str(number): signal.SIGKILL}, "torn": torn}

    def some(moments: list[int], few: int, many: int) -> list[int]:
        return sorted(chance.sample(moments, min(len(moments), size.of(few, many))))

    say(f"An undisturbed run takes {plain.seconds:.1f} s and has {len(plain.events)} events")
    both = [plain, plain, cached]
    times = [both[number % 3] for number in range(size.of(1, 100))]
    tried("kill -9 at a random time", [(course, killed(at_time(course))) for course in times])
    any_event = some(plain.moments(lambda event: True), 2, 100)
    tried(
        "kill -9 before a file is opened, renamed, deleted or flushed",
        [(plain, killed(at_event(number))) for number in any_event],
    )
    writes = plain.moments(lambda event: event.startswith(("tensors", "line")))
    tried(
        "kill -9 with a checkpoint, the adapter or a line half-written",
        [(plain, killed(at_event(number, torn=True))) for number in some(writes, 1, 40)],
    )
    measures = plain.moments(lambda event: event in ("measure", "answer"))
    tried(
        "kill -9 in the middle of an evaluation",
        [(plain, killed(at_event(number, torn=True))) for number in some(measures, 1, len(measures))],
    )
    making = _making(cached.events)
    tried(
        "kill -9 while the NF4 file cache is written",
        [(cached, killed(at_event(number, torn=True))) for number in some(making, 1, 40)],
    )
    tried(
        "kill -9 two or three times in a row",
        [
            (plain, killed(*(chance.choice([at_time(plain), at_event(chance.randint(1, 120))]) for _ in range(count))))
            for count in size.of([2], [2, 3] * 10)
        ],
    )
    for kind in (signal.SIGTERM, signal.SIGINT):
        tried(
            f"{kind.name} at a random time",
            [(course, stopped((sometime(course), kind))) for course in times[: size.of(1, 25)]],
        )
    tried(
        "a second signal soon after the first",
        [
            (plain, stopped((moment, kind), (moment + chance.uniform(0, 0.1), kind)))
            for kind in size.of([signal.SIGTERM], [signal.SIGTERM, signal.SIGINT] * 12)
            for moment in [sometime(plain)]
        ],
    )
    return rows


def _making(events: list[str]) -> list[int]:
    """The events of making a file cache: from its lock to the renaming of its folder."""
    begin = next(number for number, event in enumerate(events, 1) if event.endswith("layers.bin"))
    end = next(
        number
        for number, event in enumerate(events, 1)
        if number > begin and event.startswith("rename ") and "." in event
    )
    return list(range(begin, end + 2))


def _bytes(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()} if folder.is_dir() else {}
