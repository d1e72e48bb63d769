"""What llama.cpp calls a model's tensors and sizes, and how it wants their rows ordered: one entry a family.

    config ─► the architecture's name and keys     tensor's name ─► llama.cpp's, a permutation, a change of its values

llama.cpp hard-codes some of what a config says freely (which layers have windows, how scores are scaled); what it would
compute otherwise is refused. Learnt from llama.cpp's own converter and graphs. Knows configs and names; must not know
files, adapters or values beyond these changes.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from qlora.errors import ModelError


@dataclass(frozen=True)
class Family:
    """How llama.cpp holds the models of one ``model_type``."""

    arch: str
    interleaved: bool = False
    """Rotary pairs lie side by side in q and k, not half a head apart as in transformers."""
    shifted_norms: bool = False
    """Norms are stored as their difference from one."""
    own_head: bool = True
    """A head of its own is read, where there is one; else the embedding's values are always used."""
    window_every: int = 0
    """llama.cpp takes every layer for windowed, but each of this number."""
    activation: str = "silu"


FAMILIES: Mapping[str, Family] = {
    "llama": Family("llama", interleaved=True),
    "mistral": Family("llama", interleaved=True),
    "smollm3": Family("smollm3", interleaved=True),
    "qwen2": Family("qwen2"),
    "qwen3": Family("qwen3"),
    "qwen3_5_text": Family("qwen35", shifted_norms=True),
    "phi3": Family("phi3"),
    "gemma": Family("gemma", shifted_norms=True, own_head=False, activation="gelu_pytorch_tanh"),
    "gemma2": Family("gemma2", shifted_norms=True, own_head=False, window_every=2, activation="gelu_pytorch_tanh"),
    "gemma3_text": Family("gemma3", shifted_norms=True, window_every=6, activation="gelu_pytorch_tanh"),
}


class Converted:
    """One model's names, orders and keys, by its config. Raises ModelError for what llama.cpp would compute otherwise."""

    def __init__(self, config: Any) -> None:
        import gguf

        self.config = config
        kind = config.model_type
        if kind not in FAMILIES:
            raise ModelError(
                f"GGUF is written for {', '.join(sorted(FAMILIES))}, not for '{kind}'. Export it merged, and try "
                "llama.cpp's own convert_hf_to_gguf.py on that."
            )
        self.family = FAMILIES[kind]
        arch = next((key for key, name in gguf.MODEL_ARCH_NAMES.items() if name == self.family.arch), None)
        if arch is None:
            raise ModelError(
                f"The installed gguf does not know '{self.family.arch}'; install a newer one (pip install -U gguf)."
            )
        self._names = gguf.get_tensor_name_map(arch, config.num_hidden_layers)
        self.heads = config.num_attention_heads
        self.kv_heads = getattr(config, "num_key_value_heads", None) or self.heads
        self.head_dim = getattr(config, "head_dim", None) or config.hidden_size // self.heads
        rope = dict(getattr(config, "rope_parameters", None) or {})
        self.rope, self.local_rope = rope.get("full_attention", rope), rope.get("sliding_attention")
        self._check()

    def _check(self) -> None:
        """Raise ModelError where llama.cpp has a constant and this config another value."""
        config, family = self.config, self.family

        def refuse(what: str, found: Any, expected: Any) -> None:
            raise ModelError(
                f"llama.cpp computes '{config.model_type}' with {what} {expected}, but this model's config.json says {found}; "
                "it cannot be exported as GGUF."
            )

        activation = getattr(config, "hidden_activation", None) or getattr(config, "hidden_act", "silu")
        if activation not in (family.activation, {"silu": "swish"}.get(family.activation)):
            refuse("the activation", activation, family.activation)
        if family.interleaved and self.rope.get("partial_rotary_factor", 1.0) != 1.0:
            refuse("a partial_rotary_factor of", self.rope["partial_rotary_factor"], 1.0)
        if family.window_every:
            layers = range(1, config.num_hidden_layers + 1)
            kinds = ["full_attention" if n % family.window_every == 0 else "sliding_attention" for n in layers]
            if list(config.layer_types) != kinds:
                refuse("a window in each layer but every", config.layer_types, f"{family.window_every}th")
            largest = config.num_hidden_layers == {"gemma2": 46, "gemma3": 62}[family.arch]
            scale = config.hidden_size // self.heads if largest else self.head_dim
            if config.query_pre_attn_scalar != scale:
                refuse("a query_pre_attn_scalar of", config.query_pre_attn_scalar, scale)
        if family.arch == "smollm3":
            steps = [int((n + 1) % 4 != 0) for n in range(config.num_hidden_layers)]
            if list(config.no_rope_layers) != steps:
                refuse("no_rope_layers of", config.no_rope_layers, steps)
        if family.arch == "qwen35":
            step = next((n + 1 for n, kind in enumerate(config.layer_types) if kind == "full_attention"), 0)
            kinds = [
                "full_attention" if step and (n + 1) % step == 0 else "linear_attention"
                for n in range(config.num_hidden_layers)
            ]
            if not step or list(config.layer_types) != kinds:
                refuse("full attention in", config.layer_types, "every nth layer")
        known = ("default", "linear", "yarn", "llama3", "longrope")
        if (kind := self.rope.get("rope_type", "default")) not in known or (kind == "longrope") > (
            family.arch == "phi3"
        ):
            refuse("a rope_type of", kind, " or ".join(known[:4]))

    def name(self, target: str) -> str | None:
        """llama.cpp's name of the tensor called ``target`` in the text model's tree, or None."""
        target = target.replace(".language_model.", ".").removeprefix("language_model.")
        target = target.replace(".dt_bias", ".dt_proj.bias")
        return self._names.get_name(target, try_suffixes=(".weight", ".bias"))

    def order(self, target: str, length: Callable[[int], int]) -> tuple[int, Tensor] | None:
        """The dimension along which a tensor is permuted, and the index; ``length`` gives the size of a dimension."""
        if self.family.interleaved:
            heads = self.heads if ".q_proj." in target else self.kv_heads if ".k_proj." in target else 0
            if heads:
                return 0, torch.arange(length(0)).reshape(heads, 2, -1).swapaxes(1, 2).reshape(-1)
        if self.family.arch == "qwen35" and ".linear_attn." in target:
            return self._tiled(target, length)
        return None

    def _tiled(self, target: str, length: Callable[[int], int]) -> tuple[int, Tensor] | None:
        """Value heads lie side by side that share a key head; llama.cpp repeats key heads over them in tiles."""
        config = self.config
        keys, values = config.linear_num_key_heads, config.linear_num_value_heads
        part = target.split(".linear_attn.")[1].split(".")[0]
        width = 1 if part in ("in_proj_a", "in_proj_b", "A_log", "dt_bias") else config.linear_value_head_dim
        index = torch.arange(values * width).reshape(keys, values // keys, width).swapaxes(0, 1).reshape(-1)
        if keys == values or part == "norm":
            return None
        if part in ("in_proj_qkv", "conv1d"):
            before = length(0) - len(index)
            return 0, torch.cat([torch.arange(before), index + before])
        return (1 if part == "out_proj" else 0), index

    def shape(self, target: str, shape: tuple[int, ...]) -> tuple[int, ...]:
        """A tensor's shape in the GGUF file."""
        return tuple(size for size in shape if size != 1) if target.endswith(".conv1d.weight") else shape

    def values(self, target: str, values: Tensor) -> Tensor:
        """A merged tensor in fp32, as llama.cpp holds it."""
        if (found := self.order(target, values.size)) is not None:
            values = values.index_select(found[0], found[1].to(values.device))
        if (
            target.endswith("norm.weight")
            and self.family.shifted_norms
            and not target.endswith("linear_attn.norm.weight")
        ):
            values = values + 1
        if target.endswith(".A_log"):
            values = -torch.exp(values)
        return values.reshape(self.shape(target, tuple(values.shape)))

    def factors(self) -> dict[str, Tensor]:
        """What each rotary frequency is divided by, where that is not one number: tensors that only llama.cpp has."""
        if self.rope.get("rope_type") == "longrope":
            kinds = {"rope_factors_long.weight": "long_factor", "rope_factors_short.weight": "short_factor"}
            return {name: torch.tensor(self.rope[key], dtype=torch.float32) for name, key in kinds.items()}
        if self.rope.get("rope_type") != "llama3":
            return {}
        rope = self.rope
        steps = torch.arange(0, self.head_dim, 2, dtype=torch.float32) / self.head_dim
        lengths = 2 * math.pi * rope["rope_theta"] ** steps
        low, high, factor = rope["low_freq_factor"], rope["high_freq_factor"], rope["factor"]
        # from whole frequencies where waves are short to divided ones where they are long
        share = ((rope["original_max_position_embeddings"] / lengths - low) / (high - low)).clamp(0, 1)
        return {"rope_freqs.weight": 1 / ((1 - share) / factor + share)}

    def describe(self, writer: Any, vocabulary: int) -> None:
        """Write the architecture's keys into a gguf.GGUFWriter; ``vocabulary`` is the number of rows of the embedding."""
        config, family, rope = self.config, self.family, self.rope
        window = getattr(config, "sliding_window", None)
        context = config.max_position_embeddings
        if window and not family.window_every and self._windows():
            context = min(context, window)  # this architecture has no windows in llama.cpp: within one, both are equal
        writer.add_vocab_size(vocabulary)
        writer.add_context_length(context)
        writer.add_embedding_length(config.hidden_size)
        writer.add_block_count(config.num_hidden_layers)
        writer.add_feed_forward_length(config.intermediate_size)
        writer.add_head_count(self.heads)
        writer.add_head_count_kv(self.kv_heads)
        writer.add_key_length(self.head_dim)
        writer.add_value_length(self.head_dim)
        writer.add_layer_norm_rms_eps(config.rms_norm_eps)
        writer.add_rope_dimension_count(int(self.head_dim * rope.get("partial_rotary_factor", 1.0)))
        writer.add_rope_freq_base(rope.get("rope_theta", 10000.0))
        if self.local_rope is not None:
            writer.add_rope_freq_base_swa(self.local_rope["rope_theta"])
        if family.window_every:
            writer.add_sliding_window(window)
        elif family.arch == "phi3":
            writer.add_sliding_window(0)
        for name in ("attn_logit_softcapping", "final_logit_softcapping"):
            if getattr(config, name, None):
                getattr(writer, f"add_{name}")(getattr(config, name))
        self._describe_scaling(writer)
        if family.arch == "qwen35":
            writer.add_rope_dimension_sections([*rope.get("mrope_section", [11, 11, 10]), 0][:4])
            writer.add_ssm_conv_kernel(config.linear_conv_kernel_dim)
            writer.add_ssm_state_size(config.linear_key_head_dim)
            writer.add_ssm_group_count(config.linear_num_key_heads)
            writer.add_ssm_time_step_rank(config.linear_num_value_heads)
            writer.add_ssm_inner_size(config.linear_value_head_dim * config.linear_num_value_heads)
            writer.add_full_attention_interval(list(config.layer_types).index("full_attention") + 1)

    def _windows(self) -> bool:
        kinds = getattr(self.config, "layer_types", None)
        return getattr(self.config, "use_sliding_window", True) and (kinds is None or "sliding_attention" in kinds)

    def _describe_scaling(self, writer: Any) -> None:
        import gguf

        rope, kind = self.rope, self.rope.get("rope_type", "default")
        original = rope.get("original_max_position_embeddings") or getattr(
            self.config, "original_max_position_embeddings", self.config.max_position_embeddings
        )
        if kind in ("linear", "yarn"):
            writer.add_rope_scaling_type(gguf.RopeScalingType.LINEAR if kind == "linear" else gguf.RopeScalingType.YARN)
            writer.add_rope_scaling_factor(rope["factor"])
        if kind == "yarn":
            writer.add_rope_scaling_orig_ctx_len(original)
            for key, add in (
                ("attention_factor", writer.add_rope_scaling_yarn_attn_factor),
                ("beta_fast", writer.add_rope_scaling_yarn_beta_fast),
                ("beta_slow", writer.add_rope_scaling_yarn_beta_slow),
            ):
                if rope.get(key) is not None:
                    add(rope[key])
        if self.family.arch == "phi3":
            writer.add_rope_scaling_orig_ctx_len(original)
        if kind == "longrope":
            longer = self.config.max_position_embeddings / original
            writer.add_rope_scaling_attn_factors(
                math.sqrt(1 + math.log(longer) / math.log(original)) if longer > 1 else 1.0
            )
