"""A random model of 100 million numbers on real text through the tool itself: plan, train, resume, evaluate, export.

    python -m benchmarks.on_gpu.end_to_end WORK OUT [--tiny]

The text is the quickstart's, the standard library's docstrings. Then ten steps as a T4 computes (fp16 with a scaled loss,
SDPA, unpacked rows), and ten with half of the layers streamed. ``metrics.jsonl`` and ``plan.json`` go to OUT.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import yaml

from qlora.quickstart.docstrings import write_data
from tests.tiny import chat_checkpoint

LARGE = {
    "hidden_size": 1024, "intermediate_size": 2816, "num_hidden_layers": 8, "num_attention_heads": 16,
    "num_key_value_heads": 8, "max_position_embeddings": 2048, "initializer_range": 0.05,
}  # fmt: skip
OTHERS = {
    "fp16": ["model.compute_dtype=fp16", "model.attention=sdpa", "data.packing=false"],
    "streamed": ["memory.layers=4"],
}


def qlora(*words: str) -> int:
    """The command, its output on ours."""
    print("$ qlora", *words, flush=True)
    code = subprocess.run([sys.executable, "-c", "from qlora.cli import entry; entry()", *words]).returncode
    print("exit", code, flush=True)
    return code


def values(work: Path, tiny: bool) -> dict[str, Any]:
    """The recipe: adapters, new embeddings and a new head, a paged 8-bit optimizer, packed rows."""
    steps = 4 if tiny else 20
    return {
        "model": {"name": str(work / "model")},
        "method": [
            {"name": "lora", "r": 4 if tiny else 64, "alpha": 64, "dropout": 0.05},
            {"name": "modules", "modules": ["lm_head", "embed_tokens"]},
        ],
        "data": {
            "train": str(work / "train.jsonl"),
            "held_out": str(work / "held.jsonl"),
            "max_length": 512,
            "packing": True,
        },
        "training": {
            "steps": steps, "batch_size": 8, "micro_batch_size": 4, "learning_rate": 1e-3,
            "optimizer": "paged_adamw_8bit", "save_every": steps // 2,
        },
        "evaluation": {"prompts": 2, "max_new_tokens": 16, "held_out_rows": 2 if tiny else 8},
        "folder": str(work / "run"),
    }  # fmt: skip


def lines_of(folder: Path) -> list[dict[str, Any]]:
    """What the run recorded."""
    file = folder / "metrics.jsonl"
    return [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("work", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--tiny", action="store_true")
    options = parser.parse_args()
    work: Path = options.work
    chat_checkpoint(work / "model", **({"max_position_embeddings": 2048} if options.tiny else LARGE))
    write_data(work / "train.jsonl", work / "held.jsonl")
    recipe, run = str(work / "recipe.yaml"), work / "run"
    Path(recipe).write_text(yaml.safe_dump(values(work, options.tiny)))
    failed = 0
    for words in (["plan", recipe], ["train", recipe], ["evaluate", str(run)], ["export", str(run), "merged"]):
        failed += qlora(*words) != 0
    for name in ("metrics.jsonl", "plan.json"):
        if (run / name).exists():
            (options.out / name).write_bytes((run / name).read_bytes())
    print(
        "held out", [round(line["held_out_loss"], 3) for line in lines_of(run) if "held_out_loss" in line], flush=True
    )
    for name, more in {} if options.tiny else OTHERS.items():
        words = [f"folder={work / name}", "training.steps=10", "training.save_every=0", "evaluation.prompts=0", *more]
        failed += qlora("train", recipe, *words) != 0
        print(name, [round(line["loss"], 3) for line in lines_of(work / name) if "loss" in line], flush=True)
    sys.exit(failed > 0)


if __name__ == "__main__":
    main()
