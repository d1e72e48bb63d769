"""A step: rows become gradients, and gradients change the parameters. This is the page that is "the loop".

    rows ─► this process's share ─► micro-batches ─► summed loss ─► · scale / denominator ─► backward ─► .grad
    .grad ─► summed over all processes ─► norm ─► clipped ─► optimizer ─► fp32 masters ─► parameters

The loss is summed, and divided once by what counts in the whole step (``objectives/``), so the split into processes and
micro-batches changes nothing. Random draws come from (seed, step, the place of a micro-batch's first row in the step) alone:
nothing to save, an evaluation in between changes nothing, and a row by itself draws the same in whichever process.

What can go wrong on the way (memory, overflow, NaN) is not handled here: ``recover.py`` is around it.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress

import torch
from torch import Tensor, nn

from qlora.data.packing import Row
from qlora.errors import ModelError
from qlora.model import anatomy
from qlora.residence.boundary import drawn_by_row, draws
from qlora.training.masters import is_narrow
from qlora.training.objectives import Objective
from qlora.training.state import TrainState

ALL = slice(None)


def gradients(state: TrainState, objective: Objective, rows: Sequence[Row], mine: slice = ALL) -> float:
    """Fill ``.grad`` with what ``mine`` of a step's rows bring to the gradient of the step's mean loss, times
    ``state.loss_scale``; return what they bring to the mean loss.

    The mean is the summed loss over ``objective.denominator(rows)``; what a method adds to it (AdaLoRA's penalty) is in
    the gradient and not in the loss that is returned.
    """
    model, denominator = state.model, objective.denominator(rows)
    losses: list[Tensor] = []
    model.model.train()
    try:
        first, micro_batches = mine.start or 0, state.way.micro_batches(rows[mine])
        for micro_batch in micro_batches:
            with random_draws(state, first), state.heap:
                loss = objective.loss(micro_batch, state.way.loss_chunk)
                if not loss.requires_grad:
                    raise ModelError(
                        f"The loss of this {anatomy.kind(model.model)} model does not reach what trains: its layers compute without "
                        "a gradient. Take another model, or another method."
                    )
                (loss * (state.loss_scale / denominator)).backward()  # type: ignore[no-untyped-call]
                losses.append(loss.detach())
            first += len(micro_batch)
        for _ in range(_missing(state, len(rows), len(micro_batches))):
            (objective.loss(rows[:1], state.way.loss_chunk) * 0.0).backward()  # type: ignore[no-untyped-call]
        penalty = model.penalty() if state.processes.main else None  # once in the sum
        if penalty is not None:
            (penalty * state.loss_scale).backward()  # type: ignore[no-untyped-call]
        state.settle()  # of the last layer the gradients are still to be added up
    finally:
        model.model.eval()
    return sum(torch.stack(losses).tolist()) / denominator if losses else 0.0  # read once: each look waits for the GPU


def _missing(state: TrainState, rows: int, micro_batches: int) -> int:
    """How often a process with a small share of ``rows`` goes through the model for the sake of the others."""
    if not state.lockstep:
        return 0
    return len(state.way.micro_batches(range(state.processes.most(rows)))) - micro_batches


def add_up(state: TrainState, reached: Sequence[bool]) -> None:
    """Sum ``.grad`` over all processes. ``reached`` says of each parameter whether it has one in any of them."""
    grads = []
    for name, p in itertools.compress(state.parameters.items(), reached):
        if state.is_apart(name):  # its owner has the sum
            continue
        if p.grad is None:
            p.grad = torch.zeros_like(p, dtype=torch.float32 if is_narrow(p) else p.dtype)
        grads.append(p.grad)
    state.processes.sum(grads)


def unscale(state: TrainState) -> float:
    """Divide ``.grad`` by the loss scale; return the L2 norm of all gradients together."""
    found = {name: p.grad for name, p in state.parameters.items() if p.grad is not None}
    if state.loss_scale != 1.0:
        torch._foreach_div_(list(found.values()), state.loss_scale)
    norm = total_norm([grad for name, grad in found.items() if not state.is_apart(name)])
    if state.shares is None or state.shares.layers is None:
        return norm
    mine = total_norm([grad for name, grad in found.items() if state.is_apart(name)])
    return math.hypot(norm, *(other for (other,) in state.processes.gather(mine)))


def update(state: TrainState, learning_rate: float, norm: float) -> None:
    """Clip the gradients, whose norm is ``norm``, and let the optimizer change the parameters."""
    for group in state.optimizer.param_groups:
        group["lr"] = learning_rate * group["ratio"]
    if state.training.max_grad_norm is not None:
        parameters = [p for p in state.parameters.values() if p.grad is not None]
        whole = torch.tensor(norm, device=state.model.device)
        torch.nn.utils.clip_grads_with_norm_(parameters, state.training.max_grad_norm, whole)
    move(state)
    if state.shares is not None:
        state.shares.hand_round(state.parameters)


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


def _layers(state: TrainState) -> Iterable[nn.Module]:
    """The decoder layers, if anything draws; none where the model has no list of them, and so no boundaries either."""
    with suppress(ModelError):
        return anatomy.layers(state.model.model) if draws(state.model.model) else ()
    return ()


@contextmanager
def random_draws(state: TrainState, first: int = 0) -> Iterator[None]:
    """Inside, torch draws from (seed, step, place of the ``first`` row); outside, as if nothing had been drawn."""
    device = state.model.device
    with (
        torch.random.fork_rng(devices=[device] if device.type == "cuda" else []),
        drawn_by_row(state.training.seed, state.step, first, device, _layers(state)),
    ):
        yield
