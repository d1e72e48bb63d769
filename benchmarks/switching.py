"""How fast adapters are switched on one base, and whether each answers as if it were alone.

    python benchmarks/switching.py [--model smollm2-135m-instruct] [--quantization nf4] [--switches 200] [--out FOLDER]
    python benchmarks/switching.py --tiny          # a random model of two layers; seconds

Three LoRA adapters with random values and different targets and ranks are saved, loaded beside each other and used in
turn. Prints milliseconds a switch, whether the logits are those of a fresh load of that adapter alone, and how far a
mixed batch is from each row answered alone. ``--out`` keeps switching.md and switching.json, with versions.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import qlora
from qlora.machine.device import versions
from qlora.methods.files import save_adapter
from qlora.methods.loading import load_adapter
from qlora.methods.switching import Adapters
from qlora.model.base import Base
from qlora.model.in_memory import as_base
from qlora.recipe import DEFAULT_MODEL, LoRA, ModelSection

SECTIONS = {
    "every linear, r 16": LoRA(r=16, alpha=32),
    "attention, r 8": LoRA(r=8, alpha=16, target_modules=("q_proj", "k_proj", "v_proj", "o_proj")),
    "q and v, r 4": LoRA(r=4, alpha=8, target_modules=("q_proj", "v_proj")),
}
MIXED = [*SECTIONS, None]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=DEFAULT_MODEL)
    parser.add_argument("--quantization", default="nf4", choices=("nf4", "fp4", "int8", "none"))
    parser.add_argument("--tiny", action="store_true", help="a random model of two layers instead of --model")
    parser.add_argument("--switches", type=int, default=200)
    parser.add_argument("--tokens", type=int, default=64, help="tokens in each row of the batch")
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()

    with tempfile.TemporaryDirectory() as scratch:
        found = measure(options, Path(scratch))
    text = table(found)
    print(text)
    if options.out is not None:
        options.out.mkdir(parents=True, exist_ok=True)
        (options.out / "switching.json").write_text(json.dumps(found, indent=2) + "\n", encoding="utf-8")
        (options.out / "switching.md").write_text(text, encoding="utf-8")


def measure(options: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """Every figure, by name."""
    base, base_seconds = timed(lambda: make_base(options))
    for number, (name, section) in enumerate(SECTIONS.items()):
        make_adapter(base, section, number, folder / name)
    adapters = Adapters(base)
    load_seconds = [timed(lambda name=name: adapters.load(name, folder / name))[1] for name in SECTIONS]
    rows = torch.randint(3, base.model.config.vocab_size, (len(MIXED), options.tokens), generator=seeded(9))
    rows = rows.to(base.device)

    turns = [list(SECTIONS)[number % len(SECTIONS)] for number in range(options.switches)]
    milliseconds = [1000 * timed(lambda name=name: adapters.use(name))[1] for name in turns]
    adapters.off()
    single = statistics.median(timed(lambda: logits_of(adapters, rows))[1] for _ in range(3))
    with adapters.mixed(MIXED):
        together, mixed = logits_of(adapters, rows), [timed(lambda: logits_of(adapters, rows))[1] for _ in range(3)]

    equal, effect = {}, {}
    apart = []
    for name, row in zip(MIXED, rows, strict=True):
        with adapters.using(name):
            apart.append(logits_of(adapters, row[None]))
        if name is not None:
            alone = load_adapter(make_base(options), folder / name)
            equal[name] = torch.equal(apart[-1], logits_of(alone, row[None]))
            effect[name] = difference(apart[-1], logits_of(adapters, row[None]))
    return {
        "model": "tiny" if options.tiny else options.model,
        "quantization": base.quantization,
        "compute_dtype": str(base.compute_dtype).removeprefix("torch."),
        "device": str(base.device),
        "threads": torch.get_num_threads(),
        "base_load_seconds": base_seconds,
        "adapter_load_seconds": load_seconds,
        "planted_modules": [len(adapters[name].planted) for name in SECTIONS],
        "switches": options.switches,
        "switch_milliseconds_median": statistics.median(milliseconds),
        "switch_milliseconds_largest": max(milliseconds),
        "equal_to_a_fresh_load": equal,
        "largest_relative_change_of_the_base": effect,
        "rows": len(MIXED),
        "tokens_a_row": options.tokens,
        "base_batch_seconds": single,
        "mixed_batch_seconds": statistics.median(mixed),
        "mixed_batch_largest_relative_difference": difference(together, torch.cat(apart)),
        "versions": versions(),
    }


def make_base(options: argparse.Namespace) -> Base:
    """The base, loaded anew; the tiny one has the same random weights every time."""
    if not options.tiny:
        return qlora.load_base(ModelSection(name=options.model, quantization=options.quantization))
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=256,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
    )
    return as_base(LlamaForCausalLM(config).eval(), "tiny")


def make_adapter(base: Base, section: LoRA, seed: int, folder: Path) -> None:
    """Save an adapter whose values are random, so that it changes every answer."""
    model = qlora.apply_method(base, section, seed)
    for values in model.trainable_parameters().values():
        values.data.copy_(torch.randn(values.shape, generator=seeded(seed)) * 0.02)
    save_adapter(model, folder)
    model.remove()


@torch.no_grad()
def logits_of(model: Any, rows: Tensor) -> Tensor:
    logits: Tensor = model.model(input_ids=rows, use_cache=False).logits.float()
    return logits


def difference(found: Tensor, expected: Tensor) -> float:
    """The largest difference, relative to the largest expected value."""
    return float((found - expected).abs().max() / expected.abs().max())


def timed(act: Any) -> tuple[Any, float]:
    """(what ``act`` gave, seconds)."""
    start = time.perf_counter()
    result = act()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return result, time.perf_counter() - start


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def table(found: dict[str, Any]) -> str:
    """The figures as Markdown."""
    equal = ", ".join(f"{name}: {'yes' if same else 'NO'}" for name, same in found["equal_to_a_fresh_load"].items())
    where = f"{found['model']}, {found['quantization']}, {found['compute_dtype']}, {found['device']}"
    lines = [
        f"# Switching adapters: {where}, {found['threads']} threads",
        "",
        "| what | figure |",
        "|---|---|",
        f"| base loaded, once | {found['base_load_seconds']:.2f} s |",
        f"| an adapter loaded beside it | {', '.join(f'{s:.2f} s' for s in found['adapter_load_seconds'])} |",
        f"| planted modules | {', '.join(map(str, found['planted_modules']))} |",
        f"| a switch, median of {found['switches']} | {found['switch_milliseconds_median']:.2f} ms |",
        f"| a switch, largest | {found['switch_milliseconds_largest']:.2f} ms |",
        f"| logits equal to a fresh load, bit for bit | {equal} |",
        "| logits against the base's, largest relative difference | "
        f"{', '.join(f'{change:.2g}' for change in found['largest_relative_change_of_the_base'].values())} |",
        f"| {found['rows']} rows of {found['tokens_a_row']} tokens, base alone | {found['base_batch_seconds']:.2f} s |",
        f"| the same rows mixed, three adapters and the base | {found['mixed_batch_seconds']:.2f} s |",
        "| mixed against each row alone, largest relative difference | "
        f"{found['mixed_batch_largest_relative_difference']:.1e} |",
        "",
        "Versions: " + ", ".join(f"{name} {version}" for name, version in found["versions"].items() if version) + ".",
        "",
    ]
    return "\n".join(lines)


if __name__ == "__main__":
    main()
