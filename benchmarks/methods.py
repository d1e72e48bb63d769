"""Every method on the same model, data and number of steps: what was learned, and what it cost.

    python -m qlora.quickstart
    python benchmarks/methods.py --out benchmarks/results          # all of recipes/methods
    python benchmarks/methods.py --only lora dora --steps 8 --folder runs/few

Each recipe runs in a process of its own through ``qlora.train``, so that its peak memory is its own. A result is kept in
``--folder``; a run that was interrupted goes on with what is missing. The learning rates are the recipes' own, chosen by
hand and not tuned: the losses say that a method learns, not which is best.
"""

from __future__ import annotations

import argparse
import datetime
import json
import shutil
import statistics
import subprocess
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
RECIPES = ROOT / "recipes" / "methods"


def measure(recipe_path: Path, folder: Path, steps: int, rows: int, overrides: list[str]) -> dict[str, Any]:
    """Train one recipe for ``steps`` steps and measure it. Bytes are of the adapter's file, seconds of a generated token."""
    import qlora
    from qlora.evaluation.latency import seconds_a_token
    from qlora.machine.device import peak_memory_bytes, resolve_device
    from qlora.recipe import parts_of
    from qlora.runs.evaluate import load_run

    run_folder = folder / recipe_path.stem
    shutil.rmtree(run_folder, ignore_errors=True)
    recipe = qlora.Recipe.from_yaml(
        recipe_path,
        f"folder={run_folder}",
        f"training.steps={steps}",
        "training.save_every=0",
        "evaluation.prompts=0",
        f"evaluation.held_out_rows={rows}",
        *overrides,
    )
    run = qlora.train(recipe, quiet=True)
    assert run.before is not None
    assert run.after is not None
    peak = peak_memory_bytes(resolve_device(recipe.device.name))
    lines = [json.loads(line) for line in (run_folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    speed = statistics.median(line["tokens_per_second"] for line in lines if "tokens_per_second" in line)
    model = load_run(run_folder, quiet=True)
    reasons = [why for method in model.methods if (why := method.merge.why_not()) is not None]
    adapted = seconds_a_token(model)
    if any(part.name == "full" for part in parts_of(recipe.method)):
        base = adapted  # the same model with other numbers in it
    else:
        with model.disabled():
            base = seconds_a_token(model)
    return {
        "method": recipe_path.stem,
        "trainable_parameters": run.trainable_parameters,
        "adapter_bytes": (run_folder / "adapter" / "adapter_model.safetensors").stat().st_size,
        "peak_memory_bytes": peak,
        "tokens_per_second": speed,
        "held_out_before": run.before.loss,
        "held_out_after": run.after.loss,
        "merges": reasons[0] if reasons else True,
        "seconds_a_token": adapted,
        "seconds_a_token_base": base,
        "report": model.report() if any(part.name == "adalora" for part in parts_of(recipe.method)) else {},
    }


def table(results: list[dict[str, Any]], steps: int, rows: int) -> str:
    """The results as Markdown."""
    import torch

    from qlora.machine.device import versions

    found = versions()
    kept = ", ".join(f"{name} {found[name]}" for name in ("torch", "transformers", "bitsandbytes"))
    where = torch.cuda.get_device_name() if torch.cuda.is_available() else f"CPU, {torch.get_num_threads()} threads"
    before = statistics.median(result["held_out_before"] for result in results)
    lines = [
        "# Every method, equal steps",
        "",
        f"{datetime.date.today()}, {where}, {kept}. {steps} steps of each recipe in `recipes/methods`, held-out loss over "
        f"{rows} rows; the base's is {before:.4f}.",
        "Made by `python benchmarks/methods.py`. Learning rates are not tuned: compare costs, not methods' worth.",
        "" if torch.cuda.is_available() else "Not measured on a GPU.",
        "",
        "| method | trainable | adapter file | peak memory | tokens/s | held-out loss after | merges | time a generated token, base = 1 |",
        "|---|--:|--:|--:|--:|--:|---|--:|",
    ]
    for result in results:
        ratio = result["seconds_a_token"] / result["seconds_a_token_base"]
        lines.append(
            f"| {result['method']} | {result['trainable_parameters']:,} | {result['adapter_bytes'] / 2**20:.2f} MiB "
            f"| {result['peak_memory_bytes'] / 2**30:.2f} GiB | {result['tokens_per_second']:.0f} "
            f"| {result['held_out_after']:.4f} | {'yes' if result['merges'] is True else 'no'} | {ratio:.2f} |"
        )
    reasons = {str(result["merges"]) for result in results if result["merges"] is not True}
    lines += ["", *(f"- {reason}" for reason in sorted(reasons))]
    ranks = [result["report"]["ranks"] for result in results if result["report"].get("ranks")]
    if ranks:
        values = list(ranks[0].values())
        lines.append(
            f"- AdaLoRA's final ranks over {len(values)} targets: {min(values)} to {max(values)}, {sum(values) / len(values):.2f} on average."
        )
    return "\n".join(line for line in lines if line is not None) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--held-out-rows", type=int, default=8)
    parser.add_argument("--only", nargs="*", help="names of recipes in recipes/methods")
    parser.add_argument("--folder", type=Path, default=Path("runs/methods"), help="where runs and results are kept")
    parser.add_argument("--out", type=Path, help="folder for the table")
    parser.add_argument("--set", nargs="*", default=[], help="overrides for every recipe, as model.name=…")
    parser.add_argument("--one", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    args.folder.mkdir(parents=True, exist_ok=True)
    settings = [args.steps, args.held_out_rows, *args.set]
    if args.one:
        result = measure(args.one, args.folder, args.steps, args.held_out_rows, args.set)
        result["settings"] = settings
        (args.folder / f"{args.one.stem}.json").write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
        return
    paths = sorted(RECIPES.glob("*.yaml"))
    if args.only:
        if strange := set(args.only) - {path.stem for path in paths}:
            sys.exit(
                f"There is no recipes/methods/{sorted(strange)[0]}.yaml; there are {[path.stem for path in paths]}."
            )
        paths = [path for path in paths if path.stem in args.only]

    def result_of(path: Path) -> dict[str, Any] | None:
        """What was measured of this recipe with these settings."""
        kept = args.folder / f"{path.stem}.json"
        found = json.loads(kept.read_text(encoding="utf-8")) if kept.is_file() else {}
        return found if found.get("settings") == settings else None

    for number, path in enumerate(paths, 1):
        if result_of(path) is None:
            print(f"{number} of {len(paths)}: {path.stem}", file=sys.stderr, flush=True)
            command = [sys.executable, __file__, "--one", str(path), "--folder", str(args.folder)]
            command += ["--steps", str(args.steps), "--held-out-rows", str(args.held_out_rows), "--set", *args.set]
            subprocess.run(command, check=False)
    results = [result for path in paths if (result := result_of(path)) is not None]
    missing = [path.stem for path in paths if result_of(path) is None]
    if not results:
        sys.exit("No recipe could be measured.")
    text = table(results, args.steps, args.held_out_rows)
    print(text)
    if args.out and not missing:
        args.out.mkdir(parents=True, exist_ok=True)
        name = f"{datetime.date.today()}-methods"
        (args.out / f"{name}.md").write_text(text, encoding="utf-8")
        (args.out / f"{name}.json").write_text(json.dumps(results, indent=2) + "\n", encoding="utf-8")
    if missing:
        sys.exit(f"These failed: {', '.join(missing)}")


if __name__ == "__main__":
    main()
