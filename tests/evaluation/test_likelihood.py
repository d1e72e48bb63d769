"""The law of likelihoods: whatever shares a batch, a row or a context, ln p is what the model's own logits say of each alone."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from qlora.errors import DoesNotFitError
from qlora.evaluation.likelihood import Likelihood, likelihoods
from qlora.methods.base import AdaptedModel, apply_method
from qlora.model.base import Base
from qlora.recipe import LoRA
from tests import tiny
from tests.model.test_loss import LargestLogits
from tests.rounding import rounding
from tests.tiny import VOCABULARY

GROUPS = [
    [((5, 6, 7), (8,)), ((5, 6, 7), (9,)), ((5, 6, 7), (10, 11, 12))],
    [((20,), (21, 22)), ((20,), (23,))],
    [((30, 31), (32, 33, 34, 35)), ((36, 37), (32, 33, 34, 35))],
    [((40, 41, 42), (43, 44)), ((40, 41, 42), (45,)), ((40, 41, 42), (46, 47, 48))],
    [((50, 51, 52, 53, 54, 55), (56,))],
]


@torch.no_grad()
def alone(model: AdaptedModel, context: tuple[int, ...], rest: tuple[int, ...]) -> Likelihood:
    logits = model.model(input_ids=torch.tensor([[*context, *rest]]), use_cache=False).logits[0].double()
    behind = logits[len(context) - 1 : -1]
    nats = behind.log_softmax(-1).gather(1, torch.tensor(rest)[:, None]).sum().item()
    return Likelihood(nats, behind.argmax(-1).tolist() == list(rest), len(rest))


def greedy(model: AdaptedModel, context: tuple[int, ...]) -> tuple[int, ...]:
    ids = list(context)
    for _ in range(3):
        ids.append(int(model.model(input_ids=torch.tensor([ids]), use_cache=False).logits[0, -1].argmax()))
    return tuple(ids[len(context) :])


@pytest.mark.parametrize("worth", [1, 32])
@pytest.mark.parametrize("tokens_at_once", [1, 40, 4096])
def test_together_is_alone(
    model: AdaptedModel, tokens_at_once: int, worth: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("qlora.evaluation.likelihood.WORTH", worth)
    own = [((5, 6, 7), greedy(model, (5, 6, 7))), ((5, 6, 7), (11, 12, 13))]
    groups = [*GROUPS, own]
    model.model.train()
    found = dict(likelihoods(model, groups, tokens_at_once))
    assert model.model.training
    model.model.eval()
    assert found.keys() == set(range(len(groups)))
    for number, group in enumerate(groups):
        for ours, pair in zip(found[number], group, strict=True):
            theirs = alone(model, *pair)
            assert ours.nats == pytest.approx(theirs.nats, rel=rounding())
            assert (ours.greedy, ours.tokens) == (theirs.greedy, theirs.tokens)
    assert [one.greedy for one in found[len(GROUPS)]] == [True, False]


@pytest.mark.parametrize("name", [*tiny.SMALL, "gpt2", "gemma3", "mistral"])
def test_a_shared_context_goes_through_once(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever a family's positions and masks are: learned, rotary, ALiBi, windows shorter than the context."""
    from qlora.evaluation import likelihood

    if name in tiny.SMALL:
        model = tiny.small_model(name, tmp_path)
    else:
        sizes = {"gemma3": ("Gemma3Text", {"sliding_window": 4, "layer_types": ["sliding_attention", "full_attention"]}),
                 "mistral": ("Mistral", {"sliding_window": 4}), "gpt2": ("GPT2", {})}[name]  # fmt: skip
        bare = tiny.random_model(sizes[0], **sizes[1])
        base = Base(bare, None, tmp_path, "small", None, "none", False, tiny.CPU, torch.float32)
        model = apply_method(base, LoRA(r=4))
        tiny.stir(model, 0.05)
    through, real = list[int](), likelihood._through
    monkeypatch.setattr(likelihood, "_through", lambda *given: (through.append(given[1].numel()), real(*given))[1])
    monkeypatch.setattr(likelihood, "WORTH", 1)
    groups = [GROUPS[0], GROUPS[3], [((5, 6, 7, 8, 9, 10, 11, 12), rest) for rest in ((8, 9, 10), (9, 3), (7, 7))]]
    found = dict(likelihoods(model, groups))
    assert through == [6, 12, 8, 6]  # two contexts of 3 and what follows, one of 8 and what follows
    for number, group in enumerate(groups):
        for ours, pair in zip(found[number], group, strict=True):
            assert ours.nats == pytest.approx(alone(model, *pair).nats, rel=rounding())


@pytest.mark.parametrize("name", ["falcon-mamba", "qwen3.5", "lfm2"])
def test_a_model_with_states_shares_nothing(name: str, tmp_path: Path) -> None:
    family, sizes, _ = tiny.HYBRIDS[name]
    base = Base(
        tiny.random_model(family, **{"num_hidden_layers": 3, **sizes}),
        None,
        tmp_path,
        "small",
        None,
        "none",
        False,
        tiny.CPU,
        torch.float32,
    )
    model = apply_method(base, LoRA(r=4))
    found = dict(likelihoods(model, GROUPS))
    for number, group in enumerate(GROUPS):
        for ours, pair in zip(found[number], group, strict=True):
            assert ours.nats == pytest.approx(alone(model, *pair).nats, rel=rounding())


def test_full_logits_never_exist(model: AdaptedModel, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("qlora.evaluation.likelihood.CHUNK", 2)
    with LargestLogits(VOCABULARY) as watched:
        dict(likelihoods(model, GROUPS))
    assert watched.largest <= 64 * VOCABULARY  # the head itself, transposed


def test_less_at_once_where_memory_runs_out(model: AdaptedModel, monkeypatch: pytest.MonkeyPatch) -> None:
    from qlora.evaluation import likelihood

    found, sizes, real = dict(likelihoods(model, GROUPS)), list[int](), likelihood._found

    def small(
        model: AdaptedModel, groups: list[list[tuple[tuple[int, ...], tuple[int, ...]]]]
    ) -> list[list[Likelihood]]:
        sizes.append(len(groups))
        if len(groups) > most:
            raise torch.OutOfMemoryError("no room")
        return real(model, groups)

    monkeypatch.setattr(likelihood, "_found", small)
    monkeypatch.setattr(likelihood, "release_memory", lambda device: None)
    most = 1
    again = dict(likelihoods(model, GROUPS))
    assert [sizes[0], sizes[-1]] == [len(GROUPS), 1]
    for number, group in found.items():
        assert [one.nats for one in again[number]] == pytest.approx([one.nats for one in group], rel=rounding())
    most = 0
    with pytest.raises(DoesNotFitError, match=r"Scoring one item of .* tokens did not fit"):
        dict(likelihoods(model, GROUPS))
