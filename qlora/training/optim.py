"""The optimizer, its schedule, and how its state is written down.

Knows AdamW in torch's and bitsandbytes' forms; must not know the model, the data or the loop.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import bitsandbytes
import torch
from torch import Tensor, nn

from qlora.errors import RunError, listed
from qlora.recipe import TrainingSection

EIGHT_BIT_FROM = 4096  # numbers in a matrix from which bitsandbytes' 8-bit AdamW keeps its moments in 8 bits
BITSANDBYTES_STEP, EIGHT_BIT_STEP = 12, 20
"""Bytes that bitsandbytes' AdamW on a CPU takes for each number of a parameter during a step, measured."""


def make_optimizer(
    parameters: Mapping[str, nn.Parameter], section: TrainingSection, ratios: Mapping[str, float] | None = None
) -> torch.optim.Optimizer:
    """AdamW as the recipe names it, over ``parameters``; matrices decay, vectors do not.

    ``ratios`` says how many times the recipe's learning rate a parameter learns with; its group keeps that as ``ratio``.
    They are in fp32: masters (``masters.py``), where the model computes in 16 bits. torch's own AdamW takes them all at once;
    bitsandbytes', which waits for the GPU after each of them, is there for states in 8 bits or paged.
    """
    sorted_in: dict[tuple[bool, float], list[nn.Parameter]] = {}
    for name, values in parameters.items():
        sorted_in.setdefault((values.dim() <= 1, (ratios or {}).get(name, 1.0)), []).append(values)
    groups = [
        {
            "params": sorted_in[vectors, ratio],
            "weight_decay": 0.0 if vectors else section.weight_decay,
            "lr": section.learning_rate * ratio,
            "ratio": ratio,
        }
        for vectors, ratio in sorted(sorted_in)
    ]
    options: dict[str, Any] = {"lr": section.learning_rate, "betas": section.betas, "eps": section.epsilon}
    if section.optimizer == "adamw":
        return torch.optim.AdamW(groups, **options, fused=True)
    kinds = {
        "adamw_8bit": bitsandbytes.optim.AdamW8bit,
        "paged_adamw": bitsandbytes.optim.PagedAdamW32bit,
        "paged_adamw_8bit": bitsandbytes.optim.PagedAdamW8bit,
    }
    return kinds[section.optimizer](groups, **options)  # type: ignore[no-any-return]


def learning_rate(section: TrainingSection, step: int, total: int) -> float:
    """The learning rate of step ``step`` (from 0) of ``total``.

    Warm-up rises from peak / w at step 0 to the peak at step w - 1; the decay begins there and would reach zero at
    ``total``. Without warm-up this is transformers' schedule of the same name.
    """
    warm = round(section.warmup_fraction * total)
    if step < warm:
        return section.learning_rate * (step + 1) / warm
    done = (step - warm) / max(1, total - warm)
    if section.schedule == "linear":
        return section.learning_rate * (1 - done)
    if section.schedule == "cosine":
        return section.learning_rate * 0.5 * (1 + math.cos(math.pi * done))
    return section.learning_rate


@contextmanager
def steps_taken_back(optimizer: Any, parameters: Iterable[Tensor]) -> Iterator[int]:
    """Inside, steps may be taken; afterwards the values and the optimizer's state are, bit for bit, what they were.

    Yields how many bytes of host memory the copies take: host, so that they do not count on a GPU. They are put back in
    place, since bitsandbytes never gives back a paged state: one that was new is emptied, and is as new again.
    """
    every = list(parameters)
    values = [p.detach().to("cpu", copy=True) for p in every]
    states = {
        p: {key: v.to("cpu", copy=True) if isinstance(v, Tensor) else v for key, v in state.items()}
        for p, state in optimizer.state.items()
    }
    kept = [*values, *(v for state in states.values() for v in state.values() if isinstance(v, Tensor))]
    # full fine-tuning tells by torch's counts of writes whether its weights have moved
    with torch.autograd._unsafe_preserve_version_counter(tuple(every)):
        try:
            yield sum(tensor.nbytes for tensor in kept)
        finally:
            for device in {p.device for p in every if p.is_cuda}:
                torch.cuda.synchronize(device)  # a paged state is written from here, behind the stream's back
            with torch.no_grad():
                for p, before in zip(every, values, strict=True):
                    p.copy_(before)
                for p, state in list(optimizer.state.items()):
                    _put_back(state, states[p]) if p in states else _empty(optimizer, p)


def _put_back(state: dict[str, Any], before: dict[str, Any]) -> None:
    for key, value in before.items():
        if isinstance(value, Tensor):
            state[key].copy_(value)
        else:
            state[key] = value


def _empty(optimizer: Any, parameter: nn.Parameter) -> None:
    state = optimizer.state[parameter]
    if not any(getattr(value, "is_paged", False) for value in state.values()):
        del optimizer.state[parameter]
        return
    for key, value in state.items():
        if not isinstance(value, Tensor):
            state[key] = 0
        elif not key.startswith("qmap"):
            value.zero_()


@torch.no_grad()
def make_state(optimizer: torch.optim.Optimizer, parameters: Iterable[nn.Parameter]) -> None:
    """Give every parameter the optimizer state that it has from the first step on, by a step without a gradient.

    One after the other, so that no more than one gradient is there at a time. Weight decay changes the parameters.
    """
    for values in parameters:
        if not optimizer.state.get(values):
            values.grad = torch.zeros_like(values)
            optimizer.step()  # skips what has no gradient
            values.grad = None


def optimizer_tensors(optimizer: Any, parameters: Mapping[str, nn.Parameter]) -> dict[str, Tensor]:
    """The optimizer's state as plain tensors: ``<parameter name>/<what>``, such as ``….lora_A/exp_avg``.

    Quantisation maps are constants of bitsandbytes and are left out; step counts become int64 or fp32 scalars.
    """
    tensors: dict[str, Tensor] = {}
    for name, parameter in parameters.items():
        for key, value in optimizer.state.get(parameter, {}).items():
            if key.startswith("qmap"):
                continue
            tensor = value if isinstance(value, Tensor) else torch.tensor(value)
            tensors[f"{name}/{key}"] = tensor.detach().to("cpu", copy=True).contiguous()
    return tensors


def load_optimizer_tensors(
    optimizer: Any, parameters: Mapping[str, nn.Parameter], tensors: Mapping[str, Tensor]
) -> None:
    """Put back what ``optimizer_tensors`` gave.

    bitsandbytes' own ``load_state_dict`` moves paged states to ordinary device memory (bitsandbytes#782); here its
    buffers are made as its first step makes them, paged where it pages, and filled by copying. Raises RunError when the
    state is of other parameters or of another optimizer.
    """
    found: dict[str, dict[str, Tensor]] = {}
    for key, tensor in tensors.items():
        name, _, what = key.rpartition("/")
        found.setdefault(name, {})[what] = tensor
    if unknown := [name for name in found if name not in parameters]:
        raise RunError(
            f"The optimizer state is of other parameters: {listed(unknown)}; resume with the run's own recipe."
        )
    places = {p: (g, i) for g, group in enumerate(optimizer.param_groups) for i, p in enumerate(group["params"])}
    optimizer.state.clear()
    for name, values in found.items():
        parameter = parameters[name]
        state = optimizer.state[parameter]
        if hasattr(optimizer, "init_state"):
            if not optimizer.initialized:
                optimizer.check_overrides()
                optimizer.initialized = True
            group, index = places[parameter]
            optimizer.init_state(optimizer.param_groups[group], parameter, group, index)
        else:
            count = torch.zeros((), device=parameter.device)  # where the fused kernel reads it
            state.update(step=count, exp_avg=torch.zeros_like(parameter), exp_avg_sq=torch.zeros_like(parameter))
        expected = {key for key in state if not key.startswith("qmap")}
        if expected != set(values):
            raise RunError(
                f"The optimizer state holds {listed(sorted(values))} for {name}, but this optimizer keeps "
                f"{listed(sorted(expected))}; resume with the optimizer that the run began with."
            )
        for key, value in values.items():
            if isinstance(state[key], Tensor):
                if state[key].shape != value.shape:
                    raise RunError(
                        f"The optimizer state {key} of {name} has the shape {list(value.shape)} instead of "
                        f"{list(state[key].shape)}; resume with the run's own recipe."
                    )
                state[key].copy_(value)
            else:
                state[key] = type(state[key])(value.item())


def quiet_paging() -> None:
    """bitsandbytes warns once a run that the CPU has no paging; the plan says it already."""
    warnings.filterwarnings("ignore", message="Paged optimizers are not supported on CPU")


def state_bytes(count: int, optimizer: str) -> int:
    """Bytes of the two moments of ``count`` numbers: in fp32, or in 8 bits with an fp32 scale for each block of 256.

    bitsandbytes keeps the moments of matrices below ``EIGHT_BIT_FROM`` numbers in 32 bits.
    """
    eight = optimizer.endswith("8bit") and count >= EIGHT_BIT_FROM
    return 2 * count + 8 * -(-count // 256) if eight else 8 * count


def step_bytes(parameters: Iterable[Tensor], optimizer: str, device: str) -> int:
    """What AdamW takes for itself during a step, beyond its moments; ``device`` is "cpu" or "cuda".

    On a CPU bitsandbytes' takes some numbers for each one of a parameter, and goes over one parameter after the other. Its
    kernels on a GPU take nothing, and nor does torch's fused one.
    """
    if optimizer == "adamw" or device != "cpu":
        return 0
    each = EIGHT_BIT_STEP if optimizer.endswith("8bit") else BITSANDBYTES_STEP
    return each * max((p.numel() for p in parameters), default=0)
