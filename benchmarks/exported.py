"""What was exported is what was trained: a run's logits in PEFT and in plain transformers, on 20 held-out prompts.

    python benchmarks/exported.py runs/quickstart

PEFT loads ``adapter/`` on a base that transformers quantised itself (strictly: every key must be consumed); transformers
loads ``merged/``, which is made first when it is missing. Both answer the same prompts as the run's own model.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from peft.utils.save_and_load import load_peft_weights, set_peft_model_state_dict
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

from qlora.data import load_data
from qlora.machine.device import DTYPES, resolve_device
from qlora.model.checkpoint import open_checkpoint
from qlora.model.hub import find_model
from qlora.runs.evaluate import load_run
from qlora.runs.export import merge
from qlora.runs.folder import adapter_folder, open_run


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path)
    parser.add_argument("--prompts", type=int, default=20)
    options = parser.parse_args()

    recipe, _ = open_run(options.run)
    data = load_data(recipe.data, open_checkpoint(recipe.model, weights=False).tokenizer, recipe.training.seed)
    device = resolve_device(recipe.device.name)
    prompts = [torch.tensor([prompt.ids], device=device) for prompt in data.held_out_prompts(options.prompts)]
    ours = logits(load_run(options.run, quiet=True).model, prompts)

    dtype = DTYPES[recipe.model.compute_dtype]
    base = AutoModelForCausalLM.from_pretrained(
        find_model(recipe.model.name, recipe.model.revision, trust_remote_code=recipe.model.trust_remote_code),
        dtype=dtype,
        quantization_config=BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type=recipe.model.quantization,
            bnb_4bit_use_double_quant=recipe.model.double_quant,
            bnb_4bit_compute_dtype=dtype,
        ),
    )
    adapter = adapter_folder(options.run)
    peft: Any = PeftModel.from_pretrained(base, adapter)
    left = set_peft_model_state_dict(peft, load_peft_weights(str(adapter)))
    assert not left.unexpected_keys, f"PEFT did not consume {left.unexpected_keys[:5]}"
    # In eval mode on a CPU with AVX512-BF16, bitsandbytes rounds to bf16 whatever dtype was asked for; not in train mode.
    peft.train()
    report("PEFT, adapter on its own NF4 base", ours, logits(peft, prompts))
    del peft, base

    merged = options.run / "merged"
    if not merged.is_dir():
        merge(options.run)
    report(
        "transformers, merged 16-bit model",
        ours,
        logits(AutoModelForCausalLM.from_pretrained(merged, dtype=dtype).to(device).eval(), prompts),
    )


@torch.no_grad()
def logits(model: Any, prompts: list[torch.Tensor]) -> list[torch.Tensor]:
    return [model(input_ids=ids, use_cache=False).logits[0].float().cpu() for ids in prompts]


def report(name: str, expected: list[torch.Tensor], found: list[torch.Tensor]) -> None:
    pairs = list(zip(expected, found, strict=True))
    largest = max((a - b).abs().max().item() for a, b in pairs)
    scale = max(a.abs().max().item() for a, _ in pairs)
    nats = [(a.softmax(-1) * (a.log_softmax(-1) - b.log_softmax(-1))).sum(-1) for a, b in pairs]
    print(
        f"{name}: largest logit difference {largest:.3g} (largest logit {scale:.3g}) on {len(pairs)} prompts, "
        f"{torch.cat(nats).mean().item():.2g} nats a token"
    )


if __name__ == "__main__":
    main()
