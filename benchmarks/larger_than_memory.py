"""A model trained in a process that is not allowed to hold its weights.

    python benchmarks/larger_than_memory.py [--layers 32] [--limit 2.9] [--folder scratch] [--keep]

Writes a random bf16 checkpoint in the shapes of Llama-2-7B (13.5 GB for 32 layers; 17 GB of disk in all), then starts a
process whose memory the system limits (RLIMIT_DATA) below the quantised weights. There the checkpoint is quantised into the
file cache and two steps are trained with every layer streamed from it. A second process with the same limit and all
layers resident shows that the limit is real. Prints a Markdown table. Needs Linux.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, PreTrainedTokenizerFast

from qlora.data.packing import Row
from qlora.export.writer import SafetensorsWriter
from qlora.machine.device import peak_memory_bytes
from qlora.machine.disk import GIB, bytes_text
from qlora.methods.base import apply_method
from qlora.recipe import LoRA, MemorySection, ModelSection, TrainingSection
from qlora.residence.load import load_base
from qlora.training.loop import Trainer

SIZES = {
    "vocab_size": 32000, "hidden_size": 4096, "intermediate_size": 11008, "num_attention_heads": 32,
    "num_key_value_heads": 32, "max_position_embeddings": 4096,
}  # fmt: skip
CPU = torch.device("cpu")


def write_checkpoint(folder: Path, layers: int) -> None:
    """Random weights, a file a layer, none of them ever in memory as a whole."""
    folder.mkdir(parents=True)
    config = LlamaConfig(**SIZES, num_hidden_layers=layers, architectures=["LlamaForCausalLM"], dtype="bfloat16")
    config.save_pretrained(folder)
    words = Tokenizer(models.WordLevel({f"w{n}": n for n in range(SIZES["vocab_size"])}, unk_token="w0"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=words, unk_token="w0", pad_token="w0").save_pretrained(folder)
    d, f, v = SIZES["hidden_size"], SIZES["intermediate_size"], SIZES["vocab_size"]
    block = {f"self_attn.{name}_proj": (d, d) for name in "qkvo"}
    block |= {"mlp.gate_proj": (f, d), "mlp.up_proj": (f, d), "mlp.down_proj": (d, f)}
    files = {
        f"model-{layer:05d}.safetensors": {
            f"model.layers.{layer}.{name}.weight": shape for name, shape in block.items()
        }
        | {f"model.layers.{layer}.{name}_layernorm.weight": (d,) for name in ("input", "post_attention")}
        for layer in range(layers)
    }
    files["model-outside.safetensors"] = {
        "model.embed_tokens.weight": (v, d),
        "model.norm.weight": (d,),
        "lm_head.weight": (v, d),
    }
    generator = torch.Generator().manual_seed(0)
    for file, shapes in files.items():
        with SafetensorsWriter(
            folder / file, {name: (torch.bfloat16, shape) for name, shape in shapes.items()}
        ) as writer:
            for name, shape in shapes.items():
                spread = 1.0 if len(shape) == 1 else 0.02
                drawn = (
                    torch.empty(shape).uniform_(-spread, spread, generator=generator)
                    if len(shape) == 2
                    else torch.ones(shape)
                )
                writer.write(name, drawn.bfloat16())
    weight_map = {name: file for file, shapes in files.items() for name in shapes}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))


def train(folder: Path, cache: Path, limit: float, layers: str, length: int) -> None:
    """In the limited process: load, two steps, and one line of JSON."""
    resource.setrlimit(resource.RLIMIT_DATA, (int(limit * GIB), int(limit * GIB)))
    begin = time.perf_counter()
    memory = MemorySection(layers=layers, tier="disk", cache=str(cache))  # type: ignore[arg-type]
    model = apply_method(
        load_base(ModelSection(name=str(folder)), CPU, progress=True, memory=memory), LoRA(r=8, alpha=16)
    )
    loaded, after_load = time.perf_counter() - begin, peak_memory_bytes(CPU)
    random = numpy.random.default_rng(0)
    rows = []
    for number in range(2):
        ids = random.integers(1, SIZES["vocab_size"], length).astype(numpy.int32)
        rows.append(Row(ids, ids.copy(), numpy.arange(length, dtype=numpy.int32), (number,)))
    training = TrainingSection(
        steps=2, batch_size=1, micro_batch_size=1, learning_rate=1e-3, schedule="constant", warmup_fraction=0
    )
    trainer = Trainer(model, rows, training, memory=memory)
    steps = [{"loss": step.loss, "seconds": step.seconds} for step in trainer]
    moved = sum(
        values.abs().sum().item() for name, values in trainer.state.parameters.items() if name.endswith("lora_B")
    )
    found = {
        "load_seconds": loaded,
        "after_load": after_load,
        "peak": peak_memory_bytes(CPU),
        "steps": steps,
        "moved": moved,
    }
    print(json.dumps(found))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=32)
    parser.add_argument("--limit", type=float, default=2.9, help="GiB that the process may hold")
    parser.add_argument("--length", type=int, default=64, help="tokens of a step, one row")
    parser.add_argument("--folder", type=Path)
    parser.add_argument("--keep", action="store_true", help="leave the checkpoint and the cache")
    parser.add_argument("--train", choices=["streamed", "resident"], help=argparse.SUPPRESS)
    options = parser.parse_args()
    folder = options.folder or Path(tempfile.mkdtemp(prefix="larger-"))
    model, cache = folder / "model", folder / "cache"
    if options.train:
        train(model, cache, options.limit, options.train, options.length)
        return
    try:
        if not (model / "model.safetensors.index.json").is_file():
            write_checkpoint(model, options.layers)
        call = [
            sys.executable,
            __file__,
            "--folder",
            str(folder),
            "--limit",
            str(options.limit),
            "--length",
            str(options.length),
        ]
        there = any(cache.rglob("layers.bin"))
        # the limit counts addresses: glibc's heap keeps those of freed blocks, while mapped blocks give them back
        environment = {**os.environ, "MALLOC_MMAP_THRESHOLD_": str(2**20)}
        streamed = subprocess.run(
            [*call, "--train", "streamed"], stdout=subprocess.PIPE, text=True, check=True, env=environment
        )
        found = json.loads(streamed.stdout.splitlines()[-1])
        resident = subprocess.run([*call, "--train", "resident"], capture_output=True, text=True, env=environment)
        packed = sum(path.stat().st_size for path in cache.rglob("layers.bin"))
        checkpoint = sum(path.stat().st_size for path in model.glob("*.safetensors"))
        outside = 2 * SIZES["vocab_size"] * SIZES["hidden_size"] * 4
        assert found["moved"] > 0
        rows = {
            "checkpoint, bf16": f"{checkpoint / 1e9:.2f} GB",
            "file cache, the quantised layers": f"{packed / 1e9:.2f} GB ({bytes_text(packed)})",
            "all weights as loaded (with embedding and head in fp32)": bytes_text(packed + outside),
            "limit of the process (RLIMIT_DATA)": f"{options.limit:g} GiB",
            "all layers resident under this limit": f"exit status {resident.returncode}: {resident.stderr.strip().splitlines()[-1][:160]}",
            "peak resident set": bytes_text(found["peak"]),
            "seconds to load, the file cache written or found": f"{found['load_seconds']:.0f}, {'found' if there else 'written'}",
            f"seconds of each step of {options.length} tokens": ", ".join(
                f"{step['seconds']:.1f}" for step in found["steps"]
            ),
            "loss of the two steps": ", ".join(f"{step['loss']:.4f}" for step in found["steps"]),
        }
        print("| | |\n|---|---|\n" + "\n".join(f"| {name} | {value} |" for name, value in rows.items()))
    finally:
        if not options.keep and options.folder is None:
            shutil.rmtree(folder, ignore_errors=True)


if __name__ == "__main__":
    main()
