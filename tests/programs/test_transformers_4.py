"""transformers 4 opens what is merged and computes what was trained. Skipped where none is given (``make test-programs``)."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoTokenizer

from qlora.export.merged import merge
from qlora.machine.disk import cache_folder
from qlora.recipe import DEFAULT_MODEL
from tests.export.gguf_models import FAMILIES, checkpoint, trained
from tests.programs import read_logits
from tests.rounding import no_worse

FOLDER = Path(os.environ.get("QLORA_TRANSFORMERS_4", "/nonexistent"))
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        not FOLDER.is_dir(),
        reason="QLORA_TRANSFORMERS_4 names no folder of 'pip install --target' with transformers 4",
    ),
]
TEXT = "The 3 dogs of 1984 ate 27 apples."
REAL = "smollm2, converted"


@pytest.fixture(scope="module")
def opened(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """By family (folder, ids, the trained model's logits in fp32 and in float64, what transformers 4 wrote)."""
    work, families = tmp_path_factory.mktemp("merged"), {}
    for family in FAMILIES:
        here = work / family.replace(" ", "-")
        base = checkpoint(here / "base", family)
        model = trained(base, here / "adapter")
        merge(base, here / "adapter", here / "merged", compute_dtype="fp32", quantization="none", dtype="fp32")
        ids = [1, *(n * 7 % 250 + 3 for n in range(79))]
        with torch.no_grad():
            plain = model.model(input_ids=torch.tensor([ids]), use_cache=False).logits[0]
            exact = model.model.double()(input_ids=torch.tensor([ids]), use_cache=False).logits[0]
        families[family] = (here / "merged", ids, plain, exact)
    made = cache_folder() / "models" / DEFAULT_MODEL
    if made.is_dir():
        families[REAL] = (made, [1, 9690, 198], None, None)
    jobs = [
        {"folder": str(folder), "ids": ids, "text": TEXT, "out": str(work / f"{number}.npz")}
        for number, (folder, ids, _, _) in enumerate(families.values())
    ]
    (work / "jobs.json").write_text(json.dumps(jobs))
    subprocess.run(
        [sys.executable, read_logits.__file__, str(work / "jobs.json")],
        env={**os.environ, "PYTHONPATH": str(FOLDER)},
        check=True,
    )
    return {
        family: (*values, np.load(job["out"])) for (family, values), job in zip(families.items(), jobs, strict=True)
    }


@pytest.mark.parametrize("family", [*FAMILIES, REAL])
def test_merged_models(opened: dict[str, Any], family: str) -> None:
    if family not in opened:
        pytest.skip("the quickstart's model is not in the cache (python -m qlora.quickstart makes it)")
    folder, _, plain, exact, found = opened[family]
    if not found.files:
        pytest.skip(f"that release does not know {family}")
    print(f"{family}: opened by transformers {found['version']}")
    assert str(found["version"]).startswith("4.")
    if family == REAL:
        assert found["tokens"].tolist() == AutoTokenizer.from_pretrained(folder)(TEXT)["input_ids"]
    else:  # with a tokenizer that is not its family's, which releases read in different ways
        no_worse(torch.from_numpy(found["logits"]), plain, exact)
