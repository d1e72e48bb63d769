"""A tiny adapted model of two families for the tests of this room; each test gets it back as it was made."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from qlora.methods import AdaptedModel
from qlora.residence.layers import unwrap_layers
from tests.tiny import tiny_model


@pytest.fixture(scope="module", params=["llama", "gemma2"])
def one_model(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> AdaptedModel:
    return tiny_model(tmp_path_factory.mktemp(request.param), request.param, dropout=0.5)


@pytest.fixture
def model(one_model: AdaptedModel) -> Iterator[AdaptedModel]:
    yield one_model
    unwrap_layers(one_model.model)
    one_model.model.eval()
    one_model.tokenizer.pad_token, one_model.tokenizer.eos_token = "w0", "w2"
    one_model.model.config.eos_token_id = 2
    one_model.base.end_tokens = ()
