"""Prompt tuning (Lester et al. 2021, arXiv:2104.08691) and P-tuning (Liu et al. 2021, arXiv:2103.10385).

    ids            −P … −2 −1  x₁ x₂ x₃        P virtual tokens before every text
    embeddings      p₁ … … p_P e₁ e₂ e₃        p [P, D] trains; e is what the base gives
    P-tuning        p = W₃ relu(W₂ relu(W₁ z + b₁) + b₂) + b₃,  z [P, D]

The virtual tokens stand in the token stream itself, with ids below zero, so masks, positions, packing and generation
treat them as any other token; only the embedding knows them. Their rows are what *leaves* the base's embedding: where a
family scales inside it, as Gemma does, a prompt is not scaled, as with PEFT.

P-tuning's network is a way of training and is dropped on export: an adapter holds p alone. Without the network (see
``EncodedPrompt``) p is used as it is, and is what trains when training goes on.

Knows the embedding of a language model; must not know where the virtual ids are put in (``data/packing.py``).
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from qlora.errors import MethodError
from qlora.methods.layout import Fields, Layout
from qlora.methods.method import Method
from qlora.methods.planted import Planted
from qlora.model import anatomy
from qlora.model.base import Base

KEY = "prompt_embeddings"  # the one tensor of PEFT's prompt methods, which has no path
SHAPE = frozenset(
    {"num_virtual_tokens", "token_dim", "num_transformer_submodules", "num_attention_heads", "num_layers"}
)
"""The fields that the configs of PEFT's prompt methods share."""
INITS = {"vocabulary": "SAMPLE_VOCAB", "random": "RANDOM", "text": "TEXT"}  # ours → PEFT's


class PromptEmbedding(Planted):
    """An embedding that also knows the ids −P … −1: rows of ``prompt`` [P, D], first to last."""

    def __init__(self, base: nn.Module, prompt: Tensor) -> None:
        super().__init__(base)
        self.prompt = nn.Parameter(prompt)

    def virtual_rows(self) -> Tensor:
        """The embeddings of the virtual tokens, [P, D]."""
        return self.prompt

    def forward(self, ids: Tensor) -> Tensor:
        """[…] → […, D] in the dtype of the base."""
        if not self.enabled:
            return self.base(ids)
        rows, virtual = self.base(ids.clamp(min=0)), self.virtual_rows()
        chosen = nn.functional.embedding((ids + len(virtual)).clamp(0, len(virtual) - 1), virtual.to(rows.dtype))
        return torch.where(ids[..., None] < 0, chosen, rows)

    def extra_repr(self) -> str:
        return f"tokens={len(self.prompt)}"


class PromptEncoder(nn.Module):
    """P-tuning's network, in PEFT's shapes: z [P, D] through two hidden layers. Made on meta (see ``make_real``)."""

    def __init__(self, tokens: int, width: int, hidden: int) -> None:
        super().__init__()
        self.inputs = nn.Parameter(torch.empty(tokens, width, device="meta"))
        widths = [width, hidden, hidden, width]
        self.layers = nn.ModuleList(nn.Linear(i, o, device="meta") for i, o in itertools.pairwise(widths))

    def forward(self) -> Tensor:
        """[P, D]."""
        values: Tensor = self.inputs
        for layer in self.layers[:-1]:
            values = torch.relu(layer(values))
        return self.layers[-1](values)


class EncodedPrompt(PromptEmbedding):
    """A prompt that its network makes anew in every forward; while ``encoding`` is off, ``prompt`` stands as it is.

    Loading an adapter turns the network off, because the file holds what came out of it; a checkpoint's own state, which
    is loaded after it, turns the network on again.
    """

    def __init__(self, base: nn.Module, encoder: PromptEncoder) -> None:
        super().__init__(base, torch.zeros_like(encoder.inputs))
        self.encoder = encoder
        self.encode(True)

    def encode(self, on: bool) -> None:
        """Train the network, or else the prompt itself."""
        self.encoding = on
        self.encoder.requires_grad_(on)
        self.prompt.requires_grad_(not on)

    def virtual_rows(self) -> Tensor:
        """[P, D]."""
        return self.encoder() if self.encoding else self.prompt


class PromptLayout(Layout):
    """PEFT's PromptTuningConfig and its one tensor."""

    method: PromptTuningMethod
    peft_type = "PROMPT_TUNING"
    only = {"num_transformer_submodules": (1, None)}  # noqa: RUF012
    read = SHAPE | {"prompt_tuning_init", "prompt_tuning_init_text", "tokenizer_name_or_path", "tokenizer_kwargs"}

    @torch.no_grad()
    def tensors(self) -> dict[str, Tensor]:
        """The prompt, [P, D]."""
        return {KEY: self.method.layer.virtual_rows().detach()}

    def peft_config(self, every_path: list[str]) -> Fields:
        section = self.method.section
        return {
            **self.shape_config(),
            "prompt_tuning_init": INITS[section.init],
            "prompt_tuning_init_text": section.init_text,
            "tokenizer_name_or_path": self.method.base.name if section.init == "text" else None,
        }

    def shape_config(self) -> Fields:
        """What the configs of PEFT's prompt methods share."""
        config = getattr(self.method.base.model, "config", None)
        return {
            "num_virtual_tokens": self.method.section.tokens,
            "token_dim": self.method.layer.prompt.shape[1],
            "num_transformer_submodules": 1,
            "num_attention_heads": getattr(config, "num_attention_heads", None),
            "num_layers": getattr(config, "num_hidden_layers", None),
        }

    @classmethod
    def section_of(cls, values: Fields, folder: Path) -> Fields:
        asked = values.get("prompt_tuning_init") or "RANDOM"
        init = next((ours for ours, theirs in INITS.items() if theirs == asked), asked)
        text = values.get("prompt_tuning_init_text") if init == "text" else None
        return {"name": "prompt_tuning", "tokens": values.get("num_virtual_tokens"), "init": init, "init_text": text}


class PTuningLayout(PromptLayout):
    """PEFT's PromptEncoderConfig. The network is not in the file: the prompt is what came out of it, an LSTM's too."""

    method: PTuningMethod
    peft_type = "P_TUNING"
    read = SHAPE | {
        "encoder_hidden_size",
        "encoder_reparameterization_type",
        "encoder_num_layers",
        "encoder_dropout",
    }

    @torch.no_grad()
    def load(self, tensors: Mapping[str, Tensor]) -> None:
        """Take the prompt as it is, without the network that made it."""
        self.method.layer.prompt.copy_(tensors[KEY])
        self.method.layer.encode(False)

    def peft_config(self, every_path: list[str]) -> Fields:
        return {
            **self.shape_config(),
            "encoder_reparameterization_type": "MLP",
            "encoder_hidden_size": self.method.section.hidden_size,
            "encoder_num_layers": 2,
            "encoder_dropout": 0.0,
        }

    @classmethod
    def section_of(cls, values: Fields, folder: Path) -> Fields:
        tokens, hidden = values.get("num_virtual_tokens"), values.get("encoder_hidden_size")
        return {"name": "p_tuning", "tokens": tokens, "hidden_size": hidden}


class PromptTuningMethod(Method):
    """How a prompt is planted: on the embedding alone."""

    place = "prompt"
    layout_class = PromptLayout
    unmergeable = (
        "its virtual tokens stand before every text and no weight of the base can hold them; load the adapter beside "
        "the base, as qlora and PEFT do, or train a LoRA"
    )
    section: Any  # PromptTuning, or PTuning below

    def new_layers(self, model: nn.Module) -> dict[str, Planted]:
        """Raises MethodError for a model that has no input embedding, or one that needs its ids elsewhere."""
        path, embedding = find_embedding(model)
        return {path: self.new_layer(path, embedding)}

    @property
    def layer(self) -> Any:
        """What is planted: a PromptEmbedding, with P-tuning an EncodedPrompt."""
        (layer,) = self.planted.values()
        return layer

    def new_layer(self, path: str, embedding: nn.Embedding) -> PromptEmbedding:
        """A prompt on ``embedding``, with its first values."""
        shape = (self.section.tokens, embedding.embedding_dim)
        if self.device.type == "meta" or embedding.weight.is_meta:  # shapes are wanted, or values follow
            return PromptEmbedding(embedding, torch.zeros(shape, device=self.device, dtype=self.dtype))
        if self.section.init == "random":
            prompt = torch.randn(shape, generator=self.generator(path))  # as PEFT's
        else:
            prompt = self._embedded(path, embedding)
        return PromptEmbedding(embedding, prompt.to(self.device, self.dtype))

    def _embedded(self, path: str, embedding: nn.Embedding) -> Tensor:
        """The base's embeddings of drawn tokens, or of the text's."""
        if self.section.init == "text":
            ids = tokens_of_text(self.base, self.section.init_text, self.section.tokens)
        else:
            ids = torch.randint(embedding.num_embeddings, (self.section.tokens,), generator=self.generator(path))
        with torch.no_grad():
            rows: Tensor = embedding(ids.to(self.device))
        return rows.float()


class PTuningMethod(PromptTuningMethod):
    """How P-tuning is planted: a prompt with its network."""

    layout_class = PTuningLayout

    def new_layer(self, path: str, embedding: nn.Embedding) -> PromptEmbedding:
        """A prompt with a new network on ``embedding``."""
        encoder = PromptEncoder(self.section.tokens, embedding.embedding_dim, self.section.hidden_size)
        make_real(encoder, self.device, self.dtype, self.generator(path))
        return EncodedPrompt(embedding, encoder)

    def state(self) -> dict[str, Tensor]:
        """The network, and whether it trains."""
        return network_state(self.layer.encoder, self.layer.encoding)

    @torch.no_grad()
    def load_state(self, tensors: Mapping[str, Tensor]) -> None:
        """Put the network back, where it was in use."""
        self.layer.encode(load_network(self.layer.encoder, tensors))


def find_embedding(model: nn.Module) -> tuple[str, Any]:
    """(module path, module) of a language model's input embedding. Raises MethodError where a prompt cannot stand on it."""
    found = anatomy.embedding(model)
    path = None if found is None else anatomy.path_of(model, found)
    if path is None:
        raise MethodError(
            f"{type(model).__name__} has no input embedding, before which virtual tokens stand; use another method."
        )
    if anatomy.embeds_by_layer(model):  # Gemma 3n, Gemma 4
        raise MethodError(
            f"Every layer of this {anatomy.text_config(model).model_type} model looks its token ids up again, and virtual tokens have no "
            "place there; use another method, as LoRA."
        )
    return path, found


def tokens_of_text(base: Base, text: str, count: int) -> Tensor:
    """The token ids of ``text``, [count]: repeated or cut, as PEFT does it. Raises MethodError when there are none."""
    if base.tokenizer is None:
        raise MethodError("method.init_text needs a tokenizer, and this base has none; leave init_text out.")
    ids = base.tokenizer(text)["input_ids"]
    if not ids:
        raise MethodError(f"method.init_text {text!r:.40} has no token; give another text.")
    return torch.tensor((ids * -(-count // len(ids)))[:count])


@torch.no_grad()
def make_real(network: nn.Module, device: torch.device, dtype: torch.dtype, generator: torch.Generator) -> None:
    """Give a network that was made on meta memory and first values, drawn on the CPU; on meta it stays there.

    The values are distributed as torch's, and so PEFT's: inputs normal, linears uniform in ±1/√in.
    """
    if device.type != "meta":
        network.to_empty(device="cpu")
        for values in network.parameters(recurse=False):
            values.normal_(generator=generator)
        for layer in network.modules():
            if isinstance(layer, nn.Linear):
                bound = layer.in_features**-0.5
                for values in layer.parameters():
                    values.uniform_(-bound, bound, generator=generator)
    network.to(device, dtype)


def network_state(network: nn.Module, in_use: bool) -> dict[str, Tensor]:
    """A network's values by name, with ``in_use``: 1 or 0."""
    return {"in_use": torch.tensor(float(in_use)), **{k: v.detach() for k, v in network.named_parameters()}}


def load_network(network: nn.Module, tensors: Mapping[str, Tensor]) -> bool:
    """Copy in what ``network_state`` gave; return whether it was in use."""
    for name, values in network.named_parameters():
        values.copy_(tensors[name])
    return bool(tensors["in_use"])
