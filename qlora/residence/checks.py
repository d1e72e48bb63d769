"""A check before a run spends anything: the layers behind their recompute boundary against the plain ones.

A family may do something that the boundary does not know; without a check its gradients would be wrong in silence. Knows a
model and what stands around its layers; must not know adapters, optimizers or where batches come from.
"""

from __future__ import annotations

import sys

import torch
from torch import nn

from qlora.errors import ModelError, QloraError, first_line
from qlora.machine.device import ran_out_of_memory
from qlora.model import anatomy
from qlora.model.loss import hidden_states
from qlora.residence.layers import kept_by, recomputing
from qlora.residence.tiles import TiledMLP, tiles_of


def check_boundary(model: nn.Module, ids: list[int], rows: int, at_once: int, packed: bool) -> None:
    """Raise ModelError unless the recompute boundary changes no hidden state of a model in eval mode.

    ``rows`` short rows go through it as in training, ``at_once`` at once; the last of these micro-batches is compared with
    itself through the plain layers. A layer may get something that the boundary cuts wrongly, or should cut and does not
    know (see ``_cut`` in ``layers.py``); an MLP in tiles may look at more than one token, so its tiles are small here.
    All rows differ, and with ``packed`` each restarts its positions elsewhere. How far rounding parts two right ways is
    measured with the same rows four times over, which go through other kernels: in bf16 that can be much.
    """
    device = next(model.parameters()).device
    length = 9 if rows == 8 else 8  # a square table that all rows share is not to look like one with a row for each
    restarts = [1 + row % (length - 1) if packed else length for row in range(rows)]
    batch = {
        "input_ids": [[ids[(row + at) % len(ids)] for at in range(length)] for row in range(rows)],
        "position_ids": [[*range(restart), *range(length - restart)] for restart in restarts],
    }
    whole = {key: torch.tensor(value, device=device) for key, value in batch.items()}
    last = slice((rows - 1) // at_once * at_once, rows)
    with torch.no_grad(), tiles_of(model, sys.maxsize):
        plain = hidden_states(model, {key: value[last] for key, value in whole.items()}).float()
        again = hidden_states(model, {key: value[last].repeat(4, 1) for key, value in whole.items()}).float()
    try:
        with torch.enable_grad(), recomputing(model), tiles_of(model, 3):
            states = hidden_states(model, whole)
            for inputs in kept_by(model):
                inputs.settle()
            found = states[last].detach().float()
            del states
    except QloraError:
        raise
    except Exception as error:  # a tensor of the wrong shape fails wherever the family's code first meets it
        if ran_out_of_memory(error):
            raise
        raise _boundary_error(model, rows, at_once, f"{type(error).__name__}: {first_line(error)}") from error
    difference, largest = (found - plain).abs().max().item(), plain.abs().max().item()
    rounding = (again - plain.repeat(4, 1, 1)).abs().max().item()
    coarsest = max(torch.finfo(values.dtype).eps for values in model.parameters() if values.is_floating_point())
    if not difference <= max(1e-3 * largest, 4 * coarsest * largest, 4 * rounding):
        found_text = (
            f"hidden states of up to {largest:.3g} differ by {difference:.3g}, where rounding gives {rounding:.1g}"
        )
        raise _boundary_error(model, rows, at_once, found_text)


def _boundary_error(model: nn.Module, rows: int, at_once: int, found: str) -> ModelError:
    """``found`` with what it means and what to do. Rows that fit at once are not cut, which is the cheaper way out."""
    do = "training.recompute=none"
    if rows > at_once:
        do = f"training.accumulation=micro_batch_major, or {do} if that is refused too"
    if any(isinstance(module, TiledMLP) for module in model.modules()):
        do = f"memory.mlp_tile=null, or {do} if that is refused too"
    return ModelError(
        f"The layers of this {anatomy.kind(model)} model do not answer behind the recompute boundary as they do alone "
        f"({rows} rows, {at_once} at once: {found}), so its gradients would be wrong; set {do}."
    )
