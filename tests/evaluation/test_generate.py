"""The law of answers: a batch of prompts of different length = one by one; they end where the model ends them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import GPT2Config, GPT2LMHeadModel, TextStreamer

from qlora import recipe as config
from qlora.errors import DataError
from qlora.evaluation.generate import answer, answers, generated, room
from qlora.methods.base import AdaptedModel, apply_method
from qlora.model.nf4 import FrozenLinear
from qlora.residence.layers import wrap_layers
from tests import tiny

PROMPTS = [[5], [9, 8, 7, 6, 5, 4, 3, 10, 11], [40, 41, 42], [77, 3]]
LENGTH = 12


@torch.no_grad()
def continuation(model: AdaptedModel, prompt: list[int], length: int = LENGTH) -> list[int]:
    """Greedy by hand: the whole text through the model again for each token, no cache, no padding, no end."""
    ids = list(prompt)
    for _ in range(length):
        logits = model.model(input_ids=torch.tensor([ids]), use_cache=False).logits
        ids.append(int(logits[0, -1].argmax()))
    return ids[len(prompt) :]


def text(ids: list[int]) -> str:
    """What the tokenizer makes of ids that are no special tokens."""
    return " ".join(f"w{token}" for token in ids if token > 2)


def until(ids: list[int], *ends: int) -> list[int]:
    return ids[: next((place for place, token in enumerate(ids) if token in ends), len(ids))]


def test_a_batch_is_one_by_one_and_greedy_by_hand(model: AdaptedModel) -> None:
    expected = [text(until(continuation(model, prompt), 2)) for prompt in PROMPTS]
    assert len(set(expected)) == len(PROMPTS)
    assert answers(model, PROMPTS, LENGTH) == expected
    assert [answer(model, prompt, LENGTH) for prompt in PROMPTS] == expected
    assert answers(model, PROMPTS[::-1], LENGTH) == expected[::-1]


@pytest.mark.parametrize("name", ["falcon-mamba", "minimax", "recurrent-gemma", "rwkv", "xlstm"])
@pytest.mark.sampled
def test_models_with_states_answer_too(name: str, tmp_path: Path) -> None:
    """Instead of a cache; some let what stands before a shorter prompt into it, so those are answered by length."""
    family, sizes, _ = tiny.HYBRIDS[name]
    sizes = {**sizes, "attention_hidden_size": 64, "initializer_range": 0.5, "num_hidden_layers": 3, "lru_width": 64}
    folder = tiny.any_checkpoint(tmp_path, family, torch.float32, **sizes)
    base = tiny.tiny_base(folder, "nf4" if name == "minimax" else "none")  # experts that are not packed take no adapter
    model = apply_method(base, config.LoRA(r=4))
    tiny.stir(model, 0.3)
    prompts = [*PROMPTS[1:], [8] * 9]
    assert answers(model, prompts, 6) == [text(until(continuation(model, prompt, 6), 2)) for prompt in prompts]


def test_no_prompts_no_answers(model: AdaptedModel) -> None:
    assert answers(model, [], 5) == []


def ending(model: AdaptedModel) -> tuple[int, int, list[list[int]]]:
    """A token that some answer holds and another does not, and its place there."""
    ways = [continuation(model, prompt) for prompt in PROMPTS]
    for way in ways:
        for place, token in enumerate(way):
            if place and token > 3 and token not in way[:place] and any(token not in other for other in ways):
                return token, place, ways
    raise AssertionError("no such token")


@pytest.mark.parametrize("where", ["config", "generation_config", "list", "tokenizer"])
@pytest.mark.sampled
def test_every_end_token_ends_an_answer(model: AdaptedModel, where: str) -> None:
    """One row ends early, the others go on; what is padded behind it is not part of the answer."""
    token, _, ways = ending(model)
    model.model.config.eos_token_id = None
    if where == "config":
        model.model.config.eos_token_id = token
    elif where == "tokenizer":
        model.tokenizer.eos_token = f"w{token}"
    else:
        model.base.end_tokens = (token,) if where == "generation_config" else (2, token)
    expected = [text(until(way, token, 2)) for way in ways]
    assert expected != [text(until(way, 2)) for way in ways]
    assert answers(model, PROMPTS, LENGTH) == expected


def test_padding_that_is_no_special_token_stays_out(model: AdaptedModel) -> None:
    token, _, ways = ending(model)
    model.model.config.eos_token_id = token
    model.tokenizer.pad_token = None
    expected = [text(until(way, token, 2)) for way in ways]
    assert answers(model, PROMPTS, LENGTH) == expected


def test_the_length_is_bounded(model: AdaptedModel) -> None:
    model.model.config.eos_token_id = None
    model.tokenizer.eos_token = None
    for length in (1, 5):
        assert [len(found.split()) for found in answers(model, PROMPTS, length)] == [
            len(text(continuation(model, prompt, length)).split()) for prompt in PROMPTS
        ]


@pytest.mark.parametrize("training", [True, False])
def test_the_model_is_left_as_it_was(model: AdaptedModel, training: bool) -> None:
    expected = answers(model, PROMPTS, 5)
    wrap_layers(model.model, 1)
    model.model.train(training)
    state = torch.get_rng_state()
    assert answers(model, PROMPTS, 5) == expected
    assert all(module.training == training for module in model.model.modules())
    assert torch.equal(torch.get_rng_state(), state)
    assert all(module.kept is None for module in model.model.modules() if isinstance(module, FrozenLinear))


def test_with_little_memory_the_answer_is_the_same(model: AdaptedModel, monkeypatch: pytest.MonkeyPatch) -> None:
    """Dense copies are kept for the time of an answer, but only where they take a small part of what is free."""
    calls: list[int] = []
    linear = next(module for module in model.model.modules() if isinstance(module, FrozenLinear))
    dequantise = type(linear).dequantise
    monkeypatch.setattr(type(linear), "dequantise", lambda self, dtype: calls.append(1) or dequantise(self, dtype))
    expected = answer(model, PROMPTS[1], 5)
    linears = sum(isinstance(module, FrozenLinear) for module in model.model.modules())
    assert len(calls) == linears
    monkeypatch.setattr("qlora.evaluation.generate.total_memory_bytes", lambda device: (1000, 1000))
    calls.clear()
    assert answer(model, PROMPTS[1], 5) == expected
    assert len(calls) > linears


def test_a_streamer_gets_the_tokens(model: AdaptedModel, capsys: pytest.CaptureFixture[str]) -> None:
    streamer = TextStreamer(model.tokenizer, skip_prompt=True, skip_special_tokens=True)
    found = answer(model, PROMPTS[2], 6, streamer)
    assert found
    assert capsys.readouterr().out.split() == found.split()


def test_the_adapter_counts(model: AdaptedModel) -> None:
    adapted = answers(model, PROMPTS, LENGTH)
    with model.disabled():
        assert answers(model, PROMPTS, LENGTH) != adapted


def test_answers_end_with_the_models_positions(model: AdaptedModel) -> None:
    """64 positions. The short prompt beside a long one is answered at full length all the same."""
    model.model.config.eos_token_id = None
    model.tokenizer.eos_token = None
    long = [3 + place % 90 for place in range(60)]
    expected = [text(continuation(model, long, 4)), text(continuation(model, PROMPTS[0], LENGTH))]
    assert room(model, 60) == 4
    assert answers(model, [long, PROMPTS[0]], LENGTH) == expected
    with pytest.raises(DataError, match=r"A prompt of 64 tokens leaves no position for an answer: .* has 64 for both"):
        answers(model, [PROMPTS[0], [5] * 64], LENGTH)


@pytest.mark.parametrize("section", [config.PrefixTuning(tokens=3), config.PromptTuning(tokens=3), config.LoRA(r=2)])
def test_a_learned_table_of_positions_is_never_read_past_its_end(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, section: config.Method
) -> None:
    monkeypatch.setitem(tiny.FAMILIES, "gpt2", (GPT2Config, GPT2LMHeadModel))
    folder = tiny.tiny_checkpoint(tmp_path, "gpt2", num_key_value_heads=4, max_position_embeddings=16)
    model = apply_method(tiny.tiny_base(folder, "none"), section)
    model.model.config.eos_token_id = None
    model.tokenizer.eos_token = None
    first = model.first_position
    assert first == (0 if section.name == "lora" else 3)
    for prompts in ([[5] * (15 - first)], [[5, 6], [7] * (12 - first)]):
        assert len(answers(model, prompts, 64)) == len(prompts)
    with pytest.raises(DataError, match=f"has {16 - first} for both"):
        answer(model, [5] * (16 - first), 64)
    with model.disabled():
        assert room(model, 15) == 1


def test_the_head_has_no_copy_for_each_prompt(model: AdaptedModel) -> None:
    """Of rows that lie apart a CPU multiplies each with a copy of the head: 900 MB for 16 prompts of a model of 135M."""
    sizes, given = list[int](), list[bool]()

    class Watched(TorchDispatchMode):
        def __torch_dispatch__(self, function: Any, types: Any, values: Any = (), named: Any = None) -> Any:
            found = function(*values, **(named or {}))
            if isinstance(found, torch.Tensor):
                sizes.append(found.numel())
            return found

    head = model.model.get_output_embeddings()
    hook = head.register_forward_pre_hook(lambda _, values: given.append(values[0].is_contiguous()))
    with Watched():
        generated(model, [list(range(3, 40))] * 8, 3, ends=[2])
    hook.remove()
    assert len(given) == 3
    weights = max(values.numel() for values in model.model.parameters())
    assert max(sizes) < 8 * weights
    assert not head._forward_pre_hooks
