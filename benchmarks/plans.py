"""What `qlora plan` chooses for 8B, 32B and 70B shapes on cards that need not be here.

    python benchmarks/plans.py [--cards T4 3090 4090] [--host-memory 64GiB] [--rows 8] [--length 2048] [--ladder]

Only configurations are made, in a scratch folder; no weight is read. LoRA r=16 on every linear, paged 8-bit AdamW,
`memory.budget=auto`. Prints a Markdown table: the arrangement chosen, what it takes on the device and beside it, the tokens
a second predicted with their range, and the longest row that holds one text (packed
rows need a mask of length²), one a step, in the smallest arrangement. Every figure is a prediction, none was measured on a GPU.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path

import torch
from transformers import LlamaConfig, Qwen3Config

from qlora.machine.device import DTYPES, bytes_text
from qlora.methods import AdaptedModel, apply_method
from qlora.model.checkpoint import open_checkpoint
from qlora.model.skeleton import skeleton_base
from qlora.planning.ladder import Arranger, changed
from qlora.planning.plan import card_elsewhere, ladder_lines
from qlora.recipe import Recipe

MODELS = {
    "Llama-3.1-8B": LlamaConfig(
        vocab_size=128256, hidden_size=4096, intermediate_size=14336, num_hidden_layers=32, num_attention_heads=32,
        num_key_value_heads=8, max_position_embeddings=131072, architectures=["LlamaForCausalLM"],
    ),
    "Qwen3-32B": Qwen3Config(
        vocab_size=151936, hidden_size=5120, intermediate_size=25600, num_hidden_layers=64, num_attention_heads=64,
        num_key_value_heads=8, head_dim=128, max_position_embeddings=40960, architectures=["Qwen3ForCausalLM"],
    ),
    "Llama-3.1-70B": LlamaConfig(
        vocab_size=128256, hidden_size=8192, intermediate_size=28672, num_hidden_layers=80, num_attention_heads=64,
        num_key_value_heads=8, max_position_embeddings=131072, architectures=["LlamaForCausalLM"],
    ),
}  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cards", nargs="+", default=["T4", "3090", "4090"])
    parser.add_argument("--models", nargs="+", choices=list(MODELS), default=list(MODELS))
    parser.add_argument("--host-memory", default="64GiB")
    parser.add_argument("--rows", type=int, default=8)
    parser.add_argument("--length", type=int, default=2048)
    parser.add_argument("--ladder", action="store_true", help="print every rung")
    options = parser.parse_args()
    print(
        "| model | card | arrangement | device | host memory | tokens/s predicted | longest row |\n|---|---|---|--:|--:|--:|--:|"
    )
    ladders: list[str] = []
    with tempfile.TemporaryDirectory() as scratch:
        for model in options.models:
            MODELS[model].save_pretrained(Path(scratch) / model)
            planted: dict[torch.dtype, AdaptedModel] = {}
            for name in options.cards:
                recipe = Recipe.from_dict(
                    {
                        "model": {"name": str(Path(scratch) / model)},
                        "method": {"name": "lora", "r": 16, "alpha": 32},
                        "data": {"train": "data.jsonl", "max_length": options.length},
                        "training": {"batch_size": options.rows, "optimizer": "paged_adamw_8bit"},
                        "memory": {"budget": "auto"},
                        "device": {"memory": name, "host_memory": options.host_memory},
                    }
                )
                target, resolved, _ = card_elsewhere(recipe, open_checkpoint(recipe.model, weights=False))
                dtype = DTYPES[resolved.model.compute_dtype]
                if dtype not in planted:
                    base = skeleton_base(resolved.model, torch.device("meta"), dtype)
                    planted[dtype] = apply_method(base, resolved.method)
                arranger = Arranger(planted[dtype], resolved, target)
                ladder = arranger.ladder()
                chosen = arranger.fastest(ladder)
                if chosen is None:
                    print(f"| {model} | {name} | none fits | | | | |", flush=True)
                    continue
                seconds, tokens = chosen.seconds, options.rows * options.length
                assert seconds is not None
                alone = Arranger(
                    planted[dtype], changed(resolved, {"training.batch_size": 1, "data.packing": False}), target
                )
                context = alone.longest_context(alone.look(ladder[-1].changes))
                print(
                    f"| {model} | {name} | {str(chosen).replace('memory.', '').replace('training.', '')} "
                    f"| {bytes_text(chosen.needed.total)} | {bytes_text(chosen.needed.host_total)} "
                    f"| {tokens / seconds.expected:,.0f} ({tokens / seconds.high:,.0f} to {tokens / seconds.low:,.0f}) "
                    f"| {context or 0:,} |",
                    flush=True,
                )
                ladders += [f"\n{model} on {name}:\n", "```", *ladder_lines(ladder, target, chosen), "```"]
    if options.ladder:
        print("\n".join(ladders))


if __name__ == "__main__":
    main()
