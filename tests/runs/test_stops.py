"""A fine-tune that stops: the end of a turn in the chat template ends answers everywhere, whatever the base calls its end."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer

import qlora
from qlora.chat import Conversation
from qlora.cli import main
from tests.tiny import tiny_values, write_lines

QUESTION = [{"role": "user", "content": "hello there"}]
ANSWERED = [*QUESTION, {"role": "assistant", "content": "fine thank you"}]


@pytest.fixture(scope="module")
def run(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base whose end is </s>, as a base model's is, learns one answer that ends with its template's <|end|>."""
    folder = tmp_path_factory.mktemp("stops")
    data = write_lines(folder / "one.jsonl", [{"messages": ANSWERED}] * 8)
    values: dict[str, Any] = tiny_values(tiny_model, data, folder / "run")
    values["training"] |= {"steps": 40, "learning_rate": 2e-2, "batch_size": 2, "micro_batch_size": 2}
    values["data"] = {"train": str(data), "packing": False}
    (folder / "r.yaml").write_text(yaml.safe_dump(values), encoding="utf-8")
    qlora.train(qlora.Recipe.from_yaml(folder / "r.yaml"), quiet=True)
    return folder / "run"


def test_chat_stops(run: Path) -> None:
    assert Conversation(run).say("hello there", max_new_tokens=40) == "fine thank you"


def test_the_merged_model_stops_in_plain_transformers(run: Path, capfd: pytest.CaptureFixture[str]) -> None:
    assert main(["export", str(run), "merged"]) == 0
    assert "ends answers with <|end|> too" in capfd.readouterr().out
    merged = run / "merged"
    tokenizer: Any = AutoTokenizer.from_pretrained(merged)
    model: Any = AutoModelForCausalLM.from_pretrained(merged, dtype=torch.float32)
    assert set(model.generation_config.eos_token_id) == {
        tokenizer.eos_token_id,
        tokenizer.convert_tokens_to_ids("<|end|>"),
    }
    batch = tokenizer.apply_chat_template(QUESTION, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    found = model.generate(**batch, max_new_tokens=40, do_sample=False)[0, batch["input_ids"].shape[1] :]
    assert tokenizer.decode(found) == "fine thank you<|end|>"


def test_what_the_base_says_of_generation_stays(run: Path, tiny_model: Path, tmp_path: Path) -> None:
    """Sampling and the old ends; and a base that names the token already is left as it is."""
    merged = qlora.merge(run, tmp_path / "merged")
    before = json.loads((tiny_model / "generation_config.json").read_text(encoding="utf-8"))
    after = json.loads((merged.folder / "generation_config.json").read_text(encoding="utf-8"))
    assert {**after, "eos_token_id": before["eos_token_id"]} == before
    assert merged.new_ends == ("<|end|>",)


def test_the_adapter_stops_in_peft_with_the_end_that_export_names(
    run: Path, tiny_model: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    assert main(["export", str(run), "adapter"]) == 0
    assert "Its answers end with <|end|>, which the base's own files do not name as an end" in capfd.readouterr().out
    tokenizer: Any = AutoTokenizer.from_pretrained(tiny_model)
    model: Any = PeftModel.from_pretrained(
        AutoModelForCausalLM.from_pretrained(tiny_model, dtype=torch.float32), run / "portable"
    )
    batch = tokenizer.apply_chat_template(QUESTION, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    end = tokenizer.convert_tokens_to_ids("<|end|>")
    found = model.generate(**batch, max_new_tokens=40, do_sample=False, eos_token_id=end)[
        0, batch["input_ids"].shape[1] :
    ]
    assert tokenizer.decode(found) == "fine thank you<|end|>"
