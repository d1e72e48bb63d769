"""What `qlora plan` chooses for the shapes of known models on cards that need not be here.

    python benchmarks/plans.py [--cards T4 3090 4090] [--models …] [--host-memory 64GiB] [--rows 8] [--length 2048] [--ladder]
    python benchmarks/plans.py --ten      ten models of 2026, on 12, 16 and 24 GB

The numbers of MODELS are those of the published config.json files as we know them, written down without a network; where a
model's number is transformers' own default it is left out. Of multimodal models the language model alone. Only configurations are made, in a scratch folder; no weight is read. LoRA r=16 on every linear, paged 8-bit AdamW,
`memory.budget=auto`. Prints a Markdown table: the arrangement chosen, what it takes on the device and beside it, the tokens
a second predicted with their range, and the longest row that holds one text (packed
rows need a mask of length²), one a step, in the smallest arrangement; with --ten instead of it what the smallest arrangement takes
on the device, and the bytes of the base that are not quantised. Every figure is a prediction, none was measured on a GPU.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path

import torch
from transformers import (
    Gemma3TextConfig,
    Gemma4TextConfig,
    Glm4MoeConfig,
    GptOssConfig,
    GraniteMoeHybridConfig,
    Lfm2MoeConfig,
    LlamaConfig,
    MistralConfig,
    Qwen3_5TextConfig,
    Qwen3Config,
    Qwen3MoeConfig,
)

from qlora.machine.device import DTYPES
from qlora.machine.disk import bytes_text
from qlora.methods.base import AdaptedModel, apply_method
from qlora.model.checkpoint import open_checkpoint
from qlora.model.skeleton import skeleton_base
from qlora.planning.ladder import Arrangement, Arranger, changed
from qlora.planning.plan import card_elsewhere, ladder_lines
from qlora.planning.shapes import dense_of
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
    "Qwen3.5-9B": Qwen3_5TextConfig(max_position_embeddings=262144, architectures=["Qwen3_5ForCausalLM"]),
    "Gemma-3-12B": Gemma3TextConfig(
        vocab_size=262208, hidden_size=3840, intermediate_size=15360, num_hidden_layers=48, num_attention_heads=16,
        num_key_value_heads=8, sliding_window=1024, architectures=["Gemma3ForCausalLM"],
    ),
    "Gemma-4-26B-A4B": Gemma4TextConfig(
        hidden_size=2816, intermediate_size=2112, num_hidden_layers=30, num_attention_heads=16, num_key_value_heads=8,
        num_global_key_value_heads=2, attention_k_eq_v=True, sliding_window=1024, hidden_size_per_layer_input=0,
        enable_moe_block=True, num_experts=128, top_k_experts=8, moe_intermediate_size=704, final_logit_softcapping=30.0,
        architectures=["Gemma4ForCausalLM"],
    ),
    "Mistral-Small-3-24B": MistralConfig(
        vocab_size=131072, hidden_size=5120, intermediate_size=32768, num_hidden_layers=40, sliding_window=None,
        architectures=["MistralForCausalLM"],
    ),
    "gpt-oss-20b": GptOssConfig(num_hidden_layers=24, num_local_experts=32, architectures=["GptOssForCausalLM"]),
    "Qwen3-30B-A3B": Qwen3MoeConfig(
        num_hidden_layers=48, head_dim=128, max_position_embeddings=40960, norm_topk_prob=True,
        architectures=["Qwen3MoeForCausalLM"],
    ),
    "GLM-4.5-Air": Glm4MoeConfig(head_dim=128, attention_bias=True, architectures=["Glm4MoeForCausalLM"]),
    "Granite-4.0-H-Small": GraniteMoeHybridConfig(
        vocab_size=100352, hidden_size=4096, intermediate_size=768, shared_intermediate_size=1536, num_hidden_layers=40,
        num_attention_heads=32, num_key_value_heads=8, num_local_experts=72, num_experts_per_tok=10, mamba_n_heads=128,
        mamba_d_head=64, mamba_d_state=128, max_position_embeddings=131072, tie_word_embeddings=True,
        layer_types=["attention" if layer % 10 == 5 else "mamba" for layer in range(40)],
        architectures=["GraniteMoeHybridForCausalLM"],
    ),
    "LFM2-8B-A1B": Lfm2MoeConfig(
        num_hidden_layers=24, architectures=["Lfm2MoeForCausalLM"],
        layer_types=["full_attention" if layer in (2, 6, 10, 14, 18, 21) else "conv" for layer in range(24)],
    ),
}  # fmt: skip
THREE = ["Llama-3.1-8B", "Qwen3-32B", "Llama-3.1-70B"]
TEN = [
    "gpt-oss-20b", "Qwen3-30B-A3B", "Gemma-4-26B-A4B", "Qwen3.5-9B", "Gemma-3-12B", "Mistral-Small-3-24B", "LFM2-8B-A1B",
    "Llama-3.1-8B", "GLM-4.5-Air", "Granite-4.0-H-Small",
]  # fmt: skip


def arrangement(one: Arrangement) -> str:
    """What was chosen, with the two things that a recipe leaves to the plan."""
    training = one.recipe.training
    decided = {"training.recompute": training.recompute, "training.accumulation": training.accumulation}
    words = (f"{key.partition('.')[2]}={value}" for key, value in {**decided, **one.changes}.items())
    return " ".join(words).replace("_batch_major", "").replace("_major", "")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cards", nargs="+", default=None, help="T4 3090 4090; with --ten 3060-12 4080 4090")
    parser.add_argument("--models", nargs="+", choices=list(MODELS), default=None)
    parser.add_argument("--ten", action="store_true")
    parser.add_argument("--host-memory", default="64GiB")
    parser.add_argument("--rows", type=int, default=8)
    parser.add_argument("--length", type=int, default=2048)
    parser.add_argument("--ladder", action="store_true", help="print every rung")
    options = parser.parse_args()
    models = options.models or (TEN if options.ten else THREE)
    cards = options.cards or (["3060-12", "4080", "4090"] if options.ten else ["T4", "3090", "4090"])
    last = "smallest | not quantised" if options.ten else "longest row"
    ruler = "--:|--:" if options.ten else "--:"
    print(f"| model | card | arrangement | device | host memory | tokens/s predicted | {last} |")
    print(f"|---|---|---|--:|--:|--:|{ruler}|")
    ladders: list[str] = []
    with tempfile.TemporaryDirectory() as scratch:
        for model in models:
            MODELS[model].save_pretrained(Path(scratch) / model)
            planted: dict[torch.dtype, AdaptedModel] = {}
            dense = None
            for name in cards:
                recipe = Recipe.from_dict(
                    {
                        "model": {"name": str(Path(scratch) / model)},
                        "method": {"name": "lora", "r": 16, "alpha": 32},
                        "data": {"train": "data.jsonl", "max_length": options.length, "packing": True},
                        "training": {"batch_size": options.rows, "optimizer": "paged_adamw_8bit"},
                        "memory": {"budget": "auto"},
                        "device": {"memory": name, "host_memory": options.host_memory},
                    }
                )
                target, resolved, _ = card_elsewhere(recipe, open_checkpoint(recipe.model, weights=False))
                dtype = DTYPES[resolved.model.compute_dtype]
                if dtype not in planted:
                    base = skeleton_base(resolved.model, torch.device("meta"), dtype)
                    dense = dense_of(base.model)
                    planted[dtype] = apply_method(base, resolved.method)
                arranger = Arranger(planted[dtype], resolved, target)
                ladder = arranger.ladder()
                chosen = arranger.fastest(ladder)
                if chosen is None:
                    print(
                        f"| {model} | {name} | none fits in {options.host_memory} of host memory | | | | |", flush=True
                    )
                    continue
                seconds, tokens = chosen.seconds, options.rows * options.length
                assert seconds is not None
                if options.ten:
                    assert dense is not None
                    last = f"{bytes_text(ladder[-1].needed.total)} | {bytes_text(sum(dense.bytes.values()))}"
                else:
                    one_text = changed(resolved, {"training.batch_size": 1, "data.packing": False})
                    alone = Arranger(planted[dtype], one_text, target)
                    last = f"{alone.longest_context(alone.look(ladder[-1].changes)) or 0:,}"
                print(
                    f"| {model} | {name} | {arrangement(chosen)} "
                    f"| {bytes_text(chosen.needed.total)} | {bytes_text(chosen.needed.host_total)} "
                    f"| {tokens / seconds.expected:,.0f} ({tokens / seconds.high:,.0f} to {tokens / seconds.low:,.0f}) "
                    f"| {last} |",
                    flush=True,
                )
                ladders += [f"\n{model} on {name}:\n", "```", *ladder_lines(ladder, target, chosen), "```"]
    if options.ladder:
        print("\n".join(ladders))


if __name__ == "__main__":
    main()
