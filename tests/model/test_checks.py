"""The checks before a run: what is right passes over every family, and what would go wrong in silence is refused."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, BertConfig, BloomConfig, ModernBertDecoderConfig

from qlora.errors import ModelError
from qlora.model.anatomy import layers as decoder_layers
from qlora.model.anatomy import position_limit
from qlora.model.attention import packed_rows
from qlora.model.checks import check_causal, check_loss_path, check_packing, packs_one_row
from qlora.model.loss import hidden_states
from qlora.residence import layers
from qlora.residence.checks import check_boundary
from qlora.residence.layers import wrap_layers
from tests.model.test_loss import FAMILIES, IDS
from tests.tiny import VOCABULARY, random_model


@pytest.mark.parametrize(
    ("family", "options"),
    [
        *((family, {}) for family in FAMILIES),
        ("Gemma2", {"final_logit_softcapping": 2.0}),
        ("Granite", {"logits_scaling": 8.0}),
        ("Cohere", {"logit_scale": 0.0625, "head_dim": None}),
    ],
)
def test_check_loss_path_accepts_what_head_of_knows(family: str, options: dict[str, Any]) -> None:
    if "head_dim" in options:
        options = {}
    check_loss_path(random_model(family, **options), IDS)


def test_what_stands_before_the_head_is_known() -> None:
    sizes = {
        "vocab_size": VOCABULARY,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
    }
    for config in (BertConfig(**sizes, is_decoder=True), ModernBertDecoderConfig(**sizes, pad_token_id=0)):
        check_loss_path(AutoModelForCausalLM.from_config(config).eval(), IDS)


@pytest.mark.parametrize(
    "change", [lambda x: 1.1 * x, lambda x: 30 * torch.tanh(x / 30), lambda x: x + x.mean(-1, True)]
)
def test_check_loss_path_refuses_what_changes_its_logits(change: Any) -> None:
    model = random_model("Llama")
    forward = type(model).forward

    class Altered(type(model)):  # type: ignore[misc]
        def forward(self, *args: Any, **kwargs: Any) -> Any:
            output = forward(self, *args, **kwargs)
            output.logits = change(output.logits * 10)
            return output

    model.lm_head.weight.data *= 1
    model.__class__ = Altered
    with pytest.raises(ModelError, match="its loss would be wrong"):
        check_loss_path(model, IDS)


@pytest.mark.parametrize("rows", [1, 3])
@pytest.mark.parametrize("family", FAMILIES)
def test_check_packing_accepts_sdpa(family: str, rows: int) -> None:
    check_packing(random_model(family), IDS, rows)


def test_check_packing_accepts_a_model_that_magnifies_rounding() -> None:
    """Seen on an H100: in bf16 the states of a random model of 8 layers differ by 5 % of the largest, and nothing leaks."""
    model = random_model("Llama", hidden_size=256, head_dim=64, num_hidden_layers=12, initializer_range=0.3).bfloat16()
    positions = torch.arange(8)[None]
    with torch.no_grad():
        alone, wider = (
            hidden_states(
                model, {"input_ids": torch.tensor([IDS[:8]]).repeat(1, n), "position_ids": positions.repeat(1, n)}
            )
            for n in (1, 2)
        )
    apart = (alone - wider[:, :8]).abs().max()
    if not apart:
        pytest.skip("this processor's bf16 products are the same in one row and in two")
    assert apart > 2e-2 * alone.abs().max()
    check_packing(model, IDS)


def test_check_packing_refuses_layers_that_ignore_the_mask() -> None:
    model = random_model("Llama")
    for layer in model.model.layers:
        forward = layer.forward
        layer.forward = lambda hidden, attention_mask=None, forward=forward, **kwargs: forward(hidden, **kwargs)
    with pytest.raises(ModelError, match=r"see each other.*packing=by_length"):
        check_packing(model, IDS)


def test_check_packing_accepts_a_decoder_that_ignores_positions() -> None:
    """As gpt-oss' masks do; but learned positions would be those of the row."""
    model = random_model("Llama")
    forward = model.model.forward
    model.model.forward = lambda input_ids, position_ids, **kwargs: forward(input_ids=input_ids, **kwargs)
    check_packing(model, IDS)
    bare = random_model("GPT2", n_embd=32, n_layer=2, n_head=4, n_positions=64)
    other = bare.transformer.forward
    bare.transformer.forward = lambda input_ids, position_ids, **kwargs: other(input_ids=input_ids, **kwargs)
    with pytest.raises(ModelError, match="see each other"):
        check_packing(bare, IDS)


def test_check_packing_refuses_flash_attention_with_several_rows() -> None:
    """As transformers' FlashAttention: positions that restart are looked for in a batch of one row only."""
    model = random_model("Llama")
    forward = model.model.forward

    def blind(input_ids: Tensor, position_ids: Tensor, **kwargs: Any) -> Any:
        with packed_rows(None):
            return forward(input_ids=input_ids, position_ids=position_ids if len(input_ids) == 1 else None, **kwargs)

    model.model.forward = blind
    assert not packs_one_row(model)
    model.config._attn_implementation_internal = "flash_attention_2"
    assert packs_one_row(model)
    model.config._attn_implementation_internal = "sdpa"
    check_packing(model, IDS)
    with pytest.raises(ModelError, match="2 rows at once"):
        check_packing(model, IDS, 2)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("family", FAMILIES)
def test_check_causal_accepts_what_is_causal(family: str, dtype: torch.dtype) -> None:
    check_causal(random_model(family).to(dtype), IDS)


def test_rounding_that_goes_by_the_length_of_rows_is_no_leak() -> None:
    """As on a CPU whose attention in rows of 8 and of 16 tokens parts by 20 eps behind 30 layers of SmolLM2, other lengths by none."""
    model = random_model("Llama")
    model.model.norm.register_forward_hook(lambda _, __, states: states * (1 + 2.5e-6 * (states.shape[1] > 8)))
    check_causal(model, IDS)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize(("check", "seen"), [(check_causal, -1), (check_packing, 0)], ids=["causal", "packing"])
@pytest.mark.parametrize("share", [0.01, 0.3])
def test_a_leak_of_one_percent_is_told_from_rounding(check: Any, seen: int, share: float, dtype: torch.dtype) -> None:
    """Of the row's last token into all before it, or of its first into all behind: in bf16 16 eps would be 12 %."""
    model = random_model("Llama").to(dtype)
    check(model, IDS)
    model.model.norm.register_forward_hook(lambda _, __, states: states + share * states[:, seen, None])
    with pytest.raises(ModelError, match=r"see each other|sees what follows"):
        check(model, IDS)


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize(("rows", "at_once"), [(1, 1), (7, 2), (8, 3), (8, 8)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.sampled
def test_check_boundary_accepts_it(family: str, dtype: torch.dtype, rows: int, at_once: int, packed: bool) -> None:
    model = random_model(family).to(dtype)
    decoder_layers(model)[0].requires_grad_(True)
    wrap_layers(model, at_once)
    state = torch.get_rng_state()
    check_boundary(model, IDS, rows, at_once, packed)
    check_boundary(model, IDS[:3], rows, at_once, packed)
    assert torch.equal(torch.get_rng_state(), state)
    assert not any(module.training for module in model.modules())
    assert all(values.grad is None for values in model.parameters())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_check_boundary_refuses_rows_that_get_the_mask_of_others(
    monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype
) -> None:
    """Nothing fails here, and every tensor has the right shape."""
    model = random_model("Llama").to(dtype)
    wrap_layers(model, 2)
    cut = layers._cut
    monkeypatch.setattr(
        layers, "_cut", lambda value, part, *sizes: cut(value, slice(0, part.stop - part.start), *sizes)
    )
    check_boundary(model, IDS, 2, 2, True)
    with pytest.raises(
        ModelError, match=r"4 rows, 2 at once: hidden states of up to .* differ by .*micro_batch_major, or"
    ):
        check_boundary(model, IDS, 4, 2, True)


def test_check_boundary_takes_rows_that_differ() -> None:
    """Else a layer that gets what belongs to the tokens of other rows would answer the same."""
    model = random_model("Llama")
    wrap_layers(model, 2)
    seen: list[Tensor] = []
    model.get_input_embeddings().register_forward_hook(lambda _, args, __: seen.append(args[0]))
    check_boundary(model, IDS, 5, 2, False)
    plain, again, whole = seen
    assert len({tuple(row) for row in whole.tolist()}) == 5
    assert torch.equal(plain, whole[4:])
    assert torch.equal(again, plain.repeat(4, 1))


@pytest.mark.parametrize("at_once", [2, 4])
def test_check_boundary_refuses_what_fails_in_a_sentence(monkeypatch: pytest.MonkeyPatch, at_once: int) -> None:
    model = random_model("Llama")
    wrap_layers(model, at_once)

    def run(*_: Any) -> None:
        raise RuntimeError("3 is not 4.\nAnd more that nobody wants to read.")

    monkeypatch.setattr(layers, "_run", run)
    with pytest.raises(ModelError, match=r"RuntimeError: 3 is not 4\), so .*recompute=none") as caught:
        check_boundary(model, IDS, 4, at_once, False)
    assert "\n" not in str(caught.value)
    assert ("micro_batch_major" in str(caught.value)) == (at_once == 2)
    assert not any(module.training for module in model.modules())


def test_check_boundary_leaves_a_lack_of_memory_what_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    model = random_model("Llama")
    wrap_layers(model, 2)

    def run(*_: Any) -> None:
        raise torch.OutOfMemoryError("no memory")

    monkeypatch.setattr(layers, "_run", run)
    with pytest.raises(torch.OutOfMemoryError):
        check_boundary(model, IDS, 4, 2, False)


def test_position_limit() -> None:
    assert position_limit(random_model("Llama")) == 64
    yarn = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64, "rope_theta": 1e4}
    assert position_limit(random_model("Llama", rope_parameters=yarn)) == 256
    reaching = {"rope_type": "llama3", "factor": 8.0, "original_max_position_embeddings": 4, "rope_theta": 1e4,
                "low_freq_factor": 1.0, "high_freq_factor": 4.0}  # fmt: skip
    assert position_limit(random_model("Llama", rope_parameters=reaching)) == 64
    assert position_limit(random_model("Gemma3Text")) == 64
    bloom = BloomConfig(vocab_size=VOCABULARY, hidden_size=32, n_layer=1, n_head=4)
    assert position_limit(AutoModelForCausalLM.from_config(bloom)) is None
