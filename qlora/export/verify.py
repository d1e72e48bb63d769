"""An export that lies there, against the merge made anew: every tensor of it, one at a time.

Knows checkpoints and the stream of merged tensors; what the model answers is measured elsewhere.
"""

from __future__ import annotations

import math
from pathlib import Path

import torch

from qlora.errors import DiffersError, listed
from qlora.export.source import Source
from qlora.machine.device import DTYPES, trim_heap
from qlora.model.checkpoint import Checkpoint
from qlora.model.names import packed_parts

STEPS = 2.0  # of the dtype, that a number may be off
FEW = 1e-3  # of a tensor's numbers may be off by more: another machine may take the other of two 4-bit codes at a tie


def verify(source: Source, folder: Path) -> int:
    """How many tensors of ``folder`` are the merge's own, of the base that its note names.

    Those that are packed in 4 bits are counted and not compared: other codes may answer alike. Raises DiffersError, which
    names the tensors that are missing, too many, of another shape, or of which more than ``FEW`` are off.
    """
    checkpoint = Checkpoint(folder, str(folder))
    note = checkpoint.merge
    original = note.get("weights") == "original"
    dtype = DTYPES[str(note.get("dtype", "bf16"))]
    promised = {name: entry for file in source.promise(dtype).values() for name, entry in file.items()}
    packed = {name: packed_parts(name, checkpoint) for name in promised}
    there = checkpoint.entries.keys() - {part for parts in packed.values() for part in parts}
    wrong = dict.fromkeys(promised.keys() ^ there, math.inf)
    for name, (kind, shape) in promised.items():
        if name in wrong or packed[name]:
            continue
        found = checkpoint.read(name)
        if found.dtype != kind or found.shape != torch.Size(shape):
            wrong[name] = math.inf
            continue
        expected = source.tensor(name, kind, requantise=not original).cpu().double()
        steps = torch.finfo(kind).eps * (expected.abs() + FEW * expected.abs().max()) if kind.is_floating_point else 0.0
        off = ~((found.double() - expected).abs() <= STEPS * steps)  # what is no number is off too
        if found.numel() and off.double().mean() > FEW:
            wrong[name] = off.double().mean().item()
        trim_heap()
    if wrong:
        worst = sorted(wrong, key=lambda name: -wrong[name])
        raise DiffersError(
            f"'{folder}' is not what this run merges to: {listed(worst)} differ ({len(wrong)} of {len(promised)} tensors). Export it "
            "again; if it was copied, the copy is damaged."
        )
    return len(promised)
