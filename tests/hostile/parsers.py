"""What reads strangers' bytes, each with whole files to begin from and with a way of putting new bytes in their place.

    Parser: seeds ► [fuzz changes them] ► read(folder, bytes): written over the one file, then read as a run reads it

Knows qlora's readers and their files; must not know who makes the bytes, or what is counted. ``read`` may raise a
``QloraError``, which is a sentence, and nothing else.
"""

from __future__ import annotations

import gzip
import hashlib
import json
import struct
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch

from qlora.data.parsing import parse
from qlora.data.sources import read_records
from qlora.errors import QloraError
from qlora.files.durable import SEAL, damage, seal
from qlora.methods.files import (
    CONFIG,
    METHOD_STATE,
    WEIGHTS,
    read_about_base,
    read_adapter_tensors,
    read_method_state,
    recorded_base,
)
from qlora.methods.peft_config import read_adapter_config
from qlora.model.checkpoint import INDEX, Checkpoint, open_checkpoint
from qlora.model.skeleton import skeleton_base
from qlora.model.tokenizer import load_tokenizer
from qlora.recipe import ModelSection, Recipe
from qlora.training import checkpoint
from qlora.training.way import Way

MIB = 1024**2
LONGEST = 4000  # characters of a message


@dataclass(frozen=True)
class Parser:
    """One reader. ``memory_mib`` bounds what a process may grow by over all inputs of at most a few KiB each."""

    name: str
    seeds: tuple[bytes, ...]
    read: Callable[[Path, bytes], object]
    prepare: Callable[[Path], object] = lambda folder: None
    memory_mib: int = 256
    share: float = 1.0
    """Inputs for each one of a quick parser: some libraries behind a reader take a hundred times longer."""
    longest: int = 8192
    """Bytes of an input that atheris makes. It likes long ones, and PyYAML with its counters reads 10,000 a second."""


def tensors_bytes(header: object, size: int | None = None) -> bytes:
    """A safetensors file: ``header`` (JSON, or its bytes) behind its length, and ``size`` bytes of zeros: as many as its
    offsets ask for, up to 4 KiB, when left out."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    if size is None:
        size = 0
        try:
            for fields in json.loads(text).values():
                size = max([size, *(end for end in fields.get("data_offsets", []) if type(end) is int)])
        except (ValueError, TypeError, AttributeError, RecursionError):
            pass
    return struct.pack("<Q", len(text)) + text + bytes(min(max(size, 0), 4096))


def tensor(start: int, *shape: int, dtype: str = "F32") -> dict[str, Any]:
    """A header's fields of a tensor of four-byte numbers."""
    count = 1
    for size in shape:
        count *= size
    return {"dtype": dtype, "shape": list(shape), "data_offsets": [start, start + 4 * count]}


HEADER = {"__metadata__": {"format": "pt"}, "a.weight": tensor(0, 2, 3), "b": tensor(24), "c": tensor(28, 0, 4)}
LLAMA = {
    "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": 16, "intermediate_size": 32,
    "num_hidden_layers": 1, "num_attention_heads": 2, "num_key_value_heads": 1, "vocab_size": 32, "rms_norm_eps": 1e-6,
    "max_position_embeddings": 64, "tie_word_embeddings": True, "torch_dtype": "bfloat16", "eos_token_id": [1, 2],
    "rope_scaling": {"rope_type": "linear", "factor": 2.0}, "hidden_act": "silu",
}  # fmt: skip
QWEN = {
    **LLAMA,
    "model_type": "qwen2",
    "architectures": ["Qwen2ForCausalLM"],
    "use_sliding_window": False,
    "sliding_window": None,
}
GPT2 = {"model_type": "gpt2", "n_layer": 1, "n_head": 2, "n_embd": 16, "n_positions": 32, "vocab_size": 32}
LORA = {
    "peft_type": "LORA", "task_type": "CAUSAL_LM", "r": 4, "lora_alpha": 8, "lora_dropout": 0.1, "bias": "none",
    "target_modules": ["q_proj", "v_proj"], "rank_pattern": {"q_proj": 2}, "alpha_pattern": {}, "use_rslora": False,
    "modules_to_save": None, "base_model_name_or_path": "org/name", "init_lora_weights": True,
}  # fmt: skip
ADAPTERS = (
    LORA,
    {**LORA, "use_dora": True, "trainable_token_indices": [2, 3], "modules_to_save": ["lm_head"]},
    {**LORA, "peft_type": "ADALORA", "init_r": 12, "target_r": 8, "total_step": 100, "tinit": 10, "tfinal": 30, "rank_pattern": {"q_proj": [True, False]}},
    {"peft_type": "IA3", "target_modules": ["k_proj", "down_proj"], "feedforward_modules": ["down_proj"]},
    {"peft_type": "PREFIX_TUNING", "num_virtual_tokens": 4, "prefix_projection": False, "encoder_hidden_size": 8},
    {"peft_type": "PROMPT_TUNING", "num_virtual_tokens": 4, "prompt_tuning_init": "RANDOM"},
    {"peft_type": "P_TUNING", "num_virtual_tokens": 4, "encoder_hidden_size": 8, "encoder_reparameterization_type": "MLP"},
    {"peft_type": "TRAINABLE_TOKENS", "token_indices": [2], "target_modules": ["embed_tokens"]},
    {"peft_type": "QLORA", "qlora_method": {"name": "bitfit", "target_modules": ["q_proj"]}},
    {"peft_type": "QLORA", "qlora_method": {"name": "combined", "parts": [{"name": "lora"}, {"name": "bottleneck"}]}},
)  # fmt: skip
RECIPES = (
    b"model: {name: smollm2-135m-instruct}\nmethod: {name: lora, r: 8, alpha: 16}\ndata:\n  train: a.jsonl\n",
    b"data:\n  train: [a.jsonl, b.csv]\n  columns: {prompt: question}\ntraining:\n  learning_rate: 2e-4\n  betas: [0.9, 0.99]\n",
    b"method:\n- {name: bottleneck, size: 4}\n- {name: bottleneck, form: lin}\n- {name: modules, modules: [lm_head]}\ndata: {train: !!str 5}\n",
    b"method: {name: new_tokens, tokens: ['<|a|>', \"\\u00e9\"], ids: [1, 2]}\ndata: {train: a.txt, limit: 0x10}\nmodel: {revision: 2024-01-01}\n",
)
OVERRIDES = (
    b"training.epochs=2", b"data.train=[a, b]", b"method.0.r=4", b"method.0.target_modules=[q_proj]", b"device.memory=24GiB",
    b"memory.budget=6.5 GiB", b"model.revision=main", b"training.betas=[0.9, 0.99]", b"data.columns={prompt: q}",
)  # fmt: skip
RECORDS = (
    {"messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}], "tools": []},
    {"conversations": [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Hello"}], "system": "s"},
    {"instruction": "do", "input": "", "output": "done"},
    {"prompt": "a", "completion": "b"},
    {"text": "words"},
    {"messages": [{"role": "user", "content": [{"type": "text", "text": "Hi"}]}, {"role": "assistant", "content": "",
     "tool_calls": [{"function": {"name": "f", "arguments": "{}"}}]}]},
)  # fmt: skip
TOKENIZER = {
    "version": "1.0", "added_tokens": [{"id": 0, "content": "<s>", "special": True, "single_word": False, "lstrip": False,
    "rstrip": False, "normalized": False}], "normalizer": {"type": "NFC"}, "pre_tokenizer": {"type": "ByteLevel",
    "add_prefix_space": False, "trim_offsets": True, "use_regex": True}, "post_processor": {"type": "TemplateProcessing",
    "single": [{"SpecialToken": {"id": "<s>", "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}], "pair": [],
    "special_tokens": {"<s>": {"id": "<s>", "ids": [0], "tokens": ["<s>"]}}}, "decoder": {"type": "ByteLevel",
    "add_prefix_space": True, "trim_offsets": True, "use_regex": True},
    "model": {"type": "BPE", "vocab": {"<s>": 0, "a": 1, "b": 2, "ab": 3}, "merges": [["a", "b"]]},
}  # fmt: skip


def _json(*values: object) -> tuple[bytes, ...]:
    return tuple(json.dumps(value).encode() for value in values)


def _write(path: Path, values: object) -> None:
    path.write_text(json.dumps(values))


def _model(folder: Path) -> None:
    _write(folder / "config.json", LLAMA)
    (folder / "model.safetensors").write_bytes(tensors_bytes(HEADER))


def _header(folder: Path, content: bytes) -> None:
    # half of the inputs are a header, which gets the length and the data that it asks for, the others a whole file
    whole = content[1:] if content[:1] > b"\x7f" else tensors_bytes(content[1:])
    (folder / "model.safetensors").write_bytes(whole)
    found = open_checkpoint(folder)
    for name, entry in found.entries.items():
        if entry.bytes <= 4096:
            found.read(name)
    if not found.entries:
        Checkpoint(folder, "").fingerprint  # noqa: B018


def _sharded(folder: Path) -> None:
    (folder / "config.json").write_text("{}")
    (folder / "a.safetensors").write_bytes(tensors_bytes({"a": tensor(0, 2)}))
    (folder / "b.safetensors").write_bytes(tensors_bytes({"b": tensor(0, 2)}))


def _index(folder: Path, content: bytes) -> None:
    (folder / INDEX).write_bytes(content)
    found = open_checkpoint(folder)
    if any(shard.resolve().parent != folder.resolve() for shard in found.shards):
        raise AssertionError(f"a file outside of the folder was opened: {found.shards}")


def _config(folder: Path, content: bytes) -> None:
    (folder / "config.json").write_bytes(content)
    section = ModelSection(name=str(folder))
    if (
        getattr(open_checkpoint(section, weights=False).model_config(), "num_hidden_layers", 0) <= 50
    ):  # more take longer to build, a thousand seconds
        skeleton_base(section, torch.device("meta"), torch.float32)


def _tokenizer(folder: Path, content: bytes) -> None:
    (folder / "tokenizer.json").write_bytes(content)
    load_tokenizer(folder)


def _adapter_config(folder: Path, content: bytes) -> None:
    (folder / CONFIG).write_bytes(content)
    read_about_base(folder)
    read_adapter_config(folder)


def _adapter_weights(folder: Path, content: bytes) -> None:
    whole = content[1:] if content[:1] > b"\x7f" else tensors_bytes(content[1:])
    name, read = (METHOD_STATE, read_method_state) if content[:1] == b"\x01" else (WEIGHTS, read_adapter_tensors)
    (folder / name).write_bytes(whole)
    read(folder)
    if name == WEIGHTS:
        recorded_base(folder)


def _recipe(folder: Path, content: bytes) -> None:
    (folder / "recipe.yaml").write_bytes(content)
    Recipe.from_yaml(folder / "recipe.yaml").to_yaml()


def _override(folder: Path, content: bytes) -> None:
    values = {"data": {"train": "a.jsonl"}, "method": [{"name": "lora"}, {"name": "modules", "modules": ["lm_head"]}]}
    Recipe.from_dict(values, *content.decode("utf-8", "surrogateescape").split("\n")[:4])


def _checkpoint(folder: Path) -> None:
    for name in (WEIGHTS, METHOD_STATE, checkpoint.OPTIMIZER):
        (folder / name).write_bytes(tensors_bytes({"a": tensor(0, 2)}))
    (folder / checkpoint.STATE).write_text('{"step": 1}')
    seal(folder)


def _seal(folder: Path, content: bytes) -> None:
    (folder / SEAL).write_bytes(content)
    found = damage(folder)
    if found is not None and len(found) > 1000:
        raise AssertionError(f"a complaint of {len(found):,} characters")


def _state(folder: Path, content: bytes) -> None:
    (folder / checkpoint.STATE).write_bytes(content)
    seal(folder)
    # a trainer of another run: what comes after the reading is refused
    other = SimpleNamespace(total_steps=object(), training=SimpleNamespace(optimizer="adamw"), way=Way(1, True, 256))
    checkpoint.load(other, folder)  # type: ignore[arg-type]


def _data(suffix: str) -> Callable[[Path, bytes], object]:
    def read(folder: Path, content: bytes) -> object:
        path = folder / f"data{suffix}"
        path.write_bytes(content)
        return parse(read_records(str(path)))

    return read


SEALED = {"state.json": {"bytes": 11, "sha256": hashlib.sha256(b'{"step": 1}').hexdigest()}}
STATE = {
    "step": 3, "total_steps": 10, "loss_scale": 1.0, "optimizer": "adamw", "skipped": 0,
    "smaller": {"micro_batch_size": 1, "accumulation": "layer_major", "loss_chunk": 128},
}  # fmt: skip
_HEADERS = (*(b"\x00" + text for text in _json(HEADER, {})), b"\xff" + tensors_bytes(HEADER))

PARSERS = (
    Parser("safetensors header", _HEADERS, _header, _model),
    Parser("index file", _json({"metadata": {}, "weight_map": {"a": "a.safetensors", "b": "b.safetensors"}}), _index, _sharded),
    Parser("config.json", _json(LLAMA, QWEN, GPT2), _config, share=0.1),
    Parser("tokenizer.json", _json(TOKENIZER), _tokenizer, share=0.05),
    Parser("adapter config", _json(*ADAPTERS), _adapter_config, lambda folder: _write(folder / "tokenizer.json", TOKENIZER)),
    Parser("adapter weights", (*_HEADERS, b"\x01" + _json(HEADER)[0]), _adapter_weights),
    Parser("recipe", RECIPES, _recipe, share=0.3, longest=1024),
    Parser("override", OVERRIDES, _override, longest=512),
    Parser("checksums.json", _json(SEALED), _seal, _checkpoint),
    Parser("state.json", _json(STATE), _state, _checkpoint),
    Parser("data .jsonl", ("\n".join(map(json.dumps, RECORDS)).encode(), *_json(*RECORDS)), _data(".jsonl")),
    Parser("data .json", _json(RECORDS[:1], {"data": RECORDS[3:4]}), _data(".json")),
    Parser("data .csv", (b"prompt,completion\na,b\n", b'text\n"a ""b"", c"\n'), _data(".csv")),
    Parser("data .tsv", (b"prompt\tcompletion\na\tb\n",), _data(".tsv")),
    Parser("data .jsonl.gz", (gzip.compress(json.dumps(RECORDS[0]).encode(), mtime=0),), _data(".jsonl.gz")),
    Parser("data .txt", (b"words", "\ufeffwör\u2028ds".encode()), _data(".txt")),
)  # fmt: skip

__all__ = ["PARSERS", "Parser", "QloraError", "tensor", "tensors_bytes"]
