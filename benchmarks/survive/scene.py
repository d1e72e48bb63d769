"""What the faults share: a tiny model and its data, the recipe of a run, and what must come out of it.

    Scene(place)             model, data and recipes, made without the network
    broken(folder)           what looks whole in a run folder and is not
    difference(folder, of)   in what a finished run differs from one that nothing disturbed

Knows the run folder; must not know what a trainer does or how a process is hit. Nothing here is for a user.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import yaml

from qlora.files.durable import damage
from qlora.files.lock import LOCK
from qlora.files.strangers import Fault, read_object
from qlora.runs.folder import RUN_FILES

WORDS = [
    "what", "does", "copytree", "do", "it", "copies", "a", "whole", "folder", "hello", "there", "how", "are", "you",
    "today", "fine", "thank", "said", "the", "fox",
]  # fmt: skip
CHATML = """{% for message in messages %}{{ '<|start|>' + message['role'] + '
' + message['content'] + '<|end|>
' }}{% endfor %}{% if add_generation_prompt %}{{ '<|start|>assistant
' }}{% endif %}"""
CLOCKED = ("tokens_per_second", "seconds", "peak_memory_bytes")  # what two equal runs need not share


# --- what is trained -------------------------------------------------------------------------------------------------


def write_model(folder: Path) -> Path:
    """A random Llama of two layers with a tokenizer of bytes, saved as anyone would save it."""
    import torch
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    special = ["<pad>", "<s>", "</s>", "<|start|>", "<|end|>"]
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    core = Tokenizer(models.BPE(vocab={word: number for number, word in enumerate([*special, *alphabet])}, merges=[]))
    core.add_special_tokens(special)
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=core, pad_token="<pad>", bos_token="<s>", eos_token="<|end|>", chat_template=CHATML
    )
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=256,
        initializer_range=0.2,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def write_data(path: Path, count: int = 24) -> Path:
    """Short questions and answers, no two alike."""
    with path.open("w", encoding="utf-8") as file:
        for number in range(count):
            answer = " ".join(WORDS[(number * 3 + n) % 20] for n in range(3))
            messages = [
                {"role": "user", "content": f"{WORDS[number % 20]} {number}?"},
                {"role": "assistant", "content": answer},
            ]
            file.write(json.dumps({"messages": messages}) + "\n")
    return path


class Scene:
    """A folder with the tiny model and its data, where recipes are written and runs are made."""

    def __init__(self, place: Path) -> None:
        self.place = place
        place.mkdir(parents=True, exist_ok=True)
        self.model, self.data = place / "model", place / "chat.jsonl"
        if not self.data.is_file():
            write_model(self.model)
            write_data(self.data)

    def values(self, folder: Path, cache: Path | None = None, **sections: dict[str, Any]) -> dict[str, Any]:
        """A recipe of six steps: evaluations after 3 and at the end, checkpoints after 2, 4 and 6, two of them kept.

        ``cache``: every layer is streamed from a file cache there.
        """
        values: dict[str, Any] = {
            "model": {"name": str(self.model)},
            "method": {"r": 4, "alpha": 8, "dropout": 0.1},
            "data": {"train": str(self.data), "held_out_fraction": 0.2, "max_length": 64, "packing": False},
            "training": {
                "steps": 6,
                "batch_size": 4,
                "micro_batch_size": 2,
                "learning_rate": 0.02,
                "save_every": 2,
                "keep_checkpoints": 2,
            },
            "evaluation": {"every": 3, "held_out_rows": 4, "prompts": 1, "max_new_tokens": 4},
            "device": {"name": "cpu", "threads": 1},
            "memory": {"rehearse": False},
            "folder": str(folder),
        }
        if cache is not None:
            values["memory"] |= {"layers": "streamed", "tier": "disk", "cache": str(cache)}
        for name, section in sections.items():
            values[name] = {**values.get(name, {}), **section}
        return values

    def recipe(self, path: Path, folder: Path, cache: Path | None = None, **sections: dict[str, Any]) -> Path:
        """A recipe file at ``path`` for a run in ``folder``."""
        path.parent.mkdir(parents=True, exist_ok=True)
        text = yaml.safe_dump(self.values(folder, cache, **sections), allow_unicode=True)
        path.write_text(text, encoding="utf-8")
        return path


# --- what must come out ----------------------------------------------------------------------------------------------


def broken(folder: Path) -> str | None:
    """What in a run folder has a name that is used and is not what was written, in a few words, or None."""
    for place in (folder / "checkpoints").glob("[0-9]*"):
        if why := damage(place):
            return f"{place.name}: {why}"
    adapter = folder / "adapter"
    if adapter.is_dir() and (why := damage(adapter)):
        return f"adapter: {why}"
    for name in ("environment.json", "plan.json", "evaluation.json", "method.json"):
        try:
            read_object(folder / name)
        except Fault:
            return f"{name} is torn"
    report = folder / "report.html"
    if report.is_file() and not report.read_text(encoding="utf-8").rstrip().endswith("</html>"):
        return "report.html is torn"
    return None


def difference(folder: Path, expected: Path, beside: Sequence[str] = ()) -> str | None:
    """In what a finished run differs from ``expected``, in a few words, or None. Clocks and memory may differ.

    ``beside``: names that may lie in the folder too.
    """
    if why := broken(folder):
        return why
    if strange := {path.name for path in folder.iterdir()} - {*RUN_FILES, LOCK, *beside}:
        return f"left over: {sorted(strange)}"
    ours, theirs = (sorted(place.name for place in (run / "checkpoints").iterdir()) for run in (folder, expected))
    if any(not name.isdecimal() for name in ours) or ours[-1] != theirs[-1]:
        return f"checkpoints {ours} instead of {theirs}"
    for part in ("adapter", f"checkpoints/{theirs[-1]}"):
        names = {path.name for path in (folder / part).iterdir()}
        if names != {path.name for path in (expected / part).iterdir()}:
            return f"{part} holds {sorted(names)}"
        for name in sorted(names):
            if (folder / part / name).read_bytes() != (expected / part / name).read_bytes():
                return f"{part}/{name} has other bytes"
    if metrics(folder) != metrics(expected):
        return "metrics.jsonl tells other numbers"
    if (folder / "evaluation.json").read_bytes() != (expected / "evaluation.json").read_bytes():
        return "evaluation.json tells other numbers"
    return None


def metrics(folder: Path) -> list[dict[str, Any]]:
    """The lines of ``metrics.jsonl`` without what the clock and the machine decide."""
    lines = (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    return [{key: value for key, value in json.loads(line).items() if key not in CLOCKED} for line in lines]


def one_sentence(errors: str) -> str | None:
    """What is wrong with how an error was said, or None: one line that begins with ``qlora:``, and no traceback."""
    said = [line for line in errors.splitlines() if line.startswith("qlora: ")]
    if "Traceback" in errors or "defect" in errors:
        return f"a traceback: {errors.strip().splitlines()[-1][:200]}"
    return None if len(said) == 1 else f"{len(said)} sentences: {errors[-200:]!r}"


def row(fault: str, lost: Iterable[str | None]) -> dict[str, Any]:
    """A line of the table from what each trial lost, None for one that survived."""
    every = list(lost)
    bad = [why for why in every if why is not None]
    return {"fault": fault, "trials": len(every), "survived": len(every) - len(bad), "lost": "; ".join(bad[:3])}
