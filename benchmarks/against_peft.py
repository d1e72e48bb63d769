"""Side by side with PEFT and the Hugging Face Trainer: speed, peak memory, and the two loss curves.

    python benchmarks/against_peft.py --steps 30 --repeats 3 [--device cuda]

Same rows      the same packed rows in the same order through both: tokens/s, peak memory, largest loss difference
Real chat      the same conversations, packed here and padded to the longest there: useful tokens/s, padding left out

Ours is what a plan decides for this machine; PEFT is measured in each of its settings: with and without checkpointing, and
on a CPU in fp32 and, where ours takes it, in bf16. Ours in fp32 stands beside them there, for the losses of the same dtype.

Both sides train the same base (NF4, double quantisation) with the same adapter (its initial values, in fp32, are written by
ours and loaded by PEFT), batch, learning rates, AdamW and clipping. Every measurement is a process of its own, so that its
peak memory is its own; repeats alternate the sides, so that a busy machine slows all of them alike. The Hugging Face side
imports nothing of qlora. Needs ``peft``.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any


def sides_of(case: str, dtype: str, device: str) -> list[str]:
    """Ours, which a plan has compute in ``dtype``, and what is measured beside it."""
    dtypes = [dtype] if case == "chat" or device == "cuda" else list(dict.fromkeys(["fp32", dtype]))
    kind = "peft, padded" if case == "chat" else "peft"
    settings = [f"{kind}, {one}{more}" for one in dtypes for more in ("", ", no checkpointing")]
    return ["qlora", *(f"qlora, {one}" for one in dtypes if one != dtype), *settings]


def main() -> None:
    options = read_options()
    if options.worker:
        worker(options.worker, Path(options.work), options.threads)
        return
    with tempfile.TemporaryDirectory() as work:
        results = compare(options, Path(work))
    stem = options.out / f"{datetime.date.today():%Y-%m-%d}-against-peft"
    options.out.mkdir(parents=True, exist_ok=True)
    text = table(results)
    stem.with_suffix(".json").write_text(json.dumps(results, indent=1) + "\n")
    stem.with_suffix(".md").write_text(text)
    print(text)
    print(f"Written: {stem}.json and .md")


def read_options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=str(__doc__).split("\n\n")[0])
    parser.add_argument("--steps", type=int, default=30, help="optimizer steps on the same rows")
    parser.add_argument("--chat-steps", type=int, default=8, help="optimizer steps on the chat data; 0 leaves it out")
    parser.add_argument("--rows", type=int, default=4, help="rows an optimizer step, same rows")
    parser.add_argument("--micro", type=int, default=4, help="rows that go through the model at once, same rows")
    parser.add_argument(
        "--chat-rows", type=int, default=8, help="rows a step and at once, chat data; Trainer's default"
    )
    parser.add_argument("--max-length", type=int, default=256, help="tokens a row, same rows")
    parser.add_argument("--chat-max-length", type=int, default=512, help="tokens a row, chat data")
    parser.add_argument("--model", default="smollm2-135m-instruct", help="the default model, a folder or a hub id")
    parser.add_argument("--same", default="data/docstrings/train.jsonl", help="data for the same rows")
    parser.add_argument("--data", default="data/docstrings/train.jsonl", help="chat data, such as oasst's train.jsonl")
    parser.add_argument("--repeats", type=int, default=1, help="measurements of each side, alternating")
    parser.add_argument("--threads", type=int, default=os.cpu_count(), help="CPU threads")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results")
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    parser.add_argument("--work", help=argparse.SUPPRESS)
    return parser.parse_args()


def compare(options: argparse.Namespace, work: Path) -> dict[str, Any]:
    """Prepare both data sets once, then measure every side ``repeats`` times; everything that was measured."""
    results: dict[str, Any] = {
        "command": "python " + " ".join([Path(sys.argv[0]).name, *sys.argv[1:]]),
        "date": f"{datetime.datetime.now(datetime.UTC):%Y-%m-%d %H:%M} UTC",
        "cpu": cpu_name() if options.device == "cpu" else gpu_name(),
        "threads": options.threads,
        "load_before": os.getloadavg(),
    }
    shared = {"model": options.model, "device": options.device}
    cases = {
        "same": {
            **shared,
            "data": options.same,
            "max_length": options.max_length,
            "steps": options.steps,
            "rows": options.rows,
            "micro": options.micro,
        },
        "chat": {
            **shared,
            "data": options.data,
            "max_length": options.chat_max_length,
            "steps": options.chat_steps,
            "rows": options.chat_rows,
            "micro": options.chat_rows,
        },
    }
    for case, settings in cases.items():
        if not settings["steps"]:
            continue
        folder = work / case
        folder.mkdir()
        (folder / "settings.json").write_text(json.dumps(settings))
        prepared = run_worker("prepare", folder, options)
        results["versions"] = prepared["versions"]
        sides = sides_of(case, prepared["compute_dtype"], options.device)
        runs: dict[str, list[Any]] = {side: [] for side in sides}
        for repeat in range(options.repeats):
            for side in sides:
                print(f"{case}: {side}, {repeat + 1} of {options.repeats} …", file=sys.stderr, flush=True)
                runs[side].append(run_worker(side, folder, options))
        results[case] = {"settings": settings, "decided": prepared["decided"], "runs": runs}
    results["load_after"] = os.getloadavg()
    return results


def run_worker(what: str, folder: Path, options: argparse.Namespace) -> Any:
    """Run ``worker`` in a process of its own and read what it measured."""
    threads = str(options.threads)
    command = [sys.executable, __file__, "--worker", what, "--work", str(folder), "--threads", threads]
    quiet = {"OMP_NUM_THREADS": threads, "TRANSFORMERS_VERBOSITY": "error"}
    if options.device == "cpu":
        quiet["CUDA_VISIBLE_DEVICES"] = ""
    done = subprocess.run(command, env={**os.environ, **quiet}, capture_output=True, text=True, check=False)
    if done.returncode:
        sys.exit(f"{what} failed:\n{done.stderr[-4000:]}")
    return json.loads((folder / "result.json").read_text())


# ---- in the workers ----


def worker(what: str, folder: Path, threads: int) -> None:
    import torch

    torch.set_num_threads(threads)
    settings = json.loads((folder / "settings.json").read_text())
    if what == "prepare":
        result = prepare(settings, folder)
    elif what.startswith("qlora"):
        result = train_qlora(settings, folder, dtype_of(what))
    else:
        padded, checkpointing = "padded" in what, "no checkpointing" not in what
        result = train_peft(settings, folder, dtype_of(what), padded=padded, checkpointing=checkpointing)
    (folder / "result.json").write_text(json.dumps(result))


def dtype_of(side: str) -> str:
    """The dtype in a side's name; ``auto`` where there is none."""
    return next((dtype for dtype in ("fp32", "bf16") if dtype in side), "auto")


def recipe(settings: dict[str, Any], dtype: str = "auto") -> Any:
    """The quickstart's settings, written out, with what the plan decides for this machine."""
    from qlora.planning.plan import plan
    from qlora.recipe import Recipe

    asked = Recipe.from_dict(
        {
            "model": {"name": settings["model"], "quantization": "nf4", "double_quant": True, "compute_dtype": dtype},
            "method": {"name": "lora", "r": 16, "alpha": 32, "dropout": 0.0, "target_modules": "all-linear"},
            "data": {"train": settings["data"], "max_length": settings["max_length"]},
            "training": {
                "steps": settings["steps"],
                "batch_size": settings["rows"],
                "micro_batch_size": settings["micro"],
                "learning_rate": 1e-3,
                "schedule": "cosine",
                "warmup_fraction": 0.05,
            },
            "device": {"name": settings["device"]},
        }
    )
    return plan(asked).recipe


def prepare(settings: dict[str, Any], folder: Path) -> dict[str, Any]:
    """Write what both sides read: rows in the order of the steps, learning rates, the adapter's initial values."""
    from importlib.metadata import version

    from qlora.data.batches import step_rows
    from qlora.data.load import load_data
    from qlora.methods.base import apply_method
    from qlora.methods.files import save_adapter
    from qlora.residence.load import load_base
    from qlora.training.optim import learning_rate

    plan = recipe(settings)
    base = load_base(plan.model)
    for name, packing in (("packed", True), ("padded", False)):
        data = load_data(plan.data.model_copy(update={"packing": packing}), base.tokenizer)
        order = [
            place
            for step in range(settings["steps"])
            for place in step_rows(len(data.train), settings["rows"], step, plan.training.seed)
        ]
        if len(order) != settings["steps"] * settings["rows"] and name == "packed":
            sys.exit(
                f"{len(data.train)} rows are too few: an epoch ends within {settings['steps']} steps of "
                f"{settings['rows']} rows, and its last step is short. Take fewer steps or rows."
            )
        save_rows(folder / f"{name}.npz", [data.train[place] for place in order])
    save_adapter(apply_method(base, plan.method, plan.training.seed), folder / "adapter")
    total = settings["steps"]
    (folder / "plan.json").write_text(
        json.dumps(
            {
                "model_folder": str(base.folder),
                "pad_id": base.tokenizer.pad_token_id or 0,
                "learning_rates": [learning_rate(plan.training, step, total) for step in range(total)],
                "training": plan.training.model_dump(mode="json"),
            }
        )
    )
    names = ("torch", "transformers", "bitsandbytes", "peft", "accelerate")
    dtype, training = plan.model.compute_dtype, plan.training
    return {
        "versions": {"python": platform.python_version(), **{name: version(name) for name in names}},
        "compute_dtype": dtype,
        "decided": f"{dtype}, recompute {training.recompute}, {training.accumulation}",
    }


def save_rows(path: Path, rows: list[Any]) -> None:
    import numpy

    numpy.savez(
        path,
        ids=numpy.concatenate([row.ids for row in rows]),
        labels=numpy.concatenate([row.labels for row in rows]),
        positions=numpy.concatenate([row.positions for row in rows]),
        lengths=numpy.array([len(row.ids) for row in rows]),
    )


def read_rows(path: Path) -> list[dict[str, Any]]:
    import numpy

    with numpy.load(path) as file:
        cuts = numpy.cumsum(file["lengths"])[:-1]
        ids, labels, positions = (numpy.split(file[name], cuts) for name in ("ids", "labels", "positions"))
    return [{"ids": i, "labels": n, "positions": p} for i, n, p in zip(ids, labels, positions, strict=True)]


class Clock:
    """Seconds between ends of steps, and how much of the processor this process got."""

    def __init__(self) -> None:
        self.loaded_bytes = peak_bytes()
        self.marks: list[tuple[float, float]] = []
        self.mark()

    def mark(self) -> None:
        import torch

        if torch.cuda.is_available():
            torch.cuda.synchronize()
        self.marks.append((time.perf_counter(), time.process_time()))

    def result(self, losses: list[float], useful: list[int], threads: int) -> dict[str, Any]:
        pairs = list(zip(self.marks, self.marks[1:], strict=False))
        seconds = [after[0] - before[0] for before, after in pairs]
        processor_seconds = [after[1] - before[1] for before, after in pairs]
        return {
            "losses": losses,
            "useful_tokens": useful,
            "seconds": seconds,
            "processor_seconds": processor_seconds,
            "peak_bytes": peak_bytes(),
            "peak_bytes_before_training": self.loaded_bytes,
            "processor_share": sum(processor_seconds) / sum(seconds) / threads,
        }


def peak_bytes() -> int:
    """The most memory allocated on the GPU, or this process ever had resident. (``ru_maxrss`` begins with the parent's.)"""
    import torch

    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM"))
    return int(line.split()[1]) * 1024


def train_qlora(settings: dict[str, Any], folder: Path, dtype: str) -> dict[str, Any]:
    import torch

    from qlora.data.packing import Row
    from qlora.methods.base import apply_method
    from qlora.residence.load import load_base
    from qlora.training.loop import Trainer

    plan = recipe(settings, dtype)
    model = apply_method(load_base(plan.model), plan.method, plan.training.seed)
    rows = [
        Row(row["ids"], row["labels"], row["positions"], tuple(range(int((row["positions"] == 0).sum()))))
        for row in read_rows(folder / "packed.npz")
    ]
    trainer = Trainer(model, rows, plan.training)
    # the file has the rows in the order of the steps already
    trainer.rows = InOrder(rows, settings["rows"], plan.training.seed)
    clock = Clock()
    losses, useful = [], []
    for step in trainer:
        clock.mark()
        losses.append(step.loss)
        useful.append(step.tokens)
    return clock.result(losses, useful, torch.get_num_threads())


class InOrder:
    """Rows such that the trainer's own permutation takes them in the order of the file."""

    def __init__(self, rows: list[Any], batch: int, seed: int) -> None:
        from qlora.data.batches import step_rows

        order = [place for step in range(len(rows) // batch) for place in step_rows(len(rows), batch, step, seed)]
        self.rows = dict(zip(order, rows, strict=True))

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, place: int) -> Any:
        return self.rows[place]


def train_peft(
    settings: dict[str, Any], folder: Path, computes_in: str, *, padded: bool, checkpointing: bool
) -> dict[str, Any]:
    """The way the documentation of PEFT and transformers shows it."""
    import torch
    from peft import PeftModel, prepare_model_for_kbit_training
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig, Trainer, TrainerCallback, TrainingArguments

    plan = json.loads((folder / "plan.json").read_text())
    on_cpu = settings["device"] == "cpu"
    dtype = {"fp32": torch.float32, "bf16": torch.bfloat16}[computes_in]
    training, rates, pad_id = plan["training"], plan["learning_rates"], plan["pad_id"]
    model = AutoModelForCausalLM.from_pretrained(
        plan["model_folder"],
        dtype=dtype,
        quantization_config=BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=dtype,
        ),
        device_map={"": settings["device"]},
    )
    model.config.use_cache = False
    model = prepare_model_for_kbit_training(model, use_gradient_checkpointing=checkpointing)
    model = PeftModel.from_pretrained(model, folder / "adapter", is_trainable=True)
    rows = read_rows(folder / ("padded.npz" if padded else "packed.npz"))

    def collate(features: list[dict[str, Any]]) -> dict[str, Any]:
        """Padded on the right to the longest. Packed rows have positions and, as transformers wants it, no mask."""
        width = max(len(row["ids"]) for row in features)

        def stack(key: str, fill: int) -> Any:
            full = torch.full((len(features), width), fill)
            for at, row in enumerate(features):
                full[at, : len(row[key])] = torch.from_numpy(row[key])
            return full

        batch = {"input_ids": stack("ids", pad_id), "labels": stack("labels", -100)}
        lengths = torch.tensor([len(row["ids"]) for row in features])
        if padded:
            return {**batch, "attention_mask": (torch.arange(width) < lengths[:, None]).long()}
        positions = stack("positions", 0)
        for at, n in enumerate(lengths.tolist()):  # padding counts on: a restart would be one more packed example
            positions[at, n:] = positions[at, n - 1] + torch.arange(1, width - n + 1)
        return {**batch, "position_ids": positions}

    class SameRates(Trainer):  # type: ignore[misc]
        def create_scheduler(self, num_training_steps: int, optimizer: Any = None) -> Any:
            factors = [rate / training["learning_rate"] for rate in rates]
            self.lr_scheduler = torch.optim.lr_scheduler.LambdaLR(
                optimizer or self.optimizer, lambda step: factors[min(step, len(factors) - 1)]
            )
            return self.lr_scheduler

        def compute_loss(self, *args: Any, **kwargs: Any) -> Any:
            loss = super().compute_loss(*args, **kwargs)
            watch.loss += float((loss[0] if isinstance(loss, tuple) else loss).detach())
            return loss

    class Watch(TrainerCallback):  # type: ignore[misc]
        """Losses as they are (the log rounds them) and the clock."""

        loss = 0.0
        losses: list[float] = []  # noqa: RUF012
        clock: Clock

        def on_train_begin(self, *args: Any, **kwargs: Any) -> None:
            self.clock = Clock()

        def on_step_end(self, *args: Any, **kwargs: Any) -> None:
            self.clock.mark()
            self.losses.append(self.loss)
            self.loss = 0.0

    watch = Watch()
    trainer = SameRates(
        model=model,
        args=TrainingArguments(
            output_dir=str(folder / "trainer"),
            max_steps=settings["steps"],
            per_device_train_batch_size=settings["micro"],
            gradient_accumulation_steps=settings["rows"] // settings["micro"],
            learning_rate=training["learning_rate"],
            adam_beta1=training["betas"][0],
            adam_beta2=training["betas"][1],
            adam_epsilon=training["epsilon"],
            weight_decay=training["weight_decay"],
            max_grad_norm=training["max_grad_norm"] or 0.0,
            optim="adamw_torch",
            gradient_checkpointing=checkpointing,
            train_sampling_strategy="sequential",
            remove_unused_columns=False,
            dataloader_pin_memory=False,
            logging_steps=1,
            save_strategy="no",
            report_to=[],
            disable_tqdm=True,
            use_cpu=on_cpu,
            bf16=computes_in == "bf16",
        ),
        train_dataset=rows,
        data_collator=collate,
        callbacks=[watch],
    )
    trainer.train()
    batch = settings["rows"]
    useful = [sum(len(row["ids"]) for row in rows[at : at + batch]) for at in range(0, len(rows), batch)]
    return watch.clock.result(watch.losses, useful[: settings["steps"]], torch.get_num_threads())


# ---- the tables ----


def table(results: dict[str, Any]) -> str:
    versions = ", ".join(f"{name} {number}" for name, number in results["versions"].items())
    lines = [
        "# Against PEFT and the Hugging Face Trainer",
        "",
        f"`{results['command']}`",
        "",
        f"{results['date']} · {results['cpu']}, {results['threads']} threads · {versions}",
    ]
    for case, title in (
        ("same", "The same packed rows on both sides"),
        ("chat", "The same conversations, packed here and padded there"),
    ):
        if case not in results:
            continue
        settings, runs = results[case]["settings"], results[case]["runs"]
        lines += [
            "",
            f"## {title}",
            "",
            f"`{settings['data']}`, {settings['steps']} steps of {settings['rows']} rows of at most "
            f"{settings['max_length']} tokens, {settings['micro']} at once. Ours: {results[case]['decided']}.",
            "",
            "| side | tokens/s | ours is faster by | peak memory | ours takes | largest loss difference | processor share |",
            "|---|---|---|---|---|---|---|",
        ]
        ours = runs["qlora"]
        for side, theirs in runs.items():
            same = side != "qlora"
            difference = max(
                abs(a - b)
                # with ours in the same dtype, where that is measured
                for x, y in zip(runs.get(f"qlora, {dtype_of(side)}", ours), theirs, strict=True)
                for a, b in zip(x["losses"], y["losses"], strict=True)
            )
            lines.append(
                f"| {side} | {speed(theirs):.0f} | {f'{speed(ours) / speed(theirs):.2f}×' if same else ''} "
                f"| {peak(theirs) / 2**20:.0f} MiB | {f'{peak(ours) / peak(theirs):.2f}×' if same else ''} "
                f"| {f'{difference:.1e}' if same and case == 'same' else ''} "
                f"| {statistics.mean(run['processor_share'] for run in theirs):.0%} |"
            )
    lines += [
        "",
        "tokens/s: of the median step, padding left out; the median of the repeats. Peak memory: of the whole process, "
        "imports and loading included, on a CPU; allocated on a GPU. Processor share: how much of its threads' time a side got; both ran on the same "
        "machine in turns.",
    ]
    return "\n".join(lines) + "\n"


def speed(runs: list[Any]) -> float:
    return statistics.median(
        statistics.median(n / s for n, s in zip(run["useful_tokens"], run["seconds"], strict=True)) for run in runs
    )


def peak(runs: list[Any]) -> float:
    return statistics.median(run["peak_bytes"] for run in runs)


def gpu_name() -> str:
    import torch

    return str(torch.cuda.get_device_name())


def cpu_name() -> str:
    names = [
        line.split(":")[1].strip() for line in Path("/proc/cpuinfo").read_text().splitlines() if "model name" in line
    ]
    return f"{names[0]}, {len(names)} cores" if names else platform.processor()


if __name__ == "__main__":
    main()
