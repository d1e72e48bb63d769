"""A run finds, opens, reads and fingerprints its model once."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import pytest

import qlora
from qlora.model import checkpoint, tokenizer
from qlora.recipe import Recipe
from tests.tiny import tiny_values


@pytest.fixture
def counts(monkeypatch: pytest.MonkeyPatch) -> Counter[str]:
    """How often each reader of a checkpoint was called."""
    found: Counter[str] = Counter()

    def counting(name: str, function: Any) -> Any:
        def counted(*args: Any, **kwargs: Any) -> Any:
            found[name] += 1
            return function(*args, **kwargs)

        return counted

    for name in ("find_model", "read_model_config", "_shards", "_header", "_fingerprint"):
        monkeypatch.setattr(checkpoint, name, counting(name, getattr(checkpoint, name)))
    monkeypatch.setattr(tokenizer, "load_tokenizer", counting("load_tokenizer", tokenizer.load_tokenizer))
    return found


ONCE = dict.fromkeys(("find_model", "read_model_config", "_shards", "_header", "_fingerprint", "load_tokenizer"), 1)


def test_train_and_export_open_the_model_once(
    tiny_model: Path, chat_data: Path, tmp_path: Path, counts: Counter[str]
) -> None:
    recipe = Recipe.from_dict(tiny_values(tiny_model, chat_data, tmp_path / "run"), "training.steps=2")
    qlora.train(recipe, quiet=True)
    assert counts == ONCE
    for verb in (qlora.evaluate, qlora.resume, qlora.merge):
        counts.clear()
        verb(tmp_path / "run")
        assert counts == ONCE, verb
