"""The boundary of a layer: what it cuts, keeps, draws again and leaves alone, in families whose layers differ.

That its gradients are the resident model's, in every arrangement, is tests/test_laws_of_memory.py.
"""

from __future__ import annotations

from collections import Counter, UserDict
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from qlora.data.batches import collate
from qlora.errors import ModelError
from qlora.methods.base import AdaptedModel, apply_method
from qlora.model.anatomy import layers as decoder_layers
from qlora.model.base import Base
from qlora.model.loss import batch_loss
from qlora.model.nf4 import Linear4bit
from qlora.recipe import LoRA
from qlora.residence.boundary import draws
from qlora.residence.layers import RecomputedLayer, _cut, recomputing, unwrap_layers, wrap_layers
from tests.rounding import difference
from tests.steps import LOSS, close, same_bits
from tests.tiny import SMALL, TOKENS, gradients, random_model, random_rows, small_model, stir, tiny_model

ROWS = random_rows(24, seed=3)[:7]  # packed, of odd and different lengths


def step_gradients(model: AdaptedModel, rows: int = 7, seed: int = 5) -> dict[str, Tensor]:
    """The gradients of one step's rows, ``rows`` of them in the model at a time."""
    model.model.train()
    torch.manual_seed(seed)
    whole = collate(ROWS, 0)
    for start in range(0, len(ROWS), rows):
        batch = {key: value[start : start + rows] for key, value in whole.items()}
        batch_loss(model.model, batch, 16)[0].backward()
    model.model.eval()
    return gradients(model)


def loss_and_gradients(model: AdaptedModel, count: int) -> tuple[float, dict[str, Tensor]]:
    """Of the first ``count`` rows, all in the model together."""
    model.model.train()
    loss, _ = batch_loss(model.model, collate(ROWS[:count], 0), 16)
    loss.backward()
    model.model.eval()
    return loss.item(), gradients(model)


@pytest.fixture
def dropping(model: AdaptedModel) -> AdaptedModel:
    for layer in model.planted.values():
        layer.dropout = 0.3
    return model


def test_the_rows_are_awkward() -> None:
    assert len({len(row.ids) for row in ROWS}) > 2
    assert any(len(row.examples) > 2 for row in ROWS)
    assert len(ROWS) % 2
    assert len(ROWS) % 3


def test_dropout_layer_major_against_finite_differences(dropping: AdaptedModel) -> None:
    """No other run draws in this order, so the loss itself is the witness: its slope along the gradient."""
    model = dropping
    wrap_layers(model.model, 2)
    found = step_gradients(model, 7)
    norm = torch.cat([values.flatten() for values in found.values()]).norm()

    @torch.no_grad()
    def move(by: float) -> None:
        for name, values in model.trainable_parameters().items():
            values += by * found[name] / norm

    def loss() -> float:
        model.model.train()
        torch.manual_seed(5)
        value = batch_loss(model.model, collate(ROWS, 0), 16)[0]  # with a graph: outside it the boundary cuts nothing
        model.model.eval()
        return value.item()

    step = 3e-3
    before = {name: values.detach().clone() for name, values in model.trainable_parameters().items()}
    move(step)
    up = loss()
    move(-2 * step)
    slope = (up - loss()) / (2 * step)
    for name, values in model.trainable_parameters().items():
        values.data.copy_(before[name])
    assert slope == pytest.approx(float(norm), rel=5e-3)


def test_sliding_and_full_masks_are_cut_each(tmp_path: Path) -> None:
    """Gemma 3 gives its layers different masks and rotary tables, here with a window shorter than a row."""
    bare = random_model("Gemma3Text", num_hidden_layers=3, sliding_window=5, layer_types=[
        "sliding_attention", "full_attention", "sliding_attention"])  # fmt: skip
    base = Base(bare, None, tmp_path, "tiny", None, "none", False, torch.device("cpu"), torch.float32)
    model = apply_method(base, LoRA(r=4))
    stir(model, 0.05)
    resident = step_gradients(model)
    wrap_layers(bare, 2)
    close(step_gradients(model), resident)


@pytest.mark.parametrize(
    ("name", "count", "rows"),
    # Bloom's bias cannot be cut by its shape, and a trainer refuses it
    [(name, count, rows) for name in SMALL for count, rows in [(7, 7), (7, 2), (4, 1)] if name != "bloom" or rows == 7],
)
@pytest.mark.sampled
def test_layers_that_answer_with_a_tuple(tmp_path: Path, name: str, count: int, rows: int) -> None:
    """Their decoder takes the first entry, which of a bare tensor would be the first row. MPT's bias has 4 heads and
    is not to be taken for 4 rows."""
    model = small_model(name, tmp_path)
    loss, resident = loss_and_gradients(model, count)
    wrap_layers(model.model, rows)
    calls: Counter[str] = Counter()
    for layer in decoder_layers(model.model):
        layer.layer.register_forward_hook(lambda _, __, output: calls.update([type(output).__name__]))
    other, found = loss_and_gradients(model, count)
    assert calls == {"tuple": 2 * 2 * -(-count // rows)}
    if rows == count:
        assert other == loss
        same_bits(found, resident)
    else:
        assert other == pytest.approx(loss, rel=LOSS)
        close(found, resident)


def test_a_tuple_keeps_its_form_and_its_other_entries_stand_empty(tmp_path: Path) -> None:
    model = small_model("bloom", tmp_path)
    wrap_layers(model.model, 7)
    seen: list[Any] = []
    layer = decoder_layers(model.model)[0]
    layer.register_forward_hook(lambda _, __, output: seen.append(output))
    loss_and_gradients(model, 3)
    with torch.no_grad():
        batch_loss(model.model, collate(ROWS[:3], 0), 16)
    trained, plain = seen
    assert isinstance(trained, tuple)
    assert len(trained) == len(plain) == 2
    assert trained[0].shape == plain[0].shape
    assert trained[1] is None


class Lender(nn.Module):
    """Two layers, of which the second also gets what the first made."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList([Borrower(), Borrower()])

    def forward(self, hidden: Tensor) -> Tensor:
        made = self.layers[0](hidden)
        return self.layers[1](made, extra={"first": [made]})


class Borrower(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 4)

    def forward(self, hidden: Tensor, extra: Any = None) -> Tensor:
        return hidden + self.linear(hidden) + (extra["first"][0] if extra else 0)


def test_a_gradient_that_the_boundary_would_lose_is_refused() -> None:
    model = Lender()
    for index, layer in enumerate(model.layers):
        model.layers[index] = RecomputedLayer(layer, 1)
    hidden = torch.rand(2, 3, 4)
    with pytest.raises(ModelError, match=r"Borrower takes more than its hidden states.*recompute=none"):
        model(hidden)
    model.layers[0].layer.linear.requires_grad_(False)
    assert model(hidden).requires_grad


@pytest.mark.parametrize("kind", [dict, UserDict])
def test_states_that_layers_hand_on_are_refused(kind: Any) -> None:
    """Gemma 3n's and 4's later layers read the keys and values of earlier ones out of a dictionary."""

    class Handing(nn.Linear):
        def forward(self, hidden: Tensor, handed: Any) -> Tensor:
            handed["keys"] = super().forward(hidden)
            return hidden + handed["keys"]

    boundary = RecomputedLayer(Handing(4, 4), rows=2).train()
    with pytest.raises(ModelError, match=r"hands keys and values on to later layers.* set training\.recompute=none"):
        boundary(torch.ones(2, 3, 4), handed=kind())


def test_states_that_layers_answer_with_are_refused() -> None:
    """Zaya's routers read what those below found. Attention weights, a number for each pair, nobody reads."""

    class Handing(nn.Linear):
        def forward(self, hidden: Tensor, second: Tensor | None = None) -> tuple[Tensor, Any]:
            return hidden, super().forward(hidden) if second is None else second

    boundary = RecomputedLayer(Handing(4, 4), rows=2).train()
    with pytest.raises(ModelError, match=r"hands more than its hidden states on.* set training\.recompute=none"):
        boundary(torch.ones(2, 3, 4))
    assert boundary(torch.ones(2, 3, 4), torch.ones(2, 1, 3, 3))[1] is None


def test_states_given_by_name_are_refused() -> None:
    boundary = RecomputedLayer(nn.Linear(4, 4), rows=2).train()
    with pytest.raises(ModelError, match=r"takes its hidden states by name.* set training\.recompute=none"):
        boundary(input=torch.ones(2, 3, 4))


def test_recomputing_is_training_without_dropout(dropping: AdaptedModel) -> None:
    network = dropping.model
    wrap_layers(network, 1)
    expected = network(input_ids=TOKENS, use_cache=False).logits
    calls: list[int] = []
    decoder_layers(network)[0].layer.register_forward_hook(lambda _, args, __: calls.append(len(args[0])))
    with recomputing(network):
        found = network(input_ids=TOKENS, use_cache=False).logits
    assert calls == [1, 1]
    assert difference(found, expected) <= LOSS
    assert not any(module.training for module in network.modules())


@pytest.mark.parametrize(("rows", "visits"), [(2, 2), (7, 3)])
def test_dequantised_once_a_visit(model: AdaptedModel, monkeypatch: pytest.MonkeyPatch, rows: int, visits: int) -> None:
    """With several micro-batches once in the forward and once in the backward. With one, the kept copy would only cost
    memory: forward, recompute and backward each make their own."""
    wrap_layers(model.model, rows)
    calls: Counter[int] = Counter()
    dequantise = Linear4bit.dequantise

    def counted(self: Linear4bit, dtype: torch.dtype) -> Tensor:
        calls[id(self)] += 1
        return dequantise(self, dtype)

    monkeypatch.setattr(Linear4bit, "dequantise", counted)
    step_gradients(model)
    linears = [module for module in model.model.modules() if isinstance(module, Linear4bit)]
    assert len(linears) == 14
    first = decoder_layers(model.model)[0].layer.self_attn
    # the first layer's input needs no gradient, so its query, key and value weights are not read by the backward
    without = {id(layer.base) for layer in (first.q_proj, first.k_proj, first.v_proj)} if rows == 7 else set()
    assert calls == {id(linear): visits - (id(linear) in without) for linear in linears}
    assert all(linear.kept is None for linear in linears)


def test_below_the_lowest_layer_that_trains_nothing_is_recomputed(tmp_path: Path) -> None:
    targets = ("layers.1.self_attn.v_proj", "layers.1.mlp.down_proj")
    model = tiny_model(tmp_path, target_modules=targets)
    resident = step_gradients(model)
    wrap_layers(model.model, 2)
    calls = Counter[int]()
    for index, layer in enumerate(decoder_layers(model.model)):
        layer.layer.register_forward_hook(lambda *_, index=index: calls.update([index]))
    close(step_gradients(model), resident)
    assert calls == {0: 4, 1: 8}


def test_only_layer_inputs_are_kept(model: AdaptedModel) -> None:
    """What autograd holds between forward and backward: one [R, T, D] a layer, and what stands outside the layers."""

    def kept() -> int:
        sizes: dict[int, int] = {}

        def pack(tensor: Tensor) -> Tensor:
            sizes[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
            return tensor

        model.model.train()
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            hidden = model.model.model(input_ids=TOKENS, use_cache=False).last_hidden_state
        assert hidden.requires_grad
        model.model.eval()
        return sum(sizes.values())

    resident = kept()
    wrap_layers(model.model, 1)
    one = TOKENS.numel() * 64 * 4
    assert kept() <= 7 * one < resident / 3


def test_outside_training_it_is_the_layer_itself_and_without_gradients_it_cuts_rows_alone(
    dropping: AdaptedModel,
) -> None:
    network = dropping.model
    network.eval()
    expected = network(input_ids=TOKENS, use_cache=False).logits
    wrap_layers(network, 1)
    seen: list[int] = []
    decoder_layers(network)[0].layer.register_forward_hook(lambda _, args, __: seen.append(len(args[0])))
    assert torch.equal(network(input_ids=TOKENS, use_cache=False).logits, expected)
    with torch.no_grad(), recomputing(network):
        cut = network(input_ids=TOKENS, use_cache=False).logits
    assert difference(cut, expected) <= LOSS
    wrap_layers(network, 2)
    with torch.no_grad(), recomputing(network):
        assert torch.equal(network(input_ids=TOKENS, use_cache=False).logits, expected)
    assert seen == [2, 1, 1, 2]


def test_generation_with_a_cache_works_through_the_boundary(model: AdaptedModel) -> None:
    options: dict[str, Any] = {"max_new_tokens": 6, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    expected = model.model.generate(TOKENS, attention_mask=torch.ones_like(TOKENS), use_cache=False, **options)
    wrap_layers(model.model, 1)
    found = model.model.generate(TOKENS, attention_mask=torch.ones_like(TOKENS), use_cache=True, **options)
    assert found.shape == (2, TOKENS.shape[1] + 6)
    assert torch.equal(found, expected)


def test_wrapping_and_unwrapping_keep_the_model(model: AdaptedModel) -> None:
    state = {name: values.clone() for name, values in model.model.state_dict().items()}
    layers = list(decoder_layers(model.model))
    wrap_layers(model.model, 2)
    wrapped = decoder_layers(model.model)
    for layer, boundary in zip(layers, wrapped, strict=True):
        assert isinstance(boundary, RecomputedLayer)
        assert boundary.layer is layer
        assert boundary.self_attn is layer.self_attn
        assert getattr(boundary, "attention_type", None) == getattr(layer, "attention_type", None)
        assert boundary.training == layer.training
        with pytest.raises(AttributeError, match="no_such_thing"):
            _ = boundary.no_such_thing
    wrap_layers(model.model, 5)
    assert [layer.rows for layer in decoder_layers(model.model)] == [5, 5]
    assert all(not isinstance(layer.layer, RecomputedLayer) for layer in decoder_layers(model.model))
    unwrap_layers(model.model)
    unwrap_layers(model.model)
    assert list(decoder_layers(model.model)) == layers
    after = model.model.state_dict()
    assert list(after) == list(state)
    assert all(torch.equal(after[name], state[name]) for name in state)


def test_a_model_without_a_list_of_layers_is_refused() -> None:
    model = random_model("Llama")
    model.model.layers = nn.ModuleList(list(model.model.layers)[:1])
    with pytest.raises(ModelError, match="recompute=none"):
        wrap_layers(model, 1)
    unwrap_layers(model)


def test_what_has_a_row_for_each_row_is_cut_and_nothing_else() -> None:
    mask, shared, vector = torch.rand(4, 1, 3, 3), torch.rand(1, 3, 8), torch.rand(4)
    value = {"mask": mask, "rotary": (shared, torch.rand(4, 3, 8)), "vector": vector, "flag": True, "none": None}
    cut = _cut(value, slice(1, 3), 4, 3)
    assert torch.equal(cut["mask"], mask[1:3])
    assert cut["rotary"][0] is shared
    assert torch.equal(cut["rotary"][1], value["rotary"][1][1:3])
    assert cut["vector"] is vector
    assert (cut["flag"], cut["none"]) == (True, None)
    positions = torch.arange(12).reshape(4, 3)
    assert torch.equal(_cut([positions], slice(3, 4), 4, 3)[0], positions[3:])
    assert _cut([torch.rand(1, 5)], slice(0, 1), 1, 5)[0].shape == (1, 5)


@pytest.mark.parametrize("shape", [(4, 1, 16), (16, 1, 3), (4, 16), (4, 2, 3, 16)])
def test_what_only_looks_like_rows_is_not_cut(shape: tuple[int, ...]) -> None:
    """Four rows of three tokens: a bias for 4 heads, one for 4 heads of each row, tables of another length."""
    value = torch.rand(shape)
    assert _cut(value, slice(1, 3), 4, 3) is value


def test_blooms_own_dropout_is_drawn_again(tmp_path: Path) -> None:
    """It is a float called ``hidden_dropout``, beside a dropout module of the attention that drops nothing."""
    model = small_model("bloom", tmp_path)
    for module in model.model.modules():
        if "hidden_dropout" in vars(module):
            module.hidden_dropout = 0.3
    resident = step_gradients(model)
    wrap_layers(model.model, 7)
    same_bits(step_gradients(model), resident)
    with pytest.raises(AssertionError):
        close(step_gradients(model, seed=6), resident, 1e-2)


@pytest.mark.parametrize("name", ["dropout", "hidden_dropout", "attention_dropout", "attn_pdrop", "activation_dropout"])
def test_every_chance_of_dropout_counts(name: str) -> None:
    layer = nn.ModuleDict({"inner": nn.Linear(2, 2), "dropout": nn.Dropout(0.0)})
    inner: Any = layer["inner"]
    if name != "dropout":
        inner.dropout = nn.Dropout(0.0)  # as where a module and a float of one layer are both called so
    setattr(inner, name, 0.0)
    assert not draws(layer)
    setattr(inner, name, 0.1)
    assert draws(layer)
    assert draws(nn.Sequential(nn.Dropout(0.1)))
