"""The laws of loading, training and exporting over families: those that people use most."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.families.judge import WORKS, judge

MOST_USED = (
    "llama", "qwen2", "qwen3", "gemma2", "gemma3_text", "mistral", "phi3", "granite", "olmo2", "smollm3", "gpt2", "glm4",
)  # fmt: skip


@pytest.mark.parametrize("kind", MOST_USED)
def test_what_people_use_most(kind: str, tmp_path: Path) -> None:
    row = judge(kind, tmp_path, whole=False)
    assert row["outcome"] == WORKS, row
    assert not row["without gradient"]
