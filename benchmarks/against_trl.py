"""DPO beside TRL's DPOTrainer: speed, peak memory and losses, of the same pairs on the same base with the same adapter.

    python benchmarks/against_trl.py --data pairs.jsonl [--steps 4] [--pairs 8] [--rounds 3] [--layers 6]

Both sides have NF4 with double quantisation, LoRA of the same initial values, AdamW, and the same pairs in each step, in fp32. TRL is
measured in each of its settings: with and without checkpointing, its reference taken in each step or before the first one.
``--layers`` shortens the model, where there is little time: fewer layers make the head, and so the memory of logits, weigh more.

A side is a process of its own in each round, and rounds alternate the sides, so that a busy machine slows all of them alike. Time is
that of the processors, for the reference and all steps but the first; memory is the most that was resident beyond the loaded model. The TRL side imports
nothing of qlora. Needs ``trl`` 1.16, on the path or in the folder that QLORA_TRL names.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

sys.path.append(os.environ.get("QLORA_TRL", "."))  # at the end: of what both have, it is ours that counts
THEIRS = {
    "trl": {},
    "trl, no checkpointing": {"gradient_checkpointing": False},
    "trl, no checkpointing, reference before": {"gradient_checkpointing": False, "precompute_ref_log_probs": True},
}
SIDES = ["qlora", *THEIRS]


def main() -> None:
    options = read_options()
    if options.worker:
        folder = Path(options.work)
        settings = json.loads((folder / "settings.json").read_text())
        work = {"prepare": prepare, "qlora": train_qlora}.get(options.worker)
        result = work(settings, folder) if work else train_trl(settings, folder, THEIRS[options.worker])
        (folder / "result.json").write_text(json.dumps(result))
        return
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        (folder / "settings.json").write_text(json.dumps(vars(options) | {"out": None}))
        prepared = run("prepare", folder)
        rounds = [{side: run(side, folder) for side in SIDES} for _ in range(options.rounds)]
    text = table(options, prepared, rounds)
    place = options.out / f"{datetime.date.today():%Y-%m-%d}-against-trl.md"
    place.write_text(text)
    print(text, f"Written: {place}", sep="\n")


def read_options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=str(__doc__).split("\n\n")[0])
    parser.add_argument("--data", default="pairs.jsonl", help="pairs of answers")
    parser.add_argument("--steps", type=int, default=4)
    parser.add_argument("--pairs", type=int, default=8, help="in a step")
    parser.add_argument("--at-once", type=int, default=4, help="pairs that go through the model at once, on both sides")
    parser.add_argument("--max-length", type=int, default=256, help="tokens of a side")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--model", default="smollm2-135m-instruct", help="the default model, a folder or a hub id")
    parser.add_argument("--layers", type=int, help="only so many of its layers")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results")
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    parser.add_argument("--work", help=argparse.SUPPRESS)
    return parser.parse_args()


def run(side: str, folder: Path) -> dict[str, Any]:
    """What one process, which does one thing, found."""
    done = subprocess.run(
        [sys.executable, __file__, "--worker", side, "--work", str(folder)],
        env={**os.environ, "TRANSFORMERS_VERBOSITY": "error", "CUDA_VISIBLE_DEVICES": ""},
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    if done.returncode:
        sys.exit(f"{side} failed:\n{done.stderr[-4000:]}")
    print(f"{side}: done", file=sys.stderr, flush=True)
    found: dict[str, Any] = json.loads((folder / "result.json").read_text())
    return found


def table(options: argparse.Namespace, prepared: dict[str, Any], rounds: list[dict[str, Any]]) -> str:
    """Medians over the rounds, ratios within each round, as Markdown."""
    import torch
    import trl

    lines = [
        "# DPO beside TRL", "",
        f"`python {' '.join(sys.argv)}`", "",
        f"{datetime.datetime.now(datetime.UTC):%Y-%m-%d %H:%M} UTC, {torch.get_num_threads()} CPU threads, load {os.getloadavg()[0]:.0f}; "
        f"torch {torch.__version__}, TRL {trl.__version__}. {options.steps} steps of {options.pairs} pairs, {options.at_once} at once, "
        f"{prepared['tokens']:,} tokens in all; {prepared['parameters']:,} parameters. Each step's reference is in its time; "
        "memory is beyond the loaded model. Medians of "
        f"{options.rounds} rounds; ratios are taken within a round.", "",
        "| | processor seconds a step | memory | ours is faster by | and takes | loss of the last step |", "|---|--:|--:|--:|--:|--:|",
    ]  # fmt: skip
    for side in SIDES:

        def of(key: str, side: str = side) -> float:
            return statistics.median(one[side][key] for one in rounds)

        def beside(key: str, side: str = side) -> float:
            return statistics.median(one[side][key] / one["qlora"][key] for one in rounds)

        ratios = "| | |" if side == "qlora" else f"| {beside('seconds'):.2f} × | {1 / beside('bytes'):.2f} × |"
        lines.append(
            f"| {side} | {of('seconds'):.2f} | {of('bytes') / 2**20:,.0f} MiB {ratios} {rounds[0][side]['losses'][-1]:.5f} |"
        )
    worst = max(
        abs(ours - theirs)
        for one in rounds
        for side in THEIRS
        for ours, theirs in zip(one["qlora"]["losses"], one[side]["losses"], strict=True)
    )
    return "\n".join([*lines, "", f"Losses differ by at most {worst:.1e}.", ""])


# ---- in the workers ----


def prepare(settings: dict[str, Any], folder: Path) -> dict[str, Any]:
    """The model, cut to so many layers; the pairs of every step in token ids; the adapter's first values."""
    from transformers import AutoModelForCausalLM

    from qlora.data.load import load_data
    from qlora.methods.base import apply_method
    from qlora.methods.files import save_adapter
    from qlora.model.checkpoint import open_checkpoint
    from qlora.recipe import DataSection, LoRA, ModelSection
    from qlora.residence.load import load_base

    opened = open_checkpoint(ModelSection(name=settings["model"]))
    model = AutoModelForCausalLM.from_pretrained(opened.folder, dtype="float32")
    if settings["layers"]:
        del model.model.layers[settings["layers"] :]
        model.config.num_hidden_layers = settings["layers"]
        model.config.layer_types = None
    model.save_pretrained(folder / "model")
    opened.tokenizer.save_pretrained(folder / "model")
    count = settings["steps"] * settings["pairs"]
    section = DataSection(train=settings["data"], max_length=settings["max_length"], packing=False, limit=2 * count)
    data = load_data(section, opened.tokenizer, pairs=True)
    pairs = [
        [(one.ids.tolist(), (one.labels != -100).tolist()) for one in row.sequences()] for row in data.train[:count]
    ]
    if len(pairs) < count:
        sys.exit(f"{settings['data']} gives {len(pairs)} pairs; {count} were expected.")
    (folder / "pairs.json").write_text(json.dumps(pairs))
    base = load_base(ModelSection(name=str(folder / "model"), compute_dtype="fp32"))
    (folder / "adapter").mkdir()
    save_adapter(apply_method(base, LoRA(r=16, alpha=32)), folder / "adapter")
    tokens = sum(len(ids) for pair in pairs for ids, _ in pair)
    return {"tokens": tokens, "parameters": sum(values.numel() for values in model.parameters())}


class Clock:
    """Processor seconds of marks, and the most that was resident since the beginning beyond what was there then."""

    def __init__(self) -> None:
        Path("/proc/self/clear_refs").write_text("5")
        self.before, self.marks = self.resident("VmRSS"), [time.process_time()]

    def mark(self) -> None:
        self.marks.append(time.process_time())

    @staticmethod
    def resident(field: str) -> int:
        line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(field))
        return int(line.split()[1]) * 1024

    def result(self, losses: list[float], reference: float, steps: int) -> dict[str, Any]:
        """``reference``: the seconds of one that was taken before all steps."""
        first, last = self.marks[-steps], self.marks[-1]
        seconds = (last - first) / (steps - 1) + reference / steps
        return {"losses": losses, "seconds": seconds, "bytes": self.resident("VmHWM") - self.before}


def train_qlora(settings: dict[str, Any], folder: Path) -> dict[str, Any]:
    from qlora.data.batches import step_rows
    from qlora.data.examples import make_example
    from qlora.data.packing import make_rows
    from qlora.methods.loading import load_adapter
    from qlora.planning.plan import plan
    from qlora.recipe import Recipe
    from qlora.residence.load import load_base
    from qlora.training.loop import Trainer

    pairs, steps = json.loads((folder / "pairs.json").read_text()), settings["steps"]
    recipe = plan(
        Recipe.from_dict(
            {
                "model": {"name": str(folder / "model"), "compute_dtype": "fp32"},
                "data": {"train": settings["data"], "max_length": settings["max_length"]},
                "objective": {"name": "dpo", "beta": 0.1},
                # a step's pairs are packed into one row, so that it holds the same ones as theirs
                "training": {
                    "batch_size": settings["pairs"] // settings["at_once"], "steps": steps, "learning_rate": 1e-4,
                    "schedule": "constant", "warmup_fraction": 0,
                },
            }
        )
    ).recipe  # fmt: skip
    examples = [make_example(ids, trained) for pair in pairs for ids, trained in pair]
    size = 2 * settings["at_once"]
    length = 10**9  # a row is what it is given
    groups = [examples[start : start + size] for start in range(0, len(examples), size)]
    rows = [make_rows(group, length, packing=True, together=2)[0] for group in groups]
    numbered = [
        type(row)(row.ids, row.labels, row.positions, tuple(range(n * size, (n + 1) * size)))
        for n, row in enumerate(rows)
    ]
    batch = settings["pairs"] // settings["at_once"]
    order = [place for step in range(steps) for place in step_rows(len(rows), batch, step, recipe.training.seed)]
    placed = [row for _, row in sorted(zip(order, numbered, strict=True), key=lambda pair: pair[0])]
    model = load_adapter(load_base(recipe.model), folder / "adapter")
    trainer = Trainer(model, placed, recipe=recipe)
    clock = Clock()
    trainer.prepare()
    clock.mark()
    losses = []
    for step in trainer:
        losses.append(step.loss)
        clock.mark()
    return clock.result(losses, clock.marks[1] - clock.marks[0], steps)


def train_trl(settings: dict[str, Any], folder: Path, more: dict[str, Any]) -> dict[str, Any]:
    """The way TRL's documentation shows it."""
    import torch
    from datasets import Dataset
    from peft import PeftModel, prepare_model_for_kbit_training
    from transformers import AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig, TrainerCallback
    from trl import DPOConfig, DPOTrainer

    pairs, steps, at_once = json.loads((folder / "pairs.json").read_text()), settings["steps"], settings["at_once"]
    quantised = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.float32,
    )
    model = AutoModelForCausalLM.from_pretrained(
        folder / "model", dtype=torch.float32, quantization_config=quantised, device_map={"": "cpu"}
    )
    values: dict[str, Any] = {
        "output_dir": str(folder / "theirs"), "per_device_train_batch_size": at_once, "max_steps": steps, "learning_rate": 1e-4,
        "gradient_accumulation_steps": settings["pairs"] // at_once, "lr_scheduler_type": "constant", "max_grad_norm": 1.0,
        "optim": "adamw_torch_fused", "save_strategy": "no", "report_to": [], "use_cpu": True, "bf16": False, "disable_tqdm": True,
        "train_sampling_strategy": "sequential", "beta": 0.1, "max_length": settings["max_length"], **more,
    }  # fmt: skip
    config = DPOConfig(**values)
    model = prepare_model_for_kbit_training(model, use_gradient_checkpointing=config.gradient_checkpointing)
    model = PeftModel.from_pretrained(model, folder / "adapter", is_trainable=True)
    rows = []
    for (chosen, trained), (rejected, _) in pairs:
        asked = trained.index(True)
        rows.append({"prompt_ids": chosen[:asked], "chosen_ids": chosen[asked:], "rejected_ids": rejected[asked:]})
    given = Dataset.from_list(rows)

    class Ours(DPOTrainer):  # type: ignore[misc]
        def _prepare_dataset(self, *_: Any) -> Any:
            return given

        def compute_loss(self, *args: Any, **kwargs: Any) -> Any:
            loss = super().compute_loss(*args, **kwargs)
            losses.append(float(loss.detach()))
            return loss

    class Watch(TrainerCallback):  # type: ignore[misc]
        def on_step_end(self, *_: Any, **__: Any) -> None:
            clock.mark()

    losses: list[float] = []
    clock = Clock()
    tokenizer = AutoTokenizer.from_pretrained(folder / "model")
    trainer = Ours(model=model, args=config, train_dataset=given, processing_class=tokenizer, callbacks=[Watch()])
    reference = time.process_time() - clock.marks[0] if config.precompute_ref_log_probs else 0.0
    trainer.train()
    size = len(losses) // steps
    means = [statistics.fmean(losses[start : start + size]) for start in range(0, len(losses), size)]
    return clock.result(means, reference, steps)


if __name__ == "__main__":
    main()
