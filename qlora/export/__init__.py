"""Handing a trained model over: merged with its base into one plain checkpoint or GGUF file, or its adapter alone."""

from __future__ import annotations

from qlora.files.late import late_names

__getattr__, __all__ = late_names(__file__)
