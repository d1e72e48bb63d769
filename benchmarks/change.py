"""How long it takes to say what fine-tuning did to the weights of a run, and how much memory.

    python -m qlora.quickstart
    qlora train recipes/docstrings.yaml                              # LoRA of rank 16 on every linear, on NF4
    qlora train recipes/methods/full.yaml folder=runs/full           # every weight
    python benchmarks/change.py runs/docstrings runs/full

A line a run: without intruders and with them, and what both needed beside the loaded model. Then what became of the weights.
Beside it, of the widest matrix that full fine-tuning changed in its first layer: how much of the change a randomised SVD of as many
directions as half its smaller side holds, and its time beside that of all singular values.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

import qlora
from qlora.evaluation.change import matrices_of
from qlora.evaluation.spectrum import norm, singular_values
from qlora.machine.device import peak_since_reset, reset_peak_memory
from qlora.machine.disk import bytes_text


def timed(work: Callable[[], Any]) -> tuple[Any, float]:
    """(what it gives, seconds)."""
    begin = time.perf_counter()
    return work(), time.perf_counter() - begin


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="+", type=Path)
    for run in parser.parse_args().runs:
        model = qlora.load_run(run, quiet=True)
        reset_peak_memory(model.device)
        before = peak_since_reset(model.device)
        _, plain = timed(lambda model=model: qlora.change_of(model, intruders=False))
        more = peak_since_reset(model.device) - before
        found, whole = timed(lambda model=model: qlora.change_of(model))
        print(
            f"## {run.name}: {model.section.name} on {model.base.name} ({model.base.quantization}), {len(found.matrices)} "
            f"matrices, {torch.get_num_threads()} threads\n\n{plain:.1f} s and {bytes_text(more)} beside the model; with "
            f"intruders {whole:.1f} s and {bytes_text(peak_since_reset(model.device) - before)}.\n\n{found}\n"
        )
        wide = max((one for one in found.matrices if one.layer == 0), key=lambda one: one.rows * one.columns)
        matrix = next(one for one in matrices_of(model) if one.path == wide.path)
        if matrix.pair is None:
            delta, half = matrix.delta(matrix.before()), min(wide.rows, wide.columns) // 2
            _, exact = timed(lambda delta=delta: singular_values(delta))
            sketch, rough = timed(lambda delta=delta, half=half: torch.svd_lowrank(delta, q=half, niter=2)[1])
            held = float(sketch.square().sum()) / norm(delta) ** 2
            print(
                f"{wide.path} [{wide.rows}, {wide.columns}]: all values in {exact * 1e3:.0f} ms; torch.svd_lowrank of {half} "
                f"holds {held:.1%} of the energy in {rough * 1e3:.0f} ms.\n"
            )


if __name__ == "__main__":
    main()
