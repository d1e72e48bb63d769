"""Fixtures of the whole house: the tiny chat model on disk, a data file and a recipe for it."""

from __future__ import annotations

import os
import zlib
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

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


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Of a test that is marked ``sampled``, ``make test`` runs a part, and ``make test-all`` what is left: of one parameter
    every third value, of several parameters so many combinations that each value of each is met.
    """
    cases: dict[str, list[pytest.Function]] = {}
    for item in items:
        if (
            isinstance(item, pytest.Function)
            and item.get_closest_marker("sampled")
            and not item.get_closest_marker("slow")
        ):
            cases.setdefault(item.nodeid.partition("[")[0], []).append(item)
    for name, those in cases.items():
        values = [[(key, _known_by(value)) for key, value in one.callspec.params.items()] for one in those]
        if len(values) == len({value for case in values for value in case[:1]}):  # another third of each test's
            kept = set(range(zlib.crc32(name.encode()) % 3, len(those), 3))
        else:
            kept = _each_value_once(values)
        for number, one in enumerate(those):
            if number not in kept:
                one.add_marker(pytest.mark.slow)


def _each_value_once(cases: list[list[tuple[str, Any]]]) -> set[int]:
    """So many of ``cases`` that every value is in one of them; the first that shows most new ones, and the rarest others."""
    met: Counter[tuple[str, Any]] = Counter()
    kept: set[int] = set()
    while len(met) < len({value for case in cases for value in case}):
        best = max(
            set(range(len(cases))) - kept,
            key=lambda at: (sum(value not in met for value in cases[at]), -sum(met[value] for value in cases[at]), -at),
        )
        met.update(cases[best])
        kept.add(best)
    return kept


def _known_by(value: Any) -> Any:
    return (type(value), value) if isinstance(value, str | int | float) else id(value)
