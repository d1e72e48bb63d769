"""A safetensors file written tensor by tensor, in any order of sizes, with one tensor in memory at a time.

    8 bytes: length of the header · the header: JSON with every tensor's dtype, shape and place · the tensors' bytes

The safetensors library writes a file from a dictionary of all its tensors; a merged model must not be in memory at once.
Shapes are known before the first value is, so the header goes first and the values follow. Knows the file format alone.
"""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Self

import torch
from torch import Tensor

from qlora.model.tensor_file import DTYPES

CODES = {dtype: code for code, dtype in DTYPES.items()}


class SafetensorsWriter:
    """Open a file for tensors that are promised by name, dtype and shape; write them in that order; leave.

    Example::

        with SafetensorsWriter(path, {"norm.weight": (torch.bfloat16, (576,))}) as file:
            file.write("norm.weight", values)
    """

    def __init__(self, path: Path, promised: dict[str, tuple[torch.dtype, tuple[int, ...]]]) -> None:
        header: dict[str, object] = {"__metadata__": {"format": "pt"}}
        start = 0
        for name, (dtype, shape) in promised.items():
            end = start + math.prod(shape) * dtype.itemsize
            header[name] = {"dtype": CODES[dtype], "shape": list(shape), "data_offsets": [start, end]}
            start = end
        text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
        text += b" " * (-len(text) % 8)  # the values begin at a multiple of 8, as the format asks
        self._waiting = list(promised.items())
        self._file = path.open("wb")
        self._file.write(len(text).to_bytes(8, "little") + text)

    def write(self, name: str, values: Tensor) -> None:
        """Append the next promised tensor. Raises ValueError when it is not the one that was promised."""
        expected, (dtype, shape) = self._waiting[0] if self._waiting else ("nothing", (None, ()))
        if name != expected or values.dtype != dtype or values.shape != shape:
            raise ValueError(
                f"'{name}' {values.dtype} {list(values.shape)} came where {expected} {dtype} {list(shape)} was due"
            )
        self._waiting.pop(0)
        if values.numel():
            self._file.write(values.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        self._file.close()
        if kind is None and self._waiting:
            raise ValueError(f"{len(self._waiting)} promised tensors were never written, first '{self._waiting[0][0]}'")
