"""The estimate against what is measured: exact where it says so, and within a quarter where it models."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy
import pytest
import torch
from torch.profiler import ProfilerActivity, profile

from qlora.config import LoRA, ModelSection, TrainingSection
from qlora.data import Row
from qlora.device import bytes_text
from qlora.errors import DoesNotFitError
from qlora.memory import Estimate, check, estimate, weight_bytes
from qlora.methods import AdaptedModel, apply_method
from qlora.model import Base, load_base
from qlora.model.skeleton import load_skeleton
from qlora.training import Trainer
from qlora.training.optim import optimizer_tensors
from tests.conftest import write_model
from tests.methods.test_laws import CASES as CASES_OF_METHODS

CPU = torch.device("cpu")
SIZES: dict[str, dict[str, Any]] = {
    "tiny": {},
    "mid": {"hidden_size": 256, "intermediate_size": 768, "num_hidden_layers": 4, "num_attention_heads": 8, "vocab_size": 2000},
    "wide": {"hidden_size": 128, "intermediate_size": 384, "num_hidden_layers": 2, "vocab_size": 20000},
    "deep": {"hidden_size": 96, "intermediate_size": 256, "num_hidden_layers": 12, "vocab_size": 400},
}  # fmt: skip


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return {name: write_model(tmp_path_factory.mktemp(name) / "model", **sizes) for name, sizes in SIZES.items()}


def peak_of(work: Callable[[], object]) -> int:
    """The most bytes that torch's allocator held at one time during ``work``, beyond what it held before."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        work()
    events = [event for event in profiler.profiler.kineto_results.events() if event.name() == "[memory]"]
    live = peak = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        live += event.nbytes()
        peak = max(peak, live)
    assert peak > 0
    return peak


def adapted_model(folder: Path, r: int = 8, **section: Any) -> AdaptedModel:
    return apply_method(load_base(ModelSection(name=str(folder), **section), CPU), LoRA(r=r))


def rows_of(model: AdaptedModel, count: int, length: int, packed: bool = False) -> list[Row]:
    vocabulary = model.model.config.vocab_size  # type: ignore[union-attr]
    rows = []
    for number in range(count):
        ids = numpy.random.default_rng(number).integers(3, vocabulary, length).astype(numpy.int32)
        positions = numpy.arange(length, dtype=numpy.int32) % (length // 2 if packed else length)
        rows.append(Row(ids, ids.copy(), positions, (2 * number, 2 * number + 1) if packed else (number,)))
    return rows


def skeleton_of(folder: Path, r: int = 8, **section: Any) -> AdaptedModel:
    """What ``plan`` estimates from: the same model without its weights."""
    values = ModelSection(name=str(folder), compute_dtype="fp32", **section)
    base = Base(
        load_skeleton(values, torch.float32), None, folder, "m", None, values.quantization, values.double_quant,
        torch.device("meta"), torch.float32,
    )  # fmt: skip
    return apply_method(base, LoRA(r=r))


@pytest.mark.parametrize("quantization", ["nf4", "fp4", "int8", "none"])
@pytest.mark.parametrize("double_quant", [True, False])
def test_weights_are_counted_exactly(models: dict[str, Path], quantization: str, double_quant: bool) -> None:
    options = {"quantization": quantization, "double_quant": double_quant}
    planned = estimate(skeleton_of(models["mid"], **options), TrainingSection(), 64, CPU)
    model = adapted_model(models["mid"], **options)
    held = {
        tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes()
        for tensor in [*model.model.parameters(), *model.model.buffers()]
    }
    # a buffer that bitsandbytes shares between linears is counted for each of them: some kilobytes
    shared = sum(
        tensor.numel() * tensor.itemsize for tensor in [*model.model.parameters(), *model.model.buffers()]
    ) - sum(held.values())
    trainable = {id(parameter) for parameter in model.trainable_parameters().values()}
    assert (planned.quantised_weights, planned.other_weights) == weight_bytes(model.model, trainable)
    assert planned.quantised_weights + planned.other_weights + planned.adapter == sum(held.values()) + shared
    assert shared < 0.02 * sum(held.values())


@pytest.mark.parametrize("optimizer", ["adamw", "adamw_8bit", "paged_adamw", "paged_adamw_8bit"])
def test_adapter_gradients_and_optimizer_are_counted_exactly(models: dict[str, Path], optimizer: str) -> None:
    model = adapted_model(models["mid"], r=12)  # so that some matrices are above what 8 bits begin at, some below
    training = TrainingSection(optimizer=optimizer, batch_size=2, micro_batch_size=2, steps=2)
    planned = estimate(model, training, 32, CPU)
    parameters = model.trainable_parameters()
    assert planned.adapter == sum(p.untyped_storage().nbytes() for p in parameters.values())
    trainer = Trainer(model, rows_of(model, 2, 32), training)
    seen: list[int] = []
    step = trainer.optimizer.step

    def watched(*arguments: Any) -> Any:
        seen.append(sum(p.grad.untyped_storage().nbytes() for p in parameters.values() if p.grad is not None))
        return step(*arguments)

    trainer.optimizer.step = watched  # type: ignore[method-assign]
    next(trainer)
    assert seen == [planned.gradients]
    state = sum(tensor.nbytes for tensor in optimizer_tensors(trainer.optimizer, parameters).values())
    assert planned.optimizer == pytest.approx(state, rel=0.001)  # but for a step count of some bytes a matrix


CASES: dict[str, tuple[str, int, dict[str, Any], dict[str, Any]]] = {
    "tiny": ("tiny", 64, {"batch_size": 5, "micro_batch_size": 2}, {}),
    "layer-major": ("mid", 192, {"batch_size": 8, "micro_batch_size": 2}, {}),
    "layer-major, one micro-batch": ("mid", 128, {"batch_size": 6, "micro_batch_size": 8}, {}),
    "micro-batch-major": ("mid", 192, {"batch_size": 3, "micro_batch_size": 1, "accumulation": "micro_batch_major"}, {}),
    "no checkpointing": ("mid", 128, {"batch_size": 2, "micro_batch_size": 2, "gradient_checkpointing": False}, {}),
    "packed": ("mid", 256, {"batch_size": 4, "micro_batch_size": 1}, {"packed": True}),
    "unquantised": ("mid", 192, {"batch_size": 4, "micro_batch_size": 2}, {"quantization": "none"}),
    "bf16": ("mid", 128, {"batch_size": 4, "micro_batch_size": 2}, {"compute_dtype": "bf16"}),
    "eager": ("mid", 128, {"batch_size": 4, "micro_batch_size": 2}, {"attention": "eager"}),
    "wide, chunks": ("wide", 128, {"batch_size": 6, "micro_batch_size": 2}, {}),
    "wide, one chunk": ("wide", 96, {"batch_size": 2, "micro_batch_size": 2}, {}),
    "deep": ("deep", 128, {"batch_size": 8, "micro_batch_size": 2}, {}),
}  # fmt: skip


@pytest.mark.parametrize("name", CASES)
def test_step_takes_what_was_estimated(name: str, models: dict[str, Path]) -> None:
    size, length, settings, options = CASES[name]
    packed = options.get("packed", False)
    section = {key: value for key, value in options.items() if key != "packed"}
    model = adapted_model(models[size], **section)
    training = TrainingSection(steps=3, **settings)
    trainer = Trainer(model, rows_of(model, training.batch_size, length, packed), training)
    next(trainer)  # the optimizer's state is made by the first step
    measured = peak_of(lambda: next(trainer))
    planned = estimate(model, training, length, CPU, packed)
    step = planned.total - sum(
        (planned.quantised_weights, planned.other_weights, planned.adapter, planned.optimizer, planned.runtime)
    )  # which were there before the step
    print(f"{name}: estimated {bytes_text(step)}, measured {bytes_text(measured)}, {step / measured:.2f}")
    assert 0.8 < step / measured < 1.25


# The most that an estimate may be above what is measured. It counts all gradients at the peak, which a backward makes one
# after the other; and without checkpointing it takes frozen linears to keep their inputs, which only adapters do.
LOOSE = {"modules": 1.4, "pfeiffer, kept": 1.6, "prompt_tuning, kept": 1.4}
METHODS = [
    "dora", "adalora", "houlsby", "prompt_tuning", "prefix_tuning", "ia3", "full", "modules", "head", "new_tokens",
    "lora_head_and_new_tokens", "full, kept", "head, kept", "pfeiffer, kept", "prompt_tuning, kept", "head, micro-batches",
]  # fmt: skip


@pytest.mark.parametrize("name", METHODS)
def test_step_of_every_method_takes_what_was_estimated(name: str, models: dict[str, Path]) -> None:
    """A head that trains has a gradient in fp32, virtual tokens lengthen the rows, lower layers may need no backward."""
    key, _, how = name.partition(", ")
    settings = {
        "": {},
        "kept": {"gradient_checkpointing": False},
        "micro-batches": {"accumulation": "micro_batch_major"},
    }[how]
    case = CASES_OF_METHODS[key]
    model = apply_method(
        load_base(ModelSection(name=str(models["mid"]), quantization=case.quantization), CPU), case.section
    )
    training = TrainingSection(steps=3, batch_size=4, micro_batch_size=2, **settings)
    trainer = Trainer(model, rows_of(model, 4, 128), training)
    next(trainer)
    measured = peak_of(lambda: next(trainer))
    planned = estimate(model, training, 128 + model.virtual_tokens, CPU)
    held = ("quantised_weights", "other_weights", "adapter", "optimizer", "method_state", "runtime")
    step = planned.total - sum(getattr(planned, kind) for kind in held)
    print(f"{name}: estimated {bytes_text(step)}, measured {bytes_text(measured)}, {step / measured:.2f}")
    assert 0.8 < step / measured < LOOSE.get(name, 1.25)


@pytest.mark.parametrize("name", ["adalora", "pissa", "p_tuning", "prefix_projected"])
def test_method_state_is_counted_once(name: str, models: dict[str, Path]) -> None:
    """What a checkpoint holds beside the adapter, less what trains and is counted already: a network's weights."""
    case = CASES_OF_METHODS[name]
    model = apply_method(
        load_base(ModelSection(name=str(models["tiny"]), quantization=case.quantization), CPU), case.section
    )
    training = TrainingSection(steps=9, batch_size=2)
    trainer = Trainer(model, rows_of(model, 2, 16), training)
    next(trainer)
    found = estimate(model, training, 16, CPU).method_state
    trained = {values.data_ptr() for values in model.trainable_parameters().values()}
    assert found == sum(values.nbytes for values in model.method_state().values() if values.data_ptr() not in trained)
    per_weight = {"adalora": 2, "pissa": 1, "p_tuning": 0, "prefix_projected": 0}[name]
    assert found == pytest.approx(4 * per_weight * model.count_trainable(), rel=0.05, abs=8)


def test_estimate_needs_no_weights(models: dict[str, Path]) -> None:
    training = TrainingSection(batch_size=4, micro_batch_size=2)
    assert estimate(skeleton_of(models["mid"]), training, 128, CPU) == estimate(
        adapted_model(models["mid"]), training, 128, CPU
    )


def test_check_names_the_table_and_what_to_do(monkeypatch: pytest.MonkeyPatch) -> None:
    needed = Estimate(5 * 2**20, 0, 0, 0, 0, 0, 0, 3 * 2**20, 2 * 2**20, 0)
    assert needed.total == 8 * 2**20  # the loss chunk is gone before a layer's working set is there
    free = {"bytes": 8 * 2**20}
    monkeypatch.setattr("qlora.memory.total_memory_bytes", lambda device: (free["bytes"], 16 * 2**20))
    assert "8.0 MiB of the 8.0 MiB" in check(needed, CPU, TrainingSection())
    free["bytes"] -= 1
    with pytest.raises(DoesNotFitError) as caught:
        check(needed, CPU, TrainingSection(micro_batch_size=1, accumulation="micro_batch_major"))
    assert "quantised weights" in str(caught.value)
    assert "micro_batch_size=1" not in str(caught.value)  # it is so already
    assert "micro_batch_major" not in str(caught.value)
    free["bytes"] = 0
    assert "not known" in check(needed, CPU, TrainingSection())
