"""Packed = alone, by every way that runs here: values and gradients, over families, windows, rows at once and padding.

torch's kernel runs on a GPU alone (``tests/test_cuda.py``). Here a plain function of the same signature stands in for it, so
that the lengths, windows and heads that it is given are tested.
"""

from __future__ import annotations

import itertools
from typing import Any

import numpy
import pytest
import torch
from torch import Tensor, nn
from transformers import BertConfig, BertLMHeadModel

from qlora.model import anatomy, attention
from qlora.model.attention import EACH, EAGER, OWN, PLAIN, VARLEN, PackedMask, attention_of, keep_apart
from qlora.model.loss import hidden_states
from qlora.residence.layers import recomputing, wrap_layers
from tests.rounding import GRADIENT, difference, no_worse, rounding
from tests.tiny import VOCABULARY, random_model

POSITIONS = torch.tensor([[*range(7), *range(5), 5, 6], [*range(4), *range(6), 0, 1, 2, 3], [*range(14)]])
"""The first row ends in padding, the second in an example, and the third is one alone."""
EXAMPLES = [(0, 0, 7), (0, 7, 12), (1, 0, 4), (1, 4, 10), (1, 10, 14), (2, 0, 14)]
IDS = torch.arange(POSITIONS.numel()).reshape(POSITIONS.shape) * 7 % VOCABULARY
HALF, NARROW = torch.bfloat16, {"sliding_window": 3}
TWO_KINDS = {**NARROW, "layer_types": ["sliding_attention", "full_attention"]}
FAMILIES: dict[str, dict[str, Any]] = {
    "Llama": {},
    "Qwen2": {},
    "Qwen3": {},
    "Mistral": NARROW,
    "Phi3": NARROW,
    "Gemma3Text": TWO_KINDS,
    "Olmo3": TWO_KINDS,
    "Gemma4Text": {  # its last two layers read the keys of the first two
        **NARROW,
        "global_head_dim": 16,
        "num_hidden_layers": 4,
        "layer_types": ["sliding_attention", "full_attention"] * 2,
        "num_kv_shared_layers": 2,
        "vocab_size_per_layer_input": VOCABULARY,
    },
    "GPT2": {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64},
    "OPT": {"ffn_dim": 48, "word_embed_proj_dim": 32},  # transformers' own mask is none here: packed examples leak
}
OTHERS: dict[str, tuple[dict[str, Any], str]] = {
    "GptOss": ({**TWO_KINDS, "num_local_experts": 4}, OWN),  # sinks; its masks are not told where positions restart
    "Gemma2": ({**TWO_KINDS, "attn_logit_softcapping": 1.0, "attn_implementation": "eager"}, OWN),
    "Falcon": ({"head_dim": ...}, PLAIN),  # the name is asked for; not told either
    "BioGpt": ({}, PLAIN),
    "XGLM": ({"d_model": 32, "ffn_dim": 48, "num_layers": 2, "attention_heads": 4}, EAGER),
    "Phi3": ({**NARROW, "attn_implementation": "eager"}, EAGER),
}
UNTURNED = ("opt", "biogpt", "xglm")  # learned or added positions
"""Families that are not asked for a kernel of ours by name: sizes, and what name their attention has then."""


def plain_varlen(
    query: Tensor, key: Tensor, value: Tensor, starts_q: Tensor, starts_k: Tensor, most_q: int, most_k: int, *,
    scale: float | None, window_size: tuple[int, int], enable_gqa: bool = False,
) -> Tensor:  # fmt: skip
    """``varlen_attn`` as its documentation has it: a softmax of every sequence by itself."""
    assert torch.equal(starts_q, starts_k)
    assert starts_q.dtype == torch.int32
    assert enable_gqa or query.shape[1] == key.shape[1]
    key, value = (heads.repeat_interleave(query.shape[1] // heads.shape[1], 1) for heads in (key, value))
    bounds = starts_q.tolist()
    assert bounds[-1] == len(query)
    assert most_q == most_k == max(numpy.diff(bounds))
    left, right = window_size
    outputs = []
    for start, end in itertools.pairwise(bounds):
        scores = torch.einsum("qhe,khe->hqk", query[start:end], key[start:end])
        place = torch.arange(end - start)
        ahead = place - place[:, None]
        seen = (ahead <= right) & (ahead >= (-left if left >= 0 else -len(place)))
        scores = (scores * (scale or query.shape[2] ** -0.5)).masked_fill(~seen, -torch.inf)
        outputs.append(torch.einsum("hqk,khe->qhe", scores.softmax(-1), value[start:end]))
    return torch.cat(outputs)


@pytest.fixture(params=["each", "varlen", "varlen, heads repeated"])
def way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """The attention that packed rows go through, by its name."""
    if request.param == "each":
        return EACH
    monkeypatch.setattr(attention, "varlen_attn", plain_varlen)
    monkeypatch.setattr(attention, "_fits", lambda query, value: True)
    monkeypatch.setattr(attention, "SHARES_HEADS", request.param == "varlen")
    return VARLEN


def apart(family: str, way: str) -> Any:
    model = random_model(family, **FAMILIES[family])
    keep_apart(model, torch.float32, 0)
    assert attention_of(model) == EACH
    anatomy.text_config(model)._attn_implementation = way
    return model


def states(model: Any, ids: Tensor, positions: Tensor) -> Tensor:
    return hidden_states(model, {"input_ids": ids, "position_ids": positions})


def gradients(model: Any, packed: bool) -> dict[str, Tensor]:
    """Of a sum over the examples' tokens, none of padding's."""
    model.requires_grad_(True).zero_grad()
    weights = torch.randn(*IDS.shape, 32, generator=torch.Generator().manual_seed(0))
    whole = states(model, IDS, POSITIONS) if packed else None
    total = torch.zeros(())
    for row, start, end in EXAMPLES:
        part = slice(start, end)
        found = whole[row, part] if whole is not None else states(model, IDS[row, None, part], POSITIONS[row, None, part])[0]  # fmt: skip
        total = total + (found * weights[row, part]).sum()
    total.backward()
    found = {name: values.grad.clone() for name, values in model.named_parameters() if values.grad is not None}
    # without rotary positions a key's bias moves all scores of a query alike: its gradient is nothing but rounding
    return {
        name: grad
        for name, grad in found.items()
        if model.config.model_type not in UNTURNED or "k_proj.bias" not in name
    }


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.sampled
def test_packed_examples_are_what_they_are_alone(family: str, way: str) -> None:
    packed_is_alone(apart(family, way))


@pytest.mark.parametrize("family", OTHERS)
def test_packed_examples_are_what_they_are_alone_by_the_family_s_own_attention(family: str) -> None:
    sizes, name = OTHERS[family]
    model = random_model(family, **sizes)
    if name != EAGER:
        keep_apart(model, torch.float32, 0)
    assert attention_of(model) == name
    packed_is_alone(model)
    expected = gradients(model, packed=False)
    wrap_layers(model, 2)
    with recomputing(model):
        assert_close(gradients(model, packed=True), expected)


def packed_is_alone(model: Any) -> None:
    with torch.no_grad():
        packed = states(model, IDS, POSITIONS)
        for row, start, end in EXAMPLES:
            alone = states(model, IDS[row, None, start:end], POSITIONS[row, None, start:end])
            assert difference(packed[row, None, start:end], alone) < rounding()
    assert_close(gradients(model, packed=True), gradients(model, packed=False))


def assert_close(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    found = {name.replace(".layer.", "."): values for name, values in found.items()}
    assert found.keys() == expected.keys()
    assert max(difference(found[name], expected[name]) for name in found) < rounding(GRADIENT)


@pytest.mark.parametrize("lengths", [[[5, 3, 9], [15, 2]], [[5, 12], [5, 12]], [[16, 1], [2, 15]]])
def test_gradients_of_short_examples_in_16_bits_on_a_cpu(
    lengths: list[list[int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Values are torch's own, bit for bit, and gradients err no more than torch's own do."""
    starts = [[0, *itertools.accumulate(row[:-1])] for row in lengths]
    seed = torch.Generator().manual_seed(0)
    inputs = [torch.randn(2, 17, heads, 16, generator=seed).to(HALF) for heads in (6, 2, 2, 6)]

    def run(short: int, dtype: torch.dtype) -> list[Tensor]:
        monkeypatch.setattr(attention, "SHORT", short)
        *heads, weights = (one.to(dtype, copy=True).requires_grad_() for one in inputs)
        output, _ = attention._each(
            nn.Identity(), *(one.transpose(1, 2) for one in heads), PackedMask(starts, 17), scaling=0.3
        )
        assert (type(output.grad_fn.next_functions[0][0]).__name__ == "_ShortExamplesBackward") == (
            short > 0 and dtype == HALF
        )
        return [output, *torch.autograd.grad(output, heads, weights)]

    ours, plain, exact = run(16, HALF), run(0, HALF), run(0, torch.float64)
    assert torch.equal(ours[0], plain[0])
    for found, theirs, wanted in zip(ours, plain, exact, strict=True):
        no_worse(found, theirs, wanted, HALF)
    monkeypatch.setattr(attention, "SHORT", 16)
    assert attention._mostly_short(inputs[:3], [5, 3, 9])
    monkeypatch.setattr(attention, "CPU_BACKWARD", None)  # a torch without its private operator
    assert not attention._mostly_short(inputs[:3], [5, 3, 9])


@pytest.mark.parametrize("rows", [1, 2])
@pytest.mark.parametrize("family", ["Llama", "Gemma3Text"])
def test_rows_that_are_cut_behind_the_boundary_keep_their_lengths(family: str, rows: int, way: str) -> None:
    model = apart(family, way)
    expected = gradients(model, packed=True)
    wrap_layers(model, rows)
    assert_close(gradients(model.train(), packed=True), expected)


def test_a_mask_is_written_out_as_transformers_writes_it() -> None:
    """transformers' own, of the same positions, is the reference."""
    from transformers.masking_utils import create_causal_mask, create_sliding_window_causal_mask

    model = random_model("Mistral", sliding_window=3)
    given = {"config": model.config, "inputs_embeds": torch.zeros(3, 14, 32), "attention_mask": None, "past_key_values": None, "position_ids": POSITIONS}  # fmt: skip
    mask = PackedMask.of(POSITIONS)
    assert mask.starts == [[0, 7], [0, 4, 10], [0]]
    assert mask.lengths == [7, 7, 4, 6, 4, 14]
    assert torch.equal(mask.dense(torch.device("cpu")), create_causal_mask(**given))
    assert torch.equal(mask.within(3).dense(torch.device("cpu")), create_sliding_window_causal_mask(**given))


def test_bounds_are_made_once_for_all_layers() -> None:
    mask = PackedMask.of(POSITIONS)
    part = mask[1:3]
    assert part is mask[1:3]
    assert part.bounds(torch.device("cpu")) is part.bounds(torch.device("cpu"))
    assert part.bounds(torch.device("cpu")).tolist() == [0, 4, 10, 14, 28]
    assert not mask[2:].packed
    assert mask.packed


def test_rows_of_one_example_take_the_kernel_that_transformers_takes() -> None:
    """Bit for bit: nothing changes for whoever does not pack."""
    model = random_model("Llama")
    with torch.no_grad():
        expected = states(model, IDS[2:], POSITIONS[2:])
        keep_apart(model, torch.float32, 0)
        assert torch.equal(states(model, IDS[2:], POSITIONS[2:]), expected)


def test_dropout_in_the_attention_goes_example_by_example(monkeypatch: pytest.MonkeyPatch) -> None:
    """torch's kernel has none."""
    monkeypatch.setattr(attention, "varlen_attn", None)
    model = random_model("Llama", attention_dropout=0.5)
    anatomy.text_config(model)._attn_implementation = VARLEN
    model.train()
    with torch.no_grad():
        one, other = (states(model, IDS, POSITIONS) for _ in range(2))
    assert one.isfinite().all()
    assert not torch.equal(one, other)


def test_heads_that_flash_attention_does_not_take() -> None:
    def fits(size: int, of_values: int | None = None, dtype: torch.dtype = HALF) -> bool:
        made = [torch.empty(1, 4, 3, width, dtype=dtype) for width in (size, of_values or size)]
        return attention._fits(*made)

    assert fits(64)
    assert fits(256)
    assert fits(128, dtype=torch.float16)
    assert not fits(36)
    assert not fits(208)
    assert not fits(512)
    assert not fits(192, 128)
    assert not fits(64, dtype=torch.float32)


@pytest.mark.parametrize(
    ("dtype", "capability", "expected"),
    [(torch.float32, 0, EACH), (HALF, 0, EACH), (torch.float16, 7.5, EACH), (torch.float32, 9, EACH), (HALF, 8.6, VARLEN)],
)  # fmt: skip
def test_the_kernel_is_for_16_bits_on_ampere_and_later(dtype: torch.dtype, capability: float, expected: str) -> None:
    model = random_model("Llama")
    keep_apart(model, dtype, capability)
    assert attention_of(model) == expected


def test_what_is_no_plain_attention_keeps_its_own() -> None:
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48}
    bert = BertLMHeadModel(BertConfig(vocab_size=VOCABULARY, **sizes))  # sees what follows
    for model, own in (
        (bert, PLAIN),
        (random_model("GptOss", num_local_experts=4), OWN),
        (random_model("Falcon", head_dim=...), PLAIN),
    ):
        keep_apart(model, HALF, 9)
        assert attention_of(model) == own
