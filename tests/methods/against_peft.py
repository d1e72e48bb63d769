"""PEFT beside us on the same weights: its model, its gradients under our names, and the largest differences."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import peft
import torch
from torch import nn
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

from qlora.methods import AdaptedModel
from tests.methods.tiny import TOKENS, difference


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


def worst_of(ours: AdaptedModel, theirs: nn.Module, **inputs: Any) -> tuple[float, float]:
    """(largest difference of the logits, largest difference of a gradient), for a loss over every token."""
    found = ours.model(**inputs)
    expected = theirs(**inputs)
    found.loss.backward()
    expected.loss.backward()
    gradients = gradients_of(theirs)
    assert gradients.keys() == ours.trainable_parameters().keys()
    assert all(values.grad.any() for values in ours.trainable_parameters().values())
    worst = max(difference(values.grad, gradients[name]) for name, values in ours.trainable_parameters().items())
    return difference(found.logits, expected.logits), worst


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
