"""Real shapes with random weights under a memory limit: predicted and measured peak, speed, and the longest context.

    python benchmarks/on_gpu.py [--limit 24GiB] [--case 8b-resident …] [--steps 3] [--tiny]

Cases: an 8B model at 2,048 tokens resident, with all but its layers on the host, and streamed from pinned host memory; 70B
shapes streamed, with the share of the speed that a resident layer has; the longest row of an 8B model. Weights are random
and already 4-bit, so nothing is downloaded; speed and memory do not depend on their values. ``--tiny`` runs every case with
a tiny model on whatever device there is, to see that it works. Prints Markdown.
"""

from __future__ import annotations

import argparse
import gc
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy
import torch
from transformers import LlamaConfig

from qlora.data import Row
from qlora.errors import DoesNotFitError
from qlora.machine.cards import parse_memory, workspace_bytes
from qlora.machine.device import (
    bytes_text,
    peak_memory_bytes,
    release_memory,
    resolve_compute_dtype,
    resolve_device,
    versions,
)
from qlora.methods import AdaptedModel, apply_method
from qlora.model.anatomy import layers as decoder_layers
from qlora.model.base import Base
from qlora.model.config import Scheme
from qlora.model.load import finish
from qlora.model.nf4 import FrozenLinear
from qlora.model.skeleton import empty_linears, empty_model
from qlora.planning.ladder import changed
from qlora.planning.memory import estimate
from qlora.recipe import LoRA, MemorySection, ModelSection, Recipe
from qlora.residence.ends import embedding_on_host, head_on_host
from qlora.residence.homes import HostHome
from qlora.residence.image import Image
from qlora.residence.placement import Placement, resident_layers
from qlora.training import Trainer

SHAPES: dict[str, dict[str, int]] = {
    "8b": {"vocab_size": 128256, "hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32,
           "num_attention_heads": 32, "num_key_value_heads": 8},
    "70b": {"vocab_size": 128256, "hidden_size": 8192, "intermediate_size": 28672, "num_hidden_layers": 80,
            "num_attention_heads": 64, "num_key_value_heads": 8},
    "tiny": {"vocab_size": 1000, "hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 4,
             "num_attention_heads": 4, "num_key_value_heads": 2},
}  # fmt: skip
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
    "8b-resident": Case(
        "8b", 2048, 1, {"memory.embedding": "host", "memory.layer_inputs": "host", "training.loss_chunk": 64}
    ),
    "8b-streamed": Case("8b", 2048, 1, {**ON_HOST, "memory.layers": "streamed", "memory.mlp_tile": 1024}),
    "70b-four-layers-resident": Case("70b", 2048, 4, ON_HOST, layers=4),
    "70b-streamed": Case("70b", 2048, 4, {**ON_HOST, "memory.layers": "streamed"}),
}
LONG = {**ON_HOST, "memory.layers": "streamed", "memory.mlp_tile": 2048, "training.loss_chunk": 64}


def random_base(config: Any, memory: MemorySection, device: torch.device, dtype: torch.dtype) -> Base:
    """A base of that configuration with random weights, placed as ``load_base`` places a checkpoint's."""
    section = ModelSection(name="random")
    model: Any = empty_model(config, section, dtype)
    empty_linears(model, Scheme("nf4", True, False), dtype, set())
    layers, placement = decoder_layers(model), None
    stay = resident_layers(memory.layers, len(layers))
    if len(stay) < len(layers):
        images = {number: Image(layer) for number, layer in enumerate(layers) if number not in stay}
        home = HostHome({number: image.bytes for number, image in images.items()}, device)
        placement = Placement(images, home, memory.slots, device, memory.tier)
    generator = torch.Generator(device).manual_seed(0)
    for linear in model.modules():
        if isinstance(linear, FrozenLinear):
            drawn = torch.randn(
                linear.out_features, linear.in_features, generator=generator, device=device, dtype=torch.float32
            )
            linear.place((0.02 * drawn).to(dtype), device)  # type: ignore[operator]
    finish(model, set(model.state_dict()), device, "random")
    model.eval().requires_grad_(False)
    if placement is not None:
        placement.stream(layers)
    if memory.embedding == "host":
        embedding_on_host(model, device)
    if memory.head == "host":
        head_on_host(model, device)
    return Base(model, None, Path(), "random", None, "nf4", True, device, dtype, placement=placement)


def trainer_of(case: Case, config: Any, device: torch.device, dtype: torch.dtype, steps: int) -> tuple[Trainer, Recipe]:
    """A trainer on random rows of full length."""
    recipe = Recipe.model_validate(
        {
            "data": {"train": "random", "max_length": case.length, "packing": False},
            "training": {
                "batch_size": case.rows,
                "micro_batch_size": 1,
                "steps": steps,
                "optimizer": "paged_adamw_8bit",
            },
        }
    )
    recipe = changed(recipe, case.changes)
    model = apply_method(random_base(config, recipe.memory, device, dtype), LoRA(r=16, alpha=32))
    rows = []
    for number in range(case.rows):
        ids = numpy.random.default_rng(number).integers(3, config.vocab_size, case.length).astype(numpy.int32)
        rows.append(Row(ids, ids.copy(), numpy.arange(case.length, dtype=numpy.int32), (number,)))
    return Trainer(model, rows, recipe.training, memory=recipe.memory), recipe


def predicted(model: AdaptedModel, recipe: Recipe, device: torch.device, config: Any, dtype: torch.dtype) -> int:
    """Bytes on the device by the plan, its runtime left out, from a skeleton."""
    section = ModelSection(name="random")
    skeleton: Any = empty_model(config, section, dtype)
    empty_linears(skeleton, Scheme("nf4", True, False), dtype, set())
    skeleton.tie_weights()
    empty = Base(skeleton.requires_grad_(False), None, Path(), "random", None, "nf4", True, torch.device("meta"), dtype)
    kept = next(iter(model.trainable_parameters().values())).dtype
    method = LoRA(r=16, alpha=32, adapter_dtype="bf16" if kept == torch.bfloat16 else "fp32")
    workspace = workspace_bytes(torch.cuda.get_device_capability(device)[0])
    adapted = apply_method(empty, method)
    length = recipe.data.max_length
    needed = estimate(adapted, recipe.training, length, device, False, recipe.memory, workspace=workspace)
    return needed.total - needed.device["runtime"]


def run(name: str, case: Case, device: torch.device, dtype: torch.dtype, steps: int) -> dict[str, Any]:
    """One case: its peak, predicted and measured, and its speed."""
    sizes = {**SHAPES[case.model], "max_position_embeddings": case.length}
    config = LlamaConfig(**{**sizes, "num_hidden_layers": case.layers or sizes["num_hidden_layers"]})
    trainer, recipe = trainer_of(case, config, device, dtype, steps)
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    done = list(trainer)
    seconds = sorted(step.seconds for step in done)[len(done) // 2]
    plan = predicted(trainer.model, recipe, device, config, dtype)
    measured = peak_memory_bytes(device)
    return {
        "case": name, "tokens": case.rows * case.length, "seconds": seconds, "speed": case.rows * case.length / seconds,
        "layers": config.num_hidden_layers, "predicted": plan, "measured": measured, "host": peak_memory_bytes(torch.device("cpu")),
    }  # fmt: skip


def longest(device: torch.device, dtype: torch.dtype, model: str, start: int) -> int:
    """The longest row of the 8B model that trains a step, doubled from ``start`` until memory runs out, then halved down."""

    def fits(length: int) -> bool:
        try:
            run("longest", Case(model, length, 1, LONG), device, dtype, 1)
        except (torch.OutOfMemoryError, DoesNotFitError):
            return False
        finally:
            gc.collect()
            release_memory(device)
        return True

    low = start
    while fits(2 * low) and low < 2**20:
        low *= 2
    step = low // 4
    while step >= low // 16:
        low, step = (low + step, step) if fits(low + step) else (low, step // 2)
    return low


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--limit", default="24GiB", help="of GPU memory that this process may take")
    parser.add_argument("--case", nargs="*", choices=[*CASES, "longest"], default=[*CASES, "longest"])
    parser.add_argument("--steps", type=int, default=3)
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
    print(f"{time.strftime('%Y-%m-%d')}, {versions()}, limit {options.limit}\n")
    print(
        "| case | tokens a step | predicted | measured | error | host memory | s a step | tokens/s |\n|---|--:|--:|--:|--:|--:|--:|--:|"
    )
    found: dict[str, dict[str, Any]] = {}
    for name in options.case:
        if name == "longest":
            continue
        case = CASES[name]
        if options.tiny:
            case = Case("tiny", 128, case.rows, case.changes, case.layers)
        one = found[name] = run(name, case, device, dtype, options.steps)
        print(
            f"| {name} | {one['tokens']:,} | {bytes_text(one['predicted'])} | {bytes_text(one['measured'])} "
            f"| {one['predicted'] / one['measured'] - 1:+.1%} | {bytes_text(one['host'])} | {one['seconds']:.2f} | {one['speed']:.0f} |",
            flush=True,
        )
        gc.collect()
        release_memory(device)
    if {"70b-streamed", "70b-four-layers-resident"} <= found.keys():
        each = {name: found[name]["seconds"] / found[name]["layers"] for name in found}
        print(f"\nA streamed 70B layer at {each['70b-four-layers-resident'] / each['70b-streamed']:.1%} of a resident one's speed "
              "(the head's time is shared among 80 layers in one case, among 4 in the other).")  # fmt: skip
    if "longest" in options.case:
        model, start = ("tiny", 256) if options.tiny else ("8b", 32768)
        if device.type == "cuda":
            print(f"\nLongest row of {model}: {longest(device, dtype, model, start):,} tokens.")


if __name__ == "__main__":
    main()
