"""Counts without weights: the field's published figures, and equal to what a real model trains and writes."""

from __future__ import annotations

import shutil
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import BertConfig, BertModel, OPTConfig, Qwen2Config, ViTConfig

import qlora
from qlora import recipe as config
from qlora.errors import MethodError, ModelError
from qlora.methods.base import apply_method
from qlora.methods.files import save_adapter
from qlora.model.base import count_parameters
from qlora.model.in_memory import quantise
from qlora.planning.accounting import account, account_of
from qlora.training.optim import make_optimizer, optimizer_tensors
from tests.methods.test_laws import CASES
from tests.tiny import tiny_base, tiny_checkpoint

# GPT-3's shape (Brown et al. 2020, arXiv:2005.14165, table 2.1) in an architecture whose projections stand apart.
GPT3 = OPTConfig(
    num_hidden_layers=96, hidden_size=12288, num_attention_heads=96, ffn_dim=49152, word_embed_proj_dim=12288,
    vocab_size=50257, max_position_embeddings=2048,
)  # fmt: skip
QV = ("q_proj", "v_proj")


@pytest.mark.parametrize(
    ("method", "millions"),
    [
        (config.LoRA(r=1, target_modules=QV), 4.7),
        (config.LoRA(r=8, target_modules=QV), 37.7),
        (config.Bottleneck(form="houlsby", size=1), 7.1),
        (config.Bottleneck(form="houlsby", size=8), 40.1),
        (config.PromptTuning(tokens=256 + 8), 3.2),
    ],
)
def test_lora_papers_table_4(method: Any, millions: float) -> None:
    """Trainable parameters on GPT-3 175B (Hu et al. 2021, arXiv:2106.09685, table 4), to the digit that it prints."""
    found = account(GPT3, method)
    assert round(found.trainable_parameters / 1e6, 1) == millions
    assert found.parameters == pytest.approx(175e9, rel=0.005)


def test_lora_papers_checkpoint() -> None:
    """Section 4.2: with r=4 on queries and values the checkpoint is reduced by roughly 10,000×, from 350 GB to 35 MB."""
    found = account(GPT3, config.LoRA(r=4, target_modules=QV, adapter_dtype="bf16"))
    assert found.adapter_bytes == 2 * found.trainable_parameters == pytest.approx(35e6, rel=0.1)
    assert found.parameters / found.trainable_parameters == pytest.approx(10_000, rel=0.1)
    assert found.optimizer_bytes == 12 * found.trainable_parameters  # moments and masters are fp32 all the same
    assert found.checkpoint_bytes == 14 * found.trainable_parameters
    assert "lora: 18,874,368 trainable parameters (0.0108% of 174,604,283,904)" in str(found)
    assert "36.0 MiB" in str(found)


def test_full_fine_tuning_trains_everything() -> None:
    found = account(GPT3, config.Full())
    assert found.trainable_parameters == found.parameters
    assert found.checkpoint_bytes == 12 * found.parameters  # 2.1 TB


class Allocations(TorchDispatchMode):
    """The most numbers that any tensor outside the meta device had."""

    most = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = func(*args, **(kwargs or {}))
        for tensor in made if isinstance(made, tuple | list) else [made]:
            if isinstance(tensor, torch.Tensor) and tensor.device.type != "meta":
                self.most = max(self.most, tensor.numel())
        return made


@pytest.mark.parametrize("name", CASES)
def test_nothing_is_allocated_or_drawn(name: str) -> None:
    state = torch.get_rng_state()
    begin = time.perf_counter()
    with Allocations() as seen:
        sizes = {"hidden_size": 8192, "intermediate_size": 28672, "num_hidden_layers": 4, "vocab_size": 128256}
        found = account(qwen(**sizes), CASES[name].section, CASES[name].quantization)
    assert found.trainable_parameters > 0
    assert seen.most <= 8192  # rotary frequencies and such
    assert torch.equal(torch.get_rng_state(), state)
    assert time.perf_counter() - begin < 10


def qwen(**sizes: Any) -> Any:
    return Qwen2Config(num_attention_heads=64, num_key_value_heads=8, tie_word_embeddings=False, **sizes)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_checkpoint(tmp_path_factory.mktemp("base"))


@pytest.mark.parametrize("name", CASES)
@pytest.mark.sampled
def test_a_config_json_tells_what_a_real_model_has(checkpoint: Path, tmp_path: Path, name: str) -> None:
    """Trainable numbers, the adapter's file, the method's file and the moments; the tokenizer is not there either."""
    case = CASES[name]
    bare = tmp_path / "bare"
    bare.mkdir()
    shutil.copy(checkpoint / "config.json", bare)
    found = account(bare, case.section, case.quantization)
    model = apply_method(tiny_base(checkpoint, case.quantization), case.section)
    parameters = model.trainable_parameters()
    optimizer = make_optimizer(parameters, config.TrainingSection())
    for values in parameters.values():
        values.grad = torch.ones_like(values)
    optimizer.step()
    model.after_step(1, 10)  # AdaLoRA's averages begin here
    assert found.trainable_parameters == model.count_trainable()
    assert found == account_of(model, found.parameters, "adamw")

    save_adapter(model, tmp_path / "adapter")
    written = (tmp_path / "adapter" / "adapter_model.safetensors").stat().st_size
    assert 0 < written - found.adapter_bytes < 1000 + 200 * len(model.adapter_state())  # the header
    beside = tmp_path / "adapter" / "method.safetensors"
    assert beside.exists() == (found.method_bytes > 0)
    moments = {k: v for k, v in optimizer_tensors(optimizer, parameters).items() if not k.endswith("/step")}
    assert found.optimizer_bytes == sum(values.nbytes for values in moments.values())


def test_eight_bit_moments_are_smaller() -> None:
    section = config.LoRA(r=4, target_modules=QV)
    whole, small = (
        account(GPT3, section, optimizer=optimizer).optimizer_bytes for optimizer in ("adamw", "paged_adamw_8bit")
    )
    assert small == pytest.approx(whole / 4, rel=0.02)


def test_other_kinds_of_models_are_counted() -> None:
    lora = config.LoRA(r=4)
    bert = BertConfig(architectures=["BertForSequenceClassification"], num_labels=3)
    assert account(bert, lora).trainable_parameters == 12 * 4 * (4 * 2 * 768 + 2 * (768 + 3072))
    head = config.Combined(parts=(lora, config.Modules(modules=("classifier",))))
    assert account(bert, head).trainable["modules"] == 3 * 768 + 3
    vision = ViTConfig(architectures=["ViTForImageClassification"])
    assert account(vision, lora).trainable_parameters == account(bert, lora).trainable_parameters
    with pytest.raises(ModelError, match="'BertConfig' is a BertForNothing"):
        account(BertConfig(architectures=["BertForNothing"]), lora)
    with pytest.raises(ModelError, match="Found a dict; expected a model folder"):
        account({"model_type": "bert"}, lora)
    with pytest.raises(ModelError, match="has no config"):
        account(Path(__file__).parent, lora)


def test_a_module_is_counted_and_stays_as_it_was() -> None:
    module = BertModel(BertConfig(hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=64))
    before = {name: id(part) for name, part in module.named_modules()}
    found = qlora.account(module, config.LoRA(r=2, target_modules=("query",)))
    assert found.trainable == {"lora": 2 * 2 * 64}
    assert found.parameters == count_parameters(module) == sum(values.numel() for values in module.parameters())
    assert {name: id(part) for name, part in module.named_modules()} == before
    assert not any(values.is_meta for values in module.parameters())
    assert all(values.requires_grad for values in module.parameters())
    assert account(quantise(module), config.LoRA(r=2, target_modules=("query",))) == found


def test_each_method_of_several_is_told() -> None:
    module = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 4))
    section = config.Combined(parts=(config.LoRA(r=2), config.Modules(modules=("2",))))
    found = account(module, section)
    assert found.trainable == {"lora": 32, "modules": 36}
    assert "lora 32 + modules 36: 68 trainable parameters (63% of 108)" in str(found)


def test_a_method_that_does_not_fit_is_refused() -> None:
    with pytest.raises(MethodError, match="names 'query'"):
        account(GPT3, config.LoRA(target_modules=("query",)))
    assert isinstance(qlora.account(GPT3, config.LoRA(r=1, target_modules=QV)), qlora.Account)
