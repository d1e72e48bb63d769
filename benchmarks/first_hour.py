"""A newcomer's first hour: what is typed, what the terminal shows, and how long each takes, from one fresh clone.

    python benchmarks/first_hour.py --clone FOLDER --out first-hour.md      minutes; FOLDER: a clone in which nothing was made yet

Each command is typed in a terminal of 80 columns (a pseudo-terminal, so that colours and bars are what a person sees); one is stopped
with Ctrl-C and gone on with, and one is misspelt. Prints a transcript in Markdown: long outputs are cut in their middle, which is
marked. Beside it lie two pictures of the training in a terminal, of 80 and of 40 columns, drawn from what was shown, and all that was, as
JSON: a line that is in it is not typed again.
"""

from __future__ import annotations

import argparse
import fcntl
import json
import os
import pty
import re
import signal
import struct
import subprocess
import termios
import time
from pathlib import Path
from typing import NamedTuple

from rich.console import Console
from rich.text import Text

SHOWN = 26  # lines of one output in the transcript


class Typed(NamedTuple):
    """A command line, why somebody types it, the terminal's width, and the text at whose sight Ctrl-C is pressed."""

    line: str
    why: str
    columns: int = 80
    stop_at: str | None = None


FIRST = Typed("make quickstart", "The README's first command: installs, fetches a model, trains, reports, exports.")
HOUR = (
    Typed("qlora doctor", "Is this machine ready?"),
    Typed("qlora init --model smollm2-135m-instruct --data mine.jsonl", "One's own data: 150 pairs of a question and an answer."),
    Typed("qlora preview mine.yaml count=1", "What will be trained on?"),
    Typed("qlora plan mine.yaml", "Does it fit, and how long does it take?"),
    Typed("qlora plan mine.yaml device.memory=T4", "And on the card that Colab lends?"),
    Typed("qlora train mine.yaml training.lr=1e-4", "A key as other programs call it."),
    Typed("qlora train mine.yaml", "Ctrl-C in the middle.", stop_at="4/15"),
    Typed("qlora resume runs/mine", "On from there, in a narrow window.", 40),
    Typed("echo 'What does copytree do?' | qlora chat runs/mine", "Talk to it."),
    Typed("qlora export runs/mine merged", "Take it away, for Python and vLLM."),
    Typed("qlora export runs/mine gguf", "And for llama.cpp and Ollama."),
    Typed("qlora report runs/mine runs/quickstart", "Beside the first run."),
)  # fmt: skip


def shown(typed: Typed, folder: Path, path: str) -> tuple[int, float, str]:
    """(exit status, seconds, all that the terminal got) of a command in ``folder``."""
    here, there = pty.openpty()
    fcntl.ioctl(there, termios.TIOCSWINSZ, struct.pack("HHHH", 40, typed.columns, 0, 0))
    begun = time.perf_counter()
    environment = {**os.environ, "PATH": path, "TERM": "xterm-256color", "COLUMNS": str(typed.columns)}
    process = subprocess.Popen(
        ["bash", "-c", typed.line],
        stdin=there, stdout=there, stderr=there, cwd=folder, env=environment, start_new_session=True,
    )  # fmt: skip
    os.close(there)
    got, stopped = b"", False
    while True:
        try:
            part = os.read(here, 65536)
        except OSError:  # the other end is closed
            break
        if not part:
            break
        got += part
        if typed.stop_at is not None and not stopped and typed.stop_at.encode() in got:
            os.killpg(process.pid, signal.SIGINT)
            stopped = True
    status = process.wait()
    os.close(here)
    return status, time.perf_counter() - begun, got.decode(errors="replace")


def final(text: str) -> list[str]:
    """The lines that stay on the screen, with their colours: what a bar wrote over is gone."""
    lines, row, fresh = [""], 0, False
    for part in re.split(r"(\r\n|\r|\n|\x1b\[[0-9;?]*[A-Za-z])", text):
        if part in ("\n", "\r\n"):
            row, fresh = row + 1, True
            lines += [""] * (row == len(lines))
        elif part == "\r":
            fresh = True
        elif part.endswith("A") and part.startswith("\x1b["):
            row = max(0, row - int(part[2:-1] or 1))
        elif part.endswith("K") and part.startswith("\x1b["):
            lines[row] = ""
        elif part.startswith("\x1b[") and not part.endswith("m"):
            continue  # the cursor is hidden, or shown
        elif part:
            lines[row] = part if fresh and not part.startswith("\x1b[") else lines[row] + part
            fresh = False
    return lines


def plain(line: str) -> str:
    return Text.from_ansi(line).plain.rstrip()


def cut(lines: list[str]) -> list[str]:
    """At most ``SHOWN`` lines: the first and the last of more, with what lies between counted."""
    if len(lines) <= SHOWN:
        return lines
    half = SHOWN // 2
    return [*lines[:half], f"[… {len(lines) - 2 * half} more lines …]", *lines[-half:]]


def picture(lines: list[str], columns: int, title: str, out: Path) -> None:
    """A terminal's lines as SVG."""
    with open(os.devnull, "w") as nowhere:
        console = Console(record=True, width=columns, file=nowhere, force_terminal=True)
        for line in lines:
            console.print(Text.from_ansi(line))
        console.save_svg(str(out), title=title)


def mine(clone: Path) -> None:
    """150 records of the docstring data that the quickstart left, as somebody's own file, in the clone."""
    lines = (clone / "data/docstrings/train.jsonl").read_text(encoding="utf-8").splitlines()[:150]
    turns = [json.loads(line) for line in lines]
    (clone / "mine.jsonl").write_text("".join(json.dumps(turn) + "\n" for turn in turns), encoding="utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--clone", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args()
    clone = args.clone.absolute()
    path = f"{clone / '.venv/bin'}{os.pathsep}{os.environ['PATH']}"
    told, minutes = [], 0.0
    kept = args.out.with_suffix(".json")
    done = json.loads(kept.read_text(encoding="utf-8")) if kept.is_file() else {}
    for typed in (FIRST, *HOUR):
        if typed.line not in done:
            if typed is HOUR[1]:
                mine(clone)
            done[typed.line] = shown(typed, clone, path)
            kept.write_text(json.dumps(done), encoding="utf-8")
        status, seconds, text = done[typed.line]
        lines = final(text)
        minutes += seconds / 60
        told += [
            f"### `{typed.line}`",
            "",
            f"{typed.why} {seconds:.1f} s, exit {status}; {minutes:.0f} min into the hour.",
            "",
        ]
        told += ["```text", *cut([plain(line) for line in lines if plain(line)]), "```", ""]
        args.out.write_text("\n".join(told), encoding="utf-8")
        if typed.line.startswith(("qlora train mine.yaml", "qlora resume")) and "lr=" not in typed.line:
            name = f"{args.out.stem}-{typed.columns}.svg"
            picture([line for line in lines if plain(line)][-40:], typed.columns, typed.line, args.out.with_name(name))
    print("\n".join(told))


if __name__ == "__main__":
    main()
