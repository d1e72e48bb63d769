"""Is a resumed run the same run? Every method with every optimizer in every placement, bit for bit.

    straight    step 1 … step 5                                                       ► checkpoint, losses
    broken      step 1 … step k, saved ┊ base, adapter, trainer anew, loaded, … 5     ► checkpoint, losses     equal?

Dropout is on, a held-out loss is measured in between, and rows are packed in half of the cells. With 5 rows by 2 an epoch has
three steps, the last one short. A run is broken in the middle of an epoch, at its last step, or twice.
"""

from __future__ import annotations

import gc
import shutil
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from itertools import product
from pathlib import Path
from typing import Any

import numpy
import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from benchmarks.survive.size import Size
from qlora import recipe as config
from qlora.data import IGNORE_INDEX, Row
from qlora.data.examples import make_example
from qlora.data.packing import make_rows
from qlora.errors import InputError
from qlora.evaluation import score
from qlora.methods import apply_method
from qlora.recipe import MemorySection, ModelSection, TrainingSection
from qlora.residence.load import load_base
from qlora.training import Trainer

VOCABULARY = 96
STEPS = 5
# 32 × 128 = 64 × 64 = 4,096 values and more have 8-bit state
TARGETS = ("q_proj", "v_proj", "down_proj")
HALF: dict[str, Any] = {"r": 32, "alpha": 32, "dropout": 0.1, "target_modules": TARGETS}
FEW: dict[str, Any] = {"r": 4, "target_modules": TARGETS}
ADAPTER: dict[str, Any] = {"size": 64, "dropout": 0.1}

METHODS: dict[str, Any] = {
    "lora": config.LoRA(**HALF),
    "lora, rslora, two learning rates": config.LoRA(**HALF, rslora=True, learning_rate_ratio=4.0),
    "lora, pissa": config.LoRA(**HALF, init="pissa"),
    "lora, loftq": config.LoRA(**HALF, init="loftq"),
    "lora, eva": config.LoRA(**FEW, dropout=0.1, init="eva"),
    "dora": config.DoRA(**HALF),
    "adalora": config.AdaLoRA(r=16, initial_r=32, alpha=32, dropout=0.1, target_modules=TARGETS),
    "bottleneck, houlsby": config.Bottleneck(form="houlsby", **ADAPTER),
    "bottleneck, lin": config.Bottleneck(form="lin", **ADAPTER),
    "bottleneck, pfeiffer": config.Bottleneck(form="pfeiffer", **ADAPTER),
    "bottleneck, parallel": config.Bottleneck(form="parallel", scale=4.0, **ADAPTER),
    "prompt_tuning": config.PromptTuning(tokens=4),
    "p_tuning": config.PTuning(tokens=4, hidden_size=64),
    "prefix_tuning": config.PrefixTuning(tokens=4),
    "prefix_tuning, projected": config.PrefixTuning(tokens=4, projection_size=64),
    "ia3": config.IA3(),
    "bitfit": config.BitFit(new_biases=True),
    "full": config.Full(),
    "modules": config.Modules(modules=("layers.1.mlp", "norm")),
    "modules, head": config.Modules(modules=("lm_head",)),
    "new_tokens": config.NewTokens(tokens=("<tool>", "</tool>")),
    "lora + bottleneck": config.Combined(parts=(config.LoRA(**HALF), config.Bottleneck(**ADAPTER))),
    "lora + prompt_tuning": config.Combined(parts=(config.LoRA(**FEW), config.PromptTuning(tokens=3))),
    "lora + modules + new_tokens": config.Combined(
        parts=(config.LoRA(**FEW), config.Modules(modules=("norm",)), config.NewTokens(tokens=("<tool>",)))
    ),
}
OPTIMIZERS = ("adamw", "adamw_8bit", "paged_adamw", "paged_adamw_8bit")
# where things are: (memory, training)
PLACEMENTS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "resident": ({}, {}),
    "streamed from disk": ({"layers": "streamed", "tier": "disk"}, {}),
    "half streamed": ({"layers": 1, "tier": "disk"}, {}),
    "layer inputs on disk": ({"layer_inputs": "disk"}, {}),
    "embedding and head on the host": ({"embedding": "host", "head": "host"}, {}),
    "optimizer in backward": ({}, {"optimizer_in_backward": True, "max_grad_norm": None}),
}
BROKEN: dict[str, tuple[int, ...]] = {"mid-epoch": (4,), "end of an epoch": (3,), "twice": (1, 3)}


@dataclass(frozen=True)
class Cell:
    """One run of the matrix, by the names above."""

    method: str
    optimizer: str
    placement: str
    packing: bool
    broken_at: str


def run(place: Path, size: Size, say: Callable[[str], None]) -> list[dict[str, Any]]:
    """Every cell's row: what it is, and ``bitwise``: True, False, or ``refused: <sentence>`` where qlora refuses it.

    ``differs`` names what was not equal, ``eight_bit`` how many tensors of the optimizer's state have 8 bits.
    """
    base = write_base(place / "base")
    chosen, begin, rows = size.of(few(), every()), time.perf_counter(), []
    for number, cell in enumerate(chosen, start=1):
        rows.append(try_cell(base, place / "runs", cell))
        if number % 25 == 0 or number == len(chosen):
            gc.collect()
            broken = sum(row["bitwise"] is False for row in rows)
            say(f"resume: {number} of {len(chosen)} cells, {broken} differ, {time.perf_counter() - begin:.0f} s")
    return rows


def every() -> list[Cell]:
    """All methods × optimizers × placements. Packing and where the run is broken take turns, so that every pair is there."""
    ways = list(product((True, False), BROKEN))
    return [
        Cell(method, optimizer, placement, *ways[(m + o + p) % len(ways)])
        for (m, method), (o, optimizer), (p, placement) in product(
            enumerate(METHODS), enumerate(OPTIMIZERS), enumerate(PLACEMENTS)
        )
    ]


def few() -> list[Cell]:
    """Every method once, and every pair of optimizer, placement, packing and where the run is broken."""
    ways = list(product((True, False), BROKEN))
    placed = list(product(enumerate(OPTIMIZERS), enumerate(PLACEMENTS)))
    cells = []
    for number, method in enumerate(METHODS):
        (o, optimizer), (p, placement) = placed[number % len(placed)]
        cells.append(Cell(method, optimizer, placement, *ways[(2 * o + p) % len(ways)]))
    return cells


def try_cell(base: Path, place: Path, cell: Cell) -> dict[str, Any]:
    """The row of one cell, measured in ``place``, which is emptied first."""
    row: dict[str, Any] = {**asdict(cell), "bitwise": False, "differs": "", "eight_bit": 0}
    shutil.rmtree(place, ignore_errors=True)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        try:
            straight = trainer_for(base, place / "straight", cell)
        except InputError as error:
            return {**row, "bitwise": f"refused: {error}".replace(f"'{base}'", "the base")}
        expected = take(straight, STEPS)
        wanted = files_of(straight.save())

        trainer, found = trainer_for(base, place / "broken", cell), []
        for number, at in enumerate(BROKEN[cell.broken_at]):
            found += take(trainer, at)
            score(trainer.model, trainer.rows[:2])
            trainer.save()
            del trainer  # and with it base, adapter and optimizer
            torch.manual_seed(90 + number)
            trainer = trainer_for(base, place / "broken", cell, again=True)
        found += take(trainer, STEPS)
        files = files_of(trainer.save())
    differs = [name for name in sorted({*wanted, *files}) if wanted.get(name) != files.get(name)]
    differs += [f"step {step[0]}" for step, other in zip(expected, found, strict=True) if step != other]
    states = straight.optimizer.state.values()
    row["eight_bit"] = sum(v.dtype == torch.uint8 for state in states for v in state.values() if torch.is_tensor(v))
    return {**row, "bitwise": not differs, "differs": ", ".join(differs)}


def trainer_for(base: Path, place: Path, cell: Cell, again: bool = False, **training: Any) -> Trainer:
    """A cell's trainer as a process would make it, with everything from the disk; ``again``: to go on where it was saved."""
    memory, way = PLACEMENTS[cell.placement]
    section, cache = METHODS[cell.method], str(base.with_name("cache"))
    quantization = "none" if cell.method == "full" else "nf4"
    where = MemorySection(**memory, cache=cache)
    frozen = load_base(
        ModelSection(name=str(base), quantization=quantization, compute_dtype="fp32"), torch.device("cpu"), memory=where
    )
    model = apply_method(frozen, section, values_follow=again)
    settings: dict[str, Any] = {
        "batch_size": 2, "micro_batch_size": 1, "steps": STEPS, "learning_rate": 1e-2, "optimizer": cell.optimizer,
        "schedule": "cosine", "warmup_fraction": 0.2, "weight_decay": 0.1, "keep_checkpoints": 1, **way, **training,
    }  # fmt: skip
    trainer = Trainer(model, rows_for(section, cell.packing), TrainingSection(**settings), place, where)
    if again:
        lost = trainer.load_newest()
        if lost:
            raise AssertionError(f"A checkpoint that nobody touched is damaged: {lost}")
    else:
        model.prepare(trainer.batches())
    return trainer


def take(trainer: Trainer, last: int) -> list[tuple[Any, ...]]:
    """Steps up to number ``last``: what two runs of the same steps must share to the last bit."""
    steps = []
    while trainer.step_number < last:
        step = next(trainer)
        steps.append((step.number, step.loss, step.grad_norm, step.learning_rate, step.epoch, step.target_tokens))
    return steps


def files_of(folder: Path) -> dict[str, bytes]:
    """Every file of a checkpoint: adapter, method state, optimizer state, step, checksums."""
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def rows_for(section: Any, packing: bool, count: int = 5) -> list[Row]:
    """Rows of 3 to 10 tokens, a random part of them targets; two or three examples to a packed one.

    What a method gave an embedding of its own is said in each.
    """
    random = numpy.random.default_rng(4)
    examples = []
    for _ in range(4 * count):
        length = int(random.integers(3, 11))
        trained = random.random(length) < 0.6
        trained[1] = True
        examples.append(make_example(random.integers(3, VOCABULARY, length), trained))
    rows = make_rows(examples, 20, packing)[:count]
    new = sum(len(part.tokens) for part in config.parts_of(section) if isinstance(part, config.NewTokens))
    return [_spoken(row, new) for row in rows] if new else rows


def _spoken(row: Row, new: int) -> Row:
    """``row`` with each third token one of ``new`` behind the vocabulary."""
    ids = row.ids.copy()
    ids[1::3] = VOCABULARY + numpy.arange(len(ids[1::3])) % new
    return replace(row, ids=ids, labels=numpy.where(row.labels == IGNORE_INDEX, row.labels, ids))


def write_base(folder: Path) -> Path:
    """A random Llama of two layers with a tokenizer, its weights large enough that what is lost of them shows."""
    sizes: dict[str, Any] = {
        "vocab_size": VOCABULARY, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2,
        "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 64, "bos_token_id": 1,
        "eos_token_id": 2, "pad_token_id": 0, "initializer_range": 0.08,
    }  # fmt: skip
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        LlamaForCausalLM(LlamaConfig(**sizes)).save_pretrained(folder)
    words = Tokenizer(WordLevel({f"w{number}": number for number in range(VOCABULARY)}, unk_token="w3"))
    words.pre_tokenizer = Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=words, pad_token="w0", bos_token="w1", eos_token="w2").save_pretrained(
        folder
    )
    return folder
