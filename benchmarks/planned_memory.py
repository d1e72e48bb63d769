"""What the plan says a step takes, beside what it takes: families, methods and arrangements, on this machine's CPU.

    python benchmarks/planned_memory.py [--only TEXT] [--tokens 256] [--layers 6] [--out FOLDER]
    python benchmarks/planned_memory.py --tiny          # rows of 64 tokens, three layers; a minute

Random models of a few layers, in NF4, are planned from their shapes on the meta device and then trained for two steps; what
torch allocates in the second is counted by its profiler. Real widths (7B and 70B) have no memory here: their whole step runs
on fake tensors with every layer, against the plan that ran one layer of each kind. Prints a table of errors, of what comes
and goes in a step: weights and moments are counted exactly and would make every error smaller. ``--out`` keeps
planned_memory.md and planned_memory.json, with versions.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.profiler import ProfilerActivity, profile
from transformers import (
    AutoModelForCausalLM,
    Gemma2Config,
    Gemma3TextConfig,
    LlamaConfig,
    MistralConfig,
    Qwen2Config,
    Qwen3Config,
)

from qlora import recipe as config
from qlora.data.packing import Row
from qlora.machine.device import versions
from qlora.machine.disk import bytes_text
from qlora.methods.base import AdaptedModel, apply_method
from qlora.model.base import Base
from qlora.model.config import Scheme
from qlora.model.in_memory import as_base, on_meta, quantise
from qlora.model.loss import head_of, hidden_states, summed_loss
from qlora.model.skeleton import empty_linears, empty_model
from qlora.planning.dry_run import Ledger
from qlora.planning.few_layers import shortened
from qlora.planning.memory import estimate
from qlora.recipe import Combined, LoRA, MemorySection, ModelSection, TrainingSection
from qlora.residence.ends import embedding_on_host, head_on_host
from qlora.residence.layers import wrap_layers
from qlora.training.loop import Trainer

CPU, GPU = torch.device("cpu"), torch.device("cuda")
SIZES: dict[str, Any] = {
    "hidden_size": 256,
    "intermediate_size": 768,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "vocab_size": 4000,
    "max_position_embeddings": 4096,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
WINDOW = {"head_dim": 32, "sliding_window": 128}
FAMILIES: dict[str, Callable[..., Any]] = {
    "Llama": LlamaConfig,
    "Qwen 2": Qwen2Config,
    "Qwen 3": lambda **sizes: Qwen3Config(head_dim=32, **sizes),
    "Mistral": lambda **sizes: MistralConfig(sliding_window=128, **sizes),
    "Gemma 2": lambda **sizes: Gemma2Config(**WINDOW, **sizes),
    "Gemma 3": lambda **sizes: Gemma3TextConfig(**WINDOW, **sizes),
}
METHODS: dict[str, tuple[Any, str]] = {
    "LoRA, dropout": (LoRA(dropout=0.1), "nf4"),
    "DoRA": (config.DoRA(), "nf4"),
    "AdaLoRA": (config.AdaLoRA(), "nf4"),
    "bottleneck, Houlsby": (config.Bottleneck(form="houlsby"), "nf4"),
    "bottleneck, parallel": (config.Bottleneck(form="parallel"), "nf4"),
    "prompt tuning": (config.PromptTuning(tokens=8), "nf4"),
    "P-tuning": (config.PTuning(tokens=8, hidden_size=64), "nf4"),
    "prefix tuning": (config.PrefixTuning(tokens=8), "nf4"),
    "prefix tuning, projected": (config.PrefixTuning(tokens=8, projection_size=64), "nf4"),
    "IA3": (config.IA3(), "nf4"),
    "BitFit": (config.BitFit(new_biases=True), "nf4"),
    "full": (config.Full(), "none"),
    "one MLP and the norms": (config.Modules(modules=("layers.1.mlp", "norm")), "nf4"),
    "the head": (config.Modules(modules=("lm_head",)), "nf4"),
    "LoRA and a prompt": (Combined(parts=(LoRA(), config.PromptTuning(tokens=8))), "nf4"),
}
ARRANGEMENTS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "layer-major": ({}, {}),
    "packed": ({}, {"packed": True}),
    "micro-batches of two": ({"micro_batch_size": 2}, {}),
    "micro-batch-major": ({"accumulation": "micro_batch_major"}, {}),
    "no checkpointing": ({"gradient_checkpointing": False, "batch_size": 1}, {}),
    "chunks of 64": ({"loss_chunk": 64}, {}),
    "tiles of 64": ({}, {"mlp_tile": 64}),
    "head and embedding on the host": ({"micro_batch_size": 4}, {"embedding": "host", "head": "host"}),
    "8-bit AdamW": ({"optimizer": "adamw_8bit"}, {}),
}
LARGE: dict[str, dict[str, Any]] = {
    "7B": {"hidden_size": 4096, "intermediate_size": 11008, "num_attention_heads": 32, "vocab_size": 32000},
    "8B": {"hidden_size": 4096, "intermediate_size": 14336, "num_attention_heads": 32, "num_key_value_heads": 8,
           "vocab_size": 128256},
    "70B": {"hidden_size": 8192, "intermediate_size": 28672, "num_attention_heads": 64, "num_key_value_heads": 8,
            "vocab_size": 128256},
}  # fmt: skip
BESIDE = ("layer-major", "micro-batch-major", "no checkpointing", "tiles of 64")  # what large shapes are looked at in


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="", help="of the lines, those with this text in them")
    parser.add_argument("--tokens", type=int, default=256, help="tokens in a row")
    parser.add_argument("--layers", type=int, default=6)
    parser.add_argument("--tiny", action="store_true", help="short rows and few layers")
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    tokens, layers = (64, 3) if options.tiny else (options.tokens, options.layers)

    found: list[dict[str, Any]] = []
    print(HEAD)
    for names, measure in [*small_lines(tokens, layers), *large_lines(2048, layers)]:
        if options.only.lower() in " ".join(names).lower():
            planned, taken = measure()
            found.append(
                {"model": names[0], "method": names[1], "arrangement": names[2], "planned": planned, "taken": taken}
            )
            print(line(found[-1]), flush=True)
    errors = [abs(one["planned"] / one["taken"] - 1) for one in found]
    end = f"{len(found)} lines; the largest error is {max(errors, default=0):.1%}, the mean {numpy.mean(errors or [0]):.2%}."
    print(f"\n{end}")
    if options.out is not None:
        options.out.mkdir(parents=True, exist_ok=True)
        values = {"tokens": tokens, "layers": layers, "lines": found, "versions": versions()}
        (options.out / "planned_memory.json").write_text(json.dumps(values, indent=2) + "\n", encoding="utf-8")
        text = "\n".join([HEAD, *map(line, found), "", end, ""])
        (options.out / "planned_memory.md").write_text(text, encoding="utf-8")


HEAD = "| model | method | arrangement | planned | taken | error |\n|---|---|---|---|---|---|"


def line(one: dict[str, Any]) -> str:
    """A row of the table."""
    shown = [one["model"], one["method"], one["arrangement"], bytes_text(one["planned"]), bytes_text(one["taken"])]
    return f"| {' | '.join(shown)} | {one['planned'] / one['taken'] - 1:+.2%} |"


Line = tuple[tuple[str, str, str], Callable[[], tuple[int, int]]]


def small_lines(tokens: int, layers: int) -> Iterator[Line]:
    """Every family in four arrangements, every arrangement, and every method in two."""
    chosen: list[tuple[str, str, str]] = []
    for family in FAMILIES:
        chosen += [(family, "LoRA", way) for way in ("packed", "micro-batch-major", "no checkpointing", "tiles of 64")]
    for way in ARRANGEMENTS:
        chosen += [(family, "LoRA", way) for family in ("Llama", "Gemma 2")]
    for method in METHODS:
        chosen += [("Llama", method, way) for way in ("layer-major", "no checkpointing")]
    for names in dict.fromkeys(chosen):
        yield names, partial(step_of, *names, tokens, layers)


def large_lines(tokens: int, layers: int) -> Iterator[Line]:
    """Real widths on fake tensors."""
    for kind in LARGE:
        for way in BESIDE:
            names = f"{kind} shapes, {layers} layers", "LoRA", f"{way}, fake"
            yield names, partial(fake_step, kind, way, tokens, layers)


def settings(way: str) -> tuple[TrainingSection, MemorySection, bool]:
    """The recipe's sections of an arrangement, and whether rows are packed."""
    training, memory = ARRANGEMENTS[way]
    section = TrainingSection(**{"batch_size": 4, "micro_batch_size": 1, "steps": 3, **training})
    return section, MemorySection(**{k: v for k, v in memory.items() if k != "packed"}), "packed" in memory


def step_of(family: str, method: str, way: str, tokens: int, layers: int) -> tuple[int, int]:
    """(planned, measured) bytes of a step."""
    training, memory, packed = settings(way)
    section, quantization = METHODS.get(method, (LoRA(), "nf4"))
    made = AutoModelForCausalLM.from_config(FAMILIES[family](num_hidden_layers=layers, **SIZES), dtype=torch.float32)
    model: Any = made.eval().requires_grad_(False)
    if quantization != "none":
        quantise(model, quantization)
    bare = apply_method(as_base(on_meta(model)), section)
    if memory.head == "host":
        head_on_host(model)
    if memory.embedding == "host":
        embedding_on_host(model)
    adapted = apply_method(as_base(model), section)
    planned = estimate(bare, training, tokens + adapted.virtual_tokens, CPU, packed, memory)
    trainer = Trainer(adapted, rows(adapted, training.batch_size, tokens, packed), training, memory=memory)
    next(trainer)  # the optimizer's state is made by the first step
    return planned.step, peak_of(lambda: next(trainer))


def rows(model: AdaptedModel, count: int, length: int, packed: bool) -> list[Row]:
    """Random tokens, in rows of one example or of two."""
    made = []
    for number in range(count):
        ids = numpy.random.default_rng(number).integers(3, SIZES["vocab_size"], length).astype(numpy.int32)
        positions = numpy.arange(length, dtype=numpy.int32) % (length // 2 if packed else length)
        made.append(Row(ids, ids.copy(), positions, (2 * number, 2 * number + 1) if packed else (number,)))
    return made


def peak_of(work: Callable[[], object]) -> int:
    """The most bytes that torch's allocator held at one time during ``work``, beyond what it held before."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        work()
    events = [event for event in profiler.profiler.kineto_results.events() if event.name() == "[memory]"]
    live = peak = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        live += event.nbytes()
        peak = max(peak, live)
    return peak


def fake_step(kind: str, way: str, tokens: int, layers: int) -> tuple[int, int]:
    """(planned from one layer of each kind, counted over all layers, micro-batches, tiles and chunks) bytes of a step."""
    training, memory, _ = settings(way)
    tile = None if memory.mlp_tile is None else tokens // 2
    shape = LlamaConfig(num_hidden_layers=layers, max_position_embeddings=131072, **LARGE[kind])
    bare: Any = empty_model(shape, ModelSection(name=kind), torch.bfloat16)
    empty_linears(bare, Scheme("nf4", True, False), torch.bfloat16, set())
    bare.tie_weights()
    bare.requires_grad_(False)
    base = Base(bare, None, Path(), kind, None, "nf4", True, torch.device("meta"), torch.bfloat16)
    adapted = apply_method(base, LoRA(r=16, adapter_dtype="bf16"))
    planned = estimate(adapted, training, tokens, GPU, memory=MemorySection(mlp_tile=tile))
    together = training.layer_major
    at_once = training.batch_size if together else training.micro_batch_size
    with FakeTensorMode(allow_non_fake_inputs=True):
        model: Any = shortened(adapted, packed=False, more=layers)[0].model
        if training.recompute != "none":
            wrap_layers(model, training.micro_batch_size, mlp_tile=tile)
        model.train()
        ledger = Ledger(model, "cuda")
        with ledger:
            for _ in range(training.batch_size // at_once):
                ids = torch.zeros(at_once, tokens, dtype=torch.long)
                batch = {"input_ids": ids, "position_ids": torch.arange(tokens).repeat(at_once, 1)}
                hidden = hidden_states(model, batch).flatten(0, 1)
                places = torch.arange(len(hidden))
                loss = summed_loss(hidden, head_of(model), ids.flatten(), places, training.loss_chunk)
                del hidden, places
                loss.backward()  # type: ignore[no-untyped-call]
                del loss, batch, ids
    return planned.step, ledger.peak


if __name__ == "__main__":
    main()
