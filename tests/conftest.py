"""What tests of the whole house share: a tiny random model with a chat template on disk, and a data file for it."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from transformers import LlamaConfig, LlamaForCausalLM

from qlora.data.rendering import one_child
from tests.data.conftest import make_tokenizer

WORDS = [
    "what", "does", "copytree", "do", "it", "copies", "a", "whole", "folder", "hello", "there", "how", "are", "you",
    "today", "fine", "thank", "said", "the", "fox",
]  # fmt: skip


@pytest.fixture(scope="session", autouse=True)
def one_renderer() -> Iterator[None]:
    """One process for all templates of the session: a beginning costs half a second."""
    with one_child():
        yield


def write_model(folder: Path, **sizes: Any) -> Path:
    """A random Llama, saved as anyone would save it, with a byte-level tokenizer and a chat template."""
    tokenizer = make_tokenizer()
    torch.manual_seed(0)
    values: dict[str, Any] = {
        "vocab_size": len(tokenizer),
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 256,
        "initializer_range": 0.2,  # the usual 0.02 leaves a model this small with nothing to say
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    }
    LlamaForCausalLM(LlamaConfig(**{**values, **sizes})).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def conversations(count: int = 40) -> list[dict[str, Any]]:
    """Short questions and answers of some twenty tokens, no two alike."""
    return [
        {
            "messages": [
                {"role": "user", "content": f"{WORDS[number % 20]} {number}?"},
                {"role": "assistant", "content": " ".join(WORDS[(number * 3 + n) % 20] for n in range(4))},
            ]
        }
        for number in range(count)
    ]


def write_lines(path: Path, records: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")
    return path


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of the tiny model. Copy it before damaging it."""
    return write_model(tmp_path_factory.mktemp("tiny") / "model")


@pytest.fixture(scope="session")
def chat_data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A JSON-lines file of forty conversations."""
    return write_lines(tmp_path_factory.mktemp("data") / "chat.jsonl", conversations())


def tiny_values(model: Path, data: Path, folder: Path) -> dict[str, Any]:
    """A recipe of ten steps on the tiny model: two epochs, evaluations at 4 and 8, checkpoints at 3, 6, 9 and 10."""
    return {
        "model": {"name": str(model)},
        "method": {"r": 4, "alpha": 8, "dropout": 0.1},
        "data": {"train": str(data), "held_out_fraction": 0.2, "max_length": 64, "packing": False},
        "training": {
            "steps": 10,
            "batch_size": 5,
            "micro_batch_size": 2,
            "learning_rate": 0.02,
            "save_every": 3,
            "keep_checkpoints": 2,
        },
        "evaluation": {"every": 4, "prompts": 2, "max_new_tokens": 6},
        "device": {"name": "cpu", "threads": 1},
        "folder": str(folder),
    }


@pytest.fixture
def recipe_file(tiny_model: Path, chat_data: Path, tmp_path: Path) -> Path:
    """A recipe for the tiny model, whose run folder is ``tmp_path / "run"``."""
    path = tmp_path / "tiny.yaml"
    path.write_text(yaml.safe_dump(tiny_values(tiny_model, chat_data, tmp_path / "run")), encoding="utf-8")
    return path
