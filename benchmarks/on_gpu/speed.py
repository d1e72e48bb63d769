"""8B shapes with random 4-bit weights: a training step of ours and of PEFT with bitsandbytes, on the same weights.

    python -m benchmarks.on_gpu.speed --side qlora|peft [--only NAME …] [--profile FILE] [--tiny]

Both sides: LoRA r 16 at every linear of every layer, AdamW in 8 bits, bf16, clipped at norm 1, eight thousand tokens a step.
PEFT runs as its documentation has it (fp32 norms and adapters, autocast) and in what is faster: everything in bf16, more
rows at once, without checkpointing. The loss of the first step is the same on both sides. A table row each; the share is
that of the card's own rate in a product of 8,192³, counting the products alone (N weights: 2 N forward, 2 N backward, 2 N
where the forward is computed again; the causal half of attention).
"""

from __future__ import annotations

import argparse
import gc
import time
from collections.abc import Callable, Iterator
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple

import bitsandbytes
import torch

from benchmarks.on_gpu.shapes import attend, llama, operators, planned, random_base, rows
from qlora.data.packing import Row
from qlora.machine.device import versions
from qlora.methods.base import apply_method
from qlora.model.nf4 import Linear4bit
from qlora.recipe import LoRA, MemorySection, TrainingSection
from qlora.training.loop import Trainer

LINEARS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
STEPS = 3
G = 2**30


class Case(NamedTuple):
    """Rows of a step, and how they are computed."""

    rows: int
    length: int
    examples: int = 1
    at_once: int = 1
    recompute: bool = True
    more: dict[str, Any] = {}  # noqa: RUF012 (a tuple; nobody changes it)


def ours() -> dict[str, Case]:
    return {
        "plain": Case(4, 2048),
        "plain, not fused": Case(4, 2048, more={"whose": "plain"}),
        "packed, 4 examples a row": Case(4, 2048, 4),
        "packed, not fused": Case(4, 2048, 4, more={"whose": "plain"}),
        "packed, with a mask": Case(4, 2048, 4, more={"masked": True}),
        "4 rows at once": Case(4, 2048, at_once=4),
        "plain, micro-batch-major": Case(4, 2048, more={"accumulation": "micro_batch_major"}),
        "no checkpointing": Case(4, 2048, recompute=False),
        "8k": Case(1, 8192),
        "8k packed, 16 examples": Case(1, 8192, 16),
        "8k packed, not fused": Case(1, 8192, 16, more={"whose": "plain"}),
        "8k packed, with a mask": Case(1, 8192, 16, more={"masked": True}),
        # last, as Liger's rotary positions stay
        **({"plain, Liger's kernels": Case(4, 2048, more={"whose": "liger"})} if find_spec("liger_kernel") else {}),
    }


def theirs() -> dict[str, Case]:
    return {
        "as documented": Case(4, 2048, more={"documented": True}),
        "bf16": Case(4, 2048),
        "bf16, 4 rows at once": Case(4, 2048, at_once=4),
        "bf16, no checkpointing": Case(4, 2048, recompute=False),
        "bf16, packed, 4 examples a row": Case(4, 2048, 4),
        "bf16, 8k": Case(1, 8192),
    }


class Bench:
    """A device, a model's configuration and how a row of the table is printed."""

    def __init__(self, tiny: bool) -> None:
        self.cuda = torch.cuda.is_available()
        self.device = torch.device("cuda", 0) if self.cuda else torch.device("cpu")
        self.dtype = torch.bfloat16 if self.cuda else torch.float32
        self.scale = 32 if tiny else 1  # rows that much shorter
        self.config = llama("tiny" if tiny else "8b", 8192 // self.scale)
        self.rate = self._matrix_rate(1024 if tiny else 8192)
        print(f"\n{versions()}, products of this size alone: {self.rate / 1e12:.3g} TFLOP/s in {self.dtype}")
        print(
            "\n| what | tokens a step | s a step | tokens/s | share | allocated GiB | reserved GiB | planned GiB | retries | first loss |"
        )
        print("|---|--:|--:|--:|--:|--:|--:|--:|--:|--:|", flush=True)  # fmt: skip

    def sync(self) -> None:
        if self.cuda:
            torch.cuda.synchronize()

    def timed(self, call: Callable[[], Any], times: int = STEPS) -> float:
        """The median of so many calls, in seconds."""
        seconds = []
        for _ in range(times):
            self.sync()
            begin = time.perf_counter()
            call()
            self.sync()
            seconds.append(time.perf_counter() - begin)
        return sorted(seconds)[len(seconds) // 2]

    def _matrix_rate(self, size: int) -> float:
        a, b = (torch.randn(size, size, device=self.device, dtype=self.dtype) for _ in range(2))
        a @ b
        return 2 * size**3 / self.timed(lambda: a @ b, 10)

    def rows(self, case: Case) -> list[Row]:
        return rows(self.config, case.rows, case.length // self.scale, case.examples)

    def measure(self, name: str, case: Case, step: Callable[[], float], planned: int | None = None) -> None:
        """Run a first step, then three that are timed, and print the row. ``step`` gives the loss."""
        loss = step()
        if self.cuda:
            torch.cuda.reset_peak_memory_stats()
        seconds = self.timed(step)
        stats = torch.cuda.memory_stats() if self.cuda else {}
        tokens = case.rows * case.length // self.scale
        share = tokens * self.flops(case) / seconds / self.rate
        print(
            f"| {name} | {tokens:,} | {seconds:.3f} | {tokens / seconds:,.0f} | {share:.0%} "
            f"| {stats.get('allocated_bytes.all.peak', 0) / G:.2f} | {stats.get('reserved_bytes.all.peak', 0) / G:.2f} "
            f"| {'' if planned is None else f'{planned / G:.2f}'} | {stats.get('num_alloc_retries', 0)} | {loss:.5f} |",
            flush=True,
        )

    def flops(self, case: Case) -> float:
        """Of the products, a token."""
        c = self.config
        width = c.hidden_size // c.num_attention_heads
        layer = (
            c.hidden_size * width * 2 * (c.num_attention_heads + c.num_key_value_heads)
            + 3 * c.hidden_size * c.intermediate_size
        )
        pairs = 2 * c.num_attention_heads * width * case.length // case.examples // self.scale
        passes = 3 if case.recompute else 2
        return c.num_hidden_layers * (2 * passes * layer + (passes + 1) * pairs) + 4 * c.vocab_size * c.hidden_size  # fmt: skip

    def free(self) -> None:
        gc.collect()
        if self.cuda:
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()


def qlora_side(bench: Bench, only: list[str], profile_file: Path | None) -> None:
    model = apply_method(random_base(bench.config, MemorySection(), bench.device, bench.dtype), LoRA(r=16, alpha=32))
    kept = "bf16" if bench.cuda else "fp32"
    for name, case in chosen(ours(), only):
        more = dict(case.more)
        masked = more.pop("masked", False)
        whose = more.pop("whose", "ours")
        attention = attend(model.model, bench.dtype, bench.device, masked)
        operators(model.model, bench.dtype, bench.device, whose)
        section = TrainingSection(
            batch_size=case.rows, micro_batch_size=case.at_once, steps=1000, optimizer="adamw_8bit",
            recompute="all" if case.recompute else "none", **more,
        )  # fmt: skip
        need = planned(bench.config, LoRA(r=16, adapter_dtype=kept), section, MemorySection(),
                       case.length // bench.scale, bench.device, bench.dtype, case.examples > 1, masked, whose)  # fmt: skip
        try:
            trainer: Any = Trainer(model, bench.rows(case), section)
            step: Any = partial(next, trainer)
            bench.measure(f"qlora, {name} ({attention})", case, lambda: step().loss, need)  # noqa: B023
            if profile_file and name in ("plain", "plain, not fused", "packed, 4 examples a row"):
                profile(bench, name, step, profile_file)
        except Exception as error:
            print(f"| qlora, {name} | {type(error).__name__}: {str(error)[:150]!r} |", flush=True)
        trainer = step = None
        bench.free()


def profile(bench: Bench, name: str, step: Callable[[], Any], file: Path) -> None:
    """A step's kernels by time, and how many were launched."""
    from torch.profiler import ProfilerActivity, profile

    kinds = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if bench.cuda else [])]
    bench.sync()
    begin = time.perf_counter()
    with profile(activities=kinds) as found:
        step()
        bench.sync()
    wall = time.perf_counter() - begin
    events = found.key_averages()
    kernels = sorted(
        (e for e in events if str(e.device_type).endswith("CUDA")), key=lambda e: -e.self_device_time_total
    )
    busy = sum(e.self_device_time_total for e in kernels) / 1e6
    with file.open("a", encoding="utf-8") as out:
        print(
            f"{name}: {wall:.3f} s under the profiler, kernels {busy:.3f} s, launches {sum(e.count for e in kernels):,}",
            file=out,
        )
        calls = {e.key: e.count for e in events if "ynchronize" in e.key or e.key in ("aten::item", "aten::nonzero")}
        print(f"synchronisations {calls}", file=out)
        for e in kernels[:40]:
            print(f"{e.self_device_time_total / 1e3:10.2f} ms {e.count:6d} x  {e.key[:150]}", file=out)


def peft_side(bench: Bench, only: list[str]) -> None:
    from peft import LoraConfig, get_peft_model

    for name, case in chosen(theirs(), only):
        documented = case.more.get("documented", False)
        model = bitsandbytes_model(bench, documented)
        if case.recompute:
            model.enable_input_require_grads()
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": True})
        config = LoraConfig(r=16, lora_alpha=32, target_modules=LINEARS, task_type="CAUSAL_LM")
        model = get_peft_model(model, config, autocast_adapter_dtype=documented)
        if not documented:
            for values in model.parameters():
                if values.requires_grad:
                    values.data = values.data.to(bench.dtype)
        model.train()
        trained = [values for values in model.parameters() if values.requires_grad]
        optimizer = bitsandbytes.optim.AdamW8bit(trained, lr=2e-4)
        data = bench.rows(case)

        def step(
            model: Any = model, trained: Any = trained, optimizer: Any = optimizer, data: Any = data, case: Case = case,
            documented: bool = documented,
        ) -> float:  # fmt: skip
            total = torch.zeros((), device=bench.device)
            for start in range(0, case.rows, case.at_once):
                part = data[start : start + case.at_once]
                ids, labels, positions = (
                    torch.stack([torch.from_numpy(getattr(row, name)).long() for row in part]).to(bench.device)
                    for name in ("ids", "labels", "positions")
                )
                with torch.autocast(bench.device.type, dtype=torch.bfloat16, enabled=documented and bench.cuda):
                    loss = model(input_ids=ids, position_ids=positions, labels=labels).loss / (
                        case.rows // case.at_once
                    )
                loss.backward()
                total += loss.detach()
            torch.nn.utils.clip_grad_norm_(trained, 1.0)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            return total.item()

        try:
            bench.measure(f"peft, {name}", case, step)
        except Exception as error:
            print(f"| peft, {name} | {type(error).__name__}: {str(error)[:150]!r} |", flush=True)
        del model, trained, optimizer, step
        bench.free()


def bitsandbytes_model(bench: Bench, documented: bool) -> Any:
    """Our base's weights in bitsandbytes' own linears; ``documented``: as ``prepare_model_for_kbit_training`` leaves them."""
    model: Any = random_base(bench.config, MemorySection(), bench.device, bench.dtype).model
    for path, linear in list(model.named_modules()):
        if isinstance(linear, Linear4bit):
            new = bitsandbytes.nn.Linear4bit(
                linear.in_features,
                linear.out_features,
                bias=False,
                compute_dtype=bench.dtype,
                quant_type="nf4",
                device="meta",
            )
            new.weight = bitsandbytes.nn.Params4bit(
                linear.weight, requires_grad=False, quant_state=linear.quant_state(bench.dtype), blocksize=64,
                quant_type="nf4", bnb_quantized=True, module=new,
            )  # fmt: skip
            new.weight.quant_state = linear.quant_state(bench.dtype)
            model.set_submodule(path, new)
    model.is_loaded_in_4bit = model.is_quantized = True
    model.config.use_cache = False
    for values in model.parameters():
        values.requires_grad = False
        if documented and values.is_floating_point():
            values.data = values.data.float()
    return model


def chosen(cases: dict[str, Case], only: list[str]) -> Iterator[tuple[str, Case]]:
    yield from ((name, case) for name, case in cases.items() if not only or name in only)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--side", choices=["qlora", "peft"], required=True)
    parser.add_argument("--only", nargs="*", default=[])
    parser.add_argument("--profile", type=Path)
    parser.add_argument("--tiny", action="store_true")
    options = parser.parse_args()
    bench = Bench(options.tiny)
    if options.side == "qlora":
        qlora_side(bench, options.only, options.profile)
    else:
        peft_side(bench, options.only)


if __name__ == "__main__":
    main()
