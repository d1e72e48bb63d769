"""The law of host memory: with the embedding and the head there = without, in value, gradient and answers; and what is on
the device at a time is a slice of the head.

Here host and device are the same memory. That every tensor is where it is used is seen on the meta device; and that a slice is not used after the next one was asked for, by filling it with NaN.
"""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from qlora import recipe as config
from qlora.errors import MethodError, ModelError
from qlora.evaluation.generate import answers
from qlora.methods.base import AdaptedModel, apply_method
from qlora.model.anatomy import is_tied
from qlora.model.base import count_parameters
from qlora.model.checks import check_loss_path, check_packing
from qlora.model.in_memory import as_base
from qlora.model.load import quantised_names
from qlora.model.loss import (
    IGNORE_INDEX,
    Head,
    batch_loss,
    head_of,
    hidden_states,
    summed_loss,
    token_loss,
)
from qlora.model.nf4 import dense_weight
from qlora.recipe import MemorySection, ModelSection
from qlora.residence.ends import HostLinear, embedding_on_host, gathers_on_host, head_on_host, refuse_half
from qlora.residence.load import load_base
from tests import tiny
from tests.model.test_loss import (
    HEADS,
    IDS,
    in_dtype,
    plain_loss,
    random_batch,
    random_head,
    value_and_gradient,
)
from tests.rounding import difference, no_worse, rounding
from tests.steps import LOSS, close
from tests.tiny import VOCABULARY, random_model

MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("Llama", {"tie_word_embeddings": False}),
    "llama, tied": ("Llama", {"tie_word_embeddings": True}),
    "gemma2": ("Gemma2", {"final_logit_softcapping": 5.0}),  # tied, with a cap
    "gemma3": ("Gemma3Text", {}),  # tied, and scales inside its embedding
    "qwen2": ("Qwen2", {"tie_word_embeddings": False}),
}
BATCH = {
    "input_ids": torch.tensor([IDS[:17], IDS[17:34]]),
    "position_ids": torch.tensor([[*range(9), *range(8)], [*range(17)]]),
    "labels": torch.tensor([IDS[:17], IDS[17:34]]),
}
BATCH["labels"][:, ::3] = IGNORE_INDEX


class Poisoned(HostLinear):
    """Each slice is a copy that turns to NaN when the next one is asked for. Counts the slices that were fetched."""

    fetched = 0

    def slices(self, dtype: torch.dtype) -> Iterator[tuple[int, int, Tensor]]:
        for start, stop, weight in super().slices(dtype):
            self.fetched += 1
            place = weight.clone()
            yield start, stop, place
            place.fill_(torch.nan)


def on_host(head: Head, rows: int, travels: bool = True) -> Head:
    """The same head in host memory, ``rows`` of it to a slice; ``travels``: through places of their own."""
    linear = Poisoned(head.module.weight, head.module.bias, torch.device("cpu"))
    linear.rows, linear.travels = rows, travels
    return dataclasses.replace(head, module=linear)


def to_host(model: Any, rows: int | None = None, device: torch.device | None = None) -> Any:
    """``model`` with both of its matrices in host memory, the head in slices of ``rows``."""
    embedding_on_host(model, device)
    head_on_host(model, device)
    head = model.get_output_embeddings()
    assert isinstance(head, HostLinear)
    assert gathers_on_host(model.get_input_embeddings())
    if rows is not None:
        head.rows, head.travels = rows, True
    return model


@pytest.mark.parametrize("kind", HEADS)
@pytest.mark.parametrize(("rows", "chunk"), [(1, 256), (7, 3), (16, 1), (49, 5), (50, 256), (64, 8)])
def test_the_loss_over_slices_is_the_loss(kind: str, rows: int, chunk: int) -> None:
    head = random_head(**HEADS[kind])
    hidden, labels = random_batch(3, 33)
    expected, expected_gradient = value_and_gradient(token_loss, hidden, head, labels, 256)
    sliced = on_host(head, rows, travels=rows != 16)
    value, gradient = value_and_gradient(token_loss, hidden, sliced, labels, chunk)
    truth = value_and_gradient(plain_loss, hidden.double(), in_dtype(head, torch.float64), labels)
    no_worse(value, expected, truth[0])
    no_worse(gradient, expected_gradient, truth[1])
    spans = -(-head.module.out_features // rows)
    assert sliced.module.fetched == 2 * spans  # once a pass, however many chunks there are
    with torch.no_grad():
        assert torch.equal(token_loss(hidden, sliced, labels, chunk)[0], value)
    assert sliced.module.fetched == 3 * spans


@pytest.mark.parametrize("kind", HEADS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
@pytest.mark.sampled
def test_low_precision_errs_no_more_over_slices(kind: str, dtype: torch.dtype) -> None:
    """Against fp64, as for a head on the device: the parts of a gradient are summed up in fp32 and rounded once."""
    head = in_dtype(random_head(**HEADS[kind]), dtype)
    truth_head, sliced = in_dtype(head, torch.float64), on_host(head, 13)
    errors = torch.zeros(2, 2, dtype=torch.float64)  # sliced, plain × value, gradient
    for seed in range(12):
        hidden, labels = random_batch(3, 33, seed)
        hidden = hidden.to(dtype)
        truth = value_and_gradient(plain_loss, hidden.double(), truth_head, labels)
        ways = (
            value_and_gradient(token_loss, hidden, sliced, labels, 8),
            value_and_gradient(plain_loss, hidden, head, labels),
        )
        for row, found in enumerate(ways):
            for column in range(2):
                errors[row, column] += (found[column].double() - truth[column]).square().sum()
    ours, plain = errors.sqrt()
    assert (ours <= 1.003 * plain).all(), f"ours {ours.tolist()}, plain {plain.tolist()}"


def test_no_targets_fetch_nothing_and_a_token_without_a_logit_is_seen() -> None:
    head = on_host(random_head(), 7)
    hidden, labels = random_batch(2, 5)
    labels[:] = IGNORE_INDEX
    value, gradient = value_and_gradient(token_loss, hidden, head, labels)
    assert value == 0
    assert not gradient.any()
    assert head.module.fetched == 0
    labels[0, 2] = 50
    assert token_loss(hidden, head, labels)[0].isnan()


class Largest(TorchDispatchMode):
    """Remembers the most elements that a tensor in memory of its own has; views of ``known`` memory do not count."""

    def __init__(self, *known: Tensor) -> None:
        super().__init__()
        self.known = {tensor.untyped_storage().data_ptr() for tensor in known}
        self.largest = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        output = func(*args, **(kwargs or {}))
        for tensor in torch.utils._pytree.tree_leaves(output):
            if isinstance(tensor, Tensor) and tensor.untyped_storage().data_ptr() not in self.known:
                self.largest = max(self.largest, tensor.numel())
        return output


@pytest.mark.parametrize("travels", [False, True])
def test_no_tensor_is_larger_than_a_chunk_of_logits(travels: bool) -> None:
    """And a slice's chunk has so many more positions as it has fewer columns: 1,001 // 90 times the chunk's."""
    linear = nn.Linear(4, 1001).requires_grad_(False)
    head = HostLinear(linear.weight, linear.bias, torch.device("cpu"))
    head.rows, head.travels = 90, travels
    hidden, labels = torch.randn(1, 25, 4), torch.randint(0, 1001, (1, 25))
    for chunk, largest in ((8, 24 * 90), (1, 11 * 90)):
        with Largest(head.weight, head.bias) as watched:
            value_and_gradient(token_loss, hidden, Head(head, softcap=4.0), labels, chunk)
        assert watched.largest == largest <= chunk * 1001
    with Largest(linear.weight, linear.bias) as plain:
        value_and_gradient(token_loss, hidden, Head(linear, softcap=4.0), labels, 8)
    assert plain.largest == 8 * 1001


def test_slices_are_a_few_and_even() -> None:
    weight = nn.Parameter(torch.empty(128_256, 4096, dtype=torch.bfloat16, device="meta"), requires_grad=False)
    head = HostLinear(weight, None, torch.device("meta"))
    spans = [(start, stop) for start, stop, _ in head.slices(torch.bfloat16)]
    assert len(spans) == 16
    assert spans[0] == (0, 8016)
    assert spans[-1] == (120_240, 128_256)
    small = HostLinear(nn.Parameter(torch.randn(50, 16), requires_grad=False), None, torch.device("cpu"))
    assert [(start, stop) for start, stop, _ in small.slices(torch.float32)] == [(0, 50)]


def test_the_head_is_the_linear_that_it_was() -> None:
    """Its own product and gradient, as generation, checks and what is planted around it ask for them."""
    linear = nn.Linear(16, 50).requires_grad_(False)
    head = on_host(Head(linear), 7).module
    x = torch.randn(2, 3, 16, requires_grad=True)
    grad = torch.randn(2, 3, 50)
    expected = torch.autograd.grad(linear(x), x, grad)[0]
    assert difference(head(x), linear(x)) <= rounding(terms=16, sums=2)
    assert difference(torch.autograd.grad(head(x), x, grad)[0], expected) <= rounding(terms=50, sums=2)
    assert torch.equal(dense_weight(head, torch.bfloat16), linear.weight.bfloat16())
    assert torch.equal(head.dequantise(torch.float32), linear.weight)


@pytest.mark.parametrize("name", MODELS)
def test_a_model_is_what_it_was(name: str) -> None:
    family, options = MODELS[name]
    plain = random_model(family, **options)
    model = to_host(copy.deepcopy(plain))
    assert torch.equal(hidden_states(model, BATCH), hidden_states(plain, BATCH))
    ids = BATCH["input_ids"]
    assert torch.equal(model(input_ids=ids).logits, plain(input_ids=ids).logits)  # one slice: the same sums
    assert is_tied(model) == is_tied(plain) == ("tied" in name or "gemma" in name)
    assert model.state_dict().keys() == plain.state_dict().keys()
    assert count_parameters(model) == count_parameters(plain)
    assert not quantised_names(model)
    before = list(model.modules())
    embedding_on_host(model)
    head_on_host(model)
    assert before == list(model.modules())
    assert len(model.get_decoder()._forward_pre_hooks) == 1

    to_host(model, rows=13)
    assert difference(model(input_ids=ids).logits, plain(input_ids=ids).logits) <= LOSS
    check_loss_path(model, IDS)
    check_packing(model, IDS)
    options = {"max_new_tokens": 12, "do_sample": False, "eos_token_id": None}
    mask = torch.ones_like(ids)
    expected = plain.generate(input_ids=ids, attention_mask=mask, **options)
    assert torch.equal(model.generate(input_ids=ids, attention_mask=mask, **options), expected)


METHODS: dict[str, Any] = {
    "lora": config.LoRA(r=2),
    "lora everywhere": config.LoRA(r=2, target_modules=("q_proj", "embed_tokens", "lm_head")),
    "dora": config.DoRA(r=2, target_modules=("v_proj", "lm_head")),
    "pissa": config.LoRA(r=2, init="pissa", target_modules=("v_proj",)),
    "head": config.Modules(modules=("lm_head",)),
    "embedding": config.Modules(modules=("embed_tokens",)),
    "bias": config.BitFit(target_modules=("q_proj", "lm_head"), new_biases=True),
    "prompt": config.PromptTuning(tokens=3),
    "p-tuning": config.PTuning(tokens=3, hidden_size=8),
    "new tokens": config.NewTokens(tokens=("<a>", "<b>")),
    "full": config.Full(embeddings=False),
}


def method_on(model: Any, name: str) -> AdaptedModel:
    """The method planted, its parameters stirred so that all of them get a gradient."""
    base = as_base(model)
    if name == "new tokens":
        base.tokenizer = WORDS
    adapted = apply_method(base, METHODS[name])
    if name not in ("full", "head", "embedding", "pissa"):
        tiny.stir(adapted)
    return adapted


def gradients(adapted: AdaptedModel, name: str) -> dict[str, Tensor]:
    """The loss of a batch, with virtual and new tokens in it where the method has any, and every gradient."""
    batch = {key: value.clone() for key, value in BATCH.items()}
    if adapted.virtual_tokens:
        batch["input_ids"][:, :3] = torch.arange(-3, 0)
        batch["labels"][:, :3] = IGNORE_INDEX
    if name == "new tokens":
        batch["input_ids"][0, 5] = batch["labels"][0, 5] = VOCABULARY + 1
    adapted.model.eval()
    loss, _ = batch_loss(adapted.model, batch, 5)
    loss.backward()
    return {"loss": loss.detach(), **{key: values.grad for key, values in adapted.trainable_parameters().items()}}


@pytest.fixture(scope="module", autouse=True)
def words(tmp_path_factory: pytest.TempPathFactory) -> None:
    """A tokenizer of as many words as the models here have."""
    global WORDS
    folder = tiny.tiny_checkpoint(tmp_path_factory.mktemp("words"), "llama", num_hidden_layers=1, hidden_size=32)
    WORDS = tiny.tiny_base(folder, "none").tokenizer


@pytest.mark.parametrize("name", METHODS)
@pytest.mark.parametrize("of", ["llama", "gemma3"])
def test_every_method_that_reads_the_embedding_or_the_head(name: str, of: str) -> None:
    family, options = MODELS[of]
    plain = random_model(family, **options)
    model = to_host(copy.deepcopy(plain), rows=13)
    expected = gradients(method_on(plain, name), name)
    adapted = method_on(model, name)
    found = gradients(adapted, name)
    assert len(found) > 1
    assert all(values.any() for values in expected.values())
    close(found, expected)
    adapted.remove()
    assert isinstance(model.get_output_embeddings(), HostLinear)


@pytest.mark.parametrize("of", ["llama", "llama, tied"])
def test_lora_on_every_linear_leaves_the_head_alone(of: str) -> None:
    family, options = MODELS[of]
    paths = [apply_method(as_base(model), config.LoRA(r=2)).methods[0].planted.keys() for model in (
        random_model(family, **options), to_host(random_model(family, **options)))]  # fmt: skip
    assert paths[0] == paths[1]
    assert not any("lm_head" in path for path in paths[1])


def test_a_copy_that_trains_stays_on_the_device() -> None:
    adapted = method_on(to_host(random_model("Gemma3Text")), "embedding")
    (layer,) = adapted.methods[0].planted.values()
    assert gathers_on_host(layer.base)
    assert not gathers_on_host(layer.module)
    assert not layer.module._forward_hooks
    assert not layer.module._forward_pre_hooks
    adapted = method_on(to_host(random_model("Llama")), "head")
    (layer,) = adapted.methods[0].planted.values()
    assert type(layer.module) is nn.Linear
    assert isinstance(layer.base, HostLinear)
    assert layer.module.weight.data_ptr() != layer.base.weight.data_ptr()


def test_what_trains_in_host_memory_is_refused() -> None:
    model = to_host(random_model("Llama", tie_word_embeddings=False))
    with pytest.raises(MethodError, match=r"trains lm_head, model\.embed_tokens too.*method\.embeddings=false"):
        apply_method(as_base(model), config.Full())
    assert not any(values.requires_grad for values in model.parameters())
    model.get_output_embeddings().weight.requires_grad_(True)
    with pytest.raises(ModelError, match=r"set memory\.head=device"):
        batch_loss(model, BATCH)


def test_half_of_a_tied_pair_and_odd_heads_are_refused() -> None:
    tied, untied = random_model("Gemma2"), random_model("Llama", tie_word_embeddings=False)
    for model in (tied, copy.deepcopy(tied).to("meta")):
        with pytest.raises(ModelError, match=r"memory\.embedding is host.*set memory\.head=host too"):
            refuse_half(model, embedding=True, head=False)
        with pytest.raises(ModelError, match=r"memory\.head is host.*set memory\.embedding=host too"):
            refuse_half(model, embedding=False, head=True)
        refuse_half(model, embedding=True, head=True)
    refuse_half(untied, embedding=True, head=False)
    untied.lm_head = nn.Sequential(untied.lm_head)
    with pytest.raises(ModelError, match="a Sequential, not a plain linear"):
        head_on_host(untied)


def test_one_of_an_untied_pair() -> None:
    plain = random_model("Llama", tie_word_embeddings=False)
    one, other = copy.deepcopy(plain), copy.deepcopy(plain)
    embedding_on_host(one)
    head_on_host(other)
    assert type(one.lm_head) is nn.Linear
    assert gathers_on_host(one.model.embed_tokens)
    assert isinstance(other.lm_head, HostLinear)
    assert not gathers_on_host(other.model.embed_tokens)
    expected = batch_loss(plain, BATCH, 5)[0]
    for model in (one, other):
        assert difference(batch_loss(model, BATCH, 5)[0], expected) <= LOSS


class Readable(TorchDispatchMode):
    """Whole numbers can be read from the meta device, ids and what masks are decided by: they are zero."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        to_host = func is torch.ops.aten._to_copy.default and kwargs.get("device") == torch.device("cpu")
        if to_host and args[0].is_meta and args[0].dtype == torch.long:
            return torch.zeros(args[0].shape, dtype=torch.long)
        if func is torch.ops.aten._local_scalar_dense.default and args[0].is_meta:
            return False
        return func(*args, **kwargs)


@pytest.mark.parametrize("of", ["llama", "gemma3"])
@pytest.mark.parametrize("name", ["lora everywhere", "head", "embedding", "bias", "prompt", "new tokens"])
@pytest.mark.sampled
def test_every_tensor_is_where_it_is_used(of: str, name: str) -> None:
    """The device is meta, where tensors have no values: what mixes host and device raises, forward and backward."""
    family, options = MODELS[of]
    device = torch.device("meta")
    model = random_model(family, **options)
    for layer in (*model.model.layers, model.model.norm, model.model.rotary_emb):
        layer.to(device)
    to_host(model, device=device)
    head, embedding = model.get_output_embeddings(), model.get_input_embeddings()
    assert head.weight.device.type == embedding.weight.device.type == model.device.type == "cpu"
    head.rows = 13
    base = as_base(nn.Linear(2, 2, device=device))
    base.model = model
    adapted = apply_method(base, METHODS[name])
    trained = adapted.trainable_parameters()
    assert all(values.device == device for values in trained.values())
    ids, positions = torch.zeros(2, 9, dtype=torch.long), torch.arange(9).expand(2, 9)
    places, wanted = torch.arange(11, device=device), torch.zeros(18, dtype=torch.long, device=device)
    with Readable():
        # on the host, as generate() sends them: it thinks that the model is where its first parameter is
        hidden = hidden_states(model, {"input_ids": ids, "position_ids": positions})
        assert hidden.device == model(input_ids=ids, position_ids=positions).logits.device == device
        summed_loss(hidden.flatten(0, 1), head_of(model), wanted, places, 4).backward()
    assert all(values.grad is not None and values.grad.device == device for values in trained.values())
    assert dense_weight(head, torch.float32).device == device


def test_load_base_puts_them_there(tmp_path: Path) -> None:
    folder = tiny.tiny_checkpoint(tmp_path, "gemma2")
    section = ModelSection(name=str(folder), compute_dtype="fp32")
    prompts = [[5], [9, 8, 7, 6, 5, 4, 3, 10, 11]]
    said, losses = [], []
    for place in ("device", "host"):
        memory = MemorySection(embedding=place, head=place)
        base = load_base(section, torch.device("cpu"), memory=memory)
        assert isinstance(base.model.get_output_embeddings(), HostLinear) == (place == "host")
        adapted = apply_method(base, config.LoRA(r=2))
        tiny.stir(adapted)
        said.append(answers(adapted, prompts, 8))
        losses.append(gradients(adapted, "lora")["loss"])
    assert said[0] == said[1]
    assert all(said[0])
    assert difference(*losses) <= LOSS
