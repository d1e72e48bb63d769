"""The same results after the house was rebuilt: trains tiny recipes and records what came out, bit by bit.

    python benchmarks/equality.py record before.json          # in the checkout as it was
    python benchmarks/equality.py record after.json           # in the changed one
    python benchmarks/equality.py compare before.json after.json

A record holds every loss and gradient norm as printed by ``repr``, held-out losses and answers, a SHA-256 of each tensor of
the newest checkpoint (adapter, method state, optimizer), of the portable adapter and of the merged model, and the plan's
bytes by kind. One thread, so that sums have one order. Kept while rooms move; the laws of the tests stay.
"""

from __future__ import annotations

import hashlib
import json
import shutil
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import Gemma2Config, Gemma2ForCausalLM, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

import qlora

WORDS = [
    "what",
    "does",
    "copytree",
    "do",
    "it",
    "copies",
    "a",
    "whole",
    "folder",
    "hello",
    "there",
    "how",
    "are",
    "you",
    "today",
    "fine",
    "thank",
    "said",
    "the",
    "fox",
]
TEMPLATE = """{% for message in messages %}{{ '<|start|>' + message['role'] + '
' + message['content'] + '<|end|>
' }}{% endfor %}{% if add_generation_prompt %}{{ '<|start|>assistant
' }}{% endif %}"""


def write_model(folder: Path, family: str = "llama") -> Path:
    """A random model of 4 layers with a byte-level tokenizer."""
    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    special = ["<pad>", "<s>", "</s>", "<|start|>", "<|end|>"]
    core.train_from_iterator(
        [" ".join(WORDS)] * 4,
        trainers.BpeTrainer(
            vocab_size=330, special_tokens=special, initial_alphabet=pre_tokenizers.ByteLevel.alphabet()
        ),
    )
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=core, pad_token="<pad>", bos_token="<s>", eos_token="<|end|>", chat_template=TEMPLATE
    )
    sizes: dict[str, Any] = {
        "vocab_size": len(tokenizer), "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 4,
        "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16, "max_position_embeddings": 256,
        "initializer_range": 0.1, "bos_token_id": 1, "eos_token_id": 4, "pad_token_id": 0,
    }  # fmt: skip
    torch.manual_seed(0)
    config, made = {"llama": (LlamaConfig, LlamaForCausalLM), "gemma2": (Gemma2Config, Gemma2ForCausalLM)}[family]
    made(config(**sizes)).save_pretrained(folder, max_shard_size="200KB")
    tokenizer.save_pretrained(folder)
    return folder


def write_data(path: Path) -> Path:
    """Forty short conversations, no two alike."""
    lines = []
    for number in range(40):
        answer = " ".join(WORDS[(number * 3 + n) % len(WORDS)] for n in range(3 + number % 5))
        turns = [
            {"role": "user", "content": f"{WORDS[number % len(WORDS)]} {number}?"},
            {"role": "assistant", "content": answer},
        ]
        lines.append(json.dumps({"messages": turns}) + "\n")
    path.write_text("".join(lines), encoding="utf-8")
    return path


LORA = {"name": "lora", "r": 4, "alpha": 8, "dropout": 0.1}
CASES: dict[str, dict[str, Any]] = {
    "lora nf4 packed layer-major dropout": {"method": LORA},
    "lora none alone micro-batch-major": {
        "model.quantization": "none", "method": LORA, "data.packing": False,
        "training.accumulation": "micro_batch_major",
    },
    "lora int8 not recomputed": {"model.quantization": "int8", "method": LORA, "training.gradient_checkpointing": False},
    "lora fp4 plain scales 8-bit optimizer": {
        "model.quantization": "fp4", "model.double_quant": False, "method": {**LORA, "r": 32, "rslora": True},
        "training.optimizer": "adamw_8bit",
    },
    "lora streamed from disk": {"method": LORA, "memory.layers": "streamed", "memory.tier": "disk"},
    "lora streamed from host": {"method": LORA, "memory.layers": "streamed", "memory.tier": "host"},
    "lora half resident, slots": {"method": LORA, "memory.layers": 2, "memory.slots": 3, "memory.tier": "disk"},
    "lora tiled, inputs, head and embedding on the host": {
        "method": LORA, "memory.mlp_tile": 16, "memory.layer_inputs": "host", "memory.head": "host",
        "memory.embedding": "host",
    },
    "lora fp16": {"method": LORA, "model.compute_dtype": "fp16"},
    "lora bf16": {"method": LORA, "model.compute_dtype": "bf16"},
    "lora gemma2": {"model.name": "gemma2", "method": LORA},
    "lora resumed in the middle": {"method": LORA, "resume": True},
    "dora": {"method": {"name": "dora", "r": 4, "alpha": 8, "dropout": 0.1}},
    "dora streamed, resumed": {
        "method": {"name": "dora", "r": 4}, "memory.layers": "streamed", "memory.tier": "disk", "resume": True,
    },
    "adalora resumed": {"method": {"name": "adalora", "r": 2, "initial_r": 4}, "resume": True},
    "houlsby": {"method": {"name": "bottleneck", "size": 8, "dropout": 0.1}},
    "parallel streamed": {
        "method": {"name": "bottleneck", "form": "parallel", "size": 8}, "memory.layers": "streamed",
        "memory.tier": "disk",
    },
    "lin": {"method": {"name": "bottleneck", "form": "lin", "size": 8}},
    "pfeiffer": {"method": {"name": "bottleneck", "form": "pfeiffer", "size": 8}},
    "prompt tuning": {"method": {"name": "prompt_tuning", "tokens": 4}},
    "p-tuning": {"method": {"name": "p_tuning", "tokens": 4, "hidden_size": 16}},
    "prefix tuning": {"method": {"name": "prefix_tuning", "tokens": 4}},
    "ia3": {"method": {"name": "ia3"}},
    "bitfit": {"method": {"name": "bitfit", "new_biases": True}},
    "full": {"model.quantization": "none", "method": {"name": "full"}, "training.learning_rate": 1e-3},
    "modules": {"method": {"name": "modules", "modules": ["layers.3", "model.norm"]}, "training.learning_rate": 1e-3},
    "lora and new tokens": {"method": [LORA, {"name": "new_tokens", "tokens": ["zebra"], "special": False}]},
    "lora and prompt": {"method": [LORA, {"name": "prompt_tuning", "tokens": 4}]},
    "pissa": {"method": {**LORA, "init": "pissa"}},
    "loftq": {"method": {**LORA, "init": "loftq"}},
    "eva": {"method": {**LORA, "init": "eva"}},
    "patterns": {
        "method": {**LORA, "target_modules": ["q_proj", "down_proj"], "rank_pattern": {"q_proj": 8},
                   "alpha_pattern": {"down_proj": 2}, "learning_rate_ratio": 4},
    },
}  # fmt: skip
CARDS = {"4090": "LlamaForCausalLM 8B", "T4": "LlamaForCausalLM 8B"}


def recipe_of(case: dict[str, Any], home: Path, folder: Path) -> qlora.Recipe:
    values: dict[str, Any] = {
        "model": {"name": "llama"},
        "data": {"train": str(home / "chat.jsonl"), "held_out_fraction": 0.2, "max_length": 64},
        "training": {"steps": 6, "batch_size": 5, "micro_batch_size": 2, "learning_rate": 0.01, "save_every": 3,
                     "keep_checkpoints": 9},
        "memory": {"cache": str(home / "cache")},
        "evaluation": {"prompts": 1, "max_new_tokens": 6},
        "device": {"name": "cpu", "threads": 1},
        "folder": str(folder),
    }  # fmt: skip
    for key, value in case.items():
        if key == "resume":
            continue
        section, _, name = key.partition(".")
        if name:
            values[section][name] = value
        else:
            values[section] = value
    values["model"]["name"] = str(home / values["model"]["name"])
    return qlora.Recipe.from_dict(values)


def tensors(path: Path) -> dict[str, str]:
    """By name, the SHA-256 of each tensor of a safetensors file, or of all in a folder."""
    found = {}
    for file in sorted(path.rglob("*.safetensors")) if path.is_dir() else [path]:
        with safe_open(file, "pt") as opened:
            for name in opened.keys():  # noqa: SIM118
                tensor = opened.get_tensor(name).contiguous()
                bits = tensor.reshape(-1).view(torch.uint8).numpy().tobytes() if tensor.numel() else b""
                found[f"{file.name if file.name.startswith(('opt', 'meth')) else 'tensors'}/{name}"] = (
                    f"{tensor.dtype} {list(tensor.shape)} {hashlib.sha256(bits).hexdigest()[:16]}"
                )
    return found


def run(case: dict[str, Any], home: Path, folder: Path) -> dict[str, Any]:
    recipe = recipe_of(case, home, folder)
    qlora.train(recipe, quiet=True)
    if case.get("resume"):
        for name in ("adapter", "report.html", "checkpoints/000006"):
            place = folder / name
            shutil.rmtree(place) if place.is_dir() else place.unlink()
        qlora.resume(folder, quiet=True)
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    plan = json.loads((folder / "plan.json").read_text())
    evaluation = json.loads((folder / "evaluation.json").read_text())
    exported: dict[str, str] = {}
    try:
        merge = getattr(qlora, "merge", None) or qlora.export
        exported = tensors(Path(merge(folder, folder / "merged").folder))
    except qlora.QloraError as error:
        exported = {"refused": type(error).__name__}
    return {
        "metrics": [
            {k: repr(v) for k, v in line.items() if k not in ("seconds", "tokens_per_second", "peak_memory_bytes")}
            for line in lines
        ],
        "held out": {when: repr(values["loss"]) for when, values in evaluation["held_out"].items()},
        "answers": evaluation["generations"],
        "memory": plan["memory"],
        "disk": plan["disk"],
        "checkpoint": tensors(folder / "checkpoints" / "000006"),
        "adapter": tensors(folder / "adapter"),
        "merged": exported,
    }


def record(out: Path, only: str = "") -> None:
    torch.set_num_threads(1)
    found: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as place:
        home = Path(place)
        for family in ("llama", "gemma2"):
            write_model(home / family, family)
        write_data(home / "chat.jsonl")
        for number, (name, case) in enumerate(CASES.items()):
            if only and only not in name:
                continue
            begin = time.perf_counter()
            try:
                found[name] = run(case, home, home / f"run{number}")
            except qlora.QloraError as error:
                found[name] = {"error": str(error).replace(str(home), "")}
            print(f"{name}: {time.perf_counter() - begin:.1f} s {found[name].get('error', '')}", flush=True)
    out.write_text(json.dumps(found, indent=1), encoding="utf-8")


def compare(before: Path, after: Path) -> int:
    old, new = (json.loads(path.read_text(encoding="utf-8")) for path in (before, after))
    unequal = 0
    for name in old:
        if name not in new:
            print(f"{name}: not recorded")
            continue
        differences = list(_differences(old[name], new[name]))
        unequal += bool(differences)
        print(f"{name}: {'equal' if not differences else f'{len(differences)} differ: ' + '; '.join(differences[:6])}")
    print(f"{len(old) - unequal} of {len(old)} equal")
    return int(unequal > 0)


def _differences(old: Any, new: Any, path: str = "") -> Any:
    if isinstance(old, dict) and isinstance(new, dict):
        for key in sorted({*old, *new}):
            yield from _differences(old.get(key), new.get(key), f"{path}/{key}")
    elif isinstance(old, list) and isinstance(new, list) and len(old) == len(new):
        for number, (one, other) in enumerate(zip(old, new, strict=True)):
            yield from _differences(one, other, f"{path}/{number}")
    elif old != new:
        yield f"{path}: {old} → {new}"[:160]


if __name__ == "__main__":
    verb, *paths = sys.argv[1:]
    sys.exit(record(Path(paths[0]), *paths[1:]) if verb == "record" else compare(*map(Path, paths)))
