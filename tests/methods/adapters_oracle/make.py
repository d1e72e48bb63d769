"""Makes the recorded outputs of the library ``adapters`` in this folder, which tests/methods/test_bottleneck.py reads.

The library pins an older transformers than this package needs, so it runs in an environment of its own:

    python3 -m venv /tmp/adapters-venv
    /tmp/adapters-venv/bin/pip install torch==2.13.0 adapters==1.3.0
    /tmp/adapters-venv/bin/python tests/methods/adapters_oracle/make.py

For every case one file ``CASE.safetensors``: ``input_ids`` [2, 7], ``output`` (logits or last hidden states), ``loss``,
and for each tensor of the library's adapter ``weight/NAME`` and ``gradient/NAME``, the derivative of that loss. The base
model is not recorded: ``fill`` gives every weight by a formula. ``versions.json`` says what made the files.
"""

from __future__ import annotations

import json
import zlib
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor, nn

HERE = Path(__file__).parent
SIZE = 4  # the bottleneck's width; the library is given 32 / 4 as its reduction factor
VOCABULARY = 40
INPUT_IDS = (torch.arange(14) * 11 % VOCABULARY).reshape(2, 7)

FAMILIES: dict[str, tuple[str, str, dict[str, Any]]] = {
    "llama": ("LlamaConfig", "LlamaForCausalLM", {
        "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
        "num_key_value_heads": 2, "max_position_embeddings": 64, "tie_word_embeddings": False}),
    "gpt2": ("GPT2Config", "GPT2LMHeadModel", {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64}),
    "bert": ("BertConfig", "BertModel", {
        "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
        "max_position_embeddings": 64}),
    "distilbert": ("DistilBertConfig", "DistilBertModel", {
        "dim": 32, "hidden_dim": 48, "n_layers": 2, "n_heads": 4, "max_position_embeddings": 64}),
}  # fmt: skip

# case → the library's config class and what differs from its defaults
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama-houlsby": ("DoubleSeqBnConfig", {}),
    "llama-pfeiffer": ("SeqBnConfig", {}),
    "llama-lin": ("SeqBnConfig", {"ln_before": True}),
    "gpt2-houlsby": ("DoubleSeqBnConfig", {"non_linearity": "gelu"}),
    "gpt2-lin": ("SeqBnConfig", {"ln_before": True}),
    "bert-houlsby": ("DoubleSeqBnConfig", {"non_linearity": "tanh", "scaling": 2.0}),
    "distilbert-houlsby": ("DoubleSeqBnConfig", {"non_linearity": "relu"}),
    "distilbert-parallel": ("ParBnConfig", {}),
}


def build(family: str) -> Any:
    """A tiny model of ``family`` in eval mode, its weights those of the formula."""
    config_name, model_name, sizes = FAMILIES[family]
    config = getattr(transformers, config_name)(
        vocab_size=VOCABULARY, pad_token_id=0, bos_token_id=1, eos_token_id=2, **sizes
    )
    model = getattr(transformers, model_name)(config).eval()
    fill(model)
    return model


@torch.no_grad()
def fill(model: nn.Module) -> None:
    """Give every parameter values that depend on its name and shape alone."""
    for name, values in model.named_parameters():
        values.copy_(formula(name, values.shape))


def formula(name: str, shape: torch.Size) -> Tensor:
    """Values in ±0.3, for the weights of norms 1 ± 0.3: sines, computed in fp64 so that every machine rounds the same."""
    phase = zlib.crc32(name.encode()) % 1000
    at = torch.arange(shape.numel(), dtype=torch.float64)
    values = 0.3 * torch.sin(0.7 * at + 0.013 * at**2 + phase).reshape(shape)  # squared: else a matrix has rank 2
    norm = any(word in name.lower() for word in ("norm", "ln_")) and name.endswith("weight")
    return (1 + values if norm else values).float()


def output_of(model: Any) -> Tensor:
    """Logits [2, 7, vocabulary], or the last hidden states [2, 7, d] of a model without a head."""
    answer = model(input_ids=INPUT_IDS)
    found = answer.logits if hasattr(answer, "logits") else answer.last_hidden_state
    assert isinstance(found, Tensor)
    return found


def loss_of(output: Tensor) -> Tensor:
    """A fixed linear function of the output, so that every element has a gradient of its own."""
    return (output * formula("probe", output.shape)).sum()


def record(case: str) -> dict[str, Tensor]:
    """What the library makes of ``case``."""
    import adapters

    kind, options = CASES[case]
    model = build(case.partition("-")[0])
    adapters.init(model)
    model.add_adapter("oracle", getattr(adapters, kind)(reduction_factor=32 / SIZE, **options), set_active=True)
    model.train_adapter("oracle")
    model.eval()
    parts = {name: values for name, values in model.named_parameters() if values.requires_grad}
    with torch.no_grad():
        for name, values in parts.items():
            values.copy_(formula(name, values.shape))
    output = output_of(model)
    loss = loss_of(output)
    loss.backward()
    tensors = {"input_ids": INPUT_IDS, "output": output.detach(), "loss": loss.detach()}
    for name, values in parts.items():
        assert values.grad is not None, name
        tensors[f"weight/{name}"] = values.detach()
        tensors[f"gradient/{name}"] = values.grad
    return tensors


def main() -> None:
    """Write the files of all cases."""
    import adapters
    from safetensors.torch import save_file

    for case in CASES:
        tensors = record(case)
        save_file(tensors, HERE / f"{case}.safetensors")
        print(case, f"{len(tensors)} tensors, loss {tensors['loss'].item():.4f}")
    versions = {module.__name__: module.__version__.partition("+")[0] for module in (torch, transformers, adapters)}
    (HERE / "versions.json").write_text(json.dumps(versions, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
