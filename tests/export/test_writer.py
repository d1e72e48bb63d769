"""The streaming writer: the library reads back what it wrote, and a broken promise is an error."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from qlora.export.writer import SafetensorsWriter

TENSORS = {
    "odd": torch.arange(3, dtype=torch.uint8),  # the next one begins at an odd byte
    "matrix": torch.randn(4, 6).bfloat16(),
    "transposed": torch.randn(5, 3).t(),
    "scalar": torch.tensor(2.5, dtype=torch.float16),
    "empty": torch.empty(0, 4),
    "größe": torch.tensor([True, False]),
}


def test_the_library_reads_it_back(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    with SafetensorsWriter(
        path, {name: (values.dtype, tuple(values.shape)) for name, values in TENSORS.items()}
    ) as file:
        for name, values in TENSORS.items():
            file.write(name, values)
    found = load_file(path)
    assert found.keys() == TENSORS.keys()
    for name, values in TENSORS.items():
        assert found[name].dtype == values.dtype
        assert torch.equal(found[name], values)


def test_broken_promises_are_errors(tmp_path: Path) -> None:
    promised = {"a": (torch.float32, (2,)), "b": (torch.float32, (2,))}
    with SafetensorsWriter(tmp_path / "1", {}) as file, pytest.raises(ValueError, match="nothing"):
        file.write("a", torch.zeros(2))
    for name, values in [("b", torch.zeros(2)), ("a", torch.zeros(3)), ("a", torch.zeros(2).double())]:
        with pytest.raises(ValueError, match="was due"), SafetensorsWriter(tmp_path / "2", promised) as file:
            file.write(name, values)
    with (
        pytest.raises(ValueError, match="never written, first 'b'"),
        SafetensorsWriter(tmp_path / "3", promised) as file,
    ):
        file.write("a", torch.zeros(2))
