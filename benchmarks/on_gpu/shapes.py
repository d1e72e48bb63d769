"""Real shapes with random weights, made where they are computed with: nothing is downloaded, and nothing is quantised.

config(shape, length, layers) ─► random_base ─► a Base as load_base makes it;  rows(config, …) ─► Rows
                              └► empty_base  ─► the same without weights, for the plan
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy
import torch
from transformers import LlamaConfig

from qlora.data.packing import Row
from qlora.machine.cards import workspace_bytes
from qlora.machine.device import capability
from qlora.methods.base import apply_method
from qlora.model.anatomy import layers as decoder_layers
from qlora.model.attention import PLAIN, attention_of, keep_apart
from qlora.model.base import Base
from qlora.model.config import Scheme
from qlora.model.kernels import fuse
from qlora.model.load import finish
from qlora.model.loss import IGNORE_INDEX
from qlora.model.nf4 import Linear4bit
from qlora.model.skeleton import empty_linears, empty_model
from qlora.planning.memory import estimate
from qlora.recipe import LoRA, MemorySection, ModelSection, TrainingSection
from qlora.residence.ends import embedding_on_host, head_on_host
from qlora.residence.homes import HostHome
from qlora.residence.image import Image
from qlora.residence.placement import Placement, resident_layers

SHAPES: dict[str, dict[str, int]] = {
    "8b": {"vocab_size": 128256, "hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32,
           "num_attention_heads": 32, "num_key_value_heads": 8},
    "70b": {"vocab_size": 128256, "hidden_size": 8192, "intermediate_size": 28672, "num_hidden_layers": 80,
            "num_attention_heads": 64, "num_key_value_heads": 8},
    "tiny": {"vocab_size": 1000, "hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 4,
             "num_attention_heads": 4, "num_key_value_heads": 2},
}  # fmt: skip
DEVIATION = 0.02  # of the random weights


def llama(shape: str, length: int, layers: int | None = None) -> LlamaConfig:
    """The configuration of a Llama 3 of that shape, with only so many layers where that is said."""
    sizes = dict(SHAPES[shape])
    if layers is not None:
        sizes["num_hidden_layers"] = min(layers, sizes["num_hidden_layers"])
    return LlamaConfig(**sizes, max_position_embeddings=length, rope_theta=500000.0)  # type: ignore[arg-type]


def rows(config: LlamaConfig, count: int, length: int, examples: int = 1) -> list[Row]:
    """Random rows of full length, each of so many examples of one length; every token but an example's first is a target."""
    made = []
    for number in range(count):
        ids = numpy.random.default_rng(number).integers(3, config.vocab_size, length).astype(numpy.int32)
        positions = numpy.arange(length, dtype=numpy.int32) % (length // examples)
        labels = numpy.where(positions == 0, IGNORE_INDEX, ids).astype(numpy.int32)
        made.append(Row(ids, labels, positions, tuple(range(number * examples, (number + 1) * examples))))
    return made


def empty_base(config: LlamaConfig, device: torch.device, dtype: torch.dtype) -> Base:
    """The base without weights."""
    model: Any = empty_model(config, ModelSection(name="random"), dtype)
    empty_linears(model, Scheme("nf4", True, False), dtype, set())
    model.tie_weights()
    model.requires_grad_(False)
    return Base(model, None, Path(), "random", None, "nf4", True, device, dtype)


def random_base(config: LlamaConfig, memory: MemorySection, device: torch.device, dtype: torch.dtype) -> Base:
    """The base with random weights, placed as ``load_base`` places a checkpoint's."""
    torch.manual_seed(0)  # of what transformers initialises: embeddings and the head
    base = empty_base(config, device, dtype)
    model: Any = base.model
    layers = decoder_layers(model)
    stay = resident_layers(memory.layers, len(layers))
    if len(stay) < len(layers):
        images = {number: Image(layer) for number, layer in enumerate(layers) if number not in stay}
        home = HostHome({number: image.bytes for number, image in images.items()}, device)
        base.placement = Placement(images, home, memory.slots, device, memory.tier)
    generator = torch.Generator(device).manual_seed(0)
    source = torch.empty(2 * 1024**2, dtype=torch.bfloat16, device=device).normal_(std=DEVIATION, generator=generator)
    real = Linear4bit.empty(2048, 1024, bias=False, quant_type="nf4", double_quant=True, compute_dtype=dtype)
    real.place(source.view(1024, 2048), device)
    for linear in model.modules():
        if isinstance(linear, Linear4bit):
            _fill(linear, real, generator)
    finish(model, set(model.state_dict()), device, "random")
    model.eval()
    if isinstance(base.placement, Placement):
        base.placement.stream(layers)
    if memory.embedding == "host":
        embedding_on_host(model, device)
    if memory.head == "host":
        head_on_host(model, device)
    return base


def attend(model: Any, dtype: torch.dtype, device: torch.device, masked: bool = False) -> str:
    """Have packed rows attended to as ``load_base`` does, or with transformers' own mask; the name of the attention."""
    model.config._attn_implementation = PLAIN
    if not masked:
        keep_apart(model, dtype, capability(device))
    return str(attention_of(model))


def operators(model: Any, dtype: torch.dtype, device: torch.device, whose: str = "ours") -> None:
    """Have norms, rotary positions and SwiGLU computed as ``load_base`` does, by transformers' own code ("plain"), or by
    Liger's kernels, which stay in transformers' Llama for the rest of the process."""
    for module in model.modules():
        if hasattr(vars(module).get("forward"), "operator"):
            del module.forward
    if whose == "ours":
        fuse(model, dtype, capability(device), None if device.type == "meta" else device)
    elif whose == "liger":
        from liger_kernel.transformers import apply_liger_kernel_to_llama

        off = {"cross_entropy": False, "fused_linear_cross_entropy": False}
        apply_liger_kernel_to_llama(rope=True, swiglu=True, rms_norm=True, model=model, **off)


def _fill(linear: Linear4bit, like: Linear4bit, generator: torch.Generator) -> None:
    """Random 4-bit numbers, with the codes and scales of a matrix that was quantised for real."""
    device = like.weight.device
    for name, values in list(linear.named_buffers(recurse=False)):
        known = getattr(like, name)
        if name == "weight":
            known = torch.randint(0, 256, values.shape, dtype=torch.uint8, device=device, generator=generator)
        elif values.shape != known.shape:  # scales: as many as the matrix has, drawn from the real ones
            places = torch.randint(0, known.numel(), values.shape, device=device, generator=generator)
            known = known.view(-1)[places]
        else:
            known = known.clone()
        setattr(linear, name, known)
    if linear.away is not None:
        linear.away.keep()


def planned(
    config: LlamaConfig,
    method: LoRA,
    training: TrainingSection,
    memory: MemorySection,
    length: int,
    device: torch.device,
    dtype: torch.dtype,
    packed: bool = False,
    masked: bool = False,
    whose: str = "ours",
) -> int:
    """Bytes on the device by the plan: what the allocator gives out. ``masked``: see ``attend``, ``whose``: ``operators``."""
    workspace = workspace_bytes(capability(device)) if device.type == "cuda" else 0
    adapted = apply_method(empty_base(config, torch.device("meta"), dtype), method)
    attend(adapted.model, dtype, device, masked)
    operators(adapted.model, dtype, device, "plain" if whose == "plain" else "ours")
    return estimate(adapted, training, length, device, packed, memory, workspace=workspace).allocated
