"""The laws of prompt tuning and P-tuning: PEFT's answers and gradients, packed as alone, with and without a cache."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import peft
import pytest
import torch

from qlora import recipe as config
from qlora.data.batches import collate
from qlora.data.examples import Example
from qlora.data.packing import make_rows
from qlora.errors import DataError, MethodError
from qlora.evaluation.generate import answers
from qlora.evaluation.score import score
from qlora.methods.base import AdaptedModel, apply_method
from qlora.methods.files import save_adapter
from qlora.methods.loading import load_adapter
from qlora.methods.prompt import KEY, EncodedPrompt, PromptEmbedding
from qlora.model.loss import batch_loss
from qlora.recipe import TrainingSection
from qlora.residence.layers import unwrap_layers, wrap_layers
from qlora.residence.load import load_base
from qlora.training.loop import Trainer
from tests.methods.against_peft import plain_model
from tests.rounding import GRADIENT, rounding
from tests.tiny import FAMILIES, TOKENS, difference, logits_of, random_rows, stir, tiny_base, tiny_checkpoint

P = 3
PROMPT, ENCODED = config.PromptTuning(tokens=P), config.PTuning(tokens=P, hidden_size=16)
VIRTUAL = torch.arange(-P, 0).expand(2, P)
IDS = torch.cat((VIRTUAL, TOKENS), 1)
LABELS = torch.cat((torch.full_like(VIRTUAL, -100), TOKENS), 1)


def gradients_of(model: AdaptedModel, rows: list[Any], at_once: int | None = None) -> dict[str, torch.Tensor]:
    """Of all rows together, behind the recompute boundary with ``at_once`` rows at a time, or without it."""
    if at_once is not None:
        wrap_layers(model.model, at_once)
    model.model.train()
    loss, _ = batch_loss(model.model, collate(rows, 0, model.virtual_tokens), 16)
    loss.backward()
    model.model.eval()
    unwrap_layers(model.model)
    found = {}
    for name, values in model.trainable_parameters().items():
        assert values.grad is not None, name
        found[name], values.grad = values.grad, None
    return found


def assert_packed_is_alone(model: AdaptedModel) -> None:
    """Each example's logits, in a packed row and in a row of its own."""
    alone = random_rows(9, packing=False, seed=3)
    packed = make_rows([Example(row.ids, row.labels) for row in alone], 30, True, model.virtual_tokens)
    assert len(packed) < len(alone) - 3
    for row in packed:
        batch = collate([row], 0, model.virtual_tokens)
        assert batch["input_ids"].shape[1] <= 30
        with torch.no_grad():
            together = model.model(
                input_ids=batch["input_ids"], position_ids=batch["position_ids"], use_cache=False
            ).logits[0]
            begin = 0
            for index in row.examples:
                ids = collate([alone[index]], 0, model.virtual_tokens)["input_ids"]
                one = model.model(input_ids=ids, use_cache=False).logits[0]
                end = begin + ids.shape[1]
                assert difference(together[begin:end], one) < rounding()
                begin = end
    assert score(model, packed).loss == pytest.approx(score(model, alone).loss, rel=rounding())


def assert_answers_need_no_cache(model: AdaptedModel, length: int = 10) -> None:
    """A batch of prompts of different length, with a cache, against greedy by hand without one."""
    prompts = [[5], [9, 8, 7, 6, 5, 4, 3, 10, 11], [40, 41, 42]]
    expected = []
    for prompt in prompts:
        ids = [*range(-model.virtual_tokens, 0), *prompt]
        for _ in range(length):
            with torch.no_grad():
                logits = model.model(input_ids=torch.tensor([ids]), use_cache=False).logits
            ids.append(int(logits[0, -1].argmax()))
        new = ids[model.virtual_tokens + len(prompt) :]
        end = new.index(2) if 2 in new else length
        expected.append(model.tokenizer.decode(new[:end], skip_special_tokens=True).strip())
    assert len(set(expected)) == 3
    assert answers(model, prompts, length) == expected


def copy_encoder(theirs: Any, layer: EncodedPrompt) -> dict[str, torch.Tensor]:
    """PEFT's network takes our values; its parameters by our names."""
    pairs = {"encoder.inputs": theirs.embedding.weight}
    for ours, index in enumerate((0, 2, 4)):
        pairs[f"encoder.layers.{ours}.weight"] = theirs.mlp_head[index].weight
        pairs[f"encoder.layers.{ours}.bias"] = theirs.mlp_head[index].bias
    for name, values in layer.own_parameters().items():
        pairs[name].data.copy_(values.data)
    assert pairs.keys() == layer.own_parameters().keys()
    return pairs


@pytest.mark.parametrize("quantization", ["nf4", "none"])
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("section", [PROMPT, ENCODED], ids=lambda section: section.name)
def test_logits_and_gradients_are_those_of_peft(tmp_path: Path, family: str, quantization: str, section: Any) -> None:
    """Gemma scales its embeddings, and PEFT's virtual tokens are not scaled: neither are ours."""
    folder = tiny_checkpoint(tmp_path, family)
    ours = apply_method(tiny_base(folder, quantization), section)
    stir(ours, 0.3)
    shared: dict[str, Any] = {"num_virtual_tokens": P, "task_type": "CAUSAL_LM"}
    asked = (
        peft.PromptTuningConfig(**shared)
        if section is PROMPT
        else peft.PromptEncoderConfig(**shared, encoder_hidden_size=16)
    )
    theirs = peft.get_peft_model(plain_model(folder, quantization), asked).train()
    encoder, layer = theirs.prompt_encoder.default, ours.methods[0].layer  # type: ignore[attr-defined]
    if section is PROMPT:
        encoder.embedding.weight.data.copy_(layer.prompt.data)
        pairs = {"prompt": encoder.embedding.weight}
    else:
        pairs = copy_encoder(encoder, layer)
    found = ours.model(input_ids=IDS, labels=LABELS, use_cache=False)
    expected = theirs(input_ids=TOKENS, labels=TOKENS, use_cache=False)
    found.loss.backward()
    expected.loss.backward()
    with ours.disabled():
        assert difference(logits_of(ours.model), expected.logits[:, P:]) > 1e-2  # the prompt matters
    assert difference(found.logits, expected.logits) < rounding()
    worst = max(difference(values.grad, pairs[name].grad) for name, values in layer.own_parameters().items())
    print(f"{family} {quantization}: logits {difference(found.logits, expected.logits):.1e}, gradients {worst:.1e}")
    assert worst < rounding(GRADIENT)


@pytest.mark.parametrize("section", [PROMPT, ENCODED], ids=lambda section: section.name)
def test_peft_reads_ours_and_we_read_pefts(tmp_path: Path, section: Any) -> None:
    folder = tiny_checkpoint(tmp_path / "base")
    ours = apply_method(tiny_base(folder, "none"), section)
    stir(ours, 0.3)
    with torch.no_grad():
        expected = ours.model(input_ids=IDS, use_cache=False).logits
    save_adapter(ours, tmp_path / "ours")
    theirs = peft.PeftModel.from_pretrained(plain_model(folder, "none"), tmp_path / "ours")
    assert set(peft.get_peft_model_state_dict(theirs)) == set(ours.adapter_state()) == {KEY}
    with torch.no_grad():
        assert difference(theirs(input_ids=TOKENS, use_cache=False).logits, expected) < rounding()
    theirs.save_pretrained(tmp_path / "theirs")
    back = load_adapter(tiny_base(folder, "none"), tmp_path / "theirs")
    assert back.section.model_dump(exclude={"init"}) == section.model_dump(exclude={"init"})
    with torch.no_grad():
        assert difference(back.model(input_ids=IDS, use_cache=False).logits, expected) < rounding()


def test_what_peft_asks_for_and_we_have_not_is_refused(tmp_path: Path) -> None:
    folder = tiny_checkpoint(tmp_path / "base")
    asked = peft.PromptTuningConfig(num_virtual_tokens=P, task_type="CAUSAL_LM", num_transformer_submodules=2)
    peft.get_peft_model(plain_model(folder, "none"), asked).save_pretrained(tmp_path / "theirs")
    with pytest.raises(MethodError, match="num_transformer_submodules=2"):
        load_adapter(tiny_base(folder), tmp_path / "theirs")


def test_an_lstm_prompt_is_read_since_the_prompt_alone_is_in_the_file(tmp_path: Path) -> None:
    folder = tiny_checkpoint(tmp_path / "base")
    asked = peft.PromptEncoderConfig(
        num_virtual_tokens=P,
        task_type="CAUSAL_LM",
        encoder_hidden_size=8,
        encoder_reparameterization_type="LSTM",
        encoder_num_layers=1,
    )
    theirs = peft.get_peft_model(plain_model(folder, "none"), asked).eval()
    theirs.save_pretrained(tmp_path / "theirs")
    ours = load_adapter(tiny_base(folder, "none"), tmp_path / "theirs")
    with torch.no_grad():
        expected = theirs(input_ids=TOKENS, use_cache=False).logits
        assert difference(ours.model(input_ids=IDS, use_cache=False).logits, expected) < rounding()


@pytest.mark.parametrize("family", ["llama", "gemma2"])
def test_first_values(tmp_path: Path, family: str) -> None:
    """``vocabulary``: rows of the embedding as the model sees them. ``text``: its tokens, repeated or cut."""
    folder = tiny_checkpoint(tmp_path, family)
    base = tiny_base(folder)
    with torch.no_grad():
        every = base.model.get_input_embeddings()(torch.arange(96))  # type: ignore[operator]
    drawn = apply_method(base, config.PromptTuning(tokens=40), seed=1)
    (prompt,) = drawn.trainable_parameters().values()
    places = torch.cdist(prompt, every).argmin(1)
    assert torch.equal(prompt, every[places])
    assert len(set(places.tolist())) > 20
    other = apply_method(tiny_base(folder), config.PromptTuning(tokens=40), seed=2)
    assert not torch.equal(prompt, next(iter(other.trainable_parameters().values())))
    for text, tokens, expected in (("w7 w8 w9", 5, [7, 8, 9, 7, 8]), ("w7 w8 w9", 2, [7, 8])):
        section = config.PromptTuning(tokens=tokens, init="text", init_text=text)
        (prompt,) = apply_method(tiny_base(folder), section).trainable_parameters().values()
        assert torch.equal(prompt, every[expected])
    random = config.PromptTuning(tokens=40, init="random")
    (prompt,) = apply_method(tiny_base(folder), random).trainable_parameters().values()
    assert abs(prompt.std() - 1) < 0.05


def test_a_text_without_tokens_or_a_base_without_a_tokenizer_is_refused(tmp_path: Path) -> None:
    folder = tiny_checkpoint(tmp_path)
    with pytest.raises(MethodError, match=r"init_text ' ' has no token"):
        apply_method(tiny_base(folder), config.PromptTuning(init="text", init_text=" "))
    base = tiny_base(folder)
    base.tokenizer = None
    with pytest.raises(MethodError, match="needs a tokenizer"):
        apply_method(base, config.PromptTuning(init="text", init_text="w1"))
    assert not any(isinstance(module, PromptEmbedding) for module in base.model.modules())


def test_models_in_which_a_prompt_has_no_place_are_refused(tmp_path: Path) -> None:
    with pytest.raises(MethodError, match="Linear has no input embedding"):
        apply_method(torch.nn.Linear(2, 2), PROMPT)
    base = tiny_base(tiny_checkpoint(tmp_path))
    base.model.config.hidden_size_per_layer_input = 8  # type: ignore[union-attr]
    with pytest.raises(MethodError, match="looks its token ids up again"):
        apply_method(base, PROMPT)


@pytest.mark.parametrize("family", FAMILIES)
def test_packed_is_alone_and_answers_need_no_cache(tmp_path: Path, family: str) -> None:
    model = apply_method(tiny_base(tiny_checkpoint(tmp_path, family)), PROMPT)
    stir(model, 1.0)
    assert_packed_is_alone(model)
    assert_answers_need_no_cache(model)
    with model.disabled():
        assert model.virtual_tokens == model.first_position == 0
        assert_answers_need_no_cache(model)


def test_the_network_goes_on_where_it_was_and_else_the_prompt_trains(tmp_path: Path) -> None:
    """A checkpoint brings the network back; an adapter alone is a plain prompt, and stays one in its own checkpoints."""
    folder = tiny_checkpoint(tmp_path / "base")
    model = apply_method(tiny_base(folder), ENCODED)
    stir(model, 0.3)
    names = list(model.trainable_parameters())
    save_adapter(model, tmp_path / "whole")
    again = load_adapter(tiny_base(folder), tmp_path / "whole")
    assert list(again.trainable_parameters()) == names == [f"model.embed_tokens.encoder.{name}" for name in (
        "inputs", "layers.0.weight", "layers.0.bias", "layers.1.weight", "layers.1.bias", "layers.2.weight", "layers.2.bias"
    )]  # fmt: skip
    for name, values in again.trainable_parameters().items():
        assert torch.equal(values, model.trainable_parameters()[name])

    (tmp_path / "whole" / "method.safetensors").unlink()
    plain = load_adapter(tiny_base(folder), tmp_path / "whole")
    assert list(plain.trainable_parameters()) == ["model.embed_tokens.prompt"]
    with torch.no_grad():
        logits = [one.model(input_ids=IDS, use_cache=False).logits for one in (model, plain)]
    assert torch.equal(*logits)
    next(Trainer(plain, random_rows(6), TrainingSection(batch_size=4, learning_rate=0.1)))
    with torch.no_grad():
        assert not torch.equal(plain.model(input_ids=IDS, use_cache=False).logits, logits[1])
    save_adapter(plain, tmp_path / "plain")
    last = load_adapter(tiny_base(folder), tmp_path / "plain")
    assert list(last.trainable_parameters()) == ["model.embed_tokens.prompt"]
    assert torch.equal(last.adapter_state()[KEY], plain.adapter_state()[KEY])


@pytest.mark.parametrize("section", [PROMPT, ENCODED], ids=lambda section: section.name)
def test_shapes_are_known_without_weights(tmp_path: Path, section: Any) -> None:
    """On meta nothing is drawn or read; with an adapter device the parameters are real though the model is not."""
    folder = tiny_checkpoint(tmp_path)
    real = apply_method(tiny_base(folder), section)
    for device in ("meta", "cpu"):
        base = load_base(config.ModelSection(name=str(folder), compute_dtype="fp32"), torch.device("cpu"))
        base.model.to("meta")
        base.device, base.tokenizer = torch.device(device), None
        model = apply_method(base, section)
        shapes = {name: values.shape for name, values in model.trainable_parameters().items()}
        assert shapes == {name: values.shape for name, values in real.trainable_parameters().items()}
        assert {values.device.type for values in model.trainable_parameters().values()} == {device}
        assert model.adapter_state()[KEY].shape == (P, 64)


def test_a_trainer_counts_the_virtual_tokens_among_the_positions(tmp_path: Path) -> None:
    folder = tiny_checkpoint(tmp_path)
    (row, *_) = random_rows(1, packing=False, longest=2)
    long = type(row)(*(part.repeat(31) for part in (row.ids, row.labels)), torch.arange(62).int().numpy(), (0,))
    training = TrainingSection(batch_size=1, steps=1)
    Trainer(apply_method(tiny_base(folder), config.PromptTuning(tokens=2)), [long], training)
    with pytest.raises(DataError, match=r"62 tokens behind the method's 3 virtual tokens.*data.max_length=64"):
        Trainer(apply_method(tiny_base(folder), PROMPT), [long], training)
    with pytest.raises(DataError, match=r"62 tokens behind the method's 3 virtual tokens.*data.max_length=61"):
        Trainer(apply_method(tiny_base(folder), config.PrefixTuning(tokens=3)), [long], training)
