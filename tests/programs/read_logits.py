"""Run by another environment's Python: ``read_logits.py JOBS.json``, a list of {folder, ids, text, out}.

Opens each folder in the transformers that is there, and writes the logits [T, V] of ``ids`` and the tokens of ``text``
to ``out`` (.npz); where that release does not know the model's type, an empty file. Must not import qlora.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np
import torch
import transformers
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer


def main(jobs: str) -> None:
    transformers.utils.logging.set_verbosity_error()
    for job in json.loads(Path(jobs).read_text(encoding="utf-8")):
        try:
            AutoConfig.from_pretrained(job["folder"])
        except ValueError as error:
            if "does not recognize this architecture" not in str(error):
                raise
            np.savez(job["out"])
            continue
        # its SDPA passes over the caps of Gemma 2's scores
        options = {"torch_dtype": torch.float32, "attn_implementation": "eager"}
        model = AutoModelForCausalLM.from_pretrained(job["folder"], **options).eval()
        tokens = AutoTokenizer.from_pretrained(job["folder"])(job["text"])["input_ids"]
        with torch.no_grad():
            logits = model(torch.tensor([job["ids"]])).logits[0]
        np.savez(job["out"], logits=logits.numpy(), tokens=tokens, version=transformers.__version__)


if __name__ == "__main__":
    main(sys.argv[1])
