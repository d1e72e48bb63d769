"""What every method costs in time, side by side: all on one loaded base in one process, each beside LoRA.

    python -m qlora.quickstart
    python benchmarks/method_speed.py --out benchmarks/results

Each recipe of recipes/methods is planted, trained for a few steps, asked for an answer and taken out again. Before it, and
after it, ``lora.yaml`` does the same steps: a ratio to their mean is what the table holds, so that a machine that slows down
in between does not count. Full fine-tuning has no 4-bit base and is left to benchmarks/methods.py.
"""

from __future__ import annotations

import argparse
import datetime
import statistics
import sys
from pathlib import Path
from typing import Any

import torch

import qlora
from qlora.evaluation.latency import seconds_a_token
from qlora.machine.device import versions
from qlora.model.tokenizer import with_new_tokens
from qlora.recipe import parts_of
from qlora.residence.layers import unwrap_layers

RECIPES = Path(__file__).parents[1] / "recipes" / "methods"


def measure(base: Any, recipe: Any, data: Any, steps: int) -> tuple[float, float]:
    """(tokens/s, seconds a generated token) of a method on ``base``, which is left as it was."""
    model = qlora.apply_method(base, recipe.method)
    try:
        trainer = qlora.Trainer(model, data, recipe.training)
        model.prepare(batch for batch, _ in zip(trainer.batches(), range(2), strict=False))
        next(trainer)  # warms up
        speed = statistics.median(next(trainer).tokens_per_second for _ in range(steps))
        unwrap_layers(model.model)
        return speed, seconds_a_token(model)
    finally:
        unwrap_layers(model.model)
        model.remove()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=2)
    parser.add_argument("--rows", type=int, default=2, help="rows of at most 256 tokens a step")
    parser.add_argument("--only", nargs="*", help="names of recipes in recipes/methods")
    parser.add_argument("--out", type=Path, help="folder for the table")
    parser.add_argument("--set", nargs="*", default=[], help="overrides for every recipe, as model.name=…")
    args = parser.parse_args()
    overrides = [
        f"training.batch_size={args.rows}", f"training.micro_batch_size={args.rows}", "data.limit=200",
        "data.held_out=null", *args.set,
    ]  # fmt: skip
    recipes = {path.stem: qlora.Recipe.from_yaml(path, *overrides) for path in sorted(RECIPES.glob("*.yaml"))}
    recipes = {
        name: recipe for name, recipe in recipes.items() if all(part.name != "full" for part in parts_of(recipe.method))
    }
    base = qlora.load_base(recipes["lora"].model)

    def measured(name: str) -> tuple[float, float]:
        recipe = recipes[name]
        data = qlora.load_data(
            recipe.data, with_new_tokens(base.tokenizer, recipe.method), 0, recipe.method.virtual_tokens
        )
        return measure(base, recipe, data, args.steps)

    rows, before = [], measured("lora")
    for name in recipes:
        if name == "lora" or (args.only and name not in args.only):
            continue
        print(name, file=sys.stderr, flush=True)
        found, after = measured(name), measured("lora")
        lora_speed, lora_token = ((a + b) / 2 for a, b in zip(before, after, strict=True))
        rows.append(f"| {name} | {found[0] / lora_speed:.2f} | {found[1] / lora_token:.2f} |")
        before = after
    found_versions = versions()
    kept = ", ".join(f"{name} {found_versions[name]}" for name in ("torch", "transformers", "bitsandbytes"))
    where = torch.cuda.get_device_name() if torch.cuda.is_available() else f"CPU, {torch.get_num_threads()} threads"
    text = "\n".join(
        [
            "# Time of every method, LoRA = 1",
            "",
            f"{datetime.date.today()}, {where}, {kept}; {recipes['lora'].model.name}. Made by `python "
            f"benchmarks/method_speed.py --steps {args.steps} --rows {args.rows}`.",
            f"LoRA (r 16, all linears) at the end: {before[0]:.0f} tokens/s in training, {before[1] * 1000:.0f} ms a generated token.",
            "" if torch.cuda.is_available() else "Not measured on a GPU.",
            "",
            "| method | tokens/s in training | time a generated token |",
            "|---|--:|--:|",
            *rows,
            "",
        ]
    )
    print(text)
    if args.out:
        args.out.mkdir(parents=True, exist_ok=True)
        (args.out / f"{datetime.date.today()}-method-speed.md").write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
