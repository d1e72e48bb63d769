"""8B and 70B shapes under a memory limit: predicted and measured peak, speed, and what a streamed layer costs.

    python -m benchmarks.on_gpu.streamed [--limit 24GiB] [--case 70b-streamed …] [--steps 2] [--tiny]

A layer's seconds are (t of 12 layers − t of 4) / 8, resident and streamed: so that the ends, which do not depend on depth,
fall out. Weights are random and already 4-bit. ``--tiny`` runs every case with a tiny model on whatever device there is.
"""

from __future__ import annotations

import argparse
import gc
import time
from dataclasses import dataclass, field
from typing import Any

import torch

from benchmarks.on_gpu.shapes import llama, operators, planned, random_base, rows
from qlora.machine.cards import parse_memory
from qlora.machine.device import peak_memory_bytes, release_memory, resolve_compute_dtype, resolve_device, versions
from qlora.machine.disk import bytes_text
from qlora.methods.base import apply_method
from qlora.planning.ladder import changed
from qlora.recipe import LoRA, Recipe
from qlora.training.loop import Trainer

ON_HOST = {"memory.embedding": "host", "memory.head": "host", "memory.layer_inputs": "host", "training.loss_chunk": 64}


@dataclass(frozen=True)
class Case:
    """A model, a row's length, rows a step, and what the recipe says of memory."""

    model: str
    length: int
    rows: int
    changes: dict[str, Any] = field(default_factory=dict)
    layers: int | None = None
    """Only so many of the model's layers."""


CASES = {
    "70b-4-resident": Case("70b", 2048, 4, {}, 4),
    "70b-12-resident": Case("70b", 2048, 4, {}, 12),
    "70b-4-streamed": Case("70b", 2048, 4, {"memory.layers": "streamed"}, 4),
    "70b-12-streamed": Case("70b", 2048, 4, {"memory.layers": "streamed"}, 12),
    "70b-streamed": Case("70b", 2048, 4, {**ON_HOST, "memory.head": "device", "memory.layers": "streamed"}),
    "8b-streamed": Case("8b", 2048, 4, {**ON_HOST, "memory.layers": "streamed", "memory.mlp_tile": 1024}),
}


def recipe_of(case: Case) -> Recipe:
    """Full rows, one at a time."""
    training = {"batch_size": case.rows, "micro_batch_size": 1, "steps": 1000, "optimizer": "paged_adamw_8bit"}
    data = {"train": "random", "max_length": case.length, "packing": False}
    return changed(Recipe.model_validate({"data": data, "training": training}), case.changes)


def run(case: Case, device: torch.device, dtype: torch.dtype, steps: int) -> dict[str, Any]:
    """One case: its peak, predicted and measured, and its speed."""
    config, recipe = llama(case.model, case.length, case.layers), recipe_of(case)
    model = apply_method(random_base(config, recipe.memory, device, dtype), LoRA(r=16, alpha=32))
    operators(model.model, dtype, device)
    trainer = Trainer(model, rows(config, case.rows, case.length), recipe.training, memory=recipe.memory)
    next(trainer)
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    seconds = sorted(next(trainer).seconds for _ in range(steps))[steps // 2]
    adapters = "bf16" if next(iter(model.trainable_parameters().values())).dtype == torch.bfloat16 else "fp32"
    method = LoRA(r=16, alpha=32, adapter_dtype=adapters)  # type: ignore[arg-type]
    plan = planned(config, method, recipe.training, recipe.memory, case.length, device, dtype)
    reserved = torch.cuda.max_memory_reserved(device) if device.type == "cuda" else 0
    return {
        "tokens": case.rows * case.length, "seconds": seconds, "speed": case.rows * case.length / seconds,
        "predicted": plan, "measured": peak_memory_bytes(device), "reserved": reserved,
        "host": peak_memory_bytes(torch.device("cpu")),
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--limit", default="24GiB", help="of GPU memory that this process may take")
    parser.add_argument("--case", nargs="*", choices=CASES, default=list(CASES))
    parser.add_argument("--steps", type=int, default=2)
    parser.add_argument("--tiny", action="store_true")
    options = parser.parse_args()
    device = resolve_device()
    dtype = resolve_compute_dtype(device)
    if device.type == "cuda":
        total = torch.cuda.get_device_properties(device).total_memory
        torch.cuda.set_per_process_memory_fraction(min(1.0, parse_memory(options.limit) / total), device)
    elif not options.tiny:
        print("No CUDA device: nothing was measured. --tiny shows on a CPU that this works.")
        return
    print(f"\n{time.strftime('%Y-%m-%d')}, {versions()}, limit {options.limit}\n")
    print("| case | tokens a step | predicted | allocated | error | reserved | host memory | s a step | tokens/s |")
    print("|---|--:|--:|--:|--:|--:|--:|--:|--:|", flush=True)
    found: dict[str, dict[str, Any]] = {}
    for name in options.case:
        case = CASES[name]
        if options.tiny:
            case = Case("tiny", 128, case.rows, case.changes, min(case.layers or 4, 4) - (case.layers == 4))
        try:
            one = found[name] = run(case, device, dtype, options.steps)
            print(
                f"| {name} | {one['tokens']:,} | {bytes_text(one['predicted'])} | {bytes_text(one['measured'])} "
                f"| {one['predicted'] / one['measured'] - 1:+.1%} | {bytes_text(one['reserved'])} | {bytes_text(one['host'])} "
                f"| {one['seconds']:.2f} | {one['speed']:.0f} |",
                flush=True,
            )
        except Exception as error:
            print(f"| {name} | {type(error).__name__}: {str(error)[:200]!r} |", flush=True)
        gc.collect()
        release_memory(device)
    each = {
        how: (found[f"70b-12-{how}"]["seconds"] - found[f"70b-4-{how}"]["seconds"]) / 8
        for how in ("resident", "streamed")
        if {f"70b-12-{how}", f"70b-4-{how}"} <= found.keys()
    }
    if len(each) == 2:
        print(f"\nA 70B layer takes {each['resident']:.4f} s a step resident and {each['streamed']:.4f} s streamed: "
              f"{each['resident'] / each['streamed']:.1%} of the resident speed.")  # fmt: skip


if __name__ == "__main__":
    main()
