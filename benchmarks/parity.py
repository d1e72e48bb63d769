"""How far every method is from its oracle: what the tests of ``tests/methods`` print, as one table.

    python benchmarks/parity.py --out benchmarks/results

The oracles are PEFT, run beside us on copied weights, the recorded outputs of the ``adapters`` library, and the merged
model in plain transformers. Differences are the largest one over the largest expected value.
"""

from __future__ import annotations

import argparse
import datetime
import re
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

ROOT = Path(__file__).parents[1]
FIGURE = re.compile(r"\d(\.\d+)?e[-+]\d+|\d\.\d{2,}")


def printed(tests: str) -> tuple[list[tuple[str, str, str]], str]:
    """((file, test, line) of every line with a figure, pytest's last line) of the tests that match ``tests``."""
    command = [sys.executable, "-m", "pytest", "tests/methods", "-rpP", "-k", tests, "-p", "no:cacheprovider"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    lines = done.stdout.splitlines()
    if done.returncode:
        sys.exit("\n".join(lines[-20:]))
    found, test, inside = [], "", False
    order = re.findall(r"(?m)^PASSED (\S+?)::(\S+)", done.stdout)
    files = {name: Path(file).stem.removeprefix("test_") for file, name in order}
    for line in lines:
        if heading := re.fullmatch(r"_+ (\S.*?) _+", line):
            test, inside = heading[1], False
        elif line.startswith("---"):
            inside = "Captured stdout call" in line
        elif inside and FIGURE.search(line):
            found.append((files.get(test, ""), test.partition("[")[0].removeprefix("test_").replace("_", " "), line))
    return sorted(set(found), key=lambda item: item[:2]), lines[-1]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tests", default="not learns and not energy", help="pytest's -k")
    parser.add_argument("--out", type=Path, help="folder for the table")
    args = parser.parse_args()
    found, summary = printed(args.tests)
    kept = ", ".join(f"{name} {version(name)}" for name in ("peft", "torch", "transformers", "bitsandbytes"))
    rows = [f"| {file} | {test} | {line} |" for file, test, line in found]
    text = "\n".join(
        [
            "# Every method against its oracle",
            "",
            f"{datetime.date.today()}, CPU, {kept}; adapters 1.3.0 recorded. Made by `python benchmarks/parity.py`: {summary}.",
            "Largest differences over the largest expected value; tiny random models. Not measured on a GPU.",
            "",
            "| file of tests/methods | test | what it printed |",
            "|---|---|---|",
            *rows,
            "",
        ]
    )
    print(text)
    if args.out:
        args.out.mkdir(parents=True, exist_ok=True)
        (args.out / f"{datetime.date.today()}-parity.md").write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
