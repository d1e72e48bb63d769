"""One safetensors file: its header is checked whole before a tensor is believed, and tensors are read one at a time.

    8 bytes: the header's length ► the header: JSON ► the tensors' bytes, without gap or overlap

The file is read and not mapped. Mapped pages count as this process's memory until the file is closed, which would make
"one tensor at a time" untrue, and a file that is replaced under a mapping ends the process with SIGBUS. Knows the format;
must not know which files belong together or what a tensor is for. What is wrong is a ``Fault``, the end of a sentence.
"""

from __future__ import annotations

import math
import os
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from qlora.errors import DoesNotFitError
from qlora.files.strangers import Fault, json_object, shown
from qlora.machine.device import total_memory_bytes
from qlora.machine.disk import bytes_text

# Bytes of a header, 200,000 tensors; the format's own library takes 100 MB. As Python objects it may be thirty times that.
MAX_HEADER = 24 * 1024**2
MAX_DIMENSIONS = 16
DTYPES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16,
    "I64": torch.int64, "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8, "BOOL": torch.bool,
    "F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2,
}  # fmt: skip


class Entry(NamedTuple):
    """One tensor in a header: what it is without reading it."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    file: Path
    start: int
    """Where its bytes begin in the file."""

    @property
    def bytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize

    def part(self, number: int) -> Entry:
        """One of the tensors that lie in it along its first dimension."""
        inside = self._replace(shape=self.shape[1:])
        return inside._replace(start=self.start + number * inside.bytes)


class Header(NamedTuple):
    """What a file says of itself."""

    entries: dict[str, Entry]
    """Every tensor by its name, in the order of their bytes."""
    metadata: dict[str, str]


def read_header(path: Path) -> Header:
    """Read and check the header of a file. Raises Fault where it is damaged or contradicts itself, and OSError."""
    if path.exists() and not path.is_file():  # a pipe would be waited for
        raise Fault("it is no ordinary file")
    with path.open("rb") as file:
        size = os.fstat(file.fileno()).st_size
        length = int.from_bytes(file.read(8), "little")
        if size < 8 or length < 2:
            raise Fault("it does not begin with a safetensors header")
        if length > MAX_HEADER:
            raise Fault(f"it does not begin with a safetensors header of at most {MAX_HEADER:,} bytes")
        if 8 + length > size:
            raise Fault(f"it ends inside its header, at {size:,} bytes")
        content = file.read(length)
    header = json_object(content, strict=True)
    entries, end = _entries(header, path, 8 + length)
    if size != 8 + length + end:
        raise Fault(
            f"it is {'truncated' if size < 8 + length + end else 'too long'}: its header promises {8 + length + end:,} "
            f"bytes and it has {size:,}"
        )
    return Header(entries, header.get("__metadata__", {}))


def _entries(header: dict[str, Any], path: Path, data: int) -> tuple[dict[str, Entry], int]:
    """The tensors of a header whose data begins at byte ``data``, in their order on disk, and how many bytes they take."""
    entries: dict[str, Entry] = {}
    spans: list[tuple[int, int, str]] = []
    for name, fields in header.items():
        if name == "__metadata__":
            if not isinstance(fields, dict) or not all(isinstance(value, str) for value in fields.values()):
                raise Fault("its metadata is not text by text")
            continue
        try:
            name.encode()
        except UnicodeEncodeError:
            raise Fault(f"it has the name {shown(name)}, which is no text") from None
        if not isinstance(fields, dict) or fields.keys() != {"dtype", "shape", "data_offsets"}:
            raise Fault(f"{shown(name)} is {shown(fields)}; expected dtype, shape and data_offsets")
        dtype, shape, offsets = fields["dtype"], fields["shape"], fields["data_offsets"]
        if not isinstance(dtype, str) or dtype not in DTYPES:
            raise Fault(f"{shown(name)} has the dtype {shown(dtype)}, which is not supported")
        # true and 2.0 are numbers in Python, -2 · -2 elements are four, and of 10⁶ long numbers the product takes hours
        if not _counts(shape) or len(shape) > MAX_DIMENSIONS or math.prod(max(size, 1) for size in shape) >= 2**60:
            raise Fault(f"{shown(name)} has the shape {shown(shape)}; expected sizes, of at most 2⁶⁰ elements")
        if not _counts(offsets) or len(offsets) != 2 or offsets[0] > offsets[1]:
            raise Fault(f"{shown(name)} has the data_offsets {shown(offsets)}; expected where it begins and ends")
        start, end = offsets
        entry = Entry(DTYPES[dtype], tuple(shape), path, data + start)
        if end - start != entry.bytes:
            raise Fault(f"{shown(name)} takes {end - start:,} bytes where its shape needs {entry.bytes:,}")
        entries[name] = entry
        spans.append((start, end, name))
    spans.sort()
    reached = 0
    for start, end, name in spans:
        if start != reached:
            raise Fault(f"there is a gap or overlap at byte {start:,}, before {shown(name)}")
        reached = end
    return {name: entries[name] for _, _, name in spans}, reached


def _counts(values: object) -> bool:
    """Whether ``values`` is a list of whole numbers that fit into 63 bits."""
    return isinstance(values, list) and all(type(value) is int and 0 <= value < 2**63 for value in values)


def read_tensor(entry: Entry) -> Tensor:
    """One tensor, on the CPU, in memory of its own. Raises Fault when its file is shorter now, and OSError."""
    raw = torch.empty(entry.bytes, dtype=torch.uint8)
    with entry.file.open("rb") as file:
        file.seek(entry.start)
        count = file.readinto(raw.numpy().data)
    if count != entry.bytes:
        raise Fault("it became shorter while it was read")
    return raw.view(entry.dtype).reshape(entry.shape)


def read_tensors(path: Path) -> dict[str, Tensor]:
    """Every tensor of a file, by its name. Raises Fault and OSError, and DoesNotFitError when they need more memory than is
    free: a file with holes takes no disk and any amount of memory."""
    entries = read_header(path).entries
    needed, (free, _) = sum(entry.bytes for entry in entries.values()), total_memory_bytes(torch.device("cpu"))
    if 0 < free < needed:
        raise DoesNotFitError(
            f"'{path}' holds {bytes_text(needed)} of tensors and {bytes_text(free)} of memory are free; make room, or go on on a machine with more."
        )
    return {name: read_tensor(entry) for name, entry in entries.items()}
