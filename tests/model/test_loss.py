"""The law of the loss: chunked = plain cross-entropy, in value and gradient; in low precision no worse than the plain path."""

from __future__ import annotations

import collections
import copy
import dataclasses
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from qlora.model.loss import (
    IGNORE_INDEX,
    Head,
    batch_loss,
    grouped_loss,
    head_of,
    hidden_states,
    token_loss,
)
from tests.rounding import difference, no_worse, none_worse, rounding
from tests.steps import LOSS, close
from tests.tiny import VOCABULARY, random_model

FAMILIES = ["Llama", "Mistral", "Qwen2", "Qwen3", "Gemma2", "Gemma3Text", "Phi3"]
FEW = rounding(terms=50, sums=4)  # a product with the head each way, and the sums over tokens
HEADS: dict[str, dict[str, Any]] = {
    "plain": {},
    "bias": {"bias": True},
    "multiplier": {"multiplier": 0.25},
    "softcap": {"softcap": 3.0},
    "filled up": {"rows": 50, "softcap": 3.0},
    "both": {"multiplier": 1.5, "softcap": 3.0, "bias": True},
}
IDS = [int(token) for token in torch.arange(3, 40) * 7 % VOCABULARY]


def random_head(bias: bool = False, trained: bool = False, dtype: torch.dtype = torch.float32, **options: Any) -> Head:
    generator = torch.Generator().manual_seed(1)
    linear = nn.Linear(16, 57 if "rows" in options else 50, bias=bias)
    with torch.no_grad():
        for values in linear.parameters():
            values.normal_(generator=generator)
    return Head(linear.to(dtype).requires_grad_(trained), **options)


def in_dtype(head: Head, dtype: torch.dtype) -> Head:
    """The same head with its values rounded to ``dtype``."""
    return dataclasses.replace(head, module=copy.deepcopy(head.module).to(dtype))


def random_batch(rows: int, length: int, seed: int = 2) -> tuple[Tensor, Tensor]:
    """Hidden states and labels, about half of them targets."""
    generator = torch.Generator().manual_seed(seed)
    hidden = torch.randn(rows, length, 16, generator=generator)
    labels = torch.randint(0, 50, (rows, length), generator=generator)
    labels[torch.rand(rows, length, generator=generator) < 0.5] = IGNORE_INDEX
    return hidden, labels


def plain_loss(hidden: Tensor, head: Head, labels: Tensor) -> Tensor:
    """What everyone writes: all logits, then cross-entropy in fp32 or better."""
    logits = head.module(hidden) * head.multiplier
    if head.softcap is not None:
        logits = torch.tanh(logits / head.softcap) * head.softcap
    logits = logits[..., : head.rows]
    logits = logits if logits.dtype == torch.float64 else logits.float()
    wanted = labels[:, 1:].reshape(-1)
    return F.cross_entropy(logits[:, :-1].flatten(0, 1), wanted, ignore_index=IGNORE_INDEX, reduction="sum")


def value_and_gradient(loss: Any, hidden: Tensor, head: Head, labels: Tensor, *args: Any) -> tuple[Tensor, Tensor]:
    hidden = hidden.clone().requires_grad_()
    result = loss(hidden, head, labels, *args)
    value = result[0] if isinstance(result, tuple) else result
    (value * 0.5).backward()  # a power of two: the loss's own rounding is measured, not this factor's
    assert hidden.grad is not None
    return value.detach(), hidden.grad


@pytest.mark.parametrize("kind", HEADS)
@pytest.mark.parametrize("chunk", [1, 3, 256])
@pytest.mark.parametrize("shape", [(1, 2), (3, 7), (2, 33)])
def test_chunked_is_plain(kind: str, chunk: int, shape: tuple[int, int]) -> None:
    head = random_head(**HEADS[kind])
    hidden, labels = random_batch(*shape)
    labels[0, 1] = 7
    value, gradient = value_and_gradient(token_loss, hidden, head, labels, chunk)
    expected, expected_gradient = value_and_gradient(plain_loss, hidden, head, labels)
    exact, exact_gradient = value_and_gradient(plain_loss, hidden.double(), in_dtype(head, torch.float64), labels)
    no_worse(value, expected, exact)
    no_worse(gradient, expected_gradient, exact_gradient)
    assert token_loss(hidden, head, labels, chunk)[1] == int((labels[:, 1:] != IGNORE_INDEX).sum())


def test_without_a_gradient_the_value_is_the_same() -> None:
    hidden, labels = random_batch(3, 7)
    with torch.no_grad():
        alone = token_loss(hidden, random_head(softcap=3.0), labels, 4)[0]
    with_gradient = token_loss(hidden.requires_grad_(), random_head(softcap=3.0), labels, 4)[0]
    assert not alone.requires_grad
    assert torch.equal(alone, with_gradient.detach())


def test_ignored_rows_count_for_nothing() -> None:
    head = random_head()
    hidden, labels = random_batch(4, 9)
    labels[1] = labels[3] = IGNORE_INDEX
    value, gradient = value_and_gradient(token_loss, hidden, head, labels, 3)
    kept, kept_gradient = value_and_gradient(token_loss, hidden[[0, 2]], head, labels[[0, 2]], 3)
    assert difference(value, kept) <= FEW
    assert difference(gradient[[0, 2]], kept_gradient) <= FEW
    assert not gradient[[1, 3]].any()


def test_all_ignored_is_zero_with_a_zero_gradient() -> None:
    hidden, labels = random_batch(2, 5)
    labels[:] = IGNORE_INDEX
    labels[:, 0] = 4  # nothing predicts a first token
    value, gradient = value_and_gradient(token_loss, hidden, random_head(), labels)
    assert value == 0
    assert not gradient.any()
    assert token_loss(hidden, random_head(), labels)[1] == 0


@pytest.mark.parametrize("kind", HEADS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
@pytest.mark.sampled
def test_low_precision_errs_no_more_than_the_plain_path(kind: str, dtype: torch.dtype) -> None:
    """Against fp64 truth on the same rounded inputs, summed over many batches so that luck evens out.

    Where both round the same things, sums in another order leave a tie that is off by 0.1 % of the error. One rounding
    more than the plain path's costs 1 % without a cap and 30 % with one.
    """
    head = in_dtype(random_head(**HEADS[kind]), dtype)
    truth_head = in_dtype(head, torch.float64)
    errors = torch.zeros(2, 2, dtype=torch.float64)  # ours, plain × value, gradient
    for seed in range(20):
        hidden, labels = random_batch(3, 33, seed)
        hidden = hidden.to(dtype)
        truth = value_and_gradient(plain_loss, hidden.double(), truth_head, labels)
        for row, found in enumerate(
            (
                value_and_gradient(token_loss, hidden, head, labels, 8),
                value_and_gradient(plain_loss, hidden, head, labels),
            )
        ):
            for column in range(2):
                errors[row, column] += (found[column].double() - truth[column]).square().sum()
    ours, plain = errors
    assert (ours.sqrt() <= 1.003 * plain.sqrt()).all(), f"ours {ours.sqrt().tolist()}, plain {plain.sqrt().tolist()}"


@pytest.mark.parametrize("family", FAMILIES)
def test_batch_loss_is_the_cross_entropy_of_the_models_logits(family: str) -> None:
    model = random_model(family)
    ids = torch.tensor([IDS[:17], IDS[17:34]])
    positions = torch.tensor([[*range(9), *range(8)], [*range(17)]])
    labels = ids.clone()
    labels[:, ::3] = IGNORE_INDEX
    loss, count = batch_loss(model, {"input_ids": ids, "position_ids": positions, "labels": labels}, 5)
    logits = model(input_ids=ids, position_ids=positions, use_cache=False).logits.float()
    expected = F.cross_entropy(
        logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten(), ignore_index=IGNORE_INDEX, reduction="sum"
    )
    assert difference(loss, expected) <= LOSS
    assert count == int((labels[:, 1:] != IGNORE_INDEX).sum())


def test_granite_and_cohere_are_scaled() -> None:
    assert head_of(random_model("Granite", logits_scaling=8.0)).multiplier == 1 / 8
    assert head_of(random_model("Cohere", logit_scale=0.5)).multiplier == 0.5
    assert head_of(random_model("Gemma2", final_logit_softcapping=2.0)).softcap == 2.0


class LargestLogits(TorchDispatchMode):
    """Remembers the most elements that any tensor (of a dtype) whose last side is the vocabulary has."""

    def __init__(self, vocabulary: int, dtype: torch.dtype | None = None) -> None:
        super().__init__()
        self.vocabulary = vocabulary
        self.dtype = dtype
        self.largest = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        output = func(*args, **(kwargs or {}))
        for tensor in torch.utils._pytree.tree_leaves(output):
            if not isinstance(tensor, Tensor) or self.dtype not in (None, tensor.dtype):
                continue
            if tensor.dim() and tensor.shape[-1] == self.vocabulary:
                self.largest = max(self.largest, tensor.numel())
        return output


def head_gradients(loss: Any, hidden: Tensor, head: Head, labels: Tensor, *args: Any) -> dict[str, Tensor]:
    """The gradients of the hidden states and of the head's parameters, by name."""
    parameters = dict(head.module.named_parameters())
    for values in parameters.values():
        values.grad = None
    found = {"hidden": value_and_gradient(loss, hidden, head, labels, *args)[1]}
    for name, values in parameters.items():
        assert values.grad is not None
        found[name] = values.grad
    return found


@pytest.mark.parametrize("kind", HEADS)
@pytest.mark.parametrize("chunk", [1, 3, 256])
def test_a_head_that_trains_gets_plain_autograds_gradients(kind: str, chunk: int) -> None:
    head = random_head(trained=True, **HEADS[kind])
    hidden, labels = random_batch(3, 7)
    found = head_gradients(token_loss, hidden, head, labels, chunk)
    expected = head_gradients(plain_loss, hidden, head, labels)
    assert all(values.any() for values in expected.values())
    exact = head_gradients(plain_loss, hidden.double(), in_dtype(head, torch.float64), labels)
    none_worse(found, expected, exact)
    frozen = value_and_gradient(token_loss, hidden, random_head(**HEADS[kind]), labels, chunk)[1]
    no_worse(frozen, expected["hidden"], exact["hidden"])


def plain_loss_in_parts(hidden: Tensor, head: Head, labels: Tensor, chunk: int) -> dict[str, Tensor]:
    """The head's gradients by plain autograd, ``chunk`` targets a backward, summed up in ``.grad``."""
    head.module.zero_grad()
    flat, wanted = hidden[:, :-1].flatten(0, 1), labels[:, 1:].flatten()
    for rows in (wanted != IGNORE_INDEX).nonzero().squeeze(1).split(chunk):
        logits = head.scaled(head.module(flat[rows]))
        (F.cross_entropy(logits, wanted[rows], reduction="sum") * 0.5).backward()
    return {name: values.grad for name, values in head.module.named_parameters() if values.grad is not None}


@pytest.mark.parametrize("kind", HEADS)
@pytest.mark.sampled
def test_a_bf16_head_that_trains_errs_no_more_than_the_plain_path(kind: str) -> None:
    """As for a frozen head. In one chunk the head's gradient is plain autograd's; in several, whose parts each are
    rounded to bf16, it errs less than plain autograd that goes in such parts, because their sum is kept in fp32."""
    head = random_head(trained=True, dtype=torch.bfloat16, **HEADS[kind])
    truth_head = in_dtype(head, torch.float64)
    errors: dict[str, float] = collections.defaultdict(float)
    for seed in range(20):
        hidden, labels = random_batch(3, 33, seed)
        hidden = hidden.to(torch.bfloat16)
        truth = head_gradients(plain_loss, hidden.double(), truth_head, labels)
        ways = {
            "ours": head_gradients(token_loss, hidden, head, labels, 256),
            "plain": head_gradients(plain_loss, hidden, head, labels),
            "ours in parts": head_gradients(token_loss, hidden, head, labels, 8),
            "plain in parts": plain_loss_in_parts(hidden, head, labels, 8),
        }
        for way, found in ways.items():
            for name, values in found.items():
                assert values.dtype == torch.bfloat16
                errors[f"{way}: {name}"] += float((values.double() - truth[name]).square().sum())
    for way in ("ours", "ours in parts"):
        for name in truth:
            against = way.replace("ours", "plain") if name != "hidden" else "plain"
            ours, plain = errors[f"{way}: {name}"] ** 0.5, errors[f"{against}: {name}"] ** 0.5
            assert ours <= 1.003 * plain, f"{way}: {name} errs by {ours:g}, plain by {plain:g}"


def test_a_head_that_trains_alone_and_one_in_an_evaluation() -> None:
    """Nothing below the head trains: no gradient of the hidden states is made. Without gradients none is made at all.

    In fp16 the gradients are the only [*, 16] in fp32; in bf16 that of the hidden states is kept in bf16.
    """
    for dtype, widest in ((torch.float16, 40 * 7 * 16), (torch.bfloat16, 50 * 16)):
        head = random_head(trained=True, dtype=dtype)
        hidden, labels = random_batch(40, 7)
        hidden = hidden.to(dtype)
        with LargestLogits(16, torch.float32) as both:
            expected = head_gradients(token_loss, hidden, head, labels, 4)
        assert both.largest == widest
        head.module.zero_grad()
        with LargestLogits(16, torch.float32) as alone:
            (token_loss(hidden, head, labels, 4)[0] * 0.5).backward()
        assert alone.largest == 50 * 16
        assert torch.equal(head.module.weight.grad, expected["weight"])
        with torch.no_grad(), LargestLogits(16, torch.float32) as quiet:
            value = token_loss(hidden, head, labels, 4)[0]
        assert not value.requires_grad
        assert quiet.largest == 0


class SwitchedOff(nn.Module):
    """A head with a parameter that it does not use, as a planted one is while it is disabled."""

    def __init__(self, base: nn.Module) -> None:
        super().__init__()
        self.base = base
        self.own = nn.Parameter(torch.zeros(3))

    def forward(self, hidden: Tensor) -> Tensor:
        return self.base(hidden)


def test_parameters_that_the_head_does_not_use_get_a_zero_gradient() -> None:
    plain = random_head()
    head = Head(SwitchedOff(plain.module))
    hidden, labels = random_batch(3, 7)
    value, gradient = value_and_gradient(token_loss, hidden, head, labels, 4)
    expected, expected_gradient = value_and_gradient(token_loss, hidden, plain, labels, 4)
    assert difference(value, expected) <= FEW
    assert difference(gradient, expected_gradient) <= FEW
    loss = token_loss(hidden, head, labels, 4)[0]
    loss.backward()
    assert not head.module.own.grad.any()


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("family", ["Llama", "Gemma2"])
def test_a_whole_model_trains_through_the_loss(family: str, tied: bool) -> None:
    """A tied embedding gets the sum of what it earns as embedding and as head."""
    model = random_model(family, tie_word_embeddings=tied).requires_grad_(True)
    ids = torch.tensor([IDS[:17], IDS[17:34]])
    batch = {"input_ids": ids, "position_ids": torch.arange(17).expand(2, 17), "labels": ids.clone()}
    batch["labels"][:, ::3] = IGNORE_INDEX
    logits = model(input_ids=ids, position_ids=batch["position_ids"], use_cache=False).logits.float()
    F.cross_entropy(
        logits[:, :-1].flatten(0, 1), batch["labels"][:, 1:].flatten(), ignore_index=IGNORE_INDEX, reduction="sum"
    ).backward()
    expected = {name: values.grad for name, values in model.named_parameters() if values.grad is not None}
    model.zero_grad(set_to_none=True)
    batch_loss(model, batch, 5)[0].backward()
    assert ("lm_head.weight" in expected) is not tied
    close({name: values.grad for name, values in model.named_parameters() if values.grad is not None}, expected)


@pytest.mark.parametrize("trained", [False, True])
def test_full_logits_never_exist(trained: bool) -> None:
    model = random_model("Gemma2", vocab_size=101).requires_grad_(trained)
    ids = torch.tensor([IDS[:32]] * 8)
    batch = {"input_ids": ids, "position_ids": torch.arange(32).expand(8, 32), "labels": ids}
    head = head_of(model)
    with LargestLogits(101) as watched:
        hidden = hidden_states(model, batch).detach().requires_grad_()
        token_loss(hidden, head, ids, 8)[0].backward()
    allowed = max(8, model.config.hidden_size) * 101  # a chunk of logits; the head itself, transposed
    assert 8 * 101 <= watched.largest <= allowed < 8 * 31 * 101
    with LargestLogits(101) as plain:
        plain_loss(hidden_states(model, batch).detach().requires_grad_(), head, ids).backward()
    assert plain.largest >= 8 * 31 * 101


def test_head_without_embeddings_of_its_own_is_the_tied_one() -> None:
    model = random_model("Gemma2", tie_word_embeddings=True)
    assert head_of(model).module.weight is model.get_input_embeddings().weight
    assert isinstance(model.get_input_embeddings(), nn.Embedding)


@pytest.mark.parametrize("trained", [False, True])
@pytest.mark.parametrize("name", HEADS)
def test_sums_by_group_have_the_gradient_of_any_weights(name: str, trained: bool) -> None:
    """As plain losses of each position do: with whatever the sums are made into, of the head too where it trains."""
    head, (hidden, labels) = random_head(trained=trained, **HEADS[name]), random_batch(3, 9)
    wanted = labels[:, 1:].reshape(-1)
    places = (wanted != IGNORE_INDEX).nonzero().squeeze(1)
    groups = torch.arange(len(places)) * 7 % 4

    def made(dtype: torch.dtype, chunk: int | None) -> dict[str, Tensor]:
        ours, given = in_dtype(head, dtype), hidden.to(dtype, copy=True).requires_grad_()
        if chunk:
            sums = grouped_loss(given, ours, labels, groups, 5, chunk)
        else:
            each = F.cross_entropy(ours.logits(given[:, :-1]).flatten(0, 1), wanted, reduction="none")[places]
            sums = torch.zeros(5, dtype=torch.float64).index_add(0, groups, each.double())
        loss = (sums[0] - sums[1]).tanh() + 0.1 * sums[2] * sums[3] + sums[4]
        loss.backward()
        assert given.grad is not None
        found = {"sums": sums.detach(), "hidden": given.grad}
        return found | {key: values.grad for key, values in ours.module.named_parameters() if values.grad is not None}

    plain, exact = made(torch.float32, None), made(torch.float64, None)
    assert (len(plain) > 2) is trained
    assert exact["sums"][4] == 0
    for chunk in (1, 4, 100):
        none_worse(made(torch.float32, chunk), plain, exact)
