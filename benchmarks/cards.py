"""The recipes in recipes/cards: families that people use, on the cards that they have, as `qlora init` writes them.

    python -m benchmarks.cards [--models Qwen3-8B …] [--cards T4 …]     writes them
    python -m benchmarks.cards --check                                  says which are not what it would write, with status 1

There is no data to look at, so rows are of 2,048 tokens, or of half as many until one fits. What fits is the plan's answer, by
published configurations (benchmarks/plans.py); no weight is read and nothing was measured on these cards.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from pathlib import Path

from transformers import PretrainedConfig, Qwen3Config

from benchmarks.plans import MODELS
from qlora.errors import DoesNotFitError
from qlora.init import Draft, fitted, plan_for, reasons, with_training, written
from qlora.planning.plan import Plan
from qlora.recipe import Recipe

FOLDER = Path(__file__).parents[1] / "recipes" / "cards"
QWEN = Qwen3Config(
    vocab_size=151936, hidden_size=4096, intermediate_size=12288, num_hidden_layers=36, num_attention_heads=32,
    num_key_value_heads=8, head_dim=128, max_position_embeddings=40960, architectures=["Qwen3ForCausalLM"],
)  # fmt: skip
FAMILIES: dict[str, tuple[str, PretrainedConfig]] = {
    "qwen3-8b": ("Qwen/Qwen3-8B", QWEN),
    "llama-3.1-8b": ("meta-llama/Llama-3.1-8B-Instruct", MODELS["Llama-3.1-8B"]),
    "gemma-3-12b": ("google/gemma-3-12b-it", MODELS["Gemma-3-12B"]),
    "mistral-small-24b": ("mistralai/Mistral-Small-24B-Instruct-2501", MODELS["Mistral-Small-3-24B"]),
    "gpt-oss-20b": ("openai/gpt-oss-20b", MODELS["gpt-oss-20b"]),
    "qwen3-30b-a3b": ("Qwen/Qwen3-30B-A3B", MODELS["Qwen3-30B-A3B"]),
}
CARDS = {
    "t4": ("T4", "12GiB", "a T4, as Colab and Kaggle lend it, with 12 GiB of host memory"),
    "12gb": ("3060-12", "24GiB", "a card of 12 GB (planned for a 3060), with 24 GiB of host memory"),
    "24gb": ("3090", "48GiB", "a card of 24 GB with bf16 (planned for a 3090), with 48 GiB of host memory"),
    "48gb": ("A40", "64GiB", "a card of 48 GB (planned for an A40), with 64 GiB of host memory"),
    "80gb": ("H100", "128GiB", "a card of 80 GB (planned for an H100), with 128 GiB of host memory"),
}
"""By the end of the recipe's name: the card that it is planned for, the host memory, and what it needs in words."""
LONGEST, SHORTEST, STEPS = 2048, 256, 500


def text(family: str, size: str) -> str:
    """One recipe. Raises DoesNotFitError where not even its shortest rows do."""
    name, config = FAMILIES[family]
    card, host_memory, needs = CARDS[size]
    place = f"recipes/cards/{family}-{size}.yaml"
    with tempfile.TemporaryDirectory() as scratch:
        config.save_pretrained(scratch)
        length = LONGEST
        while True:
            data = {"train": "my.jsonl", "held_out_fraction": 0.05, "max_length": length}
            method = {"name": "lora", "r": 16, "alpha": 32}
            model = {"name": name, "quantization": "nf4"}
            begun = {"folder": f"runs/{family}-{size}", "model": model, "method": method, "data": data}
            values = with_training(begun, gpu=True, batch=16, epochs=1, steps=STEPS)

            def plan_here(recipe: Recipe, folder: str = scratch) -> Plan:
                there = recipe.model_copy(update={"model": recipe.model.model_copy(update={"name": folder})})
                return plan_for(there, card, host_memory)

            try:
                recipe, plan = fitted(values, (), plan_here)
                break
            except DoesNotFitError:
                if length <= SHORTEST:
                    raise
                length //= 2
    why = {
        "data.train": "yours: qlora init --model … --data … looks at it, and chooses what is below by it",
        "data.max_length": "the longest, up to 2,048, that fits",
        **reasons(plan),
    }
    seconds = plan.chosen.seconds
    speed = f"Predicted, not measured: {plan.chosen.tokens / seconds.expected:,.0f} tokens/s." if seconds else ""
    command = f"python -m benchmarks.cards --models {family} --cards {size}"
    return written(Draft(recipe, why, plan, [speed] if speed else []), Path(place), command, needs)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", choices=list(FAMILIES), default=list(FAMILIES))
    parser.add_argument("--cards", nargs="+", choices=list(CARDS), default=list(CARDS))
    parser.add_argument("--check", action="store_true", help="write nothing")
    options = parser.parse_args()
    FOLDER.mkdir(exist_ok=True)
    other = []
    for size in options.cards:
        for family in options.models:
            file = FOLDER / f"{family}-{size}.yaml"
            try:
                made = text(family, size)
            except DoesNotFitError:
                made = ""
            if made != (file.read_text(encoding="utf-8") if file.exists() else ""):
                other.append(file.name)
                if not options.check:
                    file.write_text(made, encoding="utf-8") if made else file.unlink()
            print(
                f"{file.name}: {'as it was' if file.name not in other else 'written' if made else 'does not fit'}",
                flush=True,
            )
    return 1 if options.check and other else 0


if __name__ == "__main__":
    sys.exit(main())
