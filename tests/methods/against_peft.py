"""PEFT beside us on the same weights: its model, its gradients under our names, and the largest differences."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import peft
import torch
from torch import nn
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

from qlora.methods.base import AdaptedModel
from tests.rounding import difference, doubled, no_worse, none_worse
from tests.tiny import TOKENS, logits_of


def plain_model(folder: Path, quantization: str = "none") -> Any:
    """The checkpoint as transformers loads it, in fp32 or in NF4 with double quantisation."""
    quantised = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.float32,
    )
    return AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, quantization_config=quantised if quantization == "nf4" else None
    )


def with_our_values(plain: nn.Module, config: peft.LoraConfig, ours: AdaptedModel) -> Any:
    """PEFT's model with our adapter's values; every one of ours has its place there, and the other way round.

    In train mode: in eval bitsandbytes packs the weights anew on some CPUs.
    """
    theirs = peft.get_peft_model(plain, config).train()
    state = ours.adapter_state()
    missing = peft.set_peft_model_state_dict(theirs, state)
    assert not missing.unexpected_keys
    assert set(peft.get_peft_model_state_dict(theirs, save_embedding_layers=False)) == set(state)
    return theirs


def gradients_of(theirs: nn.Module) -> dict[str, torch.Tensor]:
    """PEFT's gradients by our parameters' names."""
    return {
        name.removeprefix("base_model.model.").removesuffix(".weight").removesuffix(".default"): values.grad
        for name, values in theirs.named_parameters()
        if values.requires_grad and values.grad is not None
    }


def assert_as_peft(ours: AdaptedModel, theirs: nn.Module, **inputs: Any) -> str:
    """Logits and gradients, of a loss over every token, err as PEFT's own do; how far they are from PEFT's, for people."""
    found, gradients = ours.model(**inputs), {}
    found.loss.backward()
    for name, values in ours.trainable_parameters().items():
        assert values.grad is not None, name
        assert values.grad.any(), name
        gradients[name] = values.grad
    return assert_errs_as(theirs, inputs, found.logits, gradients, gradients_of)


def assert_errs_as(
    theirs: nn.Module,
    inputs: Mapping[str, Any],
    logits: torch.Tensor,
    gradients: Mapping[str, torch.Tensor],
    gradients_of: Callable[[nn.Module], dict[str, torch.Tensor]],
) -> str:
    """``logits`` and ``gradients`` are those that ``theirs`` gives for ``inputs``, to its own rounding against float64."""
    exact = doubled(theirs)
    expected, truth = theirs(**inputs), exact(**inputs)
    expected.loss.backward()
    truth.loss.backward()
    plain = gradients_of(theirs)
    no_worse(logits, expected.logits, truth.logits)
    none_worse(gradients, plain, gradients_of(exact))
    worst = max(difference(values, plain[name]) for name, values in gradients.items())
    return f"logits {difference(logits, expected.logits):.1e}, gradients {worst:.1e}"


def assert_answers_as(theirs: nn.Module, ours: AdaptedModel) -> str:
    """Our logits are those of ``theirs``, PEFT's model or a merged one, to its own rounding."""
    found, expected = logits_of(ours.model), logits_of(theirs)
    no_worse(found, expected, logits_of(doubled(theirs)))
    return f"logits {difference(found, expected):.1e}"


BATCH = {"input_ids": TOKENS, "labels": TOKENS, "use_cache": False}


@torch.no_grad()
def merge_in_place(ours: AdaptedModel) -> nn.Module:
    """The base with what was learned added to its unquantised weights; nothing is planted any more."""
    base = ours.remove().model
    for path, layer in ours.planted.items():
        weight = base.get_submodule(path).weight
        merged = layer.merged("weight", weight.detach().clone())
        base.get_submodule(path).weight = nn.Parameter(merged, requires_grad=False)  # leaves a tied one alone
    return base
