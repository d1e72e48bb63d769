"""Handing a trained model over: merged with its base into one plain checkpoint."""

from qlora.export.adapter import export_adapter
from qlora.export.merge import Merged, merge

__all__ = ["Merged", "export_adapter", "merge"]
