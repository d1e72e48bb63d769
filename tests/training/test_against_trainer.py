"""The oracle of the loop: transformers' Trainer with PEFT's LoRA, from the same weights, on the same rows in the same order."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, TrainingArguments
from transformers import Trainer as TheirTrainer

from qlora.data.batches import collate, step_rows
from qlora.model.nf4 import dense_weight
from qlora.recipe import TrainingSection
from qlora.training.loop import Trainer
from tests.steps import GRADIENT
from tests.tiny import random_rows, tiny_checkpoint, tiny_model

peft = pytest.importorskip("peft")

STEPS, BATCH, MICRO = 20, 4, 2
ROWS = {"packed": random_rows(80, seed=4)[:20], "plain": random_rows(20, packing=False, seed=4)}  # five steps an epoch


@pytest.mark.parametrize("kind", ROWS)
def test_twenty_steps_are_those_of_peft_and_transformers(tmp_path: Path, kind: str) -> None:
    rows = ROWS[kind]
    model = tiny_model(tiny_checkpoint(tmp_path / "base"), stirred=False)
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "base", dtype=torch.float32)
    theirs = peft.get_peft_model(theirs, peft.LoraConfig(r=4, lora_alpha=8, target_modules="all-linear"))
    for path, layer in model.planted.items():
        their_layer = theirs.get_submodule(f"base_model.model.{path}")
        their_layer.base_layer.weight.data.copy_(dense_weight(layer.base, torch.float32))
        their_layer.lora_A["default"].weight.data.copy_(layer.lora_A)
        their_layer.lora_B["default"].weight.data.copy_(layer.lora_B)
    section = TrainingSection(
        batch_size=BATCH, micro_batch_size=MICRO, steps=STEPS, learning_rate=1e-2, warmup_fraction=0, seed=3,
        schedule="linear", max_grad_norm=0.5, weight_decay=0.05,
    )  # fmt: skip
    order = [place for step in range(STEPS) for place in step_rows(len(rows), BATCH, step, section.seed)]
    arguments = TrainingArguments(
        output_dir=str(tmp_path / "theirs"), per_device_train_batch_size=MICRO, gradient_accumulation_steps=BATCH // MICRO,
        max_steps=STEPS, learning_rate=1e-2, lr_scheduler_type="linear", warmup_steps=0, max_grad_norm=0.5,
        weight_decay=0.05, optim="adamw_torch", logging_steps=1, logging_nan_inf_filter=False, save_strategy="no", report_to=[],
        use_cpu=True, disable_tqdm=True, train_sampling_strategy="sequential", remove_unused_columns=False,
    )  # fmt: skip
    oracle = TheirTrainer(
        model=theirs,
        args=arguments,
        train_dataset=[rows[place] for place in order],  # type: ignore[arg-type]
        data_collator=lambda some: collate(some, 0),
    )
    oracle.train()
    expected: list[dict[str, Any]] = [line for line in oracle.state.log_history if "loss" in line]
    steps = list(Trainer(model, rows, section))
    assert len(expected) == len(steps) == STEPS
    for step, line in zip(steps, expected, strict=True):
        # theirs are written with some digits; from the second step on Adam makes much of little (tests/steps.py)
        assert step.loss == pytest.approx(line["loss"], abs=1e-3), step.number
        assert step.grad_norm == pytest.approx(line["grad_norm"], rel=GRADIENT if step.number == 1 else 1e-2), (
            step.number
        )
        assert step.learning_rate == pytest.approx(line["learning_rate"])
    assert steps[-1].loss < 0.95 * steps[0].loss
    for path, layer in model.planted.items():
        their_layer = theirs.get_submodule(f"base_model.model.{path}")
        expected_B = their_layer.lora_B["default"].weight.data
        assert (layer.lora_B.data - expected_B).norm() <= 1e-2 * expected_B.norm()
