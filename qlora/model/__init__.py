"""A checkpoint on disk becomes a frozen base model.

hub (a name) ─► checkpoint (its files) ─► skeleton (an empty model) ─► load (filled, quantised, frozen) ─► base
                    │    │                    │          │
                    │    config       names, towers      nf4 (the linears), anatomy (where the family's parts are)
                    tokenizer
a module of yours ─► in_memory (quantised, as it is) ────────────────────────────────────────────────────► base

What stays on the device while training, and what does not, is the room above: ``residence``.
"""

from __future__ import annotations

from qlora.model.base import Base
from qlora.model.checkpoint import Checkpoint, find_model, open_checkpoint
from qlora.model.config import load_config
from qlora.model.in_memory import as_base, quantise
from qlora.model.load import quantised_names
from qlora.model.nf4 import Linear4bit, Linear8bit, dense_cached, dense_weight, is_linear
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
    "load_config",
    "load_tokenizer",
    "open_checkpoint",
    "quantise",
    "quantised_names",
]
