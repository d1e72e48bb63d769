"""The laws of prefix tuning: PEFT's answers and gradients, exact under recompute, packed as alone, with and without a cache."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from torch import nn
from transformers import (
    BloomConfig,
    BloomForCausalLM,
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    Gemma4ForCausalLM,
    Gemma4TextConfig,
    GPT2Config,
    GPT2LMHeadModel,
    GPTNeoXConfig,
    GPTNeoXForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    OPTConfig,
    OPTForCausalLM,
    StaticCache,
)

from qlora import recipe as config
from qlora.errors import MethodError
from qlora.methods.base import AdaptedModel, apply_method
from qlora.methods.files import save_adapter
from qlora.methods.loading import load_adapter
from qlora.methods.prefix import SPREAD, LaterPositions, PrefixAttention
from qlora.methods.prompt import KEY
from qlora.model.checks import check_packing
from qlora.recipe import TrainingSection
from qlora.residence.load import load_base
from qlora.training.loop import Trainer
from tests import tiny
from tests.methods.against_peft import plain_model
from tests.methods.test_prompt import assert_answers_need_no_cache, assert_packed_is_alone, gradients_of
from tests.rounding import GRADIENT, rounding
from tests.tiny import TOKENS, difference, logits_of, random_rows, stir, tiny_base, tiny_checkpoint

P = 3
PREFIX, PROJECTED = config.PrefixTuning(tokens=P), config.PrefixTuning(tokens=P, projection_size=8)
MORE: dict[str, tuple[Any, Any, dict[str, Any]]] = {
    "gemma3": (Gemma3TextConfig, Gemma3ForCausalLM, {"sliding_window": 64, "tie_word_embeddings": True}),
    "gpt2": (GPT2Config, GPT2LMHeadModel, {"num_key_value_heads": 4}),  # learned positions
    "opt": (OPTConfig, OPTForCausalLM, {"num_key_value_heads": 4, "ffn_dim": 128, "word_embed_proj_dim": 64}),
    "gpt_neox": (GPTNeoXConfig, GPTNeoXForCausalLM, {"num_key_value_heads": 4}),  # another name for the cache
}
EVERY = [*tiny.FAMILIES, *MORE]


@pytest.fixture
def checkpoint_of(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    def _checkpoint(family: str, **sizes: Any) -> Path:
        if family in MORE:
            config_class, model_class, own = MORE[family]
            monkeypatch.setitem(tiny.FAMILIES, family, (config_class, model_class))
            sizes = {**own, **sizes}
        return tiny_checkpoint(tmp_path / family, family, **sizes)

    return _checkpoint


def quantised(family: str) -> str:
    """How a family's base is quantised here: GPT-2's Conv1D is not."""
    return "none" if family == "gpt2" else "nf4"


def prefixes(model: AdaptedModel) -> list[PrefixAttention]:
    return [layer for layer in model.layers() if isinstance(layer, PrefixAttention)]


def side_by_side(tensors: list[torch.Tensor | None]) -> torch.Tensor:
    return torch.cat([values.flatten(1) for values in tensors if values is not None], dim=1)


@pytest.mark.parametrize("quantization", ["nf4", "none"])
@pytest.mark.parametrize("family", EVERY)
def test_logits_and_gradients_are_those_of_peft(checkpoint_of: Any, family: str, quantization: str) -> None:
    if quantization != quantised(family) != "nf4":
        pytest.skip("GPT-2's Conv1D is not quantised")
    folder = checkpoint_of(family)
    ours = apply_method(tiny_base(folder, quantization), PREFIX)
    stir(ours, 0.5)
    asked = peft.PrefixTuningConfig(num_virtual_tokens=P, task_type="CAUSAL_LM")
    theirs = peft.get_peft_model(plain_model(folder, quantization), asked).train()
    weight = theirs.prompt_encoder.default.embedding.weight
    weight.data.copy_(ours.adapter_state()[KEY])
    ours.model.train()
    for module in (*ours.model.modules(), *theirs.modules()):  # GPT-2 and OPT have dropout
        if isinstance(module, nn.Dropout):
            module.p = 0.0
        if isinstance(getattr(module, "dropout", None), float):
            module.dropout = 0.0
    found = ours.model(input_ids=TOKENS, labels=TOKENS, use_cache=False)
    expected = theirs(input_ids=TOKENS, labels=TOKENS)
    found.loss.backward()
    expected.loss.backward()
    with ours.disabled():
        assert difference(logits_of(ours.model), expected.logits) > 1e-2  # the prefix matters
    assert difference(found.logits, expected.logits) < rounding()
    worst = difference(side_by_side([layer.prefix.grad for layer in prefixes(ours)]), weight.grad)
    print(f"{family} {quantization}: logits {difference(found.logits, expected.logits):.1e}, gradients {worst:.1e}")
    assert worst < rounding(GRADIENT)


def test_a_projected_prefix_is_pefts(checkpoint_of: Any) -> None:
    folder = checkpoint_of("llama")
    ours = apply_method(tiny_base(folder, "none"), PROJECTED)
    stir(ours, 0.5)
    asked = peft.PrefixTuningConfig(
        num_virtual_tokens=P, task_type="CAUSAL_LM", prefix_projection=True, encoder_hidden_size=8
    )
    theirs = peft.get_peft_model(plain_model(folder, "none"), asked).train()
    encoder, layers = theirs.prompt_encoder.default, prefixes(ours)
    (first, last), shared = (encoder.transform[0], encoder.transform[2]), layers[0].shared
    pairs = [(encoder.embedding.weight, [shared.inputs]), (first.weight, [shared.hidden.weight])]
    pairs += [(first.bias, [shared.hidden.bias])]
    pairs += [(getattr(last, n), [getattr(layer.output, n) for layer in layers]) for n in ("weight", "bias")]
    for theirs_values, values in pairs:
        theirs_values.data.copy_(torch.cat([part.data for part in values]))
    found = ours.model(input_ids=TOKENS, labels=TOKENS, use_cache=False)
    expected = theirs(input_ids=TOKENS, labels=TOKENS)
    found.loss.backward()
    expected.loss.backward()
    assert difference(found.logits, expected.logits) < rounding()
    assert len(ours.trainable_parameters()) == 3 + 2 * 2
    for theirs_values, values in pairs:
        grads = torch.cat([part.grad for part in values if part.grad is not None])
        assert difference(grads, theirs_values.grad) < rounding(GRADIENT)


@pytest.mark.parametrize("section", [PREFIX, PROJECTED], ids=["plain", "projected"])
def test_peft_reads_ours_and_we_read_pefts(checkpoint_of: Any, tmp_path: Path, section: Any) -> None:
    folder = checkpoint_of("llama")
    ours = apply_method(tiny_base(folder, "none"), section)
    stir(ours, 0.5)
    expected = logits_of(ours.model)
    save_adapter(ours, tmp_path / "ours")
    theirs = peft.PeftModel.from_pretrained(plain_model(folder, "none"), tmp_path / "ours")
    assert set(peft.get_peft_model_state_dict(theirs)) == set(ours.adapter_state()) == {KEY}
    with torch.no_grad():
        assert difference(theirs(input_ids=TOKENS).logits, expected) < rounding()
    theirs.save_pretrained(tmp_path / "theirs")
    back = load_adapter(tiny_base(folder, "none"), tmp_path / "theirs")
    assert back.section == section
    assert difference(logits_of(back.model), expected) < rounding()
    # what came out of a network is a prefix like any other, and that is what trains on
    assert [name.rpartition(".")[2] for name in back.trainable_parameters()] == ["prefix", "prefix"]
    before = back.adapter_state()[KEY].clone()
    next(Trainer(back, random_rows(6), TrainingSection(batch_size=4, learning_rate=0.1)))
    assert not torch.equal(back.adapter_state()[KEY], before)
    save_adapter(back, tmp_path / "again")
    again = load_adapter(tiny_base(folder, "none"), tmp_path / "again")
    assert torch.equal(again.adapter_state()[KEY], back.adapter_state()[KEY])
    assert list(again.trainable_parameters()) == list(back.trainable_parameters())


@pytest.mark.parametrize("section", [PREFIX, PROJECTED], ids=["plain", "projected"])
@pytest.mark.parametrize("family", ["qwen2", "gemma2", "gpt2"])
def test_recomputed_and_layer_by_layer_gradients_are_the_plain_ones(
    checkpoint_of: Any, family: str, section: Any
) -> None:
    own = {"attn_pdrop": 0.0, "resid_pdrop": 0.0, "embd_pdrop": 0.0} if family == "gpt2" else {}
    model = apply_method(tiny_base(checkpoint_of(family, **own), quantised(family)), section)
    stir(model, 0.3)
    rows = random_rows(14)[:4]
    plain = gradients_of(model, rows)
    assert all(grad.any() for grad in plain.values())
    for at_once in (4, 1, 3):
        found = gradients_of(model, rows, at_once)
        assert max(difference(found[name], plain[name]) for name in plain) < rounding(GRADIENT)


@pytest.mark.parametrize("family", [family for family in EVERY if family not in ("opt",)])
@pytest.mark.sampled
def test_packed_is_alone_and_answers_need_no_cache(checkpoint_of: Any, family: str) -> None:
    """Every document of a packed row sees the prefix, and its positions begin behind it."""
    model = apply_method(tiny_base(checkpoint_of(family), quantised(family)), PREFIX)
    stir(model, 0.7)
    assert (model.virtual_tokens, model.first_position) == (0, P)
    assert_packed_is_alone(model)
    check_packing(model.model, [5, 6, 7, 8, 9, 10, 11, 12], 3)
    assert_answers_need_no_cache(model)
    with model.disabled():
        assert model.first_position == 0


def test_answers_of_opt_need_no_cache(checkpoint_of: Any) -> None:
    """OPT counts positions from the mask, and tells no packed examples apart, with or without a prefix."""
    model = apply_method(tiny_base(checkpoint_of("opt")), PREFIX)
    stir(model, 0.7)
    assert_answers_need_no_cache(model)


def test_a_sliding_window_hides_tokens_but_not_the_prefix(checkpoint_of: Any) -> None:
    """Far behind the window's width the prefix still matters, with a cache and without; PEFT's is lost by then."""
    folder = checkpoint_of("gemma3", sliding_window=4, layer_types=["sliding_attention"] * 2)
    model = apply_method(tiny_base(folder, "none"), PREFIX)
    ids = torch.arange(20)[None] * 5 % 96

    def last(prefix: float) -> torch.Tensor:
        for layer in prefixes(model):
            layer.prefix.data.fill_(prefix)
        with torch.no_grad():
            whole = model.model(input_ids=ids, use_cache=False).logits
            first = model.model(input_ids=ids[:, :12], use_cache=True)
            rest = model.model(input_ids=ids[:, 12:], past_key_values=first.past_key_values, use_cache=True)
        assert difference(rest.logits, whole[:, 12:]) < rounding()
        return whole[0, -1]

    assert difference(last(0.5), last(-0.5)) > 1e-2
    assert_answers_need_no_cache(model, length=16)


def test_a_cache_of_fixed_length_is_masked_beyond_its_tokens(checkpoint_of: Any) -> None:
    model = apply_method(tiny_base(checkpoint_of("llama"), "none"), PREFIX)
    cache = StaticCache(config=model.model.config, max_cache_len=32)
    with torch.no_grad():
        found = model.model(input_ids=TOKENS, past_key_values=cache, use_cache=True).logits
    assert difference(found, logits_of(model.model)) < rounding()


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_padding_on_the_left_changes_nothing(checkpoint_of: Any, attention: str) -> None:
    model = apply_method(tiny_base(checkpoint_of("llama"), "none", attention=attention), PREFIX)
    expected = logits_of(model.model)
    padded = torch.cat((torch.zeros(2, 4, dtype=torch.long), TOKENS), 1)
    mask = torch.cat((torch.zeros(2, 4), torch.ones(2, 12)), 1)
    positions = (mask.cumsum(1) - 1).clamp(min=0).long()
    with torch.no_grad():
        found = model.model(input_ids=padded, attention_mask=mask, position_ids=positions, use_cache=False).logits
    assert difference(found[:, 4:], expected) < rounding()


@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma2"])
def test_a_prefix_of_a_text_is_that_text(checkpoint_of: Any, family: str) -> None:
    """Keys and values as the base has them: what follows gets the logits that it has behind the text itself."""
    base = tiny_base(checkpoint_of(family), quantised(family))
    text = torch.tensor([[7, 8, 9, 7, 8]])
    with torch.no_grad():
        expected = base.model(input_ids=torch.cat((text.expand(2, -1), TOKENS), 1), use_cache=False).logits[:, 5:]
    model = apply_method(base, config.PrefixTuning(tokens=5, init_text="w7 w8 w9"))
    assert difference(logits_of(model.model), expected) < rounding()


def test_a_text_beyond_a_sliding_window_is_refused(checkpoint_of: Any) -> None:
    base = tiny_base(checkpoint_of("gemma3", sliding_window=4, layer_types=["sliding_attention"] * 2))
    with pytest.raises(MethodError, match=r"remembers 3 of the 5 tokens .* set method.tokens=3"):
        apply_method(base, config.PrefixTuning(tokens=5, init_text="w7 w8 w9"))
    assert not any(isinstance(module, PrefixAttention | LaterPositions) for module in base.model.modules())


def test_first_values_depend_on_seed_and_layer_alone(checkpoint_of: Any) -> None:
    folder = checkpoint_of("llama")
    one, same, other = (apply_method(tiny_base(folder), PREFIX, seed).adapter_state()[KEY] for seed in (1, 1, 2))
    assert torch.equal(one, same)
    assert not torch.equal(one, other)
    assert abs(one.std() / SPREAD - 1) < 0.1
    first, second = one.chunk(2, dim=1)
    assert not torch.equal(first, second)


@pytest.mark.parametrize("section", [PREFIX, PROJECTED], ids=["plain", "projected"])
def test_shapes_are_known_without_weights(checkpoint_of: Any, section: Any) -> None:
    """On meta nothing is drawn or read; with an adapter device the parameters are real though the model is not."""
    folder = checkpoint_of("llama")
    real = apply_method(tiny_base(folder), section)
    for device in ("meta", "cpu"):
        base = load_base(config.ModelSection(name=str(folder), compute_dtype="fp32"), torch.device("cpu"))
        base.model.to("meta")
        base.device, base.tokenizer = torch.device(device), None
        model = apply_method(base, section)
        shapes = {name: values.shape for name, values in model.trainable_parameters().items()}
        assert shapes == {name: values.shape for name, values in real.trainable_parameters().items()}
        assert {values.device.type for values in model.trainable_parameters().values()} == {device}
        assert model.adapter_state()[KEY].shape == (P, 2 * 2 * 2 * 16)


def test_it_stands_together_with_lora(checkpoint_of: Any, tmp_path: Path) -> None:
    folder = checkpoint_of("llama")
    both = config.Combined(parts=(config.LoRA(r=2, target_modules=("q_proj", "up_proj")), PREFIX))
    model = apply_method(tiny_base(folder), both)
    stir(model, 0.3)
    expected = logits_of(model.model)
    save_adapter(model, tmp_path / "both")
    assert torch.equal(logits_of(load_adapter(tiny_base(folder), tmp_path / "both").model), expected)
    base = model.remove()
    assert not any("base" in path.split(".") for path, _ in base.model.named_modules())
    model.attach()
    assert torch.equal(logits_of(model.model), expected)


def test_models_in_which_a_prefix_has_no_place_are_refused(checkpoint_of: Any) -> None:
    with pytest.raises(MethodError, match="it has no list of decoder layers"):
        apply_method(nn.Linear(2, 2), PREFIX)
    bloom = BloomForCausalLM(BloomConfig(vocab_size=96, hidden_size=64, n_layer=2, n_head=4))
    with pytest.raises(MethodError, match="neither rotary nor learned positions"):
        apply_method(bloom, PREFIX)
    llama = LlamaForCausalLM(LlamaConfig(**tiny.SIZES))
    for field, why in (("alibi", "ALiBi"), ("num_kv_shared_layers", "read the keys of others")):
        setattr(llama.config, field, 1)
        with pytest.raises(MethodError, match=why):
            apply_method(llama, PREFIX)
        setattr(llama.config, field, 0)
    gemma = Gemma4ForCausalLM(Gemma4TextConfig(**tiny.SIZES, vocab_size_per_layer_input=96))
    with pytest.raises(MethodError, match="heads of several sizes"):
        apply_method(gemma, PREFIX)
    llama.config._attn_implementation = "flash_attention_2"
    with pytest.raises(MethodError, match=r"'flash_attention_2' does not take; set model\.attention=sdpa"):
        apply_method(llama, PREFIX)
    llama.config._attn_implementation, llama.model.layers[1].self_attn = "sdpa", nn.Identity()
    with pytest.raises(MethodError, match="layer 1 has 0 attentions"):
        apply_method(llama, PREFIX)
    base = tiny_base(checkpoint_of("llama"))
    base.model.config.num_key_value_heads = 4  # type: ignore[union-attr]
    model = apply_method(base, PREFIX)
    with pytest.raises(MethodError, match=r"made 4 heads of 16 .* an attention has 2 of 16"):
        logits_of(model.model)


def test_a_trainer_runs_it_behind_the_boundary(checkpoint_of: Any) -> None:
    """Its own checks pass with a prefix, and layer by layer is row by row."""
    folder, rows = checkpoint_of("llama"), random_rows(14)[:4]
    losses = []
    for accumulation in ("layer_major", "micro_batch_major"):
        model = apply_method(tiny_base(folder), PROJECTED)
        training = TrainingSection(
            batch_size=4, micro_batch_size=2, steps=4, learning_rate=0.02, accumulation=accumulation
        )
        losses.append([step.loss for step in Trainer(model, rows, training)])
    assert losses[0] == pytest.approx(losses[1], rel=rounding())
    assert losses[0][-1] < losses[0][0]
