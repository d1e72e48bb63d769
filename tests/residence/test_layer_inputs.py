"""Where layer inputs wait changes memory alone: the same bits come back, and nothing stays behind."""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from qlora.data.batches import collate
from qlora.errors import ModelError
from qlora.methods.base import AdaptedModel
from qlora.model.anatomy import layers as decoder_layers
from qlora.model.loss import batch_loss
from qlora.residence.layer_inputs import HostMemory, KeptInput, LayerInputs
from qlora.residence.layers import kept_by, unwrap_layers, wrap_layers
from tests.residence.test_layers import ROWS, step_gradients
from tests.steps import peak_of, same_bits
from tests.tiny import TOKENS, gradients, random_model, tiny_checkpoint, tiny_model

CPU = torch.device("cpu")
PLACES = ["device", "host", "host memory"]
PARTS = [slice(0, 2), slice(2, 4), slice(4, 5)]


def inputs_in(place: str) -> LayerInputs:
    """``host memory`` is what a GPU's ``host`` does, but for the streams."""
    inputs = LayerInputs("host" if place == "host memory" else place, CPU)
    if place == "host memory":
        inputs.place = "host"
    return inputs


@pytest.fixture(scope="module")
def adapted(tmp_path_factory: pytest.TempPathFactory) -> AdaptedModel:
    """Four layers: of two the last one's input never leaves."""
    return tiny_model(tiny_checkpoint(tmp_path_factory.mktemp("deep"), num_hidden_layers=4), dropout=0.0)


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> AdaptedModel:
    return tiny_model(tmp_path_factory.mktemp("llama"), dropout=0.3)


@pytest.fixture
def model(adapted: AdaptedModel) -> Iterator[AdaptedModel]:
    yield adapted
    unwrap_layers(adapted.model)


@pytest.fixture
def dropping(llama: AdaptedModel) -> Iterator[AdaptedModel]:
    yield llama
    unwrap_layers(llama.model)


@pytest.mark.parametrize("rows", [2, 7])
def test_gradients_are_the_same_bits(model: AdaptedModel, rows: int) -> None:
    wrap_layers(model.model, rows)
    expected = step_gradients(model)
    for place in PLACES:
        inputs = inputs_in(place)
        wrap_layers(model.model, rows, inputs)
        for _ in range(2):  # the second step uses memory again
            same_bits(step_gradients(model), expected)
        assert kept_by(model.model) == {inputs}
        assert not inputs.waiting


@pytest.mark.parametrize("place", PLACES)
def test_dropout_and_an_evaluation_in_the_middle(dropping: AdaptedModel, place: str) -> None:
    """What an evaluation reads neither waits nor is drawn for."""
    network = dropping.model
    batch = collate(ROWS, 0)

    def step(evaluate: bool) -> dict[str, Tensor]:
        network.train()
        torch.manual_seed(5)
        loss, _ = batch_loss(network, batch, 16)
        if evaluate:
            network.eval()
            with torch.no_grad():
                network(input_ids=TOKENS, use_cache=False)
            network.train()
        loss.backward()
        network.eval()
        return gradients(dropping)

    wrap_layers(network, 3)
    expected = step(False)
    wrap_layers(network, 3, inputs_in(place))
    same_bits(step(True), expected)


@pytest.mark.parametrize("place", PLACES[1:])
@pytest.mark.parametrize("order", [(0, 1), (1, 0)])
def test_several_forwards_before_their_backwards(dropping: AdaptedModel, place: str, order: tuple[int, int]) -> None:
    def step(inputs: LayerInputs | None) -> dict[str, Tensor]:
        wrap_layers(dropping.model, 2, inputs)
        dropping.model.train()
        torch.manual_seed(5)
        losses = [batch_loss(dropping.model, collate(rows, 0), 16)[0] for rows in (ROWS[:3], ROWS[3:])]
        for number in order:
            losses[number].backward()
        dropping.model.eval()
        return gradients(dropping)

    same_bits(step(inputs_in(place)), step(None))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_every_bit_comes_back(dtype: torch.dtype) -> None:
    inputs = inputs_in("host memory")
    bits = torch.randint(-(2**15), 2**15, (3, 5, 7, 6), dtype=torch.int16)
    hidden = [
        (one.int() * 65537 if dtype == torch.float32 else one).view(dtype) for one in bits
    ]  # NaN and infinity too
    hidden[1] = hidden[1].transpose(1, 2).contiguous().transpose(1, 2)  # as attention may leave it
    kept = [inputs.keep(one, PARTS) for one in hidden]
    inputs.settle()
    assert all(one.here is None for one in kept)
    for one, expected in reversed(list(zip(kept, hidden, strict=True))):
        for number, part in enumerate(PARTS):
            found = one.rows(number)
            assert found.dtype == dtype
            assert torch.equal(found.contiguous().view(torch.uint8), expected[part].contiguous().view(torch.uint8))
        one.forget()
    assert not inputs.waiting


def test_one_piece_ahead_and_the_turn_fetches_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    inputs = inputs_in("host memory")
    kept = [inputs.keep(torch.full((5, 2), float(number)), PARTS) for number in range(3)]
    assert [one.here is None for one in kept] == [True, True, False]
    seen: list[tuple[int, int]] = []
    fetch = KeptInput.fetch

    def watched(self: KeptInput, number: int) -> None:
        before = len(self.coming)
        fetch(self, number)
        if len(self.coming) > before:
            seen.append((kept.index(self), number))

    monkeypatch.setattr(KeptInput, "fetch", watched)
    order = [(layer, number) for layer in (2, 1, 0) for number in range(3)]
    for at, (layer, number) in enumerate(order):
        kept[layer].rows(number)
        ahead = at + 2 if layer < 2 or number == 2 else 3
        assert seen == order[3:ahead]
        assert sum(len(one.coming) for one in kept) == (1 if 3 <= ahead - 1 < 9 and ahead > 3 else 0)
        if number == 2:
            kept[layer].forget()


def test_a_graph_that_is_dropped_leaves_nothing(dropping: AdaptedModel) -> None:
    inputs = inputs_in("host memory")
    network = dropping.model
    wrap_layers(network, 2, inputs)
    network.train()
    loss, _ = batch_loss(network, collate(ROWS, 0), 16)
    assert len(inputs.waiting) == 2
    del loss
    gc.collect()
    assert not inputs.waiting
    values = next(p for p in decoder_layers(network)[0].parameters() if p.requires_grad)
    failing = values.register_hook({}.__getitem__)  # and one whose step fails in the middle of its backward
    loss, _ = batch_loss(network, collate(ROWS, 0), 16)
    with pytest.raises(KeyError):
        loss.backward()
    failing.remove()
    assert len(inputs.waiting) == 1
    del loss
    network.zero_grad()
    gc.collect()
    assert not inputs.waiting
    held = len(inputs.memory.free)
    expected = step_gradients(dropping)
    assert len(inputs.memory.free) == held == 2
    wrap_layers(network, 2)
    same_bits(step_gradients(dropping), expected)


def test_host_memory_is_used_again() -> None:
    memory = HostMemory(CPU)
    first, second = memory.take(100), memory.take(100)
    assert (len(first), len(second)) == (100, 100)
    memory.give(first)
    memory.give(second)
    assert memory.take(60) is first
    memory.give(first)
    longer = memory.take(130)  # in the place of one of them
    assert len(longer) == 130
    assert len(memory.free) == 1
    memory.give(longer)
    assert len(memory.take(101)) == 130
    assert len(memory.take(100)) == 100
    assert not memory.free


def test_an_input_that_its_layer_writes_over_is_refused() -> None:
    inputs = inputs_in("host memory")
    hidden = torch.ones(5, 4)
    kept = inputs.keep(hidden, PARTS)
    hidden.add_(1)
    for act in (lambda: kept.rows(0), lambda: inputs.keep(hidden, PARTS)):
        with pytest.raises(ModelError, match=r"writes over its own input.*recompute=none"):
            act()


def test_a_second_backward_is_refused() -> None:
    inputs = inputs_in("host memory")
    kept = inputs.keep(torch.ones(5, 4), PARTS)
    kept.forget()
    with pytest.raises(RuntimeError, match="a second time"):
        kept.rows(0)


def test_what_gets_no_gradient_is_not_kept(dropping: AdaptedModel, monkeypatch: pytest.MonkeyPatch) -> None:
    """Below the lowest layer that trains nothing is recomputed, so its input is not written either."""
    inputs = inputs_in("host memory")
    wrap_layers(dropping.model, 2, inputs)
    for values in decoder_layers(dropping.model)[0].parameters():
        monkeypatch.setattr(values, "requires_grad", False)
    sent: list[KeptInput] = []
    monkeypatch.setattr(KeptInput, "send", lambda self: sent.append(self))
    dropping.model.train()
    batch_loss(dropping.model, collate(ROWS, 0), 16)
    dropping.model.eval()
    assert len(sent) == 1


def deep(layers: int = 10) -> nn.Module:
    return random_model("Llama", num_hidden_layers=layers, intermediate_size=32, max_position_embeddings=256)


def step_of(network: nn.Module) -> Callable[[], None]:
    ids = torch.arange(4 * 200).reshape(4, 200) % 90
    batch = {"input_ids": ids, "labels": ids, "position_ids": torch.arange(200).expand(4, 200)}

    def step() -> None:
        network.train()
        batch_loss(network, batch, 16)[0].backward()
        network.zero_grad()

    return step


@pytest.mark.parametrize("place", ["device", "host memory"])
def test_the_peak_has_no_inputs_in_it(place: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of ten layers' inputs none is left but the newest, and in backward one micro-batch's rows and the next.

    Host memory comes from NumPy here, so that torch's allocator stands for the device.
    """
    monkeypatch.setattr(
        "qlora.residence.layer_inputs.host_bytes", lambda size, _: torch.from_numpy(np.empty(size, np.uint8))
    )
    network = deep()
    decoder_layers(network)[0].requires_grad_(True)  # so that every layer has a graph
    one = 4 * 200 * 32 * 4
    wrap_layers(network, 1)
    step_of(network)()
    resident = peak_of(step_of(network))
    wrap_layers(network, 1, inputs_in(place))
    saved = resident - peak_of(step_of(network))
    assert (8.9 * one <= saved <= 10 * one) if place == "host memory" else saved == 0


def test_host_on_a_cpu_copies_nothing() -> None:
    inputs = LayerInputs("host", CPU)
    assert inputs.place == "device"
    network = deep(2)
    decoder_layers(network)[0].requires_grad_(True)
    wrap_layers(network, 1, inputs)
    loss = network(input_ids=torch.arange(6)[None], use_cache=False).logits.sum()
    network.train()
    loss = network(input_ids=torch.arange(6)[None], use_cache=False).logits.sum()
    assert not inputs.waiting
    loss.backward()
