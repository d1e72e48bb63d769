"""Several processes beside one: how far their numbers are apart, and what happens when one of them is killed.

    python benchmarks/several.py --kills 20 [--seed 0]
    python benchmarks/several.py --laws [--methods lora dora …]

Laws: of each method the worst relative differences to one process, for 2 and 3 processes, each with the whole base and with the layers
spread: of the losses and gradients of three steps whose optimizer stands still, and of losses and adapter after three more steps of Adam.
9 rows by 4, so that shares are uneven and in the last step of an epoch some processes have no row.

Kills: a run of two processes, one of which is killed at a moment that nobody chose; then it goes on with 1, 2 or 3 processes. A tiny model that is made here, 12 steps, a checkpoint after each second one. A row of the table is one kill: which process, after how
many seconds, how long the other took to end and with which status, from which step the run went on with how many processes, and how far
its losses are from those of a run by one process that nothing disturbed (relative, the worst step).
"""

from __future__ import annotations

import argparse
import itertools
import json
import random
import shutil
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
import yaml

sys.path.insert(0, str(Path(__file__).parents[1]))
from tests import processes
from tests.processes import Ended, Started
from tests.rounding import difference
from tests.tiny import chat_checkpoint, conversations, tiny_checkpoint, tiny_values, write_lines
from tests.together import environments, together
from tests.training.matrix import METHODS
from tests.training.test_several import cell, train

TRAINS_ITS_LAYERS = ("full", "modules", "lora + modules + new_tokens")
FAR = 1e-3  # relative: Adam makes a step of what is rounding in a gradient near zero


def start(size: int, *words: object) -> list[Started]:
    """``qlora WORDS`` in so many processes, as a launcher starts them."""
    return [processes.start(*words, environment=one) for one in environments(size)]


def ended(started: list[Started]) -> list[Ended]:
    """How each of them ended."""
    return [process.wait() for process in started]


def losses(folder: Path) -> dict[int, float]:
    """By step."""
    lines = map(json.loads, (folder / "metrics.jsonl").read_text().splitlines())
    return {line["step"]: line["loss"] for line in lines if "loss" in line}


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
            (one,) = torch.load(place / "1.pt", weights_only=True)
            for size, placement in itertools.product((2, 3), ("resident", "spread")):
                if placement == "spread" and method in TRAINS_ITS_LAYERS:
                    continue
                together(size, train, base, place, [cell(method, placement)], {})
                (other,) = torch.load(place / f"{size}.pt", weights_only=True)
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
    adapter = max(difference(other[3][name], values) for name, values in one[3].items() if values.numel())
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
    chance = random.Random(options.seed)
    with tempfile.TemporaryDirectory() as scratch:
        place = Path(scratch)
        values = tiny_values(
            chat_checkpoint(place / "model"), write_lines(place / "chat.jsonl", conversations()), place / "run"
        )
        values["training"] |= {"steps": 12, "save_every": 2, "micro_batch_size": 1}
        (place / "recipe.yaml").write_text(yaml.safe_dump(values), encoding="utf-8")
        recipe, run = str(place / "recipe.yaml"), place / "run"
        ended(start(1, "train", recipe, f"folder={place / 'alone'}"))
        expected = losses(place / "alone")
        began = time.monotonic()
        ended(start(2, "train", recipe))
        whole = time.monotonic() - began
        print(f"Undisturbed, two processes take {whole:.1f} s; kills at random moments of that.\n")
        print("| killed | after | the other ended after | with | said | went on | with | losses |")
        print("|--:|--:|--:|--:|---|--:|--:|--:|")
        for _ in range(options.kills):
            shutil.rmtree(run, ignore_errors=True)
            started = start(2, "train", recipe)
            victim, moment, size = chance.randrange(2), chance.uniform(0.3, 0.98) * whole, chance.randrange(1, 4)
            started[victim].process.join(moment)
            started[victim].process.kill()
            killed = time.monotonic()
            other = started[1 - victim].wait()
            took = time.monotonic() - killed
            once = other.errors.count("Another of the 2 processes ended") + other.errors.count(
                "did not find each other"
            )
            began_run = (run / "environment.json").is_file()
            found = max((int(one.name) for one in (run / "checkpoints").glob("[0-9]*")) if began_run else (), default=0)
            again = start(size, *(("resume", str(run)) if began_run else ("train", recipe, "overwrite=true")))
            assert all(process.status == 0 for process in ended(again)), (victim, moment, size)
            there = losses(run)
            assert there.keys() == expected.keys()
            worst = max(abs(there[step] / loss - 1) for step, loss in expected.items())
            assert worst < FAR, (victim, moment, worst)
            print(
                f"| {victim} | {moment:.1f} s | {took:.1f} s | {other.status} | {'once' if once == 1 else f'{once} times'} "
                f"| {f'after step {found}' if began_run else 'from the start'} | {size} | {worst:.0e} |",
                flush=True,
            )


if __name__ == "__main__":
    main()
