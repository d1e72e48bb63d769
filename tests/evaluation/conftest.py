"""A tiny adapted model of two families for the tests of this room; each test gets it back as it was made."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from qlora.methods.base import AdaptedModel
from qlora.residence.layers import unwrap_layers
from tests import tiny


@pytest.fixture(scope="module", params=["llama", "gemma2"])
def one_model(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> AdaptedModel:
    return tiny.tiny_model(tmp_path_factory.mktemp(request.param), request.param, dropout=0.5)


@pytest.fixture
def model(one_model: AdaptedModel) -> Iterator[AdaptedModel]:
    yield one_model
    unwrap_layers(one_model.model)
    one_model.model.eval()
    one_model.tokenizer.pad_token, one_model.tokenizer.eos_token = "w0", "w2"
    one_model.model.config.eos_token_id = 2
    one_model.base.end_tokens = ()


@pytest.fixture(scope="module")
def adapted(tiny_model: Path) -> AdaptedModel:
    """A tiny chat model with an adapter that does something, of which tasks are asked in real text."""
    return tiny.tiny_model(tiny_model, quantization="none")
