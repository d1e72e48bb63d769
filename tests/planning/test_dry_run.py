"""The dry run: its few layers against all of them, on fake tensors and on true ones, over families and real shapes."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.attention.varlen import varlen_attn
from transformers import (
    AutoModelForCausalLM,
    Gemma2Config,
    Gemma3nTextConfig,
    Gemma3TextConfig,
    Gemma4TextConfig,
    LlamaConfig,
    MistralConfig,
    PretrainedConfig,
    Qwen2Config,
)

from qlora.machine.disk import bytes_text
from qlora.methods.base import AdaptedModel, apply_method
from qlora.model import attention
from qlora.model.anatomy import layers as decoder_layers
from qlora.model.attention import PackedMask, keep_apart
from qlora.model.base import Base
from qlora.model.config import Scheme
from qlora.model.in_memory import as_base, quantise
from qlora.model.kernels import fuse, fused, glu, rms_norm, rotary
from qlora.model.loss import head_of, hidden_states, summed_loss
from qlora.model.skeleton import empty_linears, empty_model
from qlora.planning.dry_run import Ledger, Shape, dry_run
from qlora.planning.few_layers import shortened
from qlora.planning.memory import estimate, shape_of
from qlora.recipe import LoRA, MemorySection, ModelSection, Modules, PTuning, TrainingSection
from qlora.residence.layers import wrap_layers
from qlora.training.loop import Trainer
from tests.marks import slow
from tests.planning.test_memory import NEAR, compare, rows_of

SMALL: dict[str, Any] = {
    "hidden_size": 128,
    "intermediate_size": 384,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
WINDOW = {"head_dim": 32, "sliding_window": 64}
BY_LAYER: dict[str, Any] = {
    "hidden_size_per_layer_input": 64,
    "vocab_size_per_layer_input": 1000,
    "layer_types": ["sliding_attention", "full_attention"] * 3,
}
FAMILIES: dict[str, Callable[..., PretrainedConfig]] = {
    "llama": lambda **sizes: LlamaConfig(**SMALL, **sizes),
    "qwen2": lambda **sizes: Qwen2Config(**SMALL, **sizes),
    "mistral": lambda **sizes: MistralConfig(**SMALL, sliding_window=64, **sizes),
    "gemma2": lambda **sizes: Gemma2Config(**SMALL, **WINDOW, **sizes),
    "gemma3n": lambda **sizes: Gemma3nTextConfig(**SMALL | {"intermediate_size": [384] * 6}, **WINDOW, **BY_LAYER, activation_sparsity_pattern=[0.0] * 6, laurel_rank=16, num_kv_shared_layers=2, **sizes),
    "gemma4": lambda **sizes: Gemma4TextConfig(**SMALL, **WINDOW, **BY_LAYER, global_head_dim=64, **sizes),
    "gemma4, shared keys": lambda **sizes: Gemma4TextConfig(**SMALL, **WINDOW, **BY_LAYER, global_head_dim=64, num_kv_shared_layers=2, **sizes),
    "gemma3": lambda **sizes: Gemma3TextConfig(**SMALL, **WINDOW, layer_types=["sliding_attention"] * 3 + ["full_attention"] * 3, **sizes),
}  # fmt: skip
WAYS: dict[str, tuple[bool, dict[str, Any]]] = {
    "layer-major, packed": (True, {"batch_size": 3, "micro_batch_size": 1}),
    "micro-batches": (False, {"batch_size": 3, "micro_batch_size": 1, "accumulation": "micro_batch_major"}),
    "no checkpointing": (False, {"batch_size": 2, "micro_batch_size": 2, "gradient_checkpointing": False}),
}


def small(family: str, layers: int = 6, method: Any = None) -> AdaptedModel:
    torch.manual_seed(0)
    config = FAMILIES[family](num_hidden_layers=layers, vocab_size=1000)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval().requires_grad_(False)
    return apply_method(as_base(quantise(model)), method or LoRA(r=8))


@pytest.mark.parametrize(
    ("family", "way"),
    [
        ("qwen2", "layer-major, packed"),
        slow("mistral", "micro-batches"),
        slow("gemma2", "layer-major, packed"),
        ("gemma3", "no checkpointing"),
        slow("gemma3n", "no checkpointing"),
        slow("gemma4", "layer-major, packed"),
        slow("gemma4, shared keys", "no checkpointing"),
    ],
)
def test_every_family_takes_what_was_estimated(family: str, way: str) -> None:
    """With windows shorter than the rows, layers of two kinds in turn, norms before and behind."""
    packed, settings = WAYS[way]
    compare(f"{family}, {way}", small(family), 160, packed, **settings)


@pytest.mark.parametrize(("family", "length"), [slow("qwen2", 160), slow("mistral", 160), ("gemma3", 96)])
def test_packed_rows_that_are_kept_apart_take_what_was_estimated(family: str, length: int) -> None:
    """With windows shorter than an example, and longer."""
    model = small(family)
    keep_apart(model.model, torch.float32, 0)
    compare(f"{family}, kept apart", model, length, True, batch_size=3, micro_batch_size=1)


class Zeros:
    """Stands in for a kernel: writes zeros into its outputs, and takes no memory, as the kernel does not."""

    def __init__(self, *outputs: int) -> None:
        self.outputs = outputs

    def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., None]:
        return lambda *args, **sizes: [args[place].zero_() for place in self.outputs] and None


@pytest.mark.parametrize("way", ["micro-batches", *(slow(way) for way in WAYS if way != "micro-batches")])
def test_fused_operators_take_what_was_estimated(way: str, monkeypatch: pytest.MonkeyPatch) -> None:
    kernels = {rms_norm: {"_forward": (2, 3), "_backward": (4, 5)}, rotary: {"_rotate": (2, 3)}, glu: {"_forward": (2,), "_backward": ()}}  # fmt: skip
    for module, outputs in kernels.items():
        monkeypatch.setattr(module, "taken", lambda *tensors: True)
        for name, places in outputs.items():
            monkeypatch.setattr(module, name, Zeros(*places))
    packed, settings = WAYS[way]
    model = small("qwen2", 4)
    fuse(model.model, torch.float32, 9.0)
    compare(f"fused, {way}", model, 160, packed, **settings)


@pytest.mark.parametrize(
    ("capability", "dtype"), [slow(0, torch.float32), slow(7.5, torch.float16), (9.0, torch.bfloat16)]
)
def test_a_step_of_packed_rows_makes_no_mask(
    capability: float, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """16 rows of 8,192 tokens: 1 GiB of a bool a pair. On fake tensors, of which nothing can be read: nor are lengths."""
    adapted, training = large("7B", 3), TrainingSection(batch_size=16, micro_batch_size=1)
    device = torch.device("cuda" if capability else "cpu")

    def step(packed: bool) -> int:
        return estimate(adapted, training, 8192, device, packed).step

    plain, masked = step(False), step(True)
    keep_apart(adapted.model, dtype, capability)
    calls = []
    monkeypatch.setattr(
        attention, "varlen_attn", lambda *args, **more: calls.append(len(args)) or varlen_attn(*args, **more)
    )
    apart = dry_run(adapted, shape_of(training, 8192, True, MemorySection(), 3), device.type)
    more = max(moment.held + moment.more for moment in apart.moments()) - plain
    print(f"masked {bytes_text(masked - plain)} more than unpacked, apart {bytes_text(more)}")
    assert bool(calls) == (capability >= 8)
    assert masked - plain >= 2**30
    # on a CPU the outputs of the examples beside the whole; nothing grows with pairs of tokens
    assert abs(more) < 8 * 8192 * 4096


@pytest.mark.parametrize("recompute", ["all", "none"])
def test_a_plan_sees_what_fused_operators_keep(recompute: str) -> None:
    """A layer's backward has fewer tensors at once; where its activations wait, the silu, the norms' fp32 copies and their
    products are gone: 2 · 11,008 + 4 · 4,096 and more numbers a token."""
    plain, ours = large("7B", 3), large("7B", 3)
    fuse(ours.model, torch.bfloat16, 9.0)
    assert fused(ours.model) == {"rms_norm": 7, "rotary": 3, "glu_silu": 3}
    training = TrainingSection(batch_size=1, recompute=recompute)
    steps = [estimate(one, training, 2048, torch.device("cuda"), False).step for one in (plain, ours)]
    print(recompute, [bytes_text(step) for step in steps])
    kept = 3 if recompute == "none" else 1
    assert steps[0] - steps[1] >= kept * 2 * 2048 * 11008


def large(kind: str, layers: int) -> AdaptedModel:
    """A skeleton with the widths of a known model."""
    widths = {
        "7B": {"hidden_size": 4096, "intermediate_size": 11008, "num_attention_heads": 32, "vocab_size": 32000},
        "70B": {"hidden_size": 8192, "intermediate_size": 28672, "num_attention_heads": 64, "num_key_value_heads": 8,
                "vocab_size": 128256},
    }[kind]  # fmt: skip
    config = LlamaConfig(num_hidden_layers=layers, max_position_embeddings=131072, **widths)
    model: Any = empty_model(config, ModelSection(name=kind), torch.bfloat16)
    empty_linears(model, Scheme("nf4", True, False), torch.bfloat16, set())
    model.tie_weights()
    base = Base(
        model.requires_grad_(False), None, Path(), kind, None, "nf4", True, torch.device("meta"), torch.bfloat16
    )
    return apply_method(base, LoRA(r=16, adapter_dtype="bf16"))


def true_step(adapted: AdaptedModel, training: TrainingSection, length: int, tile: int | None) -> int:
    """The peak of a whole step with all layers, all micro-batches, all tiles and all chunks of the loss, on fake tensors."""
    together = training.layer_major
    rows = training.batch_size if together else training.micro_batch_size
    with FakeTensorMode(allow_non_fake_inputs=True):
        model: Any = shortened(adapted, packed=False, more=len(decoder_layers(adapted.model)))[0].model
        assert len(decoder_layers(model)) == len(decoder_layers(adapted.model))
        if training.recompute != "none":
            wrap_layers(model, training.micro_batch_size, mlp_tile=tile)
        model.train()
        ledger = Ledger(model, "cuda")
        with ledger:
            for _ in range(training.batch_size // rows):
                ids = torch.zeros(rows, length, dtype=torch.long)
                positions = torch.arange(length).repeat(rows, 1)
                batch = {"input_ids": ids, "position_ids": positions, "mask": PackedMask([[0]] * rows, length)}
                hidden = hidden_states(model, batch).flatten(0, 1)
                places = torch.arange(len(hidden))
                loss = summed_loss(hidden, head_of(model), ids.flatten(), places, training.loss_chunk)
                del hidden, places
                loss.backward()
                del loss, batch, ids
        return ledger.peak


@pytest.mark.parametrize(
    ("kind", "layers", "length", "tile", "settings"),
    [
        slow("7B", 5, 2048, None, {"batch_size": 3, "micro_batch_size": 1}),
        ("7B", 4, 1024, None, {"batch_size": 2, "micro_batch_size": 1, "gradient_checkpointing": False}),
        slow("70B", 4, 8192, 4096, {"batch_size": 1, "micro_batch_size": 1, "loss_chunk": 4096}),
        slow("70B", 4, 512, None, {"batch_size": 3, "micro_batch_size": 1, "accumulation": "micro_batch_major"}),
    ],
)
def test_large_shapes_take_what_was_estimated(
    kind: str, layers: int, length: int, tile: int | None, settings: dict[str, Any]
) -> None:
    """The estimate ran three layers, two micro-batches, two tiles and two chunks."""
    adapted, training = large(kind, layers), TrainingSection(**settings)
    planned = estimate(adapted, training, length, torch.device("cuda"), memory=MemorySection(mlp_tile=tile))
    found = true_step(adapted, training, length, tile)
    print(f"{kind}: planned {bytes_text(planned.step)}, true {bytes_text(found)}, {planned.step / found - 1:+.2%}")
    assert abs(planned.step / found - 1) < NEAR


def test_few_layers_stand_for_all_of_their_kind() -> None:
    small("llama", 1)  # bitsandbytes makes its table of 8 bits once, and not of fake tensors
    with FakeTensorMode(allow_non_fake_inputs=True):
        assert shortened(large("70B", 12), False)[1] == [0, *[1] * 10, 2]
        # sliding and full attention in turn, with something below that trains or without
        assert shortened(small("gemma2", 8), False)[1] == [0, 1, 2, 1, 2, 1, 2, 3]
        assert shortened(small("llama", 7, Modules(modules=("layers.2.mlp",))), False)[1] == [0, 1, 2, 3, 3, 3, 4]


def test_a_list_of_the_same_length_elsewhere_does_not_mislead() -> None:
    """P-tuning's network has three layers of its own, as many as would be kept."""
    model = small("llama", 6, PTuning(tokens=3, hidden_size=16))
    compare("p_tuning", model, 64, batch_size=2, micro_batch_size=2)


def test_the_model_stays_as_it_is() -> None:
    model = small("gemma2")
    before = {name: (id(values), values.sum().item()) for name, values in model.model.named_parameters()}
    config = model.model.config.to_dict()  # type: ignore[union-attr, operator]
    dry_run(model, Shape(2, 1, 32, 1, 8, (), False), "cpu")
    assert {name: (id(values), values.sum().item()) for name, values in model.model.named_parameters()} == before
    assert model.model.config.to_dict() == config  # type: ignore[union-attr, operator]
    assert all(values.grad is None for values in model.model.parameters())
    assert math.isfinite(next(Trainer(model, rows_of(model, 1, 16), TrainingSection(steps=1, batch_size=1))).loss)


def test_what_lives_is_counted_and_what_dies_is_not() -> None:
    with FakeTensorMode():
        linear = nn.Linear(64, 64, bias=False)
        ledger = Ledger(linear, "cpu")
        with ledger:
            x = torch.empty(10, 64)
            for _ in range(5):
                y = linear(x)
            assert y.view(-1).shape == (640,)
            assert ledger.live == 2 * 10 * 64 * 4  # x and the last y; neither the weight nor a view
            assert ledger.take_peak() == 3 * 10 * 64 * 4
            y.sum().backward()
            assert ledger.gradients() == 64 * 64 * 4


@pytest.mark.parametrize("dtype", [torch.bool, torch.uint8])
def test_what_a_mask_chooses_is_counted_as_if_it_chose_all(dtype: torch.dtype) -> None:
    """Forward and backward: an operator whose answer is as large as its mask has places has no shape in a dry run."""
    with FakeTensorMode():
        x, mask = torch.rand(6, 5, requires_grad=True), torch.ones(6, dtype=dtype)
        with Ledger(nn.Linear(1, 1), "cpu"):
            chosen, places = x[mask], torch.nonzero(mask)
            whole = torch.zeros(6, 5)
            whole[mask] = chosen * 2
            whole.sum().backward()  # type: ignore[no-untyped-call]
        assert (chosen.shape, places.shape) == ((6, 5), (6, 1))
        assert x.grad is not None


def test_a_gpu_is_not_counted_as_a_cpu() -> None:
    """Its allocator rounds up, and its attention takes more in backward; a CPU makes numbers of dropout's mask."""
    found = {}
    with FakeTensorMode():
        x = torch.empty(100, 101, dtype=torch.bfloat16)
        for device in ("cpu", "cuda"):
            ledger = Ledger(nn.ParameterList(), device)
            with ledger:
                torch.native_dropout(x, 0.1, True)
            found[device] = ledger.peak
    assert found == {"cpu": 2 * 20_200 + 10_100, "cuda": 20_480 + 10_240}
