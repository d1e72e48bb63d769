"""Streamed layers: who is fetched when, what a slot holds, and that nothing stays behind, not even after a fault."""

from __future__ import annotations

import gc
import itertools
import os
import subprocess
import sys
import threading
import time
import weakref
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import LlamaForCausalLM

from qlora.errors import ModelError
from qlora.evaluation.generate import answer
from qlora.methods.base import apply_method
from qlora.model.anatomy import layers as decoder_layers
from qlora.model.base import Base
from qlora.model.nf4 import FrozenLinear, dense_cached, dense_weight, is_away
from qlora.recipe import LoRA, MemorySection, ModelSection, Modules, TrainingSection
from qlora.residence.homes import HostHome
from qlora.residence.image import Image, frozen_linears
from qlora.residence.load import load_base
from qlora.residence.placement import POISON, Placement, Slot, next_layers, resident_layers
from qlora.training.loop import Trainer
from tests.model.test_load import theirs
from tests.tiny import any_checkpoint, logits_of, random_rows, stir, tiny_checkpoint, word_tokenizer

CPU = torch.device("cpu")
LAYERS = 6
ROWS = random_rows(12, seed=1)[:3]


@pytest.fixture(autouse=True)
def _poison(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Placement, "poison", True)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_checkpoint(tmp_path_factory.mktemp("base"), num_hidden_layers=LAYERS)


def base_of(folder: Path, quantization: str = "nf4", **memory: Any) -> Base:
    section = ModelSection(name=str(folder), quantization=quantization)  # type: ignore[arg-type]
    if "tier" in memory:
        memory = {"cache": str(folder / "cache"), **memory}
    return load_base(section, CPU, memory=MemorySection(**{"layers": "streamed", **memory}))


def trainer_of(base: Base, **training: Any) -> Trainer:
    model = apply_method(base, LoRA(r=2, dropout=0.1))
    stir(model, 0.05)
    return Trainer(model, ROWS, TrainingSection(**{"batch_size": 3, "micro_batch_size": 1, "steps": 200, **training}))


def placement_of(base: Base) -> Placement:
    assert base.placement is not None
    return base.placement


# --- which layers stay -------------------------------------------------------------------------------------------------


def test_resident_layers_are_spread_evenly() -> None:
    assert resident_layers("resident", 5) == {0, 1, 2, 3, 4}
    assert resident_layers("streamed", 5) == resident_layers(0, 5) == set()
    assert resident_layers(3, 6) == {1, 3, 5}
    assert resident_layers(7, 5) == resident_layers(5, 5) == {0, 1, 2, 3, 4}
    assert resident_layers(1, 1) == {0}
    for count in range(1, 40):
        for stay in range(count + 1):
            found = sorted(resident_layers(stay, count))
            assert len(found) == stay
            gaps = [b - a for a, b in itertools.pairwise(found)]
            assert not gaps or max(gaps) - min(gaps) <= 1


@pytest.mark.parametrize("memory", [{"layers": LAYERS}, {"layers": 99}, {"layers": "resident", "tier": "disk"}])
def test_a_resident_model_has_no_placement_and_no_cache(folder: Path, tmp_path: Path, memory: dict[str, Any]) -> None:
    base = base_of(folder, **{**memory, "tier": "disk", "cache": str(tmp_path / "none")})
    assert base.placement is None
    assert not any(is_away(linear) for linear in frozen_linears(decoder_layers(base.model)))
    assert not (tmp_path / "none").exists()


def test_layers_that_stay_are_ordinary(folder: Path) -> None:
    for tier in ("host", "disk"):
        base = base_of(folder, layers=2, tier=tier)
        placement = placement_of(base)
        assert placement.order == [0, 1, 3, 4]
        layers = decoder_layers(base.model)
        assert {n for n, layer in enumerate(layers) if all(is_away(x) for x in frozen_linears([layer]))} == {0, 1, 3, 4}
        assert all(linear.away is None for linear in frozen_linears([layers[2], layers[5]]))
        assert placement.bytes_on_device() == 2 * placement.images[0].bytes
        assert not any(values.requires_grad for values in base.model.parameters())


# --- what is fetched ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("slots", "tier"), [(2, "host"), (3, "disk"), (LAYERS, "disk"), (20, "host")])
@pytest.mark.sampled
def test_each_layer_is_fetched_at_most_twice_a_step_less_what_the_turns_reuse(
    folder: Path, slots: int, tier: str
) -> None:
    base = base_of(folder, slots=slots, tier=tier)
    placement, trainer = placement_of(base), trainer_of(base)
    assert len(placement.slots) == min(slots, LAYERS)
    next(trainer)
    begin = placement.fetched
    for _ in range(2):
        next(trainer)
    # each turn, at the top and at the bottom, finds as many layers as there are slots
    assert placement.fetched - begin == 2 * 2 * max(0, LAYERS - slots)


def test_micro_batch_major_reads_the_layers_once_more_for_each_micro_batch(folder: Path) -> None:
    base = base_of(folder)
    trainer = trainer_of(base, accumulation="micro_batch_major")
    next(trainer)
    begin = placement_of(base).fetched
    next(trainer)
    assert placement_of(base).fetched - begin == 3 * 2 * (LAYERS - 2)


@pytest.mark.parametrize("slots", [2, 3])
def test_the_next_layers_are_asked_for_before_this_one_computes(folder: Path, slots: int) -> None:
    base = base_of(folder, slots=slots)
    placement, trainer = placement_of(base), trainer_of(base, micro_batch_size=3)
    next(trainer)
    events: list[tuple[str, int]] = []
    fetch = placement._fetch

    def asked(layer: int, slot: Slot) -> None:
        events.append(("asked", layer))
        fetch(layer, slot)

    placement._fetch = asked  # type: ignore[method-assign]
    for number, boundary in enumerate(decoder_layers(base.model)):
        inside: Any = boundary
        inside.layer.register_forward_hook(lambda *_, number=number: events.append(("done", number)))
    next(trainer)
    turn = events.index(("done", LAYERS - 1)) + 1
    for way, part in ((1, events[:turn]), (-1, events[turn:])):
        assert [layer for what, layer in part if what == "asked"] == [*range(LAYERS)][::way][slots:]
        for what, layer in part:
            if what == "asked":
                assert part.index(("asked", layer)) < part.index(("done", layer - way))


def test_computing_and_fetching_overlap(folder: Path) -> None:
    """The next layer begins to come while this one computes, and this one is done while the next one still comes."""
    base = base_of(folder)
    placement, layers = placement_of(base), decoder_layers(base.model)
    begun, done = ([threading.Event() for _ in range(LAYERS)] for _ in range(2))
    alone: list[str] = []
    read = placement.home.read

    def fetch(layer: int, memory: Tensor, start: int = 0) -> None:
        begun[layer].set()
        if layer > 1 and not done[layer - 1].wait(20):
            alone.append(f"layer {layer - 1} waited for {layer}")
        read(layer, memory, start)

    def computed(layer: int) -> None:
        if layer + 1 < LAYERS and not begun[layer + 1].wait(20):
            alone.append(f"{layer + 1} was not asked for while {layer} computed")
        done[layer].set()

    placement.home.read = fetch  # type: ignore[method-assign]
    for number, layer in enumerate(layers):
        layer.register_forward_hook(lambda *_, number=number: computed(number))
    logits_of(base.model)
    assert not alone


def test_a_pass_that_breaks_off_is_followed_by_a_right_one(folder: Path) -> None:
    base = base_of(folder)
    expected = logits_of(base.model)
    for broken in (0, 1, 3, 5):
        hook = decoder_layers(base.model)[broken].register_forward_hook(_interrupted)
        with pytest.raises(KeyboardInterrupt):
            logits_of(base.model)
        hook.remove()
        assert torch.equal(logits_of(base.model), expected)


def test_a_pass_in_inference_mode_spoils_nothing(folder: Path) -> None:
    plain, trainer = (trainer_of(base_of(folder, "none", tier="disk")) for _ in range(2))
    with torch.inference_mode():
        trainer.model.model(torch.tensor([[5, 6, 7]]), use_cache=False)
    assert next(trainer).loss == next(plain).loss


def test_a_copy_that_trains_whole_does_not_bring_its_layer_in(folder: Path) -> None:
    base = base_of(folder, layers=LAYERS - 1)
    placement = placement_of(base)
    assert placement.order == [0]
    model = apply_method(base, Modules(modules=("layers.0",)))
    logits_of(model.model)
    assert placement.fetched == 0
    with model.disabled():
        logits_of(model.model)
    assert placement.fetched == 1


def _interrupted(*_: Any) -> None:
    raise KeyboardInterrupt


@pytest.mark.parametrize("order", [[3, 0, 5, 1, 4, 2, 2, 0], [5, 4, 3, 4, 5, 0], [2, 3, 4, 3, 2, 1, 0, 1]])
def test_layers_may_be_called_in_any_order(folder: Path, order: list[int]) -> None:
    plain = load_base(ModelSection(name=str(folder)), CPU)
    base = base_of(folder, slots=3)
    for number in order:
        placement_of(base).visit(number)
        pairs = zip(
            frozen_linears([decoder_layers(base.model)[number]]),
            frozen_linears([decoder_layers(plain.model)[number]]),
            strict=True,
        )
        for found, expected in pairs:
            assert not is_away(found)
            assert torch.equal(dense_weight(found, torch.float32), dense_weight(expected, torch.float32))


# --- a broken one is found out -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["right", "wrong slot", "no wait"])
def test_a_broken_visit_shows(folder: Path, monkeypatch: pytest.MonkeyPatch, kind: str) -> None:
    """The tests of memory's law would notice what a visit could do wrong."""
    base = base_of(folder, quantization="none")
    expected = logits_of(base.model)
    placement = placement_of(base)
    placement.current = -1

    def visit(layer: int) -> None:
        Placement.visit(placement, layer)
        slot = next(slot for slot in placement.slots if slot.layer == layer)
        if kind == "wrong slot":
            placement.images[layer].attach(next(other for other in placement.slots if other is not slot).memory)
        elif kind == "no wait":  # what lies there before anything has arrived
            slot.memory.fill_(POISON)

    monkeypatch.setattr(placement, "visit", visit)
    assert torch.equal(logits_of(base.model), expected) == (kind == "right")


def test_a_slot_is_poisoned_when_its_layer_leaves_and_the_linears_hold_nothing(folder: Path) -> None:
    base = base_of(folder, quantization="none")
    placement, layers = placement_of(base), decoder_layers(base.model)
    placement.visit(0)
    kept: Any = next(frozen_linears([layers[0]]))
    weight = kept.weight
    slot = next(slot for slot in placement.slots if slot.layer == 0)
    read = threading.Event()
    monkey = placement.home.read
    placement.home.read = lambda *args: (read.wait(5), monkey(*args))[1]  # type: ignore[method-assign, func-returns-value]
    worker = threading.Thread(target=placement.visit, args=(1,))
    worker.start()  # fetches 2 into the slot of 0
    while slot.layer == 0:
        time.sleep(0.001)
    time.sleep(0.01)
    assert weight.isnan().all()
    assert kept.weight.is_meta
    read.set()
    worker.join()


def test_a_graph_that_kept_a_slot_fails_instead_of_using_it(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A plain linear's weight is kept by autograd. A file is read behind its back, so the slot says that it changed."""
    monkeypatch.setattr(Placement, "poison", False)
    base = base_of(folder, quantization="none", tier="disk")
    layers = decoder_layers(base.model)
    placement_of(base).visit(0)
    linear: Any = next(frozen_linears([layers[0]]))
    x = torch.randn(2, linear.in_features, requires_grad=True)
    y = linear(x).sum()
    placement_of(base).visit(3)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.backward()


# --- a single linear ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("quantization", ["nf4", "int8", "none"])
@pytest.mark.parametrize("tier", ["host", "disk"])
@pytest.mark.sampled
def test_a_single_linear_is_fetched_and_changed_while_its_layer_is_away(
    folder: Path, quantization: str, tier: str
) -> None:
    base, plain = (
        base_of(folder, quantization, tier=tier),
        load_base(
            ModelSection(name=str(folder), quantization=quantization),
            CPU,  # type: ignore[arg-type]
        ),
    )
    expected = logits_of(plain.model)
    logits_of(base.model)
    for number in (0, 2, LAYERS - 1):  # the last one lies in a slot, the first does not
        path = f"model.layers.{number}.mlp.up_proj"
        found: Any = base.model.get_submodule(path)
        ordinary: Any = plain.model.get_submodule(path)
        was_away = is_away(found)
        assert was_away == (number != LAYERS - 1)
        assert torch.equal(dense_weight(found, torch.float32), dense_weight(ordinary, torch.float32))
        assert is_away(found) == was_away
        other = torch.randn(found.out_features, found.in_features)
        for linear in (found, ordinary):
            if isinstance(linear, FrozenLinear):
                linear.place(other, CPU)  # type: ignore[operator]
            else:
                from qlora.methods.originals import put

                put(linear, other)
        assert torch.equal(dense_weight(found, torch.float32), dense_weight(ordinary, torch.float32))
    changed = logits_of(plain.model)
    assert torch.equal(logits_of(base.model), changed)
    assert not torch.equal(changed, expected)
    # what one process changed is its own: the cache is shared
    if tier == "disk":
        assert torch.equal(logits_of(base_of(folder, quantization, tier=tier).model), expected)


# --- generation --------------------------------------------------------------------------------------------------------


def test_a_streamed_model_is_not_dequantised_whole_to_answer(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cached: list[nn.Module] = []

    def counted(layer: nn.Module) -> Any:
        cached.append(layer)
        return dense_cached(layer)

    monkeypatch.setattr("qlora.evaluation.generate.dense_cached", counted)
    texts = []
    for base in (load_base(ModelSection(name=str(folder)), CPU), base_of(folder, layers=1, tier="disk")):
        model = apply_method(base, LoRA(r=2))
        stir(model, 0.05)
        texts.append(answer(model, [5, 6, 7], 6))
        assert len(cached) == 1
    assert texts[0] == texts[1]
    assert texts[0]


# --- what cannot be read -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("when", ["forward", "backward"])
def test_a_fault_of_the_reader_is_the_callers_and_the_next_step_is_right(folder: Path, when: str) -> None:
    plain, trainer = (trainer_of(base_of(folder)) for _ in range(2))
    expected = [next(plain).loss for _ in range(2)]
    losses = [next(trainer).loss]
    placement = placement_of(trainer.model.base)
    read, fetches = placement.home.read, 0

    def faulty(layer: int, memory: Tensor, start: int = 0) -> None:
        nonlocal fetches
        fetches += 1
        if fetches > (1 if when == "forward" else LAYERS - 1):
            raise ModelError("The file cache 'x' cannot be read.")
        read(layer, memory, start)

    placement.home.read = faulty  # type: ignore[method-assign]
    for _ in range(2):  # and it fails the same way again
        with pytest.raises(ModelError, match=r"^The file cache 'x' cannot be read\.$"):
            next(trainer)
        assert trainer.step_number == 1
        assert all(values.grad is None for values in trainer.state.parameters.values())
    placement.home.read = read  # type: ignore[method-assign]
    losses.append(next(trainer).loss)
    assert losses == expected


def test_memory_that_the_system_refuses(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from qlora.errors import DoesNotFitError

    def refuse(*_: Any, **__: Any) -> Tensor:
        raise RuntimeError("DefaultCPUAllocator: can't allocate memory")

    monkeypatch.setattr("qlora.machine.device.torch.empty", refuse)
    with pytest.raises((DoesNotFitError, RuntimeError), match="memory"):
        HostHome({0: 10}, CPU)


# --- nothing stays behind ----------------------------------------------------------------------------------------------


def open_files(place: Path) -> list[str]:
    found = []
    for entry in Path("/proc/self/fd").iterdir():
        try:
            found.append(os.readlink(entry))
        except OSError:
            continue
    return [target for target in found if str(place) in target]


def eventually(condition: Callable[[], bool]) -> bool:
    """A thread that was told to end needs a moment."""
    for _ in range(200):
        if condition():
            return True
        time.sleep(0.01)
    return False


@pytest.mark.skipif(not Path("/proc/self/fd").is_dir(), reason="needs Linux's list of open files")
def test_two_hundred_visits_leave_nothing_and_close_ends_it(folder: Path) -> None:
    base = base_of(folder, tier="disk", cache=str(folder / "own"))
    placement = placement_of(base)
    logits_of(base.model)
    (thread,) = placement.worker._threads
    assert len(open_files(folder / "own")) == 1
    objects = len(gc.get_objects())
    for _ in range(200 // LAYERS):
        logits_of(base.model)
    gc.collect()
    assert len(gc.get_objects()) - objects < 200
    assert set(placement.worker._threads) == {thread}
    assert len(open_files(folder / "own")) == 1
    assert placement.fetched > 150
    placement.close()
    placement.close()  # once is enough
    assert not thread.is_alive()
    assert not open_files(folder / "own")
    assert not any(layer._forward_pre_hooks for layer in decoder_layers(base.model))


@pytest.mark.skipif(not Path("/proc/self/fd").is_dir(), reason="needs Linux's list of open files")
@pytest.mark.parametrize("changed", [False, True], ids=["read", "changed"])
def test_a_base_that_is_let_go_closes_its_file_and_ends_its_thread(folder: Path, changed: bool) -> None:
    base = base_of(folder, tier="disk", cache=str(folder / "own"))
    trainer = trainer_of(base)
    next(trainer)
    if changed:
        linear: Any = decoder_layers(base.model)[0].layer.mlp.up_proj.base  # type: ignore[union-attr]
        linear.place(torch.randn(linear.out_features, linear.in_features), CPU)
        assert len(open_files(folder / "own")) == 2
    gone = weakref.ref(placement_of(base))
    (thread,) = placement_of(base).worker._threads
    del base, trainer
    linear = None
    gc.collect()
    assert gone() is None
    assert eventually(lambda: not thread.is_alive())
    assert not open_files(folder / "own")


DYING = """
import atexit, sys, time, torch
from qlora.recipe import MemorySection, ModelSection
from qlora.residence.load import load_base
base = load_base(ModelSection(name=sys.argv[1]), torch.device("cpu"), memory=MemorySection(layers="streamed", slots=4))
read = base.placement.home.read
def slow(*args):
    time.sleep(0.3)
    read(*args)
base.placement.home.read = slow
def fail(*_):
    global dies
    dies = time.perf_counter()
    raise KeyboardInterrupt
atexit.register(lambda: print(time.perf_counter() - dies))  # after the threads were waited for
base.model.model.layers[0].register_forward_hook(fail)
base.model(torch.tensor([[1, 2, 3]]))
"""


@pytest.mark.slow
def test_a_process_that_dies_in_the_middle_ends_at_once(folder: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-c", DYING, str(folder)],
        capture_output=True,
        text=True,
        timeout=120,
        cwd=Path(__file__).parents[2],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    assert "KeyboardInterrupt" in done.stderr
    assert done.returncode != 0
    assert "Exception ignored" not in done.stderr
    assert float(done.stdout) < 5


@pytest.mark.parametrize(
    ("layer", "before", "direction", "expected"),
    [
        (0, -1, 1, (1, [0, 2, 3])),  # a forward begins
        (2, 0, 1, (1, [2, 3, 7])),
        (7, 3, 1, (-1, [7, 3, 2])),  # its end, where backward begins
        (2, 3, -1, (-1, [2, 0])),
        (0, 7, 1, (1, [0, 2, 3])),  # no backward: another forward
        (3, -1, -1, (-1, [3, 2, 0])),  # nothing is there, after a failure: on as before
    ],
)
def test_the_next_layers(layer: int, before: int, direction: int, expected: tuple[int, list[int]]) -> None:
    assert next_layers([0, 2, 3, 7], layer, before, direction, 3) == expected


# --- kinds of checkpoints ----------------------------------------------------------------------------------------------


def streamed_and_plain(folder: Path, memory: dict[str, Any], **section: Any) -> Iterator[Tensor]:
    for where in ({}, {**memory, "cache": str(folder / "cache")}):
        base = load_base(ModelSection(name=str(folder), **section), CPU, memory=MemorySection(**where))
        assert (base.placement is None) == (not where)
        with torch.no_grad():
            yield base.model(torch.arange(3, 43).view(2, 20), use_cache=False).logits


MEMORIES = [{"layers": "streamed"}, {"layers": 1, "tier": "disk"}]


@pytest.mark.parametrize("quantization", ["nf4", "fp4", "int8"])
def test_prequantised_checkpoints_stream(tmp_path: Path, quantization: str) -> None:
    """Qwen 2 has biases; its embedding and head are tied here."""
    any_checkpoint(tmp_path / "dense", "Qwen2", tie_word_embeddings=True)
    for double in (False, True) if quantization == "nf4" else (False,):
        place = tmp_path / f"packed-{double}"
        theirs(tmp_path / "dense", quantization, double).save_pretrained(place)  # type: ignore[operator]
        word_tokenizer(eos_token="</s>").save_pretrained(place)
        for memory in MEMORIES:
            plain, streamed = streamed_and_plain(place, memory, quantization=quantization)
            assert torch.equal(plain, streamed)
            _, again = streamed_and_plain(place, memory, quantization=quantization)  # from the cache that is there
            assert torch.equal(plain, again)


def test_a_prequantised_checkpoint_whose_config_lies_about_it_is_refused(tmp_path: Path) -> None:
    import json

    any_checkpoint(tmp_path / "dense")
    place = tmp_path / "packed"
    theirs(tmp_path / "dense", "nf4", False).save_pretrained(place)  # type: ignore[operator]
    word_tokenizer(eos_token="</s>").save_pretrained(place)
    values = json.loads((place / "config.json").read_text())
    values["quantization_config"]["bnb_4bit_use_double_quant"] = True
    (place / "config.json").write_text(json.dumps(values))
    for memory in MEMORIES:
        with pytest.raises(ModelError, match=r"packed otherwise than its config\.json says .*memory\.layers=resident"):
            list(streamed_and_plain(place, memory))
    assert [path.suffix for path in (place / "cache").iterdir()] == [".lock"]


@pytest.mark.parametrize("quantization", ["nf4", "none"])
def test_linears_that_are_kept_in_fp32_stream(
    tmp_path: Path, quantization: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(LlamaForCausalLM, "_keep_in_fp32_modules_strict", ["o_proj", "input_layernorm"])
    monkeypatch.setattr(LlamaForCausalLM, "_keep_in_fp32_modules", ["o_proj", "input_layernorm"])
    any_checkpoint(tmp_path, dtype=torch.float32)
    section = {"quantization": quantization, "compute_dtype": "fp16"}
    for memory in MEMORIES:
        base = load_base(
            ModelSection(name=str(tmp_path), **section),  # type: ignore[arg-type]
            CPU,
            memory=MemorySection(**memory, cache=str(tmp_path / "cache")),  # type: ignore[arg-type]
        )
        plain = load_base(ModelSection(name=str(tmp_path), **section), CPU)  # type: ignore[arg-type]
        for name, values in plain.model.named_parameters():
            if name.endswith("weight"):
                wide = "o_proj" in name or "input_layernorm" in name
                assert values.dtype == (torch.float32 if wide else torch.float16), name
        found: Any = base.model.get_submodule("model.layers.0.self_attn.o_proj")
        expected: Any = plain.model.get_submodule("model.layers.0.self_attn.o_proj")
        assert type(found) is nn.Linear
        assert torch.equal(dense_weight(found, torch.float32), expected.weight)


def test_the_transposed_linears_of_gpt2_stream(tmp_path: Path) -> None:
    options = {"n_embd": 64, "n_layer": 3, "n_head": 4, "n_positions": 64}
    any_checkpoint(tmp_path, "GPT2", **options)
    for memory in MEMORIES:
        plain, streamed = streamed_and_plain(tmp_path, memory, quantization="none")
        assert torch.equal(plain, streamed)


def test_layers_that_share_a_linear_are_refused(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from qlora.model import skeleton

    made = skeleton.empty_linears

    def share(model: Any, *args: Any) -> None:
        made(model, *args)
        model.model.layers[3].mlp.up_proj = model.model.layers[0].mlp.up_proj

    monkeypatch.setattr(skeleton, "empty_linears", share)
    with pytest.raises(ModelError, match=r"share model\.layers\.0\.mlp\.up_proj, .*memory\.layers=resident"):
        base_of(folder)


# --- images ------------------------------------------------------------------------------------------------------------


def test_an_image_is_aligned_and_holds_every_tensor(folder: Path) -> None:
    base = base_of(folder)
    image: Image = placement_of(base).images[0]
    assert all(piece.start % 256 == 0 for piece in image.pieces)
    assert {piece.name for piece in image.pieces} == {
        "weight", "absmax", "code", "nested_absmax", "nested_code", "offset",
    }  # fmt: skip
    assert image.bytes >= sum(piece.bytes for piece in image.pieces)
    assert len(image.linears) == 7
    assert isinstance(placement_of(base).slots[0], Slot)
