"""The laws of full fine-tuning: plain autograd's gradients, a plain loop's weights, an exact export, no false base."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import AutoModelForCausalLM

from qlora import recipe as config
from qlora.data.packing import Row
from qlora.errors import MethodError
from qlora.export.merged import merge
from qlora.methods.base import METHODS, AdaptedModel, apply_method
from qlora.methods.files import save_adapter
from qlora.methods.loading import load_adapter
from qlora.model.base import Base
from qlora.model.loss import batch_loss
from qlora.model.skeleton import skeleton_base
from qlora.planning.memory import estimate
from qlora.recipe import ModelSection, TrainingSection
from qlora.residence.layers import wrap_layers
from qlora.residence.load import load_base
from qlora.training.loop import Trainer
from qlora.training.optim import optimizer_tensors
from tests.rounding import GRADIENT, rounding
from tests.steps import peak_of
from tests.tiny import FAMILIES, TOKENS, difference, logits_of, stir, tiny_base, tiny_checkpoint

CPU = torch.device("cpu")
BATCH = {
    "input_ids": TOKENS.repeat(2, 1),
    "position_ids": torch.arange(12).expand(4, 12),
    "labels": torch.cat([TOKENS, (TOKENS * 5 + 1) % 96]),
}


def rows(count: int = 4, length: int = 12, vocabulary: int = 96) -> list[Row]:
    made = []
    for number in range(count):
        ids = numpy.random.default_rng(number).integers(3, vocabulary, length).astype(numpy.int32)
        labels = numpy.append([-100], ids[1:]).astype(numpy.int32)  # nothing predicts a first token
        made.append(Row(ids, labels, numpy.arange(length, dtype=numpy.int32), (number,)))
    return made


def full(folder: Path, **options: Any) -> AdaptedModel:
    return apply_method(tiny_base(folder, "none"), config.Full(**options))


def gradients(model: Any) -> dict[str, torch.Tensor]:
    found = {name: values.grad for name, values in model.named_parameters()}
    model.zero_grad(set_to_none=True)
    return found


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("at_once", [None, 1, 2])
def test_gradients_are_plain_autograds(tmp_path: Path, family: str, at_once: int | None) -> None:
    """Of every weight, through the chunked loss and behind the recompute boundary in micro-batches too."""
    folder = tiny_checkpoint(tmp_path, family)
    plain = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    logits = plain(input_ids=BATCH["input_ids"], use_cache=False).logits
    nn.functional.cross_entropy(
        logits[:, :-1].flatten(0, 1), BATCH["labels"][:, 1:].flatten(), reduction="sum"
    ).backward()
    expected = gradients(plain)
    ours = full(folder)
    if at_once is not None:
        wrap_layers(ours.model, at_once)
    batch_loss(ours.model.train(), BATCH, 7)[0].backward()
    assert ours.trainable_parameters().keys() == expected.keys()  # so a tied weight trains once
    worst = max(difference(values.grad, expected[name]) for name, values in ours.trainable_parameters().items())
    print(f"{family}: gradients differ by {worst:.1e}")
    assert worst < rounding(GRADIENT)


def test_steps_are_those_of_a_plain_loop(tmp_path: Path) -> None:
    folder = tiny_checkpoint(tmp_path)
    training = TrainingSection(
        batch_size=4, micro_batch_size=2, steps=3, learning_rate=1e-3, schedule="constant", warmup_fraction=0.0,
        max_grad_norm=None, epsilon=1e-2,  # with 1e-8 Adam takes whole steps where a gradient is nothing but rounding
    )  # fmt: skip
    ours = full(folder)
    trainer = Trainer(ours, rows(), training)
    losses = [step.loss for step in trainer]
    plain = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    matrices = [values for values in plain.parameters() if values.dim() > 1]
    vectors = [values for values in plain.parameters() if values.dim() == 1]
    optimizer = torch.optim.AdamW(
        [{"params": vectors, "weight_decay": 0.0}, {"params": matrices, "weight_decay": training.weight_decay}],
        lr=training.learning_rate, betas=training.betas, eps=training.epsilon,
    )  # fmt: skip
    ids = torch.tensor(numpy.stack([row.ids for row in rows()])).long()
    for loss in losses:
        expected = plain(input_ids=ids, labels=ids, use_cache=False).loss
        assert loss == pytest.approx(expected.item(), rel=rounding())
        expected.backward()
        optimizer.step()
        optimizer.zero_grad()
    for name, values in plain.named_parameters():
        torch.testing.assert_close(ours.trainable_parameters()[name], values, rtol=rounding(), atol=rounding())


@pytest.mark.parametrize("tied", [True, False])
def test_embeddings_and_head_stay_where_they_are_not_wanted(tmp_path: Path, tied: bool) -> None:
    folder = tiny_checkpoint(tmp_path, tie_word_embeddings=tied)
    before = load_file(folder / "model.safetensors")
    model = full(folder, embeddings=False)
    assert not any("embed" in name or "head" in name for name in model.trainable_parameters())
    for _ in Trainer(model, rows(), TrainingSection(steps=2, batch_size=4, learning_rate=1e-2, warmup_fraction=0.0)):
        pass
    for name, values in before.items():
        kept = "embed" in name or "head" in name
        now = model.trainable_parameters().get(name)
        assert (now is None) is kept
        assert now is None or not torch.equal(now, values)
    assert torch.equal(model.model.get_input_embeddings().weight, before["model.embed_tokens.weight"])


@pytest.mark.parametrize("quantization", ["nf4", "int8"])
def test_a_packed_base_is_refused_and_left_as_it_was(tmp_path: Path, quantization: str) -> None:
    base = tiny_base(tiny_checkpoint(tmp_path), quantization)
    with pytest.raises(
        MethodError, match=rf"packed \({quantization}\).*model\.quantization=none, or method\.name=lora"
    ):
        apply_method(base, config.Full())
    assert not any(values.requires_grad for values in base.model.parameters())
    apply_method(base, config.LoRA(r=2))


def test_dtypes_that_cannot_train_are_refused(tmp_path: Path) -> None:
    base = tiny_base(tiny_checkpoint(tmp_path), "none")
    with pytest.raises(MethodError, match=r"adapter_dtype is bf16, but .* computes in, fp32"):
        apply_method(base, config.Full(adapter_dtype="bf16"))
    with pytest.raises(MethodError, match=r"fp16 loses most updates.*model\.compute_dtype to bf16 or fp32"):
        apply_method(nn.Sequential(nn.Linear(4, 4)).half(), config.Full())


def test_the_weights_train_in_the_compute_dtype() -> None:
    for device in ("cpu", "cuda"):
        for dtype in (torch.float32, torch.bfloat16):
            assert METHODS["full"].trained_dtype("auto", torch.device(device), dtype) == dtype


def test_the_base_answers_until_the_first_step(tmp_path: Path) -> None:
    folder = tiny_checkpoint(tmp_path / "base")
    untouched = logits_of(tiny_base(folder, "none").model)
    model = full(folder)
    with model.disabled():
        assert torch.equal(logits_of(model.model), untouched)
    next(Trainer(model, rows(), TrainingSection(steps=2, batch_size=4)))
    with pytest.raises(MethodError, match=r"cannot answer alone any more.*load the base again"), model.disabled():
        pass
    save_adapter(model, tmp_path / "adapter")
    loaded = load_adapter(tiny_base(folder, "none"), tmp_path / "adapter")
    with pytest.raises(MethodError, match="cannot answer alone any more"), loaded.disabled():
        pass
    own_loop = full(folder)  # nobody tells the method of this step
    own_loop.model(input_ids=TOKENS, labels=TOKENS).loss.backward()
    torch.optim.SGD(own_loop.trainable_parameters().values(), lr=0.1).step()
    with pytest.raises(MethodError, match="cannot answer alone any more"), own_loop.disabled():
        pass


def test_removed_it_is_frozen_and_attached_it_trains_again(tmp_path: Path) -> None:
    model = full(tiny_checkpoint(tmp_path))
    stir(model)
    expected = logits_of(model.model)
    base = model.remove()
    assert not any(values.requires_grad for values in base.model.parameters())
    assert torch.equal(logits_of(base.model), expected)
    model.attach()
    assert all(values.requires_grad for values in base.model.parameters())


def different_head(folder: Path) -> None:
    """What a careless export leaves: a config that ties, and two different weights."""
    tensors = load_file(folder / "model.safetensors")
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].flip(0).clone()
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


@pytest.mark.parametrize(
    ("family", "tied", "both"),
    [("llama", False, False), ("llama", True, False), ("llama", True, True), ("gemma2", True, False), ("qwen2", False, False)],
)  # fmt: skip
def test_saved_and_merged_it_is_the_model(tmp_path: Path, family: str, tied: bool, both: bool) -> None:
    folder = tiny_checkpoint(tmp_path / "base", family, tie_word_embeddings=tied)
    if both:
        different_head(folder)
    model = full(folder)
    assert ("lm_head.weight" in model.trainable_parameters()) == (not tied or both)
    stir(model)
    expected = logits_of(model.model)
    save_adapter(model, tmp_path / "adapter")
    stored = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    assert stored.keys() == {f"base_model.model.{name}" for name in model.trainable_parameters()}
    again = load_adapter(tiny_base(folder, "none"), tmp_path / "adapter")
    assert torch.equal(logits_of(again.model), expected)
    result = merge(
        folder, tmp_path / "adapter", tmp_path / "out", quantization="none", compute_dtype="fp32", dtype="fp32"
    )
    assert result.adapted == result.tensors
    written = load_file(tmp_path / "out" / "model.safetensors")
    for name, values in model.trainable_parameters().items():
        assert torch.equal(written[name], values)
    plain, report = AutoModelForCausalLM.from_pretrained(
        tmp_path / "out", dtype=torch.float32, output_loading_info=True
    )
    assert not any(report.values()), report
    assert difference(logits_of(plain.eval()), expected) < rounding()


@pytest.mark.parametrize("optimizer", ["adamw", "adamw_8bit", "paged_adamw", "paged_adamw_8bit"])
@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
@pytest.mark.sampled
def test_it_learns_with_every_optimizer_in_the_compute_dtype(tmp_path: Path, optimizer: str, dtype: str) -> None:
    section = ModelSection(name=str(tiny_checkpoint(tmp_path)), quantization="none", compute_dtype=dtype)
    model = apply_method(load_base(section, CPU), config.Full())
    wanted = {"fp32": torch.float32, "bf16": torch.bfloat16}[dtype]
    assert {values.dtype for values in model.trainable_parameters().values()} == {wanted}
    training = TrainingSection(
        steps=6, batch_size=4, micro_batch_size=2, optimizer=optimizer, learning_rate=3e-3, warmup_fraction=0.0
    )
    losses = [step.loss for step in Trainer(model, rows(), training)]
    assert losses[-1] < losses[0] - 0.3


@pytest.mark.slow
@pytest.mark.parametrize("embeddings", [True, False])
@pytest.mark.parametrize("tied", [True, False])
def test_memory_is_what_was_estimated(tmp_path: Path, embeddings: bool, tied: bool) -> None:
    folder = tiny_checkpoint(
        tmp_path, hidden_size=192, intermediate_size=512, num_hidden_layers=4, vocab_size=3000, head_dim=48, max_position_embeddings=128,
        tie_word_embeddings=tied,
    )  # fmt: skip
    training = TrainingSection(steps=3, batch_size=4, micro_batch_size=2)
    section = ModelSection(name=str(folder), quantization="none", compute_dtype="fp32")
    skeleton = Base(
        skeleton_base(section, torch.device("meta"), torch.float32).model, None, folder, "m", None, "none", False, torch.device("meta"), torch.float32
    )  # fmt: skip
    planned = estimate(apply_method(skeleton, config.Full(embeddings=embeddings)), training, 128, CPU)
    model = full(folder, embeddings=embeddings)
    assert planned == estimate(model, training, 128, CPU)
    parameters = model.trainable_parameters().values()
    weights = sum(values.nbytes for values in model.model.parameters())
    buffers = sum(values.nbytes for values in model.model.buffers())
    assert "quantised_weights" not in planned.device
    frozen, trained = planned.device.get("other_weights", 0), planned.device["adapter"]
    assert frozen + trained == weights + buffers
    assert trained == sum(values.nbytes for values in parameters)
    trainer = Trainer(model, rows(4, 128, 3000), training)
    next(trainer)
    state = sum(
        tensor.nbytes for tensor in optimizer_tensors(trainer.state.optimizer, trainer.state.parameters).values()
    )
    assert planned.device["optimizer"] == pytest.approx(state, rel=0.001)
    measured = peak_of(lambda: next(trainer))
    step = planned.total - frozen - trained - planned.device["optimizer"] - planned.device["runtime"]
    print(f"embeddings={embeddings}, tied={tied}: estimated / measured {step / measured:.3f}")
    assert step == pytest.approx(measured, rel=0.05)


def test_a_batch_norms_averages_are_saved_too(tmp_path: Path) -> None:
    def network() -> nn.Module:
        torch.manual_seed(0)
        return nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(144, 2))

    images = torch.randn(8, 3, 8, 8)
    model = apply_method(network(), config.Full())
    model.model.train()
    optimizer = torch.optim.SGD(model.trainable_parameters().values(), lr=0.1)
    model.model(images).square().mean().backward()
    optimizer.step()
    save_adapter(model, tmp_path)
    again = load_adapter(apply_method(network(), config.Full()), tmp_path)
    assert torch.equal(again.model.eval()(images), model.model.eval()(images))
    assert not torch.equal(again.model[1].running_mean, torch.zeros(4))
