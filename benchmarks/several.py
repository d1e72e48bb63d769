"""Several processes beside one: how far their numbers are apart, and what happens when one of them is killed.

    python benchmarks/several.py --kills 20 [--seed 0]
    python benchmarks/several.py --laws [--methods lora dora …]

Laws: of each method the worst relative differences to one process, for 2 and 3 processes, each with the whole base and with the layers
spread: of the losses and gradients of three steps whose optimizer stands still, and of losses and adapter after three more steps of Adam.
9 rows by 4, so that shares are uneven and in the last step of an epoch some processes have no row.

Kills: a training of two processes, one of which is killed at a moment that nobody chose, once they have found each other (before that
it is the launcher who ends the others: they wait five minutes for each other); then it goes on with 1, 2 or 3 processes. 12 steps
with dropout, a checkpoint after each second one. A row is one kill: which process, after how many seconds, how long the other took to end,
with which status and how often it was said; from which step it went on with how many processes; and how far its losses are from those of
one process that nothing disturbed (relative, the worst step). The same by the command line: tests/runs/test_several.py.
"""

from __future__ import annotations

import argparse
import itertools
import os
import random
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))
from qlora.errors import ProcessLostError
from qlora.machine.processes import here, leave, tells
from tests import processes
from tests.rounding import difference
from tests.tiny import tiny_checkpoint
from tests.together import _inside, environments, together
from tests.training.matrix import METHODS, trainer_for
from tests.training.test_several import cell, found_by, train

TRAINS_ITS_LAYERS = ("modules", "lora + modules + new_tokens")
STEPS = 12
TOGETHER = "together"  # the file that is there once the processes have found each other
FAR = 1e-3  # relative: Adam makes a step of what is rounding in a gradient near zero


def go(base: Path, folder: Path) -> None:
    """Train to the last step from the newest checkpoint, where there is one; in each process."""
    again = (folder / "checkpoints").is_dir() and any((folder / "checkpoints").glob("[0-9]*"))
    try:
        here().barrier()  # all have looked
        (folder.parent / TOGETHER).touch()
        trainer = trainer_for(base, folder, cell("lora"), again=again, rows=9, batch_size=4, steps=STEPS)
        for step in trainer:
            if here().main:
                with (folder.parent / "losses").open("a") as file:
                    file.write(f"{step.number} {step.loss!r}\n")
            if step.number % 2 == 0:
                trainer.save()
        leave()
    except ProcessLostError as error:
        if tells():
            (folder.parent / f"said {os.getpid()}").write_text(str(error))
        os._exit(error.exit_status)


def start(size: int, base: Path, folder: Path) -> list[Any]:
    """So many processes, as a launcher starts them."""
    started = [processes._SERVER.Process(target=_inside, args=(one, go, (base, folder))) for one in environments(size)]
    for process in started:
        process.start()
    return started


def found_each_other(place: Path) -> float:
    """Wait for it; the time."""
    while not (place / TOGETHER).exists():
        time.sleep(0.01)
    return time.monotonic()


def losses(place: Path) -> dict[int, float]:
    """By step; of one that was taken again, the last."""
    return {int(step): float(loss) for step, loss in map(str.split, (place / "losses").read_text().splitlines())}


def kills(count: int, seed: int) -> None:
    """Print a row for each kill. Raises AssertionError where something is lost."""
    chance = random.Random(seed)
    with tempfile.TemporaryDirectory() as scratch:
        base = Path(scratch) / "base"
        tiny_checkpoint(base)
        for place in (Path(scratch) / "1", Path(scratch) / "2"):
            place.mkdir()
            started = start(int(place.name), base, place / "run")
            began = found_each_other(place)
            for process in started:
                process.join()
            whole = time.monotonic() - began
        expected = losses(Path(scratch) / "1")
        print(f"Undisturbed, two processes take {whole:.1f} s from then on; kills at random moments of that.\n")
        print("| killed | after | the other ended after | with | said | went on | with | losses |")
        print("|--:|--:|--:|--:|---|---|--:|--:|")
        done = 0
        for number in itertools.count():
            if done == count:
                return
            place = Path(scratch) / f"kill {number}"
            place.mkdir()
            victim, moment, size = chance.randrange(2), chance.uniform(0.0, 0.9) * whole, chance.randrange(1, 4)
            started = start(2, base, place / "run")
            found_each_other(place)
            started[victim].join(moment)
            if started[victim].exitcode == 0:  # this one was faster than the first: nothing was killed
                started[1 - victim].join()
                continue
            done += 1
            started[victim].kill()
            killed = time.monotonic()
            started[1 - victim].join()
            took, status = time.monotonic() - killed, started[1 - victim].exitcode
            once = len(list(place.glob("said *")))
            found = max((int(one.name) for one in (place / "run" / "checkpoints").glob("[0-9]*")), default=0)
            again = start(size, base, place / "run")
            for process in again:
                process.join()
            assert all(process.exitcode == 0 for process in again), (victim, moment, size)
            there = losses(place)
            assert there.keys() == expected.keys()
            worst = max(abs(there[step] / loss - 1) for step, loss in expected.items())
            assert worst < FAR, (victim, moment, worst)
            print(
                f"| {victim} | {moment:.1f} s | {took:.1f} s | {status} | {'once' if once == 1 else f'{once} times'} "
                f"| after step {found} | {size} | {worst:.0e} |",
                flush=True,
            )


def laws(methods: list[str]) -> None:
    """Print a row for each method and number of processes."""
    print("| method | processes | layers | losses | gradients | losses later | adapter later |")
    print("|---|--:|---|--:|--:|--:|--:|")
    with tempfile.TemporaryDirectory() as scratch:
        base = Path(scratch) / "base"
        tiny_checkpoint(base)
        for method in methods:
            place = Path(scratch) / method.replace(" ", "")
            train(base, place, [cell(method)], {})
            (one,) = found_by(1, place)
            for size, placement in itertools.product((2, 3), ("resident", "spread")):
                if placement == "spread" and method in TRAINS_ITS_LAYERS:
                    continue
                together(size, train, base, place, [cell(method, placement)], {})
                (other,) = found_by(size, place)
                print(
                    f"| {method} | {size} | {placement} | {' | '.join(f'{far:.0e}' for far in apart(one, other))} |",
                    flush=True,
                )


def apart(one: Any, other: Any) -> tuple[float, float, float, float]:
    """How far what two trainings found is apart, relative: losses, gradients, losses later, adapter later."""
    losses, later = (max(abs(b / a - 1) for a, b in zip(one[which], other[which], strict=True)) for which in (0, 2))
    pairs = [
        (theirs[name], ours) for theirs, found in zip(other[1], one[1], strict=True) for name, ours in found.items()
    ]
    gradients = max(difference(theirs, ours) for theirs, ours in pairs if ours.any())
    adapter = max(difference(other[3][0][name], values) for name, values in one[3][0].items() if values.numel())
    return losses, gradients, later, adapter


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--laws", action="store_true")
    parser.add_argument("--methods", nargs="+", choices=list(METHODS), default=list(METHODS))
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    if options.laws:
        laws(options.methods)
        return
    kills(options.kills, options.seed)


if __name__ == "__main__":
    main()
