"""What was exported is what was trained: a run in each form it is shipped in, on its held-out answers, and in PEFT.

    python benchmarks/exported.py runs/quickstart                         logits in PEFT and in plain transformers
    python benchmarks/exported.py runs/quickstart --written               every export written, reopened and measured
    python benchmarks/exported.py --data DATA --out runs/exported         three fine-tunes, and every form of each

PEFT loads ``adapter/`` on a base that transformers quantised itself (strictly: every key must be consumed); transformers
loads ``merged/``, which is made first when it is missing. Both answer the same prompts as the run's own model.

``--written``: each export by the command line, in a process of its own: size, seconds, peak memory; what was written is measured a layer
at a time on 32 held-out answers, and opened by the programs that are here (llama.cpp where QLORA_LLAMA_CPP names it), of which the
divergence on 20 held-out examples is told.

The fine-tunes are the quickstart's recipe on other data: instructions, raw text and tool calls, each the file under DATA that
``DATA`` names. What is trained or measured already is not done again.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch
import yaml
from peft import PeftModel
from peft.utils.save_and_load import load_peft_weights, set_peft_model_state_dict
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

from qlora.data.load import load_data
from qlora.errors import DiffersError, QloraError
from qlora.export.verify import GgufFile
from qlora.machine.device import DTYPES, resolve_device
from qlora.model.checkpoint import open_checkpoint
from qlora.model.hub import find_model
from qlora.runs.evaluate import load_run
from qlora.runs.export import check, in_llama_cpp, in_transformers, merge
from qlora.runs.folder import open_run
from qlora.runs.measured import HOW, WHY, measured, merged_into, subject, table
from qlora.training.checkpoint import adapter_folder

TABLE = "exported.md"
DATA = {  # the file, tokens and number of a step's rows
    "instructions": ("alpaca_en_demo/train.jsonl", 256, 4),
    "raw text": ("tinyshakespeare/train.jsonl", 256, 4),
    "tool calls": ("toolcall_sharegpt/train.jsonl", 512, 2),
}
RECIPE: dict[str, Any] = {
    "model": {"name": "smollm2-135m-instruct", "quantization": "nf4"},
    "method": {"name": "lora", "r": 16, "alpha": 32},
    "training": {
        "steps": 40, "learning_rate": 3e-3, "schedule": "cosine", "warmup_fraction": 0.05, "save_every": 10,
    },
    "device": {"threads": 1},
    "evaluation": {"prompts": 1, "max_new_tokens": 16, "held_out_rows": 24},
}  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path, nargs="?")
    parser.add_argument("--prompts", type=int, default=20)
    parser.add_argument("--written", action="store_true")
    parser.add_argument("--data", type=Path)
    parser.add_argument("--out", type=Path, default=Path("runs/exported"))
    options = parser.parse_args()
    if options.data is not None:
        for name in DATA:
            run = train(name, options.data, options.out)
            if not (run / TABLE).is_file():
                (run / TABLE).write_text(in_every_form(run), encoding="utf-8")
            print(
                f"\n**{name}** ({Path(DATA[name][0]).parent})\n\n{(run / TABLE).read_text(encoding='utf-8')}",
                flush=True,
            )
    elif options.written:
        written(options.run)
    else:
        in_peft(options.run, options.prompts)


WRITTEN = {
    "merged": ["merged", "base=dequantized"],
    "merged-original": ["merged", "base=original"],
    "nf4": ["nf4"],
    "portable": ["adapter"],
    **{f"gguf-{kind}": ["gguf", "base=dequantized", f"type={kind}"] for kind in ("f16", "q8_0")},
    "gguf-q4_0": ["gguf", "base=original", "type=q4_0"],
    "gguf-adapter": ["gguf-adapter"],
}


WATCHED = """
import sys
from qlora.cli import main
status = main(sys.argv[1:])
print(open("/proc/self/status").read().split("VmHWM:")[1].split()[0], file=sys.stderr)
sys.exit(status)
"""
"""The command line, and its peak in KiB behind all that it said; what wait() tells of a child begins with its parent's."""


def written(run: Path) -> None:
    """Print a line for each export of ``run``, as it is made."""
    print("| export | MB | seconds | peak MiB | loss | more than trained | KL | top-1 | opened by |")
    print("|---|--:|--:|--:|--:|--:|--:|--:|---|")
    for name, words in WRITTEN.items():
        place = run / name
        command = [sys.executable, "-c", WATCHED, "export", str(run), *words, f"out={place}", "overwrite=true"]
        begun = time.perf_counter()
        done = subprocess.run(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, check=False)
        seconds = time.perf_counter() - begun
        *said, peak = done.stderr.strip().splitlines()
        if done.returncode not in (0, DiffersError.exit_status):
            print(f"| {name} | | {seconds:.0f} | | exit {done.returncode}: {said[-1]} |")
            continue
        size = sum(path.stat().st_size for path in place.iterdir() if path.is_file()) / 1e6
        print(
            f"| {name} | {size:.1f} | {seconds:.0f} | {int(peak) / 1024:,.0f} | {answers(run, place)} | {opened(run, place)} |",
            flush=True,
        )


def answers(run: Path, place: Path) -> str:
    """What was written, measured; of an adapter that its tensors are the run's."""
    try:
        found = check(run, place)
    except DiffersError as error:
        return f"exit 4: {error} | | | "
    if not found.forms:
        return f"its {found.tensors} tensors are the run's | | | "
    of, (more, error) = found.forms[-1].found, found.forms[-1].found.difference
    return f"{of.loss:.4f} | {more:+.4f} ± {error:.4f} | {of.divergence:.2g} | {of.same_choice:.1%}"


def opened(run: Path, place: Path) -> str:
    """The programs that opened it, each with its divergence from the trained model in nats a token."""
    files = sorted(place.glob("model-*.gguf"))
    try:
        if files:
            return f"llama.cpp ({in_llama_cpp(run, GgufFile(files[0])).divergence:.2g})"
        if (place / "config.json").is_file():
            found = in_transformers(run, place)
            return f"transformers ({found.divergence:.2g})" if found else "too large to be opened whole"
    except QloraError as error:
        return str(error)
    return ""


def train(name: str, data: Path, out: Path) -> Path:
    """The run of that fine-tune, trained or gone on with where it is not finished."""
    run = (out / name.replace(" ", "-")).absolute()
    if not (run / "report.html").is_file():  # which is written last
        file, length, rows = DATA[name]
        recipe = RECIPE | {
            "data": {"train": str(data.absolute() / file), "held_out_fraction": 0.15, "max_length": length},
            "training": RECIPE["training"] | {"batch_size": rows, "micro_batch_size": rows},
            "folder": str(run),
        }
        described = run.with_suffix(".yaml")
        described.parent.mkdir(parents=True, exist_ok=True)
        described.write_text(yaml.safe_dump(recipe, sort_keys=False), encoding="utf-8")
        again = ["resume", str(run)] if (run / "checkpoints").is_dir() else ["train", str(described), "overwrite=true"]
        subprocess.run([sys.executable, "-m", "qlora.cli", *again], check=True)
    return run


def in_every_form(run: Path) -> str:
    """The table of a run merged into either base, in 16 bits, in NF4 and in GGUF types; how far it is from what is asked."""
    found = subject(run)
    kinds = (None, "nf4", "q8_0", "q4_0")
    forms = measured(
        found.model,
        found.source,
        {f"{base}, {HOW.get(kind, kind)}": merged_into(found.source, base, kind) for base in WHY for kind in kinds},
        found.held_out,
    )
    by_name = {form.name: form.found for form in forms}
    ours, again = by_name[f"original, {HOW['nf4']}"], by_name[f"dequantized, {HOW['nf4']}"]
    return (
        f"{table(forms)}\n\n`export nf4` (original, {HOW['nf4']}) has {ours.loss - by_name['trained'].loss:+.4f} nats a token of loss "
        f"(asked: at most +0.1) and {ours.divergence / again.divergence:.1%} of the naive reload's divergence (asked: at most 10 %), "
        f"on {ours.tokens} tokens of {len(ours.differences)} rows.\n"
    )


def in_peft(run: Path, count: int) -> None:
    """Logits of the run's adapter in PEFT and of its merged model in transformers against its own."""
    recipe, _ = open_run(run)
    data = load_data(recipe.data, open_checkpoint(recipe.model, weights=False).tokenizer, recipe.training.seed)
    device = resolve_device(recipe.device.name)
    prompts = [torch.tensor([prompt.ids], device=device) for prompt in data.held_out_prompts(count)]
    ours = logits(load_run(run, quiet=True).model, prompts)

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
    adapter = adapter_folder(run)
    peft: Any = PeftModel.from_pretrained(base, adapter)
    left = set_peft_model_state_dict(peft, load_peft_weights(str(adapter)))
    assert not left.unexpected_keys, f"PEFT did not consume {left.unexpected_keys[:5]}"
    # In eval mode on a CPU with AVX512-BF16, bitsandbytes rounds to bf16 whatever dtype was asked for; not in train mode.
    peft.train()
    report("PEFT, adapter on its own NF4 base", ours, logits(peft, prompts))
    del peft, base

    merged = run / "merged"
    if not merged.is_dir():
        merge(run)
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
