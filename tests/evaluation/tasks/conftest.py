"""A tiny chat model with an adapter that does something; tasks are asked of it in real text."""

from __future__ import annotations

from pathlib import Path

import pytest

from qlora.methods import AdaptedModel
from tests import tiny


@pytest.fixture(scope="module")
def adapted(tiny_model: Path) -> AdaptedModel:
    return tiny.tiny_model(tiny_model, quantization="none")
