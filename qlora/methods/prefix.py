"""Prefix tuning: trained keys and values before every text, in every layer (Li & Liang 2021, arXiv:2101.00190).

    keys, values     K V = [p₁ … p_P | k₁ v₁  k₂ v₂ …]     p [P, 2, H, E] for each layer
    attention        every token of every text sees the whole prefix, however many texts a row holds
    positions        0 … P−1 are the prefix's, a text's own begin at P
    projected        p = W₂ tanh(W₁ z + b₁) + b₂, z [P, H·E] (section 4.3): W₁ and z are shared by all layers

The prefix stands where a cache would hold earlier tokens: each attention is given a cache of ours, whose ``update``
answers prefix and keys together and remembers nothing (see ``_PrefixedCache``), so that a layer may be recomputed as often
as need be. In generation the real cache is behind it and holds the tokens' own keys alone.

A prefix is seen through a sliding window too, at any distance, as the paper has it. PEFT's is inside the window, and
tokens further away than that no longer see it; up to there both give the same.

Knows attention modules by what their ``forward`` takes; must not know families by name, or the training loop.

Shape suffixes: B rows, H key-value heads, P prefix, T tokens, E size of a head.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from qlora.errors import MethodError, ModelError
from qlora.methods import sublayers
from qlora.methods.layout import Fields, Layout
from qlora.methods.method import Method
from qlora.methods.planted import Planted, modules_unplanted
from qlora.methods.prompt import KEY, SHAPE, load_network, make_real, network_state, tokens_of_text
from qlora.model import anatomy
from qlora.model.attention import PackedMask, keeps_apart
from qlora.recipe.methods import PrefixTuning

CACHES = ("past_key_values", "layer_past")  # what attentions call the cache that they are given
SPREAD = 0.1
"""Standard deviation of a random prefix. PEFT's 1 drowns the text at first: SmolLM2-135M on prose, 20 tokens, loss 10.7
before the first step and 8.6 after four at 1e-2; with 0.1 it is 5.6 and 5.0, and without a prefix 4.7."""


class PrefixAttention(Planted):
    """An attention whose keys and values begin with ``prefix`` [P, 2, H, E]: keys at 0, values at 1."""

    def __init__(self, base: nn.Module, prefix: Tensor) -> None:
        super().__init__(base)
        self.prefix = nn.Parameter(prefix)
        self.names = sublayers.arguments(base)
        self.cache_name = next(name for name in CACHES if name in self.names)

    def current_prefix(self) -> Tensor:
        """[P, 2, H, E]."""
        return self.prefix

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The base's own answer, in its own form."""
        if not self.enabled:
            return self.base(*args, **kwargs)
        given = {**dict(zip(self.names, args, strict=False)), **kwargs}
        cache, tokens = given.get(self.cache_name), given[self.names[0]].shape[1]
        changed = {
            self.cache_name: _PrefixedCache(self.current_prefix(), cache),
            "attention_mask": self._mask(given.get("attention_mask"), tokens, cache, given[self.names[0]].device),
        }
        positional = [changed.pop(name, value) for name, value in zip(self.names, args, strict=False)]
        return self.base(*positional, **{**kwargs, **changed})

    def _mask(self, mask: Tensor | PackedMask | None, tokens: int, cache: Any, device: torch.device) -> Tensor | None:
        """The mask [B, 1, T, …] with P more columns on the left, which everyone sees.

        No mask means that the kernel hides the future by itself. It would count the prefix's columns as tokens, so that is
        written out; but a token alone has no future.
        """
        count = len(self.prefix)
        if mask is None:
            if tokens == 1 or not getattr(self.base, "is_causal", True):
                return None
            length = tokens if cache is None else cache.get_mask_sizes(tokens, self.base.layer_idx)[0]
            seen = torch.ones(tokens, count + length, dtype=torch.bool, device=device).tril(count)
            return seen[None, None]
        if isinstance(mask, PackedMask):
            mask = mask.dense(device)
        if mask.dim() != 4:
            raise MethodError(
                f"Prefix tuning needs an attention mask of four dimensions, and this {type(self.base).__name__} got one of "
                f"{mask.dim()}; set model.attention=sdpa."
            )
        return nn.functional.pad(mask, (count, 0), value=True if mask.dtype == torch.bool else 0.0)

    def extra_repr(self) -> str:
        return f"tokens={len(self.prefix)}"


class _PrefixedCache:
    """What an attention takes for its cache: answers with the prefix before the keys and values, and stores nothing.

    ``cache`` is the real one in generation, else None.
    """

    def __init__(self, prefix_P2HE: Tensor, cache: Any) -> None:
        self.prefix_P2HE = prefix_P2HE
        self.cache = cache

    def update(self, keys: Tensor, values: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Keys and values [B, H, T, E] → [B, H, P + (what the real cache holds) + T, E]."""
        if self.cache is not None:
            keys, values = self.cache.update(keys, values, *args, **kwargs)
        heads, size = self.prefix_P2HE.shape[2:]
        for found in (keys, values):
            if (found.shape[1], found.shape[3]) != (heads, size):
                raise MethodError(
                    f"Prefix tuning made {heads} heads of {size} for every layer, as the model's configuration says, but an "
                    f"attention has {found.shape[1]} of {found.shape[3]}; use another method, as LoRA."
                )
        prefix_2HPE = self.prefix_P2HE.to(keys.dtype).permute(1, 2, 0, 3)
        first_keys, first_values = (half.expand(len(keys), -1, -1, -1) for half in prefix_2HPE)
        return torch.cat((first_keys, keys), dim=2), torch.cat((first_values, values), dim=2)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.__dict__["cache"], name)


class PrefixProjection(nn.Module):
    """What all layers of a projected prefix share: tanh(W₁ z + b₁) [P, hidden]. Made on meta (see ``make_real``)."""

    def __init__(self, tokens: int, width: int, hidden: int) -> None:
        super().__init__()
        self.inputs = nn.Parameter(torch.empty(tokens, width, device="meta"))
        self.hidden = nn.Linear(width, hidden, device="meta")

    def forward(self) -> Tensor:
        """[P, hidden]."""
        return torch.tanh(self.hidden(self.inputs))


class ProjectedAttention(PrefixAttention):
    """A prefix that its network makes anew in every forward; while ``projecting`` is off, ``prefix`` stands as it is.

    Loading an adapter turns the network off, because the file holds what came out of it; a checkpoint's own state, which
    is loaded after it, turns the network on again. Each layer computes the shared part for itself: a layer that is
    recomputed can pass no gradient to what was computed outside of it.
    """

    def __init__(self, base: nn.Module, prefix: Tensor, shared: PrefixProjection, output: nn.Linear) -> None:
        super().__init__(base, prefix)
        self.shared, self.output = shared, output
        self.project(True)

    def project(self, on: bool) -> None:
        """Train the network, or else the prefix itself."""
        self.projecting = on
        self.shared.requires_grad_(on)
        self.output.requires_grad_(on)
        self.prefix.requires_grad_(not on)

    def current_prefix(self) -> Tensor:
        """[P, 2, H, E]."""
        return self.output(self.shared()).view_as(self.prefix) if self.projecting else self.prefix


class LaterPositions(Planted):
    """What turns positions into embeddings or rotations; a text's own begin behind the prefix, at ``first``."""

    def __init__(self, base: nn.Module, first: int) -> None:
        super().__init__(base)
        self.first = first
        names = sublayers.arguments(base)
        self.name = "position_ids" if "position_ids" in names else names[0]
        self.place = names.index(self.name)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The base's own answer, in its own form."""
        if not self.enabled:
            return self.base(*args, **kwargs)
        if self.name in kwargs:
            return self.base(*args, **{**kwargs, self.name: kwargs[self.name] + self.first})
        later = args[self.place] + self.first
        return self.base(*args[: self.place], later, *args[self.place + 1 :], **kwargs)


class PrefixLayout(Layout):
    """PEFT's PrefixTuningConfig and its one tensor."""

    method: PrefixMethod
    peft_type = "PREFIX_TUNING"
    only = {"num_transformer_submodules": (1, None)}  # noqa: RUF012
    # the last is of first values, which the file replaces
    read = SHAPE | {"prefix_projection", "encoder_hidden_size", "init_weights"}

    @torch.no_grad()
    def tensors(self) -> dict[str, Tensor]:
        """All prefixes side by side, [P, layers · 2 · H · E]: PEFT's order."""
        return {KEY: torch.cat([layer.current_prefix().detach().flatten(1) for layer in self.method.layers], dim=1)}

    @torch.no_grad()
    def load(self, tensors: Mapping[str, Tensor]) -> None:
        """Take the prefixes as they are, without a network that made them."""
        layers = self.method.layers
        for layer, values in zip(layers, tensors[KEY].chunk(len(layers), dim=1), strict=True):
            layer.prefix.copy_(values.view_as(layer.prefix))
        self.method.project(False)

    def peft_config(self, every_path: list[str]) -> Fields:
        layers, section = self.method.layers, self.method.section
        tokens, _, heads, size = layers[0].prefix.shape
        return {
            "num_virtual_tokens": tokens,
            "token_dim": heads * size,
            "num_transformer_submodules": 1,
            "num_attention_heads": heads,
            "num_layers": len(layers),
            "prefix_projection": section.projection_size is not None,
            "encoder_hidden_size": section.projection_size or heads * size,
        }

    @classmethod
    def section_of(cls, values: Fields, folder: Path) -> Fields:
        return {
            "name": "prefix_tuning",
            "tokens": values.get("num_virtual_tokens"),
            "projection_size": values.get("encoder_hidden_size") if values.get("prefix_projection") else None,
        }


class PrefixMethod(Method):
    """How a prefix is planted: on every attention, and on what makes something of positions."""

    place = "containers"
    layout_class = PrefixLayout
    unmergeable = (
        "its keys and values are no product of any weight of the base; load the adapter beside the base, as qlora and "
        "PEFT do, or train a LoRA"
    )
    section: PrefixTuning

    def new_layers(self, model: nn.Module) -> dict[str, Planted]:
        """Raises MethodError where a prefix has no place."""
        attentions = find_attentions(model)  # first, for its message where this is no language model at all
        refuse_other_attention(model)
        positions = find_positions(model)
        layers = self._on_attentions(model, attentions)
        later = {path: LaterPositions(module, self.section.tokens) for path, module in positions.items()}
        return {**later, **layers}

    @property
    def layers(self) -> list[PrefixAttention]:
        """The attentions, from the first layer to the last."""
        return [layer for layer in self.planted.values() if isinstance(layer, PrefixAttention)]

    @property
    def first_position(self) -> int:
        """The prefix takes positions, but no place in the stream."""
        return int(self.section.tokens) if any(layer.enabled for layer in self.layers) else 0

    def _on_attentions(self, model: nn.Module, attentions: Mapping[str, nn.Module]) -> dict[str, PrefixAttention]:
        heads, size = heads_of(model)
        tokens, width = self.section.tokens, heads * size
        shape = (tokens, 2, heads, size)
        if hidden := self.section.projection_size:
            shared = PrefixProjection(tokens, width, hidden)
            make_real(shared, self.device, self.dtype, self.generator("prefix"))
            made: dict[str, PrefixAttention] = {}
            for path, attention in attentions.items():
                output = nn.Linear(hidden, 2 * width, device="meta")
                make_real(output, self.device, self.dtype, self.generator(path))
                values = torch.zeros(shape, device=self.device, dtype=self.dtype)
                made[path] = ProjectedAttention(attention, values, shared, output)
            return made
        reads = self.device.type != "meta" and not next(model.parameters()).is_meta
        if not reads:  # shapes are wanted, or values follow
            first = [torch.zeros(shape, device=self.device) for _ in attentions]
        elif self.section.init_text is not None:
            first = self._of_text(model)
        else:
            first = [SPREAD * torch.randn(shape, generator=self.generator(path)) for path in attentions]
        pairs = zip(attentions.items(), first, strict=True)
        return {path: PrefixAttention(base, values.to(self.device, self.dtype)) for (path, base), values in pairs}

    @torch.no_grad()
    def _of_text(self, model: nn.Module) -> list[Tensor]:
        """The keys and values that the base has for the text, by layer [P, 2, H, E]."""
        assert self.section.init_text is not None
        ids = tokens_of_text(self.base, self.section.init_text, self.section.tokens)
        cache = anatomy.decoder(model)(input_ids=ids[None].to(self.device), use_cache=True).past_key_values
        found = [torch.stack((layer.keys[0], layer.values[0])).permute(2, 0, 1, 3) for layer in cache.layers]
        remembered = min(len(values) for values in found)
        if remembered < len(ids):
            raise MethodError(
                f"The model remembers {remembered} of the {len(ids)} tokens of method.init_text in a layer with a sliding "
                f"window; set method.tokens={remembered}."
            )
        return found

    def parameters(self) -> dict[str, nn.Parameter]:
        """What trains, by name; what the layers share stands under the first one's."""
        found: dict[int, tuple[str, nn.Parameter]] = {}
        for name, values in super().parameters().items():
            found.setdefault(id(values), (name, values))
        return dict(found.values())

    def _projected(self) -> list[ProjectedAttention]:
        return [layer for layer in self.layers if isinstance(layer, ProjectedAttention)]

    def _network(self) -> nn.Module:
        """The network of a projected prefix: what is shared, then each layer's own."""
        projected = self._projected()
        return nn.ModuleList([projected[0].shared, *(layer.output for layer in projected)])

    def state(self) -> dict[str, Tensor]:
        """The network of a projected prefix, and whether it trains."""
        projected = self._projected()
        return network_state(self._network(), projected[0].projecting) if projected else {}

    @torch.no_grad()
    def load_state(self, tensors: Mapping[str, Tensor]) -> None:
        """Put the network back, where it was in use."""
        if self._projected():
            self.project(load_network(self._network(), tensors))

    def project(self, on: bool) -> None:
        """Train the network of a projected prefix, or else the prefixes themselves."""
        for layer in self._projected():
            layer.project(on)


def refuse_other_attention(model: nn.Module) -> None:
    """Raise MethodError for attention that takes no mask, biases it by position, or reads another layer's keys."""
    config = getattr(model, "config", None)
    kernel = getattr(config, "_attn_implementation", None)
    if kernel not in ("sdpa", "eager") and not keeps_apart(model):
        raise MethodError(
            f"Prefix tuning needs attention masks, which the kernel {kernel!r} does not take; set model.attention=sdpa."
        )
    if getattr(config, "alibi", False):  # Falcon; Bloom and MPT have no other positions at all
        raise _no_place(model, "its positions are biases of the attention (ALiBi)")
    if getattr(anatomy.text_config(model), "num_kv_shared_layers", None):  # Gemma 3n, Gemma 4
        raise _no_place(model, "some of its layers read the keys of others")
    if anatomy.differs_by_layer(model):  # Gemma 4
        raise _no_place(model, "its layers have heads of several sizes")


def find_attentions(model: nn.Module) -> dict[str, nn.Module]:
    """Every layer's attention by module path: what takes a cache and a mask. Raises MethodError unless each has one."""
    try:
        layers = anatomy.layers(model)
    except (AttributeError, ModelError):
        raise _no_place(model, "it has no list of decoder layers") from None
    start = anatomy.path_of(model, layers)
    found: dict[str, nn.Module] = {}
    for number, layer in enumerate(layers):
        fits = {path: module for path, module in layer.named_modules() if path and _takes_cache(path, module)}
        inner = [path for path in fits if not any(other.startswith(f"{path}.") for other in fits)]
        if len(inner) != 1:
            raise _no_place(model, f"layer {number} has {len(inner)} attentions that take a cache and a mask, not one")
        found[f"{start}.{number}.{inner[0]}"] = fits[inner[0]]
    return found


def _takes_cache(path: str, module: nn.Module) -> bool:
    names = sublayers.arguments(module)
    return "attention_mask" in names and any(name in CACHES for name in names) and "base" not in path.split(".")


def find_positions(model: nn.Module) -> dict[str, nn.Module]:
    """What turns positions into embeddings or rotations, by module path. Raises MethodError when nothing does."""
    inside = {id(module) for module in anatomy.layers(model).modules()}
    below = {id(module) for module in anatomy.decoder(model).modules()} - inside
    found = {
        path: module
        for path, module in modules_unplanted(model)
        if id(module) in below and anatomy.gives_positions(path, module)
    }
    if not found:
        raise _no_place(model, "it has neither rotary nor learned positions that all layers share")
    return found


def heads_of(model: nn.Module) -> tuple[int, int]:
    """(key-value heads, size of a head) by the model's configuration, as PEFT reads it."""
    sizes = anatomy.sizes(model)
    if not sizes.kv_heads:
        raise MethodError(
            f"Prefixes stand before attention's keys, and this {anatomy.kind(model)} model has no attention."
        )
    return sizes.kv_heads, sizes.head_dim


def _no_place(model: nn.Module, why: str) -> MethodError:
    name = getattr(getattr(model, "config", None), "model_type", None) or type(model).__name__
    return MethodError(f"Prefix tuning has no place in this {name} model: {why}; use another method, as prompt_tuning.")
