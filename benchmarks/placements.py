"""The default model with its layers resident, half resident, and streamed from the file cache: memory, speed, gradients.

    python benchmarks/placements.py [--model smollm2-135m-instruct] [--rows 4] [--length 256] [--steps 3]

Each arrangement runs in a process of its own. The gradients of the first step are compared byte for byte with the resident
one's. Prints a Markdown table: bytes of frozen layers held, the process's peak, tokens a second and its ratio.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy
import torch
from safetensors.torch import load_file, save_file

from qlora.data.packing import Row
from qlora.machine.device import peak_since_reset, reset_peak_memory, resolve_device
from qlora.machine.disk import bytes_text
from qlora.methods.base import apply_method
from qlora.model.checkpoint import open_checkpoint
from qlora.model.nf4 import FrozenLinear
from qlora.recipe import DEFAULT_MODEL, LoRA, MemorySection, ModelSection, TrainingSection
from qlora.residence.load import load_base
from qlora.training.loop import Trainer
from qlora.training.step import gradients

ARRANGEMENTS: dict[str, dict[str, Any]] = {
    "resident": {},
    "half resident, the rest from the file": {"layers": 0.5, "tier": "disk"},
    "streamed from the file": {"layers": "streamed", "tier": "disk"},
    "streamed from the file, 4 slots": {"layers": "streamed", "tier": "disk", "slots": 4},
    "streamed from host memory": {"layers": "streamed", "tier": "host"},
}


def measure(options: argparse.Namespace, name: str, scratch: Path) -> None:
    """In a process of its own: train, keep the first step's gradients, print one line of JSON."""
    device = resolve_device()
    values = {**ARRANGEMENTS[name], "cache": str(scratch / "cache")}
    if values.get("layers") == 0.5:
        values["layers"] = (
            open_checkpoint(ModelSection(name=options.model), weights=False).model_config().num_hidden_layers // 2
        )
    memory = MemorySection(**values)
    base = load_base(ModelSection(name=options.model), device, memory=memory)
    linears = [module for module in base.model.modules() if isinstance(module, FrozenLinear)]
    held = sum(values.nbytes for linear in linears for values in linear.buffers() if not values.is_meta)
    held += base.placement.bytes_on_device() if base.placement is not None else 0
    model = apply_method(base, LoRA(r=16, alpha=32))
    with torch.no_grad():  # B is zero at first, and then A has no gradient
        for number, tensor in enumerate(model.trainable_parameters().values()):
            tensor.add_(0.01 * torch.randn(tensor.shape, generator=torch.Generator().manual_seed(number)).to(tensor))
    random, rows = numpy.random.default_rng(0), []
    for number in range(options.rows):
        ids = random.integers(3, 40000, options.length).astype(numpy.int32)
        rows.append(Row(ids, ids.copy(), numpy.arange(options.length, dtype=numpy.int32), (number,)))
    training = TrainingSection(steps=options.steps, batch_size=options.rows, micro_batch_size=1, schedule="constant")
    trainer = Trainer(model, rows, training, memory=memory)
    gradients(trainer.state, trainer.objective, rows)
    found_gradients = {name: p.grad.cpu().clone() for name, p in trainer.state.parameters.items() if p.grad is not None}
    save_file(found_gradients, scratch / f"{list(ARRANGEMENTS).index(name)}.safetensors")
    del found_gradients
    trainer.state.masters.drop_gradients()
    alone = reset_peak_memory(device)
    steps = list(trainer)
    speeds = sorted(step.tokens_per_second for step in steps)
    found = {
        "held": held,
        "peak": peak_since_reset(device),
        "alone": alone,
        "speed": speeds[len(speeds) // 2],
        "loss": steps[-1].loss,
    }
    print(json.dumps(found))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=DEFAULT_MODEL)
    parser.add_argument("--rows", type=int, default=4)
    parser.add_argument("--length", type=int, default=256)
    parser.add_argument("--steps", type=int, default=3)
    parser.add_argument("--only", help=argparse.SUPPRESS)
    parser.add_argument("--scratch", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.only:
        measure(options, options.only, options.scratch)
        return
    print(
        "| frozen layers | held in memory | peak of training | tokens/s | speed, resident = 1 | gradients | last loss |"
    )
    print("|---|--:|--:|--:|--:|---|--:|")
    with tempfile.TemporaryDirectory() as scratch:
        first: dict[str, Any] = {}
        expected: dict[str, torch.Tensor] = {}
        for number, name in enumerate(ARRANGEMENTS):
            call = [sys.executable, __file__, *sys.argv[1:], "--only", name, "--scratch", scratch]
            done = subprocess.run(call, stdout=subprocess.PIPE, text=True, check=True)
            found = json.loads(done.stdout.splitlines()[-1])
            gradients = load_file(Path(scratch) / f"{number}.safetensors")
            first, expected = first or found, expected or gradients
            equal = all(torch.equal(values, expected[key]) for key, values in gradients.items())
            print(
                f"| {name} | {bytes_text(found['held'])} | {bytes_text(found['peak'])} | {found['speed']:.0f} "
                f"| {found['speed'] / first['speed']:.2f} | {'equal, bit for bit' if equal else 'DIFFERENT'} | {found['loss']:.6f} |",
                flush=True,
            )


if __name__ == "__main__":
    main()
