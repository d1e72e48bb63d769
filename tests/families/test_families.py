"""The laws of loading, training and exporting over families: those that people use most always, a sample of all when there is time."""

from __future__ import annotations

import copy
import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import transformers

import qlora
from qlora.methods.combining import save_combined
from qlora.methods.files import read_adapter_tensors, save_adapter, save_portable
from qlora.methods.layout import PREFIX
from qlora.methods.loading import load_adapter
from qlora.model.anatomy import why_not_packed
from qlora.residence.load import load_base
from tests.families.checkpoints import save_family, tiny_config, types
from tests.families.judge import (
    OUTCOMES,
    SAME,
    UNPACKED,
    WORKS,
    judge,
    logits,
    merged_plain,
    peft_difference,
    section_of,
    tokens,
)
from tests.rounding import difference
from tests.tiny import stir

ROOT = Path(__file__).parents[2]
ROWS = ROOT / "benchmarks/results/2026-11-28-families.jsonl"
MOST_USED = (
    "llama", "qwen2", "qwen3", "gemma2", "gemma3_text", "mistral", "phi3", "granite", "olmo2", "smollm3", "gpt2", "glm4",
)  # fmt: skip
SAMPLE = (
    "apertus", "bamba", "bart", "bert", "bloom", "cohere2", "deepseek_v3", "doge", "ernie4_5", "exaone4", "falcon", "falcon_h1",
    "gemma3", "gpt_bigcode", "gpt_neox", "gpt_oss", "lfm2", "llama4_text", "mamba2", "mixtral", "molmo2", "nemotron", "olmo_hybrid",
    "opt", "phi", "qwen2_5_vl", "qwen3_moe", "recurrent_gemma", "zamba2",
)  # fmt: skip


@pytest.mark.parametrize("kind", MOST_USED)
def test_what_people_use_most(kind: str, tmp_path: Path) -> None:
    row = judge(kind, tmp_path, whole=False)
    assert row["outcome"] == WORKS, row
    assert not row["without gradient"]


@pytest.mark.parametrize("kind", ["laguna", pytest.param("deepseek_ocr2", marks=pytest.mark.slow)])
def test_peft_finds_modules_whose_names_transformers_takes_for_old_ones(kind: str, tmp_path: Path) -> None:
    if kind not in types():
        pytest.skip(f"transformers {transformers.__version__} has no {kind}")
    folder, ids = save_family(tmp_path / "model", kind), tokens()
    model = qlora.apply_method(load_base(section_of(folder)), qlora.LoRA(r=4, alpha=8))
    save_adapter(model, tmp_path / "untrained")
    plain = merged_plain(kind, folder, tmp_path / "untrained", tmp_path / "plain")
    stir(model)
    expected = logits(model, ids)
    ours = {f"{PREFIX}{path}.lora_A.weight" for path in model.planted}
    two = {"one": tmp_path / "adapter", "two": model}
    for place, write in {
        "adapter": lambda out: save_adapter(model, out),
        "combined": lambda out: save_combined(out, two, (0.5, 0.5), "cat"),
        "of files": lambda out: save_combined(out, {"one": two["one"]}, (1.0,), "cat"),
        "portable": lambda out: save_portable(model, out),
    }.items():
        write(tmp_path / place)
        assert ours - read_adapter_tensors(tmp_path / place).keys()
        assert peft_difference(copy.deepcopy(plain), tmp_path / place, ids, expected) <= SAME, place
    for place in ("adapter", "portable"):
        again = load_adapter(load_base(section_of(folder)), tmp_path / place)
        assert difference(logits(again, ids), expected) <= SAME, place


@pytest.mark.slow
@pytest.mark.parametrize("kind", SAMPLE)
def test_a_sample_is_as_the_results_say(kind: str, tmp_path: Path) -> None:
    about, kept = rows()
    if about["transformers"] != transformers.__version__:
        pytest.skip(f"the results are of transformers {about['transformers']}")
    row, kept = judge(kind, tmp_path), kept[kind]
    assert (row["outcome"], row.get("targets"), row.get("without gradient")) == (
        kept["outcome"], kept.get("targets"), kept.get("without gradient"),
    ), row.get("why")  # fmt: skip


def rows() -> tuple[dict[str, str], dict[str, dict[str, Any]]]:
    about, *kept = map(json.loads, ROWS.read_text(encoding="utf-8").splitlines())
    return about, {row["type"]: row for row in kept}


def test_results_are_of_every_type() -> None:
    about, kept = rows()
    if about["transformers"] == transformers.__version__:
        assert kept.keys() == types().keys()
    assert {row["outcome"] for row in kept.values()} <= set(OUTCOMES)


def test_what_does_not_pack_is_known_before_it_is_loaded() -> None:
    """Else plan would say that rows are packed, and only the run that they are not."""
    about, kept = rows()
    if about["transformers"] == transformers.__version__:
        tried = {kind: row["outcome"] for kind, row in kept.items() if row["outcome"] in (WORKS, UNPACKED)}
        known = {kind: UNPACKED if why_not_packed(tiny_config(kind)) else WORKS for kind in tried}
        assert known == tried


def test_pages_are_made_from_the_rows(tmp_path: Path) -> None:
    shutil.copy(ROWS, tmp_path)
    made = [tmp_path / ROWS.with_suffix(".md").name, tmp_path / "models.md"]
    options = ["--pages", "--rows", tmp_path / ROWS.name, "--docs", made[1]]
    subprocess.run([sys.executable, ROOT / "benchmarks/families.py", *options], check=True)
    for page, kept in zip(made, [ROWS.with_suffix(".md"), ROOT / "docs/models.md"], strict=True):
        assert page.read_text(encoding="utf-8") == kept.read_text(encoding="utf-8"), (
            f"run python benchmarks/families.py --pages: {kept}"
        )
