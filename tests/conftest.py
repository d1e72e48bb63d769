"""Fixtures of the whole house: the tiny chat model on disk, a data file and a recipe for it."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import yaml

if not torch.cuda.is_available():  # before Triton is imported: its interpreter runs the kernels here
    os.environ.setdefault("TRITON_INTERPRET", "1")

from qlora.data.rendering import one_child
from tests.tiny import chat_checkpoint, conversations, tiny_values, write_lines


@pytest.fixture(scope="session", autouse=True)
def one_renderer() -> Iterator[None]:
    """One process for all templates of the session: a beginning costs half a second."""
    with one_child():
        yield


@pytest.fixture(autouse=True)
def any_processor(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tests find the same on all processors: ``auto`` means fp32, and test_rates.py looks at what it means on this one."""
    monkeypatch.setattr("qlora.planning.plan.faster_in_bf16", lambda: False)
    monkeypatch.setattr("qlora.runs.train.matrix_rate", lambda device, dtype: 1e11)


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of the tiny model. Copy it before damaging it."""
    return chat_checkpoint(tmp_path_factory.mktemp("tiny") / "model")


@pytest.fixture(scope="session")
def chat_data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A JSON-lines file of forty conversations."""
    return write_lines(tmp_path_factory.mktemp("data") / "chat.jsonl", conversations())


@pytest.fixture
def recipe_file(tiny_model: Path, chat_data: Path, tmp_path: Path) -> Path:
    """A recipe for the tiny model, whose run folder is ``tmp_path / "run"``."""
    path = tmp_path / "tiny.yaml"
    path.write_text(yaml.safe_dump(tiny_values(tiny_model, chat_data, tmp_path / "run")), encoding="utf-8")
    return path
