"""The estimate against what a step really allocates on a CPU: exact where it counts, within 5 % where code ran on fake tensors."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy
import pytest
import torch

from qlora.data.packing import Row
from qlora.errors import MethodError
from qlora.evaluation.score import score
from qlora.machine.device import resolve_compute_dtype
from qlora.machine.disk import bytes_text
from qlora.methods.base import AdaptedModel, apply_method
from qlora.model.checkpoint import open_checkpoint
from qlora.model.kernels import fuse
from qlora.model.skeleton import skeleton_base
from qlora.planning.dry_run import dry_run
from qlora.planning.few_layers import layers_of
from qlora.planning.memory import RUNTIME, Estimate, estimate, holdings, largest_share, shape_of, weight_bytes
from qlora.planning.shapes import shapes_of
from qlora.recipe import Bottleneck, Full, LoRA, MemorySection, ModelSection, TrainingSection
from qlora.residence.load import load_base
from qlora.residence.owned import apart
from qlora.training.loop import Trainer
from qlora.training.optim import optimizer_tensors
from tests.methods.test_laws import CASES as CASES_OF_METHODS
from tests.steps import peak_of
from tests.tiny import any_checkpoint, chat_checkpoint

CPU, GPU = torch.device("cpu"), torch.device("cuda")
NEAR = 0.05  # of what is measured
SIZES: dict[str, dict[str, Any]] = {
    "tiny": {},
    "mid": {"hidden_size": 256, "intermediate_size": 768, "num_hidden_layers": 4, "num_attention_heads": 8, "vocab_size": 2000},
    "wide": {"hidden_size": 128, "intermediate_size": 384, "num_hidden_layers": 2, "vocab_size": 20000},
    "deep": {"hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 6, "vocab_size": 400},
}  # fmt: skip


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return {name: chat_checkpoint(tmp_path_factory.mktemp(name) / "model", **sizes) for name, sizes in SIZES.items()}


def adapted_model(
    folder: Path, method: Any = None, memory: MemorySection | None = None, **section: Any
) -> AdaptedModel:
    return apply_method(load_base(ModelSection(name=str(folder), **section), CPU, memory=memory), method or LoRA(r=8))


def rows_of(model: AdaptedModel, count: int, length: int, packed: bool = False) -> list[Row]:
    config: Any = model.model.config
    vocabulary = config.vocab_size
    rows = []
    for number in range(count):
        ids = numpy.random.default_rng(number).integers(3, vocabulary, length).astype(numpy.int32)
        positions = numpy.arange(length, dtype=numpy.int32) % (length // 2 if packed else length)
        rows.append(Row(ids, ids.copy(), positions, (2 * number, 2 * number + 1) if packed else (number,)))
    return rows


def skeleton_of(folder: Path, method: Any = None, **section: Any) -> AdaptedModel:
    """What ``plan`` estimates from: the same model without its weights."""
    values = ModelSection(name=str(folder), **{"compute_dtype": "fp32", **section})
    dtype = resolve_compute_dtype(CPU, values.compute_dtype)
    tokenizer = open_checkpoint(values, weights=False).tokenizer
    base = skeleton_base(values, torch.device("meta"), dtype, tokenizer=tokenizer)
    fuse(base.model, dtype, 0, CPU)
    return apply_method(base, method or LoRA(r=8))


def compare(
    name: str,
    model: AdaptedModel,
    length: int,
    packed: bool = False,
    memory: MemorySection | None = None,
    planned_from: AdaptedModel | None = None,
    **settings: Any,
) -> Estimate:
    """Estimate a step, do it, and hold what was allocated against what was planned."""
    memory = memory or MemorySection()
    training = TrainingSection(steps=3, **settings)
    planned = estimate(planned_from or model, training, length + model.virtual_tokens, CPU, packed, memory)
    trainer = Trainer(model, rows_of(model, training.batch_size, length, packed), training, memory=memory)
    next(trainer)  # the optimizer's state is made by the first step
    measured = peak_of(lambda: next(trainer))
    off = planned.step / measured - 1
    print(
        f"{name}: {planned.peak_phase}, planned {bytes_text(planned.step)}, measured {bytes_text(measured)}, {off:+.2%}"
    )
    assert abs(off) < NEAR
    return planned


@pytest.mark.parametrize("quantization", ["nf4", "fp4", "int8", "none"])
@pytest.mark.parametrize("double_quant", [True, False])
@pytest.mark.sampled
def test_weights_are_counted_exactly(models: dict[str, Path], quantization: str, double_quant: bool) -> None:
    options: dict[str, Any] = {"quantization": quantization, "double_quant": double_quant}
    planned, _, _ = holdings(skeleton_of(models["mid"], **options), TrainingSection(), "cpu", MemorySection())
    model = adapted_model(models["mid"], **options)
    tensors = [*model.model.parameters(), *model.model.buffers()]
    held = {tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes() for tensor in tensors}
    # a buffer that bitsandbytes shares between linears is counted for each of them: some kilobytes
    shared = sum(tensor.numel() * tensor.itemsize for tensor in tensors) - sum(held.values())
    trainable = {id(parameter) for parameter in model.trainable_parameters().values()}
    weights = (planned["quantised_weights"], planned["other_weights"])
    assert weights == weight_bytes(model.model, trainable)
    assert sum(weights) + planned["adapter"] == sum(held.values()) + shared
    assert shared < 0.02 * sum(held.values())


@pytest.mark.parametrize("optimizer", ["adamw", "adamw_8bit", "paged_adamw", "paged_adamw_8bit"])
@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
@pytest.mark.sampled
def test_adapter_gradients_and_optimizer_are_counted_exactly(
    models: dict[str, Path], optimizer: str, dtype: Any
) -> None:
    model = adapted_model(
        models["mid"], LoRA(r=12, adapter_dtype=dtype)
    )  # so that some matrices are above what 8 bits begin at, some below
    training = TrainingSection(optimizer=optimizer, batch_size=2, micro_batch_size=2, steps=2)
    planned, _, _ = holdings(model, training, "cpu", MemorySection())
    run = dry_run(model, shape_of(training, 32, False, MemorySection(), len(layers_of(model.model))), "cpu")
    parameters = model.trainable_parameters()
    assert planned["adapter"] == sum(p.untyped_storage().nbytes() for p in parameters.values())
    trainer = Trainer(model, rows_of(model, 2, 32), training)
    seen: list[int] = []
    step = trainer.state.optimizer.step

    def watched(*arguments: Any) -> Any:
        seen.append(sum(p.grad.untyped_storage().nbytes() for p in parameters.values() if p.grad is not None))
        return step(*arguments)

    optimizing: Any = trainer.state.optimizer
    optimizing.step = watched
    next(trainer)
    assert seen == [run.moments()[-1].gradients] == [4 * model.count_trainable()]
    masters = [p for name, p in trainer.state.masters.values.items() if p is not parameters[name]]
    assert planned["masters"] == sum(p.untyped_storage().nbytes() for p in masters)
    assert bool(masters) == (dtype == "bf16")
    state = sum(
        tensor.nbytes for tensor in optimizer_tensors(trainer.state.optimizer, trainer.state.masters.values).values()
    )
    assert planned["optimizer"] == pytest.approx(state, rel=0.001)  # but for a step count of some bytes a matrix


CASES: dict[str, tuple[str, int, dict[str, Any], dict[str, Any]]] = {
    "tiny": ("tiny", 64, {"batch_size": 5, "micro_batch_size": 2}, {}),
    "layer-major, three micro-batches": ("deep", 128, {"batch_size": 5, "micro_batch_size": 2}, {}),
    "micro-batch-major": ("mid", 192, {"batch_size": 3, "micro_batch_size": 1, "accumulation": "micro_batch_major"}, {}),
    "no checkpointing": ("mid", 128, {"batch_size": 4, "micro_batch_size": 2, "gradient_checkpointing": False}, {}),
    "packed": ("mid", 256, {"batch_size": 2, "micro_batch_size": 1}, {"packed": True}),
    "eager": ("mid", 128, {"batch_size": 2, "micro_batch_size": 2}, {"attention": "eager"}),
    "chunks": ("wide", 128, {"batch_size": 6, "micro_batch_size": 6, "loss_chunk": 128}, {}),
    "tiles": ("deep", 256, {"batch_size": 2, "micro_batch_size": 1}, {"memory": MemorySection(mlp_tile=100)}),
    "head and embedding on the host": (
        "wide", 128, {"batch_size": 4, "micro_batch_size": 4},
        {"memory": MemorySection(embedding="host", head="host")},
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", CASES)
@pytest.mark.sampled
def test_step_takes_what_was_estimated(name: str, models: dict[str, Path]) -> None:
    size, length, settings, options = CASES[name]
    packed, memory = options.get("packed", False), options.get("memory")
    section: dict[str, Any] = {key: value for key, value in options.items() if key not in ("packed", "memory")}
    model = adapted_model(models[size], memory=memory, **section)
    bare = skeleton_of(models[size], **{"compute_dtype": "fp32", **section})
    compare(name, model, length, packed, memory, planned_from=bare, **settings)


def test_optimizers_take_what_was_estimated_for_themselves(models: dict[str, Path]) -> None:
    """Where all weights train, the peak is in bitsandbytes' own arithmetic; torch's fused AdamW takes nothing."""
    for optimizer, phase in (("adamw", "backward"), ("adamw_8bit", "optimizer")):
        model = adapted_model(models["mid"], method=Full(), quantization="none")
        planned = compare(optimizer, model, 16, batch_size=1, optimizer=optimizer)
        assert planned.peak_phase == phase


@pytest.mark.parametrize("layers", ["streamed", 3])
def test_streamed_layers_are_counted(layers: Any, models: dict[str, Path], tmp_path: Path) -> None:
    memory = MemorySection(layers=layers, tier="disk", slots=3, cache=str(tmp_path))
    model = adapted_model(models["deep"], memory=memory)
    placement: Any = model.base.placement
    bare = skeleton_of(models["deep"])
    planned = compare(f"{layers}", model, 128, memory=memory, planned_from=bare, batch_size=2, micro_batch_size=2)
    assert planned.device["layer_slots"] == placement.bytes_on_device()
    assert planned.disk["file_cache"] == sum(file.stat().st_size for file in tmp_path.rglob("layers.bin"))
    resident = estimate(bare, TrainingSection(batch_size=2, micro_batch_size=2), 128, CPU)
    staying = planned.device.get("quantised_weights", 0) / resident.device["quantised_weights"]
    assert staying == pytest.approx(0 if layers == "streamed" else 0.5)


# the others are in benchmarks/planned_memory.py; each is like one of these
METHODS = (
    "lora", "pissa", "dora", "adalora", "houlsby", "p_tuning", "prefix_projected", "full", "modules", "lora_head_and_new_tokens"
)  # fmt: skip
KEPT = ("dora", "head")


@pytest.mark.parametrize("name", [*METHODS, *(f"{name}, kept" for name in KEPT)])
@pytest.mark.sampled
def test_step_of_every_method_takes_what_was_estimated(name: str, models: dict[str, Path]) -> None:
    """A head that trains has a gradient in fp32, virtual tokens lengthen the rows, lower layers may need no backward."""
    key, _, kept = name.partition(", ")
    case = CASES_OF_METHODS[key]
    model = adapted_model(models["mid"], method=case.section, quantization=case.quantization)
    bare = skeleton_of(models["mid"], case.section, quantization=case.quantization)
    compare(name, model, 96, planned_from=bare, batch_size=2, micro_batch_size=2, gradient_checkpointing=not kept)


@pytest.mark.parametrize("name", ["adalora", "pissa", "p_tuning", "prefix_projected"])
def test_method_state_is_counted_once(name: str, models: dict[str, Path]) -> None:
    """What a checkpoint holds beside the adapter, less what trains and is counted already: a network's weights."""
    case = CASES_OF_METHODS[name]
    model = adapted_model(models["tiny"], method=case.section, quantization=case.quantization)
    training = TrainingSection(steps=9, batch_size=2)
    trainer = Trainer(model, rows_of(model, 2, 16), training)
    next(trainer)
    found = holdings(model, training, "cpu", MemorySection())[0]["method_state"]
    trained = {values.data_ptr() for values in model.trainable_parameters().values()}
    assert found == sum(values.nbytes for values in model.method_state().values() if values.data_ptr() not in trained)
    per_weight = {"adalora": 2, "pissa": 1, "p_tuning": 0, "prefix_projected": 0}[name]
    assert found == pytest.approx(4 * per_weight * model.count_trainable(), rel=0.05, abs=8)


@pytest.mark.parametrize(("size", "length"), [("wide", 64), ("mid", 192)])
def test_evaluation_takes_less_than_a_step(size: str, length: int, models: dict[str, Path]) -> None:
    """With the peak in the loss, and in a layer."""
    model = adapted_model(models[size])
    training = TrainingSection(batch_size=2, micro_batch_size=2)
    rows = rows_of(model, 2, length)
    assert peak_of(lambda: score(model, rows, 2, training.loss_chunk)) <= estimate(model, training, length, CPU).step


def test_estimate_needs_no_weights(models: dict[str, Path]) -> None:
    training = TrainingSection(batch_size=4, micro_batch_size=2)
    bare, model = skeleton_of(models["mid"]), adapted_model(models["mid"])
    assert estimate(bare, training, 128, CPU) == estimate(model, training, 128, CPU)
    assert not any(values.is_meta for values in model.model.parameters())
    assert all(values.grad is None for values in model.model.parameters())


def test_a_method_that_waits_for_data_is_estimated_without(models: dict[str, Path]) -> None:
    """EVA refuses a forward before it has seen data; it then takes what LoRA takes."""
    bare = skeleton_of(models["tiny"], LoRA(r=4, init="eva"))
    found = estimate(bare, TrainingSection(), 16, CPU)
    assert found == estimate(skeleton_of(models["tiny"], LoRA(r=4)), TrainingSection(), 16, CPU)
    with pytest.raises(MethodError):
        bare.layers()[0](torch.empty(1, 64, device="meta"))


def test_kinds_add_up_and_the_peak_is_the_largest_phase(models: dict[str, Path]) -> None:
    for size in ("mid", "wide"):
        found = estimate(skeleton_of(models[size]), TrainingSection(batch_size=2), 64, CPU)
        assert sum(found.device.values()) == found.total == max(found.phases.values()) == found.phases[found.peak_phase]
        assert (found.host, found.host_total) == ({}, found.total)
        assert all(kind.replace("_", " ") in str(found) for kind in found.device)
    assert found.peak_phase == "loss"
    assert "loss_chunk" in found.device


def test_a_gpus_allocator_reserves_more_than_it_gives_out(models: dict[str, Path]) -> None:
    """By a quarter of what comes and goes in a step, and nothing of what stays."""
    found = on_gpu(skeleton_of(models["deep"]))
    assert found.device["fragments"] == found.step // 4
    assert found.allocated == found.total - RUNTIME["cuda"] - found.step // 4
    assert found.total == max(found.phases.values())


def on_gpu(model: AdaptedModel, **memory: Any) -> Estimate:
    training = TrainingSection(batch_size=4, micro_batch_size=1)
    return estimate(model, training, 64, GPU, memory=MemorySection(**memory))


def test_every_place_is_counted_where_it_is(models: dict[str, Path]) -> None:
    """What leaves a GPU is in host memory or on the disk; nothing is lost and nothing is there twice."""
    model = skeleton_of(models["deep"])
    stays, half = on_gpu(model), on_gpu(model, layers=3, slots=2)
    image = on_gpu(model, layers="streamed", slots=2).device["layer_slots"] // 2
    packed = stays.device["quantised_weights"]
    assert half.device["quantised_weights"] == packed // 2
    assert (half.device["layer_slots"], half.host["pinned_layers"]) == (2 * image, 3 * image)
    assert packed / 6 <= image < 1.2 * packed / 6  # each tensor is rounded up
    assert stays.total - half.total == packed // 2 - 2 * image
    disk = on_gpu(model, layers=3, tier="disk")
    assert (disk.disk, disk.host["pinned_staging"]) == ({"file_cache": 6 * image}, 2 * image)
    assert disk.device == half.device
    ends = on_gpu(model, embedding="host", head="host")
    embedding: Any = model.model.get_input_embeddings()  # type: ignore[operator]
    size = embedding.weight.numel() * embedding.weight.itemsize
    tied = model.model.config.tie_word_embeddings  # type: ignore[union-attr]
    assert stays.device["other_weights"] - ends.device["other_weights"] == (1 if tied else 2) * size
    assert sum(ends.host.values()) - sum(stays.host.values()) == (1 if tied else 2) * size
    away = on_gpu(model, layer_inputs="host")
    one = 4 * 64 * 128 * 4
    assert away.host["pinned_layer_inputs"] == 6 * one
    assert (
        stays.phases["forward"] - away.phases["forward"] == 5 * one * 5 // 4
    )  # but for the newest; and no fragments of them
    assert stays.phases["backward"] - away.phases["backward"] > 2 * one
    pinned = [sum(n for kind, n in each.host.items() if kind.startswith("pinned")) for each in (stays, away)]
    assert pinned == [0, 6 * one]


def test_what_is_planted_does_not_travel(models: dict[str, Path], tmp_path: Path) -> None:
    """Images are made before a method is planted; memory and speed count one number, and it is the file's."""
    memory = MemorySection(layers="streamed", tier="disk", cache=str(tmp_path))
    model = adapted_model(models["deep"], Bottleneck(form="houlsby", size=8), memory=memory)
    bare = skeleton_of(models["deep"], Bottleneck(form="houlsby", size=8))
    written = sum(file.stat().st_size for file in tmp_path.rglob("layers.bin"))
    assert holdings(bare, TrainingSection(), "cuda", memory)[2]["file_cache"] == written
    placement: Any = model.base.placement
    assert shapes_of(bare).layer_bytes == tuple(image.bytes for image in placement.images.values())


def test_layers_spread_over_processes_are_a_part_on_each(models: dict[str, Path]) -> None:
    model, training = skeleton_of(models["mid"]), TrainingSection()
    numbers = sum(values.numel() for values in model.trainable_parameters().values())
    host = holdings(model, training, "cuda", MemorySection(layers="streamed"))[1]["pinned_layers"]
    spread = MemorySection(layers="streamed", tier="processes")
    for processes in (1, 2, 3):
        device, beside, disk = holdings(model, training, "cuda", spread, processes, processes)
        assert device["layer_parts"] == -(-host // processes)
        assert device["gradient_sums"] == (4 * numbers if processes > 1 else 0)
        assert not disk
        assert "pinned_layers" not in beside
        shared = holdings(model, training, "cuda", MemorySection(layers="streamed"), processes, processes)[1]
        assert shared["pinned_layers"] == -(-host // processes)


def test_layers_that_train_whole_are_a_share_on_each(models: dict[str, Path]) -> None:
    model, training = skeleton_of(models["mid"], Full(), quantization="none"), TrainingSection()
    spread = MemorySection(layers="streamed", tier="processes")
    alone = holdings(model, training, "cuda", MemorySection(), 2, 2)[0]
    device = holdings(model, training, "cuda", spread, 2, 2)[0]
    parameters = model.trainable_parameters()
    mine, inside = largest_share(parameters, 2), [*apart(model.model, parameters, spread).values()]
    elsewhere = [values for layer in inside for name, values in layer.items() if name not in mine]
    assert len(inside) == len(layers_of(model.model))
    parameters["a single number"] = layers_of(model.model)[0].scale = torch.nn.Parameter(torch.zeros(1))  # type: ignore[assignment]
    assert not any("a single number" in layer for layer in apart(model.model, parameters, spread).values())
    del layers_of(model.model)[0].scale, parameters["a single number"]
    assert alone["adapter"] - device["adapter"] == sum(values.nbytes for values in elsewhere)
    largest = max(sum(values.nbytes for name, values in layer.items() if name not in mine) for layer in inside)
    assert device["layer_slots"] == 2 * largest
    whole = estimate(model, training, 64, GPU, memory=MemorySection(), processes=2, sharing=2)
    less = estimate(model, training, 64, GPU, memory=spread, processes=2, sharing=2)
    saved = 4 * sum(values.numel() for values in elsewhere) - largest  # the layer's in fp32, as its weights are
    assert whole.device["gradients"] - less.device["gradients"] <= saved
    assert less.phases["optimizer"] < whole.phases["optimizer"]


def test_paged_moments_are_in_host_memory(models: dict[str, Path]) -> None:
    model = skeleton_of(models["deep"])
    found = estimate(model, TrainingSection(optimizer="paged_adamw"), 64, GPU)
    largest = max(p.numel() for p in model.trainable_parameters().values())
    assert found.host["paged_optimizer"] == 8 * model.count_trainable()
    assert found.device["optimizer"] == 8 * largest


@pytest.mark.parametrize("parameters", [(), ("experts.down_proj",)])
def test_experts_that_all_tokens_visit_take_what_was_estimated(parameters: tuple[str, ...], tmp_path: Path) -> None:
    """The worst case, which a dry run takes: a router that tells no token from another. Any other takes less."""
    sizes = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 256, "hidden_size": 128}
    folder = any_checkpoint(tmp_path / "model", "Qwen3Moe", **sizes)
    method = LoRA(r=4, target_parameters=parameters)
    model = adapted_model(folder, method, compute_dtype="fp32")
    planned = skeleton_of(folder, method)
    assert weight_bytes(model.model, set()) == weight_bytes(planned.model, set())
    for layer in layers_of(model.model):
        layer.mlp.gate.weight.zero_()  # type: ignore[operator, union-attr]
    compare(f"experts {parameters}", model, 128, planned_from=planned, batch_size=2, micro_batch_size=1)
