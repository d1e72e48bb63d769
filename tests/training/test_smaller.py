"""The law of short memory: a step for which it runs out is taken again, and the run is the one that it would have been."""

from __future__ import annotations

import gc
import json
import sys
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from qlora.errors import DoesNotFitError, RecipeError, RunError
from qlora.evaluation.score import score
from qlora.methods.base import AdaptedModel
from qlora.model.anatomy import layers as decoder_layers
from qlora.model.loss import batch_loss
from qlora.recipe import MemorySection, TrainingSection
from qlora.residence.layers import RecomputedLayer, unwrap_layers
from qlora.training import recover
from qlora.training.log import Progress, Step
from qlora.training.loop import Trainer
from qlora.training.objectives import tokens
from qlora.training.way import Way
from tests.steps import GRADIENT, LATER, LOSS, go, take
from tests.tiny import adapter_bytes, random_rows, small_model, stir, tiny_checkpoint, tiny_model

ROWS = random_rows(80, seed=1)[:19]  # by 8: steps of 8, 8 and 3 rows an epoch
WAYS: dict[str, dict[str, Any]] = {
    "layer_major": {},
    "micro_batch_major": {"accumulation": "micro_batch_major"},
    "resident": {"gradient_checkpointing": False},
}
every_way = pytest.mark.parametrize("way", WAYS)


def section(**values: Any) -> TrainingSection:
    return TrainingSection(**{"batch_size": 8, "micro_batch_size": 4, "learning_rate": 1e-2, "steps": 5, **values})


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_checkpoint(tmp_path_factory.mktemp("base"), "qwen2")


@pytest.fixture(scope="module")
def one_model(folder: Path) -> AdaptedModel:
    return tiny_model(folder)


@pytest.fixture(autouse=True)
def no_collection(monkeypatch: pytest.MonkeyPatch) -> None:
    """Python's collector goes through all that is imported here, and the law is to hold without it."""
    monkeypatch.setattr(gc, "collect", lambda: 0)


@pytest.fixture
def model(one_model: AdaptedModel) -> Iterator[AdaptedModel]:
    stir(one_model, 0.05)
    for layer in one_model.planted.values():
        layer.dropout = 0.0
    yield one_model
    unwrap_layers(one_model.model)


@pytest.fixture
def dropping(model: AdaptedModel) -> AdaptedModel:
    for layer in model.planted.values():
        layer.dropout = 0.2
    return model


def refuse(
    kind: type[BaseException] = torch.OutOfMemoryError, text: str = "CUDA out of memory. Tried 2 GiB.\n"
) -> None:
    raise kind(text)


@contextmanager
def short_of_memory(
    model: AdaptedModel, most: int, when: str = "forward", layer: int = 1, **how: Any
) -> Iterator[list[int]]:
    """Inside, more than ``most`` rows at once do not fit into a layer, in training. The refused counts are listed."""
    refused: list[int] = []

    def look(module: torch.nn.Module, args: tuple[torch.Tensor, ...]) -> None:
        if module.training and len(args[0]) > most and torch.is_grad_enabled() == (when == "backward"):
            refused.append(len(args[0]))
            refuse(**how)

    place = decoder_layers(model.model)[layer]
    place = place.layer if isinstance(place, RecomputedLayer) else place
    handle = place.register_forward_pre_hook(look)
    try:
        yield refused
    finally:
        handle.remove()


def test_the_ways_become_smaller_until_there_is_none() -> None:
    way: Way | None = Way(9, True, 100)
    found = []
    while way := way.smaller(8):
        found.append((way.micro_batch_size, way.layer_major, way.loss_chunk))
    keeping: Way | None = Way(9, True, 100, kept=5)
    kept = []
    while (keeping := keeping.smaller(8)) and keeping.micro_batch_size == 9:
        kept.append(keeping.kept)
    assert kept == [2, 1, 0]  # recomputing more comes before anything else
    assert found == [
        (4, True, 100), (2, True, 100), (1, True, 100), (1, False, 100), (1, False, 50), (1, False, 25), (1, False, 16),
    ]  # fmt: skip
    assert found == sorted(found, reverse=True)  # so that the lesser of two is the smaller way
    assert Way(4, True, 16).smaller(1) is None  # a step of one row: neither fewer rows nor another order
    assert Way(4, True, 32).smaller(1) == Way(4, True, 16)
    assert Way(1, False, 8).smaller(8) is None
    for one in (Way(2, True, 3), Way(1, False, 256, 7)):
        assert Way.from_values(json.loads(json.dumps(one.values()))) == one
    assert not Way.of(section(recompute="none"), 2).layer_major


@pytest.mark.parametrize(
    ("way", "when"),
    [
        ("layer_major", "forward"),
        ("layer_major", "backward"),
        ("micro_batch_major", "backward"),
        ("resident", "backward"),  # that is, with a graph: its forward
    ],
)
@pytest.mark.sampled
def test_the_curve_is_the_one_of_fewer_rows_from_that_step_on(
    dropping: AdaptedModel, tmp_path: Path, way: str, when: str
) -> None:
    """With dropout, whose draws depend on the rows at once; bitwise."""
    trainer = Trainer(dropping, ROWS, section(**WAYS[way]), tmp_path)
    expected = take(trainer, 2)
    fewer = Trainer(dropping, ROWS, section(**WAYS[way], micro_batch_size=2))
    fewer.load(trainer.save())
    expected += take(fewer, 3)
    wanted = adapter_bytes(dropping)

    stir(dropping, 0.05)
    trainer = Trainer(dropping, ROWS, section(**WAYS[way]))
    found = take(trainer, 2)
    state = torch.get_rng_state()
    with short_of_memory(dropping, 2, when) as refused:
        steps = [next(trainer) for _ in range(3)]
    # rows of a short step; once, and then it is known. Two layers that keep activations are recomputed first, one by one
    assert refused == [3] * (3 if way == "resident" else 1)
    found += [(step.loss, step.grad_norm) for step in steps]
    assert found == expected
    assert adapter_bytes(dropping) == wanted
    assert torch.equal(torch.get_rng_state(), state)
    assert [step.micro_batch_size for step in steps] == [2, 2, 2]
    assert [bool(step.note) for step in steps] == [True, False, False]
    assert steps[0].note.endswith(
        "Step 3 did not fit into memory (CUDA out of memory. Tried 2 GiB): from here on 2 rows at once instead of "
        "4, same rows and result."
    )


@every_way
def test_the_curve_is_that_of_enough_memory(model: AdaptedModel, way: str) -> None:
    """Without dropout only the order of sums differs."""
    expected = take(Trainer(model, ROWS, section(**WAYS[way])), 3)
    stir(model, 0.05)
    trainer = Trainer(model, ROWS, section(**WAYS[way]))
    with short_of_memory(model, 1, "backward" if way == "resident" else "forward") as refused:
        found = take(trainer, 3)
    assert list(dict.fromkeys(refused)) == [4, 2]
    assert trainer.micro_batch_size == 1
    assert found[0] == pytest.approx(expected[0], rel=GRADIENT)
    for one, other in zip(found, expected, strict=True):
        assert one == pytest.approx(other, rel=LATER)


def test_a_loss_scale_that_fell_is_found_again(dropping: AdaptedModel) -> None:
    """fp16: two overflows in the step, memory runs out after the first. The replay meets both, from the same scale."""

    def run(most: int) -> tuple[list[tuple[float, float]], float, dict[str, bytes]]:
        stir(dropping, 0.05)
        trainer = Trainer(dropping, ROWS, section())
        trainer.state.loss_scale, trainer.state.step = 2.0**10, recover.SCALE_GROWTH - 1
        trainer.total_steps = trainer.step_number + 2
        scales: list[float] = []

        def overflow(values: torch.Tensor) -> None:
            assert values.grad is not None
            scales.append(trainer.state.loss_scale)
            if trainer.state.loss_scale > 2.0**9:
                values.grad.fill_(torch.inf)

        handle = trainer.state.parameters["model.layers.0.self_attn.q_proj.lora_A"].register_post_accumulate_grad_hook(overflow)  # fmt: skip
        if most < 4:
            go(trainer, Way(2, True, 256))
        with short_of_memory(dropping, 2 if most == 4 else 8, "backward", layer=0):
            found = take(trainer, 2)
        handle.remove()
        assert max(scales) == 2.0**11  # doubled once, whatever was taken again
        return found, trainer.state.loss_scale, adapter_bytes(dropping)

    assert run(4) == run(2)


def test_what_the_failed_try_held_is_gone_before_the_next(model: AdaptedModel) -> None:
    trainer = Trainer(model, ROWS, section())
    held: list[weakref.ref[torch.Tensor]] = []
    alive: list[int] = []

    def hold(module: torch.nn.Module, args: tuple[torch.Tensor, ...], output: torch.Tensor) -> None:
        if module.training:
            alive.append(sum(one() is not None for one in held))
            held.append(weakref.ref(output))

    gc.disable()
    try:
        with short_of_memory(model, 2, "backward", layer=0) as refused:
            embedding: Any = model.model.get_input_embeddings()  # type: ignore[operator]
            inside = [embedding.register_forward_hook(hold), model.model.model.norm.register_forward_hook(hold)]  # type: ignore[operator, union-attr]
            next(trainer)
    finally:
        gc.enable()
        for handle in inside:
            handle.remove()
    assert refused == [4]
    assert len(held) == 4
    assert alive == [0, 1, 0, 1]  # the embedding's output is the first layer's kept input


def test_in_backward_it_leaves_no_gradients(model: AdaptedModel, monkeypatch: pytest.MonkeyPatch) -> None:
    """The upper layer has some already when the lower one is refused."""
    trainer = Trainer(model, ROWS, section())
    seen: list[int] = []

    def release(device: torch.device) -> None:
        seen.append(sum(values.grad is not None for values in trainer.state.parameters.values()))

    monkeypatch.setattr(recover, "release_memory", release)
    with short_of_memory(model, 2, "backward", layer=0):
        next(trainer)
    assert seen == [0]


@pytest.mark.parametrize(
    "how",
    [
        {
            "kind": RuntimeError,
            "text": "[enforce fail at alloc_cpu.cpp:127] DefaultCPUAllocator: can't allocate memory",
        },
        {"kind": RuntimeError, "text": "CUDA error: out of memory"},
        {"kind": RuntimeError, "text": "CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"},
        {"kind": MemoryError, "text": "Unable to allocate 2 GiB"},
        {"kind": DoesNotFitError, "text": "A layer's input takes 2 GiB of host memory, which were refused."},
    ],
    ids=["cpu", "driver", "cublas", "numpy", "ours"],
)
def test_memory_is_refused_in_many_words(model: AdaptedModel, how: dict[str, Any]) -> None:
    trainer = Trainer(model, ROWS, section())
    with short_of_memory(model, 2, **how):
        assert next(trainer).micro_batch_size == 2


def test_other_errors_are_no_shortage(model: AdaptedModel) -> None:
    trainer = Trainer(model, ROWS, section())
    with (
        short_of_memory(model, 2, kind=RuntimeError, text="shapes differ"),
        pytest.raises(RuntimeError, match="shapes"),
    ):
        next(trainer)
    assert trainer.micro_batch_size == 4


def losses_in_chunks_of(most: int) -> Callable[..., Any]:
    def small_loss(model: Any, batch: Any, chunk: int) -> Any:
        if chunk > most:
            refuse()
        return batch_loss(model, batch, chunk)

    return small_loss


def test_all_the_way_down(model: AdaptedModel, monkeypatch: pytest.MonkeyPatch) -> None:
    """Logits that do not fit: fewer rows do not help, and neither does their order."""
    expected = take(Trainer(model, ROWS, section()), 2)
    stir(model, 0.05)
    monkeypatch.setattr(tokens, "batch_loss", losses_in_chunks_of(50))
    trainer = Trainer(model, ROWS, section(loss_chunk=90))
    step = next(trainer)
    assert trainer.state.way == Way(1, False, 45)
    assert "micro_batch_major accumulation instead of layer_major" in step.note
    assert step.note.endswith("a loss chunk of 45 instead of 90, same rows and result.")
    assert step.note.count("Step 1 did not fit") == 4
    assert (step.loss, step.grad_norm) == pytest.approx(expected[0], rel=GRADIENT)
    assert next(trainer).loss == pytest.approx(expected[1][0], rel=LATER)


@pytest.mark.parametrize("at", [0, 2])
def test_when_nothing_smaller_exists_it_stops_with_a_checkpoint(
    model: AdaptedModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, at: int
) -> None:
    expected = take(Trainer(model, ROWS, section(micro_batch_size=1, loss_chunk=16)), 4)
    stir(model, 0.05)
    trainer = Trainer(model, ROWS, section(micro_batch_size=1, loss_chunk=16), tmp_path)
    found = take(trainer, at)
    before = adapter_bytes(model)
    with monkeypatch.context() as patched:
        patched.setattr(tokens, "batch_loss", losses_in_chunks_of(0))
        with pytest.raises(DoesNotFitError, match=rf"Step {at + 1} .*no smaller way is left.*max_length.*budget=auto") as error:  # fmt: skip
            next(trainer)
    assert adapter_bytes(model) == before
    place = tmp_path / "checkpoints" / f"{at:06d}"
    assert place.is_dir() == (at > 0) == (str(place) in str(error.value))
    if at:  # the state is whole, and the way is the one that it began with
        stir(model, 0.3)
        again = Trainer(model, ROWS, section(micro_batch_size=1, loss_chunk=16), tmp_path)
        again.load(place)
        assert again.state.way == Way(1, True, 16)
        assert found + take(again, 2) == expected


@pytest.mark.parametrize("optimizer", ["adamw", "adamw_8bit"])
def test_a_resumed_run_goes_the_smaller_way_too(dropping: AdaptedModel, tmp_path: Path, optimizer: Any) -> None:
    trainer = Trainer(dropping, ROWS, section(optimizer=optimizer), tmp_path)
    take(trainer, 1)
    with short_of_memory(dropping, 2):
        take(trainer, 2)
    place = trainer.save()
    expected = take(trainer, 2)
    wanted = adapter_bytes(dropping)
    assert json.loads((place / "state.json").read_text())["smaller"] == {
        "micro_batch_size": 2, "accumulation": "layer_major", "loss_chunk": 256, "layers_kept": 0,
    }  # fmt: skip
    stir(dropping, 0.3)
    again = Trainer(dropping, ROWS, section(optimizer=optimizer), tmp_path)
    again.load(place)
    assert again.state.way == Way(2, True, 256)
    assert [boundary.rows for boundary in decoder_layers(dropping.model)] == [2, 2]
    assert take(again, 2) == expected
    assert adapter_bytes(dropping) == wanted
    smaller = Trainer(dropping, ROWS, section(optimizer=optimizer, micro_batch_size=1), tmp_path)
    smaller.load(place)
    assert smaller.micro_batch_size == 1  # less than was known to be enough then


def test_layers_that_cannot_be_cut_take_their_rows_one_after_the_other(tmp_path: Path) -> None:
    """Bloom's bias has no row for each row, so layer-major takes all rows at once or none."""
    model = small_model("bloom", tmp_path)
    rows = random_rows(8, packing=False, seed=4)
    expected = take(Trainer(model, rows, section(micro_batch_size=8)), 2)
    stir(model, 0.05)
    trainer = Trainer(model, rows, section(micro_batch_size=8))
    with short_of_memory(model, 2):
        found = take(trainer, 2)
    assert trainer.state.way == Way(1, False, 256)
    assert found[0] == pytest.approx(expected[0], rel=GRADIENT)
    assert found[1] == pytest.approx(expected[1], rel=LATER)


def test_memory_for_the_moments_may_be_missing_too(
    model: AdaptedModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Some parameters may have moved then: the step cannot be taken again, and what is there is not to be saved."""
    trainer = Trainer(model, ROWS, section(), tmp_path)
    take(trainer, 2)
    place = trainer.save()
    expected = take(trainer, 1)
    with monkeypatch.context() as patched:
        patched.setattr(trainer.state.optimizer, "step", refuse)
        with pytest.raises(DoesNotFitError, match=r"while step 4 changed the parameters \(CUDA out of memory.*checkpoint is whole"):  # fmt: skip
            next(trainer)
    for act in (trainer.save, trainer.rehearse, lambda: next(trainer)):
        with pytest.raises(RunError, match="Step 4 was broken off"):
            act()
    trainer.load(place)
    assert take(trainer, 1) == expected


def test_everybody_is_told(capsys: pytest.CaptureFixture[str]) -> None:
    values: dict[str, Any] = {
        "epoch": 1.0, "loss": 1.0, "learning_rate": 1e-4, "grad_norm": 1.0, "target_tokens": 1, "tokens": 1,
        "tokens_per_second": 1.0, "peak_memory_bytes": 1, "seconds": 1.0, "micro_batch_size": 2,
    }  # fmt: skip
    told = Step(number=7, note="Step 7 did not fit.", **values)
    with Progress(9) as progress:
        progress.show(told)
    assert capsys.readouterr().err.startswith("Step 7 did not fit.\n")
    assert told.metrics()["note"] == "Step 7 did not fit."
    assert told.metrics()["micro_batch_size"] == 2
    assert "note" not in Step(number=7, **values).metrics()


def test_scoring_takes_fewer_rows_and_smaller_chunks(model: AdaptedModel, monkeypatch: pytest.MonkeyPatch) -> None:
    module = sys.modules["qlora.evaluation.score"]
    expected = score(model, ROWS[:6], 4)
    asked: list[tuple[int, int]] = []

    def little(network: Any, rows: Any, chunk: int) -> Any:
        asked.append((len(rows), chunk))
        if asked[-1] > (1, 32):
            refuse()
        return losses(network, rows, chunk)

    losses = module._losses
    monkeypatch.setattr(module, "_losses", little)
    found = score(model, ROWS[:6], 4, 64)
    assert (found.loss, found.target_tokens) == (pytest.approx(expected.loss, rel=LOSS), expected.target_tokens)
    assert asked == [(4, 64), (2, 64), (1, 64), *[(1, 32)] * len(ROWS[:6])]
    monkeypatch.setattr(module, "_losses", lambda *_: refuse())
    with pytest.raises(DoesNotFitError, match=r"one held-out row of \d+ tokens .*no smaller way"):
        score(model, ROWS[:6], 4)
    assert not model.model.training


@pytest.mark.parametrize(
    ("memory", "words"),
    [
        ({"layer_inputs": "host"}, "memory.layer_inputs=host"),
        ({"mlp_tile": 8, "layer_inputs": "host"}, "memory.layer_inputs=host, memory.mlp_tile"),
    ],
)
def test_what_needs_the_boundary_is_refused_without_it(model: AdaptedModel, memory: Any, words: str) -> None:
    with pytest.raises(RecipeError, match=rf"asks for {words}, .*recompute=none; set it to all"):
        Trainer(model, ROWS, section(gradient_checkpointing=False), memory=MemorySection(**memory))


def test_streamed_layers_need_the_boundary(model: AdaptedModel, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(model.base, "placement", SimpleNamespace(order=[0]), raising=False)
    with pytest.raises(RecipeError, match="layers that are streamed"):
        Trainer(model, ROWS, section(gradient_checkpointing=False))
    Trainer(model, ROWS, section())
    monkeypatch.setattr(model.base, "placement", SimpleNamespace(order=[0, 1]), raising=False)
    with pytest.raises(RecipeError, match=r"2 of 2 layers are streamed .*recompute=1; set it to all, or to 2 or more"):
        Trainer(model, ROWS, section(recompute=1))


def test_the_memory_section_reaches_the_layers_and_stays_in_a_smaller_way(dropping: AdaptedModel) -> None:
    """Tiled, with layer inputs on the host, and short of memory on top of it: bitwise what it is on the device."""
    curves = []
    for place in ("device", "host"):
        stir(dropping, 0.05)
        trainer = Trainer(dropping, ROWS, section(), memory=MemorySection(layer_inputs=place, mlp_tile=5))  # type: ignore[arg-type]
        with short_of_memory(dropping, 2, "backward", layer=0):
            curves.append((take(trainer, 3), adapter_bytes(dropping)))
        boundary: Any = decoder_layers(dropping.model)[0]
        assert (boundary.rows, boundary.inputs is trainer.passage.inputs) == (2, True)
    assert curves[0] == curves[1]
