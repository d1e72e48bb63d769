"""How long a step was said to take, and how long it took: qlora/planning/speed.py's prediction against training.

    python benchmarks/predicted_speed.py --out benchmarks/results
    python benchmarks/predicted_speed.py --tiny        # a random model of 10 million numbers: needs no download

The machine is measured first, within a second or two; each arrangement is predicted from shapes, then trained for a few steps
on rows of random tokens. A prediction that stays within its range says "yes" in the last column. Before and after the steps
the machine is measured again, and the ratio is taken to the mean of both, so that other work on it counts less.
"""

from __future__ import annotations

import argparse
import datetime
import statistics
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy
import torch
from tokenizers import Tokenizer, models
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

import qlora
from qlora.data.packing import Row
from qlora.machine.device import resolve_compute_dtype, resolve_device, versions
from qlora.planning.rates import measure
from qlora.planning.shapes import shapes_of
from qlora.planning.speed import step_seconds, work_of
from qlora.recipe import LoRA, MemorySection, ModelSection, TrainingSection

ARRANGEMENTS: dict[str, dict[str, Any]] = {
    "kept": {"gradient_checkpointing": False, "micro_batch_size": 2},
    "recomputed, in one": {"micro_batch_size": 4},
    "layer-major, 4 × 1": {"micro_batch_size": 1},
    "layer-major, 2 × 2": {"micro_batch_size": 2},
    "micro-batch-major, 4 × 1": {"micro_batch_size": 1, "accumulation": "micro_batch_major"},
    "streamed from the file": {"micro_batch_size": 2, "memory": {"layers": "streamed", "tier": "disk"}},
    "all but 3 layers streamed": {"micro_batch_size": 2, "memory": {"layers": 3, "tier": "disk"}},
}


@dataclass(frozen=True)
class Line:
    """One arrangement."""

    name: str
    predicted: float
    low: float
    high: float
    measured: float

    def __str__(self) -> str:
        within = "yes" if self.low <= self.measured <= self.high else "no"
        return (
            f"| {self.name} | {self.predicted:.3g} | {self.low:.3g} to {self.high:.3g} | {self.measured:.3g} | "
            f"{self.measured / self.predicted:.2f} | {within} |"
        )


def write_tiny(folder: Path) -> Path:
    """A random Llama of 10 million numbers, and a tokenizer of words without a meaning."""
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=384, intermediate_size=1024, num_hidden_layers=6, num_attention_heads=6, num_key_value_heads=2,
        vocab_size=4096,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(folder)
    words = Tokenizer(models.WordLevel({f"w{number}": number for number in range(4096)}, unk_token="w0"))
    PreTrainedTokenizerFast(tokenizer_object=words, unk_token="w0", pad_token="w0").save_pretrained(folder)
    return folder


def random_rows(count: int, length: int, vocabulary: int) -> list[Row]:
    """Rows of one example each, every token a target but the first."""
    draw = numpy.random.default_rng(0)
    positions = numpy.arange(length, dtype=numpy.int32)
    drawn = (draw.integers(3, vocabulary, length).astype(numpy.int32) for _ in range(count))
    return [Row(ids, ids.copy(), positions, (number,)) for number, ids in enumerate(drawn)]


def compared(name: str, model_name: str, device: torch.device, args: argparse.Namespace, folder: Path) -> Line:
    """Predict and train one arrangement."""
    values = dict(ARRANGEMENTS[name])
    memory = MemorySection(cache=str(folder / "cache"), **values.pop("memory", {}))
    training = TrainingSection(batch_size=args.rows, steps=args.steps + 1, **values)
    base = qlora.load_base(ModelSection(name=model_name), device, memory=memory)
    model = qlora.apply_method(base, LoRA(r=16))
    dtype = base.compute_dtype
    work = work_of(shapes_of(model), training, memory, args.length, dtype_bytes=dtype.itemsize)
    before = step_seconds(work, measure(device, dtype, folder))
    rows = random_rows(args.rows * (args.steps + 1), args.length, model.model.config.vocab_size)
    trainer = qlora.Trainer(model, rows, training, folder=folder / "run", memory=memory)
    next(trainer)  # warms up
    seconds = statistics.median(step.seconds for step in trainer)
    after = step_seconds(work, measure(device, dtype, folder))
    expected = (before.expected + after.expected) / 2
    return Line(name, expected, min(before.low, after.low), max(before.high, after.high), seconds)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--tiny", action="store_true", help="a random model of 10 million numbers instead of the default one"
    )
    parser.add_argument("--model", default=ModelSection().name, help="a model folder, or a name on the hub")
    parser.add_argument("--steps", type=int, default=3)
    parser.add_argument("--rows", type=int, default=4, help="rows a step")
    parser.add_argument("--length", type=int, default=256, help="tokens a row")
    parser.add_argument("--only", nargs="*", choices=[*ARRANGEMENTS], help="arrangements, by name")
    parser.add_argument("--out", type=Path, help="folder for the table")
    args = parser.parse_args()
    device = resolve_device()
    lines = []
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        model = str(write_tiny(folder / "model")) if args.tiny else args.model
        rates = measure(device, resolve_compute_dtype(device), folder)
        for name in args.only or ARRANGEMENTS:
            print(name, file=sys.stderr, flush=True)
            lines.append(compared(name, model, device, args, folder))
    kept = ", ".join(f"{name} {version}" for name, version in versions().items() if name in ("torch", "transformers"))
    what = "a random Llama of 10 million numbers" if args.tiny else args.model
    text = "\n".join(
        [
            "# Seconds a step, predicted and measured",
            "",
            f"{datetime.date.today()}, {rates.source.removesuffix(', measured')}, {kept}; {what}, LoRA r 16, {args.rows} rows "
            f"of {args.length} tokens a step, median of {args.steps}. Made by `python benchmarks/predicted_speed.py"
            f"{' --tiny' if args.tiny else ''} --steps {args.steps} --rows {args.rows} --length {args.length}`.",
            "" if device.type == "cuda" else "Not measured on a GPU.",
            "",
            "| arrangement | predicted, s | its range | measured, s | measured / predicted | within the range |",
            "|---|--:|--:|--:|--:|---|",
            *map(str, lines),
            "",
            "```",
            str(rates),
            "```",
            "",
        ]
    )
    print(text)
    if args.out:
        args.out.mkdir(parents=True, exist_ok=True)
        (args.out / f"{datetime.date.today()}-predicted-speed.md").write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
