"""Five real data sets in five forms: previewed, then trained for 20 steps each.

    python benchmarks/five_forms.py --data path/to/data [--model smollm2-135m-instruct] [--steps 20]

``--data`` is a folder with dolly_3k, oasst_chat, toolcall_sharegpt, instruct_pref_1k and wikitext2, each with
train.jsonl. Prints a preview of each, then one table.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from pathlib import Path

from qlora.recipe import DEFAULT_MODEL, Recipe
from qlora.runs.evaluate import preview
from qlora.runs.train import train

SETS = ("dolly_3k", "oasst_chat", "toolcall_sharegpt", "instruct_pref_1k", "wikitext2")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--model", default=DEFAULT_MODEL)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--rows", type=int, default=2, help="rows a step")
    parser.add_argument("--max-length", type=int, default=256)
    options = parser.parse_args()

    lines = ["| data set | form | trained tokens | lost | loss, first 3 → last 3 steps |", "|---|---|---|---|---|"]
    for name in SETS:
        with tempfile.TemporaryDirectory() as scratch:
            recipe = Recipe.from_dict(
                {
                    "model": {"name": options.model},
                    "data": {"train": str(options.data / name / "train.jsonl"), "max_length": options.max_length},
                    "training": {
                        "steps": options.steps,
                        "batch_size": options.rows,
                        "learning_rate": 5e-4,
                        "schedule": "constant",
                    },
                    "folder": str(Path(scratch) / name),
                }
            )
            print(f"\n== {name}\n{preview(recipe, 1)[0]}\n", flush=True)
            done = train(recipe, quiet=True)
            steps = [json.loads(line) for line in (done.folder / "metrics.jsonl").read_text().splitlines()]
            data = json.loads((done.folder / "plan.json").read_text())["data"]
            counts = data["train"]
            lost = counts["truncated_tokens"] + counts["dropped_tokens"] + counts["unanswered_tokens"]
            first, last = (sum(s["loss"] for s in part) / 3 for part in (steps[:3], steps[-3:]))
            lines.append(
                f"| {name} | {data['form']} | {counts['target_tokens']:,} of {counts['tokens']:,} | {lost:,} tokens "
                f"| {first:.3f} → {last:.3f} |"
            )
            assert len(steps) == options.steps
    print("\n".join(["", *lines]))


if __name__ == "__main__":
    main()
