"""Speed: the work of a step against what a real step does, seconds from known rates, and the published limits."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry
from transformers import LlamaConfig

from qlora.data.packing import Row
from qlora.errors import ModelError, RecipeError
from qlora.machine.cards import card
from qlora.methods.base import AdaptedModel, apply_method
from qlora.model.experts import PackedExperts
from qlora.model.in_memory import as_base, quantise
from qlora.model.nf4 import Linear4bit
from qlora.model.skeleton import any_skeleton
from qlora.planning import shapes as counts
from qlora.planning.rates import Rate, Rates, rates_of
from qlora.planning.shapes import Shapes, shapes_of
from qlora.planning.speed import Pass, Seconds, Work, step_seconds, work_of
from qlora.recipe import Full, LoRA, MemorySection, ModelSection, TrainingSection
from qlora.residence.load import load_base
from qlora.training.loop import Trainer
from tests.tiny import any_checkpoint, chat_checkpoint

CPU = torch.device("cpu")
ENDLESS = Rate(1e30, 1e30, 1e30)
ARRANGEMENTS: dict[str, dict[str, Any]] = {
    "kept": {"gradient_checkpointing": False, "micro_batch_size": 2},
    "recomputed": {"micro_batch_size": 4},
    "layer-major": {"micro_batch_size": 1},
    "micro-batch-major": {"micro_batch_size": 2, "accumulation": "micro_batch_major"},
}

MIXTURES: dict[str, dict[str, Any]] = {
    "Qwen3Moe": {"num_experts": 8, "num_experts_per_tok": 2, "moe_intermediate_size": 64},
    "Gemma4Text": {
        "enable_moe_block": True, "num_experts": 8, "top_k_experts": 2, "moe_intermediate_size": 64, "vocab_size_per_layer_input": 300,
        "hidden_size_per_layer_input": 16, "layer_types": ["sliding_attention", "full_attention"],
    },
}  # fmt: skip


def attention_flops(*tensors: Any, out_val: Any = None, times: int = 4, **_: Any) -> int:
    """Every pair of positions, for queries [B, heads, T, width], the first of four dimensions that is given."""
    batch, heads, length, width = next(t for t in tensors if isinstance(t, torch.Tensor) and t.dim() == 4).shape
    return times * batch * heads * length * length * width


FLOPS: dict[Any, Callable[..., int]] = {
    **flop_registry,
    torch.ops.aten.addmm_: flop_registry[torch.ops.aten.addmm],
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: attention_flops,
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward: partial(attention_flops, times=8),
}


class Counter(TorchDispatchMode):
    """Counts the FLOPs of every product, mostly with torch's own formulas. torch's FlopCounterMode also follows modules, which
    a recompute inside a backward confuses, and does not know these three."""

    def __init__(self) -> None:
        super().__init__()
        self.flops = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func._overloadpacket not in FLOPS:
            with self:
                parts = func.decompose(*args, **kwargs)
            if parts is not NotImplemented:
                return parts
        found = func(*args, **kwargs)
        if func._overloadpacket in FLOPS:
            self.flops += FLOPS[func._overloadpacket](*args, **kwargs, out_val=found)
        return found


@pytest.fixture(scope="module")
def deep(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Six layers, so that what the first one saves, whose input wants no gradient, is little."""
    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 6}
    return chat_checkpoint(tmp_path_factory.mktemp("deep") / "model", **sizes)


def trained(model: AdaptedModel, training: TrainingSection, length: int, **options: Any) -> Trainer:
    """A trainer that has done its first step, in which the boundary finds what it may leave out."""
    draw = numpy.random.default_rng(0)
    places = numpy.arange(length, dtype=numpy.int32)
    drawn = [draw.integers(3, 300, length).astype(numpy.int32) for _ in range(training.batch_size)]
    trainer = Trainer(model, [Row(ids, ids.copy(), places, (n,)) for n, ids in enumerate(drawn)], training, **options)
    next(trainer)
    return trainer


def llama_70b(**section: Any) -> Shapes:
    config = LlamaConfig(
        hidden_size=8192, intermediate_size=28672, num_hidden_layers=80, num_attention_heads=64, num_key_value_heads=8,
        vocab_size=128256,
    )  # fmt: skip
    base = as_base(quantise(any_skeleton(config), "nf4", compute_dtype="bf16"))
    return shapes_of(apply_method(base, LoRA(r=16, **section)))


@pytest.fixture(scope="module")
def large() -> Shapes:
    return llama_70b()


def total(work: Work, kind: str) -> float:
    """All passes' ``flops``, ``dequantised``, ``copied`` or ``read``."""
    return float(sum(getattr(one, kind) for one in work))


def weights_of(model: AdaptedModel, *parts: str) -> int:
    """Of the frozen linears with ``parts`` in their names. A recompute leaves out a layer's last product, Llama's down_proj."""
    every = model.model.named_modules()
    return sum(
        m.in_features * m.out_features
        for name, m in every
        if isinstance(m, Linear4bit) and all(part in name for part in parts)
    )


# --- how much a step does, against a real one -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "method"),
    [
        ("kept", LoRA(r=16)),
        ("layer-major", LoRA(r=16)),
        ("micro-batch-major", LoRA(r=4, target_modules=("q_proj", "v_proj"))),
        ("recomputed", Full()),
    ],
)
@pytest.mark.sampled
def test_flops_are_those_of_a_real_step(deep: Path, name: str, method: Any) -> None:
    training = TrainingSection(batch_size=4, steps=2, max_grad_norm=None, **ARRANGEMENTS[name])
    quantization = "none" if isinstance(method, Full) else "nf4"
    model = apply_method(load_base(ModelSection(name=str(deep), quantization=quantization), CPU), method)
    # the counter knows no causal attention: it counts every pair, as a mask makes the kernels do
    work = work_of(shapes_of(model), training, MemorySection(), 16, dtype_bytes=4, masked=True)
    trainer = trained(model, training, 16)
    with Counter() as counter:
        next(trainer)
    # above by the first layer's products that no gradient goes through, and the last tokens, which nothing follows
    left_out = 0 if name == "kept" or isinstance(method, Full) else 2 * weights_of(model, "down_proj") * 4 * 16
    assert 0.975 < counter.flops / (total(work, "flops") - left_out) <= 1.0


@pytest.mark.parametrize(
    ("name", "times"), [("kept", 2), ("recomputed", 1), ("layer-major", 0), ("micro-batch-major", 2)]
)
@pytest.mark.sampled
def test_dequantised_bytes_are_those_of_a_real_step(
    deep: Path, name: str, times: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    training = TrainingSection(batch_size=4, steps=2, **ARRANGEMENTS[name])
    model = apply_method(load_base(ModelSection(name=str(deep)), CPU), LoRA(r=4))
    work = work_of(shapes_of(model), training, MemorySection(), 8, dtype_bytes=4)
    trainer, made, original = trained(model, training, 8), [], Linear4bit.dequantise

    def watched(linear: Linear4bit, dtype: torch.dtype) -> torch.Tensor:
        dense = original(linear, dtype)
        made.append(dense.nbytes)
        return dense

    monkeypatch.setattr(Linear4bit, "dequantise", watched)
    next(trainer)
    first = weights_of(model, "layers.0.", "self_attn") - weights_of(
        model, "layers.0.", "o_proj"
    )  # nothing trains below
    last = weights_of(model, "down_proj") if name != "kept" else 0
    assert sum(made) == total(work, "dequantised") - 4 * times * (first + last)


@pytest.mark.parametrize(
    ("name", "layers", "slots"),
    [
        ("layer-major", "streamed", 2),
        ("micro-batch-major", "streamed", 3),
        ("layer-major", 3, 2),
        ("layer-major", 4, 2),
    ],
)
@pytest.mark.sampled
def test_fetched_bytes_are_those_of_a_real_step(
    deep: Path, tmp_path_factory: pytest.TempPathFactory, name: str, layers: Any, slots: int
) -> None:
    training = TrainingSection(batch_size=4, steps=3, **ARRANGEMENTS[name])
    cache = tmp_path_factory.getbasetemp() / "nf4-of-test-machine"
    memory = MemorySection(layers=layers, slots=slots, tier="disk", cache=str(cache))
    base = load_base(ModelSection(name=str(deep)), CPU, memory=memory)
    model = apply_method(base, LoRA(r=4))
    one = shapes_of(model).layer_bytes[0]
    work = work_of(shapes_of(model), training, memory, 8, dtype_bytes=4)
    trainer = trained(model, training, 8, memory=memory)
    placement: Any = base.placement
    before = placement.fetched
    next(trainer)
    fetched = placement.fetched - before
    assert total(work, "read") == total(work, "copied") == fetched * one
    on_host = memory.model_copy(update={"tier": "host"})
    assert total(work_of(shapes_of(model), training, on_host, 8, dtype_bytes=4), "read") == 0


def test_layers_below_the_lowest_that_trains_only_go_forward(deep: Path) -> None:
    base = load_base(ModelSection(name=str(deep)), CPU)
    model = apply_method(base, LoRA(r=4, target_modules=("layers.4.mlp.up_proj", "layers.5.mlp.up_proj")))
    shapes = shapes_of(model)
    assert (shapes.layers, shapes.with_graph) == (6, 2)
    training = TrainingSection(batch_size=4, steps=2, micro_batch_size=1)
    work = work_of(shapes_of(model), training, MemorySection(layers="streamed"), 8, dtype_bytes=4)
    assert work.backward.dequantised == work.forward.dequantised / 3
    assert work.backward.copied == 0  # both are in the slots when backward begins
    trainer = trained(model, training, 8)
    with Counter() as counter:
        next(trainer)
    # of the two, nothing below up_proj in the lower one gets a gradient, and the last products are left out
    lower = weights_of(model, "layers.4.") - weights_of(model, "layers.4.", "down_proj")
    last = weights_of(model, "layers.4.", "down_proj") + weights_of(model, "layers.5.", "down_proj")
    assert 0.975 < counter.flops / (total(work, "flops") - 2 * (lower + last) * 4 * 8) <= 1.0


def test_layers_in_no_list_are_counted_together(deep: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def none(_: Any) -> Any:
        raise ModelError("No list of decoder layers.")

    model = apply_method(load_base(ModelSection(name=str(deep)), CPU), LoRA(r=4))
    listed = shapes_of(model)
    monkeypatch.setattr(counts.anatomy, "layers", none)
    assert shapes_of(model) == listed


def test_what_is_elsewhere_travels(large: Shapes) -> None:
    training = TrainingSection(batch_size=4, micro_batch_size=1)
    inputs, head = 2 * 4 * 512 * 80 * 8192, 2 * 128256 * 8192

    def work(accumulation: str = "layer_major", **memory: Any) -> Work:
        section = training.model_copy(update={"accumulation": accumulation})
        return work_of(large, section, MemorySection(**memory), 512, dtype_bytes=2)

    nothing = work()
    assert (total(nothing, "copied"), total(nothing, "read")) == (0, 0)
    on_host = work(layer_inputs="host")
    assert (on_host.forward.copied, on_host.backward.copied) == (inputs, inputs)
    # the slices come once for the sum and once for the gradient; and again for each micro-batch where these go alone
    assert work(head="host").loss.copied == 2 * head
    assert work("micro_batch_major", head="host").loss.copied == 4 * 2 * head
    assert work(head="host").loss.flops == nothing.loss.flops * 6 / 4
    streamed = work(layers="streamed")
    assert total(work("micro_batch_major", layers="streamed"), "copied") == 4 * total(streamed, "copied")


@pytest.mark.parametrize(
    ("family", "name", "micro_batches", "ways"),
    [("Qwen3Moe", "kept", 2, 2), ("Qwen3Moe", "layer-major", 4, 2), ("Gemma4Text", "layer-major", 4, 3)],
)
def test_experts_are_dequantised_once_a_micro_batch_and_way(
    family: str, name: str, micro_batches: int, ways: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of tokens that are enough to visit them all. A recompute leaves them out where a layer ends in their answer; Gemma 4
    normalises it. So does the plan, which counts their first product once more for every way back."""
    training = TrainingSection(batch_size=4, steps=2, max_grad_norm=None, **ARRANGEMENTS[name])
    folder = any_checkpoint(tmp_path, family, torch.float32, vocab_size=300, **MIXTURES[family])
    model = apply_method(load_base(ModelSection(name=str(folder), compute_dtype="fp32"), CPU), LoRA(r=4))
    counted = shapes_of(model)
    assert (counted.experts, counted.visited) == (2 * 8 * 3 * 64 * 64, 2 / 8)
    assert (counted.experts_up * 3, counted.experts_again) == (2 * counted.experts, (ways > 2) * counted.experts)
    work = work_of(counted, training, MemorySection(), 48, dtype_bytes=4, masked=True)
    linears = work.forward.dequantised - micro_batches * 4 * counted.experts
    back = work.backward.dequantised - (ways - 1) * micro_batches * 4 * counted.experts
    assert 0.999 * linears < back <= 2 * linears
    trainer, made, original = trained(model, training, 48), [], PackedExperts.dequantise

    def watched(experts: PackedExperts, expert: int, dtype: torch.dtype) -> torch.Tensor:
        dense = original(experts, expert, dtype)
        made.append(dense.nbytes)
        return dense

    monkeypatch.setattr(PackedExperts, "dequantise", watched)
    with Counter() as counter:
        next(trainer)
    assert (
        0.9 < counter.flops / total(work, "flops") <= 1.0
    )  # below by what no gradient goes through in the first layer
    turns = 1 if name == "layer-major" else micro_batches
    assert linears == pytest.approx(turns * 4 * counted.packed, rel=0.01)
    assert 0.85 < sum(made) / (ways * micro_batches * 4 * counted.experts) <= 1  # a random router has favourites
    few = work_of(counted, training, MemorySection(), 1, dtype_bytes=4).forward.dequantised
    tokens = min(training.micro_batch_size, 4)
    assert few == pytest.approx(turns * 4 * counted.packed + micro_batches * 4 * counted.experts * (1 - 0.75**tokens))


# --- the published limits -------------------------------------------------------------------------------------------------


def test_the_shapes_of_a_70b_model(large: Shapes) -> None:
    assert large.blocks == large.packed == 80 * (2 * 8192 * (8192 + 1024) + 3 * 8192 * 28672)
    assert large.blocks == pytest.approx(68.451e9, rel=1e-5)
    assert sum(large.layer_bytes) == pytest.approx(35.312e9, rel=1e-4)
    assert sum(large.layer_bytes) / large.blocks == pytest.approx(0.5159, rel=1e-4)
    assert (large.head, large.trained, large.layers, large.with_graph) == (128256 * 8192, 207093760, 80, 80)


@pytest.mark.parametrize(("name", "tokens"), [("T4", 699), ("3090", 367), ("4090", 852), ("H100", 2551)])
def test_a_forward_hides_its_transfer_behind_so_many_tokens(large: Shapes, name: str, tokens: int) -> None:
    """B ≥ 0.258 · F / β, which leaves dequantising aside, for a 70B model at half of the peak."""
    rates = replace(rates_of(card(name)), dequantise=ENDLESS)
    assert tokens == pytest.approx(0.258 * rates.matrix.expected / rates.copies.expected, rel=0.01)

    def hidden(length: int) -> bool:
        work = work_of(large, TrainingSection(batch_size=1), MemorySection(layers="streamed"), length, dtype_bytes=2)
        forward = Work(work.forward, Pass(), Pass())
        return step_seconds(forward, rates).bound == "arithmetic"

    found = next(length for length in range(1, 10_000) if hidden(length))
    # below it by the two layers of 80 that backward left in the slots, the adapters' arithmetic and attention's
    assert 0.94 < found / tokens < 1.0


@pytest.mark.parametrize(("name", "limit"), [("T4", 78), ("3090", 86), ("4090", 199), ("H100", 1192)])
def test_the_limit_of_a_streamed_70b_model(large: Shapes, name: str, limit: int) -> None:
    """Tokens a second at half of the peak, for so many tokens that neither copies nor dequantising count."""
    plain = replace(large, trained=0)  # the table does not count what trains
    training = TrainingSection(batch_size=512, micro_batch_size=1)
    work = work_of(plain, training, MemorySection(layers="streamed"), 128, dtype_bytes=2)
    seconds = step_seconds(work, rates_of(card(name)))
    assert seconds.bound == "arithmetic"
    assert 512 * 128 / seconds.expected == pytest.approx(limit, rel=0.02)


def test_seventy_billion_from_one_disk(large: Shapes) -> None:
    """10.1 s a step at 7 GB/s."""
    memory = MemorySection(layers="streamed", tier="disk")
    work = work_of(large, TrainingSection(batch_size=1), memory, 64, dtype_bytes=2)
    fast = replace(rates_of(card("4090")), disk=Rate(7e9, 7e9, 7e9))
    seconds = step_seconds(work, fast)
    assert seconds.bound == "the disk"
    assert seconds.expected == pytest.approx(10.1, rel=0.06)


def test_less_is_never_faster(large: Shapes) -> None:
    rates = rates_of(card("3090"))

    def seconds(accumulation: str = "layer_major", **memory: Any) -> float:
        training = TrainingSection(batch_size=8, micro_batch_size=1, accumulation=accumulation)
        work = work_of(large, training, MemorySection(**memory), 128, dtype_bytes=2)
        return step_seconds(work, rates).expected

    resident = seconds()
    assert resident <= seconds(layers=40) <= seconds(layers="streamed") < seconds(layers="streamed", tier="disk")
    assert resident < seconds("micro_batch_major") < seconds("micro_batch_major", layers="streamed")


# --- seconds from known rates ---------------------------------------------------------------------------------------------


def known(**rates: Any) -> Rates:
    values: dict[str, Any] = dict.fromkeys(["matrix", "dequantise", "copies", "disk"], Rate(5.0, 10.0, 20.0))
    return Rates(**{**values, "source": "made up", **rates})


def test_copies_run_beside_the_arithmetic_of_their_pass_alone() -> None:
    forward = Pass(flops=100, dequantised=100, copied=250, read=60)
    backward = Pass(flops=300, copied=100)
    found = step_seconds(Work(forward, Pass(), backward), known())
    # forward 20 s of arithmetic, 25 s of copies, 6 s of disk: 25; backward 30 and 10: 30
    assert (found.expected, found.bound) == (55.0, "arithmetic")
    assert found.low == 55.0 / 2
    assert found.high == 2 * (20 + 25 + 6 + 30 + 10)
    assert str(found) == "55 s a step of full rows (28 s to 3 min 02 s), bound by arithmetic"


@pytest.mark.parametrize(
    ("kind", "bound"),
    [("flops", "arithmetic"), ("dequantised", "arithmetic"), ("copied", "copies"), ("read", "the disk")],
)
def test_every_kind_of_work_takes_its_time(kind: str, bound: str) -> None:
    work = Work(Pass(), Pass(), Pass(**{kind: 70.0}))
    assert step_seconds(work, known()) == Seconds(7.0, 3.5, 14.0, bound)


def test_an_unknown_disk_is_refused_only_where_it_is_used() -> None:
    rates = known(disk=None, notes=("The disk of 'x' was not measured: Permission denied.",))
    assert step_seconds(Work(Pass(flops=10), Pass(), Pass()), rates).expected == 1.0
    with pytest.raises(RecipeError, match=r"1\.00 GiB a step come from the disk.* Permission denied\. Give a folder"):
        step_seconds(Work(Pass(read=2.0**30), Pass(), Pass()), rates)
