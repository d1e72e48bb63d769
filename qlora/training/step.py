"""A step: rows become gradients, and gradients change the parameters. This is the page that is "the loop".

    rows ─► micro-batches ─► summed loss ─► · scale / denominator ─► backward ─► .grad
    .grad ─► norm ─► clipped ─► optimizer ─► fp32 masters ─► parameters

The loss is summed, and divided once by what counts in the whole step (``objectives/``), so the split into micro-batches
changes nothing. Random draws come from (seed, step) alone: nothing to save, and an evaluation in between changes nothing.

What can go wrong on the way (memory, overflow, NaN) is not handled here: ``recover.py`` is around it.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor

from qlora.data import Row
from qlora.errors import ModelError
from qlora.model import anatomy
from qlora.training.objectives import Objective
from qlora.training.state import TrainState


def gradients(state: TrainState, objective: Objective, rows: Sequence[Row]) -> float:
    """Fill ``.grad`` with the gradient of these rows' mean loss, times ``state.loss_scale``; return the mean loss.

    The mean is the summed loss over ``objective.denominator(rows)``; what a method adds to it (AdaLoRA's penalty) is in
    the gradient and not in the loss that is returned.
    """
    model, denominator = state.model, objective.denominator(rows)
    losses: list[Tensor] = []
    model.model.train()
    try:
        with random_draws(state):
            for micro_batch in state.way.micro_batches(rows):
                loss = objective.loss(micro_batch, state.way.loss_chunk)
                if not loss.requires_grad:
                    raise ModelError(
                        f"The loss of this {anatomy.kind(model.model)} model does not reach what trains: its layers compute without "
                        "a gradient. Take another model, or another method."
                    )
                (loss * (state.loss_scale / denominator)).backward()  # type: ignore[no-untyped-call]
                losses.append(loss.detach())
            penalty = model.penalty()
            if penalty is not None:
                (penalty * state.loss_scale).backward()  # type: ignore[no-untyped-call]
    finally:
        model.model.eval()
    return (
        sum(torch.stack(losses).tolist()) / denominator
    )  # read once: each look waits for all that was launched before


def unscale(state: TrainState) -> float:
    """Divide ``.grad`` by the loss scale; return the L2 norm of all gradients together."""
    found = _grads(state)
    if state.loss_scale != 1.0:
        torch._foreach_div_(found, state.loss_scale)
    return total_norm(found)


def update(state: TrainState, learning_rate: float, norm: float) -> None:
    """Clip the gradients, whose norm is ``norm``, and let the optimizer change the parameters."""
    for group in state.optimizer.param_groups:
        group["lr"] = learning_rate * group["ratio"]
    if state.training.max_grad_norm is not None:
        parameters = [p for p in state.parameters.values() if p.grad is not None]
        whole = torch.tensor(norm, device=state.model.device)
        torch.nn.utils.clip_grads_with_norm_(parameters, state.training.max_grad_norm, whole)
    move(state)


def move(state: TrainState) -> None:
    """Let the optimizer change the parameters, by the gradients that they have."""
    state.masters.follow()
    state.masters.take_gradients()
    state.optimizer.step()
    state.masters.hand_over()


def total_norm(grads: list[Tensor]) -> float:
    """The L2 norm of all gradients together, in fp32: torch's own is rounded to the gradients' dtype, bf16's three digits."""
    if not grads:
        return 0.0
    norms = torch._foreach_norm(grads, 2, torch.float32)
    return float(torch.linalg.vector_norm(torch.stack(norms)))


def _grads(state: TrainState) -> list[Tensor]:
    return [p.grad for p in state.parameters.values() if p.grad is not None]


@contextmanager
def random_draws(state: TrainState) -> Iterator[None]:
    """Inside, torch draws from (seed, step); outside, as if nothing had been drawn."""
    device, seed = state.model.device, state.training.seed
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        torch.manual_seed((seed * 0x9E3779B97F4A7C15 + state.step * 0xD1B54A32D192ED03 + 1) % 2**63)
        yield
