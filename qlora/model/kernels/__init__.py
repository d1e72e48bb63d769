"""Fused operators in Triton, each with a plain way beside it; ``fuse`` puts them where a model computes the same."""

from qlora.model.kernels.fusing import fuse, fused

__all__ = ["fuse", "fused"]
