"""The recipe's ``method`` section: one class for each way of planting trainable parameters, told apart by ``name``.

Several methods at once are written as a list. Knows names and bounds; the formulas are in ``methods/``, a file each.
"""

from __future__ import annotations

from collections import Counter
from typing import Annotated, Any, Literal, Self

from pydantic import ConfigDict, Discriminator, Field, Tag, field_validator, model_validator

from qlora.errors import listed
from qlora.files.strangers import shown
from qlora.recipe.schema import Section, name_of

Targets = Literal["all-linear"] | tuple[str, ...]
Dtype = Literal["auto", "fp32", "bf16"]


FROM = """A run's folder or an adapter's, own or PEFT's, whose values and shape a new run begins with: `{from: runs/first}` alone
will do, and keys beside it must agree with that adapter but for `adapter_dtype`, `dropout` and `learning_rate_ratio`."""


class Continuable(Section):
    """What may begin with the values of an adapter."""

    model_config = ConfigDict(validate_by_name=True, validate_by_alias=True, serialize_by_alias=True)

    from_: str | None = Field(None, alias="from", description=FROM)


class MethodSection(Continuable):
    """What every method has."""

    adapter_dtype: Dtype = "auto"
    """The dtype that the adapter computes in and is written in. `auto`: bf16 on CUDA with bf16 compute, fp32 elsewhere. In
    bf16 the optimizer changes an fp32 master of each number, and gradients are summed in fp32."""

    @property
    def virtual_tokens(self) -> int:
        """Tokens that the method puts into the stream before every text."""
        return 0

    def in_short(self) -> str:
        """Its name, its rank, and what differs from the defaults: ``lora r=16 init='pissa'``."""
        fields = type(self).model_fields
        return " ".join(
            str(value) if name == "name" else f"{fields[name].alias or name}={shown(value)}"
            for name, value in sorted(self, key=lambda field: (field[0] != "name", field[0] != "r"))
            if name in ("name", "r") or value != fields[name].get_default(call_default_factory=True)
        )


class TargetedSection(MethodSection):
    """What every method on chosen linears has."""

    target_modules: Targets = "all-linear"
    """`all-linear` (every linear of attention and MLP, not the head), or names such as `[q_proj, v_proj]`."""

    @model_validator(mode="after")
    def _names(self) -> Self:
        if isinstance(self.target_modules, tuple) and not self.target_modules:
            raise ValueError("is an empty list; expected 'all-linear' or at least one module name")
        return self


class LowRankSection(TargetedSection):
    """What LoRA and DoRA share."""

    r: int = Field(16, ge=1, le=8192)
    """Rank of the update, at most the smaller side of every target."""
    alpha: float = Field(32, gt=0)
    """The update is scaled by alpha / r."""
    rslora: bool = False
    """Scale by alpha / √r instead, which keeps large ranks learning (Kalajdzievski 2023, arXiv:2312.03732)."""
    dropout: float = Field(0.0, ge=0, lt=1)
    """Dropout on the adapter's input."""
    rank_pattern: dict[str, Annotated[int, Field(ge=1, le=8192)]] = Field(default_factory=dict)
    """Other ranks for some targets, by the end of their path: `{down_proj: 32, layers.0.mlp.up_proj: 8}`. Of several names
    that fit, the first counts."""
    alpha_pattern: dict[str, Annotated[float, Field(gt=0)]] = Field(default_factory=dict)
    """Other alphas for some targets, in the same way."""
    init: Literal["kaiming", "gaussian", "pissa", "loftq", "eva"] = "kaiming"
    """How A and B begin. `kaiming` and `gaussian`: A random, B zero. `pissa`: the weight's principal part, which the frozen
    weight gives up (Meng et al. 2024, arXiv:2404.02948). `loftq`: what quantisation lost (Li et al. 2023, arXiv:2310.08659).
    `eva`: A from the training data's activations (Paischer et al. 2024, arXiv:2410.07170)."""
    loftq_iterations: int = Field(1, ge=1, le=16)
    """Rounds of LoftQ; with 1 the frozen weight stays as it was quantised."""
    learning_rate_ratio: float = Field(1.0, gt=0, le=1000)
    """LoRA+: B's learning rate is this many times A's (Hayou et al. 2024, arXiv:2402.12354); 16 is usual, with a lower rate."""


class LoRA(LowRankSection):
    """Low-rank adapters (Hu et al. 2021, arXiv:2106.09685) on frozen linears."""

    name: Literal["lora"] = "lora"
    """The method's name, which selects this section."""
    target_modules: Targets = "all-linear"
    """`all-linear` (every linear of attention and MLP, not the head), or names such as `[q_proj, v_proj]`; by name also the
    head, embeddings and 2-D convolutions, as `[embed_tokens, lm_head]`."""
    target_parameters: tuple[str, ...] = ()
    """Experts of a mixture to adapt as well, by PEFT's names, as `[mlp.experts.gate_up_proj, mlp.experts.down_proj]`. By default none: a pair
    for every expert takes more memory than the rest of the run, and a token trains only those of the few that it visits."""


class DoRA(LowRankSection):
    """LoRA on the direction of a weight, and its magnitude apart (Liu et al. 2024, arXiv:2402.09353)."""

    name: Literal["dora"] = "dora"
    """The method's name, which selects this section."""


class AdaLoRA(TargetedSection):
    """LoRA as a singular value decomposition whose ranks go where they matter (Zhang et al. 2023, arXiv:2303.10512)."""

    name: Literal["adalora"] = "adalora"
    """The method's name, which selects this section."""
    r: int = Field(8, ge=1, le=256)
    """The average rank at the end, which is the budget."""
    initial_r: int = Field(12, ge=1, le=256)
    """The rank of every target at the beginning."""
    alpha: float = Field(32, gt=0)
    """The update is scaled by alpha / initial_r, also when the rank has fallen."""
    dropout: float = Field(0.0, ge=0, lt=1)
    """Dropout on the adapter's input."""
    warmup: float = Field(0.1, ge=0, lt=1)
    """Part of all steps before the budget begins to fall (the paper's t_i / T)."""
    final: float = Field(0.3, ge=0, lt=1)
    """Part of all steps, at the end, with the final ranks (t_f / T)."""
    interval: int = Field(1, ge=1)
    """Steps between two allocations of ranks (Δ_T)."""
    beta1: float = Field(0.85, gt=0, lt=1)
    """Smoothing of the importance."""
    beta2: float = Field(0.85, gt=0, lt=1)
    """Smoothing of the importance's uncertainty."""
    orthogonality: float = Field(0.5, ge=0)
    """Weight of the penalty that keeps P and Q orthogonal (γ)."""

    @model_validator(mode="after")
    def _budget(self) -> Self:
        if self.r > self.initial_r:
            raise ValueError(f"has r {self.r} above initial_r {self.initial_r}; expected the budget to fall")
        if self.warmup + self.final >= 1:
            raise ValueError(f"has warmup {self.warmup:g} and final {self.final:g}; expected less than 1 together")
        return self


class Bottleneck(MethodSection):
    """Bottleneck adapters: up(activation(down(h))) added inside each layer."""

    name: Literal["bottleneck"] = "bottleneck"
    """The method's name, which selects this section."""
    form: Literal["houlsby", "lin", "pfeiffer", "parallel"] = "houlsby"
    """`houlsby` (H): after attention and after the MLP (arXiv:1902.00751). `lin` (L): on the layer's output, with a
    LayerNorm (arXiv:2004.03829). `pfeiffer` (P): on the layer's output (arXiv:2005.00247). `parallel`: beside the MLP
    (arXiv:2110.04366)."""
    size: int = Field(64, ge=1, le=8192)
    """The bottleneck's width."""
    activation: Literal["relu", "gelu", "silu", "tanh"] = "relu"
    """Between down and up."""
    scale: float = Field(1.0, gt=0)
    """What the adapter adds is multiplied by this; 4 is usual for `parallel`."""
    dropout: float = Field(0.0, ge=0, lt=1)
    """Dropout on the adapter's input."""


class VirtualTokens(MethodSection):
    """What prompt tuning and P-tuning share."""

    tokens: int = Field(20, ge=1, le=4096)
    """Virtual tokens before every text."""

    @property
    def virtual_tokens(self) -> int:
        """``tokens``: they stand in the stream."""
        return self.tokens


class PromptTuning(VirtualTokens):
    """Prompt tuning: embeddings of virtual tokens before every text (Lester et al. 2021, arXiv:2104.08691)."""

    name: Literal["prompt_tuning"] = "prompt_tuning"
    """The method's name, which selects this section."""
    init: Literal["vocabulary", "random", "text"] = "vocabulary"
    """`vocabulary`: embeddings of tokens drawn by `training.seed`. `text`: those of `init_text`."""
    init_text: str | None = None
    """The text whose token embeddings the prompt begins with, repeated or cut to `tokens`."""

    @model_validator(mode="after")
    def _text(self) -> Self:
        if (self.init == "text") != bool(self.init_text):
            raise ValueError("expects init_text with init=text, and only then")
        return self


class PTuning(VirtualTokens):
    """P-tuning: a prompt made by a small network from embeddings of its own (Liu et al. 2021, arXiv:2103.10385)."""

    name: Literal["p_tuning"] = "p_tuning"
    """The method's name, which selects this section."""
    hidden_size: int = Field(128, ge=1, le=16384)
    """The width of the network's two hidden layers."""


class PrefixTuning(MethodSection):
    """Prefix tuning: trained keys and values before every text, in every layer (Li & Liang 2021, arXiv:2101.00190)."""

    name: Literal["prefix_tuning"] = "prefix_tuning"
    """The method's name, which selects this section."""
    tokens: int = Field(20, ge=1, le=4096)
    """Virtual tokens, each with a key and a value in every layer. They take no place in the row."""
    init_text: str | None = None
    """The keys and values begin as those of this text, repeated or cut to `tokens`; random when left out."""
    projection_size: int | None = Field(None, ge=1, le=16384)
    """Train the prefix through a network of this hidden width (paper, section 4.3), which is dropped on export."""

    @model_validator(mode="after")
    def _one_origin(self) -> Self:
        if self.init_text is not None and self.projection_size is not None:
            raise ValueError(
                "has both init_text and projection_size; expected one of them, a projected prefix is random"
            )
        return self


class IA3(MethodSection):
    """(IA)³: vectors that rescale keys, values and the MLP's inner activations (Liu et al. 2022, arXiv:2205.05638)."""

    name: Literal["ia3"] = "ia3"
    """The method's name, which selects this section."""
    adapter_dtype: Dtype = "auto"
    """The dtype of the vectors. `auto` is fp32: near 1, bf16 steps are 0.4 % apart."""
    target_modules: Literal["auto"] | tuple[str, ...] = "auto"
    """Linears whose output is rescaled. `auto`: those that make keys and values, fused with the queries where the model
    has them so. `[]`: none."""
    feedforward_modules: Literal["auto"] | tuple[str, ...] = "auto"
    """Linears whose input is rescaled, also if `target_modules` names them too. `auto`: the MLP's last linear. `[]`: none."""


class BitFit(TargetedSection):
    """BitFit: the biases alone (Ben Zaken et al. 2021, arXiv:2106.10199)."""

    name: Literal["bitfit"] = "bitfit"
    """The method's name, which selects this section."""
    adapter_dtype: Dtype = "auto"
    """The dtype of the biases. `auto` is fp32: beside a large bias, bf16 has no number close enough for a small step."""
    target_modules: Targets = "all-linear"
    """`all-linear` (every linear of attention and MLP that has a bias, not the head, and every LayerNorm), or names such as
    `[q_proj, ln_1]`."""
    new_biases: bool = False
    """Give targets without a bias one that begins at zero; Llama's linears have none."""


class Full(MethodSection):
    """Full fine-tuning of an unquantised base, in the dtype that it computes in (`adapter_dtype` may say no other). In bf16
    the weights have fp32 masters: 18 bytes a parameter with gradient and moments, and 16 in fp32."""

    name: Literal["full"] = "full"
    """The method's name, which selects this section."""
    embeddings: bool = True
    """Train the embeddings and the head too."""


class Modules(MethodSection):
    """Chosen modules or layers whole, in full precision: a head, a norm, the last layers (PEFT's modules_to_save)."""

    name: Literal["modules"] = "modules"
    """The method's name, which selects this section."""
    modules: tuple[str, ...] = Field(min_length=1)
    """Module names as `[lm_head]`, `[score]` or `[layers.31]`; each matches the end of a path. A head or an embedding that
    trains is tied to the other no longer."""
    labels: tuple[Annotated[str, Field(min_length=1)], ...] = ()
    """Of a classifier whose head, `score`, the model lacks: what its outputs stand for, in order. `objective: classification` fills
    them in from the data."""

    @model_validator(mode="after")
    def _of_a_head(self) -> Self:
        if self.labels and (self.modules != ("score",) or len(set(self.labels)) < max(2, len(self.labels))):
            raise ValueError("has labels; expected two or more, each once, and modules=[score]")
        return self


class NewTokens(MethodSection):
    """New tokens: added to the tokenizer and the model; only their rows of the embedding and the head train."""

    name: Literal["new_tokens"] = "new_tokens"
    """The method's name, which selects this section."""
    tokens: tuple[Annotated[str, Field(min_length=1)], ...] = Field(min_length=1)
    """The texts of the new tokens, as `["<|tool|>", "<|end_tool|>"]`. They begin as the mean of all rows."""
    special: bool = True
    """Special tokens are left out of answers."""
    ids: tuple[Annotated[int, Field(ge=0, lt=2**31)], ...] | None = None
    """Left out: the tokenizer's next free ids. An adapter says which rows it has, and is refused on a base where the tokens
    would get others."""

    @field_validator("tokens")
    @classmethod
    def _once(cls, tokens: tuple[str, ...]) -> tuple[str, ...]:
        if twice := sorted(token for token, count in Counter(tokens).items() if count > 1):
            raise ValueError(f"names {listed(map(shown, twice))} more than once; expected each token once")
        return tokens


OneMethod = Annotated[
    Annotated[LoRA, Tag("lora")]
    | Annotated[DoRA, Tag("dora")]
    | Annotated[AdaLoRA, Tag("adalora")]
    | Annotated[Bottleneck, Tag("bottleneck")]
    | Annotated[PromptTuning, Tag("prompt_tuning")]
    | Annotated[PTuning, Tag("p_tuning")]
    | Annotated[PrefixTuning, Tag("prefix_tuning")]
    | Annotated[IA3, Tag("ia3")]
    | Annotated[BitFit, Tag("bitfit")]
    | Annotated[Full, Tag("full")]
    | Annotated[Modules, Tag("modules")]
    | Annotated[NewTokens, Tag("new_tokens")],
    Discriminator(name_of),
]


class Combined(Continuable):
    """Several methods in one run."""

    name: Literal["combined"] = "combined"
    """Written as a list of methods."""
    parts: tuple[OneMethod, ...]
    """The methods; the order does not matter."""

    @field_validator("parts", mode="before")
    @classmethod
    def _lora_by_default(cls, value: object) -> object:
        return [named(part) for part in value] if isinstance(value, list | tuple) else value

    @model_validator(mode="after")
    def _apart(self) -> Self:
        names = [part.name for part in self.parts]
        if any(part.from_ is not None for part in self.parts):
            raise ValueError(
                "has from inside a list; expected method.from alone, its adapter says which methods it has"
            )
        if not names:
            raise ValueError("is an empty list; expected at least one method")
        if twice := {name for name, count in Counter(names).items() if count > 1 and name != "bottleneck"}:
            raise ValueError(f"names {', '.join(sorted(twice))} more than once; expected each method once")
        if "full" in names and len(names) > 1:
            raise ValueError("has full beside other methods; full fine-tuning trains everything already")
        prompts = sorted({"prompt_tuning", "p_tuning", "prefix_tuning"} & set(names))
        if len(prompts) > 1:
            raise ValueError(f"has {' and '.join(prompts)}; expected one way of putting tokens before the text")
        return self

    @property
    def virtual_tokens(self) -> int:
        """Of all parts together."""
        return sum(part.virtual_tokens for part in self.parts)


AnyMethod = Annotated[
    Annotated[OneMethod, Tag("one")] | Annotated[Combined, Tag("combined")],
    Discriminator(lambda value: "combined" if name_of(value) == "combined" else "one"),
]


def named(value: object) -> object:
    """A method as a recipe may write it → with its ``name``: LoRA when there is none, ``combined`` for a list.

    Beside ``from`` it may stay without one: the adapter there says what it is.
    """
    if isinstance(value, list | tuple):
        return {"name": "combined", "parts": list(value)}
    return {"name": "lora", **value} if isinstance(value, dict) and not value.get("from") else value


def parts_of(section: object) -> tuple[Any, ...]:
    """The single methods of a section: its parts, or itself."""
    return tuple(section.parts) if isinstance(section, Combined) else (section,)


def labels_of(section: object) -> tuple[str, ...]:
    """What the outputs of a classifier's head stand for; nothing where a method section has no such head."""
    return next((part.labels for part in parts_of(section) if isinstance(part, Modules)), ())
