"""The laws that a CUDA device can break: ``make gpu-check``. Without one they are skipped.

The tests of the rooms prove the same laws on the CPU; here are those whose kernels, dtypes or allocator differ.
"""

from __future__ import annotations

import copy
import gc
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy
import pytest
import torch
from safetensors.torch import load_file
from transformers import AttentionInterface, LlamaConfig, LlamaForCausalLM

from qlora.data.packing import Row
from qlora.evaluation.generate import answers
from qlora.machine.cards import workspace_bytes
from qlora.machine.device import capability
from qlora.machine.disk import bytes_text
from qlora.methods.base import AdaptedModel, apply_method
from qlora.model.attention import VARLEN, PackedMask, attention_of, keep_apart
from qlora.model.kernels import fuse, fused, language, proof
from qlora.model.loss import IGNORE_INDEX
from qlora.model.skeleton import skeleton_base
from qlora.planning.memory import estimate
from qlora.planning.rates import measure
from qlora.recipe import LoRA, MemorySection, ModelSection, TrainingSection
from qlora.residence.load import load_base
from qlora.residence.placement import Placement
from qlora.training.loop import Trainer
from qlora.training.step import gradients
from tests.rounding import no_worse
from tests.tiny import chat_checkpoint, difference, stir

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")]

DEVICE = torch.device("cuda", 0)
IDS = torch.arange(3, 51).reshape(2, 24)
BF16 = 2e-2  # two roundings of the largest logit


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return chat_checkpoint(tmp_path_factory.mktemp("cuda") / "model", hidden_size=128, intermediate_size=256)


@pytest.fixture(scope="module")
def wide(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Adapters of rank 64 at its MLPs have 131,072 numbers: bitsandbytes pages the state of 100,000 and more."""
    return chat_checkpoint(tmp_path_factory.mktemp("wide") / "model", hidden_size=128, intermediate_size=2048)


@pytest.fixture(autouse=True)
def collected() -> None:
    """Models of earlier tests hang in cycles until they are collected; their memory and threads are not this test's."""
    gc.collect()
    torch.cuda.empty_cache()


@pytest.fixture
def deterministic(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


def adapted(folder: Path, dtype: str = "bf16", dropout: float = 0.0, **section: Any) -> AdaptedModel:
    base = load_base(ModelSection(name=str(folder), compute_dtype=dtype, **section), DEVICE)  # type: ignore[arg-type]
    model = apply_method(base, LoRA(r=64, dropout=dropout))
    stir(model, 0.02)
    return model


def rows(count: int, length: int, vocabulary: int, packed: bool = False) -> list[Row]:
    made = []
    for number in range(count):
        ids = numpy.random.default_rng(number).integers(3, vocabulary, length).astype(numpy.int32)
        positions = numpy.arange(length, dtype=numpy.int32) % (length // 2 if packed else length)
        labels = numpy.where(positions == 0, IGNORE_INDEX, ids).astype(numpy.int32)
        made.append(Row(ids, labels, positions, (2 * number, 2 * number + 1) if packed else (number,)))
    return made


def settings(**values: Any) -> TrainingSection:
    defaults = {"batch_size": 4, "micro_batch_size": 2, "steps": 10, "learning_rate": 1e-3, "schedule": "constant"}
    return TrainingSection(**{**defaults, **values})


def vocabulary(model: AdaptedModel) -> int:
    return int(model.model.config.vocab_size)  # type: ignore[union-attr,arg-type]


def gradients_of(model: AdaptedModel, **values: Any) -> tuple[float, dict[str, torch.Tensor]]:
    """(loss, gradients) of one step that moves nothing."""
    trainer = Trainer(model, rows(4, 33, vocabulary(model)), settings(**values))
    loss = gradients(trainer.state, trainer.objective, trainer.rows)
    found = {
        name: values.grad.float().clone()
        for name, values in trainer.state.parameters.items()
        if values.grad is not None
    }
    trainer.state.masters.drop_gradients()
    return loss, found


@pytest.mark.parametrize("quantization", ["nf4", "fp4"])
def test_logits_are_those_of_transformers(folder: Path, quantization: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Bit for bit, where norms and the rest are transformers' own code too."""
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    monkeypatch.setattr("qlora.residence.load.fuse", lambda *given: None)
    ours = load_base(ModelSection(name=str(folder), quantization=quantization, compute_dtype="bf16"), DEVICE).model  # type: ignore[arg-type]
    config = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type=quantization,
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.bfloat16,
    )
    theirs = AutoModelForCausalLM.from_pretrained(
        folder, quantization_config=config, dtype=torch.bfloat16, device_map={"": DEVICE}
    ).eval()
    with torch.no_grad():
        found, expected = (model(input_ids=IDS.to(DEVICE), use_cache=False).logits for model in (ours, theirs))
    assert torch.equal(found, expected)


def test_adapters_and_their_states_have_their_dtypes(folder: Path) -> None:
    for dtype, expected in (("bf16", torch.bfloat16), ("fp16", torch.float32), ("fp32", torch.float32)):
        model = adapted(folder, dtype)
        assert {values.dtype for values in model.trainable_parameters().values()} == {expected}
        trainer = Trainer(model, rows(4, 33, vocabulary(model)), settings())
        next(trainer)
        for name, values in trainer.state.masters.values.items():
            assert values.dtype == torch.float32
            assert torch.equal(trainer.state.parameters[name], values.to(expected))
            state = trainer.state.optimizer.state[values]
            assert {t.dtype for t in state.values() if isinstance(t, torch.Tensor) and t.dim() > 1} == {torch.float32}


@pytest.mark.parametrize("dtype", ["bf16", "fp32"])
def test_recomputed_and_layer_major_gradients_are_the_plain_ones(folder: Path, dtype: str) -> None:
    model = adapted(folder, dtype)
    loss, plain = gradients_of(model, gradient_checkpointing=False)
    tolerance = BF16 if dtype == "bf16" else 1e-4
    for accumulation in ("layer_major", "micro_batch_major"):
        other, found = gradients_of(model, accumulation=accumulation)
        assert other == pytest.approx(loss, rel=tolerance)
        assert max(difference(found[name], plain[name]) for name in plain) < tolerance


def test_gradients_are_those_on_the_dequantised_weights(folder: Path) -> None:
    from qlora.model.nf4 import FrozenLinear

    four_bit = adapted(folder, "fp32")
    dense = adapted(folder, "fp32", quantization="none")
    packed = {name: module for name, module in four_bit.model.named_modules() if isinstance(module, FrozenLinear)}
    weights = dict(dense.model.named_parameters())
    for name, module in packed.items():
        weights[f"{name}.weight"].data.copy_(module.dequantise(torch.float32))
    (loss, expected), (other, found) = gradients_of(four_bit), gradients_of(dense)
    assert other == pytest.approx(loss, rel=1e-4)
    assert max(difference(found[name], expected[name]) for name in expected) < 1e-3


@pytest.mark.parametrize("optimizer", ["adamw", "adamw_8bit", "paged_adamw", "paged_adamw_8bit"])
def test_ten_steps_are_six_and_four(wide: Path, tmp_path: Path, optimizer: str, deterministic: None) -> None:
    """Paged states come back paged; bitsandbytes' own ``load_state_dict`` un-pages them (bitsandbytes#782)."""

    def fresh(place: Path) -> Trainer:
        model = adapted(wide, dropout=0.1)
        return Trainer(model, rows(14, 33, vocabulary(model)), settings(optimizer=optimizer), place)

    whole = fresh(tmp_path / "whole")
    losses = [next(whole).loss for _ in range(10)]
    first = fresh(tmp_path / "cut")
    assert [next(first).loss for _ in range(6)] == losses[:6]
    second = fresh(tmp_path / "cut")
    second.load(first.save())
    assert [next(second).loss for _ in range(4)] == losses[6:]
    for name, values in whole.state.parameters.items():
        assert torch.equal(values, second.state.parameters[name])
    if optimizer.startswith("paged"):
        states = second.state.optimizer.state
        pageable = [
            states[values]["state1"] for values in second.state.masters.values.values() if values.numel() >= 100_000
        ]
        assert pageable
        assert all(getattr(tensor, "is_paged", False) for tensor in pageable)
    saved = load_file(first.save() / "optimizer.safetensors")
    assert all(tensor.device.type == "cpu" for tensor in saved.values())


def test_fp16_trains(folder: Path) -> None:
    model = adapted(folder, "fp16")
    trainer = Trainer(model, rows(4, 33, vocabulary(model)), settings(steps=20, learning_rate=5e-3))
    steps = list(trainer)
    assert all(numpy.isfinite([step.loss, step.grad_norm]).all() for step in steps)
    assert steps[-1].loss < 0.9 * steps[0].loss
    assert trainer.state.loss_scale > 1


def test_packed_examples_are_apart(folder: Path) -> None:
    """Whatever attention the device chooses; Trainer itself refuses a model in which they are not."""
    model = adapted(folder)
    packed = Trainer(model, rows(4, 32, vocabulary(model), packed=True), settings())
    loss = gradients(packed.state, packed.objective, packed.rows)
    packed.state.masters.drop_gradients()
    halves = [
        Row(row.ids[part], row.labels[part], numpy.arange(16, dtype=numpy.int32), (0,))
        for row in packed.rows
        for part in (slice(0, 16), slice(16, 32))
    ]
    alone = Trainer(model, halves, settings(batch_size=8))
    expected = gradients(alone.state, alone.objective, halves)
    assert loss == pytest.approx(expected, rel=BF16)


@pytest.mark.skipif(torch.cuda.is_available() and capability(DEVICE) < 8, reason="no FlashAttention before Ampere")
@pytest.mark.parametrize("window", [None, 5, 64])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_packed_rows_take_the_kernel_for_lengths(dtype: torch.dtype, window: int | None) -> None:
    """Outputs and gradients of torch's own kernel, of heads that share keys, no worse than of SDPA with a mask."""
    config = LlamaConfig(hidden_size=256, num_hidden_layers=1, num_attention_heads=8, num_key_value_heads=2)
    model = LlamaForCausalLM(config).to(DEVICE, dtype)
    keep_apart(model, dtype, capability(DEVICE))
    assert attention_of(model) == VARLEN
    mask = PackedMask([[0, 7, 8], [0, 90]], 150, window)
    made = [torch.randn(2, 150, heads, 32, device=DEVICE, dtype=torch.float64) for heads in (8, 2, 2, 8)]

    def taken(name: str, dtype: torch.dtype, mask: Any) -> tuple[torch.Tensor, ...]:
        query, key, value = (heads.to(dtype).transpose(1, 2).requires_grad_() for heads in made[:3])
        module = model.model.layers[0].self_attn
        output, _ = AttentionInterface()[name](module, query, key, value, mask, scaling=32**-0.5)
        return output.detach(), *torch.autograd.grad(output, (query, key, value), made[3].to(dtype))

    dense = mask.dense(DEVICE)
    for found in zip(taken(VARLEN, dtype, mask), taken("sdpa", dtype, dense), taken("sdpa", torch.float64, dense), strict=True):  # fmt: skip
        no_worse(*found, dtype)


@pytest.mark.skipif(not language.HERE, reason="Triton is not installed")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_fused_operators_err_no_more_than_plain_ones(dtype: torch.dtype) -> None:
    """Each kernel there and back, and all of them in a model; a loaded one has them."""
    if dtype == torch.bfloat16 and capability(DEVICE) < 8:
        pytest.skip("no bf16 in hardware before Ampere")
    for name, compute, inputs in proof._cases():
        off = proof._apart(compute, inputs, DEVICE, dtype)
        print(f"{name}: off by {off / torch.finfo(dtype).eps:.2f} eps of {dtype}")
        assert off <= proof.WITHIN * torch.finfo(dtype).eps
    torch.manual_seed(0)
    config = LlamaConfig(hidden_size=320, intermediate_size=1000, num_hidden_layers=2, num_attention_heads=4,
                         num_key_value_heads=2, head_dim=80, vocab_size=500, initializer_range=0.05)  # fmt: skip
    exact = LlamaForCausalLM(config).to(DEVICE, dtype)
    plain, ours = (copy.deepcopy(exact) for _ in range(2))
    exact.double()
    fuse(ours, dtype, capability(DEVICE), DEVICE)
    assert fused(ours) == {"rms_norm": 5, "rotary": 2, "glu_silu": 2}

    def results(model: Any) -> list[torch.Tensor]:
        logits = model(input_ids=IDS.to(DEVICE)).logits
        wanted = [
            model.model.embed_tokens.weight,
            model.model.layers[0].input_layernorm.weight,
            model.model.norm.weight,
        ]
        return [logits.detach(), *torch.autograd.grad(logits.square().mean(), wanted)]

    for found in zip(results(ours), results(plain), results(exact), strict=True):
        no_worse(*found, dtype)


@pytest.mark.skipif(not language.HERE, reason="Triton is not installed")
def test_a_loaded_model_is_fused_and_its_gradients_are_the_same_bits_each_time(folder: Path) -> None:
    model = adapted(folder)
    assert fused(model.model) == {"rms_norm": 5, "rotary": 2, "glu_silu": 2}
    norm = model.model.model.norm
    norm.weight.requires_grad_()
    found = []
    for _ in range(3):
        norm.weight.grad = None
        hidden = torch.randn(4, 700, 128, generator=torch.Generator().manual_seed(0)).to(DEVICE, torch.bfloat16)
        norm(hidden).square().mean().backward()
        found.append(norm.weight.grad)
    assert all(torch.equal(one, found[0]) for one in found)


def test_a_model_that_magnifies_rounding_is_not_refused(tmp_path: Path) -> None:
    """In bf16, with weights so large that the fused 4-bit kernel and the dense one part by a fifth of the largest state."""
    model = adapted(chat_checkpoint(tmp_path / "m", **{**WIDE, "initializer_range": 0.2}))
    for packed in (False, True):
        Trainer(model, rows(4, 64, 32000, packed), settings(micro_batch_size=1))


def test_generation_is_the_argmax_of_the_logits(folder: Path) -> None:
    model = adapted(folder, "fp32")
    prompt = IDS[0, :9].tolist()
    text = answers(model, [prompt], 1)[0]
    with torch.no_grad():
        choice = model.model(input_ids=torch.tensor([prompt], device=DEVICE)).logits[0, -1].argmax()
    assert text == model.tokenizer.decode([int(choice)], skip_special_tokens=True).strip()


WIDE = {
    "hidden_size": 1024, "intermediate_size": 2816, "num_hidden_layers": 12, "num_attention_heads": 16,
    "num_key_value_heads": 8, "vocab_size": 32000, "max_position_embeddings": 2048, "initializer_range": 0.02,
}  # fmt: skip
ARRANGEMENTS: dict[str, dict[str, Any]] = {
    "resident": {},
    "streamed": {"layers": "streamed"},
    "three slots": {"layers": "streamed", "slots": 3},
    "partly resident": {"layers": 3},
    "streamed from the file": {"layers": "streamed", "tier": "disk"},
    "inputs on the host": {"layer_inputs": "host"},
    "ends on the host": {"embedding": "host", "head": "host"},
    "tiled": {"mlp_tile": 5},
    "everything": {"layers": 2, "layer_inputs": "host", "embedding": "host", "head": "host", "mlp_tile": 7},
}


def placed(
    folder: Path, tmp_path: Path, dtype: str = "bf16", dropout: float = 0.0, **memory: Any
) -> tuple[AdaptedModel, MemorySection]:
    """A model whose layers, inputs and ends lie where ``memory`` says, its adapter stirred."""
    section = MemorySection(**{"cache": str(tmp_path / "cache"), **memory})
    base = load_base(ModelSection(name=str(folder), compute_dtype=dtype), DEVICE, memory=section)  # type: ignore[arg-type]
    model = apply_method(base, LoRA(r=16, dropout=dropout))
    stir(model, 0.02)
    return model, section


@pytest.fixture(scope="module")
def deep(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return chat_checkpoint(
        tmp_path_factory.mktemp("deep") / "m", hidden_size=128, intermediate_size=256, num_hidden_layers=8
    )


@pytest.mark.parametrize("name", ARRANGEMENTS)
def test_gradients_do_not_depend_on_where_things_wait(
    deep: Path, tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Slots that were left hold NaN; three times several micro-batches, so that every slot and buffer is used again."""
    monkeypatch.setattr(Placement, "poison", True)
    found = []
    for memory in ({}, ARRANGEMENTS[name]):
        model, section = placed(deep, tmp_path, "fp32", **memory)
        trainer = Trainer(model, rows(4, 33, vocabulary(model)), settings(micro_batch_size=1), memory=section)
        losses = [gradients(trainer.state, trainer.objective, trainer.rows) for _ in range(3)]  # they add up
        grads = {n: p.grad.clone() for n, p in trainer.state.parameters.items() if p.grad is not None}
        found.append((losses, grads))
    (losses, plain), (others, summed) = found
    assert plain.keys() == summed.keys() != set()
    assert others == pytest.approx(losses, rel=1e-4)
    assert max(difference(summed[key], plain[key]) for key in plain) < 1e-3


def test_a_streamed_model_answers_and_lets_go(deep: Path, tmp_path: Path) -> None:
    """Generation is the resident one's; a base that is collected while a layer is on its way ends its thread."""
    others = set(threading.enumerate())
    model, _ = placed(deep, tmp_path, "fp32", layers="streamed")
    resident, _ = placed(deep, tmp_path, "fp32")
    prompt = IDS[0, :9].tolist()
    assert answers(model, [prompt], 8) == answers(resident, [prompt], 8)
    placement: Any = model.base.placement
    placement.current = -1
    placement.visit(0)
    own = [t for t in threading.enumerate() if t.name.startswith("qlora-layers") and t not in others]
    assert own
    placement.close()
    assert not any(thread.is_alive() for thread in own)


def test_a_head_on_the_host_is_pinned_and_right_every_time(deep: Path, tmp_path: Path) -> None:
    """The loss of the same rows twenty times, with the compute stream held up before each: no slice is read too early."""
    model, section = placed(deep, tmp_path, "fp32", embedding="host", head="host")
    head: Any = model.model.get_output_embeddings()  # type: ignore[operator]
    assert head.weight.is_pinned()
    trainer = Trainer(model, rows(4, 33, vocabulary(model)), settings(), memory=section)
    losses = set()
    for _ in range(20):
        torch.cuda._sleep(2_000_000)
        losses.add(gradients(trainer.state, trainer.objective, trainer.rows))
        trainer.state.masters.drop_gradients()
    assert len(losses) == 1


def test_memory_that_runs_out_for_real_halves_the_rows(tmp_path: Path) -> None:
    """Under a cap that two rows at once do not fit into, the losses are those of one row at a time."""
    folder = chat_checkpoint(tmp_path / "m", **WIDE)
    expected, one_row = [], 0
    total = torch.cuda.get_device_properties(DEVICE).total_memory
    for capped in (False, True):
        model = adapted(folder)
        trainer = Trainer(model, rows(4, 2048, 32000), settings(micro_batch_size=4 if capped else 1, steps=2))
        gc.collect()
        torch.cuda.empty_cache()
        if capped:
            torch.cuda.set_per_process_memory_fraction(1.15 * one_row / total, DEVICE)
        torch.cuda.reset_peak_memory_stats(DEVICE)
        try:
            expected.append([next(trainer).loss for _ in range(2)])
        finally:
            torch.cuda.set_per_process_memory_fraction(1.0, DEVICE)
        one_row = torch.cuda.max_memory_reserved(DEVICE)
        if capped:
            assert trainer.micro_batch_size < 4
        del trainer, model
    assert expected[1] == pytest.approx(expected[0], rel=BF16)


@pytest.mark.parametrize("optimizer", ["adamw", "paged_adamw_8bit"])
def test_a_rehearsal_leaves_no_trace_and_tells_the_peak(tmp_path: Path, optimizer: str, deterministic: None) -> None:
    folder = chat_checkpoint(tmp_path / "m", **WIDE)
    losses = []
    for rehearsed in (False, True):
        model = adapted(folder, dropout=0.1)
        trainer = Trainer(model, rows(8, 1024, 32000), settings(optimizer=optimizer, steps=3))
        peak = trainer.rehearse().peak_memory_bytes if rehearsed else 0
        torch.cuda.reset_peak_memory_stats(DEVICE)
        losses.append([next(trainer).loss for _ in range(3)])
        measured = torch.cuda.max_memory_allocated(DEVICE)
        if rehearsed:
            assert peak == pytest.approx(measured, rel=0.02)
        del trainer, model
    assert losses[0] == losses[1]


@pytest.mark.parametrize(
    "memory",
    [{}, {"layers": "streamed"}, {"layer_inputs": "host", "mlp_tile": 256}, {"embedding": "host", "head": "host"}],
)
@pytest.mark.parametrize("accumulation", ["layer_major", "micro_batch_major"])
@pytest.mark.parametrize("packed", [False, True])
def test_planned_memory_is_the_measured_peak(
    tmp_path: Path, accumulation: str, packed: bool, memory: dict[str, Any]
) -> None:
    """Within a tenth, at a shape at which the rounding of the allocator is small: 12 layers of 1,024."""
    folder = chat_checkpoint(tmp_path / "m", **WIDE)
    torch._C._cuda_clearCublasWorkspaces()  # an earlier test's; the plan counts one
    before = torch.cuda.memory_allocated(DEVICE)
    model, section = placed(folder, tmp_path, **memory)
    training = settings(accumulation=accumulation, steps=3, micro_batch_size=1)
    trainer = Trainer(model, rows(4, 1024, 32000, packed), training, memory=section)
    next(trainer)
    torch.cuda.reset_peak_memory_stats(DEVICE)
    next(trainer)
    measured = torch.cuda.max_memory_allocated(DEVICE) - before
    empty = skeleton_base(ModelSection(name=str(folder), compute_dtype="bf16"), torch.device("meta"), torch.bfloat16)
    workspace = workspace_bytes(capability(DEVICE))
    keep_apart(empty.model, torch.bfloat16, capability(DEVICE))
    fuse(empty.model, torch.bfloat16, capability(DEVICE), DEVICE)
    adapted = apply_method(empty, LoRA(r=16, adapter_dtype="bf16"))
    planned = estimate(adapted, training, 1024, DEVICE, packed, section, workspace=workspace)
    total = planned.allocated
    print(f"{memory}, {accumulation}, packed {packed}: planned {bytes_text(total)}, measured {bytes_text(measured)}")
    assert total == pytest.approx(measured, rel=0.10)


def test_rates_are_those_of_a_gpu(tmp_path: Path) -> None:
    rates = measure(DEVICE, torch.bfloat16, tmp_path)
    assert 1e12 < rates.matrix.expected < 2.5e15
    assert rates.copies.expected > 2e9
