"""How trainable parameters are planted in a frozen base, and how they lie on disk.

targets ─→ lora ─→ base (METHODS, AdaptedModel) ─→ files
which      what     what every method answers to     PEFT's layout
"""

from qlora.methods.base import AdaptedModel, Method, apply_method
from qlora.methods.files import load_adapter, read_adapter_config, save_adapter
from qlora.methods.lora import LoraLinear

__all__ = [
    "AdaptedModel",
    "LoraLinear",
    "Method",
    "apply_method",
    "load_adapter",
    "read_adapter_config",
    "save_adapter",
]
