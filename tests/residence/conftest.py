"""The families that the boundary and tiles are tried on, one adapted tiny model for each test file."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from qlora.methods.base import AdaptedModel
from qlora.residence.layers import unwrap_layers
from tests.tiny import tiny_model

FAMILIES = ["llama", "qwen2", "gemma2"]


@pytest.fixture(scope="module", params=FAMILIES)
def one_model(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> AdaptedModel:
    return tiny_model(tmp_path_factory.mktemp(request.param), request.param, dropout=0.0)


@pytest.fixture
def model(one_model: AdaptedModel) -> Iterator[AdaptedModel]:
    for layer in one_model.planted.values():
        layer.dropout = 0.0
    yield one_model
    unwrap_layers(one_model.model)
