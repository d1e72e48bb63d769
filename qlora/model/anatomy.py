"""Where a family keeps its parts: the one file that knows the names that transformers gives them.

    model ─┬─ decoder ─┬─ embedding, positions
           │           └─ layers ─┬─ attention
           │                      └─ MLP, or experts
           └─ head ── what the family does to its logits

A family with other names is a change of this file alone. Every function takes the model with whatever was planted in it or
wrapped around its layers. Knows names and sizes; must not know what is quantised, what trains, or where weights wait.
"""

from __future__ import annotations

import inspect
from collections.abc import Container
from typing import TYPE_CHECKING, Any, NamedTuple

from torch import nn

from qlora.errors import ModelError

if TYPE_CHECKING:
    from transformers import PretrainedConfig

# The first path that a layer has is taken, so the more particular ones stand first.
ATTENTION = ("attention.output.dense", "self_attn", "self_attention", "attn", "attention")
"""What gives attention's output. In BERT a module adds and normalises it too, so its last linear is meant."""
MLP = ("mlp", "feed_forward", "ffn")
"""A layer's whole MLP, where that is one module."""
MLP_OUTPUT = ("output.dense", *MLP, "fc2")
"""What gives the MLP's output. OPT has the MLP's two linears in the layer itself."""
LAST_LINEAR = ("dense", "dense_4h_to_h", "down_proj")
"""The last linear of a sublayer that is handed the residual and adds it, as in Bloom and MPT."""
BEHIND = ("post_feedforward_layernorm", "post_mlp_layernorm")
"""A norm between the MLP, or the experts, and the sum that a layer ends with (Gemma, GLM-4)."""
EXPERTS = "experts"
"""A mixture's experts, in the layer's MLP or in the layer itself."""
ROUTERS = ("router", "gate", "shared_expert_gate")
"""Beside them, what says how much each of them counts."""
VISITED = ("num_experts_per_tok", "top_k_experts", "moe_topk", "moe_k")
"""What a configuration calls the number of experts that a token visits."""
BEFORE_HEAD = {"modernbert-decoder": "lm_head"}
"""By family, what stands between the decoder and the head, where that is a module: a dense layer and a norm."""
TRANSFORM = "cls.predictions.transform"
"""The same in BERT and its kin."""
RECURRENCES = ("time_shift", "mlstm_backend", "slope_rate")
"""By what is inside them, mixers of tokens without a convolution: RWKV's, xLSTM's and MiniMax' lightning attention."""
BY_PLACE = (
    "bart", "bigbird_pegasus", "blenderbot", "blenderbot-small", "marian", "mbart", "mvp", "pegasus", "plbart", "roformer", "trocr",
)  # fmt: skip
"""Families that count positions from the beginning of a row, whatever they are told."""
ALIBI = ("bloom", "mpt")
"""Families whose attention is biased by places in a row, always; Falcon's is where its configuration says so."""
ACROSS = ("deepseek_v4", "glm5_next_text", "inkling2_text")
"""Families that mix neighbouring tokens of a row by code of their own: DeepSeek V4 and GLM 5 Next look at blocks of keys, Inkling 2 convolves."""
OWN_USE = ("prediction_coefs", "correction_coefs", "o_a_proj")
"""Linears whose weight a family's code uses by itself, by the last part of their path: Gemma 3n clamps it, DeepSeek V4 takes it in groups."""
TO_ENCODER = ("encoder_attn", "crossattention")
"""Attention to an encoder, which text alone never goes through, as parts of paths: of BART's decoder taken alone, for example."""
POSITION_TABLES = ("wpe", "embed_positions")
"""Learned positions, by the last part of their path."""


class Sizes(NamedTuple):
    """The sizes of a decoder, in numbers."""

    layers: int
    hidden: int
    attention: int
    """Of all query heads together; on average, where layers differ."""
    kv_heads: int
    """The most that a layer has."""
    head_dim: int
    """The largest."""
    vocabulary: int


def text_config(model: Any) -> Any:
    """The configuration of a model's (or a configuration's) text decoder: the nested one where there are several."""
    config = getattr(model, "config", model)
    return config.get_text_config(decoder=True) if hasattr(config, "get_text_config") else config


def sizes(model: nn.Module | PretrainedConfig) -> Sizes:
    """The sizes that a configuration names, with transformers' defaults for those that it leaves out."""
    config = text_config(model)
    if missing := [name for name in ("num_hidden_layers", "hidden_size", "vocab_size") if not hasattr(config, name)]:
        raise ModelError(
            f"The configuration of this {config.model_type} model names no {' or '.join(missing)}, so that nobody could say what "
            "it needs; take another model, or report the model type."
        )
    by_layer = [_heads(one) for one in (config.per_layer_config if differs_by_layer(config) else [config])]
    return Sizes(
        layers=config.num_hidden_layers,
        hidden=config.hidden_size,
        attention=sum(heads * head_dim for heads, _, head_dim in by_layer) // len(by_layer),
        kv_heads=max(kv_heads for _, kv_heads, _ in by_layer),
        head_dim=max(head_dim for _, _, head_dim in by_layer),
        vocabulary=config.vocab_size,
    )


def _heads(config: Any) -> tuple[int, int, int]:
    """(query heads, key-value heads, size of a head) of a layer."""
    heads = getattr(config, "num_attention_heads", None) or 0  # Mamba has none
    kv_heads = (heads and getattr(config, "num_key_value_heads", None)) or heads
    return heads, kv_heads, heads and (getattr(config, "head_dim", None) or config.hidden_size // heads)


def differs_by_layer(model: nn.Module | PretrainedConfig) -> bool:
    """Whether sizes are a layer's and not the model's (Gemma 4's heads); transformers then refuses to name the model's."""
    return bool(getattr(text_config(model), "is_heterogeneous", False))


def layer_kinds(model: nn.Module | PretrainedConfig) -> list[str | None]:
    """For each layer what a hybrid calls it, as ``sliding_attention`` or ``full_attention``; None where all are alike."""
    config = text_config(model)
    return list(getattr(config, "layer_types", None) or [None] * config.num_hidden_layers)


def embeds_by_layer(model: nn.Module | PretrainedConfig) -> bool:
    """Whether a token has an embedding for each layer beside the usual one, all of them in one table (Gemma 3n, Gemma 4)."""
    return bool(getattr(text_config(model), "hidden_size_per_layer_input", None))


def position_limit(model: nn.Module | PretrainedConfig) -> int | None:
    """How many positions a text may have; None where the configuration sets no bound.

    Where rotary tables are stretched, ``max_position_embeddings`` may still name the length before: Qwen2.5 with YaRN
    has 32,768 there and reaches 4 times as far.
    """
    config = text_config(model)
    named = getattr(config, "max_position_embeddings", None)
    if not isinstance(named, int) or named < 1:
        return None
    rope = getattr(config, "rope_parameters", None) or {}
    # Gemma 3 has a table for each kind of layer
    tables = [rope, *(table for table in rope.values() if isinstance(table, dict))]
    reach = [(table.get("factor") or 1) * (table.get("original_max_position_embeddings") or named) for table in tables]
    return max(named, *(int(positions) for positions in reach))


def why_not_packed(model: nn.Module | PretrainedConfig) -> str | None:
    """Why examples cannot share a row, where the family alone says so; ``check_packing`` finds what it does not say."""
    config = text_config(model)
    if config.model_type in BY_PLACE:
        return "its positions count from the beginning of a row"
    if config.model_type in ALIBI or getattr(config, "alibi", False):
        return (
            "its attention is biased by places in a row (ALiBi), which 16 bits cannot tell apart far from its beginning"
        )
    if config.model_type in ACROSS:
        return "it mixes neighbouring tokens by code of its own"
    return "its masks are its own" if config.model_type == "openai-gpt" else None


def sees_ahead(model: nn.Module | PretrainedConfig) -> bool:
    """Whether its configuration says that tokens see what follows them, of text too: PaliGemma's, EmbeddingGemma's.
    ``check_causal`` finds what it does not say."""
    return getattr(text_config(model), "use_bidirectional_attention", None) in (True, "all")


def logit_scale(model: nn.Module | PretrainedConfig) -> tuple[float, float | None]:
    """(what logits are multiplied by, the cap of their tanh or None).

    A wrapper may leave out what its language model would do alone: Aya Vision gives Cohere's logits unscaled.
    """
    config = text_config(model)
    done = _fields_of_forward(model) if config is not getattr(model, "config", model) else None

    def named(field: str) -> Any:
        return getattr(config, field, None) if done is None or field in done else None

    multiplier = 1.0
    for field in ("logit_scale", "output_multiplier"):  # Cohere and Muse Glimmer multiply
        multiplier *= named(field) or 1.0
    for field in ("logits_scaling", "logits_mup_width_multiplier"):  # Granite and Inkling divide
        multiplier /= named(field) or 1.0
    return multiplier, named("final_logit_softcapping")  # Gemma 2


def logit_rows(model: nn.Module | PretrainedConfig) -> int | None:
    """How many rows of the head a family gives logits of, where it cuts off those that only fill it up (Inkling)."""
    return getattr(text_config(model), "unpadded_vocab_size", None)


def _fields_of_forward(model: Any) -> set[str]:
    """The names that the forward of ``model``, or of the whole language model that it hands over to, reads."""
    found: set[str] = set()
    for module in (model, _asked(model, "get_decoder")):
        code = inspect.unwrap(type(module).forward).__code__  # type: ignore[union-attr]
        found |= {*code.co_names, *(value for value in code.co_consts if isinstance(value, str))}
    return found


def decoder(model: nn.Module) -> nn.Module:
    """The module that turns token ids into hidden states; the model itself where it names none, as transformers has it.

    Where a model names a whole causal language model, as Llama 4 does, that one's.
    """
    found = _asked(model, "get_decoder") or model
    while (inner := _asked(found, "get_decoder")) is not None and inner is not found:
        found = inner
    if isinstance(found, nn.Linear):  # ModernBERT calls its head so
        found = getattr(model, str(model.base_model_prefix))
    inner = getattr(found, "model", None)
    if isinstance(inner, nn.Module) and _asked(found, "get_output_embeddings") is not None:
        return inner  # Llama 4's and Kosmos 2.5's language models name themselves
    return found


def before_head(model: nn.Module) -> nn.Module | None:
    """What hidden states go through before the head; None for most families."""
    path = BEFORE_HEAD.get(str(getattr(getattr(model, "config", None), "model_type", "")), TRANSFORM)
    return None if at(model, path) is None else model.get_submodule(path)


def embedding(model: nn.Module) -> nn.Module | None:
    """The input embedding; None where the model has none."""
    return _asked_inside(model, "get_input_embeddings")


def embedding_rows(model: nn.Module) -> int:
    """How many tokens have an input embedding."""
    rows: Any = embedding(model)
    return int(rows.num_embeddings)


def head(model: nn.Module) -> nn.Module | None:
    """The module that turns hidden states into logits; None where the model has none."""
    return _asked_inside(model, "get_output_embeddings")


def score(model: nn.Module) -> nn.Module | None:
    """The head of a classifier, as transformers and PEFT call it; None where the model has none."""
    found = getattr(model, "score", None)
    return found if isinstance(found, nn.Module) else None


def _asked_inside(model: nn.Module, name: str) -> nn.Module | None:
    """What ``model`` names, or else the whole language model inside it, as in Nemotron-H Omni."""
    found = _asked(model, name)
    return _asked(_asked(model, "get_decoder"), name) if found is None else found


def _asked(model: Any, name: str) -> nn.Module | None:
    ask = getattr(model, name, None)
    try:
        return None if ask is None else ask()
    except NotImplementedError:  # a model of images, asked for the embedding of its tokens
        return None


def layers(model: nn.Module) -> nn.ModuleList:
    """The decoder layers of a causal language model. Raises ModelError when it has no such list."""
    depth = getattr(text_config(model), "num_hidden_layers", None)
    # the outermost of that length: the network of a P-tuning may have one too
    found = [
        (path.count("."), module)
        for path, module in decoder(model).named_modules()
        if isinstance(module, nn.ModuleList) and len(module) == depth
    ]
    if found:
        return min(found, key=lambda place: place[0])[1]
    raise ModelError(
        f"No list of {depth or 'its'} decoder layers was found in this {kind(model)} model; set training.recompute=none."
    )


def kind(model: Any) -> str:
    """What a message calls the model's family: its ``model_type``."""
    return str(model.config.model_type)


def first(module: nn.Module, paths: tuple[str, ...]) -> str | None:
    """The first of ``paths``, as of ``ATTENTION``, that leads to a module inside ``module``; None where no known name fits."""
    return next((path for path in paths if at(module, path) is not None), None)


def at(module: nn.Module, path: str) -> nn.Module | None:
    """The module at ``path`` inside ``module``, or None; where something is planted on the way, what stood there."""
    found = innermost(module)
    for name in path.split("."):
        inside = getattr(found, name, None)
        if not isinstance(inside, nn.Module):
            return None
        found = innermost(inside)
    return found


def innermost(module: nn.Module) -> nn.Module:
    """What stood here before anything was planted on it: whatever is planted holds that as its ``base``."""
    while isinstance(base := getattr(module, "base", None), nn.Module):
        module = base
    return module


def gives_positions(path: str, module: nn.Module) -> bool:
    """Whether the module at ``path`` turns positions into rotations or embeddings."""
    return "RotaryEmbedding" in type(innermost(module)).__name__ or path.rpartition(".")[2] in POSITION_TABLES


def is_mixture(model: nn.Module | PretrainedConfig) -> bool:
    """Whether its configuration names experts; a small one of the family may have dense layers alone all the same."""
    config = text_config(model)
    counts = ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts")
    return any(getattr(config, name, None) not in (None, 0, 1) for name in counts)


def fused_experts(model: nn.Module) -> list[str]:
    """The parameters that hold the matrices of several experts in one tensor [experts, …, …], as transformers 5 has them.

    Griffin's gates are such tensors too, of one matrix by head.
    """
    return [
        f"{path}.{name}"
        for path, module in model.named_modules()
        if "expert" in f"{path} {type(module).__name__}".lower()
        for name, values in module.named_parameters(recurse=False)
        if values.dim() == 3 and min(values.shape[1:]) > 1
    ]


def experts_visited(model: nn.Module | PretrainedConfig, count: int) -> int:
    """How many of ``count`` experts a token visits; all where the configuration does not say."""
    config = text_config(model)
    return next((int(value) for name in VISITED if (value := getattr(config, name, None))), count)


def is_router(path: str, paths: Container[str]) -> bool:
    """Whether what stands at ``path`` belongs to a mixture's router; ``paths`` are all of the model's.

    Example: ``model.layers.0.mlp.gate``, and not ``model.layers.0.self_attn.gate``
    """
    parts = path.split(".")
    return any(part in ROUTERS and ".".join([*parts[:place], EXPERTS]) in paths for place, part in enumerate(parts))


def is_mixer(module: nn.Module) -> bool:
    """Whether a state runs through it from token to token: most such families have a convolution in front of it."""
    return any(isinstance(child, nn.Conv1d) for child in module.children()) or any(
        hasattr(module, name) for name in RECURRENCES
    )


def read_as_weights(model: nn.Module) -> list[str]:
    """Linears that are never called: Mamba-1 reads the weight of its time steps itself (Mamba, Falcon Mamba, Jamba)."""
    return [
        f"{path}.dt_proj"
        for path, module in model.named_modules()
        if any(isinstance(child, nn.Conv1d) for child in module.children()) and at(module, "dt_proj") is not None
    ]


def path_of(model: nn.Module, module: nn.Module | None) -> str | None:
    """The path at which ``module`` stands in ``model``; None where it does not."""
    return next((path for path, part in model.named_modules() if part is module), None)


def tied_names(model: nn.Module) -> dict[str, str]:
    """The weights that are another one by the model's own word: ``{"lm_head.weight": "model.embed_tokens.weight"}``."""
    return getattr(model, "all_tied_weights_keys", None) or {}


def share_blocks(model: nn.Module) -> None:
    """Where the weights of a whole block are another one's by the model's own word, as in the layers of Zamba, put that other
    block in its place, so that it is packed and lies there once; those weights are tied no longer."""
    tied, modules = tied_names(model), dict(model.named_modules())
    for path, block in list(modules.items()):
        inside = {f"{path}.{name}": name for name, _ in block.named_parameters()}
        first = next((tied.get(name, "").removesuffix(f".{inside[name]}") for name in inside), "")
        other = modules.get(first)
        if other is None or not next(block.children(), None) or _plain_values(block) != _plain_values(other):
            continue
        if all(tied.get(name) == f"{first}.{end}" for name, end in inside.items()):
            model.set_submodule(path, other)
            for name in inside:
                del tied[name]


def _plain_values(block: nn.Module) -> list[tuple[str, type, dict[str, object]]]:
    """What a block's modules are told beside weights: the number of a layer, for example."""
    plain = (bool, int, float, str, type(None))
    return [
        (path, type(module), {key: value for key, value in vars(module).items() if isinstance(value, plain)})
        for path, module in block.named_modules()
    ]


def repeated(model: nn.Module) -> set[str]:
    """The paths of modules that stand in several places: in a block that layers share."""
    first: dict[int, str] = {}
    found = set()
    for path, module in model.named_modules(remove_duplicate=False):
        if first.setdefault(id(module), path) != path:
            found |= {path, first[id(module)]}
    return found


def is_tied(model: nn.Module) -> bool:
    """Whether the output head and the input embedding are one matrix; on meta, where it is not yet, the model's word counts."""
    one, other = (getattr(module, "weight", None) for module in (embedding(model), head(model)))
    if one is None or one is other:
        return one is not None
    return bool(one.is_meta) and f"{path_of(model, head(model))}.weight" in tied_names(model)
