"""How trainable parameters are planted in a frozen base, and how an adapter looks on disk and in merged weights.

targets ─→ method, layout, merge ─→ lora, … ─→ base (METHODS, AdaptedModel) ─→ files
which      what all answer to       a file each    the model with methods in it      PEFT's layout
                                                                                       │
                                        switching (Adapters: several on one base) ←────┴──→ combining (several become one)
"""

from qlora.methods.base import METHODS, AdaptedModel, apply_method
from qlora.methods.combining import combine, save_combined
from qlora.methods.files import save_adapter
from qlora.methods.loading import load_adapter
from qlora.methods.lora import LoraLinear
from qlora.methods.method import Method
from qlora.methods.peft_config import read_adapter_config
from qlora.methods.planted import Planted
from qlora.methods.switching import Adapters

__all__ = [
    "METHODS",
    "AdaptedModel",
    "Adapters",
    "LoraLinear",
    "Method",
    "Planted",
    "apply_method",
    "combine",
    "load_adapter",
    "read_adapter_config",
    "save_adapter",
    "save_combined",
]
