"""Handing a trained model over: merged with its base into one plain checkpoint or GGUF file, or its adapter alone."""

from qlora.export.adapter import export_adapter
from qlora.export.gguf import BY_QUANTISER, TYPES, Written, export_gguf, export_gguf_adapter
from qlora.export.merge import Merged, merge
from qlora.export.nf4 import export_nf4

__all__ = [
    "BY_QUANTISER",
    "TYPES",
    "Merged",
    "Written",
    "export_adapter",
    "export_gguf",
    "export_gguf_adapter",
    "export_nf4",
    "merge",
]
