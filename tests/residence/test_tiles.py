"""An MLP in tiles: one tile's intermediates, no more products than before, and the same draws.

That its gradients are the whole MLP's, with every method, is tests/test_laws_of_memory.py.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, LlamaConfig, OPTConfig

from qlora.data.batches import collate
from qlora.errors import ModelError
from qlora.methods.base import AdaptedModel
from qlora.methods.files import save_adapter
from qlora.model.anatomy import layers as decoder_layers
from qlora.model.loss import batch_loss
from qlora.model.nf4 import Linear4bit
from qlora.residence.boundary import unread_linears
from qlora.residence.checks import check_boundary
from qlora.residence.layers import RecomputedLayer, recomputing, unwrap_layers, wrap_layers
from qlora.residence.tiles import TiledMLP, find_mlp, tile_mlps, tiles_of
from tests.residence.test_layers import ROWS, step_gradients
from tests.steps import LOSS, close, peak_of
from tests.tiny import TOKENS, difference, gradients, random_model, small_model, tiny_model

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Iterator[AdaptedModel]:
    return tiny_model(tmp_path_factory.mktemp("llama"), dropout=0.0)


@pytest.fixture
def llama_model(llama: AdaptedModel) -> Iterator[AdaptedModel]:
    yield llama
    unwrap_layers(llama.model)


def mlps(model: Any) -> list[TiledMLP]:
    return [module for module in model.modules() if isinstance(module, TiledMLP)]


@pytest.mark.parametrize("name", ["falcon", "gptj"])
def test_layers_that_add_in_place_or_answer_with_a_tuple(tmp_path: Path, name: str) -> None:
    """Falcon adds attention's output to the MLP's in place, so that one must have memory of its own."""
    model = small_model(name, tmp_path)
    resident = step_gradients(model)
    for tile in (5, 1000):
        wrap_layers(model.model, 3, None, tile)
        for _ in range(2):
            close(step_gradients(model), resident)


def test_an_mlp_by_another_name() -> None:
    """Llama 4 calls it ``feed_forward``, and its plain layers are as others'."""
    network = random_model("Llama")
    for layer in decoder_layers(network):
        layer.feed_forward = layer.mlp
        del layer.mlp
        layer.forward = Renamed.forward.__get__(layer)
    decoder_layers(network)[0].requires_grad_(True)
    network.train()

    def step() -> dict[str, Tensor]:
        network.zero_grad()
        network(input_ids=TOKENS[:, :11], use_cache=False).logits.square().mean().backward()
        return {name.replace(".layer.", ".").replace(".whole", ""): p.grad for name, p in network.named_parameters() if p.grad is not None}  # fmt: skip

    resident = step()
    wrap_layers(network, 1, None, 4)
    assert len(mlps(network)) == 2
    for _ in range(2):
        close(step(), resident)


class Renamed(nn.Module):
    def forward(self, hidden_states: Tensor, **kwargs: Any) -> Tensor:
        hidden_states = hidden_states + self.self_attn(self.input_layernorm(hidden_states), **kwargs)[0]
        return hidden_states + self.feed_forward(self.post_attention_layernorm(hidden_states))


@pytest.mark.parametrize("rows", [2, 7])
@pytest.mark.sampled
def test_dropout_against_plain_autograd_with_the_same_draws(model: AdaptedModel, rows: int, monkeypatch: Any) -> None:
    """Each tile with a graph of its own, and no recompute: the same numbers are drawn in the same order."""
    for layer in model.planted.values():
        layer.dropout = 0.3
    forward = TiledMLP.forward

    def plain(self: TiledMLP, x: Tensor) -> Tensor:
        flat = x.reshape(1, -1, x.shape[-1])
        return torch.cat([self.whole(part) for part in flat.split(self.tile, 1)], 1).view(x.shape)

    monkeypatch.setattr(TiledMLP, "forward", plain)
    tile_mlps(decoder_layers(model.model), 7)
    expected = step_gradients(model, rows)
    state = torch.get_rng_state()
    monkeypatch.setattr(TiledMLP, "forward", forward)
    wrap_layers(model.model, rows, None, 7)
    for _ in range(2):
        close(step_gradients(model, rows), expected)
        assert torch.equal(torch.get_rng_state(), state)
    with pytest.raises(AssertionError):
        close(step_gradients(model, rows, seed=6), expected, 1e-2)


class DrawsLast(nn.Module):
    """A layer whose MLP is a term of its output, and that draws for another term after it."""

    def __init__(self) -> None:
        super().__init__()
        self.mlp = nn.Sequential(nn.Linear(4, 9), nn.Dropout(0.4), nn.Linear(9, 4))
        self.beside = nn.Linear(4, 4)
        self.dropout = 0.4

    def forward(self, x: Tensor) -> Tensor:
        wide = self.mlp(x)
        return x + F.dropout(self.beside(x), self.dropout, self.training) + wide


def test_an_mlp_before_other_draws_is_not_left_out() -> None:
    torch.manual_seed(1)
    layer = DrawsLast()
    x = torch.randn(2, 6, 4)

    def step() -> dict[str, Tensor]:
        torch.manual_seed(5)
        layer.zero_grad()
        boundary(x).square().sum().backward()
        return {name: values.grad.clone() for name, values in layer.named_parameters() if values.grad is not None}

    boundary: nn.Module = layer
    tile_mlps([layer], 100)
    layer.mlp.training = False  # through the MLP's own graph
    expected = step()
    layer.mlp.training = True
    boundary = RecomputedLayer(layer, 2)
    for _ in range(2):
        close(step(), expected)
    assert boundary.unread == []
    layer.dropout = 0.0
    boundary = RecomputedLayer(layer, 2)
    step()
    assert boundary.unread == [layer.mlp]


def test_no_more_is_multiplied_than_without_tiles(model: AdaptedModel, monkeypatch: pytest.MonkeyPatch) -> None:
    """Tokens through the MLP in a step: forward and recompute. Where a norm follows the MLP its forward runs once more.
    The last product of a tile is never made again."""
    wrap_layers(model.model, 2, None, 7)
    step_gradients(model)
    seen: Counter[str] = Counter()
    product = Linear4bit.add_product

    def counted(self: Linear4bit, x: Tensor, onto: Tensor) -> None:
        seen[names[self]] += x.shape[:-1].numel()
        product(self, x, onto)

    names = {
        module: name.split(".")[-2] for name, module in model.model.named_modules() if isinstance(module, Linear4bit)
    }
    monkeypatch.setattr(Linear4bit, "add_product", counted)
    step_gradients(model)
    tokens = 2 * collate(ROWS, 0)["input_ids"].numel()
    extra = tokens if model.model.config.model_type == "gemma2" else 0
    assert seen["gate_proj"] == seen["up_proj"] == 2 * tokens + extra
    assert seen["down_proj"] == tokens + extra
    assert seen["o_proj"] == 2 * tokens
    for mlp in mlps(model.model):
        assert mlp.unread_inside == [mlp.whole.down_proj]
        assert not mlp.unread
        assert not mlp.whole.down_proj.unread


@pytest.mark.parametrize(("rows", "visits"), [(7, 2), (2, 2)])
def test_dequantised_once_for_all_tiles(
    llama_model: AdaptedModel, monkeypatch: pytest.MonkeyPatch, rows: int, visits: int
) -> None:
    wrap_layers(llama_model.model, rows, None, 7)
    step_gradients(llama_model)
    calls: Counter[int] = Counter()
    dequantise = Linear4bit.dequantise

    def counted(self: Linear4bit, dtype: torch.dtype) -> Tensor:
        calls[id(self)] += 1
        return dequantise(self, dtype)

    monkeypatch.setattr(Linear4bit, "dequantise", counted)
    step_gradients(llama_model)
    for mlp in mlps(llama_model.model):
        for name in ("gate_proj", "up_proj", "down_proj"):
            assert calls[id(getattr(mlp.whole, name).base)] == visits
            assert getattr(mlp.whole, name).base.kept is None


def test_only_one_tile_has_intermediates() -> None:
    """A wide MLP over 400 tokens: five numbers of size f a token at least are gone from the peak, but for a tile's."""
    tokens, wide = 400, 512
    torch.manual_seed(0)
    sizes = {
        "hidden_size": 16,
        "num_attention_heads": 2,
        "num_key_value_heads": 2,
        "num_hidden_layers": 2,
        "vocab_size": 30,
    }
    network = AutoModelForCausalLM.from_config(LlamaConfig(intermediate_size=wide, **sizes)).requires_grad_(False)
    decoder_layers(network)[0].self_attn.requires_grad_(True)
    ids = torch.arange(tokens)[None] % 30
    batch = {"input_ids": ids, "labels": ids, "position_ids": torch.arange(tokens)[None]}

    def step() -> None:
        network.train()
        batch_loss(network, batch, 16)[0].backward()
        network.zero_grad()

    def evaluate() -> None:
        network.eval()
        with torch.no_grad():
            network(input_ids=ids, use_cache=False, logits_to_keep=1)

    wrap_layers(network, 1)
    step()
    whole, answering = peak_of(step), peak_of(evaluate)
    one = tokens * wide * 4
    assert whole > 5 * one
    wrap_layers(network, 1, None, 20)
    step()
    assert peak_of(step) < 0.8 * one
    assert peak_of(evaluate) < answering - 2 * one


def test_an_evaluation_and_a_generation_in_the_middle(llama_model: AdaptedModel) -> None:
    network = llama_model.model
    options: dict[str, Any] = {"max_new_tokens": 6, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    options["attention_mask"] = torch.ones_like(TOKENS)
    expected = network.generate(TOKENS, **options)
    plain = network(input_ids=TOKENS, use_cache=False).logits.detach()
    resident = step_gradients(llama_model)
    wrap_layers(network, 3, None, 5)
    network.train()
    loss, _ = batch_loss(network, collate(ROWS, 0), 16)
    network.eval()
    with torch.no_grad():
        assert difference(network(input_ids=TOKENS, use_cache=False).logits, plain) <= LOSS
    assert torch.equal(network.generate(TOKENS, **options), expected)
    assert torch.equal(network(input_ids=TOKENS, use_cache=False).logits, plain)  # the MLP itself
    loss.backward()
    close(gradients(llama_model), resident)


def test_wrapping_and_unwrapping_keep_the_model(llama_model: AdaptedModel, tmp_path: Path) -> None:
    network = llama_model.model
    state = {name: values.clone() for name, values in network.state_dict().items()}
    inner = [layer.mlp for layer in decoder_layers(network)]
    save_adapter(llama_model, tmp_path / "before")
    wrap_layers(network, 2, None, 5)
    wrap_layers(network, 3, None, 6)
    assert [(mlp.tile, mlp.whole) for mlp in mlps(network)] == [(6, one) for one in inner]
    assert [mlp.training for mlp in mlps(network)] == [False, False]
    save_adapter(llama_model, tmp_path / "wrapped")
    first, second = (tmp_path / name / "adapter_model.safetensors" for name in ("before", "wrapped"))
    assert first.read_bytes() == second.read_bytes()
    # a path of the untouched model still leads where it led
    down = inner[0].down_proj
    network.set_submodule("model.layers.0.mlp.down_proj", down.base)
    assert inner[0].down_proj is down.base
    network.set_submodule("model.layers.0.mlp.down_proj", down)
    assert inner[0].down_proj is down
    assert not hasattr(network.get_submodule("model.layers.0.mlp"), "no_such_thing")
    wrap_layers(network, 2)
    assert not mlps(network)
    wrap_layers(network, 2, None, 5)
    unwrap_layers(network)
    assert [layer.mlp for layer in decoder_layers(network)] == inner
    after = network.state_dict()
    assert list(after) == list(state)
    assert all(torch.equal(after[name], state[name]) for name in state)


@pytest.mark.parametrize("name", ["mpt", "bloom"])
def test_an_mlp_that_takes_more_than_its_input_is_refused(tmp_path: Path, name: str) -> None:
    network = small_model(name, tmp_path).model
    paths = [path for path, _ in network.named_modules()]
    with pytest.raises(ModelError, match=r"takes hidden_states, residual where one tensor.*leave memory.mlp_tile out"):
        wrap_layers(network, 1, None, 5)
    assert [path for path, _ in network.named_modules()] == paths


def test_a_layer_without_an_mlp_is_refused() -> None:
    config = OPTConfig(vocab_size=96, hidden_size=16, ffn_dim=16, num_hidden_layers=2, num_attention_heads=2, word_embed_proj_dim=16)  # fmt: skip
    network = AutoModelForCausalLM.from_config(config)
    with pytest.raises(
        ModelError, match=r"OPTDecoderLayer has no MLP under the names mlp, .* only self_attn, .*mlp_tile"
    ):
        wrap_layers(network, 1, None, 5)
    assert not any(isinstance(module, RecomputedLayer) for module in network.modules())


class Odd(nn.Module):
    def __init__(self, how: str) -> None:
        super().__init__()
        self.how = how

    def forward(self, x: Tensor) -> Any:
        return {
            "tuple": lambda: (x, None),
            "narrow": lambda: x[..., :1],
            "mixing": lambda: x.cumsum(-2),
        }[self.how]()


@pytest.mark.parametrize(
    ("how", "words"),
    [
        ("tuple", r"with a tuple.*mlp_tile"),
        ("narrow", r"with \[1, 3, 1\].*mlp_tile"),
        ("mixing", "memory.mlp_tile=null, or"),
    ],
)
def test_an_mlp_that_is_none_of_tokens_is_found_out(how: str, words: str) -> None:
    """Before training, though no row of the check is as long as a tile."""
    network = random_model("Llama")
    network.requires_grad_(True)
    wrap_layers(network, 2, None, 1000)
    check_boundary(network, list(range(3, 19)), 5, 2, True)
    for layer in decoder_layers(network):
        layer.mlp.whole = Odd(how)
        if how != "mixing":  # plain, it stands for an MLP that the layer reads in its own way
            layer.layer.forward = lambda hidden, layer=layer, **_: hidden + (0 if layer.mlp.tile > 1000 else layer.mlp(hidden))  # fmt: skip
    with pytest.raises(ModelError, match=words):
        check_boundary(network, list(range(3, 19)), 5, 2, True)
    assert [mlp.tile for mlp in mlps(network)] == [1000, 1000]


def test_what_is_planted_on_a_layer_holds_its_mlp() -> None:
    layer = decoder_layers(random_model("Llama"))[0]

    class Holder(nn.Module):
        def __init__(self, base: nn.Module) -> None:
            super().__init__()
            self.base = base

    assert find_mlp(Holder(Holder(layer))) == (layer, "mlp")
    with pytest.raises(ModelError, match="more than its hidden states"):
        TiledMLP(nn.Identity(), 3)(torch.ones(1, 2), torch.ones(1, 2))


def test_a_frozen_mlp_whose_input_needs_no_gradient() -> None:
    """What could train in it is switched off: nothing asks for a gradient, and nothing fails."""

    class Off(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.ones(4))

        def forward(self, x: Tensor) -> Tensor:
            return x * 2

    x = torch.randn(5, 4)
    tiled = TiledMLP(Off(), 2)
    answer = tiled(x)
    assert torch.equal(answer, 2 * x)
    answer.sum().backward()
    assert tiled.whole.weight.grad is None


def test_a_product_that_is_the_output() -> None:
    """Of a tile nobody reads the answer itself."""
    linear = Linear4bit.empty(64, 64, bias=False, quant_type="nf4", double_quant=True, compute_dtype=torch.float32)
    linear.place(torch.randn(64, 64), CPU)
    x = torch.randn(2, 64, requires_grad=True)
    assert unread_linears(linear(x)) == [linear]
    assert unread_linears(linear(linear(x))) == []  # its first answer is read
    assert unread_linears(x * 2) == []


def test_tiles_for_a_while() -> None:
    network = random_model("Llama")
    wrap_layers(network, 1, None, 50)
    with tiles_of(network, 2), recomputing(network):
        assert [(mlp.tile, mlp.training) for mlp in mlps(network)] == [(2, True)] * 2
    assert [(mlp.tile, mlp.training) for mlp in mlps(network)] == [(50, False)] * 2
