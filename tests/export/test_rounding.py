"""Rounding to 16 bits: a change smaller than the grid's steps is kept by many weights together, and the grid itself stays."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from qlora.export.merged import merge
from qlora.export.rounding import PIECE, dithered
from qlora.methods.base import apply_method
from qlora.methods.files import save_adapter
from qlora.recipe import LoRA
from tests.tiny import stir, tiny_base, tiny_checkpoint

HALF = [torch.bfloat16, torch.float16]


def steps(values: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """How far apart two numbers of ``dtype`` are there; ``values`` are normal."""
    return 2.0 ** (values.abs().log2().floor()) * torch.finfo(dtype).eps


@pytest.mark.parametrize("dtype", HALF)
def test_what_is_on_the_grid_stays_there(dtype: torch.dtype) -> None:
    values = torch.randn(300, 77, generator=torch.Generator().manual_seed(0)).to(dtype)
    values[0, :4] = torch.tensor([0.0, -0.0, torch.finfo(dtype).max, torch.finfo(dtype).min])
    assert torch.equal(dithered(values.float(), dtype), values)
    assert torch.equal(dithered(values, dtype), values)
    assert dithered(values.float(), torch.float32).dtype == torch.float32


@pytest.mark.parametrize("dtype", HALF)
def test_each_number_becomes_one_of_its_neighbours(dtype: torch.dtype) -> None:
    values = torch.randn(PIECE + 999, generator=torch.Generator().manual_seed(0))
    values = values[values.abs() > 2**-13]
    found = dithered(values, dtype).float()
    assert ((found - values).abs() < steps(values, dtype)).all()
    up = (found - values).sign()
    assert (up > 0).any()
    assert (up < 0).any()


@pytest.mark.parametrize("dtype", HALF)
@pytest.mark.parametrize("part", [0.03, 0.3, -0.45])
def test_on_average_a_change_below_half_a_step_is_kept(part: float, dtype: torch.dtype) -> None:
    """Rounded to the nearest number it is gone. Of n numbers the mean errs by less than what n fair draws err by, 1 / 2√n of a step, five
    times over."""
    grid = torch.rand(64, 4096, generator=torch.Generator().manual_seed(0)).add(1.0).to(dtype).float()
    grid = grid[(grid > 1) & (grid < 2 - 2 * torch.finfo(dtype).eps)]
    step = torch.finfo(dtype).eps
    changed = grid + part * step
    assert torch.equal(changed.to(dtype).float(), grid)
    kept = (dithered(changed, dtype).float() - grid).mean() / step
    assert abs(kept.item() - part) < 5 / (2 * len(grid) ** 0.5)


def test_a_merge_keeps_an_adapter_that_is_smaller_than_the_grids_steps(tmp_path: Path) -> None:
    """What reaches the outputs of the merged weights is what the adapter adds; rounded to the nearest number most of it would not."""
    folder = tiny_checkpoint(tmp_path / "base", dtype=torch.bfloat16)
    model = apply_method(tiny_base(folder, "none"), LoRA(r=4, target_modules=("up_proj",)))
    stir(model, 0.004)
    save_adapter(model, tmp_path / "adapter")
    merge(folder, tmp_path / "adapter", tmp_path / "merged", compute_dtype="fp32", quantization="none", dtype="bf16")
    before, after = (load_file(place / "model.safetensors") for place in (folder, tmp_path / "merged"))
    ((path, layer),) = list(model.planted.items())[:1]
    name = f"{path}.weight"
    lora_A, lora_B = layer.low_rank()  # type: ignore[operator]
    added = (lora_B.double() @ lora_A.double()).detach()
    weight, merged = before[name].double(), after[name].double()
    nearest = (weight + added).float().bfloat16().double()
    assert (nearest == weight).double().mean() > 0.5  # what this is about
    # along the directions that the adapter reads, a sum over all inputs
    reads = lora_A.double().detach().T

    def kept(rounded: torch.Tensor) -> float:
        return float(((rounded - weight) @ reads).mul(added @ reads).sum() / (added @ reads).pow(2).sum())

    assert abs(kept(merged) - 1) < 0.2
    assert abs(kept(merged) - 1) < abs(kept(nearest) - 1) / 2
