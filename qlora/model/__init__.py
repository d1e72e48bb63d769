"""A checkpoint on disk becomes a frozen base model.

shards (files → tensors) ─┐
skeleton (config → empty) ─┼─► load (filled, quantised, frozen) ─► Base
nf4 (the linears) ─────────┘       tokenizer ─────────────────────┤
a module of yours ─────────── in_memory (quantised, as it is) ─────┘
"""

from __future__ import annotations

from qlora.model.checkpoint import Checkpoint, find_model, open_checkpoint
from qlora.model.in_memory import as_base, quantise
from qlora.model.load import Base, load_base, quantised_names
from qlora.model.nf4 import Linear4bit, Linear8bit, dense_cached, dense_weight, is_linear
from qlora.model.skeleton import load_config
from qlora.model.tokenizer import load_tokenizer

__all__ = [
    "Base",
    "Checkpoint",
    "Linear4bit",
    "Linear8bit",
    "as_base",
    "dense_cached",
    "dense_weight",
    "find_model",
    "is_linear",
    "load_base",
    "load_config",
    "load_tokenizer",
    "open_checkpoint",
    "quantise",
    "quantised_names",
]
