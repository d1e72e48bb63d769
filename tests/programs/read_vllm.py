"""Run by the Python that has vLLM: ``read_vllm.py JOB.json`` with {base, adapters, max_rank, ids, out}.

Serves ``base`` with each of the ``adapters``, or none for null, and writes the log-probabilities [T − 1] of ``ids``' own
tokens, each after those before it, to ``out`` (.npz) by number. Where vLLM refuses one, its sentence. Must not import qlora.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np


def main(path: str) -> None:
    from vllm import LLM, SamplingParams
    from vllm.lora.request import LoRARequest

    job = json.loads(Path(path).read_text(encoding="utf-8"))
    engine = LLM(
        job["base"], dtype="float32", max_model_len=64, enforce_eager=True, enable_lora=job["max_rank"] > 0,
        **({"max_lora_rank": job["max_rank"]} if job["max_rank"] else {}),
    )  # fmt: skip
    ask, found = SamplingParams(max_tokens=1, temperature=0, prompt_logprobs=0), {}
    for number, adapter in enumerate(job["adapters"]):
        lora = None if adapter is None else LoRARequest(Path(adapter).name, number + 1, adapter)
        try:
            (answer,) = engine.generate([{"prompt_token_ids": job["ids"]}], ask, lora_request=lora, use_tqdm=False)
        except Exception as error:  # whatever kind it is: the test looks at the sentence
            found[f"{number}"] = np.array(str(error))
            continue
        places = zip(job["ids"][1:], answer.prompt_logprobs[1:], strict=True)
        found[f"{number}"] = np.array([place[token].logprob for token, place in places])
    np.savez(job["out"], **found)


if __name__ == "__main__":
    main(sys.argv[1])
