"""Ten steps on pairs have the losses, rewards and margins of TRL's trainers: same weights, same pairs in the same order.

Skipped where TRL is not installed (``make test-programs``). Theirs are DPOTrainer and ORPOTrainer on PEFT's LoRA, in fp32.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

import numpy
import pytest
import torch
from datasets import Dataset
from transformers import AutoModelForCausalLM, AutoTokenizer

from qlora.data.batches import step_rows
from qlora.data.examples import make_example
from qlora.data.packing import Row, make_rows
from qlora.recipe import Recipe
from qlora.training.loop import Trainer
from tests import tiny

FOLDER = os.environ.get("QLORA_TRL", "/nonexistent")
sys.path.append(FOLDER)  # at the end: of what both have, it is ours that counts
trl = pytest.importorskip("trl", reason="QLORA_TRL names no folder of 'pip install --target' with TRL")
peft = pytest.importorskip("peft")
pytestmark = pytest.mark.slow

STEPS, BATCH = 10, 4
CLOSE = 1e-4
OBJECTIVES: dict[str, dict[str, Any]] = {
    "dpo": {"name": "dpo", "beta": 0.3},
    "ipo": {"name": "ipo", "beta": 0.3},
    "orpo": {"name": "orpo", "beta": 0.3},
}
Pair = tuple[list[int], list[int], list[int]]
"""The tokens of a question and of its two answers."""


def pairs(count: int, vocabulary: int) -> list[Pair]:
    random = numpy.random.default_rng(5)
    return [
        tuple(random.integers(3, vocabulary, int(random.integers(2, longest))).tolist() for longest in (12, 9, 9))
        for _ in range(count)
    ]  # type: ignore[misc]


def rows_of(found: list[Pair]) -> list[Row]:
    made = [
        make_example([*asked, *said], [0] * len(asked) + [1] * len(said)) for asked, *both in found for said in both
    ]
    return make_rows(made, 64, packing=False, together=2)


def columns_for(name: str, asked: list[int], chosen: list[int], rejected: list[int]) -> dict[str, list[int]]:
    """A pair as their trainer has it after tokenising."""
    if name != "orpo":
        return {"prompt_ids": asked, "chosen_ids": chosen, "rejected_ids": rejected}
    found = {"prompt_input_ids": asked, "prompt_attention_mask": [1] * len(asked)}
    for side, said in (("chosen", chosen), ("rejected", rejected)):
        whole = [*asked, *said]
        found |= {
            f"{side}_input_ids": whole,
            f"{side}_attention_mask": [1] * len(whole),
            f"{side}_labels": [-100] * len(asked) + said,
        }
    return found


def theirs(
    name: str, beta: float, model: Any, folder: Path, ordered: list[Pair], rate: float
) -> tuple[list[float], list[dict[str, float]]]:
    """(the loss, what is logged) of each of their steps."""
    at_once = (
        1 if name == "orpo" else 2
    )  # where theirs takes a mean over a micro-batch's tokens, micro-batches are pairs
    values: dict[str, Any] = {
        "output_dir": str(folder / "theirs"), "per_device_train_batch_size": at_once,
        "gradient_accumulation_steps": BATCH // at_once, "max_steps": STEPS, "learning_rate": rate, "lr_scheduler_type": "constant",
        "max_grad_norm": 1.0, "optim": "adamw_torch", "logging_steps": 1, "save_strategy": "no", "report_to": [], "use_cpu": True,
        "disable_tqdm": True, "train_sampling_strategy": "sequential", "beta": beta, "max_length": 64, "bf16": False,
        "gradient_checkpointing": False, "remove_unused_columns": False,
    }  # fmt: skip
    if name == "orpo":
        from trl.experimental.orpo import ORPOConfig, ORPOTrainer

        make, config = ORPOTrainer, ORPOConfig(**values)
    else:
        make, config = trl.DPOTrainer, trl.DPOConfig(**values, loss_type={"dpo": "sigmoid"}.get(name, name))
    text = Dataset.from_list([{"prompt": "a", "chosen": "b", "rejected": "c"}])
    trainer = make(model=model, args=config, train_dataset=text, processing_class=AutoTokenizer.from_pretrained(folder))
    trainer.train_dataset = Dataset.from_list([columns_for(name, *pair) for pair in ordered])
    losses: list[float] = []
    compute = trainer.compute_loss

    def watched(*args: Any, **kwargs: Any) -> Any:
        loss = compute(*args, **kwargs)
        losses.append(float(loss.detach()))
        return loss

    trainer.compute_loss = watched
    trainer.train()
    size = BATCH // at_once
    means = [float(numpy.mean(losses[start : start + size])) for start in range(0, len(losses), size)]
    return means, [line for line in trainer.state.log_history if "rewards/margins" in line]


@pytest.mark.parametrize("name", OBJECTIVES)
def test_ten_steps_are_those_of_trl(tmp_path: Path, name: str) -> None:
    folder = tiny.chat_checkpoint(tmp_path / "base")
    model = tiny.tiny_model(folder, stirred=False, quantization="none")
    other = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    other = peft.get_peft_model(other, peft.LoraConfig(r=4, lora_alpha=8, target_modules="all-linear"))
    for path, layer in model.planted.items():
        their_layer = other.get_submodule(f"base_model.model.{path}")
        their_layer.lora_A["default"].weight.data.copy_(layer.lora_A)
        their_layer.lora_B["default"].weight.data.copy_(layer.lora_B)
    found = pairs(24, model.model.config.vocab_size)  # type: ignore[union-attr]
    rate = 5e-3
    recipe = Recipe.from_dict({
        "data": {"train": "x"}, "objective": OBJECTIVES[name],
        "training": {"batch_size": BATCH, "micro_batch_size": 2, "steps": STEPS, "learning_rate": rate, "warmup_fraction": 0, "schedule": "constant", "seed": 3},
    })  # fmt: skip
    order = [place for step in range(STEPS) for place in step_rows(len(found), BATCH, step, 3)]
    losses, lines = theirs(name, OBJECTIVES[name]["beta"], other, folder, [found[place] for place in order], rate)
    steps = list(Trainer(model, rows_of(found), recipe=recipe))
    assert len(losses) == len(lines) == len(steps) == STEPS
    worst = 0.0
    for step, loss, line in zip(steps, losses, lines, strict=True):
        ours = {"loss": step.loss, **step.measures}
        expected = {
            "loss": loss, "reward_chosen": line["rewards/chosen"], "reward_rejected": line["rewards/rejected"],
            "reward_margin": line["rewards/margins"], "reward_accuracy": line["rewards/accuracies"],
        }  # fmt: skip
        if step.number == 1 and name != "orpo":  # rewards are zero but for rounding: which one is ahead says nothing
            ours["reward_accuracy"] = expected["reward_accuracy"]
        worst = max(worst, *(abs(ours[key] - value) for key, value in expected.items()))
        assert ours == pytest.approx(expected, abs=CLOSE), step.number
    print(
        f"{name}: {STEPS} steps, losses and rewards at most {worst:.1e} from TRL {trl.__version__}'s; loss {losses[0]:.4f} → {losses[-1]:.4f}"
    )
    assert steps[-1].measures["reward_margin"] > steps[0].measures["reward_margin"] + 0.1
